"""Flamingo: gated cross-attention before frozen layers, to a fixed number of rows that a resampler makes from each picture.

Paper: Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning", arXiv 2204.14198.

Faithful: a Perceiver resampler, whose keys and values include its latents, makes 16 rows (``latents``) from a picture; blocks
before every n-th layer from the first one on (``every``, which need not divide the depth), with tanh gates, layer norms for
words and for media, and squared ReLU; each word attends to the last picture before it and to older ones only through the
words; pictures and text may alternate; the language model is frozen throughout; loss on the text.

Adapted: EfficientNet-Lite0's 7 x 7 x 1280 map instead of a frozen NFNet's (``encoder`` sets another); a matrix maps it to
the model's width; sizes for two cores (8 heads of 64 instead of 16 of 128; the resampler is as wide as the model, with
heads of 64 and ``depth=2`` layers instead of 6); words after a picture have the positions that they would have behind its
tokens, where in the paper a picture takes no position; gate and MLP act only on words that see a picture, so text alone
stays bit-equal after training, unlike in the paper; text is never linked to the next picture instead of the last (as in
half of the paper's samples), because nothing later may change what came before; [EOI], a trained row, replaces the tag and
the end of chunk; a caption stands alone or after a plain question, without ``Output: ...`` or ``Question: ... Answer: ...``;
one dataset; no video, so no time embeddings of frames; gates start open (``gate=0`` closes them, as in the paper).

Few-shot prompts: samples have one picture unless ``--stages.0.mixture.shots 4`` puts four solved examples before each. All
answers are then trained on, as the paper trains on all text of a page. Prompts then alternate too:
``model.generate([a, "shirt", b, "shoes", c, "What is this?"])``. In a model trained this way on photographs of ten kinds, the
examples changed nothing: [few_shot](../comparison.md#few_shot).

Data: the paper's M3W, ALIGN and LTIP are not public; a public alternative is CC3M (``pixparse/cc3m-wds``), ``--data
'cc3m-wds/cc3m-train-*.tar'``. Our figures: ``--data runs/clothing/photos.jsonl:held=0.1`` (`runs/write_clothing.py`).
"""

from __future__ import annotations

from dataclasses import replace

from xfusion.fusion.connectors.resampler import Resampler
from xfusion.fusion.cross_attention import CrossAttention
from xfusion.recipes.llava import llava
from xfusion.training.stages import Recipe

KIND = "cross-attention"
PAPER = "arXiv 2204.14198"
STATUS = "runs"


def flamingo(
    every: int = 7,
    latents: int = 16,
    depth: int = 2,
    gate: float = 1.0,
    encoder: str | None = None,
    side: int = 224,
) -> Recipe:
    """The recipe, sized for two CPU cores; pictures are only read.

    Args:
        every: a block stands before every n-th layer; 1, 4 and 7 in the paper, by size.
        latents: rows that a picture becomes; the paper's are 64.
        depth: layers of the resampler; the paper's are 6.
        gate: what gates hold at the start, before tanh; the paper's is 0, which opens in thousands of steps.
        encoder: folder or hub id of a vision transformer; None takes EfficientNet-Lite0.
        side: pixels that the encoder looks at.
    """
    recipe = llava(encoder, side)
    fusion = CrossAttention.Config(
        stride=every,
        offset=0,
        media_norm=True,
        activation="squared relu",
        gate=gate,
        connector=Resampler.Config(latents=latents, depth=depth, activation="squared relu"),
    )
    # Media take no part in the words' own attention, so the words' own first position stands before them.
    image = replace(recipe.model.image, behind_begin=True)
    model = replace(recipe.model, image=image, fusion=fusion)
    return replace(recipe, model=model, stages=(replace(recipe.stages[0], rate=1e-3),))
