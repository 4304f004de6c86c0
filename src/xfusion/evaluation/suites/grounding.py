"""Grounding: where a named thing is in a picture. Boxes are written as text (`xfusion.data.boxes`).

The question is ``<ref>red disc</ref>``, the answer ``<box>(120,340),(560,780)</box>``. The model writes it greedily and without
a constraint; an answer that is not exactly one box has no overlap with anything. ``drawn`` draws its own scenes of discs,
squares and triangles with different names, so the name decides which one is meant. ``nlvr`` cuts NLVR's pictures
(Suhr et al. 2017) into their three boxes and asks for a thing whose name occurs once in its box; the positions come from the
data set's scene description. The part of a scene never changes, as in `understanding`: scenes of ``train`` may be trained on
(``runs/write_questions.py`` writes them) and are never asked here.

Scores come with ``_blind`` (pictures permuted among the questions, mean of five) and ``chance_`` (the best single box for all
scenes). ``named`` is the share of answers that overlap the named thing more than any other thing in the picture. An answer
can be no finer than the encoder's feature map, which has 7 x 7 cells for EfficientNet-Lite0. Drawn things are 1.8 to 3
cells wide; ``hit_by_size`` shows the effect of their size.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from xfusion.data.boxes import Box, boxes_of, reference
from xfusion.data.sequence import XFusionError
from xfusion.evaluation.abilities import refuse_unable
from xfusion.evaluation.metrics.blind import blind
from xfusion.evaluation.metrics.clusters import interval
from xfusion.evaluation.metrics.overlap import HIT, best_constant, overlap
from xfusion.evaluation.suites.understanding import COLOURS, SCENE, Part, nlvr_rows, part
from xfusion.storage import file_hash

SHAPES = ("disc", "square", "triangle")
SIDE, SMALLEST, LARGEST = 100, 25, 43
"""In pixels: side of a drawn picture (its edges are then hundredths), smallest and largest side of a thing (1.8 to 3 cells of a
7 x 7 map)."""
APART = 3
"""Least distance in pixels between two things, and between a thing and the edge."""
NLVR_SIDE, NLVR_BOXES = 100, (0, 150, 300)
"""Side in pixels of a box of an NLVR picture, and the left edges of its three boxes."""
NLVR_NAMES = {"circle": "disc", "square": "square", "triangle": "triangle", "#0099ff": "blue"}
NLVR_SMALLEST = 20
"""Smallest side in pixels of an NLVR thing to ask for: 0.7 cells of the encoder's map."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture, the thing to find in it, and its other things."""

    id: str
    """Hash of the scene's contents, which decides its part."""
    picture: Image.Image
    name: str
    """Name of the thing to find; no other thing of the picture has it."""
    box: Box
    """The true box of this thing."""
    others: tuple[Box, ...] = ()
    """Boxes of the other things."""

    @property
    def question(self) -> str:
        """The prompt after the picture."""
        return reference(self.name)

    @property
    def answer(self) -> str:
        """The true box as text."""
        return self.box.text()


