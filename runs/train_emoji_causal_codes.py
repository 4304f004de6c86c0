"""Trains SEED's tokenizer of the emoji behind the frozen `emoji-kl`, on the train split; held-out pictures only measure it.

    python runs/train_emoji_causal_codes.py --out FOLDER --minutes 30

Writes config.json, weights, and a card with PSNR, the share of the codes in use and their perplexity.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from train_emoji_codec import WRITTEN, load, train
from train_emoji_codes import finish

from xfusion.modalities.codecs.causal_queries import CausalQueries, Shape
from xfusion.modalities.codecs.vq import Quantizer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train SEED's tokenizer of the emoji."""

    out: Path
    """Folder to write; it must be absent or hold an earlier result of this script."""
    shape: Shape = field(default_factory=Shape)
    """Sizes of the network, and the frozen autoencoder that it reads."""
    minutes: float = 30.0
    """Wall-clock time of training; the number of steps is fixed from the speed of the first ones."""
    seed: int = 0
    """Seed of weights, order of pictures and augmentation."""
    batch: int = 32
    """Pictures per step."""
    rate: float = 1e-3
    """Peak learning rate of AdamW, cosine to zero."""


class TrainedTokenizer(nn.Module):
    """The tokenizer in training, its table by moving averages."""

    def __init__(self, codec: CausalQueries):
        super().__init__()
        shape = codec.shape
        self.__dict__["codec"] = codec
        self.tokenizer = codec.tokenizer.train().requires_grad_(True)
        self.tokenizer.table.requires_grad_(False)
        self.quantizer = Quantizer.Config(entries=shape.entries, width=shape.code_width).build()

    codec: CausalQueries

    def loss(self, images: Tensor, dtype: torch.dtype, progress: float) -> tuple[Tensor, Tensor]:
        """Squared error of the features and the codes' cost; the same error, of which the features' variance is one."""
        del progress
        features = self.codec.features(images)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            vectors, _, cost = self.quantizer(self.tokenizer.encode(features).float())
            squared = mse_loss(self.tokenizer.decode(vectors).float(), features)
        return squared + cost, squared.detach()


def main(options: Options) -> None:
    if options.out.exists() and any(path.name not in WRITTEN for path in options.out.iterdir()):
        raise SystemExit(f"{options.out} holds other files; give an empty folder")
    torch.manual_seed(options.seed)
    pictures = {split: load(split, options.shape.size) for split in ("train", "held")}
    trained = TrainedTokenizer(CausalQueries(options.shape))
    training = train(trained, pictures["train"], options, trained.loss)
    trained.tokenizer.table.data.copy_(trained.quantizer.tables[0])
    temporary = options.out.with_name(options.out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    trained.codec.save(temporary)
    finish(options, CausalQueries.Config(source=str(temporary)).build(), temporary, pictures, training)


if __name__ == "__main__":
    main(tyro.cli(Options))
