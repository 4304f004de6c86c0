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
    answer_rows, word_rows, in_subject = [], [], []
    for number, example in enumerate(examples):
        progress("reading requests", number, len(examples))
        answer_rows.append(answer_state(backbone, example.messages))
        if example.draws:
            states, spans = word_states(backbone, example.messages[-1]["content"])
            first, last = example.subject or (0, 0)  # "another one" names nothing
            word_rows.append(states)
            in_subject += [first < end and start < last for start, end in spans]
    head = Opening(backbone.hidden_size)
    _logistic(head.opens, torch.stack(answer_rows), torch.tensor([float(example.draws) for example in examples]))
    _logistic(head.subject, torch.cat(word_rows), torch.tensor(in_subject).float())
    return head.requires_grad_(False).to(backbone.device)


def _logistic(layer: nn.Linear, states: Tensor, labels: Tensor) -> None:
    """Fit one row to states ``[n, D]`` and labels of 0 or 1 ``[n]``; the problem is convex, so there is no seed."""
    states, labels = states.cpu().double(), labels.double()
    mean, deviation = states.mean(dim=0), states.std(dim=0).clamp(min=1e-6)
    standardised = (states - mean) / deviation
    weight = torch.zeros(states.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=0
    )

    def closure() -> Tensor:
        solver.zero_grad()
        value = nn.functional.binary_cross_entropy_with_logits(standardised @ weight[:-1] + weight[-1], labels)
        value = value + PENALTY * weight[:-1].square().sum()
        value.backward()
        return value

    solver.step(closure)
    with torch.no_grad():
        layer.weight.copy_((weight[:-1] / deviation)[None])
        layer.bias.copy_((weight[-1] - (weight[:-1] * mean / deviation).sum())[None])
