"""Sharded weights (FSDP2): each process stores a shard, and a layer's weights are gathered while it computes.

One policy, ``--shard``:

========  ==============================================================================================================
none      every process holds all weights (`xfusion.training.processes`); nothing of this file is used
new       the new weights are sharded, with their gradients, moments and average; each process has the whole frozen base
all       the copy of the frozen base that training computes with is sharded too
========  ==============================================================================================================

A layer is one unit of ``fully_shard``: its new modules and, for ``all``, the frozen layer are gathered before it computes and
freed after it, in forward and backward. Ports, heads, embeddings and everything else outside the layers form one more unit,
which stays gathered during a batch. Scalars cannot be sharded and stay whole.

The base itself is never changed: a copy of its module objects is sharded, filled layer by layer from its weights, which are
in a memory-mapped file that all processes of a machine share.

All processes must gather the same units in the same order, whatever their rows contain. So each call of a unit also passes on
a number, and the loss contains all of these numbers times zero: backward goes through every unit in every process, even if no
row needs it. A parameter without a gradient counts as one with a zero gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from xfusion.data.sequence import XFusionError
from xfusion.model import Model, States
from xfusion.training.processes import Shard

T = TypeVar("T")


class _Unit(nn.Module):
    """Modules whose weights are gathered together while they compute."""

    def __init__(self, modules: Iterable[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, work: Callable[[States], States], states: States, zero: Tensor) -> tuple[States, Tensor]:
        """States after the work, and a 0 that backward goes through."""
        # Backward hooks are on the states; a view's hook would be lost by an in-place write.
        found = {owner: x.clone() if x._is_view() else x for owner, x in work(states).items()}
        return found, zero.clone()


class _Root(nn.Module):
    """The whole model: the units of its layers, and everything outside them."""

    def __init__(self, units: dict[int, _Unit], others: Iterable[nn.Module]):
        super().__init__()
        self.units = nn.ModuleDict({str(index): unit for index, unit in units.items()})
        self.others = nn.ModuleList(others)
        self.zeros: list[Tensor] = []

    def forward(self, work: Callable[[], Any], zero: Tensor) -> tuple[Any, Tensor]:
        """The result of the work, and the sum of the numbers that its units passed on."""
        self.zeros = [zero]
        try:
            return work(), torch.stack(self.zeros).sum()
        finally:
            self.zeros = []

    def layer(self, index: int, work: Callable[[States], States], states: States) -> States:
        """A `Gather`: the work of a layer with its weights gathered."""
        if str(index) not in self.units:
            return work(states)
        found, zero = self.units[str(index)](work, states, self.zeros[0])
        self.zeros.append(zero)
        return found


class Sharding:
    """A model whose weights are sharded across processes.

    Args:
        model: its new parameters become shards, in place, under the same names.
        what: "new" or "all".
        mesh: the processes (`mesh`).
        dtype: compute type; a layer's new weights are gathered in it if it is narrower than their own.
        attention: attention implementation of the sharded copy of the base.

    Raises:
        XFusionError: this version of torch lacks what is needed.
    """

    def __init__(self, model: Model, what: Shard, mesh: DeviceMesh, dtype: torch.dtype, attention: str):
        self.model, self.mesh = model, mesh
        self.device = torch.device(mesh.device_type)
        self.backbone = model.backbone.over_same_weights(attention) if what == "all" else None
        frozen = None if self.backbone is None else self.backbone.layers
        whole: set[nn.Parameter] = {p for p in model.new_parameters() if not p.dim()}
        for parameter in whole:  # what is not divided is not moved either
            parameter.data = parameter.data.to(self.device)
        narrow = None if dtype == torch.float32 else dtype
        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
        units: dict[int, _Unit] = {}
        taken = set(whole)
        copies: dict[int, nn.Parameter] = {}
        for index in range(model.backbone.num_layers):
            own = model.fusion.new_modules(index)
            if frozen is not None:
                _put_copies(frozen[index], dtype, self.device, copies)
                own = [frozen[index], *own]
            unit = _Unit(own)
            if any(p not in whole for p in unit.parameters()):
                units[index] = fully_shard(  # type: ignore[assignment]
                    unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=whole
                )
                taken.update(unit.parameters())
            copies.clear()  # the share is taken: nothing holds the whole layer any more
        objectives = [model.text_objective, model.media_objective]
        others: list[nn.Module] = [model.port, model.fusion, model.extra, *objectives]
        if self.backbone is not None:
            _put_copies(self.backbone.model, dtype, self.device, copies, but=taken)
            others.append(self.backbone.model)
        self.root: Any = fully_shard(_Root(units, others), mesh=mesh, reshard_after_forward=False, ignored_params=taken)
        for unit in (self.root, *units.values()):
            unit.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # gloo knows sums alone
            unit.set_gradient_divide_factor(1.0)  # type: ignore[operator]  # losses are divided by the counts of all
        if not hasattr(self.root, "set_reduce_scatter_unused_params"):
            raise XFusionError(
                f"torch {torch.__version__} cannot divide weights that a process does not use: take 2.13"
            )
        self.root.set_reduce_scatter_unused_params(True)
        model.modality.to(self.device)
        model.gather = self.root.layer

    def losses(self, work: Callable[[], T]) -> tuple[T, Tensor]:
        """The result of some passes, and a 0 to add to the loss before backward."""
        return self.root(work, torch.zeros((), device=self.device, requires_grad=True))

    @torch.no_grad()
    def passes(self, work: Callable[[], T]) -> T:
        """The result of some passes without gradients; all processes run them together."""
        found, _ = self.root(work, torch.zeros((), device=self.device))
        self.root.reshard()
        return found


def mesh(device: torch.device) -> DeviceMesh:
    """A one-dimensional mesh of all processes of the run."""
    return init_device_mesh(device.type, (dist.get_world_size(),))


def whole_state(model: Model, *, keep: bool) -> dict[str, Tensor]:
    """The learned weights of a model, gathered one by one on the CPU; empty unless ``keep`` is set.

    All processes call it together.
    """
    found = {}
    for name, tensor in model.learned_state().items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = tensor.detach().to("cpu", copy=True)
    return found


def _put_copies(
    module: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    copies: dict[int, nn.Parameter],
    but: Iterable[nn.Parameter] = (),
) -> None:
    """Put casts of its parameters on a device in the place of a frozen module's own; one that is used twice stays one."""
    kept = set(but)
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if parameter is None or parameter in kept:
                continue
            if id(parameter) not in copies:
                values = parameter.detach().to(device, dtype)
                copies[id(parameter)] = nn.Parameter(values, requires_grad=False)
            inner._parameters[name] = copies[id(parameter)]
