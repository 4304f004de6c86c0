"""A server under four times the load that it can hold: no wrong answer, no growing memory.

Two minutes; XFUSION_LOAD_SECONDS names another time. It prints the latencies (`pytest -s`).
"""

import json
import os
import random
import statistics
import sys
import threading
import time
from pathlib import Path

import openai
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from apps.serving import apart, as_url, from_base64, tiny_models
from apps.test_cli import start
from apps.test_serve import listening
from contracts.table import Noise

from xfusion.data.sequence import Text

SECONDS = float(os.environ.get("XFUSION_LOAD_SECONDS", "120"))
QUEUE, BATCH = 8, 4
CLIENTS = 4 * (QUEUE + BATCH)
MOST_GROWTH = 48_000_000
"""Bytes that the server may grow between the first third and the end: allocators are not exact."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The folder of a pack, and calls with their right answers."""
    folder = tmp_path_factory.mktemp("load")
    (model,) = tiny_models(folder / "base").values()
    model.save_pretrained(folder / "tiny")
    shown = Noise(1).picture(0, 32)
    look = [{"type": "image_url", "image_url": {"url": as_url(shown)}}, {"type": "text", "text": "what is this?"}]
    answers = {}
    for seed in range(4):
        answers["draw", seed] = model.draw(["two blue birds"], seed=seed, steps=4)[0]
        settings = {"seed": seed, "temperature": 1.0, "max_tokens": 8}
        answers["look", seed] = model.generate([shown, "what is this?"], **settings)[0]
        text = Text(ids=model.backbone.chat("a red apple"))
        answers["say", seed] = model.generate([text], **settings)[0]
    return folder / "tiny", look, answers


def call(client, kind, seed, look):
    """One request of a kind."""
    if kind == "draw":
        answer = client.images.generate(prompt="two blue birds", extra_body={"seed": seed, "steps": 4})
        return from_base64(answer.data[0].b64_json)
    content = look if kind == "look" else "a red apple"
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        seed=seed,
        temperature=1.0,
        max_tokens=8,
        stream=True,
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def right(kind, answer, wanted):
    """A picture may differ by 2 of 255 from that of a single call; words by nothing, where they stood alone."""
    return apart(answer, wanted) <= 2 if kind == "draw" else answer == wanted


@pytest.mark.full
def test_four_times_the_capacity(expected):
    pack, look, answers = expected
    process = start(
        "serve", pack, "--port", "0", "--limits.queue", QUEUE, "--limits.batch", BATCH, "--limits.seconds", "30"
    )
    counts = {"right": 0, "full": 0}
    wrong, seconds, memory = [], {kind: [] for kind in ("draw", "look", "say")}, []
    lock, end = threading.Lock(), [0.0]

    def visit(number):
        rng = random.Random(number)
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
            while time.monotonic() < end[0]:
                kind, seed = rng.choice(list(answers))
                began = time.monotonic()
                try:
                    answer = call(client, kind, seed, look)
                except openai.RateLimitError as error:
                    with lock:
                        counts["full"] += 1
                    if not 1 <= int(error.response.headers.get("retry-after", "0")) <= 60:
                        wrong.append(f"Retry-After: {error.response.headers.get('retry-after')}")
                    time.sleep(0.05 + 0.1 * rng.random())  # sooner than we were told: the load must stay
                    continue
                except Exception as error:
                    wrong.append(f"{kind}: {error!r}")
                    continue
                with lock:
                    seconds[kind].append(time.monotonic() - began)
                    counts["right"] += right(kind, answer, answers[kind, seed])
                    if not right(kind, answer, answers[kind, seed]):
                        wrong.append(f"{kind} {seed}: {answer!r}, not {answers[kind, seed]!r}")

    try:
        address = listening(process)
        end[0] = time.monotonic() + SECONDS
        visitors = [threading.Thread(target=visit, args=(i,)) for i in range(CLIENTS)]
        for visitor in visitors:
            visitor.start()
        while any(visitor.is_alive() for visitor in visitors):
            memory.append(psutil.Process(process.pid).memory_info().rss)
            time.sleep(0.5)
        process.terminate()
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0 and "Traceback" not in err, err
    finally:
        process.kill()
        process.communicate()

    rows = {
        kind: {
            "answers": len(found),
            "median": round(statistics.median(found), 2),
            "p95": round(statistics.quantiles(found, n=20)[-1], 2),
        }
        for kind, found in seconds.items()
        if len(found) > 1
    }
    print(json.dumps({"clients": CLIENTS, **counts, "seconds": rows, "bytes": [memory[0], max(memory), memory[-1]]}))
    assert not wrong, wrong[:5]
    assert counts["full"], "the load never filled the queue"
    assert set(rows) == {"draw", "look", "say"}
    early = max(memory[: max(1, len(memory) // 3)])
    assert max(memory) - early < MOST_GROWTH, f"memory grew from {early:,} to {max(memory):,} bytes"
