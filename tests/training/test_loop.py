"""The training loop: resuming is bit-exact, nothing is half-written, budgets are written down, sums are global."""

import contextlib
import dataclasses
import io
import json
import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from contracts.table import Noise, make_base, make_model, mixed_sequences, model_config, randomise
from data.test_shards import write_dataset, write_folder, write_parquet, write_tar
from rich.console import Console
from training.runs import StopAt, log, pack_of, plan_of, recipe, same, state_of, step_records, train

import xfusion
import xfusion.fusion.base as fusion_base
from xfusion import checkpoint
from xfusion.backbone import Backbone
from xfusion.data.latents import encode
from xfusion.data.mixture import Mixture, MixtureConfig, Prefetcher
from xfusion.data.mixture import _fit as fit_
from xfusion.data.sequence import Batch, Sequence, Text, XFusionError
from xfusion.data.sources import open_source
from xfusion.data.templates import Templates
from xfusion.evaluation.machine import machine
from xfusion.evaluation.verify import text_keeping
from xfusion.fusion.adaption_prompt import AdaptionPrompt
from xfusion.fusion.connectors.positional_resampler import PositionalResampler
from xfusion.fusion.connectors.prefix_mapper import PrefixMapper
from xfusion.fusion.connectors.query_transformer import Queries
from xfusion.fusion.connectors.resampler import Resampler
from xfusion.fusion.prefix import Prefix
from xfusion.modalities.codecs.pixels import Pixels
from xfusion.modalities.codes import CodePort
from xfusion.modalities.image import ImageModality
from xfusion.modalities.port import MediaPort
from xfusion.model import Model
from xfusion.objectives.base import NoObjective
from xfusion.objectives.codes import NextCode
from xfusion.objectives.flow_matching import FlowMatching
from xfusion.objectives.next_token import NextToken
from xfusion.objectives.query_pretraining import QueryPretraining
from xfusion.training import loop, pace, progress, setup, states, summary
from xfusion.training.loop import Interrupted
from xfusion.training.optimizer import NEVER_DECAYED, Optimizer
from xfusion.training.stages import Recipe, Stage

PLAIN = Templates(caption_dropout=0, article_share=0, other_wordings=0, question_share=0)


@pytest.fixture(scope="module")
def straight(bases, tmp_path_factory):
    """12 steps without a break."""
    out = tmp_path_factory.mktemp("straight")
    return out, train(bases["llama"], out)


# ------------------------------------------------------------------------------------------------------------- resume


def test_a_run_writes_a_log_a_state_and_a_pack(straight, bases):
    out, model = straight
    assert [e["step"] for e in log(out)] == list(range(12))
    assert all(e["losses"].keys() == {"next_token", "flow_matching"} and e["samples"] == 8 for e in log(out))
    assert [len(log(out, kind)) for kind in ("start", "end", "plan")] == [1, 1, 0]
    assert [p.name for p in (out / "state").iterdir()] == ["step_00000012"]
    assert sorted(p.name for p in (out / "state" / "step_00000012").iterdir()) == ["state.json", "state.safetensors"]
    loaded = xfusion.load(out / "pack", backbone=bases["llama"])
    assert loaded.fingerprint == model.fingerprint
    config = json.loads((out / "pack" / "config.json").read_text())
    assert config["training"]["steps"] == 12 and config["training"]["samples"] == 96
    assert config["training"]["data"] == "noise" and config["training"]["averaged"] is True


def test_a_pack_records_the_commit_and_the_machine(bases, tmp_path, monkeypatch):
    monkeypatch.setenv("XFUSION_COMMIT", "0123456789abcdef")
    train(bases["llama"], tmp_path, steps=1)
    training = json.loads((tmp_path / "pack" / "config.json").read_text())["training"]
    assert training["commit"] == {"id": "0123456789abcdef", "changed_files": None}
    assert training["machine"] == machine() and training["machine"]["processor"]
    card = (tmp_path / "pack" / "README.md").read_text()
    cores, threads = training["machine"]["cores"], training["machine"]["threads"]
    assert "| commit | 0123456789ab |" in card and f", {cores} cores, {threads} threads |" in card


def test_the_same_run_twice_is_the_same_to_the_bit(straight, bases, tmp_path):
    torch.manual_seed(123)
    train(bases["llama"], tmp_path)
    assert step_records(tmp_path) == step_records(straight[0])
    assert same(pack_of(tmp_path), pack_of(straight[0]))


@pytest.mark.parametrize("stop", [0, 5, 10])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(straight, bases, tmp_path, stop):
    """Ctrl-C while a step is told; resumed with the next batch: losses, weights, averages and moments."""
    with pytest.raises(Interrupted, match=rf"stopped at step {stop + 1}; go on with --resume"):
        train(bases["llama"], tmp_path, listener=StopAt(stop))
    half = xfusion.load(tmp_path / "pack", backbone=bases["llama"])  # an interrupted run leaves a pack, too
    assert half.num_new_parameters == straight[1].num_new_parameters
    train(bases["llama"], tmp_path, resume=True)
    assert step_records(tmp_path) == step_records(straight[0])
    assert same(pack_of(tmp_path), pack_of(straight[0]))
    assert same(state_of(tmp_path), state_of(straight[0]))


def test_tokens_are_counted_without_padding_and_over_a_break(straight, bases, tmp_path):
    """Words, patches, [BOI], and [EOI] where something follows; the last word of an answer is a label alone."""
    base, (stage,) = bases["llama"], recipe(bases["llama"]).stages
    modality = straight[1].modality
    ids = base.encode, base.begin_ids, base.end_id
    mixture, expected = Mixture(Noise(), modality, modality.sizes, *ids, stage.mixture, 0), 0
    for segments in (sample.segments for step in range(12) for sample in mixture.samples(step)):
        for number, segment in enumerate(segments):
            follows = number < len(segments) - 1
            if isinstance(segment, Text):
                expected += len(segment.ids) - (segment.has_loss and not follows)
            else:
                expected += 1 + len(segment.tokens) + follows
    with pytest.raises(Interrupted):
        train(base, tmp_path, listener=StopAt(5))
    assert 0 < plan_of(tmp_path)["tokens"] < expected
    train(base, tmp_path, resume=True)
    for out in (straight[0], tmp_path):
        assert [event["tokens"] for event in log(out, "end")] == [expected]
        assert json.loads((out / "pack" / "config.json").read_text())["training"]["tokens"] == expected


def test_a_run_that_began_before_tokens_were_counted_states_none():
    walked = progress.Progress((Stage(),), None)
    state = walked.state_dict()
    del state["tokens"]
    walked.load_state_dict(state)
    walked.record(1.0, 4, 50)
    assert walked.samples == 4 and walked.tokens is None and walked.state_dict()["tokens"] is None


@pytest.mark.full
def test_a_compiled_run_in_bfloat16_resumes_to_the_bit(bases, tmp_path):
    """As users run it, by inductor; each part of the run compiles for itself, as a process of its own does."""
    base = bases["llama"]
    settings = {"compile": True, "dtype": torch.bfloat16, "steps": 16}

    def part(out, **more):
        torch.compiler.reset()
        fusion_base.compiled.cache_clear()
        train(base, out, **settings, **more)

    try:
        part(tmp_path / "straight")
        with pytest.raises(Interrupted):
            part(tmp_path / "run", listener=StopAt(5))
        with pytest.raises(Interrupted):
            part(tmp_path / "run", listener=StopAt(11), resume=True)
        part(tmp_path / "run", resume=True)
    finally:
        torch.compiler.reset()
        fusion_base.compiled.cache_clear()
    assert len(step_records(tmp_path / "run")) == 16 and step_records(tmp_path / "run") == step_records(
        tmp_path / "straight"
    )
    for what in (pack_of, state_of):
        assert same(what(tmp_path / "run"), what(tmp_path / "straight"))
    (end,) = log(tmp_path / "straight", "end")
    assert end["graphs"] > 0 and end["graphs_behind_warm_up"] == 0
    assert {event["dtype"] for event in log(tmp_path / "run", "start")} == {"bfloat16"}


def test_a_resumed_run_over_a_weighted_mixture_of_shards_is_the_uninterrupted_one_to_the_bit(
    bases, tmp_path, monkeypatch
):
    """A tar, twice as heavy, and a parquet file, each past the end of its epoch; with as many threads to decode as one likes."""
    monkeypatch.setenv("XFUSION_CACHE", str(tmp_path / "cache"))
    tar, rows = write_tar(tmp_path / "a.tar", range(7)), write_parquet(tmp_path / "b.parquet", range(7, 16))
    base, data = bases["llama"], f"{tar}:weight=2+{rows}"
    settings = {"source": None, "data": data, "recipe_": recipe(base, steps=9)}
    train(base, tmp_path / "straight", **settings)
    with pytest.raises(Interrupted):
        train(base, tmp_path / "broken off", listener=StopAt(3), decoders=1, **settings)
    with pytest.raises(Interrupted):
        train(base, tmp_path / "broken off", resume=True, listener=StopAt(6), **settings)
    train(base, tmp_path / "broken off", resume=True, decoders=3, **settings)
    assert len(step_records(tmp_path / "straight")) == 9
    assert step_records(tmp_path / "broken off") == step_records(tmp_path / "straight")
    for what in (pack_of, state_of):
        assert same(what(tmp_path / "broken off"), what(tmp_path / "straight"))
    with pytest.raises(XFusionError, match="decoders is 0: at least 1 thread decodes"):
        train(base, tmp_path / "none", decoders=0, **settings)


