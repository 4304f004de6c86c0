"""A hybrid: modality experts in the lower layers, a dual tower in the upper ones.

Not published. It tests whether one joint set of keys and values is enough in the layers where pictures and words are still
apart, and where the second set of the dual tower (arXiv 2504.20996, section 3.2) is worth its cost.

Everything except the layer (pictures, port, objectives, data, schedule) is shared with the recipe `xfusion`, so a
comparison isolates the layer.

Data: any captioned pictures, such as the public CC3M (``pixparse/cc3m-wds``), ``--data 'cc3m-wds/cc3m-train-*.tar'``. Our
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
