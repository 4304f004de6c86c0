"""Reads shards: webdataset's tars, parquet files, and folders saved by Hugging Face's `datasets`.

A shard is read by random access through an *index* of each picture's position, its captions, and the problems found. The
index is built once, decoding every picture, and cached by the shard's path, size and date. So a step needs no iterator state,
and a resumed run continues exactly.

- ``.tar``: members of the same name are an example (`xfusion.data.tars`);
- ``.parquet``: one column of pictures (bytes, or a struct with ``bytes``), and captions in a column of that name;
- a folder of ``Dataset.save_to_disk``: the same columns;
- ``hf:ORG/NAME``: parquet files of the hub (`xfusion.data.hub`), whose pictures are not checked until a step needs them.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice, takewhile
from pathlib import Path, PurePosixPath
from typing import Any

from xfusion.backbone import cache_folder
from xfusion.data import hub, pictures, tars
from xfusion.data.files import CAPTION_FIELDS, QUESTION, Columns, Record, take_captions
from xfusion.data.report import Problem, one_line
from xfusion.data.result_cache import ResultCache
from xfusion.data.sequence import XFusionError
from xfusion.data.tars import Member, broken_record, webdataset
from xfusion.storage import atomic_file, read_json

INDEX_VERSION = 6
"""Changes when the content of an index or the checks change."""
ROW_GROUP_BYTES = 512 * 1024 * 1024
"""Largest row group that is read: a picture's row group is loaded as a whole."""
GROUPS_TOGETHER = 4
"""Row groups that a step's pictures come from: only these are in memory, not the whole file."""
ROWS_TOGETHER = 1000
"""Rows of a saved data set whose texts are read together."""
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
STREAMS = ("hf://", "http://", "https://", "s3://", "gs://", "pipe:")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """A picture in a parquet file, local or on the hub."""

    path: Path | str
    group: int
    row: int
    column: str
    name: str

    def read_bytes(self) -> bytes:
        """The cell's bytes; its row group is cached."""
        return _picture_bytes(_row_group(self.path, self.group, self.column)[self.row].as_py())


@dataclass(frozen=True)
class Row:
    """A picture in a folder saved by `datasets`, which memory-maps it."""

    path: Path
    row: int
    column: str
    name: str

    def read_bytes(self) -> bytes:
        """The picture's bytes."""
        return _picture_bytes(_load_column(self.path, self.column)[self.row][self.column])


KINDS: tuple[type, ...] = (Member, Cell, Row)


def find(path: Path) -> Sequence[Path | str]:
    """The shards that a path names: a file, all of a folder, a pattern such as ``shards/{000..099}.tar``, or the addresses of
    a data set of the hub (``hf:ORG/NAME``); empty if it names none.

    Raises:
        XFusionError: it is a stream or a compressed tar, which have no random access.
    """
    text = str(path)
    if text.startswith(tuple(prefix.replace("//", "/") for prefix in STREAMS)):  # a Path has single slashes
        raise XFusionError(
            f"{text}: streams have no random access, on which exact resuming rests: parquet files of the hub are read as"
            " hf:ORG/NAME; download what else there is (hf download NAME --repo-type dataset --local-dir FOLDER) and name the"
            " folder, or encode it once: xfusion data encode"
        )
    if text.startswith(hub.PREFIX) and not path.exists():
        return hub.find(text)
    if text.endswith(COMPRESSED):
        raise XFusionError(f"{text}: a compressed tar has no random access: unpack it to a plain .tar first")
    if path.is_file():
        return [path] if path.suffix in (".tar", ".parquet") else []
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(read_json(path / "dataset_dict.json").get("splits", []))
        raise XFusionError(f"{text}: holds the splits {splits} of a data set: name the folder of one of them")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return [path]
    if path.is_dir():
        parquets = sorted(path.rglob("[!.]*.parquet"))
        if any(file.suffix.lower() in pictures.SUFFIXES for file in path.rglob("[!.]*")):
            parquets = [file for file in parquets if not _is_plain_table(file)]
        return sorted(path.rglob("[!.]*.tar")) or parquets
    if not any(character in text for character in "*?[{"):
        return []
    paths: set[Path] = set()
    for pattern in webdataset().shardlists.expand_urls(text):
        found = glob.glob(pattern)
        if not found and not any(character in pattern for character in "*?["):
            raise XFusionError(f"{text}: there is no {pattern}: name the shards that exist")
        paths.update(map(Path, found))
    return [shard for shard_path in sorted(paths) for shard in find(shard_path)]


