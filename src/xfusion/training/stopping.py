"""Ctrl-C and SIGTERM: a run stops after its step, with a checkpoint; a second signal stops it at once, without one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM, after its checkpoint was written.

    Args:
        message: what to tell.
        code: the exit status of a command that ends by it: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, code: int = 128 + signal.SIGINT):
        super().__init__(message)
        self.code = code


class Stop:
    """Whether a signal has asked to stop, and which."""

    signal: int | None = None

    @property
    def code(self) -> int:
        """The exit status: as a shell counts, 128 and the number of the signal."""
        return 128 + (self.signal or signal.SIGINT)


@contextmanager
def stopping(*, tell: bool) -> Iterator[Stop]:
    """Inside the block a signal is noted and not raised: in the middle of a step some weights are already the next step's.

    A second one raises `KeyboardInterrupt` at once. Where Ctrl-C is ignored (a shell's background) it stays so, and
    outside the main thread, which alone gets signals, nothing is changed.

    Args:
        tell: write a line when a signal came.
    """
    stop, before = Stop(), {}

    def note(number: int, frame: object) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = number
        if tell:  # not by a buffered stream: the signal may have come while that is written to
            os.write(2, b"\nstopping behind this step; once more stops at once, without a checkpoint\n")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
