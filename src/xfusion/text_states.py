"""Hidden states of texts from the frozen tower alone: computed once per text, and looked up when a batch repeats it.

Shape legend: ``B`` batch row, ``n`` positions of a text or of all texts of a row, ``L`` layers, ``D`` model width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xfusion.backbone import Backbone
from xfusion.data.sequence import Batch

TEXT_STATES_BYTES = 1 << 30
"""Bytes of frozen hidden states to cache."""


class StatesCache(OrderedDict[tuple[int, ...], Tensor]):
    """Cache of frozen hidden states by a text's tokens, of at most `TEXT_STATES_BYTES`: the oldest are removed first."""

    num_bytes: int = 0

    def __setitem__(self, ids: tuple[int, ...], states: Tensor) -> None:
        previous = self.pop(ids, None)
        self.num_bytes += states.nbytes - (0 if previous is None else previous.nbytes)
        super().__setitem__(ids, states)
        while self.num_bytes > TEXT_STATES_BYTES and len(self) > 1:
            self.num_bytes -= self.popitem(last=False)[1].nbytes

    def get_or_compute(self, ids: tuple[int, ...], compute: Callable[[], Tensor]) -> Tensor:
        """The hidden states of a text, computed if they are not cached."""
        states = self.get(ids)
        if states is None:
            states = self[ids] = compute()
        return states


# A text is always computed alone, in its own shape: so its bits do not depend on the batch, and a resumed run computes the
# same ones.


@torch.no_grad()
def compute_layer_inputs(backbone: Backbone, layers: Sequence[int], ids: tuple[int, ...]) -> Tensor:
    """Layer inputs ``[L, n, D]`` of a text at some layers of the frozen tower; layers after the last are not computed."""
    layer_inputs: list[Tensor] = []

    def compute_layer(index: int, frozen: nn.Module, x: Tensor, call: dict[str, Any]) -> Tensor:
        if index in layers:
            layer_inputs.append(x[0])
        return frozen(x, **call) if index < max(layers) else x

    backbone.shadow_decoder(compute_layer)(input_ids=torch.tensor([ids], device=backbone.device), use_cache=False)
    return torch.stack(layer_inputs)


@torch.no_grad()
def compute_final_states(backbone: Backbone, ids: tuple[int, ...]) -> Tensor:
    """Hidden states ``[1, n, D]`` of a text after the final norm of the frozen tower."""
    input_ids = torch.tensor([ids], device=backbone.device)
    return backbone.decoder(input_ids=input_ids, use_cache=False).last_hidden_state


def fill_states(batch: Batch, states: Callable[[tuple[int, ...]], Tensor], out: Tensor) -> Tensor:
    """Fill in the hidden states of each text of a batch at its positions.

    Args:
        batch: a row may contain several texts, each with its own sample number.
        states: returns ``[L, n, D]`` of a text.
        out: zeros ``[B, L, n, D]`` to fill; padding stays zero.
    """
    samples, ids = batch.text.sample.tolist(), batch.text_ids.tolist()
    for row, (row_samples, tokens) in enumerate(zip(samples, ids, strict=True)):
        start = 0
        while start < len(row_samples) and row_samples[start] >= 0:
            stop = start
            while stop < len(row_samples) and row_samples[stop] == row_samples[start]:
                stop += 1
            out[row, :, start:stop] = states(tuple(tokens[start:stop]))
            start = stop
    return out
