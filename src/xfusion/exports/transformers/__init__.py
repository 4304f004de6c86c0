"""Export to transformers: one file per class that some packs match; for other packs, the nearest class and how it differs."""

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
