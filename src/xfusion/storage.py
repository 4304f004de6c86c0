"""Atomic writes of files and folders, and hashes that show whether they were altered later.

A file or a folder is written under a temporary name next to its own and then renamed, so no reader ever sees half of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xfusion.data.sequence import XFusionError, first_line

SEAL = "sha256"
"""Field of a JSON file that stores a hash of all other fields."""
ASIDE = "-aside"
"""Suffix of the hidden name of a folder that is being replaced."""


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary file to write, which replaces ``target`` when the block ends without an error.

    Its bytes are flushed to disk before the rename: otherwise a power cut may leave an empty file. The temporary name has
    the same suffix, for writers that choose the format by it.

    Raises:
        XFusionError: the disk is full, the folder read-only, ...; the previous file stays.
    """
    with named_in_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(target)
            _sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object; the file appears whole or not at all.

    Raises:
        ValueError: it contains a number that is not finite.
        XFusionError: the file cannot be written.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, which replaces ``target`` when the block ends without an error.

    The files are flushed to disk before the rename, so neither a killed process nor a crashed machine leaves half of the
    folder. Two folders cannot swap names atomically: for a moment the previous folder has a hidden name. An error or a
    signal in that moment restores it. If the process is killed there, `restore_folder` restores it, which runs at the start of
    writing it again, of reading a pack and of resuming a run.

    Raises:
        XFusionError: the disk is full, the folder read-only, ...; then the temporary folder is removed.
    """
    with named_in_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        restore_folder(target)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            yield temporary
            for file in temporary.iterdir():
                file.chmod(0o644)  # temporary folders and safetensors files are readable by their owner only
                _sync(file)
            temporary.chmod(0o755)
            _sync(temporary)
            _replace(target, temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace(target: Path, replacement: Path) -> None:
    """Rename the folder ``replacement`` to ``target``, and remove the folder that had this name, if any."""
    aside = _aside(target)
    try:
        while True:
            if target.exists():
                _remove(aside)  # left by a process that died after its rename
                target.rename(aside)
            try:
                replacement.rename(target)
                break
            except OSError:
                if not target.exists():  # else a reader took this process for a dead one and restored the old folder
                    raise
    finally:
        restore_folder(target)
    _sync(target.parent)
    _remove(aside)


def restore_folder(target: Path) -> None:
    """Restore a folder's name if a process died while `atomic_folder` was replacing it."""
    aside = _aside(target)
    with suppress(OSError):  # without write access, the caller reports that the folder is missing
        if aside.is_dir() and not target.exists():
            aside.rename(target)


def restore_folders(folder: Path, name: str) -> None:
    """`restore_folder` for all names that match a pattern."""
    for aside in folder.glob(f".{name}{ASIDE}"):
        restore_folder(folder / aside.name[1:].removesuffix(ASIDE))


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove temporary folders left by killed processes, for names that match a pattern; `restore_folder` restores the others."""
    restore_folders(folder, name)
    for leftover in folder.glob(f".{name}-*"):
        if not leftover.name.endswith(ASIDE) or (folder / leftover.name[1:].removesuffix(ASIDE)).exists():
            _remove(leftover)


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}{ASIDE}"


def _remove(folder: Path) -> None:
    """Remove a folder, or a symbolic link to one, as far as possible."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Make file system errors in the block name the path: the error of a full disk, for example, does not.

    Raises:
        XFusionError: instead of the file system's error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            reason = "a file stands where a folder is needed"
        elif isinstance(error, IsADirectoryError):
            reason = "a folder stands where a file is needed"
        raise XFusionError(f"{path} cannot be written: {reason}; make room, or name another folder") from error


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Check that a file can be written, or files in a folder, before anything is computed for them.

    A temporary file is created and removed in the folder, or in the nearest one above that exists; missing folders are not
    created.

    Args:
        path: the file or folder, existing or not.
        folder: whether it is a folder that gets files.

    Raises:
        XFusionError: the file system refuses, or a file stands where a folder is needed or the other way round.
    """
    with named_in_errors(path):
        if not folder and path.is_dir():
            raise IsADirectoryError
        place = path if folder else path.parent
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise NotADirectoryError
        with tempfile.TemporaryFile(dir=place):
            pass


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_hash(path: Path) -> str:
    """SHA-256 of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts with a hash over them; an existing seal is replaced."""
    content = json.loads(json.dumps({k: v for k, v in facts.items() if k != SEAL}))  # as a reader will see them
    text = json.dumps(content, sort_keys=True)
    return {**facts, SEAL: hashlib.sha256(text.encode()).hexdigest()}


_PATH = re.compile(r"(?<![\w.:~/\\-])(?:~?/|[A-Za-z]:[\\/])[^\s\"'`|;,+()\[\]{}]+")
"""A path from the root, a drive or a home folder, inside other text; never a part of a URL or a hub id."""
_WHOLE_PATH = re.compile(r"(?:~?/|[A-Za-z]:[\\/])[^\n\"'`|;,+]+")
"""Such a path as the whole string; its folders may have spaces in their names."""


def without_folders(content: Any) -> Any:
    """JSON values with absolute paths of this machine shortened to their last part: ``/home/me/photos`` to ``photos``."""
    if isinstance(content, dict):
        return {key: without_folders(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_folders(value) for value in content]
    if not isinstance(content, str):
        return content
    if _WHOLE_PATH.fullmatch(content) and " /" not in content:
        return _name(content)
    return _PATH.sub(lambda match: _name(match[0]), content)


def _name(path: str) -> str:
    return PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object and check its seal, if it has one.

    Raises:
        XFusionError: it cannot be read, or was altered.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise XFusionError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(facts, dict):
        raise XFusionError(f"{path} cannot be read: it holds a {type(facts).__name__}, not an object in braces")
    if SEAL in facts and (digest := sealed(facts)[SEAL]) != facts[SEAL]:
        raise XFusionError(
            f"{path} was altered: its hash is {digest[:16]}, it says {str(facts[SEAL])[:16]}; take an intact copy"
        )
    return facts


def read_tensors(path: Path, expected_hash: str | None) -> dict[str, Tensor]:
    """The tensors of a file, returned only if its bytes match the expected hash.

    Raises:
        XFusionError: it cannot be read, or was altered.
    """
    try:
        tensors = load_file(str(path))
        digest = None if expected_hash is None else file_hash(path)
    except (OSError, SafetensorError) as error:
        raise XFusionError(f"{path} cannot be read: {first_line(error)}") from error
    if digest != expected_hash:
        raise XFusionError(
            f"{path} was altered: its hash is {str(digest)[:16]}, {str(expected_hash)[:16]} was written;"
            " take an intact copy"
        )
    return tensors
