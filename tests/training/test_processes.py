"""Several processes follow the curve of one; a state of two goes on with one and four; nobody waits for a picture."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from contracts.table import Noise, make_base, make_model
from PIL import Image as PILImage
from safetensors.torch import load_file
from training.runs import train
from training.several import GOES_ON, KILLS

import xfusion
from xfusion.data.mixture import Mixture, MixtureConfig, Prefetcher
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


def several(tmp_path_factory, what, prepare=lambda folder: None):
    """The runs of a function of `several`, in one program, so that torch is imported once."""
    folder = tmp_path_factory.mktemp(what)
    prepare(folder)
    done = subprocess.run(
        [sys.executable, str(HERE / "several.py"), str(folder), what],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,  # processes that wait for each other would do so for hours
    )
    assert not done.returncode, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def often(tmp_path_factory):
    return several(tmp_path_factory, "often")


@pytest.fixture(scope="module")
def ran(often):
    return often / "whole"


@pytest.fixture(scope="module")
def some_divided(often):
    return often / "some_divided"


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    return several(tmp_path_factory, "divided")


def told(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [e for e in lines if e["event"] == "step"]


def tokens_of(folder):
    return json.loads((folder / "pack" / "config.json").read_text())["training"]["tokens"]


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
        assert tokens_of(ran / f"of_{count}") == tokens_of(ran / "of_1") > 0
        weights = [load_file(ran / name / "pack" / "model.safetensors") for name in ("of_1", f"of_{count}")]
        assert max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[0]) < 1e-4


def test_layers_computed_again_change_no_bit_of_several_processes(ran):
    assert furthest(told(ran / "again_2"), told(ran / "of_2")) == 0
    one, other = (load_file(ran / name / "pack" / "model.safetensors") for name in ("again_2", "of_2"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_processes_without_a_row_wait_for_nobody(ran):
    """One drawing and one row of captioning for four processes."""
    assert len(told(ran / "few_4")) == 4 and furthest(told(ran / "few_4"), told(ran / "few_1")) < TOLERANCE


def test_pairs_are_contrasted_with_those_of_all_processes(ran):
    """A process that compared its own pairs alone would find a smaller loss."""
    one = told(ran / "pairs_1")
    assert len(one) == 4 and one[0]["losses"]["contrastive"] > 0.5
    for count in (2, 4):
        assert furthest(told(ran / f"pairs_{count}"), one) < TOLERANCE


def test_weighted_losses_of_several_sources_add_up_over_the_processes(ran):
    one = told(ran / "weights_1")
    assert len(one) == 4
    for count in (2, 4):
        assert furthest(told(ran / f"weights_{count}"), one) < TOLERANCE


def test_a_state_of_two_processes_goes_on_with_one_and_four(ran):
    assert states.newest_plan(ran / "died_2" / "state")["step"] == 6
    for count in (1, 4):
        assert furthest(told(ran / f"died_2_on_{count}"), told(ran / "of_1")) < TOLERANCE
        assert tokens_of(ran / f"died_2_on_{count}") == tokens_of(ran / "of_1")
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


def test_a_wall_clock_budget_is_planned_behind_one_step_whatever_the_clocks_say(ran):
    lines = [json.loads(line) for line in (ran / "late_2" / "log.jsonl").read_text().splitlines()]
    (plan,) = (line for line in lines if line["event"] == "plan")
    assert plan["step"] in (30, 50, 70, 90) and told(ran / "late_2")[-1]["step"] == plan["steps"] - 1


def test_a_signal_behind_the_last_step_has_nothing_left_to_stop(ran):
    assert [e["step"] for e in told(ran / "told_last_2")] == list(range(12))
    assert not [*ran.glob("told_last_2.*.code")]
    last = json.loads((ran / "told_last_2" / "log.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["step"]) == ("end", 12)


@pytest.mark.parametrize(
    ("runs", "name", "step"), [("ran", "lost_2", 4), ("ran", "lost_early_2", 0), ("some_divided", "lost_2", 4)]
)
def test_a_process_that_is_killed_is_told_of_by_the_others(runs, name, step, request):
    """No state was written: there is nothing to resume."""
    said = (request.getfixturevalue(runs) / f"{name}.0.said").read_text()
    assert said.startswith(f"process 0 of 2 lost process 1 at step {step}, which died") and said.endswith(
        "command again"
    )


def test_a_process_that_stands_still_is_waited_for_no_longer_than_asked_and_named_by_all_others(ran):
    for rank in (0, 2):
        said = (ran / f"stalled_3.{rank}.said").read_text()
        lost, _, rest = said.partition(" (")
        assert lost == (
            f"process {rank} of 3 lost process 1 at step 4, which died, was killed or did not go on for 0.15 minutes"
        )
        assert rest.endswith("): start the same command again with --resume")


def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all_also_behind_a_break(ran, some_divided):
    one = told(ran / "skipping_1")
    assert [e["step"] for e in one] == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]
    assert furthest(told(ran / "skipping_2"), one) < TOLERANCE
    assert furthest(told(some_divided / "skipping_2"), one) < TOLERANCE
    lines = [json.loads(line) for line in (ran / "skipping_2" / "log.jsonl").read_text().splitlines()]
    assert [(e["step"], e["reason"]) for e in lines if e["event"] == "skipped"] == [
        (step, f"the loss flow_matching is nan at step {step}") for step in (3, 8)
    ]
    assert lines[-1]["event"] == "end" and lines[-1]["skipped"] == 2


@pytest.mark.parametrize(("runs", "name"), [("ran", "of_2_twice"), ("some_divided", "all_2_twice")])
def test_what_is_refused_before_the_first_step_is_told_once(runs, name, request):
    folder = request.getfixturevalue(runs)
    said = [(folder / f"{name}.{rank}.said").read_text() for rank in (0, 1)]
    refused = f"{folder / name} already holds a run: pass --resume to go on, or name another folder"
    assert said == [f"False {refused}", f"True {refused}"]


@pytest.mark.parametrize(
    ("runs", "name", "said", "written"),
    [
        ("ran", "full_2", ("/state/step_00000001 cannot be written: ", "File too large"), 0),
        ("ran", "full_log_2", ("/log.jsonl cannot be written: ", "No space left on device"), 0),
        ("ran", "blocked_2", ("/state/step_00000001 cannot be written: a file stands where a folder is needed",), 0),
        ("ran", "not_finite_2", ("the loss flow_matching is nan at step 3: training stopped; the last checkpoint",), 3),
        ("some_divided", "full_2", ("/state/step_00000001 cannot be written: ", "File too large"), 0),
        (
            "some_divided",
            "blocked_2",
            ("/state/step_00000001 cannot be written: a file stands where a folder is needed",),
            0,
        ),
    ],
)
def test_what_stops_one_process_stops_both_with_one_line(runs, name, said, written, request):
    """Neither waits for the other, nor takes it for killed; the line is told once, and no half of a state is left."""
    folder = request.getfixturevalue(runs)
    (told, one), (told_by_other, other) = ((folder / f"{name}.{r}.said").read_text().split(" ", 1) for r in (0, 1))
    assert {told, told_by_other} == {"False", "True"}
    assert one == other and all(words in one for words in said) and "\n" not in one
    assert not [*(folder / name).glob("state/.*")] and not (folder / name / "pack").exists()
    found = states.list_states(folder / name / "state")
    assert [states.read(state)[0]["step"] for state in found[:1]] == [written] * bool(written)


def test_the_first_process_speaks_and_shows_the_memory_of_all(ran):
    said = (ran / "of_4.0.txt").read_text()
    assert "processes 4, each with all weights, and each with its share of every step" in said
    table = said[said.index("process  ") :].splitlines()
    assert table[0].split() == [
        "process",
        "base",  # and no copy of it: training in the base's own precision computes with its very weights
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


# ----------------------------------------------------------------------------------------------------------- divided


def test_two_processes_that_divide_everything_are_gone_on_with_by_one(some_divided):
    """A signal stops both behind one step; what follows, and so what they wrote, is the curve of a single process."""
    assert [(some_divided / f"all_2.{rank}.code").read_text() for rank in (0, 1)] == ["143", "143"]
    assert [e["step"] for e in told(some_divided / "all_2")] == [0, 1, 2]
    assert furthest(told(some_divided / "all_2_on_1"), told(some_divided / "of_1")) < TOLERANCE


def test_a_process_without_a_row_goes_through_every_divided_layer(some_divided):
    """One drawing and one row of captioning for two processes, of which one has neither."""
    assert len(told(some_divided / "few_2")) == 2
    assert furthest(told(some_divided / "few_2"), told(some_divided / "few_1")) < TOLERANCE


def test_a_process_with_filler_rows_alone_goes_through_every_divided_layer(some_divided):
    assert len(told(some_divided / "rare_2")) == 2
    assert furthest(told(some_divided / "rare_2"), told(some_divided / "rare_1")) < TOLERANCE


def test_each_process_holds_and_writes_its_share(some_divided):
    said = (some_divided / "all_2.0.txt").read_text()
    assert "processes 2, new weights and base divided among them, and each with its share of every step" in said
    numbers = [[float(cell) for cell in line.split()[1::2]] for line in said.splitlines() if line[:3] in ("0  ", "1  ")]
    base = sum(v.numel() * v.element_size() for v in load_file(some_divided / "base" / "model.safetensors").values())
    pack = some_divided / "all_2" / "pack" / "model.safetensors"
    new = sum(v.numel() * v.element_size() for v in load_file(pack).values())
    before, behind = numbers[:2], numbers[2:]
    for row in before:  # base, new weights, gradients, moments, average
        assert row[:5] == pytest.approx([part / 2e6 for part in (base, new, new, 2 * new, new)], abs=0.06)
    for row in behind:  # measured: no gradients are left
        assert row[:4] == pytest.approx([part / 2e6 for part in (base, new, 2 * new, new)], abs=0.06)
    (state,) = states.list_states(some_divided / "all_2" / "state")
    files = sorted(state.glob("*.safetensors"))
    assert len(files) == 2
    for file in files:  # weights, average and two moments, halved
        assert file.stat().st_size == pytest.approx(2 * new, rel=0.05)


def test_a_divided_state_is_read_whole_or_refused(some_divided, tmp_path):
    pack = load_file(some_divided / "all_2" / "pack" / "model.safetensors")
    _, tensors = states.newest(some_divided / "all_2" / "state")
    assert {name for name in tensors if name.startswith("average.")} == {f"average.{name}" for name in pack}
    assert all(torch.equal(tensors[f"average.{name}"], value) for name, value in pack.items())
    for harm, said in ((flip, "was altered"), (Path.unlink, "cannot be read"), (double, "is not of this state")):
        shutil.copytree(some_divided / "all_2" / "state", tmp_path / harm.__name__)
        (state,) = states.list_states(tmp_path / harm.__name__)
        harm(state / "shard-00002-model-00001-of-00001.safetensors")
        with pytest.raises(XFusionError, match=said):
            states.newest(tmp_path / harm.__name__)


def flip(file):
    bytes_ = bytearray(file.read_bytes())
    bytes_[-5] ^= 1
    file.write_bytes(bytes_)


def double(file):
    shutil.copy(file, file.with_name("shard-00003-model-00001-of-00001.safetensors"))


@pytest.mark.full
@pytest.mark.parametrize("shard", ["new", "all"])
def test_what_is_divided_follows_the_curve_of_one(divided, shard):
    one = load_file(divided / "of_1" / "pack" / "model.safetensors")
    assert furthest(told(divided / f"{shard}_2"), told(divided / "of_1")) < TOLERANCE
    pack = load_file(divided / f"{shard}_2" / "pack" / "model.safetensors")
    assert pack.keys() == one.keys() and max(float((pack[k] - one[k]).abs().max()) for k in one) < 1e-4
    for name in ("gates", "few"):
        assert furthest(told(divided / f"{shard}_{name}"), told(divided / f"{name}_1")) < TOLERANCE


@pytest.mark.full
@pytest.mark.parametrize("shard", ["new", "all"])
def test_all_processes_draw_a_preview_of_divided_weights(divided, shard):
    pictures = []
    for name in ("few_1", f"{shard}_few"):
        (*_, last) = sorted((divided / name / "previews").glob("*.png"))
        assert len([*(divided / name / "previews").iterdir()]) == 2
        pictures.append(numpy.asarray(PILImage.open(last)).astype(int))
    assert pictures[0].shape == (16, 16, 3) and abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.full
@pytest.mark.parametrize("shard", ["new", "all"])
def test_divided_runs_that_die_go_on_to_the_same_bits(divided, shard):
    runs = [divided / f"{shard}_2", divided / f"{shard}_on_2"]
    straight, killed = ([(e["losses"], e["gradient_norm"], e["rate"]) for e in told(run)] for run in runs)
    assert straight == killed
    one, other = (states.newest(run / "state")[1] for run in runs)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.full
@pytest.mark.parametrize("name", [row[0] for row in GOES_ON])
def test_states_go_from_any_number_and_way_to_any_other(divided, name):
    assert furthest(told(divided / name), told(divided / "of_1")) < TOLERANCE
    pack, one = (load_file(divided / run / "pack" / "model.safetensors") for run in (name, "of_1"))
    assert max(float((pack[k] - one[k]).abs().max()) for k in one) < 1e-4


@pytest.mark.full
def test_divided_runs_of_which_a_process_is_killed_go_on_to_the_same_bits(tmp_path_factory):
    folder = several(tmp_path_factory, "killed")
    for shard in ("new", "all"):
        straight = folder / f"{shard}_straight"
        expected = {e["step"]: (e["losses"], e["gradient_norm"]) for e in told(straight)}
        for number in range(KILLS):
            run = folder / f"{shard}_killed_{number}"
            # A step that was lost with its process is taken once more: all that were told are those of the straight run.
            assert all((e["losses"], e["gradient_norm"]) == expected[e["step"]] for e in told(run))
            assert {e["step"] for e in told(run)} == set(expected)
            one, other = (states.newest(path / "state")[1] for path in (straight, run))
            assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
            assert not [*run.glob("state/.step_*")] and not [*run.glob(".pack-*")]


@pytest.mark.full
def test_a_process_that_is_killed_while_it_writes_is_gone_on_with_by_two(tmp_path_factory):
    folder = several(tmp_path_factory, "killed_writing")
    out = folder / "run"
    assert [path.name[:15] for path in out.glob("state/.*")] == [".step_00000003-"]  # half of it, without its name
    assert states.newest_plan(out / "state")["step"] == 2
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(HERE / "several.py"), str(folder), "resumed"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    assert furthest(told(out), told(folder / "straight")) < TOLERANCE
    (*_, start) = (e for e in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if e["event"] == "start")
    assert (start["step"], start["processes"]) == (2, 2)
    one, other = (load_file(path / "pack" / "model.safetensors") for path in (out, folder / "straight"))
    assert max(float((one[k] - other[k]).abs().max()) for k in one) < 1e-4
    assert not [*out.glob("state/.*")]


@pytest.mark.full
def test_divided_layers_are_compiled_in_bfloat16(tmp_path_factory):
    ran = several(tmp_path_factory, "compiled")
    for shard in ("new", "all"):
        assert furthest(told(ran / shard), told(ran / "none")) < 0.02


def test_what_cannot_be_divided_is_named(bases, tmp_path):
    with pytest.raises(XFusionError, match="shard 'both' is not one of none, new, all"):
        train(bases["llama"], tmp_path, shard="both")


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


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_itself_writes_the_state_and_what_is_said_goes_on(tmp_path, number):
    """It hands the signal to its processes, waits, and ends with 1 whatever they end with."""
    make_base("llama", tmp_path / "base")
    out = tmp_path / "run"
    options = "--data emoji:12 --steps 40 --preview-every 0 --device cpu --json --stages.0.mixture.draw 4 --no-compile"
    options += " --stages.0.mixture.caption 4 --model.fusion.stride 1 --model.fusion.mlp None"
    options += f" --model.backbone.source {tmp_path / 'base'} -o {out}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "xfusion.apps.cli", "train", "xfusion", *options.split()]
    launcher = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while not (out / "log.jsonl").is_file() or len(told(out)) < 3:
        assert time.monotonic() < until and launcher.poll() is None
        time.sleep(0.1)
    launcher.send_signal(number)
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    plan, steps = states.newest_plan(out / "state"), [e["step"] for e in told(out)]
    assert steps == list(range(plan["step"])) and 3 <= plan["step"] < 40 and (out / "pack" / "config.json").is_file()
    (line,) = (line for line in said.splitlines() if line.startswith("xfusion: "))
    stopped, _, again = line.partition("; go on with: ")
    assert stopped == f"xfusion: training stopped at step {plan['step']}"
    name, *arguments = shlex.split(again)
    assert name == "torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    assert [e["step"] for e in told(out)] == list(range(40))


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
    assert alone.row_slice(5) is None and alone.is_first and alone.broadcast(3) == 3 and alone.gather(3) == [3]
    for rows in (0, 1, 5, 8):
        parts = []
        for rank in range(4):
            alone.count, alone.rank = 4, rank
            parts.append(list(range(rows))[alone.row_slice(rows)])
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
        source or Noise(),
        model.image,
        (16,),
        backbone.encode,
        backbone.begin_ids,
        backbone.end_ids[0],
        config,
        0,
        share,
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

    ahead = Prefetcher(make)
    assert [ahead.take(0), ahead.take(1), ahead.take(2)] == [0, 1, 4]
    with pytest.raises(XFusionError, match="step 3 cannot be made"):
        ahead.take(3)
    assert ahead.take(7) == 49  # any step, as a resumed run asks
    ahead.close()
    assert made[:4] == [0, 1, 2, 3] and 7 in made
