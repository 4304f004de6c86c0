"""`bench` runs and its arithmetic is right; how fast anything is, is no test."""

import contextlib
import importlib.util
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.table import Noise, make_base

import xfusion.fusion.base as fusion_base
from xfusion.apps import cli
from xfusion.apps.bench import activation_checkpointing, denoising, llama, memory, training, transfusion
from xfusion.apps.bench import base as bench_base
from xfusion.apps.bench.base import Bench, Product, Step, count_new_graphs, products, replay
from xfusion.backbone import Backbone
from xfusion.backbone.decoder import SHAPES
from xfusion.data import mixture
from xfusion.training.optimizer import Optimizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    backbone = Backbone.load(str(make_base("llama", tmp_path_factory.mktemp("base"))))
    return Bench(backbone=backbone, source=Noise(6), compile=False, quick=True, report=lambda _: None)


def test_the_folder_is_the_list():
    assert bench_base.names() == [
        "activation_checkpointing",
        "denoising",
        "generate",
        "llama",
        "memory",
        "training",
        "transfusion",
    ]


def test_products_are_those_that_are_executed():
    one, weight = torch.randn(3, 8), torch.randn(5, 8, requires_grad=True)

    def work():
        stacked = one.expand(2, 3, 8) @ weight.t()
        (
            torch.bmm(stacked, stacked.transpose(1, 2)).sum() + torch.addmm(torch.zeros(5), one, weight.t()).sum()
        ).backward()

    found = products(work)
    assert sum(p.flops for p in found) == 2 * (6 * 8 * 5 * 2 + 2 * 3 * 5 * 3 * 3 + 3 * 8 * 5 * 2)
    assert {p.dtype for p in found} == {torch.float32}
    assert products(lambda: one + one) == []
    replay(found)()


def test_products_of_compiled_code_leave_out_what_nobody_reads():
    one, two = torch.randn(4, 8), torch.randn(8, 6)

    @torch.compile
    def work():
        unread = one @ two @ two.t()
        del unread
        return one @ two

    work()
    (product,) = products(work)
    assert replace(product, places=Product.places) == Product(((4, 8), (8, 6)), ((8, 1), (6, 1)), torch.float32)
    assert product.flops == 2 * 4 * 8 * 6 and product.extents == (32, 48, 24)


def test_everybody_takes_turns(bench):
    said = []
    works = {name: lambda name=name: said.append(name) for name in "ab"}
    seconds = bench.in_turn(works, warm=1, rounds=3)
    assert said == [*"ab", *"ababab"] and list(seconds) == ["a", "b"] and min(seconds.values()) > 0


def test_a_step_learns_and_texts_that_are_kept_change_nothing(bench):
    losses = {}
    for kept in (True, False):
        model = bench.model()
        step, before = Step(bench, model, keep_text=kept), model.fingerprint
        step()
        assert model.fingerprint != before and bool(step.engine.text_states) == kept
        losses[kept] = torch.cat([p.detach().flatten() for p in model.new_parameters()])
    # AdamW's first step moves each weight by the rate times the sign of its gradient, where this is not nearly 0.
    moved = (losses[True] - losses[False]).abs()
    assert float((moved > 1e-7).float().mean()) < 1e-3, "gradients of another sign"


def test_a_step_takes_fewer_names_than_fill_a_row(bench):
    step = Step(bench, bench.model(), draw=4, caption=2)
    assert step.samples == 6 and bench.stage.mixture.pack == 4
    drawn, named = step.mixture.batches(0)
    assert len(drawn.text_ids) == 4 and len(named.text_ids) * step.mixture.config.pack == 2
    step()


@pytest.mark.full
def test_training(bench):
    found = training.measure(bench)
    for tower in ("demo_tower", "full_tower"):
        for kind in ("drawing", "joint"):
            figures = found[tower][kind]
            assert figures["graphs_after_warm_up"] == figures["graphs_in_unseen_steps"] == 0  # nothing is compiled here
            assert figures["share_of_shape_peak"] == figures["products_seconds"] / figures["step_seconds"]
            rate = figures["flops"] / figures["step_seconds"] / figures["peak_flops_per_second"]
            assert figures["share_of_peak"] == pytest.approx(rate)
        assert found[tower]["joint"]["flops"] > found[tower]["drawing"]["flops"] > 0
    assert {tower["precision"] for tower in found.values()} == {str(bench.dtype).removeprefix("torch.")}
    assert found["full_tower"]["trainable_parameters"] > found["demo_tower"]["trainable_parameters"]
    assert set(found["demo_tower"]["joint"]["cold_start_seconds"]) == {"nothing_compiled", "compiled_before"}


def test_memory(bench):
    found = memory.measure(bench)["drawing"]
    seconds = found["given_back"]["step_seconds"], found["kept"]["step_seconds"]
    assert found["given_back_over_kept"] == seconds[0] / seconds[1]


def test_memory_is_kept_and_given_back_in_turn(bench, monkeypatch):
    limits = []
    monkeypatch.setattr(memory, "keep_freed_memory", limits.append)
    memory.measure(bench)
    assert limits == [1 << 26, memory.ALL] * (2 * bench.rounds) and memory.ALL > 1 << 30


