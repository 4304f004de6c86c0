"""Where examples come from: the built-in emoji, a folder of pictures or sounds, a file of JSON lines, shards, encoded latents.

A *spec* names a source: ``emoji``, ``emoji:128``, a folder, a ``.jsonl`` file, shards (`xfusion.data.shards`), a folder of
latents (`xfusion.data.latents`), ``hf:ORG/NAME`` (`xfusion.data.hub`). Write a folder named ``emoji`` as ``./emoji``, or pass
a `pathlib.Path`. Several specs are joined by ``+``, each with its weight: with ``photos:weight=2+emoji:weight=1``, two of
three samples come from photos.

All user data is used for training unless the spec ends in a held-out share, as in ``photos:held=0.1``. Groups are then held
out by the hash of their name, so adding pictures later moves none to the other split. A group is given by the file's field
``group``; otherwise it is all copies of the same picture file.

``data.parquet:caption=prompt:image=photo`` names the columns of words and pictures, where they are not called as usual; the
same goes for fields of JSON lines and for suffixes of a tar's members.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar, cast

from xfusion.data import files, latents, pictures, shards
from xfusion.data.emoji import Emoji
from xfusion.data.files import Columns
from xfusion.data.latents import Latents
from xfusion.data.mixed import Mixed, parts, split_options
from xfusion.data.pictures import Place
from xfusion.data.report import CaptionStats, Problem, Report, look_alikes
from xfusion.data.sequence import Example, Sound, Unreadable, XFusionError
from xfusion.data.sounds import read_sound
from xfusion.modalities.image import middle_square
from xfusion.storage import file_hash

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from xfusion.modalities.base import Modality

T = TypeVar("T")
SPLITS = ("train", "held", "all")
logger = logging.getLogger(__name__)


class Source(Protocol):
    """Pictures with captions."""

    spec: str
    """As the user wrote it."""
    licence: str
    """Licence of the pictures."""
    examples: Sequence[Example]
    """Its examples, without pixels."""

    def __len__(self) -> int: ...

    def picture(self, index: int, size: int) -> Image:
        """Example ``index`` as RGB, exactly ``size`` x ``size``, upright, on white, center-cropped to a square."""
        ...


UNSTATED = "as the owner of the files says"
"""Licence of pictures that state none."""


def stated_licence(source_licence: str, owner_licence: str | None, spec: str) -> str:
    """The licence of a source's pictures: the source's own, or the one stated by the user if the source has none.

    Args:
        source_licence: licence of the source; of several sources, all of them.
        owner_licence: licence stated by the owner of the pictures, or None.
        spec: the source, for messages.

    Raises:
        XFusionError: the source has another licence, or ``owner_licence`` is not a line of text.
    """
    if owner_licence is None:
        return source_licence
    stated = owner_licence.strip()
    if not stated or not stated.isprintable():
        raise XFusionError(f"the data's licence {owner_licence!r} is no line of words: name it, such as CC-BY-4.0")
    if UNSTATED not in source_licence and stated != source_licence:
        raise XFusionError(f"{spec} is under {source_licence}, not under {stated}: leave the data's licence out")
    return source_licence.replace(UNSTATED, stated)


class Files:
    """A user's folder, JSON lines or shards as a `Source`; every picture was decoded once on opening."""

    licence = UNSTATED

    def __init__(
        self, spec: str, examples: Sequence[Example], places: Sequence[Place], report: Report | None = None
    ) -> None:
        self.spec = spec
        self.examples: Sequence[Example] = tuple(examples)
        self.places = tuple(places)
        self.blocks = shards.blocks(self.places)
        """Ranges of examples that are read and shuffled together (`xfusion.data.order`), if there are any."""
        self.report = report
        """Result of the check on opening; its problems are the examples that were left out."""

    def __len__(self) -> int:
        return len(self.examples)

    def subset(self, indices: Sequence[int]) -> Self:
        """A source of only these examples."""
        return type(self)(
            self.spec, [self.examples[i] for i in indices], [self.places[i] for i in indices], self.report
        )

    def picture(self, index: int, size: int) -> Image:
        """As `Source.picture`. Raises `XFusionError` if the file has changed or disappeared since opening."""
        return middle_square(pictures.read(self.places[index], self.examples[index].origin), size)


