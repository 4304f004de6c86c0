"""Weights that processes divide among them (FSDP2): each keeps a share, and a layer's are gathered while it computes.

One policy, ``--shard``:

========  ==============================================================================================================
none      every process holds all weights (`xfusion.training.processes`); nothing of this file is used
new       the new weights are divided, with their gradients, moments and average; the frozen base is whole in each process
all       the copy of the frozen base that training computes with is divided too
========  ==============================================================================================================

A layer is one unit of ``fully_shard``: what a layer of a pass needs, the new modules and for ``all`` the frozen layer, comes
together before it computes and is let go behind it, forth and back. Ports, heads, embeddings and whatever else stands outside
the layers is one more unit, whole as long as a batch is learned from. Single numbers cannot be divided and stay whole.

The base itself is never touched: what is divided is a copy of its module objects, filled layer by layer from its weights,
which lie in a file that the system maps and all processes of a machine share.

All processes must gather the same units in the same order, whatever stands in their rows. So each call of a unit hands on a
number besides its states, and the loss contains all of these numbers, times nothing: backward comes through every unit in
every process, also where no row needs it. A parameter without a gradient counts as one with zeros.
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
    """Modules whose weights are gathered together while some work of theirs is done."""

    def __init__(self, modules: Iterable[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, work: Callable[[States], States], states: States, zero: Tensor) -> tuple[States, Tensor]:
        """States behind the work, and a number 0 that backward comes through."""
        # Hooks of backward stand on the states, and a view's would be lost with what is written into it.
        found = {owner: x.clone() if x._is_view() else x for owner, x in work(states).items()}
        return found, zero.clone()


class _Root(nn.Module):
    """All of a model: units of layers, and what stands outside them."""

    def __init__(self, units: dict[int, _Unit], others: Iterable[nn.Module]):
        super().__init__()
        self.units = nn.ModuleDict({str(index): unit for index, unit in units.items()})
        self.others = nn.ModuleList(others)
        self.zeros: list[Tensor] = []

    def forward(self, work: Callable[[], Any], zero: Tensor) -> tuple[Any, Tensor]:
        """What the work gives, and the sum of the numbers that its units handed on."""
        self.zeros = [zero]
        try:
            return work(), torch.stack(self.zeros).sum()
        finally:
            self.zeros = []

    def layer(self, index: int, work: Callable[[States], States], states: States) -> States:
        """A `Gather`: the work of a layer with its weights at hand."""
        if str(index) not in self.units:
            return work(states)
        found, zero = self.units[str(index)](work, states, self.zeros[0])
        self.zeros.append(zero)
        return found


class Sharding:
    """A model whose weights are divided among processes.

    Args:
        model: its new parameters become shares, in place; they have the names that they had.
        what: "new" or "all".
        mesh: the processes (`mesh`).
        dtype: compute type; a layer's new weights are gathered in it where it is narrower than their own.
        attention: implementation of the divided copy of the base.

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
        """What some passes give, and a number 0 that belongs into the sum that is walked back from."""
        return self.root(work, torch.zeros((), device=self.device, requires_grad=True))

    @torch.no_grad()
    def passes(self, work: Callable[[], T]) -> T:
        """What some passes give that nothing is learned from; all processes do them together."""
        found, _ = self.root(work, torch.zeros((), device=self.device))
        self.root.reshard()
        return found


def mesh(device: torch.device) -> DeviceMesh:
    """All processes of the run in a row."""
    return init_device_mesh(device.type, (dist.get_world_size(),))


def whole_state(model: Model, *, keep: bool) -> dict[str, Tensor]:
    """The learned weights of a model, gathered one by one on the CPU; nothing where they are not to be kept.

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
