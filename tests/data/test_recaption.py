"""New captions for old pictures: recorded one by one, resumable, held back by a rate, tried again, by our own server."""

import http.server
import json
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from apps.serving import running, tiny_models
from contracts.table import Noise

from xfusion.apps import cli
from xfusion.data.files import MAX_CAPTION
from xfusion.data.recaption import JOURNAL, MAX_INVALID, Asking, Busy, endpoint, recaption
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import open_source

ASKING = Asking(model="someone", prompt="what is this?", size=32)


def silent(*_):
    pass


def test_a_break_loses_nothing_and_asks_nothing_twice(tmp_path):
    source, folder, asked = Noise(5), tmp_path / "out", []

    def ask(pictures, prompt):
        (picture,) = pictures
        assert picture.size == (32, 32) and prompt == "what is this?"
        if len(asked) == 3:
            raise XFusionError("the line went dead")
        asked.append(picture.tobytes())
        return [f"caption  {len(asked)}\n"]

    with pytest.raises(XFusionError, match="went dead"):
        recaption(source, ask, ASKING, folder, progress=silent)
    assert not (folder / "metadata.jsonl").exists()
    with (folder / JOURNAL).open("a") as journal:
        journal.write('{"index": 3, "capt')  # cut by a crash
    assert recaption(source, lambda *_: ["new words"], ASKING, folder, progress=silent) == (5, 2, [])
    made = open_source(str(folder), split="all")
    assert [e.captions[0] for e in made.examples] == ["caption 1", "caption 2", "caption 3", "new words", "new words"]
    assert made.examples[0].captions[1:] == source.examples[0].captions
    assert made.picture(1, 32).tobytes() == source.picture(1, 32).tobytes() == asked[1]
    lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 3, 4]
    assert {(line["model"], line["prompt"], line["source"]) for line in lines} == {
        ("someone", "what is this?", "noise")
    }

    def never(*_):
        raise AssertionError("asked again")

    assert recaption(source, never, ASKING, folder, progress=silent) == (5, 0, [])
    other = Asking(model="another", prompt="what is this?", size=32)
    with pytest.raises(XFusionError, match="was made with model 'someone', this call has 'another'"):
        recaption(source, never, other, folder, progress=silent)
    whole = (folder / JOURNAL).read_text()
    for bad, what in (("{]", "is not JSON"), ("[]", "has no legal field 'index'"), ('{"index": 0}', "field 'id'"),
                      ('{"index": 0, "id": "0"}', "field 'caption'"),
                      ('{"index": 0, "id": "0", "caption": "x"}', "field 'model'")):  # fmt: skip
        (folder / JOURNAL).write_text(whole.replace(whole.splitlines()[1], bad))
        with pytest.raises(XFusionError, match=f"line 2: .*{what}"):
            recaption(source, never, ASKING, folder, progress=silent)
    (folder / JOURNAL).write_text(whole)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(XFusionError, match="holds other files"):
        recaption(source, never, ASKING, tmp_path / "mine", progress=silent)


def test_a_picture_without_a_caption_is_left_out_told_and_asked_for_again(tmp_path):
    source, folder = Noise(5), tmp_path / "out"
    answers = iter(["one", " ", "three", "x" * (MAX_CAPTION + 1), "five"])
    made = recaption(source, lambda *_: [next(answers)], ASKING, folder, progress=silent)
    assert made[:2] == (3, 3) and [line.partition(" answered ")[2].split()[0] for line in made.skipped] == ["0", "4001"]
    assert all(source.examples[i].origin in line for i, line in zip((1, 3), made.skipped, strict=True))
    found = open_source(str(folder), split="all")
    assert [e.captions[0] for e in found.examples] == ["one", "three", "five"]
    assert found.picture(1, 32).tobytes() == source.picture(2, 32).tobytes()
    lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    assert [line["index"] for line in lines if "skipped" in line] == [1, 3] and len(lines) == 5
    again = recaption(source, lambda *_: ["now"], ASKING, folder, progress=silent)
    assert again == (5, 2, [])
    captions = [e.captions[0] for e in open_source(str(folder), split="all").examples]
    assert captions == ["one", "now", "three", "now", "five"]


