"""Understanding of pictures, by questions whose answers can be checked: counting, and whether a sentence is true.

``counting`` draws its own pictures, so the true number is known; ``nlvr`` asks whether NLVR's sentences (Suhr et al. 2017) are
true or false of their pictures. The part of a question never changes (`part`): questions of ``train`` may be trained on
(``runs/write_questions.py`` writes them) and are never asked here. No picture, no set of boxes in any order, and no wording of
a sentence is in two parts.

The answer is the most likely of the allowed ones; a tie for the first place counts as wrong. Its confidence is its share of
the summed likelihood of the allowed answers. On the validation part the lowest confidence is chosen at which answers reach
a wanted accuracy (`threshold`); below it, a model that may refuse refuses.

Accuracy comes with ``chance_`` (the most frequent answer), ``_blind`` (pictures permuted, mean of five) and ``_json``: the model
is asked for JSON and writes ``{"answer": ...}`` token by token, restricted by a schema, instead of scoring given answers. A
model that was never trained on JSON (``Templates.json_share``) is then hardly ever right. ``_interval`` is a 95 % interval over
resampled sentences, or pictures for counting. ``robustness`` repeats the questions on pictures that are compressed, cropped
or reduced in resolution.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from xfusion.data.sequence import XFusionError, first_line
from xfusion.evaluation.abilities import refuse_unable
from xfusion.evaluation.metrics.blind import blind
from xfusion.evaluation.metrics.clusters import interval
from xfusion.evaluation.metrics.naming import ranks
from xfusion.evaluation.metrics.refusal import refusal, threshold
from xfusion.storage import file_hash

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220)}
JPEG, CROP, RESOLUTION = (75, 30, 10, 5), (0.9, 0.75, 0.5), (0.5, 0.25, 0.125)
"""Strengths of the damages: JPEG quality; share of each side that is kept; share of the resolution that is kept."""
Part = Literal["train", "validation", "test"]
ASKED: tuple[Part, ...] = ("validation", "test")
"""The parts that this suite asks questions from."""
TRAINED, VALIDATED = 0.6, 0.2
"""Shares of the parts ``train`` and ``validation``; the rest is ``test``."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A picture, a question about it, and the right answer."""

    id: str
    """Decides the part, and is the cluster for intervals: the hash of the picture, or the name of its sentence's cluster."""
    picture: Image.Image
    text: str
    answer: str


