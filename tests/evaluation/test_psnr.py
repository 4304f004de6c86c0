"""Known answers of the signal-to-noise ratio."""

import math

import pytest
import torch

from xfusion.data.sequence import XFusionError
from xfusion.evaluation.metrics.psnr import not_white, psnr


def test_known_answers():
    reference = torch.zeros(3, 3, 4, 4)
    images = torch.stack([torch.full((3, 4, 4), value) for value in (0.2, 0.02, 0.0)])
    # An error of 0.2 on a range of 2 is a tenth: 20 dB; a hundredth: 40 dB; none: infinite.
    torch.testing.assert_close(psnr(images, reference)[:2], torch.tensor([20.0, 40.0]).double(), atol=1e-4, rtol=0)
    assert math.isinf(psnr(images, reference)[2])


def test_a_mask_counts_only_what_it_covers():
    reference = torch.ones(2, 3, 2, 2)
    reference[0, 1, 0, 0] = -1  # one green channel away from white
    images = reference.clone()
    images[0, :, 0, 0] += 0.2
    assert not_white(reference).sum(dim=(1, 2, 3)).tolist() == [1, 0]
    masked = psnr(images, reference, not_white(reference))
    assert masked[0].item() == pytest.approx(20, abs=1e-4)
    assert math.isnan(masked[1]), "a white picture has no content to compare"
    assert psnr(images, reference)[0].item() == pytest.approx(20 + 10 * math.log10(4), abs=1e-4)
    assert torch.equal(masked[:1], psnr(images, reference, not_white(reference)[:, 0])[:1])


def test_shapes_must_agree():
    with pytest.raises(XFusionError, match=r"\[1, 3, 4, 4\] and \[1, 3, 8, 8\]"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8))
