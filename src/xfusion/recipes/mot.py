"""Mixture-of-Transformers: all weights but the embeddings by modality, one global attention.

Paper: Liang et al., "Mixture-of-Transformers: A Sparse and Scalable Architecture for Multi-Modal Foundation Models",
arXiv 2411.04996.

Faithful: norms, Q, K, V, O and MLP by modality, one softmax over all positions.

Adapted: the paper trains both modalities from scratch with norms behind each branch; on a frozen base the text
weights stay, and its own order of norms is kept: on a frozen base this is LMFusion's layer. Everything around the
layer (pictures, port, objectives, data, schedule) is the recipe `xfusion`'s, so that a comparison compares the layer
alone.

The paper's own layer is `xfusion.recipes.mot:from_scratch`: `h = x + norm(O attention(x))`, `y = h + norm(MLP(h))`, with
weights of both modalities trained, on a base of the same shape with random weights (`scratch:` before its source). It
is refused on a base that was trained, whose function it would change. Still adapted: embeddings, last norm and head stay
as they were drawn, where the paper trains them, and the words that it learns are those of the captions alone: nobody
shall expect a language model of it.

Data: the paper's pictures are not public; pairs that are: CC3M (``pixparse/cc3m-wds``), ``--data
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
