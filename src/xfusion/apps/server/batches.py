"""The queue in front of the model: bounded, first come first served, jobs of one kind computed as one batch.

One thread computes, since a model has one engine; the server's event loop only submits jobs and receives their results.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from xfusion.apps.server.answers import Refused
from xfusion.data.sequence import XFusionError
from xfusion.generation import (
    Progress,
    TextStream,
    answer_with_pictures,
    conversation,
    inpaint_batch,
    openings,
    rows_together,
    text_only_tokens,
)

if TYPE_CHECKING:
    from torch import Tensor

    from xfusion.model import Model

log = logging.getLogger("xfusion.server")


class _Abandoned(Exception):
    """No client waits for a batch any more."""


@dataclass(frozen=True, kw_only=True)
class Continue:
    """A call of `generate`; jobs whose call is equal are computed together."""

    model: Model
    kinds: tuple[Any, ...]
    steps: int
    guidance: float | None
    max_tokens: int
    temperature: float
    top_p: float
    one_line: bool = False
    """Whether a line break ends the answer, if there are pictures or sounds."""
    opens: bool = False
    """Whether the answer starts with a picture that the opening head asked for; jobs are then given its prompt, not segments."""
    size: int | None = None
    """Side of such a first picture."""

    def choose(self, alike: list[Job], most: int) -> list[Job]:
        """All that fit; of text alone, which is sampled here, the oldest: its seed then gives the text of a single call."""
        return alike[: most if self.opens or any(kind != "text" for kind in self.kinds) else 1]

    def run(self, jobs: list[Job]) -> list[list[Any]]:
        """The generated segments of each job."""
        settings: dict[str, Any] = {
            "seeds": [job.seed for job in jobs],
            "steps": self.steps,
            "guidance": self.guidance,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "one_line": self.one_line,
            "progress": drawing_progress(jobs),
            "listen": lambda row, token: jobs[row].hear(token),
            "show": lambda row, item: jobs[row].show(item),
        }
        inputs = [job.inputs for job in jobs]
        if self.opens:
            return answer_with_pictures(self.model, inputs, size=self.size, **settings)
        return self.model.generate(inputs, **settings)


@dataclass(frozen=True, kw_only=True)
class Words:
    """Greedy answers of the base alone to text-only prompts, each with its own length and stop sequences.

    Jobs are given a list of one `Text`. Those that wait together are computed as one padded batch, in which jobs that ask for
    the same share a row. A single row has no padding, and is the single call.
    """

    model: Model
    rows: int
    """Most rows of a batch."""

    def choose(self, alike: list[Job], most: int) -> list[Job]:
        """The oldest job, and those whose prompts share a batch with it (`rows_together`)."""
        groups = _by_request(alike)
        lengths, max_tokens = [len(ids) for ids, _, _ in groups], [count for _, _, count in groups]
        indices = rows_together(self.model, lengths, max_tokens, min(self.rows, most))
        groups_of_jobs = list(groups.values())
        return [job for index in indices for job in groups_of_jobs[index]][:most]

    def run(self, jobs: list[Job]) -> list[list[Any]]:
        """The text of each job; a job ends as soon as its text does."""
        groups = _by_request(jobs)
        rows = list(groups.values())

        def listen(row: int, token: int) -> bool:
            heard = [job.hear(token) for job in rows[row]]  # all of them, whatever the first says
            return any(heard)

        def ended(row: int, ids: list[int]) -> None:
            for job in rows[row]:
                job.end([self.model.backbone.decode(ids)])

        text_only_tokens(
            self.model,
            [ids for ids, _, _ in groups],
            max_tokens=[count for _, _, count in groups],
            listen=listen,
            ended=ended,
        )
        return [job.answer for job in jobs]


def _by_request(jobs: list[Job]) -> dict[tuple[tuple[int, ...], tuple[str, ...], int], list[Job]]:
    """Jobs of `Words` by prompt, stop sequences and longest answer, in order."""
    groups: dict[tuple[tuple[int, ...], tuple[str, ...], int], list[Job]] = {}
    for job in jobs:
        (prompt,) = job.inputs
        groups.setdefault((prompt.ids, job.words.stop, job.words.max_tokens), []).append(job)
    return groups


@dataclass(frozen=True, kw_only=True)
class Decide:
    """Decide whether the answers to conversations start with a picture. Each job then gets its call, and waits for it."""

    answer: Continue
    """The call of an answer that starts with a picture, but for its prompt and size."""
    words: Work
    """The call of any other."""
    size: int | None
    """Side of a first picture."""

    @property
    def model(self) -> Model:
        """The model that decides."""
        return self.answer.model

    def choose(self, alike: list[Job], most: int) -> list[Job]:
        """All that fit: the head decides about them in one pass."""
        return alike[:most]

    def run(self, jobs: list[Job]) -> None:
        """Give each job the work and the input of its answer."""
        prompts = openings(self.model, [job.inputs for job in jobs], "auto")
        for job, prompt in zip(jobs, prompts, strict=True):
            if prompt is None:
                job.inputs = conversation(self.model, job.inputs, own_pictures=False)
                job.work = self.words
            else:
                job.inputs, job.work = (
                    prompt,
                    replace(self.answer, kinds=(), one_line=False, opens=True, size=self.size),
                )


@dataclass(frozen=True, kw_only=True)
class Repaint:
    """A call of `inpaint_batch`."""

    model: Model
    steps: int
    guidance: float | None

    def choose(self, alike: list[Job], most: int) -> list[Job]:
        """All that fit share a pass."""
        return alike[:most]

    def run(self, jobs: list[Job]) -> list[list[Any]]:
        """The picture of each job."""
        inputs, seeds = [job.inputs for job in jobs], [job.seed for job in jobs]
        settings = {"steps": self.steps, "guidance": self.guidance, "progress": drawing_progress(jobs)}
        return [[picture] for picture in inpaint_batch(self.model, inputs, seeds=seeds, **settings)]


@dataclass(frozen=True, kw_only=True)
class Embed:
    """A call of `embed`; a job is a request's list of texts and pictures."""

    model: Model

    def choose(self, alike: list[Job], most: int) -> list[Job]:
        """All that fit share a pass, with one row per item."""
        return alike[:most]

    def run(self, jobs: list[Job]) -> list[list[Any]]:
        """The embeddings of each job, ``[items, width]``."""
        items = [item for job in jobs for item in job.inputs]
        vectors = self.model.embed(items, progress=embedding_progress(jobs))
        return [list(part) for part in vectors.split([len(job.inputs) for job in jobs])]


