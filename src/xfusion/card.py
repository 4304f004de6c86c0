"""A pack's README on a model hub: what it is, how it was trained, its scores and its licences."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xfusion.data.sequence import XFusionError
from xfusion.modalities.encoders.efficientnet_lite import EfficientNetLite
from xfusion.model import Model
from xfusion.storage import without_folders

TEXT_OF = {
    "strictly frozen": "Text alone comes out as the base's, bit for bit; `xfusion verify` proves it. Requests of text alone"
    " run on any engine that serves the base.",
    "LoRA": "Low-rank deltas lie on the base's layers: text alone is another than the base's, and the base's without them.",
    "as in the paper": "Trained parts stand where the base's own computed words: text alone is another than the base's.",
}
"""The text of the card about each regime."""
TASKS = {
    "image": (
        ({"caption", "draw"}, "any-to-any"),
        ({"caption"}, "image-text-to-text"),
        ({"draw"}, "text-to-image"),
        ({"embed"}, "zero-shot-image-classification"),
        ({"match"}, "zero-shot-image-classification"),
        ({"fill"}, "fill-mask"),
    ),
    "audio": (
        ({"caption", "draw"}, "any-to-any"),
        ({"caption"}, "audio-text-to-text"),
        ({"draw"}, "text-to-audio"),
        ({"embed"}, "feature-extraction"),
    ),
}
"""Task names of the hub, by modality and required capabilities; a card names the first that the model can do."""
CONDITIONS = (
    (
        "permissive",
        r"none needed|cc0(-1\.0)?|public[ -]domain|mit|isc|apache-2\.0|bsd(-[23]-clause)?|zlib|cc[ -]by[ -]\d\.\d",
    ),
    ("share alike", r"cc[ -]by-sa[ -]\d\.\d|odbl(-1\.0)?"),
    ("not for commercial use", r"cc[ -]by-nc(-sa|-nd)?[ -]\d\.\d"),
)
"""Licence conditions, the least restrictive first; vendor-specific licences are not ranked."""


def check_licence(name: str) -> None:
    """Refuse a name that a hub does not accept as a licence.

    Raises:
        XFusionError: it is not a valid name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", name):
        raise XFusionError(f"licence {name!r} is no name of a licence on a hub: write it as in cc-by-sa-4.0")


def card(config: dict[str, Any], model: Model) -> str:
    """The card as Markdown, from only a pack's config and the licences that the model's parts state.

    It states only recorded facts: a card without scores or without a proof of its text says so.
    """
    config = without_folders(config)
    base, licence_chain = config["base"], licences(model, config)
    parts = [
        _front_matter(config, model),
        "# A modality pack for a frozen language model",
        f"Learned weights only ({config['num_new_parameters']:,} numbers); the base `{base['source']}` is not in here and is"
        " never changed. It can: " + ", ".join(sorted(model.capabilities)) + ".",
        "```python\nimport xfusion\n\nmodel = xfusion.load(FOLDER_OR_HUB_ID)  # brings its base\n```",
        _other_libraries(model),
        "## Base",
        _table(base | {"revision": base.get("revision") or "none", "fingerprint": f"`{base['fingerprint']}`"}),
        "The pack belongs to the base with this fingerprint and to no other; loading refuses any other one.",
        "## Recipe and data",
        _table(_recipe(config, model)),
        "## Scores",
        _scores(config.get("scores")),
        *(["## Opening head", _scores(config["opening"].get("scores"))] if config.get("opening") else []),
        "## Text",
        _proof(config, model),
        "## Limits",
        _limits(config, model),
        "## Licences",
        _table(licence_chain),
        most_restrictive(licence_chain),
    ]
    return "\n\n".join(parts) + "\n"


