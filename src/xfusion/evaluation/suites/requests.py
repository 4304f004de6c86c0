"""Does the model start a picture exactly when one is requested? Tests the opening head on wordings not used in training.

Precision and recall are over the conversations of `xfusion.data.requests`, part ``held``. A file of further prompts that do not
ask for a picture gives a separate false alarm rate.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from xfusion.data import requests
from xfusion.data.sequence import XFusionError


def run(
    model: Any,
    *,
    progress: Callable[[str, int, int], None],
    wordings: str | None = None,
    repeat: int = 6,
    chats: str | None = None,
    max_chats: int | None = None,
) -> dict[str, Any]:
    """Scores of the opening head of one model.

    Args:
        model: a model with an opening head.
        progress: see `evaluate`.
        wordings: a JSON file in the format of ``requests.json``; None uses ``requests.json``.
        repeat: how often each wording with a subject is used, every time with another subject.
        chats: prompts that do not ask for a picture: a text file with one per line, or ``FILE.parquet:COLUMN``.
        max_chats: use at most this many of them, from the start of the file.

    Returns:
        shares in [0, 1]: ``precision`` and ``recall`` of opening a picture; ``false_alarms``, the share of conversations without
        a request in which a picture is opened, and ``chats_false_alarms``, the same for the prompts of ``chats``;
        ``subject_exact``, the share of requests whose subject is extracted exactly.

    Raises:
        XFusionError: the model has no opening head, or a file cannot be read.
    """
    if model.opening is None:
        raise XFusionError("this pack has no opening head: make one with xfusion train opening PACK")
    examples = requests.read("held", wordings, repeat=repeat)
    predicted, subject_matches = [], []
    for done, example in enumerate(examples):
        progress("held requests", done, len(examples))
        predicted.append(model.opening.probability(model.backbone, example.messages) > 0.5)
        if example.subject is not None:
            text = example.messages[-1]["content"]
            subject_matches.append(model.opening.what(model.backbone, text) == text[slice(*example.subject)])
    true_positives = sum(o and e.draws for o, e in zip(predicted, examples, strict=True))
    num_requests, num_predicted = sum(e.draws for e in examples), sum(predicted)
    metrics: dict[str, Any] = {
        "precision": true_positives / num_predicted if num_predicted else 0.0,
        "recall": true_positives / num_requests,
        "false_alarms": (num_predicted - true_positives) / (len(examples) - num_requests),
        "subject_exact": sum(subject_matches) / len(subject_matches),
    }
    settings: dict[str, Any] = {
        "num_requests": num_requests,
        "num_chats": len(examples) - num_requests,
        "repeat": repeat,
    }
    if chats is not None:
        prompts = _prompts(chats)[:max_chats]
        num_alarms = 0
        for done, prompt in enumerate(prompts):
            progress("chats", done, len(prompts))
            num_alarms += model.opening.probability(model.backbone, [{"role": "user", "content": prompt}]) > 0.5
        metrics["chats_false_alarms"] = num_alarms / len(prompts)
        settings |= {"chats": Path(chats).name, "num_further_chats": len(prompts)}
    return {**metrics, "settings": {"wordings": wordings and Path(wordings).name, **settings}}


def _prompts(spec: str) -> list[str]:
    """Non-empty prompts of a text file or of a column of a parquet file."""
    name, _, column = spec.partition(".parquet:")
    try:
        if column:
            from pyarrow import parquet

            lines = parquet.read_table(f"{name}.parquet", columns=[column]).column(column).to_pylist()
        else:
            lines = Path(spec).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, KeyError) as error:
        raise XFusionError(f"{spec}: prompts cannot be read: {error}") from error
    lines = [line for line in lines if line and line.strip()]
    if not lines:
        raise XFusionError(f"{spec} holds no prompt")
    return lines
