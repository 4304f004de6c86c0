"""LMFusion: modality-specific norms, projections and MLP in every layer of a frozen Llama, one joint attention.

Paper: Shi et al., "LMFusion: Adapting Pretrained Language Models for Multimodal Generation", arXiv 2412.15188.

Faithful: the layer (norms, Q, K, V, O and MLP copied, text modules frozen); bidirectional attention inside a picture; latents of
a VAE, and DDPM on a cosine schedule with five times the weight of the text loss.

Adapted: velocity prediction, where the paper predicts noise (with which little is learned in minutes, docs/training_log.md);
linear patches of 2 x 2 latents instead of a U-Net down- and upsampler; the small VAE of emoji (``codec`` sets another). The
data are those of the recipe `xfusion`, and so is the schedule (linear, 50 steps of warm-up), but at a peak rate of 1e-3; the
paper's is 1e-4, falls as a cosine and warms up for 4000. To compare only the layer use `dual_projection`, which also has its
objective.

Data: the paper's pictures are not public; a public alternative is CC3M (``pixparse/cc3m-wds``), ``--data
'cc3m-wds/cc3m-train-*.tar'``. Our figures: ``--data emoji:64``.
"""

from __future__ import annotations

from dataclasses import replace

from xfusion.fusion.modality_experts import ModalityExperts
from xfusion.modalities.codecs.autoencoder_kl import AutoencoderKL
from xfusion.objectives.diffusion import Diffusion
from xfusion.recipes.xfusion import xfusion
from xfusion.training.stages import Recipe

KIND = "modality experts"
PAPER = "arXiv 2412.15188"
STATUS = "runs"


def lmfusion(stride: int = 1, codec: str = "emoji-kl") -> Recipe:
    """All parts of their own at every layer.

    Args:
        stride: they stand at every stride-th layer.
        codec: a VAE of diffusers: a folder, a shipped codec's name, or a hub id.
    """
    recipe = xfusion(rate=1e-3)
    image = replace(recipe.model.image, codec=AutoencoderKL.Config(source=codec), patch=2)
    media = Diffusion.Config(prediction="velocity", largest_value=None, guidance=1.5)  # latents have no largest value
    return recipe.with_model(image=image, fusion=ModalityExperts.Config(stride=stride), media=media)
