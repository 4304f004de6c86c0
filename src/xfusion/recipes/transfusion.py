"""Transfusion: one transformer for next tokens and denoised pictures.

Paper: Zhou et al., "Transfusion: Predict the Next Token and Diffuse Images with One Multi-Modal Model", arXiv
2408.11039.

Faithful: shared weights for all positions, causal over the sequence and both ways inside a picture, linear patches;
DDPM with the noise predicted and a cosine schedule, five times the weight of the words' loss; pictures that stand before
their words are noised by half at most, and then carry the loss of the noise, too.

Adapted: the paper trains from scratch; here the blocks start as copies of the language model's, so that it is the
single tower at every layer. Pixels instead of a VAE's latents, and a rate at which the noise is learned here (at the
recipe `xfusion`'s it is not). Data and schedule are that recipe's; to compare the layer alone take `single_tower`, which
also has its objective.
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
    return xfusion(largest_noise=0.5, rate=5e-4).with_model(
        fusion=SharedDecoder.Config(stride=stride), media=Diffusion.Config()
    )