@pytest.fixture(scope="module")
def cards(bases, tmp_path_factory):
    """Seven pictures in a folder, and four steps over them without a break, past the end of two epochs."""
    root = tmp_path_factory.mktemp("cards")
    folder, base = write_folder(root / "cards", range(7)), bases["llama"]
    train(base, root / "straight", source=None, data=str(folder), recipe_=recipe(base, steps=4))
    return folder, root / "straight"


def in_lines(folder, path):
    words = {file: file.with_suffix(".txt").read_text().splitlines() for file in sorted(folder.glob("*.png"))}
    path.write_text("\n".join(json.dumps({"image": str(file), "captions": said}) for file, said in words.items()))


def in_latents(folder, path):
    encode(open_source(folder), Pixels.Config(), 16, path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("cards", lambda folder, path: shutil.copytree(folder, path)),
        ("cards.jsonl", in_lines),
        ("cards.tar", lambda folder, path: write_tar(path, range(7))),
        ("saved", lambda folder, path: write_dataset(path, range(7))),
        ("latents", in_latents),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit_whatever_reads_its_pictures(
    bases, cards, tmp_path, monkeypatch, name, write
):
    """The same pictures and words in every form; parquet, whose order goes by row groups, and the hub have tests of their own."""
    monkeypatch.setenv("XFUSION_CACHE", str(tmp_path / "cache"))
    folder, straight = cards
    write(folder, tmp_path / name)
    base, out = bases["llama"], tmp_path / "run"
    settings = {"source": None, "data": str(tmp_path / name), "recipe_": recipe(base, steps=4)}
    with pytest.raises(Interrupted):
        train(base, out, listener=StopAt(1), **settings)
    train(base, out, resume=True, **settings)
    assert len(step_records(out)) == 4 and step_records(out) == step_records(straight)
    for what in (pack_of, state_of):
        assert same(what(out), what(straight))


def test_a_resumed_run_reads_the_next_batches(bases, tmp_path, monkeypatch):
    """The same pictures, wordings and order as without a break, over accumulated parts and past the end of an epoch."""
    base, real, read = bases["llama"], Prefetcher.take, []
    whole = recipe(base, steps=5, accumulate=2, weight_decay=0.1)
    monkeypatch.setattr(Prefetcher, "take", lambda self, step: read.append((step, real(self, step))) or read[-1][1])
    train(base, tmp_path / "straight", recipe_=whole)
    straight, read[:] = list(read), []
    with pytest.raises(Interrupted):
        train(base, tmp_path / "run", recipe_=whole, listener=StopAt(2))
    train(base, tmp_path / "run", recipe_=whole, resume=True)
    assert [step for step, _ in read] == [step for step, _ in straight] == list(range(5))
    for (_, one), (_, other) in zip(read, straight, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.text_ids, b.text_ids)
            assert all(torch.equal(media.tokens, b.media[name].tokens) for name, media in a.media.items())
    assert same(state_of(tmp_path / "run"), state_of(tmp_path / "straight"))


def test_a_run_that_died_goes_on_from_its_last_checkpoint(straight, bases, tmp_path, monkeypatch):
    """Steps after the checkpoint are done again, and the log holds each step once."""
    save = loop._Run.save
    monkeypatch.setattr(loop._Run, "save", lambda self: self.progress.step <= 4 and save(self))
    with pytest.raises(RuntimeError, match="power cut"):
        train(bases["llama"], tmp_path, checkpoint_every=0, listener=StopAt(8, RuntimeError("power cut")))
    assert [e["step"] for e in log(tmp_path)] == list(range(9))
    monkeypatch.undo()
    train(bases["llama"], tmp_path, resume=True)
    assert step_records(tmp_path) == step_records(straight[0])
    assert same(pack_of(tmp_path), pack_of(straight[0]))


def test_resuming_a_finished_run_changes_nothing(bases, tmp_path):
    train(bases["llama"], tmp_path, steps=4)
    before, lines = pack_of(tmp_path), step_records(tmp_path)
    train(bases["llama"], tmp_path, steps=4, resume=True)
    assert same(pack_of(tmp_path), before) and step_records(tmp_path) == lines


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"steps": 13}, r"stages\.0\.steps was 12 and is now 13"),
        ({"rate": 1e-3}, r"stages\.0\.rate was 0\.002 and is now 0\.001"),
        ({"mixture": MixtureConfig(draw=8, caption=4, pack=2)}, r"stages\.0\.mixture\.draw was 4 and is now 8"),
        ({"seed": 1}, r"seed was 0 and is now 1"),
    ],
)
def test_resuming_another_recipe_is_refused_with_both_values(straight, bases, other, message):
    with pytest.raises(XFusionError, match=message):
        train(bases["llama"], straight[0], recipe_=recipe(bases["llama"], **other), resume=True)


def test_a_run_goes_on_at_a_lower_rate_from_its_very_state(straight, bases, tmp_path):
    """The same batch and noise meet the same weights: the next loss has the same bits, and the step is another one."""
    base = bases["llama"]
    lower = recipe(base, rate=1e-3, clip=0.5, schedule="cosine")
    said, out = io.StringIO(), tmp_path / "run"
    with pytest.raises(Interrupted):
        train(base, out, listener=StopAt(5))
    with pytest.raises(Interrupted):
        train(base, out, recipe_=lower, resume=True, listener=StopAt(8), console=Console(file=said, width=200))
    changes = [("rate", 0.002, 0.001), ("schedule", "linear", "cosine"), ("clip", 1.0, 0.5)]
    assert [line for line in said.getvalue().splitlines() if line.startswith("changed")] == [
        f"changed   stages.0.{name} {before} -> {now}" for name, before, now in changes
    ]
    train(base, out, recipe_=lower, resume=True)  # nothing changes any more
    assert log(out, "changed") == [
        {"event": "changed", "step": 6, "setting": f"stages.0.{name}", "before": before, "now": now}
        for name, before, now in changes
    ]
    first, now = recipe(base).stages[0], lower.stages[0]
    assert [e["rate"] for e in log(out)] == [(first if i < 6 else now).rate_at(i, 12) for i in range(12)]
    assert step_records(out)[:6] == step_records(straight[0])[:6]
    sixth, unchanged = (log(run)[6] for run in (out, straight[0]))
    assert (sixth["losses"], sixth["gradient_norm"]) == (unchanged["losses"], unchanged["gradient_norm"])
    assert log(out)[7]["losses"] != log(straight[0])[7]["losses"]
    config = json.loads((out / "pack" / "config.json").read_text())
    assert config["recipe"]["stages"][0]["rate"] == 0.001
    assert config["training"]["changes"] == "; ".join(f"stages.0.{n} {b} -> {a} behind step 6" for n, b, a in changes)
    assert "stages.0.rate 0.002 -> 0.001 behind step 6" in (out / "pack" / "README.md").read_text()


def test_what_a_state_depends_on_and_what_is_over_cannot_be_changed(bases, tmp_path):
    """The first stage is over: whoever reads its rate in the pack should read the one that it had."""
    base = bases["llama"]
    stages = Stage(steps=2, warmup=1), Stage(steps=4, warmup=1)
    with pytest.raises(Interrupted):
        train(base, tmp_path, recipe_=recipe(base, stages=stages), listener=StopAt(1))
    for field, now in {"ema": 0.9, "accumulate": 2, "steps": 14, "rate": 1e-3}.items():
        changed = dataclasses.replace(stages[0], **{field: now}), stages[1]
        with pytest.raises(XFusionError) as error:
            train(base, tmp_path, recipe_=recipe(base, stages=changed), resume=True)
        assert str(error.value) == (
            f"{tmp_path} was started otherwise: stages.0.{field} was {getattr(stages[0], field)} and is now {now}; give the same"
            " settings to resume (of a stage with steps left rate, warmup, schedule, clip, weight_decay may be others)"
        )
    later = stages[0], dataclasses.replace(stages[1], rate=1e-3, warmup=2, weight_decay=0.1)
    train(base, tmp_path, recipe_=recipe(base, stages=later), resume=True)
    assert [e["rate"] for e in log(tmp_path)][2:] == [later[1].rate_at(i, 4) for i in range(4)]


def test_a_run_is_not_overwritten_and_nothing_is_not_resumed(straight, bases, tmp_path):
    with pytest.raises(XFusionError, match="already holds a run: pass --resume"):
        train(bases["llama"], straight[0])
    with pytest.raises(XFusionError, match="holds no run to resume"):
        train(bases["llama"], tmp_path / "new", resume=True)


def test_resuming_on_another_base_is_refused_with_both(straight, bases, tmp_path):
    other = Backbone.load(str(make_base("llama", tmp_path / "other", seed=1)))
    with pytest.raises(XFusionError) as error:
        train(other, straight[0], recipe_=recipe(bases["llama"]), resume=True)
    assert other.fingerprint[:16] in str(error.value) and bases["llama"].fingerprint[:16] in str(error.value)