def run(
    model: Any,
    *,
    progress: Callable[[str, int, int], None],
    things: Literal["drawn", "nlvr"] = "drawn",
    source: str | None = None,
    most: int = 2,
    count: int = 200,
    seed: int = 0,
    asked_of: Literal["validation", "test"] = "test",
) -> dict[str, Any]:
    """Grounding scores of one model.

    Args:
        model: a model that can caption.
        progress: see `evaluate`.
        things: the source of scenes.
        source: NLVR's parquet file; None for ``drawn``.
        most: largest number of things in a drawn scene, 1 to 3.
        count: number of scenes.
        seed: seed of the scenes, of their order and of the permutations.
        asked_of: the part to score: ``validation`` to choose settings, ``test`` to report.

    Returns:
        ``hit``, the share of answers with an overlap (intersection over union) of at least 0.5, and ``overlap``, the mean
        overlap, each in [0, 1] and also as ``_blind``, ``_over_blind`` (the difference) and ``chance_``, with 95 % intervals
        ``_interval`` (resampled scenes); ``valid``, the share of answers that are exactly one box; ``named`` and its chance
        ``named_chance``, None if no scene has another thing; ``curves`` with ``hit_by_size``: for each third of the things by
        size, the mean side as a share of the picture's side, and the share of hits.

    Raises:
        XFusionError: the model cannot caption, ``things`` and ``source`` do not fit together, or no scene is in the part.
    """
    refuse_unable(model, {"caption"}, "asks where things are in pictures")
    if things not in ("drawn", "nlvr") or (things == "nlvr") != (source is not None):
        raise XFusionError(f"things {things!r} with source {source!r}: drawn has none, nlvr a parquet file")
    parts: tuple[Part, ...] = (asked_of,)
    scenes = drawn_scenes(count, most, seed, parts) if source is None else nlvr_scenes(Path(source), count, seed, parts)
    if not scenes:
        raise XFusionError(f"no scene is in the part {asked_of}: ask more")
    true_boxes = torch.tensor([_edges(scene.box) for scene in scenes], dtype=torch.float64)

    def predict(asked_scenes: Sequence[Scene], label: str) -> Tensor:
        answers = predict_boxes(model, asked_scenes, lambda done, total: progress(label, done, total))
        return torch.tensor(answers, dtype=torch.float64)

    boxes = predict(scenes, "boxes")
    overlaps = overlap(boxes, true_boxes)
    blind_overlaps: list[Tensor] = []

    def permuted_overlap(order: Tensor) -> float:
        permuted = [replace(scene, picture=scenes[i].picture) for scene, i in zip(scenes, order.tolist(), strict=True)]
        blind_overlaps.append(overlap(predict(permuted, f"blind {len(blind_overlaps) + 1}"), true_boxes))
        return float(blind_overlaps[-1].mean())

    overlap_blind, clusters = blind(permuted_overlap, len(scenes), seed=seed), [scene.id for scene in scenes]
    blind_rounds, constant_scores = torch.stack(blind_overlaps), best_constant(true_boxes)
    over_blind = {
        "hit": (overlaps >= HIT).double() - (blind_rounds >= HIT).double().mean(dim=0),
        "overlap": overlaps - blind_rounds.mean(dim=0),
    }
    rival_overlaps = [
        max([float(overlap(box, torch.tensor(_edges(other)))) for other in scene.others], default=0.0)
        for scene, box in zip(scenes, boxes, strict=True)
    ]
    with_others = [i for i, scene in enumerate(scenes) if scene.others]
    sides = (true_boxes[:, 2:] - true_boxes[:, :2]).prod(dim=1).sqrt()
    thirds = [third for third in sides.argsort(stable=True).tensor_split(3) if len(third)]
    metrics: dict[str, Any] = {
        "hit": float((overlaps >= HIT).double().mean()),
        "hit_interval": interval((overlaps >= HIT).double(), clusters, seed=seed),
        "hit_blind": float((blind_rounds >= HIT).double().mean()),
        "hit_over_blind": float(over_blind["hit"].mean()),
        "hit_over_blind_interval": interval(over_blind["hit"], clusters, seed=seed),
        "chance_hit": constant_scores["hit"],
        "overlap": float(overlaps.mean()),
        "overlap_interval": interval(overlaps, clusters, seed=seed),
        "overlap_blind": overlap_blind,
        "overlap_over_blind": float(over_blind["overlap"].mean()),
        "overlap_over_blind_interval": interval(over_blind["overlap"], clusters, seed=seed),
        "chance_overlap": constant_scores["mean"],
        "valid": float((boxes[:, 2] > boxes[:, 0]).double().mean()),
        "named": sum(float(overlaps[i]) > rival_overlaps[i] for i in with_others) / len(with_others)
        if with_others
        else None,
        "named_chance": sum(1 / (1 + len(scenes[i].others)) for i in with_others) / len(with_others)
        if with_others
        else None,
    }
    settings = {
        "things": things,
        "source": None if source is None else Path(source).name,
        "source_sha256": None if source is None else file_hash(Path(source)),
        "most": most,
        "seed": seed,
        "asked_of": asked_of,
        "num_scenes": len(scenes),
        "num_with_others": len(with_others),
    }
    curves = {"hit_by_size": [[float(sides[i].mean()), float((overlaps[i] >= HIT).double().mean())] for i in thirds]}
    return {**metrics, "curves": curves, "settings": settings}


def predict_boxes(model: Any, scenes: Sequence[Scene], report: Callable[[int, int], None]) -> list[tuple[float, ...]]:
    """Left, top, right and bottom edge in [0, 1] of each answered box; zeros if an answer is not exactly one box."""
    boxes: list[tuple[float, ...]] = []
    for start in range(0, len(scenes), BATCH):
        report(start, len(scenes))
        batch_scenes = scenes[start : start + BATCH]
        texts = model.generate([[scene.picture, scene.question] for scene in batch_scenes], max_tokens=MAX_TOKENS)
        boxes += [_parse_box(text) for (text,) in texts]
    report(len(scenes), len(scenes))
    return boxes


BATCH, MAX_TOKENS = 50, 40
"""Questions per batch, and longest answer in tokens: a box has about 25."""


def _parse_box(text: str) -> tuple[float, ...]:
    try:
        boxes = boxes_of(text)
    except XFusionError:
        boxes = []
    return _edges(boxes[0][1]) if len(boxes) == 1 else (0.0, 0.0, 0.0, 0.0)


def _edges(box: Box) -> tuple[float, float, float, float]:
    return box.left, box.top, box.right, box.bottom


# ------------------------------------------------------------------------------------------------------------- scenes


