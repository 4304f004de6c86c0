"""Mixture-of-Transformers: all weights but the embeddings by modality, one global attention.

Paper: Liang et al., "Mixture-of-Transformers: A Sparse and Scalable Architecture for Multi-Modal Foundation Models",
arXiv 2411.04996.

Faithful: norms, Q, K, V, O and MLP by modality, one softmax over all positions.

Adapted: the paper trains both modalities from scratch with norms behind each branch; on a frozen base the text
weights stay, and its own order of norms is kept: on a frozen base this is LMFusion's layer. Everything around the
layer (pictures, port, objectives, data, schedule) is the recipe `xfusion`'s, so that a comparison compares the layer
alone.
"""

from __future__ import annotations

from xfusion.fusion.modality_experts import ModalityExperts
from xfusion.recipes.xfusion import xfusion
from xfusion.training.stages import Recipe

KIND = "modality experts"
PAPER = "arXiv 2411.04996"
STATUS = "sketch"


def mot(stride: int = 1) -> Recipe:
    """All parts of their own at every layer."""
    return xfusion().with_model(fusion=ModalityExperts.Config(stride=stride))
