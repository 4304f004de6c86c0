"""Modality packs: a folder with ``config.json``, ``model.safetensors`` (learned weights only) and a card."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from xfusion.backbone import Backbone
from xfusion.data.sequence import XFusionError, fingerprint
from xfusion.model import Model, ModelConfig

FORMAT_VERSION = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


# ---------------------------------------------------------------------------------------------- configs as JSON


def to_json(config: Any) -> Any:
    """A nested dataclass as JSON, each with the import path of its class."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        kind = type(config)
        fields = {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": f"{kind.__module__}:{kind.__qualname__}", **fields}
    if isinstance(config, (tuple, list)):
        return [to_json(item) for item in config]
    if config is None or isinstance(config, (str, int, float, bool)):
        return config
    raise TypeError(f"a {type(config).__name__} cannot be saved in {CONFIG}")


def from_json(data: Any, *, trust: bool = False, where: str = CONFIG) -> Any:
    """The inverse of `to_json`. Classes outside xfusion are imported only with ``trust``."""
    if isinstance(data, list):
        return tuple(from_json(item, trust=trust, where=where) for item in data)
    if not isinstance(data, dict):
        return data
    path = data.get("type", "")
    module, _, name = path.partition(":")
    if not name:
        raise XFusionError(f"{where}: an object without 'type' is not a configuration of xfusion")
    if module.split(".")[0] != "xfusion" and not trust:
        raise XFusionError(
            f"{where} names the class {path!r}, which is not xfusion's: pass --trust to import that package"
        )
    try:
        kind: Any = importlib.import_module(module)
        for part in name.split("."):
            kind = getattr(kind, part)
    except (ImportError, AttributeError) as error:
        hint = ""
        if module.split(".")[0] != "xfusion":
            hint = f"; install the package that has it, or put the folder of {module.split('.')[0]}.py on PYTHONPATH"
        raise XFusionError(f"{where} names the class {path!r}, which cannot be imported: {error}{hint}") from error
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        raise XFusionError(f"{where}: {path!r} is not a configuration class")
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(data) - known - {"type"})
    if unknown:
        raise XFusionError(f"{where}: {path} has no field {unknown[0]!r}; this pack needs another version of xfusion")
    return kind(**{k: from_json(v, trust=trust, where=where) for k, v in data.items() if k != "type"})


# ------------------------------------------------------------------------------------------------ save and load


