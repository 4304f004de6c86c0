"""Parquet files of the Hugging Face hub, read remotely: ``hf:ORG/NAME[@REVISION][:[CONFIG:]SPLIT]``.

Text is fetched when the source is opened, pictures by row group when a step needs them; only the index is stored on disk. A
revision is pinned to its commit, so the order covers the same files until the run names another revision.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from xfusion.data.sequence import XFusionError, first_line

PREFIX, FILES = "hf:", "hf://datasets/"
"""Prefixes of a spec, and of the address of a file."""
SPEC = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([^:]+))?(?::([^:]+?))??(?::([^:]+))?")
SPLITS = ("train", "validation", "valid", "val", "dev", "test")
"""File names that mean a split."""
UNCACHED: dict[str, Any] = {"cache_type": "none"}
"""Without this, the client fetches five megabytes per small read; the Parquet reader already requests whole columns."""
CONVERTED = "refs/convert/parquet"
"""Branch where the hub stores data sets of other formats converted to parquet."""


def find(spec: str) -> list[str]:
    """Addresses ``hf://datasets/ORG/NAME@COMMIT/FILE.parquet`` of one split, sorted by name.

    Raises:
        XFusionError: the hub does not answer, or has no such data set, revision, configuration or split.
    """
    match = SPEC.fullmatch(spec)
    if match is None:
        raise XFusionError(f"{spec}: write hf:ORG/NAME, hf:ORG/NAME:SPLIT or hf:ORG/NAME@REVISION:CONFIG:SPLIT")
    name, revision, config, split = match.groups()
    with _named_in_errors(spec):
        api = _hub().HfApi(endpoint=_hub().constants.ENDPOINT)
        commit = api.dataset_info(name, revision=revision).sha
        files = sorted(api.list_repo_files(name, repo_type="dataset", revision=commit))
    by_config: dict[str, dict[str, list[str]]] = {}
    for file in files:
        if file.endswith(".parquet"):
            file_config, file_split = place_of(file)
            by_config.setdefault(file_config, {}).setdefault(file_split, []).append(f"{FILES}{name}@{commit}/{file}")
    if not by_config:
        raise XFusionError(
            f"{spec}: holds no parquet file; if the hub has converted it, name hf:{name}@{CONVERTED}, else download it (hf"
            f" download {name} --repo-type dataset --local-dir FOLDER)"
        )
    splits = _select(spec, "configuration", by_config, config, "default")
    return _select(spec, "split", splits, split, "train")


def _select(spec: str, kind: str, available: dict[str, Any], name: str | None, default: str) -> Any:
    if name is None:
        name = next(iter(available)) if len(available) == 1 else default
    if name not in available:
        raise XFusionError(
            f"{spec}: the {kind} {name!r} is not among {', '.join(available)}: name one, as in hf:ORG/NAME:CONFIG:SPLIT"
        )
    return available[name]


def place_of(file: str) -> tuple[str, str]:
    """Configuration and split of a file, by the naming of the hub's own tools.

    ``data/train-00000-of-00002.parquet`` -> ``("default", "train")``; ``blue/test/0000.parquet`` -> ``("blue", "test")``.
    """
    *folders, stem = PurePosixPath(file).with_suffix("").parts
    folders = [folder for folder in folders if folder != "data"]
    if match := re.fullmatch(r"(.+?)-\d{5}-of-\d{5}(?:-\w+)?", stem):
        split = match[1]
    elif stem in SPLITS:
        split = stem
    else:
        split = folders.pop() if folders and (folders[-1] in SPLITS or stem.isdecimal()) else "train"
    return "/".join(folders) or "default", split


def without_commit(address: str) -> str:
    """A file's address without the commit, which does not change with new commits of the data set."""
    return re.sub(r"@[^/]+", "", address, count=1)


@contextmanager
def open_file(address: str) -> Iterator[Any]:
    """Open a file of the hub; only the parts that are read are fetched.

    Raises:
        XFusionError: it cannot be fetched. Errors of the Parquet reader pass through.
    """
    import pyarrow

    try:
        with _hub().HfFileSystem(endpoint=_hub().constants.ENDPOINT).open(address, "rb", **UNCACHED) as file:
            yield file
    except (pyarrow.ArrowException, XFusionError):
        raise
    except Exception as error:
        raise _fetch_error(address, error) from error


@contextmanager
def _named_in_errors(address: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the client's own errors, its transport's and the system's
        raise _fetch_error(address, error) from error


def _fetch_error(address: str, error: Exception) -> XFusionError:
    return XFusionError(f"{address}: cannot be fetched from the hub: {type(error).__name__}: {first_line(error)[:200]}")


def _hub() -> Any:
    import huggingface_hub

    return huggingface_hub
