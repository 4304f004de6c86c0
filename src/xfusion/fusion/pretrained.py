"""What a tower takes over from a pretrained diffusion transformer (X-Fusion, arXiv 2504.20996, section 5).

The paper joins a language model and an in-house diffusion transformer. Its blocks are modulated by noise level and read
words by cross-attention; a tower's blocks are decoder layers of the base's family, whose noise level is in the states and
whose words are in the sequence. So only these matrices go over, each where its shape fits:

==============================  ===============================================================
diffusers' block                decoder layer
==============================  ===============================================================
attn1 / attn: to_q, to_k, to_v  queries, keys, values (rows of one matrix where the family has one)
attn1 / attn: to_out.0          output of attention
ff: net.0.proj, net.2           into the MLP (SwiGLU: what the gate multiplies), out of the MLP
==============================  ===============================================================

Biases go with their matrix where the layer has one too, else they are left. Left are norms and their modulation, the
attention to words (attn2, add_q_proj ...), norms of queries and keys, patches, positions, classes, the head; and of the
layer its norms and the gate of SwiGLU, which stay fresh. A gated feed-forward (GEGLU) does not fit and is left.

Rotary positions are new to such a block, and so is causal attention to words: this is a beginning for training, not a
function that is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xfusion.backbone import Backbone
from xfusion.data.sequence import XFusionError
from xfusion.layers import Piece, linear_weight, matrix_pieces

_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "output": "to_out.0"}
_FEED_FORWARD = {"in": "ff.net.0.proj", "out": "ff.net.2"}


def load(source: str, revision: str | None = None) -> list[nn.Module]:
    """The blocks of a transformer that diffusers reads, from safetensors only.

    Args:
        source: a folder or hub id of a model, or of a pipeline, whose folder ``transformer`` is then taken.
        revision: hub revision; only for hub ids.

    Raises:
        XFusionError: there is none, its weights are not all there, or it has no blocks with attention.
    """
    import diffusers
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.models.modeling_utils import ModelMixin

    class Settings(ConfigMixin):
        config_name = "config.json"

    read: Any = Settings.load_config
    settings: dict[str, Any] = {}
    where: dict[str, Any] = {}
    reasons: list[str] = []
    for where in ({"revision": revision}, {"revision": revision, "subfolder": "transformer"}):
        try:
            settings = read(source, **where)
            break
        except (OSError, ValueError) as error:
            reasons.append(_line(error))
    if not settings:
        raise XFusionError(f"start {source!r} is no folder or hub id of a diffusers transformer: {reasons[0]}")
    kind: Any = getattr(diffusers, str(settings.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise XFusionError(f"start {source!r} is of class {settings.get('_class_name')}: diffusers has no such model")
    try:
        model, report = kind.from_pretrained(source, use_safetensors=True, output_loading_info=True, **where)  # type: ignore[misc]
    except (OSError, ValueError, RuntimeError) as error:
        raise XFusionError(f"start {source!r} cannot be loaded as {kind.__name__}: {_line(error)}") from error
    absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if absent:
        raise XFusionError(
            f"start {source!r} is not a whole {kind.__name__}: {len(absent)} weights are not there ({absent[0]})"
        )
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) and all(_attention(block) for block in child):
            return list(child)
    raise XFusionError(f"start {source!r}: {kind.__name__} has no list of blocks with to_q, to_k, to_v and to_out")


def _line(error: BaseException) -> str:
    return " ".join((str(error).strip() or type(error).__name__).split())[:300]


def _attention(block: nn.Module) -> str | None:
    """Name of the first attention of a block, which is its attention to itself."""
    wanted = ("to_q", "to_k", "to_v", "to_out")
    return next((n for n, m in block.named_children() if all(hasattr(m, w) for w in wanted)), None)


def check(blocks: list[nn.Module], source: str, width: int, backbone: Backbone) -> None:
    """Raise where a tower of ``width`` on a base cannot take anything from these blocks.

    Raises:
        XFusionError: the width or the heads are others.
    """
    attention: Any = blocks[0].get_submodule(_attention(blocks[0]) or "")
    outputs, inputs = attention.to_q.weight.shape
    head = outputs // attention.heads
    if head != backbone.head_width:
        raise XFusionError(
            f"start {source!r}: its heads are {head} wide, those of {backbone.source}, whose rotary tables they would"
            f" take, {backbone.head_width}: choose another transformer or another base"
        )
    if inputs != width:
        raise XFusionError(f"start {source!r}: its blocks are {inputs} wide, the tower {width}: set width to {inputs}")


def choose(source: int, tower: int) -> list[int]:
    """Which block each of a tower's takes from: the k-th takes number round(k source / tower).

    Args:
        source: number of the source's blocks.
        tower: number of the tower's.
    """
    return [min(round(k * source / tower), source - 1) for k in range(tower)]


@torch.no_grad()
def take(layer: nn.Module, block: nn.Module) -> dict[str, str]:
    """Copy what fits of a diffusion transformer's block into a decoder layer, in place.

    Args:
        layer: the tower's, of any family.
        block: diffusers'.

    Returns:
        what was copied: parameter of the layer (with the role, where a matrix holds several) -> parameter of the block.
    """
    attention, given = _attention(block), dict(block.named_parameters())
    names = {role: f"{attention}.{name}" for role, name in _ATTENTION.items()} | _FEED_FORWARD
    done: dict[str, str] = {}
    for role, piece in matrix_pieces(layer).items():
        matrix, name = layer.get_submodule(piece.path), names[role]
        own, other = linear_weight(matrix), given.get(f"{name}.weight")
        rows = slice(None) if piece.rows is None else piece.rows.to(own.device)
        if other is None or own[rows].shape != other.shape:
            continue
        _put(own, rows, other)
        done[_label(piece, "weight", role)] = f"{name}.weight"
        bias, other = getattr(matrix, "bias", None), given.get(f"{name}.bias")
        if isinstance(bias, Tensor) and other is not None:
            _put(bias, rows, other)
            done[_label(piece, "bias", role)] = f"{name}.bias"
    return done


def _put(own: Tensor, rows: Any, other: Tensor) -> None:
    own[rows] = other.to(own.device, own.dtype)


def _label(piece: Piece, what: str, role: str) -> str:
    return f"{piece.path}.{what}" + ("" if piece.rows is None else f" ({role})")
