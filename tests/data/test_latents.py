"""Latents encoded ahead: training from them is training from pictures, encoding goes on after a break, mixups are refused."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image as PILImage

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.table import Noise, model_config
from modalities.test_codecs import kl_model
from training.test_states import in_a_child, linux, resource

from xfusion.apps import cli
from xfusion.data import latents
from xfusion.data.latents import Latents, encode
from xfusion.data.mixture import MixtureConfig
from xfusion.data.sequence import Example, XFusionError
from xfusion.data.sources import check, open_source
from xfusion.modalities.codecs.autoencoder_kl import AutoencoderKL
from xfusion.modalities.codecs.pixels import Pixels
from xfusion.modalities.image import ImageModality
from xfusion.training import loop
from xfusion.training.stages import Recipe, Stage


class Counted(Noise):
    def __init__(self, count=6):
        super().__init__(count)
        self.opened = Counter()

    def picture(self, index, size):
        self.opened[index] += 1
        return super().picture(index, size)


@pytest.fixture
def codec(request, tmp_path):
    if request.param == "pixels":
        return Pixels.Config(), 4
    kl_model().save_pretrained(tmp_path / "kl")
    return AutoencoderKL.Config(source=str(tmp_path / "kl")), 2


@pytest.mark.parametrize("codec", ["pixels", "kl"], indirect=True)
def test_training_from_latents_is_training_from_pictures_to_the_bit(bases, tmp_path, codec):
    config, patch = codec
    base, size = bases["llama"], 16
    model = replace(model_config(base), image=ImageModality.Config(codec=config, patch=patch, sizes=(size,)))
    stage = Stage(steps=6, warmup=2, mixture=MixtureConfig(draw=4, caption=4, pack=2))
    recipe = Recipe(model=model, data="noise", stages=(stage,))
    encode(Noise(), config, size, tmp_path / "latents")
    told = []
    for name, source in (("pictures", Noise()), ("latents", open_source(tmp_path / "latents"))):
        out = tmp_path / name
        loop.train(recipe, out=out, source=source, backbone=base, compile=False, dtype=torch.float32, preview_every=0)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        told.append([(e["losses"], e["gradient_norm"]) for e in lines if e["event"] == "step"])
    assert len(told[0]) == 6 and told[0] == told[1]


def test_encoding_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "PER_SHARD", 2)

    class Stops(Counted):
        def picture(self, index, size):
            if index == 3:
                raise KeyboardInterrupt
            return super().picture(index, size)

    with pytest.raises(KeyboardInterrupt):
        encode(Stops(), Pixels.Config(), 16, tmp_path / "x")
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["latents-00000.safetensors"]
    with pytest.raises(XFusionError, match=r"not finished \(no index\.json\): give the same xfusion data encode again"):
        open_source(tmp_path / "x")
    source, told = Counted(), []
    found = encode(source, Pixels.Config(), 16, tmp_path / "x", progress=lambda *p: told.append(p))
    assert source.opened == {2: 1, 3: 1, 4: 1, 5: 1} and told == [(2, 6), (4, 6), (6, 6)]
    whole = encode(Noise(), Pixels.Config(), 16, tmp_path / "y")
    assert [s["sha256"] for s in found.shards] == [s["sha256"] for s in whole.shards]
    again = Counted()
    encode(again, Pixels.Config(), 16, tmp_path / "x")
    assert not again.opened
    image = ImageModality.Config(patch=4, sizes=(16,)).build()
    for index in range(6):
        expected = image.encode([Noise().picture(index, 16)], 16)[0]
        assert torch.equal(found.tokens(index, image, 16), expected)


def test_processes_make_the_same_files(tmp_path, monkeypatch):
    for number in range(3):
        PILImage.new("RGB", (20, 16), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"card {number}")
    source = open_source(tmp_path)
    monkeypatch.setattr(latents, "PER_SHARD", 2)
    alone = encode(source, Pixels.Config(), 16, tmp_path / "alone")
    shared = encode(source, Pixels.Config(), 16, tmp_path / "shared", workers=2)
    assert alone.shards == shared.shards and len(alone.shards) == 2


def pictures_in(folder, count=5):
    folder.mkdir()
    for number in range(count):
        PILImage.new("RGB", (20, 16), (40 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"card {number}")
    return folder


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("when", ["starting", "second shard"])
def test_a_worker_that_dies_is_told_in_one_line_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys, when):
    """Also where it dies before it has taken a source that is larger than a pipe's buffer: nothing waits for it."""
    monkeypatch.setattr(latents, "PER_SHARD", 2)
    spec = pictures_in(tmp_path / "pictures")
    for number in range(5):
        (spec / f"{number}.txt").write_text(f"card {number}\n" + "x" * 3900 + "\n" + "\n".join(["y" * 3900] * 6))
    argv = ["data", "encode", str(spec), "--size", "16", "--workers", "2", "--device", "cpu", "-o"]
    encode(open_source(spec), Pixels.Config(), 16, tmp_path / "whole")

    def kill(hand):
        os.kill(hand.process.pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        if when == "starting":
            start = latents._WorkerProcess.start
            patch.setattr(latents._WorkerProcess, "start", lambda hand: (start(hand), kill(hand)))
        else:
            answer, answered = latents._WorkerProcess.answer, []

            def dying(hand):
                answered.append(hand)
                if len(answered) == 2:
                    kill(hand)
                    hand.process.join()
                    while hand.pipe.poll():  # what it had said before it died
                        try:
                            hand.pipe.recv()
                        except EOFError:
                            break
                return answer(hand)

            patch.setattr(latents._WorkerProcess, "answer", dying)
        signal.alarm(240)
        try:
            assert cli.main([*argv, str(tmp_path / "x")]) == 2
        finally:
            signal.alarm(0)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"xfusion: {tmp_path}/x/latents-0000")
    assert (
        ": not finished, the process that made it was killed by SIGKILL: give the same command again, it goes" in said
    )
    assert not list((tmp_path / "x").glob(".*")) and not multiprocessing.active_children()
    assert cli.main([*argv, str(tmp_path / "x")]) == 0
    assert bytes_of(tmp_path / "x") == bytes_of(tmp_path / "whole")


