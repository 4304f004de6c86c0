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
    peer = build_peer(bench, steps["demo"], bench.backbone.hidden_size)
    small_peer = matched_peer(bench, steps["demo"])
    for step in (*steps.values(), peer, small_peer):
        step.warm()

    def our_step(step: Step, keep_text: bool) -> Work:
        def work() -> None:
            step.engine.keep_text = keep_text
            step()

        return work

    works = {
        (tower, text_kept): our_step(step, text_kept) for tower, step in steps.items() for text_kept in (False, True)
    }
    labelled_works = {
        f"our {tower} tower, text {'' if text_kept else 'not '}kept": work for (tower, text_kept), work in works.items()
    }
    labelled_works |= {"transfusion-pytorch": peer, "transfusion-pytorch, as many weights": small_peer}
    seconds = list(bench.in_turn(labelled_works, warm=1).values())
    samples, (peer_seconds, small_seconds) = steps["demo"].samples, seconds[-2:]
    result: dict[str, Any] = {
        "samples_per_step": samples,
        "peer": peer.facts | {"step_seconds": peer_seconds, "samples_per_second": samples / peer_seconds},
        "matched_peer": small_peer.facts
        | {"step_seconds": small_seconds, "samples_per_second": samples / small_seconds},
    }
    for (tower, text_kept), step_seconds in zip(works, seconds, strict=False):
        suffix = "_cached" if text_kept else ""
        figures = result.setdefault(f"{tower}_tower", {"trainable_parameters": steps[tower].model.num_new_parameters})
        figures |= {
            f"ratio_to_transfusion_pytorch{suffix}": peer_seconds / step_seconds,
            f"samples_per_second{suffix}": samples / step_seconds,
        }
        if tower == "demo":
            figures[f"ratio_at_matched_parameters{suffix}"] = small_seconds / step_seconds
    return result


def build_peer(bench: Bench, step: Step, width: int) -> Peer:
    try:
        from transfusion_pytorch import Transfusion
    except ImportError as error:
        raise XFusionError(
            f"the peer transfusion-pytorch cannot be imported ({error}): pip install 'xfusion[bench]', or leave it out"
            " with --only"
        ) from error
    config, head_width = bench.backbone.config, bench.backbone.head_width
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
            "dim_head": head_width,
            "heads": max(1, width // head_width),
            # Its MLP has two thirds of this width.
            "ff_expansion_factor": 1.5 * config.intermediate_size / config.hidden_size,
        },
    )
    return Peer(bench, model, step, width)


def matched_peer(bench: Bench, step: Step) -> Peer:
    """The peer with the LLM's depth whose width, in whole heads, gives the number of weights nearest to ours."""
    target, head_width = step.model.num_new_parameters, bench.backbone.head_width
    nearest = build_peer(bench, step, head_width)
    for width in range(2 * head_width, bench.backbone.hidden_size + 1, head_width):
        candidate = build_peer(bench, step, width)
        if abs(candidate.facts["trainable_parameters"] - target) >= abs(nearest.facts["trainable_parameters"] - target):
            break
        nearest = candidate
    return nearest


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
        step_number = next(self.numbers)
        samples = self.mixture.samples(step_number % self.period if self.period else step_number)
        parts = math.ceil(len(samples) / PART)
        for first in range(parts):  # each part mixes drawings and captions as the whole batch does
            part = samples[first::parts]
            loss = self._losses(part).total * (len(part) / len(samples))
            loss.backward()
            float(loss.detach())
        self.optimizer.step(self.rate, 1.0, 0.999)

    def _losses(self, samples: list[Sequence]) -> Any:
        """What the peer calls a breakdown, including ``total`` and ``text``."""
        dtype = self.bench.dtype
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return self.model([list(self._items(sample)) for sample in samples], return_breakdown=True)[1]

    @torch.no_grad()
    def nats(self, samples: list[Sequence]) -> float:
        """Mean next-token loss over the tokens that have one, in nats.

        The peer divides by a number of tokens that it does not report. The same loss of an uninformed head, which must be
        the logarithm of the vocabulary's size, reveals it.
        """
        loss = float(self._losses(samples).text)
        vocabulary_sizes = []

        def zero_logits(_: Any, __: Any, logits: Tensor) -> Tensor:
            vocabulary_sizes.append(logits.shape[-1])
            return torch.zeros_like(logits)

        hook = self.model.to_text_logits.register_forward_hook(zero_logits)
        try:
            return loss / float(self._losses(samples).text) * math.log(vocabulary_sizes[0])
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
