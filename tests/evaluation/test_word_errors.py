"""Word error rates, against values counted by hand."""

import pytest
import torch

from xfusion.data.sequence import XFusionError
from xfusion.evaluation.metrics.word_errors import normalised, with_baselines, word_errors

BY_HAND = [
    ("Please hold the line.", "please hold the line", 0, 4),
    ("please hold the line", "please told the line", 1, 4),
    ("please hold the line", "please the line", 1, 4),
    ("please hold the line", "please hold on the line", 1, 4),
    ("please hold the line", "hold please the line", 2, 4),
    ("please hold the line", "", 4, 4),
    ("press one", "no no no no no", 5, 2),
    ("It's five o'clock", "its five o’clock", 1, 3),
    ("Re-enter your pass-word!", "re enter your password", 2, 5),
]  # fmt: skip


@pytest.mark.parametrize(("text", "answer", "errors", "words"), BY_HAND)
def test_errors_of_one_sentence(text, answer, errors, words):
    found = word_errors([answer], [text])
    assert [float(x) for x in found] == [errors, words]


def test_the_rate_is_over_all_words_and_may_exceed_one():
    texts, answers = [row[0] for row in BY_HAND], [row[1] for row in BY_HAND]
    found = with_baselines("held_", answers, texts)
    assert found["held_word_errors"] == pytest.approx(17 / 34)
    assert with_baselines("", ["no no no no no"], ["press one"])["word_errors"] == 2.5
    assert with_baselines("", ["", ""], ["press one", "hold"])["word_errors"] == 1


def test_interval_and_blind_rate():
    texts = ["press one now", "press two", "hold", "good bye", "thank you very much"]
    found = with_baselines("", texts, texts)
    assert found["word_errors"] == 0 and found["word_errors_interval"] == [0, 0]
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(5, generator=generator).tolist() for _ in range(5)]
    # "press one now" and "press two" share a word; otherwise every word of the longer text is an error.
    lengths = [len(text.split()) for text in texts]
    shared = {(0, 1), (1, 0)}
    blind = [
        sum(0 if i == j else max(lengths[i], lengths[j]) - ((i, j) in shared) for i, j in enumerate(order)) / 12
        for order in orders
    ]
    assert found["word_errors_blind"] == pytest.approx(sum(blind) / 5)
    low, high = with_baselines("", ["press one now", "press", "", "good bye", "thank you"], texts)[
        "word_errors_interval"
    ]
    assert 0 <= low < 4 / 12 < high <= 1
    assert with_baselines("", texts[:4], texts[:4])["word_errors_interval"] is None


def test_what_cannot_be_counted():
    assert normalised("  Don't HOLD -- the (line), please… 3D ") == "don't hold the line please 3d"
    with pytest.raises(XFusionError, match="^word errors need one text per answer: 1 answers, 2 texts$"):
        word_errors(["a"], ["a", "b"])
    with pytest.raises(XFusionError, match="^the text '...' has no words: there is nothing to transcribe$"):
        word_errors(["a", "b"], ["a", "..."])