def _is_plain_table(path: Path) -> bool:
    """Whether a parquet file holds no pictures: img2dataset writes one about the pictures beside each of its folders."""
    import pyarrow

    try:
        with _open_parquet(path) as file:
            return not any(_holds_bytes(field.type) for field in file.schema_arrow)
    except (pyarrow.ArrowException, OSError):  # reported when it is read
        return False


def unread(path: Path, shards: Sequence[Path | str]) -> list[str]:
    """A note on the other data in a folder of shards: only these are read, tars before parquet files before loose files."""
    if not path.is_dir() or list(shards) == [path]:
        return []
    suffixes = {".tar", ".parquet", *pictures.SUFFIXES}
    others = (file for file in path.rglob("[!.]*") if file.suffix.lower() in suffixes and file.is_file())
    names = sorted(file.relative_to(path).as_posix() for file in set(others) - set(map(Path, shards)))
    if not names:
        return []
    return [f"{len(names)} files beside the shards were not read: {_first_names(names)}"]


def read_all(shards: Sequence[Path | str], columns: Columns, *, decode: bool = True) -> tuple[list[Record], list[str]]:
    """All examples of several shards, as `read`, and a note on what was not read of tars. If shards share a name, their
    examples' ids start with the folder.
    """
    places = [PurePosixPath(shard) for shard in shards]
    names = Counter(place.name for place in places)
    levels = zip(*(place.parent.parts for place in places), strict=False)
    num_shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    by_shard, unread_by_shard = zip(*(read(shard, columns, decode=decode) for shard in shards), strict=True)
    _estimate_lost(shards, by_shard)
    all_records = []
    for records, place in zip(by_shard, places, strict=True):
        if names[place.name] > 1:
            for record in records:
                record.id = "/".join((*place.parent.parts[num_shared:], record.id))
        all_records += records
    names = [f"{place.name}/{name}" for place, unread in zip(places, unread_by_shard, strict=True) for name in unread]
    if not names:
        return all_records, []
    what = "members of tars are neither the picture nor the words of an example and were not read"
    return all_records, [f"{len(names)} {what}: {_first_names(names)}"]


def _first_names(names: Sequence[str]) -> str:
    return one_line(", ".join(name[:100] for name in names[:3]) + (", ..." if len(names) > 3 else ""))


def _estimate_lost(shards: Sequence[Path | str], by_shard: Sequence[list[Record]]) -> None:
    """How many examples a file stands for that cannot be read at all: as many as the others have in its bytes."""
    sizes = [shard.stat().st_size if isinstance(shard, Path) and shard.is_file() else 0 for shard in shards]
    whole = [
        (size, sum(record.stands_for for record in records))
        for size, records in zip(sizes, by_shard, strict=True)
        if size and all(r.stands_for for r in records)
    ]
    num_bytes, num_examples = (sum(column) for column in zip(*whole, strict=True)) if whole else (0, 0)
    for size, records in zip(sizes, by_shard, strict=True):
        for record in records:
            if not record.stands_for:
                record.stands_for = max(1, round(size * num_examples / num_bytes)) if num_bytes else 1


