"""A request's life: it is received within its limits, read, and its jobs wait in the queue until done or abandoned."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from xfusion.apps.server import requests
from xfusion.apps.server.answers import Refused
from xfusion.apps.server.batches import Job, stopping
from xfusion.apps.server.reading import as_refused
from xfusion.apps.server.service import Service

BODY_SECONDS = 30.0
"""How long a client may take to send a request."""
QUIET_SECONDS = 15.0
"""How long the followers of a ticket hear nothing: proxies cut a connection over which nothing is sent for long."""
PATIENCE = 0.5
"""Seconds that a request waits for a free place in a full queue."""
Value = TypeVar("Value")
Parameters = TypeVar("Parameters", bound=BaseModel)


class Arrival:
    """A request being received: it has a deadline, its bytes are counted, and stopping the server ends it."""

    def __init__(self, service: Service, request: Request):
        self.service, self.request, self.size, self.reading = service, request, 0, False
        self.deadline = asyncio.get_running_loop().time() + service.limits.seconds
        self.kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        """Its content type, such as application/json."""

    def __enter__(self) -> Arrival:
        return self

    def __exit__(self, *_: object) -> None:
        self.service.held_bytes -= self.size
        self.service.reading -= self.reading

    async def parse_json(self, kind: type[Parameters]) -> Parameters:
        """The request as JSON, parsed in a thread.

        Raises:
            Refused: it is not JSON, or not of this kind; or as `body`.
        """
        if self.kind != "application/json":
            content_type_text = f"not {self.kind[:100]}" if self.kind else "which this request does not say"
            raise Refused(
                415,
                f"send JSON with Content-Type: application/json, {content_type_text}",
                code="unsupported_media_type",
            )
        return await self.read(partial(requests.parse_body, kind, await self.body(), self.service.limits))

    async def body(self) -> bytes:
        """The request's body, refused as soon as it is too long or too slow, or there are too many.

        If the queue is full, or will be once the requests being read are in it, nothing is received or read: repeated
        requests must not take time from the computation of answers.
        """
        await self._wait_for_place()
        limit, parts = self.service.limits.body, []
        too_long = Refused(
            413, f"the request has more than the {limit} bytes that this server allows", code="too_large"
        )
        length = self.request.headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > limit:
            raise too_long
        seconds = min(BODY_SECONDS, self.service.limits.seconds)
        too_slow = Refused(408, f"the request was not sent within {seconds:g} seconds", code="too_slow")
        async with self._until(self.deadline - self.service.limits.seconds + seconds, too_slow):
            async for part in self.request.stream():
                self._count_bytes(len(part))
                if self.size > limit:
                    raise too_long
                parts.append(part)
        self.service.batches.check(self.service.reading)
        self.service.reading += 1
        self.reading = True
        return b"".join(parts)

    async def read(self, read: Callable[[], Value]) -> Value:
        """Read it in a thread, so that a large picture does not block other requests."""
        async with self._until(self.deadline, _deadline_refusal(self.service)):
            return await asyncio.get_running_loop().run_in_executor(self.service.readers, read)

    async def _wait_for_place(self) -> None:
        """Refuse if the queue stays full for `PATIENCE` seconds, which also limits how often a client can retry."""
        try:
            self.service.batches.check(self.service.reading)
        except Refused as refusal:
            async with self._until(self.deadline, refusal):
                await asyncio.sleep(PATIENCE)
            self.service.batches.check(self.service.reading)

    def _count_bytes(self, size: int) -> None:
        limit, other_bytes = self.service.limits.bodies, self.service.held_bytes - self.size
        self.size += size
        self.service.held_bytes += size
        if other_bytes and self.service.held_bytes > limit:
            raise Refused(
                429,
                f"requests of more than the {limit} bytes that this server allows are on their way: try again later",
                code="bodies_full",
                headers={"Retry-After": "1"},
            )

    @asynccontextmanager
    async def _until(self, deadline: float, refusal: Refused) -> AsyncIterator[None]:
        """End the block at a time, or when the server stops."""
        if not self.service.batches.open:
            raise stopping()
        arriving, limit = self.service.arriving, asyncio.timeout_at(deadline)
        try:
            async with limit:
                arriving.add(limit)
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise (refusal if self.service.batches.open else stopping()) from error
        finally:
            arriving.discard(limit)


def _deadline_refusal(service: Service) -> Refused:
    seconds = service.limits.seconds
    return Refused(504, f"there is no answer within {seconds:g} seconds: ask for less", code="deadline")


class Ticket:
    """The jobs of a request in the queue, and their events."""

    def __init__(self, service: Service, request: Request, jobs: list[Job], deadline: float):
        self.service, self.request, self.jobs, self.deadline = service, request, jobs, deadline
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[tuple[Job, Any]] = asyncio.Queue()
        for job in jobs:
            job.notify = self._put_event
        service.batches.put(jobs)

    def _put_event(self, job: Job, new: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, (job, new))
        except RuntimeError:  # the loop is closed: the server stopped before the batch finished
            job.dropped = True

    def drop(self) -> None:
        """Abandon the jobs: no client waits any more."""
        self.service.batches.forget(self.jobs)

    async def follow(self) -> AsyncIterator[tuple[Job, Any] | None]:
        """Events until all jobs are done: new text of a job, a picture that it drew, or None for a job that is done.

        None instead of an event says that none came for `QUIET_SECONDS`.

        Raises:
            ClientDisconnect: the client disconnected.
            Refused: the deadline passed, a job failed, or the server stopped.
        """
        disconnected, stopped = (
            asyncio.ensure_future(self._wait_for_disconnect()),
            asyncio.ensure_future(self.service.ended.wait()),
        )
        remaining, next_event = len(self.jobs), None
        try:
            while remaining:
                next_event = next_event or asyncio.ensure_future(self.events.get())
                seconds = max(0.0, self.deadline - self.loop.time())
                await asyncio.wait(
                    {next_event, disconnected, stopped},
                    timeout=min(seconds, QUIET_SECONDS),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not next_event.done():
                    if disconnected.done():
                        raise ClientDisconnect
                    if stopped.done():
                        raise stopping()
                    if seconds <= QUIET_SECONDS:
                        raise _deadline_refusal(self.service)
                    yield None
                    continue
                job, new = next_event.result()
                next_event = None
                if new is None:
                    remaining -= 1
                    if job.error is not None:
                        raise as_refused(job.error) from job.error
                yield job, new
        finally:
            for waiting in filter(None, (disconnected, stopped, next_event)):
                waiting.cancel()

    async def _wait_for_disconnect(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
