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
        options = {"registry": self.registry, "namespace": "xfusion"}
        self.requests = Counter("requests", "Requests by route and status.", ("route", "status"), **options)
        self.seconds = Histogram("request_seconds", "Seconds per request.", ("route",), **options)
        self.batch_size = Histogram("batch_size", "Answers per batch.", buckets=(1, 2, 4, 8, 16, 32, 64), **options)
        self.batch_seconds = Histogram("batch_seconds", "Seconds per batch.", **options)
        self.tokens = Counter("tokens", "Tokens of answers.", **options)
        self.pictures = Counter("pictures", "Pictures drawn.", **options)

    def watch(self, batches: Batches) -> None:
        """Export a queue's lengths."""
        options = {"registry": self.registry, "namespace": "xfusion"}
        Gauge("waiting", "Answers in the queue.", **options).set_function(lambda: len(batches.waiting))
        Gauge("running", "Answers being computed.", **options).set_function(lambda: batches.computing)

    def count_batch(self, jobs: list[Job], seconds: float) -> None:
        """Count a finished batch."""
        self.batch_size.observe(len(jobs))
        self.batch_seconds.observe(seconds)
        self.tokens.inc(sum(len(job.words.ids) for job in jobs))
        # Answers may also hold texts and embeddings.
        num_pictures = sum(isinstance(segment, PILImage.Image) for job in jobs for segment in job.answer)
        self.pictures.inc(num_pictures)

    def text(self) -> bytes:
        """The metrics in Prometheus' format."""
        return generate_latest(self.registry)


class CountingMiddleware:
    """Middleware that counts requests by route and status, without buffering streams."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_counted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)
