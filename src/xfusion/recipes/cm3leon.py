"""CM3Leon: one stream of words and codes, learned from left to right and by infilling.

Paper: Yu et al., "Scaling Autoregressive Multi-Modal Models: Pretraining and Instruction Tuning", arXiv 2309.02591; the
objective is that of CM3 (Aghajanyan et al., arXiv 2201.07520).

Faithful: runs of codes are cut out, leave ``<mask>`` and stand behind ``<infill>`` at the end, so that a decoder that reads
from left to right completes pictures from both sides; no run crosses the boundary of a modality; guidance on scores,
``l_u + s (l_c - l_u)``, without training for it beyond empty captions.

Adapted: the paper trains from scratch; here the language model is frozen, with rows in and out for codes and sentinels.
Runs are cut from pictures alone: a name is learned behind its picture, which is what their caption infilling comes to.
The other side of guidance is no words instead of ``<mask>`` in their place; no retrieved neighbours stand before a
picture; one sentinel serves all runs; no token stands between modalities (the paper's ``<break>``), for [BOI] and [EOI] do.
Pictures and schedule are the recipe `teal`'s.

Data: the paper's Shutterstock pictures are not public; pairs that are: CC3M (``pixparse/cc3m-wds``), ``--data
'cc3m-wds/cc3m-train-*.tar'``. Our figures: ``--data emoji:64``.
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
