"""Several processes that train one model together, under torchrun; alone, all of this does nothing.

Every process lays out the whole batch of a step, reads the pictures of its own rows, and draws the noise of all: what a
row is does not depend on who computes it. Losses are divided by the counts of the whole step, which each process knows
without asking, and gradients are added. So 1, 2 and 4 processes follow one curve but for the order of float sums. All keep
the same weights, optimiser and average; the first writes the log, previews, state and pack, and a state of any number of
processes loads on any other.

Nothing waits for a particular picture or loss: a process whose rows hold none adds zeros to the same sums.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xfusion.data.sequence import XFusionError

T = TypeVar("T")
BUCKET_BYTES = 64 * 1024 * 1024
"""Gradients that are added in one message: memory that the sum needs beside them."""
PATIENCE = timedelta(hours=6)
"""How long a process waits for the others, which may be building an index; one that dies is noticed at once."""


class Processes:
    """The processes of a run.

    Args:
        device: where the run computes; ``cuda`` alone is the GPU of this process's local rank.

    Raises:
        XFusionError: torchrun's settings are incomplete.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.count > 1 else 0
        self.device = torch.device(device)
        if self.count == 1:
            return
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise XFusionError(
                f"WORLD_SIZE is {self.count} but {' and '.join(missing)} is not set: start the processes by torchrun"
                " --nproc-per-node N -m xfusion.apps.cli train ..."
            )
        if self.device.type == "cuda":
            if self.device.index is None:
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo", timeout=PATIENCE)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, rows: int) -> slice | None:
        """Rows of a batch that this process computes; None where it computes all. Some may get none."""
        if self.count == 1:
            return None
        return slice(rows * self.rank // self.count, rows * (self.rank + 1) // self.count)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """A block that the first process goes through before the others: what it builds, they find."""
        if self.count > 1 and not self.first:
            dist.barrier()
        try:
            yield
        finally:
            if self.count > 1 and self.first:
                dist.barrier()

    def meet(self) -> None:
        """Wait until all are here."""
        if self.count > 1:
            dist.barrier()

    def same(self, value: T) -> T:
        """The first process's value."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def largest(self, value: int) -> int:
        """The largest value of all processes."""
        if self.count == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def same_weights(self, parameters: Sequence[Tensor]) -> None:
        """Put the first process's weights into all."""
        if self.count > 1:
            for parameter in parameters:
                dist.broadcast(parameter.detach(), src=0)

    def add(self, losses: dict[str, float], parameters: Sequence[nn.Parameter]) -> dict[str, float]:
        """Add up gradients in place, and losses; the same names and parameters everywhere.

        A parameter that got a gradient in any process has one in all behind it; one that got none anywhere stays without,
        as it would in a single process.
        """
        if self.count == 1:
            return losses
        facts = torch.tensor([*losses.values(), *(p.grad is not None for p in parameters)], dtype=torch.float64)
        dist.all_reduce(facts)
        known = [p for p, number in zip(parameters, facts[len(losses) :].tolist(), strict=True) if number]
        for bucket in _buckets(known):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            together = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(together)
            for parameter, total in zip(bucket, together.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = total.view_as(parameter).clone()
        return dict(zip(losses, facts[: len(losses)].tolist(), strict=True))

    def memory(self, parts: dict[str, int]) -> list[str]:
        """A table of bytes by process: parts that every process holds whole, and the most that it has held of all."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            # Kilobytes on Linux, bytes on macOS.
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        rows = self.gather({**parts, "peak so far": peak})
        names = list(rows[0])
        lines = ["process  " + "  ".join(f"{name:>{max(9, len(name))}}" for name in names)]
        for rank, row in enumerate(rows):
            cells = (f"{row[name] / 1e6:>{max(9, len(name)) - 3}.1f} MB" for name in names)
            lines.append(f"{rank:<7}  " + "  ".join(cells))
        return lines


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in their order, some of one type at a time."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        bytes_ = parameter.numel() * parameter.element_size()
        if bucket and (size + bytes_ > BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += bytes_
    if bucket:
        yield bucket
