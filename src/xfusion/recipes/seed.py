"""SEED: codes in causal order, which a frozen language model reads and generates as new words.

Papers: Ge et al., "Planting a SEED of Vision in Large Language Model", arXiv 2307.08041, and "Making LLaMA SEE and Draw
with SEED Tokenizer", arXiv 2310.01218.

Faithful: causal queries over the features of a frozen encoder, cross-attention in every second layer, ``Linear-Tanh-Linear``
and a codebook; a transformer that turns codes into features and a frozen decoder that turns these into a picture; codes are
new words with one next-token loss.

Adapted: the frozen encoder and decoder are those of the emoji autoencoder, not a vision transformer and unCLIP, so codes
describe appearance, not meaning; the tokenizer learns to reconstruct features, without the paper's contrastive loss to
captions; 16 codes of 512 instead of 32 of 8192. The codec is shipped as `emoji-seed`; `runs/train_emoji_causal_codes.py`
trains another. The language model is frozen without low-rank deltas, and codes are predicted behind a norm and with a bias of
their own. Data and schedule are those of the recipe `teal`.

Data: from the paper, CC3M (``pixparse/cc3m-wds``), ``--data 'cc3m-wds/cc3m-train-*.tar'``. Our figures: ``--data
emoji:64``.
"""

from __future__ import annotations

from dataclasses import replace

from xfusion.modalities.codecs.causal_queries import CausalQueries
from xfusion.recipes.teal import teal
from xfusion.training.stages import Recipe

KIND = "codes"
PAPER = "arXiv 2307.08041, 2310.01218"
STATUS = "runs"


def seed(codec: str = "emoji-seed", entries: int = 512, size: int = 32) -> Recipe:
    """Rows for codes in causal order.

    Args:
        codec: the shipped `emoji-seed`, or a folder of `runs/train_emoji_causal_codes.py`.
        entries: codes of its table.
        size: side of the pictures in pixels, the codec's.
    """
    recipe = teal(entries=entries, size=size)
    return recipe.with_model(image=replace(recipe.model.image, codec=CausalQueries.Config(source=codec)))
