"""Reads webdataset's tars: members of the same name are an example, its picture and its words.

Captions are in ``.txt`` (one wording per line) or ``.json``, or both, as img2dataset writes them. Of several pictures of a name
the one with the fewest parts in its suffix is taken. What is not read is named.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from xfusion.data import pictures
from xfusion.data.files import MAX_LINE, Columns, Record, take_captions, unprintable, utf8
from xfusion.data.sequence import XFusionError


@dataclass(frozen=True)
class Member:
    """A picture in a tar."""

    path: Path
    offset: int
    size: int
    name: str

    def read_bytes(self) -> bytes:
        """The member's content, up to the end of the file."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def records(path: Path, columns: Columns, unread_names: list[str]) -> Iterator[Record]:
    """Members of the same name form a record; bytes that belong to no member are reported as a problem. The names of members
    that are neither picture nor words are appended to ``unread_names``.
    """
    split = webdataset().tariterators.base_plus_ext
    members, problems = _members(path)
    by_key: dict[str, list[tuple[str, tarfile.TarInfo]]] = {}
    for member in members:
        key, extension = split(member.name)
        if key is not None and not Path(member.name).name.startswith("."):
            by_key.setdefault(key, []).append((extension.lower(), member))
        else:
            unread_names.append(member.name)
    file_size = path.stat().st_size
    for key, same_key in by_key.items():
        yield _record(path, key, same_key, columns, file_size, unread_names)
    bytes_read = sum(member.offset_data - member.offset + _padded(member.size) for member in members)
    for number, (problem, num_bytes) in enumerate(problems):
        lost = max(1, round(num_bytes * len(by_key) / bytes_read)) if by_key else 0
        yield broken_record(path, f"{path.name}#{number}", problem, lost)


def _record(
    path: Path,
    key: str,
    same_key: list[tuple[str, tarfile.TarInfo]],
    columns: Columns,
    file_size: int,
    unread_names: list[str],
) -> Record:
    """The example of the members of one name, each with its suffix."""
    record = Record(id=f"{path.name}/{key}", origin=f"{path}/{key}", place=None)
    if (character := unprintable(key)) is not None:
        problem = f"the name contains the character U+{ord(character):04X}: rename the member"
        record.add_problem("invalid name", problem)
    elif ".." in PurePosixPath(key).parts:
        record.add_problem("path outside", "the name leaves the tar by ..: rename the member")
    suffixes = [suffix for suffix, _ in same_key]
    picture_suffixes = [columns.image.lower()] if columns.image else _picture_suffixes(suffixes)
    if len(picture_suffixes) > 1:
        several = f"{' and '.join(picture_suffixes)} are pictures of one name"
        remedy = f"rename one, or say which by :image={picture_suffixes[0]} behind the data"
        record.add_problem("duplicated name", f"{several}: {remedy}")
    text_suffixes = tuple(map(str.lower, columns.captions)) or ("txt",)
    if columns.captions:  # the first that is named is the example's name
        same_key = sorted(same_key, key=lambda item: text_suffixes.index(item[0]) if item[0] in text_suffixes else -1)
    with_words = [member.name for suffix, member in same_key if suffix in (*text_suffixes, "json")]
    seen: set[str] = set()
    for suffix, member in same_key:
        place = Member(path, member.offset_data, member.size, member.name)
        origin = f"{path}/{member.name}"
        is_picture = suffix in picture_suffixes
        if suffix in seen and (is_picture or member.name in with_words):
            record.add_problem("duplicated name", f"{member.name} is there twice: remove one", origin)
        seen.add(suffix)
        if member.offset_data + member.size > file_size:
            record.add_problem("broken member", f"needs {member.size} bytes, the file ends before", origin)
            if is_picture:
                record.place = record.place or place
        elif is_picture:
            record.place = place
            if member.size > pictures.MAX_BYTES:
                problem = f"has {member.size:,} bytes, more than {pictures.MAX_BYTES // 1_000_000} million"
                record.add_problem("broken picture", problem, origin)
        elif member.name not in with_words:
            unread_names.append(member.name)
        elif member.size > MAX_LINE:
            record.add_problem("long caption", f"is longer than {MAX_LINE:,} bytes: no caption", origin)
        elif suffix in text_suffixes:
            for number, line in enumerate(place.read_bytes().split(b"\n"), start=1):
                if text := utf8(line, record, f"{origin}:{number}", first=number == 1):
                    record.add_caption(text)
        elif text := utf8(place.read_bytes(), record, origin, first=True):
            _read_json_captions(text, record, columns, needed=len(with_words) == 1)
    if record.place is None and not record.problems:
        expected = f"picture {columns.image}" if columns.image else "picture"
        record.add_problem("missing picture", f"no {expected} among {', '.join(suffixes)[:200]}")
    if not record.captions and not record.problems:
        if with_words:
            record.add_problem("empty caption", f"no caption in {' or '.join(with_words)}")
        else:
            expected = " or ".join(f"{PurePosixPath(key).name}.{suffix}" for suffix in (*text_suffixes, "json"))
            record.add_problem("missing caption", f"no caption: there is no {expected} beside it")
    return record


