"""X-Fusion's dual projection: queries, keys, values and MLP by modality, one joint attention.

Paper: Mo et al., arXiv 2504.20996, figure 3 (c) and table 1.

Faithful: one set of keys and values; the frozen weights make those of words, trained copies those of pictures.

Adapted: pictures also have their own norms and output projections, as in LMFusion; the paper does not say. Copies only at
every fifth layer. Everything except the layer (pictures, port, objectives, data, schedule) is shared with the recipe
`xfusion`, so a comparison isolates the layer.

Data: the paper's pictures are not public; a public alternative is CC3M (``pixparse/cc3m-wds``), ``--data
'cc3m-wds/cc3m-train-*.tar'``. Our figures: ``--data emoji:64`` and ``emoji:128``.
"""

from __future__ import annotations

from xfusion.fusion.modality_experts import ModalityExperts
from xfusion.recipes.xfusion import xfusion
from xfusion.training.stages import Recipe

KIND = "modality experts"
PAPER = "arXiv 2504.20996"
STATUS = "runs"


def dual_projection(stride: int = 5) -> Recipe:
    """All parts of their own at every stride-th layer."""
    return xfusion().with_model(fusion=ModalityExperts.Config(stride=stride))
