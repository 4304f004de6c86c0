"""Speed of text-only generation: the fused model's ``generate`` against the base's, for the same tokens."""

from __future__ import annotations

from typing import Any

import torch

from xfusion.apps.bench.base import Bench
from xfusion.data.sequence import XFusionError

PROMPT = "A short story about a small robot who wanted to paint:"


def measure(bench: Bench) -> dict[str, Any]:
    """Measure the public method, and the fused stack that proves bit-equality."""
    model, base = bench.model(), bench.backbone
    ids = torch.tensor([base.encode(PROMPT)])
    max_tokens = 8 if bench.quick else 96
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": max_tokens,
        "do_sample": False,
        "pad_token_id": base.end_id,
    }
    fused = model.fused_text_model()
    with torch.no_grad():
        seconds = bench.in_turn(
            {
                "the base": lambda: base.model.generate(ids, **settings),
                "ours": lambda: model.generate([PROMPT], max_tokens=max_tokens),
                "the fused stack": lambda: fused.generate(ids, **settings),
            },
            rounds=None if bench.quick else 9,
        )
        tokens = base.model.generate(ids, **settings)[0, ids.shape[1] :].tolist()
    answers = {"the base": base.decode(tokens), "ours": model.generate([PROMPT], max_tokens=max_tokens)[0]}
    if len({*answers.values()}) > 1 or fused.generate(ids, **settings)[0, ids.shape[1] :].tolist() != tokens:
        raise XFusionError(f"the bench compares equal work, but the answers differ: {answers}")
    num_tokens = len(tokens)
    base_seconds, our_seconds, stack_seconds = seconds.values()
    return {
        "ratio_to_base_generate": base_seconds / our_seconds,
        "ratio_of_the_fused_stack": base_seconds / stack_seconds,
        "tokens": num_tokens,
        "base_tokens_per_second": num_tokens / base_seconds,
        "tokens_per_second": num_tokens / our_seconds,
    }
