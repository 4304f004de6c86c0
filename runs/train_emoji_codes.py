"""Trains a codec of codes of the emoji (diffusers' VQModel) on the train split; held-out pictures only measure it.

    python runs/train_emoji_codes.py --out FOLDER --minutes 30                    # a table by moving averages
    python runs/train_emoji_codes.py --out FOLDER --kind dvae                     # DALL-E's dVAE
    python runs/train_emoji_codes.py --out FOLDER --table.levels 2                # residual, two codes per place

Writes config.json and weights in the form that VQModel.from_pretrained loads, and a card with the figures: PSNR, the share
of the codes in use and their perplexity.
"""

from __future__ import annotations

import math
import platform
import shutil
import sys
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import tyro
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor, nn
from train_emoji_codec import WRITTEN, console, load, measure, save_sheet, train

from xfusion.data.emoji import Emoji
from xfusion.modalities.base import Codec
from xfusion.modalities.codecs.vq import Quantizer, VectorQuantized, code_use, relaxed


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a codec of codes of the emoji."""

    out: Path
    """Folder to write; it must be absent or hold an earlier result of this script."""
    kind: Literal["vq", "dvae"] = "vq"
    """Nearest entry of a table, or the relaxed codes of DALL-E's dVAE."""
    table: Quantizer.Config = field(default_factory=Quantizer.Config)
    """The table; a dVAE takes the number of entries alone."""
    minutes: float = 30.0
    """Wall-clock time of training; the number of steps is fixed from the speed of the first ones."""
    steps: int | None = None
    """Steps of training in float32, whatever time they take; None goes by the minutes."""
    seed: int = 0
    """Seed of weights, order of pictures, augmentation and relaxation."""
    size: int = 32
    """Side of the training pictures in pixels."""
    channels: tuple[int, ...] = (16, 32, 64, 96)
    """Width per resolution; each one after the first halves the picture, so four make 4 x 4 codes of 32 px."""
    blocks: int = 1
    """Residual blocks per resolution in the encoder; the decoder has one more."""
    batch: int = 16
    """Pictures per step."""
    rate: float = 2e-3
    """Peak learning rate of AdamW, cosine to zero."""
    divergence_weight: float = 1e-4
    """Weight of a dVAE's divergence from the uniform distribution, per cell."""
    last_temperature: float = 1 / 16
    """Temperature at which a dVAE's relaxation ends; it falls from 1 by a cosine."""
    score_scale: float = 8.0
    """Standard deviation over a batch that each of a dVAE's scores begins with, its mean at zero; 0 takes scores as they come."""


Training = tuple[int, float, torch.dtype]
"""Steps, seconds and the number format of a training."""


class TrainedCodec(nn.Module):
    """A VQModel and the table that it is trained with, which is not yet its own."""

    def __init__(self, options: Options):
        super().__init__()
        depth, channels, make = len(options.channels), options.channels, VQModel
        dvae, table = options.kind == "dvae", options.table
        settings: dict[str, Any] = {
            "block_out_channels": channels,
            "down_block_types": ("DownEncoderBlock2D",) * depth,
            "up_block_types": ("UpDecoderBlock2D",) * depth,
            "layers_per_block": options.blocks,
            "latent_channels": channels[-1],
            "num_vq_embeddings": table.entries * table.levels,
            "vq_embed_dim": table.entries if dvae else table.width,
            "norm_num_groups": math.gcd(8, *channels),
            "mid_block_add_attention": False,
            "sample_size": options.size,
        }
        self.model: Any = make(**settings).to(memory_format=torch.channels_last)
        self.quantizer = None if dvae else table.build()
        self.options, self.generator = options, torch.Generator().manual_seed(options.seed)
        # VQModel's own table takes no part in training.
        self.model.quantize.requires_grad_(False)
        self.scores: nn.Module = nn.Identity()
        if dvae:
            nn.init.eye_(self.model.quantize.embedding.weight)
        if dvae and options.score_scale:
            # As they come, scores differ by less than Gumbel's noise (1.3), so that the decoder hears noise and learns to
            # pass over it, and a few codes whose bias is highest take every place.
            self.scores = nn.BatchNorm2d(table.entries)
            nn.init.constant_(self.scores.weight, options.score_scale)
            nn.init.normal_(self.model.post_quant_conv.weight)  # one column is read at a time, as of an embedding
            nn.init.zeros_(self.model.post_quant_conv.bias)

    def codes(self, images: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """What the decoder reads, and what the codes cost, once a share of training is done."""
        latents = self.model.encode(images).latents.float()
        if self.quantizer is not None:
            vectors, _, loss = self.quantizer(latents)
            return vectors, loss
        last = self.options.last_temperature
        temperature = last + (1 - last) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, progress / 0.8)))
        vectors, divergence = relaxed(self.scores(latents), temperature, self.generator)
        return vectors, self.options.divergence_weight * divergence

    def finished(self) -> Any:
        """The VQModel with its table and the norm of its scores, in half precision."""
        if isinstance(norm := self.scores, nn.BatchNorm2d):
            last, gain = self.model.quant_conv, norm.weight / (norm.running_var + norm.eps).sqrt()
            last.bias.copy_((last.bias - norm.running_mean) * gain + norm.bias)
            last.weight.mul_(gain[:, None, None, None])
            self.scores = nn.Identity()
        if self.quantizer is not None:
            tables = self.quantizer.scaled(self.quantizer.tables, -1)
            self.model.quantize.embedding.weight.copy_(tables.flatten(0, 1))
            if len(tables) > 1:  # diffusers warns of a setting that it does not know
                self.model.register_to_config(num_levels=len(tables))
        return self.model.half()


