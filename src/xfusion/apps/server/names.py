"""By which names a server may be called.

A page elsewhere whose name is made to lead here could else use the server (DNS rebinding).
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


def called(scope: Scope) -> str:
    """The name, without a port, by which a request calls this server; empty where it names none."""
    asked = Headers(scope=scope).get("host", "").lower().rpartition(":")
    return (asked[0] if asked[2].isdigit() else "".join(asked)).removesuffix(".")
