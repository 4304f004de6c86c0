"""The routes: OpenAI's, `/health` and `/metrics`, over `generate` and `inpaint_batch`."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import anyio
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xfusion.apps.server import errors, reading, requests
from xfusion.apps.server.answers import Refused, base64_png, data_url, now
from xfusion.apps.server.completions import Completion, Events
from xfusion.apps.server.limits import Limits
from xfusion.apps.server.metrics import CountingMiddleware
from xfusion.apps.server.names import foreign_origin, host_name
from xfusion.apps.server.service import Service
from xfusion.apps.server.tickets import Arrival, Ticket
from xfusion.comparison.results import portable
from xfusion.generation import draw_size
from xfusion.model import Model


def create(
    models: Mapping[str, Model],
    limits: Limits,
    *,
    keys: frozenset[str] = frozenset(),
    hosts: frozenset[str] = frozenset(),
    names: frozenset[str] = frozenset(),
    origins: frozenset[str] = frozenset(),
) -> FastAPI:
    """The server as an ASGI application.

    Args:
        models: models to serve, by name; the first answers requests that name none.
        limits: limits of requests.
        keys: API keys; if empty, everyone may send requests.
        hosts: hosts from which pictures are fetched; if empty, pictures are accepted as data URLs only.
        names: names accepted in the Host header, in lower case; if empty, any.
        origins: origins of other sites' pages that may use the server in a browser, such as ``http://localhost:3000``.
    """
    service = Service(models, limits, hosts)
    routes = _Routes(service, keys)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.batches.start()
        yield
        service.end_stop()
        service.readers.shutdown(wait=False, cancel_futures=True)
        await anyio.to_thread.run_sync(service.batches.close, limits.grace)

    # A path with an extra slash is a 404: no client is redirected to an address that the request made up.
    app = FastAPI(title="xfusion", openapi_url=None, lifespan=lifespan, redirect_slashes=False)
    app.state.server = app.state.stops = service
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=sorted(origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(_RequestGuard, names=names, origins=origins)
    app.add_middleware(CountingMiddleware, metrics=service.metrics)
    allowed = [Depends(routes.authorised)]
    app.add_api_route("/health", routes.health, methods=["GET"])
    app.add_api_route("/metrics", routes.metrics, methods=["GET"], dependencies=allowed)
    app.add_api_route("/v1/models", routes.list_models, methods=["GET"], dependencies=allowed)
    app.add_api_route("/v1/models/{name:path}", routes.show_model, methods=["GET"], dependencies=allowed)
    app.add_api_route("/v1/chat/completions", routes.chat, methods=["POST"], dependencies=allowed)
    app.add_api_route("/v1/images/generations", routes.images, methods=["POST"], dependencies=allowed)
    app.add_api_route("/v1/images/edits", routes.edits, methods=["POST"], dependencies=allowed)
    app.add_api_route("/v1/embeddings", routes.embeddings, methods=["POST"], dependencies=allowed)
    app.add_exception_handler(Refused, errors.refused_request)
    app.add_exception_handler(HTTPException, errors.no_route)
    app.add_exception_handler(ClientDisconnect, errors.client_disconnected)
    app.add_exception_handler(Exception, errors.internal_error)
    return app


class _Routes:
    """The handlers of the paths."""

    def __init__(self, service: Service, keys: frozenset[str]):
        self.service, self.models, self.limits, self.hosts = service, service.models, service.limits, service.hosts
        # Headers are bytes, and clients encode letters beyond ASCII differently.
        self.keys = [_digest(encoded) for key in keys for encoded in _encodings(key)]

    # -- routes without a model

    async def authorised(self, request: Request) -> None:
        """Refuse a request without one of the keys; all are compared in constant time."""
        if not self.keys:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        digest = _digest(token.encode("latin-1").strip())
        matches = [hmac.compare_digest(digest, key) for key in self.keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise Refused(
                401,
                "this server wants an API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def health(self) -> dict[str, Any]:
        """Whether requests are accepted."""
        return {"status": "ok", "models": list(self.models), "waiting": len(self.service.batches.waiting)}

    async def metrics(self) -> Response:
        """Metrics for Prometheus."""
        return Response(self.service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def list_models(self) -> dict[str, Any]:
        """All served models."""
        return {"object": "list", "data": [self._model_entry(name) for name in self.models]}

    async def show_model(self, name: str) -> dict[str, Any]:
        """One served model."""
        self.service.model(name)
        return self._model_entry(name)

    def _model_entry(self, name: str) -> dict[str, Any]:
        model = self.models[name]
        base = portable(model.backbone.source)
        facts = {"capabilities": sorted(model.capabilities), "base": base, **self.service.facts[name]}
        return {"id": name, "object": "model", "created": self.service.since, "owned_by": "xfusion", **facts}

    async def embeddings(self, request: Request) -> Response:
        """Embeddings of texts and pictures."""
        with Arrival(self.service, request) as arrival:
            params = await arrival.parse_json(requests.Embeddings)
            name, model = self.service.model(params.model)
            if "embed" not in model.capabilities:
                raise requests.incapable(model, "embed", "clip")
            job, prompt = await arrival.read(partial(reading.embeddings, params, model, self.limits, self.hosts))
            as_text = params.encoding_format == "base64"
            del params  # as large as the request, and the queue may be long
            ticket = Ticket(self.service, request, [job], arrival.deadline)
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
        """The next turn of a conversation: text, a picture, or both."""
        with Arrival(self.service, request) as arrival:
            params = await arrival.parse_json(requests.Chat)
            name, model = self.service.model(params.model)
            jobs, prompt = await arrival.read(partial(reading.chat, params, model, self.limits, self.hosts))
            has_usage = params.stream_options is not None and params.stream_options.include_usage
            stream = params.stream
            del params  # its pictures are as large as they were sent, and the queue may be long
            ticket = Ticket(self.service, request, jobs, arrival.deadline)
        answer = Completion(ticket, name, prompt, has_usage=has_usage)
        if stream:
            return Events(answer.events(), ticket)
        try:
            return JSONResponse(await answer.response())
        finally:
            ticket.drop()

    # -- pictures

    async def images(self, request: Request) -> Response:
        """Pictures of a prompt."""
        with Arrival(self.service, request) as arrival:
            params = await arrival.parse_json(requests.Images)
            name, model = self.service.model(params.model)
            jobs = await arrival.read(partial(reading.images, params, model, self.limits))
            ticket = Ticket(self.service, request, jobs, arrival.deadline)
        return await self._pictures(ticket, params, name, model)

    async def edits(self, request: Request) -> Response:
        """Inpaint a part of a picture."""
        with Arrival(self.service, request) as arrival:
            if arrival.kind != "multipart/form-data":
                raise Refused(400, "send a form (multipart/form-data) with image, mask and prompt")
            params, files = await arrival.read(partial(self._form, request, await arrival.body()))
            name, model = self.service.model(params.model)
            image = files.get("image", files.get("image[]", b""))
            read_edit = partial(reading.edit, params, model, self.limits, image, files.get("mask"))
            jobs = await arrival.read(read_edit)
            del image, files, read_edit  # they are as large as they were sent, and the queue may be long
            ticket = Ticket(self.service, request, jobs, arrival.deadline)
        return await self._pictures(ticket, params, name, model)

    def _form(self, request: Request, body: bytes) -> tuple[requests.Images, dict[str, bytes]]:
        """The fields of a form, and its files; run in a thread, since the parser reads every byte."""

        async def parse_form() -> tuple[dict[str, bytes], dict[str, str], list[str]]:
            form = Request(request.scope, receive=_replay(body)).form(
                max_files=4, max_fields=32, max_part_size=self.limits.body
            )
            async with form as parts:
                files = {key: await value.read() for key, value in parts.items() if isinstance(value, UploadFile)}
                fields = {key: value for key, value in parts.items() if isinstance(value, str)}
                return files, fields, [key for key, value in parts.multi_items() if isinstance(value, UploadFile)]

        files, fields, file_fields = asyncio.run(parse_form())
        params = requests.parse(requests.Images, fields)
        self.service.model(params.model)
        if sorted(file_fields) not in (["image"], ["image", "mask"], ["image[]"], ["image[]", "mask"]):
            raise Refused(
                400, f"send one picture as image, and perhaps one mask, not {', '.join(file_fields) or 'nothing'}"
            )
        return params, files

    async def _pictures(self, ticket: Ticket, params: requests.Images, name: str, model: Model) -> Response:
        jobs = ticket.jobs
        try:
            async for _ in ticket.follow():
                pass
        finally:
            ticket.drop()
        facts = [self.service.picture_facts(name, job) | {"prompt": params.prompt} for job in jobs]
        key, encode = ("url", data_url) if params.response_format == "url" else ("b64_json", base64_png)

        def encode_all() -> list[dict[str, Any]]:
            entries = zip(jobs, facts, strict=True)
            return [{key: encode(job.answer[0], picture_facts), "seed": job.seed} for job, picture_facts in entries]

        data = await anyio.to_thread.run_sync(encode_all)
        trained_size, _ = draw_size(model, params.side())
        side = jobs[0].answer[0].width
        body = {"created": now(), "data": data, "output_format": "png", "size": f"{side}x{side}", "model": name}
        return JSONResponse(body | {"drawn_at": f"{trained_size}x{trained_size}"})


class _RequestGuard:
    """Refuses requests with a foreign Host name or from another site's page, before any route is matched."""

    def __init__(self, app: ASGIApp, names: frozenset[str], origins: frozenset[str]):
        self.app, self.names, self.origins = app, names, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)) is not None:
            await errors.response(refusal)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refused | None:
        if self.names and (name := host_name(scope)) not in self.names:
            advice = "xfusion serve --allowed-names takes names that it may have"
            return Refused(403, f"this server is not called {name[:100]!r}: {advice}", code="unknown_host")
        if (origin := foreign_origin(scope, self.origins)) is not None:
            advice = "xfusion serve --allowed-origins takes pages elsewhere that may"
            return Refused(403, f"{origin[:100]!r} may not use this server: {advice}", code="foreign_origin")
        return None


def _replay(body: bytes) -> Receive:
    """An ASGI receive function that replays a received body."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _encodings(key: str) -> set[bytes]:
    """The encodings in which clients may send a key."""
    encodings = {key.encode("utf-8", "surrogateescape")}
    with suppress(UnicodeEncodeError):
        encodings.add(key.encode("latin-1"))
    return encodings


def _digest(key: bytes) -> bytes:
    """A key's digest; keys are compared by digests, since these have equal length."""
    return hashlib.sha256(key).digest()
