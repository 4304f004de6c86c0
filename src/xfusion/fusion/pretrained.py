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

    load_config: Any = Settings.load_config
    model_config: dict[str, Any] = {}
    location: dict[str, Any] = {}
    reasons: list[str] = []
    for location in ({"revision": revision}, {"revision": revision, "subfolder": "transformer"}):
        try:
            model_config = load_config(source, **location)
            break
        except (OSError, ValueError) as error:
            reasons.append(_one_line(error))
    if not model_config:
        raise XFusionError(f"start {source!r} is no folder or hub id of a diffusers transformer: {reasons[0]}")
    model_class: Any = getattr(diffusers, str(model_config.get("_class_name")), None)
    if not (isinstance(model_class, type) and issubclass(model_class, ModelMixin)):
        raise XFusionError(
            f"start {source!r} is of class {model_config.get('_class_name')}: diffusers has no such model"
        )
    try:
        model, report = model_class.from_pretrained(source, use_safetensors=True, output_loading_info=True, **location)  # type: ignore[misc]
    except (OSError, ValueError, RuntimeError) as error:
        raise XFusionError(
            f"start {source!r} cannot be loaded as {model_class.__name__}: {_one_line(error)}"
        ) from error
    missing_keys = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if missing_keys:
        raise XFusionError(
            f"start {source!r} is not a whole {model_class.__name__}: {len(missing_keys)} weights are not there"
            f" ({missing_keys[0]})"
        )
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) and all(_attention_name(block) for block in child):
            return list(child)
    raise XFusionError(
        f"start {source!r}: {model_class.__name__} has no list of blocks with to_q, to_k, to_v and to_out"
    )


def _one_line(error: BaseException) -> str:
    return " ".join((str(error).strip() or type(error).__name__).split())[:300]


def _attention_name(block: nn.Module) -> str | None:
    """Name of the first attention of a block, which is its self-attention."""
    projections = ("to_q", "to_k", "to_v", "to_out")
    return next(
        (
            name
            for name, module in block.named_children()
            if all(hasattr(module, projection) for projection in projections)
        ),
        None,
    )


def check(blocks: list[nn.Module], source: str, width: int, backbone: Backbone) -> None:
    """Raise if a tower of ``width`` on a base cannot use these blocks.

    Raises:
        XFusionError: the width or the head width differs.
    """
    attention: Any = blocks[0].get_submodule(_attention_name(blocks[0]) or "")
    outputs, inputs = attention.to_q.weight.shape
    head_width = outputs // attention.heads
    if head_width != backbone.head_width:
        raise XFusionError(
            f"start {source!r}: its heads are {head_width} wide, those of {backbone.source}, whose rotary tables they would"
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
def copy_weights(layer: nn.Module, block: nn.Module) -> dict[str, str]:
    """Copy the matching weights of a diffusion transformer's block into a decoder layer, in place.

    Args:
        layer: the tower's layer, of any family.
        block: the diffusers block.

    Returns:
        what was copied: parameter of the layer (with the role, if a matrix combines several) -> parameter of the block.
    """
    attention_name, block_weights = _attention_name(block), dict(block.named_parameters())
    names = {role: f"{attention_name}.{name}" for role, name in _ATTENTION.items()} | _FEED_FORWARD
    copied: dict[str, str] = {}
    for role, piece in matrix_pieces(layer).items():
        matrix, name = layer.get_submodule(piece.path), names[role]
        target, source = linear_weight(matrix), block_weights.get(f"{name}.weight")
        rows = slice(None) if piece.rows is None else piece.rows.to(target.device)
        if source is None or target[rows].shape != source.shape:
            continue
        _copy_rows(target, rows, source)
        copied[_parameter_label(piece, "weight", role)] = f"{name}.weight"
        bias, source = getattr(matrix, "bias", None), block_weights.get(f"{name}.bias")
        if isinstance(bias, Tensor) and source is not None:
            _copy_rows(bias, rows, source)
            copied[_parameter_label(piece, "bias", role)] = f"{name}.bias"
    return copied


def _copy_rows(target: Tensor, rows: Any, source: Tensor) -> None:
    target[rows] = source.to(target.device, target.dtype)


def _parameter_label(piece: Piece, parameter: str, role: str) -> str:
    return f"{piece.path}.{parameter}" + ("" if piece.rows is None else f" ({role})")
