"""The server as OpenAI's own client and hostile ones meet it, over a real socket."""

import base64
import gc
import http.client
import io
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

sys.path.insert(0, str(Path(__file__).parents[1]))

from apps.serving import (
    apart,
    as_url,
    draw_only,
    from_base64,
    from_url,
    listening_at,
    opens_always,
    png,
    running,
    tiny_models,
    wrap_runs,
)
from apps.test_cli import start
from contracts.table import SIDE, SOUND_RATE, Noise, hearing_model, make_model, opening_head

import xfusion
from xfusion.apps import cli
from xfusion.apps.server import batches, reading, requests, tickets
from xfusion.apps.server.answers import Refused
from xfusion.apps.server.batches import Batches, Continue, Job, Words
from xfusion.apps.server.limits import Limits
from xfusion.apps.server.names import own_names
from xfusion.composition import together
from xfusion.data.sequence import Sound, Text, XFusionError
from xfusion.data.sounds import as_wav, decode
from xfusion.generation import TextStream
from xfusion.modalities.image import square_picture
from xfusion.opening import Opening

TINY = Limits(
    queue=8, batch=4, seconds=20, n=4, tokens=24, steps=30, pictures=2, pixels=10_000, body=200_000, characters=500
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("base"), "dual tower", "dual projection")


@pytest.fixture(scope="module")
def model(models):
    return models["dual-tower"]


@pytest.fixture(scope="module")
def server(models):
    with running(models, TINY) as found:
        yield found


@pytest.fixture
def client(server):
    with server.client() as made:
        yield made


@pytest.fixture(scope="module")
def picture():
    return Noise(1).picture(0, 32)


@pytest.fixture
def gate(monkeypatch):
    """Holds every batch until it is opened; remembers the batches' sizes."""

    held = threading.Event()
    held.sizes = []

    def wrap(run):
        def waiting(work, jobs):
            held.sizes.append(len(jobs))
            assert held.wait(30)
            return run(work, jobs)

        return waiting

    wrap_runs(monkeypatch, wrap)
    yield held
    held.set()


def until(condition, seconds=20):
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def say(words):
    return [{"role": "user", "content": words}]


def look(picture, words):
    blocks = [{"type": "image_url", "image_url": {"url": as_url(picture)}}, {"type": "text", "text": words}]
    return [{"role": "user", "content": blocks}]


def post(server, path, body, headers=None):
    """A request that no client would send: its status and its JSON."""
    parts = urllib.parse.urlsplit(server.address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"} | (headers or {}))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def get(server, path):
    with urllib.request.urlopen(server.address + path, timeout=30) as answer:
        return answer.read().decode()


def padded_answers(model, talks, counts):
    """What transformers gives for conversations as one batch, padded on the left, up to so many tokens of each."""
    prompts = [model.backbone.chat(talk) for talk in talks]
    width = max(map(len, prompts))
    ids = torch.tensor([[1] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": max(counts), "pad_token_id": 1, "do_sample": False}
    rows = model.backbone.model.generate(ids, attention_mask=mask, **settings)[:, width:].tolist()
    return [model.backbone.decode(row[:count]) for row, count in zip(rows, counts, strict=True)]


def base_answer(model, messages, count, **sampling):
    """What transformers gives for the same call."""
    ids = torch.tensor([model.backbone.chat(messages)])
    whole = model.backbone.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, pad_token_id=1, **sampling
    )
    return model.backbone.decode(whole[0, ids.shape[1] :].tolist())


# ------------------------------------------------------------------------------------------------------------- words


def test_models_are_listed(client, models):
    assert [m.id for m in client.models.list().data] == list(models)
    one = client.models.retrieve("dual-projection")
    assert one.owned_by == "xfusion" and "draw" in one.capabilities
    base = Path(models["dual-projection"].backbone.source)
    assert base.is_absolute() and one.base == base.name, "where it lies is nobody's business"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_words_alone_are_the_bases_own(client, model):
    messages = [{"role": "system", "content": "a cat"}, *say("what is this?")]
    answer = client.chat.completions.create(model="dual-tower", messages=messages, max_tokens=12)
    assert answer.choices[0].message.content == base_answer(model, messages, 12, do_sample=False)
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.prompt_tokens == len(model.backbone.chat(messages)) and answer.usage.completion_tokens <= 12

    sampled = client.chat.completions.create(
        model="dual-tower", messages=messages, max_tokens=12, temperature=0.9, top_p=0.8, seed=5, n=2
    )
    for i, choice in enumerate(sampled.choices):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5 + i)
            expected = base_answer(model, messages, 12, do_sample=True, temperature=0.9, top_p=0.8, top_k=0)
        assert choice.message.content == expected


WORDS = ("a red apple", "who are you? what is this?", "two blue birds", "what is it")


@pytest.fixture
def rows(monkeypatch):
    """The token counts of the prompts of each text-only batch."""
    batched, run = [], batches.text_only_tokens

    def spied(model, prompts, **settings):
        batched.append([len(prompt) for prompt in prompts])
        return run(model, prompts, **settings)

    monkeypatch.setattr(batches, "text_only_tokens", spied)
    return batched


def chat_jobs(model, words, limits=TINY, **fields):
    """The jobs of a chat request."""
    asked = requests.parse(requests.Chat, {"messages": say(words), **fields})
    return reading.chat(asked, model, limits, frozenset())[0]


def all_ended(jobs, batch=8, each=lambda job, new: None):
    """The sizes of the batches in which a queue computes jobs; ``each`` is given their events."""
    sizes, done = [], []

    def hear(job, new):
        each(job, new)
        done.extend([job] if new is None else [])

    queue = Batches(32, batch, lambda ended, seconds: sizes.append(len(ended)))
    for job in jobs:
        job.notify = hear
    queue.put(jobs)
    queue.start()
    until(lambda: len(done) == len(jobs) and sum(sizes) == len(jobs))
    queue.close(10)
    return sizes


def test_words_that_wait_together_are_one_padded_batch_of_the_base(server, model, gate):
    counts, found = (3, 12, 8, 6), {}

    def ask(words, count, stream):
        with server.client() as client:
            call = {"model": "dual-tower", "messages": say(words), "max_tokens": count, "stream": stream}
            answer = client.chat.completions.create(**call)
            if stream:
                chunks = [chunk.choices[0] for chunk in answer]
                text, reason = "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason
            else:
                text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
            found[words] = (text, reason)

    first = threading.Thread(target=ask, args=("a cat", 2, False))
    threads = [first] + [
        threading.Thread(target=ask, args=(words, count, bool(i % 2)))
        for i, (words, count) in enumerate(zip(WORDS, counts, strict=True))
    ]
    for number, thread in enumerate(threads):  # the first is computed alone, the others wait for it
        thread.start()
        until(lambda number=number: gate.sizes == [1] and len(server.batches.waiting) == number)
    gate.set()
    for thread in threads:
        thread.join(30)
    assert gate.sizes == [1, 4]
    expected = padded_answers(model, [say(words) for words in WORDS], counts)
    assert [found[words] for words in WORDS] == [(text, "length") for text in expected]
    assert found["a cat"] == (base_answer(model, say("a cat"), 2, do_sample=False), "length")


def test_a_row_of_words_that_ends_frees_its_place_and_holds_up_no_other(model, rows):
    """At its limit, at a stop sequence, or when nobody waits for it any more."""
    short, stopped, left, long = jobs = [
        *chat_jobs(model, WORDS[0], max_tokens=3),
        *chat_jobs(model, WORDS[1], max_tokens=24, stop=[base_answer(model, say(WORDS[1]), 8, do_sample=False)[2:4]]),
        *chat_jobs(model, WORDS[2], max_tokens=24),
        *chat_jobs(model, WORDS[3], max_tokens=24),
    ]
    seen = []

    def each(job, new):
        if job is left and len(left.words.ids) == 5:
            left.dropped = True
        if new is None:
            seen.append((job, len(long.words.ids)))

    assert all_ended(jobs, each=each) == [4] and len(rows) == 1
    assert [job for job, _ in seen][-1] is long and dict(seen)[short] <= 3 and len(left.words.ids) == 5
    expected = padded_answers(model, [say(words) for words in WORDS], (3, 24, 24, 24))
    assert short.answer == [expected[0]] and long.answer == [expected[3]]
    assert stopped.words.stopped and stopped.words.sent == expected[1][:2] and dict(seen)[stopped] < 24


def test_answers_that_ended_are_not_counted_as_being_computed(model):
    jobs = [*chat_jobs(model, WORDS[0], max_tokens=2), *chat_jobs(model, WORDS[3], max_tokens=12)]
    queue, counts = Batches(8, 8), []
    for job in jobs:
        job.notify = lambda job, new: counts.append((queue.computing, len(queue.running)))
    queue.put(jobs)
    queue.start()
    until(lambda: jobs[1].ended)
    queue.close(10)
    assert counts[0] == (2, 2) and (1, 2) in counts and counts[-1] == (0, 2)


def test_greedy_answers_to_one_request_are_one_row(model, rows):
    jobs = chat_jobs(model, WORDS[0], max_tokens=6, n=3)
    others = chat_jobs(model, WORDS[1], max_tokens=6)
    assert all_ended([*jobs, *others]) == [4] and [len(batch) for batch in rows] == [2]
    expected = padded_answers(model, [say(words) for words in WORDS[:2]], (6, 6))
    assert [job.answer for job in (*jobs, *others)] == [[expected[0]]] * 3 + [[expected[1]]]


@pytest.mark.parametrize(("limits", "expected"), [({"words": 1}, [3, 1, 1]), ({"words": 2}, [4, 1]), ({}, [5])])
def test_words_share_a_batch_as_far_as_the_limit_goes(model, rows, limits, expected):
    limits = replace(TINY, **limits)
    jobs = chat_jobs(model, WORDS[0], limits, max_tokens=4, n=3)
    jobs += [job for words in WORDS[1:3] for job in chat_jobs(model, words, limits, max_tokens=4)]
    assert all_ended(jobs) == expected
    assert [len(batch) for batch in rows] == {3: [1, 1, 1], 2: [2, 1], 1: [3]}[len(expected)]
    if limits.words == 1:
        assert [job.answer[0] for job in jobs[2:]] == [
            base_answer(model, say(words), 4, do_sample=False) for words in WORDS[:3]
        ]


def test_sampled_words_and_prompts_of_other_lengths_do_not_share(model, rows):
    """A seed gives the text of a single call; and short prompts are not computed at the length of a long one."""
    sampled = [job for words in WORDS[:2] for job in chat_jobs(model, words, max_tokens=4, temperature=0.8, seed=3)]
    long = chat_jobs(model, "a red apple on a table " * 12, max_tokens=4)
    greedy = [job for words in WORDS[:3] for job in chat_jobs(model, words, max_tokens=4)]
    assert all_ended([*sampled, *greedy, *long]) == [1, 1, 3, 1] and [len(batch) for batch in rows] == [3, 1]
    for job, words in zip(sampled, WORDS, strict=False):
        assert job.answer == model.generate(
            [Text(ids=model.backbone.chat(words))], seed=3, max_tokens=4, temperature=0.8
        )


def test_nothing_is_kept_of_words_that_were_answered(model):
    def num_tensors():
        gc.collect()
        return sum(isinstance(kept, torch.Tensor) for kept in gc.get_objects())

    counts = []
    for first in (0, 8, 16):  # the first calls prepare what later ones share
        words = [f"a red apple {number}" for number in range(first, first + 8)]
        settings = [{"temperature": 0.5 * (number % 2), "seed": number} for number in range(8)]
        all_ended(
            [job for a, more in zip(words, settings, strict=True) for job in chat_jobs(model, a, max_tokens=3, **more)]
        )
        counts.append((num_tensors(), len(model.engine.turns), len(model.engine.media_tokens)))
    assert counts[2] == counts[1]


def test_a_message_goes_back_as_the_client_dumps_it(client, model):
    call = {"model": "dual-tower", "max_tokens": 6, "seed": 4}
    first = client.chat.completions.create(**call, messages=say("a red apple"))
    dumped = first.choices[0].message.model_dump()
    assert "refusal" in dumped and dumped["refusal"] is None and dumped["tool_calls"] is None
    again = client.chat.completions.create(**call, messages=[*say("a red apple"), dumped, *say("what is this?")])
    history = [*say("a red apple"), {"role": "assistant", "content": dumped["content"]}, *say("what is this?")]
    assert again.choices[0].message.content == base_answer(model, history, 6, do_sample=False)

    drawn = client.chat.completions.create(
        **call, messages=say("a red apple"), modalities=["image", "text"], extra_body={"steps": 2}
    )
    dumped = drawn.choices[0].message.model_dump()
    again = client.chat.completions.create(**call, messages=[*say("a red apple"), dumped, *say("what is this?")])
    shown = from_url(dumped["images"][0]["image_url"]["url"])
    (expected,) = model.generate(["a red apple\n", shown, f"{dumped['content']}\nwhat is this?"], max_tokens=6, seed=4)
    assert again.choices[0].message.content == expected


def test_fields_that_change_nothing_are_taken_and_others_are_not(server, client):
    call = {"model": "dual-tower", "messages": say("a red apple"), "max_tokens": 6}
    plain = client.chat.completions.create(**call).choices[0].message.content
    same = {
        "tools": None, "functions": None, "tool_choice": "none", "function_call": "none", "parallel_tool_calls": True,
        "response_format": {"type": "text"}, "top_logprobs": None, "logprobs": None, "logit_bias": {}, "audio": None,
        "n": None, "stream": None, "modalities": None, "seed": None, "service_tier": "auto", "never_heard_of": None,
        "stream_options": None, "temperature": None,
    }  # fmt: skip
    for fields in ({}, *({key: value} for key, value in same.items()), same):
        status, answer = post(server, "/v1/chat/completions", json.dumps(call | fields))
        assert status == 200 and answer["choices"][0]["message"]["content"] == plain, (fields, answer)
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    for fields, param in (
        ({"tools": [tool]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"never_heard_of": 0}, "never_heard_of"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "assistant", "refusal": "I will not"}]}, "messages.0.refusal"),
        ({"messages": [{"role": "assistant", "tool_calls": [tool]}]}, "messages.0.tool_calls"),
    ):
        status, answer = post(server, "/v1/chat/completions", json.dumps(call | fields))
        assert status == 400 and answer["error"]["param"] == param, (fields, answer)
    status, answer = post(server, "/v1/images/generations", json.dumps({"prompt": "a", "steps": 1, "style": None}))
    assert status == 200, answer


