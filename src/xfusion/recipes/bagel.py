"""BAGEL: two experts in one attention; only noised pictures take the generation expert.

Paper: Deng et al., "Emerging Properties in Unified Multimodal Pretraining", arXiv 2505.14683.

Faithful: the generation expert is a full copy that handles noised picture tokens alone; noise level added to their
embeddings; row and column positions; a noised copy is never read by what comes later.

Adapted: the understanding expert is the frozen language model, which the paper trains, without the norms of queries and keys that
the paper adds; clean pictures come from the same patches instead of a SigLIP encoder; of the contexts that the paper drops for
guidance, captions alone; one stage instead of four. Everything around the layer (pictures, port, objectives, data, schedule) is
the recipe `xfusion`'s, so that a comparison compares the layer alone.

Data: any captioned pictures; public ones: CC3M (``pixparse/cc3m-wds``), ``--data 'cc3m-wds/cc3m-train-*.tar'``. Our
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
