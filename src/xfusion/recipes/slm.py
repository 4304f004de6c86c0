"""SLM: a frozen speech encoder and a frozen language model, with a small transformer between them.

Paper: Wang et al., "SLM: Bridge the thin gap between speech and text foundation models", ASRU 2023, arXiv 2310.00230.

Faithful: both ends frozen, the adapter alone trained; three of four frames dropped, then two transformer layers both ways
and a matrix to the language model's width; speech before the words of an instruction, a loss on the answer alone.

Adapted: Whisper tiny.en's encoder instead of one of 2 B weights, a decoder of 135 M instead of mT0 XXL; layers of width 256;
the frame that stays is the first of each five, always, instead of one by chance (``frames=4`` drops three of four); one
task, spoken digits, with an instruction for a tenth of the sounds in one of two wordings. No public code is known to
compare with.

Data: of the paper's tasks, LibriSpeech (https://www.openslr.org/12), cut to what the recipe hears, in lines with their
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


def slm(encoder: str = "openai/whisper-tiny.en", seconds: float = 1.0, frames: int = 5, window: float = 2.0) -> Recipe:
    """The adapter, trained through the frozen decoder.

    Args:
        encoder: folder or hub id of a Whisper model of width 384, or of its encoder alone.
        seconds: longest sound.
        frames: features of 20 ms of which one is kept.
        window: seconds that the encoder hears, silence included.
    """
    recipe = qwen_audio(encoder, seconds, frames, window).with_model(port=FrameTransformer.Config(cells=frames))
    return replace(recipe, stages=(replace(recipe.stages[0], rate=1e-3),))
