"""X-Fusion: a frozen text tower and a trainable copy of it for pictures.

Paper: Mo et al., "X-Fusion: Introducing New Modality to Frozen Large Language Models", ICCV 2025, arXiv 2504.20996.

Faithful: the dual-tower layer of section 3.2 (each tower makes keys and values for all positions, outputs are kept by
modality, copy initialisation); linear patches; flow matching with logit-normal time; next-token loss on answers; weights
0.2 and 1; drawing to captioning 2 : 1; clean pictures for understanding; AdamW (0.9, 0.95) with warm-up.

Adapted, because the paper leaves it open or the default must run on two cores: bidirectional attention inside a picture;
noise level added to the picture tokens; [BOI] and [EOI] as trainable rows next to the frozen table; a media block at every
fifth layer with an MLP of 512 instead of a full copy; 32 px pixels in 8 x 8 patches instead of a VAE; clean-picture
prediction, with more frequent and more heavily weighted high noise levels than logit-normal (0, 1), and sampling that takes
more steps there; 10 % empty captions for guidance, at a scale of 1.5 instead of 5.5; a rate of 4e-3 instead of 1e-4
(``rate``).

Data: the paper's pictures are not public; a public alternative is CC3M (``pixparse/cc3m-wds``), ``--data
'cc3m-wds/cc3m-train-*.tar'``. Our figures: ``--data emoji``, and ``emoji:64`` to ``emoji:128`` in comparisons.
"""

from __future__ import annotations

from dataclasses import replace

from xfusion.data.mixture import MixtureConfig
from xfusion.data.sequence import XFusionError
from xfusion.data.templates import Templates
from xfusion.fusion.dual_tower import DualTower
from xfusion.model import ModelConfig
from xfusion.objectives.flow_matching import FlowMatching
from xfusion.training.stages import Recipe, Stage

KIND = "dual tower"
PAPER = "arXiv 2504.20996"
STATUS = "runs"


def xfusion(stride: int = 5, mlp: int | None = 512, largest_noise: float = 0.0, rate: float = 4e-3) -> Recipe:
    """The recipe, sized for two CPU cores; drawing to captioning 2 : 1 as in the paper.

    Args:
        stride: a media block stands at every stride-th layer; the paper's is 1.
        mlp: width of the media blocks' MLP; None copies it whole, as the paper does.
        largest_noise: how far pictures to be named are noised, 0 to 1; the paper finds 0 best (figure 6).
        rate: largest learning rate.
    """
    return Recipe(
        model=ModelConfig(
            fusion=DualTower.Config(stride=stride, mlp=mlp),
            # Noisy levels and a low weight on clean ones: what words decide is decided there, and sampling has to walk
            # where training was (docs/training_log.md).
            media=FlowMatching.Config(time_mean=2.0, largest_weight=2.0, sampling_shift=100.0, guidance=1.5),
        ),
        data="emoji",
        stages=(Stage(rate=rate, mixture=MixtureConfig(largest_noise=largest_noise)),),
    )


def demo(pictures: int = 128, draw: int = 64) -> Recipe:
    """Five minutes on few pictures, 2 : 1, one wording each: every other wording costs as many samples again.

    Args:
        pictures: emoji to learn; `xfusion demo` takes fewer on a slow machine.
        draw: drawing samples per step, and half as many captions.
    """
    recipe, templates = xfusion(), Templates(article_share=0.0, other_wordings=0.0)
    stage = replace(recipe.stages[0], mixture=MixtureConfig(draw=draw, caption=draw // 2, templates=templates))
    return replace(recipe, data=f"emoji:{pictures}", stages=(stage,))


def pack(part: int = 1) -> Recipe:
    """The shipped pack ``emoji``: all pictures of the train split in four runs, each ``--from`` the one before.

    What words decide is learned at high noise; what makes a picture crisp is learned last, at low noise
    (docs/training_log.md).

    Args:
        part: which run, 1 to 4.
    """
    # Steps, rate, warm-up, captions per step; mean and deviation of the noise levels, largest weight.
    parts = (
        (4700, 5e-3, 200, 16, 2.0, 1.0, 2.0),
        (3600, 4e-3, 200, 4, 3.0, 1.0, 2.0),
        (1500, 3e-3, 100, 4, 0.5, 1.5, 20.0),
        (1300, 2.5e-3, 100, 4, 0.0, 1.5, 50.0),
    )
    if not 1 <= part <= len(parts):
        raise XFusionError(f"the pack's part {part} is not one of 1 to {len(parts)}")
    steps, rate, warmup, caption, mean, deviation, largest = parts[part - 1]
    media = FlowMatching.Config(
        time_mean=mean,
        time_std=deviation,
        largest_weight=largest,
        sampling_shift=6.0,
        guidance=1.5,
        guidance_interval=(0.5, 1.0),
    )
    stage = Stage(steps=steps, rate=rate, warmup=warmup, mixture=MixtureConfig(draw=64, caption=caption))
    return replace(xfusion().with_model(media=media), stages=(stage,))
