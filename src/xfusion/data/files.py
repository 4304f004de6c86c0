"""Reads a user's pictures or sounds with captions, from a folder or JSON lines. Reports every problem and skips nothing.

There are three forms; for sounds, ``audio`` replaces ``image``:

- a folder of pictures, each with a ``.txt`` of the same name: one wording per line, the first being the name;
- a folder with ``metadata.jsonl`` (``file_name`` and ``text``, ``caption``, ``captions``), Hugging Face's imagefolder;
- a ``.jsonl`` with ``image`` and captions, or with LLaVA's ``conversations``, whose first answer is the caption.

A row may have a ``question``, to which its first caption is the answer; in a conversation it is the turn before that answer.

Paths in a file are relative to that file. They may be absolute, but must not leave the folder by ``..``.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from xfusion.data import pictures, sounds
from xfusion.data.pictures import Place
from xfusion.data.report import Problem, one_line
from xfusion.data.sequence import XFusionError

MAX_CAPTION = 4000
"""Characters of the longest legal caption."""
MAX_LINE = 4_000_000
"""Bytes of the longest JSON line or ``.txt`` file that is read."""
CAPTION_FIELDS = ("caption", "captions", "text")
"""Fields of a JSON line that may contain wordings; all that are present count, in this order."""
QUESTION = "question"
"""Field of a JSON line that may contain a question."""
MARK = re.compile("<image>|<audio>")
"""Placeholder of the picture or sound in a conversation's turn."""
METADATA = "metadata.jsonl"
_NO_CAPTIONS = frozenset({"readme", "license", "licence", "notice", "copying", "classes", "requirements"})


@dataclass(frozen=True)
class Kind:
    """The medium of a data set, and how its files are recognised and checked."""

    noun: str
    field: str
    """Field of a JSON line, besides ``file_name``, that contains the path."""
    suffixes: frozenset[str]
    readable: str
    suffix: str
    """One of the suffixes, for messages."""
    header_problem: Callable[[Path], str | None]
    decode_problem: Callable[[Path], str | None]


PICTURES = Kind(
    "picture",
    "image",
    pictures.SUFFIXES,
    pictures.READABLE,
    ".png, .jpg",
    pictures.header_problem,
    pictures.decode_problem,
)
SOUNDS = Kind(
    "sound",
    "audio",
    sounds.SUFFIXES,
    sounds.READABLE,
    ".wav, .flac",
    sounds.header_problem,
    sounds.decode_problem,
)


def kind_of(path: Path) -> Kind:
    """The medium of a folder or a file of JSON lines: sounds if it contains sounds and no pictures, else pictures."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                first = next((line for line in _lines(file) if line.strip()), b"{}")
            row = json.loads(first.decode("utf-8-sig"))
            if not isinstance(row, dict):  # reported when it is read
                return PICTURES
            name = row.get("file_name", "") if "image" not in row else ".png"
            return SOUNDS if "audio" in row or Path(str(name)).suffix.lower() in sounds.SUFFIXES else PICTURES
        found = {file.suffix.lower() for file in path.rglob("[!.]*")} if path.is_dir() else set()
    except (OSError, ValueError, RecursionError):  # reported when it is read
        return PICTURES
    return SOUNDS if found & sounds.SUFFIXES and not found & pictures.SUFFIXES else PICTURES


@dataclass
class Record:
    """One example as found in the user's files, before its picture is opened."""

    id: str
    origin: str
    place: Place | None
    captions: list[str] = field(default_factory=list)
    question: str = ""
    group: str | None = None
    problems: list[Problem] = field(default_factory=list)
    content: str | None = None
    """Hash of the picture's bytes, if they were checked already (`xfusion.data.shards`)."""

    def add_caption(self, caption: str) -> None:
        """Add a wording; one that is too long is not stored: a thousand of a megabyte each would fill the memory."""
        if len(caption) > MAX_CAPTION:
            what = f"caption of {len(caption):,} characters, at most {MAX_CAPTION:,} are legal"
            self.complain("long caption", what)
        else:
            self.captions.append(caption)

    def add_question(self, question: Any) -> None:
        """Set the question."""
        if not isinstance(question, str):
            self.complain("invalid question", f"the question must be text, found {_start(question)}")
        elif len(question) > MAX_CAPTION:
            what = f"question of {len(question):,} characters, at most {MAX_CAPTION:,} are legal"
            self.complain("long question", what)
        else:
            self.question = question.strip()

    def complain(self, kind: str, what: str, where: str | None = None) -> None:
        """Record a problem, at the record's own origin unless another is given."""
        self.problems.append(Problem(kind=kind, where=where or self.origin, what=what))


