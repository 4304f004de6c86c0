"""Recipes that hear: each with a tiny Whisper on a tiny base, trained for some steps on tones of two pitches."""

import io
import json
import runpy
from base64 import b64decode
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import soundfile
import torch
from contracts.table import of_other_groups
from PIL import Image
from rich.console import Console

import xfusion
from xfusion.apps import chat, cli
from xfusion.data.mixture import MixtureConfig
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import open_source
from xfusion.evaluation.metrics import word_errors
from xfusion.evaluation.suites import sounds as sounds_suite
from xfusion.evaluation.verify import verify
from xfusion.modalities.audio import resampled
from xfusion.modalities.codecs.kmeans import KMeans, fit
from xfusion.modalities.codecs.vq import code_use
from xfusion.modalities.encoders.whisper import Whisper
from xfusion.model import build
from xfusion.recipes.base import find
from xfusion.training.loop import train
from xfusion.training.stages import Stage

RECIPES = ("qwen_audio", "slm", "pengi(heads=4)", "audiopalm")
NAMES = ("red apple", "tree")
"""Of the tones, in turns."""


def tiny(name, base, whisper, folder):
    """A recipe on the tiny base, with codes of the tones where it reads codes."""
    plain, _, given = name.rstrip(")").partition("(")
    more = f", codes={folder!r}, entries=6" if plain == "audiopalm" else ""
    recipe = find(f"{plain}({given}{', ' if given else ''}encoder={whisper!r}{more})")()
    draw = 4 if plain == "audiopalm" else 0
    mixture = replace(recipe.stages[0].mixture, draw=draw, caption=8, pack=2)
    stage = Stage(steps=20, warmup=2, rate=1e-2, schedule="constant", ema=0, mixture=mixture)
    backbone = replace(recipe.model.backbone, source=base.source)
    return replace(recipe, stages=(stage,)).with_model(backbone=backbone)


def fit_codes(recipe, tones, folder):
    codec = recipe.model.audio.codec.build()
    source = open_source(tones)
    heard = [resampled(source.sound(i), codec.rate) for i in range(8)]
    waves = torch.stack([torch.nn.functional.pad(wave, (0, 12_160)) for wave in heard])
    codec.clusters, _ = fit(codec.means(waves).flatten(0, 1), 6)
    codec.save(folder)


def test_clusters_are_measured_on_sounds_that_they_were_not_fitted_to(tones, whisper, tmp_path, monkeypatch, capsys):
    """High tones are fitted, low ones only measured: figures of these are the equations' of their own features."""
    for number in range(8):
        folder = tmp_path / ("fitted" if number % 2 else "low")
        folder.mkdir(exist_ok=True)
        for suffix in (".wav", ".txt"):
            (folder / f"{number}{suffix}").write_bytes((Path(tones) / f"{number}{suffix}").read_bytes())

    def script(*held):
        command = [tmp_path / "fitted", "-o", tmp_path / "codes", "--encoder", whisper, "--entries", 3, "--held", *held]
        monkeypatch.setattr("sys.argv", ["fit", *map(str, command), "--result", str(tmp_path / "found.json")])
        runpy.run_path(str(Path(__file__).parents[2] / "runs" / "fit_sound_codes.py"), run_name="__main__")

    with pytest.raises(SystemExit):
        script(tmp_path / "train.jsonl")
    assert "must differ from each other and from train" in capsys.readouterr().err
    script(tmp_path / "low", tones)
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())["parts"]
    assert [part["features"] for part in found.values()] == [16, 16, 32] and list(found)[:2] == ["train", "low"]
    assert found["train"]["codes_used"] == 1 and 0.5 < found["train"]["explained"] <= 1
    features = Whisper.Config(source=whisper, window=2.0)
    codec = KMeans.Config(source=str(tmp_path / "codes"), encoder=features).build()
    for part, first in (("train", 1), ("low", 0)):
        heard = [resampled(open_source(tones).sound(i), codec.rate) for i in range(first, 8, 2)]
        waves = torch.stack(
            [torch.nn.functional.pad(wave, (0, 1920)) for wave in heard]
        )  # 2.5 codes of sound, 1.5 of silence
        x, codes = codec.means(waves).flatten(0, 1), codec.encode(waves).flatten().long()
        error, variance = (x - codec.clusters[codes]).square().sum(), (x - x.mean(0)).square().sum()
        assert found[part]["explained"] == pytest.approx(1 - float(error / variance), abs=1e-4)
        assert found[part]["perplexity"] == pytest.approx(code_use(codes, 3)[1])
        assert f"explain {found[part]['explained']:.3f} of" in said


