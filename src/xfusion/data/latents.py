"""Pictures that a codec encoded ahead: a folder of latents, which trains as the pictures would, to the bit.

The folder holds ``latents-00000.safetensors`` and so on (float32 ``[n, channels, rows, columns]``), ``examples.jsonl`` and
``index.json``, which names the codec by the hash of its weights, the side in pixels, and each file with its hash, and has one
over itself. The index is written last: a folder without one is not finished, and the same command goes on with it. Latents
are kept, not tokens, so that the patch is the model's own choice.
"""

from __future__ import annotations

import copy
import hashlib
import json
import signal
import traceback
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xfusion.data.kept import Kept
from xfusion.data.report import Problem, Report
from xfusion.data.sequence import Example, Unreadable, XFusionError, fingerprint, first_line
from xfusion.modalities.base import Codec, Modality
from xfusion.modalities.image import ImageModality
from xfusion.storage import SEAL, file_hash, named_in_errors, read_json, sealed, whole_file

if TYPE_CHECKING:
    from PIL.Image import Image

    from xfusion.data.sources import Source

FORMAT_VERSION = 1
INDEX, EXAMPLES = "index.json", "examples.jsonl"
PER_SHARD = 1024
"""Pictures in a shard: what a run that is cut off does again at most."""
AGAIN = f"take an intact copy, or delete {INDEX} and give the same xfusion data encode again"


@runtime_checkable
class Encoded(Protocol):
    """A source that may give tokens without a picture."""

    def tokens(self, index: int, image: Modality, size: int) -> Tensor:
        """Tokens ``[M, P]`` of an example."""
        ...


def tokens(source: Source, index: int, image: Modality, size: int) -> Tensor:
    """Tokens ``[M, P]`` of an example of any source, on the CPU; each picture is encoded for itself."""
    if isinstance(source, Encoded):
        return source.tokens(index, image, size)
    return image.encode([source.picture(index, size)], size)[0].cpu()


def is_folder(path: Path) -> bool:
    """Whether a folder holds latents, finished or not."""
    return (path / INDEX).is_file() or any(path.glob("latents-*.safetensors"))


def identity(codec: Codec) -> dict[str, Any]:
    """What latents depend on: the codec's class and weights."""
    return {
        "class": type(codec).__qualname__,
        "fingerprint": fingerprint(dict(codec.state_dict())),
        "channels": codec.channels,
        "factor": codec.factor,
    }


class Latents:
    """A folder of latents as a `Source`; it has no pictures.

    Args:
        folder: what `encode` wrote.
        spec: as the user wrote it.

    Raises:
        XFusionError: it is not finished, of another format, lacks a shard, or its index or examples are not what was written.
    """

    def __init__(self, folder: Path, spec: str | None = None) -> None:
        if not (folder / INDEX).is_file():
            raise XFusionError(
                f"{folder}: the latents are not finished (no {INDEX}): give the same xfusion data encode again, it goes on"
            )
        self.folder, self.spec = folder, spec or str(folder)
        index = _index(folder)
        self.codec, self.size, self.licence = index["codec"], index["size"], index["licence"]
        self.shards = index["shards"]
        self._starts = tuple(accumulate((shard["count"] for shard in self.shards), initial=0))
        for shard in self.shards:
            path = folder / shard["file"]
            found = path.stat().st_size if path.is_file() else None
            if found != shard["bytes"]:
                raise XFusionError(
                    f"{path}: has {'gone' if found is None else f'{found} bytes'}, {INDEX} says {shard['bytes']} bytes:"
                    f" {AGAIN}"
                )
        self.examples: Sequence[Example] = _examples(folder / EXAMPLES, index.get("examples"))
        if len(self.examples) != self._starts[-1]:
            raise XFusionError(
                f"{folder / EXAMPLES}: has {len(self.examples)} examples, the shards hold {self._starts[-1]}: {AGAIN}"
            )
        self.indices: Sequence[int] = range(len(self.examples))
        """Places of the examples in the folder, of which a split takes some."""
        self.report: Report | None = None
        """What the check of its words found; its problems are the examples that were left out."""
        self._agrees: tuple[Modality, int] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def some(self, kept: Sequence[int]) -> Self:
        """These examples alone."""
        found = copy.copy(self)
        found.examples = tuple(self.examples[i] for i in kept)
        found.indices = tuple(self.indices[i] for i in kept)
        return found

    def picture(self, index: int, size: int) -> Image:
        """Refused: there are no pictures."""
        raise XFusionError(f"{self.spec}: holds latents, not pictures: name the pictures that they were encoded from")

    def tokens(self, index: int, image: Modality, size: int) -> Tensor:
        """Tokens ``[M, P]`` of an example.

        Raises:
            XFusionError: the model's codec or size is not the one that made the latents.
            Unreadable: its shard is not what was written.
        """
        if not isinstance(image, ImageModality):
            raise XFusionError(f"{self.spec}: holds latents of pictures, but the model hears sounds: name sounds")
        if self._agrees != (image, size):
            self._check(image, size)
            self._agrees = (image, size)
        place = self.indices[index]
        number = bisect_right(self._starts, place) - 1
        place -= self._starts[number]
        stored = self._shard(number).get_slice("latents")[place : place + 1]
        return image.tokens(stored)[0]

    def _shard(self, number: int) -> Any:
        """A shard, opened; its hash is compared when this process reads it for the first time."""
        path, expected = self.folder / self.shards[number]["file"], self.shards[number]["sha256"]
        try:
            stat = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from error
        stamp = (path, stat.st_size, stat.st_mtime_ns)
        if (found := _hash(*stamp)) != expected:
            raise Unreadable(f"{path}: {_altered(found, expected)}")
        return _opened(*stamp)

    def _check(self, image: ImageModality, size: int) -> None:
        if size != self.size:
            raise XFusionError(
                f"{self.spec}: holds latents of {self.size} px, the model reads {size} px: set --model.image.sizes"
                f" {self.size}, or encode the pictures at {size} px"
            )
        if (given := identity(image.codec)) != self.codec:
            raise XFusionError(
                f"{self.spec}: was encoded by {_name(self.codec)}, the model's codec is {_name(given)}: set"
                " --model.image.codec, or encode the pictures by the model's"
            )

    def problems(self) -> list[Problem]:
        """Shards whose bytes are not those that were written; reads all of them."""
        out = []
        for shard in self.shards:
            path = self.folder / shard["file"]
            if (found := file_hash(path)) != shard["sha256"]:
                out.append(Problem(kind="broken shard", where=str(path), what=_altered(found, shard["sha256"])))
        return out


