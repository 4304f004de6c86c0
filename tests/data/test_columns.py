"""What data in the wild look like: img2dataset's files, tars with several columns, and columns of any name."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from data.hub_server import hub
from data.test_shards import png, write_folder
from data.test_sounds import tone
from PIL import Image
from pyarrow import parquet

from xfusion.apps import cli
from xfusion.data.latents import encode
from xfusion.data.recaption import Asking, recaption
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import Sounds, check, content_fingerprint, open_source
from xfusion.modalities.codecs.pixels import Pixels
from xfusion.training import resuming
from xfusion.training.stages import Recipe

__all__ = ["hub"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XFUSION_CACHE", str(tmp_path / "cache"))


def write_members(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pixels(number: int) -> bytes:
    """The centre square of the picture of a number."""
    with Image.open(io.BytesIO(png(number))) as picture:
        return picture.convert("RGB").crop((2, 0, 14, 12)).tobytes()


def captions(spec) -> list[tuple[str, ...]]:
    return [example.captions for example in open_source(spec).examples]


# -------------------------------------------------------------------------------------------------------- img2dataset


def downloaded(number: int, **changes) -> dict[str, bytes]:
    """The files of a picture in the order in which img2dataset writes them; a change to None is a null."""
    with Image.open(io.BytesIO(png(number))) as picture:
        file = io.BytesIO()
        picture.save(file, "JPEG")
    row = {"caption": f"card {number}", "url": f"https://example.com/{number}.jpg", "key": f"{number:09d}"}
    row |= {"status": "success", "error_message": None, "width": 16, "height": 12, "original_width": 32}
    row |= {"original_height": 24, "exif": "{}", "sha256": "0" * 64, **changes}
    row = {key: value for key, value in row.items() if value != "left out"}
    words = f"card {number}".encode()
    name = f"{number:09d}"
    return {f"{name}.jpg": file.getvalue(), f"{name}.json": json.dumps(row, indent=4).encode(), f"{name}.txt": words}


@pytest.fixture
def about(tmp_path):
    """Writes the two files about the pictures that img2dataset puts beside them."""

    def write(folder: Path) -> None:
        rows = {"caption": ["card 0"], "url": ["https://example.com/0.jpg"], "key": ["000000000"], "width": [16]}
        parquet.write_table(pa.table(rows), folder / "00000.parquet")
        (folder / "00000_stats.json").write_text("{}")

    return write


@pytest.mark.parametrize("changes", [{}, {"caption": "left out"}, {"caption": None}])
def test_tars_of_img2dataset(tmp_path, about, changes):
    folder = tmp_path / "webdataset"
    folder.mkdir()
    members = {name: content for number in range(3) for name, content in downloaded(number, **changes).items()}
    write_members(folder / "00000.tar", members)
    about(folder)
    for _ in range(2):  # read, and out of the index
        report = check(folder)
        assert (report.num_examples, report.problems) == (3, ())
        assert report.notes == ("1 files beside the shards were not read: 00000.parquet",)
        assert captions(folder) == [("card 0",), ("card 1",), ("card 2",)]


def test_parquet_of_img2dataset(tmp_path):
    rows = []
    for number in range(3):
        files = downloaded(number)
        rows.append({**json.loads(files[f"{number:09d}.json"]), "jpg": files[f"{number:09d}.jpg"]})
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    assert captions(tmp_path) == [("card 0",), ("card 1",), ("card 2",)]


def test_a_folder_of_img2dataset(tmp_path, about):
    folder = tmp_path / "files" / "00000"
    folder.mkdir(parents=True)
    for number in range(3):
        for name, content in downloaded(number).items():
            (folder / name).write_bytes(content)
    about(tmp_path / "files")
    for path in (tmp_path / "files", folder):
        assert captions(path) == [("card 0",), ("card 1",), ("card 2",)]
    report = check(tmp_path / "files")
    listed = ", ".join(f"00000/{number:09d}.json" for number in range(3))
    assert report.notes == (f"5 files are no pictures and were not read: {listed}, ...",)
    # Pictures in parquet are read before loose ones, as ever.
    parquet.write_table(pa.table({"image": [png(7)], "text": ["seven"]}), tmp_path / "files" / "more.parquet")
    assert captions(tmp_path / "files") == [("seven",)]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ({"txt": b"", "json": b"{}"}, "a.tar/0: no caption in 0.txt or 0.json"),
        ({"txt": b" \n"}, "a.tar/0: no caption in 0.txt"),
        ({}, "a.tar/0: no caption: there is no 0.txt or 0.json beside it"),
        (
            {"json": b'{"url": "x", "alt": null, "key": "y"}'},
            "a.tar/0: no caption: expected caption, captions, text or conversations, found url, key: name the field by"
            " :caption=FIELD behind the data",
        ),
    ],
)
def test_words_that_a_tar_lacks_are_told(tmp_path, words, problem):
    path = write_members(
        tmp_path / "a.tar", {"0.png": png(0)} | {f"0.{suffix}": text for suffix, text in words.items()}
    )
    assert check(path).problems == (f"{tmp_path}/{problem}",)


def test_a_second_picture_of_a_name_is_another_column_and_is_noted(tmp_path):
    members = {}
    for number in range(4):
        members |= {f"{number}.depth.png": png(10 + number), f"{number}.png": png(number), f"{number}.mask.png": png(9)}
        members |= {f"{number}.txt": f"card {number}".encode(), f"{number}.cls": b"7"}
    path = write_members(tmp_path / "a.tar", members | {"README": b"about", "._0.png": b"a Mac's"})
    for _ in range(2):
        report = check(path)
        assert (report.num_examples, report.problems) == (4, ())
        assert [report.source.picture(number, 12).tobytes() for number in range(4)] == list(map(pixels, range(4)))
        (note,) = report.notes
        assert note == (
            "14 members of tars are neither the picture nor the words of an example and were not read: a.tar/README,"
            " a.tar/._0.png, a.tar/0.depth.png, ..."
        )


def test_pictures_of_which_either_could_be_meant_are_named_with_the_option(tmp_path):
    members = {"0.jpg": downloaded(0)["000000000.jpg"], "0.png": png(1), "0.txt": b"card", "0.mask.png": png(2)}
    path = write_members(tmp_path / "a.tar", members)
    assert check(path).problems == (
        f"{path}/0: jpg and png are pictures of one name: rename one, or say which by :image=jpg behind the data",
    )
    for suffix, number in (("png", 1), ("mask.png", 2)):
        source = open_source(f"{path}:image={suffix}")
        assert source.picture(0, 12).tobytes() == pixels(number)
    assert check(f"{path}:image=webp").problems == (f"{path}/0: no picture webp among jpg, png, txt, mask.png",)


# ------------------------------------------------------------------------------------------------------------ columns


def write(path: Path, kind: str) -> Path:
    """Two pictures with columns of unusual names, with words in one that has a usual name, too."""
    rows = [{"prompt": f"prompt {n}", "text_en": f"card {n}", "text": f"file {n}"} for n in range(2)]
    if kind in ("jsonl", "metadata"):
        folder = path / "folder"
        write_folder(folder, range(2))
        lines = [json.dumps({"photo": f"{n:03d}.png", "image": "none.png", **row}) for n, row in enumerate(rows)]
        file = folder / ("metadata.jsonl" if kind == "metadata" else "data.jsonl")
        file.write_text("\n".join(lines))
        return folder if kind == "metadata" else file
    if kind == "tar":
        members = {}
        for number, row in enumerate(rows):
            members |= {f"{number}.photo": png(number), f"{number}.png": b"none"}
            members |= {f"{number}.json": json.dumps(row).encode(), f"{number}.txt": b"none"}
        return write_members(path / "a.tar", members)
    table = {"photo": [png(n) for n in range(2)], "image": [b"none"] * 2}
    table |= {name: [row[name] for row in rows] for name in rows[0]}
    if kind == "dataset":
        import datasets

        datasets.Dataset.from_dict(table).save_to_disk(path / "saved")
        return path / "saved"
    parquet.write_table(pa.table(table), path / "a.parquet")
    return path / "a.parquet"


@pytest.mark.parametrize("kind", ["parquet", "dataset", "jsonl", "metadata", "tar"])
def test_columns_are_chosen_by_the_spec(tmp_path, kind):
    """And each choice has an index of its own."""
    path = write(tmp_path, kind)
    for columns in (["prompt"], ["text_en", "prompt"], ["prompt"]):
        source = open_source(f"{path}:caption={','.join(columns)}:image=photo")
        expected = [
            tuple({"prompt": f"prompt {n}", "text_en": f"card {n}"}[name] for name in columns) for n in range(2)
        ]
        assert [example.captions for example in source.examples] == expected
        assert [source.picture(n, 12).tobytes() for n in range(2)] == [pixels(0), pixels(1)]


def test_columns_of_the_hub_are_chosen_by_the_spec(hub, tmp_path):
    content = write(tmp_path, "parquet").read_bytes()
    hub.commits["datasets/org/cards"] = [("a" * 40, {"data/train-00000-of-00001.parquet": content})]
    for spec in ("hf:org/cards", "hf:org/cards:train"):
        source = open_source(f"{spec}:image=photo:caption=text_en")
        assert [example.captions for example in source.examples] == [("card 0",), ("card 1",)]
        assert source.picture(0, 8).size == (8, 8)


def test_words_in_members_of_another_suffix_are_chosen_too(tmp_path):
    members = {"0.png": png(0), "0.alt.txt": b"alt", "0.long.txt": b"long", "0.txt": b"short", "0.json": b"{}"}
    path = write_members(tmp_path / "a.tar", members)
    assert captions(f"{path}:caption=long.txt,alt.txt") == [("long", "alt")]
    assert check(f"{path}:caption=none").problems == (f"{path}/0: no caption: expected none",)


def test_options_stand_in_any_order_and_with_several_sources(tmp_path):
    one, two = write(tmp_path, "parquet"), write_folder(tmp_path / "plain", range(2))
    (tmp_path / "more").mkdir()
    tar = write(tmp_path / "more", "tar")
    first = f"{one}:caption=prompt:weight=2:image=photo"
    source = open_source(f"{first}+{two}+{tar}:image=photo:weight=3:caption=text_en")
    assert source.weights == (2, 1, 3)
    assert [part.spec for part in source.sources] == [
        f"{one}:caption=prompt:image=photo", str(two), f"{tar}:image=photo:caption=text_en",
    ]  # fmt: skip
    names = [example.captions[0] for example in source.examples]
    assert names == ["prompt 0", "prompt 1", "card 0", "card 1", "card 0", "card 1"]
    held = open_source(f"{one}:image=photo:held=0.5:caption=prompt", split="held")
    assert [example.captions[0] for example in held.examples] == ["prompt 0", "prompt 1"]


THERE = "a.parquet: of its columns a, b, c none is called"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "parquet",
            "",
            "a.parquet: 2 of its columns a, b, c hold pictures: say which by :image=COLUMN behind the data",
        ),
        ("parquet", ":image=c", f"{THERE} c and holds pictures"),
        (
            "parquet",
            ":image=a",
            "a.parquet: none of its columns a, b, c is called caption, captions, text: say which holds words by"
            " :caption=COLUMN behind the data",
        ),
        ("parquet", ":image=a:caption=c,d", f"{THERE} d"),
        ("parquet", ":caption=c:caption=c", "caption= is there twice: leave one out"),
        ("parquet", ":caption=", "names no column: write caption=COLUMN or image=COLUMN"),
        ("parquet", ":image=", "names no column: write caption=COLUMN or image=COLUMN"),
        ("parquet", ":caption=c,", "names no column: write caption=COLUMN or image=COLUMN"),
        ("parquet", ":captions=c", "there is no option captions=: use weight, held, caption or image"),
        ("folder", ":caption=c", "plain: has no columns: caption= and image= are for"),
        ("latents", ":image=c", "latents: has no columns: caption= and image= are for"),
    ],
)
def test_columns_that_are_not_there_are_told_with_those_that_are(tmp_path, kind, options, message):
    if kind == "parquet":
        path = tmp_path / "a.parquet"
        parquet.write_table(pa.table({"a": [png(0)], "b": [png(1)], "c": ["words"]}), path)
    else:
        path = write_folder(tmp_path / "plain", range(2))
        if kind == "latents":
            path = encode(open_source(path), Pixels.Config(), 16, tmp_path / "latents").folder
    for reads in (open_source, check):
        with pytest.raises(XFusionError) as error:
            reads(f"{path}{options}")
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("image", [True, False])
def test_a_field_that_a_line_lacks_is_told_with_those_that_it_has(tmp_path, image):
    path = write(tmp_path, "jsonl")
    option, missing = ("image", "picture") if image else ("caption", "caption")
    others = "caption=prompt" if image else "image=photo"
    there = "photo, image, prompt, text_en, text"
    what = f"no {missing}: expected none, found {there}: name the field by :{option}=FIELD behind the data"
    assert check(f"{path}:{others}:{option}=none").problems == (f"{path}:1: {what}", f"{path}:2: {what}")


def test_sounds_with_fields_of_other_names(tmp_path):
    tone(tmp_path / "a.wav")
    (tmp_path / "data.jsonl").write_text(json.dumps({"path": "a.wav", "label": "dog", "image": "a.png"}))
    source = open_source(f"{tmp_path / 'data.jsonl'}:image=path:caption=label")
    assert isinstance(source, Sounds) and source.examples[0].captions == ("dog",)


def test_what_encodes_checks_and_recaptions_takes_the_options(tmp_path, monkeypatch):
    monkeypatch.setattr("xfusion.backbone.special_tokens", lambda source: ())
    path = write(tmp_path, "parquet")
    spec = f"{path}:image=photo:caption=prompt"
    assert cli.main(["data", "check", spec]) == 0
    assert cli.main(["data", "encode", spec, "-o", str(tmp_path / "latents"), "--size", "16"]) == 0
    assert captions(tmp_path / "latents") == [("prompt 0",), ("prompt 1",)]
    asking = Asking(model="someone", prompt="what is this?", size=16)
    recaption(open_source(spec), lambda *_: ["new"], asking, tmp_path / "new", progress=lambda *_: None)
    assert captions(tmp_path / "new") == [("new", "prompt 0"), ("new", "prompt 1")]


def test_a_run_that_is_resumed_with_another_column_is_refused(tmp_path):
    """As with another weight; and the examples are others, whatever the spec is called."""
    path = write(tmp_path, "parquet")
    one, other = (f"{path}:image=photo:caption={name}" for name in ("prompt", "text_en"))
    assert resuming.difference(Recipe(data=one), Recipe(data=other)) == f"data was {one!r} and is now {other!r}"
    assert len({content_fingerprint(open_source(spec)) for spec in (one, other)}) == 2
    assert content_fingerprint(open_source(one)) == content_fingerprint(open_source(one))
