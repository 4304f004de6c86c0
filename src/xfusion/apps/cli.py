"""The command line: finds the verb, parses its options with tyro, prints its answer, and reports errors in one line.

Exit status: 0 success, 1 negative result (a failed proof, bad data), 2 bad arguments, bad input or a full disk,
130 stopped by Ctrl-C, 143 stopped by SIGTERM.
"""

from __future__ import annotations

import difflib
import io
import itertools
import json
import os
import re
import shlex
import sys
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import Any

import tyro
from rich.console import Console

from xfusion.apps.commands.base import Answer, UsageError, Verb
from xfusion.apps.commands.bench import Bench
from xfusion.apps.commands.chat import Chat
from xfusion.apps.commands.compare import Compare
from xfusion.apps.commands.data import DataCheck, DataEncode, DataRecaption
from xfusion.apps.commands.demo import Demo
from xfusion.apps.commands.doctor import Doctor
from xfusion.apps.commands.drawn import Draw, Judge
from xfusion.apps.commands.hub import Export, Push
from xfusion.apps.commands.pictures import Caption, Generate
from xfusion.apps.commands.proof import Evaluate, Verify
from xfusion.apps.commands.search import Index, Search
from xfusion.apps.commands.serve import Serve
from xfusion.apps.commands.show import List, Show
from xfusion.apps.commands.training import Train, TrainOpening
from xfusion.apps.commands.web import Web

