"""The routes: OpenAI's, `/health` and `/metrics`, over `generate` and `inpaint_batch`."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import anyio
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image as PILImage
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xfusion.apps.server import reading, requests
from xfusion.apps.server.answers import Refused, base64_png, data_url, now, usage
from xfusion.apps.server.batches import Batches, Continue, Job, stopping
from xfusion.apps.server.limits import Limits
from xfusion.apps.server.names import called
from xfusion.apps.server.reading import as_refused
from xfusion.generation import draw_size
from xfusion.model import Model

log = logging.getLogger("xfusion.server")

BODY_SECONDS = 30.0
"""How long a client may take to send a request."""
READERS = 2
"""Requests that are read (pictures decoded, words cut into tokens) at the same time, beside the event loop."""
CLOSED = 499
"""Status, in the metrics, of a request whose client went away."""
Value = TypeVar("Value")


def create(
    models: Mapping[str, Model],
    limits: Limits,
    *,
    keys: frozenset[str] = frozenset(),
    hosts: frozenset[str] = frozenset(),
    names: frozenset[str] = frozenset(),
) -> FastAPI:
    """The server as an ASGI application.

    Args:
        models: what is served, by name; the first answers requests that name none.
        limits: what a request may ask for.
        keys: API keys; with none, everyone may ask.
        hosts: whose pictures are fetched; with none, pictures come as data URLs alone.
        names: by which the server may be called, in lower case; with none, by any.
    """
    server = _Server(models, limits, keys, hosts)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.batches.start()
        yield
        server.end_stop()
        server.readers.shutdown(wait=False, cancel_futures=True)
        await anyio.to_thread.run_sync(server.batches.close, limits.grace)

    # A path with a slash too many is one that is not there: nobody is led to an address that the request made up.
    app = FastAPI(title="xfusion", openapi_url=None, lifespan=lifespan, redirect_slashes=False)
    app.state.server = app.state.stops = server
    app.add_middleware(_Named, names=names)
    app.add_middleware(_Counted, server=server)
    allowed = [Depends(server.authorised)]
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/metrics", server.metrics, methods=["GET"], dependencies=allowed)
    app.add_api_route("/v1/models", server.list_models, methods=["GET"], dependencies=allowed)
    app.add_api_route("/v1/models/{name:path}", server.show_model, methods=["GET"], dependencies=allowed)
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"], dependencies=allowed)
    app.add_api_route("/v1/images/generations", server.images, methods=["POST"], dependencies=allowed)
    app.add_api_route("/v1/images/edits", server.edits, methods=["POST"], dependencies=allowed)
    app.add_api_route("/v1/embeddings", server.embeddings, methods=["POST"], dependencies=allowed)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _broken)
    return app


class _Server:
    """What the routes share."""

    def __init__(
        self,
        models: Mapping[str, Model],
        limits: Limits,
        keys: frozenset[str],
        hosts: frozenset[str],
    ):
        self.models, self.limits, self.hosts = dict(models), limits, hosts
        self.keys = [_digest(key) for key in keys]
        self.facts = {
            name: {"pack_fingerprint": model.fingerprint, "base_fingerprint": model.backbone.fingerprint}
            for name, model in self.models.items()
        }
        self.since = now()
        self.batches = Batches(limits.queue, limits.batch, self._watch)
        # Threads of their own: one whose request nobody awaits any more still takes a reader's place until it ends.
        self.readers = ThreadPoolExecutor(READERS, thread_name_prefix="xfusion-reader")
        self.arriving = set[asyncio.Timeout]()
        self.held = 0
        """Bytes of the requests on their way into the queue."""
        self.ended = asyncio.Event()
        self.registry = CollectorRegistry()
        named = {"registry": self.registry, "namespace": "xfusion"}
        self.requests = Counter("requests", "Requests by route and status.", ("route", "status"), **named)
        self.seconds = Histogram("request_seconds", "Seconds per request.", ("route",), **named)
        self.batch_size = Histogram("batch_size", "Answers per batch.", buckets=(1, 2, 4, 8, 16, 32, 64), **named)
        self.batch_seconds = Histogram("batch_seconds", "Seconds per batch.", **named)
        self.tokens = Counter("tokens", "Tokens of answers.", **named)
        self.pictures = Counter("pictures", "Pictures drawn.", **named)
        Gauge("waiting", "Answers in the queue.", **named).set_function(lambda: len(self.batches.waiting))
        Gauge("running", "Answers being computed.", **named).set_function(lambda: len(self.batches.running))

    def _watch(self, jobs: list[Job], seconds: float) -> None:
        self.batch_size.observe(len(jobs))
        self.batch_seconds.observe(seconds)
        self.tokens.inc(sum(len(job.words.ids) for job in jobs))
        drawn = sum(isinstance(segment, PILImage.Image) for job in jobs for segment in job.answer)  # not vectors
        self.pictures.inc(drawn)

    # -- the end

    def begin_stop(self) -> None:
        """Take no more, and tell those that wait; what runs goes on."""
        self.batches.refuse()
        for limit in self.arriving:
            if not limit.expired():
                limit.reschedule(0)

    def end_stop(self) -> None:
        """End what runs, and tell those who wait for it."""
        self.ended.set()

    # -- routes without a model

    async def authorised(self, request: Request) -> None:
        """Refuse a request without one of the keys, comparing all of them in constant time."""
        if not self.keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        found = [hmac.compare_digest(_digest(given.strip()), key) for key in self.keys]
        if scheme.lower() != "bearer" or not any(found):
            raise Refused(
                401,
                "this server wants an API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def health(self) -> dict[str, Any]:
        """Whether requests are taken."""
        return {"status": "ok", "models": list(self.models), "waiting": len(self.batches.waiting)}

    async def metrics(self) -> Response:
        """For Prometheus."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    async def list_models(self) -> dict[str, Any]:
        """What is served."""
        return {"object": "list", "data": [self._shown(name) for name in self.models]}

    async def show_model(self, name: str) -> dict[str, Any]:
        """One of them."""
        self._model(name)
        return self._shown(name)

    def _shown(self, name: str) -> dict[str, Any]:
        model = self.models[name]
        facts = {"capabilities": sorted(model.capabilities), "base": model.backbone.source, **self.facts[name]}
        return {"id": name, "object": "model", "created": self.since, "owned_by": "xfusion", **facts}

    def _model(self, name: str | None) -> tuple[str, Model]:
        name = next(iter(self.models)) if name is None else name
        if name not in self.models:
            known = ", ".join(self.models)
            raise Refused(404, f"there is no model {name[:100]!r} here, only {known}", code="model_not_found")
        return name, self.models[name]

    async def embeddings(self, request: Request) -> Response:
        """Vectors of texts and pictures."""
        with _Arrival(self, request) as arrival:
            asked = requests.parse(requests.Embeddings, await arrival.body())
            name, model = self._model(asked.model)
            if "embed" not in model.capabilities:
                raise requests.incapable(model, "embed")
            job, prompt = await arrival.read(partial(reading.embeddings, asked, model, self.limits, self.hosts))
            as_text = asked.encoding_format == "base64"
            del asked  # it is as large as what was sent, and the queue is long
            ticket = _Ticket(self, request, [job], arrival.deadline)
        try:
            async for _ in ticket.follow():
                pass
        finally:
            ticket.drop()
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": base64.b64encode(v.numpy().astype("<f4").tobytes()).decode() if as_text else v.tolist(),
            }
            for i, v in enumerate(job.answer)
        ]
        return JSONResponse(
            {
                "object": "list",
                "data": data,
                "model": name,
                "usage": {"prompt_tokens": prompt, "total_tokens": prompt},
            }
        )

    # -- conversations

    async def chat(self, request: Request) -> Response:
        """The next turn of a conversation, in words, in a picture, or in both."""
        with _Arrival(self, request) as arrival:
            asked = requests.parse(requests.Chat, await arrival.body())
            name, model = self._model(asked.model)
            jobs, prompt = await arrival.read(partial(reading.chat, asked, model, self.limits, self.hosts))
            counted = asked.stream_options is not None and asked.stream_options.include_usage
            stream = asked.stream
            del asked  # its pictures are as large as they were sent, and the queue is long
            ticket = _Ticket(self, request, jobs, arrival.deadline)
        answer = _Chat(ticket, name, prompt, counted=counted)
        if stream:
            return _Events(answer.events(), ticket)
        try:
            return JSONResponse(await answer.whole())
        finally:
            ticket.drop()

    # -- pictures

    async def images(self, request: Request) -> Response:
        """Pictures of a prompt."""
        with _Arrival(self, request) as arrival:
            asked = requests.parse(requests.Images, await arrival.body())
            name, model = self._model(asked.model)
            jobs = await arrival.read(partial(reading.images, asked, model, self.limits))
            ticket = _Ticket(self, request, jobs, arrival.deadline)
        return await self._pictures(ticket, asked, name, model)

    async def edits(self, request: Request) -> Response:
        """A part of a picture drawn anew."""
        with _Arrival(self, request) as arrival:
            asked, files = await self._form(request, await arrival.body())
            name, model = self._model(asked.model)
            image = files.get("image", files.get("image[]", b""))
            read = partial(reading.edit, asked, model, self.limits, image, files.get("mask"))
            jobs = await arrival.read(read)
            del image, files, read  # they are as large as they were sent, and the queue is long
            ticket = _Ticket(self, request, jobs, arrival.deadline)
        return await self._pictures(ticket, asked, name, model)

    async def _form(self, request: Request, body: bytes) -> tuple[requests.Images, dict[str, bytes]]:
        """The fields of a form, and its files."""
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise Refused(400, "send a form (multipart/form-data) with image, mask and prompt")
        form = Request(request.scope, receive=_of(body)).form(
            max_files=4, max_fields=32, max_part_size=self.limits.body
        )
        async with form as parts:
            files = {key: await value.read() for key, value in parts.items() if isinstance(value, UploadFile)}
            fields = {key: value for key, value in parts.items() if isinstance(value, str)}
            sent = [key for key, value in parts.multi_items() if isinstance(value, UploadFile)]
        asked = requests.parse(requests.Images, fields)
        self._model(asked.model)
        if sorted(sent) not in (["image"], ["image", "mask"], ["image[]"], ["image[]", "mask"]):
            raise Refused(400, f"send one picture as image, and perhaps one mask, not {', '.join(sent) or 'nothing'}")
        return asked, files

    async def _pictures(self, ticket: _Ticket, asked: requests.Images, name: str, model: Model) -> Response:
        jobs = ticket.jobs
        try:
            async for _ in ticket.follow():
                pass
        finally:
            ticket.drop()
        facts = [self.picture_facts(name, job) | {"prompt": asked.prompt} for job in jobs]
        as_url = asked.response_format == "url"
        data = [
            {"url": data_url(job.answer[0], fact)} if as_url else {"b64_json": base64_png(job.answer[0], fact)}
            for job, fact in zip(jobs, facts, strict=True)
        ]
        data = [{**picture, "seed": job.seed} for picture, job in zip(data, jobs, strict=True)]
        native, _ = draw_size(model, asked.side())
        side = jobs[0].answer[0].width
        body = {"created": now(), "data": data, "output_format": "png", "size": f"{side}x{side}", "model": name}
        return JSONResponse(body | {"drawn_at": f"{native}x{native}"})

    def picture_facts(self, name: str, job: Job) -> dict[str, Any]:
        """What a PNG remembers."""
        work: Any = job.work
        guidance = work.model.guidance if work.guidance is None else work.guidance
        return {"seed": job.seed, "steps": work.steps, "guidance": guidance, **self.facts[name]}


