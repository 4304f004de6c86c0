"""A dual tower in which each position decides how much of the other tower's output it takes.

Not published. It is X-Fuse (arXiv 2504.20996, section 3.2) with the share made from the position's own state,
``tanh(w . norm(x) + b)``, per layer and side; zero at the start, so that training begins as the plain dual tower.
`xfusion.fusion.dual_tower.Mix.gate` gives the shares to plot.

Everything around the layer (pictures, port, objectives, data, schedule) is the recipe `xfusion`'s, so that a
comparison compares the layer alone.

Data: any captioned pictures; public ones: CC3M (``pixparse/cc3m-wds``), ``--data 'cc3m-wds/cc3m-train-*.tar'``. Our
figures: ``--data emoji:64``.
"""

from __future__ import annotations

from xfusion.fusion.dual_tower import DualTower
from xfusion.recipes.xfusion import xfusion
from xfusion.training.stages import Recipe

KIND = "dual tower"
PAPER = "none"
STATUS = "runs"


def xfusion_dynamic(stride: int = 5) -> Recipe:
    """Full copies at every stride-th layer, a learned share per position."""
    return xfusion().with_model(fusion=DualTower.Config(stride=stride, fuse="both", fuse_by="token"))
