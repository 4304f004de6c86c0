"""`draw` and `judge`: draw a folder of pictures for a list of prompts, and score it separately."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from xfusion.apps.commands.base import (
    Answer,
    UsageError,
    Verb,
    as_file,
    as_folder,
    choose_device,
    load_model,
    progress,
    table,
)


@dataclass(frozen=True, kw_only=True)
class Draw(Verb):
    """Draw pictures of all prompts of a file, for a judge to score later.

    The folder has GenEval's layout and a manifest of seeds, settings and hashes. Repeat the command after an interruption:
    finished pictures are kept.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder, a shipped pack's name, or a hub id."""
    prompts: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """One prompt per line (.txt), or objects with the field prompt (.jsonl), as in GenEval."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """Output folder."""
    num: Annotated[int, tyro.conf.arg(name="num", aliases=["-n"])] = 4
    """Pictures per prompt."""
    seed: int = 0
    """Seed of the first picture; the others count up."""
    steps: int = 25
    """Steps from noise to picture."""
    guidance: float | None = None
    """Classifier-free guidance; None uses the pack's own."""
    size: int | None = None
    """Side in pixels; None uses the size that the pack was trained at."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    trust: bool = False
    """Import packages outside xfusion that the pack names."""

    def run(self, console: Console) -> Answer:
        from xfusion.apps.commands.pictures import save
        from xfusion.evaluation.drawn import draw_folder, read_prompts

        if self.num < 1 or self.steps < 1 or not 0 <= self.seed < 2**62:
            raise UsageError("-n and --steps are at least 1, --seed is from 0 to 2^62 - 1")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UsageError(f"--guidance {self.guidance}: give a number, such as 3; 1 is off")
        choose_device(self.device)
        as_folder(self.out)
        prompts = read_prompts(self.prompts)
        model = load_model(self.model, device=self.device, trust=self.trust)
        guidance = model.guidance if self.guidance is None else self.guidance
        settings = {"steps": self.steps, "guidance": guidance, "size": self.size}
        with progress(console) as report_progress:
            manifest = draw_folder(
                model,
                prompts,
                self.out,
                num=self.num,
                seed=self.seed,
                settings=settings,
                save=save,
                progress=report_progress,
            )
        count = len(manifest["pictures"])
        rows = [
            ("pictures", f"{count} in {self.out}, of {len(prompts)} prompts"),
            ("judge", f"xfusion judge {self.out} --by PACK|METRIC:OF"),
        ]
        return Answer(data={"out": str(self.out), "pictures": count, "prompts": len(prompts)}, text=table(rows))


@dataclass(frozen=True, kw_only=True)
class Judge(Verb):
    """Score a folder of `xfusion draw`, with a pack that embeds or captions and did not draw it, or with a metric.

    Metrics need the extra xfusion[eval], and weights from a hub or a folder: clip-score:ORG/MODEL[@REVISION], fid:FOLDER and
    kernel-distance:FOLDER, whose folder holds the reference pictures.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder with a manifest.json."""
    by: Annotated[str, tyro.conf.arg(metavar="PACK|METRIC:OF")]
    """The judge: a pack by its folder, name or hub id; or a metric."""
    encoder: Annotated[str | None, tyro.conf.arg(metavar="NAME[:SOURCE[:REVISION]]")] = None
    """Feature encoder of fid and kernel-distance, such as efficientnet_lite; None uses Inception v3."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """Also write the result to this JSON file."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    trust: bool = False
    """Import packages outside xfusion that the pack names."""

    def run(self, console: Console) -> Answer:
        from xfusion.apps.commands.recipe import read_encoder
        from xfusion.evaluation.drawn import MANIFEST, judge, judge_by
        from xfusion.storage import write_json

        if not (self.folder / MANIFEST).is_file():
            raise UsageError(f"{self.folder} has no {MANIFEST}: make one with xfusion draw")
        try:
            encoder = read_encoder(self.encoder) if self.encoder else None
        except ValueError as error:
            raise UsageError(str(error)) from error
        if self.out:
            as_file(self.out)
        device = choose_device(self.device)
        with progress(console) as report_progress:
            result = judge_by(self.folder, self.by, encoder=encoder, device=device, progress=report_progress)
        if result is None and encoder is not None:
            raise UsageError(f"--encoder {self.encoder}: {self.by} is a pack, which looks through its own")
        if result is None:
            model = load_model(self.by, device=self.device, trust=self.trust)
            with progress(console) as report_progress:
                result = judge(self.folder, model, progress=report_progress)
        if self.out:
            write_json(self.out, result)
        rows = [(k, f"{v:.4g}" if isinstance(v, float) else str(v)) for k, v in result.items() if k != "settings"]
        return Answer(data=result, text=table(rows))
