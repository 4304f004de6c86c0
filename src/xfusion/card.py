"""A pack's README on a model hub: what it is, how it was made, what it scores, and under which licences it stands."""

from __future__ import annotations

from typing import Any

from xfusion.model import Model

TEXT_OF = {
    "strictly frozen": "Text alone comes out as the base's, bit for bit; `xfusion verify` proves it.",
    "LoRA": "Low-rank deltas lie on the base's layers: text alone is another than the base's, and the base's without them.",
    "as in the paper": "Trained parts stand where the base's own computed words: text alone is another than the base's.",
}
"""What a card says of a regime."""


def card(config: dict[str, Any], model: Model) -> str:
    """The card as Markdown, from a pack's config alone and the licences that the model's parts state.

    Nothing stands in it that was not recorded: a pack without scores says so, and so does one whose text was not proven.
    """
    base = config["base"]
    parts = [
        _front(config),
        "# A modality pack for a frozen language model",
        f"Learned weights only ({config['num_new_parameters']:,} numbers); the base `{base['source']}` is not in here and is"
        " never changed. It can: " + ", ".join(sorted(model.capabilities)) + ".",
        "```python\nimport xfusion\n\nmodel = xfusion.load(FOLDER_OR_HUB_ID)  # brings its base\n```",
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
        "## Licences",
        _table(licences(model, config)),
    ]
    return "\n\n".join(parts) + "\n"


def licences(model: Model, config: dict[str, Any]) -> dict[str, str]:
    """The chain of licences: base, codec, encoders that features or alignment came from, data, these weights."""
    training = config.get("training") or {}
    others = sorted(model.teachers - model.modality.codec.encoders)
    return {
        "these weights": config.get("licence", "not recorded"),
        "base": model.backbone.licence,
        "codec": model.modality.codec.licence,
        **{f"encoder {name[:16]}": "learned from; see the recipe" for name in others},
        "data": training.get("data_licence", "not recorded"),
    }


def _front(config: dict[str, Any]) -> str:
    """The metadata that a hub reads."""
    source = config["base"]["source"]
    lines = ["library_name: xfusion", "pipeline_tag: any-to-any"]
    lines += [f"license: {config['licence']}"] if config.get("licence") else []  # the data's may forbid any
    lines += ["tags:", "- frozen-base"]
    if source.count("/") == 1 and ":" not in source and not source.startswith((".", "~")):
        lines += [f"base_model: {source}", "base_model_relation: adapter"]
    return "\n".join(["---", *lines, "---"])


def _recipe(config: dict[str, Any], model: Model) -> dict[str, Any]:
    training = {k: v for k, v in (config.get("training") or {}).items() if isinstance(v, (str, int, float))}
    runs = (config.get("training") or {}).get("runs") or []
    return {
        "regime": model.regime,
        "fusion": type(model.fusion).__name__,
        "objectives": ", ".join(type(objective).__name__ for objective in model.objectives),
        "codec": type(model.modality.codec).__name__,
        **training,
        **{f"run {i}": f"`{run['command']}`" for i, run in enumerate(runs, start=1) if "command" in run},
        "xfusion": config["library_version"],
        "weights": f"`{config['weights_fingerprint']}`",
    }


def _scores(scores: dict[str, Any] | None) -> str:
    if not scores:
        return "Not measured."
    rows = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in scores.items() if k != "settings"}
    used = scores.get("settings") or {}
    settings = ", ".join(f"{k} {v}" for k, v in used.items() if v is not None and not isinstance(v, (dict, list)))
    versions = ", ".join(f"{k} {v}" for k, v in (used.get("versions") or {}).items() if v)
    behind = "\n\nSettings: " + "; ".join(filter(None, (settings, versions))) + "." if used else ""
    return _table(rows) + behind


def _proof(config: dict[str, Any], model: Model) -> str:
    declared = f"Regime: {model.regime}. {TEXT_OF[model.regime]}"
    proof = config.get("proof")
    if not proof:
        return f"{declared} No proof is recorded here; `xfusion verify FOLDER_OR_HUB_ID` makes one."
    settings = proof["settings"]
    verdict = "bit for bit the base's" if proof["text_identical"] else "NOT the base's"
    return f"{declared} `xfusion verify` found it {verdict} ({settings['dtype']} on {settings['device']})."


def _table(rows: dict[str, Any]) -> str:
    lines = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return "\n".join(["| fact | value |", "| --- | --- |", *lines])
