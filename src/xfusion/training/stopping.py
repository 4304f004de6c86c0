"""Handle Ctrl-C and SIGTERM: the run finishes its step and writes a checkpoint. A second signal stops it without one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM, after its checkpoint was written.

    Args:
        message: the text for the user.
        code: exit status of the command: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, code: int = 128 + signal.SIGINT):
        super().__init__(message)
        self.code = code


class Stop:
    """The signal that asked the run to stop, if any."""

    signal: int | None = None
    """Number of the first signal that arrived; None if there was none."""

    @property
    def code(self) -> int:
        """Exit status by the convention of shells: 128 plus the number of the signal."""
        return 128 + (self.signal or signal.SIGINT)


@contextmanager
def stopping(*, announce: bool) -> Iterator[Stop]:
    """Record the first SIGINT or SIGTERM inside the block instead of raising it.

    An exception in the middle of a step would leave some weights updated and others not. Signals that are ignored, such as
    Ctrl-C in a shell's background job, stay ignored. Outside the main thread, which alone receives signals, nothing changes.

    Args:
        announce: whether to write a line to standard error when the first signal arrives.

    Yields:
        the `Stop` that holds the signal, for the caller to check between steps.

    Raises:
        KeyboardInterrupt: a second signal arrived; it is raised at once, at any point of a step.
    """
    stop, previous = Stop(), {}

    def handle(number: int, frame: object) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = number
        if announce:  # unbuffered: the signal may have interrupted a write to the buffered stream
            os.write(2, b"\nstopping behind this step; once more stops at once, without a checkpoint\n")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