class _Arrival:
    """A request on its way into the queue: its clock runs, its bytes are counted, and a stop of the server ends it."""

    def __init__(self, server: _Server, request: Request):
        self.server, self.request, self.size = server, request, 0
        self.deadline = asyncio.get_running_loop().time() + server.limits.seconds

    def __enter__(self) -> _Arrival:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.held -= self.size

    async def body(self) -> bytes:
        """The request's body, refused as soon as it is too long, or too slow, or there are too many."""
        most, parts = self.server.limits.body, []
        too_long = Refused(413, f"the request has more than the {most} bytes that this server allows", code="too_large")
        length = self.request.headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > most:
            raise too_long
        seconds = min(BODY_SECONDS, self.server.limits.seconds)
        slow = Refused(408, f"the request was not sent within {seconds:g} seconds", code="too_slow")
        async with self._until(self.deadline - self.server.limits.seconds + seconds, slow):
            async for part in self.request.stream():
                self._hold(len(part))
                if self.size > most:
                    raise too_long
                parts.append(part)
        return b"".join(parts)

    async def read(self, read: Callable[[], Value]) -> Value:
        """Read it in a thread, so that a large picture does not hold up the others."""
        async with self._until(self.deadline, _late(self.server)):
            return await asyncio.get_running_loop().run_in_executor(self.server.readers, read)

    def _hold(self, size: int) -> None:
        most, others = self.server.limits.bodies, self.server.held - self.size
        self.size += size
        self.server.held += size
        if others and self.server.held > most:
            raise Refused(
                429,
                f"requests of more than the {most} bytes that this server allows are on their way: try again later",
                code="bodies_full",
                headers={"Retry-After": "1"},
            )

    @asynccontextmanager
    async def _until(self, when: float, late: Refused) -> AsyncIterator[None]:
        """What is done here ends at a time, or when the server is told to stop."""
        if not self.server.batches.open:
            raise stopping()
        arriving, limit = self.server.arriving, asyncio.timeout_at(when)
        try:
            async with limit:
                arriving.add(limit)
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise (late if self.server.batches.open else stopping()) from error
        finally:
            arriving.discard(limit)


