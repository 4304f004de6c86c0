"""Base classes of modalities and codecs: raw media <-> latents <-> tokens, independent of any language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from xfusion.data.sequence import Media, XFusionError

# Most pictures, and pixels, per call of an autoencoder; bounds memory when a whole data set is encoded at once.
_CHUNK, _CHUNK_PIXELS = 64, 64 * 256 * 256
# Resampling and reduced precision overshoot [-1, 1] by less than this; more means that a picture has another range.
_RANGE_TOLERANCE = 1e-3


class Frozen(nn.Module):
    """A module whose weights never train; it stays in eval mode even if its parent is set to train mode."""

    def freeze(self) -> Self:
        """Turn gradients off and eval mode on; call after the weights are loaded."""
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        del mode
        return super().train(False)


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Settings of one codec, of pictures or of sounds."""

    @property
    def weights(self) -> Path | None:
        """The file that defines what its codes and latents mean; None if its name does, or if nothing is learned."""
        return None


class Codec(Frozen, ABC):
    """A frozen map between images and latents.

    Images are [N, 3, H, W] floats in [-1, 1]; latents are [N, channels, H / factor, W / factor] in float32 with about
    unit variance, because the codec owns scale and shift. Neither direction records gradients.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(CodecConfig):
        """Settings of one codec; `build()` creates it."""

        def build(self) -> Codec:
            """The codec of this config, loaded, frozen and in eval mode."""
            raise NotImplementedError(f"{type(self).__qualname__} must define build()")

    channels: int
    """Latent channels."""
    factor: int
    """Pixels per latent cell, in each direction."""
    bounded: bool = False
    """Whether latents lie in [-1, 1], as pixels do; otherwise they are unbounded."""
    licence: str = "unknown"
    """Licence of the weights."""
    psnr: dict[str, float] | None = None
    """Measured peak signal-to-noise ratios in dB, by name of the measured data; None if not measured."""
    encoders: frozenset[str] = frozenset()
    """Fingerprints of frozen encoders that it uses; none of them may score a model of its latents."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, rows, columns) of the latent of one height x width image; XFusionError if it does not divide."""
        if height < self.factor or width < self.factor or height % self.factor or width % self.factor:
            raise XFusionError(
                f"an image of {height}x{width} pixels does not fit a codec of factor {self.factor}: "
                f"both sides must be multiples of {self.factor}"
            )
        return self.channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] -> latents [N, channels, H / factor, W / factor], float32, deterministic."""
        _check_floats("images", images)
        if images.ndim != 4 or images.shape[1] != 3:
            raise XFusionError(f"images must have the shape [N, 3, H, W], but this is {list(images.shape)}")
        shape = self.latent_shape(images.shape[2], images.shape[3])
        if not len(images):  # attention in an autoencoder cannot run on an empty batch
            return images.new_empty(0, *shape, dtype=torch.float32)
        low, high = (bound.item() for bound in images.aminmax())
        if not (low >= -1 - _RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE):
            raise XFusionError(f"images must lie in [-1, 1], but these lie in [{low:.3g}, {high:.3g}]; rescale them")
        parts = images.float().split(_chunk(images.shape[2] * images.shape[3]))
        return torch.cat([self._encode(part) for part in parts])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, channels, h, w] -> images [N, 3, h * factor, w * factor], float32, clipped to [-1, 1]."""
        _check_floats("latents", latents)
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise XFusionError(
                f"latents must have the shape [N, {self.channels}, h, w], but this is {list(latents.shape)}"
            )
        if not len(latents):
            height, width = (side * self.factor for side in latents.shape[2:])
            return latents.new_empty(0, 3, height, width, dtype=torch.float32)
        parts = latents.float().split(_chunk(latents.shape[2] * latents.shape[3] * self.factor**2))
        return torch.cat([self._decode(part) for part in parts]).clamp(-1, 1)

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor:
        """`encode` without the checks, on a bounded number of images."""

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """`decode` without clipping, on a bounded number of latents."""


