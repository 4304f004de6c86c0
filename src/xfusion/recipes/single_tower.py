"""X-Fusion's single tower: one decoder for words and pictures, initialised from the language model and trained.

Paper: Mo et al., arXiv 2504.20996, figure 3 (a) and table 1: the comparison layer that loses its text.

Faithful: every position passes the same trained block; text is not preserved.

Adapted: trained copies at every fifth layer only, so that it has as many trainable weights as the other layers;
embeddings and head stay frozen. Everything around the layer (pictures, port, objectives, data, schedule) is the
recipe `xfusion`'s, so that a comparison compares the layer alone.

Data: the paper's pictures are not public; pairs that are: CC3M (``pixparse/cc3m-wds``), ``--data
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