def test_a_stream_says_what_one_piece_says(client, picture):
    for messages in (say("two blue birds"), look(picture, "what is this?")):
        call = {"model": "dual-tower", "messages": messages, "max_tokens": 10, "temperature": 1.0, "seed": 3, "n": 2}
        whole = client.chat.completions.create(**call)
        chunks = list(client.chat.completions.create(**call, stream=True, stream_options={"include_usage": True}))
        for i, choice in enumerate(whole.choices):
            mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == i]
            assert "".join(c.delta.content or "" for c in mine) == choice.message.content
            assert mine[-1].finish_reason == choice.finish_reason
        assert chunks[-1].usage == whole.usage
        assert all(c.usage is None and "usage" in c.model_fields_set for c in chunks[:-1])  # as OpenAI's
        assert all("usage" not in c.model_fields_set for c in client.chat.completions.create(**call, stream=True))
        assert len({c.id for c in chunks}) == 1


def test_a_stream_that_waits_is_kept_open_by_comments(models, server, client, model, gate, monkeypatch):
    monkeypatch.setattr(tickets, "QUIET_SECONDS", 0.2)
    call = {"model": "dual-tower", "messages": say("two blue birds"), "max_tokens": 6, "stream": True}

    def told(server):
        url = f"{server.address}/v1/chat/completions"
        with httpx.stream("POST", url, json=call, timeout=30, trust_env=False) as answer:
            yield from filter(None, answer.iter_lines())

    lines = told(server)
    assert "assistant" in next(lines) and [next(lines), next(lines)] == [": waiting"] * 2
    gate.set()
    *_, last = lines
    assert last == "data: [DONE]"
    gate.clear()
    opening = threading.Timer(0.7, gate.set)
    opening.start()
    chunks = list(client.chat.completions.create(**call))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == base_answer(model, call["messages"], 6, do_sample=False)
    gate.clear()
    with running(models, replace(TINY, seconds=1.0)) as hasty:
        _, *waited, last = told(hasty)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline"
        assert set(waited) == {": waiting"} and 2 <= len(waited) <= 5
        gate.set()


