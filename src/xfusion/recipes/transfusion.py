"""Transfusion: one transformer for next tokens and denoised pictures.

Paper: Zhou et al., "Transfusion: Predict the Next Token and Diffuse Images with One Multi-Modal Model", arXiv
2408.11039.

Faithful: shared weights for all positions, causal over the sequence and both ways inside a picture, linear patches;
DDPM with the noise predicted and a cosine schedule, five times the weight of the words' loss; pictures that stand before
their words are noised by half at most, and then carry the loss of the noise, too.

Adapted: the paper trains from scratch; here the blocks start as copies of the language model's, so that it is the
single tower at every layer. Pixels instead of a VAE's latents. Data and schedule are the recipe `xfusion`'s; to compare
the layer alone take `single_tower`, which also has that recipe's objective.
"""

from __future__ import annotations

from xfusion.fusion.shared_decoder import SharedDecoder
from xfusion.objectives.diffusion import Diffusion
from xfusion.recipes.xfusion import xfusion
from xfusion.training.stages import Recipe

KIND = "shared decoder"
PAPER = "arXiv 2408.11039"
STATUS = "sketch"


def transfusion(stride: int = 1) -> Recipe:
    """Trained copies of every layer."""
    return xfusion(largest_noise=0.5).with_model(fusion=SharedDecoder.Config(stride=stride), media=Diffusion.Config())
