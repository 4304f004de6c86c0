"""A picture that opens by itself: the head decides beside the vocabulary, and where it says no the base answers as ever."""

import json
import shutil

import numpy
import pytest
import torch
from contracts.table import Noise, make_model, opening_head
from contracts.test_packs import VERSION_1
from safetensors.torch import load_file, save_file

import xfusion
from xfusion import checkpoint
from xfusion.data import requests
from xfusion.data.sequence import TooLong, XFusionError
from xfusion.evaluation.run import evaluate
from xfusion.generation import conversation, openings, opens, segments
from xfusion.opening import Opening, answer_state, answer_states, recent, word_states
from xfusion.training.opening import PENALTY, _logistic, fit

ASK = [{"role": "user", "content": "draw a red apple"}]
SETTINGS = {"seed": 3, "steps": 3, "max_tokens": 5}


@pytest.fixture
def model(bases):
    return make_model(bases["llama"])


def head(opens: float, width: int = 64) -> Opening:
    """A head that always says the same."""
    made = Opening(width).requires_grad_(False)
    made.opens.weight.zero_()
    made.opens.bias.fill_(opens)
    return made


def silent(*_):
    pass


def test_never_is_the_base_and_runs_nothing_of_the_head(model, monkeypatch):
    expected = model.generate(conversation(model, ASK), **SETTINGS)
    assert model.answer(ASK, draw="never", **SETTINGS) == expected

    def forbidden(*_):
        raise AssertionError("the head was asked")

    model.opening = head(9.0)
    monkeypatch.setattr(Opening, "probability", forbidden)
    monkeypatch.setattr(Opening, "what", forbidden)
    assert model.answer(ASK, draw="never", **SETTINGS) == expected


def test_where_no_picture_opens_the_base_says_the_same_tokens(model):
    heard: dict[str, list[int]] = {"never": [], "auto": []}
    model.opening = head(-9.0)
    for draw, tokens in heard.items():
        model.answer(ASK, draw=draw, **SETTINGS, listen=lambda _, token, to=tokens: to.append(token) or True)
    assert heard["auto"] == heard["never"] != []
    prompt = torch.tensor([model.backbone.chat(ASK)])
    base = model.backbone.model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=1)
    kept = [t for t in base[0, prompt.shape[1] :].tolist() if t not in model.backbone.end_ids]
    assert heard["auto"] == kept


def test_a_picture_opens_with_words_behind_it(model, monkeypatch):
    model.opening = head(9.0)
    monkeypatch.setattr(Opening, "what", lambda self, backbone, words: "red apple" if "apple" in words else "")
    picture, words = model.answer(ASK, **SETTINGS)
    assert picture.tobytes() == model.draw(["red apple"], seed=3, steps=3)[0].tobytes()
    assert [words] == model.generate([picture], seed=3, max_tokens=5)
    # A second picture of the same conversation; what names nothing means what was named before.
    more = [*ASK, {"role": "assistant", "content": [picture, words]}, {"role": "user", "content": ["once more"]}]
    assert opens(model, more) == "red apple"
    again, _ = model.answer(more, **{**SETTINGS, "seed": 4}, size=32)
    assert again.size == (32, 32)
    # The base goes on among words where it drew, and looks where the user shows.
    model.opening = head(-9.0)
    called = [*ASK, {"role": "assistant", "content": f"(picture)\n{words}"}, {"role": "user", "content": "once more"}]
    assert model.answer(more, **SETTINGS) == model.generate(conversation(model, called), **SETTINGS)
    model.opening = head(9.0)
    shown = [{"role": "user", "content": [Noise(1).picture(0, 32), "what is this"]}]
    assert model.answer(shown, **SETTINGS) == model.generate(conversation(model, shown), **SETTINGS)


def test_always_needs_no_head(model):
    picture, _ = model.answer(ASK, draw="always", **SETTINGS)
    assert picture.tobytes() == model.draw(["draw a red apple"], seed=3, steps=3)[0].tobytes()


