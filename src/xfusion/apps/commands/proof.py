"""`verify` and `evaluate`: whether the text is unchanged, and how good the rest is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from xfusion.apps.commands.base import (
    Answer,
    UsageError,
    Verb,
    as_file,
    choose_device,
    load_model,
    pack_folder,
    progress,
    table,
)


@dataclass(frozen=True, kw_only=True)
class Verify(Verb):
    """Prove that a model's text is its base's, bit for bit.

    The base is loaded afresh by transformers alone and compared with the model's text path and with its fused stack,
    before and after all new weights are replaced by noise. Exits with 1 where anything differs.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder, a shipped pack's name, or a hub id."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """Also write the result to this JSON file."""
    record: bool = False
    """Record the result in the pack, which must be a folder: its card then shows the proof."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    trust: bool = False
    """Import packages outside xfusion that the pack names."""

    def run(self, console: Console) -> Answer:
        from xfusion import checkpoint
        from xfusion.evaluation.verify import verify
        from xfusion.storage import write_json

        folder = _record_folder(self.model) if self.record else None
        if self.out:
            as_file(self.out)
        choose_device(self.device)
        model = load_model(self.model, device=self.device, trust=self.trust)
        with progress(console, lines=True) as report_progress:
            result: dict[str, Any] = {"model": self.model} | verify(model, report_progress)
        if self.out:
            write_json(self.out, result)
        if folder:
            checkpoint.add_facts(folder, model, proof=result)
        rows = [("ok" if c["passed"] else "FAILED", f"{c['name']}: {c['detail']}") for c in result["checks"]]
        return Answer(data=result, text=f"{table(rows)}\n{verdict(result)}", code=0 if result["passed"] else 1)


def _figure(value: Any) -> str:
    """A score for people: numbers, also those of an interval, to four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and value and all(isinstance(item, float) for item in value):
        return f"[{', '.join(map(_figure, value))}]"
    return str(value)


def _record_folder(name: str) -> Path:
    """The folder of the pack in which results are recorded; checked before they are computed."""
    from xfusion import checkpoint
    from xfusion.storage import check_writable

    folder = Path(pack_folder(name)).expanduser()
    if not folder.is_dir():
        raise UsageError(f"--record: {name} is not a folder")
    checkpoint.refuse_other_files(folder)
    check_writable(folder.absolute().parent, folder=True)  # the pack is replaced as a whole
    return folder


def verdict(result: dict[str, Any]) -> str:
    """The last line of a proof."""
    settings = result["settings"]
    conditions = (
        f"{settings['dtype']} on {settings['device']}, {settings['threads']} threads, {settings['seconds']:.0f} s"
    )
    regime = f"Regime: {result['regime']}. "
    if result["passed"]:
        return f"{regime}The text is the base's, bit for bit ({conditions})."
    if result["text_identical"]:
        return f"{regime}The text is the base's, but text before a picture is not within tolerance ({conditions})."
    adapters_off = [check["passed"] for check in result["checks"] if "adapters off" in check["name"]]
    addition = "; without the adapters it is, bit for bit" if adapters_off and all(adapters_off) else ""
    return f"{regime}The text is NOT the base's{addition} ({conditions})."


@dataclass(frozen=True, kw_only=True)
class Evaluate(Verb):
    """Score a model with a suite, and record settings, seeds and versions.

    The pack's record says which data it was trained on, also before `train --from`; training pictures are never scored as
    held out.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder, a shipped pack's name, or a hub id."""
    suite: str = "emoji"
    """Name of the suite."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE...")] = ()
    """Settings of the suite, such as source=emoji:128 max_drawn=64 features=false. Without a source the suite uses the
    data of the pack's last training run, if recorded."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """Also write the result to this JSON file."""
    record: bool = False
    """Record the scores in the pack, which must be a folder, replacing earlier ones: its card then shows them."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    trust: bool = False
    """Import packages outside xfusion that the pack names."""

    def run(self, console: Console) -> Answer:
        from xfusion import checkpoint
        from xfusion.evaluation.machine import commit, machine
        from xfusion.evaluation.run import check, evaluate

        folder = _record_folder(self.model) if self.record else None
        if self.out:
            as_file(self.out)
        settings = dict(read_setting(text) for text in self.set)
        choose_device(self.device)
        check(self.suite, settings)  # before a model is loaded
        model = load_model(self.model, device=self.device, trust=self.trust)
        with progress(console) as report_progress:
            result = evaluate(model, self.suite, out=self.out, progress=report_progress, **settings)
        if folder:
            settings_used = result["settings"] | {"commit": commit(), "machine": machine()}
            scores = {k: v for k, v in result.items() if k != "curves"} | {"settings": settings_used}
            checkpoint.add_facts(folder, model, scores=scores)
        scores = {k: v for k, v in result.items() if k not in ("settings", "curves")}
        rows = [(k, _figure(v)) for k, v in scores.items()]
        return Answer(data=result, text=table(rows + self.plots(result.get("curves", {}))))

    def plots(self, curves: dict[str, list[list[float]]]) -> list[tuple[str, str]]:
        """Plot a suite's curves beside the result as ``FILE.NAME.svg``; returns table rows with their paths."""
        from xfusion.apps import plots

        rows = []
        for name, points in curves.items() if self.out else ():
            path = self.out.with_suffix(f".{name}.svg")  # type: ignore[union-attr]
            lines = {name: [(float(x), float(y)) for x, y in points]}
            svg = plots.curves([name], lines, name)
            if not svg:  # no points
                continue
            path.write_text(plots.standalone(svg), encoding="utf-8")
            rows.append((f"plot of {name}", str(path)))
        return rows


def read_setting(text: str) -> tuple[str, Any]:
    """Parse ``NAME=VALUE`` of ``--set``; a value that is not JSON is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--set {text}: write NAME=VALUE, such as max_drawn=64")
    try:
        return name.replace("-", "_"), json.loads(value)
    except ValueError:
        return name.replace("-", "_"), value
