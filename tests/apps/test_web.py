"""The page in a browser that nobody sees: clicked, typed into, given files, and looked at; and its desk without one."""

import base64
import io
import os
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from apps.serving import apart, draw_only, listening_at, opens_always, png, tiny_models
from contracts.table import SIDE, Noise, hearing_model, make_model, model_config, randomise

import xfusion
from xfusion.apps import cli
from xfusion.apps.server import batches, reading, requests
from xfusion.apps.server.answers import Refused
from xfusion.apps.server.batches import Continue, Words, drawing_progress
from xfusion.apps.server.limits import Limits
from xfusion.apps.web import brush, heat
from xfusion.apps.web import desk as web_desk
from xfusion.apps.web.desk import Desk, Drawn, Look, Preview, Stopped, Waiting
from xfusion.composition import together
from xfusion.data.sequence import Text, XFusionError
from xfusion.evaluation.attention import drawing_attention
from xfusion.modalities.image import ImageModality, square_picture
from xfusion.model import Model
from xfusion.objectives.next_token import NextToken
from xfusion.opening import Opening, answer_states, word_states

TINY = Limits(queue=4, batch=4, seconds=20, n=3, tokens=24, steps=30, pixels=10_000, body=200_000, characters=500)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("base"))["dual-tower"]


@pytest.fixture
def desk(model, tmp_path):
    made = Desk({"tiny": model}, TINY, tmp_path)
    made.batches.start()
    yield made
    made.batches.close(10)


def until(condition, seconds=20):
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def news(events):
    """Without those that say that there is none, as on a busy machine."""
    return (event for event in events if not isinstance(event, Waiting))


# -------------------------------------------------------------------------------------------------------------- desk


def test_pictures_come_with_previews_and_remember_how_they_were_drawn(desk, model):
    found = list(desk.draw("me", "tiny", "a red apple", n=2, seed=7, steps=3, guidance=2))
    drawn = [one for one in found if isinstance(one, Drawn)]
    expected = model.draw(["a red apple"] * 2, seed=7, steps=3, guidance=2)
    for one, other in zip(drawn, expected, strict=True):
        assert apart(one.picture, other) == 0
        with Image.open(one.path) as file:
            assert apart(file, other) == 0
            assert file.info["prompt"] == "a red apple" and file.info["seed"] == str(7 + one.index)
            assert file.info["pack_fingerprint"] == model.fingerprint
    previews = [one for one in found if isinstance(one, Preview)]
    assert previews and {one.total for one in previews} == {3}
    assert previews[0].done == 1 and previews[0].picture.size == (SIDE, SIDE)
    assert not desk.open, "nobody waits any more"


def test_estimates_of_a_look_are_those_of_the_walk(desk, model):
    *strip, (picture, attention) = news(desk.look("me", "tiny", "two blue birds", seed=3, steps=4, guidance=1))
    estimates = []
    (expected,) = model.draw(
        ["two blue birds"],
        seed=3,
        steps=4,
        guidance=1,
        progress=lambda done, total, estimate: estimates.append(estimate),
    )
    assert apart(picture, expected) == 0 and [one.done for one in strip] == [1, 2, 3, 4]
    for one, estimate in zip(strip, estimates, strict=True):
        assert apart(one.picture, model.image.to_pil(model.image.decode(estimate, SIDE))[0]) == 0
    total = attention.on_words.sum(-1) + attention.on_begin + attention.on_picture.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_a_stop_ends_drawing_between_two_steps(desk):
    walk = news(desk.draw("me", "tiny", "a cat", steps=30))
    assert isinstance(next(walk), Preview)
    desk.stop("somebody else")
    assert not desk.open["me"][0].dropped
    desk.stop("me")
    with pytest.raises(Stopped):
        list(walk)
    # The thread that computes is free again, and whoever leaves without a word gives back the place too.
    walk = desk.draw("me", "tiny", "a cat", steps=30)
    next(walk)
    (job,) = desk.open["me"]
    walk.close()
    assert job.dropped and not desk.open
    assert any(isinstance(found, Drawn) for found in desk.draw("me", "tiny", "a cat", steps=1))


def test_a_conversation_is_answered_as_the_server_answers(desk, model):
    picture = Noise(1).picture(0, 32)
    messages = [{"role": "user", "content": [picture, "what is this?"]}]
    *_, answer = desk.say("me", "tiny", messages, max_tokens=8)
    assert answer == model.generate([picture, "what is this?"], max_tokens=8)


@pytest.fixture
def draws_at_once(model):
    """Every answer opens with a picture, of all words."""
    with opens_always(model):
        yield


@pytest.mark.usefixtures("draws_at_once")
def test_a_conversation_draws_when_asked(desk, model):
    asked = [{"role": "user", "content": ["two blue birds"]}]
    settings = {"draw": "auto", "steps": 3, "seed": 4, "max_tokens": 6}
    *before, answer = desk.say("me", "tiny", asked, **settings)
    expected = model.answer(asked, **settings)
    assert apart(answer[0], expected[0]) == 0 and answer[1:] == expected[1:]
    previews = [one for one in before if isinstance(one, Preview)]
    assert previews and previews[-1].total == 3
    again = [*asked, {"role": "assistant", "content": answer}, {"role": "user", "content": ["and now?"]}]
    *_, later = desk.say("me", "tiny", again, max_tokens=6)
    assert later == model.answer(again, draw="never", max_tokens=6)


def test_twelve_pictures_drawn_in_one_conversation(desk, model, monkeypatch):
    """Nine are more than the server lets a user show; and a pack that only draws cannot look at its own."""
    monkeypatch.setattr(desk, "limits", Limits(queue=4, batch=4, seconds=20, tokens=24, pictures=8))
    desk.models["draws"] = drawer = draw_only(model.backbone)
    for name, pack in (("tiny", model), ("draws", drawer)):
        messages = []
        with opens_always(pack):
            for turn in range(12):
                messages.append({"role": "user", "content": [f"{turn} cats"]})
                if turn % 2:
                    *_, answer = desk.say("me", name, messages, draw="auto", steps=1, seed=turn, max_tokens=2)
                else:
                    drawn = desk.draw("me", name, f"{turn} cats", steps=1)
                    answer = [one.picture for one in drawn if isinstance(one, Drawn)]
                assert isinstance(answer[0], Image.Image)
                messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": ["what is this?"]})
        *_, (words,) = desk.say("me", name, messages, max_tokens=4)
        if pack is drawer:  # the base answers, of words alone
            called = [
                {
                    "role": m["role"],
                    "content": "\n".join(s if isinstance(s, str) else "(picture)" for s in m["content"]),
                }
                for m in messages
            ]
            (expected,) = model.generate([Text(ids=model.backbone.chat(called))], max_tokens=4)
            assert words == expected


@pytest.mark.usefixtures("draws_at_once")
def test_a_stop_ends_what_a_conversation_draws(desk):
    answer = news(desk.say("me", "tiny", [{"role": "user", "content": ["two blue birds"]}], draw="auto", steps=30))
    assert isinstance(next(answer), Preview)
    desk.stop("me")
    with pytest.raises(Stopped):
        list(answer)


@pytest.mark.usefixtures("draws_at_once")
def test_a_stop_behind_an_answer_that_nobody_has_read_yet_keeps_it(desk, model):
    asked, settings = [{"role": "user", "content": ["two blue birds"]}], {"draw": "auto", "steps": 2, "max_tokens": 4}
    answer = news(desk.say("me", "tiny", asked, **settings))
    assert isinstance(next(answer), Preview)
    (job,) = desk.open["me"]
    until(lambda: job.ended)
    desk.stop("me")
    *_, last = answer
    assert apart(last[0], job.answer[0]) == 0 and "".join(last[1:]) == "".join(job.answer[1:])


@pytest.mark.usefixtures("draws_at_once")
def test_a_stop_behind_a_finished_picture_keeps_it(desk, model, monkeypatch):
    """It ends the words alone."""
    choose = model.text_objective.choose

    def slowly(*args):
        time.sleep(0.1)
        return choose(*args)

    monkeypatch.setattr(type(model.text_objective), "choose", staticmethod(slowly))
    asked = [{"role": "user", "content": ["two blue birds"]}]
    answer = desk.say("me", "tiny", asked, draw="auto", steps=2, max_tokens=24)
    drawn = next(event for event in answer if isinstance(event, list))
    desk.stop("me")
    *_, last = answer
    assert last[0] is drawn[0] and isinstance(last[0], Image.Image)
    assert len(last) <= 2 and all(isinstance(words, str) and words for words in last[1:])


