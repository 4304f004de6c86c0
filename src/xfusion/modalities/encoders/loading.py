"""Loading by transformers, with errors of one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xfusion.data.sequence import XFusionError, first_line


def load_pretrained(what: str, source: str, revision: str | None, load: Callable[..., Any], **options: Any) -> Any:
    """The result of a loader of transformers.

    Args:
        what: what is loaded, for the message: encoder, model.
        source: folder or hub id.
        revision: hub revision; None is the main branch.
        load: a ``from_pretrained``, or a function with the same arguments.
        options: its other arguments.

    Raises:
        XFusionError: it cannot be loaded.
    """
    try:
        return load(source, **({"revision": revision} if revision else {}), **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise XFusionError(f"{what} {source!r} cannot be loaded: {first_line(error)}") from error
