"""Qwen-Audio: pooled frames of Whisper's encoder precede the words.

Paper: Chu et al., "Qwen-Audio: Advancing Universal Audio Understanding via Unified Large-Scale Audio-Language Models", arXiv
2311.07919.

Faithful: Whisper's encoder on log-mel spectra of 80 bands at 16 kHz; the mean of neighbouring frames; one matrix to the
language model's width (as in transformers' Qwen2-Audio, to which tests find it equal); frames as ordinary
embeddings in causal order; a frozen language model with a loss on its answer only. This is the paper's first stage.

Adapted: the encoder is frozen too, where the paper trains it, and it is that of tiny.en with 8 M weights instead of large-v2's
640 M; 5 frames per token instead of the 2 of transformers' Qwen2-Audio (``frames=2``); the encoder's window is 2 s, padded
with silence, instead of 30 s (``window=30``), at a fifteenth of the cost; no hierarchy of task and language tags, because
there is one task; one dataset of spoken digits (written by `runs/write_digits.py`) instead of thirty tasks.

Data: from the paper's tasks, LibriSpeech (https://www.openslr.org/12), cut to the recipe's length, as JSON lines with the
words, ``--data librispeech/train.jsonl``. Our figures: ``--data digits/train.jsonl`` (`runs/write_digits.py`).
"""

from __future__ import annotations

from xfusion.data.mixture import MixtureConfig
from xfusion.data.templates import Templates
from xfusion.fusion.connectors.pooling import Pooling
from xfusion.fusion.prefix import Prefix
from xfusion.modalities.audio import AudioModality
from xfusion.modalities.encoders.whisper import Whisper
from xfusion.model import ModelConfig
from xfusion.objectives.base import NoObjective
from xfusion.objectives.next_token import NextToken
from xfusion.training.stages import Recipe, Stage

KIND = "prefix"
PAPER = "arXiv 2311.07919"
STATUS = "runs"
QUESTIONS = ("What is said?", "What do you hear?")
"""Asked about some of the sounds in training."""


def qwen_audio(
    encoder: str = "openai/whisper-tiny.en", seconds: float = 1.0, frames: int = 5, window: float | None = None
) -> Recipe:
    """Pooled frames and one matrix, trained through the frozen decoder.

    Args:
        encoder: folder or hub id of a Whisper model of width 384, or of its encoder alone.
        seconds: longest sound.
        frames: neighbouring features of 20 ms whose mean is a token.
        window: seconds that the encoder hears, silence included; None is 2, or the longest sound if that is longer.
    """
    return Recipe(
        model=ModelConfig(
            audio=AudioModality.Config(
                codec=Whisper.Config(source=encoder, window=max(2.0, seconds) if window is None else window),
                seconds=seconds,
                patch=frames,
                order="causal",
            ),
            port=Pooling.Config(cells=frames),
            fusion=Prefix.Config(),
            text=NextToken.Config(weight=1.0),
            media=NoObjective.Config(),
        ),
        data="digits/train.jsonl",
        stages=(
            Stage(
                steps=300,
                rate=2e-3,
                schedule="cosine",
                mixture=MixtureConfig(draw=0, caption=32, templates=Templates(questions=QUESTIONS)),
            ),
        ),
    )
