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
MAX_CAPTIONS = 1000
"""Most wordings of one example."""
MAX_PROBLEMS = 100
"""Most problems of one example that are reported: each of a million lines may have its own."""
MAX_LINE = 4_000_000
"""Bytes of the longest JSON line or ``.txt`` file that is read."""
CAPTION_FIELDS = ("caption", "captions", "text")
"""Fields of a JSON line that may contain wordings; all that are present count, in this order."""
QUESTION = "question"
"""Field of a JSON line that may contain a question."""


@dataclass(frozen=True)
class Columns:
    """What a spec such as ``photos.jsonl:caption=prompt`` names: fields of JSON, columns of a table, suffixes of tar members."""

    captions: tuple[str, ...] = ()
    """Those of wordings, instead of `CAPTION_FIELDS`; the first is the name."""
    image: str | None = None
    """That of the picture, or of the sound's path."""


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


def kind_of(path: Path, columns: Columns) -> Kind:
    """The medium of a folder or a file of JSON lines: sounds if it contains sounds and no pictures, else pictures."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                first_line = next((line for line in _lines(file) if line.strip()), b"{}")
            row = json.loads(first_line.decode("utf-8-sig"))
            if not isinstance(row, dict):  # reported when it is read
                return PICTURES
            if columns.image:
                row = {"file_name": row.get(columns.image, "")}
            name = row.get("file_name", "") if "image" not in row else ".png"
            return SOUNDS if "audio" in row or Path(str(name)).suffix.lower() in sounds.SUFFIXES else PICTURES
        suffixes = {file.suffix.lower() for file in path.rglob("[!.]*")} if path.is_dir() else set()
    except (OSError, ValueError, RecursionError):  # reported when it is read
        return PICTURES
    return SOUNDS if suffixes & sounds.SUFFIXES and not suffixes & pictures.SUFFIXES else PICTURES


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
    stands_for: int = 1
    """Examples that it counts as: those of a part of a shard that cannot be read, exactly or by its bytes; 0 if unknown."""

    def add_caption(self, caption: str) -> None:
        """Add a wording; one too long or too many is not stored: a thousand of a megabyte each would fill the memory."""
        if len(caption) > MAX_CAPTION:
            problem = f"caption of {len(caption):,} characters, at most {MAX_CAPTION:,} are legal"
            self.add_problem("long caption", problem)
        elif len(self.captions) == MAX_CAPTIONS:
            if not any(problem.kind == "many captions" for problem in self.problems):
                self.add_problem("many captions", f"more than {MAX_CAPTIONS:,} captions")
        else:
            self.captions.append(caption)

    def add_question(self, question: Any) -> None:
        """Set the question."""
        if not isinstance(question, str):
            self.add_problem("invalid question", f"the question must be text, found {_start(question)}")
        elif len(question) > MAX_CAPTION:
            problem = f"question of {len(question):,} characters, at most {MAX_CAPTION:,} are legal"
            self.add_problem("long question", problem)
        else:
            self.question = question.strip()

    def add_problem(self, kind: str, what: str, where: str | None = None) -> None:
        """Record a problem, at the record's own origin unless another is given."""
        if len(self.problems) == MAX_PROBLEMS - 1:
            kind, what, where = "many problems", f"has more than {MAX_PROBLEMS - 1} problems", None
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(kind=kind, where=where or self.origin, what=what))


