"""Error responses: a refused request, an unknown path, an internal error."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from xfusion.apps.server.answers import Refused
from xfusion.apps.server.reading import as_refused

CLOSED = 499
"""Status, in the metrics, of a request whose client disconnected."""


def response(error: Refused) -> JSONResponse:
    """The response to a refused request."""
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def refused_request(_: Request, error: Exception) -> Response:
    """A route refused the request."""
    assert isinstance(error, Refused)
    return response(error)


async def no_route(request: Request, error: Exception) -> Response:
    """An unknown path, or one that needs another method."""
    assert isinstance(error, HTTPException)
    path, allowed_methods = request.url.path[:200], (error.headers or {}).get("Allow")
    if error.status_code == 405 and allowed_methods:
        return response(
            Refused(
                405,
                f"{path} takes {allowed_methods}, not {request.method}",
                code="method_not_allowed",
                headers=error.headers,
            )
        )
    if error.status_code == 404:
        paths = ", ".join(sorted({route.path for route in request.app.routes if "{" not in route.path}))
        return response(Refused(404, f"there is no {path} here, only {paths}", code="unknown_url"))
    return response(Refused(error.status_code, f"{request.method} {path}: {error.detail}", headers=error.headers))


async def client_disconnected(_: Request, error: Exception) -> Response:
    """The client disconnected."""
    del error
    return Response(status_code=CLOSED)  # only the metrics read it


async def internal_error(_: Request, error: Exception) -> Response:
    """An internal error: it is logged, and its details are not sent to the client."""
    return response(as_refused(error))
