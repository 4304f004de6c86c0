"""Kernel distance of drawings and pictures (KID, Bińkowski et al., arXiv 1801.01401), by torchmetrics.

The unbiased estimate of the squared maximum mean discrepancy under (x y / width + 1)^3: its expectation does not depend on the
number of pictures, so it may be negative if both sides are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from xfusion.data.sequence import XFusionError
from xfusion.evaluation.metrics.fid import compare, reference, settings_of
from xfusion.modalities.base import Encoder
from xfusion.seeding import seeded

if TYPE_CHECKING:
    from xfusion.evaluation.drawn import Drawn

FEWEST = 4
"""Pictures on either side: subsets are half of them, and two make a pair."""
SUBSETS, LARGEST = 100, 1000
"""Subsets that are drawn, and the most pictures of one."""


def judge(
    drawn: Drawn,
    argument: str,
    *,
    encoder: Encoder.Config | None,
    device: str,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """``--by kernel-distance:FOLDER``: distance between the distributions of the drawings and of a folder's pictures.

    Returns:
        ``kernel_distance``, the mean over 100 subsets of half the smaller side (at most 1,000 pictures), lower is better, and
        ``kernel_distance_spread``, the standard deviation of these; and the distances of
        `xfusion.evaluation.metrics.fid.compare`.

    Raises:
        XFusionError: there are fewer than 4 pictures on a side, the encoder was used to train the drawing model or is not
            available, or torchmetrics is not installed.
    """
    files = reference(argument, "kernel-distance")
    fewer = min(len(drawn), len(files))
    if fewer < FEWEST:
        raise XFusionError(
            f"a kernel distance needs {FEWEST} pictures or more on both sides; {drawn.folder} has {len(drawn)}, {argument}"
            f" {len(files)}"
        )
    try:
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise XFusionError(f"a kernel distance needs the package {error.name}: pip install 'xfusion[eval]'") from error
    size = min(fewer // 2, LARGEST)
    metric, nearest = compare(
        KernelInceptionDistance,
        drawn,
        files,
        encoder,
        device=device,
        progress=progress,
        subsets=SUBSETS,
        subset_size=size,
    )
    with seeded(0):  # subsets are sampled on the CPU, on whatever device the features are
        mean, spread = metric.compute()
    counts = {"num_pictures": len(drawn), "num_reference": len(files)}
    settings = settings_of(encoder, argument, files) | {"subsets": SUBSETS, "subset_size": size}
    distance = {"kernel_distance": float(mean), "kernel_distance_spread": float(spread)}
    return distance | nearest | counts | {"settings": settings}
