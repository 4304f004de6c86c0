"""Curves and previews in wandb and trackio: what they are told, and that a run never depends on them."""

import json
import logging
import sys
import threading
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
from contracts.table import Noise
from training.runs import StopAt, log, step_records, train

from xfusion.data.sequence import XFusionError
from xfusion.training.loop import Interrupted
from xfusion.training.trackers import FINISH_SECONDS, LOGIN_SECONDS

PROMPTS = ("a red square",)


class Recorder(ModuleType):
    """A library of the same calls that only records them; ``fails`` names a call that raises."""

    def __init__(self, name, fails=None):
        super().__init__(name)
        self.calls, self.fails = [], fails
        self.Settings, self.Image = SimpleNamespace, lambda picture: ("image", picture.size)
        self.init, self.log, self.finish = (partial(self.record, call) for call in ("init", "log", "finish"))

    def record(self, call, *values, **named):
        print(f"{self.__name__} says something")
        if call == self.fails:
            raise ConnectionError("no network\nat all")
        self.calls.append((call, values, named))

    def named(self, call):
        return [(values, named) for name, values, named in self.calls if name == call]


@pytest.fixture
def install(monkeypatch):
    def install(name, **settings):
        module = Recorder(name, **settings)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    return install


def test_both_are_told_what_tensorboard_is(bases, tmp_path, install, capsys):
    modules = install("wandb"), install("trackio")
    out = tmp_path / "noise"
    train(
        bases["llama"], out, track=("wandb", "trackio"), preview_every=1e-6, preview_prompts=PROMPTS, command="as asked"
    )
    run_id = (out / "tracker_id").read_text()
    steps = {e["step"]: e for e in log(out)}
    curves = [
        {f"loss/{name}": value for name, value in steps[step]["losses"].items()}
        | {"rate": steps[step]["rate"], "samples_per_second": steps[step]["samples_per_second"]}
        for step in (0, 10)
    ]
    for module in modules:
        (first, begun), *_ = module.named("init")
        assert first == () and [call for call, *_ in module.calls].count("init") == 1
        assert begun["project"] == "xfusion" and begun["name"] == f"noise-{run_id}" and begun["resume"] == "allow"
        assert begun["config"]["command"] == "as asked" and begun["config"]["recipe"]["data"] == "noise"
        json.dumps(begun["config"])
        points = [(step, values) for (values,), named in module.named("log") for step in [named["step"]]]
        assert [point for point in points if "rate" in point[1]] == [(0, curves[0]), (10, curves[1])]
        pictures = [point for point in points if "preview" in point[1]]
        assert pictures == [(e["step"], {"preview": ("image", (16, 16))}) for e in log(out, "preview")]
        assert pictures[-1][0] == 12
        assert [step for step, _ in points] == sorted(step for step, _ in points)  # wandb drops a step that goes back
        assert module.calls[-1] == ("finish", (), {})
    begun = modules[0].named("init")[0][1]
    assert (begun["id"], begun["dir"]) == (run_id, str(out))
    limits = {"console": "off", "finish_timeout": FINISH_SECONDS, "login_timeout": LOGIN_SECONDS}
    assert vars(begun["settings"]) == limits
    assert {"id", "dir", "settings"}.isdisjoint(modules[1].named("init")[0][1])
    heard = capsys.readouterr()  # the object of `--json` is alone on stdout
    assert "says something" not in heard.out and "trackio says something" in heard.err


def test_none_is_asked_for_by_default(bases, tmp_path, install):
    module = install("wandb")
    train(bases["llama"], tmp_path, steps=1)
    assert module.calls == [] and not (tmp_path / "tracker_id").exists()


def test_a_project_is_named_by_the_environment(bases, tmp_path, install, monkeypatch):
    modules = install("wandb"), install("trackio")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("TRACKIO_PROJECT", "yours")
    train(bases["llama"], tmp_path, steps=1, track=("wandb", "trackio"))
    assert [module.named("init")[0][1]["project"] for module in modules] == ["mine", "yours"]


def test_a_stopped_run_is_finished_and_a_resumed_one_is_the_same(bases, tmp_path, install):
    module = install("wandb")
    with pytest.raises(Interrupted):
        train(bases["llama"], tmp_path, track=("wandb",), listener=StopAt(4))
    assert module.calls[-1][0] == "finish"
    train(bases["llama"], tmp_path, track=("wandb",), resume=True)
    first, second = module.named("init")
    assert first == second or (first[1]["id"], first[1]["name"]) == (second[1]["id"], second[1]["name"])
    assert [named["step"] for _, named in module.named("log")] == [0, 10] and module.calls[-1][0] == "finish"


