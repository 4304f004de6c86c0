"""`generate` and `caption`: text to pictures, pictures and sounds to text, pictures to the nearest of given names."""

from __future__ import annotations

import math
import re
import time
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
    write_whole,
)

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""File formats of pictures; only PNG stores the prompt and the settings."""
LARGEST_NUMBER = 4096
"""Most pictures of one call."""


@dataclass(frozen=True, kw_only=True)
class Generate(Verb):
    """Draw pictures of a prompt.

    Several pictures are one grid in -o x.png, and one file each in -o folder/. A PNG stores prompt, seed, steps, guidance and the
    pack's fingerprint.
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

    def run(self, console: Console) -> Answer:
        from xfusion.generation import draw_size
        from xfusion.objectives import solvers
        from xfusion.training.memory import keep_freed_memory

        self._check()
        solver = None if self.solver is None else solvers.find(self.solver)
        target = _Target.of(self.out, self.prompt)
        model = load_model(self.model, device=self.device, trust=self.trust)
        guidance = model.guidance if self.guidance is None else self.guidance
        trained_size, output_size = draw_size(model, self.size)
        if model.backbone.device.type == "cpu":
            keep_freed_memory()  # each step allocates the same buffers; this process does nothing else
        start = time.perf_counter()
        with progress(console) as report_progress:
            pictures = model.draw(
                [self.prompt] * self.num,
                size=self.size,
                seeds=self._seeds(),
                steps=self.steps,
                guidance=guidance,
                solver=solver,
                progress=lambda done, total, _: report_progress("drawing", done, total),
            )
        seconds = time.perf_counter() - start
        facts: dict[str, Any] = {"prompt": self.prompt, "steps": self.steps, "guidance": guidance}
        facts |= {} if self.solver is None else {"solver": self.solver}
        facts |= {"pack_fingerprint": model.fingerprint, "base_fingerprint": model.backbone.fingerprint}
        files = target.write(pictures, self._seeds(), facts)
        notes = self._notes(trained_size, output_size)
        data = {
            "files": [str(f) for f in files],
            **facts,
            "seeds": self._seeds(),
            "size": output_size,
            "drawn_at": trained_size,
        }
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

    def _notes(self, trained_size: int, output_size: int) -> list[str]:
        notes = []
        if trained_size != output_size:
            notes.append(
                f"drawn at {trained_size} px, the nearest size that the pack was trained at, and resized to {output_size} px"
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
            return cls(as_file(unused_path(Path(f"{name}.png"))), False, name)
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


def unused_path(path: Path) -> Path:
    """The path, with a number if it exists, so that a default name never overwrites anything."""
    number, candidate = 2, path
    while candidate.exists():
        candidate, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1
    return candidate


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
    image_format = FORMATS[path.suffix.lower()]
    options: dict[str, Any] = {"quality": 95} if image_format in ("JPEG", "WEBP") else {}
    if image_format == "PNG":
        from xfusion.data.pictures import png_facts

        options["pnginfo"] = png_facts(facts)
    return write_whole(path, lambda temporary: picture.save(temporary, format=image_format, **options))


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

    def run(self, console: Console) -> Answer:
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
        items = [
            sounds.read_sound(file) if file.suffix.lower() in sounds.SUFFIXES else pictures.read(file)
            for file in map(Path, self.images)
        ]
        model = load_model(self.model, device=self.device, trust=self.trust)
        if self.names:
            return self._rank_names(model, items, console)
        start_time, answers = time.perf_counter(), []
        with progress(console) as report_progress:
            for start in range(0, len(items), 16):
                report_progress("reading", start, len(items))
                answers += model.caption(
                    items[start : start + 16], question=self.question, size=self.size, max_tokens=self.max_tokens
                )
        captions = [{model.modality.name: i, "caption": a} for i, a in zip(self.images, answers, strict=True)]
        data = {"captions": captions, "question": self.question, "size": self.size or model.modality.sizes[0]}
        data |= {"pack_fingerprint": model.fingerprint}
        text = "\n".join(f"{file}: {readable(answer)}" for file, answer in zip(self.images, answers, strict=True))
        return Answer(data=data | {"seconds": round(time.perf_counter() - start_time, 3)}, text=text)

    def _rank_names(self, model: Any, items: list[Any], console: Console) -> Answer:
        """The names for each picture, nearest first."""
        names, can_embed = list(self.names), "embed" in model.capabilities
        if not can_embed and "match" not in model.capabilities:
            capabilities = ", ".join(sorted(model.capabilities))
            raise UsageError(
                f"--names: packs that embed or match rank names, and this one can only {capabilities}: leave it out"
            )
        start_time, rows = time.perf_counter(), []
        name_vectors = model.embed(names).T if can_embed else None
        with progress(console) as report_progress:
            for index, item in enumerate(items):
                report_progress("reading", index, len(items))
                rows.append(
                    model.match(item, names)
                    if name_vectors is None
                    else (model.embed([item]) @ name_vectors)[0].tolist()
                )
        measure, named, lines = "cosine" if can_embed else "probability", [], []
        for file, scores in zip(self.images, rows, strict=True):
            ranking = sorted(zip(names, scores, strict=True), key=lambda pair: -pair[1])
            entries = [{"name": name, measure: round(score, 4)} for name, score in ranking]
            named.append({model.modality.name: file, "names": entries})
            lines.append(f"{file}: " + ", ".join(f"{name} {score:.3f}" for name, score in ranking))
        data = {"named": named, "pack_fingerprint": model.fingerprint}
        return Answer(data=data | {"seconds": round(time.perf_counter() - start_time, 3)}, text="\n".join(lines))
