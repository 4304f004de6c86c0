"""LXMERT: a cross-modal encoder above a language encoder and a picture encoder, trained on masked words and matching.

Paper: Tan and Bansal, "LXMERT: Learning Cross-Modality Encoder Representations from Transformers", EMNLP 2019,
arXiv 1908.07490.

Faithful: the cross-modality layer (cross-attention both ways with one set of weights, as in the released code, then
self-attention and a feed-forward network for each side, post-norm); the picture encoder, in which features and boxes each pass
a matrix and a norm, and post-norm layers read their mean both ways; 15 % of the tokens are masked and predicted from both sides,
through the word table; half of the pairs for matching are wrong; all losses have equal weight.

Adapted: the language encoder is the frozen, causal language model, so only the cross-modal layers see the words after a
masked one; every masked token becomes a trained row (the paper keeps or replaces one in five), and a short name has at
least one masked token; matching reads its words unmasked. The places of a frozen EfficientNet-Lite0's 7 x 7 map replace 36
detected objects, with [BOI], a trained row, as one more; two picture layers and two cross-modal layers of width 256 instead of
five of 768 each, with one matrix to the base's width and one back between them. Masked objects (features and labels) and
question answering are not included as pretraining tasks.

Data: from the paper, COCO captions (``jxie/coco_captions``), ``--data 'coco_captions/data/train-*.parquet'``. Our
figures: ``--data emoji:128``, and ``--data runs/clothing/photos.jsonl:held=0.1`` (`runs/write_clothing.py`).
"""

from __future__ import annotations

from xfusion.data.mixture import MixtureConfig
from xfusion.data.templates import Templates
from xfusion.fusion.beside import Beside
from xfusion.fusion.connectors.object_encoder import ObjectEncoder
from xfusion.modalities.codecs.features import Features
from xfusion.modalities.image import ImageModality
from xfusion.model import ModelConfig
from xfusion.objectives.base import NoObjective
from xfusion.objectives.masked_words import MaskedWords
from xfusion.objectives.next_token import NextToken
from xfusion.training.stages import Recipe, Stage

KIND = "cross-modal encoder"
PAPER = "arXiv 1908.07490"
STATUS = "runs"


def lxmert(
    depth: int = 2,
    width: int = 256,
    picture_depth: int = 2,
    pairs: int = 32,
    encoder: str | None = None,
    side: int = 224,
) -> Recipe:
    """The recipe, sized for two CPU cores; pictures are only read.

    Args:
        depth: cross-modal layers; the paper has 5.
        width: of the picture encoder and of the cross-modal layers.
        picture_depth: layers of the picture encoder; the paper has 5.
        pairs: pairs of a step; each picture meets its own words and those of another.
        encoder: folder or hub id of a vision transformer; None takes EfficientNet-Lite0.
        side: pixels that the encoder looks at.
    """
    templates = Templates(caption_dropout=0.0, other_wordings=0.3)
    return Recipe(
        model=ModelConfig(
            image=ImageModality.Config(codec=Features.Config.of(encoder), patch=1, sizes=(side,), behind_begin=True),
            port=ObjectEncoder.Config(inner_width=width, depth=picture_depth, mlp=4 * width),
            fusion=Beside.Config(),
            text=NextToken.Config(weight=0.0),
            media=NoObjective.Config(),
            extra=(MaskedWords.Config(width=width, depth=depth, mlp=4 * width),),
        ),
        data="emoji",
        stages=(
            Stage(rate=5e-4, schedule="cosine", mixture=MixtureConfig(draw=pairs, caption=0, templates=templates)),
        ),
    )