def test_what_cannot_be_decided_is_refused(model, monkeypatch):
    with pytest.raises(XFusionError, match="no opening head"):
        model.answer(ASK, draw="auto")
    with pytest.raises(XFusionError, match="'sometimes' is not one of never, auto, always"):
        model.answer(ASK, draw="sometimes")
    model.opening = head(9.0)
    with pytest.raises(XFusionError, match="behind a turn of the user"):
        model.answer([*ASK, {"role": "assistant", "content": "no"}])
    monkeypatch.setattr(type(model), "capabilities", {"text", "caption"})
    with pytest.raises(XFusionError, match="cannot draw"):
        model.answer(ASK)


TALKS = [
    ASK,
    [{"role": "user", "content": "what is two and two?"}],
    [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "good day"},
        {"role": "user", "content": "a cat on a table, please, as a picture"},
    ],
    [{"role": "user", "content": "paint two blue birds"}],
    [{"role": "user", "content": "who are you"}],
]
DRAWS = [True, False, True, True, False]
LOOKS = [{"role": "user", "content": [Noise(1).picture(0, 32), "what is this"]}]


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # gemma3's layers slide
def test_several_conversations_are_answered_as_each_alone_and_drawn_as_one_batch(bases, family, monkeypatch):
    model = make_model(bases[family])
    model.opening = opening_head(model.backbone, TALKS, DRAWS)
    talks = [*TALKS[:3], LOOKS, *TALKS[3:]]
    settings = {"steps": 3, "max_tokens": 5, "temperature": 0.7}
    alone = [model.answer(talk, seed=40 + i, **settings) for i, talk in enumerate(talks)]
    assert [len(turn) for turn in alone] == [2, 1, 2, 1, 2, 1]
    drawn, draws = [], segments.draw_tokens

    def counted(model, contexts, size, **options):
        drawn.append(options["seeds"])
        return draws(model, contexts, size, **options)

    monkeypatch.setattr(segments, "draw_tokens", counted)
    heard: dict[int, list[int]] = {}
    listen = lambda i, token: heard.setdefault(i, []).append(token) or True  # noqa: E731
    together = model.answer(talks, seed=40, listen=listen, **settings)
    assert drawn == [[40, 42, 44]]
    for i, (turn, expected) in enumerate(zip(together, alone, strict=True)):
        assert turn[-1] == expected[-1] == model.backbone.decode(heard[i])
        if len(expected) == 2:
            difference = numpy.abs(numpy.asarray(turn[0]).astype(int) - numpy.asarray(expected[0]))
            assert difference.max() <= 2  # as for any batch of pictures
    with pytest.raises(XFusionError, match="2 seeds for 6 conversations"):
        model.answer(talks, seeds=[1, 2])


def test_a_line_break_ends_an_answer_where_turns_are_lines(model, monkeypatch):
    """And nowhere else: not in an answer to the only turn if that starts with its picture, nor in `generate`."""
    ids = model.backbone.encode("red apple\nred apple\nred")
    script = iter(())
    monkeypatch.setattr(
        type(model.text_objective),
        "choose",
        staticmethod(lambda logits, *_: torch.tensor([next(script)] * len(logits))),
    )

    def answers(*talks):
        nonlocal script
        script, heard = iter(ids), {}
        listen = lambda i, token: heard.setdefault(i, []).append(token) or True  # noqa: E731
        turns = model.answer([*talks], draw="never", max_tokens=len(ids), listen=listen)
        assert [model.backbone.decode(heard[i]) for i in range(len(talks))] == [turn[0] for turn in turns]
        return [turn[0] for turn in turns]

    picture = Noise(1).picture(0, 32)
    behind_words = [{"role": "user", "content": ["look at this", picture]}]
    second_turn = [*ASK, {"role": "assistant", "content": "here"}, {"role": "user", "content": [picture, "and this?"]}]
    assert answers(LOOKS) == ["red apple\nred apple\nred"]
    assert answers(behind_words) == answers(second_turn) == ["red apple"]
    assert answers(behind_words, behind_words) == ["red apple"] * 2
    script = iter(ids)
    assert model.generate(["look at this", picture], max_tokens=len(ids)) == ["red apple\nred apple\nred"]


