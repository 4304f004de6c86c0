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

from xfusion.backbone.decoder import replace_by_casts
from xfusion.data.sequence import XFusionError
from xfusion.engine import States
from xfusion.model import Model
from xfusion.training.processes import Shard

T = TypeVar("T")


class _Unit(nn.Module):
    """Modules whose weights are gathered together while they compute."""

    def __init__(self, modules: Iterable[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, compute: Callable[[States], States], states: States, zero: Tensor) -> tuple[States, Tensor]:
        """States after the work, and a 0 that backward goes through."""
        # Backward hooks are on the states; a view's hook would be lost by an in-place write.
        outputs = {owner: x.clone() if x._is_view() else x for owner, x in compute(states).items()}
        return outputs, zero.clone()


class _Root(nn.Module):
    """The whole model: the units of its layers, and everything outside them."""

    def __init__(self, units: dict[int, _Unit], others: Iterable[nn.Module]):
        super().__init__()
        self.units = nn.ModuleDict({str(index): unit for index, unit in units.items()})
        self.others = nn.ModuleList(others)
        self.zeros: list[Tensor] = []

    def forward(self, compute: Callable[[], Any], zero: Tensor) -> tuple[Any, Tensor]:
        """The result of the work, and the sum of the numbers that its units passed on."""
        self.zeros = [zero]
        try:
            return compute(), torch.stack(self.zeros).sum()
        finally:
            self.zeros = []

    def layer(self, index: int, compute: Callable[[States], States], states: States) -> States:
        """A `Gather`: the work of a layer with its weights gathered."""
        if str(index) not in self.units:
            return compute(states)
        outputs, zero = self.units[str(index)](compute, states, self.zeros[0])
        self.zeros.append(zero)
        return outputs


class Sharding:
    """A model whose weights are sharded across processes.

    Args:
        model: its new parameters become shards, in place, under the same names.
        shard: "new" or "all".
        mesh: the processes (`mesh`).
        dtype: compute type; a layer's new weights are gathered in it if it is narrower than their own.
        attention: attention implementation of the sharded copy of the base.

    Raises:
        XFusionError: this version of torch lacks what is needed.
    """

    def __init__(self, model: Model, shard: Shard, mesh: DeviceMesh, dtype: torch.dtype, attention: str):
        self.model, self.mesh = model, mesh
        self.device = torch.device(mesh.device_type)
        self.backbone = model.backbone.over_same_weights(attention) if shard == "all" else None
        frozen_layers = None if self.backbone is None else self.backbone.layers
        scalars: set[nn.Parameter] = {p for p in model.new_parameters() if not p.dim()}
        for parameter in scalars:  # what is not sharded is not moved either
            parameter.data = parameter.data.to(self.device)
        gather_dtype = None if dtype == torch.float32 else dtype
        policy = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        units: dict[int, _Unit] = {}
        assigned = set(scalars)
        copies: dict[int, nn.Parameter] = {}
        for index in range(model.backbone.num_layers):
            layer_modules = model.fusion.new_modules(index)
            if frozen_layers is not None:
                replace_by_casts(frozen_layers[index], dtype, self.device, copies)
                layer_modules = [frozen_layers[index], *layer_modules]
            unit = _Unit(layer_modules)
            if any(p not in scalars for p in unit.parameters()):
                units[index] = fully_shard(  # type: ignore[assignment]
                    unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=scalars
                )
                assigned.update(unit.parameters())
            copies.clear()  # the shards exist: nothing may hold the whole layer any longer
        objectives = [model.text_objective, model.media_objective]
        outer_modules: list[nn.Module] = [model.port, model.fusion, model.extra, *objectives]
        if self.backbone is not None:
            replace_by_casts(self.backbone.model, dtype, self.device, copies, excluded=assigned)
            outer_modules.append(self.backbone.model)
        self.root: Any = fully_shard(
            _Root(units, outer_modules), mesh=mesh, reshard_after_forward=False, ignored_params=assigned
        )
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

    def losses(self, compute: Callable[[], T]) -> tuple[T, Tensor]:
        """The result of some passes, and a 0 to add to the loss before backward."""
        return self.root(compute, torch.zeros((), device=self.device, requires_grad=True))

    @torch.no_grad()
    def run_without_gradients(self, compute: Callable[[], T]) -> T:
        """The result of some passes without gradients; all processes run them together."""
        result, _ = self.root(compute, torch.zeros((), device=self.device))
        self.root.reshard()
        return result


def mesh(device: torch.device) -> DeviceMesh:
    """A one-dimensional mesh of all processes of the run."""
    return init_device_mesh(device.type, (dist.get_world_size(),))


def gathered_state(model: Model, *, keep: bool) -> dict[str, Tensor]:
    """The learned weights of a model, gathered one by one on the CPU; empty unless ``keep`` is set.

    All processes call it together.
    """
    state = {}
    for name, tensor in model.learned_state().items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            state[name] = tensor.detach().to("cpu", copy=True)
    return state
