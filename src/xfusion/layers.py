"""Taking decoder layers of any model family apart and reassembling them; nothing here imports transformers.

Each layer runs its own ``forward``; our code replaces its cache, some of its submodules, or the whole layer. A base's own
layer is never changed: `narrow_mlp` is for copies.

Shape legend: ``B`` batch row, ``n`` rows of one tower, ``D`` model width, ``W`` another width, ``H`` key heads, ``K`` head
width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xfusion.data.sequence import Rows, XFusionError, never_blind, seen, sees, visible

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one tower at one layer, each ``[B, H, n, K]``, after the norm and the rotary embedding."""


class _CacheReached(Exception):
    """Raised to leave a layer once its keys and values are computed."""


class _RecordingCache:
    """Replaces a layer's cache; records the keys and values and stops the layer there."""

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def update(self, k: Tensor, v: Tensor, *_: Any, **__: Any) -> KeysValues:
        self.kv = (k, v)
        raise _CacheReached


class _SplicingCache:
    """Replaces a layer's cache; places the keys and values of other rows before and after the layer's own."""

    def __init__(self, before: list[KeysValues], after: list[KeysValues], include_own: bool = True):
        self.before, self.after, self.include_own = before, after, include_own

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def update(self, k: Tensor, v: Tensor, *_: Any, **__: Any) -> KeysValues:
        self.own_kv = (k, v)
        pairs = [*self.before, *([self.own_kv] if self.include_own else []), *self.after]
        return torch.cat([kv[0] for kv in pairs], dim=2), torch.cat([kv[1] for kv in pairs], dim=2)


def _arguments(module: nn.Module) -> tuple[str, ...]:
    # Faster than inspect.signature, which would cost a quarter of a millisecond per layer and denoising step.
    code = inspect.unwrap(type(module).forward).__code__
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _cache_name(layer: nn.Module) -> str:
    return "layer_past" if "layer_past" in _arguments(layer) else "past_key_values"


def takes_cache(module: nn.Module) -> bool:
    """Whether a module accepts a KV cache (state-space layers use other argument names)."""
    return not {"past_key_values", "layer_past"}.isdisjoint(_arguments(module))


def slice_call(call: dict[str, Any], rows: slice) -> dict[str, Any]:
    """The per-position arguments of a layer call, sliced to some rows of the pass."""
    position_embeddings, position_ids = call.get("position_embeddings"), call.get("position_ids")
    arguments: dict[str, Any] = {"position_ids": None if position_ids is None else position_ids[..., rows]}
    if position_embeddings is not None:
        if isinstance(position_embeddings, Tensor):  # complex, as in DeepSeek-V2
            arguments["position_embeddings"] = position_embeddings[:, rows].contiguous()
        else:
            arguments["position_embeddings"] = tuple(t[:, rows].contiguous() for t in position_embeddings)
    if "alibi" in call:  # always None (`Backbone` refuses a bias), but Falcon's layers require it
        arguments["alibi"] = call["alibi"]
    return arguments


def keys_values(layer: nn.Module, x: Tensor, call: dict[str, Any]) -> KeysValues:
    """Keys and values that ``layer`` computes from the states ``x`` ``[B, n, D]``, by the family's own code.

    The query projection of these rows is dead code, which compilation removes.
    """
    cache = _RecordingCache()
    try:
        layer(x, attention_mask=None, **call, **{_cache_name(layer): cache})
    except _CacheReached:
        return cache.kv
    raise XFusionError(f"{type(layer).__name__} never updates a cache: it has no softmax attention to share")


