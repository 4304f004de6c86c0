"""What keeps a server answering whatever is sent to it: bounds before anything is read, silent connections, pages elsewhere."""

import asyncio
import http.client
import io
import json
import socket
import sys
import threading
import time
import urllib.parse
from dataclasses import replace
from pathlib import Path

import httpx
import numpy
import openai
import pytest
import soundfile
import torch
from PIL import Image
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).parents[1]))

from apps.serving import from_base64, from_url, png, running, tiny_models, wrap_runs
from apps.test_serve import TINY, answered, base_answer, begun, get, hear, look, post, say, shape, until
from contracts.table import SOUND_RATE, Noise, hearing_model

from xfusion.apps import cli
from xfusion.apps.commands.base import UsageError
from xfusion.apps.commands.serve import listen
from xfusion.apps.server import answers, reading, requests, stopping, tickets
from xfusion.apps.server.batches import Words
from xfusion.data.sequence import Sound
from xfusion.data.sounds import as_wav
from xfusion.generation import TextStream


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("base"), "dual tower")


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
def held(monkeypatch):
    """Holds every batch until it is opened."""
    event = threading.Event()
    wrap_runs(monkeypatch, lambda run: lambda work, jobs: event.wait(60) and run(work, jobs))
    yield event
    event.set()


# -------------------------------------------------------------------------------------------------- what is asked for


def test_a_long_sequence_to_stop_at_is_refused_and_costs_nothing(server):
    for stop, param in (("a" * 100_000, "stop"), (["a", "b" * 257], "stop.1")):
        status, answer = post(server, "/v1/chat/completions", json.dumps({"messages": say("a"), "stop": stop}))
        assert status == 400 and shape(answer)["param"] == param and "256 characters" in shape(answer)["message"]

    class Long(str):
        parts = 0

        def __getitem__(self, place):
            type(self).parts += 1
            return super().__getitem__(place)

    words = TextStream(lambda ids: "ab" * len(ids), (Long("b" + "a" * 10_000),))
    assert [words.add(0), words.add(0)] == ["a", "ba"] and words.rest() == "b"
    assert Long.parts <= 2 + 4, "no more beginnings of it are tried than the answer has letters"


def user(content):
    return {"role": "user", "content": content}


MANY, MAP = [1] * 5000, {f"x{i}": 1 for i in range(5000)}
TEXTS = [{"type": "text", "text": "a"}] * 5000


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (requests.Chat, {"messages": MANY}),
        (requests.Chat, {"messages": [{}] * 5000}),
        (requests.Chat, {"messages": [user("a")] * 5000}),
        (requests.Chat, {"messages": [user(TEXTS)]}),
        (requests.Chat, {"messages": [user(MANY)]}),
        (requests.Chat, {"messages": [{"role": "assistant", "images": MANY}]}),
        (requests.Chat, {"messages": [user("a")], "modalities": MANY}),
        (requests.Chat, {"messages": [user("a")], "stop": MANY}),
        (requests.Chat, {"messages": [user("a")], "metadata": MAP}),
        (requests.Chat, {"messages": [user("a")], "logit_bias": MAP}),
        (requests.Chat, {"messages": [user("a")], **MAP}),
        (requests.Embeddings, {"input": MANY}),
    ],
)
def test_of_many_mistakes_few_are_counted(kind, body):
    """Each would be an object of its own, a thousand bytes for two that were sent."""
    with pytest.raises(ValidationError) as found:
        kind.model_validate_json(json.dumps(body))
    assert found.value.error_count() <= 3, found.value.error_count()


def test_more_values_than_a_request_needs_are_counted_and_not_read(models, monkeypatch):
    with running(models, replace(TINY, body=20_000_000)) as server:
        assert post(server, "/v1/images/generations", json.dumps({"prompt": "a", "steps": 1}))[0] == 200
        monkeypatch.setattr(requests, "parse", None)
        for path, body in (
            ("chat/completions", b'{"messages":[' + b"1," * 1_000_000 + b"1]}"),
            ("chat/completions", b'{"messages":[' + b"{}," * 1_000_000 + b"{}]}"),
            ("embeddings", b'{"input":[' + b"[]," * 1_000_000 + b'""]}'),
        ):
            status, answer = post(server, f"/v1/{path}", body)
            assert status == 400 and shape(answer)["code"] == "too_many_values", answer


