"""A frozen encoder as an encode-only codec: the latents of a picture are its feature map."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from torch import Tensor

from xfusion.data.sequence import XFusionError
from xfusion.modalities.base import Codec, Encoder
from xfusion.modalities.encoders.efficientnet_lite import EfficientNetLite
from xfusion.modalities.encoders.vision_transformer import VisionTransformer


class Features(Codec):
    """Features of a frozen encoder, [N, width, cells, cells]; for models that read pictures but do not draw.

    Pictures must have the encoder's own side in pixels. Features are the encoder's output, without scale or shift.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Codec.Config):
        """Which encoder reads the pictures."""

        encoder: Encoder.Config = field(default_factory=EfficientNetLite.Config)
        """The frozen encoder. It must then not be used to score the model."""

        @classmethod
        def of(cls, source: str | None) -> Self:
            """Features of the vision transformer at ``source`` (a folder or hub id); None uses EfficientNet-Lite0."""
            return cls(encoder=EfficientNetLite.Config() if source is None else VisionTransformer.Config(source=source))

        @property
        def weights(self) -> Path | None:
            """The encoder's."""
            return self.encoder.weights

        def build(self) -> Features:
            """The codec, with its encoder loaded."""
            return Features(self.encoder.build())

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder
        self.channels, self.factor = encoder.width, encoder.side // encoder.cells
        self.licence, self.encoders = encoder.licence, frozenset({encoder.fingerprint})
        self.freeze()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """As `Codec.latent_shape`, but only for the encoder's own side."""
        if (height, width) != (self.encoder.side, self.encoder.side):
            raise XFusionError(
                f"an image of {height}x{width} pixels is not what {self.encoder.name} looks at: set sizes to"
                f" ({self.encoder.side},)"
            )
        return self.channels, self.encoder.cells, self.encoder.cells

    def _encode(self, images: Tensor) -> Tensor:
        return self.encoder.maps(images)

    def _decode(self, latents: Tensor) -> Tensor:
        raise XFusionError(f"features of {self.encoder.name} cannot be turned back into pictures: take another codec")
