"""The settings of a run; illegal ones are refused before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console

from xfusion.backbone import Backbone
from xfusion.card import check_licence
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import Source
from xfusion.training.processes import Shard
from xfusion.training.stages import Recipe
from xfusion.training.track import Listener
from xfusion.training.trackers import library


@dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
    """The arguments of `xfusion.training.loop.train`, which documents them.

    Raises:
        XFusionError: an illegal value, or two values that exclude each other.
    """

    recipe: Recipe
    out: Path
    source: Source | None
    """An opened source instead of the recipe's data."""
    allow_bad: float
    skip_nonfinite: int
    minutes: float | None
    resume: bool
    from_pack: str | None
    backbone: Backbone | None
    """An already loaded base."""
    device: torch.device | str
    compile: bool
    dtype: torch.dtype | None
    attention: str | None
    """Attention implementation; None chooses by device."""
    preview_prompts: tuple[str, ...] | None
    preview_every: float
    checkpoint_every: float
    keep: int
    shard: Shard
    patience: float
    """Minutes."""
    decoders: int | None
    """Threads that decode pictures; None uses the default number."""
    track: tuple[str, ...]
    """Names of `xfusion.training.trackers`."""
    command: str | None
    console: Console | None
    listener: Listener | None

    def __post_init__(self) -> None:
        stages, licence = self.recipe.stages, self.recipe.licence
        for number, stage in enumerate(stages):
            stage.check(number)
        if self.minutes is not None and len(stages) != 1:
            raise XFusionError(f"--minutes takes a recipe of one stage, this one has {len(stages)}: give steps instead")
        if self.keep < 1:
            raise XFusionError(f"keep is {self.keep}: at least 1 checkpoint stays")
        if licence is not None:
            check_licence(licence)
        if self.skip_nonfinite < 0:
            raise XFusionError(f"skip-nonfinite is {self.skip_nonfinite}: 0 steps or more are skipped")
        if not 0 < self.patience < math.inf:
            raise XFusionError(f"patience is {self.patience:g} minutes: more than 0")
        if self.decoders is not None and self.decoders < 1:
            raise XFusionError(f"decoders is {self.decoders}: at least 1 thread decodes")
        if self.shard not in get_args(Shard):
            raise XFusionError(f"shard {self.shard!r} is not one of {', '.join(get_args(Shard))}")
        for name in self.track:
            library(name)
