"""`bench`: how fast xfusion is, against the machine's own rate and against peers, taking turns in one run."""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
import os
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from xfusion.apps.commands.base import Answer, UsageError, Verb, as_file

BUSY = 0.5
"""Load per core from which on a machine is not idle."""


@dataclass(frozen=True, kw_only=True)
class Bench(Verb):
    """Measure how fast training and sampling are, against the machine's matrix rate and against peers.

    xfusion and the peers take turns, A B A B; figures are medians. Run it on an idle machine: the answer records the
    load before and after. Peers that are not installed are left out with the reason. Each question runs in its own
    process, and the file is written after each.
    """

    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ()
    """Questions to answer: activation_checkpointing, denoising, generate, llama, memory, training, transfusion; default:
    all."""
    base: Annotated[str | None, tyro.conf.arg(metavar="SOURCE")] = None
    """The frozen LLM: hub id, folder or .gguf file; None uses the embedded one."""
    data: Annotated[str, tyro.conf.arg(metavar="SPEC")] = "emoji:128"
    """Pictures with captions."""
    compile: bool = True
    """Compilation of each layer, as in training, on unless --no-compile."""
    quick: bool = False
    """A few small rounds, to check that everything runs: the figures mean nothing."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """Also write the answer to this file."""

    def run(self, console: Console) -> Answer:
        from xfusion.apps.bench import base
        from xfusion.data.sequence import XFusionError
        from xfusion.evaluation.machine import commit, machine
        from xfusion.storage import write_json

        for name in self.only:
            if name not in base.names():
                raise UsageError(f"--only {name}: not one of {', '.join(base.names())}")
        if self.out:
            as_file(self.out)
        start = time.perf_counter()
        data: dict[str, Any] = {
            "command": self._command(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": commit(),
            "machine": machine(),
            "load_before": _load_average(),
            "quick": self.quick,
        }
        if (load := data["load_before"]) is not None and load > BUSY * (os.cpu_count() or 1):
            console.print(
                f"hint      other processes keep this machine busy (load {load:g}): only ratios of what is measured in turn say"
                " anything; wait until it is idle",
                highlight=False,
            )
        for name in self.only or base.names():
            try:
                data[name] = self._run_in_own_process(name)
            except XFusionError as error:
                if self.only:
                    raise
                data[name] = {"left_out": str(error)}
            data |= {"load_after": _load_average(), "seconds": round(time.perf_counter() - start, 1)}
            data = _rounded(data)
            if self.out is not None:  # after every question: the next may crash the machine
                write_json(self.out, data)
        return Answer(data=data, text=_text(data))

    def _run_in_own_process(self, name: str) -> dict[str, Any]:
        """Answer a question in its own process, so that nothing it leaves in memory affects the next.

        Raises:
            XFusionError: raised by the question itself, or its process was killed.
        """
        from xfusion.data.sequence import XFusionError

        executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        with executor:
            try:
                return executor.submit(_measure, name, self.base, self.data, self.compile, self.quick).result()
            except BrokenProcessPool as error:
                raise XFusionError(f"the process that measured {name} was killed, perhaps for its memory") from error

    def _command(self) -> str:
        words = [
            "xfusion",
            "bench",
            *(["--only", *self.only] if self.only else []),
            *(["--quick"] if self.quick else []),
        ]
        words += [] if self.base is None else ["--base", self.base]
        words += [] if self.data == type(self).data else ["--data", self.data]
        return shlex.join([*words, *([] if self.compile else ["--no-compile"]), "--json"])


def _measure(name: str, base: str | None, data: str, compile: bool, quick: bool) -> dict[str, Any]:
    """The answer to a question."""
    from xfusion.apps.bench.base import Bench

    def report(text: str) -> None:
        print(f"{name}: {text}", file=sys.stderr, flush=True)

    bench = Bench.of(base, data, compile=compile, quick=quick, report=report)
    return importlib.import_module(f"xfusion.apps.bench.{name}").measure(bench)


def _load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _rounded(value: Any) -> Any:
    """Every float rounded to four significant digits."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _text(data: dict[str, Any], indent: str = "") -> str:
    """Names and figures, one per line, parts indented below their name."""
    lines = []
    for name, value in data.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", _text(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}  {value}")
    return "\n".join(line for line in lines if line)