def test_stages_follow_each_other_and_resume_within(bases, tmp_path):
    base, small = bases["llama"], MixtureConfig(draw=0, caption=4, pack=2)
    stages = (
        Stage(steps=3, warmup=1, rate=1e-3),
        Stage(steps=4, warmup=2, rate=4e-3, mixture=small, schedule="cosine"),
    )
    stages = (dataclasses.replace(stages[0], mixture=MixtureConfig(draw=4, caption=0)), stages[1])
    two = recipe(base, stages=stages)
    train(base, tmp_path / "straight", recipe_=two)
    events = log(tmp_path / "straight")
    assert [set(e["losses"]) for e in events] == [{"flow_matching"}] * 3 + [{"next_token"}] * 4
    expected = [s.rate_at(i, s.steps) for s in stages for i in range(s.steps)]
    assert [e["rate"] for e in events] == expected
    for stop in (1, 2, 4):  # within the first stage, at its last step, within the second
        out = tmp_path / f"broken at {stop}"
        with pytest.raises(Interrupted):
            train(base, out, recipe_=two, listener=StopAt(stop))
        assert plan_of(out)["stage"] == (0 if stop < 3 else 1)
        train(base, out, recipe_=two, resume=True)
        assert step_records(out) == step_records(tmp_path / "straight")
        assert same(pack_of(out), pack_of(tmp_path / "straight"))
        assert same(state_of(out), state_of(tmp_path / "straight"))  # weights, average and moments
        assert plan_of(out)["recent"] == plan_of(tmp_path / "straight")["recent"]
    with pytest.raises(XFusionError, match="takes a recipe of one stage, this one has 2"):
        train(base, tmp_path / "x", recipe_=two, minutes=1)


def test_a_second_stage_does_not_repeat_the_order_of_the_first(bases, tmp_path, monkeypatch):
    """A short stage sees a few of many examples: the next one would see the same ones again, in the same words."""
    base, mixtures = bases["llama"], []
    mixture = setup.mixture
    monkeypatch.setattr(setup, "mixture", lambda *a: mixtures.append(mixture(*a)) or mixtures[-1])
    same_stage = Stage(steps=1, mixture=MixtureConfig(draw=4, caption=0))
    train(base, tmp_path / "two", recipe_=recipe(base, stages=(same_stage, same_stage)))
    train(base, tmp_path / "one", recipe_=recipe(base, stages=(same_stage,)))
    first, second, alone = (list(made.order.take("draw", 0, 20)) for made in mixtures)
    assert first == alone != second


# -------------------------------------------------------------------------------------------------------------- state


def test_each_stage_has_its_own_weight_decay(bases, tmp_path):
    """AdamW takes rate * decay of a matrix before it steps: two runs differ by just that. Norms, boundary rows, tables stay."""
    base, decay = bases["llama"], 0.5
    first = dataclasses.replace(recipe(base).stages[0], steps=1)
    train(base, tmp_path / "before", recipe_=recipe(base, stages=(first,)))
    for name, own in (("without", 0.0), ("with", decay)):
        train(base, tmp_path / name, recipe_=recipe(base, stages=(first, dataclasses.replace(first, weight_decay=own))))
    before, without, decayed = (state_of(tmp_path / name) for name in ("before", "without", "with"))
    for name in (name for name in before if name.startswith("weight.")):
        is_matrix = before[name].ndim > 1 and name not in ("weight.port.row.weight", "weight.port.column.weight")
        expected = without[name] - first.rate_at(0, 1) * decay * before[name] * is_matrix
        torch.testing.assert_close(decayed[name], expected, rtol=0, atol=3e-7)