def save(model: Model, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **facts: Any) -> Path:
    """Write a pack; the folder appears whole or not at all.

    Args:
        model: what was trained.
        folder: where; an existing pack is replaced.
        dtype: store the learned weights in this type (None: as they are).
        facts: what the config shall remember (recipe, data, steps, scores, ...), JSON values.
    """
    from xfusion import __version__

    target = Path(folder)
    if target.exists() and not (target / CONFIG).is_file() and any(target.iterdir()):
        raise XFusionError(f"{target} holds other files: name an empty folder or an existing pack")
    state = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in model.learned_state().items()}
    config = {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "base": {
            "source": model.backbone.source,
            "revision": model.backbone.revision,
            "fingerprint": model.backbone.fingerprint,
        },
        "weights_fingerprint": fingerprint(state),
        "capabilities": sorted(model.capabilities),
        "num_new_parameters": model.num_new_parameters,
        "model": to_json(model.config),
        **facts,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        save_file(state, str(temporary / WEIGHTS), metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (temporary / CARD).write_text(card(config, model), encoding="utf-8")
        if target.exists():
            old = temporary.with_name(temporary.name + "-old")
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
        target.chmod(0o755)
        for file in target.iterdir():  # temporary folders, and safetensors' own files, are for their owner alone
            file.chmod(0o644)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def card(config: dict[str, Any], model: Model) -> str:
    """The pack's README: what it is, how to use it, what it was trained on, the licences of its parts."""
    base, facts = config["base"], {k: v for k, v in config.items() if isinstance(v, (str, int, float)) and k != "type"}
    lines = [
        "---",
        "library_name: xfusion",
        "pipeline_tag: any-to-any",
        "license: apache-2.0",
        "---",
        "",
        "# A modality pack for a frozen language model",
        "",
        f"Learned weights only ({config['num_new_parameters']:,} numbers); the base `{base['source']}` is not in here and is",
        f"never changed. The pack belongs to the base with fingerprint `{base['fingerprint'][:16]}...` and to no other.",
        "",
        "```bash",
        'xfusion generate FOLDER "a red heart" -o heart.png',
        "xfusion verify FOLDER",
        "```",
        "",
        "| fact | value |",
        "| --- | --- |",
        *(f"| {key} | {value} |" for key, value in facts.items()),
        "",
        f"Codec licence: {model.image.codec.licence}. Scores and settings, where measured, stand in `config.json`.",
    ]
    return "\n".join(lines) + "\n"


def shipped() -> list[str]:
    """Names of the packs that come with the package."""
    root = resources.files("xfusion") / "packs"
    if not root.is_dir():
        return []
    return sorted(p.name for p in root.iterdir() if (p / WEIGHTS).is_file() and (p / CONFIG).is_file())


def find(name: str) -> Path:
    """The folder of a pack: a folder, a shipped pack's name, or a hub id, in this order."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise XFusionError(f"{name} is not a pack: it has no {CONFIG}")
        return path
    if name in shipped():
        return Path(str(resources.files("xfusion") / "packs" / name))
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        known = ", ".join(shipped()) or "none"
        raise XFusionError(
            f"there is no pack {name!r}: name a folder, a shipped pack ({known}) or a hub id such as org/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, CARD]))
    except (OSError, HFValidationError) as error:
        raise XFusionError(
            f"there is no folder {name!r}, and the hub pack of that name cannot be fetched: {_first_line(error)}"
        ) from error
    except Exception as error:  # the hub client raises its transport library's own errors
        raise XFusionError(f"the hub pack {name!r} cannot be fetched: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_config(folder: Path) -> dict[str, Any]:
    """A pack's config, checked for its format version."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise XFusionError(f"{folder / CONFIG} cannot be read: {_first_line(error)}") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise XFusionError(f"{folder}: the pack has format version {version}, this xfusion reads {FORMAT_VERSION}")
    return config


def load(
    name: str | os.PathLike[str],
    *,
    backbone: Backbone | None = None,
    device: torch.device | str = "cpu",
    trust: bool = False,
) -> Model:
    """Load a pack on its base.

    Args:
        name: a folder, a shipped pack's name, or a hub id, in this order.
        backbone: an already loaded base to share; its fingerprint must match, its device stays.
        device: where the base is loaded to, and the pack with it.
        trust: allow classes outside xfusion that the pack names.

    Raises:
        XFusionError: no such pack, another base, or weights that do not fit or were altered.
    """
    folder = find(os.fspath(name))
    config = read_config(folder)
    model_config = from_json(config["model"], trust=trust, where=str(folder / CONFIG))
    if not isinstance(model_config, ModelConfig):
        raise XFusionError(f"{folder / CONFIG}: 'model' is not a model configuration")
    base = config["base"]
    backbone = backbone or Backbone.load(base["source"], revision=base.get("revision"), device=device)
    if backbone.fingerprint != base["fingerprint"]:
        raise XFusionError(
            f"{name} belongs to the base {base['source']} with fingerprint {base['fingerprint'][:16]}, but"
            f" {backbone.source} has {backbone.fingerprint[:16]}: load the base that the pack was trained on"
        )
    model = Model(model_config, backbone, fresh=False)
    load_weights(model, folder, config.get("weights_fingerprint"))
    return model.eval()


def load_weights(model: Model, folder: Path, expected: str | None = None) -> None:
    """Load a pack's learned weights strictly into a model of the same configuration."""
    try:
        state = load_file(str(folder / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise XFusionError(f"{folder / WEIGHTS} cannot be read: {_first_line(error)}") from error
    if expected is not None and fingerprint(state) != expected:
        raise XFusionError(
            f"{folder / WEIGHTS} was altered: its fingerprint is {fingerprint(state)[:16]}, {CONFIG} says {expected[:16]};"
            " fetch or train the pack again"
        )
    own = model.learned_state()
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or unexpected or wrong:
        parts = [
            f"{len(names)} {what} (first: {names[0]})"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
            if names
        ]
        raise XFusionError(f"{folder / WEIGHTS} does not fit the model: {'; '.join(parts)}")
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(state[key])
