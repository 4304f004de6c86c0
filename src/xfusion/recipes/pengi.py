"""Pengi: one vector of a sound becomes a prefix for a frozen language model, and every audio task becomes text.

Paper: Deshmukh et al., "Pengi: An Audio Language Model for Audio Tasks", NeurIPS 2023, arXiv 2305.11834.

Faithful: the pooled vector with unit length; a linear map to as many rows as the prefix has, next to learned constants; a
pre-norm transformer whose last rows are the prefix; a frozen decoder; a loss on the answer only.

Adapted: Whisper's frozen encoder, pooled over time, instead of HTS-AT, which the paper trains; the question's words are
ordinary input, where the paper maps them through CLIP's text tower and a second mapper; the prefix is multiplied by a learned
number, which begins at the scale of the base's embeddings; 10 rows and 2 layers instead of 40 and 4; spoken digits instead of
3.4 M pairs in eight templates.

Data: from the paper, Clotho (https://zenodo.org/records/4783391), cut to the recipe's length, as JSON lines with the
captions, ``--data clotho/train.jsonl``. Our figures: ``--data digits/train.jsonl`` (`runs/write_digits.py`).
"""

from __future__ import annotations

from dataclasses import replace

from xfusion.fusion.connectors.prefix_mapper import PrefixMapper
from xfusion.recipes.qwen_audio import qwen_audio
from xfusion.training.stages import Recipe

KIND = "prefix"
PAPER = "arXiv 2305.11834"
STATUS = "runs"


def pengi(
    encoder: str = "openai/whisper-tiny.en",
    seconds: float = 1.0,
    rows: int = 10,
    heads: int = 8,
    window: float | None = None,
) -> Recipe:
    """The mapper, trained through the frozen decoder.

    Args:
        encoder: folder or hub id of a Whisper model of width 384, or of its encoder alone.
        seconds: longest sound.
        rows: of the prefix, a divisor of the sound's features of 20 ms.
        heads: of the mapper, a divisor of the language model's width.
        window: seconds that the encoder hears, silence included; None is 2, or the longest sound if that is longer.
    """
    frames = round(seconds * 50) // rows
    port = PrefixMapper.Config(rows=rows, heads=heads, cells=frames)
    recipe = qwen_audio(encoder, seconds, frames, window).with_model(port=port)
    return replace(recipe, stages=(replace(recipe.stages[0], rate=1e-3),))
