"""Opening a source: wrong specs, what is left out, splits, the report."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xfusion.data.emoji import Artwork, Emoji
from xfusion.data.report import look_alikes
from xfusion.data.sequence import Example, XFusionError
from xfusion.data.sources import UNSTATED, check, open_source, stated_licence


def save(path: Path, colour="red", size=(40, 30), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three good pictures with captions."""
    root = tmp_path / "photos"
    for number, colour in enumerate(["red", "green", "blue"]):
        save(root / f"{number}.png", colour)
        (root / f"{number}.txt").write_text(f"a {colour} card\n{colour}\n")
    return root


def lines(path: Path, *rows) -> Path:
    """Write JSON lines; a text or bytes row is written as it is."""
    encoded = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def test_folder_named_like_the_built_in_set(tmp_path, monkeypatch):
    save(tmp_path / "emoji" / "a.png")
    (tmp_path / "emoji" / "a.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for spec in ("./emoji", Path("emoji")):
        assert open_source(spec).examples[0].captions == ("mine",)
        assert check(spec).num_examples == 1


def test_emoji_specs():
    assert isinstance(open_source("emoji"), Emoji)
    assert len(open_source("emoji:12").examples) == 12  # type: ignore[arg-type]
    assert len(open_source("emoji", split="held").examples) == 172
    with pytest.raises(XFusionError, match="emoji:many: expected a number of concepts"):
        open_source("emoji:many")


def test_wrong_specs_are_named_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "one.png")
    (tmp_path / "all.json").write_text("[]")
    (tmp_path / "notes.md").write_text("hello")
    lines(tmp_path / "blank.jsonl", "", "  ")
    for name, message in {
        "nowhere": "no such folder or file; data is 'emoji'",
        "empty": "no examples found; a folder needs pictures",
        "blank.jsonl": "no examples found",
        "one.png": "is one picture; put it into a folder",
        "all.json": r"write one object a line: jq -c '.\[\]' all.json > all.jsonl",
        "notes.md": "is neither a folder nor a .jsonl, .tar or .parquet file",
    }.items():
        with pytest.raises(XFusionError, match=message) as caught:
            open_source(str(tmp_path / name))
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"), [({"split": "test"}, "'test'"), ({"allow_bad": 1.0}, "allow_bad is 1.0")]
)
def test_wrong_options(folder, options, message):
    with pytest.raises(XFusionError, match=message):
        open_source(str(folder), **options)


def test_allowed_share_leaves_out_what_is_named(folder, caplog):
    (folder / "1.txt").write_text("")
    with pytest.raises(XFusionError, match=r"1 of 3 examples are bad \(allowed: 30.0%\).*allow a share of 0.34"):
        open_source(str(folder), allow_bad=0.3)
    with caplog.at_level(logging.WARNING):
        source = open_source(str(folder), allow_bad=0.34)
    assert [e.id for e in source.examples] == ["0.png", "2.png"]
    assert source.report.num_bad == 1
    assert "left out 1 of 3 examples" in caplog.text
    assert "1.txt:1: no caption" in caplog.text


def test_nothing_left_is_an_error_whatever_is_allowed(folder):
    for number in range(3):
        (folder / f"{number}.txt").write_text("")
    with pytest.raises(XFusionError, match=r"3 of 3 examples are bad.*none is left"):
        open_source(str(folder), allow_bad=0.99)


def test_message_lists_the_first_problems_and_counts_the_rest(folder):
    for number in range(5):
        (folder / f"text{number}.png").write_text("hello")
    with pytest.raises(XFusionError, match=r"5 of 8 examples are bad: .*; and 7 more; see all") as caught:
        open_source(str(folder))  # each has no caption either: ten problems of five examples
    assert len(str(caught.value).split("text")) < 10


@pytest.fixture
def many(tmp_path) -> Path:
    """Sixty pictures, ten of them copies of one."""
    root = tmp_path / "many"
    for number in range(60):
        save(root / f"{number:02}.png", (max(number, 9), 0, 0), size=(4, 4))
        (root / f"{number:02}.txt").write_text(f"card {number}")
    return root


def test_all_of_it_trains_unless_a_share_is_asked_for(many):
    assert len(open_source(str(many)).examples) == len(open_source(str(many), split="all").examples) == 60
    with pytest.raises(XFusionError, match=r"nothing is held out; to hold a tenth out write .*many:held=0\.1"):
        open_source(str(many), split="held")