def read(path: Path, special_tokens: tuple[str, ...] = (), kind: Kind = PICTURES) -> tuple[list[Record], list[str]]:
    """Records in the order of the files, and notes on what was ignored.

    Raises:
        XFusionError: there are no such examples at ``path``.
    """
    try:
        if path.is_dir():
            records, notes = _read_folder(path, kind)
        elif path.is_file() and path.suffix.lower() in (".jsonl", ".ndjson"):
            notes: list[str] = []
            records = list(_read_lines(path, notes, kind))
        else:
            raise XFusionError(_no_source(path))
    except OSError as error:  # no read permission, a name that is too long, a failing disk
        raise XFusionError(one_line(f"{error.filename or path}: cannot be read: {error.strerror or error}")) from error
    if not records:
        raise XFusionError(
            f"{path}: no examples found; a folder needs {kind.noun}s ({kind.readable}) with a .txt of the same name "
            f"each, or a {METADATA}; a .jsonl needs a line for each {kind.noun}"
        )
    check(records, special_tokens)
    return records, notes


def check(records: Iterable[Record], special_tokens: tuple[str, ...] = ()) -> None:
    """Record problems of names and captions, for records of any source."""
    records = list(records)
    _find_duplicates(records)
    for record in records:
        _check_captions(record, special_tokens)


def _no_source(path: Path) -> str:
    if not path.exists():
        known = (
            "'emoji', 'emoji:128', a folder of pictures or sounds, shards (.tar, .parquet), hf:ORG/NAME, a folder of latents"
            " or a .jsonl file"
        )
        text = f"{path}: no such folder or file; data is {known}"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            text += (
                f"; a data set of the hub is hf:{path}, where it holds parquet files, else it is downloaded first: hf download"
                f" {path} --repo-type dataset --local-dir FOLDER"
            )
        return text
    if path.suffix.lower() == ".json":
        return f"{path}: is not read; write one object a line: jq -c '.[]' {path.name} > {path.stem}.jsonl"
    if path.suffix.lower() in pictures.SUFFIXES | sounds.SUFFIXES:
        one = PICTURES if path.suffix.lower() in pictures.SUFFIXES else SOUNDS
        return (
            f"{path}: is one {one.noun}; put it into a folder, with its caption in {path.stem}.txt, and name the folder"
        )
    return f"{path}: is neither a folder nor a .jsonl, .tar or .parquet file"


