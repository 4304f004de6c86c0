"""Read a sound file with soundfile (libsndfile): mixed to mono, at the file's own sample rate."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from xfusion.data.pictures import file_problem, one_reason
from xfusion.data.sequence import Sound, Unreadable, XFusionError

MAX_SECONDS = 600
"""Longer sounds are refused by their header, without decoding: a small file can contain hours of silence."""
RATES = (2_000, 384_000)
"""Smallest and largest sample rate."""
MAX_CHANNELS = 32
"""Largest number of channels; they are mixed to one."""
MAX_SAMPLES = 120_000_000
"""Largest number of samples over all channels, each 4 bytes when decoded: ten minutes of stereo at 96 kHz."""
SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".m4a", ".aac", ".wma"})
"""Suffixes of sound files; a file in a format that cannot be read is reported, not ignored."""
READABLE = "WAV, FLAC, Ogg, Opus, MP3, AIFF or AU"


def header_problem(path: Path) -> str | None:
    """What is wrong with a sound file by its header, or None. Cheap: decodes nothing."""
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
    """What is wrong with the rest of a file whose header is valid, or None. Decodes all of it; thread-safe."""
    found = _decoded(str(path))
    return found if isinstance(found, str) else None


def read_sound(path: str | Path, origin: str | None = None) -> Sound:
    """Read a whole sound, mixed to mono.

    Args:
        path: a file in one of the formats of `READABLE`.
        origin: its name in messages.

    Raises:
        Unreadable: the file is missing, broken, too long or not a sound; the message starts with ``origin``.
    """
    path = Path(path)
    found = header_problem(path) or _decoded(str(path))
    if isinstance(found, Sound):
        return found
    raise Unreadable(f"{origin}: {path.name} {found}" if origin else f"{path}: {found}")


def decode(data: bytes, name: str, *, most_samples: int = MAX_SAMPLES) -> Sound:
    """Decode a whole sound from a file's bytes, mixed to mono.

    Args:
        data: content of a file in one of the formats of `READABLE`.
        name: its name in messages.
        most_samples: a sound with more samples, over all channels, is refused by its header, without decoding.

    Raises:
        XFusionError: it is broken, too long or not a sound.
    """
    found = _problem(io.BytesIO(data), most_samples) or _decoded(io.BytesIO(data))
    if isinstance(found, Sound):
        return found
    raise XFusionError(f"{name} {found}")


def as_wav(sound: Sound) -> bytes:
    """A sound as a 16-bit WAV file."""
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
