"""LoRA: any recipe, with low-rank deltas on the base's own layers beside its mechanism.

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685.

Faithful: ``h = W x + (alpha / r) B A x`` on queries and values, B = 0 at the start, by peft's own layers; the matrices
themselves stay frozen, and the deltas can be left out again.

Adapted: the deltas are trained together with the recipe's own new weights, in its stages and at its rates; papers that use
LoRA (SEED-LLaMA, VL-GPT, LLaVA's LoRA variant) choose rank and targets of their own. Text alone goes through the deltas and
is another than the base's: the regime is LoRA, which packs, cards, `show`, `list` and `verify` say, and `compare` ranks it
with no strictly frozen recipe.

Data: that of the recipe inside, by default `llava`'s: the paper's CC3M of 595 K pairs
(``liuhaotian/LLaVA-CC3M-Pretrain-595K``), ``--data images/chat.jsonl``, its ``chat.json`` as lines beside the pictures.
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
    plain = find(recipe)()
    return plain.with_model(fusion=Lora.Config(inner=plain.model.fusion, rank=rank, alpha=alpha, targets=targets))
