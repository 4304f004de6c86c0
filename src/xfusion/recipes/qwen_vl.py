"""Qwen-VL: one cross-attention layer from position-aware queries to the picture.

Paper: Bai et al., "Qwen-VL: A Versatile Vision-Language Model for Understanding, Localization, Text Reading, and Beyond",
arXiv 2308.12966.

Faithful: the adapter, a single cross-attention layer with 2-D absolute positions on queries and keys, with as many tokens
as queries; trainable rows before and after a picture (the paper's ``<img>`` and ``</img>``); the first stage's frozen
language model; boxes as plain text, ``<ref>red disc</ref><box>(x1,y1),(x2,y2)</box>`` with integers from 0 to 999 in the
base's own tokens (`xfusion.data.boxes`); a loss on answers only.

Adapted: the encoder is frozen too, where the paper trains it (ViT-bigG); 7 queries instead of 256 on the encoder's 7 x 7
map, all with positions of the map's top row, so only learned queries tell rows apart (256 queries on a 16 x 16 map have the
features' own positions, as in the paper); no stages 2 and 3, which train the language model, so the adapter alone learns
boxes, where the paper learns them in stage 2; a name asks for one box; a peak rate of 1e-3 instead of 2e-4, with AdamW (0.9,
0.95), which every recipe here has, instead of (0.9, 0.98), and without the weight decay of 0.05. Captions that contain boxes,
boxes with names as answers, and ``Picture 1:`` before a picture are left to the data.

Data: from the paper, CC12M (``pixparse/cc12m-wds``), ``--data 'cc12m-wds/*.tar'``. Our figures: ``--data
runs/clothing/photos.jsonl:held=0.1`` (`runs/write_clothing.py`), and for boxes ``--data runs/boxes/train.jsonl``
(`runs/write_questions.py`, docs/questions.md).
"""

from __future__ import annotations

from dataclasses import replace

from xfusion.fusion.connectors.positional_resampler import PositionalResampler
from xfusion.recipes.llava import llava
from xfusion.training.stages import Recipe

KIND = "prefix"
PAPER = "arXiv 2308.12966"
STATUS = "runs"


def qwen_vl(queries: int = 7, map_side: int = 7, encoder: str | None = None, side: int = 224) -> Recipe:
    """The resampler, trained through the frozen decoder.

    Args:
        queries: learned queries: a picture is as many strips of its map, so a divisor of the map's features and a multiple of
            its side.
        map_side: rows and columns of the encoder's map; 7 for EfficientNet-Lite0, 16 for a ViT-L/14 at 224 px.
        encoder: folder or hub id of a vision transformer; None takes EfficientNet-Lite0.
        side: pixels that the encoder looks at.
    """
    recipe, cells = llava(encoder, side), map_side**2 // queries
    image = replace(recipe.model.image, patch_width=cells)
    port = PositionalResampler.Config(queries=queries, map=(map_side, map_side), cells=cells)
    stage = replace(recipe.stages[0], rate=1e-3)
    return replace(recipe, model=replace(recipe.model, image=image, port=port), stages=(stage,))