def read(path: Path, special_tokens: tuple[str, ...], kind: Kind, columns: Columns) -> tuple[list[Record], list[str]]:
    """Records in the order of the files, and notes on what was ignored.

    Raises:
        XFusionError: there are no such examples at ``path``, or no JSON lines whose fields ``columns`` could name.
    """
    try:
        if path.is_dir():
            records, notes = _read_folder(path, kind, columns)
        elif path.is_file() and path.suffix.lower() in (".jsonl", ".ndjson"):
            notes: list[str] = []
            records = list(_read_lines(path, notes, kind, columns))
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
        spec_forms = (
            "'emoji', 'emoji:128', a folder of pictures or sounds, shards (.tar, .parquet), hf:ORG/NAME, a folder of latents"
            " or a .jsonl file"
        )
        message = f"{path}: no such folder or file; data is {spec_forms}"
        if option := re.search(r":(\w+)=[^:/]*$", str(path)):
            message += f"; there is no option {option[1]}=: use weight, held, caption or image"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            message += (
                f"; a data set of the hub is hf:{path}, where it holds parquet files, else it is downloaded first: hf download"
                f" {path} --repo-type dataset --local-dir FOLDER"
            )
        return message
    if path.suffix.lower() == ".json":
        return f"{path}: is not read; write one object a line: jq -c '.[]' {path.name} > {path.stem}.jsonl"
    if path.suffix.lower() in pictures.SUFFIXES | sounds.SUFFIXES:
        kind = PICTURES if path.suffix.lower() in pictures.SUFFIXES else SOUNDS
        return f"{path}: is one {kind.noun}; put it into a folder, with its caption in {path.stem}.txt, and name the folder"
    return f"{path}: is neither a folder nor a .jsonl, .tar or .parquet file"


def refuse_columns(path: Path, columns: Columns) -> None:
    """Raise `XFusionError` if a spec names columns of data that have none."""
    if columns != Columns():
        raise XFusionError(
            f"{path}: has no columns: caption= and image= are for parquet, saved data sets, tars and JSON lines; leave them out"
        )


def _read_folder(folder: Path, kind: Kind, columns: Columns) -> tuple[list[Record], list[str]]:
    files = sorted(path for path in folder.rglob("[!.]*") if not path.is_dir() and not _is_hidden(path, folder))
    notes: list[str] = []
    records: list[Record] = []
    if not any(path.name == METADATA for path in files):
        refuse_columns(folder, columns)
    for path in files:
        if path.name == METADATA:
            listed_records = list(_read_lines(path, notes, kind, columns))
            for record in listed_records:
                record.id = (path.parent.relative_to(folder) / record.id).as_posix()
            records += listed_records
    listed_paths = {os.path.normpath(str(record.place)) for record in records if record.place is not None}
    media_paths = [path for path in files if path.suffix.lower() in kind.suffixes]
    by_stem: dict[Path, list[str]] = {}
    for path in media_paths:
        by_stem.setdefault(path.with_suffix(""), []).append(path.name)
    for path in media_paths:
        if os.path.normpath(path) not in listed_paths:
            records.append(_with_sidecar(path, folder, by_stem[path.with_suffix("")], has_metadata=bool(listed_paths)))
    ignored = []
    for path in files:
        if path.suffix.lower() == ".txt":
            if path.with_suffix("") not in by_stem and path.stem.lower() not in _NO_CAPTIONS:
                orphan = Record(id=path.relative_to(folder).as_posix(), origin=str(path), place=None)
                expected_name = f"{path.stem}{kind.suffix}"
                orphan.add_problem(
                    f"missing {kind.noun}", f"captions without a {kind.noun}: no file {expected_name}, ..."
                )
                records.append(orphan)
        elif path.name != METADATA and path not in media_paths:
            ignored.append(path.relative_to(folder).as_posix())
    linked = sorted(path for path in folder.rglob("[!.]*") if path.is_symlink() and path.is_dir())
    if linked:
        names = ", ".join(path.relative_to(folder).as_posix()[:100] for path in linked[:3])
        notes.append(
            one_line(f"{len(linked)} linked folders were not read, name them as sources of their own: {names}")
        )
    if ignored:
        ellipsis = ", ..." if len(ignored) > 3 else ""
        names = ", ".join(name[:100] for name in ignored[:3])
        notes.append(one_line(f"{len(ignored)} files are no {kind.noun}s and were not read: {names}{ellipsis}"))
    return records, notes


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _with_sidecar(path: Path, folder: Path, same_stem: list[str], *, has_metadata: bool) -> Record:
    """A picture with the ``.txt`` next to it."""
    record = Record(id=path.relative_to(folder).as_posix(), origin=str(path), place=path)
    sidecar = path.with_suffix(".txt")
    if (character := unprintable(record.id)) is not None:
        record.add_problem("invalid name", f"the name contains the character U+{ord(character):04X}: rename the file")
    elif len(same_stem) > 1:
        record.add_problem("duplicated name", f"{sidecar.name} would caption {' and '.join(same_stem)}: rename one")
    elif not sidecar.is_file():
        metadata_hint = f"{METADATA} does not list it and " if has_metadata else ""
        record.add_problem("missing caption", f"no caption: {metadata_hint}there is no {sidecar.name}")
    elif sidecar.stat().st_size > MAX_LINE:
        record.add_problem("long caption", f"is longer than {MAX_LINE:,} bytes: no caption", str(sidecar))
    else:
        for number, line in enumerate(sidecar.read_bytes().split(b"\n"), start=1):
            text = utf8(line, record, f"{sidecar}:{number}", first=number == 1)
            if text:
                record.add_caption(text)
        if not record.captions and not record.problems:
            record.add_problem("empty caption", "no caption: the file is empty", f"{sidecar}:1")
    return record


