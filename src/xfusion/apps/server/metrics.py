"""The metrics of `/metrics`: requests by route and status, batches, tokens, pictures, and the queue."""

from __future__ import annotations

import time

from PIL import Image as PILImage
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xfusion.apps.server.batches import Batches, Job


class Metrics:
    """Counters of one server."""

    def __init__(self):
        self.registry = CollectorRegistry()
        named = {"registry": self.registry, "namespace": "xfusion"}
        self.requests = Counter("requests", "Requests by route and status.", ("route", "status"), **named)
        self.seconds = Histogram("request_seconds", "Seconds per request.", ("route",), **named)
        self.batch_size = Histogram("batch_size", "Answers per batch.", buckets=(1, 2, 4, 8, 16, 32, 64), **named)
        self.batch_seconds = Histogram("batch_seconds", "Seconds per batch.", **named)
        self.tokens = Counter("tokens", "Tokens of answers.", **named)
        self.pictures = Counter("pictures", "Pictures drawn.", **named)

    def watch(self, batches: Batches) -> None:
        """Export a queue's lengths."""
        named = {"registry": self.registry, "namespace": "xfusion"}
        Gauge("waiting", "Answers in the queue.", **named).set_function(lambda: len(batches.waiting))
        Gauge("running", "Answers being computed.", **named).set_function(lambda: len(batches.running))

    def computed(self, jobs: list[Job], seconds: float) -> None:
        """Count a finished batch."""
        self.batch_size.observe(len(jobs))
        self.batch_seconds.observe(seconds)
        self.tokens.inc(sum(len(job.words.ids) for job in jobs))
        drawn = sum(isinstance(segment, PILImage.Image) for job in jobs for segment in job.answer)  # not embeddings
        self.pictures.inc(drawn)

    def text(self) -> bytes:
        """The metrics in Prometheus' format."""
        return generate_latest(self.registry)


class Counted:
    """Middleware that counts requests by route and status, without buffering streams."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - began)
