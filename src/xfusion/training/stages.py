"""A run is data: what is built, what it reads, and its stages, each with what it trains at which rate for how long."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from xfusion.data.mixture import MixtureConfig
from xfusion.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of training."""

    steps: int = 2000
    """Optimiser steps; a wall-clock budget (--minutes) replaces it."""
    rate: float = 2e-3
    """Largest learning rate."""
    warmup: int = 50
    """Steps over which the rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How the rate falls to 0 behind the warm-up."""
    mixture: MixtureConfig = MixtureConfig()
    """Samples per step and task."""
    accumulate: int = 1
    """Times the mixture is read per optimiser step."""
    activation_checkpointing: bool = False
    """Compute each layer once more in the backward pass instead of keeping what it made: the same losses and gradients, less
    memory, more time. `xfusion show` predicts the memory, `xfusion bench --only activation_checkpointing` measures both."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, of all new weights alike: norms, biases, gates and boundary rows too, which others often leave
    out (`xfusion.training.optimizer`)."""
    ema: float = 0.999
    """Decay of the averaged weights that are saved, warmed up as (1 + step) / (10 + step); 0 saves the raw ones. Steps are the
    stage's own: within its first ones the average becomes that of this stage alone, and what was averaged before is gone, for
    another mixture or rate makes other weights."""

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of a step (from 0) of ``steps``."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        if self.schedule == "cosine":
            return self.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        if self.schedule == "linear":
            return self.rate * max(0.0, 1 - done)
        return self.rate

    def ema_at(self, step: int) -> float:
        """EMA decay of a step."""
        return min(self.ema, (1 + step) / (10 + step)) if self.ema else 0.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to give a frozen LLM a modality: everything that `xfusion.train` needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """What is built."""
    data: str = "emoji"
    """Pictures with captions: emoji, emoji:128, a folder, a .jsonl file, shards, latents, or several with their weights, as
    in photos:weight=2+emoji."""
    data_licence: str | None = None
    """Licence of your own pictures, such as CC-BY-4.0, for the pack's card; sources that state theirs (emoji) keep it."""
    licence: str | None = None
    """Licence of the trained weights as a hub names it, such as cc-by-4.0; None states none."""
    stages: tuple[Stage, ...] = (Stage(),)
    """What is trained, in order."""
    seed: int = 0
    """Seed of order, wordings and noise."""

    def with_model(self, **changes: Any) -> Recipe:
        """The same recipe for a model in which some parts are others, such as ``fusion``."""
        return replace(self, model=replace(self.model, **changes))