def test_what_is_beyond_the_limits_is_refused_in_a_line(desk, tmp_path, monkeypatch):
    for settings, complaint in (
        ({"steps": 31}, "steps is 31, more than the 30"),
        ({"n": 4}, "n is 4, more than the 3"),
        ({"steps": 0}, "steps: Input should be greater"),
        ({"seed": -1}, "seed: Input should be greater"),
        ({"guidance": float("nan")}, "guidance: Input should be a finite number"),
    ):
        with pytest.raises(Refused, match=complaint):
            next(desk.draw("me", "tiny", "a cat", **settings))
    with pytest.raises(Refused, match="characters is 501"):
        next(desk.draw("me", "tiny", "a" * 501))
    with pytest.raises(Refused, match="there is no pack 'other'"):
        next(desk.draw("me", "other", "a cat"))
    for name, content, complaint in (
        ("empty.png", b"", "is empty"),
        ("large.png", png(Image.new("RGB", (101, 100))), "10100 pixels|more than"),
        ("words.png", b"no picture", "the file is not a picture"),
        ("heavy.png", bytes(200_001), "size in bytes is 200001"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Refused, match=complaint):
            desk.open_upload(tmp_path / name, "tiny")
    monkeypatch.setattr(Continue, "run", lambda work, jobs: time.sleep(0.3) or [[]] * len(jobs))
    monkeypatch.setattr(desk, "limits", Limits(seconds=0.1))
    with pytest.raises(Refused, match="no answer within 0.1 seconds"):
        list(desk.draw("me", "tiny", "a cat"))


def test_fewer_steps_than_usual_refuse_nothing_that_names_none(model, tmp_path):
    made = Desk({"tiny": model}, replace(TINY, steps=5), tmp_path)
    made.batches.start()
    try:
        picture = Noise(1).picture(0, 32)
        for content in ([picture], [picture, "what is this?"], ["a red apple"]):
            *_, answer = made.say("me", "tiny", [{"role": "user", "content": content}], max_tokens=4)
            assert isinstance(answer[0], str)
        *_, drawn = made.draw("me", "tiny", "a cat", seed=1)
        assert drawn.facts["steps"] == 5
        *strip, _ = news(made.look("me", "tiny", "a cat"))
        assert [one.done for one in strip] == [1, 2, 3, 4, 5]
        *_, redrawn = made.repaint("me", "tiny", png(picture), png(Image.new("L", (32, 32), "white")), "a cat")
        assert redrawn.facts["steps"] == 5
    finally:
        made.batches.close(10)


def test_what_is_asked_for_while_something_else_ends_is_stopped_too(desk, monkeypatch):
    """Two tabs of one user: the second's jobs must not go with the first's list."""
    gates, runs = [threading.Event(), threading.Event()], []

    def run(work, jobs):
        runs.append(jobs)
        assert gates[len(runs) - 1].wait(20)
        return [["a"]] * len(jobs)

    monkeypatch.setattr(Words, "run", run)

    def ask():
        with suppress(Stopped):
            list(desk.say("me", "tiny", [{"role": "user", "content": ["go on"]}]))

    first, second = threading.Thread(target=ask), threading.Thread(target=ask)

    class Open(dict):
        def setdefault(self, who, jobs):
            found = super().setdefault(who, jobs)
            if threading.current_thread() is second:  # just now the first one ends, if it can
                gates[0].set()
                first.join(1)
            return found

    desk.open = Open()
    first.start()
    end = time.monotonic() + 20
    while not runs:
        assert time.monotonic() < end
        time.sleep(0.01)
    second.start()
    while len(runs) < 2 or first.is_alive():
        assert time.monotonic() < end
        time.sleep(0.01)
    desk.stop("me")
    assert [job.dropped for job in runs[1]] == [True]
    gates[1].set()
    second.join(10)
    assert not desk.open


def test_the_deadline_holds_for_an_answer_that_never_pauses(desk, monkeypatch):
    def talk(work, jobs):
        end = time.monotonic() + 1
        while time.monotonic() < end:
            jobs[0].notify(jobs[0], "on and on ")
            time.sleep(0.01)
        return [["on and on"]]

    monkeypatch.setattr(Words, "run", talk)
    monkeypatch.setattr(desk, "limits", Limits(seconds=0.2))
    with pytest.raises(Refused, match="no answer within 0.2 seconds"):
        list(desk.say("me", "tiny", [{"role": "user", "content": ["go on"]}]))


def test_a_pack_that_hears_answers_words_and_refuses_pictures(desk, model, tmp_path):
    expected = model.generate([Text(ids=model.backbone.chat("hello"))], max_tokens=8)
    desk.models["tiny"] = model = hearing_model(model.backbone, makes=True)
    Noise(1).picture(0, 32).save(tmp_path / "a.png")
    seen = png(Noise(1).picture(0, 32))
    mask = png(Image.new("L", (32, 32), "white"))
    shown = [{"role": "user", "content": [Noise(1).picture(0, 32)]}]
    *_, answer = desk.say("me", "tiny", [{"role": "user", "content": ["hello"]}], max_tokens=8)
    assert answer == expected
    for ask in (
        lambda: desk.open_upload(tmp_path / "a.png", "tiny"),
        lambda: next(desk.say("me", "tiny", shown)),
        lambda: next(desk.draw("me", "tiny", "a cat")),
        lambda: next(desk.repaint("me", "tiny", seen, mask, "a cat")),
        lambda: next(desk.look("me", "tiny", "a cat")),
    ):
        with pytest.raises(Refused, match="knows sounds, not pictures") as refused:
            ask()
        assert (refused.value.status, refused.value.code) == (400, "not_capable")
    drawn = requests.parse(requests.Chat, {"messages": [{"role": "user", "content": "a"}], "modalities": ["image"]})
    with pytest.raises(Refused, match="knows sounds, not pictures") as refused:
        reading.chat(drawn, model, TINY, frozenset())
    assert refused.value.code == "not_capable"


def test_paint_says_what_is_drawn_anew(desk, model, tmp_path):
    """Half of a pixel is enough, a slip of the brush over the line between two is not."""
    scale = brush.SIDE // SIDE
    layers = []
    for number, box in enumerate(
        ((0, 0, 3 * scale, 2 * scale), (8 * scale, 8 * scale, 10 * scale + scale // 2 - 1, 9 * scale))
    ):
        paint = Image.new("RGBA", (brush.SIDE, brush.SIDE))
        paint.paste((234, 92, 20, 140), box)
        paint.save(tmp_path / f"{number}.png")
        layers.append(tmp_path / f"{number}.png")
    expected = Image.new("L", (SIDE, SIDE))
    expected.paste(255, (0, 0, 3, 2))
    expected.paste(255, (8, 8, 10, 9))
    assert apart(desk.painted_mask(layers, SIDE), expected) == 0
    *_, drawn = desk.repaint(
        "me", "tiny", png(seen := Noise(1).picture(0, SIDE)), png(expected), "a house", steps=2, seed=0
    )
    assert apart(drawn.picture, model.inpaint(seen, expected, "a house", steps=2, seed=0)) == 0

    nothing = Image.new("RGBA", (2 * brush.SIDE, 2 * brush.SIDE))
    nothing.paste((234, 92, 20, 255), (0, 0, 2 * brush.SIDE, scale - 1))  # of a sharper screen, and too thin
    nothing.save(tmp_path / "thin.png")
    Image.new("RGBA", (4 * brush.SIDE + 1, 4 * brush.SIDE)).save(tmp_path / "large.png")
    (tmp_path / "words.png").write_bytes(b"no picture")
    for files, complaint in (
        ([], "nothing is painted"),
        ([tmp_path / "thin.png"], "nothing is painted"),
        ([tmp_path / "large.png"], "the paint .*pixels"),
        ([tmp_path / "words.png"], "the paint"),
    ):
        with pytest.raises((Refused, XFusionError), match=complaint):
            desk.painted_mask(files, SIDE)


def test_a_sheet_shows_the_picture_and_its_cells(model):
    seen = Noise(1).picture(0, SIDE)
    shown = brush.sheet(seen, (4, 4))
    small = numpy.asarray(shown)[
        brush.SIDE // SIDE // 2 :: brush.SIDE // SIDE, brush.SIDE // SIDE // 2 :: brush.SIDE // SIDE
    ]
    assert (small == numpy.asarray(seen)).all()
    changed = numpy.asarray(shown) != numpy.asarray(seen.resize(shown.size, Image.Resampling.NEAREST))
    rows, columns = numpy.nonzero(changed.any(axis=2))
    cell = brush.SIDE // 4
    assert {int(row) for row in rows if (changed[row].any(axis=1)).mean() > 0.9} == {cell, 2 * cell, 3 * cell}
    assert ((rows % cell == 0) | (columns % cell == 0)).all()


# --------------------------------------------------------------------------------------------------------------- heat


def test_heat_maps_show_the_weights(model):
    tokens = torch.zeros(16, 48)
    found = drawing_attention(model, "a red apple", tokens, (4, 4))
    black = Image.new("RGB", (SIDE, SIDE))
    weights = torch.zeros(16)
    weights[6] = 0.3  # the second row's third
    shown = numpy.asarray(heat.overlay(black, weights, (4, 4), 0.3))
    cell = heat.SIDE // 4
    assert (shown[cell : 2 * cell, 2 * cell : 3 * cell] == (0.1 * 40 + 0.9 * heat.HOT).round()).all()
    assert (shown[:cell] == 40).all() and (shown[2 * cell :] == 40).all()
    page = heat.table(found)
    assert page.count("<tr>") == 1 + len(found.words) + 2
    for row, share in enumerate(found.on_words.mean(1).T.tolist()):
        cells = page.split("<tr>")[2 + row]
        assert [f">{100 * one:.0f}</td>" in cells for one in share] == [True] * len(share)
    one = heat.maps(black, found, heat.names(found)[1])
    assert len(one) == len(found.layers)
    assert one[0][1].startswith(f"layer 1: {found.on_words[0, :, 1].mean():.1%}")


# ------------------------------------------------------------------------------------------------------------ browser


def chromium():
    """The path of Chromium. What is missing fails, as this tier is run before a release; whoever means it may skip."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        import playwright.sync_api  # noqa: F401

        missing = [] if path else ["Chromium: apt-get install chromium"]
    except ImportError:
        missing = ["playwright: make setup"] + ([] if path else ["Chromium: apt-get install chromium"])
    if missing and os.environ.get("XFUSION_WITHOUT_BROWSER") == "1":
        pytest.skip(f"XFUSION_WITHOUT_BROWSER=1, and there is no {' and no '.join(missing)}")
    if missing:
        line = f"there is no {' and no '.join(missing)}, or set XFUSION_WITHOUT_BROWSER=1 to skip the tests of the page"
        pytest.fail(line, pytrace=False)
    return path


@pytest.mark.parametrize(("found", "imported"), [(None, True), ("bin/chromium", False), (None, False)])
def test_a_missing_browser_fails_unless_it_is_meant(monkeypatch, found, imported):
    monkeypatch.setattr(shutil, "which", lambda name: found)
    monkeypatch.setitem(sys.modules, "playwright.sync_api", SimpleNamespace() if imported else None)
    monkeypatch.delenv("XFUSION_WITHOUT_BROWSER", raising=False)
    wanted = {"apt-get install chromium": found is None, "playwright: make setup": not imported}
    with pytest.raises(pytest.fail.Exception, match="set XFUSION_WITHOUT_BROWSER=1") as failed:
        chromium()
    assert {words: words in str(failed.value) for words in wanted} == wanted and "\n" not in str(failed.value)
    monkeypatch.setenv("XFUSION_WITHOUT_BROWSER", "1")
    with pytest.raises(pytest.skip.Exception, match="XFUSION_WITHOUT_BROWSER=1") as skipped:
        chromium()
    assert {words: words in str(skipped.value) for words in wanted} == wanted


@pytest.fixture(scope="module")
def page_at(model, tmp_path_factory):
    """The page's address, and the application."""
    page = pytest.importorskip("xfusion.apps.web.page", reason="gradio is not installed: pip install 'xfusion[web]'")
    packs = {"tiny": model, "draws": draw_only(model.backbone)}
    randomise(packs["draws"], seed=1)
    app = page.create(packs, TINY, tmp_path_factory.mktemp("web"), Path(__file__).parents[2] / "comparison")
    with listening_at(app, socket.create_server(("127.0.0.1", 0))) as address:
        yield address, app


def test_an_address_that_a_request_names_is_not_fetched(page_at, monkeypatch):
    """Made by hand: gradio takes the address of a file in any component's place, and fetches it."""
    import httpx
    import safehttpx

    address, asked = "http://pictures.example/a.png", []

    async def noted(url, *_, **__):
        asked.append(url)
        raise OSError("nothing is fetched in a test")

    monkeypatch.setattr(safehttpx, "get", noted)
    monkeypatch.setattr(safehttpx, "async_validate_url", noted)
    file = {"path": address, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}
    with httpx.Client(base_url=page_at[0], timeout=60, trust_env=False) as client:
        assert client.get(f"gradio_api/file={address}").status_code == 403
        config = client.get("/config").json()
        kinds = {component["id"]: component["type"] for component in config["components"]}
        sent = 0
        for event in config["dependencies"]:
            for place, component in enumerate(event["inputs"]):
                if kinds[component] not in ("multimodaltextbox", "image", "imageeditor", "textbox"):
                    continue
                data: list[object] = [None] * len(event["inputs"])
                data[place] = {
                    "multimodaltextbox": {"text": "", "files": [file]},
                    "imageeditor": {"background": None, "layers": [file], "composite": None},
                }.get(kinds[component], file)
                body = {"data": data, "fn_index": event["id"], "session_hash": f"hand{sent}"}
                assert client.post("gradio_api/queue/join", json=body).status_code == 200
                told = client.get("gradio_api/queue/data", params={"session_hash": f"hand{sent}"}).text
                assert '"success":false' in told and '"process_generating"' not in told
                sent += 1
        sheet = next(one for one, kind in kinds.items() if kind == "imageeditor")
        body = {"data": {}, "session_hash": "hand", "component_id": sheet, "fn_name": "accept_blobs"}
        assert client.post("gradio_api/component_server", json=body).status_code == 404, "bytes are kept for nobody"
    assert sent > 10 and not asked


def test_guidance_follows_the_pack(model, tmp_path, monkeypatch):
    page = pytest.importorskip("xfusion.apps.web.page", reason="gradio is not installed: pip install 'xfusion[web]'")
    blocks = page.blocks(Desk({"one": model, "two": model}, TINY, tmp_path), None)
    (pack,) = [one for one in blocks.blocks.values() if getattr(one, "elem_id", None) == "pack"]
    sliders = [one for one in blocks.blocks.values() if getattr(one, "label", None) == "Guidance"]
    events = [one for one in blocks.fns.values() if (pack._id, "change") in one.targets]
    (event,) = [one for one in events if set(one.outputs) == set(sliders)]
    assert len(sliders) == 4
    monkeypatch.setattr(Model, "guidance", 6.5)
    assert event.fn("two") == dict.fromkeys(sliders, 6.5)


def test_a_pack_that_only_reads_says_so_and_not_what_to_paint(model, tmp_path):
    controls = pytest.importorskip(
        "xfusion.apps.web.controls", reason="gradio is not installed: pip install 'xfusion[web]'"
    )
    from xfusion.apps.web import picture

    reads = make_model(model.backbone, "openflamingo, all previous")
    assert reads.capabilities == {"text", "caption"}
    shown = picture.Picture(controls.Controls(Desk({"reads": reads, "draws": model}, TINY, tmp_path)))
    Noise(1).picture(0, 32).save(tmp_path / "a.png")
    for given, region in ((None, picture.PAINTED), (str(tmp_path / "a.png"), "left half")):
        (*_, (_, line)) = shown.inpaint("reads", given, region, [], "a house", "0", 2, 1, None)
        assert "this model cannot draw: it can caption, text; take a pack of a recipe such as xfusion" in line
    assert shown.canvas("reads", str(tmp_path / "a.png")) == (None, controls.status())
    laid, line = shown.canvas("draws", str(tmp_path / "a.png"))
    assert line == controls.status() and Image.open(laid["background"]).size == (brush.SIDE, brush.SIDE)


@pytest.mark.parametrize("tab", ["chat", "draw"])
def test_what_was_cleared_away_says_no_more(desk, tab):
    """A stop tells that it stopped; the same word after a clearing would stay on an empty page."""
    controls = pytest.importorskip(
        "xfusion.apps.web.controls", reason="gradio is not installed: pip install 'xfusion[web]'"
    )
    me = SimpleNamespace(session_hash="me")
    from xfusion.apps.web.chat import Chat
    from xfusion.apps.web.gallery import Gallery

    shown = (Chat if tab == "chat" else Gallery)(controls.Controls(desk))

    def drawing():
        settings = ("0", 30, 1)
        if tab == "chat":
            walk = shown.draw("tiny", {"text": "a cat"}, [], *settings, me)
        else:
            walk = shown.draw("tiny", "a cat", 1, *settings, [], me)
        next(line for *_, line in walk if "step" in line)
        return walk

    for _ in range(2):
        walk = drawing()
        shown.controls.stop(me)
        assert "stopped" in [*walk][-1][-1]
        walk, said = drawing(), []
        with ThreadPoolExecutor(1) as other:
            cleared = other.submit(shown.forget if tab == "chat" else shown.clear, me)
            with pytest.raises(TimeoutError):
                cleared.result(0.3)  # an estimate may be on its way to the browser
            said += [line for *_, line in walk]
            assert cleared.result(10)[-1] == controls.status()
        assert not any("stopped" in line for line in said) and not shown.clearing.working


def test_whoever_has_cleared_a_tab_is_forgotten(desk):
    controls = pytest.importorskip(
        "xfusion.apps.web.controls", reason="gradio is not installed: pip install 'xfusion[web]'"
    )

    class Slow(Counter):
        """Another thread has time between reading a number and writing it."""

        def __getitem__(self, user):
            found = super().__getitem__(user)
            time.sleep(0.001)
            return found

    clearing = controls.Clearing(desk)
    clearing.working = Slow()
    users = [SimpleNamespace(session_hash=name) for name in "abc"]

    def answer(user):
        for _ in range(5):
            with clearing.answering(user):
                assert not clearing.cleared(ValueError(), user)
            clearing.clear(user)

    with ThreadPoolExecutor(6) as others:
        assert list(others.map(answer, users * 2)) == [None] * 6
    with ThreadPoolExecutor(1) as other, clearing.answering(users[0]):
        cleared = other.submit(clearing.clear, users[0])
        until(lambda: clearing.cleared(Stopped(), users[0]))
        assert not clearing.cleared(Stopped(), users[1]) and not cleared.done()
    assert not clearing.working and not clearing._cleared


def test_of_two_packs_the_sheet_shows_the_cells_of_the_one_that_draws(model, tmp_path):
    controls = pytest.importorskip(
        "xfusion.apps.web.controls", reason="gradio is not installed: pip install 'xfusion[web]'"
    )
    from xfusion.apps.web.picture import Picture

    base, silent = model.backbone, NextToken.Config(weight=0.0)
    config = replace(model_config(base), text=silent, image=ImageModality.Config(patch=8, sizes=(2 * SIDE,)))
    drawer = Model(config, base)
    randomise(drawer)
    both = together(drawer.eval(), model)
    assert both.reads(Noise(1).picture(0, 32)).sizes == (SIDE,) and both.image.sizes == (2 * SIDE,)
    Noise(1).picture(0, 64).save(tmp_path / "a.png")
    desk = Desk({"both": both}, TINY, tmp_path)
    desk.batches.start()
    try:
        shown, me = Picture(controls.Controls(desk)), SimpleNamespace(session_hash="me")
        laid, line = shown.canvas("both", str(tmp_path / "a.png"))
        seen = square_picture(Image.open(tmp_path / "a.png"), 2 * SIDE)
        assert line == controls.status()
        assert apart(Image.open(laid["background"]), brush.sheet(seen, (4, 4))) == 0
        paint = Image.new("RGBA", (brush.SIDE, brush.SIDE))
        paint.paste((234, 92, 20, 255), (0, 0, brush.SIDE // 4, brush.SIDE // 4))  # one cell
        paint.save(tmp_path / "paint.png")
        layers, settings = [str(tmp_path / "paint.png")], ("a house", "0", 2, 1)
        *_, (file, _) = shown.inpaint("both", str(tmp_path / "a.png"), "what I paint", layers, *settings, me)
        changed = (numpy.asarray(Image.open(file)) != numpy.asarray(seen)).any(axis=2)
        assert changed[:8, :8].any() and not changed[8:].any() and not changed[:, 8:].any()
        *_, said = shown.caption("both", str(tmp_path / "a.png"), "", me)
        assert said[1] == controls.status()
    finally:
        desk.batches.close(10)


@pytest.fixture
def held(monkeypatch):
    """Holds every computation until it is opened; counts them."""
    gate = SimpleNamespace(opened=threading.Event(), count=0)

    def holds(run):
        def held_run(work, jobs):
            gate.count += 1
            assert gate.opened.wait(20)
            return run(work, jobs)

        return held_run

    for kind in (Continue, Words, batches.Repaint, Look):
        monkeypatch.setattr(kind, "run", holds(kind.run))
    yield gate
    gate.opened.set()


@pytest.mark.parametrize("is_running", [False, True], ids=["waiting", "running"])
@pytest.mark.parametrize("button", ["say", "caption", "redraw", "look"])
def test_a_stop_before_anything_came_says_that_it_stopped(desk, held, tmp_path, monkeypatch, button, is_running):
    controls = pytest.importorskip(
        "xfusion.apps.web.controls", reason="gradio is not installed: pip install 'xfusion[web]'"
    )
    from xfusion.apps.web.chat import Chat
    from xfusion.apps.web.denoising import Denoising
    from xfusion.apps.web.picture import Picture

    Noise(1).picture(0, 32).save(tmp_path / "a.png")
    given, me = str(tmp_path / "a.png"), SimpleNamespace(session_hash="me")
    shared, message, talk = controls.Controls(desk), {"text": "go on"}, [{"role": "user", "content": ["hello"]}]
    seed, steps, guidance = settings = ("0", 4, 1)
    walk, kept = {
        "say": lambda: (
            Chat(shared).say("tiny", message, talk, *settings, False, 8, 0, me),
            ([{"role": "user", "content": "hello"}], talk, message),
        ),
        "caption": lambda: (Picture(shared).caption("tiny", given, "", me), ("",)),
        "redraw": lambda: (
            Picture(shared).inpaint("tiny", given, "left half", [], "a house", seed, steps, guidance, me),
            (gr_skip(),),
        ),
        "look": lambda: (Denoising(shared).look("tiny", "a cat", *settings, me), ([], *[gr_skip()] * 4)),
    }[button]()
    monkeypatch.setattr(web_desk, "WAITING_SECONDS", 0.15)
    next(walk)  # that it was taken
    with ThreadPoolExecutor(2) as others:
        if not is_running:
            before = others.submit(lambda: list(desk.draw("others", "tiny", "a cat", steps=1)))
            until(lambda: held.count == 1)
        told = []
        said = others.submit(lambda: told.extend(walk))
        until(lambda: told)
        assert told[0][-1] == (gr_skip() if is_running else controls.status("waiting, 1 before you …"))
        shared.stop(me)
        said.result(10)
        held.opened.set()
        if not is_running:
            assert isinstance(before.result(20)[-1], Drawn)
    assert told[-1] == (*kept, controls.status("stopped"))
    assert held.count == 1 and list(desk.open) == []


class Visitors:
    """Users of a page over HTTP, without a browser: each has a session of its own."""

    def __init__(self, client):
        self.client, config = client, client.get("/config").json()
        self.components = {component["id"]: component["props"] for component in config["components"]}
        clicks = [
            (target, event) for event in config["dependencies"] for target, kind in event["targets"] if kind == "click"
        ]
        self.buttons = {self.components[target]["value"]: event for target, event in clicks}

    def press(self, user, button, **inputs):
        """Press a button; the boxes with these labels hold these values, and the others what they show first."""
        event = self.buttons[button]
        props = [self.components[component] for component in event["inputs"]]
        data = [inputs.get(one.get("label"), one.get("value")) for one in props]
        body = {"data": data, "fn_index": event["id"], "session_hash": user}
        path = "gradio_api/queue/join" if event["queue"] else "gradio_api/run/predict"
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text


@pytest.fixture
def crowd(model, tmp_path, monkeypatch):
    """A page for many users, and they."""
    page = pytest.importorskip("xfusion.apps.web.page", reason="gradio is not installed: pip install 'xfusion[web]'")
    import httpx

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))  # a page sets it, and the other page's is put back afterwards
    app = page.create({"tiny": model}, replace(TINY, queue=64), tmp_path / "crowd", None)
    with (
        listening_at(app, socket.create_server(("127.0.0.1", 0))) as address,
        httpx.Client(base_url=address, timeout=20, trust_env=False) as client,
    ):
        yield app.state.desk, Visitors(client)


def test_a_stop_and_an_upload_need_not_wait_for_the_queue(crowd, held):
    desk, users = crowd
    for button in ("Draw", "Look", "Draw it"):
        for number in range(16):
            more = {"Message": {"text": "a cat", "files": []}} if button == "Draw it" else {"Prompt": "a cat"}
            users.press(f"{button} {number}", button, Pictures=1, **more)
    until(lambda: len(desk.open) == 48)
    start = time.monotonic()
    users.press("Look 7", "Stop")
    until(lambda: "Look 7" not in desk.open)
    assert users.client.post("gradio_api/upload", files={"files": ("a.txt", b"words")}).status_code == 200
    assert time.monotonic() - start < 2
    assert len(desk.open) == 47


def test_a_tab_that_is_closed_gives_its_place_back(crowd, held):
    desk, users = crowd
    users.press("others", "Draw", Pictures=1, Prompt="a cat")
    until(lambda: held.count == 1)
    users.press("me", "Draw", Pictures=2, Prompt="a cat")
    until(lambda: len(desk.batches.waiting) == 2)
    with users.client.stream("GET", "gradio_api/queue/data", params={"session_hash": "me"}) as told:
        assert any("1 before you" in line for line in told.iter_lines())
    until(lambda: "me" not in desk.open, 5)
    assert not desk.batches.waiting
    with users.client.stream("GET", "gradio_api/queue/data", params={"session_hash": "others"}) as told:
        next(told.iter_lines())
    until(lambda: not desk.open, 5)  # what is being computed, too
    assert all(job.dropped for job in desk.batches.running)


def gr_skip():
    """What changes nothing on the page."""
    import gradio

    return gradio.skip()


@pytest.fixture(scope="module")
def browser():
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as made:
        browser = made.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


class Visit:
    """A page that is open, with everything that it asked for and complained of."""

    def __init__(self, browser, address, **context):
        self.address, self.context = address, browser.new_context(**context)
        self.context.set_default_timeout(240_000)  # of a machine that is busy
        self.page = self.context.new_page()
        self.asked, self.complaints = [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(address)
        self.page.get_by_role("tab", name="Chat").wait_for()

    def tab(self, name):
        self.page.get_by_role("tab", name=name).click()


@pytest.fixture
def visit(browser, page_at):
    visits = []

    def made(address=page_at[0], **context):
        visits.append(Visit(browser, address, **context))
        return visits[-1]

    yield made
    for one in visits:
        one.context.close()
        outside = [url for url in one.asked if not url.startswith((one.address, "data:", "blob:"))]
        assert not outside, "the page asked somebody else"
        assert not one.complaints


def picture_of(locator):
    """The picture that an ``img`` of the page shows."""
    source = locator.get_attribute("src")
    return Image.open(io.BytesIO(locator.page.request.get(source).body())).convert("RGB")


def letters(text):
    """What of a random model's words every browser shows alike."""
    return "".join(filter(str.isalnum, text))


def says(page, place, words):
    """Wait until the line of a tab says something; nothing at all where no words are given."""
    wanted = f"includes('{words}')" if words else "trim() === ''"
    page.wait_for_function(f"document.querySelector('#{place}-status').innerText.{wanted}")


@pytest.mark.full
def test_chat_by_keyboard_and_a_gallery(visit, model):
    one = visit(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page = one.page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "a phone would scroll sideways"
    assert page.evaluate("document.body.classList.contains('dark')")
    page.locator("#message textarea").focus()
    page.keyboard.type("a red apple")
    page.keyboard.press("Enter")
    page.locator("#conversation .bot").first.wait_for()
    says(page, "chat", "")
    expected = model.generate([Text(ids=model.backbone.chat("a red apple"))], max_tokens=24)
    assert letters(expected[0]) in letters(page.locator("#conversation").inner_text())

    one.tab("Draw")
    page.locator("#prompt textarea").fill("two blue birds")
    page.locator("#draw").click()
    says(page, "draw", "drawn")
    shown = page.locator("#gallery .thumbnail-item img")
    shown.nth(2).wait_for()
    assert shown.count() == 3
    expected = model.draw(["two blue birds"] * 3, seed=0)
    for number in range(3):
        assert apart(picture_of(shown.nth(number)), expected[number]) == 0
    assert "seed 2, 25 steps" in page.locator("#gallery").inner_text()


def walk_to(page, wanted, words=None, most=80):
    """Press Tab until the element of a selector, with these words on it if any are given, has the focus."""
    reached = "([wanted, words]) => document.activeElement.matches(wanted) && (words ?? activeText()) === activeText()"
    reached = reached.replace("activeText()", "document.activeElement.innerText?.trim()")
    for _ in range(most):
        if page.evaluate(reached, [wanted, words]):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{wanted} {words or ''} is not reached by Tab")


def fits(page):
    """Whether nothing is wider than the window, and no picture of a gallery is cut off."""
    return page.evaluate(
        """document.documentElement.scrollWidth <= innerWidth &&
        [...document.querySelectorAll('.thumbnail-item')].every(one => one.getBoundingClientRect().right <= innerWidth - 16)"""
    )


@pytest.mark.full
def test_every_tab_on_a_phone_by_keyboard_alone(visit, tmp_path):
    Noise(1).picture(0, 32).save(tmp_path / "a.png")
    page = visit(viewport={"width": 390, "height": 844}).page
    names = [name for name in page.get_by_role("tab").all_inner_texts() if name]
    assert names == ["Chat", "Draw", "Picture", "Inside", "Compare"]
    wanted = {"Chat": "Say", "Draw": "Draw", "Picture": "Caption", "Inside": "Look"}
    for name in names:
        walk_to(page, "[role=tab]", name)
        page.keyboard.press("Enter")
        page.wait_for_function(
            f"document.querySelector('[role=tab][aria-selected=true]').innerText.trim() === '{name}'"
        )
        if name == "Chat":
            walk_to(page, "#message textarea")
            page.keyboard.type("a cat")
        elif name == "Draw":
            walk_to(page, "#prompt textarea")
            page.keyboard.type("a cat")
        elif name == "Picture":  # by no key: a file chooser is no part of the page
            page.locator("#given input[type=file]").set_input_files(tmp_path / "a.png")
            page.locator("#given img").first.wait_for()
        elif name == "Inside":
            walk_to(page, "#look-prompt textarea")
            page.keyboard.type("a cat")
        if name == "Compare":
            walk_to(page, "#comparison input")
            page.keyboard.press("ArrowDown")
            page.keyboard.press("Enter")
            page.locator("iframe.comparison").wait_for()
        else:
            walk_to(page, f"#{wanted[name].lower()}")
            assert page.evaluate("document.activeElement.innerText.trim()") == wanted[name]
            page.keyboard.press("Enter")
        if name == "Chat":
            page.locator("#conversation .bot").first.wait_for()
        elif name == "Draw":
            page.locator("#gallery .thumbnail-item").nth(2).wait_for()
            says(page, "draw", "drawn")
        elif name == "Picture":
            page.wait_for_function("document.querySelector('#sees textarea, #sees input').value")
            walk_to(page, "#region input[value='left half']")
            page.keyboard.press("Space")
            walk_to(page, "#redraw")
            page.keyboard.press("Enter")
            says(page, "repaint", "seed 0")
            page.locator("#redrawn img").wait_for()
        elif name == "Inside":
            page.locator("#shares table").wait_for()
            page.locator("#strip .thumbnail-item").nth(8).wait_for()
        assert fits(page), f"{name}: something is cut off or scrolls sideways on a phone"


CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")


@pytest.mark.full
def test_the_measure_of_contrast_knows_its_answers(browser):
    page = browser.new_page()
    for style, ratio, least in (
        ("color: #000; background: #fff", 21, 4.5),
        ("color: #777; background: #fff", 4.478, 4.5),  # the best known grey that just fails
        ("color: rgb(0 0 0 / 0.5); background: #fff", 3.977, 4.5),
        ("color: #fff; background: #000; opacity: 0.5", 3.977, 4.5),  # white over white stays, black over white is grey
        ("color: #767676; background: transparent; font-size: 24px", 4.542, 3),
        ("color: #000; background: linear-gradient(#fff, #000)", 0, 4.5),
    ):
        page.set_content(f'<body style="background: #fff"><p style="{style}">words</p>')
        (one,) = page.evaluate(CONTRAST)
        assert one["text"] == "words" and one["ratio"] == pytest.approx(ratio, abs=0.03) and one["least"] == least
    page.set_content("""<style>::placeholder { color: #777; } b::after { content: "after"; color: #777; }</style>
        <body style="background: #fff; color: #000"><input placeholder="empty"><input value="full"><b></b>
        <i style="display: none">hidden</i><i style="visibility: hidden">hidden</i>""")
    ratios = {one["text"].strip('"'): round(one["ratio"], 1) for one in page.evaluate(CONTRAST)}
    assert ratios == {"empty": 4.5, "full": 21, "after": 4.5}
    page.close()


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_stands_out_from_its_background(visit, tmp_path, scheme):
    """WCAG 2.2, success criterion 1.4.3, in every tab, empty, in use and with a complaint."""
    Noise(1).picture(0, 32).save(tmp_path / "a.png")
    one = visit(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    page = one.page
    page.add_style_tag(content="* { transition: none !important; animation: none !important; }")
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    seen = set()

    def check(*words):
        """All words are easy to read, and these are among them."""
        page.mouse.move(1, 1)
        for frame in page.frames:  # a list fades in by script; what turns for ever cannot be finished
            frame.evaluate("document.getAnimations().forEach(one => { try { one.finish() } catch { return } })")
        found = [text for frame in page.frames for text in frame.evaluate(CONTRAST)]
        faint = [text for text in found if text["ratio"] < text["least"]]
        assert not faint, "\n".join(f"{text['ratio']:.2f} of {text['least']}: {text}" for text in faint)
        texts = {text["text"].strip('"') for text in found}
        assert not [word for word in words if not any(word in text for text in texts)]
        seen.update(texts)

    page.get_by_role("button", name="New conversation").wait_for()
    check("xfusion", "Say something", "Message, and pictures", "New conversation")
    page.get_by_text("Settings").first.click()
    page.locator("#message input[type=file]").set_input_files(tmp_path / "a.png")
    page.locator("#message img").first.wait_for()
    page.locator("#message textarea").fill("what is this?")
    page.locator("#say").click()
    page.locator("#conversation .bot").first.wait_for()
    says(page, "chat", "")
    page.locator("#say").click()
    says(page, "chat", "say something first")
    check("what is this?", "Longest answer", "say something first")
    one.tab("Draw")
    check("Pictures, newest first")
    page.locator("#prompt textarea").fill("a cat")
    page.locator("#draw").click()
    says(page, "draw", "drawn")
    page.locator("#gallery .caption-label", has_text="seed 2").wait_for()  # the line says so at the first picture
    check("a cat: seed 2, 25 steps")
    one.tab("Picture")
    check("drop a picture above first", "What is it?", "the picture is drawn in cells")
    page.locator("#given input[type=file]").set_input_files(tmp_path / "a.png")
    page.locator("#sheet .toolbar-wrap [title='Brush Size']").wait_for()
    page.locator("#caption").click()
    page.wait_for_function("document.querySelector('#sees textarea, #sees input').value")
    page.get_by_label("upper half").check()
    page.locator("#redraw").click()
    says(page, "repaint", "seed 0")
    check("upper half", "(no words): seed 0")
    one.tab("Inside")
    check("How a picture comes out of noise")
    page.locator("#look-prompt textarea").fill("a cat")
    page.locator("#look").click()
    page.locator("#shares table").wait_for()
    page.locator("#strip .thumbnail-item").nth(8).wait_for()
    check("Share of attention", "(the picture itself)", "layer 1", "step 1")
    one.tab("Compare")
    page.locator("#comparison input").click()
    page.get_by_role("option").first.wait_for()
    check("choose one")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.frame_locator("iframe.comparison").get_by_role("heading", name="Scores").wait_for()
    check("Scores", "chance")
    assert len(seen) > 100


@pytest.mark.full
def test_a_picture_is_asked_about_and_another_drawn_in_the_chat(visit, model, page_at, tmp_path):
    Noise(1).picture(0, 32).save(tmp_path / "a.png")
    page = visit(viewport={"width": 390, "height": 844}).page
    page.locator("#message input[type=file]").set_input_files(tmp_path / "a.png")
    page.locator("#message img").first.wait_for()
    page.locator("#message textarea").fill("what is this?")
    page.locator("#say").click()
    page.locator("#conversation .bot").first.wait_for()
    says(page, "chat", "")
    seen = page_at[1].state.desk.open_upload(tmp_path / "a.png", "tiny")
    assert apart(picture_of(page.locator("#conversation .user img").first), seen) == 0
    (answer,) = model.generate([seen, "what is this?"], max_tokens=24)
    assert letters(answer) in letters(page.locator("#conversation .bot").first.inner_text())

    page.locator("#message textarea").fill("two blue birds")
    page.get_by_role("button", name="Draw it").click()
    says(page, "chat", "seed 0")
    drawn = page.locator("#conversation .bot img").last
    assert apart(picture_of(drawn), model.draw(["two blue birds"], seed=0, steps=25)[0]) == 0


REQUEST, SUBJECT, GREETING = "please draw two blue birds", "two blue birds", "how are you today?"


@pytest.fixture
def page_that_decides(model, tmp_path, monkeypatch):
    """The address of a page whose pack has an opening head, fitted by hand: it opens at a request, and at no greeting."""
    page = pytest.importorskip("xfusion.apps.web.page", reason="gradio is not installed: pip install 'xfusion[web]'")
    base, head = model.backbone, Opening(model.backbone.hidden_size).requires_grad_(False)
    opens, greets = answer_states(base, [[{"role": "user", "content": words}] for words in (REQUEST, GREETING)])
    between = opens - greets
    head.opens.weight.copy_(8 * between / between.square().sum())
    head.opens.bias.copy_(-head.opens.weight @ (opens + greets) / 2)
    states, spans = word_states(base, REQUEST)
    is_subject = torch.tensor([1.0 if end > REQUEST.index(SUBJECT) else -1.0 for _, end in spans])
    head.subject.weight.copy_(torch.linalg.lstsq(states, is_subject[:, None], driver="gelsd").solution.T)
    head.subject.bias.zero_()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))  # a page sets it, and the other page's is put back afterwards
    model.opening = head
    try:
        app = page.create({"tiny": model}, TINY, tmp_path / "decides", None)
        with listening_at(app, socket.create_server(("127.0.0.1", 0))) as address:
            yield address
    finally:
        model.opening = None


@pytest.mark.full
def test_the_chat_draws_when_asked_in_plain_words(page_that_decides, visit, model, page_at):
    settings = {"seed": 0, "steps": 25, "max_tokens": 24, "guidance": model.guidance}
    without = visit(page_at[0]).page
    without.get_by_text("Settings").first.click()
    without.get_by_text("Longest answer").wait_for()
    page = visit(page_that_decides, viewport={"width": 390, "height": 844}).page
    page.get_by_text("Settings").first.click()
    page.get_by_label("Draw when asked").wait_for()
    assert page.get_by_label("Draw when asked").is_checked()
    assert not without.get_by_label("Draw when asked").is_visible(), "no pack there has a head"
    for words, is_decided, num_pictures in ((REQUEST, True, 1), (GREETING, True, 0), (REQUEST, False, 0)):
        page.get_by_label("Draw when asked").set_checked(is_decided)
        page.locator("#message textarea").fill(words)
        page.keyboard.press("Enter")
        page.locator("#conversation .bot").first.wait_for()
        says(page, "chat", "")
        expected = model.answer(
            [{"role": "user", "content": [words]}], draw="auto" if is_decided else "never", **settings
        )
        assert [isinstance(one, Image.Image) for one in expected] == [True] * num_pictures + [False]
        shown = page.locator("#conversation .bot img")
        assert shown.count() == num_pictures
        for number in range(num_pictures):
            assert apart(picture_of(shown.nth(number)), expected[number]) == 0
            assert apart(expected[number], model.draw([SUBJECT], seed=0, steps=25)[0]) == 0
        said = "".join(page.locator("#conversation .bot").all_inner_texts())
        assert letters(expected[-1]) and letters(expected[-1]) in letters(said)
        page.get_by_role("button", name="New conversation").click()
        page.locator("#conversation .bot").first.wait_for(state="detached")


@pytest.mark.full
def test_packs_of_one_base_are_chosen_from_a_list(visit, model, page_at):
    other = page_at[1].state.desk.models["draws"]
    assert other.backbone is model.backbone
    one = visit(viewport={"width": 390, "height": 844})
    page = one.page
    page.locator("#pack input").click()
    page.get_by_role("option", name="draws").click()
    one.tab("Draw")
    page.locator("#prompt textarea").fill("two blue birds")
    page.locator("#draw").click()
    says(page, "draw", "drawn")
    expected = other.draw(["two blue birds"] * 3, seed=0, steps=25)
    assert apart(expected[0], model.draw(["two blue birds"], seed=0, steps=25)[0]) > 2
    shown = page.locator("#gallery .thumbnail-item img")
    for number in range(3):
        assert apart(picture_of(shown.nth(number)), expected[number]) == 0


@pytest.mark.full
def test_a_picture_is_dropped_captioned_and_drawn_anew(visit, model, page_at, tmp_path):
    Noise(1).picture(0, 32).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    page = visit(viewport={"width": 1280, "height": 900}).page
    page.get_by_role("tab", name="Picture").click()
    page.get_by_role("button", name="Caption").click()
    says(page, "picture", "drop a picture first")
    given = page.locator("#given input[type=file]")
    given.set_input_files(tmp_path / "b.png")
    page.locator("#given img").first.wait_for(state="attached")
    page.get_by_role("button", name="Caption").click()
    says(page, "picture", "the file is not a picture")
    assert page.locator("#picture-status .problem").count() == 1
    page = visit(viewport={"width": 1280, "height": 900}).page
    page.get_by_role("tab", name="Picture").click()
    given = page.locator("#given input[type=file]")
    given.set_input_files(tmp_path / "a.png")
    page.locator("#given img").first.wait_for()
    page.get_by_role("button", name="Caption").click()
    page.wait_for_function("document.querySelector('#sees textarea, #sees input').value")
    says(page, "picture", "")
    seen = page_at[1].state.desk.open_upload(tmp_path / "a.png", "tiny")
    said = page.locator("#sees textarea, #sees input").first.input_value()
    assert letters(said) == letters(model.generate([seen], max_tokens=24)[0])

    page.get_by_label("upper half").check()
    page.locator("#repaint-prompt textarea").fill("a house")
    page.get_by_role("button", name="Draw anew").click()
    says(page, "repaint", "seed 0")
    mask = Image.new("L", seen.size, "black")
    mask.paste("white", (0, 0, SIDE, SIDE // 2))
    expected = model.inpaint(seen, mask, "a house", seed=0, steps=25)
    assert apart(picture_of(page.locator("#redrawn img")), expected) == 0


def drop(page, target, file):
    """Drop a file on a place of the page, as a mouse does that drags it there from a folder."""
    transfer = page.evaluate_handle(
        """([content, name]) => {
            const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0))
            const transfer = new DataTransfer()
            transfer.items.add(new File([bytes], name, { type: "image/png" }))
            return transfer
        }""",
        [base64.b64encode(file.read_bytes()).decode(), file.name],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event(target, event, {"dataTransfer": transfer})


@pytest.mark.full
def test_a_picture_is_dropped_with_the_mouse(visit, model, page_at, tmp_path):
    Noise(1).picture(0, 32).save(tmp_path / "a.png")
    seen = page_at[1].state.desk.open_upload(tmp_path / "a.png", "tiny")
    one = visit(viewport={"width": 1280, "height": 900})
    page = one.page
    drop(page, "#message textarea", tmp_path / "a.png")
    page.locator("#message img").first.wait_for()
    page.locator("#message textarea").fill("what is this?")
    page.locator("#say").click()
    page.locator("#conversation .bot").first.wait_for()
    says(page, "chat", "")
    assert apart(picture_of(page.locator("#conversation .user img").first), seen) == 0
    (answer,) = model.generate([seen, "what is this?"], max_tokens=24)
    assert letters(answer) in letters(page.locator("#conversation .bot").first.inner_text())

    one.tab("Picture")
    drop(page, "#given button", tmp_path / "a.png")
    page.locator("#given img").first.wait_for()
    page.locator("#sheet .toolbar-wrap [title='Brush Size']").wait_for()
    page.locator("#caption").click()
    page.wait_for_function("document.querySelector('#sees textarea, #sees input').value")
    says(page, "picture", "")
    said = page.locator("#sees textarea, #sees input").first.input_value()
    assert letters(said) == letters(model.generate([seen], max_tokens=24)[0])


@pytest.mark.full
@pytest.mark.parametrize("kind", ["large", "pdf"])
def test_a_file_that_is_refused_leaves_the_page_usable(visit, model, page_at, tmp_path, kind):
    bad = tmp_path / "picture.png"
    if kind == "large":
        Image.new("1", (10_000, 10_000)).save(bad)
        complaint = "the file has 10000 x 10000 pixels, more than 0.01 million: make it smaller"
    else:
        bad.write_bytes(b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n")
        complaint = "the file is not a picture: its content is PDF; save it as"
    Noise(1).picture(0, 32).save(good := tmp_path / "a.png")
    one = visit(viewport={"width": 1280, "height": 900})
    page = one.page

    def complains():
        (line,) = page.locator(".problem:visible").all_inner_texts()
        return line.startswith(complaint) and page.locator(".toast-body").count() == 0

    page.locator("#message input[type=file]").set_input_files(bad)
    page.locator("#message img").first.wait_for(state="attached")
    page.locator("#message textarea").fill("what is this?")
    page.locator("#say").click()
    page.locator("#chat-status .problem").wait_for()
    assert complains() and page.locator("#message textarea").input_value() == "what is this?"
    page.get_by_label("Remove file").click()
    page.locator("#message img").first.wait_for(state="detached")
    page.locator("#message input[type=file]").set_input_files(good)
    page.locator("#message img").first.wait_for()
    page.locator("#say").click()
    page.locator("#conversation .bot").first.wait_for()
    says(page, "chat", "")

    one.tab("Picture")
    page.locator("#given input[type=file]").set_input_files(bad)
    page.locator("#picture-status .problem").wait_for()
    assert complains()
    page.locator("#caption").click()
    page.wait_for_timeout(500)
    assert complains()
    page.get_by_label("Remove Image").click()
    says(page, "picture", "")
    page.locator("#given input[type=file]").set_input_files(good)
    page.locator("#given img").first.wait_for()
    page.locator("#caption").click()
    page.wait_for_function("document.querySelector('#sees textarea, #sees input').value")
    says(page, "picture", "")
    seen = page_at[1].state.desk.open_upload(good, "tiny")
    said = page.locator("#sees textarea, #sees input").first.input_value()
    assert letters(said) == letters(model.generate([seen], max_tokens=24)[0])


class Brush:
    """The mouse over the sheet of a page, by cells of the picture."""

    def __init__(self, page):
        self.page = page
        canvas = page.locator("#sheet canvas").first
        canvas.scroll_into_view_if_needed()
        self.box = canvas.bounding_box()
        self.cell = brush.SIDE / 4 * int(page.locator("#sheet .zoom-number").inner_text().strip(" %\n")) / 100

    def at(self, row, column):
        """A place, in cells from the upper left corner."""
        middle = self.box["x"] + self.box["width"] / 2, self.box["y"] + self.box["height"] / 2
        return middle[0] + (column - 2) * self.cell, middle[1] + (row - 2) * self.cell

    def stroke(self, start, end):
        """Paint from one place to another."""
        self.page.mouse.move(*self.at(*start))
        self.page.mouse.down()
        self.page.mouse.move(*self.at(*end), steps=8)
        self.page.mouse.up()

    def touch(self, start, end):
        """The same with a finger."""
        screen = self.page.context.new_cdp_session(self.page)
        (x, y), (last_x, last_y) = self.at(*start), self.at(*end)
        for step in range(9):
            place = {"x": x + (last_x - x) * step / 8, "y": y + (last_y - y) * step / 8}
            event = {"type": "touchMove" if step else "touchStart", "touchPoints": [place]}
            screen.send("Input.dispatchTouchEvent", event)
        screen.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        screen.detach()


@pytest.mark.full
def test_a_finger_paints_on_a_phone(visit, model, page_at, tmp_path):
    Noise(1).picture(0, 32).save(tmp_path / "a.png")
    page = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True).page
    page.get_by_role("tab", name="Picture").tap()
    page.locator("#given input[type=file]").set_input_files(tmp_path / "a.png")
    page.locator("#sheet .toolbar-wrap [title='Brush Size']").wait_for()
    page.locator("#repaint-prompt textarea").fill("a house")
    painter = Brush(page)
    scrolled = page.evaluate("scrollY")
    painter.touch((0.3, 0.3), (0.7, 0.6))
    painter.touch((1.5, 2.5), (2.5, 2.5))
    assert page.evaluate("scrollY") == scrolled, "the finger scrolls the page instead of painting"
    page.locator("#redraw").tap()
    says(page, "repaint", "seed 0")
    seen = page_at[1].state.desk.open_upload(tmp_path / "a.png", "tiny")
    mask = Image.new("L", (4, 4))
    for column, row in ((0, 0), (2, 1), (2, 2)):
        mask.putpixel((column, row), 255)
    mask = mask.resize(seen.size, Image.Resampling.NEAREST)
    expected = model.inpaint(seen, mask, "a house", seed=0, steps=25)
    assert apart(picture_of(page.locator("#redrawn img")), expected) == 0
    assert apart(expected, seen) > 0 and fits(page)


@pytest.mark.full
def test_what_is_painted_is_drawn_anew_and_the_rest_is_kept(visit, model, page_at, tmp_path):
    Noise(1).picture(0, 32).save(tmp_path / "a.png")
    page = visit(viewport={"width": 1280, "height": 900}).page
    page.get_by_role("tab", name="Picture").click()
    again = page.locator("#redraw")
    again.click()
    says(page, "repaint", "drop a picture first")
    page.locator("#given input[type=file]").set_input_files(tmp_path / "a.png")
    page.locator("#sheet .toolbar-wrap [title='Brush Size']").wait_for()  # the brush is in the hand
    again.click()
    says(page, "repaint", "nothing is painted")

    page.locator("#repaint-prompt textarea").fill("a house")
    painter = Brush(page)
    painter.stroke((0.3, 0.3), (0.7, 0.6))
    painter.stroke((2.5, 1.5), (2.5, 2.5))
    again.click()
    says(page, "repaint", "seed 0")
    seen = page_at[1].state.desk.open_upload(tmp_path / "a.png", "tiny")
    mask = Image.new("L", (4, 4))
    for column, row in ((0, 0), (1, 2), (2, 2)):
        mask.putpixel((column, row), 255)
    mask = mask.resize(seen.size, Image.Resampling.NEAREST)
    shown = picture_of(page.locator("#redrawn img"))
    assert apart(shown, model.inpaint(seen, mask, "a house", seed=0, steps=25)) == 0
    kept = numpy.asarray(mask) == 0
    assert (numpy.asarray(shown)[kept] == numpy.asarray(seen)[kept]).all()
    assert (numpy.asarray(shown)[~kept] != numpy.asarray(seen)[~kept]).any()

    page.locator("#sheet [title='Clear canvas']").click()  # takes the paint away, and not the picture
    page.locator("#sheet .toolbar-wrap [title='Brush Size']").wait_for()
    again.click()
    says(page, "repaint", "nothing is painted")
    Brush(page).stroke((3.5, 3.4), (3.5, 3.6))
    again.click()
    says(page, "repaint", "seed 0")
    mask = Image.new("L", seen.size)
    mask.paste(255, (3 * SIDE // 4, 3 * SIDE // 4, SIDE, SIDE))
    expected = model.inpaint(seen, mask, "a house", seed=0, steps=25)
    assert apart(picture_of(page.locator("#redrawn img")), expected) == 0


def slowly(jobs):
    """`drawing_progress`, with time to press a button between two steps."""
    progress = drawing_progress(jobs)

    def step(*facts):
        time.sleep(0.3)
        progress(*facts)

    return step


@pytest.mark.full
def test_a_drawing_is_stopped_by_keyboard_alone(visit, page_at, monkeypatch):
    monkeypatch.setattr(batches, "drawing_progress", slowly)
    page = visit(viewport={"width": 1280, "height": 900}).page
    for tab, box, button in (("Chat", "#message textarea", "Draw it"), ("Draw", "#prompt textarea", "Draw")):
        walk_to(page, "[role=tab]", tab)
        page.keyboard.press("Enter")
        walk_to(page, box)
        page.keyboard.type("a cat")
        walk_to(page, "button:not([role=tab])", button)
        page.keyboard.press("Enter")
        says(page, tab.lower(), "step")
        walk_to(page, "button", "Stop")
        page.keyboard.press("Space")
        says(page, tab.lower(), "stopped")
        assert not page_at[1].state.desk.open
    assert page.locator("#conversation .bot").count() == page.locator("#gallery .thumbnail-item").count() == 0


@pytest.mark.full
def test_drawing_is_stopped_looked_into_and_compared(visit, model, page_at, monkeypatch):
    page = visit(viewport={"width": 1280, "height": 900}).page
    with monkeypatch.context() as patch:
        patch.setattr(batches, "drawing_progress", slowly)
        page.get_by_role("tab", name="Draw").click()
        page.locator("#prompt textarea").fill("a cat")
        page.locator("#draw").click()
        says(page, "draw", "step")
        preview = page.locator("#gallery .thumbnail-item img")
        preview.first.wait_for()  # what is seen on the way is no drawing of the end
        assert apart(picture_of(preview.first), model.draw(["a cat"], seed=0)[0]) > 0
        page.locator("button:visible", has_text="Stop").click()
        says(page, "draw", "stopped")
        assert not page_at[1].state.desk.open and page.locator("#gallery .thumbnail-item").count() == 0
        page.locator("#draw").click()
        says(page, "draw", "step")
        page.locator("button:visible", has_text="Clear").click()
        says(page, "draw", "")
        page.wait_for_timeout(1000)
        says(page, "draw", "")
        assert not page_at[1].state.desk.open and page.locator("#gallery .thumbnail-item").count() == 0

    page.get_by_role("tab", name="Inside").click()
    page.locator("#look-prompt textarea").fill("a cat")
    page.locator("#look").click()
    page.locator("#shares table").wait_for()
    words = len(model.backbone.begin_ids) + len(model.backbone.encode("a cat"))
    assert page.locator("#shares tbody tr").count() == words + 2
    page.locator("#maps .thumbnail-item").nth(3).wait_for()
    assert page.locator("#strip .thumbnail-item").count() == 9
    last = page.locator("#strip .thumbnail-item img").last
    assert apart(picture_of(last), model.draw(["a cat"], seed=0, steps=16)[0]) == 0

    page.get_by_role("tab", name="Compare").click()
    page.locator("#comparison input").click()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.frame_locator("iframe.comparison").get_by_role("heading", name="Scores").wait_for()


@pytest.fixture
def page_of_the_shipped_pack(tmp_path, monkeypatch):
    """Its address, and the pack."""
    page = pytest.importorskip("xfusion.apps.web.page", reason="gradio is not installed: pip install 'xfusion[web]'")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))  # as above
    pack = xfusion.load("emoji")
    app = page.create({"emoji": pack}, Limits(), tmp_path / "shipped", Path(__file__).parents[2] / "comparison")
    with listening_at(app, socket.create_server(("127.0.0.1", 0))) as address:
        yield address, pack


@pytest.mark.full
def test_the_shipped_pack_draws(page_of_the_shipped_pack, visit):
    """With the name of a folder in XFUSION_SCREENSHOTS the page is photographed, as docs/pictures/web.png was."""
    address, pack = page_of_the_shipped_pack
    one = visit(address, viewport={"width": 1280, "height": 900})
    page = one.page
    one.tab("Draw")
    page.locator("#prompt textarea").fill("a red heart")
    page.keyboard.press("Enter")
    says(page, "draw", "drawn")
    shown = page.locator("#gallery .thumbnail-item img")
    shown.nth(3).wait_for()
    page.wait_for_function("document.querySelectorAll('#gallery .caption-label').length === 4")
    page.wait_for_function("!document.querySelector('#gallery').innerText.includes('step ')")
    for number, picture in enumerate(pack.draw(["a red heart"] * 4, seed=0)):
        assert apart(picture_of(shown.nth(number)), picture) == 0
    if folder := os.environ.get("XFUSION_SCREENSHOTS"):
        page.wait_for_function("[...document.querySelectorAll('#gallery img')].every(one => one.complete)")
        page.evaluate("document.activeElement.blur()")
        photograph = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        photograph.quantize(256).save(Path(folder) / "web.png", optimize=True)


def test_a_name_of_somebody_else_is_not_answered(tmp_path, model):
    """A page elsewhere whose name leads to this machine (DNS rebinding)."""
    page = pytest.importorskip("xfusion.apps.web.page", reason="gradio is not installed: pip install 'xfusion[web]'")
    client = pytest.importorskip("starlette.testclient")
    app = page.create({"tiny": model}, TINY, tmp_path, None, frozenset({"127.0.0.1", "localhost"}))
    for host, status in (("127.0.0.1:80", 200), ("localhost", 200), ("evil.example:80", 403), ("", 403)):
        answer = client.TestClient(app).get("/config", headers={"host": host})
        assert answer.status_code == status, host
    answer = client.TestClient(app).get("/", headers={"host": "localhost"})
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    assert "googleapis" not in answer.text


def files(page, tmp_path, model, **limits):
    """A client of a page, and the folder."""
    client = pytest.importorskip("starlette.testclient")
    folder = tmp_path / "web"
    folder.mkdir()
    return client.TestClient(page.create({"tiny": model}, replace(TINY, **limits), folder, None)), folder


def test_a_page_elsewhere_cannot_use_this_one(tmp_path, model):
    page = pytest.importorskip("xfusion.apps.web.page", reason="gradio is not installed: pip install 'xfusion[web]'")
    client, _ = files(page, tmp_path, model)
    sent = {"files": {"files": ("a.txt", b"words")}}
    for headers, status in (
        ({}, 200),
        ({"Origin": "http://testserver"}, 200),
        ({"Origin": "https://gpu.lan", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
    ):
        assert client.post("/gradio_api/upload", headers=headers, **sent).status_code == status, headers
        assert client.post("/gradio_api/queue/join", headers=headers, content="{}").status_code in (
            (403,) if status == 403 else (400, 422, 500)
        )
    assert client.get("/gradio_api/deep_link", params={"session_hash": "a"}).status_code == 404


def test_uploads_are_bounded_in_all(tmp_path, model):
    page = pytest.importorskip("xfusion.apps.web.page", reason="gradio is not installed: pip install 'xfusion[web]'")
    client, folder = files(page, tmp_path, model, bodies=300_000)

    def upload(letter):
        answer = client.post("/gradio_api/upload", files={"files": (f"{letter}.txt", letter.encode() * 100_000)})
        return answer.status_code, answer.text

    (folder / "drawn").mkdir()
    (folder / "drawn" / "a.png").write_bytes(bytes(300_000))  # is not an upload
    assert [upload(letter)[0] for letter in "ab"] == [200, 200]
    status, said = upload("c")
    assert status == 413 and "300000 bytes" in said
    (old,) = folder.rglob("a.txt")
    os.utime(old, (0, time.time() - 3601))
    assert upload("d")[0] == 200 and not old.exists() and (folder / "drawn" / "a.png").exists()


def test_the_verb_refuses_in_a_line(capsys, monkeypatch):
    for argv, complaint in (
        (["web"], "name at least one pack"),
        (["web", "emoji", "--port", "70000"], "choose 0 to 65535"),
        (["web", "emoji", "--limits.queue", "0"], "at least 1"),
    ):
        assert cli.main(argv) == 2
        assert complaint in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "xfusion.apps.web.page", raising=False)
    monkeypatch.delattr("xfusion.apps.web.page", raising=False)  # where another test has imported it
    assert cli.main(["web", "emoji", "--port", "0"]) == 2
    assert "pip install 'xfusion[web]'" in capsys.readouterr().err
