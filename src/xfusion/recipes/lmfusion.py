"""LMFusion: modality-specific norms, projections and MLP in every layer of a frozen Llama, one joint attention.

Paper: Shi et al., "LMFusion: Adapting Pretrained Language Models for Multimodal Generation", arXiv 2412.15188.

Faithful: the layer (norms, Q, K, V, O and MLP copied, text modules frozen), attention both ways inside a picture.

Adapted: linear patches instead of a U-Net down- and upsampler; flow matching instead of DDPM with a cosine schedule.

Everything around the layer (pictures, port, objectives, data, schedule) is the recipe `xfusion`'s, so that a
comparison compares the layer alone.
"""

from __future__ import annotations

from xfusion.fusion.modality_experts import ModalityExperts
from xfusion.recipes.xfusion import xfusion
from xfusion.training.stages import Recipe

KIND = "modality experts"
PAPER = "arXiv 2412.15188"
STATUS = "sketch"


def lmfusion(stride: int = 1) -> Recipe:
    """All parts of their own at every layer."""
    return xfusion().with_model(fusion=ModalityExperts.Config(stride=stride))
