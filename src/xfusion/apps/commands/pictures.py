"""`generate` and `caption`: text to pictures, pictures and sounds to text, pictures to the nearest of given names."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from xfusion.apps.commands.base import (
    Answer,
    UsageError,
    Verb,
    as_file,
    as_folder,
    choose_device,
    load_model,
    progress,
    readable,
    written,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""File formats of pictures; only PNG stores the prompt and the settings."""
LARGEST_NUMBER = 4096
"""Most pictures of one call."""


@dataclass(frozen=True, kw_only=True)
class Generate(Verb):
    """Draw pictures of a prompt.

    -o x.png writes one picture, or one grid of several; -o folder/ writes one file per picture. A PNG stores prompt,
    seed, steps, guidance and the pack's fingerprint.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder, a shipped pack's name, or a hub id."""
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """What to draw; an empty prompt draws anything."""
    num: Annotated[int, tyro.conf.arg(name="num", aliases=["-n"])] = 1
    """Number of pictures; picture i has the seed SEED + i."""
    steps: int = 25
    """Steps from noise to picture."""
    solver: str | None = None
    """Sampler: euler, heun (two passes per step) or multistep; None uses the pack's own."""
    guidance: float | None = None
    """Classifier-free guidance: how strongly the prompt is followed; 1 is off. None uses the pack's own."""
    seed: int = 0
    """Seed of the first picture."""
    size: int | None = None
    """Side in pixels; None uses the trained size. Other sizes are drawn at the nearest trained one and resized."""
    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="FILE|FOLDER/")] = None
    """Output file or folder; None writes a file named after the prompt to the current folder."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    trust: bool = False
    """Import packages outside xfusion that the pack names."""

    def run(self, people: Console) -> Answer:
        from xfusion.generation import draw_size
        from xfusion.objectives import solvers
        from xfusion.training.memory import keep_freed_memory

        self._check()
        solver = None if self.solver is None else solvers.find(self.solver)
        target = _Target.of(self.out, self.prompt)
        model = load_model(self.model, device=self.device, trust=self.trust)
        guidance = model.guidance if self.guidance is None else self.guidance
        native, wanted = draw_size(model, self.size)
        if model.backbone.device.type == "cpu":
            keep_freed_memory()  # each step allocates the same buffers; this process does nothing else
        begun = time.perf_counter()
        with progress(people) as tell:
            pictures = model.draw(
                [self.prompt] * self.num,
                size=self.size,
                seeds=self._seeds(),
                steps=self.steps,
                guidance=guidance,
                solver=solver,
                progress=lambda done, total, _: tell("drawing", done, total),
            )
        seconds = time.perf_counter() - begun
        facts: dict[str, Any] = {"prompt": self.prompt, "steps": self.steps, "guidance": guidance}
        facts |= {} if self.solver is None else {"solver": self.solver}
        facts |= {"pack_fingerprint": model.fingerprint, "base_fingerprint": model.backbone.fingerprint}
        files = target.write(pictures, self._seeds(), facts)
        notes = self._notes(native, wanted)
        data = {"files": [str(f) for f in files], **facts, "seeds": self._seeds(), "size": wanted, "drawn_at": native}
        text = "\n".join([f"{file}" for file in files] + notes)
        return Answer(data=data | {"notes": notes, "seconds": round(seconds, 3)}, text=text)

    def _seeds(self) -> list[int]:
        return [self.seed + i for i in range(self.num)]

    def _check(self) -> None:
        if not 1 <= self.num <= LARGEST_NUMBER:
            raise UsageError(f"-n {self.num}: draw 1 to {LARGEST_NUMBER} pictures at once")
        if not 0 <= self.seed < 2**63 - LARGEST_NUMBER:
            raise UsageError(f"--seed {self.seed}: choose a whole number from 0 to 2^63 - {LARGEST_NUMBER + 1}")
        if self.steps < 1:
            raise UsageError(f"--steps {self.steps}: at least 1")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UsageError(f"--guidance {self.guidance}: give a number, such as 3; 1 is off")
        if any("\ud800" <= character <= "\udfff" for character in self.prompt):
            raise UsageError("the prompt is not valid UTF-8 text")
        choose_device(self.device)

    def _notes(self, native: int, wanted: int) -> list[str]:
        notes = []
        if native != wanted:
            notes.append(
                f"drawn at {native} px, the nearest size that the pack was trained at, and resized to {wanted} px"
            )
        if not self.prompt.strip():
            notes.append("the prompt is empty: drawn without words")
        return notes


@dataclass(frozen=True)
class _Target:
    """Where pictures go: one file, or a folder with a file per picture."""

    path: Path
    is_folder: bool
    name: str

    @classmethod
    def of(cls, out: str | None, prompt: str) -> _Target:
        """Parse ``-o``; a target that could not be written is refused before anything is computed."""
        name = file_name(prompt)
        if out is None:
            return cls(as_file(unused(Path(f"{name}.png"))), False, name)
        path = Path(out).expanduser()
        is_folder = path.is_dir() or out.endswith("/") or not path.suffix
        if not is_folder and path.suffix.lower() not in FORMATS:
            raise UsageError(
                f"-o {out}: cannot write {path.suffix} files, only {', '.join(FORMATS)}; a folder ends in /"
            )
        return cls(as_folder(path) if is_folder else as_file(path), is_folder, name)

    def write(self, pictures: list[Image], seeds: list[int], facts: dict[str, Any]) -> list[Path]:
        """The files, in the order of the pictures."""
        if not self.is_folder:
            facts = facts | {"seed": " ".join(map(str, seeds))}
            return [save(pictures[0] if len(pictures) == 1 else grid(pictures), self.path, facts)]
        return [
            save(picture, self.path / f"{self.name}-seed{seed}.png", facts | {"seed": seed})
            for picture, seed in zip(pictures, seeds, strict=True)
        ]


def file_name(prompt: str) -> str:
    """A file name from a prompt: letters and digits of any script, at most 40 characters."""
    return re.sub(r"[\W_]+", "-", prompt.lower())[:40].strip("-") or "picture"


def unused(path: Path) -> Path:
    """The path, with a number if it exists, so that a default name never overwrites anything."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1
    return free


