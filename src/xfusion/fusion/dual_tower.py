"""X-Fusion's dual tower (arXiv 2504.20996, section 3.2): a frozen text tower and a trainable copy of it for media.

Both towers apply to the same mixed sequence and each position keeps the output of the tower that owns it:

    H_txt = F_txt(E)    H_img = F_img(E)    h_i = H_txt[i] if i is text else H_img[i]

Only kept outputs are computed on the fast path: a tower makes queries and MLP for its own positions, keys and values for
all of them (the text tower from media states by the frozen W_K, W_V; the media tower from text states by its own).
The towers may be asymmetric: with ``stride`` k a media block stands at every k-th layer and media states pass the others
unchanged, while the frozen tower still makes keys and values from them at every layer.

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``S`` all rows of a pass, ``D`` model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xfusion.backbone import Backbone, KeysValues, keys_values, narrow_mlp, run_rows, slice_call
from xfusion.data.sequence import XFusionError
from xfusion.fusion.base import Fusion, Pass


def tower_rows(
    layer: nn.Module,
    own: Tensor,
    own_call: dict[str, Any],
    other: Tensor | None,
    other_call: dict[str, Any],
    past: list[KeysValues],
    mask: Tensor,
    own_first: bool,
) -> tuple[Tensor, KeysValues, KeysValues | None]:
    """One tower at one layer: new states of its own rows, keys and values of all rows.

    Args:
        layer: the tower's block.
        own: states of the rows that the tower owns, ``[B, n, D]``.
        other: states of the other tower's rows, or None.
        past: the tower's cached keys and values (none or one).
        mask: own queries over [past | text | media].
        own_first: whether the own rows lie before the others along the keys (text does).
    """
    made = None if other is None else keys_values(layer, other, other_call)
    others = [] if made is None else [made]
    before, after = (past, others) if own_first else (past + others, [])
    h, kv = run_rows(layer, own, own_call, mask, before, after)
    return h, kv, made


@cache
def _compiled_tower_rows() -> Callable[..., tuple[Tensor, KeysValues, KeysValues | None]]:
    """The work of one tower at one layer, compiled; all layers of a tower share the graphs."""
    # One graph per tower, kind of batch and text width; at the default limit of 8 a run with several widths would die.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(tower_rows, fullgraph=True, dynamic=False)


class DualTower(Fusion):
    """Frozen text tower, trainable media tower; text is bit-identical whatever the media tower holds."""

    preserves_text: ClassVar[bool] = True
    prefix_is_constant: ClassVar[bool] = True
    num_towers: ClassVar[int] = 2

    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        """Shape of the media tower."""

        stride: int = 1
        """A media block stands at every stride-th layer; 1 copies every layer, as the paper does."""
        offset: int | None = None
        """First layer with a media block; None takes stride // 2 (2, 7, ..., 27 for stride 5 of 30 layers)."""
        mlp: int | None = None
        """Width of the media blocks' MLP: the first rows of gate and up, the first columns of down. None keeps all."""

        def build(self) -> DualTower:
            """The fusion, not yet installed."""
            return DualTower(self)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleDict()

    def install(self, backbone: Backbone) -> None:
        """Copy the frozen blocks at the tower's layers (spec: copy initialisation)."""
        stride = self.config.stride
        offset = stride // 2 if self.config.offset is None else self.config.offset
        if stride < 1 or not 0 <= offset < backbone.num_layers:
            raise XFusionError(
                f"dual tower: stride {stride}, offset {offset} puts no block into {backbone.num_layers} layers;"
                " choose stride >= 1 and 0 <= offset < layers"
            )
        self.windows = [backbone.window(i) for i in range(backbone.num_layers)]
        self.tower_config = backbone.tower_config()
        self.blocks = nn.ModuleDict()
        for index in range(offset, backbone.num_layers, stride):
            block = backbone.copy_layer(index, self.tower_config)
            if self.config.mlp is not None:
                narrow_mlp(block, backbone.config, self.config.mlp)
            self.blocks[str(index)] = block

    def set_attention(self, implementation: str) -> None:
        """Choose the attention implementation of the media tower; the base keeps its own."""
        if self.tower_config._attn_implementation != implementation:
            self.tower_config._attn_implementation = implementation

    @property
    def state_layers(self) -> tuple[int, ...]:
        """The layers with a media block: only there are text states read by the media tower."""
        return tuple(int(i) for i in self.blocks)

    def block(self, index: int) -> nn.Module | None:
        """The media tower's block at a layer, or None where media states pass unchanged."""
        return self.blocks[str(index)] if str(index) in self.blocks else None  # noqa: SIM401 (a ModuleDict has no get)

    def layer(self, index: int, frozen: nn.Module, call: dict[str, Any], run: Pass) -> dict[str, Tensor]:
        """Fast path: kept outputs only, each tower's keys and values for all rows (spec 1.2)."""
        window, held, calls, name = self.windows[index], run.cache, run.calls(call), run.media
        text, media = run.states.get("text"), run.states[name] if name else None
        text_call, media_call = calls.get("text", {}), calls[name] if name else {}
        keep = held is not None and run.update
        rows = _compiled_tower_rows() if run.compiled else tower_rows
        new = dict(run.states)

        if text is not None and run.given is None:
            read = media if run.text_reads_media or keep else None
            past = held.past(0, index) if held else []
            mask = run.mask("text", window, others=read is not None)
            new["text"], kv, made = rows(frozen, text, text_call, read, media_call, past, mask, True)
            if held and keep:
                held.append(0, index, [kv, *([made] if made else [])])
        elif held and keep and media is not None:
            held.append(0, index, [keys_values(frozen, media, media_call)])

        block = self.block(index)
        if block is None:
            return new
        if run.given is not None:
            text = run.given[index]
        if media is not None and name:
            past = held.past(1, index) if held else []
            read = text if run.media_reads_text or keep else None
            mask = run.mask(name, window, others=read is not None)
            new[name], kv, made = rows(block, media, media_call, read, text_call, past, mask, False)
            if held and keep:
                held.append(1, index, [*([made] if made else []), kv])
        elif text is not None and held and keep:
            held.append(1, index, [keys_values(block, text, text_call)])
        return new

    def reference_layer(self, index: int, frozen: nn.Module, call: dict[str, Any], run: Pass) -> dict[str, Tensor]:
        """Reference path: both whole blocks on the whole sequence, then each position keeps its tower's output."""
        x, whole = torch.cat(list(run.states.values()), dim=1), slice_call(call, slice(None))
        mask = torch.cat([run.mask(owner, self.windows[index]) for owner in run.rows], dim=2)
        text_out, _ = run_rows(frozen, x, whole, mask, [], [])
        block = self.block(index)
        media_out = x if block is None else run_rows(block, x, whole, mask, [], [])[0]
        return {owner: (text_out if owner == "text" else media_out)[:, rows] for owner, rows in run.slices.items()}

    def text_layer(self, index: int, frozen: nn.Module, x: Tensor, call: dict[str, Any]) -> Tensor:
        """A text-only layer: the frozen block called whole, the media tower still making its keys and values."""
        block = self.block(index)
        if block is not None:
            own = x.to(next(block.parameters()).dtype)
            keys_values(block, own, slice_call(call, slice(None)))
        return frozen(x, **call)
