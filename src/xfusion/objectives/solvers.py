"""Solvers that integrate a flow from noise to clean: the objective sets the noise levels, the solver steps between them.

Shape legend: ``N`` media items, ``M`` tokens of an item, ``P`` token width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from xfusion.data.sequence import XFusionError

Field = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""Velocity and clean estimate at ``(x_t [N, M, P], t)``; each call is one forward pass of the model."""


@dataclass(frozen=True, kw_only=True)
class Solver:
    """Integrates ``dx/dt = v``."""

    def walk(
        self, field: Field, x: Tensor, times: Seq[float], put_back: Callable[[Tensor, float], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Integrate from the first level to the last.

        Args:
            field: velocity and clean estimate.
            x: tokens ``[N, M, P]`` at the first level.
            times: decreasing noise levels, 1 to 0.
            put_back: restores known tokens, given tokens and their level.

        Yields:
            after every step the tokens and the clean estimate.
        """
        raise NotImplementedError(type(self).__name__)


@dataclass(frozen=True, kw_only=True)
class Euler(Solver):
    """First order; one forward pass per step."""

    def walk(
        self, field: Field, x: Tensor, times: Seq[float], put_back: Callable[[Tensor, float], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """``x + dt v``."""
        for time, next_time in pairwise(times):
            velocity, clean = field(x, time)
            x = put_back(x + (next_time - time) * velocity, next_time)
            yield x, clean


@dataclass(frozen=True, kw_only=True)
class Heun(Solver):
    """Second order (Karras et al. 2022, arXiv 2206.00364, algorithm 1); two forward passes per step, one for the last."""

    def walk(
        self, field: Field, x: Tensor, times: Seq[float], put_back: Callable[[Tensor, float], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """``x + dt (v + v') / 2``, where v' is the velocity after Euler's step; a step to level 0 has none."""
        for time, next_time in pairwise(times):
            velocity, clean = field(x, time)
            next_x = put_back(x + (next_time - time) * velocity, next_time)
            if next_time > 0:
                next_velocity, clean = field(next_x, next_time)
                next_x = put_back(x + (next_time - time) * (velocity + next_velocity) / 2, next_time)
            x = next_x
            yield x, clean


@dataclass(frozen=True, kw_only=True)
class Multistep(Solver):
    """DPM-Solver++ of diffusers (Lu et al. 2022, arXiv 2211.01095): uses earlier clean estimates; one pass per step."""

    order: int = 2
    """Number of clean estimates used per step, including its own: 1 to 3."""

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise XFusionError(f"a multistep solver of order {self.order}: DPM-Solver++ has the orders 1, 2 and 3")

    def walk(
        self, field: Field, x: Tensor, times: Seq[float], put_back: Callable[[Tensor, float], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """diffusers' steps between the levels in ``times``."""
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        scheduler = DPMSolverMultistepScheduler(
            solver_order=self.order, prediction_type="sample", use_flow_sigmas=True, final_sigmas_type="zero"
        )
        scheduler.set_timesteps(len(times) - 1)
        # Its own levels are evenly spaced; its steps use only these sigmas.
        scheduler.sigmas = torch.tensor(times)
        scheduler.set_begin_index(0)
        for level, (time, next_time) in zip(scheduler.timesteps, pairwise(times), strict=True):
            clean = field(x, time)[1]
            x = put_back(scheduler.step(clean, level, x, return_dict=False)[0], next_time)
            yield x, clean


def names() -> list[str]:
    """Names of the solvers."""
    return [kind.__name__.lower() for kind in Solver.__subclasses__()]


def find(name: str) -> Solver:
    """The solver with this name.

    Raises:
        XFusionError: there is none.
    """
    for kind in Solver.__subclasses__():
        if kind.__name__.lower() == name:
            return kind()
    raise XFusionError(f"solver {name!r} is not one of {', '.join(names())}")
