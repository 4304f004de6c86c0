"""What the documents say is true: their commands parse, their links lead somewhere, their marked blocks run and print.

Every bash and python block stands under a mark. ``<!-- run -->`` executes it, in the order of its document and in one folder
per document; ``full`` leaves it to the full tier, ``exit=N`` is the exit status that it must have, ``short`` runs its commands
within the bounds of `short.py` where the printed ones take minutes or hours, and ``serving=PORT`` starts it and goes on once the
port answers: it is stopped, as by Ctrl-C, before the next such block and at the end; ``needs=PACKAGE`` leaves it out, and says
so, where that is not installed. A ``text`` block right behind a block that was run holds lines that the output must have, in
order; ``…`` stands for the rest of a line. ``<!-- not run: REASON -->`` says why it is not, and the test that stands in; its
commands are parsed all the same. ``<!-- given: NAMES -->`` says what lies in the folder when the full tier begins: what a
document before it made, or what a reader has (`give`).

The full tier runs each block as a reader does; where one asks the hub, `hub_server` answers for it with what the documents name.
The default one calls the command line in this process, where importing PyTorch for every command would take most of the time. So
does the full one with the commands of the pages of recipes and of the comparisons, on one loaded base.
"""

import gc
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
import warnings
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pytest

import xfusion
from xfusion.apps import cli
from xfusion.apps.commands.base import UsageError
from xfusion.data.sequence import XFusionError
from xfusion.evaluation import verify

