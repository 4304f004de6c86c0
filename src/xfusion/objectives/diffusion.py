"""Denoising diffusion (DDPM) beside flow matching: corrupt, loss and sample, on diffusers' noise schedule.

    x_k = sqrt(abar_k) x_0 + sqrt(1 - abar_k) eps        k = 0 ... 999

(Ho et al. 2020, arXiv 2006.11239, equation 4); loss on ``eps`` (equation 14), weighted by min-SNR (Hang et al. 2023,
arXiv 2303.09556) if asked; sampling by DDIM (Song et al. 2020, arXiv 2010.02502, equation 12, eta = 0), so
that an item's noise decides what is drawn. diffusers' own DDIM stops short of the clean picture where the steps do not divide
the levels, so its equation stands here. The port is told ``t = (k + 1) / 1000``: 0 is clean, 1 is noise, as everywhere.

Shape legend: ``B`` batch row, ``n`` media rows, ``P`` token width, ``N`` media items, ``M`` tokens of an item.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from xfusion.data.sequence import Batch, XFusionError
from xfusion.objectives.base import Denoising
from xfusion.objectives.solvers import Solver

LEVELS = 1000
"""Noise levels of a schedule."""
LEAST_BOUND = 3.0
"""Least value that latents of about unit variance may be clipped to: beyond it lie 0.3 % of a normal's numbers, beyond 1 a
third."""
LEAST_SIGNAL = 1e-3
"""Share of the clean picture at the first level below which an estimate by its noise is nothing but rounding."""
_SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear"}


class Diffusion(Denoising):
    """Squared error of the prediction at noised items, one mean per item."""

    name = "diffusion"

    @dataclass(frozen=True, kw_only=True)
    class Config(Denoising.Config):
        """What the media head predicts, and the noise schedule."""

        prediction: Literal["noise", "clean", "velocity"] = "noise"
        """What the head's output means; velocity is ``sqrt(abar) eps - sqrt(1 - abar) x_0`` (Salimans and Ho 2022,
        arXiv 2202.00512)."""
        schedule: Literal["cosine", "linear"] = "cosine"
        """How the noise grows: by a cosine (Nichol and Dhariwal 2021, arXiv 2102.09672, equation 17), or betas from 1e-4
        to 0.02."""
        weighting: Literal["none", "min_snr"] = "none"
        """Weigh all noise levels alike, or by the signal-to-noise ratio up to `largest_snr`."""
        largest_snr: float = 5.0
        """gamma of min-SNR."""
        largest_value: float | None = 1.0
        """Clean estimates are clipped to this while sampling; None clips nothing. Pixels lie within 1; latents of about unit
        variance take None, or at least 3. With ``prediction="noise"`` and the cosine schedule there must be one: the first
        estimate is divided by ``sqrt(abar)`` of 5e-5."""
        threshold: float | None = None
        """Dynamic thresholding (Imagen, arXiv 2205.11487, section 2.3): the percentile of a picture's values, such as 0.995;
        where it lies above `largest_value`, its estimate is clipped to it and scaled back. None clips at `largest_value`."""
        guidance: float = 3.0
        """Strength of classifier-free guidance where the caller names none; 1 is off."""

        def build(self) -> Diffusion:
            """The objective."""
            return Diffusion(self)

        def adapted(self, trained: Any) -> Diffusion.Config:
            """Weights of the loss are a run's own choice; what the head's output and a level mean is the weights'."""
            if not isinstance(trained, Diffusion.Config):
                return self
            return replace(self, prediction=trained.prediction, schedule=trained.schedule)

    def __init__(self, config: Config):
        if not config.largest_snr > 0:
            raise XFusionError(f"largest_snr {config.largest_snr:g} must be above 0; 5 is usual")
        if config.threshold is not None and not (0 < config.threshold <= 1 and config.largest_value):
            raise XFusionError(
                f"threshold {config.threshold:g} with largest_value {config.largest_value}: a percentile within (0, 1], such"
                " as 0.995, of values that have a largest"
            )
        super().__init__()
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        self.config = config
        self.weight, self.guidance = config.weight, config.guidance
        schedule: Any = _SCHEDULES[config.schedule]
        self.scheduler: Any = DDPMScheduler(num_train_timesteps=LEVELS, beta_schedule=schedule)

    def check(self, modality: Any) -> None:
        """Refuse a largest value that would cut off what the modality's latents hold, and none where the walk cannot begin.

        Raises:
            XFusionError: it does.
        """
        largest, first = self.config.largest_value, self.shares(LEVELS - 1)[0]
        if largest is not None and largest < LEAST_BOUND and not modality.codec.bounded:
            raise XFusionError(
                f"largest_value {largest:g} cuts off what latents of {type(modality.codec).__name__} hold, which have no largest"
                f" value: set it to None, or to {LEAST_BOUND:g} or more"
            )
        if largest is None and self.config.prediction == "noise" and first < LEAST_SIGNAL:
            raise XFusionError(
                f"prediction 'noise' with largest_value None: the first estimate is divided by sqrt(abar) = {first:.1g} of the"
                f" schedule '{self.config.schedule}'; predict 'velocity' or 'clean', or set a largest value"
            )

    # -- corrupt

    def draw_level(self, largest: Tensor, generator: torch.Generator) -> Tensor:
        """Levels k, int64 ``[N]``: even among those with ``t <= largest``, the first one at least."""
        count = (largest.cpu() * LEVELS).floor().clamp(min=1)
        # Drawn on the CPU, so that a seed means the same on every device.
        return (torch.rand(len(largest), generator=generator) * count).long().to(largest.device)

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Noise the items whose state is ``noised``; the clean tokens and the target stay beside them."""
        for modality, media in batch.media.items():
            if not bool(media.noised.any()):
                continue
            level = self.draw_level(media.largest_noise, generator)
            noise = torch.randn(media.tokens.shape, generator=generator).to(media.tokens.device)
            rows = level[media.item.clamp(min=0)].flatten()
            clean, flat = media.tokens.flatten(0, 1), noise.flatten(0, 1)
            found = self.scheduler.add_noise(clean, flat, rows).view_as(noise)
            target = {"noise": noise, "clean": media.tokens}.get(self.config.prediction)
            if target is None:
                target = self.scheduler.get_velocity(clean, flat, rows).view_as(noise)
            noised = media.at(media.noised)[..., None]
            batch = batch.with_media(
                modality,
                tokens=torch.where(noised, found, media.tokens),
                time=torch.where(media.noised, (level + 1) / LEVELS, 0.0),
                clean=media.tokens,
                target=target,
            )
        return batch

    # -- loss

    def weigh(self, time: Tensor) -> Tensor:
        """Factors ``[N]`` of the items' errors at noise levels ``[N]``."""
        if self.config.weighting == "none":
            return torch.ones_like(time)
        level = (time * LEVELS).round().long().clamp(min=1) - 1
        signal = self.scheduler.alphas_cumprod.to(time.device)[level]
        snr = signal / (1 - signal)
        scale = {"noise": snr, "clean": torch.ones_like(snr), "velocity": snr + 1}[self.config.prediction]
        return snr.clamp(max=self.config.largest_snr) / scale

    # -- sample

    def shares(self, level: int) -> tuple[float, float]:
        """``sqrt(abar)`` and ``sqrt(1 - abar)`` of a level; -1 is clean."""
        kept = 1.0 if level < 0 else float(self.scheduler.alphas_cumprod[level])
        return math.sqrt(kept), math.sqrt(1 - kept)

    def clean(self, prediction: Tensor, x: Tensor, level: int) -> Tensor:
        """The clean estimate from what the head predicts at ``x_k``."""
        signal, share = self.shares(level)
        if self.config.prediction == "clean":
            return prediction
        if self.config.prediction == "velocity":
            return signal * x - share * prediction
        return (x - share * prediction) / signal

    def bounded(self, clean: Tensor) -> Tensor:
        """Clean estimates ``[N, M, P]`` within `largest_value`, each picture by its own percentile if asked."""
        largest = self.config.largest_value
        if largest is None:
            return clean
        if self.config.threshold is None:
            return clean.clamp(-largest, largest)
        bound = clean.abs().flatten(1).quantile(self.config.threshold, dim=1).clamp(min=largest)[:, None, None]
        return clean.clamp(-bound, bound) * (largest / bound)

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
        """Walk from noise to clean by DDIM steps.

        Args:
            predict: head output at ``(x_t [N, M, P], t)``, guidance included.
            noise: ``x_1 [N, M, P]``.
            steps: number of steps, 1 to 1000.
            known: clean tokens ``[N, M, P]`` of which some are kept (inpainting).
            keep: bool ``[N, M]``, True where ``known`` stands; these are put back at each noise level.
            solver: must be None.

        Yields:
            after every step ``x_t`` and the current clean estimate; the last ``x_t`` is the sample.
        """
        if solver is not None:
            raise XFusionError(f"diffusion is sampled by DDIM, not by {type(solver).__name__.lower()}: name no solver")
        if not 1 <= steps <= LEVELS:
            raise XFusionError(f"steps {steps} are not within 1 and the {LEVELS} levels of the schedule")
        # Trailing levels: the first one holds nothing but noise (Lin et al. 2023, arXiv 2305.08891, section 3.3).
        levels = [*(round(LEVELS * (1 - step / steps)) - 1 for step in range(steps)), -1]
        x = noise
        for level, following in pairwise(levels):
            clean = self.clean(predict(x, (level + 1) / LEVELS), x, level)
            clean = self.bounded(clean)
            signal, share = self.shares(level)
            # Where the estimate is clipped its noise is told anew: the two shall agree.
            eps = (x - signal * clean) / share
            signal, share = self.shares(following)
            x = signal * clean + share * eps
            if known is not None and keep is not None:
                x = torch.where(keep[..., None], signal * known + share * noise, x)
            yield x, clean