class Encoder(Frozen, ABC):
    """A frozen map from images to features, used to score drawings or to align a model with (never both).

    Images are [N, 3, H, W] floats in [-1, 1] of any size and receive no gradient.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ABC):
        """Settings of one encoder; everything that a pack stores about it is available before its weights are loaded."""

        @property
        def weights(self) -> Path | None:
            """As `CodecConfig.weights`."""
            return None

        @property
        @abstractmethod
        def width(self) -> int:
            """Feature width."""

        @property
        @abstractmethod
        def fingerprint(self) -> str:
            """Identifies its weights."""

        @property
        def licence(self) -> str:
            """Licence of the weights, as far as it is known."""
            return "unknown"

        @property
        def stated_licence(self) -> str:
            """The licence to name in a pack, which may have to be looked up."""
            return self.licence

        @abstractmethod
        def build(self) -> Encoder:
            """The encoder of this config, loaded, frozen and in eval mode."""

    name: str
    """Short name, for tables."""
    fingerprint: str
    """Identifies its weights."""
    licence: str = "unknown"
    """Licence of the weights."""
    width: int
    """Feature width."""
    side: int
    """Side in pixels to which every picture is resized."""
    cells: int
    """Rows, and columns, of its feature map."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> one feature each [N, width], float32."""

    @abstractmethod
    def maps(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> feature maps [N, width, rows, columns], float32."""


class SoundCodec(Frozen, ABC):
    """A frozen map from sounds to frames: encoder features or codes. It only encodes, and is loaded at its first use.

    Sounds are [N, samples] floats in [-1, 1] at `rate`; frames are [N, frames, width], one for each `hop` samples.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(CodecConfig):
        """Settings of one codec of sounds; `build()` creates it."""

        def build(self) -> SoundCodec:
            """The codec of this config, not yet loaded."""
            raise NotImplementedError(f"{type(self).__qualname__} must define build()")

    rate: int
    """Sample rate of its input, per second."""
    hop: int
    """Samples per frame."""
    width: int
    """Width of a frame."""
    longest: int
    """Frames of the longest sound that it accepts."""
    bounded: bool = False
    """Whether frames lie in [-1, 1]; otherwise they are unbounded."""
    licence: str = "unknown"
    """Licence of the weights."""
    encoders: frozenset[str] = frozenset()
    """Fingerprints of frozen encoders that it uses; none of them may score a model of its frames."""

    @abstractmethod
    def encode(self, sounds: Tensor) -> Tensor:
        """Sounds [N, frames * hop] in [-1, 1] -> [N, frames, width], float32, without gradients."""


class Modality(ABC):
    """Raw media <-> latents <-> tokens. A modality does not depend on the language model's width."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of one modality; `build()` creates it."""

        media: ClassVar[str]
        """Human-readable name of its media: ``pictures``."""
        suite: ClassVar[str]
        """The suite of `xfusion.evaluation` that scores its recipes in comparisons."""
        position: Literal["running", "shared"] = "running"
        """Rotary positions of an item's tokens: the running index, or one shared by all of them (CogVLM). The port's
        embeddings distinguish rows and columns."""
        order: Literal["both ways", "causal"] = "both ways"
        """Attention among the tokens of an item: bidirectional, or causal in reading order."""
        behind_begin: bool = False
        """Whether the base's BOS token is put before an item that starts a sequence. For mechanisms in which media are not
        positions of the base, whose first position is an attention sink that nothing can be read from."""

        def build(self) -> Modality:
            """The modality of this config."""
            raise NotImplementedError(f"{type(self).__qualname__} must define build()")

    config: Config
    name: str
    """The name by which segments of a sequence refer to the modality."""
    token_width: int
    """Width of a media token."""
    patch: int
    """Latent cells per token, in each direction; for sounds, frames per token."""
    sizes: tuple[int, ...]
    """Sizes that the model supports; the first is the default."""
    codec: Any
    """Turns raw media into latents: a `Codec` or a `SoundCodec`."""

    def to(self, device: torch.device | str) -> Self:
        """Move the codec to a device; `encode` and `decode` then expect tensors there, and move raw media themselves."""
        self.codec.to(device)
        return self

    @property
    @abstractmethod
    def described(self) -> str:
        """The media that the model supports, for the log: ``pictures, 32 px``."""

    @abstractmethod
    def grid(self, size: int) -> tuple[int, int]:
        """Rows and columns of tokens for media of this size; XFusionError for an illegal size."""

    @abstractmethod
    def encode(self, media: Any, size: int) -> Tensor:
        """Raw media -> tokens [N, M, token_width]."""

    @abstractmethod
    def decode(self, tokens: Tensor, size: int) -> Tensor:
        """Tokens [N, M, token_width] -> raw media as a tensor."""

    def segment(self, tokens: Tensor, grid: tuple[int, int], **options: Any) -> Media:
        """An item's tokens ``[rows * columns, token_width]`` as a segment of a sequence; ``options`` is passed to `Media`."""
        return Media(
            tokens=tokens,
            grid=grid,
            modality=self.name,
            bidirectional=self.config.order == "both ways",
            shared_position=self.config.position == "shared",
            behind_begin=self.config.behind_begin,
            **options,
        )


def _chunk(pixels: int) -> int:
    """How many pictures of so many pixels are computed in one call."""
    return max(1, min(_CHUNK, _CHUNK_PIXELS // pixels))


def _check_floats(description: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise XFusionError(
            f"{description} must be a tensor, but this is a {type(tensor).__name__}; "
            "ImageModality.from_pil turns PIL pictures into one"
        )
    if not tensor.is_floating_point():
        raise XFusionError(
            f"{description} must be floats, but these are {str(tensor.dtype).removeprefix('torch.')}; "
            "for images of 0..255 pass images.float() / 127.5 - 1"
        )
