"""`bench`: how fast ours is, against the machine's own rate and against peers, all in turn in one run."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from xfusion.apps.commands.base import Answer, UsageError, Verb, written


@dataclass(frozen=True, kw_only=True)
class Bench(Verb):
    """Measure how fast training and sampling are, against the machine's matrix rate and against peers.

    Ours and the peers take turns, A B A B; figures are medians. Run it on an idle machine: the load before and after stands
    in the answer. Peers that are not installed are left out with their reason.
    """

    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ()
    """Questions to answer: activation_checkpointing, denoising, generate, llama, memory, training, transfusion; none takes
    all."""
    base: Annotated[str | None, tyro.conf.arg(metavar="SOURCE")] = None
    """The frozen LLM: hub id, folder or .gguf file; None takes the embedded one."""
    data: Annotated[str, tyro.conf.arg(metavar="SPEC")] = "emoji:128"
    """Pictures with captions."""
    compile: bool = True
    """Compile the per-layer work, as training does."""
    quick: bool = False
    """Few and small rounds, to see that everything runs: the figures mean nothing."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """Also write the answer to this file."""

    def run(self, people: Console) -> Answer:
        from xfusion.apps.bench import base
        from xfusion.comparison.machine import commit, machine
        from xfusion.data.sequence import XFusionError

        for name in self.only:
            if name not in base.names():
                raise UsageError(f"--only {name}: not one of {', '.join(base.names())}")
        begun = time.perf_counter()
        data: dict[str, Any] = {
            "command": self._command(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": commit(),
            "machine": machine(),
            "load_before": _load(),
            "quick": self.quick,
        }
        bench = base.Bench.of(self.base, self.data, compile=self.compile, quick=self.quick)
        for name in self.only or base.names():
            asked = replace(bench, tell=lambda text, name=name: people.print(f"{name}: {text}", style="dim"))
            try:
                data[name] = importlib.import_module(f"xfusion.apps.bench.{name}").measure(asked)
            except XFusionError as error:
                if self.only:
                    raise
                data[name] = {"left_out": str(error)}
        data |= {"load_after": _load(), "seconds": round(time.perf_counter() - begun, 1)}
        data = _rounded(data)
        if self.out is not None:
            text = json.dumps(data, indent=2) + "\n"

            def write(path: Path) -> None:
                path.write_text(text, encoding="utf-8")

            written(self.out, write)
        return Answer(data=data, text=_text(data))

    def _command(self) -> str:
        words = ["xfusion bench", *(["--only", *self.only] if self.only else []), *(["--quick"] if self.quick else [])]
        return " ".join([*words, *([] if self.compile else ["--no-compile"]), "--json"])


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _rounded(value: Any) -> Any:
    """Four digits of every float."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _text(data: dict[str, Any], indent: str = "") -> str:
    """Names and figures, one a line, parts below their name."""
    lines = []
    for name, value in data.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", _text(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}  {value}")
    return "\n".join(line for line in lines if line)