def test_a_state_is_never_half_written(straight, bases, tmp_path, monkeypatch):
    saved, real = [], states.save_file

    def save_file(state, path):
        if len(saved) == 2:
            with open(path, "wb") as file:
                file.write(b"half a file")
            raise OSError("no space left on device")
        saved.append(path)
        real(state, path)

    monkeypatch.setattr(states, "save_file", save_file)
    with pytest.raises(XFusionError, match=r"state/step_00000003 cannot be written: no space left on device"):
        train(bases["llama"], tmp_path, checkpoint_every=0)
    assert [p.name for p in tmp_path.rglob(".*")] == []
    assert plan_of(tmp_path)["step"] == 2
    monkeypatch.undo()
    train(bases["llama"], tmp_path, resume=True)
    assert step_records(tmp_path) == step_records(straight[0])
    assert same(pack_of(tmp_path), pack_of(straight[0]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_checkpoint(bases, tmp_path, monkeypatch, value):
    base, loss = bases["llama"], FlowMatching.loss

    def broken(self, run, batch):
        found = loss(self, run, batch)
        calls.append(1)
        return (
            {k: (s * value, n) for k, (s, n) in found.items()} if found and sum(calls) > 2 * (1 + 5) else found
        )  # one more: the largest step was tried

    calls: list[int] = []
    monkeypatch.setattr(FlowMatching, "loss", broken)
    with pytest.raises(
        XFusionError, match=rf"loss flow_matching is {value} at step 5: .*--stages\.0\.rate than 0\.002"
    ):
        train(base, tmp_path, checkpoint_every=0)
    state = state_of(tmp_path)
    assert plan_of(tmp_path)["step"] == 5
    assert all(bool(v.isfinite().all()) for v in state.values())
    assert not (tmp_path / "pack").exists()


def test_a_run_that_diverges_before_its_first_checkpoint_names_none(bases, tmp_path, monkeypatch):
    loss = FlowMatching.loss
    monkeypatch.setattr(FlowMatching, "loss", lambda *args: {k: (s * math.nan, n) for k, (s, n) in loss(*args).items()})
    with pytest.raises(XFusionError, match="at step 0: training stopped; before the first checkpoint, try a lower"):
        train(bases["llama"], tmp_path)
    assert not (tmp_path / "state").exists()


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(bases, tmp_path, monkeypatch):
    """A finite loss may have a gradient that is not."""
    loss, calls = FlowMatching.loss, []

    def broken(self, run, batch):
        found = loss(self, run, batch)
        calls.append(1)
        if found and len(calls) > 2 * (1 + 3):  # one more: the largest step was tried
            total, count = found[self.name]
            zero = (total - total.detach()).abs()
            return {self.name: (total + zero.sqrt(), count)}  # sqrt has an infinite slope at 0
        return found

    monkeypatch.setattr(FlowMatching, "loss", broken)
    with pytest.raises(XFusionError, match="the gradient's norm is nan at step 3, although the loss is finite"):
        train(bases["llama"], tmp_path, checkpoint_every=0)
    state = state_of(tmp_path)
    assert plan_of(tmp_path)["step"] == 3
    assert all(bool(v.isfinite().all()) for v in state.values())


def not_finite_loss(total):
    return total * math.nan


def not_finite_gradient(total):
    return total + (total - total.detach()).abs().sqrt()  # sqrt has an infinite slope at 0


REASONS = {
    not_finite_loss: "the loss flow_matching is nan at step {}",
    not_finite_gradient: "the gradient's norm is nan at step {}, although the loss is finite",
}


def break_steps(monkeypatch, steps, spoil):
    """What these steps compute is not finite."""
    losses = loop._Run._losses

    def broken(self, batch, generator):
        found, zero = losses(self, batch, generator)
        at_step = self.progress.step in steps
        return {
            k: (spoil(total) if at_step and k == "flow_matching" else total, n) for k, (total, n) in found.items()
        }, zero

    monkeypatch.setattr(loop._Run, "_losses", broken)


@pytest.mark.parametrize("spoil", REASONS)
def test_a_step_that_is_not_finite_is_skipped_as_asked_and_changes_nothing(bases, tmp_path, monkeypatch, caplog, spoil):
    base, said = bases["llama"], io.StringIO()
    break_steps(monkeypatch, (3, 8), spoil)
    console = Console(file=said, width=200)
    train(base, tmp_path, skip_nonfinite=2, checkpoint_every=0, keep=20, console=console)
    reasons = [REASONS[spoil].format(step) for step in (3, 8)]
    assert [(e["step"], e["reason"]) for e in log(tmp_path, "skipped")] == [(3, reasons[0]), (8, reasons[1])]
    assert [e["step"] for e in log(tmp_path)] == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]
    assert f"{reasons[0]}: skipped, 1 of at most 2 such steps" in caplog.text
    assert "skipped   2 steps whose loss or gradient was not finite" in said.getvalue()
    assert log(tmp_path, "end")[0]["skipped"] == 2
    plans, tensors = zip(*(states.read(tmp_path / "state" / f"step_{step:08d}") for step in (3, 4, 5)), strict=True)
    assert same(tensors[0], tensors[1]) and not same(tensors[1], tensors[2])  # weights, average and moments
    assert plans[0]["recent"] == plans[1]["recent"] and [plan["samples"] for plan in plans] == [24, 24, 32]
    training = json.loads((tmp_path / "pack" / "config.json").read_text())["training"]
    assert (training["steps"], training["skipped_steps"], training["samples"]) == (12, 2, 80)


def test_one_step_more_that_is_not_finite_stops_also_behind_a_break(bases, tmp_path, monkeypatch):
    base = bases["llama"]
    break_steps(monkeypatch, (3, 8), not_finite_loss)
    train(base, tmp_path / "straight", skip_nonfinite=2)
    with pytest.raises(Interrupted):
        train(base, tmp_path / "run", skip_nonfinite=1, listener=StopAt(5))
    with pytest.raises(loop.Diverged) as error:
        train(base, tmp_path / "run", skip_nonfinite=1, resume=True)
    assert str(error.value) == (
        "the loss flow_matching is nan at step 8 behind 1 skipped ones: training stopped; the last checkpoint in"
        f" {tmp_path / 'run' / 'state'}, behind step 6, is intact: go on with --resume and a lower --stages.0.rate than 0.002"
    )
    train(base, tmp_path / "run", skip_nonfinite=2, resume=True)
    assert step_records(tmp_path / "run") == step_records(tmp_path / "straight")
    assert same(state_of(tmp_path / "run"), state_of(tmp_path / "straight"))
    assert same(pack_of(tmp_path / "run"), pack_of(tmp_path / "straight"))
    assert [e["step"] for e in log(tmp_path / "run", "skipped")] == [3, 8]


# ------------------------------------------------------------------------------------------------------------ budgets


class Clock:
    """A clock on which each step takes a second."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1e-9
        return self.now

    def __call__(self, event):
        if event["event"] == "step":
            self.now += 1.0


FEW = MixtureConfig(draw=1, caption=0, pack=1)
"""For runs of which the steps count and not what they learn."""


@pytest.fixture
def clock(monkeypatch):
    return told_by(Clock(), monkeypatch)


def told_by(clock, monkeypatch):
    """A clock that runs go by."""
    for module in (loop, progress):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_minutes_fix_the_number_of_steps_and_write_it_down(bases, tmp_path, clock):
    few = recipe(bases["llama"], mixture=FEW)
    train(bases["llama"], tmp_path, recipe_=few, minutes=45.5 / 60, listener=clock)
    (plan,) = log(tmp_path, "plan")
    assert plan["steps"] == 45 and plan["seconds_per_step"] == pytest.approx(1)
    assert plan["step"] == pace.WARM_STEPS + pace.MEASURED_STEPS
    assert [e["step"] for e in log(tmp_path)] == list(range(45))
    stage = few.stages[0]
    rates = [e["rate"] for e in log(tmp_path)]
    assert rates[plan["step"] :] == [stage.rate_at(i, 45) for i in range(plan["step"], 45)]
    assert plan_of(tmp_path)["totals"] == [45]


@pytest.mark.parametrize(("samples", "steps", "is_said"), [(34, 45, True), (2, 45, False), (34, 305, False)])
def test_few_large_steps_are_said_to_teach_little(bases, tmp_path, clock, samples, steps, is_said):
    """Two slow cores make 122 steps of 96 samples in five minutes, and learn nothing by them."""
    told, mixture = io.StringIO(), dataclasses.replace(FEW, draw=samples)

    def listen(event):
        clock(event)
        StopAt(pace.WARM_STEPS + 2 * pace.MEASURED_STEPS)(event)  # the plan was made

    settings = {"minutes": (steps + 0.5) / 60, "listener": listen, "console": Console(file=told, width=400)}
    with contextlib.suppress(Interrupted):
        train(bases["llama"], tmp_path, recipe_=recipe(bases["llama"], mixture=mixture), **settings)
    assert [plan["steps"] for plan in log(tmp_path, "plan")] == [steps]
    assert ("hint      so few steps often teach nothing" in told.getvalue()) == is_said
    assert (f"now {samples} and {mixture.caption} samples" in told.getvalue()) == is_said


def test_a_budget_is_planned_once_steps_get_no_faster(bases, tmp_path, monkeypatch):
    """Thirty steps that fill caches take a second each, later ones half of it: planned by the later ones."""

    class Filling(Clock):
        def __call__(self, event):
            if event["event"] == "step":
                self.now += 1.0 if event["step"] < 30 else 0.5

    clock = told_by(Filling(), monkeypatch)
    few = recipe(bases["llama"], mixture=FEW)
    train(bases["llama"], tmp_path, recipe_=few, minutes=70.05 / 60, listener=clock)
    (plan,) = log(tmp_path, "plan")
    assert plan["step"] == 70 and plan["seconds_per_step"] == pytest.approx(0.5)
    assert plan["steps"] == len(log(tmp_path)) == 110
    assert clock.now == pytest.approx(70, abs=0.1)


@pytest.mark.parametrize("seconds", [3, 30])
def test_a_budget_is_used_up_whatever_its_previews_take(bases, tmp_path, monkeypatch, seconds):
    """Five minutes of steps of two seconds behind twenty that compile, with a preview a minute."""

    class Compiling(Clock):
        def __call__(self, event):
            if event["event"] == "step":
                self.now += 2.0 if event["step"] else 20.0

    clock = told_by(Compiling(), monkeypatch)

    def preview(run):
        started = clock.now
        clock.now += seconds
        run.preview_seconds = clock.now - started

    monkeypatch.setattr(loop._Run, "preview", preview)
    few = recipe(bases["llama"], mixture=FEW)
    train(bases["llama"], tmp_path, recipe_=few, minutes=5, listener=clock, preview_every=60)
    (plan,) = log(tmp_path, "plan")
    assert plan["seconds_per_step"] == pytest.approx(2)
    assert 300 - seconds <= clock.now - seconds <= 300 + seconds, "the last preview comes behind the budget"


@pytest.mark.parametrize(("seconds", "share"), [(19, None), (60, "50%")])
def test_previews_that_take_much_of_a_run_are_told_once(seconds, share, bases, tmp_path, clock, monkeypatch):
    def preview(run):
        clock.now += seconds
        run.preview_seconds = seconds

    monkeypatch.setattr(loop._Run, "preview", preview)
    told = io.StringIO()
    few = recipe(bases["llama"], mixture=FEW, steps=200)
    console = Console(file=told, width=200)
    train(bases["llama"], tmp_path, recipe_=few, listener=clock, preview_every=60, console=console)
    hint = f"hint      a preview took {seconds}.0 s, and --preview-every is 60 s: {share} of the run goes to previews"
    assert told.getvalue().count("--preview-every") == told.getvalue().count(hint) == (1 if share else 0)


def test_another_budget_does_not_change_steps_that_are_fixed(bases, tmp_path, clock):
    few = recipe(bases["llama"], mixture=FEW)
    train(bases["llama"], tmp_path, recipe_=few, minutes=45.5 / 60, listener=clock)
    with pytest.raises(XFusionError, match=r"has 45 steps, fixed by a budget of 0\.758333 minutes: .*which says 60"):
        train(bases["llama"], tmp_path, recipe_=few, minutes=60, resume=True)
    few = recipe(bases["llama"], mixture=FEW, steps=2)
    train(bases["llama"], tmp_path / "by_steps", recipe_=few)
    with pytest.raises(XFusionError, match="has 2 steps, fixed: resume it without --minutes"):
        train(bases["llama"], tmp_path / "by_steps", recipe_=few, minutes=60, resume=True)


def test_a_stage_that_would_teach_nothing_is_refused(bases, tmp_path):
    """A recipe that only reads has no loss on drawings."""
    reading = recipe(bases["llama"], mixture=FEW)
    reading = reading.with_model(media=NoObjective.Config(), text=NextToken.Config(weight=1.0))
    with pytest.raises(
        XFusionError, match=r"stage 0 would teach nothing: .*no part in 1 drawing and 0 captioning samples"
    ):
        train(bases["llama"], tmp_path / "run", recipe_=reading, steps=2)
    assert not (tmp_path / "run" / "pack").exists()
    captions = MixtureConfig(draw=0, caption=2, pack=2)
    silent = recipe(bases["llama"], mixture=captions).with_model(text=NextToken.Config(weight=0.0))
    message = (
        r"losses \(flow_matching\) have no part in 0 drawing and 2 captioning samples"  # that of words weighs nothing
    )
    with pytest.raises(XFusionError, match=message):
        train(bases["llama"], tmp_path / "silent", recipe_=silent, steps=2)


def test_a_budget_of_few_slow_steps_is_kept(bases, tmp_path, monkeypatch):
    """Steps of ten seconds behind one that compiles for twenty: three quarters of a minute are over before thirty of them."""

    class Slow(Clock):
        def __call__(self, event):
            if event["event"] == "step":
                self.now += 10.0 if event["step"] else 20.0

    clock = told_by(Slow(), monkeypatch)
    train(bases["llama"], tmp_path, recipe_=recipe(bases["llama"], mixture=FEW), minutes=71 / 60, listener=clock)
    (plan,) = log(tmp_path, "plan")
    assert plan["step"] == 5 and plan["seconds_per_step"] == pytest.approx(10)
    assert plan["steps"] == len(log(tmp_path)) == 6
    assert clock.now == pytest.approx(70)


@pytest.mark.parametrize("stop", [4, 15, 33])
def test_a_budget_goes_on_after_a_break(bases, tmp_path, clock, stop):
    """Before the warm-up is over, while steps are measured, and after the plan was made."""

    def listen(event):
        clock(event)
        StopAt(stop)(event)

    few = recipe(bases["llama"], mixture=FEW)
    with pytest.raises(Interrupted):
        train(bases["llama"], tmp_path, recipe_=few, minutes=60.5 / 60, listener=listen)

    def limit(event):
        clock(event)
        assert event["step"] < 70, "the run does not end"

    train(bases["llama"], tmp_path, recipe_=few, resume=True, listener=limit)  # the budget is remembered
    assert [e["step"] for e in log(tmp_path)] == list(range(60))
    (plan,) = log(tmp_path, "plan")
    assert plan["steps"] == 60 and plan["step"] == (30 if stop == 33 else stop + 31)


def test_a_plan_outlives_a_break_behind_the_very_step_it_was_made_at(bases, tmp_path, clock):
    """The state of that step knows it, and it is not made again."""

    def listen(event):
        clock(event)
        if event["event"] == "plan":
            raise KeyboardInterrupt

    few = recipe(bases["llama"], mixture=FEW)
    with pytest.raises(Interrupted):
        train(bases["llama"], tmp_path, recipe_=few, minutes=45.5 / 60, listener=listen)
    (plan,) = log(tmp_path, "plan")
    assert plan["step"] == plan_of(tmp_path)["step"] == 30
    with pytest.raises(Interrupted):
        train(bases["llama"], tmp_path, recipe_=few, resume=True, listener=StopAt(30))
    train(bases["llama"], tmp_path, recipe_=few, resume=True)
    assert log(tmp_path, "plan") == [plan] and len(log(tmp_path)) == plan["steps"] == 45


def test_a_plan_outlives_a_death_right_behind_it(bases, tmp_path, clock):
    """Without the state of the step that it is made at, the resumed run would measure again, and its rates be others."""

    def listen(event):
        clock(event)
        if event["event"] == "step" and event["step"] == 31:
            raise SystemError("as good as killed")

    few = recipe(bases["llama"], mixture=FEW)
    with pytest.raises(SystemError):
        train(bases["llama"], tmp_path, recipe_=few, minutes=45.5 / 60, listener=listen)
    (plan,) = log(tmp_path, "plan")
    assert plan_of(tmp_path)["step"] == 30 and plan_of(tmp_path)["totals"] == [plan["steps"]]
    train(bases["llama"], tmp_path, recipe_=few, resume=True)
    assert log(tmp_path, "plan") == [plan]
    assert [e["rate"] for e in log(tmp_path)][31:] == [few.stages[0].rate_at(i, 45) for i in range(31, 45)]


# --------------------------------------------------------------------------------------------------- sums, averages


def test_batches_of_a_run_are_a_pure_function_of_seed_and_step(straight, bases, tmp_path):
    train(bases["llama"], tmp_path / "other", recipe_=recipe(bases["llama"], seed=1), steps=2)
    train(bases["llama"], tmp_path / "short", steps=2)
    rows = {
        name: [(s, losses) for s, losses, *_ in step_records(out)]
        for name, out in (("straight", straight[0]), ("other", tmp_path / "other"), ("short", tmp_path / "short"))
    }
    assert rows["short"][0] == rows["straight"][0]
    assert rows["other"][0] != rows["straight"][0]


def fixed_noise(self, batch, generator):
    """Corruption by a function of the picture, so that it does not depend on how a step is cut."""
    for modality, media in batch.media.items():
        if bool(media.noised.any()):
            batch = batch.with_media(
                modality,
                tokens=0.5 * media.tokens + 0.5 * torch.cos(37 * media.tokens),
                time=torch.full(media.time.shape, 0.5),
                clean=media.tokens,
            )
    return batch


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_equal_one_large_batch(bases, tmp_path, monkeypatch, parts):
    """Losses are divided by the counts of the whole step: parts hold answers of different lengths."""
    monkeypatch.setattr(FlowMatching, "corrupt", fixed_noise)
    results = []
    for accumulate in (1, parts):
        mixture = MixtureConfig(draw=4 // accumulate, caption=8 // accumulate, pack=2, templates=PLAIN)
        whole = recipe(bases["llama"], steps=3, rate=1e-3, warmup=1, ema=0.0, mixture=mixture, accumulate=accumulate)
        out = tmp_path / str(accumulate)
        train(bases["llama"], out, recipe_=whole)
        results.append((log(out), pack_of(out)))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert one["samples"] == other["samples"] == 12
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)
    start = make_model(bases["llama"], randomised=False).learned_state()
    for key, value in results[0][1].items():
        moved = float((value - start[key]).abs().max())
        assert float((value - results[1][1][key]).abs().max()) <= 0.05 * moved + 1e-6, key


def test_the_average_warms_up_and_is_what_is_saved(bases, tmp_path):
    averaged = recipe(bases["llama"], steps=4, ema=0.999)
    raw = recipe(bases["llama"], steps=4, ema=0.0)
    train(bases["llama"], tmp_path / "averaged", recipe_=averaged)
    train(bases["llama"], tmp_path / "raw", recipe_=raw)
    weights = state_of(tmp_path / "raw")
    assert all(torch.equal(v, weights[f"weight.{k}"]) for k, v in pack_of(tmp_path / "raw").items())
    state = state_of(tmp_path / "averaged")
    saved = pack_of(tmp_path / "averaged")
    assert all(torch.equal(v, state[f"average.{k}"]) for k, v in saved.items())
    assert not torch.equal(saved["port.begin"], state["weight.port.begin"])
    stage = averaged.stages[0]
    assert [round(stage.ema_at(i), 6) for i in (0, 1, 90)] == [0.1, round(2 / 11, 6), 0.91]
    assert stage.ema_at(10**6) == 0.999 and raw.stages[0].ema_at(10**6) == 0


def test_the_optimizer_averages_what_it_says():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer, expected = Optimizer({"w": weight}), weight.detach().clone()
    for decay in (0.0, 0.5, 0.9):
        (weight.square().sum() * 10).backward()
        norm = optimizer.step(0.1, clip=1.0, ema=decay)
        assert norm > 1
        expected = decay * expected + (1 - decay) * weight.detach()
        torch.testing.assert_close(optimizer.average[0], expected)
    kept = weight.detach().clone()
    with optimizer.averaged():
        assert torch.equal(weight, optimizer.average[0])
    assert torch.equal(weight, kept)


def test_the_optimizer_is_torchs_adamw_behind_a_clipped_gradient():
    """With the recipes' betas; and what is derived from weights notices every step."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, generator=generator)
    weight, other = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = Optimizer({"w": weight})
    theirs = torch.optim.AdamW([other], betas=(0.9, 0.95), weight_decay=0.02)
    for rate, size in ((0.01, 0.1), (0.02, 5.0), (0.005, 1.0), (0.01, 20.0)):
        gradient, version = size * torch.randn(3, 4, generator=generator), weight._version
        weight.grad, other.grad = gradient.clone(), gradient.clone()
        assert optimizer.step(rate, 1.0, 0.9, 0.02) == pytest.approx(float(gradient.norm()))
        torch.nn.utils.clip_grad_norm_([other], 1.0)
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        torch.testing.assert_close(weight, other)
        assert weight._version > version and weight.grad is None


def decayed(optimizer):
    """A step without gradients: what the parameters were, and the names of those that stay; the others lose rate * decay."""
    before = {name: p.detach().clone() for name, p in optimizer.parameters.items()}
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1, 1.0, 0.9, 0.5)
    stayed = {name for name in before if torch.equal(before[name], optimizer.parameters[name])}
    for name in before.keys() - stayed:
        torch.testing.assert_close(optimizer.parameters[name].detach(), before[name] * 0.95, msg=name)
    return before, stayed


