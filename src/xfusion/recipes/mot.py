"""Mixture-of-Transformers: separate weights by modality for everything but the embeddings, with one global attention.

Paper: Liang et al., "Mixture-of-Transformers: A Sparse and Scalable Architecture for Multi-Modal Foundation Models",
arXiv 2411.04996.

Faithful: norms, Q, K, V, O and MLP by modality, one softmax over all positions.

Adapted: the paper trains both modalities from scratch with norms after each branch; on a frozen base the text weights and the
base's order of norms are kept, which makes it LMFusion's layer. A peak rate of 4e-3 that falls linearly, without weight decay,
instead of 3e-4 that falls as a cosine, with 0.1. Everything except the layer (pictures, port, objectives, data, schedule) is
shared with the recipe `xfusion`, so a comparison isolates the layer.

The paper's own layer is `xfusion.recipes.mot:from_scratch`: `h = x + norm(O attention(x))`, `y = h + norm(MLP(h))`, with
trained weights for both modalities, on a base of the same shape with random weights (`scratch:` before its source). It
is refused on a trained base, whose function it would change. Still adapted: embeddings, last norm and head keep their
random values, where the paper trains them. It learns only the words of the captions, so do not expect a language model.

Data: the paper's pictures are not public; a public alternative is CC3M (``pixparse/cc3m-wds``), ``--data
'cc3m-wds/cc3m-train-*.tar'``. Our figures: ``--data emoji:64``.
"""

from __future__ import annotations

from xfusion.backbone import EMBEDDED, SCRATCH
from xfusion.fusion.modality_experts import ModalityExperts
from xfusion.model import BackboneConfig
from xfusion.recipes.xfusion import xfusion
from xfusion.training.stages import Recipe

KIND = "modality experts"
PAPER = "arXiv 2411.04996"
STATUS = "runs"


def mot(stride: int = 1) -> Recipe:
    """All parts of their own at every layer."""
    return xfusion().with_model(fusion=ModalityExperts.Config(stride=stride))


def from_scratch(base: str = EMBEDDED) -> Recipe:
    """The paper's layer, in words and pictures alike, from random weights.

    Args:
        base: whose shape and tokenizer it has.
    """
    return xfusion().with_model(
        backbone=BackboneConfig(source=SCRATCH + base), fusion=ModalityExperts.Config(post_norm=True)
    )
