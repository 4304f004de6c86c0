"""Connection handling of a server: it cuts connections that neither send nor read, and notifies waiting clients when it stops.

On a stop, new requests are refused at once, and running ones get the grace period.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

import uvicorn
from fastapi.responses import JSONResponse

from xfusion.apps.server.answers import Refused

SENDING = 2
"""Seconds after the grace period for sending the last answers; then connections whose clients do not read are cut."""
CANCELLING = 3
"""Seconds after that until running tasks are cancelled, with a traceback in the log."""
HEAD_SECONDS = 10.0
"""How long a connection may be open before a request's headers have arrived."""
HEAD_BYTES = 16_384
"""Most bytes of a request's headers."""
UNREAD_SECONDS = 30.0
"""How long a client may stop reading while an answer is sent."""
IDLE_SECONDS = 5
"""Keep-alive: how long a connection stays open after an answer."""
CONNECTIONS = 512
"""Simultaneous connections."""


class Stops(Protocol):
    """An application that can be stopped."""

    def begin_stop(self) -> None:
        """Accept no more requests, and end the waiting ones; running ones continue."""
        ...

    def end_stop(self) -> None:
        """End running requests, and notify their clients."""
        ...


class Server(uvicorn.Server):
    """Uvicorn's server, which answers open requests before it exits.

    Uvicorn itself cancels open requests, and a cancelled request gets no answer in OpenAI's format.

    Args:
        app: an ASGI application; its ``state.stops`` is called in the event loop.
        grace: seconds that running requests get. A second Ctrl-C or SIGTERM ends the grace period.
        connections: simultaneous connections. A request beyond them gets a 503, and idle connections are closed.
    """

    def __init__(self, app: Any, grace: int, connections: int = CONNECTIONS):
        async def bounded(scope: Any, receive: Any, send: Any) -> None:
            """Uvicorn's own limit would answer in plain text. This one counts the requesting connection, too."""
            state = self.server_state
            if scope["type"] != "http" or max(len(state.connections), len(state.tasks)) <= connections:
                return await app(scope, receive, send)
            message = f"more than {connections} connections are open: try again in a second"
            refused = Refused(503, message, code="overloaded", headers={"Retry-After": "1", "Connection": "close"})
            return await JSONResponse(refused.body, refused.status, refused.headers)(scope, receive, send)

        super().__init__(
            uvicorn.Config(
                bounded,
                http="h11",  # httptools, if installed, does not limit headers
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=grace + SENDING + CANCELLING,
                h11_max_incomplete_event_size=HEAD_BYTES,
            )
        )
        self.stops: Stops = app.state.stops
        self.grace, self.connections = grace, connections
        self._loop: asyncio.AbstractEventLoop | None = None
        self._silent: dict[Any, tuple[Any, float]] = {}
        """Silent connections: the state in which they wait, and since when."""

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: cut connections that were silent for too long."""
        self._cut_silent()
        return await super().on_tick(counter)

    def _cut_silent(self) -> None:
        """Cut connections that did not send a request's headers in time, or do not read their answer.

        Uvicorn has a timeout for keep-alive, and none for these two.
        """
        now, previous, idle = time.monotonic(), self._silent, list[tuple[float, Any]]()
        self._silent = {}
        connections: list[Any] = list(self.server_state.connections)
        for connection in connections:
            transport = getattr(connection, "transport", None)
            if transport is None or not hasattr(connection, "cycle"):  # not HTTP
                continue
            cycle, unread = connection.cycle, transport.get_write_buffer_size()
            if not unread and cycle is not None and not cycle.response_complete:
                continue  # its answer is being computed
            entry = previous.get(connection)
            since = entry[1] if entry is not None and entry[0] == (cycle, unread) else now
            self._silent[connection] = ((cycle, unread), since)
            if now - since >= (UNREAD_SECONDS if unread else HEAD_SECONDS):
                transport.abort()
            elif not unread:
                idle.append((since, transport))
        idle.sort(key=lambda item: item[0])
        for _, transport in idle[: max(0, len(self.server_state.connections) - self.connections)]:
            transport.abort()

    async def shutdown(self, sockets: Any = None) -> None:
        """Answer open requests, and shut down."""
        self._loop = asyncio.get_running_loop()
        self.stops.begin_stop()
        timers = [
            self._loop.call_later(self.grace, self.stops.end_stop),
            self._loop.call_later(self.grace + SENDING, self._cut_all),
        ]
        try:
            await super().shutdown(sockets)
        finally:
            for timer in timers:
                timer.cancel()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Handle a signal: the first one stops the server, the second one ends the grace period."""
        if not self.should_exit:
            super().handle_exit(sig, frame)
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self._end_now)

    def _end_now(self) -> None:
        self.stops.end_stop()
        asyncio.get_running_loop().call_later(SENDING, self._cut_all)

    def _cut_all(self) -> None:
        connections: list[Any] = list(self.server_state.connections)
        for connection in connections:
            if (transport := getattr(connection, "transport", None)) is not None:
                transport.abort()
