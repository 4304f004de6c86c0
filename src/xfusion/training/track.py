"""Reports the events of a run: as JSON lines, to TensorBoard if it is installed, to the `trackers` that were asked for, in a
progress bar, and to a listener.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from xfusion.data.sequence import XFusionError
from xfusion.storage import atomic_file, named_in_errors
from xfusion.training.trackers import Tracker

Event = dict[str, Any]
"""An event of a run as JSON types. ``event`` names its kind: start, changed, plan, step, skipped, preview,
left_out or end."""
Listener = Callable[[Event], None]


class Track:
    """Writes the events of one run to ``log.jsonl`` and ``tensorboard/`` in its folder.

    Args:
        folder: the run's folder; None writes no files, as in all processes but the first.
        console: where to show lines and the progress bar; None shows nothing.
        listener: called with every event; None if there is none.
        resume_at: number of finished steps; the log keeps the lines of these steps and drops later ones, which an interrupted
            run wrote after its last state.
        left_out: ids of the examples that the resumed state leaves out.

    Raises:
        XFusionError: the folder cannot be written.
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
        self.trackers: Sequence[Tracker] = ()
        """What else curves and previews are copied to; each is closed with the log."""
        self.failure: XFusionError | None = None
        """The first error while writing an event; the caller checks it and stops the run."""
        self.tensorboard: Any = None
        self.bar: Progress | None = None
        self.bar_task: Any = None
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
                self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at or None)
        except ImportError:
            self.print("TensorBoard is not installed: curves go to log.jsonl only (pip install 'xfusion[train]')")

    def _open(self, resume_at: int, left_out: Container[str]) -> TextIO:
        """Open the log for appending, without the lines of steps that will be repeated."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if resume_at and self.path.exists() else []
        # Replaced atomically: if the run is killed here, it finds the complete log when it resumes.
        with atomic_file(self.path) as temporary:
            current_lines = (line for line in lines if _is_current(line, resume_at, left_out))
            temporary.write_text("".join(f"{line}\n" for line in current_lines), encoding="utf-8")
        return self.path.open("a", encoding="utf-8", buffering=1)

    def sync(self) -> None:
        """Flush the log to disk, so that its lines survive a power cut.

        Raises:
            XFusionError: the disk reports an error.
        """
        if self.file:
            with named_in_errors(self.path):
                os.fsync(self.file.fileno())

    def print(self, *lines: str) -> None:
        """Print lines on the console."""
        if self.console:
            for line in lines:
                self.console.print(line, highlight=False, markup=False)

    def event(self, **event: Any) -> None:
        """Write an event to the log and TensorBoard, unless an earlier write failed, and call the listener with it.

        The log has the path of a preview from the run's folder. A failed write does not raise: see `failure`.

        Args:
            event: the event's fields; ``event`` is its kind.
        """
        if self.file and self.failure is None:
            try:
                with named_in_errors(self.path):
                    logged = event
                    if event["event"] == "preview":
                        logged = event | {"path": os.path.relpath(event["path"], self.path.parent)}
                    self.file.write(json.dumps(logged) + "\n")
                    if event["event"] == "step":
                        self._record_step(event)
            except XFusionError as error:  # not raised here: the other processes would wait for this one
                self.failure = error
        if self.listener:
            self.listener(event)

    def start_bar(self, total: int, done: int, first_text: str) -> None:
        """Show the progress bar.

        Args:
            total: number of steps; 0 if it is not known yet.
            done: number of finished steps.
            first_text: text of the bar until the first step is done.
        """
        if self.console:
            columns = (
                TextColumn("training"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console, refresh_per_second=2)
            self.bar_task = self.bar.add_task("training", total=total, completed=done, text=first_text)
            self.bar.start()

    def set_total(self, total: int) -> None:
        """Set the total number of steps of the bar."""
        if self.bar:
            self.bar.update(self.bar_task, total=total)

    def _record_step(self, event: Event) -> None:
        losses = event["losses"]
        if self.bar:
            text = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            self.bar.update(
                self.bar_task, completed=event["step"] + 1, text=f"{text} | {event['samples_per_second']:.0f} samples/s"
            )
        if event["step"] % 10 == 0:
            values = {f"loss/{name}": value for name, value in losses.items()}
            values |= {name: event[name] for name in ("rate", "samples_per_second")}
            if self.tensorboard:
                for name, value in values.items():
                    self.tensorboard.add_scalar(name, value, event["step"])
            for tracker in self.trackers:
                tracker.log(values, event["step"])

    def image(self, picture: Any, step: int) -> None:
        """Write a preview, a PIL image, to TensorBoard and the trackers."""
        if self.tensorboard:
            import numpy

            self.tensorboard.add_image("preview", numpy.asarray(picture), step, dataformats="HWC")
        for tracker in self.trackers:
            tracker.image(picture, step)

    def close(self) -> None:
        """Stop the bar, and close all files and trackers."""
        if self.bar:
            self.bar.stop()
        with contextlib.suppress(OSError):  # each line was flushed: an error here was reported when it was written
            if self.tensorboard:
                self.tensorboard.close()
        with contextlib.suppress(OSError):
            if self.file:
                self.file.close()
        for tracker in self.trackers:
            tracker.close()


def _is_current(line: str, resume_at: int, left_out: Container[str]) -> bool:
    """Whether a line of the log describes something that the resumed state contains.

    These are events of steps before ``resume_at``, and at ``resume_at`` itself the plan, previews, and the examples that the
    state leaves out. An incomplete line, cut off by a crash, is dropped.
    """
    try:
        event = json.loads(line)
        name, step = event.get("event"), event.get("step", 0)
    except (ValueError, AttributeError):
        return False
    at_resume_step = name in ("plan", "preview") or (name == "left_out" and event.get("example") in left_out)
    return step < resume_at or (at_resume_step and step == resume_at)