REPORT_WAIT = 10.0
"""Seconds to wait so that another process of the run can report the error: torchrun kills it once this one exits."""
VERBS: dict[str, type[Verb]] = {
    "demo": Demo,
    "train": Train,
    "train opening": TrainOpening,
    "generate": Generate,
    "caption": Caption,
    "index": Index,
    "search": Search,
    "chat": Chat,
    "serve": Serve,
    "web": Web,
    "verify": Verify,
    "push": Push,
    "export": Export,
    "show": Show,
    "list": List,
    "evaluate": Evaluate,
    "draw": Draw,
    "judge": Judge,
    "compare": Compare,
    "data check": DataCheck,
    "data encode": DataEncode,
    "data recaption": DataRecaption,
    "doctor": Doctor,
    "bench": Bench,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except KeyboardInterrupt as stop:
        return _report_interrupt(stop, argv)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UsageError, OSError, ValueError) as error:
        if not _is_expected(error):
            raise
        line = f"xfusion: {' '.join(str(error).split())}"
        _report_to_torchrun(line)
        if getattr(error, "reported_elsewhere", False):
            time.sleep(REPORT_WAIT)
            return 2
        print(line, file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        from xfusion import __version__

        print(f"xfusion {__version__}")
        return 0
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # norms under autocast
    verb = read(argv)
    if verb is None:
        return 0
    console = Console(stderr=True, highlight=False, emoji=False)
    return _print(verb.run(console), verb.json)


def _print(answer: Answer, as_json: bool) -> int:
    if os.environ.get("RANK", "0") != "0":  # with several processes only rank 0 answers
        return answer.code
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may hold bytes that are not valid text
    if as_json:
        print(json.dumps(answer.data, ensure_ascii=False, allow_nan=False))
    print(answer.text, file=sys.stderr if as_json else sys.stdout, flush=True)
    return answer.code


def _is_expected(error: Exception) -> bool:
    """Whether the user can fix an error: it is one of ours, or the file system's."""
    if isinstance(error, (UsageError, OSError)):
        return True
    sequence = sys.modules.get("xfusion.data.sequence")  # not imported: nothing can have raised its error
    return sequence is not None and isinstance(error, sequence.XFusionError)


def _report_interrupt(stop: KeyboardInterrupt, argv: list[str]) -> int:
    if str(stop):  # training wrote its checkpoint
        restart = argv if "--resume" in argv else [*argv, "--resume"]
        line = f"xfusion: {str(stop).split(';')[0]}; go on with: {_launch_command()} {shlex.join(restart)}"
        _report_to_torchrun(line)
        if os.environ.get("RANK", "0") == "0":  # with several processes only rank 0 prints
            print(line, file=sys.stderr)
    else:
        print("xfusion: stopped", file=sys.stderr)
    return getattr(stop.__cause__ or stop, "code", 130)


def _report_to_torchrun(line: str) -> None:
    """Let torchrun's own report of a failed process, which is long and comes last, end with the line that says why.

    It reads the line from a file that it names in the environment (`torch.distributed.elastic.multiprocessing.errors`). Its
    decorator `record` would write a traceback there.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": message}, file)


def _launch_command() -> str:
    """How this command line was started: directly, or by torchrun as several processes."""
    local_count, world_size = (os.environ.get(name, "1") for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if world_size == "1":
        return "xfusion"
    if local_count != world_size:  # several machines: only the user knows how they find each other
        return f"torchrun ... --nproc-per-node {local_count} -m xfusion.apps.cli"
    return f"torchrun --standalone --nproc-per-node {world_size} -m xfusion.apps.cli"


# ----------------------------------------------------------------------------------------------------------- reading


def overview() -> str:
    """The text of ``xfusion --help``."""
    rows = [(name, (kind.__doc__ or "").split("\n")[0]) for name, kind in VERBS.items()]
    width = max(len(name) for name, _ in rows)
    lines = [
        "usage: xfusion VERB ... [--json] [-o OUT]",
        "",
        "Give a frozen language model a new modality, and check that its text stays bit-identical.",
        "",
        *(f"  {name:<{width}}  {text}" for name, text in rows),
        "",
        "`xfusion VERB --help` explains a verb; `xfusion list` names recipes and packs. Start with `xfusion demo`.",
    ]
    return "\n".join(lines)


def read(argv: list[str]) -> Verb | None:
    """The verb with its options; None if help was requested and printed."""
    name, rest = _split_verb(argv)
    if any(token in ("-h", "--help") for token in rest) and name != "train":
        return parse(VERBS[name], ["--help"], name)
    if name != "train" or not rest or rest[0] in ("-h", "--help"):
        return parse(VERBS[name], rest, name)
    if rest[0].startswith("-"):
        raise UsageError(f"train: name the recipe before {rest[0]}, for example: xfusion train xfusion --minutes 5")
    from xfusion.apps.commands.recipe import parse_train

    def parse_options(kind: Any, args: list[str], **options: Any) -> Any:
        parsed = parse(kind, args, f"train {rest[0]}", **options)
        if parsed is None:
            raise _HelpShown
        return parsed

    try:
        return parse_train(parse_options, rest[0], rest[1:])
    except _HelpShown:
        return None


class _HelpShown(Exception):
    """Help was printed; there is nothing to run."""


def _split_verb(argv: list[str]) -> tuple[str, list[str]]:
    for words in (2, 1):
        if " ".join(argv[:words]) in VERBS:
            return " ".join(argv[:words]), argv[words:]
    group_verbs = [name for name in VERBS if name.startswith(f"{argv[0]} ")]
    if group_verbs:  # "data" alone, or with another second word
        suggestion = difflib.get_close_matches(" ".join(argv[:2]), group_verbs, n=1) or group_verbs
        raise UsageError(f"{' '.join(argv[:2])!r} is not a verb; did you mean {suggestion[0]!r}?")
    suggestion = nearest(argv[0], list(VERBS))
    raise UsageError(f"unknown verb {argv[0]!r}{suggestion or '; there are ' + ', '.join(VERBS)}")


def nearest(word: str, choices: list[str]) -> str:
    """``; did you mean ...?``, or nothing."""
    matches = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def parse(kind: Any, args: list[str], name: str, **options: Any) -> Any:
    """Parse a dataclass with tyro, with its errors in one line; None if help was printed."""
    settings: dict[str, Any] = {
        "prog": f"xfusion {name}",
        "config": (tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands),
        **options,
    }
    captured = io.StringIO()
    try:
        with redirect_stderr(captured):
            return tyro.cli(kind, args=args, **settings)
    except SystemExit as exit_error:
        if not exit_error.code:
            return None
    raise UsageError(_complaint(captured.getvalue(), kind, name, settings))


def _complaint(box: str, kind: Any, name: str, settings: dict[str, Any]) -> str:
    """One line from tyro's error box, which is drawn with box characters or, if stdout is ASCII, with hyphens."""
    plain = (re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│╭╮╰╯ ") for line in box.splitlines())
    title, *rest = [line for line in plain if line] or ["bad arguments"]
    title = title.strip("─ ")
    while rest and not rest[0].strip("─-"):
        rest.pop(0)
    body = itertools.takewhile(lambda line: line.strip("─-"), rest)  # a rule separates the error from help texts
    text = " ".join(body)
    if title.startswith("Unrecognized"):
        tokens = text.partition(":")[2].replace(",", " ").split()
        unknown = next((t.split("=")[0] for t in tokens if t.startswith("-")), None)
        if unknown is None:
            return f"{name}: unexpected argument {(tokens or [text])[0]!r}; see xfusion {name} --help"
        suggestion = nearest(unknown, _options(kind, settings))
        return f"{name}: unknown option {unknown}{suggestion or f'; see xfusion {name} --help'}"
    if title.startswith("Required"):
        missing = re.findall(r"(?<= )(-[-\w.]+ )?([A-Z][A-Z.|/]+)(?= |$)", text.partition(":")[2])
        names = ", ".join("".join(m) for m in missing) or text
        return f"{name}: {names} is missing; see xfusion {name} --help"
    text = text.removeprefix("Error parsing ").replace("could not convert string to float", "not a number")
    text = re.sub(
        r"Could not find valid parse for arguments: \[(.*)\]", rf"cannot read \1; see xfusion {name} --help", text
    )
    text = re.sub(r"invalid literal for int\(\) with base 10", "not a whole number", text)
    return f"{name}: {text or title}"


def _options(kind: Any, settings: dict[str, Any]) -> list[str]:
    """All options of a dataclass, as its help names them."""
    captured = io.StringIO()
    try:
        with redirect_stdout(captured):
            tyro.cli(kind, args=["--help"], **settings)
    except SystemExit:
        pass
    return sorted(set(re.findall(r"(?<![\w-])--?[a-z][\w.-]*", captured.getvalue())))


if __name__ == "__main__":
    sys.exit(main())
