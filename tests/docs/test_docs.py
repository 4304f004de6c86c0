"""What the documents say is true: their commands parse, their links lead somewhere, their marked blocks run and print.

A fenced block under ``<!-- run -->`` is executed, in the order of its document and in one folder per document;
``full`` leaves it to the full tier, ``exit=N`` is the exit status that it must have. A ``text`` block right behind it
holds lines that the output must have, in order; ``…`` stands for the rest of a line.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import xfusion
from xfusion.apps import cli
from xfusion.apps.commands.base import UsageError
from xfusion.data.sequence import XFusionError

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(
    r"(?:<!-- run(?P<full> full)?(?: exit=(?P<exit>\d+))? -->\n)?^```(?P<language>\w+)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block of a document."""

    language: str
    body: str
    run: bool
    full: bool
    status: int
    printed: str
    """The text block right behind it, or nothing."""


def blocks(document):
    text = document.read_text(encoding="utf-8")
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
                status=int(match["exit"] or 0),
                printed=following["body"] if near else "",
            )
        )
    return out


def commands(document):
    """All ``xfusion`` commands of a document, in blocks and in inline code, without what the shell reads behind them."""
    text = document.read_text(encoding="utf-8")
    lines = [line for b in blocks(document) if b.language == "bash" for line in b.body.splitlines()]
    lines += [re.sub(r"\s+", " ", code) for code in re.findall(r"`(xfusion [^`]+)`", BLOCK.sub("", text))]
    lines = [re.split(r" (?:&|\d?>)(?: |$)", line)[0] for line in lines]
    return [line for line in lines if (line.startswith("xfusion ") and line.count(" ") > 1) or line == "xfusion demo"]


def ids(document):
    return str(document.relative_to(ROOT))


def test_the_marks_are_found():
    """The other tests would pass on nothing."""
    assert sum(b.run for d in DOCUMENTS for b in blocks(d)) >= 8
    assert sum(len(commands(d)) for d in DOCUMENTS) >= 25
    marks = sum(d.read_text(encoding="utf-8").count("<!-- run") for d in DOCUMENTS)
    assert marks == sum(b.run for d in DOCUMENTS for b in blocks(d)), "a mark that no block follows"


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


def execute(document, folder, full):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {
        "PATH": path,
        "PYTHONPATH": os.pathsep.join(
            [str(Path(xfusion.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "COLUMNS": "200",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",  # both streams in the order of a terminal
    }
    for block in blocks(document):
        if not block.run or (block.full and not full):
            continue
        program = ["bash", "-ec", block.body] if block.language == "bash" else [sys.executable, "-c", block.body]
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(program, cwd=folder, env=environment, **out, text=True, check=False)
        assert done.returncode == block.status, f"{block.body}\n{done.stdout}"
        must_print(block, done.stdout)


def must_print(block, said):
    """The lines of the text block stand in the output, in order."""
    lines = iter(said.splitlines())
    for wanted in block.printed.splitlines():
        start = wanted.removesuffix("…").rstrip() if wanted.endswith("…") else None
        matches = (line.startswith(start) if start is not None else line.rstrip() == wanted for line in lines)
        assert any(matches), f"{block.body}\nnever printed (in this order): {wanted}\n{said}"


def runnable(full):
    return [d for d in DOCUMENTS if any(b.run and (full or not b.full) for b in blocks(d))]


@pytest.mark.parametrize("document", runnable(full=False), ids=ids)
def test_marked_blocks_run(document, tmp_path):
    execute(document, tmp_path, full=False)


@pytest.mark.full
@pytest.mark.parametrize("document", [d for d in runnable(full=True) if any(b.full for b in blocks(d))], ids=ids)
def test_all_marked_blocks_run(document, tmp_path):
    execute(document, tmp_path, full=True)


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
