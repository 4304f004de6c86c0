"""Where a named thing stands: boxes as text (`xfusion.data.boxes`), asked of pictures that were not trained on.

``<ref>red disc</ref>`` asks, ``<box>(120,340),(560,780)</box>`` answers, written greedily and free: what is no single box
overlaps nothing. ``drawn`` draws its own scenes of discs, squares and triangles, each of another name, so that which one is
meant matters; ``nlvr`` cuts the three boxes of NLVR's pictures (Suhr et al. 2017) apart and asks for things that its scene
description places, where only one of the name is there. A scene belongs to a part for good, as in `understanding`;
``runs/write_questions.py`` writes those of ``train``.

Beside the scores stand ``_blind`` (pictures permuted among the questions, mean of five) and ``chance_`` (the best that one box
does for all). ``named`` is the share of answers that overlap the asked thing more than any other of the picture. An answer can
be no sharper than the encoder's map, of which EfficientNet-Lite0 has 7 x 7 cells: drawn things are 1.8 to 3 cells wide, and
``hit_by_size`` says what their size is worth.
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
from xfusion.evaluation.metrics.blind import blind
from xfusion.evaluation.metrics.clusters import interval
from xfusion.evaluation.metrics.overlap import HIT, best_constant, overlap
from xfusion.evaluation.suites.understanding import COLOURS, SCENE, Part, nlvr_rows, part

SHAPES = ("disc", "square", "triangle")
SIDE, SMALLEST, LARGEST = 100, 25, 43
"""Pixels of a drawn picture, so that edges are hundredths, and of the sides of its things: 1.8 to 3 cells of a map of 7 x 7."""
APART = 3
"""Pixels between things, and to the edge."""
NLVR_SIDE, NLVR_BOXES = 100, (0, 150, 300)
"""Pixels of a box of NLVR's pictures, and where the three begin."""
NLVR_NAMES = {"circle": "disc", "square": "square", "triangle": "triangle", "#0099ff": "blue"}
NLVR_SMALLEST = 20
"""Things of NLVR of fewer pixels, 0.7 cells of the encoder's map, are not asked for."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture, the thing that is asked for, and what else is there."""

    id: str
    """Decides the part: the hash of what is there."""
    picture: Image.Image
    name: str
    box: Box
    others: tuple[Box, ...] = ()

    @property
    def question(self) -> str:
        """What a model is asked."""
        return reference(self.name)

    @property
    def answer(self) -> str:
        """What is right."""
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
    """Scores of one model.

    Args:
        model: a model that can caption.
        progress: see `evaluate`.
        things: which scenes.
        source: parquet file of NLVR; ``drawn`` has none.
        most: largest number of things of a drawn scene.
        count: how many scenes.
        seed: of the scenes and of permutations.
        asked_of: ``validation`` to choose settings by, ``test`` to report.

    Returns:
        ``hit``, the share of answers with an overlap (intersection over union) of at least 0.5, and ``overlap``, the mean of
        it, each also ``_blind``, ``_over_blind`` and ``chance_``, with intervals; ``valid``, the share of answers that are one
        box; ``named`` and ``named_chance``; ``curves``: ``hit_by_size``, of each third of the things by size, its mean side
        as a share of the picture's and its share of hits.

    Raises:
        XFusionError: the model cannot caption, or there is nothing to ask.
    """
    if "caption" not in model.capabilities:
        able = ", ".join(sorted(model.capabilities))
        raise XFusionError(f"this suite asks where things are in pictures, but the model can only do: {able}")
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
        "most": most,
        "seed": seed,
        "asked_of": asked_of,
        "num_scenes": len(scenes),
        "num_with_others": len(with_others),
    }
    curves = {"hit_by_size": [[float(sides[i].mean()), float((overlaps[i] >= HIT).double().mean())] for i in thirds]}
    return {**metrics, "curves": curves, "settings": settings}


def predict_boxes(model: Any, scenes: Sequence[Scene], report: Callable[[int, int], None]) -> list[tuple[float, ...]]:
    """Edges of the one box that each answer is; zeros where it is none, or several."""
    boxes: list[tuple[float, ...]] = []
    for start in range(0, len(scenes), BATCH):
        report(start, len(scenes))
        batch_scenes = scenes[start : start + BATCH]
        texts = model.generate([[scene.picture, scene.question] for scene in batch_scenes], max_tokens=MAX_TOKENS)
        boxes += [_parse_box(text) for (text,) in texts]
    report(len(scenes), len(scenes))
    return boxes


BATCH, MAX_TOKENS = 50, 40
"""Questions of a batch, and tokens of an answer: a box has about 25."""


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
    """Scenes of 1 to ``most`` things on white that do not touch, no two of one name; all numbers alike often.

    A scene's part is the hash of its picture's pixels; of other parts than ``parts`` none is kept.

    Raises:
        XFusionError: so many do not fit.
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
    """A picture and its things, the asked one first: name and edges, the right and the lower one behind the last pixel."""
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
            edges.clear()  # what stands there may leave no room for another
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
    """Boxes of NLVR's pictures, cut apart, with a thing of each that alone has its name there.

    The same things at the same places are one scene, wherever they stand and whatever sentence is about them.

    Args:
        path: parquet file with columns ``image`` and ``structured_rep``.
        count: how many; None takes all of the parts.
        seed: of the order, and of the thing that is asked for.
        parts: which parts.

    Raises:
        XFusionError: the file cannot be read, or a column is missing.
    """
    boxes_by_id: dict[str, tuple[dict[str, Any], int]] = {}
    for row in nlvr_rows(path, ("image", SCENE)):
        for place, things in enumerate(json.loads(row[SCENE])):
            scene = json.dumps(sorted(json.dumps(thing, sort_keys=True) for thing in things))
            identity = hashlib.sha256(scene.encode()).hexdigest()[:16]
            if part(identity) in parts:
                boxes_by_id.setdefault(identity, (row, place))
    scenes = []
    for identity in random.Random(f"{seed}/nlvr boxes").sample(sorted(boxes_by_id), len(boxes_by_id)):
        row, place = boxes_by_id[identity]
        things = json.loads(row[SCENE])[place]
        names = [_nlvr_name(thing) for thing in things]
        candidates = [
            i for i, name in enumerate(names) if names.count(name) == 1 and things[i]["size"] >= NLVR_SMALLEST
        ]
        if not candidates:
            continue
        target = random.Random(f"{seed}/{identity}").choice(candidates)
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        left = NLVR_BOXES[place]
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
