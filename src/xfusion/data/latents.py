"""Pictures encoded in advance by a codec: a folder of latents, whose training is bit-identical to training on the pictures.

The folder contains ``latents-00000.safetensors`` and so on (float32 ``[n, channels, rows, columns]``), ``examples.jsonl`` and
``index.json``. The index stores the hash of the codec's weights, the side in pixels, the hash of each file, and a hash of
itself. It is written last: a folder without it is unfinished, and the same command resumes it. The files store latents rather
than tokens, so the model can choose its patch size. A picture that could not be read has zeros there, and the index names it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import signal
import traceback
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate, pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xfusion.data.report import Problem, Report
from xfusion.data.result_cache import ResultCache
from xfusion.data.sequence import Example, Unreadable, XFusionError, fingerprint, first_line
from xfusion.modalities.base import Codec, Modality
from xfusion.modalities.image import ImageModality
from xfusion.storage import SEAL, atomic_file, file_hash, named_in_errors, read_json, sealed

if TYPE_CHECKING:
    from PIL.Image import Image

    from xfusion.data.sources import Source

FORMAT_VERSION = 2
"""Of a folder that leaves examples out; one that does not has version 1, which older versions of xfusion read too."""
INDEX, EXAMPLES = "index.json", "examples.jsonl"
PER_SHARD = 1024
"""Pictures per shard: at most these are encoded again after an interruption."""
ENCODE_AGAIN = f"take an intact copy, or delete {INDEX} and give the same xfusion data encode again"


@runtime_checkable
class Encoded(Protocol):
    """A source that can return tokens without a picture."""

    def tokens(self, index: int, image: Modality, size: int) -> Tensor:
        """Tokens ``[M, P]`` of an example."""
        ...


def tokens(source: Source, index: int, image: Modality, size: int) -> Tensor:
    """Tokens ``[M, P]`` of an example of any source, on the CPU; each picture is encoded on its own."""
    if isinstance(source, Encoded):
        return source.tokens(index, image, size)
    return image.encode([source.picture(index, size)], size)[0].cpu()


def is_folder(path: Path) -> bool:
    """Whether a folder contains latents, finished or not."""
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
        folder: a folder written by `encode`.
        spec: as the user wrote it.

    Raises:
        XFusionError: the folder is unfinished, has another format, lacks a shard, or its index or examples were altered.
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
            num_bytes = path.stat().st_size if path.is_file() else None
            if num_bytes != shard["bytes"]:
                raise XFusionError(
                    f"{path}: has {'gone' if num_bytes is None else f'{num_bytes} bytes'}, {INDEX} says {shard['bytes']} bytes:"
                    f" {ENCODE_AGAIN}"
                )
        self.examples: Sequence[Example] = _examples(folder / EXAMPLES, index.get("examples"))
        if len(self.examples) != self._starts[-1]:
            raise XFusionError(
                f"{folder / EXAMPLES}: has {len(self.examples)} examples, the shards hold {self._starts[-1]}: {ENCODE_AGAIN}"
            )
        self.left_out: dict[int, str] = {int(number): reason for number, reason in index.get("left_out", {}).items()}
        """Examples whose pictures could not be read when they were encoded, and why."""
        self.indices: Sequence[int] = [i for i in range(len(self.examples)) if i not in self.left_out]
        """Index of each example in the folder; a split uses only some of them."""
        self.examples = tuple(self.examples[i] for i in self.indices)
        self.report: Report | None = None
        """Result of the check of its texts; its problems are the examples that were left out."""
        self._checked_against: tuple[Modality, int] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def subset(self, indices: Sequence[int]) -> Self:
        """A source of only these examples."""
        subset = copy.copy(self)
        subset.examples = tuple(self.examples[i] for i in indices)
        subset.indices = tuple(self.indices[i] for i in indices)
        return subset

    def picture(self, index: int, size: int) -> Image:
        """Always raises: there are no pictures."""
        raise XFusionError(f"{self.spec}: holds latents, not pictures: name the pictures that they were encoded from")

    def tokens(self, index: int, image: Modality, size: int) -> Tensor:
        """Tokens ``[M, P]`` of an example.

        Raises:
            XFusionError: the latents were made with another codec or size than the model's.
            Unreadable: its shard was altered.
        """
        if not isinstance(image, ImageModality):
            raise XFusionError(f"{self.spec}: holds latents of pictures, but the model hears sounds: name sounds")
        if self._checked_against != (image, size):
            self._check(image, size)
            self._checked_against = (image, size)
        position = self.indices[index]
        shard_number = bisect_right(self._starts, position) - 1
        position -= self._starts[shard_number]
        latents = self._shard(shard_number).get_slice("latents")[position : position + 1]
        return image.tokens(latents)[0]

    def _shard(self, number: int) -> Any:
        """An open shard; its hash is checked when this process first reads it."""
        path, expected = self.folder / self.shards[number]["file"], self.shards[number]["sha256"]
        try:
            stat = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from error
        stamp = (path, stat.st_size, stat.st_mtime_ns)
        if (digest := _hash(*stamp)) != expected:
            raise Unreadable(f"{path}: {_altered(digest, expected)}")
        return _shard_file(*stamp)

    def _check(self, image: ImageModality, size: int) -> None:
        if size != self.size:
            raise XFusionError(
                f"{self.spec}: holds latents of {self.size} px, the model reads {size} px: set --model.image.sizes"
                f" {self.size}, or encode the pictures at {size} px"
            )
        if (model_codec := identity(image.codec)) != self.codec:
            raise XFusionError(
                f"{self.spec}: was encoded by {_name(self.codec)}, the model's codec is {_name(model_codec)}: set"
                " --model.image.codec, or encode the pictures by the model's"
            )

    def altered_shards(self) -> dict[range, Problem]:
        """The problem of each shard that was altered, by its positions in the folder; reads all of them."""
        altered = {}
        for shard, (start, end) in zip(self.shards, pairwise(self._starts), strict=True):
            path = self.folder / shard["file"]
            if (digest := file_hash(path)) != shard["sha256"]:
                what = _altered(digest, shard["sha256"])
                altered[range(start, end)] = Problem(kind="broken shard", where=str(path), what=what)
        return altered


def _index(folder: Path) -> dict[str, Any]:
    """Read an index and check that it was not altered."""
    path = folder / INDEX
    try:
        index = read_json(path)
    except XFusionError as error:
        raise XFusionError(f"{str(error).removesuffix('; take an intact copy')}: {ENCODE_AGAIN}") from error
    version = index.get("format_version")
    if version not in (1, FORMAT_VERSION):
        raise XFusionError(
            f"{folder}: its format is {version}, this version reads 1 to {FORMAT_VERSION}: encode it again"
        )
    required = {"codec", "size", "licence", "shards"}
    if "examples" in index:  # folders older than the hashes of all files have neither
        required.add(SEAL)
    missing = sorted(required - index.keys())
    for shard in index.get("shards", []):
        missing += sorted({"file", "count", "bytes", "sha256"} - set(shard))
    if missing:
        raise XFusionError(f"{path} was altered: it has no field {missing[0]}: {ENCODE_AGAIN}")
    return index


def _examples(path: Path, expected: dict[str, Any] | None) -> tuple[Example, ...]:
    """All examples of a folder, in the order of their latents; ``expected`` is the index entry of their file."""
    examples: list[Example] = []
    try:
        if expected is not None and (digest := file_hash(path)) != expected["sha256"]:
            raise XFusionError(
                f"{path} was altered: its hash is {digest[:16]}, {INDEX} says {expected['sha256'][:16]}: {ENCODE_AGAIN}"
            )
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                examples.append(_example(line, f"{path}:{number}"))
    except OSError as error:
        raise XFusionError(f"{path} cannot be read: {error.strerror or error}: {ENCODE_AGAIN}") from error
    return tuple(examples)


def _example(line: bytes, where: str) -> Example:
    try:
        row = json.loads(line)
        return Example(
            id=row["id"],
            captions=tuple(row["captions"]),
            group=row["group"],
            origin=row["origin"],
            question=row.get("question", ""),  # missing in folders older than questions, or hashes of pictures
            content=row.get("content", ""),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise XFusionError(f"{where}: is no example ({first_line(error)}): {ENCODE_AGAIN}") from error


def _altered(digest: str, expected: str) -> str:
    return f"its hash is {digest[:16]}, {INDEX} says {expected[:16]}: delete both, and encode again"


def _open_shard(path: Path, *stamp: int) -> Any:
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


# Both are cached by path, size and date.
_shard_file = ResultCache(_open_shard, 256)
_hash = ResultCache(_file_hash, 1_000_000)


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
    allow_bad: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Latents:
    """Encode all pictures of a source; finished shards of an earlier run with the same arguments are kept.

    Args:
        source: pictures with captions.
        codec: configuration of the codec that encodes them.
        size: side in pixels.
        out: folder to write.
        batch: pictures per call of the codec. Training encodes one at a time, so with 1 its losses are bit-identical; more
            are faster on a GPU and agree up to rounding.
        workers: processes that share the shards; each loads the codec and uses its share of the threads.
        device: device of the codec.
        allow_bad: share of bad examples, those found when the source was opened included, that may be left out. Those that an
            earlier call left out stay so, unless they are more than that: then their shards are encoded again.
        progress: called with the number of pictures done and in total.

    Raises:
        XFusionError: the folder contains other files, or latents of another source, codec or size.
        Unreadable: a picture cannot be read, and no more may be left out; finished shards are kept.
    """
    from xfusion.data.sources import too_many

    model_codec = codec.build()
    model_codec.latent_shape(size, size)
    codec_identity = identity(model_codec)
    _make_folder(out)
    tasks = _tasks(out, source.examples, codec_identity, size, batch)
    _refuse_others(out, tasks, codec_identity, size)
    earlier_hashes = _earlier_hashes(out)
    unfinished, left_out = _unfinished(tasks, source, allow_bad)
    done = len(source.examples) - sum(task.count for task in unfinished)
    report_progress = progress or (lambda done, total: None)
    report_progress(done, len(source.examples))
    if unfinished:
        settings = size, batch, allow_bad > 0
        for task, unreadable in _encode_shards(unfinished, source, codec, model_codec, settings, workers, device):
            left_out |= unreadable
            if (message := too_many(source, left_out, allow_bad)) is not None:
                task.path.unlink()  # so that the same command tries it again
                raise Unreadable(message, left_out)
            done += task.count
            report_progress(done, len(source.examples))
    _write_examples(out / EXAMPLES, source.examples)
    index = {
        "format_version": FORMAT_VERSION if left_out else 1,
        "spec": source.spec,
        "licence": source.licence,
        "size": size,
        "batch": batch,
        "codec": codec_identity,
        "codec_licence": model_codec.licence,
        "shards": _shard_entries(tasks, unfinished, earlier_hashes),
        "examples": {"file": EXAMPLES, "sha256": file_hash(out / EXAMPLES)},
    }
    if left_out:
        index["left_out"] = {str(number): left_out[number] for number in sorted(left_out)}
    with atomic_file(out / INDEX) as temporary:
        temporary.write_text(json.dumps(sealed(index), indent=2) + "\n", encoding="utf-8")
    return Latents(out)


def _make_folder(out: Path) -> None:
    _remove_leftovers(out)
    if out.is_dir() and not is_folder(out) and any(out.iterdir()):
        raise XFusionError(f"{out}: holds other files: name a new folder")
    with named_in_errors(out):
        out.mkdir(parents=True, exist_ok=True)


def _write_examples(path: Path, examples: Sequence[Example]) -> None:
    # An example's origin contains the folder's name, which need not be valid UTF-8.
    with (
        atomic_file(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogatepass") as file,
    ):
        for example in examples:
            file.write(json.dumps(asdict(example), ensure_ascii=False) + "\n")


def left_out_before(out: Path) -> dict[str, dict[str, str]]:
    """Examples that an unfinished or finished folder leaves out, by id, as `xfusion.data.sources.open_source` takes them: they
    keep their places, so that finished shards stay those of the same examples.
    """
    shards = sorted(out.glob("latents-*.safetensors"))
    return {facts["id"]: facts for path in shards for facts in _left_out(path).values()}


def _left_out(path: Path) -> dict[int, dict[str, str]]:
    """Examples whose pictures could not be read when a shard was made, by their position in it."""
    return {int(position): facts for position, facts in _metadata(path).get("unreadable", {}).items()}


def _earlier_hashes(out: Path) -> dict[str, str]:
    """Hash of each shard in the index of an earlier call, if there is one."""
    try:
        return {shard["file"]: shard["sha256"] for shard in _index(out)["shards"]}
    except XFusionError:
        return {}


def _remove_leftovers(out: Path) -> None:
    """Remove the temporary files of a killed run."""
    for name in ("latents-*", Path(EXAMPLES).stem, Path(INDEX).stem):
        for leftover in out.glob(f".{name}.*.tmp.*"):
            leftover.unlink(missing_ok=True)


class _Task:
    """A shard to encode; ``key`` is the hash of its inputs."""

    def __init__(self, out: Path, start: int, count: int, key: str) -> None:
        self.start, self.count, self.key = start, count, key
        self.path = out / f"latents-{start // PER_SHARD:05d}.safetensors"

    def holds(self, numbers: Iterable[int]) -> bool:
        """Whether one of these examples is in the shard."""
        return any(self.start <= number < self.start + self.count for number in numbers)


def _tasks(out: Path, examples: Sequence[Example], codec: dict[str, Any], size: int, batch: int) -> list[_Task]:
    """The shards of all examples, finished or not."""
    tasks = []
    for start in range(0, len(examples), PER_SHARD):
        in_shard = examples[start : start + PER_SHARD]
        tasks.append(_Task(out, start, len(in_shard), _key(codec, size, batch, in_shard)))
    return tasks


def _key(codec: dict[str, Any], size: int, batch: int, examples: Sequence[Example]) -> str:
    """Hash of a shard's inputs. A picture's group is the hash of its file, unless the data names another."""
    pictures = [[e.id, e.group] if e.content in ("", e.group) else [e.id, e.group, e.content] for e in examples]
    facts = [codec, size, batch, pictures]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _refuse_others(out: Path, tasks: Sequence[_Task], codec: dict[str, Any], size: int) -> None:
    for task in tasks:
        if task.path.is_file():
            metadata = _metadata(task.path)
            if metadata.get("key") != task.key:
                description = f"{metadata.get('codec', 'another codec')} at {metadata.get('size', '?')} px"
                raise XFusionError(
                    f"{task.path}: was made by {description}, or of other pictures or by another batch; asked for is"
                    f" {_name(codec)} at {size} px: name a new folder"
                )
    if unexpected := {p.name for p in out.glob("latents-*.safetensors")} - {task.path.name for task in tasks}:
        raise XFusionError(f"{out}: holds {min(unexpected)}, which this source does not fill: name a new folder")


def _unfinished(tasks: Sequence[_Task], source: Source, allow_bad: float) -> tuple[list[_Task], dict[int, str]]:
    """The shards to encode, and the examples that the others leave out, with the reason.

    A finished shard is encoded again if it leaves an example out and the finished ones leave out too many.
    """
    from xfusion.data.sources import too_many

    finished = [task for task in tasks if task.path.is_file()]
    left_out = {
        task.start + position: facts["reason"] for task in finished for position, facts in _left_out(task.path).items()
    }
    if too_many(source, left_out, allow_bad) is not None:
        finished, left_out = [task for task in finished if not task.holds(left_out)], {}
    return [task for task in tasks if task not in finished], left_out


def _shard_entries(
    tasks: Sequence[_Task], encoded: Sequence[_Task], earlier_hashes: dict[str, str]
) -> list[dict[str, Any]]:
    """The index's entries of the shards.

    Raises:
        XFusionError: a shard that was not encoded now differs from its earlier hash.
    """
    entries = [
        {"file": t.path.name, "count": t.count, "bytes": t.path.stat().st_size, "sha256": file_hash(t.path)}
        for t in tasks
    ]
    for task, entry in zip(tasks, entries, strict=True):
        earlier_hash = earlier_hashes.get(task.path.name)
        if task not in encoded and earlier_hash is not None and earlier_hash != entry["sha256"]:
            raise XFusionError(f"{task.path}: {_altered(entry['sha256'], earlier_hash)}")
    return entries


def _metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(str(path), "pt") as file:
            # A single entry: safetensors writes several in no fixed order, so a shard's hash would change.
            return json.loads((file.metadata() or {}).get("made_of", "{}"))
    except (SafetensorError, OSError) as error:
        raise XFusionError(f"{path}: cannot be read ({error}): delete it and give the same command again") from error


def _encode_shards(
    unfinished: Sequence[_Task],
    source: Source,
    config: Codec.Config,
    model_codec: Codec,
    settings: tuple[int, int, bool],
    workers: int,
    device: str,
) -> Iterator[tuple[_Task, dict[int, str]]]:
    """Encode the shards, in this process or in workers; yields each with the pictures that could not be read, and why.

    ``settings`` are the side in pixels, the pictures per call, and whether unreadable ones may be left out.
    """
    if workers == 1:
        _Worker.set_up(source, model_codec.to(device), settings, torch.get_num_threads())
        for task in unfinished:
            yield task, _Worker.shard(task)
        return
    threads = max(1, torch.get_num_threads() // workers)
    queue, processes = list(reversed(unfinished)), [_WorkerProcess() for _ in range(min(workers, len(unfinished)))]
    try:
        for worker in processes:
            worker.start()
        for worker in processes:  # after all starts: a worker receives this only once its imports are done
            worker.send((source, config, settings, device, threads), queue[-1])
            worker.send(queue.pop())
        while busy := [worker for worker in processes if worker.task is not None]:
            ready = wait([worker.pipe for worker in busy])
            for worker in busy:
                if worker.pipe in ready:
                    task, unreadable = worker.task, worker.answer()
                    assert task is not None
                    yield task, unreadable
                    worker.send(queue.pop() if queue else None)
    finally:
        for worker in processes:
            worker.stop()
        _remove_leftovers(unfinished[0].path.parent)


class _WorkerProcess:
    """A worker process that encodes shards, one at a time.

    Each has its own pipe. An executor of `concurrent.futures` would hang if a worker dies before it has received a source
    larger than a pipe's buffer, and its workers would hang if their parent is killed.
    """

    def __init__(self) -> None:
        context = get_context("spawn")
        self.pipe, self._worker_end = context.Pipe()
        self.process = context.Process(target=_work, args=(self._worker_end,), daemon=True)
        self.task: _Task | None = None

    def start(self) -> None:
        self.process.start()
        self._worker_end.close()  # only the worker keeps this end open: if it dies, the pipe closes

    def send(self, message: Any, task: _Task | None = None) -> None:
        self.task = task or (message if isinstance(message, _Task) else None)
        try:
            self.pipe.send(message)
        except OSError as error:
            if self.task is not None:  # else no work is lost
                raise self._death_error() from error

    def answer(self) -> dict[int, str]:
        """The pictures of the finished shard that could not be read."""
        try:
            reply = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._death_error() from error
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def _death_error(self) -> XFusionError:
        self.process.join(10)
        code = self.process.exitcode
        ending = (
            f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        )
        return XFusionError(
            f"{self.task and self.task.path}: not finished, the process that made it {ending}: give the same command again, it"
            " goes on (with fewer --workers where memory was short)"
        )

    def stop(self) -> None:
        if self.process.pid is not None:
            self.process.terminate()
            self.process.join()
        self.pipe.close()


def _work(pipe: Connection) -> None:
    """Main loop of a worker: receive the settings, then shards, until there are no more or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    try:
        source, config, settings, device, threads = pipe.recv()
        task = pipe.recv()
        try:
            _Worker.set_up(source, config.build().to(device), settings, threads)
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
    """The settings and the codec of a worker process."""

    source: Source
    codec: Codec
    size: int
    batch: int
    may_leave_out: bool
    device: torch.device | None

    @classmethod
    def set_up(cls, source: Source, codec: Codec, settings: tuple[int, int, bool], threads: int) -> None:
        torch.set_num_threads(threads)
        cls.source, cls.codec = source, codec
        cls.size, cls.batch, cls.may_leave_out = settings
        weight = next(codec.parameters(), None)
        cls.device = None if weight is None else weight.device

    @classmethod
    def shard(cls, task: _Task) -> dict[int, str]:
        """Write a shard; returns the pictures that could not be read, by their number in the source."""
        latents = torch.zeros(task.count, *cls.codec.latent_shape(cls.size, cls.size))
        unreadable: dict[int, str] = {}
        for start in range(0, task.count, cls.batch):
            read: dict[int, Image] = {}
            for position in range(start, min(start + cls.batch, task.count)):
                try:
                    read[position] = cls.source.picture(task.start + position, cls.size)
                except Unreadable as error:
                    if not cls.may_leave_out:
                        raise
                    unreadable[position] = str(error)
            if read:
                pictures = ImageModality.from_pil([*read.values()], cls.size)
                latents[[*read]] = cls.codec.encode(pictures.to(cls.device)).cpu().float()
        metadata = {"key": task.key, "codec": _name(identity(cls.codec)), "size": cls.size}
        if unreadable:
            examples = {position: cls.source.examples[task.start + position] for position in unreadable}
            metadata["unreadable"] = {
                position: {"id": e.id, "group": e.group, "content": e.content, "reason": unreadable[position]}
                for position, e in examples.items()
            }
        with atomic_file(task.path) as temporary:
            save_file({"latents": latents}, str(temporary), {"made_of": json.dumps(metadata)})
        return {task.start + position: reason for position, reason in unreadable.items()}
