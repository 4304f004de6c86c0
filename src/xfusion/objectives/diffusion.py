"""Denoising diffusion (DDPM), an alternative to flow matching: corrupt, loss and sample, on diffusers' noise schedule.

    x_k = sqrt(abar_k) x_0 + sqrt(1 - abar_k) eps        k = 0 ... 999

(Ho et al. 2020, arXiv 2006.11239, equation 4); loss on ``eps`` (equation 14), weighted by min-SNR (Hang et al. 2023,
arXiv 2303.09556) if configured; sampling by DDIM (Song et al. 2020, arXiv 2010.02502, equation 12, eta = 0), so that
an item's noise determines the result. DDIM is implemented here because diffusers' own stops short of the clean picture if the
steps do not divide the levels. The port receives ``t = (k + 1) / 1000``: 0 is clean, 1 is noise, as everywhere.

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
"""Smallest allowed clipping bound for latents of about unit variance: 0.3 % of a normal distribution lies beyond it, a third
beyond 1."""
LEAST_SIGNAL = 1e-3
"""Smallest ``sqrt(abar)`` at the first level; below it, a clean estimate from predicted noise is only rounding error."""
_SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear"}


class Diffusion(Denoising):
    """Squared error of the prediction at noised items, one mean per item."""

    name = "diffusion"

    @dataclass(frozen=True, kw_only=True)
    class Config(Denoising.Config):
        """What the media head predicts, and the noise schedule."""

        prediction: Literal["noise", "clean", "velocity"] = "noise"
        """Meaning of the head's output; velocity is ``sqrt(abar) eps - sqrt(1 - abar) x_0`` (Salimans and Ho 2022,
        arXiv 2202.00512)."""
        schedule: Literal["cosine", "linear"] = "cosine"
        """Noise schedule: cosine (Nichol and Dhariwal 2021, arXiv 2102.09672, equation 17), or linear betas from 1e-4
        to 0.02."""
        weighting: Literal["none", "min_snr"] = "none"
        """Weight all noise levels equally, or by the signal-to-noise ratio up to `largest_snr`."""
        largest_snr: float = 5.0
        """gamma of min-SNR."""
        largest_value: float | None = 1.0
        """Clip clean estimates to this while sampling; None does not clip. Pixels lie within 1; for latents of about unit
        variance use None, or at least 3. ``prediction="noise"`` with the cosine schedule requires a value, because the first
        estimate is divided by ``sqrt(abar)`` of 5e-5."""
        threshold: float | None = None
        """Dynamic thresholding (Imagen, arXiv 2205.11487, section 2.3): a percentile of a picture's values, such as 0.995. If
        it exceeds `largest_value`, the estimate is clipped to it and scaled back. None clips at `largest_value`."""
        guidance: float = 3.0
        """Default classifier-free guidance scale; 1 is off."""

        def build(self) -> Diffusion:
            """The objective."""
            return Diffusion(self)

        def adapted(self, trained: Any) -> Diffusion.Config:
            """Prediction type and noise schedule come from the trained model; the other settings are the run's own."""
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
        """Refuse a `largest_value` that would clip the modality's latents, and None where sampling cannot start without one.

        Raises:
            XFusionError: it is one of these.
        """
        largest, signal = self.config.largest_value, self.scales(LEVELS - 1)[0]
        if largest is not None and largest < LEAST_BOUND and not modality.codec.bounded:
            raise XFusionError(
                f"largest_value {largest:g} cuts off what latents of {type(modality.codec).__name__} hold, which have no largest"
                f" value: set it to None, or to {LEAST_BOUND:g} or more"
            )
        if largest is None and self.config.prediction == "noise" and signal < LEAST_SIGNAL:
            raise XFusionError(
                f"prediction 'noise' with largest_value None: the first estimate is divided by sqrt(abar) = {signal:.1g} of the"
                f" schedule '{self.config.schedule}'; predict 'velocity' or 'clean', or set a largest value"
            )

    # -- corrupt

    def draw_level(self, largest: Tensor, generator: torch.Generator) -> Tensor:
        """Levels k, int64 ``[N]``, uniform over those with ``t <= largest``, which always include the first."""
        count = (largest.cpu() * LEVELS).floor().clamp(min=1)
        # Sampled on the CPU, so that a seed gives the same result on every device.
        return (torch.rand(len(largest), generator=generator) * count).long().to(largest.device)

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Noise the items whose state is ``noised``; the batch also keeps the clean tokens and the target."""
        for modality, media in batch.media.items():
            if not bool(media.noised.any()):
                continue
            level = self.draw_level(media.largest_noise, generator)
            noise = torch.randn(media.tokens.shape, generator=generator).to(media.tokens.device)
            row_levels = level[media.item.clamp(min=0)].flatten()
            clean, flat_noise = media.tokens.flatten(0, 1), noise.flatten(0, 1)
            noisy = self.scheduler.add_noise(clean, flat_noise, row_levels).view_as(noise)
            target = {"noise": noise, "clean": media.tokens}.get(self.config.prediction)
            if target is None:
                target = self.scheduler.get_velocity(clean, flat_noise, row_levels).view_as(noise)
            noised = media.at(media.noised)[..., None]
            batch = batch.with_media(
                modality,
                tokens=torch.where(noised, noisy, media.tokens),
                time=torch.where(media.noised, (level + 1) / LEVELS, 0.0),
                clean=media.tokens,
                target=target,
            )
        return batch

    # -- loss

    def weigh(self, time: Tensor) -> Tensor:
        """Weights ``[N]`` of the items' errors at noise levels ``[N]``."""
        if self.config.weighting == "none":
            return torch.ones_like(time)
        level = (time * LEVELS).round().long().clamp(min=1) - 1
        signal = self.scheduler.alphas_cumprod.to(time.device)[level]
        snr = signal / (1 - signal)
        scale = {"noise": snr, "clean": torch.ones_like(snr), "velocity": snr + 1}[self.config.prediction]
        return snr.clamp(max=self.config.largest_snr) / scale

    # -- sample

    def scales(self, level: int) -> tuple[float, float]:
        """``sqrt(abar)`` and ``sqrt(1 - abar)`` of a level; -1 is clean."""
        alpha_bar = 1.0 if level < 0 else float(self.scheduler.alphas_cumprod[level])
        return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)

    def clean(self, prediction: Tensor, x: Tensor, level: int) -> Tensor:
        """The clean estimate from the head's prediction at ``x_k``."""
        signal, noise_scale = self.scales(level)
        if self.config.prediction == "clean":
            return prediction
        if self.config.prediction == "velocity":
            return signal * x - noise_scale * prediction
        return (x - noise_scale * prediction) / signal

    def bounded(self, clean: Tensor) -> Tensor:
        """Clean estimates ``[N, M, P]`` clipped to `largest_value`, or by each picture's own percentile (`threshold`)."""
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
        """Denoise by DDIM steps.

        Args:
            predict: head output at ``(x_t [N, M, P], t)``, guidance included.
            noise: ``x_1 [N, M, P]``.
            steps: number of steps, 1 to 1000.
            known: clean tokens ``[N, M, P]``, used where ``keep`` is True (inpainting).
            keep: bool ``[N, M]``, True where ``known`` is kept; these tokens are put back at each noise level.
            solver: must be None.

        Yields:
            after every step ``x_t`` and the current clean estimate; the last ``x_t`` is the sample.
        """
        if solver is not None:
            raise XFusionError(f"diffusion is sampled by DDIM, not by {type(solver).__name__.lower()}: name no solver")
        if not 1 <= steps <= LEVELS:
            raise XFusionError(f"steps {steps} are not within 1 and the {LEVELS} levels of the schedule")
        # Trailing levels: the first one is pure noise (Lin et al. 2023, arXiv 2305.08891, section 3.3).
        levels = [*(round(LEVELS * (1 - step / steps)) - 1 for step in range(steps)), -1]
        x = noise
        for level, next_level in pairwise(levels):
            clean = self.clean(predict(x, (level + 1) / LEVELS), x, level)
            clean = self.bounded(clean)
            signal, noise_scale = self.scales(level)
            # Recompute the noise from the possibly clipped estimate, so that both are consistent.
            eps = (x - signal * clean) / noise_scale
            signal, noise_scale = self.scales(next_level)
            x = signal * clean + noise_scale * eps
            if known is not None and keep is not None:
                x = torch.where(keep[..., None], signal * known + noise_scale * noise, x)
            yield x, clean
