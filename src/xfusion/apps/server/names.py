"""By which names a server may be called, and for which pages.

A page elsewhere whose name is made to lead here could else use the server (DNS rebinding), and so could any page that has the
browser send something here, whose answer it cannot read (cross-site requests).
"""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers
from starlette.types import Scope

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1", "[::1]"})
"""Names of this machine to itself."""


def own_names(host: str) -> frozenset[str]:
    """The names of a server that listens at an address: this machine's to itself where only it can reach the server.

    Elsewhere none is known, and every name is taken (an empty set).
    """
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host in LOOPBACK
    return LOOPBACK | {host} if loopback else frozenset()


def foreign(scope: Scope, allowed: frozenset[str] = frozenset()) -> str | None:
    """The page elsewhere for which a browser sends a request, or None where there is none, or an allowed one.

    Browsers say themselves whether a page is the server's own (``Sec-Fetch-Site``), to servers of this machine and behind TLS;
    else its origin is compared with the name by which the server is called. What only reads is nobody's harm: browsers show its
    answer to no page elsewhere.

    Args:
        scope: of a request.
        allowed: origins of pages elsewhere, such as ``http://localhost:3000``.
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


def called(scope: Scope) -> str:
    """The name, without a port, by which a request calls this server; empty where it names none."""
    asked = Headers(scope=scope).get("host", "").lower().rpartition(":")
    return (asked[0] if asked[2].isdigit() else "".join(asked)).removesuffix(".")
