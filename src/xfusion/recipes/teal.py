"""TEAL: any modality as codes, with their own input and output rows on a frozen language model.

Paper: Yang et al., "TEAL: Tokenize and Embed ALL for Multi-modal Large Language Models", arXiv 2311.04589.

Faithful: an off-the-shelf tokenizer's codes; a trainable non-text embedding matrix and a trainable non-text output matrix
next to the frozen ones; a frozen language model (the paper's first stage); next-token cross-entropy, and a
de-tokenizer that draws.

Adapted: the emoji quantiser, 4 x 4 codes of 512 at 32 px (`runs/train_emoji_codes.py`), instead of SEED's or BEiT's; segment
masks, so codes and words have separate softmaxes; row and column vectors added to the codes' rows; a separate norm before the
output matrix, which has a bias; 10 % empty captions for guidance; pictures only, while the paper also reads sound as codes (as
`audiopalm` does). The second stage, which also tunes a few parameters of the language model, is left out. Data and schedule
are those of the recipe `xfusion`.

Data: from the paper, COCO captions (``jxie/coco_captions``), ``--data 'coco_captions/data/train-*.parquet'``. Our
figures: ``--data emoji:64``.
"""

from __future__ import annotations

from xfusion.fusion.prefix import Prefix
from xfusion.modalities.codecs.vq import VectorQuantized
from xfusion.modalities.codes import CodePort
from xfusion.modalities.image import ImageModality
from xfusion.objectives.codes import NextCode
from xfusion.objectives.next_token import NextToken
from xfusion.recipes.xfusion import xfusion
from xfusion.training.stages import Recipe

KIND = "codes"
PAPER = "arXiv 2311.04589"
STATUS = "runs"


def teal(codec: str = "emoji-vq", entries: int = 512, size: int = 32, rate: float = 4e-3) -> Recipe:
    """Rows in and out, and nothing else.

    Args:
        codec: a VQModel: a shipped codec, a folder or a hub id.
        entries: codes of its table.
        size: side of the pictures in pixels.
        rate: largest learning rate.
    """
    return xfusion(rate=rate).with_model(
        image=ImageModality.Config(codec=VectorQuantized.Config(source=codec), patch=1, sizes=(size,), order="causal"),
        port=CodePort.Config(entries=entries),
        fusion=Prefix.Config(),
        text=NextToken.Config(weight=1.0),
        media=NextCode.Config(),
    )
