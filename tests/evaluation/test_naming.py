"""Known answers of ranking names."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xfusion.data.sequence import Example, XFusionError
from xfusion.evaluation.metrics import naming


def test_pointwise_takes_off_what_a_name_has_without_a_picture():
    given_picture, alone = torch.tensor([[-1.0, -2.0], [-1.0, -3.5]]), torch.tensor([[-0.5, -3.0]])
    assert naming.pointwise(given_picture, alone).tolist() == [[-0.5, 1.0], [-0.5, -0.5]]


def test_known_ranks():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [2.0, 2.0, 1.0]])
    hit = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0]]).bool()
    assert naming.ranks(scores, hit).tolist() == [1, 3, 2, 1.5]
    score = naming.naming(scores, hit, ks=(1, 2))
    assert score == pytest.approx({"mrr": (1 + 1 / 3 + 1 / 2 + 2 / 3) / 4, "at_1": 1 / 4, "at_2": 3 / 4})


def test_the_best_name_of_the_group_counts():
    scores, hit = torch.tensor([[1.0, 5.0, 3.0, 2.0]]), torch.tensor([[1, 0, 1, 0]]).bool()
    assert naming.ranks(scores, hit).item() == 2


def test_hits_go_by_group():
    def example(name, group):
        return Example(id=name, captions=(name, "a wording"), group=group, origin="test")

    clocks, dog = [example("one", "clock"), example("two", "clock")], example("dog", "dog")
    names = ["one", "two", "dog", "a wording"]
    assert naming.hits([clocks[0], dog], names).tolist() == [[True, False, False, False], [False, False, True, False]]
    assert naming.hits([clocks[0]], names, [*clocks, dog]).tolist() == [[True, True, False, False]]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
def test_ties_stand_at_the_mean_rank(names):
    """The rank is the mean, over all orders of the names, of where the best true name lands when sorted stably."""
    names = [*names, (1, True)]
    places = []
    for order in itertools.permutations(range(len(names))):
        ranking = sorted(order, key=lambda i: -names[i][0])
        places.append(1 + next(place for place, i in enumerate(ranking) if names[i][1]))
    scores, hit = torch.tensor([[float(s) for s, _ in names]]), torch.tensor([[h for _, h in names]])
    assert naming.ranks(scores, hit).item() == pytest.approx(sum(places) / len(places))


@given(st.integers(1, 9), st.data())
def test_chance_is_the_mean_over_all_orders(total, data):
    own = data.draw(st.integers(1, total))
    hit = torch.arange(total)[None] < own
    firsts = [min(places) for places in itertools.combinations(range(1, total + 1), own)]
    expected = {"mrr": sum(1 / place for place in firsts), "at_2": sum(place <= 2 for place in firsts)}
    expected = {key: value / len(firsts) for key, value in expected.items()}
    assert naming.chance(hit, ks=(2,)) == pytest.approx(expected)


def test_scores_that_are_not_numbers_come_last():
    scores, hit = torch.tensor([[math.nan, 0.0, -math.inf]]), torch.tensor([[True, False, False]])
    assert naming.ranks(scores, hit).item() == 2.5


def test_blind_destroys_what_the_pictures_gave():
    count = 60
    scores, hit = torch.eye(count), torch.eye(count).bool()
    assert naming.naming(scores, hit)["mrr"] == 1
    blind = naming.blind(scores, hit)
    # A permutation leaves one picture in place on average: 1/60. Elsewhere the true name is tied with 58 others.
    expected = 1 / count + (1 - 1 / count) / (2 + (count - 2) / 2)
    assert blind["mrr"] == pytest.approx(expected, abs=0.03)
    assert blind == naming.blind(scores, hit) != naming.blind(scores, hit, seed=1)


def test_blind_keeps_what_the_names_alone_give():
    """Scores that do not look at the picture are worth the same with any picture."""
    scores, hit = torch.arange(8.0).expand(8, 8), torch.eye(8).bool()
    assert naming.blind(scores, hit) == pytest.approx(naming.naming(scores, hit))


def test_bad_input_is_named():
    with pytest.raises(XFusionError, match="picture 1 has no true name"):
        naming.ranks(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]))
    with pytest.raises(XFusionError, match="one shape"):
        naming.ranks(torch.zeros(2, 2), torch.ones(2, 3).bool())