def run(
    model: Any,
    *,
    progress: Callable[[str, int, int], None],
    questions: Literal["counting", "nlvr"] = "counting",
    source: str | None = None,
    most: int = 5,
    count: int = 200,
    seed: int = 0,
    wanted: float = 0.9,
    robustness: bool = True,
) -> dict[str, Any]:
    """Scores of one model.

    Args:
        model: a model that can caption.
        progress: see `evaluate`.
        questions: the kind of questions.
        source: NLVR's parquet file; None for ``counting``.
        most: largest number of things to count, 1 to 16.
        count: number of questions, validation and test together.
        seed: seed of the pictures, of the choice of questions and of the permutations.
        wanted: accuracy in [0, 1] that answers above the threshold have on the validation part.
        robustness: also score damaged pictures.

    Returns:
        for the test part ``accuracy``, ``chance_accuracy``, ``accuracy_blind``, ``accuracy_over_blind`` (the difference),
        ``accuracy_json`` and ``json_valid``; ``refusal_threshold`` (None if everything is refused), ``answered`` and
        ``accuracy_answered``; ``accuracy_interval`` and ``accuracy_over_blind_interval``, None for fewer than five sentences or
        pictures; ``accuracy_DAMAGE_STRENGTH``; ``curves``: for each damage, points of strength and accuracy.

    Raises:
        XFusionError: the model cannot caption, ``questions`` and ``source`` do not fit together, or a part has no question.
    """
    refuse_unable(model, {"caption"}, "asks questions about pictures")
    if questions not in ("counting", "nlvr") or (questions == "nlvr") != (source is not None):
        raise XFusionError(f"questions {questions!r} with source {source!r}: counting has none, nlvr a parquet file")
    all_questions = counting(count, most, seed) if source is None else nlvr(Path(source), count, seed)
    answers = [str(n) for n in range(1, most + 1)] if source is None else ["true", "false"]
    validation = [q for q in all_questions if part(q.id) == "validation"]
    test = [q for q in all_questions if part(q.id) == "test"]
    if not validation or not test:
        raise XFusionError(
            f"{len(all_questions)} questions leave {len(validation)} to choose by and {len(test)} to test: ask more"
        )

    def reporter(label: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(label, done, total)

    validation_probabilities = answer_probabilities(model, validation, answers, reporter("validation"))
    bound = threshold(*grade(validation_probabilities, validation, answers), wanted)
    test_probabilities = answer_probabilities(model, test, answers, reporter("test"))
    confidence, is_correct = grade(test_probabilities, test, answers)
    blind_rounds: list[Tensor] = []

    def permuted_accuracy(order: Tensor) -> float:
        permuted = [replace(q, picture=test[i].picture) for q, i in zip(test, order.tolist(), strict=True)]
        report = reporter(f"blind {len(blind_rounds) + 1}")
        blind_rounds.append(
            grade(answer_probabilities(model, permuted, answers, report), permuted, answers)[1].double()
        )
        return float(blind_rounds[-1].mean())

    blind_rate, clusters = blind(permuted_accuracy, len(test), seed=seed), [q.id for q in test]
    over_blind = is_correct.double() - torch.stack(blind_rounds).mean(dim=0)
    metrics: dict[str, Any] = {
        "accuracy": float(is_correct.float().mean()),
        "accuracy_interval": interval(is_correct, clusters, seed=seed),
        "chance_accuracy": Counter(q.answer for q in test).most_common(1)[0][1] / len(test),
        "accuracy_blind": blind_rate,
        "accuracy_over_blind": float(over_blind.mean()),
        "accuracy_over_blind_interval": interval(over_blind, clusters, seed=seed),
        **json_scores(model, test, answers),
        "refusal_threshold": bound if math.isfinite(bound) else None,
        **refusal(confidence, is_correct, bound),
    }
    curves: dict[str, list[list[float]]] = {}
    if robustness:
        damages: dict[str, tuple[Sequence[float], Callable[[Image.Image, float], Image.Image]]] = {
            "jpeg": (JPEG, compressed),
            "crop": (CROP, cropped),
            "resolution": (RESOLUTION, coarse),
        }
        for name, (strengths, damage) in damages.items():
            points = [[100.0 if name == "jpeg" else 1.0, metrics["accuracy"]]]
            for strength in strengths:
                damaged = [replace(q, picture=damage(q.picture, strength)) for q in test]
                _, is_still_correct = grade(
                    answer_probabilities(model, damaged, answers, reporter(f"{name} {strength:g}")), damaged, answers
                )
                points.append([float(strength), float(is_still_correct.float().mean())])
                metrics[f"accuracy_{name}_{strength:g}"] = points[-1][1]
            curves[name] = sorted(points)
    settings = {
        "questions": questions,
        "source": None if source is None else Path(source).name,
        "source_sha256": None if source is None else file_hash(Path(source)),
        "most": most,
        "seed": seed,
        "wanted": wanted,
        "num_validation": len(validation),
        "num_test": len(test),
        "num_test_clusters": len(set(clusters)),
    }
    return {**metrics, "curves": curves, "settings": settings}


def answer_probabilities(
    model: Any, questions: Sequence[Question], answers: list[str], report: Callable[[int, int], None]
) -> Tensor:
    """Probabilities of the allowed answers ``[questions, answers]``; each row sums to 1."""
    probabilities = torch.empty(len(questions), len(answers))
    for done, question in enumerate(questions):
        report(done, len(questions))
        log_likelihoods = model.score_names([question.picture], answers, question=question.text, summed=True)[0]
        probabilities[done] = log_likelihoods.float().softmax(dim=-1)
    report(len(questions), len(questions))
    return probabilities


def grade(probabilities: Tensor, questions: Sequence[Question], answers: list[str]) -> tuple[Tensor, Tensor]:
    """Confidence of the most likely answer, float ``[questions]``, and whether it is right and no other is as likely, bool."""
    hit = torch.tensor([[answer == question.answer for answer in answers] for question in questions])
    return probabilities.amax(dim=-1), ranks(probabilities, hit) <= 1


def json_scores(model: Any, questions: Sequence[Question], answers: list[str]) -> dict[str, float]:
    """Share of questions answered rightly and share answered by valid JSON, under a schema of the allowed values."""
    schema = {"type": "object", "properties": {"answer": {"enum": [json.loads(answer) for answer in answers]}}}
    texts = model.generate([[question.picture, question.text] for question in questions], schema=schema)
    allowed = {json.dumps({"answer": json.loads(answer)}): answer for answer in answers}
    parsed = [allowed.get(_canonical_json(text)) for (text,) in texts]
    num_correct = sum(value == q.answer for value, q in zip(parsed, questions, strict=True))
    return {
        "accuracy_json": num_correct / len(parsed),
        "json_valid": sum(value is not None for value in parsed) / len(parsed),
    }


def _canonical_json(text: str) -> str:
    """JSON in a unique spelling; empty if the text is not JSON."""
    try:
        return json.dumps(json.loads(text))
    except ValueError:
        return ""


# --------------------------------------------------------------------------------------------------------- questions


def part(name: str) -> Part:
    """The part of all questions of an id. It depends on the id alone, so new questions never move others to another part."""
    digest = hashlib.sha256(f"xfusion question: {name}".encode()).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if fraction < TRAINED else "validation" if fraction < TRAINED + VALIDATED else "test"


def counting(count: int, most: int, seed: int = 0, side: int = 96, parts: Sequence[Part] = ASKED) -> list[Question]:
    """Pictures of 1 to ``most`` discs of one colour on white that do not touch. All numbers are equally frequent.

    Args:
        count: number of questions.
        most: largest number of discs, 1 to 16.
        seed: seed of the pictures.
        side: side of the pictures in pixels.
        parts: the allowed parts. The hash of its pixels decides a picture's part, so equal pictures are in one part; pictures
            of other parts are drawn again.

    Raises:
        XFusionError: ``most`` is not 1 to 16.
    """
    cells = 4
    if not 1 <= most <= cells**2:
        raise XFusionError(f"most is {most}: from 1 to {cells**2} things can be counted")
    questions = []
    for index in range(count):
        rng, num_discs, identity = random.Random(f"{seed}/counting/{index}"), index % most + 1, None
        while identity is None or part(identity) not in parts:
            colour = rng.choice(list(COLOURS))
            picture = Image.new("RGB", (side, side), "white")
            draw, cell = ImageDraw.Draw(picture), side // cells
            for cell_index in rng.sample(range(cells**2), num_discs):
                radius = rng.randint(cell // 4, cell // 2 - 2)
                reach = cell // 2 - 2 - radius  # from the middle of its cell, so that it touches no neighbour
                x = cell_index % cells * cell + cell // 2 + rng.randint(-reach, reach)
                y = cell_index // cells * cell + cell // 2 + rng.randint(-reach, reach)
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[colour])
            identity = hashlib.sha256(picture.tobytes()).hexdigest()[:16]
        text = f"How many {colour} discs are there?"
        questions.append(Question(id=identity, picture=picture, text=text, answer=str(num_discs)))
    return questions


def nlvr(path: Path, count: int | None = None, seed: int = 0, parts: Sequence[Part] = ASKED) -> list[Question]:
    """Questions of a parquet file with columns ``image``, ``sentence`` and ``label`` (true or false).

    Sentences take turns in a seeded order, so that a small ``count`` still covers many sentences. For each sentence all its
    scenes come once before a scene comes again with its boxes in another order (known from the column ``structured_rep``,
    if there is one).

    Args:
        path: the file.
        count: number of questions; None takes all.
        seed: seed of the order.
        parts: the parts to take questions from.

    Raises:
        XFusionError: it cannot be read, or a column is missing.
    """
    rows = nlvr_rows(path, ("image", "sentence", "label"), (SCENE,))
    wordings = [re.sub(r"[^a-z0-9]+", " ", row["sentence"].lower()).strip() for row in rows]
    scenes = [_scene_key(row) for row in rows]
    cluster_of = _wording_clusters(wordings, scenes)
    by_sentence: dict[str, list[int]] = {}
    for index in random.Random(f"{seed}/nlvr").sample(range(len(rows)), len(rows)):
        if part(cluster_of[wordings[index]]) in parts:
            by_sentence.setdefault(wordings[index], []).append(index)
    turns: list[tuple[int, int, int]] = []
    for sentence_index, indices in enumerate(by_sentence.values()):
        times_seen: Counter[str] = Counter()
        ranked = []
        for index in indices:
            ranked.append((times_seen[scenes[index]], index))
            times_seen[scenes[index]] += 1
        turns += [
            (turn, sentence_index, index) for turn, (_, index) in enumerate(sorted(ranked, key=lambda pair: pair[0]))
        ]
    questions = []
    for _, _, index in sorted(turns)[:count]:
        row = rows[index]
        picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        side = max(picture.size)
        square = Image.new("RGB", (side, side), "white")  # models crop to a square, which would cut the sides off
        square.paste(picture, ((square.width - picture.width) // 2, (square.height - picture.height) // 2))
        text = f"{row['sentence']} True or false?"
        questions.append(
            Question(id=cluster_of[wordings[index]], picture=square, text=text, answer=str(row["label"]).lower())
        )
    return questions


SCENE = "structured_rep"
"""NLVR's column with the things in each box, as JSON."""


def nlvr_rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of an NLVR parquet file: ``columns``, and those of ``optional`` that the file has.

    Raises:
        XFusionError: it cannot be read, or a column is missing.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise XFusionError("NLVR's parquet file needs pyarrow: pip install 'xfusion[train]'") from error
    try:
        table = parquet.read_table(path)
    except (OSError, ArrowException) as error:
        raise XFusionError(f"{path} cannot be read: {first_line(error)}") from error
    if missing := [name for name in columns if name not in table.column_names]:
        raise XFusionError(f"{path} has no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    return table.select([n for n in (*columns, *optional) if n in table.column_names]).to_pylist()


def _scene_key(row: dict[str, Any]) -> str:
    """The contents of a picture, whatever the order of its boxes; the hash of its file if the data does not state them."""
    if not row.get(SCENE):
        return hashlib.sha256(row["image"]["bytes"]).hexdigest()
    boxes = (sorted(json.dumps(thing, sort_keys=True) for thing in box) for box in json.loads(row[SCENE]))
    return json.dumps(sorted(boxes))


def _wording_clusters(wordings: Sequence[str], scenes: Sequence[str]) -> dict[str, str]:
    """Wording -> name of its cluster. Wordings that share a scene are in one cluster, named by its first in the alphabet."""
    parent = {wording: wording for wording in wordings}

    def root(wording: str) -> str:
        while parent[wording] != wording:
            wording = parent[wording]
        return wording

    wording_of_scene: dict[str, str] = {}
    for wording, scene in zip(wordings, scenes, strict=True):
        first, second = sorted((root(wording), root(wording_of_scene.setdefault(scene, wording))))
        parent[second] = first
    return {wording: root(wording) for wording in parent}


# ------------------------------------------------------------------------------------------------------------ damage


def compressed(picture: Image.Image, quality: float) -> Image.Image:
    """A picture after JPEG compression with a quality from 1 to 100."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, format="JPEG", quality=int(quality))
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def cropped(picture: Image.Image, share: float) -> Image.Image:
    """The middle of a picture: the given share of each side."""
    width, height = (max(1, round(side * share)) for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def coarse(picture: Image.Image, share: float) -> Image.Image:
    """A picture without detail: reduced to a share of its resolution, then enlarged again."""
    small = [max(1, round(side * share)) for side in picture.size]
    return picture.resize((small[0], small[1]), Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC)
