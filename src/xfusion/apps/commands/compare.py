"""`compare`: recipes against each other at equal budget, with paired seeds and confidence intervals."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from xfusion.apps.commands.base import Answer, UsageError, Verb, as_folder, choose_device, progress, size_text, table
from xfusion.apps.commands.proof import read_setting


@dataclass(frozen=True, kw_only=True)
class Compare(Verb):
    """Compare recipes at equal budget: paired seeds, intervals, costs, one page.

    Trains every recipe once per seed, scores it, and writes one JSON file per run, a table and index.html to the folder.
    The first recipe is the baseline. Stop with Ctrl-C; the same command resumes where it stopped. Several processes can
    run the same command: each takes runs that no other is working on. Without a recipe, the table and the page are made
    from the existing files.
    """

    recipes: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE...")] = ()
    """Names of `xfusion list`, file.py:function or package.module:function; optionally with arguments in parentheses and a
    label for the results before =, as in slow=single_tower(rate=1e-3)."""
    samples: int = 60_000
    """Training samples per run, drawing and captioning together."""
    seeds: int = 5
    """Runs per recipe, with the seeds 0, 1, ...; below five no interval is printed."""
    budget: Literal["samples", "flops"] = "samples"
    """What is held equal: samples, or the executed FLOPs that the first recipe needs for them."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = None
    """Folder of the results; None means comparison/RECIPE-RECIPE...."""
    backbone: Annotated[str | None, tyro.conf.arg(metavar="SOURCE")] = None
    """The base of all recipes: hub id, folder or .gguf file; None uses each recipe's own."""
    data: Annotated[str | None, tyro.conf.arg(metavar="SPEC")] = None
    """The data of all recipes: emoji, emoji:128, a folder, a .jsonl file; None uses each recipe's own."""
    held: Annotated[str | None, tyro.conf.arg(metavar="SPEC")] = None
    """Held-out pictures or sounds for scoring; None uses the held-out split of the data."""
    size: int | None = None
    """Side of the pictures in pixels, for all recipes; None uses each recipe's own."""
    share: Annotated[tuple[float, ...], tyro.conf.arg(metavar="SHARE...")] = (1.0,)
    """Fractions of the data to train on, such as 0.1 0.3 1.0, to see how much data a recipe needs."""
    trials: int = 1
    """Learning rates tried per recipe on the validation part, and as many guidance values where it draws; 1 tunes nothing, and
    the page says so."""
    choose_by: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SCORE...")] = ()
    """Scores whose mean on the validation part decides the trials, such as held_caption_mrr or held_word_errors; none is
    fit_retrieval_pixel_at_10 and fit_caption_f1."""
    match_parameters: bool = False
    """Choose for every mechanism the size that trains as many parameters as the first recipe, within 2 %."""
    draw: int | None = None
    """Drawing samples per step, for all recipes; None uses each recipe's own."""
    caption: int | None = None
    """Captioning samples per step, for all recipes; None uses each recipe's own."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE...")] = ()
    """Settings of the scoring, such as max_drawn=64 max_captioned=64 max_held=100 features=false."""
    measure_time: bool = False
    """Also measure the time of a step and of sampling; only on an otherwise idle machine."""
    compile: bool = True
    """Compilation of each layer in training, on unless --no-compile."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def run(self, console: Console) -> Answer:
        from xfusion.apps import comparison_page
        from xfusion.comparison import Plan, compare, summarise
        from xfusion.comparison.plan import CHOOSE_BY
        from xfusion.training.loop import Interrupted

        out = self.folder()
        if not self.recipes:
            if self.out is None:
                raise UsageError("compare: name recipes, or a folder of results with --out")
            summary = summarise(out)
        else:
            if self.seeds < 1:
                raise UsageError(f"--seeds {self.seeds}: at least 1")
            plan = Plan(
                samples=self.samples,
                budget=self.budget,
                seeds=tuple(range(self.seeds)),
                shares=self.share,
                trials=self.trials,
                match_parameters=self.match_parameters,
                backbone=self.backbone,
                data=self.data,
                held=self.held,
                size=self.size,
                draw=self.draw,
                caption=self.caption,
                evaluation=dict(read_setting(text) for text in self.set),
                measure_time=self.measure_time,
                compile=self.compile,
                choose_by=self.choose_by or CHOOSE_BY,
            )
            device = choose_device(self.device)
            try:
                with progress(console) as report_progress:
                    summary = compare(
                        self.recipes, plan, out=out, device=device, command=self.command(), progress=report_progress
                    )
            except Interrupted as stop:
                console.print(f"{str(stop).split(';')[0]}; the same command goes on")
                raise KeyboardInterrupt from stop
        page = comparison_page.write(out / "index.html", summary, out)
        data = {"out": str(out), "page": str(page), **summary}
        return Answer(data=data, text=f"{summary_text(summary)}\npage: {page}")

    def folder(self) -> Path:
        """Where the results are."""
        from xfusion.comparison.plan import split_label

        return as_folder(self.out or Path("comparison") / "-".join(split_label(name)[0] for name in self.recipes))

    def command(self) -> str:
        """The command that reproduces the comparison; absolute paths are reduced to file names."""

        def portable(text: str) -> str:
            return Path(text).name if Path(text).is_absolute() else text

        words = ["xfusion", "compare", *map(portable, self.recipes)]
        for name, value in vars(self).items():
            default = type(self).__dataclass_fields__[name].default
            if name in ("recipes", "json", "device") or value == default:
                continue
            option = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                words.append(option if value else "--no-" + option[2:])
            else:
                values = value if isinstance(value, tuple) else (value,)
                words += [option, *(portable(f"{v:g}" if isinstance(v, float) else str(v)) for v in values)]
        return shlex.join(words)


