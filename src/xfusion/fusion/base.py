"""The contract of a fusion: how new modules stand around frozen layers, and what one pass over the layers shares.

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``S`` all rows of a pass, ``D`` model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from types import MappingProxyType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from xfusion.backbone import Backbone, Cache
from xfusion.data.sequence import MediaRows, Rows, XFusionError, seen
from xfusion.layers import KeysValues, assembled, keys_values, modulated, rows_mask, run_rows, slice_call

REGIMES = ("strictly frozen", "LoRA", "as in the paper")
"""What of the base is trained: nothing, so that text alone is the base's; low-rank deltas; what the paper trains."""

Call = dict[str, Any]
"""What the decoder's own forward hands to a layer, besides the states."""


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
    media_rows: dict[str, MediaRows] = field(default_factory=dict)
    """Modality -> what its rows are: noise levels, items, grid."""
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
    modulation: Tensor | None = None
    """What changes the branches of the current layer's block at media rows, ``[B, n, 6, W]`` (`xfusion.layers.modulated`)."""
    final: bool = True
    """Whether anybody reads the states behind the decoder's last norm."""
    layers: frozenset[int] | None = None
    """Layers at which anything is computed; None is all."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """States that objectives asked for, by name (`Objective.needs`)."""
    _masks: dict[tuple[str, bool, int | None, str | None], Tensor] = field(default_factory=dict)
    _calls: dict[int, tuple[Any, dict[str, Call]]] = field(default_factory=dict)
    _tables: dict[Any, Tensor] = field(default_factory=dict)

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

    def calls(self, call: Call) -> dict[str, Call]:
        """Owner -> the per-position arguments of a layer call, cut to the owner's rows, and ``""`` -> those of all rows;
        made once per rotary table.
        """
        table = call.get("position_embeddings")
        if id(table) not in self._calls:
            cut = {owner: slice_call(call, rows) for owner, rows in self.slices.items()}
            self._calls[id(table)] = (table, cut | {"": slice_call(call, slice(None))})
        return self._calls[id(table)][1]

    def take_masks(self, other: Pass) -> None:
        """Share the masks of a pass over the same positions with the same keys and values behind them."""
        self._masks = other._masks

    def once(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """A table of this pass's positions that is the same at every layer, made when it is first asked for."""
        if key not in self._tables:
            self._tables[key] = make()
        return self._tables[key]

    def inputs(self, index: int) -> dict[str, Tensor]:
        """States before a layer; text that is given instead of computed in its place."""
        return self.states if self.given is None else self.states | {"text": self.given[index]}

    def reads_others(self, owner: str) -> bool:
        """Whether any position of an owner comes after positions of the others."""
        return self.text_reads_media if owner == "text" else self.media_reads_text

    def cut(self, x: Tensor) -> dict[str, Tensor]:
        """States of all rows ``[B, S, D]`` by owner."""
        return {owner: x[:, rows] for owner, rows in self.slices.items()}

    def after_media(self, owner: str) -> Tensor:
        """Where new parts may act on an owner's rows, bool ``[B, n, 1]``: from the first media token of a sequence on."""
        return self.rows[owner].after_media[..., None]

    def by_noise(self, block: Any, owners: Iterable[str]) -> Any:
        """A block as the rows of some owners, in this order, go through it: media's branches are changed by their noise
        level, where the port says so, and text's never.
        """
        named = list(owners)
        if self.modulation is None or self.media not in named:
            return block
        shape = self.modulation.shape[2:]
        rows = [
            self.modulation if owner == self.media else self.modulation.new_zeros(*self.rows[owner].order.shape, *shape)
            for owner in named
        ]
        return modulated(block, torch.cat(rows, dim=1))

    def mixes(self, owner: str) -> bool:
        """Whether new parts act on any of an owner's rows; on tensors without values they are taken to."""
        acts = self.after_media(owner)
        return acts.is_meta or bool(acts.any())

    def keys(self, of: Literal["text", "media"] | None = None) -> Rows:
        """Tables of the keys [cache | text | media ...]; ``of`` leaves those of the others out, cached ones too."""
        tables = [table for name, table in self.rows.items() if of is None or (name == "text") == (of == "text")]
        if self.cache is None:
            return Rows.cat([next(iter(self.rows.values())).none(), *tables])
        if of is None:
            return Rows.cat([self.cache.rows, *tables])
        return Rows.cat([self.cache.rows.columns(self.cache.columns(of)), *tables])

    @property
    def appends(self) -> bool:
        """Whether this pass's keys and values are put behind those that the cache holds."""
        return self.cache is not None and self.update

    def past(self, slot: int, layer: int) -> list[KeysValues]:
        """What a tower holds at a layer, as a list of none or one."""
        return [] if self.cache is None else self.cache.past(slot, layer)

    def append(self, slot: int, layer: int, *new: KeysValues | None) -> None:
        """Put keys and values of this pass, in the order of its rows, behind those that a tower holds, if it `appends` any."""
        made = [kv for kv in new if kv is not None]
        if self.cache is not None and self.update and made:
            self.cache.append(slot, layer, made)

    def all_keys_values(self, slot: int, layer: int, new: KeysValues | None) -> KeysValues | None:
        """Keys and values that a tower holds at a layer with this pass's behind them, which are kept if the pass is to.

        Args:
            slot: the tower's.
            layer: number of the layer.
            new: this pass's, or None where there are none.

        Returns:
            ``[B, H, k, K]`` each; None where there are neither.
        """
        parts = self.past(slot, layer) + ([] if new is None else [new])
        self.append(slot, layer, new)
        if not parts:
            return None
        k, v = (torch.cat(some, dim=2) for some in zip(*parts, strict=True))
        return k, v

    def seen(self, owner: str, of: Literal["text", "media"] | None = None) -> Tensor:
        """Which of these keys an owner's rows may read, whatever the distance, bool ``[B, n, k]``; a row may see none."""
        return seen(self.rows[owner], self.keys(of))

    def mask(
        self, owner: str, window: int | None, *, others: bool = True, of: Literal["text", "media"] | None = None
    ) -> Tensor:
        """Mask of one owner's queries over the keys [cache | text | media ...], ``[B, 1, n, k]``, a `block_mask` where that is
        the implementation's; ``""`` asks for all.

        ``others=False`` leaves the other owners' keys of this pass out, where none of them is visible anyway; ``of``
        leaves all keys but those of words, or of media, out, as `keys` does.
        """
        key = (owner, others, window, of)
        if key not in self._masks:
            past = [self.cache.rows] if self.cache is not None else []
            tables = [t for name, t in self.rows.items() if others or name == owner]
            queries = self.rows[owner] if owner else Rows.cat(tables)
            keys = self.keys(of) if of else Rows.cat(past + tables)
            self._masks[key] = rows_mask(queries, keys, window, self.attention, self.dtype)
        return self._masks[key]


