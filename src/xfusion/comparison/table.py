"""The table of a comparison, from its committed files alone."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xfusion.checkpoint import differing, from_json
from xfusion.comparison.intervals import FEWEST_RUNS, interval, paired
from xfusion.comparison.plan import TRIAL_SEED, heading, recipes_in_command
from xfusion.comparison.results import SUMMARY, refuse_unequal, run_name
from xfusion.data.sequence import XFusionError
from xfusion.storage import read_json


@dataclass(frozen=True, kw_only=True)
class Score:
    """Title of a score, which direction is better, and what the suite that measures it scores."""

    title: str
    better: Literal["higher", "lower"] = "higher"
    media: Literal["pictures", "sounds"] | None = "pictures"
    """As `Modality.Config.media`; None is beside any suite, so that trials cannot choose by it."""


SCORES: dict[str, Score] = {
    "fit_retrieval_pixel_at_1": Score(title="drawing, trained pictures: nearest in pixels, R@1"),
    "fit_retrieval_pixel_at_10": Score(title="drawing, trained pictures: nearest in pixels, R@10"),
    "fit_retrieval_feature_at_1": Score(title="drawing, trained pictures: nearest in features, R@1"),
    "fit_retrieval_feature_at_10": Score(title="drawing, trained pictures: nearest in features, R@10"),
    "held_retrieval_pixel_at_1": Score(title="drawing, unseen pictures: nearest in pixels, R@1"),
    "held_retrieval_pixel_at_10": Score(title="drawing, unseen pictures: nearest in pixels, R@10"),
    "held_retrieval_feature_at_1": Score(title="drawing, unseen pictures: nearest in features, R@1"),
    "held_retrieval_feature_at_10": Score(title="drawing, unseen pictures: nearest in features, R@10"),
    "fit_caption_exact": Score(title="naming, trained pictures: exact answer"),
    "fit_caption_f1": Score(title="naming, trained pictures: token F1"),
    "held_caption_mrr": Score(title="naming, unseen pictures: rank of the true name, MRR"),
    "held_caption_at_1": Score(title="naming, unseen pictures: true name first, R@1"),
    "held_caption_at_10": Score(title="naming, unseen pictures: true name among ten, R@10"),
    "held_embed_at_1": Score(title="naming, unseen pictures: true name first by cosine, R@1"),
    "held_match_at_1": Score(title="naming, unseen pictures: true name first by the matching head, R@1"),
    "held_caption_exact": Score(title="naming, unseen pictures: exact answer"),
    "held_caption_f1": Score(title="naming, unseen pictures: token F1"),
    "fit_at_1": Score(title="naming, trained sounds: true name first, R@1", media="sounds"),
    "fit_exact": Score(title="naming, trained sounds: exact answer", media="sounds"),
    "fit_word_errors": Score(title="transcribing, trained sentences: word error rate", better="lower", media="sounds"),
    "held_at_1": Score(title="naming, unheard sounds: true name first, R@1", media="sounds"),
    "held_exact": Score(title="naming, unheard sounds: exact answer", media="sounds"),
    "held_word_errors": Score(title="transcribing, unheard sentences: word error rate", better="lower", media="sounds"),
    "made_at_1": Score(title="saying codes: nearest to those of the asked word, R@1", media="sounds"),
    "text_perplexity_change": Score(
        title="text: perplexity of the fused stack minus the base's", better="lower", media=None
    ),
}
"""The scores that recipes are compared by. The files also have a suite's other numbers (chance, ceiling, blind rates)."""
SHARED_BUDGET = ("kind", "asked_samples")
"""Fields of a budget that all runs of a comparison share."""
SHARED_SETTINGS = (
    "base.fingerprint",
    "recipe.model.image.codec",
    "recipe.model.image.sizes",
    "recipe.model.audio.codec",
    "recipe.model.audio.seconds",
    "data",
    "held",
    "evaluation",
    "part",
    "tuning.trials",
    "tuning.choose_by",
    "dtype",
)
"""Settings that all runs of a comparison share."""


