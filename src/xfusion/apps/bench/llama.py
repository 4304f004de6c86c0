"""How a joint step compares with plain transformers training of the base on as many text tokens, per executed FLOP.

The peer is the base itself in plain transformers, fully trained on next-token prediction at all positions: its own attention,
uncompiled, the same precision and optimiser. FLOPs of both are counted with plain matrix products in the attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from xfusion.apps.bench.base import Bench, Step, products
from xfusion.training.optimizer import Optimizer


def measure(bench: Bench) -> dict[str, Any]:
    """Measure the demo's tower and the full copied one."""
    result: dict[str, Any] = {}
    for full in (False, True):
        step = Step(bench, bench.model(full=full))
        step.warm()
        batches = step.mixture.batches(0)
        media = [media_batch.rows for batch in batches for media_batch in batch.media.values()]
        positions = [int((rows.order >= 0).sum()) for rows in (*(b.text for b in batches), *media)]
        # Rows as long as ours on average, and enough of them for the same number of tokens.
        length = max(2, round(sum(positions) / step.samples))
        ids = torch.randint(3, bench.backbone.config.vocab_size, (round(sum(positions) / length), length))
        peer_model, peer_step = _text_training(bench, ids)
        our_flops = sum(product.flops for product in products(step))
        peer_model.config._attn_implementation = "eager"
        peer_flops = sum(product.flops for product in products(peer_step))
        peer_model.config._attn_implementation = bench.backbone.attention
        seconds = bench.in_turn({"our joint step": step, "text training": peer_step})
        our_seconds, peer_seconds = seconds.values()
        result["full_tower" if full else "demo_tower"] = {
            "ratio_to_llama_text_training": (our_flops / our_seconds) / (peer_flops / peer_seconds),
            "tokens": sum(positions),
            "text_tokens_of_the_peer": ids.numel(),
            "step_seconds": our_seconds,
            "peer_step_seconds": peer_seconds,
            "flops": our_flops,
            "peer_flops": peer_flops,
            "ratio_of_tokens_per_second": (sum(positions) / our_seconds) / (ids.numel() / peer_seconds),
        }
    return result


def _text_training(bench: Bench, ids: torch.Tensor) -> tuple[Any, Callable[[], None]]:
    peer_model: Any = copy.deepcopy(bench.backbone.model).float().requires_grad_(True).train()
    optimizer = Optimizer(dict(peer_model.named_parameters()))

    def step() -> None:
        with torch.autocast(ids.device.type, bench.dtype, enabled=bench.dtype != torch.float32):
            loss = peer_model(ids, labels=ids).loss
        loss.backward()
        optimizer.step(1e-5, 1.0, 0.999)

    return peer_model, step