@pytest.mark.full
def test_activation_checkpointing(bench):
    found = activation_checkpointing.measure(bench)["demo_tower"]
    kept, again = found["kept"], found["computed_again"]
    assert found["time_over_kept"] == again["step_seconds"] / kept["step_seconds"]
    assert again["predicted_activation_bytes"] < kept["predicted_activation_bytes"]
    if kept["memory_bytes"] is not None:
        assert found["memory_over_kept"] == again["memory_bytes"] / kept["memory_bytes"]


@pytest.mark.full
def test_denoising(bench):
    found = denoising.measure(bench)
    assert list(found) == [f"{tower}_tower_{n}_pictures" for tower in ("demo", "full") for n in (1, 2)]
    # A denoising step is the tower's rows of the picture: twice the pictures, about twice the work.
    assert found["demo_tower_2_pictures"]["flops"] > 1.8 * found["demo_tower_1_pictures"]["flops"]
    assert all("denoising_step_over_tower_flops" in figures for figures in found.values())


@pytest.mark.full
def test_denoising_is_measured_compiled_too_for_both_towers(bench, monkeypatch):
    monkeypatch.setattr(fusion_base.torch, "compile", partial(torch.compile, backend="eager"))
    fusion_base.compiled.cache_clear()
    try:
        with count_new_graphs() as graphs:
            found = denoising.measure(replace(bench, compile=True))
    finally:
        fusion_base.compiled.cache_clear()
        torch.compiler.reset()
    assert graphs() > 0
    for tower in ("demo", "full"):
        plain, compiled = (found[f"{tower}_tower_2_pictures{form}"] for form in ("", "_compiled"))
        assert plain["precision"] == compiled["precision"] and 0 < compiled["flops"] <= plain["flops"]


@pytest.mark.full
def test_llama(bench):
    found = llama.measure(bench)["demo_tower"]
    rates = [found["flops"] / found["step_seconds"], found["peer_flops"] / found["peer_step_seconds"]]
    assert found["ratio_to_llama_text_training"] == pytest.approx(rates[0] / rates[1])
    assert found["text_tokens_of_the_peer"] == pytest.approx(found["tokens"], rel=0.1)


def test_transfusion(bench):
    pytest.importorskip("transfusion_pytorch", reason="the extra xfusion[bench] is not installed")
    found = transfusion.measure(bench)
    demo = found["demo_tower"]
    assert demo["ratio_to_transfusion_pytorch"] == pytest.approx(
        demo["samples_per_second"] / found["peer"]["samples_per_second"]
    )
    assert demo["ratio_to_transfusion_pytorch_cached"] > 0 and demo["ratio_at_matched_parameters"] > 0
    assert found["matched_peer"]["width"] <= found["peer"]["width"] == bench.backbone.hidden_size


def test_the_verb_measures_generation_and_answers_in_json(capsys, bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_base.Bench, "of", lambda *_, **__: bench)
    verb = sys.modules[cli.VERBS["bench"].__module__]
    monkeypatch.setattr(
        verb.Bench, "_run_in_own_process", lambda self, name: verb._measure(name, None, "noise", False, True)
    )
    monkeypatch.setattr(verb.os, "getloadavg", lambda: (9.0 * (os.cpu_count() or 1), 0.0, 0.0))
    file = tmp_path / "bench.json"
    assert cli.main(["bench", "--only", "generate", "--quick", "--json", "-o", str(file)]) == 0
    told = capsys.readouterr()
    assert "other processes keep this machine busy" in told.err
    answer = json.loads(told.out)
    assert answer == json.loads(file.read_text())
    found = answer["generate"]
    rates = found["tokens_per_second"], found["base_tokens_per_second"]
    assert found["ratio_to_base_generate"] == pytest.approx(
        rates[0] / rates[1], rel=2e-3
    )  # four digits of each are told
    assert 0 < found["tokens"] <= 8
    assert answer["quick"] is True and answer["command"] == "xfusion bench --only generate --quick --json"
    of_ones_own = verb.Bench(base="org/other", data="my folder", quick=True)
    assert of_ones_own._command() == "xfusion bench --quick --base org/other --data 'my folder' --json"
    assert cli.main(["bench", "--only", "speed"]) == 2
    assert "--only speed: not one of activation_checkpointing, denoising" in capsys.readouterr().err


@pytest.mark.full
def test_a_question_is_answered_in_a_process_of_its_own(bench, tmp_path, capsys):
    bench.backbone.model.save_pretrained(tmp_path / "base")
    bench.backbone.tokenizer.save_pretrained(tmp_path / "base")
    call = ["bench", "--only", "generate", "--quick", "--no-compile", "--base", str(tmp_path / "base"), "--json"]
    assert cli.main(call) == 0
    assert json.loads(capsys.readouterr().out)["generate"]["tokens"] > 0


def test_no_graph_is_new_where_nothing_is_compiled():
    with count_new_graphs() as graphs:
        torch.ones(1)
    assert graphs() == 0


