"""SLM: a frozen speech encoder and a frozen language model, with a small transformer between them.

Paper: Wang et al., "SLM: Bridge the thin gap between speech and text foundation models", ASRU 2023, arXiv 2310.00230.

Faithful: both ends frozen, only the adapter trained; most frames dropped, then two bidirectional transformer layers and a
matrix to the language model's width; speech before the words of an instruction; a loss on the answer only.

Adapted: Whisper tiny.en's encoder instead of one with 2 B weights; a decoder of 135 M instead of mT0 XXL; layers of width 256;
always the first of every five frames is kept, instead of a random one (``frames=4`` drops three of four); one
task, spoken digits, with an instruction for a tenth of the sounds in one of two wordings. We know of no public code to
compare with.

Data: from the paper's tasks, LibriSpeech (https://www.openslr.org/12), cut to the recipe's length, as JSON lines with the
words, ``--data librispeech/train.jsonl``. Our figures: ``--data digits/train.jsonl`` (`runs/write_digits.py`).
"""

from __future__ import annotations

from dataclasses import replace

from xfusion.fusion.connectors.frame_transformer import FrameTransformer
from xfusion.recipes.qwen_audio import qwen_audio
from xfusion.training.stages import Recipe

KIND = "prefix"
PAPER = "arXiv 2310.00230"
STATUS = "runs"


def slm(
    encoder: str = "openai/whisper-tiny.en", seconds: float = 1.0, frames: int = 5, window: float | None = None
) -> Recipe:
    """The adapter, trained through the frozen decoder.

    Args:
        encoder: folder or hub id of a Whisper model of width 384, or of its encoder alone.
        seconds: longest sound.
        frames: features of 20 ms of which one is kept.
        window: seconds that the encoder hears, silence included; None is 2, or the longest sound if that is longer.
    """
    recipe = qwen_audio(encoder, seconds, frames, window).with_model(port=FrameTransformer.Config(cells=frames))
    return replace(recipe, stages=(replace(recipe.stages[0], rate=1e-3),))
