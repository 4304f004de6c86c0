"""Several processes follow the curve of one; a state of two goes on with one and four; nobody waits for a picture."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from contracts.table import Noise, make_base, make_model
from safetensors.torch import load_file

import xfusion
from xfusion.data.mixture import Ahead, Mixture, MixtureConfig
from xfusion.data.sequence import XFusionError
from xfusion.training import states
from xfusion.training.processes import Processes, _buckets

HERE = Path(__file__).parent
SOURCE = Path(xfusion.__file__).parents[1]
TOLERANCE = 1e-5
"""Relative, of losses and gradient norms over 12 steps in float32; 4e-7 and 2e-6 were seen."""


def environment(**more):
    paths = os.pathsep.join([str(SOURCE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | more


def several(tmp_path_factory, what):
    """The runs of a function of `several`, in one program, so that torch is imported once."""
    folder = tmp_path_factory.mktemp(what)
    done = subprocess.run(
        [sys.executable, str(HERE / "several.py"), str(folder), what], env=environment(), capture_output=True, text=True
    )
    assert not done.returncode, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return several(tmp_path_factory, "whole")


@pytest.fixture(scope="module")
def some_divided(tmp_path_factory):
    return several(tmp_path_factory, "some_divided")


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    return several(tmp_path_factory, "divided")


def told(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [e for e in lines if e["event"] == "step"]


def furthest(one, other):
    """Largest relative difference of losses and gradient norms."""
    assert [(e["step"], e["samples"], e["rate"]) for e in one] == [(e["step"], e["samples"], e["rate"]) for e in other]
    pairs = [(a["losses"][k], b["losses"][k]) for a, b in zip(one, other, strict=True) for k in a["losses"]]
    pairs += [(a["gradient_norm"], b["gradient_norm"]) for a, b in zip(one, other, strict=True)]
    return max(abs(a / b - 1) for a, b in pairs)


def test_several_processes_follow_the_curve_of_one(ran):
    one = told(ran / "of_1")
    assert len(one) == 12 and one[0]["samples"] == 10
    for count in (2, 4):
        assert furthest(told(ran / f"of_{count}"), one) < TOLERANCE
        weights = [load_file(ran / name / "pack" / "model.safetensors") for name in ("of_1", f"of_{count}")]
        assert max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[0]) < 1e-4


def test_processes_without_a_row_wait_for_nobody(ran):
    """One drawing and one row of captioning for four processes."""
    assert len(told(ran / "few_4")) == 4 and furthest(told(ran / "few_4"), told(ran / "few_1")) < TOLERANCE


def test_a_state_of_two_processes_goes_on_with_one_and_four(ran):
    assert states.newest_plan(ran / "died_2" / "state")["step"] == 6
    for count in (1, 4):
        assert furthest(told(ran / f"died_2_on_{count}"), told(ran / "of_1")) < TOLERANCE
        (start,) = (
            e
            for e in map(json.loads, (ran / f"died_2_on_{count}" / "log.jsonl").read_text().splitlines())
            if e["event"] == "start" and e["resumed"]
        )
        assert (start["step"], start["processes"]) == (6, count)


def test_a_signal_to_one_process_stops_all_behind_one_step(ran):
    assert [e["step"] for e in told(ran / "told_2")] == [0, 1, 2, 3, 4]
    assert [(ran / f"told_2.{rank}.code").read_text() for rank in (0, 1)] == ["143", "143"]
    assert furthest(told(ran / "told_2_on_1"), told(ran / "of_1")) < TOLERANCE


def test_the_first_process_speaks_and_shows_the_memory_of_all(ran):
    said = (ran / "of_4.0.txt").read_text()
    assert "processes 4, each with all weights and its share of every step" in said
    table = said[said.index("process  ") :].splitlines()
    assert table[0].split() == [
        "process",
        "base",
        "new",
        "weights",
        "gradients",
        "moments",
        "average",
        "sum",
        "held",
        "now",
        "peak",
        "so",
        "far",
    ]
    rows = [line.split() for line in table[1:5]]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    base, new, gradients, moments, average, total, held, peak = (float(cell) for cell in rows[0][1::2])
    assert abs(moments - 2 * new) < 0.11 and gradients == average == new
    assert abs(total - base - 5 * new) < 0.31 and total < held <= peak
    assert all((ran / f"of_4.{rank}.txt").read_text() == "" for rank in (1, 2, 3))


@pytest.mark.full
def test_torchrun_runs_the_command_line(tmp_path):
    make_base("llama", tmp_path / "base")
    options = "--data emoji:12 --steps 3 --no-compile --preview-every 0 --device cpu --json --stages.0.mixture.draw 4"
    options += " --stages.0.mixture.caption 4 --model.fusion.stride 1 --model.fusion.mlp None"
    options += f" --model.backbone.source {tmp_path / 'base'}"
    logs = []
    for count in (1, 2):
        out = tmp_path / f"of_{count}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command += ["-m", "xfusion.apps.cli", "train", "xfusion", *options.split(), "-o", str(out)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert not done.returncode, done.stderr[-3000:]
        assert json.loads(done.stdout)["steps"] == 3  # one answer, whatever the number of processes
        logs.append(told(out))
    assert furthest(*logs) < 0.02  # compute is bfloat16 where the machine has it


# ------------------------------------------------------------------------------------------------------------- alone


def test_settings_that_are_incomplete_are_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        XFusionError, match="WORLD_SIZE is 2 but RANK and MASTER_ADDR and MASTER_PORT is not set.*torchrun"
    ):
        Processes()


def test_shares_divide_all_rows_once(monkeypatch):
    alone = Processes()
    assert alone.share(5) is None and alone.first and alone.same(3) == 3 and alone.gather(3) == [3]
    for rows in (0, 1, 5, 8):
        parts = []
        for rank in range(4):
            alone.count, alone.rank = 4, rank
            parts.append(list(range(rows))[alone.share(rows)])
        assert [row for part in parts for row in part] == list(range(rows)) and max(map(len, parts)) - min(
            map(len, parts)
        ) <= 1


def test_buckets_hold_all_parameters_in_order(monkeypatch):
    monkeypatch.setattr("xfusion.training.processes.BUCKET_BYTES", 40)
    parameters = [
        torch.nn.Parameter(torch.zeros(n, dtype=d))
        for n, d in ((4, torch.float32), (5, torch.float32), (20, torch.float32), (1, torch.float64))
    ]
    found = list(_buckets(parameters))
    assert [len(bucket) for bucket in found] == [2, 1, 1] and [p.numel() for b in found for p in b] == [4, 5, 20, 1]


class Counted(Noise):
    def __init__(self):
        super().__init__()
        self.opened = Counter()

    def picture(self, index, size):
        self.opened[index] += 1
        return super().picture(index, size)


def mixture(model, share=lambda rows: None, source=None):
    backbone = model.backbone
    config = MixtureConfig(draw=4, caption=4, pack=2)
    return Mixture(
        source or Noise(), model.image, 16, backbone.encode, backbone.begin_ids, backbone.end_ids[0], config, 0, share
    )


def test_a_share_reads_its_own_pictures_and_meets_the_noise_of_the_whole(bases):
    """The rows of all shares, corrupted, are the rows of the whole batch, to the bit; sums of losses add up."""
    model = make_model(bases["llama"])
    whole = mixture(model).batches(1)
    for which, batch in enumerate(whole):
        view = batch
        for objective in model.objectives:
            view = objective.corrupt(view, torch.Generator().manual_seed(7))
        expected, tokens, times, items = model.losses(batch, torch.Generator().manual_seed(7)), [], [], []
        sums = Counter()
        for rank in range(2):
            source = Counted()
            rows = len(batch.text_ids)
            part = slice(rows * rank // 2, rows * (rank + 1) // 2)
            own = mixture(model, lambda n, rank=rank: slice(n * rank // 2, n * (rank + 1) // 2), source).batches(1)
            assert sum(source.opened.values()) == len(set(source.opened)) <= 4
            corrupted = own[which]
            for objective in model.objectives:
                corrupted = objective.corrupt(corrupted, torch.Generator().manual_seed(7))
            mine = corrupted.index(torch.arange(rows)[part])
            media = mine.media["image"]
            tokens.append(media.tokens)
            times.append(media.time)
            items.append(media.item.max() + 1)
            assert mine.num_sequences == batch.num_sequences // 2
            for name, (total, count) in model.losses(own[which], torch.Generator().manual_seed(7), part).items():
                sums[name] += float(total.detach()) / float(expected[name][0].detach())
                sums[f"{name} count"] += int(count)
        assert torch.equal(torch.cat(tokens), view.media["image"].tokens)
        assert torch.equal(torch.cat(times), view.media["image"].time) and sum(items) == len(view.media["image"].time)
        for name, (_, count) in expected.items():
            assert sums[name] == pytest.approx(1, abs=1e-5) and sums[f"{name} count"] == int(count)


def test_batches_made_ahead_are_those_of_the_step_and_errors_come_with_their_step():
    made = []

    def make(step):
        made.append(step)
        if step == 3:
            raise XFusionError("step 3 cannot be made")
        return step * step

    ahead = Ahead(make)
    assert [ahead.take(0), ahead.take(1), ahead.take(2)] == [0, 1, 4]
    with pytest.raises(XFusionError, match="step 3 cannot be made"):
        ahead.take(3)
    assert ahead.take(7) == 49  # any step, as a resumed run asks
    ahead.close()
    assert made[:4] == [0, 1, 2, 3] and 7 in made
