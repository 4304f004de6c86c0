"""Training with solved examples before each picture: media masks, packing, resuming, and prompts of several pictures."""

from dataclasses import replace

import pytest
from contracts.table import SIDE, Noise, model_config
from training.runs import StopAt, pack_of, same, state_of, step_records, train

import xfusion
from xfusion.data.mixture import MixtureConfig
from xfusion.data.templates import Templates
from xfusion.objectives.next_token import NextToken
from xfusion.training.loop import Interrupted
from xfusion.training.stages import Recipe, Stage

MIXTURE = MixtureConfig(draw=0, caption=6, pack=2, shots=2, templates=Templates(question_share=0.0))


def recipe(base, fusion, steps):
    model = replace(model_config(base, fusion), text=NextToken.Config(weight=1.0))
    stage = Stage(steps=steps, warmup=2, rate=3e-3, schedule="cosine", ema=0, mixture=MIXTURE)
    return Recipe(model=model, data="noise", stages=(stage,))


@pytest.mark.parametrize("fusion", ["openflamingo, all previous", "dual tower"])
def test_a_resumed_run_with_shots_is_the_uninterrupted_one(fusion, bases, tmp_path):
    base = bases["llama"]
    whole = recipe(base, fusion, 6)
    train(base, tmp_path / "straight", recipe_=whole)
    with pytest.raises(Interrupted):
        train(base, tmp_path / "run", recipe_=whole, listener=StopAt(3))
    train(base, tmp_path / "run", recipe_=whole, resume=True)
    assert step_records(tmp_path / "run") == step_records(tmp_path / "straight")
    assert same(pack_of(tmp_path / "run"), pack_of(tmp_path / "straight"))
    assert same(state_of(tmp_path / "run"), state_of(tmp_path / "straight"))


def test_a_picture_is_named_behind_any_number_of_examples_and_the_answer_ends(bases, tmp_path):
    """All answers are learned and how each ends, so fewer examples than in training, and none, do as well."""
    base, source = bases["llama"], Noise()
    train(base, tmp_path / "run", recipe_=recipe(base, "flamingo", 250))
    model = xfusion.load(tmp_path / "run" / "pack", backbone=base)
    names, pictures = [e.captions[0] for e in source.examples], [source.picture(i, SIDE) for i in range(6)]
    for shots in range(3):
        found = []
        for asked in range(6):
            solved = [(asked + 1 + n) % 6 for n in range(shots)]
            prompt = [part for i in solved for part in (pictures[i], names[i])]
            found += model.generate([*prompt, pictures[asked]])
        print(shots, found)
        assert found == names
