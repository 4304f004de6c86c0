"""Run a comparison: every recipe is tuned in the same way, trained by the same loop and scored, per seed and share."""

from __future__ import annotations

import gc
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from PIL import Image as PILImage

from xfusion import checkpoint
from xfusion.backbone import Backbone
from xfusion.comparison.cost import (
    StageCost,
    count_flops,
    flops_of_encoder,
    measure_time,
    peak_memory,
    samples_per_step,
    tokens_added,
    trainable_parameters,
)
from xfusion.comparison.plan import (
    CHOOSE_BY,
    GUIDANCES,
    RATE_FACTORS,
    TRIAL_SEED,
    Entry,
    Plan,
    recipes_by_label,
    refuse_unlike,
    share_of,
    with_plan,
)
from xfusion.comparison.results import (
    REAL,
    SUMMARY,
    finite_scores,
    learning_curves,
    portable,
    read_events,
    refuse_changed,
    refuse_unequal,
    run_name,
    seconds_trained,
    write_strip,
)
from xfusion.comparison.table import SCORES, summarise
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import Sounds, Source, open_source
from xfusion.evaluation.machine import commit, machine
from xfusion.evaluation.run import Progress, check, evaluate, silent
from xfusion.evaluation.suites.emoji import choose_examples
from xfusion.evaluation.unseen import held_out
from xfusion.evaluation.verify import text_keeping
from xfusion.modalities.audio import AudioModality
from xfusion.modalities.image import ImageModality
from xfusion.model import Model, build
from xfusion.storage import named_in_errors, read_json, write_json
from xfusion.training import states
from xfusion.training.loop import Diverged, train
from xfusion.training.precision import choose_compute_dtype
from xfusion.training.stages import Recipe

PARAMETER_TOLERANCE = 0.02
"""Largest relative difference of a matched number of parameters from the first recipe's."""
SEEDS_APART = 100_000
"""Run s draws picture i with the noise seed ``s * SEEDS_APART + i``."""


