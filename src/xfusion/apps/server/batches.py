"""The queue in front of the model: bounded, first come first served, jobs of one kind computed together.

One thread computes, since a model has one engine; the event loop of the server only hands jobs over and hears of them.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from xfusion.apps.server.answers import Refused
from xfusion.data.sequence import XFusionError
from xfusion.generation import Progress, inpaint_batch

if TYPE_CHECKING:
    from torch import Tensor

    from xfusion.model import Model

log = logging.getLogger("xfusion.server")


class _Gone(Exception):
    """Nobody waits for a batch any more."""


class Words:
    """An answer in words while it grows: cut at a stop sequence, sent as soon as nothing can change it."""

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...] = ()):
        self.decode, self.stop = decode, stop
        self.ids: list[int] = []
        self.sent = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What may be sent once a token more is known."""
        self.ids.append(token)
        text = self.decode(self.ids)
        found = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if found:
            self.stopped = True
            return self._send(text[: min(found)])
        # Not yet: a letter whose bytes are still to come, and what may become a stop sequence.
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        most = len(text) + 1
        held = [k for stop in self.stop for k in range(1, min(len(stop), most)) if text.endswith(stop[:k])]
        return self._send(text[: len(text) - max(held, default=0)])

    def rest(self) -> str:
        """What is left to be sent when the answer is over."""
        return "" if self.stopped else self._send(self.decode(self.ids))

    def _send(self, text: str) -> str:
        if not text.startswith(self.sent):  # a tokenizer that tidies up spaces may yet change its mind
            return ""
        new, self.sent = text[len(self.sent) :], text
        return new


@dataclass(frozen=True, kw_only=True)
class Continue:
    """A call of `generate`: jobs for which it is equal go through together."""

    model: Model
    kinds: tuple[Any, ...]
    steps: int
    guidance: float | None
    max_tokens: int
    temperature: float
    top_p: float
    decides: bool = False
    """Whether the answer may open with a picture; jobs are then given conversations, not segments."""
    size: int | None = None
    """Side of a picture that opens so."""

    @property
    def together(self) -> bool:
        """Whether jobs share a pass: words alone are answered one by one, as the base answers them to everyone."""
        return not self.decides and any(kind != "text" for kind in self.kinds)

    def run(self, jobs: list[Job]) -> list[list[Any]]:
        """The generated segments of each job."""
        if self.decides:
            (job,) = jobs
            return [
                self.model.answer(
                    job.given,
                    draw="auto",
                    size=self.size,
                    seed=job.seed,
                    steps=self.steps,
                    guidance=self.guidance,
                    max_tokens=self.max_tokens,
                    temperature=self.temperature,
                    top_p=self.top_p,
                    progress=told(jobs),
                    listen=lambda _, token: job.hear(token),
                )
            ]
        return self.model.generate(
            [job.given for job in jobs],
            seeds=[job.seed for job in jobs],
            steps=self.steps,
            guidance=self.guidance,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            progress=told(jobs),
            listen=lambda row, token: jobs[row].hear(token),
        )


@dataclass(frozen=True, kw_only=True)
class Repaint:
    """A call of `inpaint_batch`."""

    model: Model
    steps: int
    guidance: float | None

    @property
    def together(self) -> bool:
        """Jobs share a pass."""
        return True

    def run(self, jobs: list[Job]) -> list[list[Any]]:
        """The picture of each job."""
        given, seeds = [job.given for job in jobs], [job.seed for job in jobs]
        settings = {"steps": self.steps, "guidance": self.guidance, "progress": told(jobs)}
        return [[picture] for picture in inpaint_batch(self.model, given, seeds=seeds, **settings)]


@dataclass(frozen=True, kw_only=True)
class Embed:
    """A call of `embed`; a job is a request's list of texts and pictures."""

    model: Model

    @property
    def together(self) -> bool:
        """Jobs share a pass: each item is a row of its own."""
        return True

    def run(self, jobs: list[Job]) -> list[list[Any]]:
        """The vectors of each job, ``[items, width]``."""
        items = [item for job in jobs for item in job.given]
        vectors = self.model.embed(items, progress=_awaited(jobs))
        return [list(part) for part in vectors.split([len(job.given) for job in jobs])]


class Work(Protocol):
    """What jobs are computed by; jobs whose work is equal may go through together."""

    @property
    def model(self) -> Model:
        """The model that computes."""
        ...

    @property
    def together(self) -> bool:
        """Whether jobs share a pass."""
        ...

    def run(self, jobs: list[Job]) -> list[list[Any]]:
        """The answer of each job."""
        ...


def _awaited(jobs: list[Job]) -> Callable[[int, int], None]:
    """A progress that ends between two groups of items once all who asked are gone."""

    def progress(done: int, total: int) -> None:
        del done, total
        if all(job.dropped for job in jobs):
            raise _Gone

    return progress


def told(jobs: list[Job]) -> Progress:
    """A progress of drawing that shows each job its estimate, and ends between two steps once all who asked are gone."""

    def progress(done: int, total: int, estimate: Tensor | None) -> None:
        if all(job.dropped for job in jobs):
            raise _Gone
        for row, job in enumerate(jobs):
            if job.watch is not None and estimate is not None:
                job.watch(done, total, estimate[row])

    return progress


