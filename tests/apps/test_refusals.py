"""Every verb that shows a picture, or asks for one, refuses a pack that never learned it in one line."""

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import openai
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from apps.serving import as_url, running
from contracts.table import Noise, make_base, model_config, randomise

import xfusion
from xfusion.apps import cli
from xfusion.backbone import Backbone
from xfusion.data.sequence import XFusionError
from xfusion.model import Model
from xfusion.objectives.base import NoObjective
from xfusion.objectives.contrastive import Contrastive
from xfusion.objectives.next_token import NextToken

ABLE = {"embeds": "embed, text", "draws": "draw, text"}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A pack like clip's and one like imagen's, pictures, prompts and a folder that was drawn."""
    folder = tmp_path_factory.mktemp("refusals")
    base, silent = Backbone.load(str(make_base("llama", folder / "base"))), NextToken.Config(weight=0.0)
    configs = {
        "embeds": replace(model_config(base), text=silent, media=NoObjective.Config(), extra=(Contrastive.Config(),)),
        "draws": replace(model_config(base, "conditioned denoiser"), text=silent),
        "plain": model_config(base),
    }
    for name, config in configs.items():
        model = Model(config, base)
        randomise(model)
        model.eval().save_pretrained(folder / name)
    (folder / "photos").mkdir()
    Noise().picture(0, 32).save(folder / "photos" / "tree.png")
    (folder / "prompts.txt").write_text("a tree\n")
    made = [
        "draw",
        folder / "plain",
        "--prompts",
        folder / "prompts.txt",
        "-o",
        folder / "drawn",
        "-n",
        1,
        "--steps",
        1,
    ]
    assert cli.main([str(part) for part in made]) == 0
    return folder


CAPTION = "this model cannot caption, only {able}: take one that answers in words, of a recipe such as llava_1_5"
NO_WORDS = {
    "caption": (["caption", "PACK", "photos/tree.png"], CAPTION),
    "caption with a question": (["caption", "PACK", "photos/tree.png", "--question", "what is it?"], CAPTION),
    "data recaption": (["data", "recaption", "photos", "--with", "PACK", "-o", "new"], CAPTION),
    "questions": (["evaluate", "PACK", "--suite", "understanding"], "asks questions about pictures, but .* {able}"),
    "masked words": (["evaluate", "PACK", "--suite", "masked_words"], "{able}"),
}
NO_VECTORS = {
    "index": (
        ["index", "photos", "PACK", "-o", "new.index"],
        "this model cannot embed, only {able}: .*the recipe clip",
    ),
    "retrieval": (["evaluate", "PACK", "--suite", "retrieval"], "scores embedding and matching, but .* {able}"),
    "judge": (["judge", "drawn", "--by", "PACK"], "this pack cannot judge: it can {able}"),
}
NO_PICTURES = {
    "generate": (["generate", "PACK", "a tree"], "this model cannot draw, only {able}: .*the recipe xfusion"),
    "draw": (["draw", "PACK", "--prompts", "prompts.txt", "-o", "new"], "this model cannot draw, only {able}"),
    "infilling": (["evaluate", "PACK", "--suite", "infilling"], "this model cannot draw, only {able}"),
    "chat that draws": (
        ["chat", "PACK", "--draw", "always"],
        "--draw always: .* can {able} only; take a pack of a recipe such as xfusion",
    ),
    "an opening head": (
        ["train", "opening", "PACK", "-o", "new"],
        "embeds cannot draw: it can {able}; take a pack of a recipe such as xfusion",
    ),
}
CASES = [("embeds", name, *NO_WORDS[name]) for name in NO_WORDS] + [
    ("draws", name, *NO_WORDS[name]) for name in NO_WORDS
]
CASES += [("draws", name, *NO_VECTORS[name]) for name in NO_VECTORS]
CASES += [("embeds", name, *NO_PICTURES[name]) for name in NO_PICTURES]


@pytest.mark.parametrize(("pack", "name", "line", "message"), CASES, ids=lambda value: str(value)[:24])
def test_a_verb_says_in_one_line_what_a_pack_cannot(here, monkeypatch, capsys, pack, name, line, message):
    del name
    monkeypatch.chdir(here)
    capsys.readouterr()
    assert cli.main([pack if part == "PACK" else part for part in line]) == 2
    said = capsys.readouterr()
    assert re.search(message.format(able=re.escape(ABLE[pack])), said.err), said.err
    assert said.err.count("\n") == 1 and said.out == "" and not (here / "new").exists()


@pytest.mark.parametrize("pack", ABLE)
def test_a_sound_is_refused_by_a_recipe_that_makes_one(here, pack):
    with pytest.raises(
        XFusionError, match=f"no sound: it can {ABLE[pack]}; take a pack of a recipe such as audiopalm$"
    ):
        xfusion.load(here / pack).generate(["a tree", xfusion.Audio()])


@pytest.mark.parametrize("pack", ABLE)
def test_a_talk_goes_on_behind_a_refusal(here, monkeypatch, capsys, pack):
    """And words behind a picture that the pack drew are the base's."""
    monkeypatch.chdir(here)
    capsys.readouterr()
    lines = "/image photos/tree.png\n" + ("/draw a tree\n" if pack == "draws" else "") + "hello\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert cli.main(["chat", pack, "--steps", "1", "--max-tokens", "3", "--json"]) == 0
    said = capsys.readouterr()
    complaint = f"this pack cannot read pictures: it can {ABLE[pack]}; take one of a recipe such as llava_1_5"
    assert complaint in " ".join(said.err.split())
    turns = json.loads(said.out)["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * (1 + (pack == "draws"))


def test_a_server_refuses_before_anything_is_computed(here, monkeypatch):
    models = {name: xfusion.load(here / name) for name in ABLE}
    monkeypatch.setattr(Model, "run_pass", None)
    shown = {"type": "image_url", "image_url": {"url": as_url(Noise().picture(0, 32))}}
    heard = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
    with running(models) as server, server.client() as client:
        for model, content, more, message in (
            ("embeds", [shown], {}, ("read pictures", "llava_1_5")),
            ("draws", [shown], {}, ("read pictures", "llava_1_5")),
            ("draws", [heard], {}, ("hear", "qwen_audio")),
            ("draws", "a tree", {"modalities": ["image", "text"]}, ("say words behind a picture", "xfusion")),
            ("embeds", "a tree", {"modalities": ["image"]}, ("draw", "xfusion")),
        ):
            messages = [{"role": "user", "content": content}]
            with pytest.raises(openai.BadRequestError) as error:
                client.chat.completions.create(model=model, messages=messages, extra_body=more)
            assert error.value.code == "not_capable"
            verb, recipe = message
            line = f"this model cannot {verb}: it can {ABLE[model]}; take a pack of a recipe such as {recipe}"
            assert error.value.body["message"] == line
        with pytest.raises(openai.BadRequestError, match="it can draw, text; take a pack of a recipe such as clip"):
            client.embeddings.create(model="draws", input="a tree")


def test_a_prompt_that_is_too_long_has_openais_code(here, monkeypatch):
    """Also where words stand with a picture, which are refused before the places of the base are counted."""
    model = xfusion.load(here / "draws")
    monkeypatch.setattr("xfusion.generation.base.MAX_PROMPT_TOKENS", 64)
    with running({"draws": model}) as server, server.client() as client:
        for length, more in ((600, {}), (100, {"modalities": ["image"]})):
            messages = [{"role": "user", "content": "я" * length}]
            with pytest.raises(openai.BadRequestError, match="the prompt has .* more than the|places") as error:
                client.chat.completions.create(model="draws", messages=messages, extra_body=more, max_tokens=4)
            assert error.value.code == "context_length_exceeded" and error.value.type == "invalid_request_error"
        said = client.chat.completions.create(  # of words alone the base reads more
            model="draws", messages=[{"role": "user", "content": "я" * 100}], max_tokens=4
        )
        assert said.usage.prompt_tokens > 64
