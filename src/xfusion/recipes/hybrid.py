"""A hybrid: modality experts in the lower layers, a dual tower in the upper ones.

Not published. It asks whether one joint set of keys and values is enough where pictures and words are still apart, and
where the second set of the dual tower (arXiv 2504.20996, section 3.2) is worth its cost.

Everything around the layer (pictures, port, objectives, data, schedule) is the recipe `xfusion`'s, so that a comparison
compares the layer alone.

Data: any captioned pictures; public ones: CC3M (``pixparse/cc3m-wds``), ``--data 'cc3m-wds/cc3m-train-*.tar'``. Our
figures: ``--data emoji:64``.
"""

from __future__ import annotations

from xfusion.fusion.dual_tower import DualTower
from xfusion.fusion.layered import Layered
from xfusion.fusion.modality_experts import ModalityExperts
from xfusion.recipes.xfusion import xfusion
from xfusion.training.stages import Recipe

KIND = "layered"
PAPER = "none"
STATUS = "runs"


def hybrid(stride: int = 10, split: int = 20, num_layers: int = 30) -> Recipe:
    """Whole blocks at every stride-th layer: experts below ``split``, tower blocks from there on."""
    fusion = Layered.Config(
        parts=(
            ModalityExperts.Config(layers=(0, split), stride=stride, offset=stride // 2),
            DualTower.Config(layers=(split, num_layers), stride=stride, offset=stride // 2),
        )
    )
    return xfusion().with_model(fusion=fusion)