class Work(Protocol):
    """The computation of jobs; jobs whose work is equal may be computed together."""

    @property
    def model(self) -> Model:
        """The model that computes."""
        ...

    def choose(self, alike: list[Job], most: int) -> list[Job]:
        """Which of the waiting jobs whose work is equal, oldest first, share a pass: the oldest, and at most this many."""
        ...

    def run(self, jobs: list[Job]) -> list[list[Any]] | None:
        """The answer of each job; None if the jobs were given other work instead."""
        ...


def embedding_progress(jobs: list[Job]) -> Callable[[int, int], None]:
    """A progress callback that stops between two groups of items once all clients are gone."""

    def progress(done: int, total: int) -> None:
        del done, total
        if all(job.dropped for job in jobs):
            raise _Abandoned

    return progress


def drawing_progress(jobs: list[Job]) -> Progress:
    """A progress callback of drawing: passes each job its estimate, and stops between two steps once all clients are gone."""

    def progress(done: int, total: int, estimate: Tensor | None) -> None:
        if all(job.dropped for job in jobs):
            raise _Abandoned
        for row, job in enumerate(jobs):
            if job.watch is not None and estimate is not None:
                job.watch(done, total, estimate[row])

    return progress


@dataclass(eq=False, kw_only=True)
class Job:
    """One answer to compute."""

    work: Work
    inputs: Any
    """The input, in the format of the work."""
    seed: int
    index: int
    """Index of the answer within its request."""
    words: TextStream
    notify: Callable[[Job, Any], None]
    """Called by the computing thread with new text, with each picture as soon as it is drawn, and with None when the answer is
    done or has failed."""
    watch: Callable[[int, int, Tensor], None] | None = None
    """Called by the computing thread after each sampling step: steps done, total steps, the clean estimate ``[M, P]``."""
    answer: list[Any] = field(default_factory=list)
    num_shown: int = 0
    """Pictures of the answer that were passed on."""
    num_drawn: int = 0
    """Pictures of the answer that this run has drawn; a second run of a failed batch passes none on again."""
    error: Exception | None = None
    dropped: bool = False
    """No client waits for it any more."""
    ended: bool = False
    """The answer is done or has failed."""
    is_answered: bool = False
    """The answer is done, and a client waited for it."""

    def hear(self, token: int) -> bool:
        """Accept a token of the answer; False if no more are wanted."""
        if self.dropped:
            return False
        new = self.words.add(token)
        if new:
            self.notify(self, new)
        return not self.words.stopped

    def show(self, picture: Any) -> None:
        """Pass on a picture of the answer; text may follow it."""
        self.num_drawn += 1
        if self.num_drawn > self.num_shown:
            self.num_shown = self.num_drawn
            self.notify(self, picture)

    def end(self, answer: list[Any] | None = None, error: Exception | None = None) -> None:
        """End the job with an answer or an error; ending it again has no effect."""
        if self.ended:
            return
        self.answer, self.error = answer or [], error
        self.is_answered = error is None and not self.dropped
        rest = self.words.rest() if error is None else ""
        if rest:
            self.notify(self, rest)
        self.ended = True
        self.notify(self, None)


