"""X-Fuse: a dual tower in which positions also take a learned share of the other tower's output.

Paper: Mo et al., "X-Fusion: Introducing New Modality to Frozen Large Language Models", ICCV 2025, arXiv 2504.20996,
section 3.2, equation of X-Fuse.

Faithful: trainable alpha and beta per side; it starts as the plain dual tower (alpha 1, beta 0).

Adapted, because the paper leaves it open: one pair per layer and side; words are mixed only from the first media
token on, so that text without pictures stays bit-identical. Everything except the layer (pictures, port,
objectives, data, schedule) is shared with the recipe `xfusion`, so a comparison isolates the layer.

Data: the paper's pictures are not public; a public alternative is CC3M (``pixparse/cc3m-wds``), ``--data
'cc3m-wds/cc3m-train-*.tar'``. Our figures: ``--data emoji:64``.
"""

from __future__ import annotations

from xfusion.fusion.dual_tower import DualTower
from xfusion.recipes.xfusion import xfusion
from xfusion.training.stages import Recipe

KIND = "dual tower"
PAPER = "arXiv 2504.20996"
STATUS = "runs"


def xfuse(stride: int = 5) -> Recipe:
    """Full copies at every stride-th layer, both sides mixed."""
    return xfusion().with_model(fusion=DualTower.Config(stride=stride, fuse="both"))