def die_at(number, half):
    """Let this process kill itself at its write or picture ``number``, with half of the file written where asked for."""
    calls, save, text = [], latents.save_file, Path.write_text

    def count(path=None):
        calls.append(path)
        if len(calls) == number:
            if half and path and os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    latents.save_file = lambda tensors, path, metadata: (save(tensors, path, metadata), count(path))
    Path.write_text = lambda self, *args, **more: (text(self, *args, **more), count(self))

    class Counting(Noise):
        def picture(self, index, size):
            count()
            return super().picture(index, size)

    return Counting()


@pytest.mark.skipif(sys.platform != "linux", reason="a process that uses torch is forked safely on Linux alone")
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 12))])
def test_encoding_that_is_killed_goes_on_to_the_same_files(tmp_path, monkeypatch, seed):
    """By SIGKILL, at two moments of one run: 6 pictures, 3 shards and the index are 10, where it was killed first fewer."""
    monkeypatch.setattr(latents, "PER_SHARD", 2)
    encode(Noise(), Pixels.Config(), 16, tmp_path / "whole")
    rng = random.Random(seed)
    moments = [1, 3] if seed == 0 else [rng.randint(1, 10), rng.randint(1, 4)]
    for number in moments:
        child = os.fork()
        if not child:
            try:
                encode(die_at(number, rng.random() < 0.7 or seed == 0), Pixels.Config(), 16, tmp_path / "x")
            finally:
                os._exit(1)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]) or (tmp_path / "x" / "index.json").is_file()
        if not (tmp_path / "x" / "index.json").is_file():
            with pytest.raises(XFusionError, match=r"not finished|no such|no examples"):
                open_source(tmp_path / "x")
    encode(Noise(), Pixels.Config(), 16, tmp_path / "x")
    assert bytes_of(tmp_path / "x") == bytes_of(tmp_path / "whole")


