"""What a model never learned is refused in one line, not answered by noise: a dual encoder and a denoiser beside the base."""

import functools
import inspect
import pkgutil
import re
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch
from contracts.table import SIDE, Noise, make_model, model_config, randomise

import xfusion
from xfusion.data.sequence import XFusionError
from xfusion.generation import conversation, log_likelihoods
from xfusion.model import Model
from xfusion.objectives.base import NoObjective
from xfusion.objectives.contrastive import Contrastive
from xfusion.objectives.next_token import NextToken
from xfusion.processor import Processor

PICTURE = Noise().picture(0, SIDE)
SILENT = NextToken.Config(weight=0.0)


@pytest.fixture(scope="module")
def embeds(bases):
    """As the recipe clip: texts and pictures in one space, no words."""
    plain = model_config(bases["llama"])
    model = Model(
        replace(plain, text=SILENT, media=NoObjective.Config(), extra=(Contrastive.Config(),)), bases["llama"]
    )
    randomise(model)
    return model.eval()


@pytest.fixture(scope="module")
def draws(bases):
    """As the recipe imagen: pictures of words, no words."""
    model = Model(replace(model_config(bases["llama"], "conditioned denoiser"), text=SILENT), bases["llama"])
    randomise(model)
    return model.eval()


def test_what_these_models_can(embeds, draws):
    assert embeds.capabilities == {"text", "embed"} and draws.capabilities == {"text", "draw"}


