"""Data-parallel training by several processes under torchrun; with one process all of this is a no-op.

Every process lays out the whole batch of a step, reads the pictures of its own rows and draws the noise of all rows, so a row
does not depend on which process computes it. Losses are divided by the counts of the whole step, which every process knows
without communication, and gradients are summed. So 1, 2 and 4 processes follow the same curve up to the order of float
sums. All have the same weights, optimizer and average. The first process writes log, previews, states and pack, and a state
loads on any number of processes.

No process waits for a particular picture or loss: one whose rows have none adds zeros to the same sums.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xfusion.data.sequence import XFusionError, first_line

T = TypeVar("T")
Shard = Literal["none", "new", "all"]
"""What the processes shard (`xfusion.training.sharding`)."""
BUCKET_BYTES = 64 * 1024 * 1024
"""Size of an all-reduce bucket, which is also the extra memory that it needs."""
PREPARATION = timedelta(hours=6)
"""Timeout for the other processes before the first step, which may be building an index; one that dies is noticed at once."""
ROLL_CALL = timedelta(seconds=30)
"""Timeout for the answers when a process is missing: the others may notice it some seconds later."""

LOST_PROCESS = re.compile(
    r"onnection (closed|reset|refused)|[Bb]roken pipe|[Tt]imed out|remote process (exited|has)", re.ASCII
)
"""Error messages of gloo and nccl for a process that is gone."""


class Processes:
    """The processes of a run.

    Args:
        device: the run's device; plain ``cuda`` is the GPU of this process's local rank.

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
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo", timeout=PREPARATION)
        self.roll_call: Any = dist.new_group(backend="gloo")
        """A group of all processes that is used only when the other one has failed, which no call of it survives."""
        self._set_timeout(PREPARATION)

    def wait_at_most(self, minutes: float) -> None:
        """Wait at most so long for the other processes from now on; at the beginning it is `PREPARATION`."""
        if self.count > 1:
            self._set_timeout(timedelta(minutes=minutes))

    def _set_timeout(self, timeout: timedelta) -> None:
        self.patience = timeout
        group: Any = dist.group.WORLD
        group.set_timeout(timeout)

    def close(self) -> None:
        """Release what this object made beside the process group, which stays for a next run."""
        if self.count > 1:
            dist.destroy_process_group(self.roll_call)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes all files."""
        return self.rank == 0

    def row_slice(self, rows: int) -> slice | None:
        """Rows of a batch that this process computes, possibly none; None if it computes all."""
        if self.count == 1:
            return None
        return slice(rows * self.rank // self.count, rows * (self.rank + 1) // self.count)

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """Run the block in one process after the other, so that what it needs temporarily is needed only once.

        Raises:
            XFusionError: it failed in another process, which reports why.
        """
        for _ in range(self.rank):
            self._raise_gathered(self.gather(None))
        with self._reporting(self.gather):
            yield
        for _ in range(self.rank + 1, self.count):
            self._raise_gathered(self.gather(None))

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Run the block in the first process before the others, which then find what it built.

        Raises:
            XFusionError: it failed in the first process, which reports why.
        """
        if self.is_first:
            with self._reporting(self.broadcast):
                yield
        else:
            self._raise_gathered([self.broadcast(None)])
            yield

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Fail in all processes if the block, which must not communicate, fails in one.

        Raises:
            XFusionError: it failed here, or in another process, which reports why.
        """
        failure: XFusionError | None = None
        try:
            yield
        except XFusionError as error:
            failure = error
        messages = self.gather(None if failure is None else str(failure))
        if failure is not None and all(message is None for message in messages[: self.rank]):
            raise failure
        self._raise_gathered(messages)

    @staticmethod
    @contextmanager
    def _reporting(send: Callable[[str | None], Any]) -> Iterator[None]:
        """Tell the waiting processes after the block how it failed, or that it succeeded."""
        message: str | None = "it was stopped"
        try:
            yield
            message = None
        except Exception as error:
            message = str(error)
            raise
        finally:
            send(message)

    @staticmethod
    def _raise_gathered(messages: Iterable[str | None]) -> None:
        for message in messages:
            if message is not None:
                error = XFusionError(message)
                error.reported_elsewhere = True
                raise error

    @contextmanager
    def naming_lost_process(self, position: Callable[[], tuple[int, int | None]]) -> Iterator[None]:
        """Turn the loss of another process inside the block into one clear error.

        Args:
            position: gives the current step, and that of the newest state or None.

        Raises:
            XFusionError: another process is gone, or was waited for in vain.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not LOST_PROCESS.search(str(error)):
                raise
            step, saved_step = position()
            absent = ", ".join(map(str, self._call_roll()))
            raise XFusionError(
                f"process {self.rank} of {self.count} lost {f'process {absent}' if absent else 'another'} at step {step}, which"
                f" died, was killed or did not go on for {self.patience.total_seconds() / 60:g} minutes ({first_line(error)}):"
                f" start the same command again{'' if saved_step is None else ' with --resume'}"
            ) from error

    def _call_roll(self) -> list[int]:
        """Ranks of the processes that do not answer; those that are alive call the roll at the same time."""
        others = [rank for rank in range(self.count) if rank != self.rank]
        # gloo closes all connections of a group in which a wait runs out: so the others notice now, too
        for rank in others:
            with suppress(RuntimeError):
                cast("dist.Work", dist.irecv(torch.zeros(1), rank)).wait(timedelta(milliseconds=1))
        calls: dict[int, list[Any]] = {}
        for rank in others:
            with suppress(RuntimeError):  # one that died refuses
                calls[rank] = [call(torch.zeros(1), rank, group=self.roll_call) for call in (dist.isend, dist.irecv)]
        absent = []
        for rank in others:
            try:
                for call in calls[rank]:
                    call.wait(ROLL_CALL)
            except (KeyError, RuntimeError):
                absent.append(rank)
        return absent

    def broadcast(self, value: T) -> T:
        """Broadcast the first process's value."""
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

    def largest(self, *values: int) -> list[int]:
        """The maximum of each value over all processes."""
        if self.count == 1:
            return [*values]
        maxima = torch.tensor(values)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        return maxima.tolist()

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def broadcast_weights(self, parameters: Sequence[Tensor]) -> None:
        """Broadcast the first process's weights."""
        if self.count > 1:
            for parameter in parameters:
                dist.broadcast(parameter.detach(), src=0)

    def reduce_gradients(self, losses: dict[str, float], parameters: Sequence[nn.Parameter]) -> dict[str, float]:
        """Sum gradients in place, and losses; names and parameters must be the same everywhere.

        A parameter with a gradient in any process then has one in all; a parameter without any stays without, as in a single
        process.
        """
        if self.count == 1:
            return losses
        sums = torch.tensor([*losses.values(), *(p.grad is not None for p in parameters)], dtype=torch.float64)
        dist.all_reduce(sums)
        with_gradient = [p for p, count in zip(parameters, sums[len(losses) :].tolist(), strict=True) if count]
        for bucket in _buckets(with_gradient):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            for parameter, total in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = total.view_as(parameter).clone()
        return dict(zip(losses, sums[: len(losses)].tolist(), strict=True))

    def memory(self, parts: dict[str, int]) -> list[str]:
        """A table of memory by process: the parts, their sum, current use and peak use.

        On a CPU, "held now" counts anonymous pages only (on Linux); "peak so far" includes mapped files, which the processes
        of a machine share.
        """
        current: int | None = None
        if self.device.type == "cuda":
            current, peak = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        else:
            # Kilobytes on Linux, bytes on macOS.
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            current = anonymous_bytes()
        usage = {"peak so far": peak} if current is None else {"held now": current, "peak so far": peak}
        rows = self.gather({**parts, "sum": sum(parts.values()), **usage})
        names = list(rows[0])
        table = ["process  " + "  ".join(f"{name:>{max(9, len(name))}}" for name in names)]
        for rank, row in enumerate(rows):
            cells = (f"{row[name] / 1e6:>{max(9, len(name)) - 3}.1f} MB" for name in names)
            table.append(f"{rank:<7}  " + "  ".join(cells))
        return table


def anonymous_bytes() -> int | None:
    """Bytes of this process's anonymous pages; None if the system does not report them."""
    if not (status := Path("/proc/self/status")).is_file():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024 if "RssAnon" in lines else None


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors in this process; of a sharded tensor only its shard."""
    return sum(shard.numel() * shard.element_size() for shard in map(row_slice, tensors))


def row_slice(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; the tensor itself if it is not sharded."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[operator]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, without that import, which takes seconds."""
    return hasattr(tensor, "to_local")


def sharded_like(shard: Tensor, reference: Tensor) -> Tensor:
    """A shard as a `DTensor` that is sharded like ``reference``; unchanged if that is not sharded."""
    if not is_sharded(reference):
        return shard
    from torch.distributed.tensor import DTensor

    assert isinstance(reference, DTensor)
    return DTensor.from_local(
        shard,
        reference.device_mesh,
        reference.placements,
        run_check=False,
        shape=reference.shape,
        stride=reference.stride(),
    )


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of one dtype, up to `BUCKET_BYTES` at a time."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        parameter_bytes = parameter.numel() * parameter.element_size()
        if bucket and (size + parameter_bytes > BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter_bytes
    if bucket:
        yield bucket
