"""Fits the opening head: two logistic regressions on hidden states of the frozen base; takes seconds once these exist."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor, nn

from xfusion.data.requests import Request
from xfusion.data.sequence import XFusionError
from xfusion.opening import Opening, answer_state, word_states
from xfusion.training.precision import choose_compute_dtype

PENALTY = 1e-2
"""Weight of the L2 penalty on the coefficients (of standardised states) relative to the mean loss."""


def fit(model: Any, examples: Seq[Request], *, progress: Callable[[str, int, int], None]) -> Opening:
    """Fit an opening head for a model's base; the model itself is unchanged.

    Args:
        model: a model that can draw.
        examples: conversations that ask for a picture and others.
        progress: called with the name of a part, and its items done and in total.

    Raises:
        XFusionError: one kind of example is missing.
    """
    dtype, _ = choose_compute_dtype(model.backbone.device)
    backbone = model.backbone.working_copy(dtype, model.backbone.attention)  # as in all training
    if len({example.draws for example in examples}) < 2 or not any(example.subject for example in examples):
        raise XFusionError("the opening head needs requests with subjects, and ordinary chat: one of them is missing")
    answers, words, inside = [], [], []
    for done, example in enumerate(examples):
        progress("reading requests", done, len(examples))
        answers.append(answer_state(backbone, example.messages))
        if example.draws:
            states, spans = word_states(backbone, example.messages[-1]["content"])
            first, last = example.subject or (0, 0)  # "another one" names nothing
            words.append(states)
            inside += [first < end and start < last for start, end in spans]
    head = Opening(backbone.hidden_size)
    _logistic(head.opens, torch.stack(answers), torch.tensor([float(example.draws) for example in examples]))
    _logistic(head.subject, torch.cat(words), torch.tensor(inside).float())
    return head.requires_grad_(False).to(backbone.device)


def _logistic(layer: nn.Linear, x: Tensor, y: Tensor) -> None:
    """Fit one row to states ``[n, D]`` and labels of 0 or 1 ``[n]``; the problem is convex, so there is no seed."""
    x, y = x.double().cpu(), y.double()
    mean, deviation = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    z = (x - mean) / deviation
    weight = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=0
    )

    def loss() -> Tensor:
        solver.zero_grad()
        found = nn.functional.binary_cross_entropy_with_logits(z @ weight[:-1] + weight[-1], y)
        found = found + PENALTY * weight[:-1].square().sum()
        found.backward()
        return found

    solver.step(loss)
    with torch.no_grad():
        layer.weight.copy_((weight[:-1] / deviation)[None])
        layer.bias.copy_((weight[-1] - (weight[:-1] * mean / deviation).sum())[None])
