"""What a model never learned is refused in one line, not answered by noise: a dual encoder and a denoiser beside the base."""

from dataclasses import replace

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
