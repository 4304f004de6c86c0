"""BLIP-2: learned queries read a frozen encoder, and their few states precede the words.

Paper: Li et al., "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models",
ICML 2023, arXiv 2301.12597.

Faithful: the query transformer (shared self-attention, cross-attention in every second block, post-norm, a fixed number of
queries for any picture); one matrix to the language model's width; both ends frozen. Without arguments this is the paper's
stage 2, generative learning with a frozen decoder. ``first_stage=2000`` puts so many steps of its stage 1 before it:
contrast, matching and generation inside the query transformer, each under its own mask, with equal weights
(`xfusion.objectives.query_pretraining`): the maximum over queries of their cosines to the text's [CLS]; a two-class head on
every query, averaged, with hard negatives; generation from [DEC]; a text of at most 32 tokens. Stage 2 goes on with the same
queries. The transformer is equal to transformers' `Blip2QFormerModel` under each mask.

Adapted: 4 blocks of width 256 from random weights instead of BERT's 12 of 768; 7 queries instead of 32; EfficientNet-Lite0
instead of ViT-g (``encoder`` sets another); trainable rows before and after the queries; a peak rate of 1e-3 instead of 1e-4,
with AdamW (0.9, 0.95), which every recipe here has, instead of (0.9, 0.98), and without the weight decay of 0.05. In stage
1, words enter as the frozen language model's embeddings through a matrix and are predicted by its frozen head (the paper's
are BERT's, trained); projections to the joint space without a bias; a learned scale clipped at 100 as in the recipe `clip`,
without label smoothing; the hardest negatives of a batch of 32 instead of some sampled by similarity; a text that equals
another's, or whose picture is nearly the same, is no negative. Stage 2 alone is the default: in our one run of both, stage 1
did not pay (docs/comparison.md, `blip2_stages`).

Data: from the paper, CC3M (``pixparse/cc3m-wds``), ``--data 'cc3m-wds/cc3m-train-*.tar'``. Our figures: ``--data
runs/clothing/photos.jsonl:held=0.1`` (`runs/write_clothing.py`).
"""

from __future__ import annotations

from dataclasses import replace

from xfusion.data.mixture import MixtureConfig
from xfusion.data.templates import Templates
from xfusion.fusion.connectors.query_transformer import Queries
from xfusion.objectives.query_pretraining import QueryPretraining
from xfusion.recipes.llava import llava
from xfusion.training.stages import Recipe

KIND = "prefix"
PAPER = "arXiv 2301.12597"
STATUS = "runs"

WARM_UP = 20
"""Steps over which the rate rises in each of two stages."""


def blip2(
    queries: int = 7, cells: int = 49, encoder: str | None = None, side: int = 224, first_stage: int = 0
) -> Recipe:
    """The query transformer, trained through the frozen decoder.

    Args:
        queries: learned queries: a picture is as many strips of its map, so a divisor of ``cells`` and a multiple of the map's
            side.
        cells: features of the encoder's map; 49 for EfficientNet-Lite0, 256 for a ViT-L/14 at 224 px.
        encoder: folder or hub id of a vision transformer; None takes EfficientNet-Lite0.
        side: pixels that the encoder looks at.
        first_stage: steps of the paper's first stage, which come before; 0 leaves it out. The paper has 250,000, and then 80,000
            of the second.
    """
    recipe = llava(encoder, side)
    image = replace(recipe.model.image, patch_width=cells // queries)
    port = Queries.Config(queries=queries, cells=cells // queries, words=first_stage != 0)
    recipe = recipe.with_model(image=image, port=port)
    last = replace(recipe.stages[0], rate=1e-3)
    if not first_stage:
        return replace(recipe, stages=(last,))
    # Pairs always have some words, and both wordings of a picture.
    templates = Templates(caption_dropout=0.0, other_wordings=0.3)
    pairs = MixtureConfig(draw=32, caption=0, templates=templates)
    first = replace(last, steps=first_stage, warmup=WARM_UP, mixture=pairs)
    return replace(recipe.with_model(extra=(QueryPretraining.Config(),)), stages=(first, replace(last, warmup=WARM_UP)))
