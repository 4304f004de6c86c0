"""LLaMA-Adapter V2: the picture is the prompt of the first layers only; matrices get scale and bias, norms are trained.

Paper: Gao et al., "LLaMA-Adapter V2: Parameter-Efficient Visual Instruction Model", arXiv 2304.15010.

Faithful: early fusion (the picture's rows are the prompt of the first layers, learned prompts are in all others, and the
two are never mixed); a gate per head on prompts; ``s (W x + b)`` for every matrix of a layer; trained norms.
``released=True`` follows the released code instead, which adds the picture to the prompt of every layer, but keeps the
scales, which that code has not.

Adapted: the picture's rows come from EfficientNet-Lite0's map through a small resampler instead of CLIP through eight
layers with queries (``encoder`` sets another encoder); the picture is the prompt of the first eight layers (``early``),
because a short run learns little through the paper's one; scale, bias and norms are copies that act only on words after a
picture, so text alone is unchanged, and prompts get their keys and values from the untuned matrices, as in the released
code; these words have the positions that they would have behind its tokens; the base's
last norm, which no layer owns, is unchanged; one dataset of pictures and their names, so there are no two groups of parameters
by data, no instructions in Alpaca's form (``### Instruction: ... ### Response: ...``) and no ``Generate caption of this image``;
gates start at 0.1 instead of 0, so that they open in a short run.

Data: the paper's COCO captions (``jxie/coco_captions``), ``--data 'coco_captions/data/train-*.parquet'``. Our figures:
``--data runs/clothing/photos.jsonl:held=0.1`` (`runs/write_clothing.py`).
"""

from __future__ import annotations

from dataclasses import replace

from xfusion.fusion.adaption_prompt import AdaptionPrompt
from xfusion.fusion.connectors.resampler import Resampler
from xfusion.recipes.llama_adapter import llama_adapter
from xfusion.training.stages import Recipe

KIND = "adaption prompt"
PAPER = "arXiv 2304.15010"
STATUS = "runs"


def llama_adapter_v2(
    prompts: int = 20,
    early: int = 8,
    depth: int = 1,
    gate: float = 0.1,
    released: bool = False,
    encoder: str | None = None,
    side: int = 224,
) -> Recipe:
    """The recipe, at its natural size.

    Args:
        prompts: rows of a prompt; the paper's are 20, the code's 10.
        early: first layers whose prompt is the picture; with the paper's one little of it is heard in a short run.
        depth: layers of the resampler.
        gate: what gates hold at the start, before tanh; the paper's is 0, which opens in thousands of steps at this rate, and
            1 lets prompts of chance in at once.
        released: as in the released code: all layers but the first, the picture added to every prompt.
        encoder: folder or hub id of a vision transformer; None takes EfficientNet-Lite0.
        side: pixels that the encoder looks at.
    """
    recipe = llama_adapter(rate=5e-4, encoder=encoder, side=side)  # beyond it the scales of matrices run away
    connector = Resampler.Config(latents=prompts, depth=depth, mlp=2)
    fusion = AdaptionPrompt.Config(
        prompts=prompts,
        connector=connector,
        picture="added" if released else "early",
        early=early,
        gate=gate,
        offset=int(released),
        affine=True,
    )
    return replace(recipe, model=replace(recipe.model, fusion=fusion))
