"""Transfusion: one transformer for next tokens and denoised pictures.

Paper: Zhou et al., "Transfusion: Predict the Next Token and Diffuse Images with One Multi-Modal Model", arXiv
2408.11039.

Faithful: shared weights for all positions, causal over the sequence and both ways inside a picture, linear patches.

Adapted: the paper trains from scratch; here the blocks start as copies of the language model's, so that it is the
single tower at every layer. Flow matching instead of DDPM. Everything around the layer (pictures, port, objectives,
data, schedule) is the recipe `xfusion`'s, so that a comparison compares the layer alone.
"""

from __future__ import annotations

from xfusion.fusion.shared_decoder import SharedDecoder
from xfusion.recipes.xfusion import xfusion
from xfusion.training.stages import Recipe

KIND = "shared decoder"
PAPER = "arXiv 2408.11039"
STATUS = "sketch"


def transfusion(stride: int = 1) -> Recipe:
    """Trained copies of every layer."""
    return xfusion().with_model(fusion=SharedDecoder.Config(stride=stride))
