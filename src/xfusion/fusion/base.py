"""The interface of a fusion: how new modules are placed around frozen layers, and what one pass over the layers shares.

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``S`` all rows of a pass, ``D`` model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
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
"""Which part of the base is trained: nothing (text-only output is the base's own); low-rank deltas; what the paper trains."""

Call = dict[str, Any]
"""The arguments that the decoder's own forward passes to a layer, besides the hidden states."""


@dataclass(kw_only=True)
class Pass:
    """What one pass over the layers shares; `Model` creates and discards it. Nothing is stored on layers.

    Hidden states are stored separately by owner (``text`` first, then each modality), so that a tower's rows are one tensor
    and no layer has to split or concatenate anything.
    """

    rows: dict[str, Rows]
    """Owner -> position tables of this pass."""
    states: dict[str, Tensor]
    """Owner -> states before the current layer, ``[B, n, D]``."""
    attention: str
    """Attention implementation that masks are built for."""
    media_rows: dict[str, MediaRows] = field(default_factory=dict)
    """Modality -> description of its rows: noise levels, items, grid."""
    dtype: torch.dtype
    cache: Cache | None = None
    """Keys and values of earlier positions."""
    update: bool = False
    """Whether this pass appends its own keys and values to the cache."""
    cached_text: dict[int, Tensor] | None = None
    """Text states by layer, if they were computed before: text rows are then not recomputed."""
    text_reads_media: bool = True
    """Whether any text position of this pass comes after a media item."""
    media_reads_text: bool = True
    """Whether any media position of this pass comes after text."""
    compiled: bool = False
    """Whether the per-layer work runs compiled (yes in training; not in sampling, where shapes change)."""
    modulation: Tensor | None = None
    """Modulation of the current layer's block at media rows, ``[B, n, 6, W]`` (`xfusion.layers.modulated`)."""
    final: bool = True
    """Whether the states after the decoder's last norm are needed."""
    layers: frozenset[int] | None = None
    """Layers at which anything is computed; None means all."""
    intermediates: dict[str, Tensor] = field(default_factory=dict)
    """States requested by objectives, by name (`Objective.needs`)."""
    layer_calls: dict[int, tuple[nn.Module, Call]] | None = field(default_factory=dict)
    """Layer -> the frozen layer and the arguments that the decoder passed to it; None if the decoder changes its inputs."""
    _masks: dict[tuple[str, bool, int | None, str | None], Tensor] = field(default_factory=dict)
    _calls: dict[int, tuple[Any, dict[str, Call]]] = field(default_factory=dict)
    _tables: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def slices(self) -> dict[str, slice]:
        owner_slices, start = {}, 0
        for owner, table in self.rows.items():
            owner_slices[owner] = slice(start, start + table.count)
            start += table.count
        return owner_slices

    @property
    def media(self) -> str | None:
        """The modality of this pass, or None."""
        return next((owner for owner in self.rows if owner != "text"), None)

    def calls(self, call: Call) -> dict[str, Call]:
        """Owner -> the per-position arguments of a layer call, sliced to the owner's rows, and ``""`` -> those of all rows;
        computed once per rotary table.
        """
        rotary_table = call.get("position_embeddings")
        if id(rotary_table) not in self._calls:
            by_owner = {owner: slice_call(call, rows) for owner, rows in self.slices.items()}
            self._calls[id(rotary_table)] = (rotary_table, by_owner | {"": slice_call(call, slice(None))})
        return self._calls[id(rotary_table)][1]

    def share_tables(self, other: Pass) -> None:
        """Share masks, arguments and tables of a pass over the same positions with the same cached keys and values."""
        self._masks, self._calls, self._tables, self.layer_calls = (
            other._masks,
            other._calls,
            other._tables,
            other.layer_calls,
        )

    def cached_table(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """A table over this pass's positions that is the same at every layer, computed on first use."""
        if key not in self._tables:
            self._tables[key] = make()
        return self._tables[key]

    def inputs(self, index: int) -> dict[str, Tensor]:
        """Input states of a layer, with the cached text states where text is not computed."""
        return self.states if self.cached_text is None else self.states | {"text": self.cached_text[index]}

    def reads_others(self, owner: str) -> bool:
        """Whether any position of an owner comes after positions of the others."""
        return self.text_reads_media if owner == "text" else self.media_reads_text

    def split_by_owner(self, x: Tensor) -> dict[str, Tensor]:
        """Split the states of all rows, ``[B, S, D]``, by owner."""
        return {owner: x[:, rows] for owner, rows in self.slices.items()}

    def after_media(self, owner: str) -> Tensor:
        """Where new modules may act on an owner's rows, bool ``[B, n, 1]``: from the first media token of a sequence on."""
        return self.rows[owner].after_media[..., None]

    def by_noise(self, block: Any, owners: Iterable[str]) -> Any:
        """The block for the rows of some owners, in this order: its branches are modulated by the noise level at media rows,
        if the port does so, and never at text rows.
        """
        owner_names = list(owners)
        if self.modulation is None or self.media not in owner_names:
            return block
        shape = self.modulation.shape[2:]
        rows = [
            self.modulation if owner == self.media else self.modulation.new_zeros(*self.rows[owner].order.shape, *shape)
            for owner in owner_names
        ]
        return modulated(block, torch.cat(rows, dim=1))

    def keys(self, of: Literal["text", "media"] | None = None) -> Rows:
        """Tables of the keys [cache | text | media ...]; ``of`` restricts them to text or media, cached ones included."""
        tables = [table for name, table in self.rows.items() if of is None or (name == "text") == (of == "text")]
        if self.cache is None:
            return Rows.cat([next(iter(self.rows.values())).none(), *tables])
        if of is None:
            return Rows.cat([self.cache.rows, *tables])
        return Rows.cat([self.cache.rows.columns(self.cache.columns(of)), *tables])

    @property
    def appends(self) -> bool:
        """Whether this pass's keys and values are appended to the cache."""
        return self.cache is not None and self.update

    def past(self, slot: int, layer: int) -> list[KeysValues]:
        """A tower's cached keys and values at a layer, as a list of zero or one."""
        return [] if self.cache is None else self.cache.past(slot, layer)

    def append(self, slot: int, layer: int, *pairs: KeysValues | None) -> None:
        """Append keys and values of this pass, in the order of its rows, to a tower's cache, if the pass `appends` any."""
        new_kv = [kv for kv in pairs if kv is not None]
        if self.cache is not None and self.update and new_kv:
            self.cache.append(slot, layer, new_kv)

    def all_keys_values(self, slot: int, layer: int, new_kv: KeysValues | None) -> KeysValues | None:
        """A tower's cached keys and values at a layer, followed by this pass's, which are cached if the pass `appends`.

        Args:
            slot: the tower's cache slot.
            layer: index of the layer.
            new_kv: this pass's keys and values, or None if there are none.

        Returns:
            ``[B, H, k, K]`` each; None if there are neither cached nor new ones.
        """
        pairs = self.past(slot, layer) + ([] if new_kv is None else [new_kv])
        self.append(slot, layer, new_kv)
        if not pairs:
            return None
        k, v = (torch.cat(tensors, dim=2) for tensors in zip(*pairs, strict=True))
        return k, v

    def seen(self, owner: str, of: Literal["text", "media"] | None = None) -> Tensor:
        """Which of the `keys` an owner's rows may read, at any distance, bool ``[B, n, k]``; a row may see none."""
        return seen(self.rows[owner], self.keys(of))

    def mask(
        self, owner: str, window: int | None, *, others: bool = True, of: Literal["text", "media"] | None = None
    ) -> Tensor:
        """Attention mask of one owner's queries over the keys [cache | text | media ...], ``[B, 1, n, k]``, or a `block_mask`
        if the implementation uses one; owner ``""`` means all queries.

        ``others=False`` leaves out the other owners' keys of this pass, for when none of them is visible anyway; ``of``
        restricts the keys to text or media, as in `keys`.
        """
        key = (owner, others, window, of)
        if key not in self._masks:
            past = [self.cache.rows] if self.cache is not None else []
            tables = [t for name, t in self.rows.items() if others or name == owner]
            queries = self.rows[owner] if owner else Rows.cat(tables)
            keys = self.keys(of) if of else Rows.cat(past + tables)
            self._masks[key] = rows_mask(queries, keys, window, self.attention, self.dtype)
        return self._masks[key]


def joined(states: Mapping[str, Tensor]) -> Tensor:
    """The states of all owners in one tensor ``[B, S, D]``; those of one owner are not copied."""
    tensors = list(states.values())
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)


def module_from_parts(parts: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Parts of a layer, by their paths in it, as one module; keys of a ``ModuleDict`` cannot contain dots."""
    return nn.ModuleDict({path.replace(".", "/"): part for path, part in parts.items()})


def parts_from_module(parts: nn.ModuleDict) -> dict[str, nn.Module]:
    """The inverse of `module_from_parts`."""
    return {name.replace("/", "."): part for name, part in parts.items()}


def tower_rows(
    layer: nn.Module,
    query_states: Tensor,
    query_call: Call,
    other_layer: nn.Module,
    other_states: Tensor | None,
    other_call: Call,
    past: list[KeysValues],
    mask: Tensor,
    query_first: bool,
    return_keys_values: bool,
) -> tuple[Tensor, list[KeysValues]]:
    """One block at one layer: new states of some rows, and, if ``return_keys_values``, the keys and values of all rows in order.

    Unused outputs are not returned: once compiled, they would still get gradients (zeros, allocated and added).

    Args:
        layer: the block for the rows that are computed.
        query_states: their states, ``[B, n, D]``.
        other_layer: the block for the rows that are only read.
        other_states: their states, or None.
        past: the block's cached keys and values (zero or one).
        mask: attention mask of these queries over [past | text | media].
        query_first: whether these rows come before the others along the keys (true for text).
        return_keys_values: whether the pass `appends` keys and values.
    """
    other_kv = [] if other_states is None else [keys_values(other_layer, other_states, other_call)]
    keys_before, keys_after = (past, other_kv) if query_first else (past + other_kv, [])
    output, query_kv = run_rows(layer, query_states, query_call, mask, keys_before, keys_after)
    new_kv = [query_kv, *other_kv] if query_first else [*other_kv, query_kv]
    return output, new_kv if return_keys_values else []


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The per-layer work of a mechanism, compiled; all layers with the same kind of block share the graphs."""
    # One graph per block, kind of batch and text width; with the default limit of 8 a run with several widths would fail.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(function, fullgraph=True, dynamic=False)


class Fusion(nn.Module):
    """New modules around a frozen decoder. Each subclass is one mechanism.

    The main methods: `install` creates the new modules, `remove` drops them, `layer` computes one layer of a pass. How media
    are embedded at the input and read out is up to the media port, which all fusions share.

    Most subclasses only have to define their block at a layer and whose rows it computes (`tower`). At layers without a
    block media states pass unchanged, while the frozen layer still computes keys and values from them.
    """

    preserves_text: bool = False
    """Whether text-only logits through the fused stack are bit-identical to the base's, whatever the new weights are."""
    prefix_is_constant: bool = False
    """Whether text before the first media item never depends on new weights, so that its states may be computed once."""
    reads_ahead: bool = False
    """Whether words read media that come later, so that what is computed of a prompt does not hold for a longer one."""
    taken: Mapping[int, Mapping[str, str]] = MappingProxyType({})
    """What `begin` loaded: layer -> new parameter -> its source. Empty if a pack supplied the weights."""
    num_towers: int = 1
    """Number of cache slots, including the frozen decoder's."""
    joins_attention: bool = True
    """Whether media stand beside text in the self-attention of the decoder's layers."""
    media_blocks: bool = False
    """Whether media rows pass through new blocks that are whole layers, whose branches a noise level may modulate."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Where a mechanism has its blocks; `build` creates it."""

        stride: int = 1
        """Put a new block at every stride-th layer; 1 means every layer."""
        offset: int | None = None
        """First layer with a block; None means stride // 2 (2, 7, ..., 27 for stride 5 of 30 layers)."""
        layers: tuple[int, int] | None = None
        """Range of layers that may have blocks: first (inclusive) and end (exclusive); None means all."""

        def build(self) -> Fusion:
            """The fusion, not yet installed."""
            raise TypeError(f"{type(self).__qualname__} does not say which fusion it builds")

        def sizes(self, num_layers: int) -> Iterator[Fusion.Config]:
            """This mechanism in other sizes, smallest first: candidates for a comparison at equal parameter counts."""
            if self.layers is None:
                for stride in range(num_layers, 0, -1):
                    yield replace(self, stride=stride, offset=None)

        def placed(self, num_layers: int) -> list[int]:
            """The layers that have a block.

            Raises:
                XFusionError: no layer has one.
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
        """Create the new modules for a base, by `make` at every placed layer. The base itself is not modified."""
        self.windows = [backbone.window(i) for i in range(backbone.num_layers)]
        self.block_config = self.make_config(backbone)
        self._assembled_blocks: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
        self.blocks = nn.ModuleDict(
            {str(index): self.make(index, backbone) for index in self.config.placed(backbone.num_layers)}
        )

    def make_config(self, backbone: Backbone) -> Any:
        """The configuration that new blocks read, of the base's class; by default a copy of the base's."""
        return backbone.tower_config()

    def begin(self, backbone: Backbone) -> None:
        """Load the weights that a fresh model starts from; called once, after `install`. By default there are none.

        It is not called for a model loaded from a pack, so a pack does not need the weights that training started from.
        """

    def make(self, index: int, backbone: Backbone) -> nn.Module:
        """The new modules of a layer: a decoder layer (by default a trainable copy of the frozen one), or parts of one
        (`module_from_parts`) that replace those of the frozen layer.
        """
        return backbone.copy_layer(index, self.block_config)

    def remove(self) -> None:
        """Drop the new modules."""
        for name in list(self._modules):
            del self._modules[name]

    def set_attention(self, implementation: str) -> None:
        """Choose the attention implementation of copied blocks; the base keeps its own."""
        if self.block_config._attn_implementation != implementation:
            self.block_config._attn_implementation = implementation

    def block_widths(self) -> dict[int, int]:
        """Layer -> model width of the block whose branches a noise level may modulate.

        Raises:
            XFusionError: the mechanism has no such blocks.
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
        """Layers at which media rows are computed. Cached text states are needed only at these. By default the layers with new
        modules; a mechanism that sends media through frozen layers returns all layers.
        """
        return tuple(int(index) for index in self.blocks)

    def layers_of(self, owner: str) -> tuple[int, ...]:
        """`state_layers` for one modality, by its name."""
        del owner
        return self.state_layers

    def block(self, index: int, frozen: nn.Module) -> Any:
        """The new block at a layer, or None if there is none: the result of `make`, or the frozen layer with the parts from
        `make` inserted.

        Args:
            index: index of the layer.
            frozen: the frozen layer of this pass, for blocks that use its weights.
        """
        block = self.blocks[str(index)] if str(index) in self.blocks else None  # noqa: SIM401 (a ModuleDict has no get)
        if not isinstance(block, nn.ModuleDict):
            return block
        if frozen not in self._assembled_blocks:
            self._assembled_blocks[frozen] = assembled(frozen, parts_from_module(block))
        return self._assembled_blocks[frozen]

    def media_block(self, index: int, frozen: nn.Module) -> Any:
        """The block for media at a layer, if text goes through the frozen layer alone; None if media pass unchanged. A
        mechanism that does nothing else can be combined with others (`xfusion.together`).

        Raises:
            XFusionError: the mechanism does more than this.
        """
        del index, frozen
        raise XFusionError(
            f"{type(self).__name__} does more than to send media through blocks of their own: it stands beside no other"
        )

    def new_modules(self, index: int) -> list[nn.Module]:
        """The new modules that are needed only while this layer computes."""
        return [self.blocks[str(index)]] if str(index) in self.blocks else []

    # -- which part of the base is trained

    @property
    def regime(self) -> str:
        """One of `REGIMES`; models of different regimes are never ranked against each other."""
        return REGIMES[0] if self.preserves_text else REGIMES[-1]

    @property
    def exports(self) -> tuple[str, ...]:
        """Names in `xfusion.exports` of the libraries that have such a mechanism; the export itself decides whether a whole
        model can be exported.
        """
        return ()

    def keeps(self, index: int) -> bool:
        """Whether the frozen layer itself computes text at a layer; otherwise a trained copy replaces it."""
        del index
        return True

    @contextmanager
    def unadapted(self) -> Iterator[None]:
        """Inside the ``with`` block the frozen layers compute without the deltas that a mechanism may add to them."""
        yield

    # -- the work of a layer

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """One layer of a mixed pass: from ``run.states`` to the layer's output states."""
        raise NotImplementedError(type(self).__name__)

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The paper's equation on whole layers: slow, obviously right, without cache. Tests compare `layer` with it."""
        raise NotImplementedError(type(self).__name__)

    def text_layer(self, index: int, frozen: nn.Module, x: Tensor, call: Call) -> Tensor:
        """One layer of a text-only pass; the frozen block is called exactly as the base calls it. A block with its own cache
        slot (a decoder layer, unless a mechanism overrides this) still computes its keys and values.
        """
        if self.num_towers > 1 and (block := self.block(index, frozen)) is not None:
            new = self.blocks[str(index)]
            # New parts stand among frozen ones, perhaps of half precision: both compute in it, as in a mixed pass.
            in_half = isinstance(new, nn.ModuleDict) and x.dtype in (torch.bfloat16, torch.float16)
            with torch.autocast(x.device.type, x.dtype) if in_half else nullcontext():
                tower_states = x if in_half else x.to(next(new.parameters()).dtype)
                keys_values(block, tower_states, slice_call(call, slice(None)))
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
        """Output states of some owners' rows from a block that computes keys and values of all rows; other rows are only read.

        Args:
            slot: the block's cache slot; slot 0 is the frozen decoder's.
            index: index of the layer.
            block: any decoder layer.
            owners: whose rows are computed. Cached text is never computed.
            call: the arguments that the decoder passes to the layer.
            run: the pass.
            by_noise: the noise level modulates the block at media rows (`Pass.by_noise`).

        Returns:
            Owner -> new states ``[B, n, D]``.
        """

        def block_for(*owners: str) -> Any:
            return run.by_noise(block, owners) if by_noise else block

        owner_set = set(owners)
        computed_owners = [
            o for o in run.states if o in owner_set and not (o == "text" and run.cached_text is not None)
        ]
        calls, window, past = run.calls(call), self.windows[index], run.past(slot, index)
        compute_rows = compiled(tower_rows) if run.compiled else tower_rows
        if not computed_owners:
            if run.appends:
                run.append(slot, index, *(keys_values(block_for(o), x, calls[o]) for o, x in run.states.items()))
            return {}
        states = run.inputs(index)
        if len(computed_owners) == len(states):
            x = joined(states)
            mask, layer = run.mask("" if len(computed_owners) > 1 else computed_owners[0], window), block_for(*states)
            output, new_kv = compute_rows(layer, x, calls[""], layer, None, {}, past, mask, True, run.appends)
            run.append(slot, index, *new_kv)
            return run.split_by_owner(output)
        if len(states) > 2 or "text" not in states:  # media of several modalities
            new_kv = keys_values(block, joined(states), calls[""])
            run.append(slot, index, new_kv)
            return {
                o: run_rows(block, states[o], calls[o], run.mask(o, window), [*past, new_kv], [], splice_own=False)[0]
                for o in computed_owners
            }
        (name,) = computed_owners
        other = next(o for o in states if o != name)
        reads_other = run.appends or run.reads_others(name)
        other_arguments = (states[other], calls[other]) if reads_other else (None, {})
        query_first = name == "text"
        mask = run.mask(name, window, others=reads_other)
        output, new_kv = compute_rows(
            block_for(name),
            states[name],
            calls[name],
            block_for(other),
            *other_arguments,
            past,
            mask,
            query_first,
            run.appends,
        )
        run.append(slot, index, *new_kv)
        return {name: output}

    def words_alone(
        self, slot: int, index: int, block: nn.Module, call: Call, run: Pass, x: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Text states after a block whose attention excludes media; the slot then holds keys and values of text only.

        Args:
            slot: the block's cache slot.
            index: index of the layer.
            block: any decoder layer.
            call: the arguments that the decoder passes to the layer.
            run: the pass.
            x: input text states ``[B, n, D]`` of the block; None uses the pass's.

        Returns:
            ``{"text": new states}``, or an empty dict if no text is computed.
        """
        if "text" not in run.states or run.cached_text is not None:
            return {}
        text_call, x = run.calls(call)["text"], run.states["text"] if x is None else x
        past, compute_rows = run.past(slot, index), compiled(tower_rows) if run.compiled else tower_rows
        mask = run.mask("text", self.windows[index], of="text")
        output, new_kv = compute_rows(block, x, text_call, block, None, {}, past, mask, True, run.appends)
        run.append(slot, index, *new_kv)
        return {"text": output}

    def words_alone_reference(
        self, index: int, block: nn.Module, call: Call, run: Pass, x: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`words_alone` for reference paths: text through a whole block without cache; the arguments are as there."""
        if "text" not in run.states:
            return {}
        x, mask = run.states["text"] if x is None else x, run.mask("text", self.windows[index], of="text")
        return {"text": run_rows(block, x, run.calls(call)["text"], mask, [], [])[0]}

    def frozen_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """A layer without new modules: text reads all rows through the frozen layer; media states pass unchanged."""
        return run.states | self.tower(0, index, frozen, {"text"}, call, run)

    def frozen_reference(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """`frozen_layer` for reference paths: the whole frozen layer, of whose output only text's is kept."""
        new_states = self.whole(index, frozen, call, run)
        return run.states | {owner: h for owner, h in new_states.items() if owner == "text"}

    def whole(
        self, index: int, block: nn.Module, call: Call, run: Pass, *, by_noise: bool = False
    ) -> dict[str, Tensor]:
        """A whole block over the whole sequence, by owner: the building block of reference paths."""
        x = joined(run.states)
        block = run.by_noise(block, run.states) if by_noise else block
        return run.split_by_owner(run_rows(block, x, run.calls(call)[""], run.mask("", self.windows[index]), [], [])[0])


class WithoutBlocks(Fusion):
    """A mechanism without new modules at the frozen layers: they are before, beside or above the layers."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        """No settings; ``stride``, ``offset`` and ``layers`` do not apply."""

        def sizes(self, num_layers: int) -> Iterator[Fusion.Config]:
            """None: its weights belong to other modules."""
            del num_layers
            yield from ()

        def reject_block_placement(self, name: str) -> None:
            """Reject settings that would place blocks.

            Args:
                name: name of the mechanism, for the message.

            Raises:
                XFusionError: such a setting is not at its default.
            """
            if (self.stride, self.offset, self.layers) != (1, None, None):
                raise XFusionError(
                    f"{name}: stride {self.stride}, offset {self.offset}, layers {self.layers}, but it has no blocks to"
                    " place: leave them out"
                )

    def install(self, backbone: Backbone) -> None:
        """Read the attention windows of the base's layers."""
        self.windows = [backbone.window(i) for i in range(backbone.num_layers)]

    def set_attention(self, implementation: str) -> None:
        """Nothing to do: there are no copied blocks, and the frozen layers keep their own attention."""
