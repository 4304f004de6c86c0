"""AudioPaLM: speech as discrete codes that a language model reads and generates like words.

Paper: Rubenstein et al., "AudioPaLM: A Large Language Model That Can Speak and Listen", arXiv 2306.12925.

Faithful: codes are k-means clusters of a speech encoder's features; the embedding table is extended by rows for codes, which
are trained from scratch and also used to predict codes; one next-token loss in both directions, speech to words and words to
speech.

Adapted: the language model is frozen and only the new rows are trained (the paper tunes the whole model); 128 clusters of
Whisper tiny.en's features at 12.5 per second (fitted by `runs/fit_sound_codes.py`) instead of clusters of USM's; segment masks,
so codes and words have separate softmaxes; a norm of the codes' own before their rows out; a position vector is added to each
code's row; no task tags, because the first segment determines the task; no later stages that turn codes into a waveform: the
output remains codes.

Data: from the paper's tasks, LibriSpeech (https://www.openslr.org/12), cut to the recipe's length, as JSON lines with the
words, ``--data librispeech/train.jsonl``. Our figures: ``--data digits/train.jsonl`` (`runs/write_digits.py`).
"""

from __future__ import annotations

from xfusion.data.mixture import MixtureConfig
from xfusion.data.templates import Templates
from xfusion.fusion.prefix import Prefix
from xfusion.modalities.audio import AudioModality
from xfusion.modalities.codecs.kmeans import KMeans
from xfusion.modalities.codes import CodePort
from xfusion.modalities.encoders.whisper import Whisper
from xfusion.model import ModelConfig
from xfusion.objectives.codes import NextCode
from xfusion.objectives.next_token import NextToken
from xfusion.recipes.qwen_audio import QUESTIONS
from xfusion.training.stages import Recipe, Stage

KIND = "codes"
PAPER = "arXiv 2306.12925"
STATUS = "runs"


def audiopalm(
    codes: str = "codes",
    entries: int = 128,
    encoder: str = "openai/whisper-tiny.en",
    seconds: float = 0.96,
    pooled: int = 4,
    window: float = 2.0,
) -> Recipe:
    """Rows for codes, in and out, and nothing else.

    Args:
        codes: a folder of `runs/fit_sound_codes.py`, fitted with the same encoder, pooled and window.
        entries: its clusters.
        encoder: folder or hub id of a Whisper model of width 384, or of its encoder alone.
        seconds: longest sound.
        pooled: features of 20 ms to a code.
        window: seconds that the encoder hears, silence included.
    """
    codec = KMeans.Config(source=codes, encoder=Whisper.Config(source=encoder, window=window), pooled=pooled)
    templates = Templates(questions=QUESTIONS, article_share=0.0)
    return Recipe(
        model=ModelConfig(
            audio=AudioModality.Config(codec=codec, seconds=seconds, order="causal"),
            port=CodePort.Config(entries=entries, tied=True),
            fusion=Prefix.Config(),
            text=NextToken.Config(weight=1.0),
            media=NextCode.Config(),
        ),
        data="digits/train.jsonl",
        stages=(Stage(steps=600, rate=4e-3, mixture=MixtureConfig(draw=16, caption=32, templates=templates)),),
    )
