"""`data check`: look at pictures and captions before training does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from xfusion.apps.commands.base import Answer, Verb, table

SHOWN = 20
"""Problems that people are told; programs get all."""


@dataclass(frozen=True, kw_only=True)
class DataCheck(Verb):
    """Look at every picture and caption of a data source and name what is wrong, with file and line.

    Exits with 1 where anything is.
    """

    spec: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPEC")]
    """emoji, emoji:128, a folder of pictures with captions, or a .jsonl file."""
    sheet: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """Draw a contact sheet as a model will see the pictures."""
    size: int = 32
    """Side in pixels of the model that the sheet is drawn for."""
    base: Annotated[str | None, tyro.conf.arg(metavar="SOURCE")] = None
    """The base whose control tokens no caption may contain; None takes the embedded one, where it is installed."""

    def run(self, people: Console) -> Answer:
        from xfusion.data.sources import check

        tokens, note = self._special_tokens()
        with people.status(f"looking at {self.spec}") if people.is_terminal else _nothing():
            report = check(self.spec, special_tokens=tokens)
        data = report.to_json()
        data["notes"] += [note] if note else []
        if self.sheet:
            data["sheet"] = str(report.sheet(self.sheet, size=self.size))
        return Answer(data=data, text=_text(data), code=1 if report.num_bad else 0)

    def _special_tokens(self) -> tuple[tuple[str, ...], str]:
        from xfusion.backbone import EMBEDDED, special_tokens
        from xfusion.data.sequence import XFusionError

        try:
            return special_tokens(self.base or EMBEDDED), ""
        except XFusionError:
            if self.base:
                raise
            return (), "captions were not searched for a base's control tokens: name one with --base"


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


def _text(data: dict) -> str:
    words = data["captions"]
    rows = [
        ("source", data["spec"]),
        ("licence", data["licence"]),
        ("examples", f"{data['num_examples']}, {data['num_bad']} of them bad ({100 * data['share_bad']:.1f} %)"),
        ("groups", f"{data['num_groups']} of pictures that count as the same"),
        (
            "captions",
            f"{words['num_captions']}; {words['shortest']} to {words['longest']} characters, median {words['median']:g}",
        ),
    ]
    rows += [(f"  {kind}", str(count)) for kind, count in data["counts"].items()]
    lines = [table(rows), *data["problems"][:SHOWN]]
    if len(data["problems"]) > SHOWN:
        lines.append(f"... and {len(data['problems']) - SHOWN} more (--json has all)")
    lines += [f"note: {note}" for note in data["notes"]]
    if "sheet" in data:
        lines.append(f"sheet: {data['sheet']}")
    return "\n".join(lines)