def _read_folder(folder: Path, kind: Kind) -> tuple[list[Record], list[str]]:
    files = sorted(path for path in folder.rglob("[!.]*") if not path.is_dir() and not _is_hidden(path, folder))
    notes: list[str] = []
    records: list[Record] = []
    for path in files:
        if path.name == METADATA:
            found = list(_read_lines(path, notes, kind))
            for record in found:
                record.id = (path.parent.relative_to(folder) / record.id).as_posix()
            records += found
    listed = {os.path.normpath(str(record.place)) for record in records if record.place is not None}
    images = [path for path in files if path.suffix.lower() in kind.suffixes]
    by_stem: dict[Path, list[str]] = {}
    for path in images:
        by_stem.setdefault(path.with_suffix(""), []).append(path.name)
    for path in images:
        if os.path.normpath(path) not in listed:
            records.append(_with_sidecar(path, folder, by_stem[path.with_suffix("")], has_metadata=bool(listed)))
    ignored = []
    for path in files:
        if path.suffix.lower() == ".txt":
            if path.with_suffix("") not in by_stem and path.stem.lower() not in _NO_CAPTIONS:
                orphan = Record(id=path.relative_to(folder).as_posix(), origin=str(path), place=None)
                first = f"{path.stem}{kind.suffix}"
                orphan.complain(f"missing {kind.noun}", f"captions without a {kind.noun}: no file {first}, ...")
                records.append(orphan)
        elif path.name != METADATA and path not in images:
            ignored.append(path.relative_to(folder).as_posix())
    if ignored:
        more = ", ..." if len(ignored) > 3 else ""
        shown = ", ".join(name[:100] for name in ignored[:3])
        notes.append(one_line(f"{len(ignored)} files are no {kind.noun}s and were not read: {shown}{more}"))
    return records, notes


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _with_sidecar(path: Path, folder: Path, same_stem: list[str], *, has_metadata: bool) -> Record:
    """A picture with the ``.txt`` next to it."""
    record = Record(id=path.relative_to(folder).as_posix(), origin=str(path), place=path)
    sidecar = path.with_suffix(".txt")
    if (character := _unprintable(record.id)) is not None:
        record.complain("invalid name", f"the name contains the character U+{ord(character):04X}: rename the file")
    elif len(same_stem) > 1:
        record.complain("duplicated name", f"{sidecar.name} would caption {' and '.join(same_stem)}: rename one")
    elif not sidecar.is_file():
        instead = f"{METADATA} does not list it and " if has_metadata else ""
        record.complain("missing caption", f"no caption: {instead}there is no {sidecar.name}")
    elif sidecar.stat().st_size > MAX_LINE:
        record.complain("long caption", f"is longer than {MAX_LINE:,} bytes: no caption", str(sidecar))
    else:
        for number, line in enumerate(sidecar.read_bytes().split(b"\n"), start=1):
            text = utf8(line, record, f"{sidecar}:{number}", first=number == 1)
            if text:
                record.add_caption(text)
        if not record.captions and not record.problems:
            record.complain("empty caption", "no caption: the file is empty", f"{sidecar}:1")
    return record


def _read_lines(path: Path, notes: list[str], kind: Kind) -> Iterator[Record]:
    """One record per line that is not blank."""
    num_longer = 0
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), start=1):
            record = Record(id=f"line {number}", origin=f"{path}:{number}", place=None)
            if len(line) > MAX_LINE:
                record.complain("long line", f"is longer than {MAX_LINE:,} bytes: no example")
                line = b""
            text = utf8(line, record, first=number == 1)
            if text:
                num_longer += _fill(record, text, path.parent, kind)
            if text or record.problems:
                yield record
    if num_longer:
        notes.append(f"{path}: {num_longer} conversations have more than one answer; the first is the caption")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; a line that is too long is cut to one byte more than the limit."""
    while line := file.readline(MAX_LINE + 1):
        yield line
        while len(line) > MAX_LINE and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE + 1)


def utf8(line: bytes, record: Record, where: str | None = None, *, first: bool = False) -> str:
    """The line without surrounding whitespace; empty, with a problem recorded, if it is not UTF-8."""
    try:
        return line.decode("utf-8-sig" if first else "utf-8").strip()
    except UnicodeDecodeError as error:
        what = f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}; save the file as UTF-8"
        record.complain("invalid UTF-8", what, where)
        return ""


def _fill(record: Record, text: str, root: Path, kind: Kind) -> bool:
    """Read path, captions, question and group from a JSON line. Returns whether a conversation has further answers."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        record.complain("invalid JSON", f"not JSON: {error}")
        return False
    if not isinstance(row, dict):
        record.complain("invalid JSON", f"expected an object in braces, found a {type(row).__name__}")
        return False
    record.place = _path(row, record, root, kind)
    return take_captions(row, record)


def take_captions(row: Mapping[str, Any], record: Record) -> bool:
    """Read captions, question and group from a row. Returns whether a conversation has further answers."""
    if isinstance(group := row.get("group"), str) and group:
        if _control_character(group):
            record.complain("invalid group", f"the group {group[:60]!r} contains a character that is none: reword it")
        record.group = group
    if row.get(QUESTION) is not None:
        record.add_question(row[QUESTION])
    fields = [name for name in CAPTION_FIELDS if name in row]
    if not fields and "conversations" in row:
        return _conversation(row["conversations"], record)
    if not fields:
        record.complain("missing caption", f"no caption: expected {', '.join(CAPTION_FIELDS)} or conversations")
    for name in fields:
        wordings = row[name] if isinstance(row[name], list) else [row[name]]
        if all(isinstance(wording, str) for wording in wordings):
            for wording in wordings:
                record.add_caption(wording.strip())
        else:
            record.complain("invalid caption", f"{name} must be text or a list of texts, found {_start(row[name])}")
    if fields and not record.captions and not record.problems:
        record.complain("empty caption", "empty caption")
    return False


