"""Frozen vision transformers of transformers, by folder or hub id: the image towers of CLIP and SigLIP, DINOv2, ViT."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xfusion.data.sequence import XFusionError
from xfusion.hub import card_licence, hub_file
from xfusion.modalities.base import Encoder
from xfusion.modalities.encoders.loading import load_pretrained


class VisionTransformer(Encoder):
    """Hidden states of the patches after a layer; class and register tokens are excluded from the map.

    Pictures are [N, 3, H, W] floats in [-1, 1] of any size; they are resized bicubically to the model's own side and
    normalised with the mean and standard deviation of its own preprocessor.

    Raises:
        XFusionError: the source cannot be loaded, or weights of its image tower are missing.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Encoder.Config):
        """Which vision transformer, and which of its layers."""

        source: str = "openai/clip-vit-large-patch14"
        """Folder or hub id of a vision transformer, or of a model with one (CLIP, SigLIP)."""
        revision: str | None = None
        """Hub revision (a commit for exact reproduction)."""
        layer: int = -2
        """Layer whose hidden states are used: -1 is the last, -2 the one before it, as in LLaVA."""
        batch_size: int = 16
        """Pictures per forward pass; affects memory only."""
        licence: str = "unknown"  # type: ignore[assignment]
        """Licence of the weights; if it is unknown, a pack names what their model card states."""

        @cached_property
        def shape(self) -> Any:
            """Its transformers configuration; weights are not loaded."""
            from transformers import AutoConfig

            config = load_pretrained(
                "encoder", self.source, self.revision, AutoConfig.from_pretrained, trust_remote_code=False
            )
            return getattr(config, "vision_config", config)

        @property
        def width(self) -> int:
            """Feature width."""
            return self.shape.hidden_size

        @property
        def weights(self) -> Path | None:
            """The file of its weights, where they are in one and this machine has it."""
            return hub_file(self.source, "model.safetensors", self.revision)

        @property
        def fingerprint(self) -> str:
            """Source, revision and layer."""
            return f"{self.source}@{self.revision}#{self.layer}"

        @property
        def stated_licence(self) -> str:
            """The licence, or that of the model card."""
            card = card_licence(self.source, self.revision) if self.licence == "unknown" else None
            return card or self.licence

        def build(self) -> VisionTransformer:
            """The frozen encoder."""
            return VisionTransformer(self)

    mean: Tensor
    std: Tensor

    def __init__(self, config: Config):
        from transformers import AutoModel
        from transformers.image_processing_base import ImageProcessingMixin

        super().__init__()
        self.config, shape = config, config.shape
        self.name, self.fingerprint = config.source, config.fingerprint
        self.licence = config.stated_licence
        self.width, self.side = shape.hidden_size, shape.image_size
        self.cells = self.side // shape.patch_size
        options = {"trust_remote_code": False, "output_loading_info": True}
        place = "encoder", config.source, config.revision
        model, report = load_pretrained(*place, AutoModel.from_pretrained, config=shape, **options)
        if report["missing_keys"]:
            raise XFusionError(f"encoder {config.source!r} lacks weights: {sorted(report['missing_keys'])[0]}")
        self.model: Any = model.float()
        preprocessor, _ = load_pretrained(*place, ImageProcessingMixin.get_image_processor_dict)
        self.register_buffer("mean", torch.tensor(preprocessor["image_mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessor["image_std"]).view(3, 1, 1), persistent=False)
        self.freeze()

    def features(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] -> [N, width] float32, mean over the map, then normalised to unit length."""
        return F.normalize(self.maps(images).mean(dim=(2, 3)), dim=-1)

    @torch.no_grad()
    def maps(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] -> [N, width, cells, cells] float32, not normalised."""
        if not len(images):
            return torch.empty(0, self.config.width, self.cells, self.cells)
        return torch.cat([self._map(part) for part in images.split(self.config.batch_size)])

    def _map(self, images: Tensor) -> Tensor:
        images = images.to(self.mean.device, torch.float32)
        if tuple(images.shape[2:]) != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode="bicubic", align_corners=False, antialias=True)
        pixels = ((images.clamp(-1, 1) + 1) / 2 - self.mean) / self.std
        states = self.model(pixel_values=pixels, output_hidden_states=True).hidden_states[self.config.layer]
        patches = states[:, -(self.cells**2) :]  # all other tokens come before them
        return patches.transpose(1, 2).unflatten(2, (self.cells, self.cells)).float()