def test_made_codes_are_judged_by_those_of_trained_recordings(bases, tones, whisper, tmp_path, monkeypatch):
    """Counted by hand: recordings of a name have three codes of its own and one of everybody's, in any order."""
    recipe = tiny("audiopalm", bases["llama"], whisper, str(tmp_path / "codes"))
    fit_codes(recipe, tones, tmp_path / "codes")
    model = build(recipe.model, bases["llama"]).eval()
    rows = torch.tensor([[0, 0, 1, 4], [2, 3, 3, 4]])
    own = dict(zip(NAMES, rows.flip(1), strict=True))
    monkeypatch.setattr(sounds_suite, "_codes", lambda model, sounds, indices: rows[[i % 2 for i in indices]])
    for said, at_1 in ((own, 1.0), (own | {"tree": own["red apple"]}, 0.5)):
        monkeypatch.setattr(type(model), "generate", lambda self, items, seed, said=said: [[said[n]] for n, _ in items])
        others = of_other_groups(open_source(tones))
        found = sounds_suite.run(model, progress=lambda *_: None, source=tones, held=others, num_made=3)
        assert found["made_at_1"] == at_1 and found["num_made"] == 6 and found["chance_made_at_1"] == 0.5
        assert found["ceiling_made_at_1"] == 1
    assert "made_at_1" not in sounds_suite.run(model, progress=lambda *_: None, source=tones, num_made=0)


SENTENCES = ("please hold", "press one", "press two to go on", "thank you", "good bye")


def test_sentences_are_ranked_among_the_held_ones_and_transcribed(bases, tones, whisper, tmp_path, monkeypatch):
    for number, sentence in enumerate(SENTENCES):
        wave = 0.4 * numpy.sin(6.28 * (200 + 150 * number) * numpy.arange(1600) / 8000)
        soundfile.write(tmp_path / f"{number}.wav", wave, 8000)
        (tmp_path / f"{number}.txt").write_text(sentence)
    model = build(tiny("qwen_audio", bases["llama"], whisper, "").model, bases["llama"]).eval()
    held = open_source(str(tmp_path), split="all")
    found = xfusion.evaluate(model, "sounds", source=tones, held=held)
    heard = [held.sound(i) for i in range(5)]
    longest = 2 * max(len(model.backbone.encode(name)) for name in NAMES)
    answers = {"held": model.caption(heard, max_tokens=max(8, longest))}
    answers["fit"] = model.caption([open_source(tones).sound(i) for i in range(8)], max_tokens=max(8, longest))
    for kind, texts in (("held", SENTENCES), ("fit", NAMES * 4)):
        expected = word_errors.with_baselines(f"{kind}_", answers[kind], texts)
        assert {key: found[key] for key in expected} == expected and expected[f"{kind}_word_errors"] > 0
    gained = model.score_names(heard, SENTENCES) - model.score_names(None, SENTENCES)
    assert found["held_at_1"] == (gained.argmax(1) == torch.arange(5)).double().mean()
    assert found["num_names"] == 5 and found["chance_held_at_1"] == pytest.approx(0.2)
    assert found["settings"]["names"] == list(SENTENCES) and "fit_at_1" not in found and found["num_fit"] == 8

    asked, sentences = [], {float(sound.samples[1]): text for sound, text in zip(heard, SENTENCES, strict=True)}

    def caption(self, sounds, max_tokens):
        asked.append(max_tokens)
        return [sentences.get(float(sound.samples[1]), "") for sound in sounds]

    monkeypatch.setattr(type(model), "caption", caption)
    found = xfusion.evaluate(model, "sounds", source=tones, held=held)
    assert found["held_word_errors"] == 0 and found["fit_word_errors"] == 1 and found["held_word_errors_blind"] > 0.5
    assert set(asked) == {max(8, longest)}
    (tmp_path / "4.txt").write_text("tree")
    with pytest.raises(
        XFusionError,
        match="0.wav: 'please hold' is no name of .*, but 1 of 5 held-out texts are: hold out recordings of",
    ):
        xfusion.evaluate(model, "sounds", source=tones, held=str(tmp_path))
    monkeypatch.setattr(sounds_suite, "LARGEST_NAMES", 4)
    with pytest.raises(XFusionError, match="5 different names, at most 4 are ranked: score fewer, by max_held"):
        xfusion.evaluate(model, "sounds", source=tones, held=held)
    assert xfusion.evaluate(model, "sounds", source=tones, held=held, max_held=4)["num_names"] == 4
    monkeypatch.setattr(sounds_suite, "LARGEST_NAMES", 1)
    found = xfusion.evaluate(model, "sounds", source=tones)  # too many to be names, and nothing is held out
    assert found["fit_word_errors"] == 1 and found["num_names"] == 0 and "fit_at_1" not in found