def test_stop_sequences_end_an_answer(client):
    call = {"model": "dual-tower", "messages": say("a red apple"), "max_tokens": 20, "temperature": 1.0, "seed": 1}
    whole = client.chat.completions.create(**call).choices[0].message.content
    stop = whole[4:6]
    cut = client.chat.completions.create(**call, stop=[stop, "never said"]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)] and cut.finish_reason == "stop"
    streamed = client.chat.completions.create(**call, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == cut.message.content


def test_words_are_sent_once_they_cannot_change():
    decode = bytes.decode
    words = TextStream(lambda ids: decode(bytes(ids), errors="replace"), ("stop", "top!"))
    assert [words.add(byte) for byte in "né".encode()] == ["n", "", "é"]
    assert [words.add(byte) for byte in b"sto"] == ["", "", ""]
    assert words.add(ord("x")) == "stox"
    assert [words.add(byte) for byte in b"a stop"] == ["a", " ", "", "", "", ""]
    assert words.stopped and words.sent == "néstoxa " and words.rest() == ""
    # A token that completes two of them ends the text at the first.
    words = TextStream("".join, ("cd", "a", "bc"))
    assert words.add("xabcd") == "x" and words.stopped


def test_words_behind_text_that_a_tokenizer_changes_are_still_sent():
    """A tokenizer that falls back to bytes decodes a run of them anew with each byte: a wrong one spoils those before it."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁hello": 256, "▁you": 257, "<unk>": 258}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    words = TextStream(tokenizer.decode)
    assert [words.add(token) for token in (*"é".encode(), 0xFF, 256, 257)] == [
        "",
        "é",
        "",
        "\ufffd\ufffd hello",
        " you",
    ]
    assert words.sent == "\ufffd\ufffd\ufffd hello you" and words.rest() == ""


def test_the_thread_outlives_whatever_fails_behind_a_batch(model):
    """A decoder that fails on the last words, or a metric, must not leave all later requests without an answer."""
    heard, failing = [], [True]

    def watch(jobs, seconds):
        if failing:
            raise ValueError("a metric failed")

    def job(decode):
        kinds = ("text",)
        settings = {"steps": 1, "guidance": None, "max_tokens": 2, "temperature": 0.0, "top_p": 1.0}
        work = Continue(model=model, kinds=kinds, **settings)
        return Job(
            work=work,
            inputs=["a cat"],
            seed=0,
            index=0,
            words=TextStream(decode),
            notify=lambda j, new: heard.append(new),
        )

    def broken(ids):
        raise ValueError("a tokenizer failed")

    made = Batches(4, 4, watch)
    made.start()
    first, second, third = job(model.backbone.decode), job(model.backbone.decode), job(model.backbone.decode)
    made.put([first])
    until(lambda: first.error is not None or (heard and heard[-1] is None and not made.running))
    failing.clear()
    second.words.rest = lambda: broken([])
    made.put([second])
    until(lambda: second.error is not None)
    heard.clear()
    made.put([third])
    until(lambda: heard and heard[-1] is None)
    made.close(10)
    assert str(second.error) == "a tokenizer failed" and third.error is None and third.answer


def test_when_to_come_again_counts_what_runs_and_what_was_answered_alone(monkeypatch):
    clock, gate = [0.0], threading.Event()
    monkeypatch.setattr(batches, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Work:
        def choose(self, alike, most):
            return alike[:most]

        def __init__(self, end, seconds=0.0):
            self.end, self.seconds = end, seconds

        def run(self, jobs):
            clock[0] += self.seconds
            self.end(jobs)
            return [["a"]] * len(jobs)

    def fail(jobs):
        raise XFusionError("no")

    def abandon(jobs):
        queue.forget(jobs)
        raise batches._Abandoned

    def jobs(count, work):
        settings = {"seed": 0, "index": 0, "notify": lambda job, new: None}
        return [Job(work=work, inputs=[], words=TextStream(str), **settings) for _ in range(count)]

    queue = Batches(2, 2)
    queue.start()
    for work in (
        Work(lambda jobs: None, seconds=12.0),  # 6 for each of two
        Work(fail),
        Work(abandon),
        Work(lambda jobs: queue.forget(jobs)),  # as words do that nobody hears any more
    ):
        queue.put(made := jobs(2, work))
        until(lambda made=made: not queue.waiting and not queue.running)
    for _ in range(2):
        queue.put(jobs(2, Work(lambda jobs: gate.wait(20))))
        until(lambda: queue.running)
    with pytest.raises(Refused, match="^2 answers wait, and no more than 2 may: try again later$") as refused:
        queue.put(jobs(1, None))
    assert refused.value.headers == {"Retry-After": "8"}  # of four answers, each of 1 + 0.2 * (6 - 1) seconds
    gate.set()
    queue.close(10)


def test_jobs_that_nobody_waits_for_when_they_get_other_work_are_let_go():
    """Else they count as running, with all that they hold, until the next request comes."""
    moved = threading.Event()

    class Deciding:
        def choose(self, alike, most):
            return alike[:most]

        def run(self, jobs):
            queue.forget(jobs)
            for job in jobs:
                job.work = object()
            moved.set()

    job = Job(work=Deciding(), inputs=[], seed=0, index=0, words=TextStream(str), notify=lambda job, new: None)
    queue = Batches(4, 4)
    queue.put([job])
    queue.start()
    assert moved.wait(10)
    until(lambda: not queue.running)
    assert not queue.waiting
    queue.close(10)


# ---------------------------------------------------------------------------------------------------------- pictures


def test_pictures_in(client, model, picture):
    answer = client.chat.completions.create(model="dual-tower", messages=look(picture, "what is this?"), max_tokens=8)
    (expected,) = model.generate([picture, "what is this?"], max_tokens=8)
    assert answer.choices[0].message.content == expected
    assert answer.usage.prompt_tokens == 16 + len(model.backbone.encode("what is this?"))


def test_a_pack_that_reads_no_picture_draws_behind_a_turn_of_its_own(model):
    turns = [*say("a red apple"), {"role": "assistant", "content": "sure"}]
    body = json.dumps({"model": "drawer", "messages": turns, "modalities": ["image"], "steps": 1})
    with running({"drawer": draw_only(model.backbone)}, TINY) as found:
        status, answer = post(found, "/v1/chat/completions", body)
    assert status == 200 and len(answer["choices"][0]["message"]["images"]) == 1


def test_pictures_out_of_a_conversation(client, model):
    call = {"model": "dual-tower", "messages": say("a red apple"), "seed": 4, "extra_body": {"steps": 3}}
    answer = client.chat.completions.create(**call, modalities=["image"])
    message = answer.choices[0].message
    (expected,) = model.generate(["a red apple", xfusion.Image()], seed=4, steps=3)
    drawn = from_url(message.images[0]["image_url"]["url"])
    assert message.content is None and apart(drawn, expected) == 0
    assert drawn.info["seed"] == "4" and drawn.info["pack_fingerprint"] == model.fingerprint

    both = client.chat.completions.create(**call, modalities=["image", "text"], max_tokens=6)
    expected = model.generate(["a red apple", xfusion.Image(), ""], seed=4, steps=3, max_tokens=6)
    assert apart(from_url(both.choices[0].message.images[0]["image_url"]["url"]), expected[0]) == 0
    assert both.choices[0].message.content == expected[1]
    assert_streams_picture_first(
        client, {**call, "modalities": ["image", "text"], "max_tokens": 6}, both.choices[0].message
    )

    # What was drawn goes back as it came.
    again = [*call["messages"], message.to_dict(), {"role": "user", "content": "what is this?"}]
    answer = client.chat.completions.create(model="dual-tower", messages=again, max_tokens=6)
    (expected,) = model.generate(["a red apple\n", drawn, "\nwhat is this?"], max_tokens=6)
    assert answer.choices[0].message.content == expected

    chunks = list(client.chat.completions.create(**call, modalities=["image"], stream=True))
    (streamed,) = [c.choices[0].delta.images for c in chunks if getattr(c.choices[0].delta, "images", None)]
    assert streamed == message.images


def assert_streams_picture_first(client, call, message):
    """A stream sends the picture of a message as soon as it is drawn, and its words behind it."""
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**call, stream=True)]
    kinds = ["images" if getattr(delta, "images", None) else "words" for delta in deltas if delta.content != ""]
    assert kinds[0] == "images" and kinds.count("images") == 1 and kinds.count("words") >= 2
    (images,) = [delta.images for delta in deltas if getattr(delta, "images", None)]
    assert images == message.images
    assert "".join(delta.content or "" for delta in deltas) == message.content


def test_the_opening_head_decides_where_a_request_asks_it_to(client, model, monkeypatch):
    call = {"model": "dual-tower", "messages": say("draw a red apple"), "seed": 4, "max_tokens": 6}
    with pytest.raises(openai.BadRequestError, match="has no opening head"):
        client.chat.completions.create(**call, extra_body={"draw": "auto"})
    head = Opening(64).requires_grad_(False)
    head.opens.weight.zero_()
    monkeypatch.setattr(model, "opening", head)
    head.opens.bias.fill_(-9.0)
    plain = client.chat.completions.create(**call)
    said = client.chat.completions.create(**call, extra_body={"draw": "auto"})
    assert said.choices[0].message.content == plain.choices[0].message.content
    head.opens.bias.fill_(9.0)
    drawn = client.chat.completions.create(**call, extra_body={"draw": "auto", "steps": 3, "size": "32x32"})
    picture, words = model.answer(say("draw a red apple"), seed=4, steps=3, max_tokens=6, size=32)
    message = drawn.choices[0].message
    found = from_url(message.images[0]["image_url"]["url"])
    assert found.size == (32, 32) and apart(found, picture) == 0 and message.content == words
    assert_streams_picture_first(client, {**call, "extra_body": {"draw": "auto", "steps": 3, "size": "32x32"}}, message)
    assert client.chat.completions.create(**call).choices[0].message.content == plain.choices[0].message.content


def test_what_the_head_opens_is_drawn_as_one_batch_and_greedy_text_is_another(model, monkeypatch):
    subjects = ["draw a red apple", "who are you", "paint two blue birds", "a cat as a picture", "what is it"]
    draws = [True, False, True, True, False]
    talks = [say(words) for words in subjects]
    monkeypatch.setattr(model, "opening", opening_head(model.backbone, talks, draws))
    for temperature, of_words in ((0.5, [[31], [34]]), (0.0, [[31, 34]])):
        heard, sizes = [], []
        call = {"draw": "auto", "steps": 3, "max_tokens": 6, "temperature": temperature}
        jobs = []
        for i, talk in enumerate(talks):
            asked = requests.parse(requests.Chat, {"messages": talk, "seed": 30 + i, **call})
            (job,), _ = reading.chat(asked, model, TINY, frozenset())
            job.notify = lambda job, new, heard=heard: heard.append(job.seed) if new is None else None
            jobs.append(job)
        queue = Batches(8, 8, lambda done, seconds, sizes=sizes: sizes.append([job.seed for job in done]))
        queue.put(jobs)
        queue.start()
        until(lambda heard=heard: len(heard) == 5)
        queue.close(10)
        assert sizes == [[30, 32, 33], *of_words] and heard == [30, 32, 33, 31, 34]
        for job, talk in zip(jobs, talks, strict=True):
            expected = model.answer(talk, seed=job.seed, steps=3, max_tokens=6, temperature=temperature)
            assert job.error is None and job.answer[-1] == expected[-1]
            assert len(job.answer) == len(expected) and (len(expected) == 1 or apart(job.answer[0], expected[0]) <= 2)


def test_a_line_break_ends_an_answer_about_a_picture_behind_words(client, model, picture, monkeypatch):
    ids = model.backbone.encode("red apple\nred apple")
    script = iter(())
    monkeypatch.setattr(
        type(model.text_objective),
        "choose",
        staticmethod(lambda logits, *_: torch.tensor([next(script)] * len(logits))),
    )

    def ask(*messages):
        nonlocal script
        script = iter(ids)
        call = {"model": "dual-tower", "messages": messages, "max_tokens": len(ids)}
        choice = client.chat.completions.create(**call).choices[0]
        return choice.message.content, choice.finish_reason

    assert ask(*look(picture, "what is this?")) == ("red apple\nred apple", "length")
    turns = [*say("hello"), {"role": "assistant", "content": "good day"}]
    assert ask(*turns, *look(picture, "what is this?")) == ("red apple", "stop")


def test_a_conversation_that_cannot_be_decided_fails_alone(model):
    with opens_always(model):
        first, second, third = (
            reading.chat(
                requests.parse(requests.Chat, {"messages": say("a cat"), "draw": "auto", "steps": 1, "max_tokens": 2}),
                model,
                TINY,
                frozenset(),
            )[0][0]
            for _ in range(3)
        )
        second.inputs = [*second.inputs, {"role": "assistant", "content": "no"}]
        heard = []
        queue = Batches(8, 8)
        for job in (first, second, third):
            job.notify = lambda job, new: heard.append(job) if new is None else None
        queue.put([first, second, third])
        queue.start()
        until(lambda: len(heard) == 3)
        queue.close(10)
    assert "behind a turn of the user" in str(second.error)
    assert [(job.error, len(job.answer)) for job in (first, third)] == [(None, 2)] * 2


def test_own_pictures_are_read_as_far_as_the_limit_goes_and_called_so_beyond(client, model, picture):
    drawn = model.draw(["a cat", "a dog", "a tree"], seed=1, steps=1)

    def turn(i):
        images = [{"type": "image_url", "image_url": {"url": as_url(drawn[i])}}]
        return [*say(str(i)), {"role": "assistant", "content": f"it is {i}", "images": images}]

    def ask(*messages, **more):
        made = client.chat.completions.create(model="dual-tower", messages=messages, max_tokens=6, extra_body=more)
        return made.choices[0].message.content

    # Two are read: the newest, or what the user shows and the newest.
    (expected,) = model.generate(
        ["0\n(picture)\nit is 0\n1\n", drawn[1], "it is 1\n2\n", drawn[2], "it is 2\nand?"], max_tokens=6
    )
    assert ask(*turn(0), *turn(1), *turn(2), *say("and?")) == expected
    seen = square_picture(picture, SIDE)
    (expected,) = model.generate(
        ["0\n(picture)\nit is 0\n1\n(picture)\nit is 1\n2\n", drawn[2], "it is 2\n", seen, "and?"], max_tokens=6
    )
    assert ask(*turn(0), *turn(1), *turn(2), *look(picture, "and?")) == expected
    with pytest.raises(openai.BadRequestError, match="pictures is 3, more than the 2"):
        ask(*turn(0), *look(picture, "a"), *look(picture, "b"), *look(picture, "c"))


@pytest.mark.parametrize("draws_alone", [False, True])
def test_twelve_pictures_drawn_in_one_conversation(model, draws_alone):
    pack = draw_only(model.backbone) if draws_alone else model
    limits = replace(TINY, pictures=8)
    with opens_always(pack), running({"tiny": pack}, limits) as server, server.client() as client:
        messages = []

        def ask(words, **more):
            messages.extend(say(words))
            made = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, **more)
            messages.append(made.choices[0].message.to_dict())
            return made.choices[0].message

        for number in range(12):
            how = {"modalities": ["image"]} if number % 2 else {"draw": "auto"}
            assert len(ask(f"{number} cats", extra_body={"steps": 1, **how}).images) == 1
        assert ask("what is this?").content is not None
        (user,) = look(Noise(1).picture(0, 32), "and this?")
        asked = {"model": "tiny", "messages": [*messages, user], "max_tokens": 2}
        if draws_alone:
            with pytest.raises(openai.BadRequestError, match="this model cannot read pictures: it can draw, text"):
                client.chat.completions.create(**asked)
        else:
            assert client.chat.completions.create(**asked).choices[0].message.content is not None


def test_a_pack_that_only_draws_answers_of_its_pictures_by_what_they_are_called(model):
    pack = draw_only(model.backbone)
    with running({"draws": pack}, TINY) as server, server.client() as client:
        call = {"model": "draws", "max_tokens": 6}
        first = client.chat.completions.create(
            **call, messages=say("a red apple"), modalities=["image"], extra_body={"steps": 1}
        )
        messages = [*say("a red apple"), first.choices[0].message.to_dict(), *say("what is this?")]
        found = client.chat.completions.create(**call, messages=messages).choices[0].message.content
        called = [*say("a red apple"), {"role": "assistant", "content": "(picture)"}, *say("what is this?")]
        assert found == base_answer(pack, called, 6, do_sample=False)


def test_images_generations(client, model):
    answer = client.images.generate(
        model="dual-tower",
        prompt="two blue birds",
        n=3,
        size="32x32",
        extra_body={"seed": 7, "steps": 4, "guidance": 2},
    )
    expected = model.draw(["two blue birds"] * 3, seed=7, steps=4, guidance=2, size=32)
    for i, (one, other) in enumerate(zip(answer.data, expected, strict=True)):
        assert one.seed == 7 + i
        assert apart(from_base64(one.b64_json), other) <= 2
        single = model.draw(["two blue birds"], seed=7 + i, steps=4, guidance=2, size=32)[0]
        assert apart(from_base64(one.b64_json), single) <= 2
    assert answer.size == "32x32" and answer.drawn_at == f"{SIDE}x{SIDE}"
    url = client.images.generate(prompt="a cat", response_format="url", extra_body={"seed": 1, "steps": 2}).data[0].url
    assert apart(from_url(url), model.draw(["a cat"], seed=1, steps=2)[0]) == 0
    without = [client.images.generate(prompt="a cat", extra_body={"steps": 1}).data[0] for _ in range(2)]
    assert without[0].seed != without[1].seed


def test_images_edits(client, model, picture):
    mask = Image.new("L", picture.size, "black")
    mask.paste("white", (0, 0, 16, 32))
    expected = model.inpaint(picture, mask, "a house", seed=2, steps=3)
    call = {"prompt": "a house", "extra_body": {"seed": 2, "steps": 3}}
    answer = client.images.edit(image=("a.png", png(picture)), mask=("m.png", png(mask)), **call)
    assert apart(from_base64(answer.data[0].b64_json), expected) == 0
    # OpenAI's masks say it by transparency, and so may the picture itself.
    holed = picture.copy()
    holed.putalpha(mask.point([255] + [0] * 255))
    answer = client.images.edit(image=png(picture), mask=png(holed), n=2, **call)
    assert apart(from_base64(answer.data[0].b64_json), expected) <= 2
    # A mask lies as its tag turns it, and is white from half on.
    turned, file = mask.transpose(Image.Transpose.ROTATE_90), io.BytesIO()
    tag = turned.getexif()
    tag[0x0112] = 6
    turned.save(file, "PNG", exif=tag)
    for told in (file.getvalue(), png(mask.point([127] * 128 + [128] * 128))):
        same = client.images.edit(image=png(picture), mask=told, **call)
        assert apart(from_base64(same.data[0].b64_json), expected) <= 2
    # What an editor saves without a transparent pixel says it by white.
    opaque = mask.convert("RGBA")
    same = client.images.edit(image=png(picture), mask=png(opaque), **call)
    assert apart(from_base64(same.data[0].b64_json), expected) <= 2
    other = model.inpaint(picture, mask, "a house", seed=3, steps=3)
    assert apart(from_base64(answer.data[1].b64_json), other) <= 2
    alone = client.images.edit(image=png(holed), **call)
    unstreamed = client.images.edit(image=png(holed), **call, stream=False)  # which a form has as text
    assert unstreamed.data[0].b64_json == alone.data[0].b64_json
    with pytest.raises(openai.BadRequestError, match="stream: Input should be False"):
        client.images.edit(image=png(holed), prompt="a house", extra_body={"stream": True})
    white = picture.copy()
    white.paste("white", mask=mask)  # what shows through, as far as a kept token sees it
    white = model.inpaint(white, mask, "a house", seed=2, steps=3)
    assert apart(from_base64(alone.data[0].b64_json), white) <= 2
    for wrong, complaint in (
        ({"image": png(picture)}, "no mask"),
        ({"image": png(picture), "mask": png(mask.resize((8, 8)))}, "8 x 8"),
        ({"image": b"%PDF-1.7", "mask": png(mask)}, "PDF"),
        (
            {"image": png(picture), "mask": png(Image.new("L", picture.size))},
            "nothing to draw anew in its middle square",
        ),
        ({"image": [png(picture), png(picture)], "mask": png(mask)}, "one picture"),
    ):
        with pytest.raises(openai.BadRequestError, match=complaint):
            client.images.edit(**wrong, **call)


# ------------------------------------------------------------------------------------------------- queue and batches


def ask(server, answers, **call):
    """Ask in a thread; the answer, or the error, goes to a list."""

    def run():
        with server.client() as client:
            try:
                answers.append((call["seed"], client.images.generate(prompt="a cat", extra_body={**call, "steps": 3})))
            except openai.APIError as error:
                answers.append((call["seed"], error))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_requests_of_one_kind_go_through_together(server, client, model, gate):
    answers, threads = [], [ask(server, answers := [], seed=100)]
    until(lambda: gate.sizes == [1])
    for seed in (1, 2, 3, 4, 5):
        threads.append(ask(server, answers, seed=seed))
        until(lambda seed=seed: len(server.batches.waiting) == seed)
    gate.set()
    for thread in threads:
        thread.join()
    assert gate.sizes == [1, 4, 1]
    for seed, answer in answers:
        assert apart(from_base64(answer.data[0].b64_json), model.draw(["a cat"], seed=seed, steps=3)[0]) <= 2
    assert 'xfusion_batch_size_bucket{le="4.0"}' in get(server, "/metrics")


def test_beyond_the_queue_is_429(server, client, gate):
    answers = []
    threads = [ask(server, answers, seed=0)]
    until(lambda: gate.sizes == [1])
    threads += [ask(server, answers, seed=seed) for seed in range(1, 9)]
    until(lambda: len(server.batches.waiting) == 8)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="dual-tower", messages=say("a"))
    assert caught.value.code == "queue_full" and 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert json.loads(get(server, "/health"))["waiting"] == 8
    gate.set()
    for thread in threads:
        thread.join()
    assert len(answers) == 9 and not any(isinstance(a, Exception) for _, a in answers)


def test_a_deadline_and_a_disconnect_free_their_places(models, gate):
    with running(models, Limits(queue=8, batch=4, seconds=1.0)) as server, server.client() as client:
        answers = []
        first = ask(server, answers, seed=0)
        until(lambda: gate.sizes == [1])
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model="dual-tower", messages=say("a"), n=2)
        assert caught.value.status_code == 504 and caught.value.code == "deadline"
        assert not server.batches.waiting
        first.join()
        assert answers[0][1].status_code == 504
        gate.set()

    gate.clear()
    gate.sizes.clear()
    with running(models, TINY) as server:
        streams = []
        for stream in (False, True):
            body = {"model": "dual-tower", "messages": say("a red apple"), "n": 2, "stream": stream}
            parts = urllib.parse.urlsplit(server.address)
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            streams.append(connection)
            if not stream:
                until(lambda: gate.sizes == [2])  # both answers are one row
        until(lambda: len(server.batches.waiting) == 2)
        running_jobs = list(server.batches.running)
        for connection in streams:
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
        until(lambda: not server.batches.waiting and all(job.dropped for job in running_jobs))
        gate.set()
        until(lambda: not server.batches.running)
        assert all(len(job.words.ids) <= 1 for job in running_jobs), "nobody listened any more"
        with server.client() as client:
            assert client.chat.completions.create(model="dual-tower", messages=say("a"), max_tokens=2)


def test_what_runs_ends_when_its_client_unplugs_in_the_middle(models, monkeypatch):
    decode = models["dual-tower"].backbone.decode
    monkeypatch.setattr(models["dual-tower"].backbone, "decode", lambda ids: time.sleep(0.05) or decode(ids))
    with running(models, Limits(tokens=300)) as server, server.client() as client:
        call = {"model": "dual-tower", "messages": say("a"), "temperature": 2.0, "seed": 0, "max_tokens": 300}
        with client.chat.completions.create(**call, stream=True) as stream:
            for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            (job,) = server.batches.running
        until(lambda: not server.batches.running, seconds=10)
        assert job.dropped and len(job.words.ids) < 100


def test_a_failing_job_takes_no_other_of_its_batch_with_it(caplog):
    class Work:
        def choose(self, alike, most):
            return alike[:most]

        def run(self, jobs):
            if any(job.inputs == "poison" for job in jobs):
                raise XFusionError("poison")
            return [[job.inputs] for job in jobs]

    work, ended = Work(), threading.Semaphore(0)
    jobs = [
        Job(
            work=work,
            inputs=given,
            seed=0,
            index=0,
            words=TextStream(lambda ids: ""),
            notify=lambda job, new: ended.release(),
        )
        for given in ("a", "poison", "b")
    ]
    batches = Batches(queue=4, batch=4)
    batches.put(jobs)
    batches.start()
    for _ in jobs:
        assert ended.acquire(timeout=20)
    assert [job.answer for job in jobs] == [["a"], [], ["b"]] and str(jobs[1].error) == "poison"
    batches.close(5)
    with pytest.raises(Refused, match="stopping"):
        batches.put(jobs)


def test_what_a_failed_batch_held_is_let_go_before_its_jobs_are_computed_one_by_one():
    """Else the caches of a batch that ran out of memory take it from the jobs that are tried again."""

    class Held:
        """Stands for the caches of a batch."""

    class Work:
        def choose(self, alike, most):
            return alike[:most]

        def run(self, jobs):
            alive.append([reference() is not None for reference in held])
            caches = Held()
            held.append(weakref.ref(caches))
            raise XFusionError(f"{len(jobs)} do not fit")

    held, alive, ended, work = [], [], threading.Semaphore(0), Work()
    settings = {"work": work, "inputs": None, "seed": 0, "index": 0, "notify": lambda job, new: ended.release()}
    jobs = [Job(words=TextStream(lambda ids: ""), **settings) for _ in range(3)]
    batches = Batches(queue=4, batch=4)
    batches.put(jobs)
    batches.start()
    for _ in jobs:
        assert ended.acquire(timeout=20)
    assert alive == [[], [False], [False] * 2, [False] * 3]
    until(lambda: not batches.running)
    assert [str(job.error) for job in jobs] == ["1 do not fit"] * 3 and held[-1]() is None
    batches.close(5)


@pytest.mark.parametrize("in_time", [True, False])
def test_a_server_that_stops_answers_everyone(models, picture, monkeypatch, capsys, in_time):
    """What waits is refused at once, what runs gets its grace, and nobody is left with half a word."""
    held = threading.Semaphore(0)

    def wrap(run):
        def waiting(work, jobs):
            jobs[0].notify(jobs[0], "begun ")
            assert held.acquire(timeout=60)
            return run(work, jobs)

        return waiting

    wrap_runs(monkeypatch, wrap)
    with running(models, replace(TINY, queue=16, grace=20 if in_time else 1, seconds=60)) as server:
        chat = {"model": "dual-tower", "messages": say("a red apple"), "max_tokens": 4}
        bodies = [
            ("chat/completions", chat | {"stream": True}),
            ("chat/completions", chat),
            ("chat/completions", chat | {"stream": True}),
            ("chat/completions", chat | {"messages": look(picture, "hm"), "n": 2}),
            ("images/generations", {"prompt": "a cat", "steps": 1}),
        ]
        open_ones = []
        for path, body in bodies:
            open_ones.append(begun(server, json.dumps(body).encode(), path=f"/v1/{path}"))
            until(lambda: server.batches.running)
            until(lambda: len(server.batches.waiting) == (0, 1, 2, 4, 5)[len(open_ones) - 1])
        open_ones.append(begun(server, b"{", 100))
        until(lambda: server.app.state.server.held_bytes == 1)
        server.server.should_exit = True
        found = [answered(one) for one in open_ones[1:]]
        if in_time:
            assert server.batches.running and not server.batches.open
            held.release()
        first = answered(open_ones[0])
        for one in open_ones:
            one.close()
        held.release()
    errors = []
    for stream, (status, headers, body) in zip((False, True, False, False, False), found, strict=True):
        if stream:
            assert status == 200
            events = [json.loads(line[6:]) for line in body.decode().split("\n\n") if line]
            errors.append(shape(events[-1]))
        else:
            assert status == 503 and headers["Retry-After"] and headers["Content-Type"] == "application/json"
            errors.append(shape(json.loads(body)))
    lines = [line[6:] for line in first[2].decode().split("\n\n") if line]
    if in_time:
        assert lines[-1] == "[DONE]" and json.loads(lines[-2])["choices"][0]["finish_reason"]
    else:
        assert json.loads(lines[1])["choices"][0]["delta"]["content"] == "begun "
        errors.append(shape(json.loads(lines[-1])))
    assert {(error["message"], error["code"]) for error in errors} == {("the server is stopping", "stopping")}
    said = capsys.readouterr().err
    assert "Traceback" not in said and "Exception" not in said, said


def test_a_client_that_does_not_read_holds_up_no_stop(models, monkeypatch, capsys):
    """Its connection is cut behind the grace, without a traceback."""

    def much(work, jobs):
        for _ in range(30):
            jobs[0].notify(jobs[0], "much " * 200_000)
        return [["much"]]

    monkeypatch.setattr(Words, "run", much)
    with running(models, replace(TINY, grace=1)) as server:
        call = {"model": "dual-tower", "messages": say("a"), "stream": True}
        with begun(server, json.dumps(call).encode()):
            until(lambda: server.batches._seconds != 1.0)  # the batch is done, its words are not sent
            time.sleep(0.5)
            assert server.server.server_state.connections
            server.server.should_exit = True
            until(lambda: not server.server.server_state.connections)
    said = capsys.readouterr().err
    assert "Traceback" not in said and "Exception" not in said, said


def test_what_breaks_inside_is_not_told(server, client, monkeypatch, caplog):
    run = Continue.run

    def failing(work, jobs):
        if any(job.inputs[0] == "poison" for job in jobs):
            raise RuntimeError("secret: /etc/passwd")
        return run(work, jobs)

    monkeypatch.setattr(Continue, "run", failing)
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="poison")
    assert "secret" not in str(caught.value) and caught.value.code == "internal_error"
    assert client.images.generate(prompt="a cat", extra_body={"steps": 1}).data
    with pytest.raises(openai.APIError, match="the server failed to answer") as caught:
        list(client.chat.completions.create(
            model="dual-tower", messages=say("poison"), modalities=["image"], stream=True))  # fmt: skip
    assert "secret" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ bad requests


def test_errors_are_in_openais_shape(server):
    ask = {"messages": say("a")}
    huge = as_url(Image.new("L", (200, 200)))
    cases = [
        ("chat/completions", {}, 400, "messages"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role"),
        ("chat/completions", ask | {"model": "gpt-4"}, 404, None),
        ("chat/completions", ask | {"tools": [{"type": "function"}]}, 400, "tools"),
        ("chat/completions", ask | {"n": 5}, 400, "n"),
        ("chat/completions", ask | {"n": 0}, 400, "n"),
        ("chat/completions", ask | {"seed": -1}, 400, "seed"),
        ("chat/completions", ask | {"temperature": 1e999}, 400, "temperature"),
        ("chat/completions", ask | {"temperature": 3}, 400, "temperature"),
        ("chat/completions", ask | {"top_p": 0}, 400, "top_p"),
        ("chat/completions", ask | {"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
        ("chat/completions", ask | {"stop": ""}, 400, None),
        ("chat/completions", ask | {"max_tokens": 25}, 400, "max_tokens"),
        ("chat/completions", ask | {"modalities": ["audio"]}, 400, "modalities.0"),
        ("chat/completions", {"messages": say("a" * 501)}, 400, "characters"),
        ("chat/completions", {"messages": [look(Image.new("L", (8, 8)), "a")[0]] * 3}, 400, "pictures"),
        ("images/generations", {"prompt": "a", "size": "8x16"}, 400, "size"),
        ("images/generations", {"prompt": "a", "size": "x"}, 400, "size"),
        ("images/generations", {"prompt": "a", "size": 4096}, 400, None),
        ("images/generations", {"prompt": "a", "steps": 31}, 400, "steps"),
        ("images/generations", {"prompt": "a", "guidance": float("nan")}, 400, None),
        ("images/generations", {"prompt": "\ud800"}, 400, None),
        ("images/generations", {}, 400, "prompt"),
        ("images/edits", {"prompt": "a"}, 400, None),
        ("embeddings", {"model": "dual-tower", "input": "a"}, 400, "model"),
        ("embeddings", [], 400, None),
        ("audio/speech", {}, 404, None),
    ]
    for url in ("http://localhost/a.png", "file:///etc/passwd", "data:image/png,abc", "data:image/png;base64,%%", huge,
                "data:;base64,", "http://[", "data:application/pdf;base64,JVBERi0xLjc="):  # fmt: skip
        block = {"type": "image_url", "image_url": {"url": url}}
        cases.append(("chat/completions", {"messages": [{"role": "user", "content": [block]}]}, 400, None))
    for path, body, status, param in cases:
        found, answer = post(server, f"/v1/{path}", json.dumps(body))
        assert found == status, (path, body, answer)
        assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
        assert "Traceback" not in answer["error"]["message"] and "\n" not in answer["error"]["message"]
        assert param is None or answer["error"]["param"] == param, answer
    for body in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"messages": "' + b"a" * 199_000 + b'"}'):
        assert post(server, "/v1/chat/completions", body)[0] == 400
        assert post(server, "/v1/embeddings", body)[0] == 400
    assert post(server, "/v1/chat/completions", json.dumps(ask | {"tools": []}))[0] == 200, "no tools are wanted"
    assert post(server, "/v1/models", b"")[0] == 405
    assert post(server, "/v1/images/edits", b"no form", {"Content-Type": "multipart/form-data; boundary=x"})[0] == 400
    assert post(server, "/v1/images/edits", b"no form", {"Content-Type": "multipart/form-data"})[0] == 400
    assert "100 million" not in get(server, "/health")


def test_bodies_are_bounded(server):
    status, answer = post(server, "/v1/chat/completions", b"a" * 200_001)
    assert status == 413 and answer["error"]["code"] == "too_large"
    status, _ = post(server, "/v1/chat/completions", iter([b"a" * 100_000] * 3))  # in chunks
    assert status == 413
    parts = urllib.parse.urlsplit(server.address)
    before = get(server, "/metrics").count('status="499"')
    with socket.create_connection((parts.hostname, parts.port)) as half:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100"
        half.sendall(head + b"\r\n\r\n{")
    until(lambda: get(server, "/metrics").count('status="499"') > before)


def shape(answer):
    """The error of an answer in OpenAI's shape."""
    assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}, answer
    return answer["error"]