@pytest.mark.parametrize(
    ("fusion", "kept"),
    [
        ("gated tower", {"gates", "norm", "begin", "end", "row", "column"}),
        ("flamingo", {"gate", "mlp_gate", "latents", "norm"}),
        ("llama-adapter 2", {"gate", "rows", "latents", "scale", "bias"}),
        ("low-rank tower", {"begin", "end"}),
        ("dual tower, adaln", {"norm", "begin"}),
    ],
)
def test_decay_closes_no_gate_and_shrinks_no_learned_input(bases, fusion, kept):
    model = make_model(bases["llama"], fusion)
    before, stayed = decayed(Optimizer(model.named_new_parameters(), None, model.embedding_tables))
    for name in before.keys() - stayed:
        assert before[name].ndim > 1 and name.endswith(("weight", "down", "up")), name
    assert before.keys() - stayed
    for word in kept:
        named = [name for name in before if word in name.split(".") or name.split(".")[-2].endswith(word)]
        assert named and stayed.issuperset(named), (word, named)


def test_the_log_has_the_counts_of_each_loss(bases, tmp_path):
    """Pictures to draw, and the tokens of names with their end tokens, over both reads of a step."""
    base = bases["llama"]
    mixture = MixtureConfig(draw=4, caption=4, pack=2, templates=PLAIN)
    train(base, tmp_path, recipe_=recipe(base, steps=2, mixture=mixture, accumulate=2))
    read = Mixture(Noise(), ImageModality.Config(patch=4, sizes=(16,)).build(), (16,), base.encode, base.begin_ids,
                   base.end_id, mixture, 0)  # fmt: skip
    for step, event in enumerate(log(tmp_path)):
        answers = [s.segments[-1].ids for part in (0, 1) for s in read.captionings(2 * step + part)]
        assert event["counts"] == {"next_token": sum(map(len, answers)), "flow_matching": 8}
        assert event["counts"].keys() == event["losses"].keys()
    drawing = recipe(base, steps=1, mixture=dataclasses.replace(mixture, caption=0))
    train(base, tmp_path / "drawing", recipe_=drawing)
    assert log(tmp_path / "drawing")[0]["counts"] == {"flow_matching": 4}


CODES = CodePort.Config(largest_grid=6, entries=5)
WORDS_BESIDE_QUERIES = Queries.Config(queries=3, query_width=16, heads=2, depth=2, mlp=24, words=True)


@pytest.mark.parametrize(
    ("changes", "tables", "matrix"),
    [
        ({}, {"port.row.weight", "port.column.weight"}, "port.project.weight"),
        (
            {"fusion": Prefix.Config(), "port": CODES, "media": NextCode.Config()},
            {"port.row.weight", "port.column.weight", "port.table.weight"},
            "port.head.weight",
        ),
        (
            {"fusion": Prefix.Config(), "port": WORDS_BESIDE_QUERIES, "media": NoObjective.Config()}
            | {"extra": (QueryPretraining.Config(width=10),)},
            {"extra.0.places.weight"},
            "extra.0.words_in.weight",
        ),
    ],
    ids=["places", "codes", "places of words"],
)
def test_decay_shrinks_no_embedding_table(bases, changes, tables, matrix):
    """Rows of places and of codes are looked up one by one: those that a batch lacks would fade."""
    model = Model(replace(model_config(bases["llama"], "cogvlm"), **changes), bases["llama"])
    randomise(model)
    assert model.embedding_tables == tables
    before, stayed = decayed(Optimizer(model.named_new_parameters(), None, model.embedding_tables))
    assert tables <= stayed and matrix in before.keys() - stayed


