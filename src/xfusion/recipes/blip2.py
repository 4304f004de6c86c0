"""BLIP-2: learned queries read a frozen encoder, and their few states precede the words.

Paper: Li et al., "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models",
ICML 2023, arXiv 2301.12597.

Faithful: the query transformer (shared self-attention, cross-attention in every second block, post-norm, a fixed number of
queries for any picture); one matrix to the language model's width; both ends frozen. This is the paper's stage 2, generative
learning with a frozen decoder. The three masks of stage 1 and the words' own feed-forward networks are in
`xfusion.fusion.connectors.query_transformer`, equal to transformers' `Blip2QFormerModel`.

Adapted: stage 1 (contrast, generation and matching inside the query transformer) is not trained; 4 blocks of width 256 from
random weights instead of BERT's 12 of 768; 7 queries instead of 32; EfficientNet-Lite0 instead of ViT-g (``encoder`` sets
another); trainable rows before and after the queries.

Data: from the paper, CC3M (``pixparse/cc3m-wds``), ``--data 'cc3m-wds/cc3m-train-*.tar'``. Our figures: ``--data
runs/clothing/photos.jsonl:held=0.1`` (`runs/write_clothing.py`).
"""

from __future__ import annotations

from dataclasses import replace

from xfusion.fusion.connectors.query_transformer import Queries
from xfusion.recipes.llava import llava
from xfusion.training.stages import Recipe

KIND = "prefix"
PAPER = "arXiv 2301.12597"
STATUS = "runs"


def blip2(queries: int = 7, cells: int = 49, encoder: str | None = None, side: int = 224) -> Recipe:
    """The query transformer, trained through the frozen decoder.

    Args:
        queries: learned queries, a divisor of ``cells``: a picture is as many strips of its map.
        cells: features of the encoder's map; 49 for EfficientNet-Lite0, 256 for a ViT-L/14 at 224 px.
        encoder: folder or hub id of a vision transformer; None takes EfficientNet-Lite0.
        side: pixels that the encoder looks at.
    """
    recipe = llava(encoder, side)
    image = replace(recipe.model.image, patch_width=cells // queries)
    port = Queries.Config(queries=queries, cells=cells // queries)
    stage = replace(recipe.stages[0], rate=1e-3)
    return replace(recipe, model=replace(recipe.model, image=image, port=port), stages=(stage,))
