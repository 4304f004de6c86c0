"""DALL-E: words, then the codes of a picture, as one stream of tokens.

Paper: Ramesh et al., "Zero-Shot Text-to-Image Generation", arXiv 2102.12092.

Faithful: one decoder over words and then codes in reading order; row and column vectors for codes; segment masks, so
a position predicts words or codes but never both.

Adapted: the paper trains a decoder of 12 billion weights from scratch; here the language model is frozen, with input and
output rows for codes, behind a norm and with a bias of their own, and, unless ``rank`` is None, a low-rank copy of it for
picture positions. Codes have 7/8 of the loss weight and words 1/8, our reading of the paper; words before a picture belong to the
frozen model and have no loss, so the 1/8 goes to names after pictures. The tokenizer is the shipped quantiser. To use the
paper's dVAE, train it with `runs/train_emoji_codes.py --kind dvae` and pass it as ``codec``. Compared with a quantiser trained
as briefly, it used half of its codes and had 0.5 dB less (docs/training_log.md, kinds of codes). No recipe was trained on
it. 4 x 4 codes of 512 instead of 32 x 32 of 8192; dense attention instead of row, column and convolutional; guidance, which
the paper does not have, instead of 512 samples ranked by CLIP. Data and schedule are those of the recipe `xfusion`.

Data: from the paper, CC3M (``pixparse/cc3m-wds``), ``--data 'cc3m-wds/cc3m-train-*.tar'``. Our figures: ``--data
emoji:64``.
"""

from __future__ import annotations

from xfusion.fusion.dual_tower import DualTower
from xfusion.objectives.codes import NextCode
from xfusion.objectives.next_token import NextToken
from xfusion.recipes.teal import teal
from xfusion.training.stages import Recipe

KIND = "codes"
PAPER = "arXiv 2102.12092"
STATUS = "runs"


def dall_e(codec: str = "emoji-vq", entries: int = 512, size: int = 32, rank: int | None = 16) -> Recipe:
    """The stream of tokens.

    Args:
        codec: a VQModel: a shipped codec, a folder or a hub id; a dVAE is one, too.
        entries: codes of its table.
        size: side of the pictures in pixels.
        rank: of the deltas that picture positions take at every layer; None trains the codes' rows alone, as `teal` does, which
            draws significantly worse (docs/comparison.md, tokens).
    """
    recipe = teal(codec, entries, size).with_model(
        text=NextToken.Config(weight=1 / 8), media=NextCode.Config(weight=7 / 8)
    )
    return recipe if rank is None else recipe.with_model(fusion=DualTower.Config(rank=rank))
