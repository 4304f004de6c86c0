"""Random numbers from a seed, behind which all generators go on where they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """A block in which torch's own generator of the CPU starts at a seed, and so does that of a device where it has one.

    `torch.manual_seed` seeds all devices there are, and `torch.random.fork_rng` puts back those alone that it is told of.

    Args:
        seed: of both.
        device: where else numbers are drawn; the generators of all others are not touched.
    """
    second_device = torch.device(device)
    with torch.random.fork_rng(devices=[second_device] if second_device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if second_device.type == "cuda":
            with torch.cuda.device(second_device):
                torch.cuda.manual_seed(seed)
        yield