def test_a_batch_decides_as_single_calls_do(model, monkeypatch):
    """Also where a decision is so close that the rounding of a batch could turn it: those are asked alone."""
    model.opening = opening_head(model.backbone, TALKS, DRAWS)
    alone, probability = [], Opening.probability

    def asked(self, backbone, messages):
        alone.append(messages)
        return probability(self, backbone, messages)

    monkeypatch.setattr(Opening, "probability", asked)
    expected = ["draw a red apple", None, "a cat on a table, please, as a picture", "paint two blue birds", None]
    assert openings(model, TALKS) == expected
    assert alone == []
    model.opening.opens.bias[0] -= 6.0  # requests for pictures now have a logit of 0
    found = openings(model, TALKS)
    assert alone == [talk for talk, draws in zip(TALKS, DRAWS, strict=True) if draws]
    assert found == [opens(model, talk) for talk in TALKS]
    states = answer_states(model.backbone, TALKS)
    for state, talk in zip(states, TALKS, strict=True):
        assert torch.allclose(state, answer_state(model.backbone, talk), rtol=1e-4, atol=1e-5)


def test_the_subject_is_the_stretch_with_the_largest_sum(bases):
    backbone, made = bases["llama"], Opening(64).requires_grad_(False)
    words = "please draw two blue birds on a table for me"
    states, spans = word_states(backbone, words)
    assert len(states) == len(spans) == len(backbone.encode(words))
    assert "".join(words[a:b] for a, b in spans) == words
    found = set()
    for seed in range(20):
        made.subject.weight.normal_(generator=torch.Generator().manual_seed(seed))
        made.subject.bias.fill_(0.3 * (seed % 5 - 2))
        logits = made.subject(states)[:, 0].tolist()
        sums = {(a, b): sum(logits[a:b]) for a in range(len(spans)) for b in range(a + 1, len(spans) + 1)}
        (first, end), best = max(sums.items(), key=lambda item: item[1])
        expected = words[spans[first][0] : spans[end - 1][1]].strip() if best > 0 else ""
        assert made.what(backbone, words) == expected
        found.add(expected)
    assert len(found) > 5
    assert made.what(backbone, "") == ""


