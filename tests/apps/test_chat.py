"""A conversation in the terminal."""

import base64
import io
import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image as PILImage
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from apps.serving import apart, draw_only, from_url, tiny_models
from apps.test_cli import SOURCE
from contracts.table import SIDE, Noise

from xfusion.apps import chat, cli
from xfusion.apps.chat import COLUMNS, Chat, half_blocks, inline
from xfusion.apps.commands.base import readable
from xfusion.data.sequence import Text, XFusionError
from xfusion.generation import conversation
from xfusion.opening import Opening


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("base"))["dual-tower"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Noise(1).picture(0, 32).save("a picture.png")
    return tmp_path


def talk(model, *lines, terminal=False, **settings):
    """What was said on the screen, and the conversation."""
    screen = io.StringIO()
    colours = {"force_terminal": True, "color_system": "truecolor"} if terminal else {}
    console = Console(file=screen, width=80, highlight=False, **colours)
    made = Chat(model=model, console=console, **{"steps": 3, "max_tokens": 8, **settings})
    made.run(iter(lines))
    return screen.getvalue(), made


def test_words_are_answered_by_the_base_with_what_was_said_before(model):
    said, made = talk(model, "a red apple", "", "what is this?")
    first = model.generate([Text(ids=model.backbone.chat("a red apple"))], max_tokens=8)[0]
    history = [("user", "a red apple"), ("assistant", first), ("user", "what is this?")]
    ids = model.backbone.chat([{"role": role, "content": words} for role, words in history])
    second = model.generate([Text(ids=ids)], max_tokens=8)[0]
    assert said == f"{readable(first)}\n{readable(second)}\n"
    assert [m["content"] for m in made.messages] == [["a red apple"], [first], ["what is this?"], [second]]


def test_the_bases_own_template_lays_out_words(model, monkeypatch):
    template = "{% for m in messages %}<|begin|>{{ m.role }} {{ m.content }}<|end|>{% endfor %}<|begin|>assistant "
    monkeypatch.setattr(model.backbone.tokenizer, "chat_template", template)
    messages = [{"role": "system", "content": "a cat"}, {"role": "user", "content": ["what ", "is this?"]}]
    (text,) = conversation(model, messages)
    expected = "<|begin|>system a cat<|end|><|begin|>user what is this?<|end|><|begin|>assistant "
    assert text.ids == tuple(model.backbone.tokenizer(expected, add_special_tokens=False)["input_ids"])
    assert text.ids.count(0) == 3 and text.ids.count(1) == 2
    monkeypatch.setattr(model.backbone.tokenizer, "chat_template", "{{ raise_exception('no system role here') }}")
    with pytest.raises(XFusionError, match="no system role here"):
        conversation(model, messages)


def test_pictures_in_and_out(model, here):
    said, made = talk(model, '/image "a picture.png"', "what is this?", "/draw two blue birds", "/draw two blue birds")
    (answer,) = model.generate([Noise(1).picture(0, 32), "what is this?"], max_tokens=8)
    assert said.splitlines()[-2:] == ["two-blue-birds.png", "two-blue-birds-2.png"]
    assert said.startswith(f"{answer}\n")
    expected = model.draw(["two blue birds"], seed=1, steps=3)[0]
    with PILImage.open("two-blue-birds.png") as drawn:
        assert apart(drawn, expected) == 0 and drawn.info["seed"] == "1"
    # What was drawn stands in the conversation.
    assert [m["role"] for m in made.messages] == ["user", "assistant"] * 3
    assert apart(made.messages[3]["content"][0], expected) == 0


def test_a_line_break_ends_an_answer_about_a_picture_behind_words(model, here, monkeypatch):
    ids = model.backbone.encode("red apple\nred apple")

    script = iter([*ids, *ids])
    monkeypatch.setattr(
        type(model.text_objective),
        "choose",
        staticmethod(lambda logits, *_: torch.tensor([next(script)] * len(logits))),
    )
    _, alone = talk(model, "/image 'a picture.png'", "what is this?", max_tokens=len(ids))
    said, behind = talk(model, "hello", "/image 'a picture.png'", "what is this?", max_tokens=len(ids))
    assert alone.messages[-1]["content"] == [model.backbone.decode(ids)] != ["red apple"]
    assert behind.messages[-1]["content"] == ["red apple"] and said.endswith("red apple\n")


def test_a_pack_that_only_draws_goes_on_in_words(model, here):
    _, made = talk(draw_only(model.backbone), "/draw a cat", "what is this?")
    words = [("user", "a cat"), ("assistant", "(picture)"), ("user", "what is this?")]
    ids = model.backbone.chat([{"role": role, "content": content} for role, content in words])
    assert made.messages[3]["content"] == model.generate([Text(ids=ids)], max_tokens=8)


def test_look_asks_about_the_last_picture_alone(model, here, monkeypatch):
    """Where the pack decides to draw, its own pictures are the words (picture) in later turns: /look shows it the last one."""
    monkeypatch.setattr(chat, "opens", lambda *_: None)  # as its head does where it finds no request
    lines = ("/look what is this?", "/draw a cat", "/look", "/look what is this?", "and now?", "/image 'a picture.png'", "/look?",
             "/look and this?")  # fmt: skip
    said, made = talk(model, *lines, draw="auto")
    expected = model.generate([made.last[0], "what is this?"], max_tokens=8)
    assert "nothing was drawn yet" in said and "say what to ask" in said
    assert made.messages[3]["content"] == expected != model.generate(["a cat\n(picture)\nwhat is this?"], max_tokens=8)
    turns = [("a cat", "(picture)"), ("what is this?", expected[0])]
    words = [{"role": role, "content": turn[i]} for turn in turns for i, role in enumerate(("user", "assistant"))]
    ids = model.backbone.chat([*words, {"role": "user", "content": "and now?"}])
    assert made.messages[5]["content"] == model.generate([Text(ids=ids)], max_tokens=8)
    assert "first ask about what you showed it" in said.replace("\n", " ") and len(made.messages) == 7


def test_the_last_picture_and_the_conversation_are_saved(model, here):
    said, made = talk(model, "/draw a cat", "/save new/cat.webp", "/save talk.json", "/new", terminal=True)
    assert "▀" in said and not list(here.glob("*cat*.png")), "shown, so not written unasked"
    assert PILImage.open("new/cat.webp").size == (SIDE, SIDE)
    saved = json.loads(Path("talk.json").read_text())["messages"]
    assert saved[0] == {"role": "user", "content": [{"type": "text", "text": "a cat"}]}
    assert apart(from_url(saved[1]["content"][0]["image_url"]["url"]), made.last[0]) == 0
    assert made.messages == []


@pytest.mark.parametrize("variables", [{"TERM": "xterm-kitty"}, {"TERM_PROGRAM": "iTerm.app"}], ids=str)
def test_a_drawing_is_shown_in_a_terminal_that_has_pictures(model, here, monkeypatch, variables):
    for name in ("TMUX", "STY", "KITTY_WINDOW_ID", "LC_TERMINAL", "TERM_PROGRAM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said, made = talk(model, "/draw a cat", terminal=True)
    assert inline(made.messages[1]["content"][0], variables) in said and "▀" not in said


def test_mistakes_are_one_line_each(model, here, monkeypatch):
    lines = (
        "/drw a",
        "/draw",
        "/image",
        "/image none.png",
        "/save a.png",
        "/save a.gif",
        "/help",
        "/quit",
        "never said",
    )
    said, made = talk(model, *lines)
    for complaint in ("/drw is not a command", "say what to draw", "name a picture file", "none.png: no such file",
                      "nothing was drawn yet", ".png, .jpg"):  # fmt: skip
        assert complaint in said.replace("\n", " ")
    assert "/image PATH" in said and not made.messages
    monkeypatch.setattr(type(model), "capabilities", {"text"})
    for line, cannot, recipe in (
        ("/draw a", "draw", "xfusion"),
        ("/image a.png", "read pictures", "llava_1_5"),
        ("/look a", "read pictures", "llava_1_5"),
    ):
        said = " ".join(talk(model, line)[0].split())
        assert said == f"this pack cannot {cannot}: it can text; take one of a recipe such as {recipe}"


def test_a_model_cannot_tell_the_terminal_what_to_do(model, here, monkeypatch, capsys):
    """Titles, colours, the clipboard, what is written over: control characters of an answer are not shown."""
    answer = "\x1b]0;a title\x07red\x1b[31m\r\x08\x9b2J\x7f apple\n\tand more"
    plain = "]0;a titlered[31m2J apple\n\tand more"
    monkeypatch.setattr(model.backbone, "decode", lambda ids: answer)
    said, made = talk(model, "what is this?", "/draw", "/\x1b[31mdraw")
    assert said.startswith(f"{plain.expandtabs()}\n")
    assert not any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in said.replace("\n", ""))
    assert made.messages[1]["content"] == [answer], "what was said stays as it is"
    monkeypatch.undo()
    monkeypatch.chdir(here)
    model.save_pretrained("tiny")
    monkeypatch.setattr(type(model), "caption", lambda *_, **__: [answer])
    assert cli.main(["caption", "tiny", "a picture.png", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"a picture.png: {plain}\n"


def test_ctrl_c_ends_an_answer_and_not_the_conversation(model, monkeypatch):
    decode, calls = model.backbone.decode, []

    def interrupted(ids):
        calls.append(list(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(ids)

    monkeypatch.setattr(model.backbone, "decode", interrupted)
    _, made = talk(model, "a red apple", "a cat")
    assert made.answers == 2 and len(made.messages) == 4
    said = ""  # what stands on the screen when Ctrl-C comes: no half letter, nothing that was taken back
    for heard in (decode(ids).rstrip("\N{REPLACEMENT CHARACTER}") for ids in calls[:2]):
        said = heard if heard.startswith(said) else said
    assert said and made.messages[1]["content"] == [said]


class Terminal:
    """`xfusion chat` at a terminal of its own."""

    def __init__(self, pack):
        self.screen, here = pty.openpty()
        command = [sys.executable, "-m", "xfusion.apps.cli", "chat", pack, "--max-tokens", "4", "--device", "cpu"]
        self.process = subprocess.Popen(
            command,
            stdin=here,
            stdout=here,
            stderr=here,
            env=os.environ | {"PYTHONPATH": str(SOURCE), "TERM": "dumb"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(here)
        self.seen = ""

    def wait_for(self, what):
        """All that is shown until something is."""
        end = time.monotonic() + 120
        while what not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.screen], [], [], 1)[0]:
                self.seen += os.read(self.screen, 65536).decode(errors="replace")
        before, _, self.seen = self.seen.partition(what)
        return before

    def type(self, text):
        os.write(self.screen, text.encode())

    def interrupt(self):
        """Ctrl-C once it waits for a key: Python's readline notes one that comes just before that at the next key."""
        asleep = 0
        while asleep < 5:
            time.sleep(0.05)
            asleep = asleep + 1 if psutil.Process(self.process.pid).status() == psutil.STATUS_SLEEPING else 0
        self.process.send_signal(signal.SIGINT)

    def end(self):
        self.process.kill()
        self.process.wait()
        os.close(self.screen)


def test_with_json_prompts_go_to_stderr(model, here, monkeypatch, capsys):
    """Stdout is for one object alone."""
    model.save_pretrained(here / "tiny")
    lines = iter(["a red apple"])

    def typed(prompt):
        print(prompt, end="")
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", typed)
    assert cli.main(["chat", "tiny", "--max-tokens", "4", "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["messages"]) == 2 and err.count("> ") == 2


def test_colons_around_a_word_stay_as_they_are(model, here, capsys):
    """As in answers and names of files; rich would draw a key."""
    model.save_pretrained(here / "tiny")
    assert cli.main(["caption", "tiny", "a:key:b.png"]) == 2
    assert "a:key:b.png" in capsys.readouterr().err


def test_ctrl_c_at_the_prompt_drops_the_line_and_a_second_one_leaves(model, here):
    model.save_pretrained(here / "tiny")
    shown = Terminal("tiny")
    try:
        shown.wait_for("> ")
        shown.type("/draw a house")
        shown.wait_for("a house")
        shown.interrupt()
        shown.wait_for("Ctrl-C once more leaves")
        shown.wait_for("> ")
        shown.type("/save talk.json\n")  # the dropped line is no part of this one, and the talk goes on
        shown.wait_for("saved talk.json")
        shown.wait_for("> ")
        shown.interrupt()  # not in a row with the first
        shown.wait_for("Ctrl-C once more leaves")
        shown.wait_for("> ")
        shown.interrupt()
        shown.wait_for("0 answers")
        assert shown.process.wait(60) == 0
        assert json.loads(Path("talk.json").read_text()) == {"messages": []}
    finally:
        shown.end()


def test_terminals_that_draw_pictures_are_sent_them_whole():
    picture = PILImage.frombytes("RGB", (64, 64), random.Random(0).randbytes(3 * 64 * 64))
    sent = inline(picture, {"TERM": "xterm-kitty"})
    parts = re.findall(r"\033_G([^;]*);([^\033]*)\033\\", sent)
    assert "".join(f"\033_G{keys};{data}\033\\" for keys, data in parts) == sent and len(parts) > 1
    assert [keys for keys, _ in parts] == [f"a=T,f=100,c={COLUMNS},m=1", *["m=1"] * (len(parts) - 2), "m=0"]
    assert all(len(data) <= 4096 for _, data in parts)
    iterm = inline(picture, {"TERM_PROGRAM": "iTerm.app"})
    head, _, data = iterm.removesuffix("\a").partition(":")
    size = len(base64.b64decode(data))
    assert head == f"\033]1337;File=inline=1;size={size};width={COLUMNS};height={COLUMNS // 2}"
    for encoded in ("".join(data for _, data in parts), data):
        with PILImage.open(io.BytesIO(base64.b64decode(encoded))) as shown:
            assert shown.convert("RGB").tobytes() == picture.convert("RGB").tobytes()
    assert inline(picture, {"TERM": "xterm-256color"}) is None
    assert inline(picture, {"TERM": "xterm-kitty", "TMUX": "/tmp/tmux-0/default,1,0"}) is None


@pytest.mark.parametrize(
    ("size", "extent", "sent_size"),
    [((16, 16_000), "r=16", (1, 1024)), ((4000, 3000), "c=32", (1024, 768)), ((1024, 1024), "c=32", (1024, 1024))],
)
def test_a_terminal_is_sent_no_more_than_it_can_show(size, extent, sent_size):
    sent = inline(PILImage.new("RGB", size), {"TERM": "xterm-kitty"})
    (keys, *_), parts = zip(*re.findall(r"\033_G([^;]*);([^\033]*)\033\\", sent), strict=True)
    assert keys.startswith(f"a=T,f=100,{extent},m=")
    with PILImage.open(io.BytesIO(base64.b64decode("".join(parts)))) as shown:
        assert shown.size == sent_size


def test_a_tall_picture_does_not_flood_the_terminal():
    assert half_blocks(PILImage.new("RGB", (16, 16_000)), 64).plain == "\n".join(["▀"] * 32)
    assert half_blocks(PILImage.new("RGB", (320, 640)), 40).plain == "\n".join(["▀" * 20] * 20)


def test_half_blocks():
    picture = PILImage.new("RGB", (2, 2))
    for place, colour in (((0, 0), (255, 0, 0)), ((0, 1), (0, 0, 255)), ((1, 0), (0, 255, 0)), ((1, 1), (9, 9, 9))):
        picture.putpixel(place, colour)
    line = half_blocks(picture, 64)
    assert line.plain == "▀▀"
    styles = [span.style for span in line.spans]
    assert [(s.color.triplet, s.bgcolor.triplet) for s in styles] == [
        ((255, 0, 0), (0, 0, 255)),
        ((0, 255, 0), (9, 9, 9)),
    ]
    assert half_blocks(PILImage.new("RGB", (640, 320)), 40).plain == "\n".join(["▀" * 40] * 10)


def test_the_verb(model, here, monkeypatch, capsys):
    model.save_pretrained(here / "tiny")
    monkeypatch.setattr(sys, "stdin", io.StringIO("/draw a cat\na red apple\n/quit\n"))
    assert cli.main(["chat", "tiny", "--steps", "2", "--max-tokens", "4", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)["messages"]
    assert [m["role"] for m in found] == ["user", "assistant"] * 2 and found[1]["content"] == ["(picture)"]
    assert "tiny can" in said.err and "a-cat.png" in said.err
    for argv in (
        ["--steps", "0"], ["--max-tokens", "0"], ["--temperature", "-1"], ["--seed", "-1"], ["--guidance", "nan"]
    ):  # fmt: skip
        assert cli.main(["chat", "tiny", *argv]) == 2


def test_bytes_that_are_no_text_do_not_end_the_conversation(model, here, monkeypatch, capsys):
    model.save_pretrained(here / "tiny")
    piped = io.TextIOWrapper(io.BytesIO(b"hi\n\xff\xfe\nho\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", piped)
    assert cli.main(["chat", "tiny", "--max-tokens", "2", "--json"]) == 0
    messages = json.loads(capsys.readouterr().out)["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == [["hi"], ["\ufffd\ufffd"], ["ho"]]


def test_words_behind_text_that_the_tokenizer_changes_are_still_said(model, monkeypatch):
    """A tokenizer that falls back to bytes reads a run of them anew with each byte: one that is wrong spoils all before it."""
    texts = ["é", "\ufffd\ufffd\ufffd", "\ufffd\ufffd\ufffd hello", "\ufffd\ufffd\ufffd hello you"]

    def said(segments, *, listen, **settings):
        for token in range(len(texts)):
            listen(0, token)
        return [texts[-1]]

    monkeypatch.setattr(model.backbone, "decode", lambda ids: texts[len(ids) - 1], raising=False)
    monkeypatch.setattr(model, "generate", said, raising=False)
    screen, made = talk(model, "a red apple")
    assert screen == "é\ufffd\ufffd hello you\n"
    assert made.messages[-1]["content"] == [texts[-1]]


class Asked(Opening):
    """A head that opens a picture where the word draw stands, of what stands behind it."""

    def probability(self, backbone, messages):
        return float("draw" in messages[-1]["content"])

    def what(self, backbone, words):
        return words.partition("draw ")[2]


def test_a_picture_opens_where_it_is_asked_for(model, here, monkeypatch):
    monkeypatch.setattr(model, "opening", Asked(64))
    said, made = talk(model, "please draw two blue birds", "a red apple", "draw a cat", draw="auto")
    assert [[type(s).__name__ for s in m["content"]] for m in made.messages[1::2]] == [
        ["Image", "str"], ["str"], ["Image", "str"]]  # fmt: skip
    assert apart(made.messages[1]["content"][0], model.draw(["two blue birds"], seed=0, steps=3)[0]) == 0
    assert "two-blue-birds.png" in said and "a-cat.png" in said
    # Between two pictures the base answers, of words alone.
    first = made.messages[1]["content"][1]
    words = [("user", "please draw two blue birds"), ("assistant", f"(picture)\n{first}"), ("user", "a red apple")]
    ids = model.backbone.chat([{"role": role, "content": content} for role, content in words])
    assert made.messages[3]["content"] == model.generate([Text(ids=ids)], max_tokens=8)
    _, never = talk(model, "please draw two blue birds")
    assert [type(s) for s in never.messages[1]["content"]] == [str]


def test_the_verb_asks_for_a_head_where_it_needs_one(model, here, monkeypatch, capsys):
    model.save_pretrained(here / "tiny")
    assert cli.main(["chat", "tiny", "--draw", "auto"]) == 2
    assert "has no opening head" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("a red apple\n"))
    assert cli.main(["chat", "tiny", "--draw", "always", "--steps", "2", "--max-tokens", "3", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["messages"][1]["content"][0] == "(picture)" and "--draw always" in said.err
