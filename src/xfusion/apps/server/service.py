"""What all requests of a server share: models, limits, queue, reader threads, and shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from xfusion.apps.server.answers import Refused, now
from xfusion.apps.server.batches import Batches, Job
from xfusion.apps.server.limits import Limits
from xfusion.apps.server.metrics import Metrics
from xfusion.model import Model

READERS = 2
"""Threads that read requests (decode pictures, tokenize text) outside the event loop."""


class Service:
    """Models behind one queue.

    Args:
        models: models to serve, by name; the first answers requests that name none.
        limits: limits of requests.
        hosts: hosts from which pictures are fetched.
    """

    def __init__(self, models: Mapping[str, Model], limits: Limits, hosts: frozenset[str]):
        self.models, self.limits, self.hosts = dict(models), limits, hosts
        self.facts = {
            name: {"pack_fingerprint": model.fingerprint, "base_fingerprint": model.backbone.fingerprint}
            for name, model in self.models.items()
        }
        self.since = now()
        self.metrics = Metrics()
        self.batches = Batches(limits.queue, limits.batch, self.metrics.count_batch)
        self.metrics.watch(self.batches)
        # A dedicated pool: a thread whose request was abandoned still occupies a reader until it ends.
        self.readers = ThreadPoolExecutor(READERS, thread_name_prefix="xfusion-reader")
        self.arriving = set[asyncio.Timeout]()
        self.held_bytes = 0
        """Bytes of the requests that are not yet in the queue."""
        self.reading = 0
        """Number of requests that are not yet in the queue."""
        self.ended = asyncio.Event()

    def begin_stop(self) -> None:
        """Accept no more requests, and end the waiting ones; running ones continue."""
        self.batches.refuse()
        for limit in self.arriving:
            if not limit.expired():
                limit.reschedule(0)

    def end_stop(self) -> None:
        """End running requests, and notify their clients."""
        self.ended.set()

    def model(self, name: str | None) -> tuple[str, Model]:
        """A served model, and its name.

        Raises:
            Refused: no model has this name.
        """
        name = next(iter(self.models)) if name is None else name
        if name not in self.models:
            names = ", ".join(self.models)
            raise Refused(404, f"there is no model {name[:100]!r} here, only {names}", code="model_not_found")
        return name, self.models[name]

    def picture_facts(self, name: str, job: Job) -> dict[str, Any]:
        """The facts stored in a PNG."""
        work: Any = job.work
        guidance = work.model.guidance if work.guidance is None else work.guidance
        return {"seed": job.seed, "steps": work.steps, "guidance": guidance, **self.facts[name]}
