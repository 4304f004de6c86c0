"""Which encoders may score a model: not those that it was trained with or uses itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from xfusion.data.sequence import XFusionError


def is_teacher(encoder: str, teachers: Iterable[str] | None) -> bool:
    """Whether an encoder is one of the teachers, whatever its layer, revision or path.

    A copy under another name is not recognised.

    Args:
        encoder: fingerprint of the encoder: a hash of its weights, or ``SOURCE[@revision][#layer]``.
        teachers: `Model.teachers`; None if they are not recorded.
    """
    sources = set(map(_source, teachers or ()))
    return _source(encoder) in sources or _path(encoder) in {_path(teacher) for teacher in sources}


def refuse_teacher(encoder: str, teachers: Iterable[str] | None) -> None:
    """Refuse an encoder that is one of the teachers.

    Raises:
        XFusionError: it is one.
    """
    if is_teacher(encoder, teachers):
        raise XFusionError(
            f"the scoring encoder {encoder[:60]!r} took part in training what drew: it may not score it, name another"
        )


def _source(fingerprint: str) -> str:
    """A fingerprint without layer and revision."""
    name = re.sub(r"#-?\d+$", "", fingerprint)
    return name.rpartition("@")[0] or name


def _path(fingerprint: str) -> Path:
    return Path(_source(fingerprint)).expanduser().resolve()
