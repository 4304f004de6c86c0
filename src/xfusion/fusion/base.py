"""The contract of a fusion: how new modules stand around frozen layers, and what one pass over the layers shares.

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``S`` all rows of a pass, ``D`` model width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xfusion.backbone import Backbone, Cache, attention_mask, slice_call
from xfusion.data.sequence import Rows, visible


@dataclass(kw_only=True)
class Pass:
    """What one pass over the layers shares; `Model` makes it and drops it. Nothing is stored on layers.

    The states of a pass lie apart by owner (``text`` first, then each modality), so that a tower's rows are one tensor
    and no layer cuts or joins anything.
    """

    rows: dict[str, Rows]
    """Owner -> position tables of this pass."""
    states: dict[str, Tensor]
    """Owner -> states before the current layer, ``[B, n, D]``."""
    attention: str
    """Attention implementation that masks are made for."""
    dtype: torch.dtype
    cache: Cache | None = None
    """Keys and values of earlier positions."""
    update: bool = False
    """Whether this pass appends its own keys and values to the cache."""
    given: dict[int, Tensor] | None = None
    """Text states by layer, where they were computed before: text rows are then not computed again."""
    text_reads_media: bool = True
    """Whether any text position of this pass comes after a media item."""
    media_reads_text: bool = True
    """Whether any media position of this pass comes after text."""
    compiled: bool = False
    """Whether the per-layer work runs compiled (training does; sampling, whose shapes change, does not)."""
    _masks: dict[tuple[str, bool, int | None], Tensor] = field(default_factory=dict)
    _calls: dict[int, tuple[Any, dict[str, dict[str, Any]]]] = field(default_factory=dict)

    @property
    def slices(self) -> dict[str, slice]:
        out, start = {}, 0
        for owner, table in self.rows.items():
            out[owner] = slice(start, start + table.count)
            start += table.count
        return out

    @property
    def media(self) -> str | None:
        """The modality of this pass, or None."""
        return next((owner for owner in self.rows if owner != "text"), None)

    def calls(self, call: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Owner -> the per-position arguments of a layer call, cut to the owner's rows; made once per rotary table."""
        table = call.get("position_embeddings")
        if id(table) not in self._calls:
            self._calls[id(table)] = (table, {owner: slice_call(call, rows) for owner, rows in self.slices.items()})
        return self._calls[id(table)][1]

    def mask(self, owner: str, window: int | None, *, others: bool = True) -> Tensor:
        """Mask of one owner's queries over the keys [cache | text | media ...], ``[B, 1, n, k]``.

        ``others=False`` leaves the other owners' keys of this pass out, where none of them is visible anyway.
        """
        key = (owner, others, window)
        if key not in self._masks:
            past = [self.cache.rows] if self.cache is not None else []
            tables = [t for name, t in self.rows.items() if others or name == owner]
            seen = visible(self.rows[owner], Rows.cat(past + tables), window)
            self._masks[key] = attention_mask(seen, self.attention, self.dtype)
        return self._masks[key]


class Fusion(nn.Module):
    """New modules around a frozen decoder. A subclass is one mechanism.

    The verbs: `install` makes the new modules, `remove` forgets them, `layer` computes one layer of a pass. What a
    media item looks like at the input and how it is read out is the media port's, shared by all fusions.
    """

    preserves_text: ClassVar[bool] = False
    """Whether text-only logits through the fused stack equal the base's bit for bit, whatever the new weights are."""
    prefix_is_constant: ClassVar[bool] = False
    """Whether text before the first media item never depends on new weights, so that it may be computed once."""
    num_towers: ClassVar[int] = 1
    """Slots of the cache, the frozen decoder's included."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of a fusion; `build` makes it."""

        def build(self) -> Fusion:
            """The fusion, not yet installed."""
            raise TypeError(f"{type(self).__qualname__} does not say which fusion it builds")

    def install(self, backbone: Backbone) -> None:
        """Make the new modules for a base. The base itself is not touched."""
        raise NotImplementedError(type(self).__name__)

    def remove(self) -> None:
        """Forget the new modules."""
        for name in list(self._modules):
            del self._modules[name]

    def set_attention(self, implementation: str) -> None:
        """Choose the attention implementation of the new modules."""

    @property
    def state_layers(self) -> tuple[int, ...]:
        """Layers whose text states must be at hand when text is given instead of computed."""
        return ()

    def layer(self, index: int, frozen: nn.Module, call: dict[str, Any], run: Pass) -> dict[str, Tensor]:
        """One layer of a mixed pass: from ``run.states`` to the states behind the layer."""
        raise NotImplementedError(type(self).__name__)

    def reference_layer(self, index: int, frozen: nn.Module, call: dict[str, Any], run: Pass) -> dict[str, Tensor]:
        """The paper's equation on whole layers: slow, obviously right, without cache. Tests hold `layer` to it."""
        raise NotImplementedError(type(self).__name__)

    def text_layer(self, index: int, frozen: nn.Module, x: Tensor, call: dict[str, Any]) -> Tensor:
        """One layer of a text-only pass, the frozen block called exactly as the base calls it."""
        raise NotImplementedError(type(self).__name__)

    def new_parameters(self) -> Iterable[nn.Parameter]:
        """What training may change."""
        return self.parameters()