def test_states_are_the_bases_own(bases):
    backbone = bases["qwen3"]
    ids = torch.tensor([backbone.chat(ASK)])
    out = backbone.model(ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(answer_state(backbone, ASK), out[0, -1])
    long = [{"role": r, "content": str(i)} for i in range(6) for r in ("user", "assistant")] + ASK
    assert [m["content"] for m in recent([{"role": "system", "content": "be kind"}, *long])] == [
        "4", "4", "5", "5", "draw a red apple"]  # fmt: skip


def test_the_fit_is_the_minimum_of_the_penalised_loss():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(80, 6, generator=g) * torch.tensor([1.0, 5, 0.1, 2, 1, 30]) + 3
    y = (x[:, 0] + 0.2 * x[:, 1] + torch.randn(80, generator=g) > 6).float()
    layer = torch.nn.Linear(6, 1).requires_grad_(False)
    _logistic(layer, x, y)
    weight, bias = layer.weight[0].double().requires_grad_(True), layer.bias.double().requires_grad_(True)
    deviation = x.double().std(dim=0)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(x.double() @ weight + bias, y.double())
    loss = loss + PENALTY * (weight * deviation).square().sum()
    gradient = torch.autograd.grad(loss, (weight, bias))
    assert max(float(g.abs().max()) for g in gradient) < 2e-5  # the row itself is float32


def test_a_head_learns_what_it_is_told(model):
    """A tiny random base carries which letters stood last; the head finds requests and their subjects among them."""
    kinds = [("draw a {}", True), ("name a {}", False)]
    subjects = ["cat", "house", "tree", "bird", "apple", "table"]
    examples = []
    for wording, draws in kinds:
        for subject in subjects:
            words = wording.format(subject)
            span = (words.index(subject), len(words)) if draws else None
            examples.append(requests.Request(messages=({"role": "user", "content": words},), draws=draws, subject=span))
    made = fit(model, examples, progress=silent)
    for example in examples:
        assert (made.probability(model.backbone, example.messages) > 0.5) == example.draws
    hits = [made.what(model.backbone, e.messages[-1]["content"]) in subjects for e in examples if e.draws]
    assert sum(hits) >= 5
    with pytest.raises(XFusionError, match="one of them is missing"):
        fit(model, examples[:6], progress=silent)


def test_what_is_measured_was_not_learned_from(tmp_path):
    train, held = (requests.read(split, repeat=2) for split in ("train", "held"))
    assert sum(e.draws for e in held) > 50 and sum(not e.draws for e in held) > 100
    data = json.loads((requests.resources.files("xfusion.data") / "requests.json").read_text())
    for field in data["train"]:
        assert not {w.lower() for w in data["train"][field]} & {w.lower() for w in data["held"][field]}
    assert not {e.messages[-1]["content"] for e in train} & {e.messages[-1]["content"] for e in held}
    for part, subjects in ((train, data["train"]["subjects"]), (held, data["held"]["subjects"])):
        named = [e.messages[-1]["content"][slice(*e.subject)].lower() for e in part if e.subject]
        assert set(named) <= {s.lower() for s in subjects}
        assert all(e.messages[-1]["role"] == "user" for e in part)
    assert requests.read("held", repeat=2) == held
    (tmp_path / "own.json").write_text('{"train": {"requests": ["draw"]}}')
    with pytest.raises(XFusionError, match="'train' has no 'subjects'"):
        requests.read("train", tmp_path / "own.json")
    data["train"]["requests"] = ["draw it"]
    (tmp_path / "own.json").write_text(json.dumps(data))
    with pytest.raises(XFusionError, match="must hold one {}"):
        requests.read("train", tmp_path / "own.json")


def test_scores_of_a_head_that_always_draws_and_of_one_that_finds_the_word(model, monkeypatch, tmp_path):
    (tmp_path / "chats.txt").write_text("hello\n\npicture this\ndraw near\nwho\n")
    model.opening = head(9.0)
    monkeypatch.setattr(Opening, "probability", lambda self, backbone, messages: 1.0)
    monkeypatch.setattr(Opening, "what", lambda self, backbone, words: "")
    held = requests.read("held", repeat=1)
    asked = sum(e.draws for e in held)
    found = evaluate(model, "requests", repeat=1)
    assert (found["precision"], found["recall"]) == (asked / len(held), 1.0)
    assert (found["false_alarms"], found["subject_exact"]) == (1.0, 0.0)
    monkeypatch.setattr(
        Opening, "probability", lambda self, backbone, messages: float("draw" in messages[-1]["content"])
    )
    found = evaluate(model, "requests", repeat=1, chats=str(tmp_path / "chats.txt"))
    hits = sum("draw" in e.messages[-1]["content"] for e in held if e.draws)
    alarms = sum("draw" in e.messages[-1]["content"] for e in held if not e.draws)
    assert found["precision"] == hits / (hits + alarms) and found["recall"] == hits / asked
    assert found["chats_false_alarms"] == 0.25 and found["settings"]["num_further_chats"] == 4
    model.opening = None
    with pytest.raises(XFusionError, match="no opening head"):
        evaluate(model, "requests")


# --------------------------------------------------------------------------------------------------------------- packs


def test_a_head_is_a_file_of_its_own(model, tmp_path):
    plain, folder = tmp_path / "plain", tmp_path / "pack"
    model.save_pretrained(plain)
    made = Opening(64)
    checkpoint.add_opening(plain, model, made, folder, scores={"recall": 1.0})
    assert "## Opening head\n\n| fact | value |\n| --- | --- |\n| recall | 1 |" in (folder / "README.md").read_text()
    assert (folder / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert (folder / "opening.safetensors").stat().st_size < 2000
    config = json.loads((folder / "config.json").read_text())
    assert config["opening"]["scores"] == {"recall": 1.0} and config == checkpoint.sealed(config)
    loaded = xfusion.load(folder, backbone=model.backbone)
    assert loaded.fingerprint == model.fingerprint
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in loaded.opening.state_dict().items())
    loaded.save_pretrained(tmp_path / "again")
    again = xfusion.load(tmp_path / "again", backbone=model.backbone)
    assert torch.equal(again.opening.opens.weight, made.opens.weight)
    assert xfusion.load(plain, backbone=model.backbone).opening is None
    checkpoint.add_opening(folder, model, head(1.0), folder)  # in place, and another one
    assert float(xfusion.load(folder, backbone=model.backbone).opening.opens.bias) == 1.0


def test_an_altered_head_is_refused(model, tmp_path):
    model.opening = Opening(64)
    model.save_pretrained(tmp_path / "pack")
    path = tmp_path / "pack" / "opening.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(XFusionError, match="was altered"):
        xfusion.load(tmp_path / "pack", backbone=model.backbone)
    state = load_file(path)
    save_file({k: v for k, v in state.items() if k != "opens.bias"}, path)
    config = tmp_path / "pack" / "config.json"
    facts = json.loads(config.read_text()) | {"opening_sha256": checkpoint.file_hash(path)}
    config.write_text(json.dumps(checkpoint.sealed(facts)))
    with pytest.raises(XFusionError, match=r"does not fit the model: 1 missing \(first: opens.bias\)"):
        xfusion.load(tmp_path / "pack", backbone=model.backbone)
    path.unlink()
    with pytest.raises(XFusionError, match=r"opening\.safetensors cannot be read"):
        xfusion.load(tmp_path / "pack", backbone=model.backbone)


def test_a_pack_of_the_previous_format_version_takes_a_head(model, tmp_path):
    old = shutil.copytree(VERSION_1, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    config["base"]["fingerprint"] = model.backbone.fingerprint  # another torch may draw the base otherwise
    (old / "config.json").write_text(json.dumps(config))
    with pytest.raises(XFusionError, match="holds other weights than this model"):
        checkpoint.add_opening(old, model, Opening(64), tmp_path / "new")
    own = xfusion.load(old, backbone=model.backbone)
    checkpoint.add_opening(old, own, Opening(64), tmp_path / "new")
    config = checkpoint.read_config(tmp_path / "new")
    assert config["format_version"] == 2
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == (VERSION_1 / "model.safetensors").read_bytes()
    weights = bytearray((old / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (old / "model.safetensors").write_bytes(weights)
    with pytest.raises(XFusionError, match="was altered"):
        checkpoint.add_opening(old, own, Opening(64), tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


@pytest.mark.full
def test_the_shipped_head_opens_as_its_card_says():
    """On held-out requests and chats; what the card has beside them is of a file of the user's."""
    model = xfusion.load("emoji")
    recorded = checkpoint.read_config(checkpoint.find("emoji"))["opening"]["scores"]
    found = evaluate(model, "requests", repeat=recorded["settings"]["repeat"])
    for name in ("precision", "recall", "false_alarms", "subject_exact"):
        assert found[name] == pytest.approx(recorded[name], abs=0.02), name


def test_a_conversation_beyond_the_learned_positions_is_refused_in_one_line(bases):
    """What to draw is read from the last turn twice, which may be too long where the turn itself is not."""
    model = make_model(bases["gpt2"])
    model.opening = head(9.0)
    for length, tokens in ((600, "[0-9]+"), (150, "60[0-9]")):  # of two bytes, a token each
        message = f"is read from {tokens} tokens, more than the 512 that the base has learned: .*draw='never'"
        with pytest.raises(TooLong, match=message):
            openings(model, [[{"role": "user", "content": "я" * length}], ASK])
    assert openings(model, [ASK]) == openings(model, [ASK, ASK])[:1]
