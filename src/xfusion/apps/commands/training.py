"""`train`: any recipe, with all of its settings on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from xfusion.apps.commands.base import (
    Answer,
    UsageError,
    Verb,
    as_folder,
    choose_device,
    load_model,
    pack_folder,
    progress,
    size_text,
    table,
)

if TYPE_CHECKING:
    from xfusion.model import Model
    from xfusion.training.stages import Recipe


@dataclass(frozen=True, kw_only=True)
class Train(Verb):
    """Train a recipe; the result is a pack.

    Ctrl-C and SIGTERM finish the step, write state and pack, and exit with 130 and 143; go on with --resume, also after
    a crash. `xfusion train RECIPE --help` also shows the settings of that recipe, such as --data, --model.fusion.stride
    and --stages.0.rate.
    """

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """A name of `xfusion list`, file.py:function or package.module:function."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = None
    """Folder of the run: log, previews, state, and the pack in FOLDER/pack; None takes runs/RECIPE."""
    minutes: float | None = None
    """Wall-clock budget; the number of steps follows from the measured speed."""
    steps: int | None = None
    """Optimiser steps of the last stage, instead of a budget in minutes."""
    resume: bool = False
    """Go on where the run in the folder stopped, with its settings and its next batch."""
    from_pack: Annotated[str | None, tyro.conf.arg(name="from", metavar="PACK")] = None
    """Adapt this pack: start from its weights, with its model's settings."""
    allow_bad: float = 0.0
    """Share of bad examples that is left out instead of stopping, such as 0.05."""
    preview: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROMPT...")] = ()
    """What previews draw; nothing takes the first captions of the data."""
    preview_every: float = 60.0
    """Seconds between previews; 0 makes none."""
    checkpoint_every: float = 300.0
    """Seconds between checkpoints."""
    keep: int = 2
    """Newest checkpoints that stay in FOLDER/state. Besides stays the best: the one with the lowest training loss, as a
    running mean over some fifty steps, of the last stage that was reached. It says nothing of pictures held out."""
    compile: bool = True
    """Whether the per-layer work is compiled: a minute at the start, two to three times the speed behind it."""
    shard: Literal["none", "new", "all"] = "none"
    """What several processes divide among them (torchrun): nothing, the new weights with their gradients, moments and
    average, or the frozen base too. One process divides nothing."""
    decoders: int | None = None
    """Threads of each process that read and decode pictures; None takes four, or as many as there are cores."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    attention: str | None = None
    """What layers attend by: grouped, eager, sdpa, or flex_attention (block masks, on a GPU; its speed is not measured).
    None chooses by device."""

    def start(self, recipe: Recipe, people: Console) -> Answer:
        """Train a recipe with all settings resolved."""
        from xfusion.recipes.base import train

        self._check()
        out, ends = self.folder(), _Ends()
        model = train(
            recipe,
            out=out,
            minutes=self.minutes,
            steps=self.steps,
            resume=self.resume,
            from_pack=self.from_pack,
            device=choose_device(self.device),
            attention=self.attention,
            allow_bad=self.allow_bad,
            preview_prompts=self.preview or None,
            preview_every=self.preview_every,
            checkpoint_every=self.checkpoint_every,
            keep=self.keep,
            compile=self.compile,
            shard=self.shard,
            decoders=self.decoders,
            console=people,
            listener=ends,
        )
        pack = out / "pack"
        data = {"out": str(out), "pack": str(pack), "fingerprint": model.fingerprint, **ends.facts()}
        rows = [
            ("pack", f"{pack} ({size_text((pack / 'model.safetensors').stat().st_size)})"),
            ("steps", f"{data['steps']} with {data['samples']} samples in {data['seconds'] / 60:.1f} minutes"),
            ("losses", ", ".join(f"{k} {v:.4f}" for k, v in data["losses"].items()) or "no step was left to take"),
            *([("graphs", _graphs(data))] if data["graphs"] else []),
            ("try", _first_use(model, pack, self.recipe)),
        ]
        return Answer(data=data, text=table(rows))

    def folder(self) -> Path:
        """Where the run is."""
        return as_folder(self.out or Path("runs") / self.recipe.rpartition(":")[2])

    def _check(self) -> None:
        choose_device(self.device)
        if self.minutes is not None and self.steps is not None:
            raise UsageError("give --minutes or --steps, not both")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise UsageError(f"--minutes {self.minutes:g}: more than 0")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"--steps {self.steps}: at least 1")
        if self.decoders is not None and self.decoders < 1:
            raise UsageError(f"--decoders {self.decoders}: at least 1")
        if self.keep < 1:
            raise UsageError(f"--keep {self.keep}: at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainOpening(Verb):
    """Fit the head that opens a picture by itself to a pack, on requests in chat wording and ordinary chat.

    Two rows of numbers on the frozen base's states, in minutes on a CPU; the pack's other weights are not touched. It is
    scored on wordings and chat that it did not learn from.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PACK")]
    """A folder, a shipped pack's name, or a hub id."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = None
    """Folder of the pack with the head; None adds it to PACK, which must be a folder."""
    wordings: Annotated[str | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Requests and chat in the form of xfusion/data/requests.json; None takes these."""
    repeat: int = 6
    """How often a wording appears, each time with another subject."""
    chats: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Further prompts that ask for no picture, to count false alarms among: a line each, or FILE.parquet:COLUMN."""
    max_chats: int | None = None
    """Only the first of them."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    trust: bool = False
    """Import packages outside xfusion that the pack names."""

    def run(self, people: Console) -> Answer:
        from xfusion import checkpoint
        from xfusion.data import requests
        from xfusion.evaluation.run import evaluate
        from xfusion.training.opening import fit

        choose_device(self.device)
        if self.repeat < 1:
            raise UsageError(f"--repeat {self.repeat}: at least 1")
        if self.out is not None:
            as_folder(self.out)
        name = pack_folder(self.model)
        if self.out is None and not Path(name).expanduser().is_dir():
            raise UsageError(f"{self.model} is not a folder: name another one for the pack with the head, by -o FOLDER")
        folder = checkpoint.find(name)
        checkpoint.refuse_other_files(self.out or folder)
        model = load_model(self.model, device=self.device, trust=self.trust)
        if "draw" not in model.capabilities:
            raise UsageError(f"{self.model} cannot draw: it can {', '.join(sorted(model.capabilities))}")
        examples = requests.read("train", self.wordings, repeat=self.repeat)
        with progress(people) as tell:
            model.opening = fit(model, examples, progress=tell)
            settings = {"wordings": self.wordings, "chats": self.chats, "max_chats": self.max_chats}
            scores = evaluate(model, "requests", progress=tell, repeat=self.repeat, **settings)
        facts = {"examples": len(examples), "wordings": self.wordings and Path(self.wordings).name, "scores": scores}
        out = checkpoint.add_opening(folder, model, model.opening, self.out or folder, **facts)
        found = {k: v for k, v in scores.items() if k != "settings"}
        rows = [("pack", str(out)), *((k, f"{v:.4f}") for k, v in found.items()), ("try", f"xfusion chat {out}")]
        return Answer(data={"out": str(out), "examples": len(examples), **scores}, text=table(rows))


