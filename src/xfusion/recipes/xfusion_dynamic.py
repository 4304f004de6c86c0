"""A dual tower in which each position decides how much of the other tower's output it takes.

Not published. It is X-Fuse (arXiv 2504.20996, section 3.2) with the share computed from the position's own state,
``tanh(w . norm(x) + b)``, per layer and side; initialised at zero, so training starts as the plain dual tower.
`xfusion.fusion.dual_tower.Mix.gate` returns the shares for plotting.

Everything except the layer (pictures, port, objectives, data, schedule) is shared with the recipe `xfusion`, so a
comparison isolates the layer.

Data: any captioned pictures, such as the public CC3M (``pixparse/cc3m-wds``), ``--data 'cc3m-wds/cc3m-train-*.tar'``. Our
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
