"""`train`: any recipe, with all its settings as options."""

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

    Ctrl-C and SIGTERM finish the step, write state and pack, and exit with 130 and 143; continue with --resume, also
    after a crash. `xfusion train RECIPE --help` also shows the settings of that recipe, such as --data,
    --model.fusion.stride and --stages.0.rate.
    """

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """A name of `xfusion list`, file.py:function or package.module:function."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = None
    """Folder of the run: log, previews, state, and the pack in FOLDER/pack; None means runs/RECIPE."""
    minutes: float | None = None
    """Wall-clock budget; the number of steps follows from the measured speed."""
    steps: int | None = None
    """Optimiser steps of the last stage, instead of a budget in minutes."""
    resume: bool = False
    """Resume the run in the folder where it stopped, with its settings and its next batch. Given with it,
    --stages.N.rate, .warmup, .schedule, .clip and .weight-decay are other ones from here on."""
    from_pack: Annotated[str | None, tyro.conf.arg(name="from", metavar="PACK")] = None
    """Adapt this pack: start from its weights and its model's settings."""
    allow_bad: float = 0.0
    """Fraction of bad examples that is skipped instead of stopping, such as 0.05."""
    skip_nonfinite: int = 0
    """Number of steps of the run that are skipped, weights unchanged, because a loss or the gradient is not finite; one more
    stops the run."""
    preview: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROMPT...")] = ()
    """Prompts of the previews; by default the first captions of the data."""
    preview_every: float = 60.0
    """Seconds between previews; 0 makes none."""
    checkpoint_every: float = 300.0
    """Seconds between checkpoints."""
    keep: int = 2
    """Number of newest checkpoints to keep in FOLDER/state. The best is kept, too: the one with the lowest training loss,
    as a running mean over some fifty steps, of the last stage reached. It says nothing about held-out pictures."""
    compile: bool = True
    """Compilation of each layer, on unless --no-compile: costs a minute at the start, then runs two to three times as fast."""
    shard: Literal["none", "new", "all"] = "none"
    """What is sharded across processes (torchrun): nothing, the new weights with their gradients, moments and average, or
    the frozen base too. A single process shards nothing."""
    patience: float = 30.0
    """Minutes that a process waits for another one (torchrun) between two steps or within one, before it takes it for lost;
    a preview or a state must not take longer."""
    decoders: int | None = None
    """Threads per process that read and decode pictures; None means four, or the number of cores."""
    track: Annotated[tuple[Literal["wandb", "trackio"], ...], tyro.conf.arg(metavar="TRACKER...")] = ()
    """Copy curves and previews to wandb, trackio or both, which must be installed; log.jsonl and TensorBoard are written
    anyway. WANDB_PROJECT or TRACKIO_PROJECT names the project, else xfusion."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    attention: str | None = None
    """Attention implementation: grouped, eager, sdpa, or flex_attention (block masks, on a GPU; its speed is not
    measured). None chooses by device."""

    command: Annotated[str | None, tyro.conf.Suppress] = None
    """The command line, for the pack's record."""

    def start(self, recipe: Recipe, console: Console) -> Answer:
        """Train a recipe with all settings resolved."""
        from xfusion.recipes.base import train

        self._check()
        out, run_listener = self.folder(), _RunListener()
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
            skip_nonfinite=self.skip_nonfinite,
            preview_prompts=self.preview or None,
            preview_every=self.preview_every,
            checkpoint_every=self.checkpoint_every,
            keep=self.keep,
            compile=self.compile,
            shard=self.shard,
            patience=self.patience,
            decoders=self.decoders,
            track=self.track,
            command=self.command,
            console=console,
            listener=run_listener,
        )
        pack = out / "pack"
        data = {"out": str(out), "pack": str(pack), "fingerprint": model.fingerprint, **run_listener.facts()}
        rows = [
            ("pack", f"{pack} ({size_text((pack / 'model.safetensors').stat().st_size)})"),
            ("steps", f"{data['steps']} with {data['samples']} samples in {data['seconds'] / 60:.1f} minutes"),
            ("losses", ", ".join(f"{k} {v:.4f}" for k, v in data["losses"].items()) or "no step was left to take"),
            *([("skipped", f"{data['skipped']} steps, not finite")] if data["skipped"] else []),
            *([("graphs", _graphs_text(data))] if data["graphs"] else []),
            ("try", _first_use(model, pack, self.recipe)),
        ]
        return Answer(data=data, text=table(rows))

    def folder(self) -> Path:
        """Folder of the run."""
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
    """Train a pack's opening head, which decides when to draw, on chat requests for pictures and on ordinary chat.

    The head is two rows of weights on the frozen base's hidden states; training takes minutes on a CPU and does not change
    the pack's other weights. The head is scored on held-out wordings and chat.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PACK")]
    """A folder, a shipped pack's name, or a hub id."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = None
    """Folder of the pack with the head; None adds it to PACK, which must be a folder."""
    wordings: Annotated[str | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Requests and chat in the format of xfusion/data/requests.json; None uses that file."""
    repeat: int = 6
    """How often each wording appears, each time with another subject."""
    chats: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Further prompts that request no picture, to count false alarms: one per line, or FILE.parquet:COLUMN."""
    max_chats: int | None = None
    """Use only the first this many of --chats."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    trust: bool = False
    """Import packages outside xfusion that the pack names."""

    def run(self, console: Console) -> Answer:
        from xfusion import checkpoint
        from xfusion.data import requests
        from xfusion.evaluation.run import evaluate
        from xfusion.storage import check_writable
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
        check_writable((self.out or folder).absolute().parent, folder=True)  # the pack is written as a whole
        model = load_model(self.model, device=self.device, trust=self.trust)
        if "draw" not in model.capabilities:
            able = ", ".join(sorted(model.capabilities))
            raise UsageError(f"{self.model} cannot draw: it can {able}; take a pack of a recipe such as xfusion")
        examples = requests.read("train", self.wordings, repeat=self.repeat)
        with progress(console) as report_progress:
            model.opening = fit(model, examples, progress=report_progress)
            settings = {"wordings": self.wordings, "chats": self.chats, "max_chats": self.max_chats}
            scores = evaluate(model, "requests", progress=report_progress, repeat=self.repeat, **settings)
        facts = {"examples": len(examples), "wordings": self.wordings and Path(self.wordings).name, "scores": scores}
        out = checkpoint.add_opening(folder, model, model.opening, self.out or folder, **facts)
        figures = {k: v for k, v in scores.items() if k != "settings"}
        rows = [("pack", str(out)), *((k, f"{v:.4f}") for k, v in figures.items()), ("try", f"xfusion chat {out}")]
        return Answer(data={"out": str(out), "examples": len(examples), **scores}, text=table(rows))


def _first_use(model: Model, pack: Path, recipe: str) -> str:
    """A command that shows what the model has learned; PYTHONPATH is added for classes of the user's own file."""
    from xfusion.checkpoint import modules_outside, to_json

    outside_modules, file = modules_outside(to_json(model.config)), Path(recipe.partition(":")[0])
    environment = f"PYTHONPATH={file.parent} " if file.suffix == ".py" and file.stem in outside_modules else ""
    trust = " --trust" if outside_modules else ""
    is_audio = model.modality.name == "audio"
    uses = {
        "draw": f'xfusion generate {pack} "..."',
        "caption": f"xfusion caption {pack} {'SOUND' if is_audio else 'PICTURE'}",
        "embed": f"xfusion index FOLDER {pack} -o INDEX",
    }
    use = next(
        (
            use
            for capability, use in uses.items()
            if capability in model.capabilities and not (is_audio and capability == "draw")
        ),
        f"xfusion show {pack}",
    )
    return f"{environment}{use}{trust}"


def _graphs_text(data: dict[str, Any]) -> str:
    """How many graphs a run compiled, and how many of them after the warm-up."""
    from xfusion.training.pace import WARM_STEPS

    return f"{data['graphs']} compiled, {data['graphs_behind_warm_up']} of them behind the first {WARM_STEPS} steps"


class _RunListener:
    """Listens to a run and collects the facts for the answer."""

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
        """Steps, samples, seconds, skipped steps, the last losses, and this call's median rate."""
        rates = sorted(self.rates)
        return {
            "steps": self.end["step"],
            "samples": self.end["samples"],
            "seconds": round(self.end["seconds"], 2),
            "skipped": self.end["skipped"],
            "losses": self.step.get("losses", {}),
            "samples_per_second": round(rates[len(rates) // 2], 2) if rates else None,
            "graphs": self.end["graphs"],
            "graphs_behind_warm_up": self.end["graphs_behind_warm_up"],
        }