def _late(server: _Server) -> Refused:
    seconds = server.limits.seconds
    return Refused(504, f"there is no answer within {seconds:g} seconds: ask for less", code="deadline")


class _Ticket:
    """The jobs of a request in the queue, and what is heard of them."""

    def __init__(self, server: _Server, request: Request, jobs: list[Job], deadline: float):
        self.server, self.request, self.jobs, self.deadline = server, request, jobs, deadline
        self.loop = asyncio.get_running_loop()
        self.heard: asyncio.Queue[tuple[Job, str | None]] = asyncio.Queue()
        for job in jobs:
            job.tell = self._tell
        server.batches.put(jobs)

    def _tell(self, job: Job, new: str | None) -> None:
        try:
            self.loop.call_soon_threadsafe(self.heard.put_nowait, (job, new))
        except RuntimeError:  # the loop is closed: the server stopped before the batch did
            job.dropped = True

    def drop(self) -> None:
        """Nobody waits any more."""
        self.server.batches.forget(self.jobs)

    async def follow(self) -> AsyncIterator[tuple[Job, str | None]]:
        """What is heard until all jobs are done: new words of one, or None for one that is done.

        Raises:
            ClientDisconnect: the client went away.
            Refused: the deadline passed, a job failed, or the server stopped.
        """
        gone, ended = asyncio.ensure_future(self._gone()), asyncio.ensure_future(self.server.ended.wait())
        left = len(self.jobs)
        try:
            while left:
                next_one = asyncio.ensure_future(self.heard.get())
                seconds = max(0.0, self.deadline - self.loop.time())
                await asyncio.wait({next_one, gone, ended}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                if not next_one.done():
                    next_one.cancel()
                    if gone.done():
                        raise ClientDisconnect
                    raise stopping() if ended.done() else _late(self.server)
                job, new = next_one.result()
                if new is None:
                    left -= 1
                    if job.error is not None:
                        raise as_refused(job.error) from job.error
                yield job, new
        finally:
            gone.cancel()
            ended.cancel()

    async def _gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass


class _Chat:
    """A ticket's answers in the shape of a chat completion."""

    def __init__(self, ticket: _Ticket, name: str, prompt: int, *, counted: bool):
        self.ticket, self.name, self.prompt = ticket, name, prompt
        self.counted = counted
        """Whether a stream ends with its usage."""
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": now(), "model": name}

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        async for _ in self.ticket.follow():
            pass
        choices = []
        for job in self.ticket.jobs:
            words = [segment for segment in job.answer if isinstance(segment, str)]
            content = job.words.sent if job.words.stopped else "".join(words)
            message: dict[str, Any] = {"role": "assistant", "content": content if words else None}
            if images := self._images(job):
                message["images"] = images
            choices.append(
                {"index": job.index, "message": message, "finish_reason": self._reason(job), "logprobs": None}
            )
        seed = {"seed": self.ticket.jobs[0].seed}
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self._usage(), **seed}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        for job in self.ticket.jobs:
            yield self._event(job.index, {"role": "assistant", "content": ""})
        try:
            async for job, new in self.ticket.follow():
                if new is not None:
                    yield self._event(job.index, {"content": new})
                    continue
                if images := self._images(job):
                    yield self._event(job.index, {"images": images})
                yield self._event(job.index, {}, self._reason(job))
        except ClientDisconnect:
            return
        except Exception as error:
            yield f"data: {json.dumps(as_refused(error).body)}\n\n"
            return
        if self.counted:
            yield self._chunk(choices=[], usage=self._usage())
        yield "data: [DONE]\n\n"

    def _event(self, index: int, delta: dict[str, Any], reason: str | None = None) -> str:
        return self._chunk(choices=[{"index": index, "delta": delta, "finish_reason": reason}])

    def _chunk(self, **parts: Any) -> str:
        chunk = {**self.head, "object": "chat.completion.chunk", **parts}
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    def _images(self, job: Job) -> list[dict[str, Any]]:
        facts = self.ticket.server.picture_facts(self.name, job)
        drawn = [segment for segment in job.answer if not isinstance(segment, str)]
        return [{"type": "image_url", "image_url": {"url": data_url(picture, facts)}} for picture in drawn]

    def _reason(self, job: Job) -> str:
        work = job.work
        full = isinstance(work, Continue) and len(job.words.ids) >= work.max_tokens
        return "length" if full and not job.words.stopped else "stop"

    def _usage(self) -> dict[str, int]:
        return usage(self.prompt, sum(len(job.words.ids) for job in self.ticket.jobs))


