"""CM3Leon: one stream of words and codes, trained left to right and by infilling.

Paper: Yu et al., "Scaling Autoregressive Multi-Modal Models: Pretraining and Instruction Tuning", arXiv 2309.02591; the
objective is that of CM3 (Aghajanyan et al., arXiv 2201.07520).

Faithful: spans of codes are replaced by ``<mask>`` and moved after ``<infill>`` at the end, so a left-to-right decoder
completes pictures from both sides; no span crosses a modality boundary; guidance on logits,
``l_u + s (l_c - l_u)``, with no special training except empty captions.

Adapted: the paper trains from scratch; here the language model is frozen, with input and output rows for codes and sentinels,
codes being predicted behind a norm and with a bias of their own. Spans are cut only from pictures: a name is learned after
its picture, which is equivalent to the paper's caption infilling. The unconditional side of guidance has no words instead of
``<mask>``; no retrieved neighbours precede a picture; one sentinel serves all spans; [BOI] and [EOI] replace the token between
modalities (the paper's ``<break>``). Pictures and schedule are those of the recipe `teal`.

Data: the paper's Shutterstock pictures are not public; a public alternative is CC3M (``pixparse/cc3m-wds``), ``--data
'cc3m-wds/cc3m-train-*.tar'``. Our figures: ``--data emoji:64``; 4,800 samples are too few to learn infilling (suite
`infilling`; docs/training_log.md).
"""

from __future__ import annotations

from xfusion.modalities.codes import CodePort
from xfusion.objectives.codes import NextCode
from xfusion.recipes.teal import teal
from xfusion.training.stages import Recipe

KIND = "codes"
PAPER = "arXiv 2309.02591"
STATUS = "runs"


def cm3leon(codec: str = "emoji-vq", entries: int = 512, size: int = 32, infill: float = 0.5, runs: int = 2) -> Recipe:
    """Next token and infilling.

    Args:
        codec: a VQModel: a shipped codec, a folder or a hub id.
        entries: codes of its table.
        size: side of the pictures in pixels.
        infill: share of pictures with runs at the end.
        runs: how many at most.
    """
    return teal(codec, entries, size).with_model(
        port=CodePort.Config(entries=entries, sentinels=2), media=NextCode.Config(infill=infill, runs=runs)
    )
