"""Joint training against ``transfusion-pytorch`` from its wheel: samples per second, text caching off and on.

The peer has the LLM's transformer shape (depth, width, heads, MLP width) and is fully trained, as designed. It gets the same
picture tokens, text, batch, precision, optimiser and numbers of drawing and captioning samples, with the flow loss on
drawings and the text loss on captions. It has some parts beyond the LLM's shape that cannot be left out: norms, shifts and
gates from the noise level in every layer and for every position, U-Net skips (without them release 0.20.0 fails), attention
over earlier layers' outputs, gates on values, norms of queries and keys, a soft cap on scores. It runs uncompiled, as
released, and a few samples at a time: the activations of a whole step in one pass would take more than 24 GB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor

from xfusion.apps.bench.base import PERIOD, Bench, Step, Work
from xfusion.data.sequence import Media, Sequence, Text, XFusionError
from xfusion.training.optimizer import Optimizer

PART = 16
"""Samples per pass of the peer; the passes' gradients add up to a step's."""


def measure(bench: Bench) -> dict[str, Any]:
    """Measure the demo's tower and the full copied one against the peer at the LLM's shape and at the demo's weight count."""
    steps = {tower: Step(bench, bench.model(full=tower == "full")) for tower in ("demo", "full")}
    peer = peer_of(bench, steps["demo"], bench.backbone.hidden_size)
    small = matched_peer(bench, steps["demo"])
    for step in (*steps.values(), peer, small):
        step.warm()

    def ours(step: Step, keep_text: bool) -> Work:
        def work() -> None:
            step.engine.keep_text = keep_text
            step()

        return work

    works = {(tower, kept): ours(step, kept) for tower, step in steps.items() for kept in (False, True)}
    named = {f"our {tower} tower, text {'' if kept else 'not '}kept": work for (tower, kept), work in works.items()}
    named |= {"transfusion-pytorch": peer, "transfusion-pytorch, as many weights": small}
    seconds = list(bench.in_turn(named, warm=1).values())
    samples, (theirs, matched) = steps["demo"].samples, seconds[-2:]
    found: dict[str, Any] = {
        "samples_per_step": samples,
        "peer": peer.facts | {"step_seconds": theirs, "samples_per_second": samples / theirs},
        "matched_peer": small.facts | {"step_seconds": matched, "samples_per_second": samples / matched},
    }
    for (tower, kept), taken in zip(works, seconds, strict=False):
        cached = "_cached" if kept else ""
        entry = found.setdefault(f"{tower}_tower", {"trainable_parameters": steps[tower].model.num_new_parameters})
        entry |= {
            f"ratio_to_transfusion_pytorch{cached}": theirs / taken,
            f"samples_per_second{cached}": samples / taken,
        }
        if tower == "demo":
            entry[f"ratio_at_matched_parameters{cached}"] = matched / taken
    return found


def peer_of(bench: Bench, step: Step, width: int) -> Peer:
    try:
        from transfusion_pytorch import Transfusion
    except ImportError as error:
        raise XFusionError(
            f"the peer transfusion-pytorch cannot be imported ({error}): pip install 'xfusion[bench]', or leave it out"
            " with --only"
        ) from error
    config, head = bench.backbone.config, bench.backbone.head_width
    model = Transfusion(
        num_text_tokens=config.vocab_size,
        dim_latent=step.model.image.token_width,
        modality_default_shape=step.model.image.grid(step.model.image.sizes[0]),
        modality_num_dim=2,
        add_pos_emb=True,
        prob_uncond=0.0,  # captions that our mixture drops are already empty here
        transformer={
            "dim": width,
            "depth": bench.backbone.num_layers,
            "dim_head": head,
            "heads": max(1, width // head),
            # Its MLP has two thirds of this width.
            "ff_expansion_factor": 1.5 * config.intermediate_size / config.hidden_size,
        },
    )
    return Peer(bench, model, step, width)


def matched_peer(bench: Bench, step: Step) -> Peer:
    """The peer with the LLM's depth whose width, in whole heads, gives the number of weights nearest to ours."""
    wanted, head = step.model.num_new_parameters, bench.backbone.head_width
    best = peer_of(bench, step, head)
    for width in range(2 * head, bench.backbone.hidden_size + 1, head):
        wider = peer_of(bench, step, width)
        if abs(wider.facts["trainable_parameters"] - wanted) >= abs(best.facts["trainable_parameters"] - wanted):
            break
        best = wider
    return best


class Peer:
    """Successive optimiser steps of the peer, on our samples."""

    def __init__(self, bench: Bench, model: Any, step: Step, width: int):
        self.model, self.mixture, self.bench, self.numbers = model, step.mixture, bench, count()
        self.rate, self.period = step.rate, step.period
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.facts: dict[str, int] = {
            "width": width,
            "trainable_parameters": sum(weight.numel() for weight in weights.values()),
            "samples_per_pass": min(PART, step.samples),
        }
        self.optimizer = Optimizer(weights)
        self.grid = step.model.image.grid(step.model.image.sizes[0])

    def __call__(self) -> None:
        number = next(self.numbers)
        samples = self.mixture.samples(number % self.period if self.period else number)
        parts = math.ceil(len(samples) / PART)
        for first in range(parts):  # each part mixes drawings and captions as the whole batch does
            part = samples[first::parts]
            loss = self._losses(part).total * (len(part) / len(samples))
            loss.backward()
            float(loss.detach())
        self.optimizer.step(self.rate, 1.0, 0.999)

    def _losses(self, samples: list[Sequence]) -> Any:
        """What the peer calls a breakdown, including ``total`` and ``text``."""
        kind = self.bench.dtype
        with torch.autocast("cpu", kind, enabled=kind != torch.float32):
            return self.model([list(self._items(sample)) for sample in samples], return_breakdown=True)[1]

    @torch.no_grad()
    def nats(self, samples: list[Sequence]) -> float:
        """Mean next-token loss over the tokens that have one, in nats.

        The peer divides by a number of tokens that it does not report. The same loss of an uninformed head, which must be
        the logarithm of the vocabulary's size, reveals it.
        """
        found = float(self._losses(samples).text)
        sizes = []

        def knows_nothing(_: Any, __: Any, logits: Tensor) -> Tensor:
            sizes.append(logits.shape[-1])
            return torch.zeros_like(logits)

        hook = self.model.to_text_logits.register_forward_hook(knows_nothing)
        try:
            return found / float(self._losses(samples).text) * math.log(sizes[0])
        finally:
            hook.remove()

    def warm(self) -> None:
        """Run every batch once: for each kind of batch, the peer tries its batch layouts and keeps the fastest."""
        for _ in range(PERIOD):
            self()

    def _items(self, sample: Sequence) -> Iterator[tuple[Any, ...]]:
        """A sample in the peer's format; parts with weight 0 are read without a loss."""
        for segment in sample.segments:
            if isinstance(segment, Text) and segment.ids:
                yield torch.tensor(segment.ids), float(segment.has_loss)
            elif isinstance(segment, Media):
                yield 0, self._grid(segment.tokens), float(segment.has_loss)

    def _grid(self, tokens: Tensor) -> Tensor:
        return tokens.float().view(*self.grid, -1)