def read(path: Path | str, columns: Columns, *, decode: bool = True) -> tuple[list[Record], list[str]]:
    """All examples of a shard, with their pictures checked (except on the hub), and the names of the members of a tar that
    were not read; from the index if it is cached.
    """
    place = [path] if isinstance(path, str) else [str(path.resolve()), decode, *_sizes_and_dates(path)]
    key = [INDEX_VERSION, asdict(columns), *place]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    index = cache_folder() / "shards" / f"{PurePosixPath(path).stem}-{digest}.jsonl"
    if index.is_file():
        try:
            return _read_index(index, path)
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            logger.warning("%s: its index %s cannot be read (%s): it is built anew", path, index, _error_line(error))
    unread_names: list[str] = []
    if isinstance(path, str):
        records = list(_hub_records(path, columns))
    else:
        records = list(_check_pictures(path, columns, unread_names, decode))
    try:
        _write_index(index, records, unread_names)
    except XFusionError as error:
        logger.warning("%s: its index cannot be kept (%s): it is built at every start", path, error)
    return records, unread_names


def _hub_records(address: str, columns: Columns) -> Iterator[Record]:
    """Records whose pictures are not checked: each is its own group unless the data says otherwise, and its content counts
    as changed when the data set gets another commit.
    """
    for record in _parquet_records(address, columns):
        if record.place is not None:
            record.group = record.group or _short_hash(hub.without_commit(record.origin))
            record.content = _short_hash(record.origin)
        yield record


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_pictures(path: Path, columns: Columns, unread_names: list[str], decode: bool) -> Iterator[Record]:
    """Records with each picture checked and hashed. Appends to ``unread_names``."""
    if path.suffix == ".tar":
        records = tars.records(path, columns, unread_names)
    elif path.suffix == ".parquet":
        records = _parquet_records(path, columns)
    else:
        records = _dataset_records(path, columns)

    def check(record: Record) -> Record:
        if any(problem.kind in ("broken member", "broken picture") for problem in record.problems):
            return record  # already reported, from its header
        if record.place is not None:
            try:
                content = record.place.read_bytes()
            except (TypeError, KeyError):
                record.add_problem("missing picture", "holds no bytes: only pictures inside of a shard are read")
                return record
            except Exception as error:  # the content of a shard may be broken in any way
                record.add_problem("broken picture", f"cannot be read ({_error_line(error)})")
                return record
            if picture_problem := pictures.bytes_problem(content, decode=decode):
                record.add_problem("broken picture", picture_problem)
            record.content = hashlib.sha256(content).hexdigest()[:16]
        return record

    # Pillow decodes without the GIL; few threads, since each may hold a whole picture.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        # In small chunks, so that a row group is checked while it is in memory.
        while chunk := list(islice(records, 64)):
            yield from pool.map(check, chunk)


# -------------------------------------------------------------------------------------------- parquet and saved data sets


@contextmanager
def _open_parquet(path: Path | str) -> Iterator[Any]:
    """Open a parquet file, local or on the hub."""
    from pyarrow import parquet

    if isinstance(path, str):
        with hub.open_file(path) as remote, parquet.ParquetFile(remote, pre_buffer=True) as file:
            yield file
    else:
        with parquet.ParquetFile(path) as file:
            yield file


def _parquet_records(path: Path | str, columns: Columns) -> Iterator[Record]:
    """One record per row; a row group that cannot be read is one problem."""
    import pyarrow

    with ExitStack() as exit_stack:
        try:
            file = exit_stack.enter_context(_open_parquet(path))
        except (pyarrow.ArrowException, OSError) as error:
            yield broken_record(path, PurePosixPath(path).name, f"cannot be read as parquet: {_error_line(error)}", 0)
            return
        yield from _row_groups(path, columns, file)