def summarise(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The table of a comparison, from its committed files alone.

    Args:
        folder: folder of the runs' JSON files.

    Returns:
        JSON values: ``name``, ``media`` (pictures or sounds), ``first``, ``recipes``, ``called`` (recipe -> its name with the
        given arguments), ``regimes``, ``shares``, ``budget``, ``scores`` (per share and score: a row per recipe with
        ``mean``, ``interval``, ``values`` by seed and the paired ``difference`` to the first), ``cost`` per recipe,
        ``learning``, ``contributions``, ``prompts``, ``drawn_otherwise`` (runs whose samples are of other prompts),
        ``differences``, ``notes``, ``command`` (one per line), ``settings``.

    Raises:
        XFusionError: there are no runs, or runs that cannot share a table (budget, base, codec, data, scoring).
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*-seed*.json"))
    runs = [read_json(path) for path in paths]
    if not runs:
        raise XFusionError(f"{folder} holds no result of a comparison (RECIPE-seedS.json)")
    plan = read_json(folder / SUMMARY) if (folder / SUMMARY).is_file() else {}
    _refuse_mixed(paths, runs)
    labels = {run["recipe"] for run in runs}
    planned_labels = plan.get("recipes", [])
    recipes = [label for label in planned_labels if label in labels] + sorted(labels - set(planned_labels))
    shares = sorted({run["settings"]["share"] for run in runs}, reverse=True)
    scores = [
        table
        for share in shares
        for name in SCORES
        if (table := _score_table(name, recipes, share, [r for r in runs if r["settings"]["share"] == share]))
    ]
    regimes = {label: regime_of(next(r for r in runs if r["recipe"] == label)) for label in recipes}
    _remove_unranked_verdicts(scores, regimes)
    # Another process may not have finished its run on the largest share yet.
    first = max((r for r in runs if r["recipe"] == recipes[0]), key=lambda r: r["settings"]["share"])
    _mark_untuned(scores, first["settings"]["tuning"])
    recipe_names = recipes_in_command(plan.get("command"))
    summary = {
        "name": folder.name,
        "media": "sounds" if _value_at(first["settings"], "recipe.model.audio") else "pictures",
        "first": recipes[0],
        "recipes": recipes,
        "called": {label: heading(label, recipe_names.get(label) or label) for label in recipes},
        "shares": shares,
        "seeds": sorted({run["seed"] for run in runs}),
        "num_runs": len(runs),
        "budget": first["budget"],
        "scores": scores,
        "regimes": regimes,
        "text": {label: _text_facts([r for r in runs if r["recipe"] == label]) for label in recipes},
        "cost": [_cost_row(label, [r for r in runs if r["recipe"] == label], shares[0]) for label in recipes],
        "learning": {label: _mean_curve([r for r in runs if _is_run_of(r, label, shares[0])]) for label in recipes},
        "contributions": contributions(folder),
        "prompts": plan.get("prompts", []),
        "drawn_otherwise": sorted(
            run_name(r["recipe"], r["seed"], r["settings"]["share"])
            for r in runs
            if r.get("prompts", plan.get("prompts", [])) != plan.get("prompts", [])
        ),
        "differences": {k: v for k, v in plan.get("differences", {}).items() if k in labels},
        "command": plan.get("command"),
        "licence": plan.get("licence"),
        "settings": first["settings"],
        "machine": first["machine"],
        "commits": sorted({run["commit"]["id"] for run in runs if run["commit"]}),
    }
    return summary | {"notes": _notes(summary, runs)}


def contributions(folder: Path) -> dict[str, dict[str, float]]:
    """Layer -> kind of position -> learned share of the other tower, mean over the files ``shares-*.json`` of a folder that
    have it.

    `xfusion evaluate PACK --suite shares --out FOLDER/shares-NAME.json` writes one for a run's pack.
    """
    results = [read_json(path) for path in sorted(folder.glob("shares-*.json"))]
    means: dict[str, dict[str, float]] = {}
    names = dict.fromkeys(name for result in results for name in result if name.startswith("share_layer"))
    for name in names:  # a tower with blocks at other layers has no share at these
        layer, _, kind = name.removeprefix("share_").partition("_")
        mean = statistics.fmean(result[name] for result in results if name in result)
        means.setdefault(layer.replace("layer", "layer "), {})[kind.replace("_", " ")] = mean
    return means


def _is_run_of(run: Mapping[str, Any], label: str, share: float) -> bool:
    return run["recipe"] == label and run["settings"]["share"] == share


def _refuse_mixed(paths: Sequence[Path], runs: Sequence[dict[str, Any]]) -> None:
    """Refuse runs that were made under different conditions."""
    first_of_share: dict[float, int] = {}
    for number, (path, run) in enumerate(zip(paths, runs, strict=True)):
        for key in ("recipe", "seed", "budget", "settings", "scores", "cost", "machine", "commit"):
            if key not in run:
                raise XFusionError(f"{path} is not a result of a comparison: it has no {key!r}")
        reference = first_of_share.setdefault(run["settings"]["share"], number)
        names = path.name, paths[reference].name
        refuse_unequal(names[0], run["budget"], names[1], runs[reference]["budget"])
        pairs = [(f"budget.{k}", run["budget"][k], runs[0]["budget"][k]) for k in SHARED_BUDGET]
        pairs += [(k, *(_value_at(r["settings"], k) for r in (run, runs[0]))) for k in SHARED_SETTINGS]
        for setting, run_value, reference_value in pairs:
            for field, other_value, value in differing(reference_value, run_value):
                raise XFusionError(
                    f"{path.name} and {paths[0].name} cannot stand in one table: {'.'.join(filter(None, (setting, field)))}"
                    f" is {value!r} and {other_value!r}"
                )
    encoders = {
        run["scored"].get("encoder"): path.name for path, run in zip(paths, runs, strict=True) if "scored" in run
    }
    encoders.pop(None, None)
    if len(encoders) > 1:
        (encoder, name), (other_encoder, other_name), *_ = encoders.items()
        raise XFusionError(
            f"{name} and {other_name} were scored by two encoders ({encoder}, {other_encoder}): they cannot stand in one"
            " table"
        )


def _value_at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _score_table(
    name: str, recipes: Sequence[str], share: float, runs: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """One score of all recipes for one share."""
    values = {
        label: {
            r["seed"]: r["scores"][name] for r in runs if r["recipe"] == label and r["scores"].get(name) is not None
        }
        for label in recipes
    }
    if not any(values.values()):
        return None
    score, reference, rows = SCORES[name], values[recipes[0]], []
    for label in recipes:
        seed_values = values[label]
        bounds = interval(list(seed_values.values()))
        rows.append(
            {
                "recipe": label,
                "num_runs": len(seed_values),
                "mean": statistics.fmean(seed_values.values()) if seed_values else None,
                "interval": bounds and list(bounds),
                "values": {str(seed): value for seed, value in sorted(seed_values.items())},
                "difference": None if label == recipes[0] else paired(seed_values, reference, score.better),
            }
        )
    references = {}
    for kind, key in (("chance", f"chance_{name}"), ("ceiling", f"ceiling_{name}"), ("blind", f"{name}_blind")):
        values_of_kind = [r["scores"][key] for r in runs if isinstance(r["scores"].get(key), (int, float))]
        if values_of_kind:
            references[kind] = statistics.fmean(values_of_kind)
    return {"score": name, "title": score.title, "better": score.better, "share": share, "rows": rows, **references}


def regime_of(run: Mapping[str, Any]) -> str | None:
    """How much of the base a run trained, one of `xfusion.fusion.base.REGIMES`, as recorded. For results older than this field
    it is derived from the recorded mechanism; None if that is not xfusion's or no longer exists.
    """
    if run.get("regime") is not None:
        return run["regime"]
    try:
        return from_json(_value_at(run["settings"], "recipe.model.fusion"), where="the recorded recipe").build().regime
    except (XFusionError, AttributeError, TypeError):
        return None


def _remove_unranked_verdicts(scores: Sequence[dict[str, Any]], regimes: Mapping[str, str | None]) -> None:
    """Remove verdicts between recipes if one trains more of the base than the other, or may do so."""
    for row in (row for score in scores for row in score["rows"]):
        row["regime"], reference = regimes[row["recipe"]], next(iter(regimes.values()))
        if row["difference"] and row["regime"] != reference:
            row["difference"] |= {"verdict": "another regime, not ranked", "seeds_needed": None}


def _mark_untuned(scores: Sequence[dict[str, Any]], tuning: Mapping[str, Any]) -> None:
    """Mark verdicts between recipes whose learning rates were not tuned alike: they hold for one rate each."""
    if tuning["trials"] > 1:
        return
    for row in (row for score in scores for row in score["rows"]):
        if row["difference"] and row["difference"]["verdict"] in ("better", "worse"):
            row["difference"]["verdict"] += ", untuned"


def _text_facts(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "declared": all(r.get("preserves_text") for r in runs),
        "bit_equal": sum(bool(r["scores"].get("text_bit_equal")) for r in runs),
        "num_runs": len(runs),
        "perplexity_base": runs[0]["scores"]["text_perplexity_base"],
        "perplexity_fused": {str(r["seed"]): r["scores"]["text_perplexity_fused"] for r in runs if _is_full_share(r)},
    }


def _is_full_share(run: Mapping[str, Any]) -> bool:
    return run["settings"]["share"] == 1


def _cost_row(label: str, runs: Sequence[dict[str, Any]], share: float) -> dict[str, Any]:
    """Costs of a recipe, from its runs at the largest share; values that vary by run are a median or the maximum."""
    runs = [r for r in runs if r["settings"]["share"] == share] or list(runs)
    cost = runs[0]["cost"]
    peaks = [r["cost"]["peak_memory"]["bytes"] for r in runs if r["cost"]["peak_memory"]["bytes"]]
    times = [r["cost"]["time"] for r in runs if r["cost"]["time"]]
    return {
        "recipe": label,
        "trainable_parameters": cost["trainable_parameters"],
        "flops_per_sample": cost["flops_per_sample"],
        "encoder_flops": cost.get("encoder_flops"),
        "forward_flops_per_sample": cost["forward_flops_per_sample"],
        "training_flops": runs[0]["budget"].get("flops"),
        "tokens_per_picture": cost["tokens_per_picture"],
        "steps": runs[0]["budget"]["steps"],
        "samples": runs[0]["budget"]["samples"],
        "peak_memory": {"bytes": max(peaks) if peaks else None, "what": cost["peak_memory"]["what"]},
        "wall_minutes": statistics.median(r["cost"]["wall_minutes"] for r in runs),
        "time": _median_times(times),
        "tuning": runs[0]["settings"]["tuning"],
        "fusion": runs[0]["settings"]["recipe"]["model"]["fusion"],
    }


def _median_times(times: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    values_by_key = {key: [t[key] for t in times if t.get(key) is not None] for t in times for key in t}
    return {key: statistics.median(values) for key, values in values_by_key.items() if values} or None


def _mean_curve(runs: Sequence[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Loss -> samples so far and the mean loss over runs."""
    mean_curves = {}
    for name in dict.fromkeys(name for run in runs for name in run.get("learning", {})):
        curves = [run["learning"][name] for run in runs if name in run.get("learning", {})]
        length = min(map(len, curves))
        mean_curves[name] = [[curves[0][i][0], statistics.fmean(c[i][1] for c in curves)] for i in range(length)]
    return mean_curves


def _reads_pixels(model: Mapping[str, Any]) -> bool:
    """Whether media become tokens directly, without a frozen network before them."""
    kind = _value_at(model, "audio.codec.type") or _value_at(model, "image.codec.type") or ""
    return kind in ("", "xfusion.modalities.codecs.pixels:Pixels.Config")


def _machine_name(facts: Mapping[str, Any]) -> str:
    """What computed a run: its GPU, or the processor, and the version of torch."""
    return f"{facts.get('gpu') or facts.get('processor')}, torch {facts.get('versions', {}).get('torch')}"


def difference_notes(summary: Mapping[str, Any]) -> list[str]:
    """How each recipe differs from the first besides the mechanism: the long ones of the summary's notes."""
    notes: list[str] = []
    for label, differences in summary["differences"].items():
        if differences:
            examples = "; ".join(f"{d['where']} {d['first']!r} -> {d['this']!r}" for d in differences[:6])
            more = f"; and {len(differences) - 6} more" if len(differences) > 6 else ""
            notes.append(f"Besides the mechanism, {label} differs from {summary['first']}: {examples}{more}.")
    return notes


def _notes(summary: Mapping[str, Any], runs: Sequence[dict[str, Any]]) -> list[str]:
    """Notes that a reader needs besides the numbers."""
    budget, tuning, regimes = summary["budget"], summary["settings"]["tuning"], summary["regimes"]
    budget_unit = "executed FLOPs" if budget["kind"] == "flops" else "samples"
    notes = [f"Equal budget in {budget_unit}; every difference is to {summary['first']}, over runs of the same seed."]
    if None not in regimes.values():
        regime_list = "; ".join(f"{label}: {regime}" for label, regime in regimes.items())
        notes.append(
            f"Regime, or what of the base is trained: {regime_list}. Recipes of different regimes are not ranked."
        )
    if not _reads_pixels(summary["settings"]["recipe"]["model"]):
        encoder_flops = {row["encoder_flops"] for row in summary["cost"]} - {None}
        encoder_text = f", {max(encoder_flops) / 1e9:.2f} GFLOPs per {summary['media'][:-1]}," if encoder_flops else ""
        notes.append(
            f"FLOPs are counted behind the frozen encoder or codec, on what it made of the {summary['media']}: its"
            f" own{encoder_text} are left out, the same for all."
        )
    if tuning["trials"] == 1:
        notes.append(
            "Rate and guidance are each recipe's own: nothing was tuned, so that a verdict holds at one rate each (untuned)."
        )
    else:
        guidances = {row["recipe"]: row["tuning"]["guidance"] for row in summary["cost"]}
        tuning_list = "; ".join(
            f"{row['recipe']}: rate times {row['tuning']['rate_factor']:g}"
            + (f", guidance {guidances[row['recipe']]:g}" if guidances[row["recipe"]] is not None else "")
            for row in summary["cost"]
        )
        guided = f" and {tuning['trials']} strengths of guidance" if set(guidances.values()) != {None} else ""
        by = f" by {', '.join(tuning['choose_by'])}" if "choose_by" in tuning else ""
        notes.append(
            f"{tuning['trials']} rates{guided} per recipe, chosen{by} on the validation part"
            f" (seed {TRIAL_SEED}, groups that are in no test score): {tuning_list}."
        )
    fewest = min(len([r for r in runs if r["recipe"] == label]) for label in summary["recipes"])
    if len(summary["seeds"]) < FEWEST_RUNS or fewest < FEWEST_RUNS:
        notes.append(f"n < {FEWEST_RUNS}: no interval, and nothing is decided.")
    notes.append(
        "Intervals are 95 % t-intervals over runs, one by one: of twenty true ties one looks decided. fit_ is memory of"
        f" trained {summary['media']}, held_ is on groups that no training saw."
    )
    machines = sorted({_machine_name(run["machine"]) for run in runs})
    if len(machines) > 1:
        notes.append(
            f"The runs are of {len(machines)} machines ({'; '.join(machines)}): times and minutes are medians over all of them,"
            " and a seed rounds otherwise on each."
        )
    notes += difference_notes(summary)
    with_encoder = [
        label
        for label in summary["recipes"]
        if any(r["recipe"] == label and r["scored"].get("encoder", 0) is None for r in runs)
    ]
    if with_encoder and not summary["settings"]["evaluation"].get("features", True):
        with_encoder = []
    if with_encoder:
        notes.append(f"No feature score for {', '.join(with_encoder)}: a frozen encoder took part in training.")
    if all(row["time"] is None for row in summary["cost"]):
        notes.append(
            "Time of a step and of sampling was not measured (--measure-time, on an idle machine); wall minutes are of a"
            " machine that may have done other work."
        )
    return notes
