"""Runs of the tiny base, and what they left behind."""

import json

import torch
from contracts.table import Noise, model_config
from safetensors.torch import load_file

from xfusion.data.mixture import MixtureConfig
from xfusion.training import loop, states
from xfusion.training.stages import Recipe, Stage


def recipe(base, *, stages=None, seed=0, **stage):
    settings = {"steps": 12, "warmup": 3, "mixture": MixtureConfig(draw=4, caption=4, pack=2), **stage}
    return Recipe(model=model_config(base), data="noise", stages=stages or (Stage(**settings),), seed=seed)


def train(base, out, *, recipe_=None, **settings):
    settings = {
        "source": Noise(),
        "backbone": base,
        "compile": False,
        "dtype": torch.float32,
        "preview_every": 0,
        **settings,
    }
    return loop.train(recipe_ or recipe(base), out=out, **settings)


def log(out, kind="step"):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def step_records(out):
    """What a run says of its steps, without wall-clock times."""
    return [(e["step"], e["losses"], e["rate"], e["gradient_norm"], e["samples"]) for e in log(out)]


def pack_of(out):
    return load_file(out / "pack" / "model.safetensors")


def plan_of(out):
    return states.newest(out / "state")[0]


def state_of(out):
    return states.newest(out / "state")[1]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class StopAt:
    """A listener that raises when a step was told."""

    def __init__(self, step, error=KeyboardInterrupt):
        self.step, self.error = step, error

    def __call__(self, event):
        if event["event"] == "step" and event["step"] == self.step:
            raise self.error
