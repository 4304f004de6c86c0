"""From a sound file to a sound: one channel, at the file's own rate. Decoding is libsndfile's job, through soundfile."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from xfusion.data.pictures import file_problem, one_reason
from xfusion.data.sequence import Sound, Unreadable, XFusionError

MAX_SECONDS = 600
"""A longer sound is refused from its header, undecoded: a small file can hold hours of silence."""
RATES = (2_000, 384_000)
"""Smallest and largest legal number of samples per second."""
MAX_CHANNELS = 32
"""They are mixed to one."""
MAX_SAMPLES = 120_000_000
"""Of all channels together, each 4 bytes once it is decoded: ten minutes of two channels at 96,000 samples per second."""
SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".m4a", ".aac", ".wma"})
"""Files that mean to be sounds; one in a format that we do not read is a problem to name, not a file to pass over."""
READABLE = "WAV, FLAC, Ogg, Opus, MP3, AIFF or AU"


def header_problem(path: Path) -> str | None:
    """What is wrong with a sound file as far as its header tells, or None. Cheap, decodes nothing."""
    if (problem := file_problem(path, "cut it")) is not None:
        return problem
    return _problem(str(path))


def _problem(file: str | io.BytesIO, most_samples: int = MAX_SAMPLES) -> str | None:
    soundfile = _soundfile()
    try:
        found = soundfile.info(file)
    except Exception as error:  # a broken header may fail in any way
        return f"is not a sound ({one_reason(error)}); save it as {READABLE}"
    if not RATES[0] <= found.samplerate <= RATES[1]:
        return f"has {found.samplerate} samples per second: {RATES[0]} to {RATES[1]} are legal"
    if found.channels > MAX_CHANNELS:
        return f"has {found.channels} channels, at most {MAX_CHANNELS} are legal"
    if not found.frames:
        return "holds no samples"
    if found.frames > MAX_SECONDS * found.samplerate:
        return f"lasts {found.frames / found.samplerate:.0f} s, at most {MAX_SECONDS} are legal: cut it"
    if (samples := found.frames * found.channels) > most_samples:
        return (
            f"holds {samples:,} samples in all its channels, at most {most_samples:,} are allowed: cut it, or mix them"
        )
    return None


def decode_problem(path: Path) -> str | None:
    """What is wrong with the rest of a file whose header is sound, or None. Decodes all of it; safe in threads."""
    found = _decoded(str(path))
    return found if isinstance(found, str) else None


def read_sound(path: str | Path, origin: str | None = None) -> Sound:
    """The whole sound, its channels mixed to one.

    Args:
        path: a file of one of `READABLE`.
        origin: what to call it in messages.

    Raises:
        Unreadable: the file is missing, broken, too long or no sound, with ``origin`` in front.
    """
    path = Path(path)
    found = header_problem(path) or _decoded(str(path))
    if isinstance(found, Sound):
        return found
    raise Unreadable(f"{origin}: {path.name} {found}" if origin else f"{path}: {found}")


def decode(data: bytes, name: str, *, most_samples: int = MAX_SAMPLES) -> Sound:
    """The whole sound of a file's bytes, its channels mixed to one.

    Args:
        data: of one of `READABLE`.
        name: what to call it in messages.
        most_samples: one that holds more, all its channels together, is refused from its header, undecoded.

    Raises:
        XFusionError: it is broken, too long or no sound.
    """
    found = _problem(io.BytesIO(data), most_samples) or _decoded(io.BytesIO(data))
    if isinstance(found, Sound):
        return found
    raise XFusionError(f"{name} {found}")


def as_wav(sound: Sound) -> bytes:
    """A sound as a WAV file of 16 bits."""
    file = io.BytesIO()
    _soundfile().write(file, sound.samples.numpy(), sound.rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def _decoded(file: str | io.BytesIO) -> Sound | str:
    """A sound, or what is wrong with it."""
    try:
        return _decode(file)
    except Exception as error:  # as above
        return f"cannot be decoded ({one_reason(error)})"


def _decode(opened: str | io.BytesIO) -> Sound:
    with _soundfile().SoundFile(opened) as file:
        samples, rate, wanted = file.read(dtype="float32", always_2d=True), file.samplerate, file.frames
    mixed = torch.from_numpy(samples).mean(dim=1)
    if len(mixed) < wanted or not wanted:
        raise ValueError(f"cut short: {len(mixed)} of {wanted} samples")
    if not bool(mixed.isfinite().all()):
        raise ValueError("some samples are no numbers")
    return Sound(samples=mixed, rate=rate)


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the wheel without its library
        raise XFusionError(f"sounds need soundfile ({error}): pip install 'xfusion[audio]'") from error
    return soundfile