@dataclass(eq=False, kw_only=True)
class Job:
    """One answer that is to be computed."""

    work: Work
    given: Any
    """What it is computed from, as the work takes it."""
    seed: int
    index: int
    """Which of a request's answers it is."""
    words: Words
    tell: Callable[[Job, str | None], None]
    """Called by the computing thread with new words, and with None when the answer is there or cannot be had."""
    watch: Callable[[int, int, Tensor], None] | None = None
    """Called by the computing thread after each step of drawing: steps done, steps in all, the clean estimate ``[M, P]``."""
    answer: list[Any] = field(default_factory=list)
    error: Exception | None = None
    dropped: bool = False
    """Nobody waits for it any more."""
    ended: bool = False
    """The answer is there, or cannot be had."""

    def hear(self, token: int) -> bool:
        """Take a token of the answer; False where no more is wanted."""
        if self.dropped:
            return False
        new = self.words.add(token)
        if new:
            self.tell(self, new)
        return not self.words.stopped

    def end(self, answer: list[Any] | None = None, error: Exception | None = None) -> None:
        """Say that it is over; what is over stays as it ended."""
        if self.ended:
            return
        self.answer, self.error = answer or [], error
        rest = self.words.rest() if error is None else ""
        if rest:
            self.tell(self, rest)
        self.ended = True
        self.tell(self, None)


class Batches:
    """The queue and the thread that empties it."""

    def __init__(self, queue: int, batch: int, watch: Callable[[list[Job], float], None] = lambda jobs, seconds: None):
        """``watch`` is told the jobs and the seconds of every batch."""
        self.most, self.batch, self.watch = queue, batch, watch
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.open = True
        self._seconds = 1.0  # per answer, as it went lately
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="xfusion-batches", daemon=True)

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    def refuse(self) -> None:
        """Take no more jobs, and end those that wait; what runs goes on."""
        with self._changed:
            self.open = False
            waiting = list(self.waiting)
            self.waiting.clear()
            self._changed.notify_all()
        for job in waiting:
            job.end(error=stopping())

    def close(self, seconds: float) -> None:
        """Refuse, and let the batch that runs end, if it does in this time."""
        self.refuse()
        self._thread.join(seconds)

    def put(self, jobs: list[Job]) -> None:
        """Queue the jobs of a request, all or none.

        Raises:
            Refused: the queue is full, or the server is stopping.
        """
        with self._changed:
            self._check(len(self.waiting), len(jobs))
            self.waiting.extend(jobs)
            self._changed.notify_all()

    def check(self, coming: int) -> None:
        """Refuse a request before anything is done for it, with ``coming`` others being read that will wait for one answer each.

        Raises:
            Refused: as `put`.
        """
        with self._changed:
            self._check(len(self.waiting) + coming, 1)

    def _check(self, taken: int, wanted: int) -> None:
        if not self.open:
            raise stopping()
        if taken + wanted > self.most:
            seconds = min(60.0, self._seconds * taken)
            raise Refused(
                429,
                f"{taken} answers wait, and no more than {self.most} may: try again later",
                code="queue_full",
                headers={"Retry-After": str(max(1, math.ceil(seconds)))},
            )

    def forget(self, jobs: list[Job]) -> None:
        """Nobody waits for these any more: their places are free at once, and what runs ends at its next step."""
        with self._changed:
            for job in jobs:
                job.dropped = True
            if any(job.dropped for job in self.waiting):
                self.waiting = deque(job for job in self.waiting if not job.dropped)

    def _next(self) -> list[Job]:
        """The oldest job and those that go through with it; none once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or not self.open)
            if not self.open:
                return []
            work = self.waiting[0].work
            most = self.batch if work.together else 1
            self.running = [job for job in self.waiting if job.work == work][:most]
            chosen = set(map(id, self.running))
            self.waiting = deque(job for job in self.waiting if id(job) not in chosen)
            return self.running

    def _work(self) -> None:
        while jobs := self._next():
            began = time.perf_counter()
            try:
                self._run(jobs)
                seconds = time.perf_counter() - began
                self._seconds += 0.2 * (seconds / len(jobs) - self._seconds)
                self.watch(jobs, seconds)
            except Exception as error:  # without this thread nobody would ever be answered again
                log.exception("the end of a batch of %d failed", len(jobs))
                for job in jobs:
                    job.end(error=error)
            self.running = []

    def _run(self, jobs: list[Job]) -> None:
        try:
            answers = jobs[0].work.run(jobs)
        except _Gone:
            return
        except Exception as error:  # whatever it is, those who wait must hear of it and the next batch must run
            if len(jobs) > 1 and not any(job.words.ids for job in jobs):
                for job in jobs:  # one of them must not take the others with it
                    self._run([job])
                return
            if not isinstance(error, XFusionError):
                log.exception("a batch of %d failed", len(jobs))
            for job in jobs:
                job.end(error=error)
            return
        for job, answer in zip(jobs, answers, strict=True):
            job.end(answer)


def stopping() -> Refused:
    """What a request hears that is not answered any more."""
    return Refused(503, "the server is stopping", code="stopping", headers={"Retry-After": "5"})
