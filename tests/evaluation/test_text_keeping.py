"""How far a text is the base's, held to scores computed by hand from logits, on files of every kind."""

import json
import math
import random

import pytest
import torch
from contracts.table import make_model

from xfusion.backbone import Backbone
from xfusion.data.sequence import XFusionError
from xfusion.evaluation.metrics.clusters import RESAMPLES
from xfusion.evaluation.run import evaluate
from xfusion.evaluation.suites import text_keeping

PASSAGES = [f"a red apple on a table and {word} small house" for word in ("two", "blue", "what", "name", "this", "one")]
QUESTIONS = [
    {"question": "what is this?", "choices": ["a red apple", "two blue birds", "cat"], "answer": i}
    for i in (1, 1, 0, 2, 0, 1)
]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join([*PASSAGES, "", "the green tree, two blue birds"] * 3))
    (tmp_path / "passages.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return {
        "perplexity": str(tmp_path / "text.txt"),
        "lambada": str(tmp_path / "passages.jsonl"),
        "arc_easy": str(tmp_path / "questions.jsonl"),
    }


def log_probs(model, stack, context, ids):
    """Of each id after the ones before it, by one pass over each prefix."""
    found = []
    for end in range(len(ids)):
        prefix = [*model.backbone.begin_ids, *context, *ids[:end]]
        logits = model.text_logits(torch.tensor([prefix]), stack=stack)[0, -1]
        found.append((logits.double() - logits.double().logsumexp(0))[ids[end]].item())
    return found


def test_a_stack_that_is_the_base_changes_nothing(bases, files, monkeypatch):
    monkeypatch.setattr(text_keeping, "WINDOW", 40)
    found = evaluate(make_model(bases["llama"]), "text_keeping", **files)
    assert found["text_bit_equal"] is True and found["text_declared_equal"] is True
    for name in files:
        assert found[f"{name}_change"] == 0 and found[f"{name}_change_interval"] == [0, 0]
        assert found[f"{name}_base"] == found[f"{name}_fused"]
    settings = found["settings"]
    assert settings["num_lambada"] == settings["num_arc_easy"] == 6 and settings["perplexity"] == "text.txt"


