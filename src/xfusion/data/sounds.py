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
    return _header_problem(str(path))


def _header_problem(file: str | io.BytesIO, most_samples: int = MAX_SAMPLES) -> str | None:
    soundfile = _soundfile()
    try:
        info = soundfile.info(file)
    except Exception as error:  # a broken header may fail in any way
        return f"is not a sound ({one_reason(error)}); save it as {READABLE}"
    if not RATES[0] <= info.samplerate <= RATES[1]:
        return f"has {info.samplerate} samples per second: {RATES[0]} to {RATES[1]} are legal"
    if info.channels > MAX_CHANNELS:
        return f"has {info.channels} channels, at most {MAX_CHANNELS} are legal"
    if not info.frames:
        return "holds no samples"
    if info.frames > MAX_SECONDS * info.samplerate:
        return f"lasts {info.frames / info.samplerate:.0f} s, at most {MAX_SECONDS} are legal: cut it"
    if (samples := info.frames * info.channels) > most_samples:
        return (
            f"holds {samples:,} samples in all its channels, at most {most_samples:,} are allowed: cut it, or mix them"
        )
    return None


def decode_problem(path: Path) -> str | None:
    """What is wrong with the rest of a file whose header is valid, or None. Decodes all of it; thread-safe."""
    result = _decode_or_problem(str(path))
    return result if isinstance(result, str) else None


def read_sound(path: str | Path, origin: str | None = None) -> Sound:
    """Read a whole sound, mixed to mono.

    Args:
        path: a file in one of the formats of `READABLE`.
        origin: its name in messages.

    Raises:
        Unreadable: the file is missing, broken, too long or not a sound; the message starts with ``origin``.
    """
    path = Path(path)
    result = header_problem(path) or _decode_or_problem(str(path))
    if isinstance(result, Sound):
        return result
    raise Unreadable(f"{origin}: {path.name} {result}" if origin else f"{path}: {result}")


def decode(data: bytes, name: str, *, most_samples: int = MAX_SAMPLES) -> Sound:
    """Decode a whole sound from a file's bytes, mixed to mono.

    Args:
        data: content of a file in one of the formats of `READABLE`.
        name: its name in messages.
        most_samples: a sound with more samples, over all channels, is refused by its header, without decoding.

    Raises:
        XFusionError: it is broken, too long or not a sound.
    """
    result = _header_problem(io.BytesIO(data), most_samples) or _decode_or_problem(io.BytesIO(data))
    if isinstance(result, Sound):
        return result
    raise XFusionError(f"{name} {result}")


def as_wav(sound: Sound) -> bytes:
    """A sound as a 16-bit WAV file."""
    file = io.BytesIO()
    _soundfile().write(file, sound.samples.numpy(), sound.rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def _decode_or_problem(file: str | io.BytesIO) -> Sound | str:
    """A sound, or what is wrong with it."""
    try:
        return _decode(file)
    except Exception as error:  # as above
        return f"cannot be decoded ({one_reason(error)})"


def _decode(source: str | io.BytesIO) -> Sound:
    with _soundfile().SoundFile(source) as file:
        samples, rate, num_frames = file.read(dtype="float32", always_2d=True), file.samplerate, file.frames
    mono = torch.from_numpy(samples).mean(dim=1)
    if len(mono) < num_frames or not num_frames:
        raise ValueError(f"cut short: {len(mono)} of {num_frames} samples")
    if not bool(mono.isfinite().all()):
        raise ValueError("some samples are no numbers")
    return Sound(samples=mono, rate=rate)


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the wheel without its library
        raise XFusionError(f"sounds need soundfile ({error}): pip install 'xfusion[audio]'") from error
    return soundfile
