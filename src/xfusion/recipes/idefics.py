"""Idefics: Flamingo on a Llama, with blocks in the Llama's own shape.

Paper: Laurençon et al., "OBELICS: An Open Web-Scale Filtered Dataset of Interleaved Image-Text Documents", arXiv 2306.16527.

Faithful: blocks before every n-th layer from the first one on, with RMS norms, as many heads as the base, per-head norms of
queries and keys, no rotary embedding, SwiGLU of the base's width, tanh gates; a resampler with ReLU
and per-head norms; each word attends to the last picture before it; the first stage, in which the language model is
frozen. Tests compare block and resampler with transformers' to 1e-5.

Adapted: EfficientNet-Lite0 instead of CLIP ViT-H/14 (``encoder`` sets another); widths for two cores; n need not divide the
depth (theirs must); the gated MLP acts only on words that see a picture (theirs acts on all, ``--model.fusion.text-only
mlp``); words after a picture have the positions that they would have behind its tokens; no loss on the size of the logits;
[EOI] replaces the two added tokens; the second stage, which unfreezes everything and has the turns
``User: ...<end_of_utterance>``, ``Assistant: ...<end_of_utterance>``, is not included: a caption stands alone or after a plain
question; a gate is one number, where the code also knows a number per feature; gates start open (``gate=0`` closes them, as in
the paper).

Data: from the paper, LAION (``laion/relaion2B-en-research-safe``, links to download with img2dataset), ``--data
'laion/*.tar'``; OBELICS' interleaved pages are not read. Our figures: ``--data runs/clothing/photos.jsonl:held=0.1``
(`runs/write_clothing.py`).
"""

from __future__ import annotations

from dataclasses import replace

from xfusion.fusion.connectors.resampler import Resampler
from xfusion.fusion.cross_attention import CrossAttention
from xfusion.recipes.flamingo import flamingo
from xfusion.training.stages import Recipe

KIND = "cross-attention"
PAPER = "arXiv 2306.16527"
STATUS = "runs"


def idefics(
    every: int = 7,
    latents: int = 16,
    depth: int = 2,
    heads: int = 9,
    mlp: int = 1536,
    gate: float = 1.0,
    encoder: str | None = None,
    side: int = 224,
) -> Recipe:
    """The recipe, sized for two CPU cores and the embedded base.

    Args:
        every: a block stands before every n-th layer; 4 in the paper.
        latents: rows that a picture becomes; the paper's are 64.
        depth: layers of the resampler; the paper's are 6.
        heads: attention heads of a block; the base's.
        mlp: hidden units of a block; the base's.
        gate: what gates hold at the start, before tanh; the paper's is 0, which opens in thousands of steps.
        encoder: folder or hub id of a vision transformer; None takes EfficientNet-Lite0.
        side: pixels that the encoder looks at.
    """
    recipe = flamingo(encoder=encoder, side=side)
    fusion = CrossAttention.Config(
        stride=every,
        offset=0,
        heads=heads,
        norm="rms",
        head_norm=True,
        mlp=mlp,
        activation="swiglu",
        gate=gate,
        connector=Resampler.Config(latents=latents, depth=depth, activation="relu", head_norm=True),
    )
    return replace(recipe, model=replace(recipe.model, fusion=fusion))
