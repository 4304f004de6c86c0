"""How a model computes its passes: over which copy of the frozen weights, in which precision, along which path.

Shape legend: ``B`` batch row, ``n`` positions of one owner, ``D`` model width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xfusion.backbone import Backbone
from xfusion.text_states import StatesCache


@dataclass(kw_only=True)
class Engine:
    """How a model computes: which copy of the frozen weights, in which precision, with which attention."""

    backbone: Backbone
    autocast: torch.dtype | None
    """Compute dtype of the new modules, or None for their own (float32)."""
    reason: str
    """Why this precision was chosen, for the log."""
    reference: bool = False
    """Whether layers use the reference path."""
    compiled: bool = False
    """Whether the per-layer work is compiled."""
    activation_checkpointing: bool = False
    """Whether each layer stores only its inputs for the backward pass, which recomputes the layer (Chen et al. 2016,
    arXiv 1604.06174): the same losses and gradients, less memory, more time."""
    decoder: Any = None
    keep_text: bool = True
    """Whether hidden states of text that never change are computed once and then looked up."""
    text_states: StatesCache = field(default_factory=StatesCache)
    """Frozen hidden states of texts, keyed by their tokens."""
    final_states: StatesCache = field(default_factory=StatesCache)
    """Frozen hidden states of texts after the last norm, keyed by their tokens."""
    turns: OrderedDict[tuple[Any, ...], Any] = field(default_factory=OrderedDict)
    """State saved from earlier turns of conversations with media (`xfusion.generation.turns`)."""
    media_tokens: OrderedDict[tuple[Any, ...], Tensor] = field(default_factory=OrderedDict)
    """Tokens of media that were shown one at a time, keyed by the media's content."""

    @property
    def dtype(self) -> torch.dtype:
        return self.autocast or self.backbone.dtype


States = dict[str, Tensor]
"""Owner -> states ``[B, n, D]``."""
Gather = Callable[[int, Callable[[States], States], States], States]
"""``gather(index, work, states)`` is ``work(states)`` with all weights of a sharded layer gathered."""