def _picture_suffixes(suffixes: Iterable[str]) -> list[str]:
    """Suffixes of an example's picture, of which there should be one: in webdataset's convention ``001.mask.png`` beside
    ``001.jpg`` is another column.
    """
    found = [suffix for suffix in dict.fromkeys(suffixes) if f".{suffix.rpartition('.')[2]}" in pictures.SUFFIXES]
    return [suffix for suffix in found if suffix.count(".") == min(other.count(".") for other in found)]


def _members(path: Path) -> tuple[list[tarfile.TarInfo], list[tuple[str, int]]]:
    """The files of a tar; after a broken header, reading continues at the next valid one, and the gap is reported with its
    bytes.
    """
    members: list[tarfile.TarInfo] = []
    problems: list[tuple[str, int]] = []
    try:
        with tarfile.open(path, "r:", ignore_zeros=True) as tar, path.open("rb") as file:
            end = 0
            while True:
                try:
                    member = tar.next()
                except (tarfile.TarError, ValueError, OSError) as error:
                    if not _ends_inside(members, file):
                        rest = file.seek(0, os.SEEK_END) - end
                        problems.append((f"cannot be read behind byte {end}: {error}", rest))
                    break
                start = file.seek(0, os.SEEK_END) if member is None else member.offset
                if start > end and _holds_data(file, end, start):
                    problems.append((f"bytes {end} to {start} belong to no member: a header is broken", start - end))
                if member is None:
                    break
                end = member.offset_data + _padded(member.size)
                if member.isfile():
                    members.append(member)
                elif member.islnk() or member.issym():
                    problems.append(
                        (f"{member.name} is a link, which is not read: put the file itself into the tar", 0)
                    )
    except (tarfile.TarError, OSError) as error:
        problems.append((f"cannot be read as a tar: {error}", 0))
    return members, problems


def _padded(size: int) -> int:
    """Bytes that a member's content of this size takes: whole blocks."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _ends_inside(members: Sequence[tarfile.TarInfo], file: Any) -> bool:
    """Whether the file ends inside its last member, which is then reported separately."""
    return bool(members) and members[-1].offset_data + members[-1].size > file.seek(0, os.SEEK_END)


def _holds_data(file: Any, start: int, end: int) -> bool:
    file.seek(start)
    while start < end:
        block = file.read(min(1 << 20, end - start))
        if not block or any(block):
            return bool(block)
        start += len(block)
    return False


def _read_json_captions(text: str, record: Record, columns: Columns, *, needed: bool) -> None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        record.add_problem("invalid JSON", f"its .json is not JSON: {error}")
        return
    if isinstance(row, dict):
        take_captions({key: value for key, value in row.items() if value is not None}, record, columns, needed=needed)
    else:
        record.add_problem("invalid JSON", f"its .json holds a {type(row).__name__}, expected an object in braces")


def broken_record(path: Path | str, identity: str, problem: str, stands_for: int) -> Record:
    """A record of a part of a shard that cannot be read, in place of ``stands_for`` examples."""
    record = Record(id=identity, origin=str(path), place=None, stands_for=stands_for)
    record.add_problem("broken shard", problem)
    return record


def webdataset() -> Any:
    """The package, or an `XFusionError` if it is missing."""
    try:
        import webdataset
    except ImportError as error:
        raise XFusionError("tar shards need webdataset: pip install 'xfusion[train]'") from error
    return webdataset
