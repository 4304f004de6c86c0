"""Transfusion: one transformer for next-token prediction and picture denoising.

Paper: Zhou et al., "Transfusion: Predict the Next Token and Diffuse Images with One Multi-Modal Model", arXiv
2408.11039.

Faithful: shared weights for all positions; attention is causal over the sequence and bidirectional inside a picture; linear
patches of a VAE's latents; DDPM on a cosine schedule with five times the weight of the text loss; pictures before their words
are noised by at most half, and then also have the diffusion loss.

Adapted: the paper trains from scratch; here the blocks start as copies of the language model's, so it is the single tower at
every layer. Drawing takes 25 steps at a guidance of 1.5 unless asked for others; the paper's takes 250, at 3 in its ablations
and 5 in its comparisons. The prediction target, the VAE, the rate and the rest are those of the recipe `lmfusion`; to compare
only the layer use `single_tower`, which has the objective of `xfusion`.

Data: the paper's pictures are not public; a public alternative is CC3M (``pixparse/cc3m-wds``), ``--data
'cc3m-wds/cc3m-train-*.tar'``. Our figures: ``--data emoji:64``.
"""

from __future__ import annotations

from dataclasses import replace

from xfusion.fusion.shared_decoder import SharedDecoder
from xfusion.recipes.lmfusion import lmfusion
from xfusion.training.stages import Recipe

KIND = "shared decoder"
PAPER = "arXiv 2408.11039"
STATUS = "runs"


def transfusion(stride: int = 1, codec: str = "emoji-kl") -> Recipe:
    """Trained copies of every layer.

    Args:
        stride: they stand at every stride-th layer.
        codec: a VAE of diffusers: a folder, a shipped codec's name, or a hub id.
    """
    recipe = lmfusion(codec=codec).with_model(fusion=SharedDecoder.Config(stride=stride))
    (stage,) = recipe.stages
    return replace(recipe, stages=(replace(stage, mixture=replace(stage.mixture, largest_noise=0.5)),))