def test_split_divides_no_group_and_holds_when_pictures_are_added(many):
    train, held = (open_source(f"{many}:held=0.2", split=split).examples for split in ("train", "held"))
    assert {e.group for e in train}.isdisjoint(e.group for e in held)
    assert len(train) + len(held) == 60
    assert 4 <= len(held) <= 25
    assert len({e.group for e in [*train, *held]}) == 51  # copies are one group
    save(many / "new.png", "blue")
    (many / "new.txt").write_text("new")
    after = open_source(f"{many}:held=0.2", split="held").examples
    assert {e.id for e in held} == {e.id for e in after} - {"new.png"}


def test_groups_of_the_file_win(tmp_path):
    rows = []
    for number in range(40):
        save(tmp_path / f"{number}.png", (number, 0, 0))
        rows.append({"image": f"{number}.png", "text": f"card {number}", "group": f"series {number // 4}"})
    path = lines(tmp_path / "data.jsonl", *rows)
    held = open_source(f"{path}:held=0.3", split="held").examples
    assert len(held) % 4 == 0
    assert {e.group for e in held} <= {f"series {n}" for n in range(10)}


@pytest.mark.parametrize("share", ["0", "1", "ten", "", "1.5"])
def test_wrong_share_is_named(many, share):
    with pytest.raises(XFusionError, match="the held-out share is"):
        open_source(f"{many}:held={share}")


def test_share_too_small_for_the_data_is_named(folder):
    with pytest.raises(XFusionError, match="none of 3 pictures falls into the split 'held'"):
        open_source(f"{folder}:held=0.001", split="held")


def test_report(folder):
    (folder / "2.txt").write_text("")
    report = check(str(folder))
    found = json.loads(json.dumps(report.to_json()))
    assert found["num_examples"] == 3
    assert found["num_bad"] == 1
    assert found["counts"] == {"empty caption": 1}
    assert found["captions"] == {"num_captions": 4, "shortest": 3, "median": 7.5, "longest": 12}
    assert found["problems"] == list(report.problems)
    assert "source" not in found
    assert found["share_bad"] == pytest.approx(1 / 3)


