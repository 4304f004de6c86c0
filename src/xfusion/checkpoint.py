"""Modality packs: a folder with ``config.json``, ``model.safetensors`` (learned weights only) and a card."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from xfusion.backbone import Backbone
from xfusion.card import card, check_licence, training_runs
from xfusion.data.sequence import XFusionError, fingerprint, first_line
from xfusion.model import Model, ModelConfig
from xfusion.opening import Opening
from xfusion.storage import (
    SEAL,
    atomic_folder,
    file_hash,
    read_json,
    read_tensors,
    restore_folder,
    sealed,
    without_folders,
)

FORMAT_VERSION = 2
"""Version 1 had no file hashes: its weights are checked by their fingerprint, and its config is not checked."""
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
OPENING = "opening.safetensors"
"""File of the opening head, in a pack that has one. It is fitted after the rest, so it does not change the weights file."""
FILES = (CONFIG, WEIGHTS, OPENING, CARD)
"""All files that a pack may contain."""
DERIVED_FIELDS = frozenset(
    {
        "format_version",
        "library_version",
        "base",
        "base_function",
        "weights_fingerprint",
        "weights_sha256",
        "capabilities",
        "regime",
        "num_new_parameters",
        "model",
        "codec_sha256",
        "opening_sha256",
        SEAL,
    }
)
"""Config fields that are derived from the model itself; all others are facts recorded about it."""


# ---------------------------------------------------------------------------------------------- configs as JSON


def to_json(config: Any) -> Any:
    """Convert a nested dataclass to JSON; each object stores the import path of its class."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        kind = type(config)
        fields = {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": f"{kind.__module__}:{kind.__qualname__}", **fields}
    if isinstance(config, (tuple, list)):
        return [to_json(item) for item in config]
    if config is None or isinstance(config, (str, int, float, bool)):
        return config
    raise TypeError(f"a {type(config).__name__} cannot be saved in {CONFIG}")


def modules_outside(data: Any) -> set[str]:
    """Modules outside xfusion that define classes of a configuration, which is given as `to_json` writes it."""
    if isinstance(data, list):
        return set().union(*map(modules_outside, data))
    if not isinstance(data, dict):
        return set()
    module = data["type"].partition(":")[0]
    modules = set() if module.split(".")[0] == "xfusion" else {module}
    return modules.union(*map(modules_outside, data.values()))


def differing(first: Any, second: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ: the path and both values, with None for a missing one."""
    pairs: list[tuple[str, Any, Any]]
    if isinstance(first, dict) and isinstance(second, dict) and first.get("type") == second.get("type"):
        pairs = [(str(k), first.get(k), second.get(k)) for k in dict.fromkeys([*first, *second])]
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        pairs = [
            (str(i), first_value, second_value)
            for i, (first_value, second_value) in enumerate(zip(first, second, strict=True))
        ]
    else:
        if first != second:
            yield path, first, second
        return
    for name, first_value, second_value in pairs:
        yield from differing(first_value, second_value, f"{path}.{name}" if path else name)


def from_json(data: Any, *, trust: bool = False, where: str = CONFIG) -> Any:
    """The inverse of `to_json`. Classes outside xfusion are imported only with ``trust``."""
    if isinstance(data, list):
        return tuple(from_json(item, trust=trust, where=where) for item in data)
    if not isinstance(data, dict):
        return data
    class_path = data.get("type", "")
    module, _, name = class_path.partition(":")
    if not name:
        raise XFusionError(f"{where}: an object without 'type' is not a configuration of xfusion")
    if module.split(".")[0] != "xfusion" and not trust:
        raise XFusionError(
            f"{where} names the class {class_path!r}, which is not xfusion's: pass --trust to import that package"
        )
    try:
        kind: Any = importlib.import_module(module)
        for part in name.split("."):
            kind = getattr(kind, part)
    except (ImportError, AttributeError) as error:
        hint = ""
        if module.split(".")[0] != "xfusion":
            hint = f"; install the package that has it, or put the folder of {module.split('.')[0]}.py on PYTHONPATH"
        raise XFusionError(
            f"{where} names the class {class_path!r}, which cannot be imported: {error}{hint}"
        ) from error
    is_own = trust or str(getattr(kind, "__module__", "")).split(".")[0] == "xfusion"  # not what xfusion imports
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind) or not is_own:
        raise XFusionError(f"{where}: {class_path!r} is not a configuration class")
    field_names = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(data) - field_names - {"type"})
    if unknown:
        raise XFusionError(
            f"{where}: {class_path} has no field {unknown[0]!r}; this pack needs another version of xfusion"
        )
    return kind(**{k: from_json(v, trust=trust, where=where) for k, v in data.items() if k != "type"})


# ------------------------------------------------------------------------------------------------ save and load


def save(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    weights: dict[str, torch.Tensor] | None = None,
    recipe: Any = None,
    training: dict[str, Any] | None = None,
    scores: dict[str, Any] | None = None,
    proof: dict[str, Any] | None = None,
    licence: str | None = None,
) -> Path:
    """Write a pack; the folder appears whole or not at all.

    Facts recorded in the pack that the model was loaded from are written again as long as the weights are unchanged.
    Facts given here replace them. Of weights that ``dtype`` rounds nothing was measured or proved: scores, proof and perplexities
    are left out, how they were trained and their licence are not.

    Args:
        model: the trained model.
        folder: where to write; an existing pack is replaced.
        dtype: store the learned weights in this type (None: as they are).
        weights: the learned weights, if the model's own are sharded across processes; None uses the model's.
        recipe: how the model was trained, as `to_json` returns it. This and the following are stored in the config if given.
        training: the data and the length of the training: ``data``, ``data_licence``, ``steps``, ``samples``, ...
        scores: as `evaluate` returns them.
        proof: as `verify` returns it.
        licence: licence of the weights, by its name on a hub; without it the card states none.

    Raises:
        XFusionError: the folder contains other files or cannot be written, or the licence is not a valid name.
    """
    from xfusion import __version__

    target = Path(folder)
    refuse_other_files(target)
    if licence is not None:
        check_licence(licence)
    learned_state = {k: v.detach().cpu() for k, v in (weights or model.learned_state()).items()}
    state = {k: v.to(dtype or v.dtype).contiguous() for k, v in learned_state.items()}
    is_exact = all(torch.equal(state[k].to(v.dtype), v) for k, v in learned_state.items())
    given_facts = {"recipe": recipe, "training": training, "scores": scores, "proof": proof, "licence": licence}
    facts = _unchanged_facts(model, learned_state, is_exact)
    facts |= {name: value for name, value in given_facts.items() if value is not None}
    config = {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "base": model.backbone.identity,
        "base_function": model.backbone.function,
        "weights_fingerprint": fingerprint(state),
        "capabilities": sorted(model.capabilities),
        "regime": model.regime,
        "num_new_parameters": model.num_new_parameters,
        "model": to_json(model.config),
        **_codec_facts(model.config),
        **facts,
    }
    with atomic_folder(target) as temporary:
        file = temporary / WEIGHTS
        save_file(state, str(file), metadata={"format": "pt"})
        config |= {"weights_sha256": file_hash(file)} | _write_opening(model.opening, temporary)
        _write_config_and_card(temporary, config, model)
    if is_exact:  # a rounded copy is another pack than the model's own
        model.recorded = Record.of(config, model, state)
    return target


@dataclasses.dataclass(frozen=True)
class Record:
    """The facts that a pack records about a model, and the weights that they apply to."""

    facts: dict[str, Any]
    """The recorded facts: recipe, training, scores, proof, licence, ..."""
    model: ModelConfig
    """Configuration of the model that uses the weights."""
    weights: str | None
    """Fingerprint of the weights as the pack stores them."""
    dtypes: dict[str, torch.dtype]
    """The types in which the pack stores them."""
    opening: str | None
    """Fingerprint of the opening head."""

    @property
    def teachers(self) -> frozenset[str]:
        """Fingerprints of the encoders that any of the recorded training runs learned from."""
        return frozenset(teacher for run in training_runs(self.facts) for teacher in run.get("teachers", ()))

    @classmethod
    def of(cls, config: dict[str, Any], model: Model, state: dict[str, torch.Tensor]) -> Record:
        """Build the record from a pack's config, its model, and its weights as stored."""
        return cls(
            facts={key: value for key, value in config.items() if key not in DERIVED_FIELDS},
            model=model.config,
            weights=config.get("weights_fingerprint"),
            dtypes={name: tensor.dtype for name, tensor in state.items()},
            opening=_opening_fingerprint(model),
        )


def _unchanged_facts(model: Model, state: dict[str, torch.Tensor], is_exact: bool) -> dict[str, Any]:
    """The recorded facts that still hold for weights about to be written: none if the weights have changed, and no
    measurements if they will be rounded.
    """
    record = model.recorded
    if record is None or not _has_recorded_weights(model, state):
        return {}
    outdated = set() if is_exact else {"scores", "proof", "text_keeping"}
    if record.opening != _opening_fingerprint(model):
        outdated.add("opening")
    return {key: value for key, value in record.facts.items() if key not in outdated}


def has_recorded_weights(model: Model) -> bool:
    """Whether a model's weights are those that its record is about; False if it has no record, or was changed since."""
    return _has_recorded_weights(model, {name: tensor.detach().cpu() for name, tensor in model.learned_state().items()})


def _has_recorded_weights(model: Model, state: dict[str, torch.Tensor]) -> bool:
    record = model.recorded
    if record is None or record.model != model.config or set(record.dtypes) != set(state):
        return False
    stored = {name: tensor.to(record.dtypes[name]) for name, tensor in state.items()}
    unchanged = all(torch.equal(stored[name].to(tensor.dtype), tensor) for name, tensor in state.items())
    return unchanged and fingerprint(stored) == record.weights


def _opening_fingerprint(model: Model) -> str | None:
    return None if model.opening is None else fingerprint(dict(model.opening.state_dict()))


def _codec_facts(config: ModelConfig) -> dict[str, Any]:
    """Hash of the codec's weights: with other weights of the same name, the same latents would decode differently."""
    file = config.modality.codec.weights
    return {"codec_sha256": file_hash(file)} if file is not None and file.is_file() else {}


def _write_opening(head: Opening | None, folder: Path) -> dict[str, Any]:
    """Write the file of an opening head, if there is one, and return its config entry."""
    if head is None:
        return {}
    state = {k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}
    save_file(state, str(folder / OPENING), metadata={"format": "pt"})
    return {"opening_sha256": file_hash(folder / OPENING)}


def add_opening(folder: Path, model: Model, head: Opening, out: Path, **facts: Any) -> Path:
    """Copy a pack and add an opening head; the weights stay bit-identical, and the card is rewritten.

    Args:
        folder: a pack of any format version; its weights are checked, and the result has the current version.
        model: the model of the pack.
        head: the opening head; it replaces the pack's, if there is one.
        out: where to write; may be the same folder.
        facts: facts about the head (scores, ...) to store in the config under ``opening``.

    Raises:
        XFusionError: the pack was altered, the model is not the pack's, or ``out`` contains other files.
    """
    config, state = _read_pack_of(folder, model)
    refuse_other_files(out)
    with atomic_folder(out) as temporary:
        shutil.copyfile(folder / WEIGHTS, temporary / WEIGHTS)
        config |= {"format_version": FORMAT_VERSION, "weights_sha256": file_hash(temporary / WEIGHTS)}
        config |= _write_opening(head, temporary) | {"opening": facts}
        config["base_function"] = _completed_function(config, model.backbone)
        _write_config_and_card(temporary, config, model)
    if head is model.opening:
        model.recorded = Record.of(config, model, state)
    return out


def _completed_function(config: dict[str, Any], base: Backbone) -> dict[str, Any]:
    """What a pack records about its base's function, with what packs of older versions lack. What is recorded stays.

    Raises:
        XFusionError: the base is another one.
    """
    if base.fingerprint != config["base"]["fingerprint"]:
        raise XFusionError(
            f"the pack belongs to the base {config['base']['fingerprint'][:16]}, the model stands on {base.fingerprint[:16]}:"
            " load it on its own base"
        )
    return base.function | config.get("base_function", {})


def _write_config_and_card(folder: Path, config: dict[str, Any], model: Model) -> None:
    """Write a pack's config and its card; paths of this machine are shortened, as they are of no use elsewhere."""
    config = {key: value if key in DERIVED_FIELDS else without_folders(value) for key, value in config.items()}
    config = sealed(config) if config["format_version"] > 1 else config
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    (folder / CARD).write_text(card(config, model), encoding="utf-8")


def _read_pack_of(folder: Path, model: Model) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and weights of an intact pack, which must match the model."""
    config, state = _read_intact(folder)
    model_state = model.learned_state()  # a pack may store them in half precision
    if set(model_state) != set(state) or not all(
        torch.equal(model_state[k].cpu().to(v.dtype), v) for k, v in state.items()
    ):
        raise XFusionError(f"{folder} holds other weights than this model: load it and try again")
    return config, state


def _read_intact(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and weights of a pack, after checking that no file was altered."""
    config = read_config(folder)
    state = read_tensors(folder / WEIGHTS, config.get("weights_sha256"))
    if "weights_sha256" not in config and fingerprint(state) != config["weights_fingerprint"]:
        raise XFusionError(f"{folder / WEIGHTS} was altered: take an intact copy")
    if "opening_sha256" in config:
        read_tensors(folder / OPENING, config["opening_sha256"])
    return config, state


def refuse_other_files(target: Path) -> None:
    """Refuse to replace a folder that is not a pack or contains other files, which would be lost.

    Raises:
        XFusionError: the folder contains other files, or is a file itself.
    """
    if target.exists() and not target.is_dir():
        raise XFusionError(f"{target} is a file: name an empty folder or an existing pack")
    names = sorted(path.name for path in target.iterdir()) if target.exists() else []
    unexpected = next((name for name in names if name not in FILES), None)
    if names and unexpected is None and "format_version" not in _config_if_any(target):
        unexpected = names[0]
    if unexpected is not None:
        raise XFusionError(f"{target} holds other files ({unexpected}): name an empty folder or an existing pack")


def _config_if_any(folder: Path) -> dict[str, Any]:
    """The content of a folder's config, intact or not; empty if it is missing or not JSON."""
    try:
        facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def push(
    what: Model | str | os.PathLike[str],
    repository: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    message: str = "xfusion pack",
    licence: str | None = None,
) -> str:
    """Upload a pack to a model hub, all files in one commit; the repository and branch are created if missing.

    Args:
        what: an intact pack, or a model, which is saved as a pack together with the facts recorded about its weights.
        repository: ``organisation/name``.
        revision: branch; None is the main one.
        private: whether a new repository is private; None uses the account's own setting.
        message: commit message.
        licence: licence of a model's weights, by its name on a hub; None uses the recorded one. A pack states its own.

    Returns:
        the URL of the commit.

    Raises:
        XFusionError: the pack was altered, the licence is not a valid name or is given for a pack, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(what, Model):
        with tempfile.TemporaryDirectory() as folder:
            saved_folder = save(what, Path(folder) / "pack", licence=licence)
            return push(saved_folder, repository, revision=revision, private=private, message=message)
    path = find(os.fspath(what))
    if licence is not None:
        raise XFusionError(f"{path} states its own licence: load it, and push the model with licence={licence!r}")
    _read_intact(path)
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=path,
            revision=revision,
            allow_patterns=list(FILES),
            delete_patterns=[OPENING],  # left by an earlier pack, if this one has no opening head
            commit_message=message,
        )
    except (OSError, ValueError, RuntimeError, HFValidationError, HfHubHTTPError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else None  # the file; the error says why
        reason = first_line(error) + (f" {first_line(cause)}" if cause else "")
        raise XFusionError(f"{path} cannot be put on the hub as {repository!r}: {reason}") from error
    return str(commit.commit_url)


def add_facts(
    folder: Path,
    model: Model,
    *,
    scores: dict[str, Any] | None = None,
    proof: dict[str, Any] | None = None,
    text_keeping: dict[str, Any] | None = None,
) -> None:
    """Record ``scores``, a ``proof`` or perplexities (``text_keeping``) in a pack with a folder of its own, and rewrite its card.

    A pack of an older version also gets what it does not record of its base's function; without new facts, only this.

    Raises:
        XFusionError: the model or its base is not the pack's, or the folder also contains other files.
    """
    config, state = _read_pack_of(folder, model)
    refuse_other_files(folder)
    with atomic_folder(folder) as temporary:
        for name in (WEIGHTS, OPENING):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
        facts = {"scores": scores, "proof": proof, "text_keeping": text_keeping}
        config |= {name: value for name, value in facts.items() if value is not None}
        config["base_function"] = _completed_function(config, model.backbone)
        _write_config_and_card(temporary, config, model)
    model.recorded = Record.of(config, model, state)


def shipped() -> list[str]:
    """Names of the packs that come with the package."""
    root = resources.files("xfusion") / "packs"
    if not root.is_dir():
        return []
    return sorted(p.name for p in root.iterdir() if (p / WEIGHTS).is_file() and (p / CONFIG).is_file())


def pack_in(folder: Path) -> Path:
    """The pack in a folder: the one inside if it is the folder of a training run, else the folder itself."""
    inner = folder / "pack"
    restore_folder(inner)
    return inner if not (folder / CONFIG).is_file() and (inner / CONFIG).is_file() else folder


def find(name: str) -> Path:
    """The folder of a pack, given by a folder, a shipped pack's name, or a hub id, in this order.

    The folder of a training run means the pack in it.
    A hub id may end with a branch, a tag or a commit, as in ``org/name@1f3a9c0``.
    """
    path = Path(name).expanduser()
    restore_folder(path)
    if path.is_dir():
        pack = pack_in(path)
        if not (pack / CONFIG).is_file():
            hides = f"; it hides the shipped pack {name}: rename it, or run this elsewhere" if name in shipped() else ""
            raise XFusionError(f"{name} is not a pack: it has no {CONFIG}, and neither has {path / 'pack'}{hides}")
        return pack
    if name in shipped():
        return Path(str(resources.files("xfusion") / "packs" / name))
    repository, _, revision = name.partition("@")  # a revision may have slashes, as refs/pr/1 has
    if repository.count("/") != 1 or name.startswith((".", "/", "~")):
        shipped_names = ", ".join(shipped()) or "none"
        raise XFusionError(
            f"there is no pack {name!r}: name a folder, a shipped pack ({shipped_names}) or a hub id such as org/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(FILES)))
    except (OSError, HFValidationError) as error:
        raise XFusionError(
            f"there is no folder {name!r}, and the hub pack of that name cannot be fetched: {first_line(error)}"
        ) from error
    except Exception as error:  # the hub client raises its transport library's own errors
        raise XFusionError(f"the hub pack {name!r} cannot be fetched: {first_line(error)}") from error


def _at_revision(name: str, revision: str) -> str:
    """A hub id followed by its revision."""
    if Path(name).expanduser().is_dir() or name in shipped() or "@" in name:
        raise XFusionError(f"revision {revision!r} is of a hub id without one, and {name!r} is none: leave it out")
    return f"{name}@{revision}"


def _differing_shared(recorded: Any, current: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ, as `differing`, but a field that one of them lacks is no difference: older packs or
    other versions of transformers may lack it.
    """
    if isinstance(recorded, dict) and isinstance(current, dict):
        for name in sorted(recorded.keys() & current.keys()):
            yield from _differing_shared(recorded[name], current[name], f"{field}.{name}" if field else name)
    elif recorded != current:
        yield field, recorded, current


def read_config(folder: Path) -> dict[str, Any]:
    """Read a pack's config, of any known format version, and check that it was not altered."""
    config = read_json(folder / CONFIG)
    version = config.get("format_version")
    if version is None and "model_type" in config:
        raise XFusionError(
            f"{folder} is a model of transformers, not a pack: it may be the base of one, xfusion train"
            " --model.backbone.source"
        )
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise XFusionError(f"{folder}: the pack has format version {version}, this xfusion reads 1 to {FORMAT_VERSION}")
    if version > 1 and not {SEAL, "weights_sha256"} <= set(config):
        raise XFusionError(
            f"{folder / CONFIG} was altered: a pack of format version {version} has hashes, this has none"
        )
    return config


def load(
    name: str | os.PathLike[str],
    *,
    backbone: Backbone | None = None,
    device: torch.device | str = "cpu",
    trust: bool = False,
    revision: str | None = None,
) -> Model:
    """Load a pack on its base.

    Args:
        name: a folder (that of a training run means the pack in it), a shipped pack's name, or a hub id (perhaps
            ``org/name@revision``), in this order.
        backbone: an already loaded base to share; its fingerprint must match, and it stays on its device.
        device: device to load the base and the pack to.
        trust: allow classes outside xfusion that the pack names.
        revision: a branch, a tag or a commit, for a hub id that does not include one.

    Raises:
        XFusionError: there is no such pack, the base is another one, or the weights do not fit or were altered.
    """
    folder = find(os.fspath(name) if revision is None else _at_revision(os.fspath(name), revision))
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
    for setting, recorded, current in _differing_shared(config.get("base_function", {}), backbone.function):
        raise XFusionError(
            f"{name} was trained on {base['source']} with {setting} {recorded!r:.60}, but {backbone.source} has the same weights"
            f" with {current!r:.60}: what it computes is another base; load that of the training"
        )
    is_checked = _check_codec(name, config, model_config)
    model = Model(model_config, backbone, fresh=False)
    if not is_checked:  # a hub may have sent the weights meanwhile (Whisper's come at the first use)
        _check_codec(name, config, model_config)
    state = load_weights(model, folder, config.get("weights_fingerprint"), config.get("weights_sha256"))
    model.opening = _read_opening(folder, config, backbone)
    model.recorded = Record.of(config, model, state)
    return model.eval()


def _check_codec(name: str | os.PathLike[str], config: dict[str, Any], model_config: ModelConfig) -> bool:
    """Refuse other weights of the codec or encoder than the pack was trained with; whether they are here to be checked.

    Raises:
        XFusionError: their hash is another.
    """
    codec_hash = _codec_facts(model_config).get("codec_sha256") if "codec_sha256" in config else None
    if codec_hash is not None and codec_hash != config["codec_sha256"]:
        raise XFusionError(
            f"{name} was trained with a codec whose weights have the hash {config['codec_sha256'][:16]}, but those at"
            f" {model_config.modality.codec.weights} have {codec_hash[:16]}: put back the one of its training"
        )
    return codec_hash is not None or "codec_sha256" not in config


def _read_opening(folder: Path, config: dict[str, Any], backbone: Backbone) -> Opening | None:
    """The opening head that a pack's config names; without that entry no file is read.

    Raises:
        XFusionError: the file is missing, was altered, or is for another model width.
    """
    if "opening_sha256" not in config:
        return None
    head = Opening(backbone.hidden_size)
    _load_strictly(dict(head.state_dict()), read_tensors(folder / OPENING, config["opening_sha256"]), folder / OPENING)
    return head.requires_grad_(False).to(backbone.device)


def load_weights(
    model: Model, folder: Path, expected: str | None = None, expected_hash: str | None = None
) -> dict[str, torch.Tensor]:
    """Load a pack's learned weights strictly into a model of the same configuration.

    Args:
        model: the model whose weights are replaced.
        folder: the pack.
        expected: fingerprint of the weights; checked only if there is no hash of the file.
        expected_hash: hash of the file.

    Returns:
        the weights as stored in the file.

    Raises:
        XFusionError: the file is missing, was altered, or does not fit.
    """
    state = read_tensors(folder / WEIGHTS, expected_hash)
    if expected_hash is None and expected is not None and fingerprint(state) != expected:
        raise XFusionError(
            f"{folder / WEIGHTS} was altered: its fingerprint is {fingerprint(state)[:16]}, {CONFIG} says {expected[:16]};"
            " take an intact copy"
        )
    _load_strictly(model.learned_state(), state, folder / WEIGHTS)
    return state


def _load_strictly(model_state: dict[str, torch.Tensor], state: dict[str, torch.Tensor], path: Path) -> None:
    """Replace all tensors by those of a file, which must contain exactly the same names and shapes."""
    missing, unexpected = sorted(set(model_state) - set(state)), sorted(set(state) - set(model_state))
    reshaped = [k for k in model_state if k in state and model_state[k].shape != state[k].shape]
    if missing or unexpected or reshaped:
        parts = [
            f"{len(names)} {problem} (first: {names[0]})"
            for problem, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
            if names
        ]
        raise XFusionError(
            f"{path} does not fit the model: {'; '.join(parts)}; take the version of xfusion that wrote it, or train it anew"
        )
    with torch.no_grad():
        for key, value in model_state.items():
            value.copy_(state[key])
