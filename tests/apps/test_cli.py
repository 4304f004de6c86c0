"""The command line as people and programs meet it."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from functools import partial
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.table import WINDOW, Noise, make_base, make_model, tokenizer
from training import runs

import xfusion
import xfusion.fusion.base as fusion_base
from xfusion import checkpoint
from xfusion.apps import cli
from xfusion.apps.commands import doctor
from xfusion.apps.commands.pictures import file_name
from xfusion.apps.commands.show import training_memory
from xfusion.backbone import Backbone
from xfusion.backbone.attention import choose_attention
from xfusion.data.mixture import MixtureConfig
from xfusion.data.templates import Templates
from xfusion.model import Model
from xfusion.objectives.base import NoObjective
from xfusion.recipes.base import find, names
from xfusion.training.loop import Interrupted

SOURCE = Path(xfusion.__file__).parents[1]


def start(*argv, **options):
    """The command line in a process of its own."""
    paths = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "xfusion.apps.cli", *map(str, argv)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        # Whoever runs the tests in the background of a shell ignores Ctrl-C, and children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


# ---------------------------------------------------------------------------------------------------------- fixtures


class Ran(NamedTuple):
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        assert self.out.count("\n") == 1, "one JSON object on one line"
        return json.loads(self.out)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return make_base("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def pack(base, tmp_path_factory):
    """A tiny pack on a tiny random Llama."""
    folder = tmp_path_factory.mktemp("packs") / "tiny"
    make_model(Backbone.load(str(base))).save_pretrained(folder, training={"data_licence": "none needed", "steps": 0})
    return str(folder)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder with a picture, a text and a broken picture."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("red.png")
    Path("text.png").write_text("no picture")
    Path("broken.png").write_bytes(Path("red.png").read_bytes()[:60])
    return tmp_path


@pytest.fixture
def photos(here):
    """A folder of six pictures with captions."""
    noise, folder = Noise(6), here / "photos"
    folder.mkdir()
    for i, example in enumerate(noise.examples):
        noise.picture(i, 32).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(example.captions[0])
    return folder


@pytest.fixture
def run(capsys):
    """Call the command line in this process: its answer, or one line of complaint."""

    def call(*argv):
        capsys.readouterr()
        code = cli.main([str(a) for a in argv])
        said = capsys.readouterr()
        if code == 2:
            assert said.out == ""
            assert said.err.startswith("xfusion: ")
            assert said.err.count("\n") == 1, said.err
            assert "Traceback" not in said.err
        return Ran(code, said.out, said.err)

    return call


@pytest.fixture(scope="session")
def small(base):
    """Settings of a run that takes a second."""
    return [
        *("--model.backbone.source", str(base), "--model.image.patch", "4", "--model.image.sizes", "16"),
        *("--model.fusion.stride", "2", "--model.fusion.mlp", "40", "--no-compile", "--preview-every", "0"),
        *("--stages.0.mixture.draw", "4", "--stages.0.mixture.caption", "4"),
    ]


# ------------------------------------------------------------------------------------------------------------- help


def test_help_names_every_verb(run):
    ran = run("--help")
    assert ran.code == 0
    assert all(verb in ran.out for verb in cli.VERBS)
    assert run().out == ran.out


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_explains_itself(run, verb):
    ran = run(*verb.split(), "--help")
    assert ran.code == 0
    assert "--json" in ran.out
    assert (cli.VERBS[verb].__doc__ or "?").split("\n")[0].rstrip(".") in " ".join(ran.out.split())


def test_help_of_a_recipe_has_its_settings_with_their_docstrings(run):
    text = " ".join(run("train", "xfusion", "--help").out.replace("│", " ").split())
    assert "--model.fusion.stride" in text and "every stride-th layer" in text
    assert "--stages.0.rate" in text and "--data" in text and "--model.image.codec" in text


def test_help_does_not_import_torch():
    code = "import sys; from xfusion.apps.cli import main; main([]); main(['train', '-h']); sys.exit('torch' in sys.modules)"
    paths = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, capture_output=True)
    assert done.returncode == 0


WITHOUT_EXTRAS = """
import importlib, json, sys
blocked, modules = json.load(sys.stdin)
sys.modules.update(dict.fromkeys(blocked))
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(f"{module}: {error}")
"""
OF_EXTRAS = ("xfusion.apps.server", "xfusion.apps.web", "xfusion.evaluation.adapters")
"""Folders whose modules need the extra that they are about."""


def test_everything_else_is_imported_without_extras():
    project = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [line for lines in project["optional-dependencies"].values() for line in lines]
    of_extras = {re.split(r"[^\w-]", line)[0].replace("_", "-").lower() for line in requirements} - {"xfusion"}
    blocked = [
        module
        for module, given in packages_distributions().items()
        if of_extras & {name.lower().replace("_", "-") for name in given}
    ]
    assert {"fastapi", "gradio", "peft", "soundfile", "torchmetrics", "pytest"} <= set(blocked)
    files = [path.relative_to(SOURCE).with_suffix("") for path in sorted((SOURCE / "xfusion").rglob("*.py"))]
    modules = [".".join(file.parts).removesuffix(".__init__") for file in files]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS], input=json.dumps([blocked, modules]), capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(SOURCE)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "xfusion.apps.server.app: " in done.stdout, "nothing is blocked"
    assert not [line for line in done.stdout.splitlines() if not line.startswith(OF_EXTRAS)]


def test_version(run):
    assert run("--version").out == f"xfusion {xfusion.__version__}\n"


# ------------------------------------------------------------------------------------------------------------ errors

COMPLAINTS = [
    ("generte", "did you mean 'generate'?"),
    ("data", "did you mean 'data check'?"),
    ("data chekc photos", "did you mean 'data check'?"),
    ("frobnicate", "unknown verb 'frobnicate'; there are demo, train"),
    ("generate", "MODEL, PROMPT is missing"),
    ("generate PACK", "PROMPT is missing"),
    ("generate PACK apple --stpes 3", "unknown option --stpes; did you mean '--steps'?"),
    ("generate PACK apple --stpes=3", "unknown option --stpes; did you mean '--steps'?"),
    ("generate PACK a red apple", "unexpected argument 'red'"),
    ("generate PACK apple --steps many", "--steps: not a whole number: 'many'"),
    ("generate PACK apple --steps", "--steps"),
    ("generate PACK apple --steps 0", "--steps 0: at least 1"),
    ("generate PACK apple -n 0", "-n 0"),
    ("generate PACK apple --seed -1", "--seed -1"),
    ("generate PACK apple --guidance nan", "--guidance nan"),
    ("generate PACK apple --size 4000", "out of reach of the trained sizes"),
    ("generate PACK apple --size 0", "at least 1 pixel"),
    ("generate PACK apple --device cuda:99", "leave --device out"),
    ("generate PACK apple --device toaster", "'toaster' is not one of auto, cpu"),
    ("generate PACK apple -o apple.gif", "cannot write .gif files"),
    ("generate PACK apple -o red.png/", "red.png is a file, not a folder"),
    ("generate PACK apple -o red.png/a.png", "red.png is a file, not a folder"),
    ("generate PACK apple -o /proc/apple.png", "/proc/apple.png cannot be written: "),
    ("generate nothing apple", "there is no pack 'nothing'"),
    ("generate ./nothing apple", "there is no pack './nothing'"),
    ("generate . apple", "not a pack"),
    ("caption PACK", "at least one picture"),
    ("caption PACK red.png missing.png", "missing.png: no such file"),
    ("caption PACK .", ".: is a folder: name the files in it"),
    ("caption PACK text.png", "text.png: is not a picture: its content is text"),
    ("caption PACK broken.png", "broken.png"),
    ("generate PACK apple --solver huen", "solver 'huen' is not one of euler, heun, multistep"),
    ("caption PACK red.png --max-tokens 0", "--max-tokens 0"),
    ("verify nothing", "there is no pack 'nothing'"),
    ("show xfuson", "did you mean 'xfusion'?"),
    ("show nothing.py:recipe", "there is no file nothing.py"),
    ("evaluate PACK --suite emojy", "did you mean 'emoji'?"),
    ("evaluate PACK --set draw", "write NAME=VALUE"),
    ("evaluate PACK --set max_drwan=3", "did you mean 'max_drawn'?"),
    ("evaluate nothing --set max_drawn=many", "max_drawn is 'many', and has to be int or null"),
    ("evaluate nothing --set features=1", "features is 1, and has to be bool"),
    ("evaluate nothing --set part=half", "part is 'half', and has to be 'all' or 'validation' or 'test'"),
    ("data check missing", "missing: no such folder or file"),
    ("doctor ./missing", "no such folder"),
    ("train", "RECIPE is missing"),
    ("train --minutes 1 xfusion", "name the recipe before --minutes"),
    ("train xfuson", "did you mean 'xfusion'?"),
    ("train xfusion xfuse", "unexpected argument 'xfuse'"),
    ("train xfusion --model.fusion.strid 3", "did you mean '--model.fusion.stride'?"),
    ("train xfusion --model.fusion.stride=x", "--model.fusion.stride: not a whole number: 'x'"),
    ("train xfusion --stages.0.schedule sine", "'sine'"),
    (
        "train xfusion --model.image.codec pixel",
        "codec 'pixel' is not one of autoencoder_kl, autoencoder_tiny, causal_qu",
    ),
    ("train xfusion --model.image.codec autoencoder_kl", "autoencoder_kl:source:subfolder"),
    ("train xfusion --minutes 1 --steps 1", "not both"),
    ("train xfusion --minutes 0", "--minutes 0"),
    ("train xfusion --steps 0", "--steps 0"),
    ("train xfusion --resume -o nothing", "holds no run to resume"),
    ("train xfusion --from nothing", "there is no pack 'nothing'"),
    (
        "train flamingo --from PACK",
        "was trained with DualTower, the recipe flamingo has CrossAttention: name the recipe",
    ),
    ("train flamingo(every", "recipe 'flamingo(every': write flamingo(NAME=VALUE), such as single_tower(stride=3)"),
    ("train xfusion --device cuda:99 --steps 1", "leave --device out"),
    ("demo --minutes 0", "--minutes 0"),
]


@pytest.mark.parametrize(("line", "complaint"), COMPLAINTS, ids=[line for line, _ in COMPLAINTS])
def test_bad_input_is_one_line(run, here, pack, line, complaint):
    ran = run(*(pack if word == "PACK" else word for word in line.split()))
    assert ran.code == 2
    assert complaint in ran.err


@pytest.mark.full
def test_the_embedded_base_is_unpacked_without_a_word_in_a_pipe(run, here, monkeypatch):
    monkeypatch.setenv("XFUSION_CACHE", str(here / "cache"))
    assert "missing: no such folder or file" in run("data", "check", "missing").err
    assert len(list((here / "cache" / "bases").iterdir())) == 1


FILLED = {
    "demo": "",
    "train": "xfusion",
    "train opening": "PACK",
    "generate": "PACK apple",
    "export": "PACK --to peft",
    "draw": "PACK --prompts text.png",
    "compare": "xfusion xfuse",
    "data encode": "emoji",
    "data recaption": "emoji --with PACK",
}
"""Verbs that fill a folder, and what else they need."""


def test_the_verbs_that_fill_a_folder_are_all_tried():
    outs = {name: [f.type for f in dataclasses.fields(verb) if f.name == "out"] for name, verb in cli.VERBS.items()}
    assert {name for name, types in outs.items() if types and "FOLDER" in types[0]} == set(FILLED)


@pytest.mark.parametrize("verb", list(FILLED))
@pytest.mark.parametrize("out", ["red.png/", "red.png/run/"])
def test_a_file_where_a_folder_would_be_is_named_before_anything_is_computed(run, here, pack, monkeypatch, verb, out):
    monkeypatch.setattr("xfusion.checkpoint.load", None)
    words = [pack if word == "PACK" else word for word in FILLED[verb].split()]
    ran = run(*verb.split(), *words, "-o", out)
    assert ran.code == 2 and "red.png is a file, not a folder" in ran.err
    assert Path("red.png").is_file() and sorted(path.name for path in here.iterdir()) == [
        "broken.png",
        "red.png",
        "text.png",
    ]


WRITTEN = {
    "verify": "PACK -o",
    "evaluate": "PACK -o",
    "judge": "drawn --by PACK -o",
    "index": "photos PACK -o",
    "bench": "-o",
    "data check": "photos --sheet",
}
"""Verbs that write a file at their end, up to its name."""


@pytest.mark.parametrize("verb", [*FILLED, *WRITTEN, "generate to a file"])
def test_a_place_that_cannot_be_written_is_named_before_anything_is_computed(run, photos, pack, monkeypatch, verb):
    Path("drawn").mkdir()
    Path("drawn/manifest.json").write_text("{}")
    for name in (
        *("checkpoint.load", "recipes.base.train", "comparison.compare", "apps.demo.run", "data.latents.encode"),
        *("data.sources.check", "apps.commands.bench.Bench._run_in_own_process"),
    ):
        monkeypatch.setattr(f"xfusion.{name}", None)
    if verb == "generate to a file":
        line, out = "generate PACK apple -o", "/proc/new/apple.png"
    elif verb in WRITTEN:
        line, out = f"{verb} {WRITTEN[verb]}", "/proc/new/result.json"
    else:
        line, out = f"{verb} {FILLED[verb]} -o", "/proc/new"
    ran = run(*(pack if word == "PACK" else word for word in line.split()), out)
    assert ran.code == 2 and f"{out} cannot be written: " in ran.err


@pytest.mark.parametrize("line", ["verify PACK --record", "evaluate PACK --record", "train opening PACK"])
def test_a_pack_that_cannot_be_replaced_is_named_before_anything_is_computed(run, pack, monkeypatch, line):
    def refused(dir):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

    monkeypatch.setattr("xfusion.storage.tempfile.TemporaryFile", refused)
    monkeypatch.setattr("xfusion.checkpoint.load", None)
    ran = run(*(pack if word == "PACK" else word for word in line.split()))
    assert ran.code == 2 and f"{Path(pack).parent} cannot be written: Permission denied; make room" in ran.err


def test_bad_input_is_one_line_for_programs_too(run, here, pack):
    assert run("caption", pack, "missing.png", "--json").code == 2


def test_a_long_prompt_is_refused_with_both_lengths(run, here, pack):
    ran = run("generate", pack, "x" * 4000)
    assert ran.code == 2
    assert "4000 tokens" in ran.err and "512" in ran.err


def test_a_prompt_that_is_no_text_is_refused(run, here, pack):
    assert "not valid UTF-8" in run("generate", pack, "\udcff").err


def test_a_bug_is_not_hidden(run, monkeypatch):
    monkeypatch.setattr(cli.List, "run", lambda *_: [][0])
    with pytest.raises(IndexError):
        run("list")


def test_a_compiled_run_says_how_often_it_compiled(run, here, photos, small, monkeypatch):
    """Graphs, not machine code."""
    monkeypatch.setattr(fusion_base.torch, "compile", partial(torch.compile, backend="eager"))
    fusion_base.compiled.cache_clear()
    try:
        call = [
            "train",
            "xfusion",
            "--data",
            photos,
            "--steps",
            "2",
            *(word for word in small if word != "--no-compile"),
        ]
        assert re.search(
            r"graphs +[1-9]\d* compiled, 0 of them behind the first 10 steps\n", run(*call, "-o", "one").out
        )
        assert run(*call, "--no-compile", "-o", "other", "--json").json["graphs"] == 0
    finally:
        fusion_base.compiled.cache_clear()
        torch.compiler.reset()


def test_what_another_process_tells_is_not_told_twice(monkeypatch, small, capsys):
    def refuse(*_, **__):
        error = xfusion.XFusionError("there is a run already")
        error.reported_elsewhere = True
        raise error

    monkeypatch.setattr("xfusion.recipes.base.train", refuse)
    monkeypatch.setattr(cli, "REPORT_WAIT", 0.0)
    assert cli.main(["train", "xfusion", *small]) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("code", [130, 143])
def test_ctrl_c_and_sigterm_say_how_to_resume(run, monkeypatch, small, code):
    def stop(*_, **__):
        raise Interrupted("training stopped at step 3; go on with --resume", code)

    monkeypatch.setattr("xfusion.recipes.base.train", stop)
    ran = run("train", "xfusion", *small, "-o", "my run")
    assert ran.code == code
    assert ran.err.startswith("xfusion: training stopped at step 3; go on with: xfusion train xfusion")
    assert "'my run' --resume" in ran.err and ran.err.count("\n") == 1
    # Under torchrun the first process alone says so, and what it says starts as many again.
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    said = "; go on with: torchrun --standalone --nproc-per-node 4 -m xfusion.apps.cli train xfusion"
    assert said in run("train", "xfusion", *small, "-o", "my run").err
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "torchrun ... --nproc-per-node 2 -m" in run("train", "xfusion", *small, "-o", "my run").err
    monkeypatch.setenv("RANK", "1")
    ran = run("train", "xfusion", *small, "-o", "my run")
    assert (ran.code, ran.err) == (code, "")


# ---------------------------------------------------------------------------------------------------------- generate


def test_one_picture(run, here, pack):
    ran = run("generate", pack, "a red apple", "--steps", "2", "--json")
    assert ran.code == 0
    assert ran.json["files"] == ["a-red-apple.png"]
    assert ran.json["seeds"] == [0] and ran.json["size"] == ran.json["drawn_at"] == 16
    assert ran.err == "a-red-apple.png\n"
    with Image.open("a-red-apple.png") as picture:
        assert picture.size == (16, 16)
        text = picture.text
    assert text["prompt"] == "a red apple"
    assert (text["seed"], text["steps"], text["guidance"]) == ("0", "2", "3.0")
    assert text["pack_fingerprint"] == xfusion.load(pack).fingerprint


def test_text_for_people_goes_to_stdout_without_json(run, here, pack):
    ran = run("generate", pack, "apple", "--steps", "1")
    assert ran.out == "apple.png\n"


def test_a_default_name_overwrites_nothing(run, here, pack):
    for name in ("apple.png", "apple-2.png", "apple-3.png"):
        assert run("generate", pack, "apple", "--steps", "1").out == f"{name}\n"


def test_a_file_is_a_grid(run, here, pack):
    ran = run("generate", pack, "apple", "-n", "5", "-o", "deep/grid.png", "--steps", "1", "--json")
    assert ran.json["files"] == ["deep/grid.png"]
    with Image.open("deep/grid.png") as grid:
        assert grid.size == (3 * 17 - 1, 2 * 17 - 1)
        assert grid.text["seed"] == "0 1 2 3 4"
    assert os.listdir("deep") == ["grid.png"]


@pytest.mark.parametrize("out", ["new/", "new", "there", "with.dot/"])
def test_a_folder_gets_a_file_per_picture(run, here, pack, out):
    Path("there").mkdir()
    ran = run("generate", pack, "Red Apple!", "-n", "2", "--seed", "7", "-o", out, "--steps", "1", "--json")
    folder = out.rstrip("/")
    assert ran.json["files"] == [f"{folder}/red-apple-seed7.png", f"{folder}/red-apple-seed8.png"]
    assert sorted(os.listdir(folder)) == ["red-apple-seed7.png", "red-apple-seed8.png"]
    with Image.open(f"{folder}/red-apple-seed8.png") as picture:
        assert picture.text["seed"] == "8"


def test_a_picture_of_a_grid_is_the_single_of_its_seed(run, here, pack):
    run("generate", pack, "apple", "-n", "2", "-o", "grid.png", "--steps", "2")
    run("generate", pack, "apple", "--seed", "1", "-o", "one.png", "--steps", "2")
    with Image.open("grid.png") as grid, Image.open("one.png") as one:
        other = grid.crop((17, 0, 33, 16))
        assert max(abs(a - b) for a, b in zip(other.tobytes(), one.convert("RGB").tobytes(), strict=True)) <= 2


@pytest.mark.parametrize(("name", "kind"), [("a.jpg", "JPEG"), ("a.webp", "WEBP"), ("A.PNG", "PNG")])
def test_other_formats(run, here, pack, name, kind):
    assert run("generate", pack, "apple", "-o", name, "--steps", "1").code == 0
    with Image.open(name) as picture:
        assert picture.format == kind


def test_another_size_is_said(run, here, pack):
    ran = run("generate", pack, "apple", "--size", "40", "--steps", "1")
    assert "drawn at 16 px" in ran.out and "resized to 40 px" in ran.out
    with Image.open("apple.png") as picture:
        assert picture.size == (40, 40)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("красное яблоко", "красное-яблоко"),
        ("", "picture"),
        ("../../etc/passwd", "etc-passwd"),
        ("苹果 \U0001f34e", "苹果"),
    ],
)
def test_prompts_of_all_kinds(run, here, pack, prompt, name):
    assert file_name(prompt) == name
    assert run("generate", pack, prompt, "--steps", "1").code == 0
    with Image.open(f"{name}.png") as picture:
        assert picture.text["prompt"] == prompt


def test_a_run_folder_stands_for_its_pack(run, here, pack):
    Path("run").mkdir()
    Path("run/pack").symlink_to(pack)
    assert run("generate", "run", "apple", "--steps", "1").code == 0


# ------------------------------------------------------------------------------------------------- the other verbs


def test_caption(run, here, pack):
    ran = run("caption", pack, "red.png", "red.png", "--max-tokens", "4", "--json")
    assert [c["image"] for c in ran.json["captions"]] == ["red.png", "red.png"]
    assert ran.json["captions"][0]["caption"] == ran.json["captions"][1]["caption"]
    asked = run("caption", pack, "red.png", "--question", "What is this?", "--max-tokens", "4", "--json").json
    assert asked["question"] == "What is this?"


PARTS_OF_A_PROOF = [
    "loading the base afresh",
    "base weights",
    "base alone",
    "text path",
    "fused stack",
    "text before a picture",
    "fused stack, new weights randomised",
    "text before a picture, new weights randomised",
]


def test_verify(run, here, pack, monkeypatch):
    monkeypatch.setattr("xfusion.evaluation.verify.NEW_TOKENS", 3)
    ran = run("verify", pack, "-o", "proof.json", "--json")
    assert ran.code == 0
    assert ran.json["text_identical"] is True and ran.json["passed"] is True
    assert all(set(check) == {"name", "passed", "detail"} for check in ran.json["checks"])
    assert json.loads(Path("proof.json").read_text()) == ran.json
    assert "bit for bit" in ran.err
    assert ran.err.splitlines()[: len(PARTS_OF_A_PROOF)] == PARTS_OF_A_PROOF  # without a terminal, a line each
    plain = run("verify", pack)
    assert plain.err.splitlines() == PARTS_OF_A_PROOF and plain.out.splitlines()[0].startswith("ok")


def test_a_failed_proof_exits_with_1(run, here, pack, monkeypatch):
    monkeypatch.setattr("xfusion.evaluation.verify.bit_equal", lambda *_: False)
    monkeypatch.setattr("xfusion.evaluation.verify.NEW_TOKENS", 3)
    ran = run("verify", pack, "--json")
    assert ran.code == 1
    assert ran.json["text_identical"] is False
    assert "FAILED" in ran.err and "NOT the base's" in ran.err


def test_show_a_pack(run, here, pack):
    shown = run("show", pack, "--json").json
    model = xfusion.load(pack)
    assert shown["kind"] == "pack"
    assert shown["new_parameters"] == model.num_new_parameters == sum(shown["new_parts"].values())
    assert shown["frozen_parameters"] == sum(p.numel() for p in model.backbone.model.parameters())
    assert shown["fusion"]["layers_with_blocks"] == [0, 1, 2, 3]
    assert shown["image"]["grid"] == [4, 4] and shown["image"]["tokens_per_item"] == 16
    assert shown["image"]["token_width"] == 48
    assert shown["memory"]["total"] > 5 * 4 * shown["new_parameters"]
    assert "besides up to 1.1 GB states of prompts, kept" in run("show", pack).out
    assert set(shown["licences"]) == {"base", "codec", "data"}
    assert "frozen" in run("show", pack).out


def test_show_tells_the_memory_on_a_base_that_is_not_here(run):
    """Frozen weights in bfloat16; new ones, their gradients, both moments and the average in float32."""
    ran = run("show", "xfusion", "--backbone", "Llama-3.2-1B", "--json")
    shown, text = ran.json, ran.err
    assert shown["frozen_parameters"] == 1_235_814_400 and shown["new_parameters"] == 46_686_400
    assert shown["memory"]["base"] == 2 * 1_235_814_400
    assert shown["memory"]["total"] == 2 * 1_235_814_400 + 5 * 4 * 46_686_400
    assert "3.4 GB: 2.5 GB base in bfloat16, 933.7 MB new weights, gradients, optimiser and average" in text
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "bench.json"
    measured = json.loads(results.read_text())["activation_checkpointing"]["full_tower"]
    kept, again = (measured[way]["predicted_activation_bytes"] for way in ("kept", "computed_again"))
    saved = f"{1 - measured['memory_over_kept']:.0%}", f"{1 - again / kept:.0%}"
    assert saved == ("36%", "84%")
    assert "compiled, the default, it saves less: a full tower 36 % of the memory where this predicts 84 %" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_copy_of_the_base_that_show_tells_is_the_one_that_training_makes(pack, monkeypatch, dtype):
    """None in the base's own precision: the engine then computes with the base's very weights."""
    model = xfusion.load(pack)
    monkeypatch.setattr("xfusion.training.precision.choose_compute_dtype", lambda device: (dtype, "as asked"))
    copy = model.training_engine(dtype, "as asked", "eager", False).backbone.model
    own = {p.data_ptr() for p in model.backbone.model.parameters()}
    held = sum(p.numel() * p.element_size() for p in copy.parameters() if p.data_ptr() not in own)
    assert training_memory(model)["base_copy_for_training"] == held
    assert bool(held) == (dtype != model.backbone.dtype)


def test_the_states_of_prompts_that_show_tells_are_those_that_training_keeps(bases, tmp_path, monkeypatch):
    base, engines, make = bases["llama"], [], Model.training_engine
    monkeypatch.setattr("xfusion.training.precision.choose_compute_dtype", lambda device: (torch.float32, "as asked"))
    monkeypatch.setattr(Model, "training_engine", lambda self, *a: engines.append(make(self, *a)) or engines[-1])
    source = Noise(40)
    source.examples = tuple(dataclasses.replace(e, captions=(f"{e.captions[0]} {e.id}",)) for e in source.examples)
    plain = Templates(caption_dropout=0, article_share=0, other_wordings=0, question_share=0)
    mixture = MixtureConfig(draw=20, caption=4, pack=2, templates=plain)
    model = runs.train(base, tmp_path, recipe_=runs.recipe(base, steps=4, mixture=mixture), source=source)
    held, without = engines[-1].text_states.num_bytes, training_memory(model)
    found = training_memory(model, source)
    assert len(engines[-1].text_states) == 40
    assert found["text_states"] == pytest.approx(held, rel=0.01)
    assert found["total"] == without["total"] + found["text_states"]
    assert without["text_states"] == 1 << 30  # of texts that are not known, what there is room for
    monkeypatch.setattr("xfusion.training.setup.TEXT_STATES_BYTES", held // 3)
    assert training_memory(model, source)["text_states"] == held // 3
    monkeypatch.setattr("xfusion.training.setup.TEXT_STATES_BYTES", held // 5)  # they would not come back in time
    assert training_memory(model, source)["text_states"] == 0
    model.set_objectives(model.config.text, NoObjective.Config())  # who does not draw looks no text up
    assert training_memory(model)["text_states"] == 0


def test_show_a_recipe_of_ones_own(run, here, base):
    Path("mine.py").write_text(
        "from xfusion.model import BackboneConfig, ModelConfig\n"
        "from xfusion.training.stages import Recipe\n"
        "def mine():\n"
        f"    return Recipe(model=ModelConfig(backbone=BackboneConfig(source={str(base)!r})), data='photos')\n"
        "def wrong():\n"
        "    return 3\n"
    )
    shown = run("show", "mine.py:mine", "--json").json
    assert shown["kind"] == "recipe"
    assert shown["licences"]["data"] == "as the owner of the files says"
    assert "returns a int, not a Recipe" in run("train", "mine.py:wrong").err
    assert "has no function 'other'" in run("train", "mine.py:other").err


def test_list(run):
    listed = run("list", "--json").json
    assert set(listed) == {"recipes", "packs"}
    by_name = {recipe["name"]: recipe for recipe in listed["recipes"]}
    assert {"name", "kind", "paper", "status"} <= set(by_name["xfusion"])
    assert by_name["xfusion"]["regime"] == "strictly frozen" and by_name["lora"]["regime"] == "LoRA"
    assert by_name["xfusion"]["paper"] == "arXiv 2504.20996"
    assert all(recipe["status"] in ("reproduced", "runs", "sketch") for recipe in listed["recipes"])
    lines = [line.split() for line in run("list").out.splitlines()]
    for recipe in listed["recipes"]:
        assert [recipe["name"], recipe["status"], *recipe["summary"].split()[:2]] in [line[:4] for line in lines]


def test_a_status_has_its_committed_figures():
    """`runs`: a comparison or a command of the training log; `reproduced`: a comparison."""
    root = Path(__file__).parents[2]
    log = (root / "docs" / "training_log.md").read_text(encoding="utf-8")
    compared = {
        json.loads(path.read_text(encoding="utf-8"))["recipe"] for path in (root / "comparison").glob("*/*-seed*.json")
    }
    trained = compared | set(re.findall(r"xfusion train [\"']?(\w+)", log))
    for name in names():
        status = import_module(f"xfusion.recipes.{name}").STATUS
        assert status == "sketch" or name in (compared if status == "reproduced" else trained), (name, status)


def test_evaluate(run, here, pack, monkeypatch):
    def suite(model, *, progress, source="emoji", max_drawn=None):
        progress("drawing", 1, 1)
        scores = {"score": 0.5, "score_interval": [1 / 3, 2 / 3], "curves": {}}
        return scores | {"settings": {"source": source, "max_drawn": max_drawn}}

    monkeypatch.setenv("XFUSION_COMMIT", "0123456789abcdef")
    monkeypatch.setattr("xfusion.evaluation.suites.emoji.run", suite)
    ran = run("evaluate", pack, "--set", "source=emoji:128", "max-drawn=3", "-o", "scores.json", "--json")
    assert ran.json["score"] == 0.5
    assert ran.json["settings"]["source"] == "emoji:128" and ran.json["settings"]["max_drawn"] == 3
    assert json.loads(Path("scores.json").read_text()) == ran.json
    mine = shutil.copytree(pack, "mine")
    ran_again = run("evaluate", mine, "--set", "max_drawn=3", "--record")
    assert ran_again.code == 0 and "[0.3333, 0.6667]" in ran_again.out
    assert "| score | 0.5 |" in (Path(mine) / "README.md").read_text()
    assert checkpoint.read_config(Path(mine))["scores"]["settings"]["max_drawn"] == 3
    settings = checkpoint.read_config(Path(mine))["scores"]["settings"]
    assert settings["commit"] == ran.json["settings"]["commit"] == {"id": "0123456789abcdef", "changed_files": None}
    assert settings["machine"] == ran.json["settings"]["machine"] and settings["machine"]["cores"]
    assert "commit 0123456789ab, machine " in (Path(mine) / "README.md").read_text()
    assert run("evaluate", "emoji", "--record").code == 2  # not a folder of one's own


def test_evaluate_scores_what_the_pack_was_trained_on(run, photos, base):
    make_model(Backbone.load(str(base))).save_pretrained("mine", training={"data": "photos"})
    few = ("evaluate", "mine", "--json", "--set", "max_drawn=1", "steps=1", "max_captioned=1", "features=false")
    settings = run(*few).json["settings"]
    assert settings["data"] == "photos" and run(*few, "source=photos").json["settings"]["trained_on"] == (
        "photos; perhaps other data of that name: photos: the pack records its name alone"
    )
    held = run(*few, "source=photos:held=0.5", "--record")
    assert held.code == 2 and "held-out examples may be trained on in photos (" in held.err
    assert "photos:held=0.5" in held.err and "scores" not in checkpoint.read_config(Path("mine"))


def test_data_check(run, photos):
    ran = run("data", "check", photos, "--sheet", "sheet.png", "--json")
    assert ran.code == 0
    assert ran.json["num_examples"] == 6 and ran.json["num_bad"] == 0
    assert Image.open("sheet.png").size[0] > 100


def test_data_check_names_what_is_wrong(run, photos):
    (photos / "0.png").write_text("no picture")
    (photos / "1.txt").write_text("")
    ran = run("data", "check", photos)
    assert ran.code == 1
    assert "0.png" in ran.out and "is not a picture" in ran.out and "1.txt" in ran.out
    assert run("data", "check", photos, "--json").json["num_bad"] == 2


def test_data_check_finds_the_control_tokens_of_a_base(run, photos, base):
    (photos / "1.txt").write_text("a <|end|> of it")
    assert run("data", "check", photos, "--base", base).code == 1


def test_doctor(run):
    found = run("doctor", "--json").json
    assert {
        "device",
        "dtype",
        "dtype_reason",
        "attention",
        "threads",
        "versions",
        "cache",
        "embedded_base",
        "extras",
    } <= set(found)
    project = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra, names_of in found["extras"].items():
        said = [re.match(r"[\w-]+", text)[0] for text in project["optional-dependencies"][extra]]
        assert list(names_of) == said
    assert set(project["optional-dependencies"]) - set(found["extras"]) == {"docs", "bench", "dev"}
    assert found["versions"]["torch"]
    assert "base" not in found
    assert (found["attention"], found["attention_reason"]) == choose_attention(torch.device(found["device"]))
    assert re.search(r"^attention +{attention}: {attention_reason}$".format_map(found), run("doctor").out, re.MULTILINE)


def test_doctor_notes_what_no_test_ran_with(run, monkeypatch):
    tested = {"python": "3.11.9", "torch": "2.13.0+cpu", "transformers": "5.23.1", "gguf": None}
    assert doctor.untested(tested, "Linux") == []
    other = {
        "python": "3.13.1",
        "torch": "2.14.0",
        "transformers": "5.2.0",
        "numpy": "1.26.4",
        "huggingface-hub": "1.2.0",
    }
    assert doctor.untested(other, "Darwin") == [
        "Darwin (tested: Linux)",
        "python 3.13.1 (tested: 3.11)",
        "torch 2.14.0 (allowed: <2.14,>=2.11)",
        "transformers 5.2.0 (tested: 5.23)",
        "numpy 1.26.4 (allowed: >=2)",
    ]
    pinned = (SOURCE.parent / "constraints.txt").read_text(encoding="utf-8")
    for name in ("torch", "transformers"):
        assert re.search(rf"^{name}==(\d+\.\d+)\.", pinned, re.MULTILINE)[1] == doctor.TESTED[name]
    flow = (SOURCE.parent / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert re.findall(r'python-version: "(.+)"', flow) == [doctor.TESTED["python"]] and "runs-on: ubuntu-" in flow
    limits = (SOURCE.parent / "docs" / "limits.md").read_text(encoding="utf-8")
    assert "CPython {python}, torch {torch} and transformers {transformers}".format(**doctor.TESTED) in limits
    monkeypatch.setitem(doctor.TESTED, "torch", "1.0")
    (line,) = [line for line in run("doctor").out.splitlines() if "not tested" in line]
    assert f"torch {torch.__version__} (tested: 1.0)" in line


def test_doctor_tries_a_base(run, base):
    ran = run("doctor", base, "--json")
    assert ran.code == 0
    found = ran.json["base"]
    assert found["layers"] == 4 and found["windows"] == [None] * 4
    assert found["passed"] and len(found["checks"]) == 6


@pytest.mark.parametrize(
    ("family", "layer", "attention", "windows"),
    [
        ("gemma2", "Gemma2DecoderLayer", "eager", [WINDOW, None, WINDOW, None]),
        ("phi3", "Phi3DecoderLayer", "sdpa", [WINDOW] * 4),
        ("gpt_neox", "GPTNeoXLayer", "sdpa", [None] * 4),
        ("smollm3", "SmolLM3DecoderLayer", "sdpa", [None, WINDOW, None, WINDOW]),
    ],
)
def test_doctor_tries_other_families(run, tmp_path, family, layer, attention, windows):
    ran = run("doctor", make_base(family, tmp_path), "--json")
    found = ran.json["base"]
    assert ran.code == 0 and all(check["passed"] for check in found["checks"])
    assert (found["layer_class"], found["attention"], found["windows"]) == (layer, attention, windows)
    in_training = ("grouped", choose_attention(torch.device("cpu"))[1])
    if family == "gemma2":
        in_training = ("eager", "Gemma2ForCausalLM has no sdpa, so the base's own stays")
    assert (found["training_attention"], found["training_attention_reason"]) == in_training
    assert found["longest"] is None


def test_doctor_says_in_one_line_that_a_state_space_model_cannot_be_fused(run, tmp_path):
    shape = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2}
    MambaForCausalLM(MambaConfig(**shape)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    ran = run("doctor", tmp_path)
    assert ran.code == 2
    assert "MambaForCausalLM cannot be fused: its layers (MambaBlock) have no softmax attention" in ran.err


def test_doctor_says_in_one_line_that_a_base_with_position_bias_cannot_be_fused(run, tmp_path):
    BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    ran = run("doctor", tmp_path)
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert (
        "BloomForCausalLM cannot be fused: its layers (BloomBlock) take a bias by the distance of words (alibi)"
        in ran.err
    )


def test_doctor_says_what_a_base_lacks(run, base, monkeypatch):
    def refuse(*_):
        raise xfusion.XFusionError("its MLP is not made of plain Linear layers")

    monkeypatch.setattr("xfusion.fusion.dual_tower.DualTower.install", refuse)
    ran = run("doctor", base)
    assert ran.code == 1
    assert "its MLP is not made of plain Linear layers" in ran.out and "Not supported" in ran.out


def test_demo_is_called_with_its_folder_and_minutes(run, here, monkeypatch):
    import types

    def demo(*, out, minutes, pictures, console):
        out.mkdir(parents=True)
        metrics = {"text_identical": True, "minutes_training": minutes, "pictures": pictures}
        (out / "metrics.json").write_text(json.dumps(metrics))

    monkeypatch.setitem(sys.modules, "xfusion.apps.demo", types.SimpleNamespace(run=demo))
    import xfusion.apps

    monkeypatch.setattr(xfusion.apps, "demo", types.SimpleNamespace(run=demo), raising=False)
    for more, pictures in ([], None), (["--pictures", "8"], 8):
        ran = run("demo", "-o", f"there {pictures}", "--minutes", "0.5", "--json", *more)
        assert ran.code == 0
        assert ran.json == {"text_identical": True, "minutes_training": 0.5, "pictures": pictures}
    ran = run("demo", "--pictures", "0")
    assert ran.code == 2 and "--pictures 0: at least 1" in ran.err


# ------------------------------------------------------------------------------------------------------------- train


def test_train_then_adapt(run, here, photos, small):
    ran = run("train", "xfusion", "--data", photos, "--steps", "3", "-o", "first", *small, "--json")
    assert ran.code == 0
    assert ran.json["steps"] == 3 and ran.json["samples"] == 24
    assert set(ran.json["losses"]) == {"flow_matching", "next_token"}
    assert Path(ran.json["pack"], "model.safetensors").is_file()
    config = json.loads(Path("first/pack/config.json").read_text())
    assert config["model"]["fusion"]["stride"] == 2 and config["model"]["fusion"]["mlp"] == 40
    first_command = config["training"]["command"]
    assert first_command.startswith("xfusion train xfusion --data photos --steps 3 -o first ")
    card = Path("first/pack/README.md").read_text()
    assert f"| command | `{first_command}` |" in card and "| seed | 0 |" in card
    assert f"| largest rate | {config['recipe']['stages'][0]['rate']} |" in card
    assert "| samples per step | 4 to draw, 4 to caption |" in card
    assert "already holds a run" in run("train", "xfusion", "-o", "first", *small).err

    few = ["--stages.0.mixture.draw", "4", "--stages.0.mixture.caption", "4", "--no-compile", "--preview-every", "0"]
    adapt = run("train", "xfusion", "--from", "first", "--data", photos, "--steps", "2", "-o", "second", *few, "--json")
    assert adapt.code == 0 and adapt.json["steps"] == 2
    assert json.loads(Path("second/pack/config.json").read_text())["model"] == config["model"]
    ended = run("train", "xfusion", "-o", "first", "--resume", "--no-compile", "--preview-every", "0", "--json")
    assert ended.code == 0 and ended.json["steps"] == 3
    assert json.loads(Path("first/pack/config.json").read_text())["training"]["command"] == first_command


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("/home/My Name/secret/cats", "cats"),
        ("/data/shards/{000..099}.tar", "{000..099}.tar"),
        ("autoencoder_kl:/home/me/private/vae:vae", "autoencoder_kl:vae:vae"),
        ("--data=/home/me/cats:weight=2+/home/me/dogs", "--data=cats:weight=2+dogs"),
        ("~/cats", "cats"),
        ("mine/cats", "mine/cats"),
        ("hf:org/cards", "hf:org/cards"),
        ("s3://bucket/a", "s3://bucket/a"),
    ],
)
def test_the_recorded_command_has_no_folders_of_this_machine(argument, kept):
    from xfusion.apps.commands import recipe

    assert recipe._without_folders(argument) == kept


def test_licences_that_are_stated_stand_in_the_pack_and_its_card(run, here, photos, small):
    call = ("train", "xfusion", "--steps", "1", *small)
    own = ("--data", photos, "--data-licence", "CC-BY-4.0, taken by us", "--licence", "cc-by-4.0", "-o", "run")
    assert run(*call, *own).code == 0
    config, card = json.loads(Path("run/pack/config.json").read_text()), Path("run/pack/README.md").read_text()
    assert config["training"]["data_licence"] == "CC-BY-4.0, taken by us" and config["licence"] == "cc-by-4.0"
    assert "| data | CC-BY-4.0, taken by us |" in card and "| these weights | cc-by-4.0 |" in card
    assert "\nlicense: cc-by-4.0\n" in card
    assert run("show", "run", "--json").json["licences"]["data"] == "CC-BY-4.0, taken by us"
    again = run("train", "xfusion", "-o", "run", "--resume", "--no-compile", "--data-licence", "MIT")
    assert "data_licence was 'CC-BY-4.0, taken by us' and is now 'MIT'" in again.err
    for number, (options, complaint) in enumerate(
        (
            (["--data", "emoji:16", "--data-licence", "MIT"], "emoji:16 is under CC-BY-SA-4.0, not under MIT"),
            (["--data", photos, "--data-licence", " "], "the data's licence ' ' is no line of words"),
            (["--data", photos, "--data-licence", "MIT\nApache"], "is no line of words"),
            (["--data", photos, "--licence", "mine: all of it"], "'mine: all of it' is no name of a licence on a hub"),
        )
    ):
        assert complaint in run(*call, *options, "-o", f"run{number}").err
        assert not Path(f"run{number}/pack").exists()


def test_a_codec_is_one_option(run, here, tmp_path, base):
    ran = run(
        "train", "xfusion", "--model.image.codec", f"autoencoder_kl:{tmp_path / 'no'}", "--model.backbone.source", base
    )
    assert ran.code == 2
    assert "codec" in ran.err and "no" in ran.err


def test_ctrl_c_in_mid_run(here, photos, small, capfd):
    """In this process; what a shell sees of it: the test below."""
    log, over = Path("run/log.jsonl"), threading.Event()

    def interrupt():
        while not over.wait(0.05):
            if log.is_file() and '{"event": "step"' in log.read_text():
                return os.kill(os.getpid(), signal.SIGINT)

    before, other = signal.signal(signal.SIGINT, signal.default_int_handler), threading.Thread(target=interrupt)
    other.start()
    try:
        argv = ["train", "xfusion", "--data", str(photos), "--steps", "100000", "-o", "run", *small]
        assert cli.main(argv) == 130
    finally:
        over.set()
        other.join()
        signal.signal(signal.SIGINT, before)
    out, err = capfd.readouterr()
    assert "stopping behind this step" in err and err.rstrip().endswith("--resume") and out == ""
    assert len(list(Path("run/state").glob("step_*/state.json"))) == 1 and Path("run/pack/config.json").is_file()


@pytest.mark.full
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_in_earnest(here, photos, small, run, number, code):
    process = start("train", "xfusion", "--data", photos, "--steps", "100000", "-o", "run", *small)
    log, until = Path("run/log.jsonl"), time.monotonic() + 60
    stepped = '{"event": "step"'
    while time.monotonic() < until and process.poll() is None and not (log.is_file() and stepped in log.read_text()):
        time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err and "stopping behind this step" in err
    assert err.rstrip().endswith("--resume")
    assert out == ""
    assert len(list(Path("run/state").glob("step_*/state.json"))) == 1 and Path("run/pack/config.json").is_file()


def test_the_line_that_a_shell_sees(here):
    process = start("lst", "--json")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err == "xfusion: unknown verb 'lst'; did you mean 'list'?\n"


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("xfusion(stride='a')", "stride is 'a', but it takes int"),
        ("xfusion(mlp=1.5)", "mlp is 1.5, but it takes int | None"),
        ("llama_adapter_v2(gate='x')", "gate is 'x', but it takes float"),
        ("llama_adapter_v2(released=1)", "released is 1, but it takes bool"),
    ],
)
def test_an_argument_of_another_kind_is_named(recipe, said):
    with pytest.raises(xfusion.XFusionError, match=re.escape(said)):
        find(recipe)


def test_arguments_of_their_kind_are_taken():
    made = find("xfusion(stride=3, mlp=None, rate=1)")()
    assert (made.model.fusion.stride, made.model.fusion.mlp, made.stages[0].rate) == (3, None, 1)
    made = find("lora(recipe='llava(strip=7)', targets=('query',))")()
    assert made.model.fusion.targets == ("query",) and made.model.image == find("llava(strip=7)")().model.image
    assert made.model.image != find("llava")().model.image


def test_numbers_that_mean_nothing_are_refused_before_anything_is_read(tmp_path, capsys):
    draw = ["draw", "nowhere", "--prompts", str(tmp_path / "none.txt"), "-o", str(tmp_path / "out")]
    for argv, message in (
        ([*draw, "--guidance", "nan"], "--guidance nan: give a number"),
        (["chat", "nowhere", "--guidance", "inf"], "--guidance inf: give a number"),
        (["data", "check", str(tmp_path), "--size", "0", "--sheet", str(tmp_path / "s.png")], "--size 0: pictures on"),
    ):
        assert cli.main(argv) == 2
        said = capsys.readouterr()
        assert message in said.err and said.err.count("\n") == 1 and not said.out
