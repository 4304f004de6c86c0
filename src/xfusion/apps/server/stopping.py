"""What a server does to its connections: those that neither ask nor read are cut, and its end is told to everybody who waits.

At the end no more is taken at once, and what runs gets its grace.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

import uvicorn

SENDING = 2
"""Seconds behind the grace in which the last answers are sent; then connections are cut whose clients do not read."""
CANCELLING = 3
"""Seconds behind that until what still runs is cancelled, with a traceback in the log."""
HEAD_SECONDS = 10.0
"""How long a connection may be open before a request's head is there."""
HEAD_BYTES = 16_384
"""Longest head of a request."""
UNREAD_SECONDS = 30.0
"""How long a client may read nothing of an answer that is being sent."""
IDLE_SECONDS = 5
"""How long a connection is kept open behind an answer."""
CONNECTIONS = 512
"""Connections at the same time."""


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
        connections: at the same time. Beyond them a request gets a 503, and connections without one make room.
    """

    def __init__(self, app: Any, grace: int, connections: int = CONNECTIONS):
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",  # the other one, where it is installed, bounds no heads
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=grace + SENDING + CANCELLING,
                limit_concurrency=connections + 1,  # it counts the one that asks
                h11_max_incomplete_event_size=HEAD_BYTES,
            )
        )
        self.stops: Stops = app.state.stops
        self.grace, self.connections = grace, connections
        self._loop: asyncio.AbstractEventLoop | None = None
        self._silent: dict[Any, tuple[Any, float]] = {}
        """Connections on which nothing happens: what they wait in, and since when."""

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: cut what is silent for too long."""
        self._cut_silent()
        return await super().on_tick(counter)

    def _cut_silent(self) -> None:
        """Cut connections that sent no request's head in time, or read nothing of their answer.

        Uvicorn has a clock for a connection that is kept open behind an answer, and none for these two.
        """
        now, before, idle = time.monotonic(), self._silent, list[tuple[float, Any]]()
        self._silent = {}
        for connection in list(self.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is None or not hasattr(connection, "cycle"):  # no HTTP
                continue
            cycle, unread = connection.cycle, transport.get_write_buffer_size()
            if not unread and cycle is not None and not cycle.response_complete:
                continue  # it is being answered
            known = before.get(connection)
            since = known[1] if known is not None and known[0] == (cycle, unread) else now
            self._silent[connection] = ((cycle, unread), since)
            if now - since >= (UNREAD_SECONDS if unread else HEAD_SECONDS):
                transport.abort()
            elif not unread:
                idle.append((since, transport))
        idle.sort(key=lambda one: one[0])
        for _, transport in idle[: max(0, len(self.server_state.connections) - self.connections)]:
            transport.abort()

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
