"""Tars, parquet files and saved data sets: the same pictures as a folder's, an index built once, broken parts by name."""

import io
import json
import random
import shutil
import tarfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from xfusion.data import shards, tars
from xfusion.data.mixture import Mixture, MixtureConfig, order_of
from xfusion.data.order import Order
from xfusion.data.result_cache import ResultCache
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import check, open_source
from xfusion.modalities.image import ImageModality

COUNT = 12


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


def png(number: int) -> bytes:
    file = io.BytesIO()
    pixels = random.Random(number).randbytes(16 * 12 * 3)  # noise does not shrink: a cut file has lost pixels
    Image.frombytes("RGB", (16, 12), pixels).save(file, "PNG")
    return file.getvalue()


def words(number: int) -> list[str]:
    return [f"card {number}", f"number {number}"]


def write_tar(path: Path, numbers, *, pictures=png, as_json=False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            row = as_json(number) if callable(as_json) else {"captions": words(number)}
            text = json.dumps(row) if as_json else "\n".join(words(number))
            words_name = f"{number:03d}.{'json' if as_json else 'txt'}"
            for name, content in ((f"{number:03d}.png", pictures(number)), (words_name, text.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_parquet(path: Path, numbers, *, group=3, struct=True, pictures=png, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": pictures(n), "path": f"{n}.png"} if struct else pictures(n) for n in numbers]
    table = pa.table({"image": images, "captions": [words(n) for n in numbers], "other": list(numbers)})
    parquet.write_table(table, path, row_group_size=group, **options)
    return path


def write_folder(path: Path, numbers) -> Path:
    path.mkdir()
    for number in numbers:
        (path / f"{number:03d}.png").write_bytes(png(number))
        (path / f"{number:03d}.txt").write_text("\n".join(words(number)))
    return path


def write_dataset(path: Path, numbers) -> Path:
    import datasets

    rows = {"image": [{"bytes": png(n), "path": None} for n in numbers], "captions": [words(n) for n in numbers]}
    features = datasets.Features({"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(path))
    return path


def contents(source):
    return [(e.captions, e.group, source.picture(i, 8).tobytes()) for i, e in enumerate(source.examples)]


# -------------------------------------------------------------------------------------------------------- equal content


@pytest.mark.parametrize("kind", ["tar", "tar with json", "tars", "pattern", "parquet", "bytes", "dataset"])
def test_shards_hold_what_a_folder_holds(tmp_path, kind):
    """Captions, groups and pixels, in the order of the shards."""
    expected = contents(open_source(write_folder(tmp_path / "plain", range(COUNT))))
    if kind.startswith("tar") and kind != "tars":
        spec = write_tar(tmp_path / "a.tar", range(COUNT), as_json="json" in kind)
    elif kind in ("tars", "pattern"):
        for number in range(3):
            write_tar(tmp_path / "shards" / f"{number:03d}.tar", range(4 * number, 4 * number + 4))
        spec = tmp_path / "shards" if kind == "tars" else str(tmp_path / "shards" / "{000..002}.tar")
    elif kind == "dataset":
        spec = write_dataset(tmp_path / "saved", range(COUNT))
    else:
        spec = write_parquet(tmp_path / "a.parquet", range(COUNT), struct=kind == "parquet")
    found = contents(open_source(spec))
    assert len(found) == COUNT and found == expected
    assert contents(open_source(spec)) == expected  # out of the index


@pytest.mark.parametrize("kind", ["parquet", "dataset", "tar"])
def test_questions_stand_in_shards_and_in_their_index(tmp_path, cache, kind):
    rows = {
        "image": [{"bytes": png(n), "path": None} for n in range(3)],
        "caption": ["0", "1", "2"],
        "question": ["How many?", None, "Which?"],
    }
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.table(rows), path)
    elif kind == "dataset":
        import datasets

        datasets.Dataset.from_dict(rows).save_to_disk(path)
    else:
        write_tar(path, range(3), as_json=lambda n: {"caption": str(n), "question": rows["question"][n]})
    for _ in range(2):  # read, and out of the index
        found = open_source(path).examples
        assert [(e.question, e.captions[0]) for e in found] == [("How many?", "0"), ("", "1"), ("Which?", "2")]
    assert list(cache.glob("*.jsonl"))


def test_an_index_is_built_once_and_again_when_the_shard_changes(tmp_path, cache, monkeypatch):
    path, built, tar = write_tar(tmp_path / "a.tar", range(3)), [], tars.records
    monkeypatch.setattr(tars, "records", lambda p, *how: built.append(p) or tar(p, *how))
    for _ in range(3):
        assert len(open_source(path)) == 3
    assert len(built) == 1 and len(list(cache.iterdir())) == 1
    write_tar(path, range(5))
    assert len(open_source(path)) == 5 and len(built) == 2


def test_an_index_that_cannot_be_kept_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XFUSION_CACHE", str(write_tar(tmp_path / "file.tar", [0])))
    assert len(open_source(write_tar(tmp_path / "a.tar", range(3)))) == 3
    assert "its index cannot be kept" in caplog.text


@pytest.mark.parametrize("damage", ["empty", "first line", "half", "zeros", "no records"])
def test_an_index_that_a_power_cut_left_is_built_anew(tmp_path, cache, caplog, damage):
    """Else its examples would be gone, without a word, for as long as the index stays."""
    path = write_tar(tmp_path / "a.tar", range(3))
    expected = contents(open_source(path))
    (index,) = cache.iterdir()
    whole = index.read_bytes()
    lines = whole.splitlines(keepends=True)
    index.write_bytes(
        {
            "empty": b"",
            "first line": lines[0],
            "half": b"".join(lines[:3]),
            "zeros": whole[:50] + bytes(len(whole) - 50),
            "no records": b"[]\n" * len(lines),
        }[damage]
    )
    assert contents(open_source(path)) == expected
    assert f"its index {index} cannot be read" in caplog.text and index.read_bytes() == whole


def test_shards_of_one_name_are_told_apart_by_their_folders(tmp_path):
    """With the same keys and the same words; ids of shards that share no name stay as they are."""
    for folder, numbers in (("a", range(2)), ("b/c", range(2, 4))):
        write_tar(
            tmp_path / "shards" / folder / "000.tar",
            range(2),
            pictures=lambda n, own=numbers: png(own[n]),
            as_json=lambda n: {"caption": "a card"},
        )
    write_tar(tmp_path / "shards" / "b" / "001.tar", [0])
    source = open_source(tmp_path / "shards")
    two = ["a/000.tar/000", "a/000.tar/001", "001.tar/000", "b/c/000.tar/000", "b/c/000.tar/001"]
    assert sorted(e.id for e in source.examples) == sorted(two)
    at = {e.id: i for i, e in enumerate(source.examples)}
    with Image.open(io.BytesIO(png(3))) as picture:
        assert (
            source.picture(at["b/c/000.tar/001"], 12).tobytes() == picture.convert("RGB").crop((2, 0, 14, 12)).tobytes()
        )


# -------------------------------------------------------------------------------------------------------------- broken


def test_a_broken_member_is_named_and_left_out_only_if_allowed(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", range(10), pictures=lambda n: png(n)[:200] if n == 3 else png(n))
    with pytest.raises(XFusionError, match=r"1 of 10 examples are bad: .*a\.tar/003: is cut short.*a share of 0\.1"):
        open_source(path)
    source = open_source(path, allow_bad=0.1)
    assert [e.captions[0] for e in source.examples] == [f"card {n}" for n in range(10) if n != 3]
    assert "left out 1 of 10" in caplog.text
    assert check(path).counts == {"broken picture": 1}


def test_a_broken_header_is_told_with_its_bytes_and_reading_goes_on_behind_it(tmp_path):
    path = write_tar(tmp_path / "a.tar", range(10))
    with tarfile.open(path) as tar:
        offset = tar.getmember("004.png").offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 512] = b"x" * 512
    path.write_bytes(content)
    with pytest.raises(
        XFusionError, match=rf"2 of 11 .*no picture among txt.*bytes {offset} to \d+ belong to no member"
    ):
        open_source(path)
    source = open_source(path, allow_bad=0.2)
    assert [e.captions[0] for e in source.examples] == [f"card {n}" for n in range(10) if n != 4]


def test_a_truncated_tar_names_the_member_that_it_ends_in(tmp_path):
    path = write_tar(tmp_path / "a.tar", range(10))
    with tarfile.open(path) as tar:
        end = tar.getmember("009.png").offset_data + 100
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(XFusionError, match=r"1 of 10 .*a\.tar/009\.png: needs \d+ bytes, the file ends before"):
        open_source(path)
    assert len(open_source(path, allow_bad=0.1)) == 9


def test_broken_parquet_is_named(tmp_path):
    path = write_parquet(tmp_path / "p" / "a.parquet", range(10))
    shutil.copy(path, tmp_path / "p" / "b.parquet")
    content = path.read_bytes()
    (tmp_path / "p" / "b.parquet").write_bytes(content[: len(content) // 2])
    # It counts as the rows that the other file has in as many bytes.
    for _ in range(2):  # from the index, too
        with pytest.raises(XFusionError, match=r"5 of 15 .*b\.parquet: cannot be read as parquet.*a share of 0\.34"):
            open_source(tmp_path / "p", allow_bad=0.3)
    assert len(open_source(tmp_path / "p", allow_bad=0.34)) == 10


def test_a_gap_in_a_tar_counts_as_the_members_that_it_held(tmp_path):
    path = write_tar(tmp_path / "a.tar", range(20))
    with tarfile.open(path) as tar:
        start, end = tar.getmember("004.png").offset, tar.getmember("012.png").offset
    content = bytearray(path.read_bytes())
    content[start:end] = b"x" * (end - start)
    path.write_bytes(content)
    report = check(path)
    assert len(report.source) == 12 and report.num_examples == pytest.approx(20, abs=1)
    assert report.num_bad == report.num_examples - 12 and report.counts["broken shard"] == 1


def test_what_lies_beside_shards_and_is_not_read_is_noted(tmp_path):
    write_tar(tmp_path / "data" / "one.tar", range(3))
    assert check(str(tmp_path / "data")).notes == ()
    write_parquet(tmp_path / "data" / "sub" / "two.parquet", range(3))
    (tmp_path / "data" / "photo.png").write_bytes(png(7))
    (tmp_path / "data" / "photo.txt").write_text("a photo")
    report = check(str(tmp_path / "data"))
    assert report.num_examples == 3
    assert report.notes == ("2 files beside the shards were not read: photo.png, sub/two.parquet",)


def test_a_shard_that_a_range_names_and_the_folder_lacks_is_an_error(tmp_path):
    for number in (0, 2):
        write_tar(tmp_path / f"{number:03d}.tar", range(number, number + 2))
    with pytest.raises(XFusionError, match=r"there is no .*001\.tar: name the shards that exist"):
        open_source(str(tmp_path / "{000..002}.tar"))
    assert len(open_source(str(tmp_path / "{000,002}.tar")).examples) == 4
    assert len(open_source(str(tmp_path / "*.tar")).examples) == 4


def test_links_and_captions_that_are_there_twice_are_told(tmp_path):
    write_tar(tmp_path / "one.tar", range(2))
    with tarfile.open(tmp_path / "one.tar", "a") as tar:
        link = tarfile.TarInfo("linked.png")
        link.type, link.linkname = tarfile.LNKTYPE, "000.png"
        tar.addfile(link)
        newer = tarfile.TarInfo("001.txt")
        newer.size = 4
        tar.addfile(newer, io.BytesIO(b"anew"))
    report = check(str(tmp_path / "one.tar"))
    told = " ".join(report.problems)
    assert "linked.png is a link, which is not read" in told and "001.txt is there twice: remove one" in told
    assert report.num_bad == 2 and report.num_examples == 3


def test_names_in_a_tar_that_leave_it_or_break_a_line_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("good", "new\nline", "../../out", "back\x08"):
            for suffix, content in (("png", png(1)), ("txt", b"a card")):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    report = check(path)
    assert [example.id for example in report.source.examples] == ["a.tar/good"]
    assert report.counts == {"invalid name": 2, "path outside": 1} and report.num_bad == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "no state"])
def test_a_broken_saved_data_set_is_named(tmp_path, damage):
    path = write_dataset(tmp_path / "saved", range(40))
    (arrow,) = path.glob("*.arrow")
    if damage == "no state":
        (path / "state.json").write_text("{")
    elif damage == "gone":
        arrow.unlink()
    else:
        arrow.write_bytes(arrow.read_bytes()[: arrow.stat().st_size // 2] if damage == "cut" else b"")
    with pytest.raises(
        XFusionError, match=r"1 of 1 examples are bad: .*saved: cannot be read as a saved data set"
    ) as error:
        open_source(path)
    assert "\n" not in str(error.value)
    assert check(path).counts == {"broken shard": 1}
    (path / "dataset_dict.json").write_text("{")
    with pytest.raises(XFusionError, match=r"dataset_dict\.json cannot be read"):
        open_source(path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf://datasets/org/name", "streams have no random access.*are read as hf:ORG/NAME; download what else"),
        ("https://host/a.tar", "streams have no random access"),
        ("a.tar.gz", "a compressed tar has no random access: unpack it"),
        ("org/name", "hf download org/name --repo-type dataset"),
        ("photos:weight=2", "photos:weight=2: a weight is for one of several sources: write photos:weight=2"),
        ("photos:weight=0+emoji", "'photos:weight=0' is no source with a weight"),
        ("photos:weight=many+emoji", "is no source with a weight"),
        ("emoji:weight=1.0001+emoji:weight=0.3333", "weights stand as 10001 : 3333"),
    ],
)
def test_what_has_no_random_access_is_refused_in_one_line(spec, message):
    with pytest.raises(XFusionError, match=message) as error:
        open_source(spec)
    assert "\n" not in str(error.value)


def test_columns_are_named_where_none_fits(tmp_path):
    parquet.write_table(pa.table({"a": [1], "caption": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(XFusionError, match="0 of its columns a, caption hold pictures"):
        open_source(tmp_path / "a.parquet")
    parquet.write_table(pa.table({"image": [b"x"], "words": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(XFusionError, match="none of its columns image, words is called caption, captions, text: say"):
        open_source(tmp_path / "b.parquet")


# --------------------------------------------------------------------------------------------------------------- order


def test_row_groups_are_shuffled_a_few_at_a_time(tmp_path):
    """Each epoch holds every picture once; GROUPS_TOGETHER groups are open, side by side, and orders differ."""
    source = open_source(write_parquet(tmp_path / "a.parquet", range(60), group=3))
    assert source.blocks == tuple(range(n, n + 3) for n in range(0, 60, 3))
    order = Order(source, 0)
    epochs = [list(order.take("draw", 60 * e, 60)) for e in range(3)]
    assert [sorted(e) for e in epochs] == [list(range(60))] * 3
    assert len({tuple(e) for e in epochs}) == 3
    window = 3 * shards.GROUPS_TOGETHER
    for epoch in epochs:
        assert all(len({i // 3 for i in epoch[s : s + window]}) == shards.GROUPS_TOGETHER for s in range(0, 60, window))
        assert len({i // 3 for i in epoch[:3]}) > 1  # and these are mixed
    assert list(Order(source, 0).take("draw", 75, 10)) == epochs[1][15:25]  # from anywhere, without a history


@pytest.fixture
def groups_read(monkeypatch):
    """Row groups that were read, in order; none is in memory at first, and few stay."""
    read, real = [], shards._row_group.make
    monkeypatch.setattr(shards._row_group, "max_results", 4)
    shards._row_group.clear()
    monkeypatch.setattr(shards._row_group, "make", lambda *key: read.append(key) or real(*key))
    return read


def test_reading_in_order_opens_each_row_group_once(tmp_path, groups_read):
    source = open_source(write_parquet(tmp_path / "a.parquet", range(60), group=3))
    shards._row_group.clear()
    groups_read.clear()
    for index in Order(source, 0).take("draw", 0, 60):
        source.picture(index, 8)
    assert len(groups_read) == len(set(groups_read)) == 20


def test_threads_that_want_one_row_group_read_it_once(tmp_path, groups_read):
    """All four at the same moment, of two groups; and no more are in memory than stay there."""
    source = open_source(write_parquet(tmp_path / "a.parquet", range(60), group=3))
    shards._row_group.clear()
    groups_read.clear()
    ready = threading.Barrier(4, timeout=30)
    slow = shards._row_group.make

    def reading(*key):
        time.sleep(0.05)  # so long that the others come, too
        return slow(*key)

    shards._row_group.make = reading  # the fixture puts the real one back

    def look(index):
        ready.wait()
        return source.picture(index, 8).tobytes()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(look, [0, 1, 2, 3]))
        assert len(groups_read) == 2
        assert found == [source.picture(index, 8).tobytes() for index in range(4)]
        list(pool.map(lambda index: source.picture(index, 8), range(60)))
    assert len(groups_read) == 20 and len(shards._row_group._futures) == shards._row_group.max_results == 4


def test_what_cannot_be_read_is_tried_again_and_told_to_all_who_wait():
    asked = []

    def make(key):
        asked.append(key)
        if len(asked) == 1:
            time.sleep(0.1)
            raise OSError("gone")
        return key

    one = ResultCache(make, 2)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(one, "a"), pool.submit(one, "a")]
        errors = [call.exception() for call in calls]
    # The second came while the first waited, or behind it and read by itself.
    assert isinstance(errors[0], OSError) and len(asked) + sum(isinstance(e, OSError) for e in errors) == 3
    assert one("a") == "a" and one("b") == "b" and one("c") == "c" and len(one._futures) == 2


def mixture(source, rank=0, count=1, **settings):
    """The batches of one of several processes: two epochs of 240 pictures in 15 steps, one to draw and one to caption."""
    image = ImageModality.Config(patch=4, sizes=(8,)).build()
    config = MixtureConfig(**{"draw": 16, "caption": 16, "pack": 2, **settings})

    def share(rows):
        return None if count == 1 else slice(rows * rank // count, rows * (rank + 1) // count)

    return Mixture(source, image, (8,), lambda text: tuple(map(ord, text)), (1,), 2, config, 0, share, decoders=1)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_process_reads_its_share_of_the_row_groups_and_decodes_the_pictures_of_its_own_rows(
    tmp_path, groups_read, count, monkeypatch
):
    """Twenty row groups; all processes read each of them once for either task between them."""
    monkeypatch.setattr("xfusion.data.mixture.TOKENS_KEPT", 1)  # no picture is still known from the other task
    source = open_source(write_parquet(tmp_path / "a.parquet", range(240), group=12))
    decoded, read, look = [], [], source.picture
    source.picture = lambda index, size: decoded.append(index) or look(index, size)
    for rank in range(count):
        shards._row_group.clear()
        groups_read.clear()
        made = mixture(source, rank, count)
        assert shards._row_group.max_results == (4, 6, 12)[2 // count]
        for step in range(15):
            made.batches(step)
        read.append(len(groups_read))
    # Its share of both epochs, and nothing twice; fewer where one task finds a group that the other has just read.
    assert max(read) <= 40 // count and sum(read) > 20
    assert set(decoded) == set(range(240)) and 470 < len(decoded) <= 480


def test_batches_do_not_depend_on_the_number_of_processes(tmp_path):
    """Each process's own rows are those of the whole batch, pictures and words."""
    source = open_source(write_parquet(tmp_path / "a.parquet", range(240), group=12))
    whole = mixture(source).batches(7)
    for rank in range(4):
        own = mixture(source, rank, 4).batches(7)
        for one, other in zip(whole, own, strict=True):
            rows = torch.arange(len(one.text_ids))[len(one.text_ids) * rank // 4 : len(one.text_ids) * (rank + 1) // 4]
            assert torch.equal(one.text_ids, other.text_ids)
            mine, theirs = (batch.index(rows).media["image"].tokens for batch in (one, other))
            assert torch.equal(mine, theirs) and bool(mine.abs().sum())


@pytest.mark.parametrize(
    "settings", [{"draw": 6, "caption": 10}, {"draw": 3, "caption": 0}, {"draw": 50, "caption": 6}]
)
def test_an_epoch_holds_every_picture_once_however_rows_are_dealt_to_lanes(tmp_path, settings):
    source = open_source(write_parquet(tmp_path / "a.parquet", range(61), group=7))
    order = order_of(source, MixtureConfig(pack=2, **settings), 0)
    for task in ("draw", "caption"):
        taken = list(order.take(task, 0, 183))
        assert [sorted(taken[start : start + 61]) for start in (0, 61, 122)] == [list(range(61))] * 3
        again = order_of(source, MixtureConfig(pack=2, **settings), 0)
        assert list(again.take(task, 150, 20)) == taken[150:170] and list(again.take(task, 20, 20)) == taken[20:40]


def test_sources_of_a_mixture_go_through_epochs_of_their_own_lane_by_lane(tmp_path, groups_read):
    """Two files in row groups and a folder: exact shares, exact epochs, and a process reads its own lanes' groups."""
    one = write_parquet(tmp_path / "one.parquet", range(48), group=4)
    two = write_parquet(tmp_path / "two.parquet", range(48, 144), group=4)
    three = write_folder(tmp_path / "three", range(144, 151))
    source = open_source(f"{one}+{two}:weight=2+{three}")
    order = order_of(source, MixtureConfig(draw=16, caption=0, pack=2), 0)
    taken = list(order.take("draw", 0, 16 * 40))
    for part, (start, end) in enumerate(pairwise(source.starts)):
        own = [i for i in taken if start <= i < end]
        assert len(own) == 16 * 40 * (1, 2, 1)[part] // 4
        for epoch in range(len(own) // (end - start)):
            assert sorted(own[epoch * (end - start) : (epoch + 1) * (end - start)]) == list(range(start, end))
    assert list(order_of(source, MixtureConfig(draw=16, caption=0, pack=2), 0).take("draw", 333, 9)) == taken[333:342]
    # The quarter of each step that a fourth process reads comes from its own groups.
    quarters = [[taken[step * 16 + place] for step in range(12) for place in range(4 * q, 4 * q + 4)] for q in range(4)]
    groups = [{source.part(i)[0].places[source.part(i)[1]].group for i in some if i < 48} for some in quarters]
    assert sum(map(len, groups)) <= 12 + 3 and set.union(*groups) == set(range(12))


def test_a_mixture_gives_each_source_its_exact_share(tmp_path):
    one = write_folder(tmp_path / "one", range(5))
    two = write_parquet(tmp_path / "two.parquet", range(5, 12))
    source = open_source(f"{one}:weight=2+{two}:weight=0.5")
    assert source.weights == (4, 1) and len(source) == 12
    assert [e.id for e in source.examples][4:6] == ["0/004.png", "1/two.parquet:0"]
    order = Order(source, 0)
    first = list(order.take("draw", 0, 800))
    for start in range(0, 800, 80):  # a stretch of twenty in each of four lanes
        assert Counter(i >= 5 for i in first[start : start + 80]) == {False: 64, True: 16}
    assert Counter(i for i in first if i < 5) == dict.fromkeys(range(5), 128)
    assert list(Order(source, 0).take("draw", 333, 40)) == first[333:373]
    assert list(Order(source, 1).take("draw", 0, 40)) != first[:40]
    pictures = [source.picture(i, 8).tobytes() for i in (4, 5)]
    assert pictures == [open_source(one).picture(4, 8).tobytes(), open_source(two).picture(0, 8).tobytes()]
