"""Peak signal-to-noise ratio of pictures in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from xfusion.data.sequence import XFusionError

# A channel below this counts as "not white": one level of 255 under white.
_WHITE = 1 - 1.5 / 127.5


def psnr(images: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """PSNR in dB of each image against its reference, over all its pixels or over those in `mask`.

    images, reference: [N, 3, H, W] in [-1, 1], so the peak-to-peak range is 2: 10 log10(4 / mean squared error).
    mask: bool [N, 1, H, W] or [N, H, W]; an image whose mask is empty gives nan (leave it out with `nanmean`).
    Returns float64 [N]; equal images give inf.
    """
    if images.shape != reference.shape or images.ndim != 4:
        raise XFusionError(
            f"psnr compares images of one shape [N, 3, H, W], but these are {list(images.shape)} and {list(reference.shape)}"
        )
    squares = (images.double() - reference.double()).square()
    if mask is None:
        error = squares.mean(dim=(1, 2, 3))
    else:
        inside = mask.reshape(len(images), 1, *images.shape[2:]).expand_as(squares)
        error = torch.where(inside, squares, 0).sum(dim=(1, 2, 3)) / inside.sum(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error)


def not_white(reference: Tensor) -> Tensor:
    """bool [N, 1, H, W]: where the reference picture is not white, so where a drawing on white has its content."""
    return (reference < _WHITE).any(dim=1, keepdim=True)
