"""Every recipe on another device, without one: it trains, draws, names and embeds there, and what it says is what the CPU says.

No operation may mix tensors of the two devices, which is what code that was only ever run on a CPU gets wrong on a GPU.
"""

import pytest
import torch
from contracts.pretended import PRETENDED, Elsewhere, moved, one_more_device
from contracts.table import Noise
from PIL import Image
from recipes.narrow import every, narrowed

import xfusion
from xfusion.data.sources import open_source
from xfusion.training.loop import train

STEPS = 2
IN_DEFAULT_TIER = {"xfusion.recipes.xfusion:demo", "clip", "qwen_audio"}
PROMPTS, NAMES = ["a red apple", "tree"], ["a red apple", "a tree", "one"]


def answers(model, source):
    """What a model says by everything that it can do."""
    able, found = model.capabilities, {}
    if model.config.audio is None:
        media = [Image.new("RGB", (40, 40), colour) for colour in ("red", "white")]
    else:
        media = [source.sound(index) for index in range(2)]
    if "caption" in able:
        found["caption"] = model.caption(media, max_tokens=4)
        found["score"] = model.score_names(media, NAMES)
        found["continued"] = model.generate([media[0], "What is this?"], max_tokens=4)[0]
    if "draw" in able and model.config.audio is None:
        size = model.image.sizes[0]
        context = [[prompt, xfusion.Image(size=size)] for prompt in PROMPTS]
        found["drawn"] = [torch.tensor(list(out[0].tobytes())) for out in model.generate(context, seed=3, steps=2)]
    if "embed" in able:
        found["embedded"] = model.embed([*NAMES, *media])
    if "match" in able:
        found["matched"] = torch.tensor(model.match(media[0], NAMES))
    if "fill" in able:
        found["filled"] = [word for word, _ in model.fill(media[0], ["a red ___"])[0][0]]
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_DEFAULT_TIER else pytest.mark.full) for name in every()]
)
def test_a_recipe_does_there_what_it_does_here(name, bases_of, tones, whisper, codes, tmp_path, monkeypatch):
    recipe, base = narrowed(name, bases_of, whisper, codes, STEPS)
    source = open_source(tones) if recipe.model.audio else Noise()
    losses = {"here": [], "there": []}

    def trained(place, backbone):
        settings = {"source": source, "compile": False, "dtype": torch.float32, "preview_every": 0}
        listener = lambda event: losses[place].append(event["losses"]) if event["event"] == "step" else None  # noqa: E731
        return train(recipe, out=tmp_path / place, backbone=backbone, listener=listener, **settings)

    here = trained("here", base)
    with one_more_device(monkeypatch):
        there = trained("there", moved(base))
        assert there.device == PRETENDED and {type(p.data) for p in there.new_parameters()} == {Elsewhere}
        there.load_state_dict({part: weight.to(PRETENDED) for part, weight in here.state_dict().items()})
        said = answers(there, source)
    assert len(losses["here"]) == STEPS * len(recipe.stages)
    for one, two in zip(losses["here"], losses["there"], strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    expected = answers(here, source)
    assert expected.keys() == said.keys()
    for verb, answer in expected.items():
        if verb == "drawn":
            assert all(int((a - b).abs().max()) <= 2 for a, b in zip(answer, said[verb], strict=True)), verb
        elif isinstance(answer, torch.Tensor):
            torch.testing.assert_close(said[verb].cpu(), answer, rtol=1e-3, atol=1e-3)
        else:
            assert said[verb] == answer, verb
