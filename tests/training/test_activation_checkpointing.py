"""Layers that are computed once more in the backward pass: the same bits, less memory, as predicted."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from contracts.table import FUSIONS, LAYERS, make_model, mixed_sequences, view
from training.runs import StopAt, log, pack_of, recipe, same, state_of, step_records, train

import xfusion.fusion.base as fusion_base
from xfusion.comparison.cost import LiveBytes, _loss, _sample_makers, activation_memory
from xfusion.data.mixture import MixtureConfig
from xfusion.data.pack import pack
from xfusion.model import compiled_graphs
from xfusion.training.loop import Interrupted
from xfusion.training.stages import Stage


def learned(model, dtype, again, *, compiled=False):
    """Losses and gradients of all kinds of sequences, and how often a layer was computed."""
    engine = replace(model.training_engine(dtype, "tested", "eager", compiled), activation_checkpointing=again)
    calls, layer = [], model.fusion.layer
    model.fusion.layer = lambda index, *rest: calls.append(index) or layer(index, *rest)
    model.zero_grad()
    batch = view([[s] for s in mixed_sequences().values()], model)
    with model.using(engine), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(batch)
        found = {name: value for o in model.objectives for name, (value, _) in o.loss(lambda _: out, batch).items()}
        sum(found.values()).backward()
    del model.fusion.layer
    return found, [p.grad for p in model.new_parameters()], len(calls)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)])
@pytest.mark.parametrize("fusion", [*FUSIONS, "flamingo"])
def test_losses_and_gradients_are_the_same_bits(bases, fusion, dtype):
    model = make_model(bases["llama"], fusion)
    (plain, gradients, once), (again, others, twice) = (learned(model, dtype, way) for way in (False, True))
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)
    assert len(gradients) == len(others) and any(g is not None and g.any() for g in gradients)
    for one, other in zip(gradients, others, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    assert once == LAYERS and LAYERS < twice <= 2 * LAYERS  # layers before the first new weight need no backward pass


def test_compiled_layers_too_and_no_graph_is_made_for_it(bases, monkeypatch):
    monkeypatch.setattr(fusion_base.torch, "compile", partial(torch.compile, backend="aot_eager"))
    fusion_base.compiled.cache_clear()
    torch.compiler.reset()
    model = make_model(bases["llama"], "x-fuse")
    begun = compiled_graphs()
    plain, gradients, _ = learned(model, torch.float32, False, compiled=True)
    made = compiled_graphs()
    again, others, _ = learned(model, torch.float32, True, compiled=True)
    assert begun < made == compiled_graphs()
    fusion_base.compiled.cache_clear()
    torch.compiler.reset()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


def test_a_run_is_the_same_to_the_bit_and_resumes(bases, tmp_path):
    """One stage keeps, the other computes again."""
    stages = tuple(
        Stage(steps=4, warmup=2, mixture=MixtureConfig(draw=4, caption=4, pack=2), activation_checkpointing=way)
        for way in (True, False)
    )
    plain = tuple(replace(stage, activation_checkpointing=False) for stage in stages)
    base = bases["llama"]
    train(base, tmp_path / "plain", recipe_=recipe(base, stages=plain))
    train(base, tmp_path / "again", recipe_=recipe(base, stages=stages))
    with pytest.raises(Interrupted):
        train(base, tmp_path / "broken", recipe_=recipe(base, stages=stages), listener=StopAt(1))
    train(base, tmp_path / "broken", recipe_=recipe(base, stages=stages), resume=True)
    for name in ("again", "broken"):
        assert step_records(tmp_path / name) == step_records(tmp_path / "plain") and len(log(tmp_path / name)) == 8
        assert same(pack_of(tmp_path / name), pack_of(tmp_path / "plain"))
        assert same(state_of(tmp_path / name), state_of(tmp_path / "plain"))


def test_live_bytes_are_those_of_tensors_that_are_held():
    """Of y = relu(w x) the product goes before the square is made, but the relu's result stays for the backward pass."""
    w, x = torch.randn(16, 8, requires_grad=True), torch.randn(8, 100)
    with LiveBytes() as live:
        y = (w @ x).relu()  # 16 x 100 floats twice, then once
        assert (live.current, live.peak) == (6400, 12_800)
        z = y[:4].t()  # views are nobody's
        assert live.current == 6400
        y.sum().backward()
    assert live.current == 6400 + 4 * 16 * 8 and z.shape == (100, 4)  # and the gradient of w


@pytest.mark.parametrize(("fusion", "over"), [("dual tower", 1.02), ("single tower", 1.02), ("flamingo", 1.25)])
def test_predicted_memory_is_that_of_a_real_pass(bases, fusion, over):
    """Without values no row can be left out, so that a mechanism which skips rows without pictures is predicted dearer."""
    model = make_model(bases["llama"], fusion)
    stage = Stage(mixture=MixtureConfig(draw=6, caption=4, pack=2))
    found = {way: activation_memory(model, stage, torch.float32, checkpointing=way) for way in (False, True)}
    before = [p.detach().clone() for p in model.new_parameters()]
    for way, predicted in found.items():
        most = 0
        engine = replace(model.training_engine(torch.float32, "", "eager", False), activation_checkpointing=way)
        for p in model.new_parameters():
            p.grad = torch.zeros_like(p)
        for task, rows in (("draw", [1] * 6), ("caption", [2] * 2)):
            if task in model.capabilities:
                batch = pack([[_sample_makers(model)[task](12)] * count for count in rows])
                with model.using(engine), LiveBytes() as live:
                    _loss(model, batch, task).backward()
                most = max(most, live.peak)
        assert 0.98 * most <= predicted <= over * most
    assert found[True] < 0.75 * found[False]
    assert all(torch.equal(a, b) for a, b in zip(before, model.new_parameters(), strict=True))


def test_more_samples_need_more(bases):
    model = make_model(bases["llama"])
    small, large = (
        activation_memory(model, Stage(mixture=MixtureConfig(draw=n, caption=0)), torch.float32) for n in (8, 16)
    )
    assert large == pytest.approx(2 * small, rel=0.05)


def test_solved_examples_need_what_as_many_samples_would(bases):
    model = make_model(bases["llama"])
    alone, solved, more = (
        activation_memory(model, Stage(mixture=MixtureConfig(draw=0, pack=1, **mixture)), torch.float32)
        for mixture in ({"caption": 4}, {"caption": 4, "shots": 2}, {"caption": 12})
    )
    assert solved > 2.5 * alone and 0.9 * more < solved < 1.5 * more
