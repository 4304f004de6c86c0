"""Reports of a run: one JSON line per step, TensorBoard if it is installed, a live progress bar, and a listener."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from xfusion.data.sequence import XFusionError
from xfusion.storage import named_in_errors, whole_file

Event = dict[str, Any]
"""``{"event": "start" | "plan" | "step" | "preview" | "end", ...}``."""
Listener = Callable[[Event], None]


class Track:
    """Writes events of one run into its folder.

    Args:
        folder: the run's folder; None writes nothing, for a process that another one writes for.
        console: where people read; None is silent.
        listener: called with every event.
        resume_at: steps of the log that stay; later lines belong to a run that was cut off.
        left_out: ids of the examples that a resumed run leaves out from its start.
    """

    def __init__(
        self,
        folder: Path | None,
        console: Console | None,
        listener: Listener | None,
        resume_at: int,
        left_out: Container[str] = (),
    ):
        self.console, self.listener = console, listener
        self.failure: XFusionError | None = None
        """First error of writing an event; the caller checks it and stops the run."""
        self.board: Any = None
        self.bar: Progress | None = None
        self.task: Any = None
        self.file: TextIO | None = None
        if folder is None:
            return
        self.path = folder / "log.jsonl"
        with named_in_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self.file = self._open(resume_at, left_out)
        try:
            from torch.utils.tensorboard import SummaryWriter

            with named_in_errors(folder / "tensorboard"):
                self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at or None)
        except ImportError:
            self.say("TensorBoard is not installed: curves go to log.jsonl only (pip install 'xfusion[train]')")

    def _open(self, resume_at: int, left_out: Container[str]) -> TextIO:
        """The log, without what a run that was cut off had told of steps that will be taken again."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if resume_at and self.path.exists() else []
        # Under another name first: a run that is killed here shall find the whole log when it goes on.
        with whole_file(self.path) as rewritten:
            kept = (line for line in lines if _stays(line, resume_at, left_out))
            rewritten.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        return self.path.open("a", encoding="utf-8", buffering=1)

    def to_disk(self) -> None:
        """The log's lines outlive a power cut from here on."""
        if self.file:
            with named_in_errors(self.path):
                os.fsync(self.file.fileno())

    def say(self, *lines: str) -> None:
        """Lines for people."""
        if self.console:
            for line in lines:
                self.console.print(line, highlight=False, markup=False)

    def event(self, **event: Any) -> None:
        """Write an event down, unless that has failed before, and pass it on."""
        if self.file and self.failure is None:
            try:
                with named_in_errors(self.path):
                    if event["event"] != "preview":
                        self.file.write(json.dumps(event) + "\n")
                    if event["event"] == "step":
                        self._step(event)
            except XFusionError as error:  # not raised: the other processes would not know
                self.failure = error
        if self.listener:
            self.listener(event)

    def start_bar(self, total: int, done: int, first: str) -> None:
        """Show the live bar; ``first`` stands in it until the first step is done."""
        if self.console:
            columns = (
                TextColumn("training"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console, refresh_per_second=2)
            self.task = self.bar.add_task("training", total=total, completed=done, text=first)
            self.bar.start()

    def set_total(self, total: int) -> None:
        """Tell the bar how many steps there are."""
        if self.bar:
            self.bar.update(self.task, total=total)

    def _step(self, event: Event) -> None:
        losses = event["losses"]
        if self.bar:
            text = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            self.bar.update(
                self.task, completed=event["step"] + 1, text=f"{text} | {event['samples_per_second']:.0f} samples/s"
            )
        if self.board and event["step"] % 10 == 0:
            for name, value in losses.items():
                self.board.add_scalar(f"loss/{name}", value, event["step"])
            self.board.add_scalar("rate", event["rate"], event["step"])
            self.board.add_scalar("samples_per_second", event["samples_per_second"], event["step"])

    def image(self, picture: Any, step: int) -> None:
        """A preview, for TensorBoard."""
        if self.board:
            import numpy

            self.board.add_image("preview", numpy.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Leave no bar and no open file."""
        if self.bar:
            self.bar.stop()
        with contextlib.suppress(OSError):  # each line was flushed: what fails here has been told when it was written
            if self.board:
                self.board.close()
        with contextlib.suppress(OSError):
            if self.file:
                self.file.close()


def _stays(line: str, resume_at: int, left_out: Container[str]) -> bool:
    """Whether a line tells of what a state of this step holds: steps before it, what was planned behind the last of them, and
    what is left out. A line that was cut off tells of nothing.
    """
    try:
        event = json.loads(line)
        kind, step = event.get("event"), event.get("step", 0)
    except (ValueError, AttributeError):
        return False
    at = kind == "plan" or (kind == "left_out" and event.get("example") in left_out)
    return step < resume_at or (at and step == resume_at)
