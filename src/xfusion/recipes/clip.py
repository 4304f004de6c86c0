"""CLIP: pictures and words in one space, with the frozen language model as the text tower.

Paper: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv 2103.00020.

Faithful: linear projections without non-linearity; cosines times a learned scale, initialised at 1 / 0.07 and clipped at
100; the mean of both cross-entropies over the pairs of a batch; the text feature at the last word of a causal transformer.

Adapted: the text tower is the frozen language model (the paper trains its own); the picture tower is a matrix and copied
blocks over the mean feature of a frozen EfficientNet-Lite0 (the paper trains a ViT on pixels); batches of 64 instead of 32,768,
in which pictures of one group and equal captions are not negatives.

Zero-shot naming with any names, nearest first: ``xfusion caption PACK photo.jpg --names shirt boot "a red hat"``, or in Python
``model.embed([picture]) @ model.embed(["shirt", "boot", "a red hat"]).T``. Training uses bare names,
so give them without a template ("a photo of a ...").

Data: the paper's 400 M pairs are not public; a public alternative is CC12M (``pixparse/cc12m-wds``), ``--data
'cc12m-wds/*.tar'``. Our figures: ``--data runs/clothing/photos.jsonl:held=0.1`` (`runs/write_clothing.py`).
"""

from __future__ import annotations

from xfusion.data.mixture import MixtureConfig
from xfusion.data.templates import Templates
from xfusion.fusion.connectors.pooling import Pooling
from xfusion.fusion.dual_tower import DualTower
from xfusion.modalities.codecs.features import Features
from xfusion.modalities.image import ImageModality
from xfusion.model import ModelConfig
from xfusion.objectives.base import NoObjective
from xfusion.objectives.contrastive import Contrastive
from xfusion.objectives.next_token import NextToken
from xfusion.training.stages import Recipe, Stage

KIND = "dual encoder"
PAPER = "arXiv 2103.00020"
STATUS = "runs"

WARM_UP = 3_200
"""Pairs over which the rate rises, whatever the batch: runs of equal samples have equal rates at equal samples."""


def clip(
    stride: int = 15,
    mlp: int | None = 512,
    batch: int = 64,
    pooled: int = 7,
    encoder: str | None = None,
    side: int = 224,
) -> Recipe:
    """A picture tower beside the frozen text tower; neither sees the other.

    Args:
        stride: a block of the picture tower stands at every stride-th layer.
        mlp: width of its blocks' MLP; None copies it whole.
        batch: pairs per step: each is contrasted with all others.
        pooled: rows and columns of the encoder's map whose mean is one token; 7 makes one token of EfficientNet-Lite0's map,
            1 keeps each place.
        encoder: folder or hub id of a vision transformer; None takes EfficientNet-Lite0.
        side: pixels that the encoder looks at.
    """
    # Both wordings of a picture, and always some words.
    templates = Templates(caption_dropout=0.0, other_wordings=0.3)
    return Recipe(
        model=ModelConfig(
            image=ImageModality.Config(codec=Features.Config.of(encoder), patch=pooled, sizes=(side,)),
            port=Pooling.Config(cells=pooled**2),
            fusion=DualTower.Config(stride=stride, mlp=mlp),
            text=NextToken.Config(weight=0.0),
            media=NoObjective.Config(),
            extra=(Contrastive.Config(),),
        ),
        data="emoji",
        stages=(
            Stage(
                rate=5e-4,
                warmup=max(1, WARM_UP // batch),
                schedule="cosine",
                mixture=MixtureConfig(draw=batch, caption=0, templates=templates),
            ),
        ),
    )
