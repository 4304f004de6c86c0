"""Flow matching (rectified flow) with logit-normal time: corrupt, loss and sample.

Convention everywhere: t = 0 is clean, t = 1 is noise; ``x_t = (1 - t) x_0 + t eps``, velocity ``v = dx/dt = eps - x_0``
(Esser et al. 2024, arXiv 2403.03206, equations 13 and 19). X-Fusion (arXiv 2504.20996) trains with this scheduler.

Shape legend: ``B`` batch row, ``n`` media rows, ``P`` token width, ``N`` media items, ``M`` tokens of an item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from xfusion.data.sequence import Batch, XFusionError
from xfusion.objectives.base import Denoising
from xfusion.objectives.solvers import Euler, Solver

SMALLEST_TIME = 1e-3
"""Lower bound of the divisors t and 1 - t."""

MAX_STEPS = 10_000
"""Largest number of sampling steps; beyond some dozens a picture hardly changes (docs/speed.md)."""


class FlowMatching(Denoising):
    """L_DM: squared error of the prediction at noised items, one mean per item."""

    name = "flow_matching"

    @dataclass(frozen=True, kw_only=True)
    class Config(Denoising.Config):
        """What the media head predicts and how noise levels are sampled."""

        weight: float = 1.0
        """lambda_DM of X-Fusion."""
        prediction: Literal["velocity", "noise", "clean"] = "clean"
        """Meaning of the head's output. Clean-picture prediction draws best with wide tokens (8 x 8 pixels). The velocity of
        predicted noise is its difference to the tokens over 1 - t, so sampling magnifies its errors at the noisiest levels."""
        time_mean: float = 0.0
        """Mean of the normal whose sigmoid is the noise level."""
        time_std: float = 1.0
        """Standard deviation of that normal."""
        largest_weight: float = 100.0
        """Upper bound of the weight t^-2 of clean prediction, which makes its error a velocity error."""

        sampling_shift: float = 1.0
        """Sampling takes equal steps in s and visits t = shift s / (1 + (shift - 1) s): above 1 it spends more steps at noisy
        levels (Esser et al. 2024, equation 23). A model trained with a `time_mean` above 0 has seen few clean levels."""

        solver: Solver = Euler()
        """Default solver for sampling."""

        guidance: float = 3.0
        """Default classifier-free guidance scale; 1 is off."""

        guidance_interval: tuple[float, float] = (0.0, 1.0)
        """Guidance applies at noise levels above the first value and up to the second (Kynkäänniemi et al. 2024,
        arXiv 2404.07724). The prompt decides the content at high levels. At low levels guidance only adds specks, and a step
        without it takes half the time."""

        def build(self) -> FlowMatching:
            """The objective."""
            return FlowMatching(self)

        def adapted(self, trained: Any) -> FlowMatching.Config:
            """The prediction type comes from the trained model; noise levels and loss weights are the run's own."""
            return replace(self, prediction=trained.prediction) if isinstance(trained, FlowMatching.Config) else self

    def __init__(self, config: Config):
        if not config.sampling_shift > 0:
            raise XFusionError(f"sampling_shift {config.sampling_shift:g} must be above 0; 1 takes equal steps of t")
        low, high = config.guidance_interval
        if not 0 <= low < high <= 1:
            raise XFusionError(f"guidance_interval {low:g} to {high:g} must rise within 0 to 1, such as 0.5 to 1")
        super().__init__()
        self.config = config
        self.weight, self.guidance = config.weight, config.guidance
        self.guidance_interval = config.guidance_interval

    # -- corrupt

    def draw_time(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise levels ``[count]`` in (0, 1): sigmoid of a normal."""
        normal = torch.randn(count, generator=generator)
        return torch.sigmoid(normal * self.config.time_std + self.config.time_mean)

    @staticmethod
    def mix(clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """``x_t`` for tensors that broadcast together."""
        return (1 - time) * clean + time * noise

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Noise the items whose state is ``noised``; the batch also keeps the clean tokens and the target."""
        for modality, media in batch.media.items():
            if not bool(media.noised.any()):
                continue
            # Sampled on the CPU, so that a seed gives the same result on every device.
            levels = self.draw_time(len(media.noised), generator).to(media.time.device) * media.largest_noise
            time = torch.where(media.noised, levels, torch.zeros_like(levels))
            noise = torch.randn(media.tokens.shape, generator=generator).to(media.tokens.device)
            level = media.at(time)[:, :, None]
            tokens = self.mix(media.tokens, noise, level)
            if self.config.prediction == "noise":
                target = noise
            elif self.config.prediction == "velocity":
                target = noise - media.tokens
            else:
                target = media.tokens
            batch = batch.with_media(modality, tokens=tokens, time=time, clean=media.tokens, target=target)
        return batch

    # -- loss

    def weigh(self, time: Tensor) -> Tensor:
        """For clean prediction ``t^-2`` up to `largest_weight`, which makes it a velocity error; otherwise 1."""
        if self.config.prediction != "clean":
            return torch.ones_like(time)
        return time.clamp(min=SMALLEST_TIME).pow(-2).clamp(max=self.config.largest_weight)

    # -- sample

    def shifted(self, time: float) -> float:
        """The noise level for ``time`` on the grid of equal steps (`sampling_shift`); 0 and 1 are unchanged."""
        shift = self.config.sampling_shift
        return shift * time / (1 + (shift - 1) * time)

    def velocity(self, prediction: Tensor, x: Tensor, time: float) -> Tensor:
        """``v`` from the head's prediction at ``x_t``."""
        if self.config.prediction == "velocity":
            return prediction
        if self.config.prediction == "noise":
            return (prediction - x) / max(1 - time, SMALLEST_TIME)
        return (x - prediction) / max(time, SMALLEST_TIME)

    def clean(self, prediction: Tensor, x: Tensor, time: float) -> Tensor:
        """The clean estimate from the head's prediction at ``x_t``."""
        return prediction if self.config.prediction == "clean" else x - time * self.velocity(prediction, x, time)

    def sample(
        self,
        predict: Callable[[Tensor, float], Tensor],
        noise: Tensor,
        *,
        steps: int,
        known: Tensor | None = None,
        keep: Tensor | None = None,
        solver: Solver | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Integrate from noise to clean, with steps spaced by `sampling_shift`.

        Args:
            predict: head output at ``(x_t [N, M, P], t)``, guidance included.
            noise: ``x_1 [N, M, P]``.
            steps: number of steps, 1 to `MAX_STEPS`.
            known: clean tokens ``[N, M, P]``, used where ``keep`` is True (inpainting).
            keep: bool ``[N, M]``, True where ``known`` is kept; these tokens are put back at each noise level.
            solver: the solver; None uses the configuration's.

        Yields:
            after every step ``x_t`` and the current clean estimate; the last ``x_t`` is the sample.
        """
        if not 1 <= steps <= MAX_STEPS:
            raise XFusionError(f"steps {steps} are not within 1 and {MAX_STEPS}")

        def field(x: Tensor, time: float) -> tuple[Tensor, Tensor]:
            prediction = predict(x, time)
            return self.velocity(prediction, x, time), self.clean(prediction, x, time)

        def put_back(x: Tensor, time: float) -> Tensor:
            if known is None or keep is None:
                return x
            return torch.where(keep[..., None], self.mix(known, noise, torch.tensor(time, device=x.device)), x)

        times = [self.shifted(1 - step / steps) for step in range(steps + 1)]
        yield from (solver or self.config.solver).walk(field, noise, times, put_back)
