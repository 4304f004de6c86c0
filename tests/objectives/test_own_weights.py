"""Objectives of every kind may own weights: made for a model, trained, saved, loaded, and kept when settings change."""

from dataclasses import dataclass, replace

import torch
from contracts.table import Noise, model_config
from torch import nn

import xfusion
from xfusion.data.mixture import MixtureConfig
from xfusion.model import Model
from xfusion.objectives.flow_matching import FlowMatching
from xfusion.objectives.next_token import NextToken
from xfusion.training.loop import train
from xfusion.training.stages import Recipe, Stage


class Scaled(FlowMatching):
    """Flow matching in which each number of a token has a learned factor."""

    @dataclass(frozen=True, kw_only=True)
    class Config(FlowMatching.Config):
        """Nothing more to set."""

        def build(self):
            """The objective."""
            return Scaled(self)

    def install(self, width, modality):
        """The factors, begun at random."""
        self.factor = nn.Parameter(1 + 0.1 * torch.randn(modality.token_width))

    def loss(self, run, batch):
        """Of the scaled head."""

        def scaled(view):
            out = run(view)
            return replace(out, media={name: x * self.factor for name, x in out.media.items()})

        return super().loss(scaled, batch)


class Shifted(NextToken):
    """Next tokens of a head with a learned temperature."""

    @dataclass(frozen=True, kw_only=True)
    class Config(NextToken.Config):
        """Nothing more to set."""

        def build(self):
            """The objective."""
            return Shifted(self)

    def install(self, width, modality):
        """The temperature."""
        self.log_scale = nn.Parameter(torch.zeros(()))

    def loss(self, run, batch):
        """Of the sharper or flatter head."""

        def shifted(view):
            out = run(view)
            return replace(out, logits=lambda chosen: out.logits(chosen) * self.log_scale.exp())

        return super().loss(shifted, batch)


def config(base):
    return replace(model_config(base), media=Scaled.Config(prediction="velocity"), text=Shifted.Config())


def test_weights_of_text_and_media_objectives_are_trained_saved_and_loaded(bases, tmp_path):
    base = bases["llama"]
    fresh, plain = Model(config(base), base), Model(model_config(base), base)
    names = set(fresh.named_new_parameters()) - set(plain.named_new_parameters())
    assert names == {"media.factor", "text.log_scale"} <= set(fresh.learned_state())
    assert fresh.num_new_parameters == plain.num_new_parameters + fresh.modality.token_width + 1
    assert Model(config(base), base).fingerprint == fresh.fingerprint  # by the seed of the model
    shared = plain.learned_state().items()
    assert all(
        torch.equal(fresh.learned_state()[name], value) for name, value in shared
    )  # what stands before them is as before

    stage = Stage(steps=3, warmup=1, ema=0, mixture=MixtureConfig(draw=4, caption=4))
    run = {"source": Noise(), "backbone": base, "compile": False, "dtype": torch.float32, "preview_every": 0}
    model = train(Recipe(model=config(base), data="noise", stages=(stage,)), out=tmp_path / "run", **run)
    before, after = fresh.named_new_parameters(), model.named_new_parameters()
    assert all(not torch.equal(before[name], after[name]) for name in names)
    loaded = xfusion.load(tmp_path / "run" / "pack", backbone=base, trust=True)
    assert loaded.fingerprint == model.fingerprint
    assert torch.equal(loaded.media_objective.factor, model.media_objective.factor)


def test_own_weights_stay_when_settings_change(bases):
    base = bases["llama"]
    model = Model(config(base), base)
    with torch.no_grad():
        model.media_objective.factor.fill_(2.0)
    model.set_objectives(model.config.text, replace(model.config.media, guidance=1.0))
    assert model.guidance == 1.0 and bool((model.media_objective.factor == 2).all())
    model.set_objectives(NextToken.Config(), FlowMatching.Config())
    assert not {"media.factor", "text.log_scale"} & set(model.learned_state())
    model.set_objectives(Shifted.Config(), Scaled.Config())
    assert 0.5 < float(model.media_objective.factor.detach().mean()) < 1.5  # fresh ones
