"""X-Fusion: a frozen text tower and a trainable copy of it for pictures.

Paper: Mo et al., "X-Fusion: Introducing New Modality to Frozen Large Language Models", ICCV 2025, arXiv 2504.20996.

Faithful: the dual-tower layer of section 3.2 (each tower makes keys and values for all positions, outputs are kept by
modality, copy initialisation), linear patches, flow matching with logit-normal time, next-token loss on answers, weights
0.2 and 1, drawing to captioning 2 : 1, clean pictures for understanding, AdamW (0.9, 0.95) with warm-up.

Adapted, because the paper leaves it open or the default must run on two cores: attention both ways inside a picture,
noise level added to the picture tokens, [BOI] and [EOI] as trainable rows beside the frozen table; a media block at every
fifth layer with an MLP of 512 instead of a full copy; 32 px pixels in 8 x 8 patches instead of a VAE; clean-picture
prediction, with more and heavier noisy levels than logit-normal (0, 1), and sampling that lingers there; 10 % empty
captions for guidance.
"""

from __future__ import annotations

from dataclasses import replace

from xfusion.data.mixture import MixtureConfig
from xfusion.data.templates import Templates
from xfusion.fusion.dual_tower import DualTower
from xfusion.model import ModelConfig
from xfusion.objectives.flow_matching import FlowMatching
from xfusion.training.stages import Recipe, Stage

KIND = "dual tower"
PAPER = "arXiv 2504.20996"
STATUS = "runs"


def xfusion(stride: int = 5, mlp: int | None = 512) -> Recipe:
    """The recipe, sized for two CPU cores; drawing to captioning 2 : 1 as in the paper.

    Args:
        stride: a media block stands at every stride-th layer; the paper's is 1.
        mlp: width of the media blocks' MLP; None copies it whole, as the paper does.
    """
    return Recipe(
        model=ModelConfig(
            fusion=DualTower.Config(stride=stride, mlp=mlp),
            # Noisy levels and a low weight on clean ones: what words decide is decided there, and sampling has to walk
            # where training was (docs/training_log.md).
            media=FlowMatching.Config(time_mean=2.0, largest_weight=2.0, sampling_shift=100.0),
        ),
        data="emoji",
        stages=(Stage(rate=4e-3),),
    )


def demo() -> Recipe:
    """Five minutes on 128 pictures, 2 : 1, one wording each: every other wording costs as many samples again."""
    recipe, templates = xfusion(), Templates(article_share=0.0, other_wordings=0.0)
    stage = replace(recipe.stages[0], mixture=MixtureConfig(templates=templates))
    return replace(recipe, data="emoji:128", stages=(stage,))


def pack() -> Recipe:
    """The shipped pack ``emoji``: all pictures of the train split, mostly by their names, 4 : 1."""
    mixture = MixtureConfig(draw=64, caption=16)
    return replace(xfusion(), stages=(Stage(steps=4700, rate=5e-3, warmup=200, mixture=mixture),))


def finish() -> Recipe:
    """What the shipped pack learned after `pack` (``--from`` its result): noisier levels yet, 16 : 1."""
    recipe = pack()
    media = replace(recipe.model.media, time_mean=3.0, guidance=1.5)
    mixture = MixtureConfig(draw=64, caption=4)
    stage = replace(recipe.stages[0], steps=3600, rate=4e-3, mixture=mixture)
    return replace(recipe, model=replace(recipe.model, media=media), stages=(stage,))
