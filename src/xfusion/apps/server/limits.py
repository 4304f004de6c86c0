"""Limits of a server. Nothing is imported here: the command line shows these fields as its help."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server; a request beyond them is refused with a one-line error."""

    queue: int = 64
    """Answers that may wait in the queue (a request for n answers takes n places); beyond it 429 with Retry-After."""
    batch: int = 16
    """Batch size: answers of the same kind that are computed together, at most 64."""
    words: int = 64
    """Greedy answers in words alone of one batch, no more than `batch`; 1 computes each alone, so that its bits never depend on
    other requests."""
    seconds: float = 120.0
    """Deadline of a request, including sending and waiting; beyond it 504."""
    n: int = 8
    """Answers per request."""
    tokens: int = 512
    """Longest answer in tokens; also the default length."""
    steps: int = 100
    """Sampling steps of a picture."""
    pictures: int = 8
    """The user's pictures in one request; the assistant's beyond them are replaced by ``(picture)``."""
    sounds: int = 8
    """Sounds in one request."""
    samples: int = 16_000_000
    """Samples of a sound, over all channels; a larger one is refused undecoded."""
    inputs: int = 256
    """Texts and pictures in one embeddings request."""
    pixels: int = 16_000_000
    """Pixels of a picture; a larger one is refused undecoded."""
    body: int = 20_000_000
    """Bytes of a request."""
    bodies: int = 200_000_000
    """Bytes of all requests being received; beyond it 429 with Retry-After, but a single one is accepted."""
    characters: int = 100_000
    """Characters of a request's text."""
    connections: int = 512
    """Simultaneous connections; a request beyond them gets a 503, and idle connections are closed to make room."""
    grace: int = 10
    """Seconds that open requests get when the server stops."""