LEARNED_INPUTS = {
    "by_layer": MediaPort.Config(time="modulate"),
    "constants": PrefixMapper.Config(heads=2),
    "latents": Resampler.Config(latents=3),
    "queries": PositionalResampler.Config(heads=2),
    "rows": AdaptionPrompt.Config(prompts=3),
}
"""Last name of a parameter that is a list of vectors -> what has one."""


@pytest.mark.parametrize("name", LEARNED_INPUTS)
def test_no_list_of_vectors_is_taken_for_a_matrix(bases, name):
    config = LEARNED_INPUTS[name]
    if isinstance(config, Resampler.Config):
        module = config.build(16)
    elif isinstance(config, AdaptionPrompt.Config):
        module = config.build()
        module.install(bases["llama"])
    else:
        module = config.build(16, 12, 0.1, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    before, stayed = decayed(Optimizer(dict(module.named_parameters())))
    lists = {path for path in before if path.rpartition(".")[2] == name}
    assert lists and all(before[path].ndim > 1 for path in lists) and lists <= stayed


def test_every_list_of_vectors_is_tried():
    assert set(LEARNED_INPUTS) == NEVER_DECAYED


def test_the_loss_is_weighed_and_every_step_has_noise_of_its_own(bases, tmp_path, monkeypatch):
    """Twice the weights are twice the gradient, of the same losses."""
    corrupt, seeds = FlowMatching.corrupt, []

    def noted(self, batch, generator):
        seeds.append(generator.initial_seed())
        return corrupt(self, batch, generator)

    monkeypatch.setattr(FlowMatching, "corrupt", noted)
    plain = recipe(bases["llama"], steps=3, rate=0.0)
    text, media = plain.model.text, plain.model.media
    twice = plain.with_model(text=replace(text, weight=2 * text.weight), media=replace(media, weight=2 * media.weight))
    train(bases["llama"], tmp_path / "plain", recipe_=plain)
    assert len(set(seeds)) == 1 + 3  # that of the largest step, which is tried, and of each
    train(bases["llama"], tmp_path / "twice", recipe_=twice)
    for one, other in zip(log(tmp_path / "plain"), log(tmp_path / "twice"), strict=True):
        assert one["losses"] == other["losses"]
        assert other["gradient_norm"] == pytest.approx(2 * one["gradient_norm"], rel=1e-5)


def test_losses_of_two_stages_have_no_common_mean():
    walked = progress.Progress((Stage(steps=3), Stage(steps=2)), None)
    means = []
    for loss in (9.0, 9.0, 9.0, 1.0, 1.0):
        walked.record(loss, 4, 50)
        means.append((walked.state_dict()["stage"], walked.state_dict()["loss"]))
    assert means == [(0, pytest.approx(9))] * 3 + [(1, pytest.approx(1))] * 2


def test_a_budget_has_room_for_its_previews():
    """A preview of 2 seconds comes 10 seconds after the last: of 50 seconds that are left, previews take a sixth."""
    walked = progress.Progress((Stage(),), 1.0)
    now = walked._started + 10
    assert walked.steps_in_budget(0.5, now, (0.0, 2.0)) == walked.steps_in_budget(0.5, now) == 100
    assert walked.steps_in_budget(0.5, now, (10.0, 2.0)) == 83
    assert walked.steps_in_budget(0.5, now, (10.0, 10.0)) == 50, "never none, however long a preview takes"
    assert walked.steps_in_budget(0.5, now, (10.0, 5.0), (20.0, 10.0)) == 50, "of two seconds one is of steps"


def test_a_budget_goes_on_beyond_the_steps_of_its_recipe():
    """Before it is planned, a run of more steps than the recipe says neither repeats its batches nor warms up again."""
    walked = progress.Progress((Stage(steps=20, warmup=50),), 1.0)
    assert [walked.stage(step)[:2] for step in (0, 19, 20, 21, 47)] == [(0, s) for s in (0, 19, 20, 21, 47)]
    rates = []
    for _ in range(30):
        rates.append(walked.rate())
        walked.record(1.0, 4, 50)
    assert rates == sorted(rates) and len(set(rates)) == 30
    walked.plan(35)
    assert walked.stage(walked.step) == (0, 30, 35)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate": 0}, "stage 1 has accumulate 0: set --stages.1.accumulate, 1 or more"),
        ({"steps": 0}, "stage 1 has steps 0: set --stages.1.steps, at least 1"),
        ({"clip": 0.0}, "stage 1 has clip 0: set --stages.1.clip, above 0"),
        ({"clip": math.nan}, "stage 1 has clip nan"),
        ({"rate": -1e-3}, "stage 1 has rate -0.001: set --stages.1.rate, 0 or more"),
        ({"warmup": -1}, "stage 1 has warmup -1"),
        ({"weight_decay": -0.1}, "stage 1 has weight-decay -0.1: set --stages.1.weight-decay"),
        ({"ema": -0.5}, "stage 1 has ema -0.5: set --stages.1.ema, from 0 to 1"),
        ({"ema": 2.0}, "stage 1 has ema 2"),
    ],
    ids=str,
)
def test_a_stage_that_would_train_nothing_is_refused_before_anything_is_made(bases, tmp_path, settings, message):
    stages = (Stage(steps=1), Stage(**{"steps": 1, **settings}))
    with pytest.raises(XFusionError, match=message) as error:
        train(bases["llama"], tmp_path / "run", recipe_=recipe(bases["llama"], stages=stages))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip_nonfinite": -1}, "skip-nonfinite is -1: 0 steps or more are skipped"),
        ({"patience": 0.0}, "patience is 0 minutes: more than 0"),
    ],
    ids=str,
)
def test_a_setting_that_means_nothing_is_refused_before_anything_is_made(bases, tmp_path, settings, message):
    with pytest.raises(XFusionError) as error:
        train(bases["llama"], tmp_path / "run", **settings)
    assert str(error.value) == message and not (tmp_path / "run").exists()


def test_rates_rise_and_fall():
    for schedule in ("linear", "cosine", "constant"):
        stage = Stage(rate=2.0, warmup=4, schedule=schedule)
        rates = [stage.rate_at(i, 10) for i in range(10)]
        assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and max(rates) == 2.0
        assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] > 0
        assert stage.rate_at(10, 10) == pytest.approx(2.0 if schedule == "constant" else 0.0)
    linear, cosine = (Stage(rate=2.0, warmup=4, schedule=schedule) for schedule in ("linear", "cosine"))
    assert [linear.rate_at(i, 10) for i in (4, 5, 7, 9)] == pytest.approx([2, 10 / 6, 1, 2 / 6])
    assert [cosine.rate_at(i, 10) for i in (4, 6, 7, 8)] == pytest.approx([2, 1.5, 1, 0.5])


# ---------------------------------------------------------------------------------------------------------- from_pack


def test_from_pack_adapts_and_refuses_another_shape(straight, bases, tmp_path):
    base = bases["llama"]
    pack = make_model(base)
    pack.save_pretrained(tmp_path / "start")
    seen = []

    def listen(event):
        if event["event"] == "start":
            seen.append(event)

    frozen = recipe(base, steps=1, rate=0.0)
    told = Console(file=io.StringIO(), width=400)
    model = train(
        base, tmp_path / "kept", recipe_=frozen, from_pack=str(tmp_path / "start"), listener=listen, console=told
    )
    count = len(pack.learned_state())
    assert f"start     {count} tensors of the pack {tmp_path / 'start'}, and 0 new ones\n" in told.file.getvalue()
    assert model.fingerprint == pack.fingerprint and seen[0]["new_parameters"] == pack.num_new_parameters
    moved = train(base, tmp_path / "moved", recipe_=recipe(base, steps=2), from_pack=str(tmp_path / "start"))
    distance = [
        (a - b).detach().abs().max() for a, b in zip(moved.new_parameters(), pack.new_parameters(), strict=True)
    ]
    assert 0 < float(max(distance)) < 0.05  # two steps away from the pack, not from fresh weights
    strided = dataclasses.replace(frozen, model=model_config(base, "dual tower, strided"))
    with pytest.raises(XFusionError, match=r"built otherwise than this recipe: fusion\.stride was 1 and is now 2"):
        train(base, tmp_path / "x", recipe_=strided, from_pack=str(tmp_path / "start"))
    Model(dataclasses.replace(pack.config, media=NoObjective.Config()), base).save_pretrained(tmp_path / "reader")
    with pytest.raises(XFusionError, match=r"reader can caption, text, the recipe draws: name the recipe that trained"):
        train(base, tmp_path / "x", recipe_=frozen, from_pack=str(tmp_path / "reader"))
    assert not (tmp_path / "x").exists()  # a run that was refused leaves no folder


# ----------------------------------------------------------------------------------------------------- the frozen base


def test_training_leaves_the_base_and_learns(bases, tmp_path):
    base = bases["gemma3"]
    before = base.compute_fingerprint()
    model = train(base, tmp_path, recipe_=recipe(base, steps=40, rate=4e-3), dtype=torch.float32)
    assert base.compute_fingerprint() == before and base.attention == "sdpa"
    losses = [e["losses"] for e in log(tmp_path)]
    for name in ("next_token", "flow_matching"):
        start, end = (sum(step[name] for step in part) / 5 for part in (losses[:5], losses[-5:]))
        assert end < 0.8 * start, name
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    assert torch.equal(model.text_logits(ids), model.text_logits(ids, stack="fused"))
    assert model.engine.backbone is base  # what is returned computes with the base itself


