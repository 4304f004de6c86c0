"""CLIP score of drawings (Hessel et al., arXiv 2104.08718), by torchmetrics: 100 times the cosine of picture and prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy
import torch
from PIL.Image import Image
from torch import Tensor

from xfusion.data.sequence import XFusionError
from xfusion.evaluation.teachers import refuse_teacher
from xfusion.modalities.base import Encoder

if TYPE_CHECKING:
    from xfusion.evaluation.drawn import Drawn

BATCH = 32
"""Pictures per forward pass; memory only."""


def judge(
    drawn: Drawn,
    argument: str,
    *,
    encoder: Encoder.Config | None,
    device: str,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """``--by clip-score:ORG/MODEL[@revision]``, or a folder: how well the pictures match their prompts.

    Returns:
        ``clip_score`` in [0, 100]; ``clip_score_blind``, the same for every picture with the next prompt of the folder, if
        there is another; and the number of prompts that were too long for CLIP.

    Raises:
        XFusionError: this CLIP was used to train the drawing model, or cannot be loaded; or torchmetrics is not installed.
    """
    from xfusion.evaluation.adapters.transformers import clip, parse_source

    if not argument:
        raise XFusionError("name the CLIP that scores, such as --by clip-score:openai/clip-vit-base-patch16")
    if encoder is not None:
        raise XFusionError("a CLIP score has no other encoder: leave --encoder out")
    source, revision = parse_source(argument)
    refuse_teacher(f"{source}@{revision}", drawn.teachers)
    metric = _metric()
    towers, reader = clip(source, revision, device=device)
    score, blind_score = (metric(lambda: (towers, reader)) for _ in range(2))
    prompts = list(dict.fromkeys(drawn.prompts))
    next_prompt = dict(zip(prompts, [*prompts[1:], prompts[0]], strict=True))
    for start in range(0, len(drawn), BATCH):
        progress("judging", start, len(drawn))
        batch_prompts = drawn.prompts[start : start + BATCH]
        images = [levels(picture).to(device) for picture in drawn.pictures(start, start + BATCH)]
        score.update(images, batch_prompts)
        if len(prompts) > 1:
            blind_score.update(images, [next_prompt[prompt] for prompt in batch_prompts])
    scores = {"clip_score": float(score.compute())}
    if len(prompts) > 1:
        scores["clip_score_blind"] = float(blind_score.compute())
    counts = {"num_pictures": len(drawn), "num_prompts": len(prompts), "num_prompts_cut": len(reader.cut)}
    return scores | counts | {"settings": {"encoder": f"{source}@{revision}"}}


def levels(picture: Image) -> Tensor:
    """A picture in RGB -> uint8 [3, H, W]."""
    return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)


def _metric() -> Any:
    try:
        from torchmetrics.multimodal.clip_score import CLIPScore
    except ImportError as error:
        raise XFusionError(f"a CLIP score needs the package {error.name}: pip install 'xfusion[eval]'") from error
    return CLIPScore
