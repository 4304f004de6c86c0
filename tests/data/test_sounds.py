"""Sounds from files: what is read, what is refused in one line, and folders and manifests of them as a source."""

import json

import numpy
import pytest
import soundfile
import torch

import xfusion
from xfusion.data import sounds
from xfusion.data.sequence import Sound, XFusionError
from xfusion.data.sources import Sounds, check, open_source
from xfusion.modalities.image import ImageModality

RATE = 8000


def tone(path, hertz=440.0, seconds=0.25, channels=1):
    time = numpy.arange(round(seconds * RATE)) / RATE
    wave = 0.5 * numpy.sin(2 * numpy.pi * hertz * time)
    stack = numpy.stack([wave * (1 if c == 0 else 0) for c in range(channels)], axis=1)
    soundfile.write(path, stack, RATE, subtype="PCM_16" if path.suffix != ".ogg" else None)
    return path


def test_a_file_is_read_at_its_own_rate_and_channels_are_mixed(tmp_path):
    one, two = xfusion.read_sound(tone(tmp_path / "a.wav")), xfusion.read_sound(tone(tmp_path / "b.flac", channels=2))
    assert one.rate == two.rate == RATE and one.seconds == 0.25
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(2000, dtype=torch.float64) / RATE)
    assert (one.samples - expected).abs().max() < 1 / 32_000
    assert (two.samples - one.samples / 2).abs().max() < 1 / 32_000
    assert xfusion.read_sound(tone(tmp_path / "c.ogg")).samples.abs().max() > 0.4


def broken(folder):
    (folder / "empty.wav").write_bytes(b"")
    (folder / "words.wav").write_text("no sound at all")
    tone(folder / "whole.flac")
    (folder / "cut.flac").write_bytes((folder / "whole.flac").read_bytes()[:900])
    soundfile.write(folder / "nothing.wav", numpy.zeros((0, 1)), RATE)
    soundfile.write(folder / "long.flac", numpy.zeros(601 * RATE), RATE)
    soundfile.write(folder / "slow.wav", numpy.zeros(10), 1000)
    soundfile.write(folder / "wrong.wav", numpy.array([0.0, numpy.nan]), RATE, subtype="FLOAT")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("gone.wav", "no such file"),
        ("empty.wav", "is empty"),
        ("words.wav", "is not a sound .*save it as WAV"),
        ("cut.flac", "cannot be decoded|is not a sound"),
        ("nothing.wav", "holds no samples"),
        ("long.flac", "lasts 601 s, at most 600"),
        ("slow.wav", "1000 samples per second: 2000 to"),
        ("wrong.wav", "some samples are no numbers"),
    ],
)
def test_what_is_no_sound_is_told_in_one_line(tmp_path, name, what):
    broken(tmp_path)
    with pytest.raises(XFusionError, match=what) as error:
        xfusion.read_sound(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_sound_of_many_channels_is_refused_undecoded(tmp_path, monkeypatch):
    """Ten minutes of 32 channels at the highest rate are 29 GB in memory, and silence a small file."""
    soundfile.write(tmp_path / "bomb.flac", numpy.zeros((4096, 8)), 48_000, subtype="PCM_16")
    data = (tmp_path / "bomb.flac").read_bytes()
    frames = sounds.MAX_SAMPLES // 8 + 1
    assert frames < 600 * 48_000
    head = int.from_bytes(data[18:26], "big")  # rate, channels, depth, and 36 bits of frames
    (tmp_path / "bomb.flac").write_bytes(data[:18] + (head >> 36 << 36 | frames).to_bytes(8, "big") + data[26:])
    monkeypatch.setattr(sounds, "_decode", lambda file: 1 / 0)
    with pytest.raises(XFusionError, match="bomb.flac: holds 120,000,008 samples in all its channels, at most 120,0"):
        xfusion.read_sound(tmp_path / "bomb.flac")
    with pytest.raises(XFusionError, match="it holds 32,768 samples in all its channels, at most 1,000"):
        sounds.decode(data, "it", most_samples=1000)


def test_a_sound_is_a_row_of_floats():
    for samples, rate in ((torch.zeros(2, 3), 8), (torch.zeros(3).int(), 8), (torch.zeros(0), 8), (torch.zeros(3), 0)):
        with pytest.raises(XFusionError, match="a row of floats at a rate"):
            Sound(samples=samples, rate=rate)


def test_a_manifest_and_a_folder_are_sources(tmp_path):
    folder = tmp_path / "sounds"
    folder.mkdir()
    for number, name in enumerate(("low", "high")):
        tone(folder / f"{name}.wav", hertz=220.0 * (number + 1))
        (folder / f"{name}.txt").write_text(f"{name}\na {name} tone\n")
    lines = [{"audio": f"sounds/{name}.wav", "caption": name, "group": "all"} for name in ("low", "high")]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, lines)))
    both = open_source(str(folder)), open_source(str(tmp_path / "some.jsonl"))
    for source in both:
        assert isinstance(source, Sounds) and {e.captions[0] for e in source.examples} == {"low", "high"}
        at = next(i for i, e in enumerate(source.examples) if e.captions[0] == "high")
        assert torch.equal(source.sound(at).samples, xfusion.read_sound(folder / "high.wav").samples)
        with pytest.raises(XFusionError, match="holds sounds, not pictures"):
            source.picture(0, 32)
        with pytest.raises(XFusionError, match="this model reads pictures, but it was given a sound"):
            source.tokens(0, ImageModality.Config().build(), 32)
    assert both[0].examples[0].captions == ("high", "a high tone") and both[1].examples[0].group == "all"
    report = check(str(folder))
    assert (report.num_examples, report.num_bad) == (2, 0)
    (folder / "low.wav").write_bytes(b"RIFF")
    with pytest.raises(XFusionError, match="1 of 2 examples are bad.*low.wav.* is not a sound"):
        open_source(str(folder))
    assert check(str(folder)).counts == {"broken sound": 1}
    (tmp_path / "none.jsonl").write_text('{"audio": "gone.wav", "caption": "x"}')
    assert check(str(tmp_path / "none.jsonl")).counts == {"missing sound": 1}