@pytest.mark.full
def test_encoding_in_processes_that_is_killed_leaves_none_of_them(tmp_path):
    """The command with two workers, killed when they are there: they end by themselves, and the command goes on."""
    spec, out = pictures_in(tmp_path / "pictures"), tmp_path / "x"
    encode(open_source(spec), Pixels.Config(), 16, tmp_path / "whole")
    argv = [sys.executable, "-m", "xfusion.apps.cli", "data", "encode", str(spec), "--size", "16", "--device", "cpu"]
    command = [*argv, "--workers", "2", "-o", str(out)]
    before = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(2):
        run = subprocess.Popen(command, env=before, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        while run.poll() is None and not (workers := workers_among(children.read_text())):
            time.sleep(0.01)
        run.kill()
        run.wait()
        until = time.monotonic() + 120
        while time.monotonic() < until and any(map(workers_among, workers)):
            time.sleep(0.1)
        assert not any(map(workers_among, workers)), "a worker waits for ever for a run that is gone"
    assert not subprocess.run(command, env=before, capture_output=True).returncode
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def workers_among(numbers: str) -> list[str]:
    """Those of some processes, by their numbers, that are workers."""
    found = []
    for number in numbers.split():
        try:
            if b"spawn_main" in Path(f"/proc/{number}/cmdline").read_bytes():
                found.append(number)
        except OSError:
            continue
    return found


def test_another_codec_size_or_source_is_refused_with_both(tmp_path):
    kl_model().save_pretrained(tmp_path / "kl")
    out, other = tmp_path / "latents", AutoencoderKL.Config(source=str(tmp_path / "kl"))
    found = encode(Noise(), Pixels.Config(), 16, out)
    with pytest.raises(XFusionError, match="holds latents of 16 px, the model reads 32 px: set --model.image.sizes 16"):
        found.tokens(0, ImageModality.Config(patch=4).build(), 32)
    with pytest.raises(XFusionError, match="was encoded by Pixels [0-9a-f]{16}, the model's codec is AutoencoderKL"):
        found.tokens(0, ImageModality.Config(codec=other, patch=2, sizes=(16,)).build(), 16)
    with pytest.raises(XFusionError, match="holds latents, not pictures"):
        found.picture(0, 16)
    for source, codec, size in ((Noise(5), Pixels.Config(), 16), (Noise(), other, 16), (Noise(), Pixels.Config(), 32)):
        with pytest.raises(
            XFusionError, match="was made by Pixels .* at 16 px, or of other pictures.*name a new folder"
        ):
            encode(source, codec, size, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(XFusionError, match="mine: holds other files"):
        encode(Noise(), Pixels.Config(), 16, tmp_path / "mine")


def test_a_damaged_shard_is_named(tmp_path):
    encode(Noise(), Pixels.Config(), 16, tmp_path / "x")
    shard = tmp_path / "x" / "latents-00000.safetensors"
    assert check(tmp_path / "x").num_bad == 0
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    report = check(tmp_path / "x")
    assert report.num_bad == report.num_examples == 6 and "latents-00000.safetensors: its hash is" in report.problems[0]
    shard.write_bytes(content[:-4])
    with pytest.raises(XFusionError, match=r"latents-00000\.safetensors: has \d+ bytes, index\.json says \d+ bytes"):
        Latents(tmp_path / "x")


def test_a_flipped_bit_is_found_when_the_shard_is_first_read(tmp_path, monkeypatch, bases):
    """By whoever trains, once per process and shard; a sound shard beside it is read."""
    monkeypatch.setattr(latents, "PER_SHARD", 3)
    encode(Noise(), Pixels.Config(), 16, tmp_path / "x")
    path = tmp_path / "x" / "latents-00001.safetensors"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    hashed, real = [], latents._hash.make
    monkeypatch.setattr(latents._hash, "make", lambda path, *stamp: hashed.append(path.name) or real(path, *stamp))
    image = ImageModality.Config(patch=4, sizes=(16,)).build()
    source = open_source(tmp_path / "x")
    for index in (0, 1, 2, 0):
        source.tokens(index, image, 16)
    for index in (3, 4):
        with pytest.raises(
            XFusionError, match=r"latents-00001\.safetensors: its hash is [0-9a-f]{16}, index\.json says"
        ):
            source.tokens(index, image, 16)
    assert hashed == ["latents-00000.safetensors", "latents-00001.safetensors"]
    model = replace(model_config(bases["llama"]), image=ImageModality.Config(patch=4, sizes=(16,)))
    stage = Stage(steps=2, mixture=MixtureConfig(draw=6, caption=0, pack=2))
    with pytest.raises(XFusionError, match=r"latents-00001\.safetensors: its hash is"):
        loop.train(
            Recipe(model=model, data="noise", stages=(stage,)),
            out=tmp_path / "run",
            source=open_source(tmp_path / "x"),
            backbone=bases["llama"],
            compile=False,
        )
    path.write_bytes(sound)  # another file, which is looked at anew
    assert torch.equal(source.tokens(3, image, 16), image.encode([Noise().picture(3, 16)], 16)[0])


def test_splits_and_mixtures_of_latents(tmp_path):
    encode(Noise(), Pixels.Config(), 16, tmp_path / "x")
    image = ImageModality.Config(patch=4, sizes=(16,)).build()
    whole = open_source(tmp_path / "x")
    parts = [open_source(f"{tmp_path / 'x'}:held=0.5", split=split) for split in ("train", "held")]
    assert sorted(e.id for part in parts for e in part.examples) == [str(i) for i in range(6)]
    for part in parts:
        for index, example in enumerate(part.examples):
            assert torch.equal(part.tokens(index, image, 16), whole.tokens(int(example.id), image, 16))
    both = open_source(f"{tmp_path / 'x'}+emoji:12")
    assert torch.equal(both.tokens(5, image, 16), whole.tokens(5, image, 16))
    assert torch.equal(both.tokens(6, image, 16), image.encode([open_source("emoji:12").picture(0, 16)], 16)[0])


def test_questions_are_encoded_with_their_pictures(tmp_path):
    emoji = open_source("emoji:2")
    for index in range(2):
        emoji.picture(index, 16).save(tmp_path / f"{index}.png")
    rows = [{"image": "0.png", "caption": "red", "question": "Which colour?"}, {"image": "1.png", "caption": "dog"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    encode(open_source(tmp_path / "data.jsonl"), Pixels.Config(), 16, tmp_path / "x")
    assert [e.question for e in open_source(tmp_path / "x").examples] == ["Which colour?", ""]
    examples = tmp_path / "x" / "examples.jsonl"
    old = [{k: v for k, v in json.loads(line).items() if k != "question"} for line in examples.read_text().splitlines()]
    examples.write_text("\n".join(map(json.dumps, old)) + "\n", encoding="utf-8")
    as_before(tmp_path / "x")
    assert [e.question for e in open_source(tmp_path / "x").examples] == ["", ""]  # written before there were any


def test_the_command(tmp_path, capsys):
    argv = ["data", "encode", "emoji:12", "-o", str(tmp_path / "x"), "--size", "16", "--json"]
    assert cli.main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == 12 and found["shards"] == 1 and found["codec"]["class"] == "Pixels"
    assert cli.main(["data", "check", str(tmp_path / "x")]) == 0
    assert cli.main(["data", "encode", "emoji:12", "-o", str(tmp_path / "x"), "--codec", "vae"]) == 2
    assert "codec 'vae' is not one of" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- sealed, or refused


def as_before(folder):
    """The index as it was before files had hashes: of the shards alone."""
    path = folder / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in index.items() if k not in ("examples", "sha256")}, indent=2))


def swap(path, old, new):
    content = path.read_bytes()
    assert content.count(old) >= 1
    path.write_bytes(content.replace(old, new, 1))


def without_line(path, number):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))