def summary_text(summary: dict[str, Any]) -> str:
    """The table for a terminal."""
    regimes = summary.get("regimes") or dict.fromkeys(summary["recipes"])
    several_regimes = len(set(regimes.values())) > 1
    names = {
        label: f"{recipe} ({regimes[label] or 'regime not recorded'})" if several_regimes else recipe
        for label, recipe in summary["called"].items()
    }
    lines, width = [], max(map(len, names.values()))
    for score in summary["scores"]:
        share = "" if score["share"] == 1 else f", {score['share']:.0%} of the {summary['media']}"
        references = [f"{kind} {score[kind]:.3f}" for kind in ("chance", "blind", "ceiling") if kind in score]
        lines.append(f"{score['title']}{share} ({'; '.join([score['better'] + ' is better', *references])})")
        for row in score["rows"]:
            lines.append(
                f"  {names[row['recipe']]:<{width}}  {mean_text(row):<36}  {difference_text(row['difference'])}".rstrip()
            )
    cost_rows = [(summary["called"][row["recipe"]], cost_text(row, summary["media"])) for row in summary["cost"]]
    text_rows = [(summary["called"][label], text_text(facts)) for label, facts in summary["text"].items()]
    return "\n".join(
        [*lines, "cost", table(cost_rows, "  "), "text", table(text_rows, "  "), *map("- {}".format, summary["notes"])]
    )


def mean_text(row: dict[str, Any]) -> str:
    """A mean with its interval, or why there is none."""
    if row["mean"] is None:
        return "not measured"
    return f"{row['mean']:.4g} {interval_text(row['interval'])}, n = {row['num_runs']}"


def interval_text(interval: list[float] | None) -> str:
    """An interval, or why there is none."""
    return f"[{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "(n < 5: no interval)"


def difference_text(difference: dict[str, Any] | None) -> str:
    """A paired difference with its verdict, and the number of seeds needed to detect it."""
    if difference is None:
        return ""
    num_seeds = difference["seeds_needed"]
    seeds = f"; {num_seeds} seeds find a difference this large" if num_seeds else ""
    interval = f" {interval_text(difference['interval'])}" if difference["interval"] else ""
    return f"{difference['mean']:+.4g}{interval}: {difference['verdict']}{seeds}"


def cost_text(row: dict[str, Any], media: str) -> str:
    """What a recipe costs, in one line."""
    flops = ", ".join(f"{v / 1e9:.4g} GFLOPs to learn a {_TASK[k]}" for k, v in row["flops_per_sample"].items())
    peak = row["peak_memory"]["bytes"]
    parts = [
        f"{row['trainable_parameters']:,} trainable",
        flops,
        f"{row['tokens_per_picture']} tokens per {media.removesuffix('s')}",
        f"peak {size_text(peak)}" if peak else "peak memory not measured",
    ]
    if row["time"] and row["time"].get("step_seconds"):
        parts.append(f"{row['time']['step_seconds']:.3g} s per step")
    return ", ".join(parts)


_TASK = {"draw": "drawing", "caption": "name"}


def text_text(facts: dict[str, Any]) -> str:
    """Whether the base's text changed, as a sentence."""
    if facts["bit_equal"] == facts["num_runs"]:
        declared = "as declared" if facts["declared"] else "although not declared"
        return f"bit-identical to the base's in {facts['num_runs']} of {facts['num_runs']} runs, {declared}"
    broken = ", ALTHOUGH IT IS DECLARED" if facts["declared"] else ""
    return f"changed in {facts['num_runs'] - facts['bit_equal']} of {facts['num_runs']} runs{broken}"
