"""Keys and values of what was read before, for the frozen decoder and the towers beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xfusion.data.sequence import Rows
from xfusion.layers import KeysValues


@dataclass
class Cache:
    """Keys and values of one or more towers over the same positions, with the table of these positions."""

    rows: Rows
    slots: list[dict[int, KeysValues]] = field(default_factory=list)
    """Per tower: layer index -> keys and values. Slot 0 is the frozen decoder's."""
    owners: list[str] = field(default_factory=list)
    """Owner of each position, since a slot may hold the positions of one owner alone."""

    def grow(self, rows: Mapping[str, Rows]) -> None:
        """Put the position tables of a pass behind those that are held."""
        self.rows = Rows.cat([self.rows, *rows.values()])
        self.owners += [owner for owner, table in rows.items() for _ in range(table.count)]

    def columns(self, of: str) -> Tensor:
        """Which positions are words (``text``) or media (``media``), int64 ``[k]``."""
        chosen = [i for i, owner in enumerate(self.owners) if (owner == "text") == (of == "text")]
        return torch.tensor(chosen, dtype=torch.int64, device=self.rows.order.device)

    def past(self, slot: int, layer: int) -> list[KeysValues]:
        """What a tower holds at a layer, as a list of none or one."""
        kv = self.slots[slot].get(layer)
        return [] if kv is None else [kv]

    def append(self, slot: int, layer: int, new: list[KeysValues]) -> None:
        """Put keys and values behind those that a tower holds at a layer."""
        parts = self.past(slot, layer) + new
        self.slots[slot][layer] = (torch.cat([p[0] for p in parts], dim=2), torch.cat([p[1] for p in parts], dim=2))

    def copy(self) -> Cache:
        """Another cache that begins with the same, of which neither grows with the other."""
        return Cache(self.rows, [dict(slot) for slot in self.slots], list(self.owners))

    def index(self, rows: Tensor) -> Cache:
        """The batch rows ``rows`` (int64), as a new cache."""
        slots = [{i: (k[rows], v[rows]) for i, (k, v) in slot.items()} for slot in self.slots]
        return Cache(self.rows.index(rows), slots, list(self.owners))
