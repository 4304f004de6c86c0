"""Random numbers from a seed, without changing the state of the generators afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside the ``with`` block torch's CPU generator, and that of a GPU (CUDA or Apple's), start at a seed; afterwards they go
    on where they were.

    `torch.manual_seed` would seed every device, and `torch.random.fork_rng` restores only the devices that it is given.

    Args:
        seed: seed of the generators.
        device: device whose generator is seeded besides the CPU's; the generators of all other devices are not touched.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        # `fork_rng` knows no generator without an index.
        before = torch.mps.get_rng_state() if device.type == "mps" else None
        try:
            if before is not None:
                torch.mps.manual_seed(seed)
            yield
        finally:
            if before is not None:
                torch.mps.set_rng_state(before)
