"""Sparse experts instead of a layer's MLP (MoE-LLaVA, arXiv 2401.15947).

    p = softmax(W x)        y = sum over the k largest p_i of p_i / (their sum) MLP_i(x)        MLP_i = MLP at the start

Every routed position goes to its k experts. None is dropped and routing is deterministic, so a token's routing does not depend on
its batch (the paper's code has a capacity limit and noise on the second choice). Media pass through all frozen layers, as in
LLaVA.

The paper routes every token, also in text-only input, and trains all experts, so text is not preserved. With
``frozen_expert`` the first expert is the base's own MLP, only the others train, and routing starts at the first media token
of a sequence: before it, and in text-only input, text uses only the first expert. [BOI], a row that the paper has not, goes
through the base's own MLP in both forms.

Shape legend: ``B`` batch row, ``n`` rows, ``r`` routed rows, ``D`` model width, ``E`` experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from xfusion.backbone import Backbone
from xfusion.data.sequence import XFusionError
from xfusion.fusion.base import Call, Fusion, Pass
from xfusion.layers import Delta, assembled, mlp_path


class Experts(nn.Module):
    """The router of a layer and its experts, excluding a frozen expert."""

    def __init__(self, config: SparseExperts.Config, width: int, experts: list[nn.Module]):
        super().__init__()
        self.active, self.frozen_expert = config.active, config.frozen_expert
        self.router = nn.Linear(width, config.experts, bias=False)
        self.experts = nn.ModuleList(experts)

    def all(self, frozen: nn.Module) -> list[nn.Module]:
        """Every expert, in the router's order."""
        return [frozen, *self.experts] if self.frozen_expert else list(self.experts)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows ``[r, D]`` -> probabilities ``[r, E]`` in at least float32, and normalized weights of the chosen experts."""
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # costs are counted on meta
            wide_states = x.to(torch.promote_types(x.dtype, torch.float32))
            probability = torch.softmax(
                nn.functional.linear(wide_states, self.router.weight.to(wide_states.dtype)), dim=-1
            )
        top = probability.topk(self.active, dim=-1)
        top_probabilities = torch.zeros_like(probability).scatter(-1, top.indices, top.values)
        return probability, top_probabilities / top.values.sum(-1, keepdim=True)


class Routed(Delta):
    """An MLP, replaced by the experts for routed rows; created for one pass.

    Args:
        experts: the layer's experts.
        routed_mask: which rows are routed, bool ``[B, n]``.
        probabilities: a list to which the router's probabilities ``[r, E]`` are appended.
    """

    def __init__(self, experts: Experts, routed_mask: Tensor, probabilities: list[Tensor]):
        super().__init__()
        self.experts, self.routed_mask, self.probabilities = experts, routed_mask, probabilities

    def forward(self, frozen: nn.Module, x: Tensor) -> Tensor:  # type: ignore[override]
        """``[B, n, D]`` -> ``[B, n, D]``; each expert computes its own rows, and the frozen MLP those that are not routed."""
        if x.is_meta:
            return self.evenly(frozen, x)
        rows = x[self.routed_mask]
        probability, weight = self.experts.weights(rows)
        self.probabilities.append(probability)
        routed_output = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts.all(frozen)):
            expert_rows = weight[:, i].nonzero()[:, 0]
            expert_output = expert(rows[expert_rows].to(next(expert.parameters()).dtype))
            routed_output = routed_output.index_add(
                0, expert_rows, (weight[expert_rows, i, None] * expert_output).to(routed_output.dtype)
            )
        output = self.without_routing(frozen, x)
        return output.masked_scatter(self.routed_mask[..., None], routed_output.to(output.dtype))

    def without_routing(self, frozen: nn.Module, x: Tensor) -> Tensor:
        """The frozen MLP at rows that are not routed, ``[B, n, D]``; 0 at the others."""
        if bool(self.routed_mask.all()):
            return torch.zeros_like(x)
        if not bool(self.routed_mask.any()):
            return frozen(x)  # as the base calls it: products of other sizes may round differently
        frozen_output = frozen(x[~self.routed_mask])
        return frozen_output.new_zeros(x.shape).masked_scatter(~self.routed_mask[..., None], frozen_output)

    def evenly(self, frozen: nn.Module, x: Tensor) -> Tensor:
        """The same on meta tensors, to count costs: all rows are routed, with an equal share for each expert."""
        rows = x.flatten(0, 1)
        probability, weight = self.experts.weights(rows)
        self.probabilities.append(probability)
        experts = self.experts.all(frozen)
        share = len(rows) * self.experts.active // len(experts)
        expert_outputs = [expert(rows[:share]).sum(0) * weight[:, i, None] for i, expert in enumerate(experts)]
        return (rows + torch.stack(expert_outputs).sum(0)).unflatten(0, x.shape[:2])


class RoutedByAll(Routed):
    """The paper's sum, every expert on every row: the reference path."""

    def forward(self, frozen: nn.Module, x: Tensor) -> Tensor:  # type: ignore[override]
        """``[B, n, D]`` -> ``[B, n, D]``."""
        probability, weight = self.experts.weights(x)
        self.probabilities.append(probability[self.routed_mask])
        expert_outputs = torch.stack([expert(x) for expert in self.experts.all(frozen)], dim=-1)
        return torch.where(
            self.routed_mask[..., None], (expert_outputs * weight[..., None, :]).sum(-1).to(x.dtype), frozen(x)
        )


