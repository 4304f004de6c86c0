"""Under torchrun the reason of a failure is the last that is printed: torchrun's report, which is long, ends with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import xfusion
from xfusion.apps import cli
from xfusion.data.sequence import XFusionError
from xfusion.training.stopping import Interrupted


@pytest.fixture
def error_file(tmp_path, monkeypatch):
    """The file that torchrun gives each process."""
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    return path


def reported(error_file):
    """The end of torchrun's report about a process that left this file."""
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(error_file))
    report = ChildFailedError("xfusion.apps.cli", {0: failure}).format_msg().strip().splitlines()
    assert "Traceback" not in str(report) and report[-1].strip("=") == ""
    return report[-2].strip()


def test_a_refusal_ends_the_report(error_file, capsys):
    assert cli.main(["show", "nothing-of-this-name"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("xfusion: 'nothing-of-this-name' is neither")
    assert reported(error_file) == f"traceback : {said}"


def test_a_process_that_says_nothing_reports_the_same(error_file, capsys, monkeypatch):
    """The first process printed it; whichever of them fails first, the report ends with it."""
    error = XFusionError("runs/one already holds a run:\npass --resume")
    error.reported_elsewhere = True

    def refuse(argv):
        raise error

    monkeypatch.setattr(cli, "REPORT_WAIT", 0)
    monkeypatch.setattr(cli, "_run", refuse)
    assert cli.main(["train", "xfusion"]) == 2 and capsys.readouterr() == ("", "")
    assert reported(error_file) == "traceback : xfusion: runs/one already holds a run: pass --resume"


def test_a_stopped_run_reports_how_it_goes_on(error_file, capsys, monkeypatch):
    def stop(argv):
        raise Interrupted("training stopped at step 3; go on with --resume", 143)

    monkeypatch.setattr(cli, "_run", stop)
    assert cli.main(["train", "xfusion", "-o", "run"]) == 143
    assert reported(error_file) == f"traceback : {capsys.readouterr().err.strip()}"


@pytest.mark.parametrize("path", ["", "missing/error.json"])
def test_without_such_a_file_the_line_is_printed_as_ever(monkeypatch, capsys, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", path)
    assert cli.main(["show", "nothing-of-this-name"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.full
def test_torchrun_itself_ends_with_the_line(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "xfusion.apps.cli", "train", "xfusion", "--data", "nowhere", "--device", "cpu", "-o", "run"]
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment = kept | {"PYTHONPATH": str(Path(xfusion.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    *_, last, rule = done.stderr.strip().splitlines()
    assert done.returncode == 1 and rule.strip("=") == ""
    assert last.strip().startswith("traceback : xfusion: ") and "nowhere" in last
    assert last.partition(" : ")[2] in done.stderr.splitlines()  # as it was printed


@pytest.mark.full
@pytest.mark.parametrize(
    ("how", "found"), [(["--multi_gpu"], {"2 0 [1]", "2 1 [1]"}), (["--cpu"], {"1 0 [0]"})], ids=str
)
def test_accelerate_sets_what_torchrun_does(tmp_path, how, found):
    """With --multi_gpu it starts several processes, also without a GPU; with --cpu it starts one, whatever their number."""
    script = tmp_path / "count.py"
    script.write_text(
        "from xfusion.training.processes import Processes\n"
        "processes = Processes()\n"
        "print(processes.count, processes.rank, processes.largest(processes.rank), flush=True)\n"
        "processes.close()\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, "--num_processes", "2", "--num_machines", "1"]
    command += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", str(script)]
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment = kept | {"PYTHONPATH": str(Path(xfusion.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split("\n")) - {""} == found