def _path(row: dict[str, Any], record: Record, root: Path, kind: Kind) -> Path | None:
    missing, name = f"missing {kind.noun}", row.get("file_name", row.get(kind.field))
    if name is None:
        record.complain(missing, f"no {kind.noun}: expected {kind.field} or file_name")
    elif not isinstance(name, str) or _unprintable(name) or not name:
        record.complain(missing, f"the {kind.noun} must be a path, found {_start(name)}")
    elif name.startswith(("http://", "https://", "data:")):
        record.complain(missing, f"{name[:60]} is a web address: only files are read, fetch it first")
    elif not os.path.isabs(name) and os.path.normpath(name).split(os.sep)[0] == "..":
        record.complain(
            "path outside", f"{name[:100]} leaves the folder of the file: write an absolute path to mean it"
        )
    else:
        record.id = name if os.path.isabs(name) else os.path.normpath(name)
        return root / name
    return None


def _conversation(turns: Any, record: Record) -> bool:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        record.complain("invalid caption", "conversations must be a list of {from, value}")
        return False
    places = [place for place, turn in enumerate(turns) if turn.get("from") in ("gpt", "assistant")]
    answers = [turns[place].get("value") for place in places]
    if not answers or not isinstance(answers[0], str):
        record.complain("missing caption", "no caption: the conversation has no answer from gpt")
        return False
    record.add_caption(answers[0].strip())
    before = turns[places[0] - 1] if places[0] else {}
    if before.get("from") in ("human", "user") and not record.question:
        asked = before.get("value")
        record.add_question(MARK.sub(" ", asked) if isinstance(asked, str) else asked)
    return len(answers) > 1


def _find_duplicates(records: Iterable[Record]) -> None:
    """Report lines that repeat a picture with the same question and captions, and make ids unique.

    One picture may otherwise have several lines.
    """
    seen: dict[str, list[Record]] = {}
    first: dict[tuple[str, ...], Record] = {}
    for record in records:
        before = first.setdefault((record.id, record.question, *record.captions), record)
        if before is not record and record.place is not None and not record.problems:
            what = f"{record.id[:100]} with these captions stands already at {before.origin}"
            record.complain("duplicated name", what)
        seen.setdefault(record.id, []).append(record)
    for identity, several in seen.items():
        for record in several[1:]:
            record.id = f"{identity}#{record.origin.rpartition(':')[2]}"


def check_special_tokens(record: Record, special_tokens: tuple[str, ...]) -> None:
    """Report text in captions and question that a tokenizer would read as special tokens."""
    for what, words in _said(record):
        for token in special_tokens:
            if token and token in words:
                problem = f"{what} contains {token!r}, a special token of the model's tokenizer: reword it"
                record.complain("special token", problem)


def _said(record: Record) -> Iterator[tuple[str, str]]:
    yield from (("caption", caption) for caption in record.captions)
    if record.question:
        yield "question", record.question


def _check_captions(record: Record, special_tokens: tuple[str, ...]) -> None:
    check_special_tokens(record, special_tokens)
    for what, words in _said(record):
        if not words:
            record.complain("empty caption", "empty caption")
        if character := _control_character(words):
            record.complain("control character", f"{what} contains the character U+{ord(character):04X}: remove it")
    record.captions = list(dict.fromkeys(record.captions))


def _control_character(text: str) -> str | None:
    """The first control character other than tab and newline, or lone surrogate: tokenizers handle these badly."""
    return next((c for c in text if c not in "\t\n\r" and unicodedata.category(c) in ("Cc", "Cs")), None)


def _unprintable(name: str) -> str | None:
    """The first character of a file name that breaks a line or is invalid, such as a byte that is not UTF-8."""
    return next((c for c in name if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), None)


def _start(value: Any) -> str:
    """The start of an unexpected value, for messages."""
    try:
        return repr(str(value)[:60])
    except (RecursionError, ValueError):  # very deeply nested lists; a number of 5,000 digits
        return f"a {type(value).__name__}"
