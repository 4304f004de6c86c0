"""Recipes by name: a function in a file of this folder (or of anybody's) returns one."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast, get_type_hints

import torch
from rich.console import Console
from typeguard import TypeCheckError, check_type

from xfusion.backbone import Backbone
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import Source
from xfusion.model import Model
from xfusion.training import loop
from xfusion.training.processes import Shard
from xfusion.training.stages import Recipe
from xfusion.training.track import Listener


def names() -> list[str]:
    """Names of the recipes of this folder."""
    folder = Path(__file__).parent
    return sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if m.name != "base")


def find(name: str) -> Callable[..., Recipe]:
    """The function that a recipe's name stands for.

    Args:
        name: a name of `names`, ``file.py:function`` or ``package.module:function``; arguments of the function may
            stand behind it, as in ``single_tower(stride=3)``.

    Raises:
        XFusionError: there is none, or it does not take these arguments.
    """
    bare_name, arguments = _arguments(name)
    function = _function(bare_name)
    if arguments:
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            parameters = ", ".join(inspect.signature(function).parameters) or "none"
            raise XFusionError(f"recipe {name!r}: {error}; its arguments are: {parameters}") from error
        try:
            hints = get_type_hints(function)
        except NameError:  # of names that are imported for type checkers alone
            hints = {}
        for argument, value in arguments.items():
            try:
                check_type(value, hints.get(argument, Any))
            except TypeCheckError as error:
                annotation = inspect.signature(function).parameters[argument].annotation
                raise XFusionError(f"recipe {name!r}: {argument} is {value!r}, but it takes {annotation}") from error
    return functools.partial(function, **arguments) if arguments else function


def _arguments(name: str) -> tuple[str, dict[str, Any]]:
    """``single_tower(stride=3)`` -> ``single_tower`` and ``{"stride": 3}``."""
    bare_name, bracket, rest = name.partition("(")
    if not bracket:
        return name, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError(rest)
        return bare_name, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise XFusionError(f"recipe {name!r}: write {bare_name}(NAME=VALUE), such as single_tower(stride=3)") from error


def _function(name: str) -> Callable[..., Recipe]:
    location, _, function = name.partition(":")
    if location.endswith(".py"):
        path = Path(location)
        if not path.is_file():
            raise XFusionError(f"recipe {name!r}: there is no file {location}")
        if not function:
            raise XFusionError(f"recipe {name!r} names no function: write {location}:FUNCTION")
        path = path.resolve()
        if _has_name_of_module(path):
            raise XFusionError(
                f"recipe {name!r}: there is a module {path.stem!r} already, and whoever imports it would get this file: rename"
                " the file"
            )
        module = _module(path, path.read_bytes())
    elif function:
        try:
            module = importlib.import_module(location)
        except ImportError as error:
            raise XFusionError(f"recipe {name!r}: {error}") from error
    else:
        if name not in names():
            matches = difflib.get_close_matches(name, names(), n=1)
            hint = f"; did you mean {matches[0]!r}?" if matches else ""
            raise XFusionError(f"recipe {name!r} is not one of {', '.join(names())}{hint}")
        module, function = importlib.import_module(f"xfusion.recipes.{name}"), name
    recipe_function: Any = getattr(module, function, None)
    if not callable(recipe_function):
        raise XFusionError(f"recipe {name!r}: {location} has no function {function!r}")
    return cast("Callable[..., Recipe]", recipe_function)


_FILE_MODULES: dict[str, ModuleType] = {}
"""Modules of recipe files by the name that they are known by."""


def _has_name_of_module(path: Path) -> bool:
    """Whether a recipe file has the name of another module that can be imported, such as an installed package's."""
    stem = path.stem
    if "." in stem or (stem in _FILE_MODULES and sys.modules.get(stem) is _FILE_MODULES[stem]):
        return False
    try:
        spec = importlib.util.find_spec(stem)
    except ValueError:  # of a loaded module that was not found by one, such as __main__
        return True
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() != path


@functools.cache
def _module(path: Path, content: bytes) -> ModuleType:
    """The module of a file, run once as long as the file stays.

    It is known by its name, as an imported one: a run that goes on reads the classes of its configuration by it. If it
    was imported itself, that module keeps the name. It is run as read: what Python keeps compiled beside a file it takes for
    fresh where the file was changed within a second to another of its length.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    if path.stem not in sys.modules or sys.modules[path.stem] is _FILE_MODULES.get(path.stem):
        sys.modules[path.stem] = _FILE_MODULES[path.stem] = module
    exec(compile(content, str(path), "exec"), vars(module))
    return module


def train(
    recipe: Recipe | str,
    *,
    out: str | os.PathLike[str],
    data: str | None = None,
    source: Source | None = None,
    allow_bad: float = 0.0,
    skip_nonfinite: int = 0,
    steps: int | None = None,
    minutes: float | None = None,
    resume: bool = False,
    from_pack: str | None = None,
    backbone: Backbone | None = None,
    device: torch.device | str = "cpu",
    compile: bool = True,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    preview_prompts: tuple[str, ...] | None = None,
    preview_every: float = 60.0,
    checkpoint_every: float = 300.0,
    keep: int = 2,
    shard: Shard = "none",
    patience: float = 30.0,
    decoders: int | None = None,
    track: tuple[str, ...] = (),
    command: str | None = None,
    console: Console | None = None,
    listener: Listener | None = None,
) -> Model:
    """Train a recipe, given as an object or by name; see `xfusion.training.loop.train`."""
    if isinstance(recipe, str):
        command = command or f"xfusion.train({recipe!r}, ...)"
        recipe = find(recipe)()
    return loop.train(
        recipe,
        out=out,
        data=data,
        source=source,
        allow_bad=allow_bad,
        skip_nonfinite=skip_nonfinite,
        steps=steps,
        minutes=minutes,
        resume=resume,
        from_pack=from_pack,
        backbone=backbone,
        device=device,
        compile=compile,
        dtype=dtype,
        attention=attention,
        preview_prompts=preview_prompts,
        preview_every=preview_every,
        checkpoint_every=checkpoint_every,
        keep=keep,
        shard=shard,
        patience=patience,
        decoders=decoders,
        track=track,
        command=command,
        console=console,
        listener=listener,
    )