ROOT = Path(__file__).parents[2]
WRITTEN = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
DOCUMENTS = [*WRITTEN, *sorted((ROOT / "docs" / "recipes").glob("*.md"))]
RUN = r"run(?P<full> full)?(?: exit=(?P<exit>\d+))?(?P<short> short)?(?: serving=(?P<port>\d+))?(?: needs=(?P<needs>\w+))?"
BLOCK = re.compile(
    rf"(?:<!-- (?:{RUN}|not run: (?P<reason>[^\n]+)) -->\n)?^```(?P<language>\w+)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
GIVEN = re.compile(r"^<!-- given: (.+) -->$", re.MULTILINE)
COMMAND = re.compile(r"^(?:[A-Z]\w*=\S+ |.*\| )?xfusion |^torchrun .*-m xfusion\.apps\.cli ")
"""What stands before a verb: nothing, a variable or a pipe; or several processes."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = {*PROJECT["project"]["optional-dependencies"]}
OBSTACLES = ("installs", "of the hub", "a GPU", "several processes", "runs this")
"""What may keep a block from being run: time alone does not, for a block may be ``short``."""


class Block(NamedTuple):
    """A fenced block of a document."""

    language: str
    body: str
    run: bool
    full: bool
    short: bool
    status: int
    port: int
    """Where it serves, or 0."""
    reason: str
    """Why it is not run, or nothing."""
    needs: str
    """A package without which it is left out, or nothing."""
    printed: str
    """The text block right behind it, or nothing."""

    @property
    def commands(self):
        """What is run of it."""
        if not self.short:
            return self.body
        from docs.short import shortened

        return shortened(self.body)


def blocks(document):
    return blocks_of(document.read_text(encoding="utf-8"))


def blocks_of(text):
    found = list(BLOCK.finditer(text))
    out = []
    for match, following in zip(found, [*found[1:], None], strict=False):
        near = following is not None and following["language"] == "text"
        near = near and not text[match.end() : following.start()].strip()
        out.append(
            Block(
                language=match["language"],
                body=match["body"],
                run=match.group(0).startswith("<!-- run"),
                full=bool(match["full"]),
                short=bool(match["short"]),
                status=int(match["exit"] or 0),
                port=int(match["port"] or 0),
                reason=match["reason"] or "",
                needs=match["needs"] or "",
                printed=following["body"] if near else "",
            )
        )
    return out


def commands(document):
    """All ``xfusion`` commands of a document, in blocks and in inline code, without what the shell reads behind them."""
    text = document.read_text(encoding="utf-8")
    code = [line for b in blocks(document) if b.language == "bash" for line in b.body.splitlines()]
    lines = ["xfusion " + COMMAND.sub("", line, count=1) for line in code if COMMAND.match(line)]
    inline = [re.sub(r"\s+", " ", code) for code in re.findall(r"`(xfusion [^`]+)`", BLOCK.sub("", text))]
    lines += [line for line in inline if line.count(" ") > 1 or line == "xfusion demo"]
    return [re.split(r" (?:&|\d?>)(?: |$)", line)[0] for line in lines]


def ids(document):
    return str(document.relative_to(ROOT))


def test_the_marks_are_found(capsys):
    """The other tests would pass on nothing."""
    found = [block for document in DOCUMENTS for block in blocks(document) if block.run or block.reason]
    ran = [block for block in found if block.run]
    assert len(ran) >= 110
    with capsys.disabled():
        short = sum(block.short for block in ran)
        print(f"\nthe documents: {len(ran)} blocks are run, {short} of them short, {len(found) - len(ran)} are not")
    assert sum(len(commands(d)) for d in DOCUMENTS) >= 100
    assert all(commands(d) for d in DOCUMENTS if d.parent.name == "recipes" and d.stem != "index")
    text = "".join(d.read_text(encoding="utf-8") for d in DOCUMENTS)
    marked = [b for d in DOCUMENTS for b in blocks(d) if b.run or b.reason]
    assert len(re.findall(r"^<!-- (?:not )?run\b", text, re.MULTILINE)) == len(marked), "a mark that no block follows"


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_every_block_is_run_or_says_why_not(document):
    for block in blocks(document):
        if block.language not in ("bash", "python"):
            assert not block.run and not block.reason, f"a mark of nothing that can be run:\n{block.body}"
            continue
        assert block.run or block.reason, f"neither <!-- run --> nor <!-- not run: REASON -->:\n{block.body}"
        if block.reason:
            assert any(word in block.reason for word in OBSTACLES), f"{block.reason}: none of {', '.join(OBSTACLES)}"
            for path in re.findall(r"(?:tests|docs|benchmarks)/[\w/.]*\w", block.reason):
                assert (ROOT / path).exists(), f"{block.reason}: there is no {path}"
        for line in block.body.splitlines() if block.language == "bash" else ():
            script = re.match(r"python (\w[\w/]*\.py)", line)
            assert script is None or (ROOT / script[1]).is_file(), f"{line}: there is no {script[1]}"
            target = re.match(r"make ([\w-]+)$", line)
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert target is None or f"\n{target[1]}:" in makefile, f"{line}: the Makefile has no {target[1]}"
            extras = re.match(r"pip install .*'\.\[([\w,]+)\]'", line)
            assert extras is None or set(extras[1].split(",")) <= EXTRAS, f"{line}: extras are {', '.join(EXTRAS)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_every_command_is_understood(document, capsys):
    for line in commands(document):
        try:
            cli.read(shlex.split(line, comments=True)[1:])
        except UsageError as error:
            pytest.fail(f"{line}\n{error}")
        except XFusionError:  # understood; these read a run, or a file of the reader's, which is not here
            assert "--resume" in line or "--from" in line or ".py:" in line, line
    capsys.readouterr()  # help that was asked for


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_every_link_leads_somewhere(document):
    text = BLOCK.sub("", document.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (document.parent / path) if path else document
        assert there.exists(), f"{target} leads nowhere"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            known = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in known, f"{target}: no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_every_python_block_is_python(document):
    for block in blocks(document):
        if block.language == "python":
            compile(block.body, str(document), "exec")


def surroundings(further):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    package = str(Path(xfusion.__file__).parents[1])
    return (
        os.environ
        | further
        | {
            "PATH": path,
            "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "COLUMNS": "200",
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",  # both streams in the order of a terminal
        }
    )


def execute(document, folder, further):
    with ExitStack() as served:
        for block in blocks(document):
            if not block.run:
                continue
            if block.needs and importlib.util.find_spec(block.needs) is None:
                warnings.warn(f"{document.name}: left out, for there is no {block.needs}:\n{block.body}", stacklevel=1)
                continue
            if block.port:
                served.close()  # one at a time
                served.enter_context(serve(block, folder, further))
            else:
                run(block, folder, further)


@contextmanager
def serve(block, folder, further):
    """What the block starts, from when its port answers until Ctrl-C, which must be answered by an end without an error."""
    assert not block.printed and not block.status and block.language == "bash"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", block.port))  # else another's answers would be taken for ours
    streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
    log = folder / f"served_{block.port}.log"
    # Where the tests themselves run behind a shell, Ctrl-C may be ignored, and what they start would inherit it.
    streams["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with log.open("w") as out:
        server = subprocess.Popen(
            ["bash", "-ec", block.commands], cwd=folder, env=surroundings(further), stdout=out, **streams
        )
    try:
        ended = time.monotonic() + 600
        while not answers(block.port):
            assert server.poll() is None, f"{block.body}\n{log.read_text()}"
            assert time.monotonic() < ended, f"{block.body}\nport {block.port} never answered\n{log.read_text()}"
            time.sleep(1)
        yield
        os.killpg(server.pid, signal.SIGINT)
        assert server.wait(timeout=120) in (0, 130), f"{block.body}\n{log.read_text()}"
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def answers(port):
    """Whether HTTP is spoken there; a page that is not found is an answer, too."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False


def run(block, folder, further):
    program = ["bash", "-ec"] if block.language == "bash" else [sys.executable, "-c"]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(
        [*program, block.commands], cwd=folder, env=surroundings(further), **streams, text=True, check=False
    )
    assert done.returncode == block.status, f"{block.commands}\n{done.stdout}"
    must_print(block, done.stdout)


def run_here(block, folder):
    """Commands of xfusion in this process, what stands between them in a shell."""
    said, status = io.StringIO(), 0
    with chdir(folder), redirect_stdout(said), redirect_stderr(said):
        if block.language == "python":
            exec(compile(block.body, "a block", "exec"), {"__name__": "__main__"})
        for ours, lines in groupby(block.commands.splitlines(), key=lambda line: line.startswith("xfusion ")):
            for line in lines if ours else ():
                assert not set("|&;<>$`") & set(line), f"{line}: a shell is needed"
                status = status or cli.main(shlex.split(line, comments=True)[1:])
            if not ours and not status and block.language == "bash":
                done = subprocess.run(["bash", "-ec", "\n".join(lines)], capture_output=True, text=True, check=False)
                status = done.returncode
                said.write(done.stdout + done.stderr)
    assert status == block.status, f"{block.commands}\n{said.getvalue()}"
    must_print(block, said.getvalue())


def must_print(block, said):
    """The lines of the text block stand in the output, in order."""
    lines = iter(said.splitlines())
    for wanted in block.printed.splitlines():
        start = wanted.removesuffix("…").rstrip() if wanted.endswith("…") else None
        matches = (line.startswith(start) if start is not None else line.rstrip() == wanted for line in lines)
        assert any(matches), f"{block.body}\nnever printed (in this order): {wanted}\n{said}"


def runnable(full):
    return [d for d in DOCUMENTS if any(b.run and (full or not b.full) for b in blocks(d))]


def test_what_serves_is_awaited_and_stopped(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = tmp_path / "page.md"
    page.write_text(f"<!-- run full serving={port} -->\n```bash\npython -m http.server --bind 127.0.0.1 {port}\n```\n")
    (block,) = blocks(page)
    with serve(block, tmp_path, {}):
        assert answers(port)
    assert not answers(port) and "GET / " in (tmp_path / f"served_{port}.log").read_text()
    page.write_text(page.read_text().replace("python -m http.server", "false"))
    with pytest.raises(AssertionError, match="false --bind"), serve(blocks(page)[0], tmp_path, {}):
        pass


@pytest.mark.parametrize("document", runnable(full=False), ids=ids)
def test_marked_blocks_run(document, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    # The full tier proves with all prompts and 16 tokens behind each.
    monkeypatch.setattr("xfusion.evaluation.verify.PROMPTS", verify.PROMPTS[:3])
    monkeypatch.setattr("xfusion.evaluation.verify.PADDED", ("English", "German"))
    monkeypatch.setattr("xfusion.evaluation.verify.NEW_TOKENS", 2)
    for block in blocks(document):
        if block.run and not block.full:
            run_here(block, tmp_path)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with twenty pictures and a run of four steps, as docs/your_own_data.md makes them."""
    folder = tmp_path_factory.mktemp("prepared")
    making = [b._replace(printed="") for b in blocks(ROOT / "docs" / "your_own_data.md") if b.run]
    run(next(b for b in making if 'Path("photos")' in b.body), folder, {})
    run(next(b for b in making if b.body.endswith(" -o runs/photos\n")), folder, {})
    return folder


@pytest.fixture(scope="session")
def heard(tmp_path_factory, assets, hub_of_documents):
    """A folder with spoken digits, a reader of them and their codes, as docs/sounds.md makes them."""
    folder = tmp_path_factory.mktemp("heard")
    for name in ("fsdd_train.parquet", "runs/write_digits.py", "runs/fit_sound_codes.py"):
        reader_has(name, folder, assets)
    lines = [
        line
        for b in blocks(ROOT / "docs" / "sounds.md")
        if b.run and b.language == "bash"
        for line in b.body.splitlines()
    ]
    for start in ("python runs/write_digits.py ", "xfusion train qwen_audio ", "python runs/fit_sound_codes.py "):
        line = next(line for line in lines if line.startswith(start))
        run(Block("bash", line, True, True, True, 0, 0, "", "", ""), folder, hub_of_documents)
    import soundfile

    samples, rate = soundfile.read(folder / "digits" / "wav" / "7_theo_0.wav")
    soundfile.write(folder / "seven.wav", samples.repeat(16000 // rate), 16000)
    return folder


SUBSETS = {
    "fsdd_train.parquet": ("audio", 200),
    "asterisk_en_train.parquet": ("audio", 200),
    "nlvr_dev.parquet": ("images", 600),
    "clothing_160_train.parquet": ("images", 4000),
    "fluent_emoji_3d_256.parquet": ("images", 200),
}
"""Files of the real test assets that readers have, and how many of their rows at most, evenly chosen."""


def reader_has(name, folder, assets):
    """Put into a folder what a reader brings: a file of `SUBSETS`, a script of this repository, a GGUF file."""
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    if name in SUBSETS:
        from pyarrow import parquet

        kind, wanted = SUBSETS[name]
        rows = parquet.read_table(assets / kind / name)
        parquet.write_table(rows.take(list(range(0, len(rows), max(1, len(rows) // wanted)))), place)
    elif name == "models":
        from xfusion.backbone import EMBEDDED, sources

        place.mkdir()
        file = sources._gguf_file(EMBEDDED)
        (place / file.name).symlink_to(file)
    else:
        shutil.copyfile(ROOT / name, place)


ASSETS = {"whisper": "whisper_tiny_en_encoder", "whisper_tiny_en_encoder": "whisper_tiny_en_encoder", "taef2": "taef2"}
"""Folders of the real test assets that readers have, by their names there."""
MADE = {
    "prepared": {"photos": "photos", "runs/photos": "runs/photos", "pizza.png": "photos/pizza.png"},
    "heard": {
        "digits": "digits",
        "runs/qwen_audio": "runs/qwen_audio",
        "codes": "codes",
        "seven.wav": "seven.wav",
    },
}
"""What documents make that others are given, by the fixture that has it: its name there."""


def give(document, folder, request):
    """What a document's marks say that it is given."""
    names = " ".join(GIVEN.findall(document.read_text(encoding="utf-8"))).split()
    for name in dict.fromkeys(names):
        maker = next((maker for maker, made in MADE.items() if name in made), None)
        if name == "runs/clothing":
            for needed in ("clothing_160_train.parquet", "runs/write_clothing.py"):
                reader_has(needed, folder, request.getfixturevalue("assets"))
            command = "python runs/write_clothing.py clothing_160_train.parquet -o runs/clothing"
            run(Block("bash", command, True, True, False, 0, 0, "", "", ""), folder, {})
        elif name == "runs/colours":
            reader_has("runs/write_colours.py", folder, None)
            command = "python runs/write_colours.py -o runs/colours"
            run(Block("bash", command, True, True, True, 0, 0, "", "", ""), folder, {})
        elif name in ASSETS:
            (folder / name).symlink_to(request.getfixturevalue("assets") / ASSETS[name])
        elif maker is None:
            reader_has(name, folder, request.getfixturevalue("assets") if name in SUBSETS else None)
        else:
            source, target = request.getfixturevalue(maker) / MADE[maker][name], folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)


@pytest.fixture(scope="session")
def hub_of_documents(tmp_path_factory, request):
    """A stand-in for the hub with all that the documents name there, made small; what a process has to be told to ask it."""
    from contracts.pretrained import make_clip, make_llava
    from contracts.table import make_base
    from data.hub_server import Hub
    from data.test_shards import write_parquet
    from diffusers import AutoencoderKL
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("hub")
    make_base("qwen3", folder / "qwen3")
    # The MLP of the recipes' towers is 512 wide, and is cut from the base's.
    AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder / "qwen3", intermediate_size=512)
    ).save_pretrained(folder / "qwen3")
    channels = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    blocks_of = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(**channels, **blocks_of).save_pretrained(folder / "diffusion" / "vae")
    write_parquet(folder / "rows" / "train.parquet", range(4), group=4)
    pack = request.getfixturevalue("prepared") / "runs" / "photos" / "pack"
    places = {"Qwen/Qwen3-0.6B": folder / "qwen3", "stable-diffusion-v1-5/stable-diffusion-v1-5": folder / "diffusion",
              "datasets/ORG/NAME": folder / "rows", "org/photos": pack, "org/sketches": pack,
              "openai/clip-vit-base-patch16": make_clip(folder / "clip", side=224, patch=32),
              **dict.fromkeys(("Qwen/Qwen2.5-VL-3B-Instruct", "OpenGVLab/InternVL3-1B-hf"), make_llava(folder / "llava")),
              }  # fmt: skip
    with suppress(pytest.skip.Exception):  # what needs the assets is skipped elsewhere
        places["openai/whisper-tiny.en"] = request.getfixturevalue("assets") / "whisper_tiny_en_encoder"
    server = Hub()
    for name, place in places.items():
        files = {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        server.commits[name] = [("1f3a9c0" + "0" * 33, files)]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "HF_ENDPOINT": server.address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "home"),
        "HF_TOKEN": "hf_none",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    server.shutdown()
    server.server_close()


