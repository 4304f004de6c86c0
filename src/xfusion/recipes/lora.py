"""LoRA: any recipe, with low-rank deltas on the base's own layers in addition to its mechanism.

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685.

Faithful: ``h = W x + (alpha / r) B A x`` on queries and values, with B initialised at 0, in peft's own layers; the matrices
themselves stay frozen, and the deltas can be switched off.

Adapted: the deltas are trained together with the recipe's own new weights, in its stages and at its rates; papers that use
LoRA (SEED-LLaMA, VL-GPT, LLaVA's LoRA variant) choose their own rank and targets. Text alone goes through the deltas, so it
differs from the base's. The regime is therefore LoRA; packs, cards, `show`, `list` and `verify` say so, and `compare` does not
rank it against strictly frozen recipes.

Data: that of the wrapped recipe, by default `llava`: the paper's CC3M of 595 K pairs
(``liuhaotian/LLaVA-CC3M-Pretrain-595K``), ``--data images/chat.jsonl``, its ``chat.json`` as JSON lines next to the pictures.
Our figures: ``--data runs/clothing/photos.jsonl:held=0.1`` (`runs/write_clothing.py`).
"""

from __future__ import annotations

from xfusion.fusion.lora import Lora
from xfusion.recipes.base import find
from xfusion.training.stages import Recipe

KIND = "low-rank base"
PAPER = "arXiv 2106.09685"
STATUS = "runs"


def lora(
    recipe: str = "llava",
    rank: int = 8,
    alpha: float = 16.0,
    targets: tuple[str, ...] | None = ("query", "value"),
) -> Recipe:
    """A recipe with deltas on the base's layers.

    Args:
        recipe: the recipe, arguments in brackets.
        rank: of the deltas.
        alpha: they are multiplied by alpha / rank.
        targets: matrices that carry one, of query, key, value, output, in and out; None takes all.
    """
    base_recipe = find(recipe)()
    return base_recipe.with_model(
        fusion=Lora.Config(inner=base_recipe.model.fusion, rank=rank, alpha=alpha, targets=targets)
    )
