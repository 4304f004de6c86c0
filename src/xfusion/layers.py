"""Taking the decoder layers of any family apart, and putting them together anew; nothing here imports transformers.

Each layer computes by its own ``forward``; what is ours stands in the place of its cache, of some of its submodules, or of
the whole. A base's own layer is never changed: `narrow_mlp` is for copies.

Shape legend: ``B`` batch row, ``n`` rows of one tower, ``D`` model width, ``W`` another width, ``H`` key heads, ``K`` head
width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xfusion.data.sequence import Rows, XFusionError, never_blind, seen, sees, visible

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one tower at one layer, each ``[B, H, n, K]``, after norm and rotary embedding."""


class _Stop(Exception):
    """Leaves a layer once its keys and values are known."""


class _Grab:
    """Stands where a cache stands; ends the layer at its keys and values."""

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def update(self, k: Tensor, v: Tensor, *_: Any, **__: Any) -> KeysValues:
        self.kv = (k, v)
        raise _Stop


class _Splice:
    """Stands where a cache stands; puts the keys and values of other rows around a layer's own."""

    def __init__(self, before: list[KeysValues], after: list[KeysValues], own: bool = True):
        self.before, self.after, self.with_own = before, after, own

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def update(self, k: Tensor, v: Tensor, *_: Any, **__: Any) -> KeysValues:
        self.own = (k, v)
        pairs = [*self.before, *([self.own] if self.with_own else []), *self.after]
        return torch.cat([kv[0] for kv in pairs], dim=2), torch.cat([kv[1] for kv in pairs], dim=2)


def _arguments(module: nn.Module) -> tuple[str, ...]:
    # A signature takes a quarter of a millisecond to read, in every layer of every denoising step.
    code = inspect.unwrap(type(module).forward).__code__
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _cache_name(layer: nn.Module) -> str:
    return "layer_past" if "layer_past" in _arguments(layer) else "past_key_values"


def takes_cache(module: nn.Module) -> bool:
    """Whether a module takes a cache of keys and values (state-space layers name theirs otherwise)."""
    return not {"past_key_values", "layer_past"}.isdisjoint(_arguments(module))


def slice_call(call: dict[str, Any], rows: slice) -> dict[str, Any]:
    """The per-position arguments of a layer call, cut to some rows of the pass."""
    embeddings, position = call.get("position_embeddings"), call.get("position_ids")
    out: dict[str, Any] = {"position_ids": None if position is None else position[..., rows]}
    if embeddings is not None:
        out["position_embeddings"] = tuple(t[:, rows].contiguous() for t in embeddings)
    return out


