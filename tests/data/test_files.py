"""A user's captions: all that is wrong is named with file and line, nothing is skipped."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from xfusion.data.files import MAX_CAPTION
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import check, open_source


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


@pytest.mark.parametrize("first", ["3", "true", "null", "[1]", '"words"'])
def test_a_first_line_that_is_no_object_is_named(tmp_path, first):
    with pytest.raises(XFusionError, match="expected an object in braces, found a"):
        open_source(str(lines(tmp_path / "data.jsonl", first)))


def lines(path: Path, *rows) -> Path:
    """Write JSON lines; a text or bytes row is written as it is."""
    encoded = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def test_folder_with_a_text_beside_each_picture(folder):
    (folder / "1.txt").write_bytes("\ufeffzelené 🍏 зелёная\r\n\r\n  green apple \r\n".encode())
    source = open_source(str(folder))
    assert [e.id for e in source.examples] == ["0.png", "1.png", "2.png"]
    assert source.examples[0].captions == ("a red card", "red")
    assert source.examples[1].captions == ("zelené 🍏 зелёная", "green apple")
    assert source.examples[1].origin == str(folder / "1.png")
    assert source.picture(2, 16).getpixel((3, 3)) == (0, 0, 255)


def test_linked_folders_are_noted(folder, tmp_path):
    save(tmp_path / "elsewhere" / "9.png")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    report = check(str(folder))
    assert report.num_examples == 3
    assert report.notes == ("1 linked folders were not read, name them as sources of their own: more",)


def test_metadata_as_in_imagefolder(tmp_path):
    save(tmp_path / "a" / "one.jpg"), save(tmp_path / "two.png", "blue")
    lines(tmp_path / "a" / "metadata.jsonl", {"file_name": "one.jpg", "text": "one"})
    lines(tmp_path / "metadata.jsonl", "", {"file_name": "two.png", "captions": ["two", "zwei"]})
    source = open_source(str(tmp_path))
    assert {(e.id, e.captions) for e in source.examples} == {("a/one.jpg", ("one",)), ("two.png", ("two", "zwei"))}
    assert next(e.origin for e in source.examples if e.id == "two.png") == f"{tmp_path / 'metadata.jsonl'}:2"


def test_picture_that_metadata_forgets_is_named(tmp_path):
    save(tmp_path / "one.png"), save(tmp_path / "two.png", "blue")
    lines(tmp_path / "metadata.jsonl", {"file_name": "one.png", "text": "one"})
    assert check(tmp_path).problems == (
        f"{tmp_path / 'two.png'}: no caption: metadata.jsonl does not list it and there is no two.txt",
    )


@pytest.mark.parametrize(
    ("row", "captions"),
    [
        ({"caption": "one"}, ("one",)),
        ({"captions": ["one", "two", "one"]}, ("one", "two")),
        ({"text": " one "}, ("one",)),
        ({"caption": "name", "text": "wording"}, ("name", "wording")),
        (
            {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A card."}]},
            ("A card.",),
        ),
    ],
)
def test_json_lines(tmp_path, row, captions):
    save(tmp_path / "sub" / "a.png")
    absolute = {"image": str(save(tmp_path / "b.png", "blue")), "text": "absolute"}
    source = open_source(str(lines(tmp_path / "data.jsonl", {"image": "sub/a.png"} | row, absolute)))
    assert [e.captions for e in source.examples] == [captions, ("absolute",)]


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"caption": "3"}, ""),
        ({"caption": "3", "question": None}, ""),
        ({"caption": "3", "question": " How many? "}, "How many?"),
        (
            {"conversations": [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "3"}]},
            "How many?",
        ),
        (
            {"conversations": [{"from": "user", "value": "Count.\n<image>"}, {"from": "assistant", "value": "3"}]},
            "Count.",
        ),
        ({"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "3"}]}, ""),
        ({"conversations": [{"from": "gpt", "value": "3"}, {"from": "human", "value": "Why?"}]}, ""),
    ],
)
def test_a_question_is_read(tmp_path, row, question):
    save(tmp_path / "a.png")
    (example,) = open_source(str(lines(tmp_path / "data.jsonl", {"image": "a.png"} | row))).examples
    assert (example.captions, example.question) == (("3",), question)


def test_one_picture_may_be_asked_two_things_with_one_answer(tmp_path):
    save(tmp_path / "a.png")
    row = {"image": "a.png", "caption": "yes"}
    path = lines(tmp_path / "data.jsonl", row | {"question": "Red?"}, row | {"question": "Round?"}, row)
    assert [e.question for e in open_source(str(path)).examples] == ["Red?", "Round?", ""]
    path = lines(tmp_path / "data.jsonl", row | {"question": "Red?"}, row | {"question": "Red?"})
    assert "stands already at" in check(path).problems[0]


def test_further_answers_of_a_conversation_are_noted(tmp_path):
    save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "A card."}] * 2
    report = check(lines(tmp_path / "data.jsonl", {"image": "a.png", "conversations": turns}))
    assert report.num_bad == 0
    assert "1 conversations have more than one answer" in report.notes[0]


def test_one_picture_may_have_several_lines_but_the_same_line_twice_is_a_mistake(tmp_path):
    save(tmp_path / "a.png")
    one, two = {"image": "a.png", "text": "one"}, {"image": "./a.png", "text": "two"}
    source = open_source(str(lines(tmp_path / "data.jsonl", one, two)))
    assert [e.id for e in source.examples] == ["a.png", "a.png#2"]
    assert len({e.group for e in source.examples}) == 1
    path = lines(tmp_path / "data.jsonl", one, two, one)
    assert check(path).problems == (f"{path}:3: a.png with these captions stands already at {path}:1",)


GOOD = {"image": "a.png", "text": "good"}
BAD_LINES = {
    "missing picture": ({"image": "b.png", "text": "x"}, "b.png no such file"),
    "case": ({"image": "A.png", "text": "x"}, "A.png no such file (there is a.png: upper and lower case differ)"),
    "no field": ({"text": "x"}, "no picture: expected image or file_name"),
    "number": ({"image": 7, "text": "x"}, "the picture must be a path, found '7'"),
    "zero byte": ({"image": "a\0.png", "text": "x"}, "the picture must be a path"),
    "long name": ({"image": "a" * 5000, "text": "x"}, "cannot be opened"),
    "address": ({"image": "https://example.com/a.png", "text": "x"}, "is a web address: only files are read"),
    "escape": ({"image": "sub/../../a.png", "text": "x"}, "sub/../../a.png leaves the folder of the file"),
    "folder": ({"image": "..", "text": "x"}, ".. leaves the folder"),
    "no caption": ({"image": "a.png"}, "no caption: expected caption, captions, text or conversations"),
    "empty": ({"image": "a.png", "text": "  "}, "empty caption"),
    "one empty": ({"image": "a.png", "captions": ["x", ""]}, "empty caption"),
    "empty list": ({"image": "a.png", "captions": []}, "empty caption"),
    "null": ({"image": "a.png", "text": None}, "text must be text or a list of texts, found 'None'"),
    "long": ({"image": "a.png", "text": "x" * 4001}, "caption of 4,001 characters, at most 4,000 are legal"),
    "special": ({"image": "a.png", "text": "a <|im_end|> b"}, "caption contains '<|im_end|>', a special token"),
    "control": ({"image": "a.png", "text": "a\x00b"}, "caption contains the character U+0000"),
    "surrogate": ('{"image": "a.png", "text": "\\ud800"}', "caption contains the character U+D800"),
    "silent": ({"image": "a.png", "conversations": [{"from": "human", "value": "?"}]}, "has no answer from gpt"),
    "turns": ({"image": "a.png", "conversations": "hello"}, "conversations must be a list of {from, value}"),
    "asked a number": ({"image": "a.png", "text": "x", "question": 7}, "the question must be text, found '7'"),
    "asked long": ({"image": "a.png", "text": "x", "question": "x" * 4001}, "question of 4,001 characters, at most"),
    "asked special": ({"image": "a.png", "text": "x", "question": "<|im_end|>"}, "question contains '<|im_end|>', a"),
    "asked control": ({"image": "a.png", "text": "x", "question": "a\x00"}, "question contains the character U+0000"),
    "not JSON": ("{'image': 'a.png'}", "not JSON: Expecting property name"),
    "deep": ("[" * 100_000, "not JSON: "),
    "list": ("[1]", "expected an object in braces, found a list"),
    "latin": ('{"image": "a.png", "text": "caf\xe9"}'.encode("latin-1"), "not UTF-8: byte 0xe9 at column 32"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line_is_named_with_its_number(tmp_path, kind):
    row, message = BAD_LINES[kind]
    save(tmp_path / "a.png")
    path = lines(tmp_path / "data.jsonl", GOOD, "", row)
    report = check(path, special_tokens=("<|im_end|>",))
    assert (report.num_examples, report.num_bad, len(report.problems)) == (2, 1, 1)
    assert report.problems[0].startswith(f"{path}:3: ")
    assert message in report.problems[0]
    assert "\n" not in report.problems[0]
    assert len(report.problems[0]) < 500
    with pytest.raises(XFusionError, match="1 of 2 examples are bad"):
        open_source(str(path), special_tokens=("<|im_end|>",))


def test_longest_legal_caption(tmp_path):
    save(tmp_path / "a.png")
    assert check(lines(tmp_path / "data.jsonl", {"image": "a.png", "text": "x" * MAX_CAPTION})).num_bad == 0


def test_bad_sidecars_are_named_with_their_line(folder):
    (folder / "0.txt").write_bytes(b"good\n\xff\xfe bad\n")
    (folder / "1.txt").write_text("\n \n")
    (folder / "2.txt").unlink()
    save(folder / "twin.png"), save(folder / "twin.jpg")
    (folder / "twin.txt").write_text("which?")
    (folder / "lonely.txt").write_text("no picture")
    (folder / "README.txt").write_text("about this data")
    (folder / "notes.md").write_text("about this data")
    (folder / ".hidden.png").write_text("not ours")
    report = check(folder)
    assert sorted(report.problems) == [
        f"{folder / '0.txt'}:2: not UTF-8: byte 0xff at column 1; save the file as UTF-8",
        f"{folder / '1.txt'}:1: no caption: the file is empty",
        f"{folder / '2.png'}: no caption: there is no 2.txt",
        f"{folder / 'lonely.txt'}: captions without a picture: no file lonely.png, .jpg, ...",
        f"{folder / 'twin.jpg'}: twin.txt would caption twin.jpg and twin.png: rename one",
        f"{folder / 'twin.png'}: twin.txt would caption twin.jpg and twin.png: rename one",
    ]
    assert report.counts == {
        "duplicated name": 2,
        "invalid UTF-8": 1,
        "empty caption": 1,
        "missing caption": 1,
        "missing picture": 1,
    }
    assert (report.num_examples, report.num_bad) == (6, 6)
    assert report.notes == ("1 files are no pictures and were not read: notes.md",)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row=st.binary(max_size=200)
    | st.from_regex(r"\{\"image\": .{0,40}, \"(text|caption|conversations)\": .{0,40}\}").map(str.encode)
)
def test_no_line_whatsoever_breaks_the_check(tmp_path, row):
    if not (tmp_path / "a.png").exists():
        save(tmp_path / "a.png")
    path = lines(tmp_path / "data.jsonl", GOOD, row.replace(b"\n", b""))
    report = check(path)
    assert report.num_examples - report.num_bad >= 1
    assert all(problem.startswith(f"{path}:") for problem in report.problems)
    json.dumps(report.to_json())


def test_an_example_has_a_thousand_wordings_and_reports_a_hundred_problems_at_most(tmp_path):
    for name, content in (("many", b"w%d\n"), ("broken", b"\xff%d\n")):
        save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(b"".join(content % number for number in range(1001)))
    report = check(tmp_path)
    assert report.num_bad == report.num_examples == 2
    assert report.counts == {"invalid UTF-8": 99, "many problems": 1, "many captions": 1}
    assert any(problem.endswith("many.png: more than 1,000 captions") for problem in report.problems)
    (tmp_path / "broken.png").unlink(), (tmp_path / "broken.txt").unlink()
    (tmp_path / "many.txt").write_text("".join(f"w{number}\n" for number in range(1000)))
    assert len(open_source(tmp_path).examples[0].captions) == 1000