class _Events(StreamingResponse):
    """Server-sent events; however the stream ends, the ticket's places are given back."""

    def __init__(self, events: AsyncIterator[str], ticket: _Ticket):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ticket.drop()


class _Counted:
    """Counts requests by route and status, without holding back what is streamed."""

    def __init__(self, app: ASGIApp, server: _Server):
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.server.requests.labels(route, status).inc()
            self.server.seconds.labels(route).observe(time.perf_counter() - began)


class _Named:
    """Refuses whatever calls this server by a name that is not its own, before it is asked which paths there are."""

    def __init__(self, app: ASGIApp, names: frozenset[str]):
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.names and (name := called(scope)) not in self.names:
            message = (
                f"this server is not called {name[:100]!r}: xfusion serve --allowed-names takes names that it may have"
            )
            await _answer(Refused(403, message, code="unknown_host"))(scope, receive, send)
            return
        await self.app(scope, receive, send)


# ------------------------------------------------------------------------------------------------------------ errors


def _answer(error: Refused) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _answer(error)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, allowed = request.url.path[:200], (error.headers or {}).get("Allow")
    if error.status_code == 405 and allowed:
        return _answer(
            Refused(
                405, f"{path} takes {allowed}, not {request.method}", code="method_not_allowed", headers=error.headers
            )
        )
    if error.status_code == 404:
        known = ", ".join(sorted({route.path for route in request.app.routes if "{" not in route.path}))
        return _answer(Refused(404, f"there is no {path} here, only {known}", code="unknown_url"))
    return _answer(Refused(error.status_code, f"{request.method} {path}: {error.detail}", headers=error.headers))


async def _left(_: Request, error: Exception) -> Response:
    del error
    return Response(status_code=CLOSED)  # nobody reads it but the metrics


async def _broken(_: Request, error: Exception) -> Response:
    return _answer(as_refused(error))


def _of(body: bytes) -> Receive:
    """A body that was received, to be received once more."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _digest(key: str) -> bytes:
    """Keys are compared by their digests, which have one length."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
