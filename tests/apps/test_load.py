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
from collections import Counter
from dataclasses import replace
from pathlib import Path

import openai
import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from apps.serving import apart, as_url, from_base64
from apps.test_cli import start
from apps.test_serve import listening
from contracts.table import Noise, make_base, make_model, model_config, randomise

from xfusion.backbone import Backbone
from xfusion.data.sequence import Text
from xfusion.model import Model
from xfusion.objectives.base import NoObjective
from xfusion.objectives.contrastive import Contrastive
from xfusion.objectives.next_token import NextToken

SECONDS = float(os.environ.get("XFUSION_LOAD_SECONDS", "120"))
QUEUE, BATCH = 8, 4
CLIENTS = 4 * (QUEUE + BATCH)
DEADLINE = 30
MOST_GROWTH = 32_000_000
"""Bytes that the server's memory may be larger in the last third than in the first: allocators are not exact."""
MARGIN = 1e-3
"""Least distance of the two largest logits along a greedy answer: in a batch with others they differ by rounding."""
INPUTS = ["a red apple", "two blue birds", "a tree"]
QUESTIONS = ["a red apple", "who are you? what is this?", "two blue birds", "what is it"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The folders of two packs on one base, a picture, and the right answers of calls by kind and seed."""
    folder = tmp_path_factory.mktemp("load")
    base = Backbone.load(str(make_base("llama", folder / "base")))
    model, shown = make_model(base), Noise(1).picture(0, 32)
    pairs = Model(
        replace(
            model_config(base),
            text=NextToken.Config(weight=0.0),
            media=NoObjective.Config(),
            extra=(Contrastive.Config(),),
        ),
        base,
    )
    randomise(pairs)
    packs = {"tiny": model, "pairs": pairs.eval()}
    for name, made in packs.items():
        made.save_pretrained(folder / name)
    url, answers = as_url(shown), {}
    for seed in range(4):
        answers["draw", seed] = model.draw(["two blue birds"], seed=seed, steps=4)[0]
        settings = {"seed": seed, "temperature": 1.0, "max_tokens": 8}
        answers["look", seed] = model.generate([shown, "what is this?"], **settings)[0]
        text = Text(ids=model.backbone.chat("a red apple"))
        answers["say", seed] = model.generate([text], **settings)[0]
        text = Text(ids=model.backbone.chat(QUESTIONS[seed]))
        answers["tell", seed] = model.generate([text], max_tokens=4 * (1 + seed))[0]
        assert margin(model, text, 4 * (1 + seed)) > MARGIN, "rounding may decide a word: ask something else"
        answers["embed", seed] = pairs.embed([*INPUTS[: 1 + seed % 3], shown])
    return [folder / name for name in packs], url, answers


def margin(model, text, count):
    """The least distance of the two largest logits along a greedy answer."""
    ids = torch.tensor([text.ids])
    settings = {"max_new_tokens": count, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    scores = model.text_only().generate(ids, attention_mask=torch.ones_like(ids), **settings).scores
    first, second = torch.stack(scores).topk(2).values.unbind(dim=-1)
    return float((first - second).min())


def call(client, kind, seed, url, stream):
    """One request of a kind."""
    if kind == "draw":
        answer = client.images.generate(model="tiny", prompt="two blue birds", extra_body={"seed": seed, "steps": 4})
        return from_base64(answer.data[0].b64_json)
    if kind == "embed":
        answer = client.embeddings.create(model="pairs", input=[*INPUTS[: 1 + seed % 3], url])
        return torch.tensor([item.embedding for item in answer.data])
    look = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is this?"}]
    content = {"look": look, "say": "a red apple", "tell": QUESTIONS[seed]}[kind]
    settings = {"max_tokens": 4 * (1 + seed)} if kind == "tell" else {"seed": seed, "temperature": 1.0, "max_tokens": 8}
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], stream=stream, **settings
    )
    if not stream:
        return answer.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer)


def right(kind, answer, wanted):
    """A picture may differ by 2 of 255 and a vector by rounding from those of a single call; words by nothing."""
    if kind == "draw":
        return apart(answer, wanted) <= 2
    return torch.allclose(answer, wanted, atol=1e-4) if kind == "embed" else answer == wanted


def refusal(error):
    """What a server that is full may say, in OpenAI's shape; anything else is a fault."""
    body = error.body if isinstance(error, openai.APIError) and isinstance(error.body, dict) else {}
    if set(body) != {"message", "type", "param", "code"}:
        return None
    if isinstance(error, openai.RateLimitError) and body["code"] == "queue_full":
        wait = error.response.headers.get("retry-after", "")
        return "full" if wait.isdigit() and 1 <= int(wait) <= 60 else None
    return "late" if body["code"] == "deadline" else None


def latencies(seconds):
    """Count and percentiles in seconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"answers": len(seconds)} | {f"p{k}": round(cuts[k - 1], 3) for k in (50, 95, 99)}


@pytest.mark.full
def test_four_times_the_capacity(expected):
    packs, url, answers = expected
    limits = ("--limits.queue", QUEUE, "--limits.batch", BATCH, "--limits.seconds", DEADLINE)
    process = start("serve", *packs, "--port", "0", *limits)
    counts, wrong, seconds, memory = Counter(), [], {kind: [] for kind, _ in answers}, []
    lock, end = threading.Lock(), [0.0]

    def visit(number):
        rng = random.Random(number)
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=2 * DEADLINE) as client:
            while time.monotonic() < end[0]:
                kind, seed = rng.choice(list(answers))
                began = time.monotonic()
                try:
                    answer = call(client, kind, seed, url, stream=rng.random() < 0.5)
                except Exception as error:
                    with lock:
                        counts[refusal(error)] += 1
                    if refusal(error) is None:
                        wrong.append(f"{kind} {seed}: {error!r}")
                    time.sleep(0.05 + 0.1 * rng.random())  # sooner than we were told: the load must stay
                    continue
                took, fits = time.monotonic() - began, right(kind, answer, answers[kind, seed])
                with lock:
                    seconds[kind].append(took)
                    counts["right"] += fits
                if not fits:
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

    third = max(1, len(memory) // 3)
    first, last = max(memory[:third]), max(memory[-third:])
    rows = {kind: latencies(found) for kind, found in seconds.items() if len(found) > 1}
    print(json.dumps({"clients": CLIENTS, "seconds": SECONDS, **counts, "latency": rows, "bytes": [first, last]}))
    assert not wrong, wrong[:5]
    assert set(rows) == {"draw", "look", "say", "tell", "embed"}
    assert counts["right"] == sum(map(len, seconds.values()))
    assert counts["full"], "the load never filled the queue"
    assert last - first < MOST_GROWTH, f"memory grew from {first:,} bytes in the first third to {last:,} in the last"
