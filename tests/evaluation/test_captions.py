"""Known answers of exact match and token F1."""

import pytest

from xfusion.data.sequence import Example, XFusionError
from xfusion.evaluation.metrics.captions import accepted, exact_match, token_f1


def example(name, *others, group):
    return Example(id=name, captions=(name, *others), group=group, origin="test")


def test_exact_match_ignores_case_and_outer_space_only():
    wordings = [("Red apple",), ("red apple",), ("red apple",), ("dog", "hound")]
    assert exact_match(["  red APPLE\n", "red  apple", "red apple.", "hound"], wordings) == 0.5


def test_wordings_of_the_whole_group_are_accepted():
    one, two, other = (
        example("one o'clock", group="c"),
        example("two o'clock", "2:00", group="c"),
        example("x", group="x"),
    )
    assert accepted([one, other], [one, two, other]) == [("one o'clock", "two o'clock", "2:00"), ("x",)]
    assert accepted([one, two]) == [("one o'clock", "two o'clock", "2:00"), ("two o'clock", "2:00", "one o'clock")]


def test_token_f1():
    assert token_f1(["a red apple"], [("red apple",)]) == pytest.approx(2 * 2 / 5)
    assert token_f1(["red red"], [("red",)]) == pytest.approx(2 / 3)
    assert token_f1(["apple!"], [("pear", "Apple")]) == 1
    assert token_f1(["", "яблоко"], [("apple",), ("Яблоко",)]) == 0.5


def test_counts_must_agree():
    with pytest.raises(XFusionError, match="2 answers, 1 sets"):
        exact_match(["a", "b"], [("a",)])