REFUSED = {
    "caption": lambda model: model.caption([PICTURE]),
    "caption with a question": lambda model: model.caption([PICTURE], question="what is it?"),
    "score_names": lambda model: model.score_names([PICTURE], ["tree"]),
    "score_names without a picture": lambda model: model.score_names(None, ["tree"]),
    "generate behind a picture": lambda model: model.generate([PICTURE]),
    "generate with a question": lambda model: model.generate([PICTURE, "what is it?"]),
    "generate in a batch": lambda model: model.generate([["a tree"], [PICTURE, "?"]]),
    "words behind a drawn picture": lambda model: model.generate(["a tree", xfusion.Image(), "what is it?"]),
    "a picture before one to draw": lambda model: model.generate([PICTURE, "a tree", xfusion.Image()]),
    "log-likelihoods": lambda model: log_likelihoods(model, [PICTURE, "it is"], ["a tree"]),
    "a conversation": lambda model: model.answer([{"role": "user", "content": [PICTURE, "?"]}], draw="never"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_no_word_is_said_behind_a_picture(embeds, draws, monkeypatch, name):
    monkeypatch.setattr(Model, "run_pass", None)  # refused before anything is computed
    for model, able in ((embeds, "embed, text"), (draws, "draw, text")):
        with pytest.raises(XFusionError) as error:
            REFUSED[name](model)
        message = str(error.value)
        assert message.startswith(f"this model cannot caption, only {able}: ") and "\n" not in message
        assert "of a recipe such as llava_1_5" in message


def test_words_alone_and_pictures_of_words_go_on(embeds, draws):
    expected = make_model(embeds.backbone).generate(["a tree"], max_tokens=3)
    assert embeds.generate(["a tree"], max_tokens=3) == draws.generate(["a tree"], max_tokens=3) == expected
    assert draws.generate(["a tree", xfusion.Image(), "and", xfusion.Image()], steps=1)[0].size == (SIDE, SIDE)
    with pytest.raises(XFusionError, match="this model cannot draw, only embed, text"):
        embeds.generate(["a tree", xfusion.Image()], steps=1)


def test_a_drawn_picture_is_named_by_its_word_where_none_can_be_read(draws):
    """A conversation with a pack that only draws goes on behind its pictures, by the base."""
    turns = [
        {"role": "user", "content": "draw a tree"},
        {"role": "assistant", "content": [PICTURE]},
        {"role": "user", "content": "thanks"},
    ]
    assert conversation(draws, turns) == conversation(draws, turns, own_pictures=False)
    (words,) = draws.answer(turns, draw="never", max_tokens=3)
    assert isinstance(words, str)
    reads = make_model(draws.backbone)
    assert PICTURE in conversation(reads, turns) and PICTURE not in conversation(reads, turns, own_pictures=False)


def test_a_dual_encoder_scores_by_cosines(embeds, draws):
    texts = ["a red apple", "tree", "a house by the sea"]
    found = torch.tensor(embeds.score(PICTURE, texts))
    picture, *words = embeds.embed([PICTURE, *texts])
    torch.testing.assert_close(found, torch.stack([torch.dot(picture, w) for w in words]), rtol=0, atol=1e-6)
    assert float(found.abs().max()) <= 1 and len(set(found.tolist())) == 3
    with pytest.raises(XFusionError, match="scores texts by their cosine to a picture: give one"):
        embeds.score(None, texts)
    with pytest.raises(XFusionError, match="this model cannot caption, only draw, text: take one that captions.* clip"):
        draws.score(PICTURE, texts)
    for model in (embeds, draws):
        with pytest.raises(XFusionError, match=r"score takes a list of texts: write \[text\]"):
            model.score(PICTURE, "tree")


def test_a_model_that_captions_scores_by_likelihood(bases):
    """Also where it embeds besides, as the recipe blip does."""
    plain = model_config(bases["llama"])
    for config in (plain, replace(plain, extra=(Contrastive.Config(),))):
        model = Model(config, bases["llama"]).eval()
        assert model.score(PICTURE, ["tree", "sea"]) == model.score_names([PICTURE], ["tree", "sea"])[0].tolist()
        assert model.score(None, ["tree"]) == model.score_names(None, ["tree"])[0].tolist()
        assert max(model.score(PICTURE, ["tree", "sea"])) < 0


def _target(verb):
    """The function that a verb's docstring names, to which it passes everything on."""
    named = re.search(r"see\s+`(xfusion[\w.]+)`", verb.__doc__ or "")
    return named and pkgutil.resolve_name(named[1])


VERBS = {name: verb for name in vars(Model) if callable(verb := getattr(Model, name)) and _target(verb)}
WITHOUT = {"match": {"picture", "pictures"}, "save_pretrained": {"weights"}}
"""Parameters in which a verb is narrower: one picture, and no weights other than the model's own."""


def _signature(function, subjects, without=frozenset()):
    """Names, kinds, defaults and annotations of a function's parameters, but for its first ones."""
    parameters = list(inspect.signature(function).parameters.values())[subjects:]
    return [(p.name, p.kind, p.default, p.annotation) for p in parameters if p.name not in without]


def test_the_verbs_of_a_model_have_the_signatures_of_the_functions_that_they_call():
    """So that help and completion show every setting, and a new one of a function is one of its verb."""
    assert {"generate", "answer", "draw", "inpaint", "caption", "score", "score_names", "match", "fill", "embed"} < set(
        VERBS
    )
    assert {"from_pretrained", "save_pretrained", "push_to_hub"} < set(VERBS)
    for name, verb in VERBS.items():
        is_class_method, without = name == "from_pretrained", WITHOUT.get(name, frozenset())
        found = _signature(verb, 0 if is_class_method else 1, without)
        assert found == _signature(_target(verb), 0 if is_class_method else 1, without), name
        if name != "match":  # one list, not a row of a table
            assert inspect.signature(verb).return_annotation == inspect.signature(_target(verb)).return_annotation, name
    assert _signature(Processor.reply, 2) == _signature(_target(Processor.reply), 2)
    assert _signature(xfusion.train, 1) == _signature(_target(xfusion.train), 1)


@pytest.mark.parametrize("name", [*VERBS, "reply", "train"])
def test_a_verb_passes_every_setting_on(monkeypatch, name):
    verb = {"reply": Processor.reply, "train": xfusion.train}.get(name) or VERBS[name]
    target, model, calls = _target(verb), MagicMock(), []

    def record(*values, **settings):
        calls.append(inspect.signature(target).bind(*values, **settings).arguments)
        return MagicMock()

    model.model.generate = functools.partial(record, model)
    if name != "reply":  # which asks its model
        place = "xfusion.generation" if target.__module__.startswith("xfusion.generation") else target.__module__
        monkeypatch.setattr(f"{place}.{target.__name__}", record)
    parameters = inspect.signature(verb).parameters
    given = {n: object() for n in parameters if n not in {"self", "conversation"}}
    values = [given[n] for n, p in parameters.items() if n in given and p.kind is p.POSITIONAL_OR_KEYWORD]
    settings = {n: given[n] for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    subjects = [model] * ("self" in parameters) + [object()] * ("conversation" in parameters)
    verb(*subjects, *values, **settings)
    passed = {n: value for n, value in calls[0].items() if n in given}
    assert passed == {n: value for n, value in given.items() if n not in WITHOUT.get(name, ())}