class Batches:
    """The queue and the thread that empties it."""

    def __init__(self, queue: int, batch: int, watch: Callable[[list[Job], float], None] = lambda jobs, seconds: None):
        """``watch`` is called with the jobs and the seconds of every batch."""
        self.capacity, self.batch, self.watch = queue, batch, watch
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.open = True
        self._seconds = 1.0  # recent time per answer
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="xfusion-batches", daemon=True)

    def start(self) -> None:
        """Start the computing thread."""
        self._thread.start()

    def refuse(self) -> None:
        """Accept no more jobs, and end the waiting ones; running ones continue."""
        with self._changed:
            self.open = False
            waiting = list(self.waiting)
            self.waiting.clear()
            self._changed.notify_all()
        for job in waiting:
            job.end(error=stopping())

    def close(self, seconds: float) -> None:
        """Refuse new jobs, and wait at most this long for the running batch."""
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

    def check(self, num_arriving: int) -> None:
        """Refuse a request before any work on it; ``num_arriving`` others are being read and will need one place each.

        Raises:
            Refused: as `put`.
        """
        with self._changed:
            self._check(len(self.waiting) + num_arriving, 1)

    def _check(self, num_waiting: int, num_new: int) -> None:
        if not self.open:
            raise stopping()
        if num_waiting + num_new > self.capacity:
            seconds = min(60.0, self._seconds * (num_waiting + self.computing))
            raise Refused(
                429,
                f"{num_waiting} answers wait, and no more than {self.capacity} may: try again later",
                code="queue_full",
                headers={"Retry-After": str(max(1, math.ceil(seconds)))},
            )

    def forget(self, jobs: list[Job]) -> None:
        """Drop jobs that no client waits for: their places are free at once, and running ones stop at their next step."""
        with self._changed:
            for job in jobs:
                job.dropped = True
            if any(job.dropped for job in self.waiting):
                self.waiting = deque(job for job in self.waiting if not job.dropped)

    @property
    def computing(self) -> int:
        """The number of answers being computed; the others of a running batch have ended."""
        return sum(not job.ended for job in self.running)

    def before(self, job: Job) -> int:
        """The number of answers before a waiting one, those being computed included; 0 for one that does not wait."""
        with self._changed:
            return self.computing + self.waiting.index(job) if job in self.waiting else 0

    def _next(self) -> list[Job]:
        """The oldest job and those that are batched with it; empty once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or not self.open)
            if not self.open:
                return []
            work = self.waiting[0].work
            self.running = work.choose([job for job in self.waiting if job.work == work], self.batch)
            running_ids = set(map(id, self.running))
            self.waiting = deque(job for job in self.waiting if id(job) not in running_ids)
            return self.running

    def _work(self) -> None:
        while jobs := self._next():
            start, work = time.perf_counter(), jobs[0].work
            try:
                self._run(jobs)
                if again := [job for job in jobs if job.work != work and not job.ended]:
                    self._put_back(again)
                else:
                    seconds = time.perf_counter() - start
                    if any(job.is_answered for job in jobs):  # else it ended before its time
                        self._seconds += 0.2 * (seconds / len(jobs) - self._seconds)
                    self.watch(jobs, seconds)
            except Exception as error:  # without this thread no request would ever be answered again
                log.exception("the end of a batch of %d failed", len(jobs))
                for job in jobs:
                    job.end(error=error)
            self.running = []

    def _put_back(self, jobs: list[Job]) -> None:
        """Let jobs wait for their new work, where they were: in front of the others."""
        with self._changed:
            if self.open:
                self.waiting.extendleft(job for job in reversed(jobs) if not job.dropped)
                return
        for job in jobs:
            job.end(error=stopping())

    def _run(self, jobs: list[Job]) -> None:
        try:
            answers = jobs[0].work.run(jobs)
        except _Abandoned:
            return
        except Exception as error:  # whatever it is, clients must be notified and the next batch must run
            if len(jobs) == 1 or any(job.words.ids for job in jobs):
                if not isinstance(error, XFusionError):
                    log.exception("a batch of %d failed", len(jobs))
                for job in jobs:
                    job.end(error=error.with_traceback(None))  # its frames hold the caches of the batch
                return
            log.warning("a batch of %d failed and is computed one by one: %s", len(jobs), repr(error))
        else:
            for job, answer in zip(jobs, answers or (), strict=answers is not None):
                job.end(answer)
            return
        # Behind the handler, since as long as the error lives so do the caches of the batch, which may have run out of memory.
        for job in jobs:  # one job must not fail the others
            job.num_drawn = 0
            self._run([job])


def stopping() -> Refused:
    """The error for a request that is no longer answered."""
    return Refused(503, "the server is stopping", code="stopping", headers={"Retry-After": "5"})
