"""OpenFlamingo: Flamingo's open code, with GELU, eight heads of 64 and blocks before the last of every n layers.

Paper: Awadalla et al., "OpenFlamingo: An Open-Source Framework for Training Large Autoregressive Vision-Language Models",
arXiv 2308.01390.

Faithful: as `flamingo`, with the released code's layer norm on words only, attention with 8 heads of 64 for any model,
GELU, blocks before layers i with (i + 1) % n = 0, no learned time or media embeddings, and loss on the text after a picture.

Adapted: EfficientNet-Lite0 instead of CLIP ViT-L/14 (``encoder`` sets another); widths for two cores; the gated MLP acts
only on words that see a picture (the published one acts on all, ``--model.fusion.text-only mlp``); new words are placed by
their order, not assumed to follow the last picture, and after a picture have the positions that they would have behind its
tokens; [EOI] replaces the two added tokens, so a sample is a picture and its caption, at times with a plain question between,
not ``<image>...<|endofchunk|>``; one dataset instead of two losses of weights 1 and 0.2; gates start open (``gate=0`` closes
them, as in the paper).

Data: from the paper, LAION (``laion/relaion2B-en-research-safe``, links to download with img2dataset), ``--data
'laion/*.tar'``; MMC4's interleaved pages are not read. Our figures: ``--data runs/clothing/photos.jsonl:held=0.1``
(`runs/write_clothing.py`).
"""

from __future__ import annotations

from dataclasses import replace

from xfusion.fusion.connectors.resampler import Resampler
from xfusion.fusion.cross_attention import CrossAttention
from xfusion.recipes.flamingo import flamingo
from xfusion.training.stages import Recipe

KIND = "cross-attention"
PAPER = "arXiv 2308.01390"
STATUS = "runs"


def openflamingo(
    every: int = 7,
    latents: int = 16,
    depth: int = 2,
    gate: float = 1.0,
    encoder: str | None = None,
    side: int = 224,
) -> Recipe:
    """The recipe, sized for two CPU cores.

    Args:
        every: a block stands before the last of every n layers; 1, 2 and 4 in the paper, by size.
        latents: rows that a picture becomes; the paper's are 64.
        depth: layers of the resampler; the paper's are 6.
        gate: what gates hold at the start, before tanh; the paper's is 0, which opens in thousands of steps.
        encoder: folder or hub id of a vision transformer; None takes EfficientNet-Lite0.
        side: pixels that the encoder looks at.
    """
    recipe = flamingo(encoder=encoder, side=side)
    connector = Resampler.Config(latents=latents, depth=depth)
    fusion = CrossAttention.Config(stride=every, offset=every - 1, gate=gate, connector=connector)
    return replace(recipe, model=replace(recipe.model, fusion=fusion))
