"""Finds the export targets, and explains in one line what cannot be exported."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path

from xfusion.data.sequence import XFusionError
from xfusion.model import Model
from xfusion.storage import atomic_folder


def names() -> list[str]:
    """Names of the targets: the files of this folder."""
    folder = str(Path(__file__).parent)
    return sorted(module.name for module in pkgutil.iter_modules([folder]) if module.name != "base")


def export(model: Model, folder: Path, target: str) -> list[str]:
    """Write a model in the format of another library; the folder appears whole or not at all.

    Args:
        model: a pack on its base.
        folder: output folder; it must be empty or not exist.
        target: a name from `names`.

    Returns:
        notes for users of the result, one per line.

    Raises:
        XFusionError: the other library has no equivalent, or is not installed; or the folder is not empty.
    """
    if target not in names():
        raise XFusionError(f"there is no export to {target!r}, only to {', '.join(names())}")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise XFusionError(f"{folder} is not empty: name an empty folder, or one that is not there")
    try:
        with atomic_folder(folder) as temporary:
            return import_module(f"xfusion.exports.{target}").export(model, temporary)
    except ImportError as error:
        raise XFusionError(f"export to {target} needs the package {error.name}: pip install {error.name}") from error


def not_exact(model: Model, target: str, reason: str) -> XFusionError:
    """The error if the other library has nothing that computes the same."""
    return XFusionError(f"{type(model.fusion).__name__} cannot be exported to {target}: {reason}")
