"""The page's requests as jobs of the server's queue: streamed text and previews, stoppable between two steps.

Nothing here depends on the page's layout. A user is identified by a string, so that users can stop their own work.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL.Image import Image as Picture
from torch import Tensor

from xfusion.apps.chat import request_message
from xfusion.apps.commands.pictures import file_name, save, unused_path
from xfusion.apps.server import reading, requests
from xfusion.apps.server.answers import Refused
from xfusion.apps.server.batches import Batches, Job, drawing_progress
from xfusion.apps.server.limits import Limits
from xfusion.apps.web import brush
from xfusion.data import pictures
from xfusion.data.sequence import Text
from xfusion.evaluation.attention import Attention, drawing_attention
from xfusion.generation import TextStream, draw_tokens
from xfusion.model import Model

PREVIEW_SECONDS = 0.2
"""Time between two previews of a picture: decoding and sending one slows down drawing."""
LISTEN_SECONDS = 0.1
"""How soon a listener notices a stop."""
WAITING_SECONDS = 1.0
"""How often a listener is told that there is nothing new: a page that was closed is noticed only where it is told something."""
KEPT_SECONDS = 3600.0
"""How long a file is kept after it was written."""
STRIP = 8
"""Estimates shown for one denoising."""


class Stopped(Exception):
    """The user stopped the request."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Nothing came for `WAITING_SECONDS`."""

    before: int
    """Answers that are computed first; 0 if it is being computed."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A picture while it is drawn: the model's clean estimate after some steps."""

    index: int
    """Index among the requested pictures."""
    done: int
    total: int
    picture: Picture


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A finished picture."""

    index: int
    path: Path
    """A PNG that stores `facts`."""
    picture: Picture
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Look:
    """Draws one picture from its prompt, ``job.inputs``, and computes what its tokens attend to."""

    model: Model
    steps: int
    guidance: float | None

    def choose(self, alike: list[Job], most: int) -> list[Job]:
        """The oldest: each is computed alone."""
        return alike[: min(1, most)]

    def run(self, jobs: list[Job]) -> list[list[Any]]:
        """The picture and its `Attention`."""
        (job,), model = jobs, self.model
        ids = model.backbone.encode(job.inputs)
        context = (Text(ids=ids),) if ids else ()
        size = model.image.sizes[0]
        settings = {"steps": self.steps, "guidance": self.guidance, "progress": drawing_progress(jobs)}
        tokens = draw_tokens(model, [context], size, seeds=[job.seed], **settings)
        (picture,) = model.image.to_pil(model.image.decode(tokens, size))
        return [[picture, drawing_attention(model, job.inputs, tokens[0], model.image.grid(size))]]


class Desk:
    """Accepts the page's requests and streams their results.

    Args:
        models: packs by name.
        limits: limits of requests.
        folder: where drawn pictures are written.
    """

    def __init__(self, models: Mapping[str, Model], limits: Limits, folder: Path):
        self.models, self.limits, self.folder = dict(models), limits, folder
        self.batches = Batches(limits.queue, limits.batch)
        self._swept = time.time()
        self.open: dict[str, list[Job]] = {}
        """User -> awaited jobs; each request runs in its own thread."""
        self._opening = threading.Lock()

    def model(self, name: str | None) -> Model:
        """A loaded pack.

        Raises:
            Refused: no pack has this name.
        """
        if name not in self.models:
            raise Refused(404, f"there is no pack {str(name)[:100]!r} here, only {', '.join(self.models)}")
        return self.models[name]

    @cached_property
    def facts(self) -> dict[str, dict[str, str]]:
        """The facts stored in every picture of a pack."""
        return {
            name: {"pack_fingerprint": model.fingerprint, "base_fingerprint": model.backbone.fingerprint}
            for name, model in self.models.items()
        }

    def stop(self, user: str) -> None:
        """Stop all requests of a user: text at the next token, drawing at the next step."""
        with self._opening:
            jobs = list(self.open.get(user, []))
        self.batches.forget(jobs)

    def picture_file(self, picture: Picture) -> str:
        """A file of a picture, the same file for the same picture: browsers may read it while others are written."""
        digest = hashlib.sha256(f"{picture.mode}{picture.size}".encode() + picture.tobytes()).hexdigest()
        path = self.folder / "shown" / f"{digest[:24]}.png"
        if path.exists():
            os.utime(path)
        else:
            save(picture, path, {})
            self._sweep()
        return str(path)

    def _sweep(self) -> None:
        """Delete old files, so that a page that stays open does not fill the disk."""
        now = time.time()
        if now < self._swept + KEPT_SECONDS / 6:
            return
        self._swept = now
        for path in self.folder.rglob("*.png"):
            with suppress(OSError):
                if path.stat().st_mtime < now - KEPT_SECONDS:
                    path.unlink()

    def begin_stop(self) -> None:
        """Accept no more requests, and end the waiting ones; running ones continue."""
        self.batches.refuse()

    def end_stop(self) -> None:
        """End running requests."""
        self.batches.forget(list(self.batches.running))

    # -- what may be asked for

    def open_upload(self, path: str | Path, name: str | None) -> Picture:
        """An uploaded file as the model sees it.

        Raises:
            Refused: it is not a picture, or beyond the limits.
        """
        return requests.resize_for_model(self._decode_upload(path), self.model(name))

    def open_canvas(self, path: str | Path, name: str | None) -> Picture:
        """An uploaded file at the size at which the model draws: of several packs, another one may do that than sees it.

        Raises:
            Refused: it is not a picture, or beyond the limits, or this pack does not draw.
        """
        model = self.drawing_model(name)
        return requests.resize_for_drawing(self._decode_upload(path), model)

    def _decode_upload(self, path: str | Path) -> Picture:
        file = Path(path)
        requests.within(file.stat().st_size, self.limits.body, "the file's size in bytes")
        return requests.decode_picture(file.read_bytes(), "the file", self.limits)

    def drawing_model(self, name: str | None) -> Model:
        """A pack that draws pictures.

        Raises:
            Refused: this pack does not.
        """
        model = self.model(name)
        if "draw" not in model.capabilities:
            raise requests.incapable(model, "draw", "xfusion")
        return model

    def painted_mask(self, layers: Sequence[str | Path], side: int) -> Picture:
        """The mask of a brush: white where the painted layers (files) cover a picture of ``side`` x ``side`` pixels.

        Raises:
            Refused: nothing is painted, or only thin lines.
            XFusionError: a file is not a picture, or too large.
        """
        files = (Path(path).read_bytes() for path in layers)
        mask = brush.mask((pictures.decode(file, "the paint", most_pixels=brush.MOST) for file in files), side)
        if mask is None:
            raise Refused(400, "nothing is painted: paint broadly over what is to be drawn anew, or choose a part")
        return mask

    def say(
        self, user: str, name: str | None, messages: list[dict[str, Any]], **settings: Any
    ) -> Iterator[Waiting | Preview | list[Any]]:
        """Stream the answer to a conversation: previews of a picture, or all segments so far; the last item is complete.

        Args:
            user: who asks, for `stop`.
            name: the pack.
            messages: as `xfusion.generation.conversation` accepts them.
            settings: fields of a chat request: ``seed``, ``max_tokens``, ``temperature``, ``draw``, ``steps``, ``guidance``.

        Raises:
            Refused: the request is refused, the queue is full, or it takes too long.
            Stopped: the user stopped it before its first word, or while it drew; a finished picture and stopped text stay as
                they are.
        """
        body = {"messages": [request_message(message) for message in messages], **settings}
        params = requests.parse(requests.Chat, body)
        (job,), _ = reading.chat(params, self.model(name), self.limits, frozenset())
        picture: list[Any] = []
        is_drawn = False
        for _, event in self._follow(user, [job]):
            if isinstance(event, (Waiting, Preview)):
                picture = [event.picture] if isinstance(event, Preview) else picture
                yield event
                continue
            if event is not None and not isinstance(event, str):
                picture, is_drawn = [event], True
            if not job.answer:
                yield [*picture, *filter(None, [job.words.sent])]
        if job.dropped and not is_drawn and not job.words.sent:
            raise Stopped
        yield list(job.answer) if job.answer and not job.dropped else [*picture, *filter(None, [job.words.sent])]

    def draw(self, user: str, name: str | None, prompt: str, **settings: Any) -> Iterator[Waiting | Preview | Drawn]:
        """Draw pictures of a prompt; settings are fields of an image request: ``n``, ``seed``, ``steps``, ``guidance``.

        Raises:
            Refused: as `say`.
            Stopped: by the user.
        """
        params = requests.parse(requests.Images, {"prompt": prompt, **settings})
        yield from self._draw_jobs(user, name, params, reading.images(params, self.model(name), self.limits))

    def repaint(
        self, user: str, name: str | None, picture: bytes, mask: bytes, prompt: str, **settings: Any
    ) -> Iterator[Waiting | Preview | Drawn]:
        """Inpaint a part of a picture, given a file and a mask of its size, white in that part.

        Raises:
            Refused: as `say`.
            Stopped: by the user.
        """
        params = requests.parse(requests.Images, {"prompt": prompt, **settings})
        jobs = reading.edit(params, self.model(name), self.limits, picture, mask)
        yield from self._draw_jobs(user, name, params, jobs)

    def look(
        self, user: str, name: str | None, prompt: str, **settings: Any
    ) -> Iterator[Waiting | Preview | tuple[Picture, Attention]]:
        """The clean estimates of a picture during denoising, then the picture and what its tokens attend to.

        Raises:
            Refused: as `say`.
            Stopped: by the user.
        """
        model = self.model(name)
        params = requests.parse(requests.Images, {"prompt": prompt, **settings})
        (checked_job,) = reading.images(params, model, self.limits)
        steps = params.drawing_steps(self.limits)
        job = Job(
            work=Look(model=model, steps=steps, guidance=params.guidance),
            inputs=params.prompt,
            seed=checked_job.seed,
            index=0,
            words=TextStream(model.backbone.decode),
            notify=checked_job.notify,
        )
        preview_steps = {round(1 + (steps - 1) * k / (STRIP - 1)) for k in range(STRIP)}
        events = (event for _, event in self._follow(user, [job], preview_steps))
        yield from (event for event in events if isinstance(event, (Waiting, Preview)))
        if job.dropped:
            raise Stopped
        picture, attention = job.answer
        yield picture, attention

    # -- how

    def _draw_jobs(
        self, user: str, name: str | None, params: requests.Images, jobs: list[Job]
    ) -> Iterator[Waiting | Preview | Drawn]:
        model = self.model(name)
        guidance = model.guidance if params.guidance is None else params.guidance
        steps = params.drawing_steps(self.limits)
        for job, event in self._follow(user, jobs):
            if isinstance(event, (Waiting, Preview)):
                yield event
            elif event is None and job.answer:
                facts = {"prompt": params.prompt, "seed": job.seed, "steps": steps, "guidance": guidance}
                path = unused_path(self.folder / f"{file_name(params.prompt)}-seed{job.seed}.png")
                save(job.answer[0], path, facts | self.facts[str(name)])
                yield Drawn(index=job.index, path=path, picture=job.answer[0], facts=facts)
        if any(job.dropped for job in jobs):
            raise Stopped

    def _follow(
        self, user: str, jobs: list[Job], preview_steps: set[int] | None = None
    ) -> Iterator[tuple[Job, str | Picture | Preview | Waiting | None]]:
        """Events of jobs until all are done or stopped: text, previews, pictures, and None for a job that is done.

        Where none comes for `WAITING_SECONDS`, the first job is said to be waiting.

        ``preview_steps`` names the steps whose estimates are wanted; without it, at most one comes every `PREVIEW_SECONDS`.
        """
        events: queue.SimpleQueue[tuple[Job, str | Picture | Preview | None]] = queue.SimpleQueue()
        for job in jobs:
            job.notify = lambda job, new: events.put((job, new))
            job.watch = _watcher(job, events, preview_steps)
        deadline = time.monotonic() + self.limits.seconds
        remaining, told = len(jobs), time.monotonic()
        with self._opening:  # registered before they are queued, so that a stop finds them
            self.open.setdefault(user, []).extend(jobs)
        try:
            self.batches.put(jobs)
            while remaining:
                if time.monotonic() > deadline:
                    seconds = self.limits.seconds
                    raise Refused(504, f"there is no answer within {seconds:g} seconds: ask for less", code="deadline")
                try:
                    job, event = events.get(timeout=LISTEN_SECONDS)
                except queue.Empty:
                    if all(job.dropped for job in jobs):
                        return
                    if time.monotonic() - told >= WAITING_SECONDS:
                        yield jobs[0], Waiting(before=self.batches.before(jobs[0]))
                        told = time.monotonic()
                    continue
                if event is None:
                    remaining -= 1
                    if job.error is not None:
                        raise reading.as_refused(job.error) from job.error
                yield job, event
                told = time.monotonic()
        finally:
            if remaining:  # the listener went away or failed: nobody waits for the rest
                self.batches.forget(jobs)
            with self._opening:
                user_jobs = self.open[user]
                for job in jobs:
                    user_jobs.remove(job)
                if not user_jobs:
                    self.open.pop(user)


def _watcher(job: Job, events: queue.SimpleQueue[Any], preview_steps: set[int] | None) -> Any:
    """A callback that reports a job's estimates, called in the computing thread."""
    last = -PREVIEW_SECONDS

    def watch(done: int, total: int, estimate: Tensor) -> None:
        nonlocal last
        is_due = time.monotonic() - last >= PREVIEW_SECONDS if preview_steps is None else done in preview_steps
        if not is_due or job.dropped:
            return
        image = job.work.model.image  # read only when drawing: an audio pack has none, and answers in text
        (picture,) = image.to_pil(image.decode(estimate[None], image.sizes[0]))
        last = time.monotonic()
        events.put((job, Preview(index=job.index, done=done, total=total, picture=picture)))

    return watch