def of_paths(parts: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Parts of a layer by their paths in it as one module; a ``ModuleDict`` takes no dots."""
    return nn.ModuleDict({path.replace(".", "/"): part for path, part in parts.items()})


def by_path(parts: nn.ModuleDict) -> dict[str, nn.Module]:
    """The inverse of `of_paths`."""
    return {name.replace("/", "."): part for name, part in parts.items()}


def tower_rows(
    layer: nn.Module,
    own: Tensor,
    own_call: Call,
    other_layer: nn.Module,
    other: Tensor | None,
    other_call: Call,
    past: list[KeysValues],
    mask: Tensor,
    own_first: bool,
    keep: bool,
) -> tuple[Tensor, list[KeysValues]]:
    """One block at one layer: new states of some rows, and the keys and values of all rows, in their order, if they are kept.

    What is returned and read by nobody has gradients all the same once this is compiled: zeros, filled in and added.

    Args:
        layer: the block, as the rows that are computed go through it.
        own: their states, ``[B, n, D]``.
        other_layer: the block, as the rows that are only read go through it.
        other: their states, or None.
        past: the block's cached keys and values (none or one).
        mask: own queries over [past | text | media].
        own_first: whether the own rows lie before the others along the keys (text does).
        keep: whether the pass `appends` keys and values.
    """
    others = [] if other is None else [keys_values(other_layer, other, other_call)]
    before, after = (past, others) if own_first else (past + others, [])
    h, kv = run_rows(layer, own, own_call, mask, before, after)
    made = [kv, *others] if own_first else [*others, kv]
    return h, made if keep else []


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The per-layer work of a mechanism, compiled; all layers of a block's kind share the graphs."""
    # One graph per block, kind of batch and text width; at the default limit of 8 a run with several widths would die.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(function, fullgraph=True, dynamic=False)


class Fusion(nn.Module):
    """New modules around a frozen decoder. A subclass is one mechanism.

    The verbs: `install` makes the new modules, `remove` forgets them, `layer` computes one layer of a pass. What a
    media item looks like at the input and how it is read out is the media port's, shared by all fusions.

    A subclass of most mechanisms has only to say what its block at a layer is and whose rows it computes (`tower`).
    At layers without a block media states pass unchanged, while the frozen layer still makes keys and values of them.
    """

    preserves_text: bool = False
    """Whether text-only logits through the fused stack equal the base's bit for bit, whatever the new weights are."""
    prefix_is_constant: bool = False
    """Whether text before the first media item never depends on new weights, so that it may be computed once."""
    taken: Mapping[int, Mapping[str, str]] = MappingProxyType({})
    """What `begin` read: layer -> new parameter -> where it is from. Empty where a pack brought the weights."""
    num_towers: int = 1
    """Slots of the cache, the frozen decoder's included."""
    media_blocks: bool = False
    """Whether media rows go through new blocks, whole layers, so that a noise level may act on their branches."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Where a mechanism stands; `build` makes it."""

        stride: int = 1
        """A new block stands at every stride-th layer; 1 takes every layer."""
        offset: int | None = None
        """First layer with a block; None takes stride // 2 (2, 7, ..., 27 for stride 5 of 30 layers)."""
        layers: tuple[int, int] | None = None
        """Layers that the mechanism may stand at, from the first up to but without the second; None takes all."""

        def build(self) -> Fusion:
            """The fusion, not yet installed."""
            raise TypeError(f"{type(self).__qualname__} does not say which fusion it builds")

        def sizes(self, num_layers: int) -> Iterator[Fusion.Config]:
            """This mechanism in other sizes, smallest first: what a comparison at equal parameters chooses from."""
            if self.layers is None:
                for stride in range(num_layers, 0, -1):
                    yield replace(self, stride=stride, offset=None)

        def placed(self, num_layers: int) -> list[int]:
            """The layers at which a block stands.

            Raises:
                XFusionError: there is none.
            """
            first, end = self.layers or (0, num_layers)
            offset = self.stride // 2 if self.offset is None else self.offset
            if not 0 <= first < end <= num_layers:
                raise XFusionError(
                    f"layers {first} to {end} are not within the base's {num_layers}: choose some of them"
                )
            if self.stride < 1 or not 0 <= offset < end - first:
                raise XFusionError(
                    f"stride {self.stride}, offset {offset} puts no block into {end - first} layers; choose"
                    " stride >= 1 and 0 <= offset < layers"
                )
            return list(range(first + offset, end, self.stride))

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleDict()

    def install(self, backbone: Backbone) -> None:
        """Make the new modules for a base: at every placed layer what `make` says. The base itself is not touched."""
        self.windows = [backbone.window(i) for i in range(backbone.num_layers)]
        self.block_config = self.make_config(backbone)
        self._standing: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
        self.blocks = nn.ModuleDict(
            {str(index): self.make(index, backbone) for index in self.config.placed(backbone.num_layers)}
        )

    def make_config(self, backbone: Backbone) -> Any:
        """The base's kind of configuration that new blocks read; by default a copy of the base's."""
        return backbone.tower_config()

    def begin(self, backbone: Backbone) -> None:
        """Read weights that a fresh model starts from; once, behind `install`. By default there are none to read.

        A model whose weights a pack brings is made without it, so that a pack does not need what training began with.
        """

    def make(self, index: int, backbone: Backbone) -> nn.Module:
        """The new modules of a layer: a decoder layer, by default a trainable copy of the frozen one; or parts of one
        (`of_paths`), which stand in the frozen layer.
        """
        return backbone.copy_layer(index, self.block_config)

    def remove(self) -> None:
        """Forget the new modules."""
        for name in list(self._modules):
            del self._modules[name]

    def set_attention(self, implementation: str) -> None:
        """Choose the attention implementation of copied blocks; the base keeps its own."""
        if self.block_config._attn_implementation != implementation:
            self.block_config._attn_implementation = implementation

    def block_widths(self) -> dict[int, int]:
        """Layer -> model width of the block whose branches a noise level may act on.

        Raises:
            XFusionError: the mechanism has none.
        """
        if not self.media_blocks:
            raise XFusionError(
                f"the port's time 'adaln' acts inside new blocks that media go through, and {type(self).__name__} has"
                " none: take 'add' or 'modulate'"
            )
        width: int = self.block_config.hidden_size
        return dict.fromkeys(self.state_layers, width)

    @property
    def state_layers(self) -> tuple[int, ...]:
        """Layers at which media rows are computed: only there need text states be at hand when text is given instead of
        computed. By default those with new modules; a mechanism that sends media through frozen layers names them all.
        """
        return tuple(int(index) for index in self.blocks)

    def layers_of(self, owner: str) -> tuple[int, ...]:
        """The same for one modality, by its name."""
        del owner
        return self.state_layers

    def block(self, index: int, frozen: nn.Module) -> Any:
        """The new block at a layer, or None where there is none: what `make` made, or the frozen layer with the parts that
        it made in place.

        Args:
            index: number of the layer.
            frozen: the frozen layer of this pass, for blocks that stand on its weights.
        """
        block = self.blocks[str(index)] if str(index) in self.blocks else None  # noqa: SIM401 (a ModuleDict has no get)
        if not isinstance(block, nn.ModuleDict):
            return block
        if frozen not in self._standing:
            self._standing[frozen] = assembled(frozen, by_path(block))
        return self._standing[frozen]

    def media_block(self, index: int, frozen: nn.Module) -> Any:
        """The block that media go through at a layer, where words go through the frozen one and meet nothing new; None where
        media pass unchanged. A mechanism that is nothing but this can stand beside others (`xfusion.together`).

        Raises:
            XFusionError: it is more than this.
        """
        del index, frozen
        raise XFusionError(
            f"{type(self).__name__} does more than to send media through blocks of their own: it stands beside no other"
        )

    def new_modules(self, index: int) -> list[nn.Module]:
        """The new modules that a layer needs while it computes, and that nothing needs at any other time."""
        return [self.blocks[str(index)]] if str(index) in self.blocks else []

    # -- what of the base is trained

    @property
    def regime(self) -> str:
        """One of `REGIMES`; models of different regimes are never ranked together."""
        return REGIMES[0] if self.preserves_text else REGIMES[-1]

    @property
    def exports(self) -> tuple[str, ...]:
        """Names in `xfusion.exports` of the libraries that have such a mechanism; whether a whole model can go there, the
        export says.
        """
        return ()

    def keeps(self, index: int) -> bool:
        """Whether the frozen layer itself computes words at a layer; else a trained copy stands in its place."""
        del index
        return True

    @contextmanager
    def unadapted(self) -> Iterator[None]:
        """Inside the block the frozen layers compute without deltas, where a mechanism lays some on them."""
        yield

    # -- the work of a layer

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """One layer of a mixed pass: from ``run.states`` to the states behind the layer."""
        raise NotImplementedError(type(self).__name__)

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The paper's equation on whole layers: slow, obviously right, without cache. Tests hold `layer` to it."""
        raise NotImplementedError(type(self).__name__)

    def text_layer(self, index: int, frozen: nn.Module, x: Tensor, call: Call) -> Tensor:
        """One layer of a text-only pass, the frozen block called exactly as the base calls it; a block with a slot of its
        own, which is a decoder layer unless a mechanism says otherwise here, still makes its keys and values.
        """
        if self.num_towers > 1 and (block := self.block(index, frozen)) is not None:
            own = x.to(next(self.blocks[str(index)].parameters()).dtype)
            keys_values(block, own, slice_call(call, slice(None)))
        return frozen(x, **call)

    def tower(
        self,
        slot: int,
        index: int,
        block: nn.Module,
        owners: Iterable[str],
        call: Call,
        run: Pass,
        *,
        by_noise: bool = False,
    ) -> dict[str, Tensor]:
        """Rows of some owners behind a block that makes keys and values of all rows; the other rows are only read.

        Args:
            slot: where the block keeps keys and values; slot 0 is the frozen decoder's.
            index: number of the layer.
            block: any decoder layer.
            owners: whose rows are computed. Text that is given is never computed.
            call: what the decoder hands to the layer.
            run: the pass.
            by_noise: the noise level acts inside the block, at media rows (`Pass.by_noise`).

        Returns:
            Owner -> new states ``[B, n, D]``.
        """

        def of(*owners: str) -> Any:
            return run.by_noise(block, owners) if by_noise else block

        wanted = set(owners)
        own = [o for o in run.states if o in wanted and not (o == "text" and run.given is not None)]
        calls, window, past = run.calls(call), self.windows[index], run.past(slot, index)
        work = compiled(tower_rows) if run.compiled else tower_rows
        if not own:
            if run.appends:
                run.append(slot, index, *(keys_values(of(o), x, calls[o]) for o, x in run.states.items()))
            return {}
        states = run.inputs(index)
        if len(own) == len(states):
            x = torch.cat(list(states.values()), dim=1)
            mask, layer = run.mask("" if len(own) > 1 else own[0], window), of(*states)
            h, made = work(layer, x, calls[""], layer, None, {}, past, mask, True, run.appends)
            run.append(slot, index, *made)
            return run.cut(h)
        if len(states) > 2 or "text" not in states:  # media of several modalities
            made = keys_values(block, torch.cat(list(states.values()), dim=1), calls[""])
            run.append(slot, index, made)
            return {
                o: run_rows(block, states[o], calls[o], run.mask(o, window), [*past, made], [], splice_own=False)[0]
                for o in own
            }
        (name,) = own
        other = next(o for o in states if o != name)
        read = run.appends or run.reads_others(name)
        others = (states[other], calls[other]) if read else (None, {})
        first = name == "text"
        mask = run.mask(name, window, others=read)
        h, made = work(of(name), states[name], calls[name], of(other), *others, past, mask, first, run.appends)
        run.append(slot, index, *made)
        return {name: h}

    def words_alone(
        self, slot: int, index: int, block: nn.Module, call: Call, run: Pass, x: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Text behind a block in whose attention media take no part; the slot then holds keys and values of text only.

        Args:
            slot: where the block keeps keys and values.
            index: number of the layer.
            block: any decoder layer.
            call: what the decoder hands to the layer.
            run: the pass.
            x: text states ``[B, n, D]`` that the block is given; None takes the pass's.

        Returns:
            ``{"text": new states}``, or nothing where no text is computed.
        """
        if "text" not in run.states:
            return {}
        own = run.calls(call)["text"]
        if run.given is not None and not run.appends:  # not computed again, and at hand only at the layers that read it
            return {}
        x = run.inputs(index)["text"] if x is None else x
        if run.given is not None:
            run.append(slot, index, keys_values(block, x, own))
            return {}
        past, work = run.past(slot, index), compiled(tower_rows) if run.compiled else tower_rows
        mask = run.mask("text", self.windows[index], of="text")
        h, made = work(block, x, own, block, None, {}, past, mask, True, run.appends)
        run.append(slot, index, *made)
        return {"text": h}

    def whole(
        self, index: int, block: nn.Module, call: Call, run: Pass, *, by_noise: bool = False
    ) -> dict[str, Tensor]:
        """A whole block over the whole sequence, by owner: what reference paths are made of."""
        x = torch.cat(list(run.states.values()), dim=1)
        block = run.by_noise(block, run.states) if by_noise else block
        return run.cut(run_rows(block, x, run.calls(call)[""], run.mask("", self.windows[index]), [], [])[0])


class WithoutBlocks(Fusion):
    """A mechanism that puts nothing at the frozen layers: what is new stands before them, beside them or above them."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        """Nothing to set; ``stride``, ``offset`` and ``layers`` have nothing to place."""

        def sizes(self, num_layers: int) -> Iterator[Fusion.Config]:
            """None: its weights are others'."""
            del num_layers
            yield from ()

        def refuse_places(self, name: str) -> None:
            """Refuse settings that would place blocks.

            Args:
                name: of the mechanism, for the message.

            Raises:
                XFusionError: one is set.
            """
            if (self.stride, self.offset, self.layers) != (1, None, None):
                raise XFusionError(
                    f"{name}: stride {self.stride}, offset {self.offset}, layers {self.layers}, but it has no blocks to"
                    " place: leave them out"
                )

    def install(self, backbone: Backbone) -> None:
        """Learn the shape of the base."""
        self.windows = [backbone.window(i) for i in range(backbone.num_layers)]

    def set_attention(self, implementation: str) -> None:
        """Nothing of it is the base's kind of block: the frozen layers say which attention they use."""