@pytest.mark.parametrize(
    ("fusion", "said"),
    [
        ("dual tower", "text      unchanged (bit for bit)"),
        ("single tower", "text      will change: the recipe trains parts that words pass through (as in the paper)"),
        ("lora", "text      will change: low-rank deltas lie on the base's layers, and without them it is the base's"),
    ],
)
def test_a_run_says_what_becomes_of_the_text(bases, tmp_path, fusion, said):
    """Perplexities of text that changes are those of the trained model, printed, logged, in the pack and on its card."""
    base, told = bases["llama"], io.StringIO()
    stages = (Stage(steps=3, warmup=1, rate=1e-2, mixture=MixtureConfig(draw=4, caption=4, pack=2)),)
    run = Recipe(model=model_config(base, fusion), data="noise", stages=stages)
    model = train(base, tmp_path, recipe_=run, console=Console(file=told, width=400))
    assert said in told.getvalue().splitlines()
    (end,) = log(tmp_path, "end")
    config = json.loads((tmp_path / "pack" / "config.json").read_text())
    card = (tmp_path / "pack" / "README.md").read_text()
    if fusion == "dual tower":
        assert "text" not in end and "text_keeping" not in config and "perplexity" not in told.getvalue() + card
        return
    wanted = text_keeping(model)
    assert wanted["text_perplexity_change"] != 0
    assert end["text"] == config["text_keeping"] == wanted
    both = "{text_perplexity_base:.4g} (base), {text_perplexity_fused:.4g}".format_map(wanted)
    assert f"text      perplexity of the bundled prompts: {both} (trained)" in told.getvalue()
    assert f"| perplexity of the bundled prompts | {both} (with this pack) |" in card
    loaded = xfusion.load(tmp_path / "pack", backbone=base)
    checkpoint.save(loaded, tmp_path / "same")
    checkpoint.save(loaded, tmp_path / "rounded", dtype=torch.bfloat16)
    assert "text_keeping" in json.loads((tmp_path / "same" / "config.json").read_text())
    assert "text_keeping" not in json.loads((tmp_path / "rounded" / "config.json").read_text())


@pytest.mark.parametrize(
    ("family", "asked", "attention", "reason"),
    [
        ("llama", None, "grouped", "plain products are faster than the fused kernel on a CPU's short sequences"),
        ("llama", "sdpa", "sdpa", "as asked"),
        ("gemma2", None, "eager", "Gemma2ForCausalLM has no sdpa, so the base's own stays"),
    ],
)
def test_a_run_says_which_attention_computes_and_why(bases, tmp_path, family, asked, attention, reason):
    told = io.StringIO()
    model = train(bases[family], tmp_path, steps=1, attention=asked, console=Console(file=told, width=400))
    assert f"attention {attention}: {reason}" in told.getvalue().splitlines()
    (start,) = log(tmp_path, "start")
    assert (start["attention"], start["attention_reason"]) == (attention, reason)
    engine = model.training_engine(torch.float32, "", asked or "grouped", False)
    assert engine.backbone.attention == attention


def test_the_start_shows_what_is_read_and_what_is_learned(bases, tmp_path):
    """By hand: two drawings and two captionings of one caption, 16 tokens a picture, [BOI] before it and [EOI] behind."""
    base, told = bases["llama"], io.StringIO()
    source = Noise(4)
    source.examples = [dataclasses.replace(e, captions=("a red apple",)) for e in source.examples]
    mixture = MixtureConfig(draw=2, caption=2, pack=1, templates=PLAIN)
    run = recipe(base, steps=1, mixture=mixture, accumulate=2)
    train(base, tmp_path / "one", recipe_=run, source=source, console=Console(file=told, width=400))
    lines = told.getvalue().splitlines()
    words = len(base.encode("a red apple"))
    # [BOS] before a prompt; [EOI] behind a picture, and the end token, which is a label alone.
    assert (
        f"tokens    {4 * (1 + words) + 4 * (1 + words)} text and {8 * 17} image positions in this step, padding aside"
        in lines
    )
    samples = [line for line in lines if line.startswith("sample")]
    assert samples == [
        "sample    <|begin|>a red apple »<16 image tokens>«",
        "sample    <16 image tokens> »a red apple<|end|>«",
    ]
    assert not any(line.startswith("start ") for line in lines)
    narrow = io.StringIO()
    train(base, tmp_path / "two", recipe_=run, source=source, console=Console(file=narrow, width=30))
    assert "sample    <|begin|>a red appl…" in narrow.getvalue().splitlines()
    # Words without a loss are not marked, nor are pictures that nothing draws.
    reader = dataclasses.replace(model_config(base), media=NoObjective.Config(), text=NextToken.Config(weight=0.0))
    sequences = Mixture(source, ImageModality.Config(patch=4, sizes=(16,)).build(), (16,), base.encode, base.begin_ids,
                        base.end_id, mixture, 0)  # fmt: skip
    shown = [summary.sample_text(Model(reader, base), s) for s in (*sequences.drawings(0), *sequences.captionings(0))]
    assert shown[0] == "<|begin|>a red apple <16 image tokens>" and shown[-1] == "<16 image tokens> a red apple<|end|>"


def test_answers_of_solved_examples_are_marked(bases):
    """Their end tokens are learned and not read."""
    base = bases["llama"]
    model, (media, _) = make_model(base), mixed_sequences()["words behind picture"].segments
    shot = Text(ids=(*base.encode("a cat"), base.end_id), has_loss=True, unread_end=True)
    question, answer = (
        Text(ids=base.encode("what is this?")),
        Text(ids=(*base.encode("two birds"), base.end_id), has_loss=True),
    )
    sample = Sequence(segments=(media, shot, media, question, answer))
    assert summary.sample_text(model, sample) == (
        "<16 image tokens> »a cat<|end|>« <16 image tokens> what is this? »two birds<|end|>«"
    )


def test_bfloat16_training_keeps_float32_masters(bases, tmp_path):
    model = train(bases["llama"], tmp_path, steps=3, dtype=torch.bfloat16)
    assert {p.dtype for p in model.new_parameters()} == {torch.float32}
    assert log(tmp_path, "start")[0]["dtype"] == "bfloat16"
    assert all(math.isfinite(v) for e in log(tmp_path) for v in e["losses"].values())
    reference = train(bases["llama"], tmp_path / "float32", steps=3)
    for one, other in zip(log(tmp_path), log(tmp_path / "float32"), strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=0.05)
        assert one["losses"] != pytest.approx(other["losses"], rel=1e-5)  # rounded as bfloat16 rounds
    kept, exact = list(model.new_parameters()), list(reference.new_parameters())
    assert all(float((a - b).detach().abs().max()) < 0.05 for a, b in zip(kept, exact, strict=True))
    assert any(p.ne(p.bfloat16()).any() for p in kept)  # masters are not rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_modules_outside_the_layers_have_the_runs_precision_and_losses_are_float32(
    bases, tmp_path, monkeypatch, dtype
):
    read, summed, readout, losses = set(), set(), MediaPort.readout, Model.losses

    def watched_readout(self, hidden):
        prediction = readout(self, hidden)
        read.add(prediction.dtype)
        return prediction

    def watched_losses(self, *args):
        found = losses(self, *args)
        summed.update(total.dtype for total, _ in found.values())
        return found

    monkeypatch.setattr(MediaPort, "readout", watched_readout)
    monkeypatch.setattr(Model, "losses", watched_losses)
    train(bases["llama"], tmp_path, steps=1, dtype=dtype)
    assert (read, summed) == ({dtype}, {torch.float32})


def test_a_resumed_run_keeps_its_precision_whatever_the_machine_is_good_at(bases, tmp_path, monkeypatch):
    base = bases["llama"]
    monkeypatch.setattr(loop, "choose_compute_dtype", lambda device: (torch.bfloat16, "faster here"))
    with pytest.raises(Interrupted):
        train(base, tmp_path, steps=4, dtype=None, listener=StopAt(2))
    monkeypatch.setattr(loop, "choose_compute_dtype", lambda device: (torch.float32, "faster here"))
    train(base, tmp_path, steps=4, dtype=None, resume=True)
    assert [e["dtype"] for e in log(tmp_path, "start")] == ["bfloat16", "bfloat16"]


def test_previews_are_drawn_by_the_averaged_weights_and_change_nothing(straight, bases, tmp_path):
    base, events = bases["llama"], []
    loop.train(
        recipe(base),
        out=tmp_path,
        source=Noise(),
        backbone=base,
        compile=False,
        dtype=torch.float32,
        preview_every=1e-9,
        preview_prompts=("a red apple", "tree"),
        listener=events.append,
        checkpoint_every=0,
    )
    assert step_records(tmp_path) == step_records(straight[0])
    assert same(pack_of(tmp_path), pack_of(straight[0]))
    previews = [e for e in events if e["event"] == "preview"]
    assert [e["step"] for e in previews] == [*range(1, 13), 12]
    facts = {"averaged": True, "steps": 25, "guidance": recipe(base).model.media.guidance, "seed": 0}
    assert all({key: e[key] for key in facts} == facts for e in previews)
    assert log(tmp_path, "preview") == [e | {"path": f"previews/step_{e['step']:06d}.png"} for e in previews]
    from PIL import Image

    sheet = Image.open(previews[-1]["path"])
    assert sheet.text == {"prompts": "a red apple\ntree", "step": "12"} | {
        key: str(value) for key, value in facts.items()
    }
    drawn = xfusion.load(tmp_path / "pack", backbone=base).draw(["a red apple", "tree"], seed=0)
    assert sheet.size == (32, 16)
    assert sheet.crop((16, 0, 32, 16)).tobytes() == drawn[1].tobytes()


