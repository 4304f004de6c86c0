"""Copies the curves and previews of a run to wandb and trackio, which are called alike.

The log is the record: whatever a tracker raises is told once and costs its copy, not the run.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from xfusion.data.sequence import XFusionError, first_line
from xfusion.storage import atomic_file, named_in_errors

TrackerName = Literal["wandb", "trackio"]
logger = logging.getLogger(__name__)

FINISH_SECONDS = 60
"""How long wandb may take to upload the rest at the end; what is left stays in the run's folder (`wandb sync`)."""
LOGIN_SECONDS = 60
"""How long wandb waits for an answer when it asks for an account."""


def library(name: str) -> Any:
    """The library of a tracker.

    Raises:
        XFusionError: there is no such tracker, or it is not installed.
    """
    if name not in get_args(TrackerName):
        raise XFusionError(f"track {name!r} is not one of {', '.join(get_args(TrackerName))}")
    with contextlib.suppress(ImportError):
        module = importlib.import_module(name)
        if hasattr(module, "init"):  # a folder named wandb, where it keeps its files, can be imported as well
            return module
    raise XFusionError(f"track {name} needs the library {name}, which is not installed: pip install {name}")


def start(names: Sequence[str], folder: Path, config: Mapping[str, Any], *, resume: bool) -> list[Tracker]:
    """Start the trackers of a run, or continue what they have of it.

    Args:
        names: of the trackers.
        folder: the run's; keeps the id that a resumed run needs.
        config: facts about the run, as JSON types.
        resume: whether the run in the folder is continued.

    Raises:
        XFusionError: the id cannot be written.
    """
    if not names:
        return []
    path = folder / "tracker_id"
    with named_in_errors(path):
        if resume and path.exists():
            run_id = path.read_text(encoding="utf-8")
        else:
            run_id = secrets.token_hex(4)
            with atomic_file(path) as temporary:
                temporary.write_text(run_id, encoding="utf-8")
    return [Tracker(name, folder, run_id, config) for name in names]


class Tracker:
    """One run in one tracker, in the project ``xfusion`` unless WANDB_PROJECT or TRACKIO_PROJECT names another.

    Args:
        name: the tracker's.
        folder: the run's.
        run_id: the same for the same run, also after it was resumed.
        config: facts about the run.
    """

    def __init__(self, name: str, folder: Path, run_id: str, config: Mapping[str, Any]):
        self.name, self.library, self.works = name, library(name), True
        self._call(
            lambda: self.library.init(
                project=os.environ.get(f"{name.upper()}_PROJECT", "xfusion"),
                name=f"{folder.resolve().name}-{run_id}",
                config=dict(config),
                resume="allow",
                **_OPTIONS[name](self.library, folder, run_id),
            )
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log points of curves."""
        self._call(lambda: self.library.log(dict(values), step=step))

    def image(self, picture: Any, step: int) -> None:
        """Log a preview, a PIL image."""
        self._call(lambda: self.library.log({"preview": self.library.Image(picture)}, step=step))

    def close(self) -> None:
        """End the run."""
        self._call(lambda: self.library.finish())

    def _call(self, function: Callable[[], object]) -> None:
        if not self.works:
            return
        try:
            with contextlib.redirect_stdout(
                sys.stderr
            ):  # trackio prints on stdout, which `--json` keeps for its object
                function()
        except Exception as error:
            self.works = False
            logger.warning(
                "%s stopped (%s: %s): the run goes on without it", self.name, type(error).__name__, first_line(error)
            )


def _wandb_options(wandb: Any, folder: Path, run_id: str) -> dict[str, Any]:
    settings = wandb.Settings(console="off", finish_timeout=FINISH_SECONDS, login_timeout=LOGIN_SECONDS)
    return {"id": run_id, "dir": str(folder), "settings": settings}


def _trackio_options(trackio: Any, folder: Path, run_id: str) -> dict[str, Any]:
    return {}


_OPTIONS: dict[str, Callable[[Any, Path, str], dict[str, Any]]] = {"wandb": _wandb_options, "trackio": _trackio_options}
"""What `init` takes besides project, name, config and resume; trackio knows a run again by its name."""
