"""BAGEL: two experts in one attention; only noised pictures use the generation expert.

Paper: Deng et al., "Emerging Properties in Unified Multimodal Pretraining", arXiv 2505.14683.

Faithful: the generation expert is a full copy that handles only noised picture tokens; the noise level is added to their
embeddings; row and column positions; later positions never read a noised copy.

Adapted: the understanding expert is the frozen language model, which the paper trains, without the query and key norms that the
paper adds; clean pictures come from the same patches instead of a SigLIP encoder; for guidance only captions are dropped, not
pictures; one stage instead of four. Everything except the layer (pictures, port, objectives, data, schedule) is
shared with the recipe `xfusion`, so a comparison isolates the layer.

Data: any captioned pictures, such as the public CC3M (``pixparse/cc3m-wds``), ``--data 'cc3m-wds/cc3m-train-*.tar'``. Our
figures: ``--data emoji:64``.
"""

from __future__ import annotations

from xfusion.fusion.modality_experts import ModalityExperts
from xfusion.recipes.xfusion import xfusion
from xfusion.training.stages import Recipe

KIND = "modality experts"
PAPER = "arXiv 2505.14683"
STATUS = "runs"


def bagel(stride: int = 1) -> Recipe:
    """A generation expert at every layer."""
    return xfusion().with_model(fusion=ModalityExperts.Config(stride=stride, noised_only=True))
