"""The image modality: pictures <-> latents (through a codec) <-> tokens (square patches of latents)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from xfusion.data.sequence import Sound, XFusionError
from xfusion.modalities.base import Codec, Modality
from xfusion.modalities.codecs.pixels import Pixels


class ImageModality(Modality):
    """Square pictures as tokens. C = codec channels, f = codec factor, p x q = patch:

    picture of size x size -> latents [C, size / f, size / f] -> size^2 / (f^2 p q) tokens of C * p * q numbers.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Modality.Config):
        """Settings of the image modality."""

        media, suite = "pictures", "emoji"
        codec: Codec.Config = field(default_factory=Pixels.Config)
        """The codec that turns pixels into latents and back."""
        patch: int = 8
        """Latent cells per token, in each direction."""
        patch_width: int | None = None
        """Latent cells per token from left to right; None uses `patch`. A connector that outputs fewer tokens than cells is
        given strips: patch 1, and this many cells per strip."""
        sizes: tuple[int, ...] = (32,)
        """Picture sides in pixels that the model supports; the first is the default."""

        def build(self) -> ImageModality:
            return ImageModality(self)

    name = "image"

    def __init__(self, config: ImageModality.Config):
        if config.patch < 1 or (config.patch_width is not None and config.patch_width < 1):
            raise XFusionError(f"patch must be at least 1, but it is {config.patch} x {config.patch_width}")
        if not config.sizes:
            raise XFusionError("sizes is empty; give at least one side in pixels, for example 32")
        self.config: ImageModality.Config = config
        self.patch, self.patch_width = config.patch, config.patch_width or config.patch
        self.sizes = tuple(config.sizes)
        self.codec = config.codec.build()
        self.step = self.codec.factor * self.patch  # pixels per token, from top to bottom
        self.token_width = self.codec.channels * self.patch * self.patch_width
        for size in self.sizes:
            self.grid(size)

    @property
    def described(self) -> str:
        """See `Modality.described`."""
        return f"pictures, {', '.join(map(str, self.sizes))} px"

    @property
    def device(self) -> torch.device | None:
        """Device of the codec's weights; None for a codec without weights, which works on any device."""
        weight = next(self.codec.parameters(), None)
        return None if weight is None else weight.device

    def grid(self, size: int) -> tuple[int, int]:
        """(rows, columns) of tokens of a size x size picture; XFusionError with legal sizes if ``size`` is illegal."""
        step = self.codec.factor * math.lcm(self.patch, self.patch_width)
        if size < step or size % step:
            below = max(size // step, 1) * step
            raise XFusionError(
                f"image size {size} is not legal: it must be a multiple of {step} (codec factor "
                f"{self.codec.factor} x patch {step // self.codec.factor}), for example {below} or {below + step}"
            )
        return size // self.step, size // (self.codec.factor * self.patch_width)

    def encode(self, media: Sequence[Image.Image] | Tensor, size: int) -> Tensor:
        """PIL pictures, or images [N, 3, size, size] in [-1, 1] -> tokens [N, rows * columns, token_width], float32."""
        self.grid(size)
        if not isinstance(media, Tensor):
            if any(isinstance(item, Sound) for item in media):
                raise XFusionError(
                    "this model reads pictures, but it was given a sound: take one that hears, or a picture"
                )
            media = self.from_pil(media, size).to(self.device)
        elif tuple(media.shape[-2:]) != (size, size):
            raise XFusionError(f"images of shape {list(media.shape)} are not {size}x{size} pixels; resize them first")
        return self.tokens(self.codec.encode(media))

    def decode(self, tokens: Tensor, size: int) -> Tensor:
        """Tokens [N, rows * columns, token_width] -> images [N, 3, size, size], clipped to [-1, 1]."""
        return self.codec.decode(self.latents(tokens, size))

    def tokens(self, latents: Tensor) -> Tensor:
        """Patchify: latents [N, C, h, w] -> tokens [N, (h/p) * (w/q), C * p * q], in reading order."""
        p, q = self.patch, self.patch_width
        count, channels, height, width = latents.shape
        if channels != self.codec.channels or height % p or width % q:
            raise XFusionError(
                f"latents of shape {list(latents.shape)} do not divide into patches: they must have "
                f"{self.codec.channels} channels and sides that are multiples of {p} and {q}"
            )
        latents = latents.reshape(count, channels, height // p, p, width // q, q)
        return latents.permute(0, 2, 4, 1, 3, 5).reshape(count, (height // p) * (width // q), self.token_width)

    def latents(self, tokens: Tensor, size: int) -> Tensor:
        """The exact inverse of `tokens`: tokens [N, rows * columns, C * p * q] -> latents [N, C, size/f, size/f]."""
        rows, columns = self.grid(size)
        if tokens.shape[1:] != (rows * columns, self.token_width):
            raise XFusionError(
                f"tokens of shape {list(tokens.shape)} are not {size}x{size} pictures: "
                f"these have [N, {rows * columns}, {self.token_width}]"
            )
        p, q, channels = self.patch, self.patch_width, self.codec.channels
        tokens = tokens.reshape(len(tokens), rows, columns, channels, p, q)
        return tokens.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), channels, rows * p, columns * q)

    @staticmethod
    def from_pil(pictures: Sequence[Image.Image], size: int) -> Tensor:
        """PIL pictures of any size and mode -> [N, 3, size, size] in [-1, 1], float32 (see `square_picture`)."""
        if isinstance(pictures, Image.Image):
            raise XFusionError("one picture was given where a list of pictures is expected; write [picture]")
        if not pictures:
            return torch.empty(0, 3, size, size)
        arrays = numpy.stack([numpy.asarray(square_picture(picture, size)) for picture in pictures])
        return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1

    @staticmethod
    def to_pil(images: Tensor) -> list[Image.Image]:
        """Images [N, 3, H, W] in [-1, 1] -> PIL pictures in RGB; values outside are clipped."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise XFusionError(f"images must have the shape [N, 3, H, W], but this is {list(images.shape)}")
        # Scaling in float32 and rounding make from_pil and to_pil exact inverses for all 256 values.
        levels = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]


def square_picture(picture: Image.Image, size: int) -> Image.Image:
    """`picture` as a model sees it: rotated by its EXIF tag, on white, cropped to the middle square, size x size, RGB."""
    return middle_square(on_white(ImageOps.exif_transpose(picture)), size)


def middle_square(picture: Image.Image, size: int) -> Image.Image:
    """The middle square of a picture, resized to ``size`` x ``size``."""
    middle = _middle(picture)  # crop first, so that nothing outside bleeds in
    return middle if middle.width == size else middle.resize((size, size), Image.Resampling.LANCZOS)


def _middle(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def touched(mask: Image.Image, grid: tuple[int, int]) -> Tensor:
    """Which tokens of a picture a mask touches, bool ``[rows * columns]``: those with any white pixel (above half in any
    channel) in their part of the middle square, however thin the stroke.

    Args:
        mask: upright, of the picture's size; of any Pillow mode. What is transparent is not white.
        grid: rows and columns of the picture's tokens.
    """
    if "A" in mask.mode or "a" in mask.mode or "transparency" in mask.info:
        layer = mask.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), layer)
    else:
        mask = on_white(mask)
    touched_mask = (numpy.asarray(_middle(mask.convert("RGB"))) > 127).any(axis=2)
    for axis, count in enumerate(grid):
        side = touched_mask.shape[axis]
        # A pixel that lies in two tokens touches both.
        parts = (range(n * side // count, -(-(n + 1) * side // count)) for n in range(count))
        touched_mask = numpy.stack([touched_mask.take(part, axis).any(axis=axis) for part in parts], axis=axis)
    return torch.from_numpy(touched_mask).flatten()


def on_white(picture: Image.Image) -> Image.Image:
    """A picture of any Pillow mode as RGB; deep grey is scaled down instead of clipped, transparent parts become white."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        picture = _eight_bits(picture)
    if picture.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(picture, lab, rgb, outputMode="RGB")
        assert converted is not None
        return converted
    if "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit, 32-bit or float grey as 8 bits. Pillow's own conversion clips: all but the darkest turns white."""
    values = numpy.nan_to_num(numpy.asarray(picture, dtype=numpy.float64), posinf=0, neginf=0)
    max_value = float(values.max(initial=0))
    if picture.mode == "F":
        full_scale = 1.0 if max_value <= 1 else max(max_value, 255.0)
    elif picture.mode.startswith("I;16"):
        full_scale = 65535.0
    else:  # mode "I" is always 32 bits, whatever the file had: assume the smallest usual range that holds the values
        full_scale = next((float(limit) for limit in (255, 65535) if max_value <= limit), max_value)
    return Image.fromarray(numpy.clip(numpy.rint(values * (255 / full_scale)), 0, 255).astype(numpy.uint8))