class Sounds(Files):
    """A user's folder or JSON lines of sounds; every sound was decoded once on opening."""

    def picture(self, index: int, size: int) -> Image:
        """Always raises: there are no pictures."""
        raise XFusionError(f"{self.spec}: holds sounds, not pictures: name pictures, or take a recipe of sounds")

    def sound(self, index: int) -> Sound:
        """Example ``index``. Raises `XFusionError` if the file has changed or disappeared since opening."""
        return read_sound(cast("Path", self.places[index]), self.examples[index].origin)

    def tokens(self, index: int, image: Modality, size: int) -> Tensor:
        """Tokens ``[M, P]`` of an example, as `xfusion.data.latents.tokens`.

        Raises:
            Unreadable: its file has changed or disappeared, or is longer than the model accepts.
            XFusionError: the model does not accept sounds.
        """
        sound = self.sound(index)
        try:
            return image.encode([sound], size)[0].cpu()
        except XFusionError as error:
            # A sound that is too long may be left out; a model that accepts no sounds fails for all of them.
            kind = Unreadable if isinstance(error, Unreadable) else XFusionError
            raise kind(f"{self.examples[index].origin}: {error}") from error


def open_source(
    spec: str | os.PathLike[str],
    *,
    split: str = "train",
    allow_bad: float = 0.0,
    special_tokens: tuple[str, ...] = (),
    decode: bool = True,
    unreadable: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> Source:
    """Open a data source and check every example.

    Args:
        spec: see the top of this file.
        split: ``"train"``, ``"held"`` or ``"all"``.
        allow_bad: share of bad examples, from 0 to below 1, that may be left out. More is an error.
        special_tokens: texts that captions must not contain, since the tokenizer would read them as special tokens.
        decode: decode every picture in full. If off, only headers are read, and damage is found when a picture is used.
        unreadable: ids of examples that a run found broken and left out, with their former ``group`` and ``content``. They
            keep their place among the examples; otherwise a resumed run would read others than before.

    Raises:
        XFusionError: the spec or split is unknown, there are too many bad examples, or the split is empty.
    """
    if split not in SPLITS:
        raise XFusionError(f"unknown split {split!r}: use {', '.join(map(repr, SPLITS))}")
    if not 0 <= allow_bad < 1:
        raise XFusionError(f"allow_bad is {allow_bad}: it is a share from 0 to below 1, such as 0.05")
    if weighted_specs := parts(os.fspath(spec)):
        sources = [
            open_source(
                source_spec,
                split=split,
                allow_bad=allow_bad,
                special_tokens=special_tokens,
                decode=decode,
                unreadable={
                    example_id.removeprefix(f"{number}/"): facts
                    for example_id, facts in unreadable.items()
                    if example_id.startswith(f"{number}/")
                },
            )
            for number, (source_spec, _) in enumerate(weighted_specs)
        ]
        return Mixed(str(spec), sources, [weight for _, weight in weighted_specs])
    if (emoji := _open_emoji(spec, split) if isinstance(spec, str) else None) is not None:
        return emoji
    spec = os.fspath(spec)
    path, held_share, columns = _read_spec(spec)
    if split == "held" and not held_share and path.exists():  # all of it is used for training, whatever it contains
        raise XFusionError(_empty_split(spec, split, held_share, 0))
    if latents.is_folder(path):
        report = _inspect_latents(Latents(path, spec), special_tokens)
    else:
        report = _inspect(spec, path, columns, special_tokens, decode, unreadable)
    if report.num_bad and (report.share_bad > allow_bad or report.num_bad == report.num_examples):
        raise XFusionError(_too_many_message(report, allow_bad))
    if report.num_bad:
        logger.warning(
            "%s: left out %d of %d examples: %s", spec, report.num_bad, report.num_examples, _first_problems(report)
        )
    assert isinstance(report.source, (Files, Latents))
    indices = [
        index
        for index, example in enumerate(report.source.examples)
        if split == "all" or _split_of(example.group, held_share) == split
    ]
    if not indices:
        raise XFusionError(_empty_split(spec, split, held_share, report.num_groups))
    source = report.source.subset(indices)
    source.report = report
    return source


def check(spec: str | os.PathLike[str], *, special_tokens: tuple[str, ...] = ()) -> Report:
    """Check every example of a source, of all its splits, and report problems instead of raising; and note which of a user's
    pictures look the same but are of different groups.

    Raises:
        XFusionError: there is no such source, or it is empty.
    """
    if weighted_specs := parts(os.fspath(spec)):
        raise XFusionError(
            f"{spec}: check its sources one by one: {', '.join(source_spec for source_spec, _ in weighted_specs)}"
        )
    emoji = _open_emoji(spec, "all" if spec == "emoji" else "train") if isinstance(spec, str) else None
    if emoji is None:
        spec = os.fspath(spec)
        path, _, columns = _read_spec(spec)
        if latents.is_folder(path):
            encoded = Latents(path, spec)
            return _inspect_latents(encoded, special_tokens, encoded.altered_shards())
        report = _inspect(spec, path, columns, special_tokens, decode=True)
        if report.source is None or isinstance(report.source, Sounds):
            return report
        return replace(report, notes=(*report.notes, *look_alikes(report.source)))
    problems: list[Problem] = []
    for index, example in enumerate(emoji.examples):
        try:
            emoji.picture(index, 32)
        except ValueError as error:
            problems.append(Problem(kind="broken picture", where=example.origin, what=str(error)))
    return _make_report(emoji, len(emoji.examples), len(problems), problems, [])


def _open_emoji(spec: str, split: str) -> Emoji | None:
    """The built-in set where the spec names it."""
    name, colon, number = spec.partition(":")
    if name != "emoji":
        return None
    if colon and not re.fullmatch(r"[0-9]{1,6}", number):
        raise XFusionError(f"{spec}: expected a number of concepts, such as emoji:128; a folder would be ./{spec}")
    return Emoji(split=split, num_concepts=int(number) if colon else None)


def _read_spec(spec: str) -> tuple[Path, float, Columns]:
    """Path, held-out share and columns of ``photos.jsonl:held=0.1:caption=prompt``."""
    bare_spec, options = split_options(spec)
    path, held = Path(bare_spec), options.get("held", "0")
    if "weight" in options:
        raise XFusionError(f"{spec}: a weight is for one of several sources: write photos:weight=2+emoji:weight=1")
    if "held" in options and (not re.fullmatch(r"0?\.[0-9]+", held) or not 0 < float(held) < 1):
        raise XFusionError(f"{spec}: the held-out share is {held!r}: write one between 0 and 1, such as held=0.1")
    columns = Columns(tuple(options["caption"].split(",")) if "caption" in options else (), options.get("image"))
    if "" in (*columns.captions, columns.image):
        raise XFusionError(f"{spec}: names no column: write caption=COLUMN or image=COLUMN")
    if latents.is_folder(path):
        files.refuse_columns(path, columns)
    return path, float(held), columns


def _split_of(group: str, held_share: float) -> str:
    digest = hashlib.sha256(f"xfusion split: {group}".encode()).digest()
    return "held" if int.from_bytes(digest[:8], "big") < held_share * 2**64 else "train"


def _inspect(
    spec: str,
    path: Path,
    columns: Columns,
    special_tokens: tuple[str, ...],
    decode: bool,
    unreadable: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> Report:
    """Read all records and open every picture once."""
    kind = files.PICTURES
    if shard_paths := shards.find(path):
        records, notes = shards.read_all(shard_paths, columns, decode=decode)
        notes += shards.unread(path, shard_paths)
        if not records:
            raise XFusionError("; ".join([f"{spec}: {len(shard_paths)} shards without an example", *notes]))
        files.check(records, special_tokens)
    else:
        kind = files.kind_of(path, columns)
        records, notes = files.read(path, special_tokens, kind, columns)
    paths = list(dict.fromkeys(record.place for record in records if isinstance(record.place, Path)))
    problems_of = dict(zip(paths, map(kind.header_problem, paths), strict=True))
    intact_paths = [path for path in paths if problems_of[path] is None]
    if decode:
        problems_of.update(_in_threads(kind.decode_problem, intact_paths))
    contents = dict(_in_threads(_content_hash, [path for path in intact_paths if problems_of[path] is None]))
    examples, places = [], []
    for record in records:
        place = record.place
        if isinstance(place, Path) and (picture_problem := problems_of[place]) is not None:
            state = "missing" if picture_problem.startswith("no such") else "broken"
            record.add_problem(
                f"{state} {kind.noun}",
                picture_problem if record.origin == str(place) else f"{place.name[:100]} {picture_problem}",
            )
        if record.id in unreadable and place is not None and record.captions:
            earlier = unreadable[record.id]
            record.problems.clear()
            # Its file is broken now: the state has its former content, unless it is older than that field.
            record.group, record.content = earlier["group"], earlier.get("content") or earlier["group"]
        if place is not None and not record.problems:
            content = record.content or contents[cast("Path", place)]
            examples.append(
                Example(
                    id=record.id,
                    captions=tuple(record.captions),
                    group=record.group or content,
                    origin=record.origin,
                    question=record.question,
                    content=content,
                )
            )
            places.append(place)
    problems = [problem for record in records for problem in record.problems]
    number = sum(record.stands_for for record in records)
    num_bad = sum(record.stands_for for record in records if record.problems)
    source_class = Sounds if kind is files.SOUNDS else Files
    return _make_report(source_class(spec, examples, places), number, num_bad, problems, notes)


def _inspect_latents(
    encoded: Latents, special_tokens: tuple[str, ...], altered: Mapping[range, Problem] = MappingProxyType({})
) -> Report:
    """Check the texts of encoded pictures, which may have been checked for another base; ``altered`` are positions of altered
    shards.
    """
    if not encoded.examples:
        raise XFusionError(f"{encoded.spec}: no examples found: encode a source that has some")
    records = [
        files.Record(
            id=example.id, origin=example.origin, place=None, captions=list(example.captions), question=example.question
        )
        for example in encoded.examples
    ]
    for record in records:
        files.check_special_tokens(record, special_tokens)
    lost = {position for positions in altered for position in positions}
    indices = [
        index
        for index, (record, position) in enumerate(zip(records, encoded.indices, strict=True))
        if not record.problems and position not in lost
    ]
    problems = [*altered.values(), *(problem for record in records for problem in record.problems)]
    notes = [f"left out when it was encoded: {reason}" for reason in encoded.left_out.values()]
    return _make_report(encoded.subset(indices), len(records), len(records) - len(indices), problems, notes)


def _make_report(
    source: Files | Emoji | Latents, number: int, num_bad: int, problems: Sequence[Problem], notes: Sequence[str]
) -> Report:
    return Report(
        spec=source.spec,
        licence=source.licence,
        num_examples=number,
        num_bad=num_bad,
        num_groups=len({example.group for example in source.examples}),
        problems=tuple(map(str, problems)),
        counts=dict(Counter(problem.kind for problem in problems).most_common()),
        notes=tuple(notes),
        captions=CaptionStats.of(source.examples),
        source=source if source.examples else None,
    )


def _in_threads(function: Callable[[Path], T], paths: Iterable[Path]) -> list[tuple[Path, T]]:
    """Results in order. Pillow decodes without the GIL; few threads, since each may hold a whole picture."""
    paths = list(paths)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return list(zip(paths, pool.map(function, paths), strict=True))


def _content_hash(path: Path) -> str:
    return file_hash(path)[:16]


def content_fingerprint(source: Source) -> str:
    """SHA-256 over names, groups, texts and content of a source's examples, in order; 64 hexadecimal digits.

    It does not depend on where the files are, so it recognises data whose spec has become another one.
    """
    digest = hashlib.sha256()
    for example in source.examples:
        facts = [example.id, example.group, example.captions, example.question, example.content]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


def too_many(source: Source, unreadable: Mapping[int, str], allow_bad: float) -> str | None:
    """Why a run that found these examples unreadable must stop, in one line; None if they may be left out.

    Args:
        source: the run's data source.
        unreadable: numbers of the examples, and what is wrong with each.
        allow_bad: share of bad examples that may be left out of each source, including those found on opening.
    """
    if isinstance(source, Mixed):
        starts = source.starts
        by_part = [
            {index - start: reason for index, reason in unreadable.items() if start <= index < end}
            for start, end in pairwise(starts)
        ]
        messages = (
            too_many(part, part_unreadable, allow_bad)
            for part, part_unreadable in zip(source.sources, by_part, strict=True)
        )
        return next(filter(None, messages), None)
    report = source.report if isinstance(source, (Files, Latents)) else None
    num_bad = len(unreadable) + (report.num_bad if report else 0)
    total = report.num_examples if report else len(source.examples)
    if not unreadable or (num_bad / total <= allow_bad and len(unreadable) < len(source.examples)):
        return None
    allowed_share = min(-(-num_bad * 100 // total) / 100, 0.99)
    return (
        f"{[*unreadable.values()][-1]}; with it {num_bad} of {total} examples of {source.spec} are bad (allowed:"
        f" {allow_bad:.1%}): mend it, or allow a share of {allowed_share:.2f}"
    )


def _too_many_message(report: Report, allow_bad: float) -> str:
    allowed = f" (allowed: {allow_bad:.1%})" if allow_bad else ""
    message = f"{report.spec}: {report.num_bad} of {report.num_examples} examples are bad{allowed}: {_first_problems(report)}; "
    if report.num_bad == report.num_examples:
        return message + f"none is left, see all: xfusion data check {report.spec}"
    share = -(-report.num_bad * 100 // report.num_examples) / 100
    return f"{message}see all: xfusion data check {report.spec}; to leave them out, allow a share of {min(share, 0.99):.2f}"


def _first_problems(report: Report, count: int = 3) -> str:
    num_more = len(report.problems) - count
    return "; ".join(report.problems[:count]) + (f"; and {num_more} more" if num_more > 0 else "")


def _empty_split(spec: str, split: str, held_share: float, num_groups: int) -> str:
    if not held_share:
        return f"{spec}: all of it trains, nothing is held out; to hold a tenth out write {spec}:held=0.1"
    return (
        f"{spec}: none of {num_groups} pictures falls into the split {split!r}: choose a share other than {held_share}"
    )