def keys_values(layer: nn.Module, x: Tensor, call: dict[str, Any]) -> KeysValues:
    """Keys and values that ``layer`` makes of the states ``x`` ``[B, n, D]``, by the family's own code.

    The query projection of these rows is dead code and vanishes when compiled.
    """
    grab = _Grab()
    try:
        layer(x, attention_mask=None, **call, **{_cache_name(layer): grab})
    except _Stop:
        return grab.kv
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
        mask: ``[B, 1, n, before + n + after]`` in the form that the layer's attention takes (`attention_mask`).
        before: keys and values that stand before the own ones along the key axis.
        after: the same behind them.
        splice_own: False leaves out the keys and values that the layer itself makes of these rows.

    Returns:
        the new states ``[B, n, D]`` and the rows' own keys and values.
    """
    splice = _Splice(before, after, splice_own)
    h = layer(x, attention_mask=mask, **call, **{_cache_name(layer): splice})
    return (h[0] if isinstance(h, tuple) else h), splice.own


BLOCK = 128
"""Queries, and keys, to a block of a block mask."""


def block_mask(query: Rows, key: Rows, window: int | None = None) -> Any:
    """`visible` as FlexAttention takes it (Dong et al. 2024, arXiv 2412.05496): which blocks of `BLOCK` x `BLOCK` pairs hold
    nothing, some or all, and the rule itself for those that hold some.

    What stays is the position tables; the pairs are laid out once, to sort the blocks.

    Args:
        query: tables ``[B, q]``.
        key: tables ``[B, k]``.
        window: a sliding window, as `seen` takes it.

    Returns:
        ``torch.nn.attention.flex_attention.BlockMask`` of shape ``[B, 1, q, k]``.
    """
    from torch.nn.attention.flex_attention import BlockMask

    found = seen(query, key, window)
    blind, found = ~found.any(dim=-1), never_blind(found)
    queries, keys = query.seeing, key.seeing

    def rule(b: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = sees([table[b, i] for table in queries], [table[b, j] for table in keys], window)
        return own | (blind[b, i] & (j == 0))

    pad = (0, -found.shape[2] % BLOCK, 0, -found.shape[1] % BLOCK)
    held = functional.pad(found, pad).unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).sum(dim=(2, 4))
    whole = BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_listed((held > 0) & (held < whole)),
        *_listed(held == whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=rule,
        seq_lengths=(query.count, key.count),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys a block of queries takes, ``[B, 1, rows]``, and which, those first ``[B, 1, rows, columns]``."""
    blocks = blocks[:, None].to(torch.int32)
    return blocks.sum(-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def rows_mask(query: Rows, key: Rows, window: int | None, implementation: str, dtype: torch.dtype) -> Any:
    """Who sees whom in the form that an attention implementation takes: `block_mask`, or `attention_mask` of `visible`."""
    if implementation == "flex_attention":
        return block_mask(query, key, window)
    return attention_mask(visible(query, key, window), implementation, dtype)


class _Scores(torch.autograd.Function):
    """``q @ k^T``, whose gradients lie as q and k do.

    Autograd's own lays that of k out across, and what stands behind it (sums, rotary positions) reads it so.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(q, k)
        return q @ k.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (q, k) = grads, ctx.saved_tensors
        return grad @ k, grad.mT @ q


LONG = 512
"""Queries by keys, each, from which attention by torch's fused kernel is the faster one on a CPU (docs/speed.md)."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as plain products in which the queries of a group stand under their key in one matrix (Ainslie et al. 2023,
    arXiv 2305.13245): keys and values are not copied for every query head, and their gradients need no sum. Scores of long
    rows, beyond `LONG`, do not stay in a processor's cache, so these go through torch's fused kernel, which makes no weights.

    A function as transformers registers them. Nothing is dropped out, and as in its ``eager`` no mask hides nothing.

    Args:
        module: the layer's attention; not read.
        query: ``[B, G H, n, K]``, G of them to a key head.
        key: ``[B, H, k, K]``.
        value: as the keys.
        attention_mask: added to the scores, ``[B, 1, n, k]``, or None.
        scaling: of the scores; None is one over the root of the head's width.
        others: what else a family hands to its attention.

    Returns:
        ``[B, n, G H, K]`` and the weights ``[B, G H, n, k]``, or None where rows are long.

    Raises:
        XFusionError: the family caps scores, adds sinks, or adds a bias by position, which are not known here.
    """
    for unknown in ("softcap", "s_aux", "position_bias"):
        if others.get(unknown) is not None:
            raise XFusionError(f"attention 'grouped' knows no {unknown}, which {type(module).__name__} has: take eager")
    batch, heads, rows, width = query.shape
    own, keys = key.shape[1], key.shape[2]
    if rows * keys > LONG * LONG:
        key, value = (t.repeat_interleave(heads // own, dim=1) for t in (key, value))
        read = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
        return read.transpose(1, 2).contiguous(), None
    scores = _Scores.apply(query.reshape(batch, own, -1, width), key) * (width**-0.5 if scaling is None else scaling)
    scores = scores.view(batch, heads, rows, keys)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = functional.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    read = weights.view(batch, own, -1, keys) @ value
    return read.view(batch, heads, rows, -1).transpose(1, 2).contiguous(), weights


def attention_mask(found: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """A 4-D mask ``[B, 1, q, k]`` from bool ``[B, q, k]`` in the form that an attention implementation takes.

    sdpa takes bool; eager and grouped add the mask to the scores and take nothing else.
    """
    if implementation in ("eager", "grouped"):
        blocked = torch.zeros(found.shape, dtype=dtype, device=found.device)
        return blocked.masked_fill(~found, torch.finfo(dtype).min)[:, None]
    if implementation == "sdpa":
        return found[:, None]
    raise XFusionError(f"attention {implementation!r} is not supported for mixed sequences: use 'sdpa' or 'eager'")


def narrow_mlp(layer: nn.Module, config: Any, width: int) -> None:
    """Keep the first ``width`` hidden units of a layer's MLP: first rows of gate and up, first columns of down.

    Raises:
        XFusionError: the MLP is not made of plain matrices (a mixture of experts, say), or is not that wide.
    """
    size = config.hidden_size
    # Projections of attention may have the same shapes; every attention of transformers carries its layer's number.
    inner = [m for m in layer.modules() if m is not layer and hasattr(m, "layer_idx")]
    attention = {id(m) for module in inner for m in module.modules()}
    matrices = [m for m in layer.modules() if _is_linear(m) and id(m) not in attention]
    # The matrix that comes back to the model's width tells how many units there are: a configuration may not.
    widths = {wide for wide, out in map(linear_shape, matrices) if out == size != wide}
    if len(widths) != 1 or any(p.dim() > 2 for p in layer.parameters()):
        raise XFusionError(
            f"{type(layer).__name__}: its MLP is not made of plain Linear layers of one width; leave mlp at None"
        )
    full = widths.pop()
    if not 0 < width <= full:
        raise XFusionError(f"MLP width {width} is not within 1 to {full}, the base's own")
    for matrix in matrices:
        wide, out = linear_shape(matrix)
        if wide == size and out in (full, 2 * full):
            _keep(matrix, torch.arange(out).view(-1, full)[:, :width].reshape(-1), outputs=True)
        elif (wide, out) == (full, size):
            _keep(matrix, torch.arange(width), outputs=False)


def _keep(matrix: nn.Module, units: Tensor, *, outputs: bool) -> None:
    """Cut a linear layer, in place, to some of its outputs (with their bias) or inputs."""
    linear, bias = isinstance(matrix, nn.Linear), matrix.bias
    units = units.to(matrix.get_parameter("weight").device)
    matrix.weight = nn.Parameter(matrix.get_parameter("weight").data.index_select(int(outputs != linear), units))
    if outputs and isinstance(bias, Tensor):
        matrix.bias = nn.Parameter(bias.data[units])
    names = ("in_features", "out_features") if linear else ("nx", "nf")
    setattr(matrix, names[outputs], len(units))


class Projected(nn.Module):
    """A decoder layer of another width between two projections, as a residual of the states ``[B, n, D]``:

        h = x + P_out (F(P_in x) - P_in x)

    Row ``j`` of P_in ``[W, D]`` is at the start the unit vector of feature ``j mod D``: a wider layer reads every feature
    at least once, a narrower one the first ``W``. P_out ``[D, W]`` is its transpose, in which a feature that was read
    ``r`` times takes the mean of its ``r`` copies, times ``scale``. What a fresh layer adds does not depend on how large
    its normed input was; with a scale that is small beside the states the whole starts near the identity.

    Args:
        layer: a decoder layer of width W.
        width: the states' D.
        inner: W.
        scale: share of the layer's change that comes back at the start.
    """

    def __init__(self, layer: nn.Module, width: int, inner: int, scale: float):
        super().__init__()
        self.layer = layer
        device = next(layer.parameters()).device
        self.into = nn.Linear(width, inner, bias=False, device=device)
        self.out = nn.Linear(inner, width, bias=False, device=device)
        read = torch.zeros(inner, width, device=device)
        rows = torch.arange(inner, device=device)
        read[rows, rows % width] = 1.0
        with torch.no_grad():
            self.into.weight.copy_(read)
            self.out.weight.copy_(scale * (read / read.sum(0).clamp(min=1)).t())

    def forward(self, x: Tensor, past_key_values: Any = None, **call: Any) -> Tensor:
        """``[B, n, D]`` -> ``[B, n, D]``; keys and values are the inner layer's."""
        inner = self.into(x)
        h = self.layer(inner, **call, **{_cache_name(self.layer): past_key_values})
        return x + self.out((h[0] if isinstance(h, tuple) else h) - inner)


