"""Next-token loss on labels only; greedy and sampled choice, each row by its own generator."""

import math

import pytest
import torch
from contracts.table import VOCABULARY, make_model, mixed_sequences, view
from hypothesis import given, settings
from hypothesis import strategies as st

from xfusion.backbone import Backbone
from xfusion.comparison.cost import LiveBytes
from xfusion.data.pack import pack
from xfusion.data.sequence import Sequence, Text, XFusionError
from xfusion.objectives.base import Output
from xfusion.objectives.next_token import GREEDY, NextToken, sum_of_nats


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def generators(count, start=0):
    return [generator(start + i) for i in range(count)]


def test_the_loss_of_words_is_summed_over_labels_only():
    batch = pack([[Sequence(segments=(Text(ids=(4, 5)), Text(ids=(1, 2, 3), has_loss=True)))]])
    logits = torch.randn(1, 4, 8, generator=generator())
    objective = NextToken.Config().build()
    asked = []

    def run(_):
        return Output(logits=lambda chosen: asked.append(chosen) or logits[chosen], vocabulary=None, media={})

    total, count = objective.loss(run, batch)["next_token"]
    expected = -sum(float(logits[0].log_softmax(-1)[at, token]) for at, token in ((1, 1), (2, 2), (3, 3)))
    assert int(count) == objective.count(batch)["next_token"] == 3
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert asked[0].tolist() == [[False, True, True, True]]  # the head is not asked elsewhere
    prompt = pack([[Sequence(segments=(Text(ids=(4, 5)),))]])
    assert objective.loss(run, prompt) == {} == objective.count(prompt)


def test_a_loss_of_many_logits_is_computed_in_parts(bases, monkeypatch):
    """The same loss and gradients to 1e-6, from a head that never has more rows at once, forward or backward."""
    model = make_model(bases["llama"], "single tower")
    batch = view([[sequence] for sequence in mixed_sequences().values()], model)
    logits, rows = Backbone.logits, []

    def noted(self, hidden):
        rows.append(hidden.shape[1])
        return logits(self, hidden)

    monkeypatch.setattr(Backbone, "logits", noted)

    def found():
        rows.clear()
        with model.using(model.training_engine(torch.float32, "", "eager", False)):
            total, count = model.text_objective.loss(model, batch)["next_token"]
            model.zero_grad()
            total.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_new_parameters().items() if p.grad is not None}
        return total.detach(), int(count), gradients, list(rows)

    whole, count, gradients, asked = found()
    assert asked == [count]
    monkeypatch.setattr("xfusion.objectives.next_token.MOST_LOGITS", 4 * VOCABULARY)
    total, same_count, in_parts, asked = found()
    assert same_count == count and float(total) == pytest.approx(float(whole), rel=1e-6)
    assert asked[: len(asked) // 2] == [4] * (count // 4) + [count % 4] * bool(count % 4)
    assert sum(asked) == 2 * count
    assert in_parts.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert float((in_parts[name] - gradient).abs().max()) <= 1e-6 * float(gradient.abs().max()), name


def test_logits_in_parts_take_less_memory(monkeypatch):
    """Of 64 rows of 5,000 logits 8 at a time are held: an eighth, up to the states."""
    states = torch.randn(64, 8, generator=generator(), requires_grad=True)
    head, labels = torch.randn(8, 5000, generator=generator(1)), torch.arange(64)
    peaks = []
    for most_logits in (64 * 5000, 8 * 5000):
        monkeypatch.setattr("xfusion.objectives.next_token.MOST_LOGITS", most_logits)
        with LiveBytes() as live:
            sum_of_nats(lambda chosen: states[chosen] @ head, torch.arange(64), labels, 5000).backward()
        peaks.append(live.peak)
    assert peaks[0] >= 2 * 4 * 64 * 5000 and peaks[1] < peaks[0] / 6


@given(st.integers(1, 5), st.integers(0, 1000))
def test_greedy_is_the_largest(rows, seed):
    logits = torch.randn(rows, 12, generator=generator(seed))
    assert torch.equal(NextToken.choose(logits, 0.0, 0.5, generators(rows)), logits.argmax(-1))


@given(st.integers(1, 5), st.integers(0, 1000), st.floats(0, GREEDY, exclude_max=True), st.sampled_from([1, 1e4]))
def test_next_to_no_temperature_takes_the_largest_too(rows, seed, temperature, scale):
    logits = scale * torch.randn(rows, 12, generator=generator(seed))
    assert torch.equal(NextToken.choose(logits, temperature, 1.0, generators(rows)), logits.argmax(-1))
    assert bool(((logits / GREEDY).softmax(-1).sum(-1) - 1).abs().max() < 1e-5), "what is divided by it is finite"


@settings(max_examples=60)
@given(st.integers(0, 1000), st.floats(0.05, 1), st.floats(0.3, 3))
def test_sampling_stays_within_the_nucleus_and_a_row_does_not_depend_on_its_batch(seed, top_p, temperature):
    logits = 2 * torch.randn(6, 12, generator=generator(seed))
    chosen = NextToken.choose(logits, temperature, top_p, generators(6, seed))
    for row, token in enumerate(chosen.tolist()):
        probability = (logits[row] / temperature).softmax(-1)
        better = float(probability[probability > probability[token]].sum())
        assert better < top_p + 1e-5  # without it the others would not have reached top_p
        alone = NextToken.choose(logits[row : row + 1], temperature, top_p, [generator(seed + row)])
        assert int(alone[0]) == token


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([[math.log(0.6), math.log(0.3), math.log(0.1)]]).expand(6000, -1)
    counts = torch.bincount(NextToken.choose(logits, 1.0, 1.0, generators(6000)), minlength=3) / 6000
    torch.testing.assert_close(counts, torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.03)
    nucleus = torch.bincount(NextToken.choose(logits, 1.0, 0.7, generators(6000)), minlength=3) / 6000
    torch.testing.assert_close(nucleus, torch.tensor([2 / 3, 1 / 3, 0.0]), rtol=0, atol=0.03)
    assert set(NextToken.choose(logits, 1.0, 0.5, generators(6000)).tolist()) == {0}
    two = torch.bincount(NextToken.choose(logits, 1.0, 1.0, generators(6000), 2), minlength=3) / 6000
    torch.testing.assert_close(two, torch.tensor([2 / 3, 1 / 3, 0.0]), rtol=0, atol=0.03)
    assert set(NextToken.choose(logits, 1.0, 0.6, generators(6000), 2).tolist()) == {0}  # the nucleus of these two
    one, whole = (NextToken.choose(logits[:9], 1.0, 1.0, generators(9), k) for k in (50, 0))
    assert torch.equal(one, whole)


def test_a_nucleus_ends_with_the_token_that_reaches_it():
    """Two of four equal tokens have half of all probability; a third is one too many."""
    chosen = NextToken.choose(torch.zeros(64, 4), 1.0, 0.5, generators(64))
    assert len(set(chosen.tolist())) == 2


@pytest.mark.parametrize(("temperature", "top_p"), [(-0.1, 1.0), (1.0, 0.0), (1.0, 1.1)])
def test_impossible_sampling_is_refused(temperature, top_p):
    with pytest.raises(XFusionError, match=f"temperature {temperature} must be >= 0 and top_p {top_p}"):
        NextToken.choose(torch.zeros(1, 3), temperature, top_p, generators(1))
    with pytest.raises(XFusionError, match="top_k -1 0 or more"):
        NextToken.choose(torch.zeros(1, 3), 1.0, 1.0, generators(1), -1)
