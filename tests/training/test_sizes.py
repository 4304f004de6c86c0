"""Pictures of several sizes in one step: packed as alone, one graph for all, drawn and named at each."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from contracts.table import Noise, model_config, randomise, view
from training.runs import StopAt, log, pack_of, recipe, same, step_records, train

import xfusion
import xfusion.fusion.base as fusion_base
from xfusion.data.mixture import Mixture, MixtureConfig
from xfusion.data.sequence import XFusionError
from xfusion.data.templates import Templates
from xfusion.model import Model, compiled_graphs
from xfusion.training.loop import Interrupted

SIZES = (16, 24, 8)
MIXTURE = MixtureConfig(draw=6, caption=6, pack=2)


def of_sizes(base, sizes=SIZES, fusion="dual tower"):
    config = model_config(base, fusion)
    return replace(config, image=replace(config.image, sizes=sizes))


def run(base, sizes=SIZES, mixture=MIXTURE):
    return replace(recipe(base, mixture=mixture), model=of_sizes(base, sizes))


@pytest.mark.parametrize("fusion", ["dual tower", "x-fuse", "flamingo"])
def test_a_step_is_the_sum_of_its_samples_alone(bases, fusion):
    """Losses and gradients of packed rows of several sizes, against every sample in a batch of its own."""
    base = bases["llama"]
    model = Model(of_sizes(base, fusion=fusion), base)
    randomise(model)
    made = Mixture(Noise(), model.image, SIZES, base.encode, base.begin_ids, base.end_ids[0], MIXTURE, 0)
    rows = [
        row for task in made._rows(made.drawings(1), made.captionings(1)) for row in made._fill_pictures(list(task))
    ]
    assert len(rows) < 12 and len({len(row) for row in rows}) > 1

    def summed(batches):
        model.zero_grad()
        found = {}
        for batch in batches:
            for objective in model.objectives:
                for name, (value, count) in objective.loss(model, batch).items():
                    value.backward()
                    found[name] = [
                        a + b for a, b in zip(found.get(name, (0, 0)), (float(value.detach()), int(count)), strict=True)
                    ]
        return found, [p.grad.clone() for p in model.new_parameters() if p.grad is not None]

    packed, gradients = summed([view(rows, model)])
    alone, expected = summed([view([[sample]], model) for row in rows for sample in row])
    assert packed.keys() == alone.keys() and len(packed) == (1 if fusion == "flamingo" else 2)
    for name, (value, count) in packed.items():
        assert count == alone[name][1] and value == pytest.approx(alone[name][0], rel=1e-5)
    for one, other in zip(gradients, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-7)


def test_a_run_of_several_sizes_resumes_and_its_pack_draws_and_names_at_each(bases, tmp_path):
    base = bases["llama"]
    model = train(base, tmp_path / "whole", recipe_=run(base))
    with pytest.raises(Interrupted):
        train(base, tmp_path / "broken", recipe_=run(base), listener=StopAt(5))
    train(base, tmp_path / "broken", recipe_=run(base), resume=True)
    assert step_records(tmp_path / "whole") == step_records(tmp_path / "broken")
    assert same(pack_of(tmp_path / "whole"), pack_of(tmp_path / "broken"))
    model = xfusion.load(tmp_path / "whole" / "pack", backbone=base)
    randomise(model)
    names, scores = ["red apple", "a house"], []
    for size in SIZES:
        assert model.draw(["cat"], steps=2, size=size)[0].size == (size, size)
        pictures = [Noise().picture(0, 48)]
        assert isinstance(model.caption(pictures, size=size, max_tokens=4)[0], str)
        scores.append(model.score_names(pictures, names, size=size))
    assert torch.equal(scores[0], model.score_names(pictures, names))
    assert not torch.allclose(scores[0], scores[1]) and not torch.allclose(scores[1], scores[2])
    with pytest.raises(XFusionError, match="pictures of 32 px cannot be read: the model was made for 16, 24, 8 px"):
        model.caption(pictures, size=32)


class Even(Noise):
    """All words are as long: no other width of text makes a graph."""

    def __init__(self, number=6):
        super().__init__(number)
        self.examples = tuple(replace(example, captions=("a cat",)) for example in self.examples)


def test_sizes_share_their_graphs(bases, tmp_path, monkeypatch):
    """As many graphs as a run of one size: no size is compiled for itself. Rows of several sizes may be wider than usual, which
    is compiled ahead and counted elsewhere.
    """
    monkeypatch.setattr(Mixture, "wide_batches", lambda _: ())
    plain = Templates(caption_dropout=0, article_share=0, other_wordings=0, question_share=0)
    mixture = replace(MIXTURE, templates=plain)
    monkeypatch.setattr(fusion_base.torch, "compile", partial(torch.compile, backend="eager"))
    found = {}
    for sizes in ((16,), SIZES):
        torch.compiler.reset()
        fusion_base.compiled.cache_clear()
        before = compiled_graphs()
        out = tmp_path / str(len(sizes))
        train(bases["llama"], out, recipe_=run(bases["llama"], sizes, mixture), source=Even(), compile=True)
        found[sizes] = compiled_graphs() - before
        train(bases["llama"], out / "plain", recipe_=run(bases["llama"], sizes, mixture), source=Even())
        for one, other in zip(log(out), log(out / "plain"), strict=True):
            assert one["losses"] == pytest.approx(other["losses"], rel=1e-4)
    fusion_base.compiled.cache_clear()
    torch.compiler.reset()
    assert found[(16,)] == found[SIZES] > 0


@pytest.mark.full
def test_a_long_caption_of_a_run_of_several_sizes_compiles_nothing_behind_the_warm_up(bases, tmp_path, monkeypatch):
    """The graphs that it needs are made ahead, as in a run of one size, and no loss changes."""
    source, late = Even(60), 9  # its turns are steps 12 and 13
    long = replace(source.examples[late], captions=("a cat " * 3,))
    source.examples = (*source.examples[:late], long, *source.examples[late + 1 :])
    plain = Templates(caption_dropout=0, article_share=0, other_wordings=0, question_share=0)
    mixture = MixtureConfig(draw=3, caption=4, pack=2, templates=plain)
    whole = replace(recipe(bases["llama"], steps=15, mixture=mixture), model=of_sizes(bases["llama"]))
    monkeypatch.setattr(fusion_base.torch, "compile", partial(torch.compile, backend="eager"))
    for name in ("ahead", "when needed"):
        torch.compiler.reset()
        fusion_base.compiled.cache_clear()
        train(bases["llama"], tmp_path / name, recipe_=whole, source=source, compile=True)
        monkeypatch.setattr(Mixture, "wide_batches", lambda _: ())
    fusion_base.compiled.cache_clear()
    torch.compiler.reset()
    ahead, when_needed = (log(tmp_path / name, "end")[0] for name in ("ahead", "when needed"))
    assert ahead["graphs_behind_warm_up"] == 0 < when_needed["graphs_behind_warm_up"]
    assert step_records(tmp_path / "ahead") == step_records(tmp_path / "when needed")