def _first_use(model: Model, pack: Path, recipe: str) -> str:
    """A command that shows what the model has learned; classes of a file of one's own are found by its folder."""
    from xfusion.checkpoint import modules_outside, to_json

    outside, file = modules_outside(to_json(model.config)), Path(recipe.partition(":")[0])
    found_by = f"PYTHONPATH={file.parent} " if file.suffix == ".py" and file.stem in outside else ""
    trust = " --trust" if outside else ""
    hears = model.modality.name == "audio"
    uses = {
        "draw": f'xfusion generate {pack} "..."',
        "caption": f"xfusion caption {pack} {'SOUND' if hears else 'PICTURE'}",
        "embed": f"xfusion index FOLDER {pack} -o INDEX",
    }
    use = next(
        (use for able, use in uses.items() if able in model.capabilities and not (hears and able == "draw")),
        f"xfusion show {pack}",
    )
    return f"{found_by}{use}{trust}"


def _graphs(data: dict[str, Any]) -> str:
    """How often a run compiled, and how often when it should be done with that."""
    from xfusion.training.pace import WARM_STEPS

    return f"{data['graphs']} compiled, {data['graphs_behind_warm_up']} of them behind the first {WARM_STEPS} steps"


class _Ends:
    """Listens for what the answer says about a run."""

    def __init__(self) -> None:
        self.step: dict[str, Any] = {}
        self.end: dict[str, Any] = {}
        self.rates: list[float] = []

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            self.step = event
            self.rates.append(event["samples_per_second"])
        elif event["event"] == "end":
            self.end = event

    def facts(self) -> dict[str, Any]:
        """Steps, samples, seconds, the last losses, and the median rate of this call."""
        rates = sorted(self.rates)
        return {
            "steps": self.end["step"],
            "samples": self.end["samples"],
            "seconds": round(self.end["seconds"], 2),
            "losses": self.step.get("losses", {}),
            "samples_per_second": round(rates[len(rates) // 2], 2) if rates else None,
            "graphs": self.end["graphs"],
            "graphs_behind_warm_up": self.end["graphs_behind_warm_up"],
        }