@pytest.mark.parametrize("name", RECIPES)
def test_twenty_steps(bases, tones, whisper, name, tmp_path, monkeypatch):
    base, losses, folder = bases["llama"], [], tmp_path / "codes"
    before, recipe = base.compute_fingerprint(), tiny(name, base, whisper, str(folder))
    codes = name == "audiopalm"
    if codes:
        fit_codes(recipe, tones, folder)
    model = train(
        recipe,
        out=tmp_path / "run",
        data=tones,
        backbone=base,
        compile=False,
        dtype=torch.float32,
        listener=lambda e: losses.append(e["losses"]) if e["event"] == "step" else None,
    )
    assert len(losses) == 20 and set(losses[0]) == {"next_token"} | ({"next_code"} if codes else set())
    for loss in losses[0]:
        first, last = (sum(step[loss] for step in part) / 4 for part in (losses[:4], losses[-4:]))
        assert last < 0.8 * first
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(model.text_logits(ids, stack="fused"), base.model(ids).logits)
    assert base.compute_fingerprint() == before
    assert model.capabilities == {"text", "caption"} | ({"draw"} if codes else set())
    assert model.teachers == {f"{whisper}@None"}

    loaded = xfusion.load(tmp_path / "run" / "pack", backbone=base)
    sounds = [open_source(tones).sound(i) for i in range(2)]
    answers = model.eval().caption(sounds, max_tokens=4)
    assert loaded.caption(sounds, max_tokens=4) == answers
    assert [loaded.generate([s], max_tokens=4)[0].strip() for s in sounds] == answers
    (answer,) = loaded.generate([sounds[0], "what is this?"], max_tokens=3)
    assert isinstance(answer, str)
    found = xfusion.evaluate(loaded, "sounds", source=tones, held=of_other_groups(open_source(tones)))
    assert found["num_names"] == 2 and found["chance_held_at_1"] == 0.5 and found["fit_at_1"] == found["held_at_1"]
    if codes:
        assert found["num_made"] == 20 and {"made_at_1", "made_at_1_blind", "ceiling_made_at_1"} <= set(found)
    else:
        assert "made_at_1" not in found
    with pytest.raises(XFusionError, match="this model knows sounds, not pictures"):
        loaded.generate([Image.new("RGB", (8, 8)), "what is this?"])
    with pytest.raises(XFusionError, match="this model knows sounds, not pictures"):
        loaded.generate(["a tree", xfusion.Image()])
    if codes:
        monkeypatch.setattr("xfusion.evaluation.verify.NEW_TOKENS", 3)
        assert verify(loaded)["passed"]
        out = loaded.generate([["tree", xfusion.Audio()], ["red apple", xfusion.Audio()]])
        assert [list(codes[0].shape) for codes in out] == [[12], [12]]
        assert all(int(codes[0].min()) >= 0 and int(codes[0].max()) < 6 for codes in out)
        assert torch.equal(out[0][0], loaded.generate(["tree", xfusion.Audio()])[0])
    else:
        with pytest.raises(XFusionError, match="this model makes no sound"):
            loaded.generate(["a tree", xfusion.Audio()])


