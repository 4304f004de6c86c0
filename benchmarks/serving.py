"""How long answers of `xfusion serve` take, with one client, at the server's capacity and at four times that.

    python benchmarks/serving.py

The server runs in a process of its own with the shipped pack and, on the same base, a dual encoder of the recipe `clip`, whose
new weights are fresh: their values do not affect the time. Clients are OpenAI's own, in threads on the same machine, so that both
share its cores. Capacity is what the server holds at once: its queue and a batch. Each client requests a drawing, what a picture
shows, words, or vectors of a picture and its words, and sends the next request when it has the answer; after a refusal (429) it
asks again within 0.15 s. Answers are compared with the single calls in Python; words that the server batches are too, since their
questions are such that rounding decides no word (`MARGIN`). Takes five minutes. Writes
benchmarks/results/serving.json, which `python docs/pages.py speed` puts into docs/serving.md.
"""

from __future__ import annotations

import base64
import io
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy
import openai
import psutil
import torch
import tyro
from PIL import Image

import xfusion
from xfusion.apps.commands.base import short_name
from xfusion.data.sequence import Text
from xfusion.evaluation.machine import origin
from xfusion.generation import PLAIN
from xfusion.model import Model
from xfusion.recipes.base import find
from xfusion.storage import write_json

RESULT = Path(__file__).parent / "results" / "serving.json"
PROMPTS = ("a red heart", "a yellow star", "a green tree", "a blue car")
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "How many days are in a week, and which of them is the first one?",
    "Which animal says moo, and which one says meow? Tell me in a few words.",
)
MARGIN = 0.01
"""Least distance of the two largest logits along an answer in words alone: in a batch they round differently, by some 0.0001."""
LEVELS = 2
"""Levels of 255 that a picture may differ by from that of a single call."""
ROUNDING = 1e-4
"""What a number of a vector may differ by from that of a single call."""
KINDS = ("draw", "look", "say", "embed")


@dataclass(frozen=True)
class Settings:
    """What is asked of what."""

    pack: str = "emoji"
    """A model that draws and captions."""
    pairs: str = "clip"
    """The recipe of the dual encoder."""
    loads: tuple[float, ...] = (0.0, 1.0, 4.0)
    """Clients in units of the capacity; 0 is one client."""
    seconds: tuple[float, ...] = (45.0, 45.0, 120.0)
    """How long each load lasts; one number is for all."""
    queue: int = 16
    """Answers that may wait."""
    batch: int = 8
    """Answers that are computed together."""
    steps: int = 25
    """Of drawing."""
    tokens: int = 16
    """Longest answer in words."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = RESULT
    """Where the result goes."""


class Workload:
    """The requests and their right answers."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, model = settings, xfusion.load(settings.pack)
        self.name, self.fingerprint = short_name(settings.pack), model.fingerprint
        pictures = [model.draw([p], seed=i, steps=settings.steps)[0] for i, p in enumerate(PROMPTS)]
        self.answers: dict[tuple[str, int], Any] = {("draw", i): picture for i, picture in enumerate(pictures)}
        self.urls = [_as_url(picture) for picture in pictures]
        for i, picture in enumerate(pictures):
            (self.answers["look", i],) = model.generate([picture], max_tokens=settings.tokens)
        for i, question in enumerate(QUESTIONS):
            chat = Text(ids=model.backbone.chat(question))
            if (found := margin(model, chat, settings.tokens)) < MARGIN:
                raise SystemExit(
                    f"{question!r}: rounding may decide a word, at a margin of {found:.4f}; ask something else"
                )
            (self.answers["say", i],) = model.generate([chat], max_tokens=settings.tokens)
        # A picture comes back from its PNG as it was, and so its vector is that of the picture.
        pairs = xfusion.build(find(settings.pairs)().model, model.backbone).eval()
        for i, (prompt, picture) in enumerate(zip(PROMPTS, pictures, strict=True)):
            self.answers["embed", i] = pairs.embed([prompt, picture])
        pairs.save_pretrained(folder)
        self.pairs = short_name(str(folder))

    def ask(self, client: openai.OpenAI, kind: str, number: int) -> tuple[bool, float | None]:
        """One request: whether its answer is right, and the seconds until its first word."""
        start, first_word, expected = time.perf_counter(), None, self.answers[kind, number]
        if kind == "draw":
            response = client.images.generate(
                prompt=PROMPTS[number], extra_body={"seed": number, "steps": self.settings.steps}
            )
            file = io.BytesIO(base64.b64decode((response.data or [])[0].b64_json or ""))
            pixels = [numpy.asarray(picture).astype(int) for picture in (Image.open(file), expected)]
            return int(numpy.abs(pixels[0] - pixels[1]).max()) <= LEVELS, None
        if kind == "embed":
            embeddings = client.embeddings.create(model=self.pairs, input=[PROMPTS[number], self.urls[number]])
            vectors = torch.tensor([item.embedding for item in embeddings.data])
            return vectors.shape == expected.shape and bool(((vectors - expected).abs() <= ROUNDING).all()), None
        block = {"type": "image_url", "image_url": {"url": self.urls[number]}}
        content: Any = QUESTIONS[number] if kind == "say" else [block]
        text = ""
        for chunk in client.chat.completions.create(
            model=self.name,
            messages=[{"role": "user", "content": content}],
            max_tokens=self.settings.tokens,
            stream=True,
        ):
            new = chunk.choices[0].delta.content or ""
            first_word = time.perf_counter() - start if new and first_word is None else first_word
            text += new
        return text == expected, first_word