def _index(folder: Path) -> dict[str, Any]:
    """What an index says, as far as it is what was written."""
    path = folder / INDEX
    try:
        index = read_json(path)
    except XFusionError as error:
        raise XFusionError(f"{str(error).removesuffix('; take an intact copy')}: {AGAIN}") from error
    if index.get("format_version") != FORMAT_VERSION:
        found = index.get("format_version")
        raise XFusionError(f"{folder}: its format is {found}, this version reads {FORMAT_VERSION}: encode it again")
    needed = {"codec", "size", "licence", "shards"}
    if "examples" in index:  # folders from before there were hashes of all files have neither
        needed.add(SEAL)
    missing = sorted(needed - index.keys())
    for shard in index.get("shards", []):
        missing += sorted({"file", "count", "bytes", "sha256"} - set(shard))
    if missing:
        raise XFusionError(f"{path} was altered: it has no field {missing[0]}: {AGAIN}")
    return index


def _examples(path: Path, expected: dict[str, Any] | None) -> tuple[Example, ...]:
    """All examples of a folder, in the order of their latents; ``expected`` is what the index says of their file."""
    out: list[Example] = []
    try:
        if expected is not None and (found := file_hash(path)) != expected["sha256"]:
            raise XFusionError(
                f"{path} was altered: its hash is {found[:16]}, {INDEX} says {expected['sha256'][:16]}: {AGAIN}"
            )
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                out.append(_example(line, f"{path}:{number}"))
    except OSError as error:
        raise XFusionError(f"{path} cannot be read: {error.strerror or error}: {AGAIN}") from error
    return tuple(out)