class SparseExperts(Fusion):
    """Experts instead of MLPs, with a router that sends every token to a few of them."""

    preserves_text = True
    prefix_is_constant = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        """Number of experts; ``stride`` and ``offset`` choose the layers that have them."""

        stride: int = 2
        """Put experts at every stride-th layer; the paper uses every second."""
        offset: int | None = 0
        """First layer with experts."""
        experts: int = 4
        """Experts per layer, including a frozen one."""
        active: int = 2
        """Experts per token."""
        frozen_expert: bool = True
        """Whether the first expert is the base's own MLP and routing starts at the first media token, so that text is
        preserved; otherwise as in the paper."""

        def build(self) -> SparseExperts:
            """The fusion, not yet installed.

            Raises:
                XFusionError: ``active`` is not between 1 and ``experts``, or there are fewer than 2 experts.
            """
            if not 1 <= self.active <= self.experts or self.experts < 2:
                raise XFusionError(
                    f"sparse experts: a token takes {self.active} of {self.experts}: take at least 2 experts, and no more"
                    " active ones than there are"
                )
            return SparseExperts(self)

    def __init__(self, config: Config):
        super().__init__(config)
        if not config.frozen_expert:
            self.preserves_text = self.prefix_is_constant = False

    @property
    def state_layers(self) -> tuple[int, ...]:
        """All layers: media pass through the frozen layers."""
        return tuple(range(len(self.windows)))

    def make(self, index: int, backbone: Backbone) -> Experts:
        """The router and copies of a layer's MLP.

        Raises:
            XFusionError: the layer has no single MLP, or it has experts already.
        """
        count = self.config.experts - self.config.frozen_expert
        path = mlp_path(backbone.layers[index])
        mlp = backbone.layers[index].get_submodule(path)
        if any(parameter.ndim > 2 for parameter in mlp.parameters()):
            raise XFusionError(
                f"sparse experts: {type(mlp).__name__} of {backbone.source} is a mixture of experts already, which cannot be one"
                " of the experts: take another base, or another mechanism"
            )
        copies = [backbone.copy_layer(index, self.block_config).get_submodule(path) for _ in range(count)]
        return Experts(self.config, backbone.hidden_size, copies).to(backbone.device)

    def _routed_layer(
        self,
        index: int,
        frozen: nn.Module,
        routed_mask: Tensor,
        routed_class: type[Routed],
        probabilities: list[Tensor],
    ) -> Any:
        experts: Any = self.blocks[str(index)]
        return assembled(frozen, {mlp_path(frozen): routed_class(experts, routed_mask, probabilities)})

    def _routed_mask(self, run: Pass, owner: str) -> Tensor:
        """Which rows are routed, bool ``[B, n]``; not [BOI], so that it stays bit-identical whatever a picture's noise is."""
        rows = run.rows[owner]
        routed_mask = rows.after_media if self.config.frozen_expert else rows.order >= 0
        return routed_mask if owner == "text" else routed_mask & ~run.media_rows[owner].boundary

    def _computed_layer(
        self, index: int, frozen: nn.Module, run: Pass, routed_class: type[Routed], probabilities: list[Tensor]
    ) -> Any:
        """The layer of this pass, for the rows that it computes (cached text is not computed)."""
        computed_owners = [owner for owner in run.states if owner != "text" or run.cached_text is None]
        if str(index) not in self.blocks or not computed_owners:
            return frozen
        return self._routed_layer(
            index,
            frozen,
            torch.cat([self._routed_mask(run, o) for o in computed_owners], dim=1),
            routed_class,
            probabilities,
        )

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """All rows through the layer; the router's probabilities are kept for its loss as ``router.`` plus the layer index."""
        probabilities: list[Tensor] = []
        block = self._computed_layer(index, frozen, run, Routed, probabilities)
        # The number of rows per expert depends on the data, so such a layer is not compiled.
        layer_pass = run if block is frozen else replace(run, compiled=False)
        states = run.states | self.tower(0, index, block, run.states, call, layer_pass)
        run.intermediates |= {f"router.{index}": probability for probability in probabilities}
        return states

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The whole layer, with every expert on every row."""
        probabilities: list[Tensor] = []
        states = self.whole(index, self._computed_layer(index, frozen, run, RoutedByAll, probabilities), call, run)
        run.intermediates |= {f"router.{index}": probability for probability in probabilities}
        return states

    def text_layer(self, index: int, frozen: nn.Module, x: Tensor, call: Call) -> Tensor:
        """A text-only layer: routed as in the paper, or with only the first expert."""
        if str(index) not in self.blocks:
            return frozen(x, **call)
        routed_mask = torch.full(x.shape[:2], not self.config.frozen_expert, device=x.device)
        return self._routed_layer(index, frozen, routed_mask, Routed, [])(x, **call)