def margin(model: Model, prompt: Text, count: int) -> float:
    """The least distance of the two largest logits along the greedy answer of a model's base."""
    ids = torch.tensor([prompt.ids])
    settings: dict[str, Any] = {"max_new_tokens": count, "do_sample": False, **PLAIN}
    answer = model.text_only().generate(
        ids, attention_mask=torch.ones_like(ids), output_scores=True, return_dict_in_generate=True, **settings
    )
    first, second = torch.stack(answer.scores).topk(2).values.unbind(dim=-1)
    return float((first - second).min())


def _as_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def load(
    workload: Workload, address: str, server: psutil.Process, clients: int, duration: float
) -> list[dict[str, Any]]:
    """A number of clients for a while: a row per kind of request."""
    seconds, firsts = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    lock, end = threading.Lock(), time.monotonic() + duration

    def visit(number: int) -> None:
        rng = random.Random(number)
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600) as client:
            while time.monotonic() < end:
                kind = rng.choice(KINDS)
                request = rng.choice([key for key in workload.answers if key[0] == kind])
                start, first = time.perf_counter(), None
                try:
                    is_right, first = workload.ask(client, *request)
                    outcome = "right" if is_right else "wrong"
                except openai.RateLimitError:
                    outcome = "refused"
                except openai.APIError as error:
                    outcome = "late" if error.code == "deadline" else "failed"
                elapsed = time.perf_counter() - start
                with lock:
                    counts[kind][outcome] += 1
                    if outcome in ("right", "wrong"):
                        seconds[kind].append(elapsed)
                        firsts[kind] += [] if first is None else [first]
                if outcome not in ("right", "wrong"):
                    time.sleep(0.05 + 0.1 * rng.random())

    visitors = [threading.Thread(target=visit, args=(i,)) for i in range(clients)]
    memory = []
    for visitor in visitors:
        visitor.start()
    while any(visitor.is_alive() for visitor in visitors):
        memory.append(server.memory_info().rss)
        time.sleep(0.5)
    rows: list[dict[str, Any]] = []
    third = max(1, len(memory) // 3)
    for kind in KINDS:
        row: dict[str, Any] = {"clients": clients, "seconds": duration, "request": kind, "answers": len(seconds[kind])}
        row |= {name: counts[kind][name] for name in ("wrong", "refused", "late", "failed")}
        if len(seconds[kind]) > 1:
            cuts = statistics.quantiles(seconds[kind], n=100, method="inclusive")
            row |= {f"p{k}": round(cuts[k - 1], 3) for k in (50, 95, 99)}
        if firsts[kind]:
            row["first_word_p50"] = round(statistics.median(firsts[kind]), 3)
        row |= {"megabytes_first_third": max(memory[:third]) // 10**6}
        row |= {"megabytes_last_third": max(memory[-third:]) // 10**6}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main(settings: Settings) -> None:
    """Serve, ask, write."""
    if len(settings.seconds) not in (1, len(settings.loads)):
        raise SystemExit(
            f"--loads has {len(settings.loads)} numbers and --seconds {len(settings.seconds)}: give one, or as many"
        )
    provenance = origin("benchmarks")
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / settings.pairs
        workload = Workload(settings, pairs)
        rows = serve_loads(workload, pairs)
    result = {
        **provenance,
        "pack": settings.pack,
        "fingerprint": workload.fingerprint,
        "pairs": settings.pairs,
        "queue": settings.queue,
        "batch": settings.batch,
        "steps": settings.steps,
        "tokens": settings.tokens,
        "rows": rows,
    }
    write_json(settings.out, result)


def serve_loads(workload: Workload, pairs: Path) -> list[dict[str, Any]]:
    """All loads on a server of both packs."""
    settings, rows = workload.settings, list[dict[str, Any]]()
    command = [sys.executable, "-m", "xfusion.apps.cli", "serve", settings.pack, str(pairs), "--port", "0"]
    command += ["--limits.queue", str(settings.queue), "--limits.batch", str(settings.batch)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            matches = (re.match(r"serving at (\S+)/v1", line) for line in server.stderr)
            address = next((match[1] for match in matches if match), None)
            if address is None:
                raise SystemExit("the server ended before it served")
            with openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=600) as client:
                for request in workload.answers:  # what first calls prepare is no load's
                    workload.ask(client, *request)
            capacity, process = settings.queue + settings.batch, psutil.Process(server.pid)
            durations = settings.seconds * (len(settings.loads) if len(settings.seconds) == 1 else 1)
            for times, seconds in zip(settings.loads, durations, strict=True):
                rows += load(workload, address, process, max(1, round(times * capacity)), seconds)
        finally:
            server.terminate()
    return rows


if __name__ == "__main__":
    main(tyro.cli(Settings))
