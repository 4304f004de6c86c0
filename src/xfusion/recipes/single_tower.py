"""X-Fusion's single tower: one decoder for words and pictures, initialised from the language model and trained.

Paper: Mo et al., arXiv 2504.20996, figure 3 (a) and table 1: the baseline that does not keep its text.

Faithful: every position goes through the same trained block; text is not preserved.

Adapted: trained copies only at every fifth layer, so that it has as many trainable weights as the other layers;
embeddings and head stay frozen. Everything except the layer (pictures, port, objectives, data, schedule) is shared with
the recipe `xfusion`, so a comparison isolates the layer.

Data: the paper's pictures are not public; a public alternative is CC3M (``pixparse/cc3m-wds``), ``--data
'cc3m-wds/cc3m-train-*.tar'``. Our figures: ``--data emoji:64`` and ``emoji:128``.
"""

from __future__ import annotations

from xfusion.fusion.shared_decoder import SharedDecoder
from xfusion.recipes.xfusion import xfusion
from xfusion.training.stages import Recipe

KIND = "shared decoder"
PAPER = "arXiv 2504.20996"
STATUS = "runs"


def single_tower(stride: int = 5, rate: float = 4e-3) -> Recipe:
    """Trained copies at every stride-th layer.

    Args:
        stride: a block is trained at every stride-th layer.
        rate: largest learning rate; the lower, the less of the text is lost and the less is learned to draw.
    """
    return xfusion(rate=rate).with_model(fusion=SharedDecoder.Config(stride=stride))