PAGES = [document for document in DOCUMENTS if document.parent.name == "recipes"]
ALONE = [document for document in PAGES if not GIVEN.search(document.read_text(encoding="utf-8"))]
"""Pages of recipes that need nothing but the package."""


COMPARISONS = ROOT / "docs" / "comparison.md"


@pytest.mark.full
@pytest.mark.parametrize("document", [d for d in runnable(full=True) if d not in [*ALONE, COMPARISONS]], ids=ids)
def test_all_marked_blocks_run(document, tmp_path, request, hub_of_documents):
    give(document, tmp_path, request)
    execute(document, tmp_path, hub_of_documents)


@pytest.fixture
def loaded_once(embedded, monkeypatch):
    """Whoever loads the embedded base is handed that of the session."""
    from xfusion.backbone import Backbone

    load = Backbone.load
    monkeypatch.setattr(
        Backbone, "load", lambda source, **how: embedded if source == embedded.source else load(source, **how)
    )


@pytest.mark.full
@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("document", [d for d in runnable(full=True) if d in ALONE], ids=ids)
def test_a_recipe_trains_by_the_command_of_its_page(document, tmp_path):
    (block,) = (b for b in blocks(document) if b.run)
    run_here(block, tmp_path)
    assert (tmp_path / "runs" / document.stem / "pack" / "README.md").is_file()
    gc.collect()  # a model holds itself, and the next one needs its room


