"""Parquet files of the hub, by its own client from a stand-in on this machine: no file is fetched whole, each step exact."""

import io
import random

import pytest
import torch
from data.hub_server import hub
from data.test_shards import write_parquet
from PIL import Image

from xfusion.data import hub as hub_files
from xfusion.data import latents, shards
from xfusion.data.files import Columns
from xfusion.data.order import Order
from xfusion.data.sequence import Unreadable, XFusionError
from xfusion.data.sources import check, open_source
from xfusion.modalities.codecs.pixels import Pixels
from xfusion.modalities.image import ImageModality
from xfusion.training.progress import all_examples

__all__ = ["hub"]


def large(number):
    """A picture that is larger than what is fetched of a file to see what it holds, 64 kB, when there are a few."""
    file = io.BytesIO()
    Image.frombytes("RGB", (120, 100), random.Random(number).randbytes(36000)).save(file, "PNG")
    return file.getvalue()


def rows(folder, numbers):
    plain = {"compression": "none", "write_statistics": False}
    return write_parquet(folder / "rows.parquet", numbers, group=4, pictures=large, **plain).read_bytes()


def contents(source):
    return [(e.captions, source.picture(i, 8).tobytes()) for i, e in enumerate(source.examples)]


def test_a_data_set_of_the_hub_is_read_as_its_files_would_be_and_only_in_parts(hub, tmp_path):
    two = [rows(tmp_path, range(12)), rows(tmp_path, range(12, 24))]
    names = [f"data/train-{n:05d}-of-00002.parquet" for n in range(2)]
    files = {"data/test-00000-of-00001.parquet": b"no", **dict(zip(names, two, strict=True))}
    hub.commits["datasets/org/cards"] = [("a" * 40, files)]
    source = open_source("hf:org/cards")
    assert source.spec == "hf:org/cards" and len(source) == 24
    fetched = {name: sum(size for one, size in hub.fetched if one == name) for name in names}
    assert all(0 < fetched[name] < len(content) / 2 for name, content in zip(names, two, strict=True))
    (tmp_path / "local").mkdir()
    for number, content in enumerate(two):
        (tmp_path / "local" / f"{number}.parquet").write_bytes(content)
    local = open_source(tmp_path / "local")
    assert contents(source) == contents(local)
    assert source.blocks == local.blocks  # so that orders are the same, shuffled by row groups
    assert list(Order(source, 3).take("draw", 0, 60)) == list(Order(local, 3).take("draw", 0, 60))
    assert source.examples[13].origin == f"hf://datasets/org/cards@{'a' * 40}/{names[1]}:1"
    assert len({example.group for example in source.examples}) == 24
    # Opened again it fetches no row: the index of this commit is there.
    hub.fetched.clear()
    assert open_source("hf:org/cards:train").examples == source.examples and not hub.fetched
    held = [open_source("hf:org/cards:train:held=0.3", split=split) for split in ("train", "held")]
    assert sorted(e.id for part in held for e in part.examples) == sorted(e.id for e in source.examples)


def test_a_step_fetches_the_row_groups_of_its_own_pictures(hub, tmp_path):
    content = rows(tmp_path, range(40))
    hub.commits["datasets/org/cards"] = [("b" * 40, {"train.parquet": content})]
    source = open_source("hf:org/cards")
    hub.fetched.clear()
    for index in (8, 9, 11, 10):  # of one group
        source.picture(index, 8)
    size = sum(len(large(number)) for number in range(8, 12))
    # The group once, and where it stands in the file.
    assert size <= sum(n for _, n in hub.fetched) < size + 70_000 < len(content) / 4


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("data/train-00000-of-00002.parquet", ("default", "train")),
        ("data/train-00000-of-00002-0123456789abcdef.parquet", ("default", "train")),
        ("blue/validation-00003-of-00009.parquet", ("blue", "validation")),
        ("blue/test/0000.parquet", ("blue", "test")),
        ("default/partial-train/0007.parquet", ("default", "partial-train")),
        ("test.parquet", ("default", "test")),
        ("train/cards.parquet", ("default", "train")),
        ("cards.parquet", ("default", "train")),
    ],
)
def test_names_of_files_say_configuration_and_split(file, expected):
    assert hub_files.place_of(file) == expected


