"""X-Fusion: a frozen text tower and a trainable copy of it for pictures.

Paper: Mo et al., "X-Fusion: Introducing New Modality to Frozen Large Language Models", ICCV 2025, arXiv 2504.20996.

Faithful: the dual-tower layer of section 3.2 (each tower makes keys and values for all positions, outputs are kept by
modality, copy initialisation), linear patches, flow matching with logit-normal time, next-token loss on answers, weights
0.2 and 1, drawing to captioning 2 : 1, clean pictures for understanding, AdamW (0.9, 0.95) with warm-up.

Adapted, because the paper leaves it open or the default must run on two cores: attention both ways inside a picture,
noise level added to the picture tokens, [BOI] and [EOI] as trainable rows beside the frozen table; a media block at every
fifth layer with an MLP of 512 instead of a full copy; 32 px pixels in 8 x 8 patches instead of a VAE; clean-picture
prediction; 10 % empty captions for guidance.
"""

from __future__ import annotations

from xfusion.fusion.dual_tower import DualTower
from xfusion.model import ModelConfig
from xfusion.training.stages import Recipe, Stage

KIND = "dual tower"
PAPER = "arXiv 2504.20996"
STATUS = "runs"


def xfusion() -> Recipe:
    """The recipe, sized for two CPU cores."""
    return Recipe(
        model=ModelConfig(fusion=DualTower.Config(stride=5, mlp=512)),
        data="emoji",
        stages=(Stage(),),
    )