def test_an_error_repeats_little_of_what_was_sent(server):
    long = "x" * 100_000
    for body in (
        {"messages": say("a"), long: 1},
        {"messages": [{"role": "user", "content": [{"type": long}]}]},
        {"messages": [{"role": long, "content": "a"}]},
        {"messages": say("a"), "tool_choice": long},
    ):
        status, answer = post(server, "/v1/chat/completions", json.dumps(body))
        assert status == 400 and len(json.dumps(answer)) < 2000, len(json.dumps(answer))


@pytest.mark.parametrize("path", ["chat/completions", "images/generations", "images/edits", "embeddings"])
def test_others_are_answered_while_a_request_is_parsed(server, monkeypatch, path):
    parsing, done, parse = threading.Event(), threading.Event(), requests.parse

    def slow(kind, body):
        parsing.set()
        done.wait(10)
        return parse(kind, body)

    monkeypatch.setattr(requests, "parse", slow)
    sent = {"files": {"image": b"x"}, "data": {"prompt": "a"}} if path == "images/edits" else {"json": {"prompt": 1}}
    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{server.address}/v1/{path}", timeout=30, trust_env=False, **sent))
    )
    asking.start()
    assert parsing.wait(10)
    began = time.monotonic()
    assert json.loads(get(server, "/health"))["status"] == "ok"
    assert time.monotonic() - began < 5 and not answers
    done.set()
    asking.join(30)
    assert answers[0].status_code == 400


@pytest.mark.parametrize("path", ["chat/completions", "chat/completions, streamed", "images/generations"])
def test_others_are_answered_while_a_picture_is_encoded(server, monkeypatch, path):
    encoding, done, facts = threading.Event(), threading.Event(), answers.png_facts

    def slow(given):
        encoding.set()
        assert done.wait(10)
        return facts(given)

    monkeypatch.setattr(answers, "png_facts", slow)
    body = {"messages": say("a cat"), "modalities": ["image"], "stream": "streamed" in path, "steps": 1}
    body = {"prompt": "a cat", "steps": 1} if path == "images/generations" else body
    url = f"{server.address}/v1/{path.partition(',')[0]}"
    given = []
    asking = threading.Thread(target=lambda: given.append(httpx.post(url, timeout=30, trust_env=False, json=body)))
    asking.start()
    assert encoding.wait(10)
    began = time.monotonic()
    assert json.loads(get(server, "/health"))["status"] == "ok"
    assert time.monotonic() - began < 5 and not given
    done.set()
    asking.join(30)
    assert given[0].status_code == 200 and "iVBORw0KGgo" in given[0].text


def with_frames(flac, count):
    """A FLAC file whose header says that it has so many frames: the last 36 bits of these 8 bytes."""
    head = int.from_bytes(flac[18:26], "big")
    return flac[:18] + (head >> 36 << 36 | count).to_bytes(8, "big") + flac[26:]


