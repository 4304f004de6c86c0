"""`serve`: packs behind routes that OpenAI's clients know."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from xfusion.apps.commands.base import Answer, UsageError, Verb, load_models
from xfusion.apps.server.limits import Limits

KEY_VARIABLE = "XFUSION_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Serve(Verb):
    """Serve packs over HTTP, for OpenAI's clients and all that speak like them.

    Packs on the same base share it. The key in the environment variable XFUSION_API_KEY, or the file of --keys, closes
    the server to all others. Ctrl-C or SIGTERM: no new requests, those that run get --limits.grace seconds, a second one
    ends them.
    """

    packs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PACK...")]
    """Folders, shipped packs' names, or hub ids; the first answers requests that name no model."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every network that this machine is in."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    keys: Path | None = None
    """File with an API key per line."""
    picture_hosts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="HOST...")] = ()
    """Hosts whose pictures may be named by address; without one, pictures come as data URLs alone."""
    allowed_names: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ()
    """Names that requests may call this server by (their Host), besides those of this machine to itself. Without one, a
    server without keys at a loopback address takes only the latter, and any other server takes every name."""
    allowed_origins: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ORIGIN...")] = ()
    """Pages elsewhere that may use this server in a browser (their Origin), such as http://localhost:3000. Without one, no page
    may; programs say no Origin and need none."""
    limits: Limits = field(default_factory=Limits)
    """What a request may ask for."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    trust: bool = False
    """Import packages outside xfusion that a pack names."""

    def run(self, people: Console) -> Answer:
        self._check()
        keys = self._keys()
        # Listening comes first: a port that is taken is known before anything is loaded, and early clients wait.
        with listen(self.host, self.port) as listener:
            try:
                from xfusion.apps.server import app
                from xfusion.apps.server.names import LOOPBACK, own_names
            except ImportError as error:
                raise UsageError(f"serve needs the package {error.name}: pip install 'xfusion[serve]'") from error
            models = load_models(self.packs, device=self.device, trust=self.trust)
            where = address_of(self.host, listener)
            for name, model in models.items():
                able = ", ".join(sorted(model.capabilities))
                people.print(f"{name}: {able}, on {model.backbone.source}", markup=False, soft_wrap=True)
            door = "with API keys" if keys else "open to all who reach it"
            people.print(f"serving at {where}/v1 ({door})", markup=False, soft_wrap=True)
            names = frozenset() if keys else own_names(self.host)
            if self.allowed_names:
                names |= LOOPBACK | {self.host} | {name.lower() for name in self.allowed_names}
            hosts, origins = frozenset(self.picture_hosts), frozenset(self.allowed_origins)
            served = app.create(models, self.limits, keys=keys, hosts=hosts, names=names, origins=origins)
            minutes = serve_until_stopped(served, listener, self.limits)
        return Answer(data={"address": where, "models": list(models)}, text=f"served for {minutes:.1f} minutes")

    def _check(self) -> None:
        if not self.packs:
            raise UsageError("name at least one pack to serve, such as emoji")
        for origin in self.allowed_origins:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", origin):
                raise UsageError(
                    f"--allowed-origins {origin}: an origin is a scheme, a name and perhaps a port, such as"
                    " http://localhost:3000"
                )
        check_limits(self.limits)

    def _keys(self) -> frozenset[str]:
        found = [os.environ.get(KEY_VARIABLE, "")]
        if self.keys is not None:
            found += self.keys.read_text(encoding="utf-8").splitlines()
            if not any(key.strip() for key in found[1:]):
                raise UsageError(f"--keys {self.keys}: the file holds no key")
        return frozenset(key.strip() for key in found if key.strip())


def check_limits(limits: Limits) -> None:
    """Refuse limits that let nothing through.

    Raises:
        UsageError: one is below 1.
    """
    for name, value in vars(limits).items():
        if value < 1:
            raise UsageError(f"--limits.{name} {value:g}: at least 1")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; clients that come before anything answers wait.

    Raises:
        UsageError: there is no such port, or it is taken.
    """
    if not 0 <= port < 65536:
        raise UsageError(f"--port {port}: choose 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"cannot listen at {host} port {port}: {reason}; --port names another") from error


def address_of(host: str, listener: socket.socket) -> str:
    """Where a browser or a client finds a listener."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def serve_until_stopped(app: Any, listener: socket.socket, limits: Limits) -> float:
    """Answer until SIGINT or SIGTERM; open requests then get `Limits.grace` seconds. Returns the minutes that it went."""
    from xfusion.apps.server.stopping import Server

    began = time.perf_counter()
    # Having stopped, uvicorn raises the signal once more for whoever had set a handler: for us it was answered.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    Server(app, limits.grace, limits.connections).run(sockets=[listener])
    return (time.perf_counter() - began) / 60
