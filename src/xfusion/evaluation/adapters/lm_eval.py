"""Adapter for EleutherAI's lm-evaluation-harness: its tasks on a pack's text, through the base's forward or the fused stack.

With the harness's command line: ``python -m xfusion.evaluation.adapters.lm_eval --model xfusion --model_args pack=emoji --tasks
arc_easy``. With xfusion's: ``xfusion evaluate emoji --suite lm_eval --set tasks=arc_easy``.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from xfusion.model import Model


@register_model("xfusion")
class PackText(HFLM):
    """A pack as a model of the harness: its class for transformers models, on one of the pack's text stacks."""

    def __init__(
        self, pack: str | Model, stack: str = "fused", device: str = "cpu", batch_size: int = 1, **settings: Any
    ):
        """Load a pack.

        Args:
            pack: name of a pack, or a loaded model.
            stack: "base" or "fused", as in `Model.text_logits`.
            device: device to load on, "cpu" where this machine has none such; ignored for a loaded model.
            batch_size: items per forward pass.
            settings: further arguments of the harness's class.

        Raises:
            ValueError: the stack is unknown.
        """
        if isinstance(pack, str):
            from xfusion.checkpoint import load

            if torch.device(device).type == "cuda" and not torch.cuda.is_available():
                device = "cpu"  # the harness's command line says cuda:0 where it is told no device
            pack = load(pack, device=device)
        if stack not in ("base", "fused"):
            raise ValueError(f"stack {stack!r} is neither 'base' nor 'fused'")
        text = pack.text_only() if stack == "base" else pack.fused_text_model()
        settings |= {"pretrained": text, "tokenizer": pack.backbone.tokenizer, "batch_size": int(batch_size)}
        super().__init__(**settings)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
