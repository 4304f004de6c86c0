"""X-Fusion with a low-rank tower: media positions take the frozen layers with trainable deltas on every matrix.

Papers: Mo et al., arXiv 2504.20996 (dual tower); Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv 2106.09685.

Faithful: the dual-tower layer; ``W x + B A x`` with B = 0 at the start on queries, keys, values, output and MLP.

Adapted: no paper combines the two. The language model is in memory once and a pack holds a few million weights.
Everything around the layer (pictures, port, objectives, data, schedule) is the recipe `xfusion`'s, so that a
comparison compares the layer alone.

Data: the paper's pictures are not public; pairs that are: CC3M (``pixparse/cc3m-wds``), ``--data
'cc3m-wds/cc3m-train-*.tar'``. Our figures: ``--data emoji:64``.
"""

from __future__ import annotations

from xfusion.fusion.dual_tower import DualTower
from xfusion.recipes.xfusion import xfusion
from xfusion.training.stages import Recipe

KIND = "dual tower"
PAPER = "arXiv 2504.20996, 2106.09685"
STATUS = "runs"


def xfusion_lora(stride: int = 1, rank: int = 16) -> Recipe:
    """Deltas of a rank at every stride-th layer."""
    return xfusion().with_model(fusion=DualTower.Config(stride=stride, rank=rank))
