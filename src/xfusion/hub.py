"""What this machine has of hub repositories, and the licences that their cards state."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def hub_file(source: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a folder, or of a hub repository if this machine has it in its cache; None if there is none.

    Args:
        source: a folder or a hub id.
        name: the file's path inside of it.
        revision: branch, tag or commit of the repository; None means its main branch.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    path = Path(source) / name
    if not Path(source).is_dir():
        try:
            cached = try_to_load_from_cache(source, name, revision=revision)
        except HFValidationError:  # neither a folder nor the name of a repository
            cached = None
        if not isinstance(cached, str):
            return None
        path = Path(cached)
    return path if path.is_file() else None


def hub_commit(source: str, revision: str | None = None) -> str | None:
    """The commit of a hub repository that was loaded last from a branch, a tag or a commit; None for a folder.

    The cache keeps each commit's files in a folder of its name; transformers no longer says which one it took.
    """
    config = None if Path(source).is_dir() else hub_file(source, "config.json", revision)
    return None if config is None else config.parent.name


def card_licence(source: str, revision: str | None = None) -> str | None:
    """The licence that the model card of a folder or of a hub repository states; None if it states none or cannot be had."""
    from huggingface_hub import hf_hub_download, metadata_load
    from yaml import YAMLError

    card = hub_file(source, "README.md", revision)
    if card is None and not Path(source).is_dir():
        with suppress(Exception):  # no network, no card, no such repository: whatever it is, a run must not end by it
            card = Path(hf_hub_download(source, "README.md", revision=revision))
    try:
        licence = card and (metadata_load(card) or {}).get("license")
    except (ValueError, OSError, YAMLError):
        return None
    return ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence) if licence else None