def loss_of(trained: TrainedCodec, images: Tensor, dtype: torch.dtype, progress: float) -> tuple[Tensor, Tensor]:
    """(loss, mean squared error): squared error for PSNR, a little absolute error for edges, and the codes' cost."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        vectors, cost = trained.codes(images.contiguous(memory_format=torch.channels_last), progress)
        restored = trained.model.decode(vectors, force_not_quantize=True).sample
    error = restored.float() - images
    squared = error.square().mean()
    return squared + 0.05 * error.abs().mean() + cost, squared.detach()


def main(options: Options) -> None:
    if options.out.exists() and any(path.name not in WRITTEN for path in options.out.iterdir()):
        raise SystemExit(f"{options.out} holds other files; give an empty folder")
    if options.kind == "dvae" and options.table.levels > 1:
        raise SystemExit(f"a dVAE has one level, but --table.levels is {options.table.levels}")
    pictures = {split: load(split, options.size) for split in ("train", "held")}
    trained, training = train_codec(pictures["train"], options)
    temporary = options.out.with_name(options.out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    # What is measured is what a user will load: half-precision weights.
    finish(options, save_codec(trained, temporary), temporary, pictures, training)


def train_codec(images: Tensor, options: Options) -> tuple[TrainedCodec, Training]:
    """A codec trained on pictures [N, 3, H, W] in [-1, 1]."""
    torch.manual_seed(options.seed)
    trained = TrainedCodec(options)
    return trained, train(trained, images, options, partial(loss_of, trained), options.steps)


@torch.no_grad()
def save_codec(trained: TrainedCodec, folder: Path) -> VectorQuantized:
    """Write a trained codec, and read it as a codec."""
    trained.finished().save_pretrained(folder)
    return VectorQuantized.Config(source=str(folder)).build()


def figures_of(codec: Codec, images: Tensor) -> dict[str, Any]:
    """PSNR in dB over all pixels and over those not white, the share of codes used, and their perplexity at each level."""
    use = [code_use(level, codec.entries) for level in codec.encode(images).unbind(1)]  # tables differ between levels
    shares, perplexities = zip(*use, strict=True)
    return measure(codec, images) | {"codes_used": sum(shares) / len(shares), "perplexities": list(perplexities)}


def finish(options: Any, codec: Any, temporary: Path, pictures: dict[str, Tensor], training: Training) -> None:
    """Measure a codec of codes that lies in a temporary folder, write its card and samples, and move it into place."""
    figures = {split: figures_of(codec, images) for split, images in pictures.items()}
    (temporary / "README.md").write_text(card(options, codec, figures, pictures, *training), encoding="utf-8")
    save_sheet(codec, pictures["held"], temporary / "held.png")
    shutil.rmtree(options.out, ignore_errors=True)
    temporary.rename(options.out)
    console.print((options.out / "README.md").read_text(encoding="utf-8"), markup=False)


def card(
    options: Any,
    codec: Any,
    figures: dict[str, dict[str, Any]],
    pictures: dict[str, Tensor],
    steps: int,
    seconds: float,
    dtype: torch.dtype,
) -> str:
    size = pictures["held"].shape[-1]
    levels, rows, columns = codec.latent_shape(size, size)
    num_parameters = sum(parameter.numel() for parameter in codec.parameters())
    names = ("all_pixels", "non_white")
    metadata = "".join(f"  {split}_{name}: {part[name]:.2f}\n" for split, part in figures.items() for name in names)
    settings_given = {key: value for key, value in vars(options).items() if key != "out" and value is not None}
    flat = {key: value for key, value in settings_given.items() if not is_dataclass(value)}
    parts = {key: value for key, value in settings_given.items() if is_dataclass(value)}
    flat |= {f"{key}.{name}": value for key, part in parts.items() for name, value in vars(part).items()}
    settings = " ".join(
        f"--{key.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in flat.items()
    )
    rows_of_figures = "\n".join(
        f"| {'trained' if split == 'train' else 'held out'} | {part['all_pixels']:.2f} | {part['non_white']:.2f} |"
        f" {part['codes_used']:.0%} | {', '.join(f'{level:.0f}' for level in part['perplexities'])} |"
        for split, part in figures.items()
    )
    return f"""---
license: {Emoji.licence.lower()}
library_name: diffusers
psnr:
{metadata}---
# Codes of emoji

{type(codec).__name__}, {num_parameters:,} parameters in float16, trained on the train split of OpenMoji (CC-BY-SA-4.0) by

    python runs/{Path(sys.argv[0]).name} --out FOLDER {settings}

{steps:,} steps in {seconds / 60:.1f} minutes on {torch.get_num_threads()} threads ({platform.machine()},
{str(dtype).removeprefix("torch.")}),
torch {torch.__version__}, diffusers {diffusers.__version__}. Held-out groups of pictures were never trained on.

A {size} px picture is {rows} x {columns} places of {levels} of {codec.entries} codes, or
{levels * rows * columns * math.log2(codec.entries):.0f} bits.
Codes used and each level's perplexity are over all pictures of a split.

| pictures | PSNR over all pixels, dB | over pixels that are not white, dB | codes used | perplexity |
| --- | --- | --- | --- | --- |
{rows_of_figures}

`held.png`: held-out pictures above, what the codec makes of them below.
"""


if __name__ == "__main__":
    main(tyro.cli(Options))
