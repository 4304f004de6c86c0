"""Known answers of retrieval."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xfusion.data.sequence import XFusionError
from xfusion.evaluation.metrics.retrieval import chance, first_hit, retrieval

LINE = torch.tensor([[0.0], [1.0], [3.0], [6.0]])
ALONE = ["a", "b", "c", "d"]


def test_hand_made_distances():
    drawn, target = torch.tensor([[0.9], [0.9], [10.0]]), torch.tensor([1, 2, 0])
    assert first_hit(drawn, LINE, target, ALONE).tolist() == [1, 3, 4]
    assert retrieval(drawn, LINE, target, ALONE, ks=(1, 3, 4)) == pytest.approx(
        {"at_1": 1 / 3, "at_3": 2 / 3, "at_4": 1}
    )


def test_any_member_of_the_group_is_a_hit():
    drawn, target = torch.tensor([[0.9]]), torch.tensor([2])
    assert first_hit(drawn, LINE, target, ["a", "c", "c", "d"]).item() == 1
    # The nearest member counts, and a member never stands before a member.
    assert first_hit(drawn, LINE, torch.tensor([3]), ["a", "b", "d", "d"]).item() == 3


def test_ties_count_against_the_drawn_picture():
    same = torch.zeros(3, 2)
    assert first_hit(same[:1], same, torch.tensor([0]), ["a", "b", "c"]).item() == 3
    assert first_hit(same[:1], same, torch.tensor([0]), ["a", "a", "c"]).item() == 2
    # Equal up to rounding is a tie as well: one direction in three lengths.
    gallery = torch.tensor([[0.1, 0.2], [0.2, 0.4], [0.3, 0.6]])
    assert first_hit(gallery[:1], gallery, torch.tensor([0]), ["a", "b", "c"], distance="cosine").item() == 3


def test_cosine_ignores_length_and_euclidean_does_not():
    gallery = torch.tensor([[1.0, 0.0], [0.0, 9.0]])
    drawn, target = torch.tensor([[0.5, 1.0]]), torch.tensor([1])
    assert first_hit(drawn, gallery, target, ["a", "b"], distance="cosine").item() == 1
    assert first_hit(drawn, gallery, target, ["a", "b"]).item() == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_broken_picture_is_last(value, distance):
    drawn = torch.full((1, 1), value)
    assert first_hit(drawn, LINE, torch.tensor([1]), ALONE, distance=distance).item() == 4


def test_pictures_are_flattened():
    gallery = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert retrieval(gallery, gallery, torch.arange(5), list("abcde")) == {"at_1": 1.0, "at_10": 1.0}


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=8), st.integers(-3, 3), st.data())
def test_ranks_are_those_of_a_loop(gallery, drawn, data):
    groups = data.draw(st.lists(st.sampled_from("abc"), min_size=len(gallery), max_size=len(gallery)))
    target = data.draw(st.integers(0, len(gallery) - 1))
    best = min(abs(x - drawn) for x, group in zip(gallery, groups, strict=True) if group == groups[target])
    strangers = [x for x, group in zip(gallery, groups, strict=True) if group != groups[target]]
    expected = 1 + sum(abs(x - drawn) <= best for x in strangers)
    columns = torch.tensor(gallery)[:, None].float()
    assert first_hit(torch.tensor([[float(drawn)]]), columns, torch.tensor([target]), groups).item() == expected


def test_chance_is_what_a_random_order_scores():
    groups, target, ks = list("aabcccccddef"), torch.tensor([0, 2, 3, 8, 11]), (1, 3, 12)
    generator = torch.Generator().manual_seed(0)
    tries = 4000
    total = dict.fromkeys([f"at_{k}" for k in ks], 0.0)
    for _ in range(tries):
        gallery = torch.rand(len(groups), 1, generator=generator)
        for key, value in retrieval(torch.zeros(len(target), 1), gallery, target, groups, ks=ks).items():
            total[key] += value / tries
    # One gallery serves five targets, so that a try spreads by at most 0.5: five deviations of the mean are 0.04.
    assert total == pytest.approx(chance(target, groups, ks=ks), abs=0.04)
    assert chance(target, groups, ks=ks)["at_12"] == 1
    assert chance(torch.arange(1918), [str(i) for i in range(1918)])["at_10"] == pytest.approx(10 / 1918)


def test_k_beyond_the_gallery_is_certain():
    drawn = torch.tensor([[100.0]])
    assert retrieval(drawn, LINE, torch.tensor([0]), ALONE, ks=(10,)) == {"at_10": 1.0}
    assert chance(torch.tensor([0]), ALONE, ks=(10,)) == {"at_10": 1.0}


def test_disagreeing_shapes_are_named():
    with pytest.raises(XFusionError, match="4 values, real ones 1"):
        retrieval(torch.zeros(1, 4), LINE, torch.tensor([0]), ALONE)
    with pytest.raises(XFusionError, match="3 groups"):
        retrieval(LINE, LINE, torch.arange(4), ["a", "b", "c"])
