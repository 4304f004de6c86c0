"""What all verbs share: the answer, the progress bar, and how to find a model, a device and an output file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from xfusion.model import Model


class UsageError(Exception):
    """Bad arguments, reported in one line. The library's own error, `XFusionError`, needs torch to be imported."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The result of a verb."""

    data: dict[str, Any]
    """For programs: what ``--json`` prints."""
    text: str
    """For people."""
    code: int = 0
    """Exit status: 1 for a negative result (a failed proof, bad data)."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A command of the command line; a subclass's docstring and field docstrings are its help."""

    json: bool = False
    """Print one JSON object on stdout; text for people goes to stderr."""

    def run(self, console: Console) -> Answer:
        """Run the verb.

        Args:
            console: where progress is shown (stderr).
        """
        raise NotImplementedError(type(self).__name__)


_CONTROL_CHARACTERS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")})


def readable(text: str) -> str:
    """A model's output without the control characters that a terminal would interpret instead of showing."""
    return text.translate(_CONTROL_CHARACTERS)


@contextmanager
def progress(console: Console, *, lines: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar with the time left, only on a terminal; yields a function of (part's name, items done, items in all).

    Args:
        console: where it is shown.
        lines: without a terminal, print the name of each part on a line of its own as it begins.
    """
    time_left = TimeRemainingColumn(elapsed_when_finished=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), time_left)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        current = ""

        def report(part: str, done: int, total: int) -> None:
            nonlocal current
            if lines and part != current and not console.is_terminal:
                console.print(part, markup=False, soft_wrap=True)
            current = part
            bar.update(task, description=part, completed=done, total=total)

        yield report


def load_model(name: str, *, device: str = "auto", trust: bool = False) -> Model:
    """Load a pack on its base. The folder of a training run means the pack in it, ``a+b`` two packs together."""
    (model,) = load_models([name], device=device, trust=trust).values()
    return model


def load_models(names: Sequence[str], *, device: str = "auto", trust: bool = False) -> dict[str, Model]:
    """Load packs, keyed by their short names; ``a+b`` means two together. Packs of one base share it, loaded once.

    Raises:
        UsageError: two packs have the same name.
    """
    from xfusion import checkpoint
    from xfusion.backbone import Backbone
    from xfusion.composition import together

    folders_by_name: dict[str, list[str]] = {}
    bases: dict[str, str] = {}
    for name in names:
        short = "+".join(map(short_name, parts(name)))
        if short in folders_by_name:
            raise UsageError(f"two packs are called {short!r}: rename the folder of one")
        folders_by_name[short] = [pack_folder(part) for part in parts(name)]
        for folder in folders_by_name[short]:
            bases[folder] = checkpoint.read_config(checkpoint.find(folder))["base"]["fingerprint"]
    torch_device = choose_device(device)
    packs: dict[str, Model] = {}
    backbones: dict[str, Backbone] = {}
    for folder, base in bases.items():
        packs[folder] = checkpoint.load(folder, backbone=backbones.get(base), device=torch_device, trust=trust)
        backbones.setdefault(base, packs[folder].backbone)
    return {short: together(*(packs[folder] for folder in folders)) for short, folders in folders_by_name.items()}


def parts(name: str) -> list[str]:
    """The packs that a name means: several if they are joined by ``+``."""
    return name.split("+") if "+" in name and not Path(name).expanduser().exists() else [name]


def short_name(name: str) -> str:
    """A pack's short name: the folder's name, the run's name if the folder is a run's pack, else the name itself."""
    path = Path(name).expanduser()
    if not path.is_dir():
        return name
    path = path.resolve()
    return path.parent.name if path.name == "pack" else path.name


def pack_folder(name: str) -> str:
    """The name of a pack; the folder of a training run is resolved to the pack in it."""
    from xfusion.checkpoint import pack_in

    folder = Path(name).expanduser()
    pack = pack_in(folder)
    return name if pack == folder else str(pack)


def choose_device(name: str) -> str:
    """The device that a name means; auto is a CUDA GPU if there is one, else the CPU.

    Raises:
        UsageError: an unknown device, or one that this machine lacks.
    """
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} is not one of auto, cpu, cuda, cuda:1, mps") from None
    is_available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(device.type)
    if is_available is None or not is_available():
        raise UsageError(
            f"device {name!r}: torch {torch.__version__} finds none on this machine; leave --device out to use the CPU"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r}: this machine has {torch.cuda.device_count()} of that kind, counted from 0")
    return name


def as_folder(path: Path) -> Path:
    """A path that a verb will fill as a folder, checked before anything is computed.

    Raises:
        UsageError: the path or one of its parents is a file.
        XFusionError: the file system refuses to write there.
    """
    from xfusion.storage import check_writable

    _refuse_file(path, (path, *path.parents))
    check_writable(path, folder=True)
    return path


def as_file(path: Path) -> Path:
    """A path that a verb will write as a file, checked before anything is computed.

    Raises:
        UsageError: one of its parents is a file.
        XFusionError: the file system refuses to write it, or it is a folder.
    """
    from xfusion.storage import check_writable

    _refuse_file(path, path.parents)
    check_writable(path)
    return path


def _refuse_file(path: Path, folders: Iterable[Path]) -> None:
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"-o {path}: {folder} is a file, not a folder")


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then rename it: no reader ever sees a partial file.

    Raises:
        XFusionError: the file system refuses; the error names ``path``.
    """
    from xfusion.storage import atomic_file

    with atomic_file(path) as temporary:
        write(temporary)
    return path


def table(rows: list[tuple[str, str]], indent: str = "") -> str:
    """Two aligned columns."""
    width = max((len(left) for left, _ in rows), default=0)
    return "\n".join(f"{indent}{left:<{width}}  {right}".rstrip() for left, right in rows)


def size_text(count: float) -> str:
    """A human-readable number of bytes: ``12.3 MB``."""
    unit, *larger = ("bytes", "kB", "MB", "GB", "TB")
    while count >= 1000 and larger:
        count, unit = count / 1000, larger.pop(0)
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
