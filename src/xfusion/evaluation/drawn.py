"""Suites in two phases: a model draws a folder of pictures with a manifest, then a judge scores the folder.

The phases are independent, so a judge may use other packages, another machine or people. The layout is GenEval's (Ghosh et
al., arXiv 2310.11513): ``00000/metadata.jsonl`` with the prompt's own line, ``00000/samples/0000.png``; in addition,
``manifest.json`` has prompts, seeds, settings and the hash of every picture.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor

from xfusion.data.pictures import one_reason
from xfusion.data.sequence import XFusionError
from xfusion.evaluation import metrics
from xfusion.evaluation.metrics import naming
from xfusion.evaluation.teachers import refuse_teacher
from xfusion.generation import draw_size, refuse_to_draw
from xfusion.modalities.base import Encoder
from xfusion.storage import file_hash, read_json, sealed, write_json

MANIFEST = "manifest.json"


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The lines of a prompt file: objects with ``prompt`` (.jsonl), otherwise one prompt per line.

    Raises:
        XFusionError: it cannot be read, or a line has no prompt.
    """
    try:
        # Not `splitlines`, which also ends a line at characters that JSON may hold, such as U+2028.
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise XFusionError(f"{path} cannot be read: {one_reason(error)}") from error
    prompts: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            item = json.loads(line) if path.suffix.lower() == ".jsonl" else {"prompt": line.strip()}
        except ValueError as error:
            raise XFusionError(f"{path}, line {number}: is not JSON: {error}") from error
        if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
            raise XFusionError(f"{path}, line {number}: has no field 'prompt' with words")
        if any("\ud800" <= character <= "\udfff" for character in item["prompt"]):
            raise XFusionError(
                f"{path}, line {number}: the prompt has half a character, an escape such as \\ud83d alone"
            )
        prompts.append(item)
    if not prompts:
        raise XFusionError(f"{path} holds no prompt")
    return prompts


def draw_folder(
    model: Any,
    prompts: list[dict[str, Any]],
    folder: Path,
    *,
    num: int,
    seed: int,
    settings: dict[str, Any],
    save: Callable[[PILImage.Image, Path, dict[str, Any]], object],
    progress: Callable[[str, int, int], None],
    batch: int = 16,
) -> dict[str, Any]:
    """The first phase. Called again after an interruption, it draws the missing pictures, the same as without interruption.

    Args:
        model: a model that can draw.
        prompts: from `read_prompts`.
        folder: output folder.
        num: pictures per prompt; picture i of prompt p has the seed ``seed + p * num + i``.
        seed: seed of the first picture.
        settings: settings of `generation.draw`: steps, guidance, size.
        save: writes a picture with its metadata.
        progress: called with the number of pictures done and in total.
        batch: pictures per call.

    Returns:
        the manifest.

    Raises:
        XFusionError: the folder contains pictures of another pack, prompts or settings; or the model cannot draw, or not at
            this size, and then nothing is written.
    """
    refuse_to_draw(model)
    draw_size(model, settings.get("size"))
    facts = {
        "pack_fingerprint": model.fingerprint,
        "base_fingerprint": model.backbone.fingerprint,
        "settings": {**settings, "num": num, "seed": seed},
        "prompts": [item["prompt"] for item in prompts],
    }
    marker = folder / "begun.json"  # the manifest itself is written last, so a judge never sees half a folder
    for path in (folder / MANIFEST, marker):
        if path.is_file() and any(read_json(path).get(key) != facts[key] for key in facts):
            raise XFusionError(f"{folder} holds pictures of another pack, prompts or settings: name an empty folder")
    if folder.exists() and not marker.is_file() and not (folder / MANIFEST).is_file() and any(folder.iterdir()):
        raise XFusionError(f"{folder} holds other files: name an empty folder")
    write_json(marker, sealed(facts))
    places = [(p, i) for p in range(len(prompts)) for i in range(num)]
    missing = [(p, i) for p, i in places if not _file(folder, p, i).is_file()]
    for p in {p for p, _ in missing}:
        _file(folder, p, 0).parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(prompts[p], ensure_ascii=False) + "\n"
        (folder / f"{p:05}" / "metadata.jsonl").write_text(line, encoding="utf-8")
    for start in range(0, len(missing), batch):
        batch_places = missing[start : start + batch]
        progress("drawing", len(places) - len(missing) + start, len(places))
        seeds = [seed + p * num + i for p, i in batch_places]
        pictures = model.draw([prompts[p]["prompt"] for p, _ in batch_places], seeds=seeds, **settings)
        for (p, i), picture, picture_seed in zip(batch_places, pictures, seeds, strict=True):
            save(picture, _file(folder, p, i), {"prompt": prompts[p]["prompt"], "seed": picture_seed, **settings})
    items = [
        {
            "prompt": p,
            "seed": seed + p * num + i,
            "file": _file(folder, p, i).relative_to(folder).as_posix(),
            "sha256": file_hash(_file(folder, p, i)),
        }
        for p, i in places
    ]
    manifest = sealed(facts | {"teachers": sorted(model.teachers), "pictures": items})
    write_json(folder / MANIFEST, manifest)
    marker.unlink()
    return manifest


