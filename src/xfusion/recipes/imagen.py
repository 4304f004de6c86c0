"""Imagen: the states of a frozen language model condition a diffusion model of pixels.

Paper: Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding", NeurIPS 2022,
arXiv 2205.11487.

Faithful: the language model is frozen and reads each prompt once; the denoiser reads the whole sequence of its states by
cross-attention; their mean, added to the noise level's embedding, scales and shifts the inputs of every block; pixels; a cosine
schedule; a share of prompts dropped for classifier-free guidance; dynamic thresholding of the clean estimate.

Adapted: the penultimate states of a decoder language model instead of the T5-XXL encoder; a small transformer over patches
instead of the Efficient U-Net; velocity prediction, where the paper's base model predicts noise (with which a short run on
patches learns little, docs/training_log.md); 32 pixels and no super-resolution stages, so no noise-conditioning augmentation;
DDIM steps. The 99.5th percentile and the 10 % of dropped prompts are our choice. Pictures are only drawn: no word reads one.

Data: from the paper, LAION (``laion/relaion2B-en-research-safe``, links to download with img2dataset), ``--data
'laion/*.tar'``. Our figures: ``--data emoji:64``.
"""

from __future__ import annotations

from xfusion.data.mixture import MixtureConfig
from xfusion.fusion.conditioned import Conditioned
from xfusion.modalities.image import ImageModality
from xfusion.model import ModelConfig
from xfusion.objectives.diffusion import Diffusion
from xfusion.objectives.next_token import NextToken
from xfusion.training.stages import Recipe, Stage

KIND = "conditioned denoiser"
PAPER = "arXiv 2205.11487"
STATUS = "runs"


def imagen(width: int = 256, depth: int = 6, patch: int = 8, size: int = 32, threshold: float | None = 0.995) -> Recipe:
    """The recipe, sized for two CPU cores.

    Args:
        width: of the denoiser.
        depth: its blocks.
        patch: pixels of a token's side.
        size: pixels of a picture's side.
        threshold: percentile of dynamic thresholding; None clips at 1.
    """
    return Recipe(
        model=ModelConfig(
            image=ImageModality.Config(patch=patch, sizes=(size,)),
            fusion=Conditioned.Config(width=width, depth=depth),
            text=NextToken.Config(weight=0.0),
            # What words decide is decided at high noise, where an error of the noise says least of the picture.
            media=Diffusion.Config(prediction="velocity", threshold=threshold, guidance=2.0),
        ),
        data="emoji",
        # Of equally many samples, twice as many steps of half as many teach more (docs/training_log.md).
        stages=(Stage(rate=1e-3, schedule="cosine", mixture=MixtureConfig(draw=32, caption=0)),),
    )