def flac(channels, rate):
    file = io.BytesIO()
    soundfile.write(file, numpy.zeros((4096, channels)), rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def test_a_sound_of_many_samples_is_refused_undecoded(model, monkeypatch):
    hearer = hearing_model(model.backbone)
    small = as_wav(Sound(samples=torch.zeros(24), rate=SOUND_RATE))
    with running({"hears": hearer}, replace(TINY, samples=10_000)) as server, server.client() as client:

        def ask(data):
            client.chat.completions.create(model="hears", messages=hear(data), max_tokens=2)

        ask(small)
        monkeypatch.setattr("xfusion.data.sounds._decode", lambda file: 1 / 0)
        for frames in (5001, 200_000):
            said = f"input_audio holds {2 * frames:,} samples in all its channels, at most 10,000"
            with pytest.raises(openai.BadRequestError, match=said) as error:
                ask(with_frames(flac(2, 8000), frames))
            assert error.value.code == "invalid_audio"


def test_steps_are_bounded_where_something_is_drawn(models, model, picture):
    with running(models, replace(TINY, steps=3)) as server, server.client() as client:
        call = {"model": "dual-tower", "max_tokens": 4}
        plain = client.chat.completions.create(**call, messages=say("a red apple"))
        assert plain.choices[0].message.content == base_answer(model, say("a red apple"), 4, do_sample=False)
        assert client.chat.completions.create(**call, messages=look(picture, "hm")).choices
        again = client.chat.completions.create(**call, messages=say("a red apple"), extra_body={"steps": 25})
        assert again.choices[0].message.content == plain.choices[0].message.content, "nothing is drawn in steps"
        (drawn,) = client.images.generate(prompt="a cat", extra_body={"seed": 1}).data
        assert from_base64(drawn.b64_json).info["steps"] == "3"
        message = client.chat.completions.create(**call, messages=say("a cat"), modalities=["image"]).choices[0].message
        assert from_url(message.images[0]["image_url"]["url"]).info["steps"] == "3"
        mask = Image.new("L", picture.size, "white")
        (edited,) = client.images.edit(image=png(picture), mask=png(mask), prompt="a cat").data
        assert from_base64(edited.b64_json).info["steps"] == "3"
        for ask in (
            lambda: client.images.generate(prompt="a cat", extra_body={"steps": 4}),
            lambda: client.images.edit(image=png(picture), mask=png(mask), prompt="a", extra_body={"steps": 4}),
            lambda: client.chat.completions.create(
                **call, messages=say("a"), modalities=["image"], extra_body={"steps": 4}
            ),
        ):
            with pytest.raises(openai.BadRequestError, match="steps is 4, more than the 3"):
                ask()


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 9e-6])
def test_a_temperature_near_nothing_takes_the_likeliest_word(client, picture, temperature):
    for messages in (say("a red apple"), look(picture, "what is this?")):
        call = {"model": "dual-tower", "messages": messages, "max_tokens": 8}
        plain, cold = (client.chat.completions.create(**call, temperature=t, seed=3) for t in (0, temperature))
        assert cold.choices[0].message.content == plain.choices[0].message.content


def test_guidance_is_bounded(client):
    for guidance in (1e308, -1e308, 101):
        for ask in (
            lambda more: client.images.generate(prompt="a cat", extra_body=more),
            lambda more: client.chat.completions.create(
                model="dual-tower", messages=say("a"), modalities=["image"], extra_body=more
            ),
        ):
            with pytest.raises(openai.BadRequestError, match="guidance: .* -?100") as error:
                ask({"guidance": guidance, "steps": 1})
            assert error.value.param == "guidance"
    assert client.images.generate(prompt="a cat", extra_body={"guidance": 100, "steps": 1}).data


# ----------------------------------------------------------------------------------------------------------- the queue


def test_a_full_queue_refuses_before_anything_is_read(models, held, monkeypatch):
    with running(models, replace(TINY, queue=1)) as server:
        body = json.dumps({"model": "dual-tower", "messages": say("a"), "max_tokens": 2}).encode()
        first = begun(server, body)
        until(lambda: server.batches.running)
        second = begun(server, body)
        until(lambda: server.batches.waiting)
        monkeypatch.setattr(requests, "parse", None)
        for path in ("chat/completions", "images/generations", "embeddings", "images/edits"):
            kind = "multipart/form-data; boundary=x" if path == "images/edits" else "application/json"
            with begun(server, b"", 1000, f"/v1/{path}", kind) as refused:
                status, headers, answer = answered(refused)
            assert status == 429 and shape(json.loads(answer))["code"] == "queue_full" and headers["Retry-After"]
        held.set()
        assert [answered(one)[0] for one in (first, second)] == [200, 200]
        for one in (first, second):
            one.close()