class Long(Noise):
    """Captions of very different lengths."""

    def __init__(self):
        super().__init__(40)
        self.examples = tuple(replace(e, captions=("cat " * (1 + i),)) for i, e in enumerate(self.examples))


def test_compiled_steps_of_many_widths_and_models_stay_within_the_graphs(bases, tmp_path, monkeypatch):
    """A caption longer than any that was looked at makes another graph, another tower makes its own: no run may die."""
    base, mixture = bases["llama"], MixtureConfig(draw=2, caption=2, pack=1)
    torch.compiler.reset()
    limit, torch._dynamo.config.recompile_limit = torch._dynamo.config.recompile_limit, 3  # the library raises it
    monkeypatch.setattr(
        fusion_base.torch, "compile", partial(torch.compile, backend="eager")
    )  # graphs, not machine code
    monkeypatch.setattr("xfusion.data.mixture.LOOKED_AT", 1)
    fusion_base.compiled.cache_clear()
    made = []
    try:
        for number, fusion in enumerate(("dual tower", "dual tower, strided")):
            whole = recipe(base, mixture=mixture, steps=12 if number == 0 else 6)
            whole = replace(whole, model=model_config(base, fusion))
            out, plain = tmp_path / f"compiled {number}", tmp_path / f"plain {number}"
            train(base, out, recipe_=whole, source=Long(), compile=True)
            train(base, plain, recipe_=whole, source=Long())
            for one, other in zip(log(out), log(plain), strict=True):
                assert one["losses"] == pytest.approx(other["losses"], rel=1e-4)
            made.append((log(out, "end")[0]["graphs"], log(plain, "end")[0]["graphs"]))
        assert sum(graphs for graphs, _ in made) > 3 and [plain for _, plain in made] == [0, 0]
    finally:
        torch._dynamo.config.recompile_limit = limit
        fusion_base.compiled.cache_clear()
        torch.compiler.reset()


def test_float16_is_refused_before_anything_is_made(bases, tmp_path):
    with pytest.raises(XFusionError, match="cannot compute in torch.float16: gradients in float16 vanish"):
        train(bases["llama"], tmp_path / "run", dtype=torch.float16)
    assert not (tmp_path / "run").exists()


class Even(Noise):
    """Captions of one length."""

    def __init__(self):
        super().__init__(40)
        words = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("cat", "house", "tree")]
        self.examples = tuple(replace(e, captions=(words[i % 6],)) for i, e in enumerate(self.examples))


@pytest.fixture
def graphs(monkeypatch):
    """Compiled layers without machine code: graphs are made, and counted, as they are with it."""
    torch.compiler.reset()
    monkeypatch.setattr(fusion_base.torch, "compile", partial(torch.compile, backend="eager"))
    fusion_base.compiled.cache_clear()
    yield
    fusion_base.compiled.cache_clear()
    torch.compiler.reset()


@pytest.mark.usefixtures("graphs")
def test_steps_behind_the_warm_up_are_not_compiled(bases, tmp_path):
    """Batches that were not read before, of pictures and words in another order."""
    whole = recipe(bases["llama"], steps=25, mixture=MixtureConfig(draw=4, caption=4, pack=2, templates=PLAIN))
    train(bases["llama"], tmp_path, recipe_=whole, source=Even(), compile=True)
    (end,) = log(tmp_path, "end")
    assert end["graphs"] > 0 and end["graphs_behind_warm_up"] == 0
    train(bases["llama"], tmp_path / "plain", steps=2)
    assert [log(tmp_path / "plain", "end")[0][name] for name in ("graphs", "graphs_behind_warm_up")] == [0, 0]


@pytest.mark.usefixtures("graphs")
def test_one_very_long_caption_compiles_nothing_behind_the_warm_up_and_changes_no_loss(bases, tmp_path, monkeypatch):
    """The graphs that it needs are made ahead, by batches that nothing learns from."""
    source, late = Even(), 7  # its turn comes behind the tenth step
    long = replace(source.examples[late], captions=("a red cat " * 3,))
    source.examples = (*source.examples[:late], long, *source.examples[late + 1 :])
    whole = recipe(bases["llama"], steps=20, mixture=MixtureConfig(draw=2, caption=2, pack=2, templates=PLAIN))
    for name in ("ahead", "when needed"):
        train(bases["llama"], tmp_path / name, recipe_=whole, source=source, compile=True)
        torch.compiler.reset()
        fusion_base.compiled.cache_clear()
        monkeypatch.setattr(Mixture, "wide_batches", lambda self: ())
    ahead, when_needed = (log(tmp_path / name, "end")[0] for name in ("ahead", "when needed"))
    assert ahead["graphs_behind_warm_up"] == 0 < when_needed["graphs_behind_warm_up"]
    assert step_records(tmp_path / "ahead") == step_records(tmp_path / "when needed")
    assert same(pack_of(tmp_path / "ahead"), pack_of(tmp_path / "when needed"))


@pytest.mark.full
@pytest.mark.usefixtures("graphs")
def test_a_caption_longer_than_was_looked_at_makes_graphs_once_and_they_are_counted(bases, tmp_path, monkeypatch):
    """Widths double, so there are few; were each length a width of its own, a graph a step would be counted."""
    base, mixture, take, late, new = bases["llama"], MixtureConfig(draw=2, caption=2, pack=1), Prefetcher.take, [], []
    monkeypatch.setattr("xfusion.data.mixture.LOOKED_AT", 1)
    for number, fit in enumerate((fit_, lambda widths, longest: longest)):
        taken: list[list[Batch]] = []
        monkeypatch.setattr("xfusion.data.mixture._fit", fit)
        monkeypatch.setattr(Prefetcher, "take", lambda self, step, to=taken: to.append(take(self, step)) or to[-1])
        whole, out = recipe(base, mixture=mixture, steps=40), tmp_path / str(number)
        train(base, out, recipe_=whole, source=Long(), compile=True)
        late.append(log(out, "end")[0]["graphs_behind_warm_up"])
        widths = [{(task, batch.text.count) for task, batch in enumerate(step)} for step in taken]
        new.append(len(set().union(*widths[10:]) - set().union(*widths[:10])))
    assert new[0] < 6 and late[0] <= 3 * new[0]
    assert new[1] > 20 and late[1] > 20


def test_a_text_longer_than_the_base_reads_is_refused_before_anything_is_written(bases, tmp_path):
    source = Noise()
    source.examples = tuple(replace(e, captions=("z" * 520,)) if e.id == "3" else e for e in source.examples)
    with pytest.raises(
        XFusionError, match=r"^noise:3: with its text a sample takes 5\d\d positions.*the base reads 512: "
    ):
        train(bases["llama"], tmp_path / "run", source=source)
    assert not (tmp_path / "run").exists()


def test_an_empty_source_is_refused_rather_than_replaced(bases, tmp_path):
    with pytest.raises(XFusionError, match="noise: no pictures to train on"):
        train(bases["llama"], tmp_path, source=Noise(0))


def test_randomised_models_differ(bases):
    """The helper that all tests lean on."""
    model = make_model(bases["llama"], randomised=False)
    before = model.fingerprint
    randomise(model)
    assert model.fingerprint != before


# ------------------------------------------------------------------------------------------------- the largest step


def test_the_largest_step_is_at_least_as_wide_as_any(bases):
    model = make_model(bases["llama"])
    settings = (model.backbone.begin_ids, model.backbone.end_ids[0], MixtureConfig(draw=4, caption=4, pack=2), 0)
    mixture = Mixture(Noise(), model.image, model.image.sizes, model.backbone.encode, *settings)
    widest = [batch.text.count for batch in mixture.largest()]
    steps = [[batch.text.count for batch in mixture.batches(step)] for step in range(100)]
    assert all(count <= limit for counts in steps for count, limit in zip(counts, widest, strict=True))
    assert [b.num_sequences for b in mixture.largest()] == [4, 4]


def test_what_does_not_fit_fails_before_the_first_step(bases, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("xfusion.model.Model.losses", full)
    with pytest.raises(
        XFusionError, match=r"the largest step of stage 0 \(4 samples .*, 4 samples .*lower --stages.0.mix"
    ):
        train(bases["llama"], tmp_path)
    assert log(tmp_path, "step") == []


def test_other_failures_of_the_largest_step_are_not_called_memory(bases, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("xfusion.model.Model.losses", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(bases["llama"], tmp_path)


def test_prompts_that_would_not_come_back_in_time_are_computed_in_each_step(bases, tmp_path, monkeypatch):
    train(bases["llama"], tmp_path / "kept", steps=3)
    said = io.StringIO()
    monkeypatch.setattr(setup, "TEXT_STATES_BYTES", 0)
    monkeypatch.setattr(Model, "text_states", lambda *_: pytest.fail("kept"))
    train(bases["llama"], tmp_path / "computed", steps=3, console=Console(file=said, width=200))
    assert "computed in each step instead of kept" in said.getvalue()
    one, other = ([e["losses"]["flow_matching"] for e in log(tmp_path / run)] for run in ("kept", "computed"))
    assert one == pytest.approx(other, rel=1e-5)