def drawn_scenes(count: int, most: int, seed: int = 0, parts: Sequence[Part] = ("test",)) -> list[Scene]:
    """Scenes of 1 to ``most`` things on white that do not touch and have different names. All numbers are equally frequent.

    Args:
        count: number of scenes.
        most: largest number of things, 1 to 3.
        seed: seed of the scenes.
        parts: the allowed parts. The hash of its pixels decides a scene's part; scenes of other parts are drawn again.

    Raises:
        XFusionError: ``most`` is not 1 to 3.
    """
    if not 1 <= most <= 3:
        raise XFusionError(f"most is {most}: from 1 to 3 things fit on a scene")
    scenes = []
    for index in range(count):
        rng, identity = random.Random(f"{seed}/grounding/{index}"), None
        while identity is None or part(identity) not in parts:
            picture, things = _draw_scene(rng, index % most + 1)
            identity = hashlib.sha256(picture.tobytes()).hexdigest()[:16]
        boxes = [Box.of_pixels(*edges, picture.size) for _, edges in things]
        scenes.append(Scene(id=identity, picture=picture, name=things[0][0], box=boxes[0], others=tuple(boxes[1:])))
    return scenes


def _draw_scene(rng: random.Random, count: int) -> tuple[Image.Image, list[tuple[str, tuple[int, int, int, int]]]]:
    """A picture with ``count`` things, and their names and edges in pixels (left, top, right, bottom; the last two exclusive)."""
    names = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], count)
    edges: list[tuple[int, int, int, int]] = []
    while len(edges) < count:
        side = rng.randint(SMALLEST, LARGEST)
        left, top = (rng.randint(APART, SIDE - APART - side) for _ in range(2))
        box = (left, top, left + side, top + side)
        if all(
            box[0] >= other[2] + APART
            or other[0] >= box[2] + APART
            or box[1] >= other[3] + APART
            or other[1] >= box[3] + APART
            for other in edges
        ):
            edges.append(box)
        elif rng.random() < 0.02:
            edges.clear()  # the things placed so far may leave no room for another
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(picture)
    for (colour, shape), (left, top, right, bottom) in zip(names, edges, strict=True):
        right, bottom = right - 1, bottom - 1  # pillow draws the last pixel, too
        if shape == "disc":
            draw.ellipse((left, top, right, bottom), fill=COLOURS[colour])
        elif shape == "square":
            draw.rectangle((left, top, right, bottom), fill=COLOURS[colour])
        else:
            draw.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=COLOURS[colour])
    return picture, [(" ".join(name), edge) for name, edge in zip(names, edges, strict=True)]


def nlvr_scenes(path: Path, count: int | None = None, seed: int = 0, parts: Sequence[Part] = ("test",)) -> list[Scene]:
    """Single boxes of NLVR's pictures, each with a thing to find whose name occurs once in the box.

    Equal things at equal positions are one scene, whichever picture, box and sentence they belong to.

    Args:
        path: parquet file with columns ``image`` and ``structured_rep``.
        count: number of scenes; None takes all.
        seed: seed of the order, and of the choice of the thing to find.
        parts: the parts to take scenes from.

    Raises:
        XFusionError: the file cannot be read, or a column is missing.
    """
    boxes_by_id: dict[str, tuple[dict[str, Any], int]] = {}
    for row in nlvr_rows(path, ("image", SCENE)):
        for box_index, things in enumerate(json.loads(row[SCENE])):
            scene = json.dumps(sorted(json.dumps(thing, sort_keys=True) for thing in things))
            identity = hashlib.sha256(scene.encode()).hexdigest()[:16]
            if part(identity) in parts:
                boxes_by_id.setdefault(identity, (row, box_index))
    scenes = []
    for identity in random.Random(f"{seed}/nlvr boxes").sample(sorted(boxes_by_id), len(boxes_by_id)):
        row, box_index = boxes_by_id[identity]
        things = json.loads(row[SCENE])[box_index]
        names = [_nlvr_name(thing) for thing in things]
        candidates = [
            i for i, name in enumerate(names) if names.count(name) == 1 and things[i]["size"] >= NLVR_SMALLEST
        ]
        if not candidates:
            continue
        target = random.Random(f"{seed}/{identity}").choice(candidates)
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        left = NLVR_BOXES[box_index]
        picture = image.crop((left, 0, left + NLVR_SIDE, NLVR_SIDE))
        boxes = [_nlvr_box(thing) for thing in things]
        others = tuple(box for i, box in enumerate(boxes) if i != target)
        scenes.append(Scene(id=identity, picture=picture, name=names[target], box=boxes[target], others=others))
        if len(scenes) == count:
            break
    return scenes


def _nlvr_name(thing: dict[str, Any]) -> str:
    colour, shape = thing["color"].lower(), thing["type"].lower()
    return f"{NLVR_NAMES.get(colour, colour)} {NLVR_NAMES[shape]}"


def _nlvr_box(thing: dict[str, Any]) -> Box:
    left, top, size = thing["x_loc"], thing["y_loc"], thing["size"]
    return Box.of_pixels(left, top, left + size, top + size, (NLVR_SIDE, NLVR_SIDE))
