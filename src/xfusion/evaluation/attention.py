"""What the tokens of a drawn picture attend to: attention weights by layer, from the reference path.

For each picture token, the softmax weights show its attention to every prompt token, to [BOI] and to every token of the
picture itself. If a mechanism has two blocks at a layer, the weights are those of the new one, since the picture's rows keep
its output (``H_img`` of X-Fusion, arXiv 2504.20996, section 3.2). Attention weights show what was read, not what it was used
for (Jain and Wallace, arXiv 1902.10186).

Shape legend: ``L`` layers, ``M`` tokens of the picture, ``W`` tokens of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xfusion.data.pack import pack
from xfusion.data.sequence import Sequence, Text, XFusionError
from xfusion.data.templates import with_begin
from xfusion.generation import refuse_to_draw
from xfusion.layers import attention_weights
from xfusion.model import Model


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention weights averaged over heads; for each token and layer they sum to 1."""

    words: tuple[str, ...]
    """The prompt's tokens as text, including BOS."""
    layers: tuple[int, ...]
    """The layers at which pictures are computed."""
    grid: tuple[int, int]
    """Rows and columns of the picture's tokens."""
    on_words: Tensor
    """``[L, M, W]``."""
    on_begin: Tensor
    """Weight of [BOI], ``[L, M]``."""
    on_picture: Tensor
    """``[L, M, M]``."""


@torch.no_grad()
def drawing_attention(model: Model, prompt: str, tokens: Tensor, grid: tuple[int, int]) -> Attention:
    """Attention of a drawn picture's tokens after the last step of drawing: noise level 0, after the prompt.

    Args:
        model: a model that can draw.
        prompt: the prompt of the picture; may be empty.
        tokens: the picture, ``[M, P]``.
        grid: its rows and columns of tokens.

    Raises:
        XFusionError: the model cannot draw, or its pictures take no part in self-attention.
    """
    refuse_to_draw(model)
    ids = model.backbone.encode(prompt)
    context = (Text(ids=ids),) if ids else ()
    picture = model.image.segment(tokens.cpu(), grid, state="noised")
    batch = pack([[Sequence(segments=(*with_begin(model.backbone.begin_ids, context), picture))]])
    batch = batch.to(model.backbone.device)
    engine = model.training_engine(model.backbone.dtype, "plain products give their weights", "eager", False)
    # If a layer has two blocks, the new one runs last.
    with (
        model.using(replace(engine, reference=True)),
        attention_weights([*engine.backbone.layers, model.fusion]) as weights_of_heads,
    ):
        _, run = model.run_pass(batch)
    weights_by_layer = {index: weights[0].float().mean(0).cpu() for index, weights in weights_of_heads.items()}
    layers = tuple(index for index in sorted(model.fusion.state_layers) if index in weights_by_layer)
    modality = run.media
    if modality is None or not layers or any(len(weights_by_layer[i]) != _positions(run.slices) for i in layers):
        raise XFusionError("this model's pictures take no part in its self-attention: there is nothing to show")
    media = batch.media[modality]
    picture_slice = run.slices[modality]
    is_token = media.item[0].cpu() >= 0
    weights = torch.stack([weights_by_layer[i][picture_slice][is_token] for i in layers])
    on_media = weights[..., picture_slice]
    text = batch.text_ids[0].tolist() if batch.text.count else []
    return Attention(
        words=tuple(model.backbone.decode([i]) or model.backbone.tokenizer.convert_ids_to_tokens(i) for i in text),
        layers=layers,
        grid=grid,
        on_words=weights[..., run.slices["text"]] if text else weights[..., :0],
        on_begin=on_media[..., ~is_token].sum(-1),
        on_picture=on_media[..., is_token],
    )


def _positions(slices: dict[str, slice]) -> int:
    """Number of positions of a pass, from the rows of its owners."""
    return max(rows.stop for rows in slices.values())