def test_no_more_are_read_than_the_queue_has_room_for(models, monkeypatch):
    """Else each of a hundred clients costs the time of a reading whenever a place is free."""
    read, reads, chat = threading.Event(), [], reading.chat

    def slow(*given):
        reads.append(1)
        assert read.wait(30)
        return chat(*given)

    monkeypatch.setattr(reading, "chat", slow)
    with running(models, replace(TINY, queue=2)) as server:
        body = json.dumps({"model": "dual-tower", "messages": say("a"), "max_tokens": 2}).encode()
        open_ones = [begun(server, body) for _ in range(2)]
        until(lambda: len(reads) == 2)
        for _ in range(3):
            with begun(server, body) as refused:
                status, _, answer = answered(refused)
            assert status == 429 and "2 answers wait" in shape(json.loads(answer))["message"]
        read.set()
        assert [answered(one)[0] for one in open_ones] == [200, 200] and len(reads) == 2
        for one in open_ones:
            one.close()
        assert server.app.state.server.reading == 0
        assert post(server, "/v1/chat/completions", b"{")[0] == 400 and server.app.state.server.reading == 0
        assert post(server, "/v1/chat/completions", body)[0] == 200


def test_a_place_that_becomes_free_soon_is_waited_for(models, held, monkeypatch):
    monkeypatch.setattr(tickets, "PATIENCE", 3.0)
    with running(models, replace(TINY, queue=1)) as server:
        body = json.dumps({"model": "dual-tower", "messages": say("a"), "max_tokens": 2}).encode()

        def three():
            """One that is computed, one that waits, and one more."""
            made = [begun(server, body)]
            until(lambda: server.batches.running)
            made.append(begun(server, body))
            until(lambda: server.batches.waiting)
            made.append(begun(server, body))
            until(lambda: server.app.state.server.arriving)
            return made

        open_ones = three()
        held.set()
        assert [answered(one)[0] for one in open_ones] == [200] * 3
        until(lambda: not server.batches.running)
        held.clear()
        open_ones += three()
        began = time.monotonic()
        server.server.should_exit = True  # a stop does not wait for it
        assert [answered(one)[0] for one in open_ones[4:]] == [503] * 2 and time.monotonic() - began < 2.5
        held.set()
        assert answered(open_ones[3])[0] == 200
        for one in open_ones:
            one.close()


# --------------------------------------------------------------------------------------------------------- connections


def connected(server):
    parts = urllib.parse.urlsplit(server.address)
    return socket.create_connection((parts.hostname, parts.port), timeout=20)


