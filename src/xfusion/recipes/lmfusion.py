"""LMFusion: modality-specific norms, projections and MLP in every layer of a frozen Llama, one joint attention.

Paper: Shi et al., "LMFusion: Adapting Pretrained Language Models for Multimodal Generation", arXiv 2412.15188.

Faithful: the layer (norms, Q, K, V, O and MLP copied, text modules frozen), attention both ways inside a picture; DDPM
with the noise predicted and a cosine schedule, five times the weight of the words' loss.

Adapted: linear patches of pixels instead of a VAE with a U-Net down- and upsampler, and a rate at which the noise is
learned here (at the recipe `xfusion`'s it is not). Data and schedule are that recipe's; to compare the layer alone take
`dual_projection`, which also has its objective.
"""

from __future__ import annotations

from xfusion.fusion.modality_experts import ModalityExperts
from xfusion.objectives.diffusion import Diffusion
from xfusion.recipes.xfusion import xfusion
from xfusion.training.stages import Recipe

KIND = "modality experts"
PAPER = "arXiv 2412.15188"
STATUS = "sketch"


def lmfusion(stride: int = 1) -> Recipe:
    """All parts of their own at every layer."""
    return xfusion(rate=5e-4).with_model(fusion=ModalityExperts.Config(stride=stride), media=Diffusion.Config())
