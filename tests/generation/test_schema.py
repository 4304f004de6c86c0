"""Answers as JSON of a schema: nothing else can be said, and what would be said freely is said."""

import itertools
import json

import pytest
import torch
from contracts.table import Noise, make_model

from xfusion.data.sequence import XFusionError
from xfusion.data.templates import in_json
from xfusion.generation import generate, log_likelihoods, schema_answers
from xfusion.generation.schema import next_tokens

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", 'a "b"']},
        "count": {"type": "integer", "minimum": 1, "maximum": 12},
        "seen": {"type": "boolean"},
    },
    "required": ["colour", "count", "seen"],
}


def answer_json(model, pictures, question, schema):
    """The answers to a question about each picture, as values."""
    return [json.loads(answer) for (answer,) in generate(model, [[p, question] for p in pictures], schema=schema)]


def test_all_texts_of_a_schema_are_written_out():
    texts = schema_answers(SCHEMA)
    values = itertools.product(["red", "green", 'a "b"'], range(1, 13), [True, False])
    assert [json.loads(text) for text in texts] == [{"colour": c, "count": n, "seen": s} for c, n, s in values]
    assert schema_answers({"const": None}) == ["null"] and schema_answers({"type": "object"}) == ["{}"]
    assert schema_answers({"type": "integer", "minimum": -1.5, "maximum": 1.5}) == ["-1", "0", "1"]
    assert schema_answers({"type": "integer", "minimum": 0.5, "maximum": 2}) == ["1", "2"]
    # A value has to fit all of its schema.
    assert schema_answers({"type": "string", "enum": ["a", 1, None]}) == ['"a"']
    assert schema_answers({"type": ["integer", "null"], "enum": [True, 1, 2.5, None]}) == ["1", "null"]
    assert schema_answers({"type": "boolean", "enum": [True, 1]}) == ["true"]
    assert schema_answers({"enum": [1, 2, 3, "a"], "minimum": 2}) == ["2", "3", '"a"']
    for schema, message in (
        ({"type": "string"}, "type 'string' is not one of"),
        ({"type": "integer"}, "an integer needs minimum and maximum"),
        ({"type": "integer", "minimum": 0, "maximum": 9999}, "it allows 10000 answers, from 1 to 4096"),
        ({"type": "object", "properties": {"a": {"type": "null"}}, "required": []}, "property 'a' is optional"),
        ({"enum": []}, "it allows 0 answers"),
        ({"enum": list(range(4097))}, "it allows 4097 answers, from 1 to 4096"),
        ({"type": "integer", "minimum": 0.2, "maximum": 0.8}, "it allows 0 answers"),
        ({"pattern": "a"}, "'pattern' is not understood"),
        ("boolean", "'boolean' is not a schema"),
        ({"enum": 5}, "enum is 5: give a list of values"),
        ({"const": float("nan")}, "nan has no JSON text"),
        ({"type": "integer", "minimum": "0", "maximum": 3}, "minimum is '0': give a number"),
        ({"type": "integer", "minimum": 0, "maximum": float("inf")}, "maximum is inf: give a number"),
        ({"type": "object", "properties": ["a"]}, r"properties is \['a'\]: give an object of schemas"),
        ({"type": "object", "properties": {"a": True}}, "True is not a schema"),
        ({"type": "object", "required": "a"}, "required is 'a': give a list of names"),
        (
            {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a", "b"]},
            "'b' is required, but prop",
        ),
        ({"type": "text", "enum": ["a"]}, "type 'text' is not one of object, array"),
        ({"type": "integer", "enum": ["a"]}, "it allows 0 answers"),
        ({"enum": [1, 2], "const": 3}, "it allows 0 answers"),
    ):
        with pytest.raises(XFusionError, match=message):
            schema_answers(schema)


def test_a_prefix_may_end_or_go_on():
    allowed = [(1, 2), (1, 2, 3), (4,)]
    assert next_tokens([], allowed, 0) == [1, 4]
    assert next_tokens([1], allowed, 0) == [2]
    assert next_tokens([1, 2], allowed, 0) == [0, 3]
    assert next_tokens([1, 2, 3], allowed, 0) == next_tokens([4], allowed, 0) == [0]


@torch.no_grad()
def test_a_random_model_says_nothing_else(bases):
    model = make_model(bases["llama"])
    shown = [Noise().picture(i, 32) for i in range(3)]
    found = answer_json(model, shown, "what is this?", SCHEMA)
    texts = [json.loads(text) for text in schema_answers(SCHEMA)]
    assert all(value in texts for value in found)
    assert found[1:2] == answer_json(model, shown[1:2], "what is this?", SCHEMA)
    (words,) = generate(model, ["a red apple"], schema=SCHEMA)
    assert json.loads(words) in texts  # by the base's own generate
    with pytest.raises(XFusionError, match="max_tokens 2 is too few for the schema's longest answer"):
        generate(model, [shown[0]], schema=SCHEMA, max_tokens=2)


@torch.no_grad()
def test_the_choice_is_greedy_among_what_is_allowed(bases):
    """One token each: the likeliest of them by the model's own scores, and of the base's for words alone."""
    model = make_model(bases["llama"])
    answers = schema_answers({"type": "integer", "minimum": 0, "maximum": 9})
    ids = [model.backbone.encode(text) for text in answers]
    assert {len(one) for one in ids} == {1}
    prompt = model.backbone.encode("two blue birds")
    logits = model.backbone.model(torch.tensor([prompt])).logits[0, -1]
    wanted = max(range(10), key=lambda n: float(logits[ids[n][0]]))
    assert generate(model, ["two blue birds"], schema={"enum": list(range(10))}) == [str(wanted)]


@torch.no_grad()
def test_a_question_is_asked_in_json_where_its_answer_is(bases):
    """The value is what stands behind the question as it was trained, and not behind a plain one."""
    model = make_model(bases["llama"])
    values = list(range(10))
    schema = {"type": "object", "properties": {"answer": {"enum": values}}}
    begun = [f'{{"answer": {value}' for value in values]
    whole = [model.backbone.encode(text) for text in schema_answers(schema)]
    assert [one[:-1] for one in whole] == [
        model.backbone.encode(text) for text in begun
    ]  # the last token closes the brace
    differ = 0
    for seed in range(8):
        shown = Noise().picture(seed, 32)

        def best(question, answers, shown=shown):
            likely = [likelihood for likelihood, _ in log_likelihoods(model, [shown, question], answers)]
            return max(values, key=likely.__getitem__)

        asked = best(in_json("how many?"), begun)
        differ += asked != best("how many?", begun)
        assert answer_json(model, [shown], "how many?", schema) == [{"answer": asked}]
        bare = best("how many?", [str(value) for value in values])
        assert generate(model, [shown, "how many?"], schema={"enum": values}) == [str(bare)]
    assert differ