def test_a_new_run_in_the_same_folder_is_another(bases, tmp_path, install):
    module = install("wandb")

    def fail(event):
        raise RuntimeError("before the first state")

    with pytest.raises(RuntimeError, match="before the first state"):
        train(bases["llama"], tmp_path, track=("wandb",), listener=fail)
    assert module.calls[-1][0] == "finish"
    train(bases["llama"], tmp_path, steps=1, track=("wandb",))
    (_, first), (_, second) = module.named("init")
    assert first["id"] != second["id"]


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_what_a_tracker_raises_is_told_once_and_stops_nothing(bases, tmp_path, install, caplog, call):
    failing, other = install("wandb", fails=call), install("trackio")
    with caplog.at_level(logging.WARNING):
        train(bases["llama"], tmp_path / "run", track=("wandb", "trackio"))
    told = [r.message for r in caplog.records if "wandb" in r.message]
    assert told == ["wandb stopped (ConnectionError: no network): the run goes on without it"]
    assert len(log(tmp_path / "run")) == 12 and (tmp_path / "run" / "pack" / "config.json").exists()
    assert len(other.named("log")) == 2 and other.calls[-1][0] == "finish"
    assert len(failing.calls) == {"init": 0, "log": 1, "finish": 3}[call]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_one_that_is_not_installed_is_refused_before_anything_is_made(bases, tmp_path, monkeypatch, name):
    message = f"track {name} needs the library {name}, which is not installed: pip install {name}"
    monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    with pytest.raises(XFusionError) as error:
        train(bases["llama"], tmp_path / "run", track=(name,))
    assert str(error.value) == message and not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, name, ModuleType(name))  # what a folder of that name is imported as
    with pytest.raises(XFusionError) as error:
        train(bases["llama"], tmp_path / "run", track=(name,))
    assert str(error.value) == message


def test_another_name_is_refused(bases, tmp_path):
    with pytest.raises(XFusionError) as error:
        train(bases["llama"], tmp_path / "run", track=("tensorboard",))
    assert str(error.value) == "track 'tensorboard' is not one of wandb, trackio"


def test_the_run_is_the_same_to_the_bit_with_and_without(bases, tmp_path, install):
    install("trackio")
    train(bases["llama"], tmp_path / "with", track=("trackio",))
    train(bases["llama"], tmp_path / "without")
    assert step_records(tmp_path / "with") == step_records(tmp_path / "without")


# --------------------------------------------------------------------------------------------------- the real libraries


def test_trackio_keeps_a_run_and_continues_it(bases, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    out = tmp_path / "noise"
    asked = {"track": ("trackio",), "preview_every": 1e-6, "preview_prompts": PROMPTS}
    with pytest.raises(Interrupted):
        train(bases["llama"], out, **asked, listener=StopAt(4))
    train(bases["llama"], out, **asked, resume=True)
    assert capsys.readouterr().out == ""
    (run,) = trackio.Api().runs("xfusion")
    assert run.name == f"noise-{(out / 'tracker_id').read_text()}" and run.config["recipe"]["data"] == "noise"
    points = trackio.run.SQLiteStorage.get_logs("xfusion", run.name)
    rates = [(point["step"], point["rate"]) for point in points if "rate" in point]
    assert rates == [(e["step"], e["rate"]) for e in log(out) if e["step"] % 10 == 0]
    assert {point["step"] for point in points if "preview" in point} == {e["step"] for e in log(out, "preview")}
    assert not [thread for thread in threading.enumerate() if "trackio" in thread.name.lower()]


def test_wandb_without_a_network_keeps_a_run_in_the_folder(bases, tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb", reason="wandb is not installed").teardown()  # which forgets an earlier environment
    monkeypatch.setenv("WANDB_MODE", "offline")
    asked = {"track": ("wandb",), "preview_every": 1e-6, "preview_prompts": PROMPTS}
    with pytest.raises(Interrupted):
        train(bases["llama"], tmp_path / "run", **asked, listener=StopAt(4))
    train(bases["llama"], tmp_path / "run", **asked, resume=True)
    assert capsys.readouterr().out == ""
    run_id = (tmp_path / "run" / "tracker_id").read_text()
    before, after = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert b"loss/flow_matching" in before.read_bytes() and b"loss/flow_matching" in after.read_bytes()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/preview_*.png"))


@pytest.mark.full
def test_wandb_that_reaches_nothing_costs_the_run_nothing(bases, tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb", reason="wandb is not installed").teardown()
    for name, value in (
        ("MODE", "online"),
        ("BASE_URL", "http://127.0.0.1:9"),
        ("API_KEY", "0" * 40),
        ("INIT_TIMEOUT", "5"),
    ):
        monkeypatch.setenv(f"WANDB_{name}", value)
    train(bases["llama"], tmp_path / "run", track=("wandb",), source=Noise())
    assert len(log(tmp_path / "run")) == 12
    (told,) = [r.message for r in caplog.records if r.message.startswith("wandb stopped")]
    assert told.endswith("the run goes on without it")
