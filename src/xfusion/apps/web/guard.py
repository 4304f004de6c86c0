"""What a browser may load for the page and who may request it; gradio itself is kept from fetching anything."""

from __future__ import annotations

from typing import Any, NoReturn

import anyio
from gradio import processing_utils, routes
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xfusion.apps.server.names import foreign_origin, host_name
from xfusion.apps.web.uploads import Uploads

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:;"
    " media-src 'self' blob:; frame-ancestors 'self'; form-action 'self'; base-uri 'self'; object-src 'none'"
)
"""What a browser may load for the page: nothing from another host."""
UPLOAD = "/gradio_api/upload"
"""Path of uploads."""
LINK = "/gradio_api/deep_link"
"""Path at which gradio would let anyone store a user's session permanently."""


async def _fetch_nothing(address: str, *_: Any, **__: Any) -> NoReturn:
    """Replaces gradio's fetching of a URL that a hand-made request names instead of an uploaded file."""
    raise HTTPException(403, f"this page fetches nothing from elsewhere, and not {address[:100]!r}")


# The files of every component go through the first of these; the second answers `file=http://...`.
processing_utils.async_ssrf_protected_get = _fetch_nothing
_routes: Any = routes  # imported there, and so a private name to type checkers
_routes.secure_url_stream_response = _fetch_nothing


class Guard:
    """Middleware: restricts what a browser may load, limits the size of requests and uploads, and checks the Host name.

    Otherwise, another site's page whose name is made to resolve to this machine could use this page (DNS rebinding), or make
    a browser send something to it.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, hosts: frozenset[str], uploads: Uploads):
        self.app, self.max_bytes, self.hosts, self.uploads = app, max_bytes, hosts, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.hosts and host_name(scope) not in self.hosts:
            await PlainTextResponse("this page has another name here", 403)(scope, receive, send)
            return
        if foreign_origin(scope) is not None:
            await PlainTextResponse("a page elsewhere may not use this one", 403)(scope, receive, send)
            return
        if scope["path"].rstrip("/") == LINK:
            await PlainTextResponse("this page keeps nothing to come back to", 404)(scope, receive, send)
            return
        size, uploads = 0, self.uploads
        is_upload = scope["path"].rstrip("/") == UPLOAD
        free_bytes = await anyio.to_thread.run_sync(uploads.free_bytes) if is_upload else 0

        async def receive_counted() -> Message:
            nonlocal size
            message = await receive()
            part = len(message.get("body", b""))
            size += part
            uploads.num_coming += part if is_upload else 0
            if size > self.max_bytes:
                raise HTTPException(413, f"more than the {self.max_bytes} bytes that this page takes")
            if is_upload and uploads.num_coming > free_bytes:
                raise HTTPException(
                    413, f"uploads fill the {uploads.max_bytes} bytes that this page keeps: try again in an hour"
                )
            return message

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["Referrer-Policy"] = "no-referrer"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            await self.app(scope, receive_counted, send_guarded)
        finally:
            uploads.num_coming -= size if is_upload else 0
