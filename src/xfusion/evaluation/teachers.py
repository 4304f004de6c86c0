"""Who may score: an encoder that what is scored had learned from, or looks through, may not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from xfusion.data.sequence import XFusionError


def taught(encoder: str, teachers: Iterable[str] | None) -> bool:
    """Whether an encoder is one of the teachers, through whatever layer, of whatever revision, by whatever path.

    A copy of one under another name is not recognised.

    Args:
        encoder: the fingerprint of one: a hash of its weights, or ``SOURCE[@revision][#layer]``.
        teachers: `Model.teachers`; None where nobody noted them.
    """
    known = set(map(_source, teachers or ()))
    return _source(encoder) in known or _path(encoder) in {_path(teacher) for teacher in known}


def refuse_taught(encoder: str, teachers: Iterable[str] | None) -> None:
    """Refuse an encoder that is one of the teachers.

    Raises:
        XFusionError: it is.
    """
    if taught(encoder, teachers):
        raise XFusionError(
            f"the scoring encoder {encoder[:60]!r} took part in training what drew: it may not score it, name another"
        )


def _source(fingerprint: str) -> str:
    """A fingerprint without layer and revision."""
    name = re.sub(r"#-?\d+$", "", fingerprint)
    return name.rpartition("@")[0] or name


def _path(fingerprint: str) -> Path:
    return Path(_source(fingerprint)).expanduser().resolve()
