"""LLaVA: one matrix maps a frozen encoder's features to the input of the language model.

Paper: Liu et al., "Visual Instruction Tuning", NeurIPS 2023, arXiv 2304.08485.

Faithful: ``H = W Z`` on the encoder's grid of features, whose tokens are ordinary embeddings in causal order; stage 1
of the paper (feature alignment), which trains only the matrix, at rate 2e-3; a loss on the answer only.

Adapted: a bias beside the matrix, ``H = W Z + b``; the language model remains frozen, so there is no stage 2 (in which the
paper trains it); 135 M parameters instead of Vicuna's 7 B; EfficientNet-Lite0's 7 x 7 x 1280 map instead of CLIP's 256 tokens
(``encoder`` sets another encoder; ``--model.image.codec autoencoder_kl:emoji-kl --model.image.sizes 32`` reads a codec's
latents instead); trainable rows before and after a picture; answers are names of pictures, sometimes after a question, which
always follows the picture (the paper puts it before or after at random).

Data: the paper's CC3M of 595 K pairs (``liuhaotian/LLaVA-CC3M-Pretrain-595K``), ``--data images/chat.jsonl``, its
``chat.json`` as JSON lines next to the pictures. Our figures: ``--data runs/clothing/photos.jsonl:held=0.1``
(`runs/write_clothing.py`).
"""

from __future__ import annotations

from xfusion.data.mixture import MixtureConfig
from xfusion.fusion.connectors.linear import Linear
from xfusion.fusion.prefix import Prefix
from xfusion.modalities.codecs.features import Features
from xfusion.modalities.image import ImageModality
from xfusion.model import ModelConfig
from xfusion.objectives.base import NoObjective
from xfusion.objectives.next_token import NextToken
from xfusion.training.stages import Recipe, Stage

KIND = "prefix"
PAPER = "arXiv 2304.08485"
STATUS = "runs"


def llava(encoder: str | None = None, side: int = 224, strip: int = 1) -> Recipe:
    """One matrix, trained in one stage.

    Args:
        encoder: folder or hub id of a vision transformer, such as openai/clip-vit-large-patch14, the paper's; None takes
            EfficientNet-Lite0.
        side: pixels that the encoder looks at.
        strip: neighbouring features of a row of the encoder's map that make one token; 1 is the paper's, 7 makes 7 tokens of
            EfficientNet-Lite0's 49, which two CPU cores train five times as fast.
    """
    return Recipe(
        model=ModelConfig(
            image=ImageModality.Config(
                codec=Features.Config.of(encoder), patch=1, patch_width=strip, sizes=(side,), order="causal"
            ),
            port=Linear.Config(),
            fusion=Prefix.Config(),
            text=NextToken.Config(weight=1.0),
            media=NoObjective.Config(),
        ),
        data="emoji",
        stages=(Stage(rate=2e-3, schedule="cosine", mixture=MixtureConfig(draw=0, caption=32)),),
    )
