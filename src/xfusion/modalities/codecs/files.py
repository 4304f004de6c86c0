"""Locating a codec's weights: a local folder, a codec shipped with the package, or a hub id. Safetensors only."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from xfusion.data.sequence import XFusionError
from xfusion.modalities.base import Codec

WEIGHTS = "diffusion_pytorch_model.safetensors"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class FolderConfig(Codec.Config):
    """A codec whose weights are in a folder. The fields are in the order of the option ``NAME:SOURCE:SUBFOLDER``."""

    source: str
    """A folder, a shipped codec's name, or a hub id."""
    subfolder: str = ""
    """Folder inside the source, for example vae."""
    revision: str | None = None
    """Commit or tag of a hub id; None uses the newest."""
    licence: str | None = None
    """Licence of the weights; None reads the folder's card."""

    @property
    def weights(self) -> Path:
        """The codec's own weights file."""
        return locate(self.source, subfolder=self.subfolder, revision=self.revision) / WEIGHTS

    def folder(self, class_name: str) -> Path:
        """The folder with the weights, checked to be of this class (`locate`)."""
        return locate(self.source, class_name=class_name, subfolder=self.subfolder, revision=self.revision)


def locate(source: str, *, class_name: str | None = None, subfolder: str = "", revision: str | None = None) -> Path:
    """The folder of `source`: a local folder, a codec shipped with the package, or the cached copy of a hub id.

    The folder must have weights as safetensors and a config.json, of diffusers' class `class_name` if one is given.
    """
    packs_folder = Path(str(files("xfusion"))) / "packs"
    if Path(source).expanduser().is_dir():
        folder = Path(source).expanduser() / subfolder
    elif re.fullmatch(r"[\w-]+", source) and (packs_folder / source).is_dir():
        folder = packs_folder / source
    elif _HUB_ID.fullmatch(source) and not source.startswith("."):
        folder = _download(source, subfolder, revision)
    else:
        names = ", ".join(sorted(path.parent.name for path in packs_folder.glob(f"*/{WEIGHTS}"))) or "none"
        raise XFusionError(f"codec {source!r} is no folder, no shipped codec ({names}) and no hub id (owner/name)")
    actual_class = read_json(folder / "config.json").get("_class_name")
    if class_name is not None and actual_class != class_name:
        raise XFusionError(f"{folder / 'config.json'} is of class {actual_class}, but this codec loads {class_name}")
    if not (folder / WEIGHTS).is_file():
        unsafe_weights = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        hint = (
            f" (only {unsafe_weights[0]}, which is not loaded: save it again as safetensors)" if unsafe_weights else ""
        )
        raise XFusionError(f"{folder} holds no {WEIGHTS}{hint}")
    return folder


def _download(source: str, subfolder: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    names = ["config.json", WEIGHTS, "latent_stats.json", "README.md"]
    try:
        folder = snapshot_download(source, revision=revision, allow_patterns=[prefix + name for name in names])
    except Exception as error:  # the hub client raises many kinds of errors; all mean that the codec is unavailable
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise XFusionError(
            f"codec {source!r} is no folder here and the hub did not give it ({reason}); a local folder works offline"
        ) from error
    return Path(folder) / subfolder


def load(model_class: Any, folder: Path) -> Any:
    """Load a diffusers class (old attention keys too), strictly: no key may be missing, unexpected or of another shape."""
    settings = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        model, report = model_class.from_pretrained(str(folder), **settings)
    except (OSError, ValueError, RuntimeError) as error:
        prefix = f"{folder} cannot be loaded as {model_class.__name__}"
        raise XFusionError(f"{prefix}: {' '.join(str(error).split())[:300]}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, report[problem])):
            remainder = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise XFusionError(
                f"{folder} is not a plain {model_class.__name__}: {problem.replace('_', ' ')} {', '.join(keys[:3])}{remainder}"
            )
    return model


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, with one-line errors."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise XFusionError(f"{path} does not exist; a codec's folder holds config.json and {WEIGHTS}") from None
    except (OSError, ValueError) as error:
        raise XFusionError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise XFusionError(f"{path} must hold a JSON object, but it holds a {type(content).__name__}")
    return content


def card(folder: Path) -> dict[str, Any]:
    """The metadata block of the folder's README.md; empty if there is none."""
    from huggingface_hub import metadata_load

    path = folder / "README.md"
    return (metadata_load(path) or {}) if path.is_file() else {}
