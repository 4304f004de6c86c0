"""LLaVA-1.5: LLaVA with a two-layer MLP instead of the matrix.

Paper: Liu et al., "Improved Baselines with Visual Instruction Tuning", CVPR 2024, arXiv 2310.03744.

Faithful: the connector (Linear, GELU, Linear, as wide as the language model), on the output of a vision transformer's
second-to-last layer, without its class token (``encoder``); pictures before the words; the first stage, which trains only
the connector.

Adapted: as in the recipe `llava`; also, a rate of 1e-3, our reading of the paper's; no padding to a square (pictures are
centre-cropped), no prompts for the answer's format ("Answer the question using a single word or phrase.") and no second stage
on the paper's 665 K instructions, which trains the language model.

Data: the paper's 558 K pairs (``liuhaotian/LLaVA-Pretrain``), ``--data images/blip_laion_cc_sbu_558k.jsonl``, its
``blip_laion_cc_sbu_558k.json`` as JSON lines next to the pictures. Our figures: ``--data
runs/clothing/photos.jsonl:held=0.1`` (`runs/write_clothing.py`).
"""

from __future__ import annotations

from dataclasses import replace

from xfusion.fusion.connectors.mlp import MLP
from xfusion.recipes.llava import llava
from xfusion.training.stages import Recipe

KIND = "prefix"
PAPER = "arXiv 2310.03744"
STATUS = "runs"


def llava_1_5(encoder: str | None = None, side: int = 224, strip: int = 1) -> Recipe:
    """A perceptron, trained in one stage.

    Args:
        encoder: folder or hub id of a vision transformer, such as openai/clip-vit-large-patch14-336, the paper's; None
            takes EfficientNet-Lite0.
        side: pixels that the encoder looks at.
        strip: neighbouring features that make one token, as in `llava`.
    """
    recipe = llava(encoder, side, strip)
    stage = replace(recipe.stages[0], rate=1e-3)
    return replace(recipe, model=replace(recipe.model, port=MLP.Config()), stages=(stage,))