def test_sheet_shows_the_pixels_that_a_model_sees(many, tmp_path):
    (many / "00.txt").write_text("an extremely long caption " * 30 + "x" * 300)
    path = check(many).sheet(tmp_path / "new" / "sheet.png", size=4)
    with Image.open(path) as sheet:
        assert sheet.size == (5 * 140 + 12, 5 * 182 + 12)
        assert sheet.getpixel((12 + 5, 12 + 5)) == (9, 0, 0)
        assert sheet.getpixel((12 + 140 * 4 + 5, 12 + 182 * 4 + 5)) == (24 * 60 // 25, 0, 0)
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


def test_sheet_of_few_pictures_is_no_larger_than_needed(folder, tmp_path):
    with Image.open(check(folder).sheet(tmp_path / "sheet.png")) as sheet:
        assert sheet.size == (3 * 140 + 12, 182 + 12)


def test_sheet_without_a_good_example(folder, tmp_path):
    for number in range(3):
        (folder / f"{number}.txt").write_text("")
    report = check(folder)
    with pytest.raises(XFusionError, match="no good example to draw"):
        report.sheet(tmp_path / "sheet.png")
    assert report.to_json()["captions"]["num_captions"] == 0


def test_check_of_the_built_in_set():
    report = check("emoji")
    assert (report.num_examples, report.num_bad, report.num_groups) == (1918, 0, 1783)
    assert report.licence == "CC-BY-SA-4.0"


def test_a_licence_is_stated_where_a_source_knows_none(folder):
    mixed = open_source(f"{folder}:weight=2+emoji:16")
    known = f"{folder}: {UNSTATED}; emoji:16: CC-BY-SA-4.0"
    assert stated_licence(mixed.licence, None, mixed.spec) == mixed.licence == known
    assert stated_licence(known, " MIT ", mixed.spec) == f"{folder}: MIT; emoji:16: CC-BY-SA-4.0"
    assert stated_licence("CC-BY-SA-4.0", "CC-BY-SA-4.0", "emoji") == "CC-BY-SA-4.0"
    with pytest.raises(
        XFusionError, match=r"^emoji is under CC-BY-SA-4\.0, not under MIT: leave the data's licence out$"
    ):
        stated_licence("CC-BY-SA-4.0", "MIT", "emoji")
    for nothing in ("", " ", "MIT\nand more", "\x1b[31m"):
        with pytest.raises(XFusionError, match="is no line of words"):
            stated_licence(UNSTATED, nothing, "photos")


def photograph(seed, side=160):
    """Smooth shapes with some grain."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
    return Image.fromarray((smooth + generator.normal(0, 5, smooth.shape)).clip(0, 255).astype(np.uint8))


def with_words(picture, path, words, **how):
    picture.save(path, **how)
    path.with_suffix(".txt").write_text(words)


def test_one_photograph_saved_twice_is_noted_and_different_pictures_are_not(tmp_path, monkeypatch):
    """Neither are flat cards of near colours, clock faces an hour apart, or a photograph in which one thing has changed."""
    monkeypatch.chdir(tmp_path)
    folder = Path("photos")
    folder.mkdir()
    for seed in range(4):
        with_words(photograph(seed), folder / f"{seed}.png", f"thing {seed}")
    changed = photograph(0)
    changed.paste("black", (100, 40, 110, 50))
    with_words(changed, folder / "changed.png", "a thing with a hole")
    for name, colour in {"red": "#ff0000", "scarlet": "#ff2400", "orange": "#ffa500", "amber": "#ffbf00"}.items():
        with_words(Image.new("RGB", (64, 64), colour), folder / f"{name}.png", name)
    art = Artwork()
    for identity in ("1F550", "1F551", "1F552", "1F468-200D-1F469-200D-1F466", "1F468-200D-1F469-200D-1F467"):
        with_words(art.draw(identity, 96), folder / f"{identity}.png", identity)
    assert look_alikes(check("photos").source) == [] == list(check("photos").notes)
    with_words(photograph(1), folder / "copy.jpg", "the same", quality=90)
    with_words(photograph(1), folder / "again.jpg", "the same again", quality=95)
    with_words(photograph(2).resize((80, 80)), folder / "small.jpg", "a smaller one", quality=90)
    report = check("photos")
    assert report.num_bad == 0 and report.num_groups == 17
    first, *others = report.notes
    assert first.startswith(
        "5 pictures look the same as one of another group: contrastive losses take them for different"
    )
    assert others == [
        "look the same: photos/1.png, photos/again.jpg, photos/copy.jpg",
        "look the same: photos/2.png, photos/small.jpg",
    ]


def test_what_the_owner_put_in_one_group_is_not_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for quality in (90, 95):
        photograph(1).save(f"{quality}.jpg", quality=quality)
    lines = [{"image": f"{q}.jpg", "caption": f"at {q}", "group": "one"} for q in (90, 95)]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert check("data.jsonl").notes == ()
    Path("data.jsonl").write_text("\n".join(json.dumps(line | {"group": line["caption"]}) for line in lines))
    assert check("data.jsonl").notes[1:] == ("look the same: data.jsonl:1, data.jsonl:2",)


def test_many_look_alikes_are_counted_and_few_are_named(tmp_path):
    """As of a film's frames. Pictures of more than one block are compared with those of other blocks."""

    class Film:
        spec = "film"
        examples = tuple(Example(id=str(i), captions=("frame",), group=str(i), origin=f"film:{i}") for i in range(500))

        def picture(self, index, size):
            # Two frames of each of 250 scenes, far apart in the file; each scene has a red dot of its own place.
            scene = Image.new("RGB", (size, size), (100, 100, 100 + index // 250))
            scene.putpixel((index % 250 % size, index % 250 // size), (255, 0, 0))
            return scene

    notes = look_alikes(Film())
    assert notes[0].startswith("500 pictures look the same as one of another group")
    assert notes[1] == "look the same: film:0, film:250" and len(notes) == 1 + 20 + 1
    assert notes[-1] == "... and 230 more such sets"
    Film.picture = lambda self, index, size: Image.new("RGB", (size, size), "grey")
    notes = look_alikes(Film())
    assert notes[0].startswith("at least ") and " more" in notes[1]
