"""The KV cache of earlier positions, for the frozen decoder and the towers beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xfusion.data.sequence import Rows
from xfusion.layers import KeysValues


@dataclass
class Cache:
    """Keys and values of one or more towers over the same positions, with the position table."""

    rows: Rows
    slots: list[dict[int, KeysValues]] = field(default_factory=list)
    """Per tower: layer index -> keys and values. Slot 0 is the frozen decoder's."""
    owners: list[str] = field(default_factory=list)
    """Owner of each position; needed because a slot may hold only one owner's positions."""

    def grow(self, rows: Mapping[str, Rows]) -> None:
        """Append the position tables of a pass."""
        self.rows = Rows.cat([self.rows, *rows.values()])
        self.owners += [owner for owner, table in rows.items() for _ in range(table.count)]

    def columns(self, of: str) -> Tensor:
        """Indices of the text (``text``) or media (``media``) positions, int64 ``[k]``."""
        indices = [i for i, owner in enumerate(self.owners) if (owner == "text") == (of == "text")]
        return torch.tensor(indices, dtype=torch.int64, device=self.rows.order.device)

    def past(self, slot: int, layer: int) -> list[KeysValues]:
        """A tower's cached keys and values at a layer, as a list of zero or one."""
        kv = self.slots[slot].get(layer)
        return [] if kv is None else [kv]

    def append(self, slot: int, layer: int, new_kv: list[KeysValues]) -> None:
        """Append keys and values to a tower's cache at a layer."""
        pairs = self.past(slot, layer) + new_kv
        self.slots[slot][layer] = (
            torch.cat([pair[0] for pair in pairs], dim=2),
            torch.cat([pair[1] for pair in pairs], dim=2),
        )

    def copy(self) -> Cache:
        """A copy with the same contents that grows independently."""
        return Cache(self.rows, [dict(slot) for slot in self.slots], list(self.owners))

    def index(self, rows: Tensor) -> Cache:
        """A new cache with the batch rows ``rows`` (int64)."""
        slots = [{i: (k[rows], v[rows]) for i, (k, v) in slot.items()} for slot in self.slots]
        return Cache(self.rows.index(rows), slots, list(self.owners))