def compare(
    recipes: Sequence[str] | Mapping[str, Recipe],
    plan: Plan,
    *,
    out: str | os.PathLike[str],
    work: str | os.PathLike[str] | None = None,
    backbone: Backbone | None = None,
    device: torch.device | str = "cpu",
    source: Source | None = None,
    held: Source | None = None,
    encoder: Any = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train and score recipes under equal conditions, and report whether they differ.

    Finished runs are not repeated, and interrupted ones resume: call it again with the same settings. Several processes that
    share ``out`` and ``work`` may run at once: each takes runs that no other process is working on.

    Args:
        recipes: names as accepted by `xfusion.recipes.base.find`, or recipes by name. The first is the reference.
        plan: settings shared by all recipes.
        out: folder of the results: ``RECIPE-seedS.json`` and ``.png``, ``RECIPE-trials.json``, ``comparison.json``.
        work: folder of the training runs; None uses ``runs/compare/NAME``.
        backbone: an already loaded base.
        device: device to load the base to, if none is given.
        source: the opened training pictures, or sounds, instead of a spec.
        held: the held-out pictures, or sounds, of ``source``.
        encoder: picture encoder for feature scores; None uses the suite's own. Models trained with it get no such scores.
        command: the command that reproduces the comparison, to be recorded.
        progress: called with the progress of each part.

    Returns:
        what `summarise` returns.

    Raises:
        XFusionError: recipes cannot be compared (modality, base, data, codec, size, budget), a number of parameters cannot be
            matched, ``out`` has results made with other settings, or the loss of some runs or of all trials of a recipe was not
            finite; the other runs are then finished.
    """
    comparison = _Comparison(recipes, plan, Path(out), work, backbone, device, source, held, encoder, command, progress)
    comparison.run()
    return summarise(out)


def _at_rate(recipe: Recipe, factor: float, seed: int) -> Recipe:
    stages = tuple(replace(stage, rate=stage.rate * factor) for stage in recipe.stages)
    return replace(recipe.with_model(init_seed=seed), stages=stages, seed=seed)


class _Comparison:
    """The state of one call of `compare`."""

    def __init__(
        self,
        recipes: Sequence[str] | Mapping[str, Recipe],
        plan: Plan,
        out: Path,
        work: str | os.PathLike[str] | None,
        backbone: Backbone | None,
        device: torch.device | str,
        source: Source | None,
        held: Source | None,
        encoder: Any,
        command: str | None,
        progress: Progress | None,
    ):
        self.plan, self.out, self.command = plan, out, command
        self.work = Path(work) if work is not None else Path("runs") / "compare" / out.name
        self.progress: Progress = progress or silent
        self.encoder, self.held = encoder, held
        self._check_plan()
        entries = [
            Entry(label=label, recipe=with_plan(recipe, plan)) for label, recipe in recipes_by_label(recipes).items()
        ]
        if backbone is not None:  # a given base is used by all recipes, like the plan's
            entries = [replace(e, recipe=with_plan(e.recipe, replace(plan, backbone=backbone.source))) for e in entries]
        refuse_unlike(entries, source is not None)
        self.modality = entries[0].recipe.model.modality
        check(self.modality.suite, dict(plan.evaluation) | ({} if encoder is None else {"encoder": encoder}))
        self._check_choice()
        base = entries[0].recipe.model.backbone
        self.progress("loading the base", 0, 1)
        self.backbone = backbone or Backbone.load(base.source, revision=base.revision, device=device)
        data = entries[0].recipe.data
        self.source = source or open_source(data, special_tokens=self.backbone.special_tokens)
        if isinstance(self.source, Sounds) != isinstance(self.modality, AudioModality.Config):
            raise XFusionError(
                f"{self.source.spec} holds no {self.modality.media}, which {entries[0].label} is of: name some by --data"
            )
        if plan.held is not None:
            self.held = held_out(plan.held, self.source)
        if source is not None:
            entries = [replace(e, recipe=replace(e.recipe, data=source.spec)) for e in entries]
        self.guided: set[str] = set()
        """Labels of recipes whose drawings have a strength of guidance; sounds are made without."""
        for entry in entries:  # refuse a recipe that cannot be built before training another
            try:
                model = build(entry.recipe.model, self.backbone)
            except XFusionError as error:
                raise XFusionError(f"{entry.label}: {error}") from error
            if "draw" in model.capabilities and isinstance(self.modality, ImageModality.Config):
                self.guided.add(entry.label)
        self.entries = self._match_parameters(entries) if plan.match_parameters else entries
        self.parts = {share: share_of(self.source, share) for share in plan.shares}
        self.costs: dict[tuple[str, float], tuple[list[StageCost], dict[str, Any]]] = {}
        self.planned: dict[tuple[str, float], tuple[Recipe, dict[str, Any]]] = {}
        for share in plan.shares:
            for entry in self.entries:  # the others must match the first one's budget
                self.planned[entry.label, share] = self._with_budget(entry, share)

    def _check_plan(self) -> None:
        plan = self.plan
        if self.out.exists() and not self.out.is_dir():
            raise XFusionError(f"{self.out} is a file: name a folder for the results")
        if plan.samples < 1:
            raise XFusionError(f"samples {plan.samples}: at least 1")
        if not plan.seeds or len(set(plan.seeds)) != len(plan.seeds):
            raise XFusionError(f"seeds {list(plan.seeds)}: at least one, each once")
        if TRIAL_SEED in plan.seeds or min(plan.seeds) < 0:
            raise XFusionError(f"seeds {list(plan.seeds)}: from 0 on, without {TRIAL_SEED}, which trials have")
        if not plan.shares or any(not 0 < s <= 1 for s in plan.shares) or len(set(plan.shares)) != len(plan.shares):
            raise XFusionError(f"shares {list(plan.shares)}: above 0 and up to 1, each once, such as 0.1 0.3 1.0")
        if not 1 <= plan.trials <= len(RATE_FACTORS):
            raise XFusionError(f"trials {plan.trials}: from 1 (nothing is tuned) to {len(RATE_FACTORS)}")
        reserved = [name for name in ("seed", "part", "source", "held", "encoder") if name in plan.evaluation]
        if reserved:
            raise XFusionError(f"the setting {reserved[0]!r} of the evaluation is the comparison's own: leave it out")
        if plan.trials > 1 and "guidance" in plan.evaluation:
            raise XFusionError(f"guidance is tuned by {plan.trials} trials and also given: leave one out")

    def _check_choice(self) -> None:
        """Refuse scores that trials cannot choose by."""
        trials, choose_by = self.plan.trials, self.plan.choose_by
        if trials == 1:
            if choose_by != CHOOSE_BY:
                raise XFusionError(
                    f"choose_by {', '.join(choose_by)}: one trial leaves nothing to choose; give more trials"
                )
            return
        known = [name for name, score in SCORES.items() if score.media == self.modality.media]
        if unknown := [name for name in choose_by if name not in known]:
            raise XFusionError(
                f"trials choose by {unknown[0]!r}, which is no score of {self.modality.media}: name, by --choose-by, some of"
                f" {', '.join(known)}"
            )
        if len({SCORES[name].better for name in choose_by}) != 1:
            raise XFusionError(
                f"trials choose by the mean of {', '.join(choose_by)}: name at least one score, all higher or all lower is better"
            )

    # -- equal parameters, equal budget

    def _match_parameters(self, entries: list[Entry]) -> list[Entry]:
        """Every mechanism at the size whose number of trainable parameters is closest to the first one's."""

        def count(recipe: Recipe) -> int:
            return trainable_parameters(build(recipe.model, self.backbone))

        target = count(entries[0].recipe)
        matched_entries = []
        for number, entry in enumerate(entries):
            self.progress("matching parameters", number, len(entries))
            own_count = count(entry.recipe)
            best_count, best_recipe = own_count, entry.recipe
            for fusion in entry.recipe.model.fusion.sizes(self.backbone.num_layers) if number else ():
                recipe = entry.recipe.with_model(fusion=fusion)
                try:
                    num_parameters = count(recipe)
                except XFusionError:  # wider than the base itself
                    break
                if abs(num_parameters - target) < abs(best_count - target):
                    best_count, best_recipe = num_parameters, recipe
                if num_parameters > target:  # smallest first: the next ones are farther away
                    break
            if abs(best_count - target) > PARAMETER_TOLERANCE * target:
                raise XFusionError(
                    f"{entry.label} cannot be matched to {entries[0].label}: its nearest size trains {best_count:,} parameters,"
                    f" {entries[0].label} {target:,}, and {PARAMETER_TOLERANCE:.0%} is allowed; give one of them another size"
                )
            matched = {"own": own_count, "matched": best_count, "first": target}
            matched_entries.append(replace(entry, recipe=best_recipe, matched=matched))
        return matched_entries

    def _with_budget(self, entry: Entry, share: float) -> tuple[Recipe, dict[str, Any]]:
        """The recipe with its number of steps, and its budget."""
        plan, reference = self.plan, self.entries[0]
        *earlier_stages, last_stage = entry.recipe.stages
        earlier_samples = sum(stage.steps * samples_per_step(stage) for stage in earlier_stages)
        per_step = samples_per_step(last_stage)
        if plan.budget == "samples" or entry is reference:
            steps = (plan.samples - earlier_samples) // per_step
        else:
            steps = self._steps_for(entry, share, self.planned[reference.label, share][1]["flops"])
        if steps < 1:
            earlier_text = f" behind {earlier_samples} samples of earlier stages" if earlier_samples else ""
            raise XFusionError(
                f"{entry.label}: {plan.samples} samples are less than one step of {per_step}{earlier_text}; give more"
            )
        recipe = replace(entry.recipe, stages=(*earlier_stages, replace(last_stage, steps=steps)))
        budget: dict[str, Any] = {
            "kind": plan.budget,
            "asked_samples": plan.samples,
            "steps": [stage.steps for stage in recipe.stages],
            "samples": earlier_samples + steps * per_step,
        }
        if plan.budget == "flops":
            costs, _ = self._cost(entry, share)
            budget["flops"] = sum(c.total(s.steps) for c, s in zip(costs, recipe.stages, strict=True))
        if entry is not reference:
            refuse_unequal(entry.label, budget, reference.label, self.planned[reference.label, share][1])
        return recipe, budget

    def _steps_for(self, entry: Entry, share: float, flops: int) -> int:
        """Steps of the last stage that come closest to this many FLOPs."""
        costs, _ = self._cost(entry, share)
        remaining = flops - sum(c.total(s.steps) for c, s in zip(costs[:-1], entry.recipe.stages[:-1], strict=True))
        last_cost = costs[-1]
        steps = remaining // last_cost.step
        for _ in range(4):  # cached texts cost more at the beginning
            steps = round((remaining - (last_cost.total(steps) - steps * last_cost.step)) / last_cost.step)
        return steps

    def _cost(self, entry: Entry, share: float) -> tuple[list[StageCost], dict[str, Any]]:
        """FLOPs by stage, and the costs that do not depend on a run."""
        key = (entry.label, share)
        if key not in self.costs:
            self.progress(f"{entry.label}: counting", 0, 1)
            model = build(entry.recipe.model, self.backbone)
            stages = [count_flops(model, stage, self.parts[share]) for stage in entry.recipe.stages]
            last_cost = stages[-1]
            facts: dict[str, Any] = {
                "trainable_parameters": trainable_parameters(model),
                "flops_per_sample": last_cost.training,
                "forward_flops_per_sample": last_cost.forward,
                "flops_per_new_text": last_cost.text,
                "encoder_flops": flops_of_encoder(entry.recipe.model),
                "tokens_per_picture": tokens_added(model),
                "time": None,
            }
            self.costs[key] = stages, facts
        return self.costs[key]

    # -- all runs

    def run(self) -> None:
        labels = self._labels()
        diverged: dict[str, XFusionError] = {}
        settings = self._tune_all(diverged)
        runs = [
            (entry, share, seed)
            for share in sorted(self.plan.shares, reverse=True)
            for seed in self.plan.seeds
            for entry in self.entries
            if entry.label in settings
        ]

        def is_finished(entry: Entry, share: float, seed: int) -> bool:
            return self._is_finished(entry, share, seed, settings[entry.label])

        def run_if_free(entry: Entry, share: float, seed: int) -> bool:
            """Do a run, unless it is finished, has diverged or another process is working on it."""
            name = run_name(entry.label, seed, share)
            with self._locked(name) as locked:
                if not locked or name in diverged or is_finished(entry, share, seed):
                    return False
                counter = f"[{1 + sum(is_finished(*run) for run in runs)}/{len(runs)}]"
                try:
                    self._run(entry, share, seed, settings[entry.label], counter)
                except Diverged as error:  # it must not keep the others from their turn
                    diverged[name] = error
                return True

        for run in runs:  # refuse results made with other settings before writing anything
            is_finished(*run)
        self._write_plan(labels)
        while sum(run_if_free(*run) for run in runs):  # another process may have died during a run
            pass
        if self.plan.measure_time:
            for num_done, entry in enumerate(self.entries):
                self.progress("measuring time", num_done, len(self.entries))
                self._measure_time(entry)
        if diverged:
            (name, error), *others = diverged.items()
            names = f" (and those of {', '.join(run for run, _ in others)})" if others else ""
            raise XFusionError(
                f"{name}: {str(error).partition(':')[0]}{names}; the other runs are finished, see them by xfusion compare --out"
                f" {self.out}; give this recipe a lower rate, under another label"
            )

    @contextmanager
    def _locked(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Lock a part of the work against other processes of the same comparison; the system frees the locks of a dead one.

        Yields whether the lock was obtained: without ``wait`` another process may hold it.
        """
        with named_in_errors(self.work):
            self.work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.work / f".{name}.lock")
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _labels(self) -> list[str]:
        """All recipes of the folder. Recipes and seeds may be added later; the first recipe stays the first."""
        path, labels = self.out / SUMMARY, [e.label for e in self.entries]
        earlier = read_json(path)["recipes"] if path.exists() else []
        if earlier and earlier[0] != labels[0]:
            raise XFusionError(
                f"{self.out} compares with {earlier[0]!r}, and now {labels[0]!r} comes first: name the same one first, or"
                " another --out"
            )
        return list(dict.fromkeys([*earlier, *labels]))

    def _write_plan(self, labels: list[str]) -> None:
        """Write the file that records what is compared."""
        path = self.out / SUMMARY
        with named_in_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        earlier = read_json(path) if path.exists() else {}
        prompts, pictures = self._sample_grid(earlier.get("prompts"))
        differences = {
            entry.label: [
                {"where": field, "first": first_value, "this": this_value}
                for field, first_value, this_value in checkpoint.differing(
                    *(
                        checkpoint.to_json(self.planned[compared.label, self.plan.shares[0]][0])
                        for compared in (self.entries[0], entry)
                    )
                )
                if not re.match(r"model\.fusion|stages\.\d+\.steps", field)  # the budget determines the steps
            ]
            for entry in self.entries[1:]
        }
        differences = earlier.get("differences", {}) | differences
        commands = [*(earlier.get("command") or "").splitlines(), *([self.command] if self.command else [])]
        if pictures and not (earlier and (self.out / REAL).exists()):
            write_strip(self.out / REAL, pictures, self.entries[0].recipe.model.image.sizes[0])
        content = {
            "recipes": labels,
            "prompts": earlier.get("prompts", prompts),  # those of the real pictures beside it
            "differences": differences,
            "command": "\n".join(dict.fromkeys(commands)) or None,
            "licence": self.source.licence,
        }
        write_json(path, portable(content))

    def _sample_grid(self, earlier: list[str] | None = None) -> tuple[list[str], list[PILImage.Image]]:
        """Names and real pictures of the sample grids: those of earlier calls if this call's smallest share has them, else chosen
        from it, never from the validation part. For sounds, only names.
        """
        part = self.parts[min(self.plan.shares)]
        indices = choose_examples(part.examples, self.plan.num_shown, self._test_part)
        by_name = {example.captions[0]: i for i, example in enumerate(part.examples)}
        if earlier and all(name in by_name for name in earlier):
            indices = [by_name[name] for name in earlier]
        names = [part.examples[i].captions[0] for i in indices]
        if not isinstance(self.modality, ImageModality.Config):
            return names, []
        size = self.entries[0].recipe.model.image.sizes[0]
        return names, [part.picture(i, size) for i in indices]

    @property
    def _test_part(self) -> Literal["all", "test"]:
        return "test" if self.plan.trials > 1 else "all"

    def _train(self, recipe: Recipe, source: Source, work: Path, title: str) -> Model:
        steps = sum(stage.steps for stage in recipe.stages)
        resume = bool(states.list_states(work / "state"))
        if resume:  # a run may be resumed at another rate, which is no run of a comparison
            plan = states.newest_plan(work / "state")
            recorded = checkpoint.from_json(plan["recipe"], trust=True, where=str(work))
            refuse_changed(work / "state", *map(checkpoint.to_json, (recorded, recipe)))

        def listen(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                self.progress(title, event["step"] + 1, steps)

        self.progress(title, 0, steps)
        return train(
            recipe,
            out=work,
            source=source,
            resume=resume,
            backbone=self.backbone,
            compile=self.plan.compile,
            preview_every=0,
            checkpoint_every=120.0,
            listener=listen,
        )

    def _evaluate(self, model: Model, source: Source, title: str, **settings: Any) -> dict[str, Any]:
        settings = {**self.plan.evaluation, **settings}
        if self.held is not None:
            settings["held"] = self.held
        if self.encoder is not None:
            settings["encoder"] = self.encoder

        def report_progress(part: str, done: int, total: int) -> None:
            self.progress(f"{title}: {part}", done, total)

        return evaluate(model, self.modality.suite, source=source, progress=report_progress, **settings)

    # -- tuning

    def _tune_all(self, diverged: dict[str, XFusionError]) -> dict[str, dict[str, Any]]:
        """Every recipe's learning rate and guidance; those that another process is tuning come last, and those whose every trial
        diverged are put into ``diverged``.
        """
        tunings: dict[str, dict[str, Any]] = {}
        for wait in (False, True):
            for entry in (e for e in self.entries if e.label not in tunings and f"{e.label}-trials" not in diverged):
                name = f"{entry.label}-trials"
                with self._locked(name, wait=wait) as locked:
                    try:
                        if locked:
                            tunings[entry.label] = self._tune(entry)
                    except Diverged as error:
                        diverged[name] = error
        return tunings

    def _tune(self, entry: Entry) -> dict[str, Any]:
        """Learning rate and guidance of a recipe, chosen once on the validation part and recorded."""
        plan, trials = self.plan, self.plan.trials
        if trials == 1:
            return {"trials": 1, "rate_factor": 1.0, "guidance": plan.evaluation.get("guidance")}
        best = max if SCORES[plan.choose_by[0]].better == "higher" else min
        path, share = self.out / f"{entry.label}-trials.json", max(plan.shares)
        recipe, budget = self.planned[entry.label, share]
        expected = portable(
            {
                "recipe": entry.label,
                "seed": TRIAL_SEED,
                "budget": budget,
                "settings": self._settings(recipe, share, {"trials": trials, "choose_by": list(plan.choose_by)}),
            }
        )
        content: dict[str, Any] = {**expected, "rates": [], "guidances": [], "chosen": None}
        if path.exists():
            content = read_json(path)
            refuse_changed(path, {k: content.get(k) for k in expected}, expected)
        factors, guidances = RATE_FACTORS[:trials], GUIDANCES[:trials] if entry.label in self.guided else ()
        common: dict[str, Any] = {"seed": TRIAL_SEED * SEEDS_APART, "part": "validation"}
        for number, factor in enumerate(factors[len(content["rates"]) :], start=len(content["rates"]) + 1):
            title = f"{entry.label}: trial {number} of {trials}"
            try:
                model = self._train(
                    _at_rate(recipe, factor, TRIAL_SEED), self.parts[share], self._trial_folder(entry, factor), title
                )
            except Diverged as error:
                result = {"score": None, "diverged": str(error).partition(":")[0]}
            else:
                scores = self._evaluate(model, self.parts[share], title, **common)
                result = {"score": self._trial_score(entry, scores), "scores": finite_scores(scores)}
            content["rates"].append({"factor": factor, **result})
            write_json(path, content)
        if not (finite := [trial for trial in content["rates"] if trial["score"] is not None]):
            raise Diverged(f"the loss was not finite at any of {trials} rates")
        # Among equals the first is chosen, and the recipe's own rate comes first.
        factor = best(finite, key=lambda trial: trial["score"])["factor"]
        if len(content["guidances"]) < len(guidances):
            title = f"{entry.label}: guidance"
            model = self._train(
                _at_rate(recipe, factor, TRIAL_SEED), self.parts[share], self._trial_folder(entry, factor), title
            )
            for guidance in guidances[len(content["guidances"]) :]:
                scores = self._evaluate(model, self.parts[share], title, guidance=guidance, **common)
                trial_result = {
                    "guidance": guidance,
                    "score": self._trial_score(entry, scores),
                    "scores": finite_scores(scores),
                }
                content["guidances"].append(trial_result)
                write_json(path, content)
        guidance = best(content["guidances"], key=lambda trial: trial["score"])["guidance"] if guidances else None
        content["chosen"] = {"rate_factor": factor, "guidance": guidance}
        write_json(path, content)
        for tried_factor in factors:
            shutil.rmtree(self._trial_folder(entry, tried_factor), ignore_errors=True)
        choice = {} if plan.choose_by == CHOOSE_BY else {"choose_by": list(plan.choose_by)}
        return {"trials": trials, **content["chosen"], **choice}

    def _trial_folder(self, entry: Entry, factor: float) -> Path:
        return self.work / f"{entry.label}-trial-rate{factor:g}"

    def _trial_score(self, entry: Entry, scores: dict[str, Any]) -> float:
        measured = [name for name in SCORES if isinstance(scores.get(name), (int, float))]
        values = [scores[name] for name in self.plan.choose_by if name in measured]
        if not values:
            raise XFusionError(
                f"trials choose by {', '.join(self.plan.choose_by)}, and {entry.label} has none of these: name, by --choose-by,"
                f" some of {', '.join(measured)}"
            )
        return sum(values) / len(values)

    # -- one run

    def _measure_time(self, entry: Entry) -> None:
        """Time a recipe after all runs, when nothing else computes, and add it to the runs of its largest share."""
        share = max(self.plan.shares)
        with self._locked(f"{entry.label}-time", wait=True):
            paths = [self.out / f"{run_name(entry.label, seed, share)}.json" for seed in self.plan.seeds]
            untimed = {
                path: run for path in paths if path.exists() and (run := read_json(path))["cost"]["time"] is None
            }
            if not untimed:
                return
            time = measure_time(
                entry.recipe,
                self.parts[share],
                self.backbone,
                steps=self.plan.evaluation.get("steps", 25),
                compile=self.plan.compile,
            )
            for path, run in untimed.items():
                write_json(path, run | {"cost": run["cost"] | {"time": time}})

    def _settings(self, recipe: Recipe, share: float, tuning: dict[str, Any]) -> dict[str, Any]:
        base = self.backbone
        return {
            "recipe": checkpoint.to_json(recipe),
            "base": base.identity,
            "data": self.source.spec,
            "share": share,
            "num_pictures": len(self.parts[share]),
            "evaluation": dict(self.plan.evaluation),
            "part": self._test_part,
            "tuning": tuning,
            "dtype": str(choose_compute_dtype(base.device)[0]).removeprefix("torch."),
        } | ({} if self.plan.held is None else {"held": self.plan.held})

    def _expected_record(
        self, entry: Entry, share: float, seed: int, tuning: dict[str, Any]
    ) -> tuple[Recipe, dict[str, Any]]:
        """The recipe of a run, and the settings that its file records."""
        recipe, budget = self.planned[entry.label, share]
        recipe = _at_rate(recipe, tuning["rate_factor"], seed)
        settings = self._settings(recipe, share, tuning) | {"matched_parameters": entry.matched}
        return recipe, portable({"recipe": entry.label, "seed": seed, "budget": budget, "settings": settings})

    def _is_finished(self, entry: Entry, share: float, seed: int, tuning: dict[str, Any]) -> bool:
        """Whether a run is already in the folder; one made with other settings is refused."""
        path = self.out / f"{run_name(entry.label, seed, share)}.json"
        if not path.exists():
            return False
        recorded, (_, expected) = read_json(path), self._expected_record(entry, share, seed, tuning)
        refuse_changed(path, {k: recorded.get(k) for k in expected}, expected)
        return True

    def _run(self, entry: Entry, share: float, seed: int, tuning: dict[str, Any], counter: str) -> None:
        recipe, record = self._expected_record(entry, share, seed, tuning)
        name = run_name(entry.label, seed, share)
        path, work, title = self.out / f"{name}.json", self.work / name, f"{counter} {name}"
        part = self.parts[share]
        with peak_memory(self.backbone.device) as memory:
            model = self._train(recipe, part, work, title)
        guidance = {} if tuning["guidance"] is None else {"guidance": tuning["guidance"]}
        scores = self._evaluate(model, part, title, seed=seed * SEEDS_APART, part=self._test_part, **guidance)
        scoring_settings = scores.pop("settings")
        scores |= text_keeping(model)
        prompts, pictures = self._sample_grid(read_json(self.out / SUMMARY)["prompts"])
        if "draw" in model.capabilities and pictures:
            steps = {"steps": self.plan.evaluation["steps"]} if "steps" in self.plan.evaluation else {}
            drawings = model.draw(prompts, seed=0, **steps, **guidance)
            write_strip(path.with_suffix(".png"), drawings, model.image.sizes[0])
        _, cost = self._cost(entry, share)
        events = read_events(work / "log.jsonl")
        result = {
            **record,
            "scores": finite_scores(scores),
            "scored": {k: v for k, v in scoring_settings.items() if k != "versions"},
            "preserves_text": bool(model.fusion.preserves_text),
            "regime": model.regime,
            "cost": cost | {"peak_memory": memory, "wall_minutes": round(seconds_trained(events) / 60, 3)},
            "learning": learning_curves(events),
            "prompts": prompts,
            "machine": machine(),
            "commit": commit(),
        }
        write_json(path, portable(result))
        shutil.rmtree(work / "state", ignore_errors=True)  # the pack stays
        del model
        gc.collect()
