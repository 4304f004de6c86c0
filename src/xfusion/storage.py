"""Files that appear whole or not at all, and that are known to be what was written.

A file or a folder is filled under a temporary name beside its own and then renamed, so that no reader ever sees half of it;
hashes tell afterwards whether its bytes are still the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xfusion.data.sequence import XFusionError, first_line

SEAL = "sha256"
"""Field of a JSON file that holds a hash over all of its other fields."""


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A file to fill that takes the name ``target``, in the place of what stood there, when the block ends well.

    Its bytes are on the disk before it gets the name: else a power cut may leave the name with nothing in it. Its temporary
    name has the same suffix, for writers that go by it.

    Raises:
        XFusionError: the disk is full, the folder read-only, ...; what stood there stays.
    """
    with named_in_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
        try:
            yield temporary
            _to_disk(temporary)
            temporary.replace(target)
            _to_disk(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object; the file appears whole or not at all.

    Raises:
        ValueError: it holds a number that is not finite.
        XFusionError: it cannot be written.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that takes the name ``target`` when the block ends well; until then what stood there stays.

    The files are on the disk before they get the name, so that neither a killed process nor a machine that dies leaves
    half of one under it.

    Raises:
        XFusionError: the disk is full, the folder read-only, ...; then nothing is left of it.
    """
    with named_in_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            yield temporary
            for file in temporary.iterdir():
                file.chmod(0o644)  # temporary folders, and safetensors' own files, are for their owner alone
                _to_disk(file)
            temporary.chmod(0o755)
            _to_disk(temporary)
            old = temporary.with_name(temporary.name + "-old")
            if target.exists():
                target.rename(old)
            temporary.rename(target)
            _to_disk(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Inside the block an error of the file system names what it is about: a full disk's own says only that it is full.

    Raises:
        XFusionError: in place of that error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            reason = "a file stands where a folder is needed"
        raise XFusionError(f"{path} cannot be written: {reason}; make room, or name another folder") from error


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_hash(path: Path) -> str:
    """SHA-256 over the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts with a hash over them; a seal that they have already is renewed."""
    plain = json.loads(json.dumps({k: v for k, v in facts.items() if k != SEAL}))  # as whoever reads them will see them
    text = json.dumps(plain, sort_keys=True)
    return {**facts, SEAL: hashlib.sha256(text.encode()).hexdigest()}


_PATH = re.compile(r"(?<![\w.:~/\\-])(?:~?/|[A-Za-z]:[\\/])[^\s\"'`|;,+()\[\]{}]+")
"""A path from the root, a drive or somebody's home, in the middle of words; no part of an address or of a hub id."""
_ALONE = re.compile(r"(?:~?/|[A-Za-z]:[\\/])[^\n\"'`|;,+]+")
"""The same with nothing around it; its folders may have spaces in their names."""


def without_folders(content: Any) -> Any:
    """JSON values in which whole paths of this machine are the names of what they lead to: ``/home/me/photos`` is ``photos``."""
    if isinstance(content, dict):
        return {key: without_folders(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_folders(value) for value in content]
    if not isinstance(content, str):
        return content
    if _ALONE.fullmatch(content) and " /" not in content:
        return _name(content)
    return _PATH.sub(lambda found: _name(found[0]), content)


def _name(path: str) -> str:
    return PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, its seal checked where it has one.

    Raises:
        XFusionError: it cannot be read, or is not what was written.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise XFusionError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(facts, dict):
        raise XFusionError(f"{path} cannot be read: it holds a {type(facts).__name__}, not an object in braces")
    if SEAL in facts and (found := sealed(facts)[SEAL]) != facts[SEAL]:
        raise XFusionError(
            f"{path} was altered: its hash is {found[:16]}, it says {str(facts[SEAL])[:16]}; take an intact copy"
        )
    return facts


def read_tensors(path: Path, expected_hash: str | None) -> dict[str, Tensor]:
    """The tensors of a file, read only if its bytes are those that were written.

    Raises:
        XFusionError: it cannot be read, or was altered.
    """
    try:
        tensors = load_file(str(path))
        found = None if expected_hash is None else file_hash(path)
    except (OSError, SafetensorError) as error:
        raise XFusionError(f"{path} cannot be read: {first_line(error)}") from error
    if found != expected_hash:
        raise XFusionError(
            f"{path} was altered: its hash is {str(found)[:16]}, {str(expected_hash)[:16]} was written;"
            " take an intact copy"
        )
    return tensors