def _example(line: bytes, where: str) -> Example:
    try:
        row = json.loads(line)
        return Example(
            id=row["id"],
            captions=tuple(row["captions"]),
            group=row["group"],
            origin=row["origin"],
            question=row.get("question", ""),  # folders from before there were questions, or hashes of pictures
            content=row.get("content", ""),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise XFusionError(f"{where}: is no example ({first_line(error)}): {AGAIN}") from error


def _altered(found: str, expected: str) -> str:
    return f"its hash is {found[:16]}, {INDEX} says {expected[:16]}: delete both, and encode again"


def _open(path: Path, *stamp: int) -> Any:
    del stamp
    try:
        return safe_open(str(path), "pt")
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _file_hash(path: Path, *stamp: int) -> str:
    del stamp
    try:
        return file_hash(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> Unreadable:
    return Unreadable(f"{path}: cannot be read ({error}): delete it and {INDEX}, and encode again")


# Of a file of one size and date.
_opened = Kept(_open, 256)
_hash = Kept(_file_hash, 1_000_000)


def _name(codec: dict[str, Any]) -> str:
    return f"{codec['class']} {codec['fingerprint'][:16]}"


# ------------------------------------------------------------------------------------------------------------- encode


def encode(
    source: Source,
    codec: Codec.Config,
    size: int,
    out: Path,
    *,
    batch: int = 1,
    workers: int = 1,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Latents:
    """Encode all pictures of a source; what is there from an earlier run of the same is kept.

    Args:
        source: pictures with captions.
        codec: what encodes them.
        size: side in pixels.
        out: folder to write.
        batch: pictures per call of the codec. One at a time is what training does, so that its losses are the same to
            the bit; more are faster on a GPU and agree to rounding.
        workers: processes that share the shards; each loads the codec and divides the threads.
        device: where the codec runs.
        progress: told pictures done and pictures in all.

    Raises:
        XFusionError: the folder holds something else, or latents of another source, codec or size.
    """
    built = codec.build()
    built.latent_shape(size, size)
    who = identity(built)
    _remove_rests(out)
    if out.is_dir() and not is_folder(out) and any(out.iterdir()):
        raise XFusionError(f"{out}: holds other files: name a new folder")
    with named_in_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(source.examples), PER_SHARD)
    tasks = [_Task(out, start, min(PER_SHARD, len(source.examples) - start)) for start in starts]
    for task in tasks:
        task.key = _key(who, size, batch, source.examples[task.start : task.start + task.count])
    _refuse_others(out, tasks, who, size)
    left = [task for task in tasks if not task.path.is_file()]
    before = _known_hashes(out)
    done = len(source.examples) - sum(task.count for task in left)
    told = progress or (lambda done, total: None)
    told(done, len(source.examples))
    if left:
        for number in _walk(left, source, codec, built, size, batch, workers, device):
            done += number
            told(done, len(source.examples))
    # A folder's name, which stands in what messages call an example, need not be text.
    with whole_file(out / EXAMPLES) as temporary, temporary.open("w", encoding="utf-8", errors="surrogatepass") as file:
        for example in source.examples:
            file.write(json.dumps(asdict(example), ensure_ascii=False) + "\n")
    shards = [
        {"file": t.path.name, "count": t.count, "bytes": t.path.stat().st_size, "sha256": file_hash(t.path)}
        for t in tasks
    ]
    for task, shard in zip(tasks, shards, strict=True):
        said = before.get(task.path.name)
        if task not in left and said is not None and said != shard["sha256"]:
            raise XFusionError(f"{task.path}: {_altered(shard['sha256'], said)}")
    index = {
        "format_version": FORMAT_VERSION,
        "spec": source.spec,
        "licence": source.licence,
        "size": size,
        "batch": batch,
        "codec": who,
        "codec_licence": built.licence,
        "shards": shards,
        "examples": {"file": EXAMPLES, "sha256": file_hash(out / EXAMPLES)},
    }
    with whole_file(out / INDEX) as temporary:
        temporary.write_text(json.dumps(sealed(index), indent=2) + "\n", encoding="utf-8")
    return Latents(out)


def _known_hashes(out: Path) -> dict[str, str]:
    """Hash of each shard, as far as an index of an earlier call says it."""
    try:
        return {shard["file"]: shard["sha256"] for shard in _index(out)["shards"]}
    except XFusionError:
        return {}


def _remove_rests(out: Path) -> None:
    """Remove what a killed run had half written: files that never got their name."""
    for name in ("latents-*", Path(EXAMPLES).stem, Path(INDEX).stem):
        for rest in out.glob(f".{name}.*.tmp.*"):
            rest.unlink(missing_ok=True)


class _Task:
    """A shard to make."""

    def __init__(self, out: Path, start: int, count: int) -> None:
        self.start, self.count, self.key = start, count, ""
        self.path = out / f"latents-{start // PER_SHARD:05d}.safetensors"


def _key(codec: dict[str, Any], size: int, batch: int, examples: Sequence[Example]) -> str:
    """What a shard was made of. A picture's group is the hash of its file, where nobody gave it another."""
    pictures = [[e.id, e.group] if e.content in ("", e.group) else [e.id, e.group, e.content] for e in examples]
    facts = [codec, size, batch, pictures]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _refuse_others(out: Path, tasks: Sequence[_Task], codec: dict[str, Any], size: int) -> None:
    for task in tasks:
        if task.path.is_file():
            metadata = _metadata(task.path)
            if metadata.get("key") != task.key:
                made = f"{metadata.get('codec', 'another codec')} at {metadata.get('size', '?')} px"
                raise XFusionError(
                    f"{task.path}: was made by {made}, or of other pictures or by another batch; asked for is"
                    f" {_name(codec)} at {size} px: name a new folder"
                )
    if more := {p.name for p in out.glob("latents-*.safetensors")} - {task.path.name for task in tasks}:
        raise XFusionError(f"{out}: holds {min(more)}, which this source does not fill: name a new folder")


def _metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(str(path), "pt") as file:
            # One entry: of several, safetensors writes them in no fixed order, and a shard's hash would change.
            return json.loads((file.metadata() or {}).get("made_of", "{}"))
    except (SafetensorError, OSError) as error:
        raise XFusionError(f"{path}: cannot be read ({error}): delete it and give the same command again") from error


def _walk(
    left: Sequence[_Task],
    source: Source,
    config: Codec.Config,
    built: Codec,
    size: int,
    batch: int,
    workers: int,
    device: str,
) -> Iterator[int]:
    """Make the shards, here or in processes; yields how many pictures each held."""
    if workers == 1:
        _Worker.set_up(source, built.to(device), size, batch, torch.get_num_threads())
        for task in left:
            yield _Worker.shard(task)
        return
    threads = max(1, torch.get_num_threads() // workers)
    waiting, pool = list(reversed(left)), [_Hand() for _ in range(min(workers, len(left)))]
    try:
        for hand in pool:
            hand.start()
        for hand in pool:  # behind all starts: a hand takes this only when it has imported what it needs
            hand.send((source, config, size, batch, device, threads), waiting[-1])
            hand.send(waiting.pop())
        while busy := [hand for hand in pool if hand.task is not None]:
            ready = wait([hand.pipe for hand in busy])
            for hand in busy:
                if hand.pipe in ready:
                    yield hand.answer()
                    hand.send(waiting.pop() if waiting else None)
    finally:
        for hand in pool:
            hand.stop()
        _remove_rests(left[0].path.parent)


class _Hand:
    """A process that makes shards, one at a time.

    A pipe each and not an executor of `concurrent.futures`: that one waits for ever where a process dies before it has taken
    a source that is larger than a pipe's buffer, and its processes do where theirs is killed.
    """

    def __init__(self) -> None:
        context = get_context("spawn")
        self.pipe, self._theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(self._theirs,), daemon=True)
        self.task: _Task | None = None

    def start(self) -> None:
        self.process.start()
        self._theirs.close()  # the end that stays open is the process's alone: where it dies, the pipe does

    def send(self, what: Any, task: _Task | None = None) -> None:
        self.task = task or (what if isinstance(what, _Task) else None)
        try:
            self.pipe.send(what)
        except OSError as error:
            if self.task is not None:  # else nothing is missing
                raise self._died() from error

    def answer(self) -> int:
        """How many pictures the shard held."""
        try:
            found = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(found, BaseException):
            raise found
        return found

    def _died(self) -> XFusionError:
        self.process.join(10)
        code = self.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        return XFusionError(
            f"{self.task and self.task.path}: not finished, the process that made it {how}: give the same command again, it"
            " goes on (with fewer --workers where memory was short)"
        )

    def stop(self) -> None:
        if self.process.pid is not None:
            self.process.terminate()
            self.process.join()
        self.pipe.close()


def _work(pipe: Connection) -> None:
    """What a process does: take what it encodes with, then shards, until there is none or nobody who would give one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who started it, and ends this one
    try:
        source, config, size, batch, device, threads = pipe.recv()
        task = pipe.recv()
        try:
            _Worker.set_up(source, config.build().to(device), size, batch, threads)
            while task is not None:
                pipe.send(_Worker.shard(task))
                task = pipe.recv()
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            expected = isinstance(error, (XFusionError, OSError))
            pipe.send(error if expected else RuntimeError(traceback.format_exc()))
    except (EOFError, ConnectionError):
        pass


class _Worker:
    """What a process encodes with."""

    source: Source
    codec: Codec
    size: int
    batch: int
    device: torch.device | None

    @classmethod
    def set_up(cls, source: Source, codec: Codec, size: int, batch: int, threads: int) -> None:
        torch.set_num_threads(threads)
        cls.source, cls.codec, cls.size, cls.batch = source, codec, size, batch
        weight = next(codec.parameters(), None)
        cls.device = None if weight is None else weight.device

    @classmethod
    def shard(cls, task: _Task) -> int:
        made = []
        for start in range(task.start, task.start + task.count, cls.batch):
            chosen = range(start, min(start + cls.batch, task.start + task.count))
            pictures = ImageModality.from_pil([cls.source.picture(i, cls.size) for i in chosen], cls.size)
            made.append(cls.codec.encode(pictures.to(cls.device)).cpu())
        made_of = {"key": task.key, "codec": _name(identity(cls.codec)), "size": cls.size}
        with whole_file(task.path) as temporary:
            save_file({"latents": torch.cat(made).contiguous()}, str(temporary), {"made_of": json.dumps(made_of)})
        return task.count
