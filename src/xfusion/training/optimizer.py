"""AdamW over the new weights, and their moving average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Optimizer:
    """AdamW (0.9, 0.95) with clipping and a moving average, over learned weights only.

    Args:
        parameters: float32 masters by name.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], weight_decay: float):
        self.parameters = parameters
        self.list: list[nn.Parameter] = list(parameters.values())
        self.adamw = torch.optim.AdamW(self.list, lr=0.0, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
        self.average = [p.detach().clone() for p in self.list]

    def step(self, rate: float, clip: float, ema: float) -> float:
        """One step; returns the norm of the gradient before clipping. Without a finite norm nothing is changed."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.list if p.grad is not None])
        if not bool(norm.isfinite()):
            return float(norm)
        if bool(norm > clip):  # else every gradient would be read and written to be multiplied by 1
            torch.nn.utils.clip_grads_with_norm_(self.list, clip, norm)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        get_ema_multi_avg_fn(ema)(self.average, [p.detach() for p in self.list], None)
        return float(norm)

    def forget_gradients(self) -> None:
        """Drop what backward passes left."""
        self.adamw.zero_grad(set_to_none=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the parameters hold their moving average."""
        kept = [p.detach().clone() for p in self.list]
        self.use_average()
        try:
            yield
        finally:
            self._put(kept)

    def use_average(self) -> None:
        """Put the moving average in the parameters' place for good."""
        self._put(self.average)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.list, values, strict=True):
            parameter.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as flat tensors."""
        out: dict[str, Tensor] = {}
        for (name, parameter), average in zip(self.parameters.items(), self.average, strict=True):
            out[f"weight.{name}"], out[f"average.{name}"] = parameter.detach(), average
            for key, value in self.adamw.state.get(parameter, {}).items():
                out[f"{key}.{name}"] = value
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` gave."""
        with torch.no_grad():
            for (name, parameter), average in zip(self.parameters.items(), self.average, strict=True):
                parameter.copy_(state[f"weight.{name}"])
                average.copy_(state[f"average.{name}"])
                kept = {
                    key: state[f"{key}.{name}"].to(parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}.{name}" in state
                }
                if kept:
                    self.adamw.state[parameter] = dict(kept)
