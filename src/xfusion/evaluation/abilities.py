"""Which models a suite can score."""

from __future__ import annotations

from typing import Any

from xfusion.data.sequence import XFusionError


def refuse_unable(model: Any, abilities: set[str], what: str) -> None:
    """Refuse a model that has none of the abilities that a suite scores.

    Args:
        model: the model.
        abilities: some of `Model.capabilities`.
        what: what the suite does with them, for the message.

    Raises:
        XFusionError: it has none of them.
    """
    if abilities.isdisjoint(model.capabilities):
        able = ", ".join(sorted(model.capabilities))
        raise XFusionError(f"this suite {what}, but the model can only do: {able}")