def test_configurations_splits_and_revisions_are_chosen_or_named(hub, tmp_path):
    content = {name: rows(tmp_path, numbers) for name, numbers in (("a", range(3)), ("b", range(3, 5)))}
    files = {"red/train/0000.parquet": content["a"], "blue/train/0000.parquet": content["a"],
             "blue/test/0000.parquet": content["b"]}  # fmt: skip
    hub.commits |= {"datasets/org/cards": [("c" * 40, files)], "datasets/org/other": [("d" * 40, {"a.csv": b""})]}
    assert [e.captions[0] for e in open_source("hf:org/cards:blue:test").examples] == ["card 3", "card 4"]
    assert len(open_source(f"hf:org/cards@{'c' * 40}:blue:train:weight=2+hf:org/cards:red:train")) == 6
    for spec, message in (
        ("hf:org/cards", "the configuration 'default' is not among blue, red: name one, as in"),
        ("hf:org/cards:blue:dev", "the split 'dev' is not among test, train: name one"),
        ("hf:org/cards@main~1:blue:test", "cannot be fetched from the hub: RevisionNotFoundError"),
        ("hf:org/none", "hf:org/none: cannot be fetched from the hub: RepositoryNotFoundError"),
        ("hf:org/other", "holds no parquet file; if the hub has converted it, name hf:org/other@refs/convert/parquet"),
        ("hf:cards", "write hf:ORG/NAME, hf:ORG/NAME:SPLIT or"),
    ):
        with pytest.raises(XFusionError, match=message) as error:
            open_source(spec)
        assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_is_no_broken_picture(hub, tmp_path):
    """Nor is an index written of what was not fetched. What a run does: tests/training/test_unreadable.py."""
    hub.commits["datasets/org/cards"] = [("e" * 40, {"train.parquet": rows(tmp_path, range(8))})]
    source = open_source("hf:org/cards")
    hub.out_of_order = True
    with pytest.raises(XFusionError, match=r"train\.parquet: cannot be fetched from the hub") as error:
        source.picture(0, 8)
    assert not isinstance(error.value, Unreadable)
    with pytest.raises(XFusionError, match="cannot be fetched from the hub"):
        shards.read(f"hf://datasets/org/cards@{'f' * 40}/train.parquet", Columns())
    hub.out_of_order = False
    assert source.picture(0, 8).size == (8, 8)


def test_another_commit_holds_other_examples_of_the_same_names_and_groups(hub, tmp_path):
    """So that a resumed run says so, and a split stays as it is; pinned by its commit the data is the same."""
    files = [{"train.parquet": rows(tmp_path, numbers)} for numbers in (range(8), range(8, 16))]
    hub.commits["datasets/org/cards"] = [("a" * 40, files[0])]
    one = open_source("hf:org/cards")
    hub.commits["datasets/org/cards"].append(("b" * 40, files[1]))
    two, pinned = open_source("hf:org/cards"), open_source(f"hf:org/cards@{'a' * 40}")
    assert [(e.id, e.group) for e in one.examples] == [(e.id, e.group) for e in two.examples]
    assert all_examples(one)[:2] == all_examples(two)[:2] and all_examples(one)[2] != all_examples(two)[2]
    assert all_examples(pinned) == all_examples(one)


@pytest.mark.parametrize("batch", [1, 3])
def test_what_cannot_be_read_when_it_is_encoded_is_left_out_only_if_allowed(hub, tmp_path, monkeypatch, batch):
    """Pictures of the hub are not decoded before: the share counts while they are encoded."""
    monkeypatch.setattr(latents, "PER_SHARD", 8)
    broken = (5, 17)
    content = write_parquet(
        tmp_path / "rows.parquet", range(20), pictures=lambda n: large(n)[:900] if n in broken else large(n)
    ).read_bytes()
    hub.commits["datasets/org/cards"] = [("b" * 40, {"train.parquet": content})]
    source, out = open_source("hf:org/cards"), tmp_path / "latents"

    def encoded(allow_bad):
        return latents.encode(source, Pixels.Config(), 16, out, batch=batch, allow_bad=allow_bad)

    with pytest.raises(Unreadable, match=r"train\.parquet:5.* is cut short"):
        encoded(0.0)
    with pytest.raises(Unreadable, match=r"2 of 20 examples of hf:org/cards are bad \(allowed: 5\.0%\)"):
        encoded(0.05)
    found = encoded(0.1)
    assert [number for number in range(20) if number not in found.indices] == [*found.left_out] == [*broken]
    image = ImageModality.Config(patch=4, sizes=(16,)).build()
    opened = open_source(out)
    assert [e.id for e in opened.examples] == [e.id for i, e in enumerate(source.examples) if i not in broken]
    for index, number in enumerate(found.indices):
        assert torch.equal(opened.tokens(index, image, 16), image.encode([source.picture(number, 16)], 16)[0])
    report = check(out)
    assert report.num_examples == 18 and not report.num_bad
    assert [note for note in report.notes if "left out when it was encoded: " in note and "is cut short" in note] == [
        *report.notes
    ]
    before = (out / "index.json").read_bytes()
    encoded(0.1)
    assert (out / "index.json").read_bytes() == before