SECTIONS = {
    part.partition("\n")[0]: blocks_of(part)
    for part in re.split(r"^## ", COMPARISONS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
}


@pytest.fixture(scope="session")
def to_compare(tmp_path_factory, request):
    """A folder with what the page of comparisons is given."""
    folder = tmp_path_factory.mktemp("to_compare")
    give(COMPARISONS, folder, request)
    return folder


@pytest.mark.full
@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("name", [name for name, found in SECTIONS.items() if any(block.run for block in found)])
def test_a_comparison_runs_by_the_commands_of_its_section(name, to_compare, monkeypatch):
    monkeypatch.setattr("xfusion.evaluation.verify.PROMPTS", verify.PROMPTS[:3])
    for block in SECTIONS[name]:
        if block.run:
            run_here(block, to_compare)
        gc.collect()
    plan = ROOT / "comparison" / name / "comparison.json"
    recipes = json.loads(plan.read_text(encoding="utf-8"))["recipes"] if plan.is_file() else []
    made = {path.name for path in (to_compare / "comparison" / name).glob("*-seed0.json")}
    assert made == {f"{label}-seed0.json" for label in recipes}


@pytest.mark.full
@pytest.mark.parametrize("notebook", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(notebook, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[docs]'")
    import nbformat

    cells = nbformat.read(notebook, as_version=4)
    assert not any(cell.get("outputs") for cell in cells.cells), "notebooks are kept without outputs"
    nbclient.NotebookClient(cells, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.full
def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = {page.parent.name for page in (tmp_path / "site").rglob("index.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} <= found
    assert "randomised" not in (tmp_path / "site/reference/index.html").read_text(), "only what users call"
    assert "xfusion.load" in (tmp_path / "site/reference/index.html").read_text()


def test_the_reference_has_every_public_name():
    targets = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    documented = [
        getattr(importlib.import_module(module), name) for module, _, name in (t.rpartition(".") for t in targets)
    ]
    for name in set(xfusion.__all__) - {"__version__"}:
        assert any(getattr(xfusion, name) is found for found in documented), f"xfusion.{name} is not documented"


def test_the_layout_names_every_module():
    """Of every folder whose files the design note lists; it names no other."""
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    top, *rows = re.split(r"\n  (?=\w+/)", design.split("\nsrc/xfusion/\n")[1].split("\ntests/")[0])
    listed = {".": re.findall(r"(\w+)\.py", top)}
    for row in rows:
        folder, _, content = " ".join(row.split()).partition("/")
        parts = {f"{folder}/{inner}": names for inner, names in re.findall(r"(\w+)/ \(([^)]*)\)", content)}
        parts[folder] = re.sub(r"\w+/(?: \([^)]*\))?", "", content)
        listed |= {place: re.findall(r"\w+", names) for place, names in parts.items() if "a file per" not in names}
    del listed["packs"]  # weights
    assert {".", "backbone", "data", "modalities/codecs", "training", "evaluation", "comparison", "apps"} <= set(listed)
    for place, names in listed.items():
        modules = {path.stem for path in (ROOT / "src" / "xfusion" / place).glob("*.py")} - {"__init__"}
        assert sorted(names) == sorted(modules), place


def test_the_import_contracts_name_all_of_data():
    """The linter takes a module that they leave out for one of which nothing is said."""
    contracts = {c["id"]: c for c in PROJECT["tool"]["importlinter"]["contracts"]}
    modules = {path.stem for path in (ROOT / "src" / "xfusion" / "data").glob("*.py")} - {"__init__", "sequence"}
    (row,) = [layer for layer in contracts["layers"]["layers"] if "(data.mixture)" in layer]
    assert sorted(re.findall(r"\(data\.(\w+)\)", row)) == sorted(modules)
    assert "(data.sequence)" in contracts["layers"]["layers"]
    forbidden = contracts["fusion-without-data"]["forbidden_modules"]
    assert sorted(forbidden) == sorted(f"xfusion.data.{name}" for name in modules)


# ----------------------------------------------------------------------------------------------- the scripts of runs/

SCRIPTS = [
    ("cpu_emoji.sh", {}),
    ("cpu_emoji.sh", {"PICTURES": "32", "DRAW": "16", "MINUTES": "1.5"}),
    ("cpu_emoji.sh", {"PROCESSES": "2", "SHARD": "new"}),
    ("llama_1b_one_gpu.sh", {"SHARDS": "shards/{000..099}.tar"}),
    ("llama_1b_one_gpu.sh", {"SHARDS": "shards/a.tar", "HOURS": "1.5", "PROCESSES": "8", "SHARD": "all"}),
]


def asked_by(script, variables, folder):
    """What a script asks of `xfusion`, in order, where commands of that name and `torchrun` note their words and do nothing."""
    (folder / "bin").mkdir()
    for name in ("xfusion", "torchrun"):
        stub = folder / "bin" / name
        stub.write_text(f'#!/usr/bin/env bash\nprintf "%s\\0" {name} "$@" >> {folder}/asked; echo >> {folder}/asked\n')
        stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"} | variables
    done = subprocess.run(
        ["bash", ROOT / "runs" / script, str(folder / "out")],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    asked = (folder / "asked").read_text().split("\0\n")[:-1] if (folder / "asked").exists() else []
    return done, [words.split("\0") for words in asked]


@pytest.mark.parametrize(("script", "variables"), SCRIPTS, ids=str)
def test_what_a_script_asks_is_understood(tmp_path, script, variables, capsys):
    done, asked = asked_by(script, variables, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [words[0] for words in asked if "train" in words] == ["torchrun" if "PROCESSES" in variables else "xfusion"]
    for words in asked:
        verb = cli.read(words[words.index("xfusion.apps.cli") + 1 :] if words[0] == "torchrun" else words[1:])
        assert verb is not None
        minutes = {"MINUTES": 1, "HOURS": 60}
        for name in minutes.keys() & variables.keys() if "train" in words else ():
            assert verb.minutes == float(variables[name]) * minutes[name]
    (tmp_path / "out" / "run" / "state" / "step_7").mkdir(parents=True)
    shutil.rmtree(tmp_path / "bin")
    (tmp_path / "asked").unlink()
    done, again = asked_by(script, variables, tmp_path)
    assert done.returncode == 0 and len(again) == len(asked) > 2
    assert [("--resume" in words) for words in again] == [("train" in words) for words in again]
    capsys.readouterr()


@pytest.mark.parametrize("hours", ["0", "-1", "a day"])
def test_hours_that_are_none_are_refused_before_anything_is_encoded(tmp_path, hours):
    done, asked = asked_by("llama_1b_one_gpu.sh", {"SHARDS": "a.tar", "HOURS": hours}, tmp_path)
    assert done.returncode and not asked and f"HOURS={hours}: give a number above 0" in done.stderr


def test_the_script_of_five_minutes_expects_what_the_demo_measured():
    demo = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))
    header = (ROOT / "runs" / "cpu_emoji.sh").read_text(encoding="utf-8").split("set -euo")[0]
    said = re.sub(r"\s+", " ", " ".join(line.lstrip("# ") for line in header.splitlines()))
    training, scores = demo["training"], demo["fresh"]
    assert f"emoji:PICTURES ({training['pictures']})" in said
    assert (
        f"for five minutes: {training['steps']} steps; of the trained pictures names {scores['fit_caption_exact']:.2f} exact"
        in said
    )
    assert f"drawings {scores['fit_retrieval_pixel_at_1']:.2f} nearest to the requested picture in pixels" in said
    assert f"and {scores['fit_retrieval_feature_at_1']:.2f} by ImageNet features (benchmarks/results/demo.json)" in said


@pytest.mark.full
def test_the_script_of_five_minutes_runs(tmp_path):
    """On eight pictures, in five minutes, it learns to draw most of them; given again, it finds what it made."""
    small = {
        "MINUTES": "5",
        "PICTURES": "8",
        "DRAW": "8",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for _ in range(2):
        done = subprocess.run(
            ["bash", ROOT / "runs" / "cpu_emoji.sh", str(tmp_path / "out")],
            env=os.environ | small, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        scores = json.loads((tmp_path / "out" / "scores.json").read_text())
        assert scores["fit_retrieval_pixel_at_1"] >= 0.5 > 2 * scores["chance_fit_retrieval_pixel_at_1"]
        assert (tmp_path / "out" / "hearts.png").is_file()
