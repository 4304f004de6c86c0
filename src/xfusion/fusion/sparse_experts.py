"""Sparse experts instead of a layer's MLP (MoE-LLaVA, arXiv 2401.15947).

    p = softmax(W x)        y = sum over the k largest p_i of p_i / (their sum) MLP_i(x)        MLP_i = MLP at the start

Every position goes to its k experts. None is dropped and routing is deterministic, so a token's routing does not depend on
its batch (the paper's code has a capacity limit and noise on the second choice). Media pass through all frozen layers, as in
LLaVA.

The paper routes every token, also in text-only input, and trains all experts, so text is not preserved. With
``frozen_expert`` the first expert is the base's own MLP, only the others train, and routing starts at the first media token
of a sequence: before it, and in text-only input, text uses only the first expert.

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
            exact = x.to(torch.promote_types(x.dtype, torch.float32))
            probability = torch.softmax(nn.functional.linear(exact, self.router.weight.to(exact.dtype)), dim=-1)
        best = probability.topk(self.active, dim=-1)
        taken = torch.zeros_like(probability).scatter(-1, best.indices, best.values)
        return probability, taken / best.values.sum(-1, keepdim=True)


class Routed(Delta):
    """An MLP, replaced by the experts for routed rows; created for one pass.

    Args:
        experts: the layer's experts.
        acts: which rows are routed, bool ``[B, n]``.
        seen: a list to which the router's probabilities ``[r, E]`` are appended.
    """

    def __init__(self, experts: Experts, acts: Tensor, seen: list[Tensor]):
        super().__init__()
        self.experts, self.acts, self.seen = experts, acts, seen

    def forward(self, frozen: nn.Module, x: Tensor) -> Tensor:  # type: ignore[override]
        """``[B, n, D]`` -> ``[B, n, D]``; each expert computes its own rows."""
        if x.is_meta:
            return self.evenly(frozen, x)
        rows = x[self.acts]
        probability, weight = self.experts.weights(rows)
        self.seen.append(probability)
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts.all(frozen)):
            mine = weight[:, i].nonzero()[:, 0]
            made = expert(rows[mine].to(next(expert.parameters()).dtype))
            out = out.index_add(0, mine, (weight[mine, i, None] * made).to(out.dtype))
        whole = torch.zeros_like(x) if bool(self.acts.all()) else frozen(x)
        return whole.masked_scatter(self.acts[..., None], out.to(whole.dtype))

    def evenly(self, frozen: nn.Module, x: Tensor) -> Tensor:
        """The same on meta tensors, to count costs: all rows are routed, with an equal share for each expert."""
        rows = x.flatten(0, 1)
        probability, weight = self.experts.weights(rows)
        self.seen.append(probability)
        every = self.experts.all(frozen)
        share = len(rows) * self.experts.active // len(every)
        made = [expert(rows[:share]).sum(0) * weight[:, i, None] for i, expert in enumerate(every)]
        return (rows + torch.stack(made).sum(0)).unflatten(0, x.shape[:2])


class RoutedByAll(Routed):
    """The paper's sum, every expert on every row: the reference path."""

    def forward(self, frozen: nn.Module, x: Tensor) -> Tensor:  # type: ignore[override]
        """``[B, n, D]`` -> ``[B, n, D]``."""
        probability, weight = self.experts.weights(x)
        self.seen.append(probability[self.acts])
        made = torch.stack([expert(x) for expert in self.experts.all(frozen)], dim=-1)
        return torch.where(self.acts[..., None], (made * weight[..., None, :]).sum(-1).to(x.dtype), frozen(x))


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
            XFusionError: the layer has no single MLP.
        """
        count = self.config.experts - self.config.frozen_expert
        path = mlp_path(backbone.layers[index])
        copies = [backbone.copy_layer(index, self.block_config).get_submodule(path) for _ in range(count)]
        return Experts(self.config, backbone.hidden_size, copies).to(backbone.device)

    def _routed(self, index: int, frozen: nn.Module, acts: Tensor, kind: type[Routed], seen: list[Tensor]) -> Any:
        experts: Any = self.blocks[str(index)]
        return assembled(frozen, {mlp_path(frozen): kind(experts, acts, seen)})

    def _acts(self, run: Pass, owner: str) -> Tensor:
        """Which rows are routed, bool ``[B, n]``; not [BOI], so that it stays bit-identical whatever a picture's noise is."""
        rows = run.rows[owner]
        acts = rows.after_media if self.config.frozen_expert else rows.order >= 0
        return acts if owner == "text" else acts & ~run.media_rows[owner].boundary

    def _computed(self, index: int, frozen: nn.Module, run: Pass, kind: type[Routed], seen: list[Tensor]) -> Any:
        """The layer of this pass, for the rows that it computes (given text is not computed)."""
        computed = [owner for owner in run.states if owner != "text" or run.given is None]
        if str(index) not in self.blocks or not computed:
            return frozen
        return self._routed(index, frozen, torch.cat([self._acts(run, o) for o in computed], dim=1), kind, seen)

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """All rows through the layer; the router's probabilities are kept for its loss as ``router.`` plus the layer index."""
        seen: list[Tensor] = []
        block = self._computed(index, frozen, run, Routed, seen)
        # The number of rows per expert depends on the data, so such a layer is not compiled.
        work = run if block is frozen else replace(run, compiled=False)
        states = run.states | self.tower(0, index, block, run.states, call, work)
        run.kept |= {f"router.{index}": probability for probability in seen}
        return states

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The whole layer, with every expert on every row."""
        seen: list[Tensor] = []
        states = self.whole(index, self._computed(index, frozen, run, RoutedByAll, seen), call, run)
        run.kept |= {f"router.{index}": probability for probability in seen}
        return states

    def text_layer(self, index: int, frozen: nn.Module, x: Tensor, call: Call) -> Tensor:
        """A text-only layer: routed as in the paper, or with only the first expert."""
        if str(index) not in self.blocks:
            return frozen(x, **call)
        acts = torch.full(x.shape[:2], not self.config.frozen_expert, device=x.device)
        return self._routed(index, frozen, acts, Routed, [])(x, **call)
