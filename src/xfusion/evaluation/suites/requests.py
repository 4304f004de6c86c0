"""Does a picture start exactly when one is requested? Tests the opening head on wordings that it was not trained on.

Precision and recall are over conversations of `xfusion.data.requests`, part ``held``. Further prompts from a file, which ask
for no picture, give a separate rate of false alarms.
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
    """Scores of one model.

    Args:
        model: a model with an opening head.
        progress: see `evaluate`.
        wordings: a JSON file of the form of ``requests.json``; None takes that one.
        repeat: how often a wording with a subject appears, each time with another one.
        chats: a text file with a prompt a line that asks for no picture, or ``FILE.parquet:COLUMN``.
        max_chats: only the first of them.

    Returns:
        ``precision``, ``recall``; ``false_alarms`` among the held chats and, with a file, ``chats_false_alarms`` among
        its prompts; ``subject_exact``, the share of requests whose subject is found to the letter.

    Raises:
        XFusionError: the model has no opening head, or a file cannot be read.
    """
    if model.opening is None:
        raise XFusionError("this pack has no opening head: make one with xfusion train opening PACK")
    held = requests.read("held", wordings, repeat=repeat)
    opened, exact = [], []
    for done, example in enumerate(held):
        progress("held requests", done, len(held))
        opened.append(model.opening.probability(model.backbone, example.messages) > 0.5)
        if example.subject is not None:
            words = example.messages[-1]["content"]
            exact.append(model.opening.what(model.backbone, words) == words[slice(*example.subject)])
    hits = sum(o and e.draws for o, e in zip(opened, held, strict=True))
    asked, found = sum(e.draws for e in held), sum(opened)
    out: dict[str, Any] = {
        "precision": hits / found if found else 0.0,
        "recall": hits / asked,
        "false_alarms": (found - hits) / (len(held) - asked),
        "subject_exact": sum(exact) / len(exact),
    }
    settings: dict[str, Any] = {"num_requests": asked, "num_chats": len(held) - asked, "repeat": repeat}
    if chats is not None:
        prompts = _prompts(chats)[:max_chats]
        alarms = 0
        for done, prompt in enumerate(prompts):
            progress("chats", done, len(prompts))
            alarms += model.opening.probability(model.backbone, [{"role": "user", "content": prompt}]) > 0.5
        out["chats_false_alarms"] = alarms / len(prompts)
        settings |= {"chats": Path(chats).name, "num_further_chats": len(prompts)}
    return {**out, "settings": {"wordings": wordings and Path(wordings).name, **settings}}


def _prompts(spec: str) -> list[str]:
    name, _, column = spec.partition(".parquet:")
    try:
        if column:
            from pyarrow import parquet

            found = parquet.read_table(f"{name}.parquet", columns=[column]).column(column).to_pylist()
        else:
            found = Path(spec).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, KeyError) as error:
        raise XFusionError(f"{spec}: prompts cannot be read: {error}") from error
    found = [line for line in found if line and line.strip()]
    if not found:
        raise XFusionError(f"{spec} holds no prompt")
    return found