@pytest.mark.parametrize(
    ("damage", "message", "before"),
    [
        (lambda f: without_line(f / "examples.jsonl", 2), r"examples\.jsonl was altered: its hash is", "has 5 examples"),
        (lambda f: swap(f / "examples.jsonl", b"a picture", b"a pasture"), r"examples\.jsonl was altered: its hash", None),
        (lambda f: (f / "examples.jsonl").unlink(), r"examples\.jsonl cannot be read: No such file", "cannot be read"),
        (lambda f: swap(f / "examples.jsonl", b'"id"', b'"id'), r"examples\.jsonl was altered", r"jsonl:1: is no example \("),
        (lambda f: swap(f / "examples.jsonl", b'"group"', b'"grope"'), "was altered", r"jsonl:1: is no example \('group'\)"),
        (lambda f: swap(f / "index.json", b'"size": 16', b'"size": 61'), r"index\.json was altered: its hash is", None),
        (lambda f: swap(f / "index.json", b'"bytes"', b'"bites"'), r"index\.json was altered", r"it has no field bytes"),
        (lambda f: swap(f / "index.json", b"{", b""), r"index\.json cannot be read: Extra data", "cannot be read: Extra"),
        (lambda f: (f / "index.json").write_bytes(b""), r"index\.json cannot be read: Expecting", "cannot be read: Exp"),
    ],
    ids=["lost line", "other words", "no words", "no JSON", "no group", "other size", "no bytes", "no brace", "empty index"],
)  # fmt: skip
def test_an_index_or_words_that_are_not_what_was_written_are_named(tmp_path, capsys, damage, message, before):
    """A line that is lost would give all pictures behind it the words of others. Folders from before there were hashes are
    read as far as their words fit the shards.
    """
    encode(Noise(), Pixels.Config(), 16, tmp_path / "x")
    shutil.copytree(tmp_path / "x", tmp_path / "old")
    as_before(tmp_path / "old")
    whole = bytes_of(tmp_path / "x")
    assert open_source(tmp_path / "old").examples == open_source(tmp_path / "x").examples == Noise().examples
    for folder, told in ((tmp_path / "x", message), (tmp_path / "old", before)):
        damage(folder)
        if told is None:
            assert len(open_source(folder)) == 6  # what nobody can know
            continue
        with pytest.raises(
            XFusionError, match=f"{told}.*: take an intact copy, or delete index.json and give"
        ) as error:
            open_source(folder)
        assert "\n" not in str(error.value)
        assert cli.main(["data", "check", str(folder)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        encode(Noise(), Pixels.Config(), 16, folder)  # as it says; the shards are kept
        assert bytes_of(folder) == whole


def test_a_seal_is_not_taken_off(tmp_path):
    encode(Noise(), Pixels.Config(), 16, tmp_path / "x")
    swap(tmp_path / "x" / "index.json", b'"sha256": "', b'"sha265": "')
    with pytest.raises(XFusionError, match=r"index\.json was altered"):
        open_source(tmp_path / "x")


def test_a_damaged_shard_is_not_sealed_anew(tmp_path):
    """Given again beside its index the command says what it says when it reads."""
    encode(Noise(), Pixels.Config(), 16, tmp_path / "x")
    before = (tmp_path / "x" / "index.json").read_bytes()
    shard = tmp_path / "x" / "latents-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    with pytest.raises(
        XFusionError, match=r"latents-00000\.safetensors: its hash is .*: delete both, and encode again"
    ):
        encode(Noise(), Pixels.Config(), 16, tmp_path / "x")
    assert (tmp_path / "x" / "index.json").read_bytes() == before
    shard.unlink()
    encode(Noise(), Pixels.Config(), 16, tmp_path / "x")
    assert (tmp_path / "x" / "index.json").read_bytes() == before


@linux
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_disk_that_takes_no_more_is_told_with_the_file_and_the_same_command_goes_on(tmp_path, monkeypatch, workers):
    """A limit on the size of a file is what a test may set without a disk of its own; the writes fail for real."""
    monkeypatch.setattr(latents, "PER_SHARD", 3)
    spec, out = pictures_in(tmp_path / "pictures"), tmp_path / "x"

    def limited(limit):
        def work():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            encode(open_source(spec), Pixels.Config(), 16, out, workers=workers)

        return in_a_child(work)

    told = (
        rf"^XFusionError: {out}/latents-0000[01]\.safetensors cannot be written: .*File too large.*; make room, or name"
    )
    assert re.search(told, said := limited(5000)) and "\n" not in said, said
    assert list(out.iterdir()) == []
    encode(open_source(spec), Pixels.Config(), 16, out)
    whole = bytes_of(out)
    (out / "index.json").unlink()
    assert limited(100) == (
        f"XFusionError: {out}/examples.jsonl cannot be written: File too large; make room, or name another folder"
    )
    assert {**whole, "index.json": b""} == {**bytes_of(out), "index.json": b""}  # what stood there, and no more
    encode(open_source(spec), Pixels.Config(), 16, out)
    assert bytes_of(out) == whole


def test_shards_of_pictures_that_changed_under_their_names_are_not_kept(tmp_path, monkeypatch):
    """Also where the data's own groups stay as they are."""
    monkeypatch.setattr(latents, "PER_SHARD", 2)
    pictures_in(tmp_path / "pictures")
    rows = [{"image": f"pictures/{n}.png", "caption": f"card {n}", "group": f"suit {n % 2}"} for n in range(5)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    encode(open_source(path), Pixels.Config(), 16, tmp_path / "x")
    rows[4]["caption"] = "a card"  # other words need no other latents
    path.write_text("\n".join(map(json.dumps, rows)))
    assert encode(open_source(path), Pixels.Config(), 16, tmp_path / "x").examples[4].captions == ("a card",)
    PILImage.new("RGB", (20, 16), "blue").save(tmp_path / "pictures" / "3.png")
    with pytest.raises(XFusionError, match=r"latents-00001\.safetensors: was made by .*, or of other pictures"):
        encode(open_source(path), Pixels.Config(), 16, tmp_path / "x")
    # Of a picture whose group is the hash of its file no more is written than before: such shards are kept.
    one = Example(id="0", captions=("card",), group="0123", origin="0.png", content="0123")
    assert latents._key({}, 16, 1, [one]) == latents._key({}, 16, 1, [replace(one, content="")])


def test_captions_are_searched_for_the_special_tokens_of_the_base_that_trains_on_them(tmp_path, caplog):
    """They may have been encoded for another."""
    spec = pictures_in(tmp_path / "pictures")
    (spec / "2.txt").write_text("a <|im_end|> b")
    encode(open_source(spec), Pixels.Config(), 16, tmp_path / "x")
    whole = open_source(tmp_path / "x", special_tokens=("<eos>",))
    assert len(whole) == 5 and check(tmp_path / "x").num_bad == 0
    told = (
        r"1 of 5 examples are bad: .*2\.png: caption contains '<\|im_end\|>', a special token of the model's tokenizer"
    )
    with pytest.raises(XFusionError, match=told):
        open_source(tmp_path / "x", special_tokens=("<|im_end|>",))
    report = check(tmp_path / "x", special_tokens=("<|im_end|>",))
    assert (report.num_examples, report.num_bad, report.counts) == (5, 1, {"special token": 1})
    some = open_source(tmp_path / "x", special_tokens=("<|im_end|>",), allow_bad=0.2)
    assert [e.id for e in some.examples] == ["0.png", "1.png", "3.png", "4.png"] and "left out 1 of 5" in caplog.text
    image = ImageModality.Config(patch=4, sizes=(16,)).build()
    assert torch.equal(some.tokens(2, image, 16), whole.tokens(3, image, 16))


def test_workers_leave_out_what_breaks_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "PER_SHARD", 3)
    for index in range(6):
        Noise().picture(index, 16).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"card {index}")
    source, out = open_source(tmp_path), tmp_path / "out"
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:100])
    with pytest.raises(XFusionError, match=r"4\.png is cut short"):
        encode(source, Pixels.Config(), 16, out, workers=2)
    found = encode(source, Pixels.Config(), 16, out, workers=2, allow_bad=0.2)
    assert [e.captions[0] for e in found.examples] == [f"card {index}" for index in (0, 1, 2, 3, 5)]
    assert "4.png is cut short" in found.left_out[4]
    # By the command, for which the broken picture would else be none of the examples.
    index = (out / "index.json").read_bytes()
    command = ["data", "encode", str(tmp_path), "--size", "16", "--device", "cpu", "-o", str(out), "--allow-bad"]
    assert cli.main([*command, "0.2"]) == 0 and (out / "index.json").read_bytes() == index
    # Mended: less is allowed, so its shard is made again.
    Noise().picture(4, 16).save(tmp_path / "4.png")
    assert cli.main([*command, "0.01"]) == 0
    assert len(Latents(out)) == 6 and not Latents(out).left_out
