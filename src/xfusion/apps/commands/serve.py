"""`serve`: serve packs through an OpenAI-compatible API."""

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
    """Serve packs over HTTP, for OpenAI's clients and compatible ones.

    Packs on the same base share it. With a key in the environment variable XFUSION_API_KEY or in the file of --keys, all
    requests need a key. Ctrl-C or SIGTERM stops new requests and gives running ones --limits.grace seconds; a second
    one ends them.
    """

    packs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PACK...")]
    """Folders, shipped packs' names, or hub ids; the first answers requests that name no model."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 means all network interfaces."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""
    keys: Path | None = None
    """File with one API key per line."""
    picture_hosts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="HOST...")] = ()
    """Hosts from which picture URLs may be fetched; by default pictures are accepted as data URLs only."""
    allowed_names: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ()
    """Names accepted in the Host header, besides the loopback names. By default, a server without keys on a loopback
    address accepts only loopback names, and any other server accepts every name."""
    allowed_origins: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ORIGIN...")] = ()
    """Origins of other sites' pages that may use this server in a browser, such as http://localhost:3000. By default none
    may; programs send no Origin and need none."""
    limits: Limits = field(default_factory=Limits)
    """Limits of requests."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    trust: bool = False
    """Import packages outside xfusion that a pack names."""

    def run(self, console: Console) -> Answer:
        self._check()
        keys = self._read_keys()
        # Listen first: a port in use is reported before anything is loaded, and early clients wait.
        with listen(self.host, self.port) as listener:
            try:
                from xfusion.apps.server import app
                from xfusion.apps.server.names import LOOPBACK, own_names
            except ImportError as error:
                raise UsageError(f"serve needs the package {error.name}: pip install 'xfusion[serve]'") from error
            models = load_models(self.packs, device=self.device, trust=self.trust)
            address = address_of(self.host, listener)
            for name, model in models.items():
                capabilities = ", ".join(sorted(model.capabilities))
                console.print(f"{name}: {capabilities}, on {model.backbone.source}", markup=False, soft_wrap=True)
            access = "with API keys" if keys else "open to all who reach it"
            console.print(f"serving at {address}/v1 ({access})", markup=False, soft_wrap=True)
            names = frozenset() if keys else own_names(self.host)
            if self.allowed_names:
                names |= LOOPBACK | {self.host} | {name.lower() for name in self.allowed_names}
            hosts, origins = frozenset(self.picture_hosts), frozenset(self.allowed_origins)
            asgi_app = app.create(models, self.limits, keys=keys, hosts=hosts, names=names, origins=origins)
            minutes = serve_until_stopped(asgi_app, listener, self.limits)
        return Answer(data={"address": address, "models": list(models)}, text=f"served for {minutes:.1f} minutes")

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

    def _read_keys(self) -> frozenset[str]:
        candidates = [os.environ.get(KEY_VARIABLE, "")]
        if self.keys is not None:
            candidates += self._key_lines(self.keys)
            if not any(key.strip() for key in candidates[1:]):
                raise UsageError(f"--keys {self.keys}: the file holds no key")
        return frozenset(key.strip() for key in candidates if key.strip())

    @staticmethod
    def _key_lines(path: Path) -> list[str]:
        try:
            return path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UsageError(f"--keys {path}: the file is not UTF-8 text ({error.reason} {error.start})") from error


def check_limits(limits: Limits) -> None:
    """Refuse limits that would reject every request.

    Raises:
        UsageError: one is below 1, or a batch is larger than a pass of the model.
    """
    from xfusion.generation import BATCH

    for name, value in vars(limits).items():
        if not value >= 1:  # nor not a number
            raise UsageError(f"--limits.{name} {value:g}: at least 1")
    if limits.batch > BATCH:
        raise UsageError(f"--limits.batch {limits.batch}: at most {BATCH}, the items of one pass")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; clients that connect before the server answers wait.

    Raises:
        UsageError: there is no such port, or it is in use.
    """
    if not 0 <= port < 65536:
        raise UsageError(f"--port {port}: choose 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, TypeError, UnicodeError) as error:  # the latter two: no host could have such a name
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot listen at {host} port {port}: {reason}; --port names another") from error


def address_of(host: str, listener: socket.socket) -> str:
    """The URL of a listener."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def serve_until_stopped(app: Any, listener: socket.socket, limits: Limits) -> float:
    """Serve until SIGINT or SIGTERM; open requests then get `Limits.grace` seconds. Returns the minutes served."""
    from xfusion.apps.server.stopping import Server

    start = time.perf_counter()
    # After stopping, uvicorn raises the signal again for earlier handlers: we have already handled it.
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, lambda *_: None)
    Server(app, limits.grace, limits.connections).run(sockets=[listener])
    return (time.perf_counter() - start) / 60