def test_a_mistake_in_here_is_a_line_that_tells_nothing(server, monkeypatch):
    def mistaken(*_):
        raise ZeroDivisionError("what nobody elsewhere should read")

    monkeypatch.setattr(reading, "images", mistaken)
    status, answer = post(server, "/v1/images/generations", json.dumps({"prompt": "a cat"}))
    assert status == 500 and shape(answer)["code"] == "internal_error"
    assert "nobody elsewhere" not in json.dumps(answer)
    assert server.app.state.server.held_bytes == 0


def begun(server, body, length=None, path="/v1/chat/completions", kind="application/json"):
    """A connection on which a request's head and the beginning of its body were sent."""
    parts = urllib.parse.urlsplit(server.address)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=30)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: {length or len(body)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


def answered(connection):
    """Status, headers and body of the answer that comes on a connection."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, answer.headers, answer.read()


def test_a_body_that_does_not_come_is_given_up(server, monkeypatch):
    monkeypatch.setattr(tickets, "BODY_SECONDS", 0.5)
    with begun(server, b'{"messages": [', 1000) as slow:
        status, _, body = answered(slow)
    assert status == 408 and shape(json.loads(body))["code"] == "too_slow"
    assert shape(json.loads(body))["message"] == "the request was not sent within 0.5 seconds"
    assert server.app.state.server.held_bytes == 0


def test_the_deadline_counts_from_before_the_body(models, gate):
    with running(models, replace(TINY, seconds=4.0)) as server:
        body = json.dumps({"model": "dual-tower", "messages": say("a")}).encode()
        began = time.monotonic()
        with begun(server, body[:10], len(body)) as slow:
            time.sleep(3)
            slow.sendall(body[10:])
            status, _, answer = answered(slow)
        assert status == 504 and shape(json.loads(answer))["code"] == "deadline"
        assert 3.9 < time.monotonic() - began < 6.5, "it began when the body was there"
        gate.set()


def test_large_bodies_are_bounded_together(models):
    with running(models, replace(TINY, bodies=250_000)) as server:
        held = server.app.state.server
        ones = [begun(server, b"a" * 90_000, 100_000) for _ in range(2)]
        until(lambda: held.held_bytes == 180_000)
        for path in ("chat/completions", "images/generations", "images/edits", "embeddings"):
            kind = "multipart/form-data; boundary=x" if path == "images/edits" else "application/json"
            with begun(server, b"a" * 90_000, 100_000, f"/v1/{path}", kind) as third:
                status, headers, body = answered(third)
            assert status == 429 and shape(json.loads(body))["code"] == "bodies_full" and headers["Retry-After"] == "1"
        assert held.held_bytes == 180_000
        assert post(server, "/v1/images/generations", json.dumps({"prompt": "a cat", "steps": 1}))[0] == 200
        for one in ones:
            one.close()
        until(lambda: held.held_bytes == 0)
        assert post(server, "/v1/chat/completions", b"a" * 190_000)[0] == 400  # read whole, and no JSON
    with running(models, replace(TINY, bodies=1000)) as server:  # one alone is always taken
        assert post(server, "/v1/chat/completions", b"a" * 190_000)[0] == 400


@pytest.mark.parametrize("drips", ["head", "body", "body of unknown length", "handshake"])
def test_a_host_that_drips_holds_no_reader(models, picture, monkeypatch, drips):
    monkeypatch.setattr(requests, "FETCH_SECONDS", 1.0)
    file, left = png(picture), threading.Event()

    def drip(listener):
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.recv(65536)
            known = f"Content-Length: {len(file)}\r\n" if drips != "body of unknown length" else ""
            head = f"HTTP/1.0 200 OK\r\n{known}\r\n".encode()
            if drips == "handshake":
                connection.sendall(b"\x16\x03\x03\x40\x00")  # a record of 16,384 bytes
            elif drips != "head":
                connection.sendall(head + file[:-10])
            for byte in (head + file) * 9 if drips == "head" else bytes(1000):
                connection.sendall(bytes([byte]))
                time.sleep(0.3)
        left.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=drip, args=(listener,), daemon=True).start()
        scheme = "https" if drips == "handshake" else "http"
        url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/a.png"
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
        with running(models, hosts=frozenset({"127.0.0.1"})) as server, server.client() as client:
            with pytest.raises(openai.BadRequestError, match="host did not send it within 1 seconds"):
                client.chat.completions.create(model="dual-tower", messages=messages, max_tokens=4)
            assert left.wait(10), "the connection is still open"


def fetched(model, *urls):
    """The pictures of a request that names these addresses, read as the server reads them."""
    blocks = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    params = requests.parse(requests.Chat, {"messages": [{"role": "user", "content": blocks}]})
    hosts = frozenset({"127.0.0.1", "pictures.example"})
    return requests.messages(params, model, Limits(), hosts)[0]["content"]


@pytest.fixture
def slow_host(picture):
    """The port of a host that sends a picture after 0.4 seconds."""
    file = png(picture)

    def send(connection):
        with connection:
            connection.recv(65536)
            time.sleep(0.4)
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + file)

    def accept(listener):
        with suppress(OSError):
            while True:
                threading.Thread(target=send, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_the_pictures_of_a_request_share_the_time_of_fetching(model, picture, slow_host, monkeypatch):
    monkeypatch.setattr(requests, "FETCH_SECONDS", 1.0)
    url = f"http://127.0.0.1:{slow_host}/a.png"
    expected = square_picture(picture, SIDE)
    assert [apart(one, expected) for one in fetched(model, url, url)] == [0, 0]
    began = time.monotonic()
    line = (
        "image_url cannot be fetched: its host did not send it within 1 seconds, the time of all pictures of a request"
    )
    with pytest.raises(Refused, match=f"^{line}$"):
        fetched(model, *[url] * 8)
    assert 0.9 < time.monotonic() - began < 2


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_pictures_are_fetched_over_tls_from_hosts_that_prove_their_name(model, picture, tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    call = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *call.split(), *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def serve(listener):
        for _ in range(2):
            with suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True) as connection:
                assert connection.recv(65536).startswith(b"GET /a.png?b=1 HTTP/1.1\r\nHost: 127.0.0.1:")
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + png(picture))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/a.png?b=1"
        with pytest.raises(Refused, match="image_url cannot be fetched: .*certificate verify failed"):
            fetched(model, url)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert apart(fetched(model, url)[0], square_picture(picture, SIDE)) == 0


def test_the_time_of_fetching_begins_before_the_name_is_resolved(model, monkeypatch):
    monkeypatch.setattr(requests, "FETCH_SECONDS", 0.5)
    answered, resolve = threading.Event(), socket.getaddrinfo

    def slowly(host, *others, **settings):
        assert host != "pictures.example" or answered.wait(20)
        return resolve("127.0.0.1", *others, **settings)

    monkeypatch.setattr(socket, "getaddrinfo", slowly)
    began = time.monotonic()
    try:
        with pytest.raises(Refused, match="did not send it within 0.5 seconds"):
            fetched(model, "http://pictures.example/a.png")
        assert time.monotonic() - began < 2
    finally:
        answered.set()


def test_the_addresses_of_a_host_share_the_time_of_fetching(model, picture, slow_host, monkeypatch):
    """One at which nobody answers does not take all of it, and many of them no more."""
    monkeypatch.setattr(requests, "FETCH_SECONDS", 1.2)
    with socket.socket() as full, socket.socket() as last:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        last.connect(full.getsockname())  # no other connection is taken

        def resolve(addresses):
            found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

        resolve([full.getsockname(), ("127.0.0.1", slow_host)])
        assert apart(fetched(model, "http://pictures.example/a.png")[0], square_picture(picture, SIDE)) == 0
        began = time.monotonic()
        resolve([full.getsockname()] * 8)
        with pytest.raises(Refused, match="did not send it within 1.2 seconds"):
            fetched(model, "http://pictures.example/a.png")
        assert time.monotonic() - began < 3


def test_a_picture_of_a_hundred_megapixels_is_refused_undecoded(models):
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, format="PNG")
    with running(models) as server, server.client() as client:
        began = time.process_time()
        with pytest.raises(openai.BadRequestError, match="more than 16 million"):
            client.images.edit(image=file.getvalue(), prompt="a", mask=file.getvalue())
        assert time.process_time() - began < 2
        with pytest.raises(openai.BadRequestError, match="PDF"):
            client.images.edit(image=b"%PDF-1.7 hello", prompt="a")


def test_pictures_are_fetched_from_allowed_hosts_alone(models, picture, tmp_path):
    import functools
    import http.server

    picture.save(tmp_path / "a.png")

    class Files(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/a.png")
                self.end_headers()
                return
            super().do_GET()

    files = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=tmp_path))
    threading.Thread(target=files.serve_forever, daemon=True).start()
    try:
        with running(models, hosts=frozenset({"127.0.0.1"})) as server, server.client() as client:

            def ask(path, host="127.0.0.1"):
                block = {"type": "image_url", "image_url": {"url": f"http://{host}:{files.server_port}/{path}"}}
                messages = [{"role": "user", "content": [block]}]
                return client.chat.completions.create(model="dual-tower", messages=messages, max_tokens=4)

            (expected,) = models["dual-tower"].generate([picture], max_tokens=4)
            assert ask("a.png").choices[0].message.content == expected
            for path, host in (("moved", "127.0.0.1"), ("missing", "127.0.0.1"), ("a.png", "localhost")):
                with pytest.raises(openai.BadRequestError, match="image_url"):
                    ask(path, host)
    finally:
        files.shutdown()
        files.server_close()


def test_keys(models):
    with running(models, keys=frozenset({"right", "other"})) as server:
        for key in ("right", "other"):
            assert server.client(key).models.list().data
        for key in ("wrong", "righ", "right2"):
            with pytest.raises(openai.AuthenticationError) as caught:
                server.client(key).models.list()
            assert caught.value.code == "invalid_api_key"
        # What the client itself would not send.
        for sent in (b"Bearer", b"", b"right", "Bearer clé".encode(), "Bearer clé".encode("latin-1"),
                     b"Bearer right other", b"Basic right"):  # fmt: skip
            answer = httpx.get(f"{server.address}/v1/models", headers={b"Authorization": sent}, trust_env=False)
            assert answer.status_code == 401 and shape(answer.json())["code"] == "invalid_api_key", sent
        assert httpx.get(f"{server.address}/v1/models", trust_env=False).status_code == 401
        assert post(server, "/v1/chat/completions", b"{}")[0] == 401
        assert post(server, "/v1/chat/completions", b"{}", {"Authorization": "Basic right"})[0] == 401
        assert json.loads(get(server, "/health"))["status"] == "ok"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(server, "/metrics")


def as_called(server, name, path="/v1/models", **headers):
    """Status and body of a request that calls the server by a name."""
    parts = urllib.parse.urlsplit(server if isinstance(server, str) else server.address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    try:
        connection.putrequest("GET", path, skip_host=True)
        for header, value in ({"Host": name} | headers).items():
            connection.putheader(header, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_a_name_that_was_made_to_lead_here_is_refused(models, server):
    with running(models, names=own_names("127.0.0.1") | {"gpu.lan"}) as guarded:
        for name in ("127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST.:1", "[::1]:8000", "gpu.lan:80"):
            assert as_called(guarded, name)[0] == 200, name
        assert guarded.client().models.list().data
        for name in (
            "evil.example",
            "evil.example:8000",
            "127.0.0.1.evil.example",
            "localhost.evil.example:80",
            "",
            "a:b:c",
        ):
            for path in ("/v1/models", "/health", "/", "/v1/nothing", "/v1/chat/completions", "/health/"):
                status, answer = as_called(guarded, name, path)
                assert status == 403 and shape(answer)["code"] == "unknown_host", (name, path)
    assert as_called(server, "evil.example")[0] == 200  # whoever makes the application may take every name
    assert not own_names("0.0.0.0") and not own_names("gpu.lan") and "127.0.0.2" in own_names("127.0.0.2")


def test_what_is_wrong_with_a_field_is_one_line_about_it(server):
    pdf = {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERi0xLjc="}}
    for path, body, param, message in (
        ("chat/completions", {"messages": [{"role": "user", "content": [pdf]}]}, "messages.0.content.0",
         "Input tag 'file' found using 'type' does not match any of the expected tags: 'text', 'image_url', 'input_audio'"),
        ("chat/completions", {"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "valid string"),
        ("chat/completions", {"messages": say("a"), "stop": 3}, "stop", "valid string"),
        ("chat/completions", {"messages": say("a"), "stop": ["a", 3]}, "stop.1", "valid string"),
        ("images/generations", {"prompt": "a", "quality": "hd"}, "quality", "Input should be 'auto' or 'standard', not 'hd'"),
        ("embeddings", {"input": ["a", 3]}, "input.1", "valid string"),
    ):  # fmt: skip
        status, answer = post(server, f"/v1/{path}", json.dumps(body))
        assert status == 400 and shape(answer)["param"] == param and message in shape(answer)["message"], answer


def asked(server, method, path):
    """Status, headers and body of an answer to a request without a body."""
    parts = urllib.parse.urlsplit(server.address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def test_what_is_no_route_is_told_as_other_errors_are(server):
    for method in ("GET", "POST", "PUT", "OPTIONS"):
        for path in ("/", "/v1", "/v1/audio/speech", "/health/", "/docs", "/v1//models", "/v1/%2e%2e/x"):
            status, headers, body = asked(server, method, path)
            error = shape(json.loads(body))
            assert (status, error["code"]) == (404, "unknown_url"), (method, path)
            assert (
                "\n" not in error["message"]
                and "/v1/chat/completions" in error["message"]
                and headers["Content-Type"] == "application/json"
            )
    for method, path, allowed in (
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/models", "GET"),
        ("POST", "/health", "GET"),
        ("PATCH", "/v1/images/edits", "POST"),
        ("OPTIONS", "/v1/embeddings", "POST"),
    ):
        status, headers, body = asked(server, method, path)
        error = shape(json.loads(body))
        assert (status, error["code"], headers["Allow"]) == (405, "method_not_allowed", allowed), (method, path)
        assert error["message"] == f"{path} takes {allowed}, not {method}"
    assert asked(server, "HEAD", "/nothing")[0] == 404 and asked(server, "HEAD", "/health")[0] == 405


@pytest.mark.parametrize(
    ("options", "taken", "refused"),
    [
        ([], ["127.0.0.1"], ["evil.example", "gpu.lan"]),
        (["--allowed-names", "GPU.lan"], ["127.0.0.1", "gpu.lan"], ["evil.example"]),
        (["--host", "0.0.0.0"], ["127.0.0.1", "evil.example"], []),
        (["--keys"], ["127.0.0.1", "evil.example"], []),
    ],
)
def test_the_verb_answers_to_its_own_names(models, tmp_path, monkeypatch, options, taken, refused):
    from xfusion.apps.commands import serve as verb

    models["dual-tower"].save_pretrained(tmp_path / "pack")
    if options == ["--keys"]:
        (tmp_path / "keys").write_text("k1\n")
        options = ["--keys", str(tmp_path / "keys")]
    found = {}

    def serve(app, listener, grace):
        with listening_at(app, listener.dup()) as address:
            for name in (*taken, *refused):
                found[name] = as_called(address, name, Authorization="Bearer k1")[0]
        return 0.0

    monkeypatch.setattr(verb, "serve_until_stopped", serve)
    assert cli.main(["serve", str(tmp_path / "pack"), "--port", "0", "--device", "cpu", *options]) == 0
    assert found == dict.fromkeys(taken, 200) | dict.fromkeys(refused, 403)


def test_metrics_count_routes_and_statuses(server, client):
    client.models.list()
    post(server, "/v1/nowhere", b"")
    text = get(server, "/metrics")
    assert 'xfusion_requests_total{route="/v1/models",status="200"}' in text
    assert 'xfusion_requests_total{route="none",status="404"}' in text
    assert "xfusion_waiting 0.0" in text and "xfusion_request_seconds_bucket" in text


# -------------------------------------------------------------------------------------------------- the command line


def listening(process):
    """The address that a starting server prints."""
    for line in process.stderr:
        if line.startswith("serving at "):
            return line.split()[2].removesuffix("/v1")
    raise AssertionError("it ended")


def test_the_verb_serves_packs_on_one_base_and_stops_in_order(models, tmp_path):
    for name, made in models.items():
        made.save_pretrained(tmp_path / name)
    (tmp_path / "keys").write_text("k1\n\n")
    packs = [tmp_path / name for name in models]
    process = start("serve", *packs, "--port", "0", "--json", "--keys", tmp_path / "keys", "--limits.tokens", "300")
    try:
        address = listening(process)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="k1", max_retries=0, timeout=60)
        shown = client.models.list().data
        assert [m.id for m in shown] == list(models)
        call = {"messages": say("a"), "temperature": 2.0, "seed": 0, "max_tokens": 60, "stream": True}
        stream = client.chat.completions.create(model="dual-projection", **call)
        next(stream)
        process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert last.choices[0].finish_reason, "what was begun is finished"
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert json.loads(out)["models"] == list(models) and "Traceback" not in err
    finally:
        process.kill()
        process.communicate()


def test_bad_calls_of_the_verb(models, tmp_path, monkeypatch, capsys):
    models["dual-tower"].save_pretrained(tmp_path / "one")
    models["dual-tower"].save_pretrained(tmp_path / "two" / "one")
    (tmp_path / "none").write_text("\n")
    pack = str(tmp_path / "one")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for argv, complaint in (
            ([], "at least one pack"),
            (["emojy"], "no pack 'emojy'"),
            ([pack, str(tmp_path / "two" / "one"), "--port", "0"], "two packs are called 'one'"),
            ([pack, "--port", port], f"port {port}"),
            ([pack, "--port", "70000"], "70000"),
            ([pack, "--limits.queue", "0"], "--limits.queue 0"),
            ([pack, "--keys", str(tmp_path / "none")], "holds no key"),
            ([pack, "--host", "256.1.1.1"], "cannot listen"),
        ):
            assert cli.main(["serve", *argv]) == 2
            said = capsys.readouterr()
            assert complaint in said.err.splitlines()[-1], said.err
            assert said.out == ""
    assert os.environ.get("XFUSION_API_KEY") is None


def hear(*recordings):
    """A conversation about sounds, as the ``openai`` client sends them."""
    blocks = [
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}
        for data in recordings
    ]
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": "what is this"}]}]


def test_sounds_and_pictures_are_heard_and_seen_in_one_conversation(models, picture):
    seeing = make_model(models["dual-tower"].backbone, "dual tower, strided")
    hearer = hearing_model(seeing.backbone)
    packs = {"sees": seeing, "hears": hearer, "both": together(seeing, hearer)}
    wave = torch.rand(24, generator=torch.Generator().manual_seed(1)) - 0.5
    recording = as_wav(Sound(samples=wave, rate=SOUND_RATE))
    heard = decode(recording, "it")
    with running(packs, replace(TINY, sounds=2)) as server, server.client() as client:

        def ask(name, messages):
            made = client.chat.completions.create(model=name, messages=messages, max_tokens=6)
            return made.choices[0].message.content

        ((alone,), (beside,)) = (
            m.answer([{"role": "user", "content": [heard, "what is this"]}], draw="never", max_tokens=6)
            for m in (hearer, packs["both"])
        )
        assert ask("hears", hear(recording)) == ask("both", hear(recording)) == alone == beside
        assert ask("both", look(picture, "hm")) == ask("sees", look(picture, "hm"))
        mixed = hear(recording)
        mixed[0]["content"][:0] = look(picture, "first")[0]["content"]
        (expected,) = packs["both"].answer(
            [{"role": "user", "content": [square_picture(picture, 16), "first", heard, "what is this"]}],
            draw="never",
            max_tokens=6,
        )
        assert ask("both", mixed) == expected
        long = as_wav(Sound(samples=torch.zeros(100), rate=SOUND_RATE))
        for name, messages, said in (
            ("sees", hear(recording), "this model knows pictures, not sounds"),
            ("hears", look(picture, "hm"), "this model knows sounds, not pictures"),
            ("both", hear(b"RIFF but no sound"), "input_audio is not a sound"),
            ("both", hear(long), "a sound of 0.05 s is longer than the 0.015 s"),
            ("both", hear(*[recording] * 3), "sounds is 3, more than the 2"),
        ):
            with pytest.raises(openai.BadRequestError, match=said):
                ask(name, messages)
        drawn = client.images.generate(model="both", prompt="abc", extra_body={"seed": 3, "steps": 2}).data[0].b64_json
        assert apart(seeing.draw(["abc"], seed=3, steps=2)[0], from_base64(drawn)) == 0


def test_packs_of_one_base_share_it(models, tmp_path):
    from xfusion.apps.commands.base import load_models

    for name, made in models.items():
        made.save_pretrained(tmp_path / name / "pack")
        (tmp_path / name / "config.txt").touch()
    found = load_models([str(tmp_path / name) for name in models], device="cpu")
    assert list(found) == list(models)
    assert len({id(made.backbone) for made in found.values()}) == 1
    for name, made in found.items():
        assert apart(made.draw(["a cat"], steps=2)[0], models[name].draw(["a cat"], steps=2)[0]) == 0
    first = next(iter(models))
    models[first].save_pretrained(tmp_path / "again")
    both = load_models([f"{tmp_path / first}+{tmp_path / 'again'}", str(tmp_path / "again")], device="cpu")
    assert list(both) == [f"{first}+again", "again"]
    beside = both[f"{first}+again"]
    assert beside.backbone is both["again"].backbone
    assert apart(beside.draw(["a cat"], steps=2)[0], models[first].draw(["a cat"], steps=2)[0]) == 0