def run_rows(
    layer: nn.Module,
    x: Tensor,
    call: dict[str, Any],
    mask: Tensor,
    before: list[KeysValues],
    after: list[KeysValues],
    *,
    splice_own: bool = True,
) -> tuple[Tensor, KeysValues]:
    """The output of ``layer`` for the rows ``x`` ``[B, n, D]``, given the keys and values of all other rows.

    Args:
        layer: a decoder layer of any softmax-attention family.
        x: states of the tower's own rows.
        call: per-position arguments of these rows (`slice_call`).
        mask: ``[B, 1, n, before + n + after]`` in the format of the layer's attention (`attention_mask`).
        before: keys and values placed before the rows' own along the key axis.
        after: keys and values placed after them.
        splice_own: False leaves out the keys and values that the layer itself computes for these rows.

    Returns:
        the new states ``[B, n, D]`` and the rows' own keys and values.
    """
    cache = _SplicingCache(before, after, splice_own)
    output = layer(x, attention_mask=mask, **call, **{_cache_name(layer): cache})
    return (output[0] if isinstance(output, tuple) else output), cache.own_kv


@contextmanager
def attention_weights(modules: Iterable[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Inside the ``with`` block, the weights ``[B, H, n, k]`` of the attention that ran last at each layer.

    Args:
        modules: decoder layers whose attention is eager, or modules that contain such; their shadows are recorded too.

    Returns:
        Layer index -> weights, filled as the modules compute.
    """
    weights: dict[int, Tensor] = {}

    def record(module: Any, _: Any, output: Any) -> None:
        # Eager attention returns its weights beside the states.
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor):
            weights[module.layer_idx] = output[1]

    numbered = [module for root in modules for module in root.modules() if hasattr(module, "layer_idx")]
    handles = [module.register_forward_hook(record) for module in numbered]
    try:
        yield weights
    finally:
        for handle in handles:
            handle.remove()


BLOCK = 128
"""Queries per block of a block mask, and keys per block."""


def block_mask(query: Rows, key: Rows, window: int | None = None) -> Any:
    """`visible` in the format of FlexAttention (Dong et al. 2024, arXiv 2412.05496): which blocks of `BLOCK` x `BLOCK` pairs
    are empty, partial or full, and the rule itself for the partial ones.

    Only the position tables are kept; all pairs are materialized once, to classify the blocks.

    Args:
        query: tables ``[B, q]``.
        key: tables ``[B, k]``.
        window: a sliding window, as in `seen`.

    Returns:
        ``torch.nn.attention.flex_attention.BlockMask`` of shape ``[B, 1, q, k]``.
    """
    from torch.nn.attention.flex_attention import BlockMask

    allowed = seen(query, key, window)
    sees_nothing, allowed = ~allowed.any(dim=-1), never_blind(allowed)
    queries, keys = query.seeing, key.seeing

    def mask_mod(b: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        is_visible = sees([table[b, i] for table in queries], [table[b, j] for table in keys], window)
        return is_visible | (sees_nothing[b, i] & (j == 0))

    padding = (0, -allowed.shape[2] % BLOCK, 0, -allowed.shape[1] % BLOCK)
    pair_counts = functional.pad(allowed, padding).unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).sum(dim=(2, 4))
    block_area = BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_block_table((pair_counts > 0) & (pair_counts < block_area)),
        *_block_table(pair_counts == block_area),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(query.count, key.count),
    )


def _block_table(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number of key blocks per query block, ``[B, 1, rows]``, and their indices, put first, ``[B, 1, rows, columns]``."""
    blocks = blocks[:, None].to(torch.int32)
    return blocks.sum(-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def rows_mask(query: Rows, key: Rows, window: int | None, implementation: str, dtype: torch.dtype) -> Any:
    """The mask in the format of an attention implementation: `block_mask`, or `attention_mask` of `visible`."""
    if implementation == "flex_attention":
        return block_mask(query, key, window)
    return attention_mask(visible(query, key, window), implementation, dtype)


class _Scores(torch.autograd.Function):
    """``q @ k^T``, whose gradients have the memory layout of q and k.

    Autograd's own gradient of k is transposed in memory, which later operations (sums, rotary positions) then have to read.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(q, k)
        return q @ k.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (q, k) = grads, ctx.saved_tensors
        # Autocast chose the product's precision; a family that norms its queries and keys has them in float32 there.
        return (grad @ k.to(grad.dtype)).to(q.dtype), (grad.mT @ q.to(grad.dtype)).to(k.dtype)


LONG = 512
"""Number of queries and of keys above which torch's fused attention kernel is faster on a CPU (docs/speed.md)."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Grouped-query attention as plain matrix products: the queries of a group are stacked into one matrix per key head
    (Ainslie et al. 2023, arXiv 2305.13245). Keys and values are not copied for every query head, and their gradients need no
    sum. Scores of long sequences (beyond `LONG`) overflow the CPU cache, so they use torch's fused kernel, without weights.

    The signature is the one transformers registers. There is no dropout; without a mask nothing is masked, as in ``eager``.

    Args:
        module: the layer's attention; not read.
        query: ``[B, G H, n, K]``, G query heads per key head.
        key: ``[B, H, k, K]``.
        value: same shape as the keys.
        attention_mask: added to the scores, ``[B, 1, n, k]``, or None.
        scaling: factor on the scores; None means one over the square root of the head width.
        kwargs: further arguments that a family passes to its attention.

    Returns:
        ``[B, n, G H, K]`` and the weights ``[B, G H, n, k]``, or None instead of weights for long sequences.

    Raises:
        XFusionError: the family uses score capping, attention sinks or a position bias, which are not supported here.
    """
    for argument in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(argument) is not None:
            raise XFusionError(
                f"attention 'grouped' knows no {argument}, which {type(module).__name__} has: take eager"
            )
    batch, query_heads, num_queries, width = query.shape
    key_heads, num_keys = key.shape[1], key.shape[2]
    if num_queries * num_keys > LONG * LONG:
        key, value = (t.repeat_interleave(query_heads // key_heads, dim=1) for t in (key, value))
        output = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
        return output.transpose(1, 2).contiguous(), None
    scale = width**-0.5 if scaling is None else scaling
    queries = query.reshape(batch, key_heads, -1, width)
    if torch.is_grad_enabled():
        scores = (_Scores.apply(queries, key) * scale).view(batch, query_heads, num_queries, num_keys)
        scores = scores if attention_mask is None else scores + attention_mask
    else:  # scaled within the product and masked in place: no further pass over memory
        unused = queries.new_empty(())
        scores = torch.baddbmm(unused, queries.flatten(0, 1), key.flatten(0, 1).mT, beta=0, alpha=scale)
        scores = scores.view(batch, query_heads, num_queries, num_keys)
        scores = scores if attention_mask is None else scores.add_(attention_mask)
    weights = functional.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    output = weights.view(batch, key_heads, -1, num_keys) @ value
    return output.view(batch, query_heads, num_queries, -1).transpose(1, 2).contiguous(), weights


def attention_mask(allowed: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """A 4-D mask ``[B, 1, q, k]`` from bool ``[B, q, k]`` in the format of an attention implementation.

    sdpa takes a bool mask; eager and grouped take only an additive mask.
    """
    if implementation in ("eager", "grouped"):
        blocked = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return blocked.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
    if implementation == "sdpa":
        return allowed[:, None]
    raise XFusionError(f"attention {implementation!r} is not supported for mixed sequences: use 'sdpa' or 'eager'")


def narrow_mlp(layer: nn.Module, config: Any, width: int) -> None:
    """Keep the first ``width`` hidden units of a layer's MLP: first rows of gate and up, first columns of down.

    Raises:
        XFusionError: the MLP does not consist of plain matrices (for example a mixture of experts), or is narrower.
    """
    hidden_size = config.hidden_size
    # Attention projections may have the same shapes; every attention module of transformers has a ``layer_idx``.
    attention_modules = [m for m in layer.modules() if m is not layer and hasattr(m, "layer_idx")]
    attention_parts = {id(m) for module in attention_modules for m in module.modules()}
    matrices = [m for m in layer.modules() if _is_linear(m) and id(m) not in attention_parts]
    # Read the number of hidden units from the matrix that maps back to the model width: the config may not state it.
    widths = {inputs for inputs, outputs in map(linear_shape, matrices) if outputs == hidden_size != inputs}
    if len(widths) != 1 or any(p.dim() > 2 for p in layer.parameters()):
        raise XFusionError(
            f"{type(layer).__name__}: its MLP is not made of plain Linear layers of one width; leave mlp at None"
        )
    full_width = widths.pop()
    if not 0 < width <= full_width:
        raise XFusionError(
            f"MLP width {width} is not within 1 to {full_width}, the base's own: name one (--model.fusion.mlp), or None for all"
        )
    for matrix in matrices:
        inputs, outputs = linear_shape(matrix)
        if inputs == hidden_size and outputs in (full_width, 2 * full_width):
            _select_units(matrix, torch.arange(outputs).view(-1, full_width)[:, :width].reshape(-1), outputs=True)
        elif (inputs, outputs) == (full_width, hidden_size):
            _select_units(matrix, torch.arange(width), outputs=False)


def _select_units(matrix: nn.Module, units: Tensor, *, outputs: bool) -> None:
    """Cut a linear layer in place to some of its outputs (with their biases) or inputs."""
    is_linear, bias = isinstance(matrix, nn.Linear), matrix.bias
    units = units.to(matrix.get_parameter("weight").device)
    matrix.weight = nn.Parameter(matrix.get_parameter("weight").data.index_select(int(outputs != is_linear), units))
    if outputs and isinstance(bias, Tensor):
        matrix.bias = nn.Parameter(bias.data[units])
    size_names = ("in_features", "out_features") if is_linear else ("nx", "nf")
    setattr(matrix, size_names[outputs], len(units))


class Projected(nn.Module):
    """A decoder layer of another width between two projections, added as a residual to the states ``[B, n, D]``:

        h = x + P_out (F(P_in x) - P_in x)

    Row ``j`` of P_in ``[W, D]`` is initialized to the unit vector of feature ``j mod D``: a wider layer reads every feature
    at least once, a narrower one the first ``W``. P_out ``[D, W]`` starts as its transpose, where a feature that was read
    ``r`` times gets the mean of its ``r`` copies, times ``scale``. What a fresh layer adds does not depend on the magnitude
    of its normed input, so with a scale that is small relative to the states the module starts near the identity.

    Args:
        layer: a decoder layer of width W.
        width: D, the width of the states.
        inner: W.
        scale: initial share of the layer's change that is added back.
    """

    def __init__(self, layer: nn.Module, width: int, inner: int, scale: float):
        super().__init__()
        self.layer = layer
        device = next(layer.parameters()).device
        self.into = nn.Linear(width, inner, bias=False, device=device)
        self.out = nn.Linear(inner, width, bias=False, device=device)
        selection = torch.zeros(inner, width, device=device)
        unit_rows = torch.arange(inner, device=device)
        selection[unit_rows, unit_rows % width] = 1.0
        with torch.no_grad():
            self.into.weight.copy_(selection)
            self.out.weight.copy_(scale * (selection / selection.sum(0).clamp(min=1)).t())

    def forward(self, x: Tensor, past_key_values: Any = None, **call: Any) -> Tensor:
        """``[B, n, D]`` -> ``[B, n, D]``; keys and values are those of the inner layer."""
        inner = self.into(x)
        output = self.layer(inner, **call, **{_cache_name(self.layer): past_key_values})
        return x + self.out((output[0] if isinstance(output, tuple) else output) - inner)


class Delta(nn.Module):
    """A new module that modifies what a frozen one computes; `assembled` binds the two without owning the frozen one."""

    def forward(self, frozen: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The replacement for ``frozen(*args, **kwargs)``."""
        raise NotImplementedError(type(self).__name__)

    def bind(self, frozen: nn.Module) -> nn.Module:
        """The two as one module, for use in an assembled layer."""
        return _BoundDelta(self, frozen)


class _BoundDelta(nn.Module):
    def __init__(self, delta: Delta, frozen: nn.Module):
        super().__init__()
        self.delta, self.frozen = delta, frozen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.delta(self.frozen, *args, **kwargs)


def assembled(layer: nn.Module, parts: Mapping[str, nn.Module]) -> Any:
    """A shadow of a layer with some submodules replaced; it shares the rest with the layer, which is not changed.

    Args:
        layer: a decoder layer.
        parts: path of a submodule (``self_attn.q_proj``) -> its replacement. A `Delta` is bound to the layer's own
            submodule.
    """
    result, shadows = shadow(layer), {}
    for path, part in parts.items():
        *parents, name = path.split(".")
        module, prefix = result, ""
        for child in parents:
            prefix += f"{child}."
            if prefix not in shadows:
                shadows[prefix] = module._modules[child] = shadow(module._modules[child])
            module = shadows[prefix]
        original = module._modules[name]
        module._modules[name] = part.bind(original) if isinstance(part, Delta) else part
    return result


@dataclass(frozen=True)
class Piece:
    """A submodule of a layer, or some of its output rows."""

    path: str
    rows: Tensor | None = None
    """Output features, int64, if the submodule combines several roles in one matrix; None means all of it."""


_SPLIT = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "q_norm": "query", "k_norm": "key"}
_FUSED = ("qkv_proj", "query_key_value", "c_attn")
_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")


def attention_path(layer: nn.Module) -> str:
    """Name of a layer's attention: the child with a ``layer_idx``, which every cache needs."""
    for name, child in layer.named_children():
        if hasattr(child, "layer_idx"):
            return name
    raise XFusionError(f"{type(layer).__name__}: no child is an attention with a number")


def _norms_and_others(layer: nn.Module) -> tuple[list[str], list[str]]:
    """Names of a layer's norms and of its other children except attention, even if deltas are bound to some of them."""
    norms: list[str] = []
    others: list[str] = []
    attention_name = attention_path(layer)
    for name, child in layer.named_children():
        child = child.frozen if isinstance(child, _BoundDelta) else child
        if name != attention_name and not isinstance(child, (nn.Dropout, nn.Identity)):
            (norms if "Norm" in type(child).__name__ else others).append(name)
    return norms, others


def layer_pieces(layer: nn.Module) -> dict[str, list[Piece]]:
    """The parts of a layer by role: ``norm``, ``query``, ``key``, ``value``, ``output``, ``mlp``.

    Query and key norms count as query and key. If one matrix makes queries, keys and values, a role is some of its rows.

    Raises:
        XFusionError: the attention has an unknown projection.
    """
    by_role: dict[str, list[Piece]] = {r: [] for r in ("norm", "query", "key", "value", "output", "mlp")}
    attention_name = attention_path(layer)
    norms, others = _norms_and_others(layer)
    by_role["norm"], by_role["mlp"] = [Piece(name) for name in norms], [Piece(name) for name in others]
    attention: Any = layer.get_submodule(attention_name)
    for name, child in attention.named_children():
        path = f"{attention_name}.{name}"
        if name in _SPLIT:
            by_role[_SPLIT[name]].append(Piece(path))
        elif name in _OUTPUT:
            by_role["output"].append(Piece(path))
        elif name in _FUSED and hasattr(attention, "config"):
            width = attention.head_dim if hasattr(attention, "head_dim") else attention.head_size
            num_outputs, role_rows = linear_shape(child)[1], {}
            if name == "query_key_value":  # per head: queries, keys, values
                heads = attention.config.num_attention_heads
                if num_outputs != 3 * heads * width:
                    raise XFusionError(
                        f"{type(attention).__name__}.{name}: {num_outputs} outputs are not queries, keys and values of"
                        f" {heads} heads of {width}, {3 * heads * width} in all: its heads share keys, and xfusion cannot"
                        " take it apart; take a mechanism that copies whole layers"
                    )
                rows = torch.arange(num_outputs).view(-1, 3, width)
                role_rows = {role: rows[:, i].reshape(-1) for i, role in enumerate(("query", "key", "value"))}
            else:
                config = attention.config
                key_width = width * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
                row_groups = torch.arange(num_outputs).split([num_outputs - 2 * key_width, key_width, key_width])
                role_rows = dict(zip(("query", "key", "value"), row_groups, strict=True))
            for role, rows in role_rows.items():
                by_role[role].append(Piece(path, rows))
        elif any(True for _ in child.parameters()):
            raise XFusionError(f"{type(attention).__name__}.{name}: a projection that xfusion cannot take apart")
    return by_role


def mlp_path(layer: nn.Module) -> str:
    """Name of a layer's MLP.

    Raises:
        XFusionError: it has none, or several.
    """
    paths = _norms_and_others(layer)[1]
    if len(paths) != 1:
        raise XFusionError(f"{type(layer).__name__}: parts {paths} are no single MLP")
    return paths[0]


def branch_output_norms(layer: nn.Module) -> tuple[str | None, str | None]:
    """Names of the norms applied to the outputs of attention and MLP before they are added to the residual stream; None if
    a branch has none, as in most families.
    """
    norms = _norms_and_others(layer)[0]
    mlp_norm = next((name for name in ("post_feedforward_layernorm", "post_mlp_layernorm") if name in norms), None)
    if mlp_norm is None:  # then a `post_attention_layernorm` is applied before the MLP
        return None, None
    attention_norms = ("post_self_attn_layernorm", "post_attention_layernorm")
    return next((name for name in attention_norms if name in norms), None), mlp_norm


def post_norm_parts(layer: nn.Module, parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Parts of a layer converted to post-norm, ``h = x + norm(attention(x))``, ``y = h + norm(MLP(h))``: each norm before
    a branch moves after it; if a family already has norms after its branches, those before them are removed.

    Args:
        layer: a layer of the family.
        parts: all norms, the attention's output projection and the MLP, by path; may include other parts.

    Raises:
        XFusionError: the layer does not have a norm for each branch, or its branches run in parallel.
    """
    norms, output_norms = _norms_and_others(layer)[0], branch_output_norms(layer)
    input_norms = [name for name in norms if name not in output_norms]
    moved_norms = [name for name, output_norm in zip(input_norms, output_norms, strict=False) if output_norm is None]
    if getattr(layer, "use_parallel_residual", False) or len(moved_norms) + len(norms) - len(input_norms) != 2:
        raise XFusionError(f"{type(layer).__name__}: norms {norms} are not one for each of two branches in turn")
    (attention_output,) = (piece.path for piece in layer_pieces(layer)["output"])
    new_parts = dict(parts) | {name: nn.Identity() for name in input_norms}
    for name, last_module in zip(moved_norms, (attention_output, mlp_path(layer)), strict=False):
        new_parts[last_module] = nn.Sequential(parts[last_module], parts[name])
    return new_parts


class Modulated(Delta):
    """A branch of a layer modulated by a condition: ``(1 + gate) f((1 + scale) x + shift)``, each ``[B, n, D]`` or None."""

    def __init__(self, shift: Tensor | None, scale: Tensor | None, gate: Tensor | None):
        super().__init__()
        self.shift, self.scale, self.gate = shift, scale, gate

    def forward(self, frozen: nn.Module, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """The branch's output: states ``[B, n, D]``, or a tuple that starts with them."""
        x, other_args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if self.scale is not None and self.shift is not None:
            x = x * (1 + self.scale) + self.shift
        output = frozen(x, *other_args, **kwargs)
        if self.gate is None:
            return output
        if isinstance(output, tuple):
            return ((1 + self.gate) * output[0], *output[1:])
        return (1 + self.gate) * output


def modulated(layer: nn.Module, modulation: Tensor) -> Any:
    """A shadow of a layer whose branches are modulated by a condition (DiT's adaptive layer norm, arXiv 2212.09748, figure 3):

        h = x + (1 + g_1) attention((1 + s_1) norm(x) + b_1)        y = h + (1 + g_2) MLP((1 + s_2) norm(h) + b_2)

    Whatever a family applies after a branch, including norms, counts as part of it, so gates scale what is added to the
    residual stream. Zeros leave the layer unchanged. For a `Projected` layer the inner layer is modulated.

    Args:
        layer: a decoder layer.
        modulation: ``[B, n, 6, W]``: b_1, s_1, g_1, b_2, s_2, g_2 of each row; W is the layer's own model width.
    """
    if isinstance(layer, Projected):
        return assembled(layer, {"layer": modulated(layer.layer, modulation)})
    parts: dict[str, nn.Module] = {}
    branches = (attention_path(layer), mlp_path(layer))
    for branch, output_norm, branch_modulation in zip(
        branches, branch_output_norms(layer), modulation.split(3, dim=-2), strict=True
    ):
        shift, scale, gate = branch_modulation.unbind(-2)
        parts[branch] = Modulated(shift, scale, gate if output_norm is None else None)
        if output_norm is not None:
            parts[output_norm] = Modulated(None, None, gate)
    return assembled(layer, parts)


def matrix_pieces(layer: nn.Module) -> dict[str, Piece]:
    """The matrices of a layer by role: ``query``, ``key``, ``value``, ``output``, and for its MLP ``in`` and ``out``.

    In a gated MLP (SwiGLU), ``in`` is the projection that the gate multiplies; the gate itself has no role. A role for which
    the layer has no matrix, or none that xfusion recognises, is left out.
    """
    by_role: dict[str, Piece] = {}
    for role, pieces in layer_pieces(layer).items():
        matrices = [piece for piece in pieces if _is_linear(layer.get_submodule(piece.path))]
        if role in ("query", "key", "value", "output") and len(matrices) == 1:
            by_role[role] = matrices[0]
    attention_name = attention_path(layer)
    for path in linear_paths(layer):
        name = path.rpartition(".")[2]
        if path.startswith(f"{attention_name}."):
            continue
        if name in ("up_proj", "c_fc", "dense_h_to_4h"):
            by_role["in"] = Piece(path)
        elif name == "gate_up_proj":
            num_outputs = linear_shape(layer.get_submodule(path))[1]
            by_role["in"] = Piece(path, torch.arange(num_outputs // 2, num_outputs))
        elif name in ("down_proj", "c_proj", "dense_4h_to_h"):
            by_role["out"] = Piece(path)
    return by_role


def linear_paths(layer: nn.Module) -> list[str]:
    """Paths of all matrices of a layer."""
    return [path for path, module in layer.named_modules() if path and _is_linear(module)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Number of inputs and outputs of a linear layer; GPT-2's Conv1D stores its weight transposed."""
    shape = module.get_parameter("weight").shape
    return (shape[1], shape[0]) if isinstance(module, nn.Linear) else (shape[0], shape[1])


def linear_weight(module: nn.Module) -> Tensor:
    """The matrix ``[out, in]`` of a linear layer."""
    weight = module.get_parameter("weight")
    return weight if isinstance(module, nn.Linear) else weight.t()


class Slot(nn.Module):
    """Replaces one decoder layer in a shadow and forwards the call to ``compute_layer``."""

    def __init__(
        self,
        layer: nn.Module,
        index: int,
        compute_layer: Callable[[int, nn.Module, Tensor, dict[str, Any]], Tensor],
        *,
        in_tuple: bool = False,
    ):
        """``in_tuple`` returns states as the first item of a tuple, as the family's own layers do."""
        super().__init__()
        self.in_tuple = in_tuple
        self.__dict__["layer"] = layer  # not a submodule: the shadow owns no parameters
        self.__dict__["compute_layer"] = compute_layer
        self.index = index
        self.names = list(inspect.signature(type(layer).forward).parameters)[1:]
        for name in ("attention_type", "layer_type"):
            if hasattr(layer, name):
                self.__dict__[name] = getattr(layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        compute_layer: Callable[..., Any] = self.__dict__["compute_layer"]
        output = compute_layer(self.index, self.__dict__["layer"], call.pop("hidden_states"), call)
        return (output,) if self.in_tuple and isinstance(output, Tensor) else output


def shadow(module: nn.Module) -> Any:
    """A shallow copy: same parameters, its own dict of children, no instance-level ``forward``."""
    result = copy.copy(module)
    result._modules = dict(module._modules)
    result.__dict__.pop("forward", None)
    return result