def test_characters_that_no_caption_may_have_are_taken_out(tmp_path):
    """Half of a cut-off emoji, and a bell: with them, the journal could not be written and the folder not be opened."""
    answers = iter(["one", "\ud83d x", "three", "a \x07 bell", "five"])
    made = recaption(Noise(5), lambda *_: [next(answers)], ASKING, tmp_path / "out", progress=silent)
    assert made == (5, 5, [])
    found = open_source(str(tmp_path / "out"), split="all")
    assert [e.captions[0] for e in found.examples] == ["one", "x", "three", "a bell", "five"]
    assert recaption(Noise(5), lambda *_: ["now"], ASKING, tmp_path / "out", progress=silent) == (5, 0, [])


def test_captions_of_a_source_that_changed_are_refused(tmp_path):
    """A picture that comes first moves all others: each would get the caption of the one before it."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in "bcd":
        Noise(1).picture(0, 32).save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text(f"old {name}")
    recaption(open_source(str(photos)), lambda *_: ["new"], ASKING, tmp_path / "out", progress=silent)
    made = (tmp_path / "out" / "metadata.jsonl").read_text()
    Noise(1).picture(0, 32).save(photos / "a.png")
    (photos / "a.txt").write_text("old a")
    with pytest.raises(XFusionError, match=r"line 1: picture 0 of .*photos was 'b\.png' and is 'a\.png' now"):
        recaption(open_source(str(photos)), lambda *_: ["new"], ASKING, tmp_path / "out", progress=silent)
    for name in "abc":
        (photos / f"{name}.png").unlink(), (photos / f"{name}.txt").unlink()
    (tmp_path / "out" / JOURNAL).write_text("".join((tmp_path / "out" / JOURNAL).read_text().splitlines(True)[2:]))
    with pytest.raises(XFusionError, match=r"line 1: picture 2 of .* was 'd\.png' and is 'none' now"):
        recaption(open_source(str(photos)), lambda *_: ["new"], ASKING, tmp_path / "out", progress=silent)
    assert (tmp_path / "out" / "metadata.jsonl").read_text() == made


def test_answers_that_are_never_captions_end_it_before_all_are_paid_for(tmp_path):
    asked = []

    def ask(*_):
        asked.append(1)
        return [""]

    with pytest.raises(XFusionError, match="none of the first 20 answers is a caption, .*another folder"):
        recaption(Noise(30), ask, ASKING, tmp_path / "out", progress=silent)
    assert len(asked) == MAX_INVALID == 20


def test_a_request_that_is_made_again_counts_and_waits_longer(tmp_path, monkeypatch):
    now, times = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def ask(*_):
        times.append(now[0])
        if len(times) <= 3:
            raise Busy("later", 9.0 if len(times) == 2 else None)
        return ["words"]

    asking = Asking(model="someone", prompt="", size=8, per_minute=30, retries=3)
    assert recaption(Noise(2), ask, asking, tmp_path / "out", progress=silent) == (2, 2, [])
    assert times == [100.0, 102.0, 111.0, 113.0, 115.0]  # two seconds apart, or as many as were named
    times.clear()
    with pytest.raises(Busy, match="later"):
        recaption(Noise(2), ask, Asking(model="x", prompt="", size=8, retries=2), tmp_path / "other", progress=silent)
    assert [b - a for a, b in pairwise(times)] == [0.5, 9.0]


def test_a_server_that_asks_to_wait_for_a_day_ends_the_run_with_its_words(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"it waits {seconds} s"))

    def ask(*_):
        raise Busy("the quota is used up", 86_400)

    asking = Asking(model="someone", prompt="", size=8, retries=3)
    with pytest.raises(
        XFusionError, match=r"^the quota is used up; it asks to wait 86,400 s, more than 600: give the same"
    ):
        recaption(Noise(2), ask, asking, tmp_path / "out", progress=silent)


def test_no_more_requests_than_the_rate_allows(tmp_path, monkeypatch):
    now, slept = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    asking = Asking(model="someone", prompt="", size=8, per_minute=30)
    times = []

    def ask(*_):
        times.append(now[0])
        now[0] += 0.5
        return ["words"]

    recaption(Noise(4), ask, asking, tmp_path / "out", progress=silent)
    assert times == [100.0, 102.0, 104.0, 106.0] and slept == [0.0, 1.5, 1.5, 1.5]


class Overrun(http.server.BaseHTTPRequestHandler):
    """Too busy twice, then an answer, then answers without one, then a refusal; and a picture in every request."""

    nothing: ClassVar[list] = [None, [], [{"index": 0, "finish_reason": "content_filter"}]]

    seen: ClassVar[list[dict]] = []

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        number = len(self.seen)
        status = 429 if number <= 2 else 200 if number <= 7 else 400
        message = {"role": "assistant", "content": "a red apple"}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}  # fmt: skip
        body["choices"] = self.nothing[number - 4] if 4 <= number <= 6 else body["choices"]
        kind = "text/html" if number == 7 else "application/json"
        body = json.dumps(body if status == 200 else {"error": {"message": "no", "type": "x"}}).encode()
        body = b"<html>a page for people</html>" if number == 7 else body
        self.send_response(status)
        for key, value in (("Content-Type", kind), ("Content-Length", len(body)), ("Retry-After-Ms", 1)):
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body)


def test_a_busy_server_is_asked_again_and_a_refusal_ends_it(tmp_path):
    pytest.importorskip("openai", reason="openai is not installed (extra dev): no endpoint can be asked")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Overrun)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        ask, pictures = endpoint(url, "m", key="none", max_tokens=9), [Noise(1).picture(0, 8)]
        asking = Asking(model="m", prompt="what?", size=8, retries=2)
        assert recaption(Noise(1), ask, asking, tmp_path / "out", progress=silent) == (1, 1, [])
        assert len(Overrun.seen) == 3 and "a red apple" in (tmp_path / "out" / "metadata.jsonl").read_text()
        content = Overrun.seen[0]["messages"][0]["content"]
        assert content[0]["image_url"]["url"].startswith("data:image/png;base64,") and content[1]["text"] == "what?"
        assert Overrun.seen[0]["max_tokens"] == 9
        assert [ask(pictures, "") for _ in Overrun.nothing] == [[""]] * 3
        with pytest.raises(XFusionError, match="which is no chat completion"):
            ask(pictures, "")
        with pytest.raises(XFusionError, match="refuses: .*400"):
            ask(pictures, "")
    finally:
        server.shutdown()
        server.server_close()


def test_our_own_server_captions_as_the_pack_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for index in range(2):
        Noise(2).picture(index, 32).save(f"{index}.png")
    Path("old").mkdir()
    for index in range(2):
        Path(f"{index}.png").rename(f"old/{index}.png")
        Path(f"old/{index}.txt").write_text(f"old words {index}\n")
    models = tiny_models(tmp_path / "base")
    with running(models) as server:
        call = [
            "data",
            "recaption",
            "old",
            "--with",
            f"{server.address}/v1",
            "-o",
            "new",
            "--size",
            "32",
            "--max-tokens",
            "6",
        ]
        assert cli.main(call) == 2 and "name its model" in capsys.readouterr().err
        assert cli.main([*call, "--model", "dual-tower", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["asked"] == 2
    (model,) = models.values()
    source = open_source("old", split="all")
    question = "Describe this picture in one sentence."
    expected = [model.generate([source.picture(i, 32), question], max_tokens=6)[0] for i in range(2)]
    found = open_source("new", split="all")
    assert [e.captions[0] for e in found.examples] == [" ".join(words.split()) for words in expected]
    assert [e.captions[1] for e in found.examples] == ["old words 0", "old words 1"]
    # And by the pack itself, without a server.
    model.save_pretrained("pack")
    assert (
        cli.main(["data", "recaption", "old", "--with", "pack", "-o", "by-pack", "--size", "32", "--max-tokens", "6"])
        == 0
    )
    direct = model.caption([source.picture(i, 32) for i in range(2)], question=question, max_tokens=6)
    assert [e.captions[0] for e in open_source("by-pack", split="all").examples] == [
        " ".join(w.split()) for w in direct
    ]
