"""`demo`: in five minutes from scratch to a model that draws and names emoji."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from xfusion.apps.commands.base import Answer, UsageError, Verb, as_folder


@dataclass(frozen=True, kw_only=True)
class Demo(Verb):
    """Watch a frozen language model learn to draw and name emoji, with a proof that its text is unchanged.

    Trains a fresh tower, draws and captions with it and with the shipped pack, verifies, and writes report.html and
    metrics.json.
    """

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = Path("runs/demo")
    """Folder of the report."""
    minutes: float = 5.0
    """Minutes of training."""
    pictures: int | None = None
    """Emoji to learn; None takes as many as this machine learns in these minutes, at most 128."""

    def run(self, console: Console) -> Answer:
        from xfusion.apps import demo

        if not 0 < self.minutes < float("inf"):
            raise UsageError(f"--minutes {self.minutes:g}: more than 0")
        if self.pictures is not None and self.pictures < 1:
            raise UsageError(f"--pictures {self.pictures}: at least 1")
        demo.run(out=as_folder(self.out), minutes=self.minutes, pictures=self.pictures, console=console)
        metrics = json.loads((self.out / "metrics.json").read_text(encoding="utf-8"))
        return Answer(
            data=metrics, text=f"report: {self.out / 'report.html'}", code=0 if metrics["text_identical"] else 1
        )
