"""mPLUG-Owl2's modality-adaptive module: norms, keys and values by modality; queries, output and MLP shared.

Paper: Ye et al., "mPLUG-Owl2: Revolutionizing Multi-modal Large Language Model with Modality Collaboration", arXiv
2311.04257.

Faithful: the module, initialised from the language model; ordinary positions.

Adapted: linear patches instead of a visual abstractor with 64 queries over CLIP; attention among the patches of a picture
is bidirectional, where the paper's is causal; one stage with the language model frozen, like the paper's first, without its
second, which trains everything, and without the prompts ``USER: ... ASSISTANT: ...``: a caption stands alone or after a plain
question; it also draws, which the paper's model does not.

Everything except the layer (pictures, port, objectives, data, schedule) is shared with the recipe `xfusion`, so a
comparison isolates the layer.

Data: from the paper, CC3M (``pixparse/cc3m-wds``), ``--data 'cc3m-wds/cc3m-train-*.tar'``. Our figures: ``--data
emoji:64``.
"""

from __future__ import annotations

from xfusion.fusion.modality_experts import ModalityExperts
from xfusion.recipes.xfusion import xfusion
from xfusion.training.stages import Recipe

KIND = "modality experts"
PAPER = "arXiv 2311.04257"
STATUS = "runs"


def mplug_owl2(stride: int = 1) -> Recipe:
    """Norms, keys and values of their own at every layer."""
    return xfusion().with_model(fusion=ModalityExperts.Config(stride=stride, own=("norm", "key", "value")))