def _row_groups(path: Path | str, columns: Columns, file: Any) -> Iterator[Record]:
    import pyarrow

    file_name = PurePosixPath(path).name
    # A hub that does not answer is not a broken file: that error passes through.
    failures = (pyarrow.ArrowException, OSError) if isinstance(path, Path) else (pyarrow.ArrowException,)
    picture_column, text_columns = _columns(path, file.schema_arrow, columns)
    number = 0
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        if metadata.total_byte_size > ROW_GROUP_BYTES:
            raise XFusionError(
                f"{path}: row group {group} has {metadata.total_byte_size >> 20} MiB, at most {ROW_GROUP_BYTES >> 20} are"
                " read at once: convert it (datasets.load_dataset('parquet', data_files=...)['train'].save_to_disk(FOLDER))"
            )
        try:
            rows = _rows(file.read_row_group(group, columns=text_columns))
            if isinstance(path, Path):
                _row_group(path, group, picture_column)
        except failures as error:
            yield broken_record(
                path,
                f"{file_name}#group {group}",
                f"row group {group} cannot be read: {_error_line(error)}",
                metadata.num_rows,
            )
            rows = []
            number += metadata.num_rows
        for row, values in enumerate(rows):
            name = f"{file_name}:{number}"
            yield _row_record(name, f"{path}:{number}", Cell(path, group, row, picture_column, name), values, columns)
            number += 1


def _dataset_records(path: Path, columns: Columns) -> Iterator[Record]:
    """One record per row of a saved data set; a chunk of rows that cannot be read is one problem."""
    import pyarrow

    try:
        table = _load_dataset(path)
    except XFusionError:
        raise
    except Exception as error:  # of Arrow, the system, or an invalid JSON file
        yield broken_record(path, path.name, f"cannot be read as a saved data set: {_error_line(error)}", 0)
        return
    picture_column, text_columns = _columns(path, table.data.schema, columns)
    texts = table.select_columns(text_columns)
    for start in range(0, len(texts), ROWS_TOGETHER):
        end = min(start + ROWS_TOGETHER, len(texts))
        try:
            rows = _rows(texts.with_format("arrow")[start:end])
        except (pyarrow.ArrowException, OSError) as error:
            yield broken_record(
                path,
                f"{path.name}#row {start}",
                f"rows {start} to {end} cannot be read: {_error_line(error)}",
                end - start,
            )
            continue
        for number, values in enumerate(rows, start=start):
            name = f"{path.name}:{number}"
            yield _row_record(name, f"{path}:{number}", Row(path, number, picture_column, name), values, columns)