def grid(pictures: list[Image]) -> Image:
    """Pictures of one size side by side, nearly as many columns as rows, with a gap."""
    from PIL import Image as PILImage

    width, height = pictures[0].size
    columns = math.ceil(math.sqrt(len(pictures)))
    rows, gap = math.ceil(len(pictures) / columns), max(1, width // 16)
    sheet = PILImage.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def save(picture: Image, path: Path, facts: dict[str, Any]) -> Path:
    """Write a picture in the format of its suffix; a PNG stores the facts as text."""
    kind = FORMATS[path.suffix.lower()]
    options: dict[str, Any] = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    if kind == "PNG":
        options["pnginfo"] = png_facts(facts)
    return written(path, lambda temporary: picture.save(temporary, format=kind, **options))


def png_facts(facts: Mapping[str, Any]) -> PngInfo:
    """Facts as text chunks of a PNG."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in facts.items():
        info.add_text(key, str(value).replace("\0", ""))
    return info


@dataclass(frozen=True, kw_only=True)
class Caption(Verb):
    """Caption pictures or sounds; with --names, rank some names for them."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder, a shipped pack's name, or a hub id."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE...")]
    """Picture files (cropped to their central square), or sound files for a pack with audio."""
    question: str = ""
    """Question about each picture; an empty one asks for its name."""
    names: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ()
    """Rank these names for each picture instead of answering (zero-shot classification): by cosine for packs that embed
    (recipe clip), by probability for packs that match (lxmert)."""
    size: int | None = None
    """Side in pixels at which pictures are read, one of the pack's sizes; None uses its first."""
    max_tokens: int = 32
    """Longest answer in tokens."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    trust: bool = False
    """Import packages outside xfusion that the pack names."""

    def run(self, people: Console) -> Answer:
        from xfusion.data import pictures, sounds

        if not self.images:
            raise UsageError("name at least one picture or sound file to caption")
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens {self.max_tokens}: at least 1")
        if self.names and (self.question or self.size is not None):
            raise UsageError("--names ranks names beside pictures: leave --question and --size out")
        if not all(name.strip() for name in self.names):
            raise UsageError("--names: one of the names is empty")
        choose_device(self.device)
        opened = [
            sounds.read_sound(file) if file.suffix.lower() in sounds.SUFFIXES else pictures.read(file)
            for file in map(Path, self.images)
        ]
        model = load_model(self.model, device=self.device, trust=self.trust)
        if self.names:
            return self._ranked(model, opened, people)
        begun, answers = time.perf_counter(), []
        with progress(people) as tell:
            for start in range(0, len(opened), 16):
                tell("reading", start, len(opened))
                answers += model.caption(
                    opened[start : start + 16], question=self.question, size=self.size, max_tokens=self.max_tokens
                )
        found = [{model.modality.name: i, "caption": a} for i, a in zip(self.images, answers, strict=True)]
        data = {"captions": found, "question": self.question, "size": self.size or model.modality.sizes[0]}
        data |= {"pack_fingerprint": model.fingerprint}
        text = "\n".join(f"{file}: {readable(answer)}" for file, answer in zip(self.images, answers, strict=True))
        return Answer(data=data | {"seconds": round(time.perf_counter() - begun, 3)}, text=text)

    def _ranked(self, model: Any, opened: list[Any], people: Console) -> Answer:
        """The names for each picture, nearest first."""
        names, embeds = list(self.names), "embed" in model.capabilities
        if not embeds and "match" not in model.capabilities:
            able = ", ".join(sorted(model.capabilities))
            raise UsageError(
                f"--names: packs that embed or match rank names, and this one can only {able}: leave it out"
            )
        begun, rows = time.perf_counter(), []
        near = model.embed(names).T if embeds else None
        with progress(people) as tell:
            for done, item in enumerate(opened):
                tell("reading", done, len(opened))
                rows.append(model.match(item, names) if near is None else (model.embed([item]) @ near)[0].tolist())
        how, found, lines = "cosine" if embeds else "probability", [], []
        for file, scores in zip(self.images, rows, strict=True):
            best = sorted(zip(names, scores, strict=True), key=lambda pair: -pair[1])
            ranked = [{"name": name, how: round(score, 4)} for name, score in best]
            found.append({model.modality.name: file, "names": ranked})
            lines.append(f"{file}: " + ", ".join(f"{name} {score:.3f}" for name, score in best))
        data = {"named": found, "pack_fingerprint": model.fingerprint}
        return Answer(data=data | {"seconds": round(time.perf_counter() - begun, 3)}, text="\n".join(lines))
