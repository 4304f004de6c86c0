"""No codec at all: the latents are the pixels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from xfusion.modalities.base import Codec


class Pixels(Codec):
    """The identity: 3 channels, factor 1, no loss. White pictures sit at +1; their variance is that of the data."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Codec.Config):
        """Pixels themselves, without an autoencoder."""

        def build(self) -> Pixels:
            return Pixels()

    channels = 3
    factor = 1
    bounded = True
    licence = "none needed"

    def _encode(self, images: Tensor) -> Tensor:
        return images

    def _decode(self, latents: Tensor) -> Tensor:
        return latents
