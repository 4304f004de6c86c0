"""Losses of cosines and of a judge are computed in float32, whatever the precision of the pass that they read."""

import pytest
import torch
from objectives import test_alignment, test_contrastive, test_matching

from xfusion.data.pack import pack
from xfusion.objectives import matching as matching_module


def contrastive(base):
    return test_contrastive.make(base), pack([[test_contrastive.pair(i)] for i in range(4)])


def matching(base):
    return test_matching.make(base, "dual tower"), pack([[test_matching.pair(i)] for i in range(4)])


def alignment(base, **settings):
    return test_alignment.make(base, **settings), test_alignment.batch()


def patchwise_alignment(base):
    return alignment(base, patchwise=True)


@pytest.mark.parametrize("made", [contrastive, matching, alignment, patchwise_alignment], ids=lambda f: f.__name__)
@torch.no_grad()
def test_autocast_around_a_loss_changes_no_bit_of_it(bases, made):
    """Cosines times 100 differ by less than bfloat16 can say. Only the states that a loss reads may be rounded."""
    model, batch = made(bases["llama"])
    (objective,) = model.extra

    def run(view):
        with torch.autocast("cpu", enabled=False):
            return model(view)

    exact = objective.loss(run, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = objective.loss(run, batch)
    assert found.keys() == exact.keys() and exact
    for name, (total, count) in exact.items():
        assert found[name][0].dtype == torch.float32
        assert torch.equal(found[name][0], total) and int(found[name][1]) == int(count)


@torch.no_grad()
def test_hard_negatives_are_chosen_by_cosines_in_float32(bases, monkeypatch):
    """In bfloat16, cosines that differ by less than a 256th are equal, and the first of the batch would be the hardest."""
    model, batch = matching(bases["llama"])
    found, hardest = [], matching_module.hardest_negatives
    monkeypatch.setattr(matching_module, "hardest_negatives", lambda *given: found.append(given[0]) or hardest(*given))
    with torch.autocast("cpu", torch.bfloat16):
        model.extra[0].loss(model, batch)
    assert [similarity.dtype for similarity in found] == [torch.float32]
