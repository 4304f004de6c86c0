"""X-Fusion with a low-rank tower: media positions use the frozen layers with trainable deltas on every matrix.

Papers: Mo et al., arXiv 2504.20996 (dual tower); Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv 2106.09685.

Faithful: the dual-tower layer; ``W x + B A x`` with B initialised at 0, on queries, keys, values, output and MLP.

Adapted: no paper combines the two. The language model is in memory once, and a pack has a few million weights.
Everything except the layer (pictures, port, objectives, data, schedule) is shared with the recipe `xfusion`, so a
comparison isolates the layer.

Data: the paper's pictures are not public; a public alternative is CC3M (``pixparse/cc3m-wds``), ``--data
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