def _read_lines(path: Path, notes: list[str], kind: Kind, columns: Columns) -> Iterator[Record]:
    """One record per line that is not blank."""
    num_longer = 0
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), start=1):
            record = Record(id=f"line {number}", origin=f"{path}:{number}", place=None)
            if len(line) > MAX_LINE:
                record.add_problem("long line", f"is longer than {MAX_LINE:,} bytes: no example")
                line = b""
            text = utf8(line, record, first=number == 1)
            if text:
                num_longer += _fill(record, text, path.parent, kind, columns)
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
        problem = f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}; save the file as UTF-8"
        record.add_problem("invalid UTF-8", problem, where)
        return ""


def _fill(record: Record, text: str, root: Path, kind: Kind, columns: Columns) -> bool:
    """Read path, captions, question and group from a JSON line. Returns whether a conversation has further answers."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        record.add_problem("invalid JSON", f"not JSON: {error}")
        return False
    if not isinstance(row, dict):
        record.add_problem("invalid JSON", f"expected an object in braces, found a {type(row).__name__}")
        return False
    record.place = _path(row, record, root, kind, columns)
    return take_captions(row, record, columns)


def take_captions(row: Mapping[str, Any], record: Record, columns: Columns, *, needed: bool = True) -> bool:
    """Read captions, question and group from a row; without ``needed``, one without a field for captions is no problem.

    Returns whether a conversation has further answers.
    """
    if isinstance(group := row.get("group"), str) and group:
        if control_character(group):
            record.add_problem(
                "invalid group", f"the group {group[:60]!r} contains a character that is none: reword it"
            )
        record.group = group
    if row.get(QUESTION) is not None:
        record.add_question(row[QUESTION])
    fields = [name for name in columns.captions or CAPTION_FIELDS if name in row]
    if not fields and not columns.captions and "conversations" in row:
        return _conversation(row["conversations"], record)
    if not fields and needed:
        expected = ", ".join(columns.captions) or f"{', '.join(CAPTION_FIELDS)} or conversations"
        record.add_problem("missing caption", f"no caption: expected {expected}{_others(row, 'caption')}")
    for name in fields:
        wordings = row[name] if isinstance(row[name], list) else [row[name]]
        if all(isinstance(wording, str) for wording in wordings):
            for wording in wordings:
                record.add_caption(wording.strip())
        else:
            record.add_problem("invalid caption", f"{name} must be text or a list of texts, found {_start(row[name])}")
    if fields and not record.captions and not record.problems:
        record.add_problem("empty caption", "empty caption")
    return False


def _others(row: Mapping[str, Any], option: str) -> str:
    """What a row has instead of the fields that were expected."""
    return f", found {', '.join(row)[:200]}: name the field by :{option}=FIELD behind the data" if row else ""


def _path(row: dict[str, Any], record: Record, root: Path, kind: Kind, columns: Columns) -> Path | None:
    missing = f"missing {kind.noun}"
    name = row.get(columns.image) if columns.image else row.get("file_name", row.get(kind.field))
    if name is None:
        expected = columns.image or f"{kind.field} or file_name"
        record.add_problem(missing, f"no {kind.noun}: expected {expected}{_others(row, 'image')}")
    elif not isinstance(name, str) or unprintable(name) or not name:
        record.add_problem(missing, f"the {kind.noun} must be a path, found {_start(name)}")
    elif name.startswith(("http://", "https://", "data:")):
        record.add_problem(missing, f"{name[:60]} is a web address: only files are read, fetch it first")
    elif not os.path.isabs(name) and os.path.normpath(name).split(os.sep)[0] == "..":
        record.add_problem(
            "path outside", f"{name[:100]} leaves the folder of the file: write an absolute path to mean it"
        )
    else:
        record.id = name if os.path.isabs(name) else os.path.normpath(name)
        return root / name
    return None


def _conversation(turns: Any, record: Record) -> bool:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        record.add_problem("invalid caption", "conversations must be a list of {from, value}")
        return False
    answer_turns = [index for index, turn in enumerate(turns) if turn.get("from") in ("gpt", "assistant")]
    answers = [turns[index].get("value") for index in answer_turns]
    if not answers or not isinstance(answers[0], str):
        record.add_problem("missing caption", "no caption: the conversation has no answer from gpt")
        return False
    record.add_caption(answers[0].strip())
    question_turn = turns[answer_turns[0] - 1] if answer_turns[0] else {}
    if question_turn.get("from") in ("human", "user") and not record.question:
        question = question_turn.get("value")
        record.add_question(MARK.sub(" ", question) if isinstance(question, str) else question)
    return len(answers) > 1


def _find_duplicates(records: Iterable[Record]) -> None:
    """Report lines that repeat a picture with the same question and captions, and make ids unique.

    One picture may otherwise have several lines.
    """
    records_by_id: dict[str, list[Record]] = {}
    first_records: dict[tuple[str, ...], Record] = {}
    for record in records:
        first_record = first_records.setdefault((record.id, record.question, *record.captions), record)
        if first_record is not record and record.place is not None and not record.problems:
            problem = f"{record.id[:100]} with these captions stands already at {first_record.origin}"
            record.add_problem("duplicated name", problem)
        records_by_id.setdefault(record.id, []).append(record)
    for identity, same_id in records_by_id.items():
        for record in same_id[1:]:
            record.id = f"{identity}#{record.origin.rpartition(':')[2]}"


def check_special_tokens(record: Record, special_tokens: tuple[str, ...]) -> None:
    """Report text in captions and question that a tokenizer would read as special tokens."""
    for part, text in _texts(record):
        for token in special_tokens:
            if token and token in text:
                problem = f"{part} contains {token!r}, a special token of the model's tokenizer: reword it"
                record.add_problem("special token", problem)


def _texts(record: Record) -> Iterator[tuple[str, str]]:
    yield from (("caption", caption) for caption in record.captions)
    if record.question:
        yield "question", record.question


def _check_captions(record: Record, special_tokens: tuple[str, ...]) -> None:
    check_special_tokens(record, special_tokens)
    for part, text in _texts(record):
        if not text:
            record.add_problem("empty caption", "empty caption")
        if character := control_character(text):
            record.add_problem("control character", f"{part} contains the character U+{ord(character):04X}: remove it")
    record.captions = list(dict.fromkeys(record.captions))


def control_character(text: str) -> str | None:
    """The first control character other than tab and newline, or lone surrogate: tokenizers handle these badly."""
    return next((c for c in text if c not in "\t\n\r" and unicodedata.category(c) in ("Cc", "Cs")), None)


def unprintable(name: str) -> str | None:
    """The first character of a file name that breaks a line or is invalid, such as a byte that is not UTF-8."""
    return next((c for c in name if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), None)


def _start(value: Any) -> str:
    """The start of an unexpected value, for messages."""
    try:
        return repr(str(value)[:60])
    except (RecursionError, ValueError):  # very deeply nested lists; a number of 5,000 digits
        return f"a {type(value).__name__}"
