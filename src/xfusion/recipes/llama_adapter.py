"""LLaMA-Adapter: learned prompts in the attention of the upper layers, behind a zero-initialised gate.

Paper: Zhang et al., "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", arXiv 2303.16199.

Faithful: ten prompt rows in all layers but the first two; the frozen matrices make their keys and values, without positions;
a separate softmax; a tanh gate per head, initialised at 0; one vector of the picture added to every row at every layer;
the language model is frozen; one stage. Tests compare the attention to a prompt with peft's AdaptionPrompt to 1e-5.

Adapted: the picture's vector comes from EfficientNet-Lite0's map through one latent of a small resampler instead of from
CLIP's global features through an MLP (``encoder`` sets another encoder); prompts act only on words after a picture, so text
alone is unchanged, and these words have the positions that they would have behind its tokens; pictures and their names
instead of instructions in Alpaca's form (``### Instruction: ... ### Response: ...``).

Data: the paper's ScienceQA (``derek-thomas/ScienceQA``), as lines with ``conversations``, ``--data
scienceqa/train.jsonl``. Our figures: ``--data runs/clothing/photos.jsonl:held=0.1`` (`runs/write_clothing.py`).
"""

from __future__ import annotations

from dataclasses import replace

from xfusion.fusion.adaption_prompt import AdaptionPrompt
from xfusion.fusion.connectors.resampler import Resampler
from xfusion.recipes.flamingo import flamingo
from xfusion.training.stages import Recipe

KIND = "adaption prompt"
PAPER = "arXiv 2303.16199"
STATUS = "runs"


def llama_adapter(
    prompts: int = 10,
    first: int = 2,
    depth: int = 1,
    rate: float = 9e-3,
    encoder: str | None = None,
    side: int = 224,
) -> Recipe:
    """The recipe; at its natural size, which is small.

    Args:
        prompts: rows of a prompt.
        first: first layer with a prompt; the paper's is 2.
        depth: layers of the resampler that makes the picture's vector.
        rate: largest learning rate; the paper's.
        encoder: folder or hub id of a vision transformer; None takes EfficientNet-Lite0.
        side: pixels that the encoder looks at.
    """
    recipe = flamingo(encoder=encoder, side=side)
    fusion = AdaptionPrompt.Config(
        offset=first, prompts=prompts, connector=Resampler.Config(latents=1, depth=depth, mlp=2)
    )
    stages = tuple(replace(stage, rate=rate) for stage in recipe.stages)
    return replace(recipe, model=replace(recipe.model, fusion=fusion), stages=stages)