def training_runs(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The record of each training run behind a pack's weights, the first run first; the last one made the pack.

    A run that started from another pack records that pack's runs under ``earlier``. A run without ``data`` recorded none.

    Args:
        facts: a pack's config, or the facts recorded in it.
    """
    training, recipe = facts.get("training"), facts.get("recipe")
    last = dict(training) if isinstance(training, Mapping) else {}
    earlier = last.pop("earlier", None)
    if "data" not in last and isinstance(recipe, Mapping) and isinstance(recipe.get("data"), str):
        last["data"] = recipe["data"]
    return [*(dict(run) for run in earlier or () if isinstance(run, Mapping)), last]


def run_summary(run: Mapping[str, Any]) -> str:
    """One line about a run of `training_runs`: ``photos, 1,746 examples, 11,100 steps``."""
    counts = ((run.get("pictures"), "examples"), (run.get("steps"), "steps"))
    data = run["data"] if isinstance(run.get("data"), str) else "data not recorded"
    return ", ".join([data, *(f"{number:,} {name}" for number, name in counts if isinstance(number, int))])


def data_licences(facts: Mapping[str, Any]) -> str:
    """The licence of the training data, or all of them if the runs of `training_runs` had data under several."""
    runs = training_runs(facts)
    stated = [str(run.get("data_licence") or "not recorded") for run in runs]
    if len(set(stated)) == 1:
        return stated[0]
    named = (
        licence if ": " in licence else f"{run.get('data', 'an earlier run')}: {licence}"
        for run, licence in zip(runs, stated, strict=True)
    )
    return "; ".join(dict.fromkeys(named))


def licences(model: Model, config: dict[str, Any]) -> dict[str, str]:
    """The chain of licences: these weights, base, codec, encoders used for features or alignment, data of all runs."""
    codec = model.modality.codec
    return without_folders(
        {
            "these weights": config.get("licence") or "not recorded",
            "base": model.backbone.licence,
            "codec": codec.licence,
            **{f"encoder {_encoder_name(encoder)}": codec.licence for encoder in sorted(codec.encoders)},
            **{
                f"encoder {_encoder_name(used_encoder.fingerprint)}": used_encoder.stated_licence
                for objective in model.objectives
                for used_encoder in objective.encoders
            },
            "data": data_licences(config),
        }
    )


def _encoder_name(fingerprint: str) -> str:
    """A readable name for an encoder's fingerprint, which is its source or a hash."""
    if fingerprint == EfficientNetLite.fingerprint:
        return EfficientNetLite.name
    return fingerprint[:16] if re.fullmatch(r"[0-9a-f]{64}", fingerprint) else without_folders(fingerprint)


def most_restrictive(licence_chain: dict[str, str]) -> str:
    """A sentence that names the most restrictive licence of the chain, if all of them can be ranked."""
    ranks = {part: _rank(licence) for part, licence in licence_chain.items() if part != "these weights"}
    unranked = [part for part, rank in ranks.items() if rank is None]
    if unranked:
        return f"Which link asks most of you cannot be said: no known licence is named for {', '.join(unranked)}."
    highest = max(rank for rank in ranks.values() if rank is not None)
    condition = CONDITIONS[highest][0]
    links = ", ".join(f"{part} ({licence_chain[part]})" for part, rank in ranks.items() if rank == highest)
    return f"The most restrictive link: {links}, {condition}." if highest else f"Every link is {condition}."


def _rank(licence: str) -> int | None:
    """Index in `CONDITIONS` of a licence, or of the strictest of several, as in ``photos: MIT; emoji:16: CC-BY-SA-4.0``."""
    names = [part.rpartition(": ")[2].strip().lower() for part in licence.split("; ")]
    ranks = [
        next((i for i, (_, pattern) in enumerate(CONDITIONS) if re.fullmatch(pattern, name)), None) for name in names
    ]
    return None if None in ranks else max(rank for rank in ranks if rank is not None)


def task(model: Model) -> str:
    """The hub's name for a model's task."""
    tasks = TASKS["audio" if model.modality.name == "audio" else "image"]
    return next((name for required, name in tasks if required <= model.capabilities), "text-generation")


def _front_matter(config: dict[str, Any], model: Model) -> str:
    """The metadata block that a hub reads."""
    source = config["base"]["source"]
    is_folder = not config["base"].get("revision") and Path(source).is_dir()
    lines = ["library_name: xfusion", f"pipeline_tag: {task(model)}"]
    lines += [f"license: {config['licence']}"] if config.get("licence") else []  # the data's licence may forbid any
    lines += ["tags:", "- frozen-base"]
    if source.count("/") == 1 and ":" not in source and not source.startswith((".", "~")) and not is_folder:
        lines += [f"base_model: {source}", "base_model_relation: adapter"]
    return "\n".join(["---", *lines, "---"])


def _other_libraries(model: Model) -> str:
    """Which other libraries can load the pack."""
    if not model.fusion.exports:
        return "It loads with xfusion only: no other library has this mechanism."
    names = " or ".join(f"`xfusion export PACK --to {name}`" for name in model.fusion.exports)
    return f"It loads with xfusion. {names} writes it for that library where the library computes the same, or says why not."


def _recipe(config: dict[str, Any], model: Model) -> dict[str, Any]:
    training = {k: v for k, v in (config.get("training") or {}).items() if isinstance(v, (str, int, float))}
    runs = (config.get("training") or {}).get("runs") or []
    if "command" in training:
        training["command"] = _code(str(training["command"]))
    return {
        "regime": model.regime,
        "fusion": type(model.fusion).__name__,
        "objectives": ", ".join(type(objective).__name__ for objective in model.objectives),
        "codec": type(model.modality.codec).__name__,
        **_schedule(config.get("recipe") or {}, several_runs=bool(runs)),
        **training,
        "commit": "not recorded",
        "machine": "not recorded",
        **_origin(config.get("training") or {}),
        **{f"run {i}": _run(run) for i, run in enumerate(runs, start=1) if "command" in run},
        **{f"earlier run {i}": run_summary(run) for i, run in enumerate(training_runs(config)[:-1], start=1)},
        "xfusion": config["library_version"],
        "weights": f"`{config['weights_fingerprint']}`",
    }


def _run(run: Mapping[str, Any]) -> str:
    """One of the runs that made the weights: its command, and how much it computed."""
    units = {"steps": "steps", "seconds": "s", "threads": "threads"}
    amounts = (f"{run[name]:,} {unit}" for name, unit in units.items() if isinstance(run.get(name), int | float))
    return ", ".join([_code(str(run["command"])), *amounts])


def _code(text: str) -> str:
    """A text as code in one line, whatever it contains."""
    fence = "``" if "`" in text else "`"
    return f"{fence}{' '.join(text.split())}{fence}"


def _origin(facts: Mapping[str, Any]) -> dict[str, str]:
    """The recorded commit and machine of a training or an evaluation, a short text each."""
    rows: dict[str, str] = {}
    if isinstance(commit := facts.get("commit"), Mapping):
        changed = commit.get("changed_files")
        rows["commit"] = f"{commit['id'][:12]}{f' and {changed} changed files' if changed else ''}"
    if isinstance(machine := facts.get("machine"), Mapping):
        cores = f"{machine['cores']} cores, {machine['threads']} threads"
        rows["machine"] = ", ".join(filter(None, (machine.get("gpu"), machine["processor"], cores)))
    return rows


def _schedule(recipe: Mapping[str, Any], *, several_runs: bool) -> dict[str, str]:
    """Seed, learning rates and samples per step of a recipe as recorded; stages one after the other. Of several runs the recipe
    is that of the last, whose rates say nothing of the others.
    """
    stages = [stage for stage in recipe.get("stages") or () if isinstance(stage, Mapping)]
    if not stages:
        return {}
    seed = {"seed": str(recipe.get("seed", "not recorded"))}
    if several_runs:
        return seed
    mixtures = [stage.get("mixture") or {} for stage in stages]
    samples = (f"{m.get('draw', 0)} to draw, {m.get('caption', 0)} to caption" for m in mixtures)
    return seed | {
        "largest rate": ", then ".join(str(stage.get("rate")) for stage in stages),
        "samples per step": ", then ".join(samples),
    }


def _scores(scores: dict[str, Any] | None) -> str:
    if not scores:
        return "Not measured."
    rows = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in scores.items() if k != "settings"}
    settings_used = scores.get("settings") or {}
    settings = ", ".join(
        f"{k} {v}" for k, v in settings_used.items() if v is not None and not isinstance(v, (dict, list))
    )
    origin = ", ".join(f"{k} {v}" for k, v in _origin(settings_used).items())
    versions = ", ".join(f"{k} {v}" for k, v in (settings_used.get("versions") or {}).items() if v)
    settings_text = (
        "\n\nSettings: " + "; ".join(filter(None, (settings, versions, origin))) + "." if settings_used else ""
    )
    return _table(rows) + settings_text


