"""Trains the small KL autoencoder of the emoji (diffusers' AutoencoderKL) on the train split; held-out pictures only measure it.

    python runs/train_emoji_codec.py --out src/xfusion/packs/emoji-kl --minutes 30

Writes config.json and weights in the form that AutoencoderKL.from_pretrained loads, and a card with the figures.
"""

from __future__ import annotations

import math
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import tyro
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as DiffusersKL
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import pad

from xfusion.data.emoji import Emoji
from xfusion.evaluation.metrics.psnr import not_white, psnr
from xfusion.modalities import ImageModality
from xfusion.modalities.base import Codec
from xfusion.modalities.codecs.autoencoder_kl import AutoencoderKL
from xfusion.modalities.codecs.files import WEIGHTS

console = Console()
WRITTEN = {"README.md", "config.json", WEIGHTS, "held.png"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train the small KL autoencoder of the emoji."""

    out: Path
    """Folder to write; it must be absent or hold an earlier result of this script."""
    minutes: float = 30.0
    """Wall-clock time of training; the number of steps is fixed from the speed of the first ones."""
    seed: int = 0
    """Seed of weights, order of pictures and augmentation."""
    size: int = 32
    """Side of the training pictures in pixels; the model also takes other multiples of its factor."""
    channels: tuple[int, ...] = (16, 32, 64)
    """Width per resolution; each one after the first halves the picture, so three make a factor of 4."""
    blocks: int = 1
    """Residual blocks per resolution in the encoder; the decoder has one more."""
    latent_channels: int = 8
    """Channels of a latent."""
    batch: int = 16
    """Pictures per step."""
    rate: float = 2e-3
    """Peak learning rate of AdamW, cosine to zero."""
    kl_weight: float = 1e-4
    """Weight of the KL term per latent number: larger makes smoother latents and lower PSNR."""


def main(options: Options) -> None:
    if options.out.exists() and any(path.name not in WRITTEN for path in options.out.iterdir()):
        raise SystemExit(f"{options.out} holds other files; give an empty folder")
    factor = 2 ** (len(options.channels) - 1)
    if options.size % factor:
        raise SystemExit(
            f"--size {options.size} is not a multiple of {factor}, the factor of {len(options.channels)} widths"
        )
    torch.manual_seed(options.seed)
    pictures = {split: load(split, options.size) for split in ("train", "held")}
    model = build(options)
    steps, seconds, dtype = train(model, pictures["train"], options, partial(loss_of, model, options.kl_weight))
    latents = measure_latents(model, pictures["train"])
    model.register_to_config(scaling_factor=round(1 / latents[1], 5), shift_factor=round(latents[0], 5))
    temporary = options.out.with_name(options.out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.half().save_pretrained(temporary)
    # Everything below measures what a user will load: half-precision weights, scaled latents.
    codec = AutoencoderKL.Config(source=str(temporary)).build()
    figures = {split: measure(codec, images) for split, images in pictures.items()}
    (temporary / "README.md").write_text(card(options, codec, figures, steps, seconds, dtype), encoding="utf-8")
    save_sheet(codec, pictures["held"], temporary / "held.png")
    shutil.rmtree(options.out, ignore_errors=True)
    temporary.rename(options.out)
    console.print((options.out / "README.md").read_text(encoding="utf-8"), markup=False)


def load(split: str, size: int) -> Tensor:
    """All pictures of a split, [N, 3, size, size] in [-1, 1]."""
    source = Emoji(split=split)
    return ImageModality.from_pil([source.picture(index, size) for index in range(len(source.examples))], size)


def build(options: Options) -> Any:
    depth = len(options.channels)
    make: Any = DiffusersKL
    model = make(
        block_out_channels=options.channels,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        layers_per_block=options.blocks,
        latent_channels=options.latent_channels,
        norm_num_groups=math.gcd(8, *options.channels),
        mid_block_add_attention=False,  # the codec stays local, so that other sizes keep its statistics
        sample_size=options.size,
        scaling_factor=1.0,
    )
    # Starting with a narrow posterior lets the mean carry the picture at once; the KL term widens it where it can.
    with torch.no_grad():
        model.quant_conv.bias[options.latent_channels :] = -6.0
    return model.to(memory_format=torch.channels_last)


def augment(images: Tensor) -> Tensor:
    """Mirrored, shifted by up to 2 pixels on white, and (one in four) with other colours: more than the fixed set."""
    count, _, size, _ = images.shape
    images = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(-1), images)
    colours = torch.where(torch.rand(count, 1) < 0.25, torch.rand(count, 3).argsort(1), torch.arange(3))
    images = images.gather(1, colours[:, :, None, None].expand_as(images))
    row, column = torch.randint(0, 5, (2,)).tolist()
    return pad(images, (2, 2, 2, 2), value=1.0)[:, :, row : row + size, column : column + size]


Loss = Callable[[Tensor, torch.dtype, float], tuple[Tensor, Tensor]]
"""Pictures, number format and share of training that is done -> what is minimised, and the mean squared error."""


def loss_of(model: Any, kl_weight: float, images: Tensor, dtype: torch.dtype, progress: float) -> tuple[Tensor, Tensor]:
    """(loss, mean squared error): squared error for PSNR, a little absolute error for edges, KL per latent number."""
    del progress
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        posterior = model.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
        restored = model.decode(posterior.sample()).sample
    error = restored.float() - images
    squared = error.square().mean()
    kl = posterior.kl().float().mean() / posterior.mean[0].numel()
    return squared + 0.05 * error.abs().mean() + kl_weight * kl, squared.detach()


def train(
    model: Any, images: Tensor, options: Any, loss_of: Loss, steps: int | None = None
) -> tuple[int, float, torch.dtype]:
    """Trains in place; (steps, seconds, the number format): a number of steps in float32, or what the minutes allow in the
    format that is faster here."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.99), weight_decay=1e-3)
    start = time.monotonic()
    dtype = torch.float32
    if steps is None:
        dtype, per_step = faster_format(model, images, options.batch, loss_of)
        steps = max(int((options.minutes * 60 - (time.monotonic() - start)) / per_step), 1)
    warm_up = min(100, steps // 10 + 1)
    smoothed = None
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    ) as progress:
        task = progress.add_task("training", total=steps)
        order = torch.randperm(len(images))
        for step in range(steps):
            rate = min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = options.rate * rate
            if len(order) < options.batch:
                order = torch.cat([order, torch.randperm(len(images))])
            batch, order = order[: options.batch], order[options.batch :]
            loss, squared = loss_of(augment(images[batch]), dtype, step / steps)
            if not loss.isfinite():
                raise SystemExit(f"the loss is {loss.item()} at step {step}; lower --rate")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            smoothed = squared.item() if smoothed is None else 0.98 * smoothed + 0.02 * squared.item()
            decibels = 10 * math.log10(4 / smoothed)
            progress.update(task, advance=1, description=f"training, {decibels:.1f} dB with noise and augmentation")
    model.eval()
    return steps, time.monotonic() - start, dtype


def faster_format(model: Any, images: Tensor, batch: int, loss_of: Loss) -> tuple[torch.dtype, float]:
    """Measures bfloat16 autocast against float32 on this machine, because on CPUs without bf16 units it is slower."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        times = []
        for _ in range(8):
            start = time.monotonic()
            loss_of(augment(images[:batch]), dtype, 0.0)[0].backward()
            times.append(time.monotonic() - start)
        seconds[dtype] = sorted(times[2:])[3]
    model.zero_grad()
    fastest = min(seconds, key=lambda dtype: seconds[dtype])
    return fastest, seconds[fastest] * 1.05  # the optimizer's share


@torch.no_grad()
def measure_latents(model: Any, images: Tensor) -> tuple[float, float]:
    """(mean, standard deviation) of the unscaled latents of the training pictures."""
    latents = torch.cat([model.encode(part).latent_dist.mode() for part in images.split(64)])
    return latents.mean().item(), latents.std().item()


def measure(codec: Codec, images: Tensor) -> dict[str, float]:
    """Mean over pictures of the PSNR in dB, over all pixels and over those that are not white."""
    restored = codec.decode(codec.encode(images))
    return {
        "all_pixels": psnr(restored, images).mean().item(),
        "non_white": psnr(restored, images, not_white(images)).nanmean().item(),
    }


def save_sheet(codec: Codec, images: Tensor, path: Path) -> None:
    """Held-out pictures above what the codec makes of them."""
    samples = images[:: max(len(images) // 16, 1)][:16]
    rows = [torch.cat(list(row), dim=-1) for row in (samples, codec.decode(codec.encode(samples)))]
    ImageModality.to_pil(torch.cat(rows, dim=-2)[None])[0].save(path)


def card(
    options: Options,
    codec: AutoencoderKL,
    figures: dict[str, dict[str, float]],
    steps: int,
    seconds: float,
    dtype: torch.dtype,
) -> str:
    channels, rows, columns = codec.latent_shape(options.size, options.size)
    num_parameters = sum(parameter.numel() for parameter in codec.parameters())
    metadata = "".join(
        f"  {split}_{measure}: {value:.2f}\n" for split, part in figures.items() for measure, value in part.items()
    )
    settings = " ".join(
        f"--{name} {value}"
        for name, value in {
            "minutes": f"{options.minutes:g}",
            "seed": options.seed,
            "size": options.size,
            "channels": " ".join(map(str, options.channels)),
            "blocks": options.blocks,
            "latent-channels": options.latent_channels,
            "batch": options.batch,
            "rate": options.rate,
            "kl-weight": options.kl_weight,
        }.items()
    )
    rows_of_figures = "\n".join(
        f"| {'trained' if split == 'train' else 'held out'} | {part['all_pixels']:.2f} | {part['non_white']:.2f} |"
        for split, part in figures.items()
    )
    return f"""---
license: {Emoji.licence.lower()}
library_name: diffusers
psnr:
{metadata}---
# Small KL autoencoder of emoji

diffusers' AutoencoderKL, {num_parameters:,} parameters in float16, trained on the train split of OpenMoji (CC-BY-SA-4.0) by

    python runs/train_emoji_codec.py --out FOLDER {settings}

{steps:,} steps in {seconds / 60:.1f} minutes on {torch.get_num_threads()} threads ({platform.machine()},
{str(dtype).removeprefix("torch.")}),
torch {torch.__version__}, diffusers {diffusers.__version__}. Held-out groups of pictures were never trained on.

Latent of a {options.size} px picture: {channels} x {rows} x {columns} = {channels * rows * columns} numbers
(the picture has {3 * options.size**2}), unit variance through `scaling_factor` and `shift_factor`.

| pictures | PSNR over all pixels, dB | over pixels that are not white, dB |
| --- | --- | --- |
{rows_of_figures}

`held.png`: held-out pictures above, what the codec makes of them below.
"""


if __name__ == "__main__":
    main(tyro.cli(Options))
