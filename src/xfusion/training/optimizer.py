"""AdamW over the new weights, and their moving average; of weights that processes divide, over this one's shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from xfusion.training.processes import divided_like, share

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW (0.9, 0.95) with clipping and a moving average, over learned weights only.

    A weight decay is taken of all of them, norms, biases, gates and boundary rows too, where many leave these out: which weights
    would be exempt is a mechanism's own matter (a gate begins at 0 and a norm at 1), and no recipe has a decay but 0.

    Args:
        parameters: float32 masters by name; divided ones are `DTensor`.
        add: adds a number up over all processes; asked only where weights are divided.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], add: Callable[[Tensor], Tensor] | None = None):
        self.parameters, self.add = parameters, add
        self.list: list[nn.Parameter] = [_own(p) for p in parameters.values()]
        self.adamw = torch.optim.AdamW(self.list, lr=0.0, betas=(0.9, 0.95), fused=True)
        self.average = [p.detach().clone() for p in self.list]

    @property
    def whole(self) -> list[nn.Parameter]:
        """The parameters that this process holds whole."""
        return [own for own, parameter in zip(self.list, self.parameters.values(), strict=True) if own is parameter]

    @property
    def moments(self) -> list[Tensor]:
        """What AdamW remembers so far."""
        return [value for state in self.adamw.state.values() for value in state.values() if value.dim()]

    def step(self, rate: float, clip: float, ema: float, weight_decay: float = 0.0) -> float:
        """One step; returns the norm of the gradient before clipping. Without a finite norm nothing is changed.

        Args:
            rate: the learning rate.
            clip: largest norm of the gradient.
            ema: decay of the average.
            weight_decay: AdamW's.
        """
        norm = self._norm()
        if not bool(norm.isfinite()):
            return float(norm)
        if bool(norm > clip):  # else every gradient would be read and written to be multiplied by 1
            torch.nn.utils.clip_grads_with_norm_(self.list, clip, norm)
        for group in self.adamw.param_groups:
            group["lr"] = rate
            group["weight_decay"] = weight_decay
        self.adamw.step()
        # The fused kernel leaves the version as it was, by which others know that what they made of the weights is old.
        torch.autograd.graph.increment_version(self.list)
        self.forget_gradients()
        get_ema_multi_avg_fn(ema)(self.average, [p.detach() for p in self.list], None)
        return float(norm)

    def _norm(self) -> Tensor:
        """Norm of the whole gradient; a share's own gradient is laid beside it."""
        shares = []
        for own, parameter in zip(self.list, self.parameters.values(), strict=True):
            if own is not parameter:
                own.grad = None if parameter.grad is None else share(parameter.grad)
                shares.append(own)
        square = _square_sum([p.grad for p in self.whole if p.grad is not None])
        if self.add is not None:
            square = square + self.add(_square_sum([p.grad for p in shares if p.grad is not None]))
        return square.sqrt().float()

    def forget_gradients(self) -> None:
        """Drop what backward passes left."""
        for parameter in (*self.list, *self.parameters.values()):
            parameter.grad = None

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

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as flat tensors, divided as the parameters are."""
        out: dict[str, Tensor] = {}
        for name, parameter, own, average in self._rows():
            out[f"weight.{name}"], out[f"average.{name}"] = parameter.detach(), divided_like(average, parameter)
            for key, value in self.adamw.state.get(own, {}).items():
                out[f"{key}.{name}"] = divided_like(value, parameter) if value.shape == own.shape else value
        return out

    def state_like(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Room for a state of these names; parameters that are not trained yet have no moments."""
        known, out = set(names), {}
        for name, parameter, own, _ in self._rows():
            for key in ("weight", "average", *MOMENTS):
                if f"{key}.{name}" in known:
                    room = torch.zeros((), dtype=torch.float32) if key == "step" else torch.zeros_like(own)
                    out[f"{key}.{name}"] = room if key == "step" else divided_like(room.detach(), parameter)
        return out

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        with torch.no_grad():
            for name, _, own, average in self._rows():
                own.copy_(share(state[f"weight.{name}"]))
                average.copy_(share(state[f"average.{name}"]))
                kept = {
                    key: share(state[f"{key}.{name}"]).to(own.device) for key in MOMENTS if f"{key}.{name}" in state
                }
                if kept:
                    self.adamw.state[own] = dict(kept)

    def _rows(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter, Tensor]]:
        """Name, parameter, what this process holds of it, and its average."""
        for (name, parameter), own, average in zip(self.parameters.items(), self.list, self.average, strict=True):
            yield name, parameter, own, average


def _square_sum(gradients: list[Tensor]) -> Tensor:
    """Sum of the squares of all numbers, float64. A dot product reads them once, at the memory's own rate, which torch's
    norm of a tensor does not reach on a CPU (docs/speed.md).
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([torch.dot(g.reshape(-1), g.reshape(-1)) for g in gradients]).double().sum()


def _own(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter over this process's share; the parameter itself where it is whole."""
    own = share(parameter)
    return parameter if own is parameter else nn.Parameter(own)
