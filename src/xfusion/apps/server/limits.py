"""What a server allows. Nothing is imported here: the command line shows these fields as its help."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a server; beyond them a request is refused in one line."""

    queue: int = 64
    """Answers that may wait (a request for n answers takes n places); beyond it 429 with Retry-After."""
    batch: int = 16
    """Answers of the same kind that are computed together."""
    seconds: float = 120.0
    """Deadline of a request, sending and waiting included; beyond it 504."""
    n: int = 8
    """Answers per request."""
    tokens: int = 512
    """Longest answer in tokens, and what an answer may have where the request names no length."""
    steps: int = 100
    """Steps of drawing."""
    pictures: int = 8
    """Pictures that the user shows in one request; the assistant's own beyond them are called ``(picture)``."""
    sounds: int = 8
    """Sounds in one request."""
    samples: int = 16_000_000
    """Samples of a sound that is sent, those of all its channels; a larger one is refused undecoded."""
    inputs: int = 256
    """Texts and pictures in one request for embeddings."""
    pixels: int = 16_000_000
    """Pixels of a picture that is sent; a larger one is refused undecoded."""
    body: int = 20_000_000
    """Bytes of a request."""
    bodies: int = 200_000_000
    """Bytes of all requests on their way into the queue; beyond it 429 with Retry-After, but one alone is taken."""
    characters: int = 100_000
    """Characters of a request's words."""
    connections: int = 512
    """Connections at the same time; a request beyond them gets a 503, and connections that ask nothing make room."""
    grace: int = 10
    """Seconds that open requests get when the server is told to stop."""
