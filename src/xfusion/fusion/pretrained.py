"""The weights that a tower copies from a pretrained diffusion transformer (X-Fusion, arXiv 2504.20996, section 5).

The paper joins a language model and an in-house diffusion transformer. The latter's blocks are modulated by the noise level
and read text by cross-attention; a tower's blocks are decoder layers of the base's family, whose noise level is in the
states and whose text is in the sequence. So only these matrices are copied, each if its shape fits:

==============================  ===============================================================
diffusers' block                decoder layer
==============================  ===============================================================
attn1 / attn: to_q, to_k, to_v  queries, keys, values (rows of one matrix if the family fuses them)
attn1 / attn: to_out.0          output of attention
ff: net.0.proj, net.2           into the MLP (SwiGLU: what the gate multiplies), out of the MLP
==============================  ===============================================================

A bias is copied with its matrix if the layer has a bias too. Not copied are norms and their modulation, cross-attention to
text (attn2, add_q_proj ...), query and key norms, patch, position and class embeddings, and the head. The layer's own norms
and SwiGLU gate keep their fresh initialization. A gated feed-forward (GEGLU) does not fit and is not copied.

Rotary positions and causal attention to text are new to such a block: this is an initialization for training and does not
preserve the block's function.
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
    """The blocks of a transformer that diffusers can load, from safetensors only.

    Args:
        source: a folder or hub id of a model, or of a pipeline, whose subfolder ``transformer`` is then used.
        revision: hub revision; only for hub ids.

    Raises:
        XFusionError: there is no such model, weights are missing, or it has no blocks with attention.
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
    """Name of the first attention of a block, which is its self-attention."""
    wanted = ("to_q", "to_k", "to_v", "to_out")
    return next((n for n, m in block.named_children() if all(hasattr(m, w) for w in wanted)), None)


def check(blocks: list[nn.Module], source: str, width: int, backbone: Backbone) -> None:
    """Raise if a tower of ``width`` on a base cannot use these blocks.

    Raises:
        XFusionError: the width or the head width differs.
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
    """Which source block each of a tower's blocks copies: the k-th copies number round(k source / tower).

    Args:
        source: number of blocks in the source.
        tower: number of blocks in the tower.
    """
    return [min(round(k * source / tower), source - 1) for k in range(tower)]


@torch.no_grad()
def take(layer: nn.Module, block: nn.Module) -> dict[str, str]:
    """Copy the matching weights of a diffusion transformer's block into a decoder layer, in place.

    Args:
        layer: the tower's layer, of any family.
        block: the diffusers block.

    Returns:
        what was copied: parameter of the layer (with the role, if a matrix combines several) -> parameter of the block.
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