class Delta(nn.Module):
    """A new module that works on what a frozen one makes; `assembled` binds the two without owning the frozen one."""

    def forward(self, frozen: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What stands in the place of ``frozen(*args, **kwargs)``."""
        raise NotImplementedError(type(self).__name__)

    def bound(self, frozen: nn.Module) -> nn.Module:
        """The two as one module, for a layer that is put together."""
        return _Bound(self, frozen)


class _Bound(nn.Module):
    def __init__(self, delta: Delta, frozen: nn.Module):
        super().__init__()
        self.delta, self.frozen = delta, frozen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.delta(self.frozen, *args, **kwargs)


def assembled(layer: nn.Module, parts: Mapping[str, nn.Module]) -> Any:
    """A shadow of a layer in which some submodules are others; all the rest is the layer's own, and it is not changed.

    Args:
        layer: a decoder layer.
        parts: path of a submodule (``self_attn.q_proj``) -> what stands in its place. A `Delta` is bound to the layer's
            own submodule.
    """
    out, shadows = shadow(layer), {}
    for path, part in parts.items():
        *above, name = path.split(".")
        module, seen = out, ""
        for step in above:
            seen += f"{step}."
            if seen not in shadows:
                shadows[seen] = module._modules[step] = shadow(module._modules[step])
            module = shadows[seen]
        old = module._modules[name]
        module._modules[name] = part.bound(old) if isinstance(part, Delta) else part
    return out


@dataclass(frozen=True)
class Piece:
    """A submodule of a layer, or some output rows of one."""

    path: str
    rows: Tensor | None = None
    """Output features, int64, where the submodule holds several roles in one matrix; None is all of it."""


_SPLIT = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "q_norm": "query", "k_norm": "key"}
_FUSED = ("qkv_proj", "query_key_value", "c_attn")
_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")


def attention_path(layer: nn.Module) -> str:
    """Name of a layer's attention: the child that carries the layer's number, as every cache needs."""
    for name, child in layer.named_children():
        if hasattr(child, "layer_idx"):
            return name
    raise XFusionError(f"{type(layer).__name__}: no child is an attention with a number")


def _beside_attention(layer: nn.Module) -> tuple[list[str], list[str]]:
    """Names of a layer's norms and of what else stands beside its attention, also where deltas work on some of them."""
    norms: list[str] = []
    others: list[str] = []
    inside = attention_path(layer)
    for name, child in layer.named_children():
        child = child.frozen if isinstance(child, _Bound) else child
        if name != inside and not isinstance(child, (nn.Dropout, nn.Identity)):
            (norms if "Norm" in type(child).__name__ else others).append(name)
    return norms, others


def layer_pieces(layer: nn.Module) -> dict[str, list[Piece]]:
    """The parts of a layer by role: ``norm``, ``query``, ``key``, ``value``, ``output``, ``mlp``.

    Norms of queries and keys go with these. Where one matrix makes queries, keys and values, a role is some of its rows.

    Raises:
        XFusionError: the attention has a projection that is not known.
    """
    found: dict[str, list[Piece]] = {r: [] for r in ("norm", "query", "key", "value", "output", "mlp")}
    inside = attention_path(layer)
    norms, others = _beside_attention(layer)
    found["norm"], found["mlp"] = [Piece(name) for name in norms], [Piece(name) for name in others]
    attention: Any = layer.get_submodule(inside)
    for name, child in attention.named_children():
        path = f"{inside}.{name}"
        if name in _SPLIT:
            found[_SPLIT[name]].append(Piece(path))
        elif name in _OUTPUT:
            found["output"].append(Piece(path))
        elif name in _FUSED:
            width = attention.head_dim if hasattr(attention, "head_dim") else attention.head_size
            total, out = linear_shape(child)[1], {}
            if name == "query_key_value":  # per head: queries, keys, values
                heads = attention.config.num_attention_heads
                if total != 3 * heads * width:
                    raise XFusionError(
                        f"{type(attention).__name__}.{name}: {total} outputs are not queries, keys and values of {heads} heads of"
                        f" {width}, {3 * heads * width} in all: its heads share keys, and xfusion cannot take it apart; take a"
                        " mechanism that copies whole layers"
                    )
                rows = torch.arange(total).view(-1, 3, width)
                out = {role: rows[:, i].reshape(-1) for i, role in enumerate(("query", "key", "value"))}
            else:
                config = attention.config
                keys = width * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
                parts = torch.arange(total).split([total - 2 * keys, keys, keys])
                out = dict(zip(("query", "key", "value"), parts, strict=True))
            for role, rows in out.items():
                found[role].append(Piece(path, rows))
        elif any(True for _ in child.parameters()):
            raise XFusionError(f"{type(attention).__name__}.{name}: a projection that xfusion cannot take apart")
    return found


def mlp_path(layer: nn.Module) -> str:
    """Name of a layer's MLP.

    Raises:
        XFusionError: it has none, or several.
    """
    paths = _beside_attention(layer)[1]
    if len(paths) != 1:
        raise XFusionError(f"{type(layer).__name__}: parts {paths} are no single MLP")
    return paths[0]


def norms_behind(layer: nn.Module) -> tuple[str | None, str | None]:
    """Names of the norms through which the attention's and the MLP's outputs pass before they are added to the states;
    None where a branch has none, as most families.
    """
    norms = _beside_attention(layer)[0]
    of_mlp = next((name for name in ("post_feedforward_layernorm", "post_mlp_layernorm") if name in norms), None)
    if of_mlp is None:  # then a `post_attention_layernorm` stands before the MLP
        return None, None
    of_attention = ("post_self_attn_layernorm", "post_attention_layernorm")
    return next((name for name in of_attention if name in norms), None), of_mlp


def post_normed(layer: nn.Module, parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Parts of a layer with their norms behind the branches, ``h = x + norm(attention(x))``, ``y = h + norm(MLP(h))``:
    each norm before a branch goes behind it; where a family has norms behind its branches, those before are left out.

    Args:
        layer: of the family.
        parts: all norms, the attention's output and the MLP, by path, with other parts or without.

    Raises:
        XFusionError: the layer does not have a norm for each branch, or its branches stand beside each other.
    """
    norms, behind = _beside_attention(layer)[0], norms_behind(layer)
    before = [name for name in norms if name not in behind]
    moved = [name for name, other in zip(before, behind, strict=False) if other is None]
    if getattr(layer, "use_parallel_residual", False) or len(moved) + len(norms) - len(before) != 2:
        raise XFusionError(f"{type(layer).__name__}: norms {norms} are not one for each of two branches in turn")
    (output,) = (piece.path for piece in layer_pieces(layer)["output"])
    new = dict(parts) | {name: nn.Identity() for name in before}
    for name, end in zip(moved, (output, mlp_path(layer)), strict=False):
        new[end] = nn.Sequential(parts[end], parts[name])
    return new


class Modulated(Delta):
    """A branch of a layer as a condition changes it: ``(1 + gate) f((1 + scale) x + shift)``, each ``[B, n, D]`` or None."""

    def __init__(self, shift: Tensor | None, scale: Tensor | None, gate: Tensor | None):
        super().__init__()
        self.shift, self.scale, self.gate = shift, scale, gate

    def forward(self, frozen: nn.Module, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """The branch's own answer, of which the first part, or all, is states ``[B, n, D]``."""
        x, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if self.scale is not None and self.shift is not None:
            x = x * (1 + self.scale) + self.shift
        out = frozen(x, *rest, **kwargs)
        if self.gate is None:
            return out
        if isinstance(out, tuple):
            return ((1 + self.gate) * out[0], *out[1:])
        return (1 + self.gate) * out


def modulated(layer: nn.Module, by: Tensor) -> Any:
    """A shadow of a layer whose branches a condition changes (adaptive layer norm of DiT, arXiv 2212.09748, figure 3):

        h = x + (1 + g_1) attention((1 + s_1) norm(x) + b_1)        y = h + (1 + g_2) MLP((1 + s_2) norm(h) + b_2)

    All that the families put behind a branch, norms too, is part of it, so that gates stand on what is added. Zeros leave
    the layer as it is. Of a layer between projections (`Projected`) the inner one is changed.

    Args:
        layer: a decoder layer.
        by: ``[B, n, 6, W]``, b_1, s_1, g_1, b_2, s_2, g_2 of each row, W the layer's own model width.
    """
    if isinstance(layer, Projected):
        return assembled(layer, {"layer": modulated(layer.layer, by)})
    parts: dict[str, nn.Module] = {}
    branches = (attention_path(layer), mlp_path(layer))
    for branch, behind, own in zip(branches, norms_behind(layer), by.split(3, dim=-2), strict=True):
        shift, scale, gate = own.unbind(-2)
        parts[branch] = Modulated(shift, scale, gate if behind is None else None)
        if behind is not None:
            parts[behind] = Modulated(None, None, gate)
    return assembled(layer, parts)


def matrix_pieces(layer: nn.Module) -> dict[str, Piece]:
    """The matrices of a layer by role: ``query``, ``key``, ``value``, ``output``, and of its MLP ``in`` and ``out``.

    Of a gated MLP (SwiGLU), ``in`` is what the gate multiplies; the gate itself has no role. A role that the layer does
    not have as a matrix, or that xfusion does not recognise, is left out.
    """
    found: dict[str, Piece] = {}
    for role, pieces in layer_pieces(layer).items():
        matrices = [piece for piece in pieces if _is_linear(layer.get_submodule(piece.path))]
        if role in ("query", "key", "value", "output") and len(matrices) == 1:
            found[role] = matrices[0]
    inside = attention_path(layer)
    for path in linear_paths(layer):
        name = path.rpartition(".")[2]
        if path.startswith(f"{inside}."):
            continue
        if name in ("up_proj", "c_fc", "dense_h_to_4h"):
            found["in"] = Piece(path)
        elif name == "gate_up_proj":
            total = linear_shape(layer.get_submodule(path))[1]
            found["in"] = Piece(path, torch.arange(total // 2, total))
        elif name in ("down_proj", "c_proj", "dense_4h_to_h"):
            found["out"] = Piece(path)
    return found


def linear_paths(layer: nn.Module) -> list[str]:
    """Paths of all matrices of a layer."""
    return [path for path, module in layer.named_modules() if path and _is_linear(module)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a matrix; GPT-2's Conv1D lies the other way round."""
    shape = module.get_parameter("weight").shape
    return (shape[1], shape[0]) if isinstance(module, nn.Linear) else (shape[0], shape[1])


def linear_weight(module: nn.Module) -> Tensor:
    """The matrix ``[out, in]`` of a linear layer."""
    weight = module.get_parameter("weight")
    return weight if isinstance(module, nn.Linear) else weight.t()


class Slot(nn.Module):
    """Takes the place of one decoder layer in a shadow and hands the call to whoever drives."""

    def __init__(self, layer: nn.Module, index: int, act: Callable[[int, nn.Module, Tensor, dict[str, Any]], Tensor]):
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: the shadow owns no parameters
        self.__dict__["act"] = act
        self.index = index
        self.names = list(inspect.signature(type(layer).forward).parameters)[1:]
        for name in ("attention_type", "layer_type"):
            if hasattr(layer, name):
                self.__dict__[name] = getattr(layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        act: Callable[..., Tensor] = self.__dict__["act"]
        return act(self.index, self.__dict__["layer"], call.pop("hidden_states"), call)


def shadow(module: nn.Module) -> Any:
    """A shallow copy: the same parameters, its own table of children, no instance-level forward."""
    out = copy.copy(module)
    out._modules = dict(module._modules)
    out.__dict__.pop("forward", None)
    return out