def _proof(config: dict[str, Any], model: Model) -> str:
    declared = f"Regime: {model.regime}. {TEXT_OF[model.regime]}"
    proof = config.get("proof")
    found = "No proof is recorded here; `xfusion verify FOLDER_OR_HUB_ID` makes one."
    if proof:
        settings = proof["settings"]
        verdict = "bit for bit the base's" if proof["text_identical"] else "NOT the base's"
        found = f"`xfusion verify` found it {verdict} ({settings['dtype']} on {settings['device']})."
    rows = _perplexities(config)
    return "\n\n".join([f"{declared} {found}", *([_table(rows)] if rows else [])])


def _perplexities(config: dict[str, Any]) -> dict[str, str]:
    """The recorded perplexities of the base and of the fused stack: at the end of training, and those of the proof."""
    kept, proven = config.get("text_keeping") or {}, (config.get("proof") or {}).get("perplexity") or {}
    pairs = {
        "perplexity of the bundled prompts": (kept.get("text_perplexity_base"), kept.get("text_perplexity_fused")),
        "perplexity in the proof": (proven.get("base"), proven.get("fused")),
    }
    return {
        name: f"{base:.4g} (base), {fused:.4g} (with this pack)"
        for name, (base, fused) in pairs.items()
        if isinstance(base, float) and isinstance(fused, float)
    }


def _limits(config: dict[str, Any], model: Model) -> str:
    """The limits that follow from the training, one per line."""
    training, scores = config.get("training") or {}, config.get("scores") or {}
    lines = [f"It was made for {model.modality.described}; others are resized or refused."]
    if "pictures" in training:
        lines.append(
            f"It learned from {training['pictures']:,} examples, and nothing is known of others that is not scored."
        )
    if any(name.startswith("fit_") for name in scores):
        lines.append("Scores that begin with `fit_` are of examples that training saw: they measure memory.")
    if not any(name.startswith("held_") for name in scores):
        lines.append("No score here is of examples that training did not see.")
    lines.append("Nothing filters what it is asked, shown or answers.")
    return "\n".join(f"- {line}" for line in lines)


def _table(rows: dict[str, Any]) -> str:
    lines = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return "\n".join(["| fact | value |", "| --- | --- |", *lines])