def test_a_change_is_what_the_logits_say(bases, files, monkeypatch):
    monkeypatch.setattr(text_keeping, "WINDOW", 40)
    model = make_model(bases["llama"], "single tower")
    encode = model.backbone.encode
    found = evaluate(model, "text_keeping", **files)
    assert found["text_bit_equal"] is False and found["text_declared_equal"] is False

    text = "".join(f"{line}\n" for line in [*PASSAGES, "the green tree, two blue birds"] * 3)
    ids = [i for line in text.splitlines(keepends=True) for i in encode(line)]
    pieces = [ids[start : start + 40] for start in range(0, len(ids), 40)]
    assert found["settings"]["num_perplexity"] == len(pieces) >= 5
    nats = {s: [-sum(log_probs(model, s, (), piece)) for piece in pieces] for s in ("base", "fused")}
    wanted = {stack: math.exp(sum(values) / len(ids)) for stack, values in nats.items()}
    assert {s: found[f"perplexity_{s}"] for s in wanted} == pytest.approx(wanted, rel=1e-5)
    assert found["perplexity_change"] == pytest.approx(wanted["fused"] - wanted["base"], rel=1e-4) != 0
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(pieces), (RESAMPLES, len(pieces)), generator=generator).tolist()
    resampled = []
    for row in rows:
        tokens = sum(len(pieces[i]) for i in row)
        of = {s: math.exp(sum(nats[s][i] for i in row) / tokens) for s in nats}
        resampled.append(of["fused"] - of["base"])
    low, high = torch.tensor(resampled, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    assert found["perplexity_change_interval"] == pytest.approx([low, high], rel=1e-4)

    for stack in ("base", "fused"):
        hits = []
        for question in QUESTIONS:
            prompt = encode(f"Question: {question['question']}\nAnswer:")
            ratings = [
                sum(log_probs(model, stack, prompt, encode(f" {choice}"))) / len(choice)
                for choice in question["choices"]
            ]
            hits.append(ratings.index(max(ratings)) == question["answer"])
        assert found[f"arc_easy_{stack}"] == sum(hits) / len(hits)


def test_a_last_word_is_guessed_token_by_token(bases, tmp_path, monkeypatch):
    """The continuation that greedy decoding writes is found by the stack that writes it, and by no other."""
    model = make_model(bases["llama"], "single tower")
    passage = (5, 6, 7, 8)
    endings = {}
    for stack in ("base", "fused"):
        ids = [*model.backbone.begin_ids, *passage]
        for _ in range(3):
            ids.append(int(model.text_logits(torch.tensor([ids]), stack=stack)[0, -1].argmax()))
        endings[stack] = tuple(ids[-3:])
    assert endings["base"] != endings["fused"]
    path = tmp_path / "passages.txt"
    path.write_text("some words\n")
    for stack, other in (("base", "fused"), ("fused", "base")):
        monkeypatch.setattr(text_keeping, "_split_ids", lambda *_, stack=stack: (passage, endings[stack]))
        found = evaluate(model, "text_keeping", lambada=str(path))
        assert (found[f"lambada_{stack}"], found[f"lambada_{other}"]) == (1, 0)
        assert found["lambada_change_interval"] is None, "one item"
        off = (*endings[stack][:-1], (endings[stack][-1] + 1) % 320)
        monkeypatch.setattr(text_keeping, "_split_ids", lambda *_, off=off: (passage, off))
        assert evaluate(model, "text_keeping", lambada=str(path))[f"lambada_{stack}"] == 0, "all but the last token"


def test_words_are_split_from_what_is_before_them(bases):
    encode = bases["llama"].encode
    assert text_keeping._split_ids(encode, "a red apple on a", " table") == (
        encode("a red apple on a"),
        encode(" table"),
    )


def test_a_base_near_chance_is_named(bases, files, monkeypatch):
    model = make_model(bases["llama"])
    found = evaluate(model, "text_keeping", arc_easy=files["arc_easy"])
    assert found["chance_arc_easy"] == pytest.approx(1 / 3) and found["arc_easy_near_chance"] is True
    monkeypatch.setattr(
        text_keeping._Stacks, "choose", lambda self, question: text_keeping._Scores({"base": 1.0, "fused": 0.0})
    )
    found = evaluate(model, "text_keeping", arc_easy=files["arc_easy"])
    assert found["arc_easy_near_chance"] is False
    assert found["arc_easy_change"] == -1 and found["arc_easy_change_interval"] == [-1, -1]


def test_items_are_chosen_by_seed(bases, files):
    model = make_model(bases["llama"], "single tower")
    few = [evaluate(model, "text_keeping", perplexity=files["perplexity"], max_items=1, seed=s) for s in range(4)]
    assert {found["settings"]["num_perplexity"] for found in few} == {1}
    again = evaluate(model, "text_keeping", perplexity=files["perplexity"], max_items=1, seed=0)
    assert again["perplexity_base"] == few[0]["perplexity_base"]


def test_what_cannot_be_read_is_refused(bases, tmp_path):
    model = make_model(bases["llama"])
    path = tmp_path / "rows.jsonl"

    def refused(match, content=None, **settings):
        if content is not None:
            path.write_text(content)
        with pytest.raises(XFusionError, match=match):
            evaluate(model, "text_keeping", **settings)

    refused("name a file: perplexity=FILE")
    refused(r"nowhere\.txt cannot be read", perplexity=str(tmp_path / "nowhere.txt"))
    refused("has no rows", "\n", lambada=str(path))
    refused("row 1 has no column 'text'", '{"text": "a b"}\n{"words": "a b"}\n', lambada=str(path))
    refused("passage 0 has no word before its last one", '{"text": "alone"}\n', lambada=str(path))
    refused("row 0 is no question", '{"question": "a", "choices": ["b"]}\n', arc_easy=str(path))
    refused("2 choices and the answer 2", '{"question": "a", "choices": ["b", "c"], "answer": 2}\n', arc_easy=str(path))


def test_questions_as_the_hub_has_them(tmp_path):
    rows = {"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answerKey": "B"}
    (tmp_path / "arc.jsonl").write_text(json.dumps(rows))
    (question,) = text_keeping._questions(str(tmp_path / "arc.jsonl"))
    assert question.choices == ("b", "c") and question.answer == 1


def test_real_files(assets):
    """Perplexity as transformers' own loss has it, on a real tiny Llama."""
    base = Backbone.load(str(assets / "stories260k-llama"))
    model = make_model(base)
    text = assets / "text"
    found = evaluate(
        model,
        "text_keeping",
        perplexity=str(text / "wikitext2_valid.parquet"),
        lambada=str(text / "lambada_test_first1000.parquet"),
        arc_easy=str(text / "arc_easy_test.parquet"),
        max_items=8,
    )
    assert found["text_bit_equal"] is True and found["perplexity_change"] == found["arc_easy_change"] == 0
    assert {found["settings"][f"num_{name}"] for name in ("perplexity", "lambada", "arc_easy")} == {8}
    assert found["chance_arc_easy"] == pytest.approx(0.25, abs=0.03) and found["arc_easy_near_chance"] is True
    wikitext = str(text / "wikitext2_valid.parquet")
    pieces, one = (
        text_keeping._pieces(model, wikitext),
        evaluate(model, "text_keeping", perplexity=wikitext, max_items=1),
    )
    (index,) = random.Random(0).sample(range(len(pieces)), 1)
    ids = torch.tensor([[*base.begin_ids, *pieces[index]]])
    assert one["perplexity_base"] == pytest.approx(math.exp(base.model(ids, labels=ids).loss.item()), rel=1e-4)
