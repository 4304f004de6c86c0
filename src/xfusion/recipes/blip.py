"""BLIP: contrastive, matching and captioning losses on one decoder whose words may attend to the picture.

Paper: Li et al., "BLIP: Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding and Generation",
ICML 2022, arXiv 2201.12086.

Faithful: three equally weighted losses - contrastive between picture and text, matching with hard negatives chosen by
contrastive similarity, and language modelling on captions; one text tower, which reads only words for the first loss and
also the picture, by cross-attention, for the others; a trained [Encode] row for matching; a two-class head.

Adapted: the text tower is the frozen language model, causal in all three modes (the paper's text encoder has its own
bidirectional self-attention, which a frozen base cannot have); so the paper's [Encode], which precedes the words, follows them
to see them all, and it is no row of its own but [EOI], which also follows a picture before its caption; gated cross-attention
before every n-th layer instead of within every one; words after a picture have the positions that they would have behind its
tokens; a resampler over the features of a frozen EfficientNet-Lite0 instead of a trained ViT; no momentum encoder, queue or
label smoothing; the hardest negative of a batch of 16 instead of one sampled by similarity; captions are not bootstrapped
(CapFilt); a peak rate of 1e-3 instead of 3e-4, and no weight decay instead of 0.05.

Data: from the paper, CC3M (``pixparse/cc3m-wds``), ``--data 'cc3m-wds/cc3m-train-*.tar'``; or COCO captions
(``jxie/coco_captions``), ``--data 'coco_captions/data/train-*.parquet'``. Our figures: ``--data
runs/clothing/photos.jsonl:held=0.1`` (`runs/write_clothing.py`).
"""

from __future__ import annotations

from xfusion.data.mixture import MixtureConfig
from xfusion.data.templates import Templates
from xfusion.fusion.connectors.linear import Linear
from xfusion.fusion.connectors.resampler import Resampler
from xfusion.fusion.cross_attention import CrossAttention
from xfusion.modalities.codecs.features import Features
from xfusion.modalities.image import ImageModality
from xfusion.model import ModelConfig
from xfusion.objectives.base import NoObjective
from xfusion.objectives.matching import Matching
from xfusion.objectives.next_token import NextToken
from xfusion.training.stages import Recipe, Stage

KIND = "cross-attention"
PAPER = "arXiv 2201.12086"
STATUS = "runs"


def blip(
    every: int = 7,
    latents: int = 8,
    pairs: int = 16,
    gate: float = 1.0,
    encoder: str | None = None,
    side: int = 224,
) -> Recipe:
    """The recipe, sized for two CPU cores; pictures are only read.

    Args:
        every: a cross-attention block stands before every n-th layer.
        latents: rows that a picture becomes.
        pairs: pairs of a step that are contrasted and matched, and as many captions.
        gate: what the blocks' gates hold at the start, before tanh; the paper has none.
        encoder: folder or hub id of a vision transformer; None takes EfficientNet-Lite0.
        side: pixels that the encoder looks at.
    """
    templates = Templates(caption_dropout=0.0, other_wordings=0.3)
    return Recipe(
        model=ModelConfig(
            image=ImageModality.Config(codec=Features.Config.of(encoder), patch=1, sizes=(side,), behind_begin=True),
            port=Linear.Config(),
            fusion=CrossAttention.Config(
                stride=every, offset=0, media_norm=True, gate=gate, connector=Resampler.Config(latents=latents, depth=2)
            ),
            text=NextToken.Config(weight=1.0),
            media=NoObjective.Config(),
            extra=(Matching.Config(),),
        ),
        data="emoji",
        stages=(
            Stage(
                rate=1e-3,
                warmup=20,
                schedule="cosine",
                mixture=MixtureConfig(draw=pairs, caption=pairs, templates=templates),
            ),
        ),
    )
