"""Diffusers' AutoencoderTiny as a codec (TAESD and its kin), with TAEF2's pool branch, which diffusers' class lacks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xfusion.data.sequence import XFusionError
from xfusion.modalities.base import Codec
from xfusion.modalities.codecs import files
from xfusion.seeding import seeded

_CLASS = "AutoencoderTiny"
_POOL_KEY = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.pool\.0\.weight")


class AutoencoderTiny(Codec):
    """A small autoencoder without a posterior. A latent is (z - shift) * scale: per channel from `latent_stats.json`
    (mean and std) where the folder has it, else from the config's `shift_factor` and `scaling_factor`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(files.FolderConfig):
        """A tiny autoencoder of diffusers, with or without TAEF2's pool branch."""

        source: str | None = None
        """A folder, a shipped codec's name, or a hub id such as madebyollin/taesd; None makes random weights."""
        latent_channels: int = 4
        """Channels of a latent, for random weights."""
        seed: int = 0
        """Seed of random weights."""

        def build(self) -> AutoencoderTiny:
            if self.source is None:
                return AutoencoderTiny(_random(self.latent_channels, self.seed), licence=self.licence or "none needed")
            folder = self.folder(_CLASS)
            card, statistics = files.card(folder), folder / "latent_stats.json"
            return AutoencoderTiny(
                _load(folder),
                statistics=files.read_json(statistics) if statistics.is_file() else None,
                licence=self.licence or card.get("license"),
                psnr=card.get("psnr"),
            )

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: Any,
        *,
        statistics: dict[str, Any] | None = None,
        licence: str | None = None,
        psnr: dict[str, float] | None = None,
    ):
        """`model` is a diffusers AutoencoderTiny, frozen here; `statistics` holds mean and std per latent channel."""
        super().__init__()
        config = model.config
        self.model = model.float()
        self.channels = config.latent_channels
        self.factor = 2 ** (len(config.encoder_block_out_channels) - 1)
        self.licence = licence or "unknown"
        self.psnr = psnr
        if statistics is None:
            shift, scale = torch.tensor(config.shift_factor), torch.tensor(config.scaling_factor)
        else:
            shift, std = torch.tensor(statistics["mean"]), torch.tensor(statistics["std"])
            if not len(shift) == len(std) == self.channels:
                raise XFusionError(
                    f"latent_stats.json has {len(shift)} means and {len(std)} deviations for {self.channels} channels"
                )
            scale = 1 / std
        self.register_buffer("shift", shift.reshape(-1, 1, 1))
        self.register_buffer("scale", scale.reshape(-1, 1, 1))
        self.freeze()

    def _encode(self, images: Tensor) -> Tensor:
        return (self.model.encode(images).latents - self.shift) * self.scale

    def _decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents / self.scale + self.shift).sample


def _random(latent_channels: int, seed: int) -> Any:
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny as Model

    with seeded(seed):
        return Model(latent_channels=latent_channels)


def _load(folder: Path) -> Any:
    """The model of a folder, strictly: pool branches are made where the weights have them, and every key must match.

    `AutoencoderTiny.from_pretrained` is not used, because it drops keys that its class does not know.
    """
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny as Model
    from safetensors.torch import load_file

    config = files.read_json(folder / "config.json")
    pool = config.pop("mid_block_pool", None) or {}
    weights = load_file(folder / files.WEIGHTS)
    model: Any = Model.from_config(config)
    for key, weight in weights.items():
        if match := _POOL_KEY.fullmatch(key):
            part, index = match[1], int(match[2])
            layers = getattr(model, part).layers
            if index >= len(layers) or not hasattr(layers[index], "conv"):
                raise XFusionError(f"{folder}: {key} is a pool branch, but {part}.layers.{index} is not a block")
            hidden, channels = weight.shape[:2]
            _add_pool(layers[index], channels=channels, hidden=hidden, groups=pool.get("groups", 4))
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise XFusionError(
            f"{folder / files.WEIGHTS} does not fit {_CLASS}: {' '.join(str(error).split())[:300]}"
        ) from error
    return model


def _add_pool(block: Any, *, channels: int, hidden: int, groups: int) -> None:
    """Gives a block x + pool(x) in the place of its input x; the block's own forward stays diffusers'."""
    block.pool = nn.Sequential(
        nn.Conv2d(channels, hidden, kernel_size=1, bias=False),
        nn.GroupNorm(groups, hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, channels, kernel_size=1, bias=False),
    )
    block.register_forward_pre_hook(lambda module, inputs: (inputs[0] + module.pool(inputs[0]),))
