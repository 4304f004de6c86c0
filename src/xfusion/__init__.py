"""Give a frozen language model a new modality, and check that its text stays bit-identical.

The public names are imported when they are first used, so ``import xfusion`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xfusion.checkpoint import load
    from xfusion.composition import together
    from xfusion.data.sequence import Audio, Image, Sequence, Sound, XFusionError
    from xfusion.data.sounds import read_sound
    from xfusion.evaluation.run import evaluate
    from xfusion.generation import generate
    from xfusion.model import Model, ModelConfig, build
    from xfusion.processor import Processor
    from xfusion.recipes.base import Recipe, train

__version__ = "0.1.0"

__all__ = [
    "Audio",
    "Image",
    "Model",
    "ModelConfig",
    "Processor",
    "Recipe",
    "Sequence",
    "Sound",
    "XFusionError",
    "__version__",
    "build",
    "evaluate",
    "generate",
    "load",
    "read_sound",
    "together",
    "train",
]

_MODULES = {
    "Audio": "xfusion.data.sequence",
    "Image": "xfusion.data.sequence",
    "Model": "xfusion.model",
    "ModelConfig": "xfusion.model",
    "Processor": "xfusion.processor",
    "Recipe": "xfusion.recipes.base",
    "Sequence": "xfusion.data.sequence",
    "Sound": "xfusion.data.sequence",
    "XFusionError": "xfusion.data.sequence",
    "build": "xfusion.model",
    "evaluate": "xfusion.evaluation.run",
    "generate": "xfusion.generation",
    "load": "xfusion.checkpoint",
    "read_sound": "xfusion.data.sounds",
    "together": "xfusion.composition",
    "train": "xfusion.recipes.base",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'xfusion' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
