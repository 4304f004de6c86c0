"""The end of a server: no more is taken at once, what runs gets its grace, and everybody who still waits hears of it."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import uvicorn

SENDING = 2
"""Seconds behind the grace in which the last answers are sent; then connections are cut whose clients do not read."""
CANCELLING = 3
"""Seconds behind that until what still runs is cancelled, with a traceback in the log."""


class Stops(Protocol):
    """What answers requests, while it stops."""

    def begin_stop(self) -> None:
        """Take no more, and tell those that wait; what runs goes on."""
        ...

    def end_stop(self) -> None:
        """End what runs, and tell those who wait for it."""
        ...


class Server(uvicorn.Server):
    """Uvicorn's server, whose open requests are answered before it ends.

    Uvicorn itself cancels what is open, and a request that is cancelled gets no answer in OpenAI's shape.

    Args:
        app: an ASGI application; its ``state.stops`` is told in the event loop.
        grace: seconds that what runs gets. A second Ctrl-C or SIGTERM ends it.
    """

    def __init__(self, app: Any, grace: int):
        most = grace + SENDING + CANCELLING
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=most
            )
        )
        self.stops: Stops = app.state.stops
        self.grace = grace
        self._loop: asyncio.AbstractEventLoop | None = None

    async def shutdown(self, sockets: Any = None) -> None:
        """Answer what is open, and end."""
        self._loop = asyncio.get_running_loop()
        self.stops.begin_stop()
        timers = [
            self._loop.call_later(self.grace, self.stops.end_stop),
            self._loop.call_later(self.grace + SENDING, self._cut),
        ]
        try:
            await super().shutdown(sockets)
        finally:
            for timer in timers:
                timer.cancel()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal: the first one stops, the second one ends the grace."""
        if not self.should_exit:
            super().handle_exit(sig, frame)
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self._end_now)

    def _end_now(self) -> None:
        self.stops.end_stop()
        asyncio.get_running_loop().call_later(SENDING, self._cut)

    def _cut(self) -> None:
        for connection in list(self.server_state.connections):
            if (transport := getattr(connection, "transport", None)) is not None:
                transport.abort()
