"""MoE-LLaVA: a few experts instead of some layers' MLPs, and a router that sends each token to two of them.

Paper: Lin et al., "MoE-LLaVA: Mixture of Experts for Large Vision-Language Models", arXiv 2401.15947.

Faithful: experts are copies of the layer's MLP; a float32 router without bias, with the two largest probabilities normalised
to a sum of 1 (as in its code), at equally spaced layers from the first; a balance loss of weight 0.01; picture tokens go through
the language model's layers like words; only experts, router and connector are trained.

Adapted: the paper trains first the connector, then the whole language model, then experts and routers; here one stage trains
connector, experts and routers together, and the language model is frozen throughout. The first expert is the base's own MLP,
and routing starts at the first picture, so text alone is unchanged; ``paper=True`` routes every token among experts that are
all trained, as published. The trained row [BOI] before a picture, which the paper has not, is not routed in either form. No
capacity limit and no noise on the second choice, so a token's routing does not depend on its batch; EfficientNet-Lite0 instead
of CLIP before the two linear layers (``encoder`` sets another encoder); three experts at every fifth layer, for two cores,
instead of the paper's four at every second (``every=2, experts=4``); a caption stands alone or after a plain question, without
the system line and the turns ``USER: ... ASSISTANT: ...``.

Data: the paper's 558 K pairs (``liuhaotian/LLaVA-Pretrain``), ``--data images/blip_laion_cc_sbu_558k.jsonl``, its
``blip_laion_cc_sbu_558k.json`` as JSON lines next to the pictures. Our figures: ``--data
runs/clothing/photos.jsonl:held=0.1`` (`runs/write_clothing.py`).
"""

from __future__ import annotations

from dataclasses import replace

from xfusion.fusion.sparse_experts import SparseExperts
from xfusion.objectives.load_balance import LoadBalance
from xfusion.recipes.llava_1_5 import llava_1_5
from xfusion.training.stages import Recipe

KIND = "sparse experts"
PAPER = "arXiv 2401.15947"
STATUS = "runs"


def moe_llava(
    every: int = 5,
    experts: int = 3,
    paper: bool = False,
    encoder: str | None = None,
    side: int = 224,
    strip: int = 1,
) -> Recipe:
    """The recipe, sized for two CPU cores.

    Args:
        every: experts stand at every n-th layer; the paper's is 2.
        experts: experts of a layer; the paper's are 4.
        paper: train all experts and route all tokens but [BOI], as published: text is then not kept.
        encoder: folder or hub id of a vision transformer; None takes EfficientNet-Lite0.
        side: pixels that the encoder looks at.
        strip: neighbouring features that make one token, as in `llava`.
    """
    recipe = llava_1_5(encoder, side, strip)
    fusion = SparseExperts.Config(stride=every, experts=experts, frozen_expert=not paper)
    model = replace(recipe.model, fusion=fusion, extra=(LoadBalance.Config(),))
    return replace(recipe, model=model)
