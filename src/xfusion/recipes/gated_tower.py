"""X-Fusion's gated tower: the frozen layer plus a gated trainable copy of it.

Paper: Mo et al., arXiv 2504.20996, figure 3 (b) and table 1; the gate is Flamingo's (arXiv 2204.14198), initialised
at zero.

Faithful: both blocks see the whole sequence, ``H_txt + gamma H_gate``.

Adapted: the paper reports unchanged text but not how; here the gate acts only from the first media token of a sequence on.
Copies only at every fifth layer. Everything except the layer (pictures, port, objectives, data, schedule) is shared with
the recipe `xfusion`, so a comparison isolates the layer.

Data: the paper's pictures are not public; a public alternative is CC3M (``pixparse/cc3m-wds``), ``--data
'cc3m-wds/cc3m-train-*.tar'``. Our figures: ``--data emoji:64`` and ``emoji:128``.
"""

from __future__ import annotations

from xfusion.fusion.gated_tower import GatedTower
from xfusion.recipes.xfusion import xfusion
from xfusion.training.stages import Recipe

KIND = "gated tower"
PAPER = "arXiv 2504.20996"
STATUS = "runs"


def gated_tower(stride: int = 5) -> Recipe:
    """Gated copies at every stride-th layer."""
    return xfusion().with_model(fusion=GatedTower.Config(stride=stride))