def is_cut(connection):
    """Whether the other side ended a connection, within its timeout."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_connections_that_ask_nothing_are_cut(models, held, monkeypatch):
    monkeypatch.setattr(stopping, "HEAD_SECONDS", 0.5)
    with running(models, TINY) as server:
        body = json.dumps({"model": "dual-tower", "messages": say("a"), "max_tokens": 2}).encode()
        asks = begun(server, body)
        until(lambda: server.batches.running)
        silent, begins, again = (connected(server) for _ in range(3))
        begins.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n")
        again.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert answered(again)[0] == 200
        again.sendall(b"GET /hea")
        for one in (silent, begins, again):
            with one:
                assert is_cut(one)
        time.sleep(1)
        held.set()
        assert answered(asks)[0] == 200, "one that waits for its answer is left alone"
        asks.close()
        kept = http.client.HTTPConnection(urllib.parse.urlsplit(server.address).netloc, timeout=20)
        for _ in range(8):  # and so is one that asks now and then
            kept.request("GET", "/health")
            assert kept.getresponse().read()
            local = kept.sock.getsockname()
            time.sleep(0.2)
        assert kept.sock.getsockname() == local
        kept.close()


def test_a_client_that_does_not_read_its_answer_is_cut(models, monkeypatch, capsys):
    def much(work, jobs):
        for _ in range(30):
            jobs[0].notify(jobs[0], "much " * 200_000)
        return [["much"]]

    monkeypatch.setattr(Words, "run", much)
    monkeypatch.setattr(stopping, "UNREAD_SECONDS", 0.5)
    with running(models, replace(TINY, seconds=1.0)) as server:
        call = {"model": "dual-tower", "messages": say("a"), "stream": True}
        with begun(server, json.dumps(call).encode()):
            until(lambda: server.server.server_state.connections)
            until(lambda: not server.server.server_state.connections)
    said = capsys.readouterr().err
    assert "Traceback" not in said and "Exception" not in said, said


def test_connections_are_bounded(models, held, monkeypatch):
    monkeypatch.setattr(stopping, "HEAD_SECONDS", 60.0)  # longer than a socket here waits: what is cut makes room
    with running(models, replace(TINY, connections=2)) as server:
        silent = []
        for _ in range(4):
            known = set(server.server._silent)
            silent.append(connected(server))
            until(lambda known=known: set(server.server._silent) - known)  # each is as old as its own tick
        with silent[0], silent[1]:
            assert is_cut(silent[0]) and is_cut(silent[1]), "the oldest make room"
        for one in silent[2:]:
            one.close()
        until(lambda: not server.server.server_state.connections)
        body = json.dumps({"model": "dual-tower", "messages": say("a"), "max_tokens": 2}).encode()
        open_ones = []
        for _ in range(2):
            open_ones.append(begun(server, body))
            until(lambda: len(server.batches.waiting) + len(server.batches.running) == len(open_ones))
        with begun(server, body) as third:
            status, headers, answer = answered(third)
            assert status == 503 and headers["Retry-After"] == "1" and headers["Connection"] == "close"
            error = shape(json.loads(answer))
            assert error["code"] == "overloaded" and "more than 2 connections are open" in error["message"]
        held.set()
        assert [answered(one)[0] for one in open_ones] == [200, 200]
        for one in open_ones:
            one.close()


def test_a_long_head_is_refused(server):
    with connected(server) as one:
        one.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000)
        assert one.recv(100).startswith(b"HTTP/1.1 400")


# ---------------------------------------------------------------------------------------------------------- the door


def chatted(server, content=None, **headers):
    """A chat as some page or program sends it: the status and the error's code."""
    body = content or json.dumps({"model": "dual-tower", "messages": say("a"), "max_tokens": 1})
    given = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    answer = httpx.post(f"{server.address}/v1/chat/completions", content=body, headers=given, trust_env=False)
    return answer.status_code, answer.json().get("error", {}).get("code")