def _rows(table: Any) -> list[dict[str, Any] | UnicodeDecodeError]:
    """The rows of a table of texts. Strings in Parquet need not be valid UTF-8; the error then replaces the row."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        rows: list[dict[str, Any] | UnicodeDecodeError] = []
    for number in range(len(table)):
        try:
            rows += table.slice(number, 1).to_pylist()
        except UnicodeDecodeError as error:
            rows.append(error)
    return rows


def _row_record(
    name: str, origin: str, place: Cell | Row, values: dict[str, Any] | UnicodeDecodeError, columns: Columns
) -> Record:
    record = Record(id=name, origin=origin, place=place)
    if isinstance(values, UnicodeDecodeError):
        byte = values.object[values.start]
        record.add_problem("invalid UTF-8", f"not UTF-8: byte 0x{byte:02x} of its words; write them as UTF-8")
        return record
    take_captions({key: value for key, value in values.items() if value is not None}, record, columns)
    return record


def _holds_bytes(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _columns(path: Path | str, schema: Any, columns: Columns) -> tuple[str, list[str]]:
    """The column of pictures, and the columns of text."""
    picture_columns = [field.name for field in schema if _holds_bytes(field.type)]
    there = f"its columns {', '.join(schema.names)}"
    if columns.image or "image" in picture_columns:
        picture_columns = [name for name in picture_columns if name == (columns.image or "image")]
    if columns.image and not picture_columns:
        raise XFusionError(f"{path}: of {there} none is called {columns.image} and holds pictures")
    if len(picture_columns) != 1:
        raise XFusionError(
            f"{path}: {len(picture_columns)} of {there} hold pictures: say which by :image=COLUMN behind the data"
        )
    for name in columns.captions:
        if name not in schema.names:
            raise XFusionError(f"{path}: of {there} none is called {name}")
    caption_columns = [name for name in columns.captions or (*CAPTION_FIELDS, "conversations") if name in schema.names]
    if not caption_columns:
        raise XFusionError(
            f"{path}: none of {there} is called {', '.join(CAPTION_FIELDS)}: say which holds words by :caption=COLUMN"
            " behind the data"
        )
    return picture_columns[0], [*caption_columns, *(name for name in (QUESTION, "group") if name in schema.names)]


def _picture_bytes(value: Any) -> bytes:
    content = value["bytes"] if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise TypeError("no bytes")
    return content


def _read_row_group(path: Path | str, group: int, column: str) -> Any:
    with _open_parquet(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)


# As many as the threads that check pictures in order may use at once.
_row_group = ResultCache(_read_row_group, 4)


def make_room(row_groups: int) -> None:
    """Cache at least this many row groups from now on: those that are read concurrently."""
    _row_group.max_results = max(_row_group.max_results, row_groups)


@lru_cache(maxsize=8)
def _load_dataset(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise XFusionError(f"{path}: a saved data set needs datasets: pip install 'xfusion[train]'") from error
    return datasets.load_from_disk(str(path)).with_format(None)


@lru_cache(maxsize=8)
def _load_column(path: Path, column: str) -> Any:
    """Only this column, with its pictures as bytes."""
    import datasets

    table = _load_dataset(path).select_columns([column])
    is_image = isinstance(table.features[column], datasets.Image)
    return table.cast_column(column, datasets.Image(decode=False)) if is_image else table


def _error_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# -------------------------------------------------------------------------------------------------------------- index


def _sizes_and_dates(path: Path) -> Iterator[int]:
    """Sizes and dates of the shard's files."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        stat = file.stat()
        yield from (stat.st_size, stat.st_mtime_ns)


def _write_index(index: Path, records: Sequence[Record], unread_names: Sequence[str]) -> None:
    """Write the number of records with the names of what was not read, then one record per line."""
    with atomic_file(index) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"records": len(records), "unread": unread_names}) + "\n")
        for record in records:
            file.write(json.dumps(_to_json(record)) + "\n")


def _read_index(index: Path, path: Path | str) -> tuple[list[Record], list[str]]:
    """Read what `_write_index` wrote. Raises some error if it is incomplete, for example after a power cut."""
    with index.open(encoding="utf-8") as file:
        header = json.loads(file.readline())
        records = [_from_json(json.loads(line), path) for line in file]
    if len(records) != header["records"]:
        raise ValueError(f"{len(records)} of {header['records']} records")
    return records, header["unread"]


def _to_json(record: Record) -> dict[str, Any]:
    line = asdict(record)
    if record.place is not None:
        line["place"] = [KINDS.index(type(record.place)), {k: v for k, v in line["place"].items() if k != "path"}]
    return line


def _from_json(line: dict[str, Any], path: Path | str) -> Record:
    place = line.pop("place")
    problems = [Problem(**problem) for problem in line.pop("problems")]
    return Record(**line, place=place and KINDS[place[0]](path=path, **place[1]), problems=problems)


def blocks(places: Sequence[pictures.Place]) -> tuple[range, ...] | None:
    """Ranges of examples that are read together, if pictures come in row groups; None if each is stored on its own."""
    starts = [0]
    for index in range(1, len(places)):
        previous, current = places[index - 1], places[index]
        if not (
            isinstance(previous, Cell)
            and isinstance(current, Cell)
            and (previous.path, previous.group) == (current.path, current.group)
        ):
            starts.append(index)
    if len(starts) == len(places):
        return None
    return tuple(range(a, b) for a, b in zip(starts, [*starts[1:], len(places)], strict=True))
