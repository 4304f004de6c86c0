"""Known answers of the overlap of boxes, and of the best that one box does."""

import pytest
import torch

from xfusion.data.sequence import XFusionError
from xfusion.evaluation.metrics.overlap import best_constant, overlap


def test_known_answers():
    box = torch.tensor([0.0, 0.0, 0.5, 0.5])
    others = torch.tensor(
        [[0, 0, 0.5, 0.5], [0.25, 0.25, 0.75, 0.75], [0.5, 0, 1, 0.5], [0, 0, 1, 1], [0, 0, 0, 0], [0.4, 0.4, 0.2, 0.2]]
    )
    # Itself; a sixteenth of seven; an edge alone; a quarter; no area; edges that are crossed.
    assert overlap(box, others).tolist() == pytest.approx([1, 1 / 7, 0, 0.25, 0, 0], abs=1e-7)
    nothing = torch.zeros(4)
    assert float(overlap(nothing, nothing)) == 0
    with pytest.raises(XFusionError, match=r"four edges \[..., 4\], but these are \[3\]"):
        overlap(torch.zeros(3), box)


def test_one_box_for_all():
    """Of three like boxes and a far one the best box is that of the three; of two halves the whole hits both."""
    near, far = [0.1, 0.1, 0.4, 0.4], [0.6, 0.6, 0.9, 0.9]
    found = best_constant(torch.tensor([near, near, near, far]))
    assert found["hit"] == pytest.approx(0.75) and found["mean"] == pytest.approx(0.75)
    halves = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]])
    assert best_constant(halves)["hit"] == 1 and best_constant(halves)["mean"] == pytest.approx(0.5)