def _file(folder: Path, prompt: int, index: int) -> Path:
    return folder / f"{prompt:05}" / "samples" / f"{index:04}.png"


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A folder written by `draw_folder`, as input of a judge."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Drawn:
        """Read the folder's manifest; pictures are read on demand.

        Raises:
            XFusionError: the manifest cannot be read, or was altered.
        """
        return cls(folder=folder, manifest=read_json(folder / MANIFEST))

    def __len__(self) -> int:
        return len(self.manifest["pictures"])

    @property
    def prompts(self) -> list[str]:
        """The prompt of each picture."""
        return [self.manifest["prompts"][item["prompt"]] for item in self.manifest["pictures"]]

    @property
    def teachers(self) -> frozenset[str] | None:
        """Fingerprints of the encoders that trained the drawing model (`Model.teachers`); None if they are not recorded."""
        fingerprints = self.manifest.get("teachers")
        return None if fingerprints is None else frozenset(fingerprints)

    def pictures(self, start: int, stop: int) -> Iterator[PILImage.Image]:
        """Some of the pictures, in RGB.

        Raises:
            XFusionError: a picture is missing or was altered.
        """
        for item in self.manifest["pictures"][start:stop]:
            path = self.folder / item["file"]
            if not path.is_file() or file_hash(path) != item["sha256"]:
                raise XFusionError(f"{path} is missing or is not the picture that was drawn: draw the folder again")
            with PILImage.open(path) as opened:
                yield opened.convert("RGB")


def judge_names() -> list[str]:
    """Judges that are not packs: the files of the folder ``evaluation/metrics`` with a ``judge``."""
    names = sorted(module.name for module in pkgutil.iter_modules(metrics.__path__))
    return [name for name in names if hasattr(import_module(f"{metrics.__name__}.{name}"), "judge")]


def judge_by(
    folder: Path,
    by: str,
    *,
    encoder: Encoder.Config | None = None,
    device: str = "cpu",
    progress: Callable[[str, int, int], None],
) -> dict[str, Any] | None:
    """The second phase, with a metric as the judge.

    Args:
        folder: written by `draw_folder`.
        by: ``clip-score:ORG/MODEL``, ``fid:FOLDER``, ``kernel-distance:FOLDER``, or any other of `judge_names`.
        encoder: the encoder of the distances; None uses Inception v3.
        device: device of the metric.
        progress: called with the number of pictures done and in total.

    Returns:
        the metric's scores, and under "settings" the judge and the drawing model; None if ``by`` is not a metric and so
        names a pack.

    Raises:
        XFusionError: the metric is unknown, or it refuses the input.
    """
    name, colon, argument = by.partition(":")
    names = judge_names()
    if Path(by).expanduser().exists() or (not colon and name.replace("-", "_") not in names):
        return None
    if name.replace("-", "_") not in names:
        choices = ", ".join(f"{choice.replace('_', '-')}:..." for choice in names)
        raise XFusionError(f"there is no judge {by!r}: there are {choices}, or a pack that embeds or captions")
    drawn = Drawn.read(folder)
    metric = import_module(f"{metrics.__name__}.{name.replace('-', '_')}")
    result = metric.judge(drawn, argument, encoder=encoder, device=device, progress=progress)
    teachers = "not noted when it was drawn" if drawn.teachers is None else sorted(drawn.teachers)
    settings = {"by": by, **result["settings"], "torchmetrics": version("torchmetrics"), "teachers": teachers}
    return result | {"settings": settings | {"drawn": _drawing_settings(drawn.manifest)}}


def judge(folder: Path, model: Any, *, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """The second phase, with a pack as the judge: does a picture's own prompt rank first among all prompts of the folder?

    A pack that embeds ranks by cosine; otherwise a pack that captions ranks by the prompt's log-likelihood minus the same
    without the picture. The judge's mistakes affect the score.

    Args:
        folder: written by `draw_folder`.
        model: a pack that embeds or captions, other than the one that drew.
        progress: called with the number of pictures done and in total.

    Returns:
        ``at_1``, ``at_10``, ``mrr`` with chance and blind values (pictures permuted), and the judge and the drawing model.

    Raises:
        XFusionError: the folder was altered, or the judge drew it itself, reads pictures with an encoder that took part in
            training what drew, or can neither embed nor caption.
    """
    drawn = Drawn.read(folder)
    if drawn.manifest["pack_fingerprint"] == model.fingerprint:
        raise XFusionError(f"{folder} was drawn by this very pack: it may not judge itself")
    for encoder in sorted(model.teachers):
        refuse_teacher(encoder, drawn.teachers)
    prompts = list(dict.fromkeys(drawn.manifest["prompts"]))
    pictures = list(drawn.pictures(0, len(drawn)))

    def report(done: int, total: int) -> None:
        progress("judging", done, total)

    if "embed" in model.capabilities:
        scores: Tensor = model.embed(pictures, progress=report) @ model.embed(prompts).T
    elif "caption" in model.capabilities:
        scores = naming.pointwise(
            model.score_names(pictures, prompts, progress=report), model.score_names(None, prompts)
        )
    else:
        raise XFusionError(
            f"this pack cannot judge: it can {', '.join(sorted(model.capabilities))}, not embed or caption"
        )
    true_index = [prompts.index(prompt) for prompt in drawn.prompts]
    hit = torch.nn.functional.one_hot(torch.tensor(true_index), len(prompts)).bool()
    judge_settings = {
        "judge_fingerprint": model.fingerprint,
        "by": "embed" if "embed" in model.capabilities else "caption",
    }
    counts = {"num_pictures": len(pictures), "num_prompts": len(prompts)}
    return (
        naming.with_baselines("", scores, hit)
        | counts
        | {"settings": judge_settings | {"drawn": _drawing_settings(drawn.manifest)}}
    )


def _drawing_settings(manifest: dict[str, Any]) -> dict[str, Any]:
    return {key: manifest[key] for key in ("pack_fingerprint", "settings")}
