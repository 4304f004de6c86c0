"""Every recipe as it stands trains through the real loop on a narrow base, and keeps what it says it keeps.

Recipes are found, not listed, so that a new one is held to this by being there. Models, objectives and schedules are the recipes'
own; a step has four samples of each task, always the same ones under the same noise, so that a loss that falls was learned. What
a recipe would take from a hub is a random one of the same shape.
"""

import math
import re
from dataclasses import replace

import pytest
import torch
from contracts.table import Noise, trained
from recipes.narrow import SAMPLES, every, narrowed

from xfusion.data.mixture import Mixture
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import open_source
from xfusion.model import Model, build

STEPS = 3
"""What stands behind a closed gate or a head of zeros moves in the second step, what stands behind both in the third."""

BEGIN, END = {"port.begin"}, {"port.end"}
STILL = {
    # Words read what stands behind [BOI], by attention of their own.
    **dict.fromkeys(("blip", "flamingo", "openflamingo", "idefics", "llama_adapter", "llama_adapter_v2"), BEGIN),
    "clip": END,  # no word stands behind a picture
    "imagen": BEGIN | END,
}
"""Weights that a recipe has and does not train, by name; of all others every one moves."""
EXPERT = re.compile(r"fusion\.blocks\.(\d+)\.experts\.(\d+)\.")


@pytest.fixture
def same_step(monkeypatch):
    """Every step reads what the first one reads, and meets the same noise."""
    batches, losses = Mixture.batches, Model.losses
    monkeypatch.setattr(Mixture, "batches", lambda mixture, _: batches(mixture, 0))
    monkeypatch.setattr(
        Model, "losses", lambda model, batch, generator, *rows: losses(model, batch, generator.manual_seed(0), *rows)
    )


@pytest.mark.parametrize("name", every())
def test_a_recipe_trains_as_it_stands(name, bases_of, tones, whisper, codes, same_step, tmp_path):
    recipe, base = narrowed(name, bases_of, whisper, codes, STEPS)
    source = open_source(tones) if recipe.model.audio else Noise()
    model, losses = trained(recipe, base, tmp_path / "run", source=source)  # text as the fusion declares it

    weights = {loss: weight for objective in model.objectives for loss, weight in objective.weights.items()}
    first, *_, last = (sum(weights[loss] * value for loss, value in step.items()) for step in losses)
    start, moved = build(recipe.model, base).named_new_parameters(), model.named_new_parameters()
    still = {part for part, weight in start.items() if torch.equal(weight, moved[part])}
    assert losses[0] and len({tuple(step) for step in losses}) == 1
    assert math.isfinite(last) and last < first
    idle = {match.groups() for part in still if (match := EXPERT.match(part))}
    assert {part for part in still if not EXPERT.match(part)} == STILL.get(name, set())
    assert len({layer for layer, _ in idle}) == len(
        idle
    )  # of three experts each token takes two: one of a layer may get none


@pytest.mark.full
@pytest.mark.parametrize("name", every())
def test_a_recipe_of_one_task_alone_trains_or_is_refused(name, bases_of, tones, whisper, codes, tmp_path):
    """Drawing or captioning samples only: finite steps if the recipe has such samples, and one line before the first if not.

    Every token has a part in a balance of experts.
    """
    recipe, base = narrowed(name, bases_of, whisper, codes, steps=2)
    source = open_source(tones) if recipe.model.audio else Noise()
    for task in ("draw", "caption"):
        alone = {"draw": 0, "caption": 0, task: SAMPLES}
        stages = [replace(stage, mixture=replace(stage.mixture, **alone)) for stage in recipe.stages]
        settings = {
            "recipe": replace(recipe, stages=tuple(stages)),
            "base": base,
            "out": tmp_path / task,
            "source": source,
        }
        if any(getattr(stage.mixture, task) for stage in recipe.stages) or name.startswith("moe_llava"):
            _, losses = trained(**settings)
            assert len(losses) == 2 and all(step and all(map(math.isfinite, step.values())) for step in losses)
        else:
            with pytest.raises(XFusionError, match="^stage 0 would teach nothing: ") as error:
                trained(**settings)
            assert "\n" not in str(error.value)