def test_a_page_elsewhere_cannot_use_the_server(server, models, picture):
    host = urllib.parse.urlsplit(server.address).netloc
    for headers in ({}, {"Origin": f"http://{host}"}, {"Origin": "https://gpu.lan", "Sec-Fetch-Site": "same-origin"},
                    {"Sec-Fetch-Site": "none"}):  # fmt: skip
        assert chatted(server, **headers)[0] == 200, headers
    foreign = (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://{host}.evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": f"http://{host}", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    )
    form = {"data": {"prompt": "a", "steps": "1"}, "files": {"image": png(picture)}}
    for headers in foreign:
        assert chatted(server, **headers) == (403, "foreign_origin"), headers
        answer = httpx.post(f"{server.address}/v1/images/edits", headers=headers, trust_env=False, **form)
        assert answer.status_code == 403 and shape(answer.json())["code"] == "foreign_origin"
    with running(models, TINY, origins=frozenset({"http://localhost:3000"})) as opened:
        headers = {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"}
        assert chatted(opened, **headers)[0] == 200
        assert chatted(opened, Origin="http://localhost:3001") == (403, "foreign_origin")
        url = f"{opened.address}/v1/chat/completions"
        before = headers | {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        told = httpx.options(url, headers=before, trust_env=False)
        assert told.status_code == 200 and told.headers["access-control-allow-origin"] == "http://localhost:3000"
        assert "authorization" in told.headers["access-control-allow-headers"]


def test_json_says_that_it_is_json(server):
    """What a page may have a browser send without asking is no JSON, whatever it holds."""
    for kind in ("text/plain", "text/plain; charset=application/json", "application/x-www-form-urlencoded", ""):
        for path in ("chat/completions", "images/generations", "embeddings"):
            status, answer = post(server, f"/v1/{path}", b"{}", {"Content-Type": kind})
            assert status == 415 and shape(answer)["code"] == "unsupported_media_type", (kind, path)
            assert "application/json" in shape(answer)["message"]
    assert chatted(server, Content_Type="Application/JSON; charset=utf-8")[0] == 200


def test_the_verb_wants_origins(tmp_path, capsys):
    for origin in ("localhost:3000", "http://localhost:3000/", "http://", "null"):
        assert cli.main(["serve", str(tmp_path), "--allowed-origins", origin]) == 2
        assert f"--allowed-origins {origin}: an origin is" in capsys.readouterr().err


def test_keys_beyond_ascii(models):
    with running(models, keys=frozenset({"clé à"})) as server:

        def status(key):
            url, headers = f"{server.address}/v1/models", {b"Authorization": b"Bearer " + key}
            return httpx.get(url, headers=headers, trust_env=False).status_code

        assert status("clé à".encode()) == status("clé à".encode("latin-1")) == 200
        for wrong in (b"cle a", "cle\u0301 à".encode(), "clé".encode(), b"\xff\xfe"):
            assert status(wrong) == 401, wrong


def test_the_follower_of_a_ticket_is_cancelled_whole(models):
    """However it ends, none of the tasks that it waits by is left."""
    from xfusion.apps.server.tickets import Ticket

    with running(models, TINY) as server:
        service = server.app.state.server

        class Quiet:
            async def receive(self):
                await asyncio.Event().wait()

        async def follow():
            ticket = object.__new__(Ticket)
            ticket.service, ticket.request, ticket.jobs = service, Quiet(), [None]
            ticket.loop = asyncio.get_running_loop()
            ticket.deadline, ticket.events = ticket.loop.time() + 30, asyncio.Queue()

            async def walk():
                async for _ in ticket.follow():
                    pass

            walking = asyncio.ensure_future(walk())
            await asyncio.sleep(0.1)
            walking.cancel()
            await asyncio.sleep(0.1)
            return len(asyncio.all_tasks()) - 1

        ended, service.ended = service.ended, asyncio.Event()
        try:
            assert asyncio.run(follow()) == 0
        finally:
            service.ended = ended


def test_an_error_names_an_unknown_field_whatever_its_name_in_one_line(server):
    """Fields that are no identifier, or are called like a kind that is tried."""
    for name, said in (("top-k", "top-k"), ("int", "int"), ("1", "1"), ("a\nb", "a b"), ("", "''")):
        status, answer = post(server, "/v1/chat/completions", json.dumps({"messages": say("a"), name: 1}))
        assert status == 400 and shape(answer)["message"] == f"{said} is not a parameter of this server", answer
        assert answer["error"]["code"] == "unknown_parameter" and answer["error"]["param"] == (name or None)
    body = {"messages": [{"role": "user", "content": [{"type": "te\nxt", "text": "a"}]}]}
    status, answer = post(server, "/v1/chat/completions", json.dumps(body))
    assert status == 400 and "Input tag 'te xt' found" in shape(answer)["message"], answer


def test_the_verb_refuses_keys_and_names_that_are_no_text(tmp_path, capsys):
    (tmp_path / "keys").write_bytes(b"\xff\xfe\x00key\n")
    assert cli.main(["serve", str(tmp_path), "--keys", str(tmp_path / "keys")]) == 2
    assert "keys: the file is not UTF-8 text" in capsys.readouterr().err
    for host in ("\udcff", "a" * 70 + ".example"):
        with pytest.raises(UsageError, match="cannot listen at"):
            listen(host, 0)
    assert cli.main(["serve", str(tmp_path), "--limits.seconds", "nan"]) == 2
    assert "--limits.seconds nan: at least 1" in capsys.readouterr().err