@pytest.mark.full
def test_graphs_are_counted_over_batches_that_were_not_read_before(bench, monkeypatch):
    """Those of the warm-up, again and again, would hide a shape that changes with every step."""
    monkeypatch.setattr(fusion_base.torch, "compile", partial(torch.compile, backend="eager"))
    counted = {}
    # Each width is a graph of its own in the second.
    limits = torch._dynamo.config.patch(recompile_limit=512, accumulated_recompile_limit=4096)
    with limits, contextlib.ExitStack() as reset:
        reset.callback(torch.compiler.reset)
        reset.callback(fusion_base.compiled.cache_clear)
        for name, fit in (("as it is", mixture._fit), ("each its own width", lambda widths, longest: longest)):
            torch.compiler.reset()
            fusion_base.compiled.cache_clear()
            monkeypatch.setattr(mixture, "_fit", fit)
            step = Step(replace(bench, source=Long(40), compile=True), bench.model(), draw=2, caption=2)
            step.warm()
            with count_new_graphs() as seen:
                step()
            with count_new_graphs() as unseen:
                step.run_unseen(6)
            counted[name] = seen(), unseen()
            assert step.period == bench_base.PERIOD
    assert counted["as it is"][0] == counted["each its own width"][0] == 0
    assert counted["as it is"][1] <= 6 < counted["each its own width"][1]


class Long(Noise):
    """Captions of very different lengths."""

    def __init__(self, count):
        super().__init__(count)
        self.examples = tuple(replace(e, captions=("cat " * (1 + i),)) for i, e in enumerate(self.examples))


def test_the_profile_of_a_step_knows_its_optimiser(monkeypatch):
    """By the names of what runs now: a kind that matches nothing would be a row of zeros."""
    spec = importlib.util.spec_from_file_location("profile_step", BENCHMARKS / "profile_step.py")
    study = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "profile_step", study)
    spec.loader.exec_module(study)
    weights = {str(n): torch.nn.Parameter(torch.ones(300)) for n in range(7)}
    optimizer = Optimizer(weights)
    for weight in weights.values():
        weight.grad = torch.ones(300)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step(0.1, 1e9, 0.9)
    ran = {event.key: event.count for event in profile.key_averages()}
    times = {kind: sum(n for key, n in ran.items() if key.startswith(starts)) for kind, starts in study.KINDS.items()}
    assert times["norm of the gradient"] == 7 and times["AdamW"] and times["moving average"]
    assert not [key for key in ran if "norm" in key], "a norm that the row leaves out"


@pytest.fixture
def shape_study(monkeypatch):
    """benchmarks/shape.py, and a shape so tiny that it runs."""
    tiny = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    monkeypatch.setitem(SHAPES, "tiny", SHAPES["Llama-3.2-1B"] | tiny | {"num_attention_heads": 8})
    spec = importlib.util.spec_from_file_location("shape", BENCHMARKS / "shape.py")
    study = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "shape", study)
    spec.loader.exec_module(study)
    return study


SMALL = {"shape": "tiny", "side": 2, "words": 4, "steps": 1, "device": "cpu", "compile": False, "square": 64}


def test_the_study_of_a_real_shape_runs_on_a_tiny_one(tmp_path, shape_study):
    flops = {}
    for keep in (True, False):
        out = tmp_path / f"{keep}.json"
        shape_study.main(shape_study.Settings(**SMALL, batch=6, packed=2, keep_text=keep, out=out))
        found = json.loads(out.read_text())
        flops[keep] = found["drawing"]["flops_per_step"]
        assert found["attention"] == "grouped" and found["joint"]["share_of_peak"] > 0
    assert flops[False] > flops[True] > 0  # frozen layers over the prompts' words


def test_flops_of_a_real_shape_are_those_of_the_samples_however_they_are_packed_and_attended(
    tmp_path, shape_study, monkeypatch
):
    """12 drawings of 16 tokens behind 4 words are the same work in rows of one, two or four."""
    monkeypatch.setitem(SHAPES, "deeper", SHAPES["tiny"] | {"num_hidden_layers": 3})

    def flops(**settings):
        out = tmp_path / "out.json"
        shape_study.main(shape_study.Settings(**SMALL | {"side": 4, "out": out} | settings, batch=12))
        return json.loads(out.read_text())["drawing"]["flops_per_step"]

    one = flops(packed=1)
    assert flops(packed=2) == flops(packed=4, attention="sdpa") == one
    width, mlp, heads, key_heads, head, words, picture = 32, 64, 8, 8, 4, 4, 1 + 16  # [BOI] and its tokens
    query, keys = 2 * width * heads * head, 2 * 2 * width * key_heads * head
    own = 3 * picture * (2 * query + keys + 3 * 2 * width * mlp)  # forward, and gradients of states and of weights
    read = 3 * words * keys  # the tower's norm of the frozen states is learned
    pairs = (words + 1) + 16 * (words + picture)  # [BOI] sees the words and itself, tokens see all
    assert flops(shape="deeper") - one == 12 * (own + read + pairs * heads * head * 2 * (2 + 4))