def test_a_pack_hears_from_the_command_line_and_in_a_conversation(bases, tones, whisper, tmp_path, capsys):
    base = bases["llama"]
    model = build(tiny("qwen_audio", base, whisper, "").model, base).eval()
    model.save_pretrained(tmp_path / "pack")
    files = [f"{tones}/{number}.wav" for number in range(2)]
    answers = model.caption([xfusion.read_sound(file) for file in files], max_tokens=4)
    assert cli.main(["caption", str(tmp_path / "pack"), *files, "--max-tokens", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["captions"]
    assert found == [{"audio": file, "caption": answer} for file, answer in zip(files, answers, strict=True)]
    soundfile.write(tmp_path / "long.wav", numpy.zeros(16_000), 8000)
    assert cli.main(["caption", str(tmp_path / "pack"), str(tmp_path / "long.wav")]) == 2
    assert "a sound of 2.00 s is longer than the 1 s that this model hears" in capsys.readouterr().err

    said = io.StringIO()
    talk = chat.Chat(model=model, console=Console(file=said, width=300), max_tokens=4)
    saved = tmp_path / "talk.json"
    talk.run(
        iter([f"/sound {files[0]}", "what is this?", "/image x.png", f"/sound {tmp_path}/long.wav", f"/save {saved}"])
    )
    expected = model.generate([xfusion.read_sound(files[0]), "what is this?"], max_tokens=4)
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] and talk.messages[1]["content"] == expected
    assert "knows sounds, not pictures" in said.getvalue() and "is longer than the 1 s" in said.getvalue()
    kept = json.loads(saved.read_text())["messages"][0]["content"][0]["input_audio"]
    wave, rate = soundfile.read(io.BytesIO(b64decode(kept["data"])), dtype="float32")
    heard = xfusion.read_sound(files[0])
    assert kept["format"] == "wav" and rate == heard.rate
    assert numpy.abs(wave - heard.samples.numpy()).max() < 1 / 30_000


def test_what_the_pages_say():
    made = {name: find(name)() for name in ("qwen_audio", "slm", "pengi", "audiopalm")}
    assert all(r.model.audio.order == "causal" and r.data == "digits/train.jsonl" for r in made.values())
    grids = {name: r.model.audio.build() for name, r in made.items()}  # without the encoder's weights
    assert {n: a.grid(a.sizes[0])[0] for n, a in grids.items()} == {
        "qwen_audio": 10,
        "slm": 10,
        "pengi": 10,
        "audiopalm": 12,
    }
    for name, grid in (
        ("qwen_audio", (50, 1)),
        ("slm", (50, 1)),
        ("pengi", (10, 1)),
    ):  # the encoder hears as long a sound
        longer = find(f"{name}(seconds=5.0)")().model.audio.build()
        assert longer.grid(longer.sizes[0]) == grid and longer.codec.longest == 250
        assert made[name].model.audio.codec.window == 2.0
    with pytest.raises(XFusionError, match="a length of 5 s is not legal: .* at most the codec's 2 s"):
        find("slm(seconds=5.0, window=2.0)")().model.audio.build()
    assert made["audiopalm"].model.port.tied and made["audiopalm"].stages[0].mixture.draw == 16
    assert MixtureConfig().templates.questions != made["slm"].stages[0].mixture.templates.questions
