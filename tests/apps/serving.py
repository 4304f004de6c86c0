"""A server on a real socket in a thread, over tiny packs."""

import base64
import contextlib
import dataclasses
import io
import socket
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from openai import OpenAI
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.table import make_base, make_model, model_config, randomise

from xfusion.apps.server import app
from xfusion.apps.server.batches import Continue, Words
from xfusion.apps.server.limits import Limits
from xfusion.apps.server.stopping import Server
from xfusion.backbone import Backbone
from xfusion.model import Model
from xfusion.objectives.next_token import NextToken
from xfusion.opening import Opening


class Running(NamedTuple):
    """A server that runs."""

    address: str
    app: object
    server: Server

    @property
    def batches(self):
        return self.app.state.server.batches

    def client(self, key="none", **options):
        return OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=60, **options)


def tiny_models(folder, *fusions):
    """Models of different fusions on one tiny base."""
    base = Backbone.load(str(make_base("llama", folder)))
    return {name.replace(" ", "-"): make_model(base, name) for name in fusions or ("dual tower",)}


def draw_only(base):
    """A model that draws and cannot caption."""
    model = Model(dataclasses.replace(model_config(base), text=NextToken.Config(weight=0.0)), base)
    randomise(model)
    assert model.capabilities == {"text", "draw"}
    return model.eval()


@contextlib.contextmanager
def opens_always(model):
    """While the block runs every answer of a model opens with a picture, of all words."""
    head = Opening(model.backbone.hidden_size).requires_grad_(False)
    for row in (head.opens, head.subject):
        torch.nn.init.zeros_(row.weight)
        torch.nn.init.constant_(row.bias, 5.0)
    model.opening = head
    try:
        yield
    finally:
        model.opening = None


def wrap_runs(monkeypatch, wrap):
    """Wrap the computation of a batch, of words alone or not: ``wrap`` is given the function and returns another."""
    for kind in (Continue, Words):
        monkeypatch.setattr(kind, "run", wrap(kind.run))


@contextlib.contextmanager
def running(models, limits=None, **options):
    """A server while the block runs."""
    application = app.create(models, limits or Limits(), **options)
    with socket.create_server(("127.0.0.1", 0)) as listener, _serving(application, listener, limits) as server:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", application, server)


@contextlib.contextmanager
def listening_at(application, listener):
    """The address of an application that answers at a socket while the block runs."""
    with listener, _serving(application, listener, None):
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def _serving(application, listener, limits):
    server = Server(application, (limits or Limits()).grace, (limits or Limits()).connections)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


def png(picture):
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def as_url(picture):
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def from_base64(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def from_url(url):
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return from_base64(data)


def apart(first, second):
    """Largest difference of two pictures in levels of 255."""
    assert first.size == second.size
    return int(numpy.abs(numpy.asarray(first).astype(int) - numpy.asarray(second)).max())
