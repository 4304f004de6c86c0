"""`index` and `search`: find pictures of a folder by text."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from xfusion.apps.commands.base import Answer, UsageError, Verb, choose_device, load_model, progress, table, write_whole

FORMAT = "xfusion index 1"
"""The format name stored in the file."""
CHUNK = 64
"""Pictures that are embedded at once."""


@dataclass(frozen=True, kw_only=True)
class Index(Verb):
    """Make a folder of pictures searchable by text: one vector per picture, in one file."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of pictures, searched recursively. Pictures are cropped to their central square."""
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder, a shipped pack's name, or a hub id, of a model that can embed (recipe clip)."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="INDEX")] = Path("pictures.index")
    """Index file to write."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    trust: bool = False
    """Import packages outside xfusion that the pack names."""

    def run(self, console: Console) -> Answer:
        from xfusion.data import pictures

        if not self.folder.is_dir():
            raise UsageError(f"{self.folder} is no folder of pictures")
        files = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in pictures.SUFFIXES and p.is_file())
        if not files:
            raise UsageError(f"{self.folder} holds no picture: {pictures.READABLE} are read")
        choose_device(self.device)
        start_time, model = time.perf_counter(), load_model(self.model, device=self.device, trust=self.trust)
        import torch
        from safetensors.torch import save_file

        vectors = []
        with progress(console) as report_progress:
            for start in range(0, len(files), CHUNK):
                report_progress("pictures", start, len(files))
                vectors.append(model.embed([pictures.read(file) for file in files[start : start + CHUNK]]))
        facts = {
            "format": FORMAT,
            "model": str(Path(self.model).resolve()) if Path(self.model).exists() else self.model,
            "fingerprint": model.fingerprint,
            "files": json.dumps([str(file.resolve()) for file in files]),
        }
        write_whole(self.out, lambda path: save_file({"vectors": torch.cat(vectors)}, str(path), metadata=facts))
        data: dict[str, Any] = {"index": str(self.out), "pictures": len(files), "pack_fingerprint": model.fingerprint}
        data["seconds"] = round(time.perf_counter() - start_time, 3)
        return Answer(data=data, text=f"{self.out}: {len(files)} pictures in {data['seconds']:.1f} s")


@dataclass(frozen=True, kw_only=True)
class Search(Verb):
    """Find pictures of an index by text, nearest first."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Index file of `xfusion index`."""
    words: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WORDS")]
    """Text to search for."""
    num: Annotated[int, tyro.conf.arg(name="num", aliases=["-n"])] = 10
    """Number of pictures."""
    model: str | None = None
    """The model, if it has moved since the index was made."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    trust: bool = False
    """Import packages outside xfusion that the pack names."""

    def run(self, console: Console) -> Answer:
        from safetensors import SafetensorError, safe_open

        from xfusion.data.pictures import one_reason

        if self.num < 1:
            raise UsageError(f"-n {self.num}: at least 1")
        if not self.words.strip():
            raise UsageError("name some words to look for")
        try:
            with safe_open(str(self.index), "pt") as file:
                facts, vectors = file.metadata() or {}, file.get_tensor("vectors")
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"{self.index} cannot be read as an index ({one_reason(error)}): make one with xfusion index FOLDER MODEL -o"
                f" {self.index}"
            ) from error
        if facts.get("format") != FORMAT:
            raise UsageError(f"{self.index} is not an index: make one with xfusion index FOLDER MODEL -o {self.index}")
        model = load_model(self.model or facts["model"], device=self.device, trust=self.trust)
        if model.fingerprint != facts["fingerprint"]:
            raise UsageError(
                f"{self.index} was made with the pack {facts['fingerprint'][:16]}, {self.model or facts['model']} is"
                f" {model.fingerprint[:16]}: make the index again"
            )
        cosines = vectors @ model.embed([self.words])[0]
        best, files = cosines.argsort(descending=True)[: self.num].tolist(), json.loads(facts["files"])
        matches = [{"image": files[i], "cosine": round(float(cosines[i]), 4)} for i in best]
        rows = [(f"{item['cosine']:.3f}", item["image"]) for item in matches]
        return Answer(
            data={"words": self.words, "found": matches, "pack_fingerprint": model.fingerprint}, text=table(rows)
        )
