"""To transformers: the classes that some packs are, a file each; for all others, which class is nearest and what keeps it from
being the same.
"""

from __future__ import annotations

from pathlib import Path

from xfusion.exports.base import not_exact
from xfusion.exports.transformers import llava, nearest, voxtral
from xfusion.model import Model


def export(model: Model, folder: Path) -> list[str]:
    """Write a model that a class of transformers loads by ``from_pretrained(folder)``, with its tokenizer and preprocessor."""
    if llava.is_like(model):
        return llava.export(model, folder)
    if voxtral.is_like(model):
        return voxtral.export(model, folder)
    raise not_exact(model, "transformers", nearest.reason(model.config))
