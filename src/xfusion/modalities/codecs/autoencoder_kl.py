"""Diffusers' AutoencoderKL as a codec: Stable Diffusion's VAEs, the shipped `emoji-kl`, or any folder of that class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xfusion.data.sequence import XFusionError
from xfusion.modalities.base import Codec
from xfusion.modalities.codecs import files

_CLASS = "AutoencoderKL"


class AutoencoderKL(Codec):
    """A KL autoencoder (Rombach et al., arXiv 2112.10752) with deterministic latents: the mode of the posterior.

    The model itself applies neither scale nor shift. Here a latent is (z - shift) * scale, with both from the model's
    config: `scaling_factor` and `shift_factor`, and per channel `latents_mean` and `latents_std` if present.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(files.FolderConfig):
        """A KL autoencoder of diffusers."""

        source: str
        """A folder, a shipped codec's name, or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5."""

        def build(self) -> AutoencoderKL:
            folder = self.folder(_CLASS)
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Model

            card, model = files.card(folder), files.load(Model, folder)
            return AutoencoderKL(model, licence=self.licence or card.get("license"), psnr=card.get("psnr"))

    scale: Tensor
    shift: Tensor

    def __init__(self, model: Any, *, licence: str | None = None, psnr: dict[str, float] | None = None):
        """`model` is a diffusers AutoencoderKL; it is frozen and converted to float32."""
        super().__init__()
        config = model.config
        if config.in_channels != 3 or config.out_channels != 3:
            raise XFusionError(
                f"the autoencoder maps {config.in_channels} to {config.out_channels} channels; images need 3 to 3"
            )
        self.model = model.float()
        self.channels = config.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.licence = licence or "unknown"
        self.psnr = psnr
        # As in diffusers' own pipelines: per-channel statistics, if present, take precedence over the scalars.
        per_channel = config.get("latents_mean") is not None and config.get("latents_std") is not None
        shift = config.latents_mean if per_channel else config.get("shift_factor") or 0.0
        std = config.latents_std if per_channel else 1.0
        self.register_buffer("shift", torch.tensor(shift).reshape(-1, 1, 1))
        self.register_buffer("scale", config.scaling_factor / torch.tensor(std).reshape(-1, 1, 1))
        self.freeze()

    def _encode(self, images: Tensor) -> Tensor:
        return (self.model.encode(images).latent_dist.mode() - self.shift) * self.scale

    def _decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents / self.scale + self.shift).sample
