"""The sound modality: sounds <-> frames (through a frozen codec) <-> tokens (strips of neighbouring frames)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

from xfusion.data.sequence import Sound, Unreadable, XFusionError
from xfusion.modalities.base import Modality, SoundCodec
from xfusion.modalities.encoders.whisper import Whisper


class AudioModality(Modality):
    """Sounds of one length as tokens. F = width of a frame, h = samples per frame, p = patch:

    sound of n samples -> padded with silence to the size -> frames [size, F] -> size / p tokens of F * p numbers.

    A size is a number of frames. A shorter sound is padded with silence, which the codec encodes too, as Whisper did in
    training. A longer sound is refused, because a part of it would be ignored.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Modality.Config):
        """Settings of the sound modality."""

        media, suite = "sounds", "sounds"
        codec: SoundCodec.Config = field(default_factory=Whisper.Config)
        """The codec that turns sounds into frames."""
        seconds: float = 2.0
        """Longest sound in seconds."""
        patch: int = 1
        """Frames per token."""

        def build(self) -> AudioModality:
            return AudioModality(self)

    name = "audio"

    def __init__(self, config: AudioModality.Config):
        if config.patch < 1:
            raise XFusionError(f"patch must be at least 1, but it is {config.patch}")
        self.config: AudioModality.Config = config
        self.patch = config.patch
        self.codec: SoundCodec = config.codec.build()
        self.token_width = self.codec.width * self.patch
        frames = config.seconds * self.codec.rate / self.codec.hop
        self.sizes = (round(frames),)
        if abs(frames - self.sizes[0]) > 1e-6:
            raise XFusionError(
                f"{config.seconds:g} s are {frames:g} frames of the codec: choose a whole number of them"
            )
        self.grid(self.sizes[0])

    @property
    def described(self) -> str:
        """See `Modality.described`."""
        return f"sounds of up to {self.config.seconds:g} s"

    def grid(self, size: int) -> tuple[int, int]:
        """(tokens, 1) for a sound of ``size`` frames; XFusionError for a length that does not divide or is too long."""
        longest, frame = self.codec.longest, self.codec.hop / self.codec.rate
        if size < self.patch or size % self.patch or size > longest:
            raise XFusionError(
                f"a length of {size * frame:g} s is not legal: it must be a multiple of {self.patch * frame:g} s"
                f" ({self.patch} frames of {frame:g} s) and at most the codec's {longest * frame:g} s"
            )
        return size // self.patch, 1

    def encode(self, media: Sequence[Sound], size: int) -> Tensor:
        """Sounds of any rate, none longer than ``size`` frames -> tokens [N, size / patch, token_width], float32.

        Raises:
            XFusionError: something is not a sound, or is too long.
        """
        self.grid(size)
        waves = torch.zeros(len(media), size * self.codec.hop)
        for wave, sound in zip(waves, media, strict=True):
            samples = self.as_heard(sound, size).samples
            wave[: len(samples)] = samples
        return self.tokens(self.codec.encode(waves))

    def as_heard(self, sound: Sound, size: int) -> Sound:
        """A sound at the codec's rate.

        Raises:
            XFusionError: it is not a sound.
            Unreadable: it is longer than ``size`` frames.
        """
        if not isinstance(sound, Sound):
            raise XFusionError(
                f"this model hears sounds, but it was given a {type(sound).__name__}: take one that reads pictures, or"
                " a sound (xfusion.read_sound)"
            )
        samples, longest = resampled(sound, self.codec.rate), size * self.codec.hop
        if len(samples) > longest:
            raise Unreadable(
                f"a sound of {sound.seconds:.2f} s is longer than the {longest / self.codec.rate:g} s that this model"
                " hears: cut it, or train a model with --model.audio.seconds"
            )
        return Sound(samples=samples, rate=self.codec.rate)

    def decode(self, tokens: Tensor, size: int) -> Tensor:
        """The inverse of `tokens`: tokens [N, size / patch, token_width] -> frames [N, size, F]. No codec makes sounds yet."""
        if tokens.shape[1:] != (self.grid(size)[0], self.token_width):
            raise XFusionError(f"tokens of shape {list(tokens.shape)} are not sounds of {size} frames")
        return tokens.unflatten(-1, (self.codec.width, self.patch)).transpose(-1, -2).flatten(1, 2)

    def tokens(self, frames: Tensor) -> Tensor:
        """Groups frames into strips, channels first as in patches: [N, size, F] -> [N, size / patch, F * patch]."""
        return frames.unflatten(1, (-1, self.patch)).transpose(-1, -2).flatten(2)


def resampled(sound: Sound, rate: int) -> Tensor:
    """Samples of a sound resampled to ``rate``, float32, by soxr's band-limited filter."""
    if sound.rate == rate:
        return sound.samples.float()
    try:
        import soxr
    except ImportError as error:
        raise XFusionError("resampling needs soxr: pip install 'xfusion[audio]'") from error
    samples: Any = soxr.resample(sound.samples.float().numpy(), sound.rate, rate)
    return torch.from_numpy(numpy.ascontiguousarray(samples, dtype=numpy.float32))
