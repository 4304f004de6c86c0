"""AdamW over the new weights, and their moving average. With sharded weights it works on this process's shards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from xfusion.training.processes import row_slice, sharded_like

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
NEVER_DECAYED = frozenset({"latents", "queries", "constants", "rows", "by_layer"})
"""Last names of parameters that are lists of vectors and no matrices: learned inputs, which mean nothing near 0."""


class Optimizer:
    """AdamW (0.9, 0.95) with clipping and a moving average, over learned weights only.

    Weight decay applies to matrices: not to embedding tables, gates, which it would close, norms, biases, boundary rows, and
    the queries, latents and rows that modules learn as inputs of their own.

    Args:
        parameters: float32 master weights by name; sharded ones are `DTensor`.
        all_reduce: sums a tensor over all processes; called only if weights are sharded.
        embedding_tables: names of the parameters that are embedding tables (`xfusion.model.Model.embedding_tables`).
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        embedding_tables: Collection[str] = (),
    ):
        self.parameters, self.all_reduce = parameters, all_reduce
        self.shards: list[nn.Parameter] = [_shard_of(p) for p in parameters.values()]
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for (name, parameter), shard in zip(parameters.items(), self.shards, strict=True):
            is_matrix = parameter.ndim > 1 and name not in embedding_tables
            groups[is_matrix and name.rpartition(".")[2] not in NEVER_DECAYED].append(shard)
        self.adamw = torch.optim.AdamW(
            [{"params": shards, "decays": decays} for decays, shards in groups.items() if shards],
            lr=0.0,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.average = [p.detach().clone() for p in self.shards]

    @property
    def unsharded(self) -> list[nn.Parameter]:
        """The parameters that this process holds unsharded."""
        return [
            shard for shard, parameter in zip(self.shards, self.parameters.values(), strict=True) if shard is parameter
        ]

    @property
    def moments(self) -> list[Tensor]:
        """AdamW's moments so far."""
        return [value for state in self.adamw.state.values() for value in state.values() if value.dim()]

    def step(self, rate: float, clip: float, ema: float, weight_decay: float = 0.0) -> float:
        """Take one step and return the gradient norm before clipping. If the norm is not finite, nothing is changed.

        Args:
            rate: learning rate.
            clip: norm to which the gradient is clipped.
            ema: decay of the moving average.
            weight_decay: AdamW's decoupled decay of matrices.
        """
        norm = self._gradient_norm()
        if not bool(norm.isfinite()):
            return float(norm)
        if bool(norm > clip):  # otherwise every gradient would be read and written only to be multiplied by 1
            torch.nn.utils.clip_grads_with_norm_(self.shards, clip, norm)
        for group in self.adamw.param_groups:
            group["lr"] = rate
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        self.adamw.step()
        # The fused kernel does not bump the version counter, by which caches of derived tensors notice that weights changed.
        torch.autograd.graph.increment_version(self.shards)
        self.forget_gradients()
        get_ema_multi_avg_fn(ema)(self.average, [p.detach() for p in self.shards], None)
        return float(norm)

    def _gradient_norm(self) -> Tensor:
        """Norm of the whole gradient; sets the gradients of this process's shards on the way."""
        sharded = []
        for shard, parameter in zip(self.shards, self.parameters.values(), strict=True):
            if shard is not parameter:
                shard.grad = None if parameter.grad is None else row_slice(parameter.grad)
                sharded.append(shard)
        square_sum = _square_sum([p.grad for p in self.unsharded if p.grad is not None])
        if self.all_reduce is not None:
            square_sum = square_sum + self.all_reduce(_square_sum([p.grad for p in sharded if p.grad is not None]))
        return square_sum.sqrt().float()

    def forget_gradients(self) -> None:
        """Drop all gradients."""
        for parameter in (*self.shards, *self.parameters.values()):
            parameter.grad = None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the parameters hold their moving average."""
        current = [p.detach().clone() for p in self.shards]
        self.use_average()
        try:
            yield
        finally:
            self._set_parameters(current)

    def use_average(self) -> None:
        """Replace the parameters by their moving average for good."""
        self._set_parameters(self.average)

    @torch.no_grad()
    def _set_parameters(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.shards, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as flat tensors, sharded like the parameters."""
        state: dict[str, Tensor] = {}
        for name, parameter, shard, average in self._entries():
            state[f"weight.{name}"], state[f"average.{name}"] = parameter.detach(), sharded_like(average, parameter)
            for key, value in self.adamw.state.get(shard, {}).items():
                state[f"{key}.{name}"] = sharded_like(value, parameter) if value.shape == shard.shape else value
        return state

    def state_like(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Empty tensors to load a state with these names into; parameters not trained yet have no moments."""
        present, state = set(names), {}
        for name, parameter, shard, _ in self._entries():
            for key in ("weight", "average", *MOMENTS):
                if f"{key}.{name}" in present:
                    buffer = torch.zeros((), dtype=torch.float32) if key == "step" else torch.zeros_like(shard)
                    state[f"{key}.{name}"] = buffer if key == "step" else sharded_like(buffer.detach(), parameter)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a `state_dict`."""
        with torch.no_grad():
            for name, _, shard, average in self._entries():
                shard.copy_(row_slice(state[f"weight.{name}"]))
                average.copy_(row_slice(state[f"average.{name}"]))
                moments = {
                    key: row_slice(state[f"{key}.{name}"]).to(shard.device)
                    for key in MOMENTS
                    if f"{key}.{name}" in state
                }
                if moments:
                    self.adamw.state[shard] = dict(moments)

    def _entries(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter, Tensor]]:
        """Name, parameter, this process's part of it, and the average of that part."""
        for (name, parameter), shard, average in zip(self.parameters.items(), self.shards, self.average, strict=True):
            yield name, parameter, shard, average


def _square_sum(gradients: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements, float64, on the CPU. A dot product reads them once at full memory bandwidth, which
    torch's norm of a tensor does not reach on a CPU (docs/speed.md). Apple's GPUs have no float64.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([torch.dot(g.reshape(-1), g.reshape(-1)) for g in gradients]).cpu().double().sum()


def _shard_of(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter over this process's shard; the parameter itself if it is not sharded."""
    shard = row_slice(parameter)
    return parameter if shard is parameter else nn.Parameter(shard)
