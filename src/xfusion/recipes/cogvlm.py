"""CogVLM's visual expert: separate queries, keys, values, output and MLP for picture positions, with shared norms.

Paper: Wang et al., "CogVLM: Visual Expert for Pretrained Language Models", arXiv 2311.03079.

Faithful: the expert, copied from the language model; all patches of a picture at one rotary position; causal order
among patches (preferred by the paper's ablation).

Adapted: linear patches instead of EVA2-CLIP with a SwiGLU adapter; one stage, without the paper's instruction tuning or its
prompts (``[INST] ... [/INST]``, ``Question: ... Short answer:``): a caption stands alone or after a plain question; it also
draws, which the paper's model does not.

``stride=n`` is the slim form: an expert at every n-th layer, the first at layer n // 2, so that 4 of 30 layers gives seven, at
2, 6, ..., 26. ``--model.fusion.offset 0`` starts at the first, with eight, the paper's ceil(30 / 4).

Everything except the layer (pictures, port, objectives, data, schedule) is shared with the recipe `xfusion`, so a
comparison isolates the layer.

Data: from the paper, LAION (``laion/relaion2B-en-research-safe``, links to download with img2dataset), ``--data
'laion/*.tar'``. Our figures: ``--data emoji:64``.
"""

from __future__ import annotations

from dataclasses import replace

from xfusion.fusion.modality_experts import ModalityExperts
from xfusion.recipes.xfusion import xfusion
from xfusion.training.stages import Recipe

KIND = "modality experts"
PAPER = "arXiv 2311.03079"
STATUS = "runs"


def cogvlm(stride: int = 1) -> Recipe:
    """An expert at every layer, one rotary position per picture."""
    recipe = xfusion()
    fusion = ModalityExperts.Config(stride=stride, own=("query", "key", "value", "output", "mlp"))
    image = replace(recipe.model.image, position="shared", order="causal")
    return recipe.with_model(fusion=fusion, image=image)
