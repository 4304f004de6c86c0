"""Which Host names and which origins a server accepts.

Otherwise, another site's page whose name is made to resolve to this machine could use the server (DNS rebinding). So could any
page that makes the browser send something here, even if it cannot read the answer (cross-site requests).
"""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers
from starlette.types import Scope

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1", "[::1]"})
"""Loopback names."""


def own_names(host: str) -> frozenset[str]:
    """The names of a server that listens on an address: the loopback names if only this machine can reach the server.

    Otherwise the names are unknown, and every name is accepted (an empty set).
    """
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host in LOOPBACK
    return LOOPBACK | {host} if loopback else frozenset()


def foreign_origin(scope: Scope, allowed: frozenset[str] = frozenset()) -> str | None:
    """The other site's origin for which a browser sends a request; None if there is none, or an allowed one.

    For loopback servers and over TLS, browsers say whether a page is the server's own (``Sec-Fetch-Site``). Otherwise the
    page's origin is compared with the request's Host name. Requests that only read are harmless: browsers do not show the
    answer to other sites' pages.

    Args:
        scope: ASGI scope of a request.
        allowed: allowed origins of other sites, such as ``http://localhost:3000``.
    """
    headers = Headers(scope=scope)
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if scope["method"] in ("GET", "HEAD", "OPTIONS") or origin in allowed:
        return None
    if site is not None:
        return None if site in ("same-origin", "none") else origin or f"a {site} page"
    if origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower():
        return None
    return origin


def host_name(scope: Scope) -> str:
    """The Host name of a request, without the port; empty if there is none."""
    host = Headers(scope=scope).get("host", "").lower().rpartition(":")
    return (host[0] if host[2].isdigit() else "".join(host)).removesuffix(".")
