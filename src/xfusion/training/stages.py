"""Recipes and stages as data: the model, the training data, and per stage the mixture, learning rate and number of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from xfusion.data.mixture import MixtureConfig
from xfusion.data.sequence import XFusionError
from xfusion.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training."""

    steps: int = 2000
    """Optimiser steps; a wall-clock budget (--minutes) replaces it."""
    rate: float = 2e-3
    """Peak learning rate."""
    warmup: int = 50
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How the learning rate falls to 0 after the warm-up."""
    mixture: MixtureConfig = MixtureConfig()
    """Samples per step, by task."""
    accumulate: int = 1
    """Gradient accumulation: how many times the mixture is read per optimiser step."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of storing its activations: same losses and gradients, less memory,
    more time. Compiled steps save less memory than `xfusion show` predicts for uncompiled ones; `xfusion bench --only
    activation_checkpointing` measures memory and time."""
    clip: float = 1.0
    """Gradients are clipped to this norm."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay of matrices: not of embedding tables, gates, norms, biases, boundary rows, queries and
    latents."""
    ema: float = 0.999
    """Decay of the exponential moving average of the weights, which is what is saved; 0 saves the raw weights. It warms up as
    (1 + step) / (10 + step) with the stage's own steps, so each stage soon averages over itself alone."""

    def check(self, number: int) -> None:
        """Check the stage's own settings; ``number`` is its place among the stages, for the message.

        Raises:
            XFusionError: with one of them nothing would be trained.
        """
        legal = {
            "steps": (self.steps >= 1, "at least 1"),
            "rate": (0 <= self.rate < math.inf, "0 or more"),
            "warmup": (self.warmup >= 0, "0 or more steps"),
            "accumulate": (self.accumulate >= 1, "1 or more"),
            "clip": (self.clip > 0, "above 0"),
            "weight-decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "ema": (0 <= self.ema <= 1, "from 0 to 1"),
        }
        for name, (is_legal, limits) in legal.items():
            if not is_legal:
                value = getattr(self, name.replace("-", "_"))
                raise XFusionError(f"stage {number} has {name} {value:g}: set --stages.{number}.{name}, {limits}")

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate at a step, counted from 0, of ``steps`` in total."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        fraction = (step - self.warmup) / max(1, steps - self.warmup)
        if self.schedule == "cosine":
            return self.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
        if self.schedule == "linear":
            return self.rate * max(0.0, 1 - fraction)
        return self.rate

    def ema_at(self, step: int) -> float:
        """EMA decay at a step."""
        return min(self.ema, (1 + step) / (10 + step)) if self.ema else 0.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to give a frozen LLM a modality: everything that `xfusion.train` needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: str = "emoji"
    """Pictures with captions: emoji, emoji:128, a folder, a .jsonl file, shards, latents, or a weighted mixture such as
    photos:weight=2+emoji."""
    data_licence: str | None = None
    """Licence of your own pictures, such as CC-BY-4.0, for the pack's card; sources that state their own (emoji) keep it."""
    licence: str | None = None
    """Licence of the trained weights as the hub spells it, such as cc-by-4.0; None states none."""
    stages: tuple[Stage, ...] = (Stage(),)
    """The stages, in order."""
    seed: int = 0
    """Seed of the data order, the wordings and the noise."""

    def with_model(self, **changes: Any) -> Recipe:
        """The same recipe with some fields of its model config replaced, such as ``fusion``."""
        return replace(self, model=replace(self.model, **changes))
