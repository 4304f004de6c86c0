"""What is understood of pictures, by questions whose answers can be checked: how many there are, and whether a sentence is true.

``counting`` draws its own pictures, so that the truth is known exactly; ``nlvr`` reads those of NLVR (Suhr et al. 2017), true
or false. An answer is the likeliest of the allowed ones, and its confidence the share of its likelihood among them. On the
validation part the lowest confidence is chosen at which answers are right as often as asked (`threshold`); below it a model
that may refuse does. Beside accuracy stand ``chance_`` (the commonest answer) and ``_blind`` (pictures permuted), and
``_json``: the model writes ``{"answer": ...}`` by a schema, token after token, instead of having given answers scored.
``robustness`` scores the same questions on pictures that were compressed, cropped and made small.
"""

from __future__ import annotations

import io
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from xfusion.data.sequence import XFusionError
from xfusion.evaluation.metrics.refusal import refusal, threshold
from xfusion.evaluation.suites.emoji import part_of

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220)}
JPEG, CROP, RESOLUTION = (75, 30, 10, 5), (0.9, 0.75, 0.5), (0.5, 0.25, 0.125)
"""Quality; share of the side that stays; share of the pixels of the side."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A picture, what is asked, and what is right."""

    id: str
    """Decides the part: equal ids are in one."""
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
        questions: which questions.
        source: parquet file of NLVR; ``counting`` has none.
        most: largest number of things to count.
        count: how many questions, validation and test together.
        seed: of the pictures that are drawn.
        wanted: accuracy that the threshold shall reach on the validation part.
        robustness: score damaged pictures, too.

    Returns:
        ``accuracy``, ``chance_accuracy``, ``accuracy_blind``, ``accuracy_json``, ``refusal_threshold``, ``answered`` and
        ``accuracy_answered`` of the test part (the threshold is None where all is refused); ``curves``: damage -> points of
        its strength and accuracy.

    Raises:
        XFusionError: the model cannot caption, or there is nothing to ask.
    """
    if "caption" not in model.capabilities:
        able = ", ".join(sorted(model.capabilities))
        raise XFusionError(f"this suite asks questions about pictures, but the model can only do: {able}")
    if questions not in ("counting", "nlvr") or (questions == "nlvr") != (source is not None):
        raise XFusionError(f"questions {questions!r} with source {source!r}: counting has none, nlvr a parquet file")
    made = counting(count, most, seed) if source is None else nlvr(Path(source), count)
    answers = [str(n) for n in range(1, most + 1)] if source is None else ["true", "false"]
    validation = [q for q in made if part_of(q.id) == "validation"]
    test = [q for q in made if part_of(q.id) == "test"]
    if not validation or not test:
        raise XFusionError(
            f"{len(made)} questions leave {len(validation)} to choose by and {len(test)} to test: ask more"
        )

    def told(part: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(part, done, total)

    chosen_by = answered(model, validation, answers, told("validation"))
    bound = threshold(*right(chosen_by, validation, answers), wanted)
    found = answered(model, test, answers, told("test"))
    confidence, is_right = right(found, test, answers)
    permuted = random.Random(seed).sample(range(len(test)), len(test))
    others = [Question(id=q.id, picture=test[i].picture, text=q.text, answer=q.answer)
              for q, i in zip(test, permuted, strict=True)]  # fmt: skip
    _, blind = right(answered(model, others, answers, told("blind")), others, answers)
    metrics: dict[str, Any] = {
        "accuracy": float(is_right.float().mean()),
        "chance_accuracy": Counter(q.answer for q in test).most_common(1)[0][1] / len(test),
        "accuracy_blind": float(blind.float().mean()),
        "accuracy_json": written(model, test, answers),
        "refusal_threshold": bound if math.isfinite(bound) else None,
        **refusal(confidence, is_right, bound),
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
                hurt = [
                    Question(id=q.id, picture=damage(q.picture, strength), text=q.text, answer=q.answer) for q in test
                ]
                _, still = right(answered(model, hurt, answers, told(f"{name} {strength:g}")), hurt, answers)
                points.append([float(strength), float(still.float().mean())])
                metrics[f"accuracy_{name}_{strength:g}"] = points[-1][1]
            curves[name] = sorted(points)
    settings = {
        "questions": questions,
        "source": None if source is None else Path(source).name,
        "most": most,
        "seed": seed,
        "wanted": wanted,
        "num_validation": len(validation),
        "num_test": len(test),
    }
    return {**metrics, "curves": curves, "settings": settings}


def answered(model: Any, questions: Sequence[Question], answers: list[str], tell: Callable[[int, int], None]) -> Tensor:
    """Shares of the likelihood of each allowed answer ``[questions, answers]``, each row summing to 1."""
    out = torch.empty(len(questions), len(answers))
    for done, question in enumerate(questions):
        tell(done, len(questions))
        out[done] = model.score_names([question.picture], answers, question=question.text)[0].float().softmax(dim=-1)
    tell(len(questions), len(questions))
    return out


def right(shares: Tensor, questions: Sequence[Question], answers: list[str]) -> tuple[Tensor, Tensor]:
    """Confidence, and whether the likeliest answer is right: float and bool ``[questions]``."""
    confidence, said = shares.max(dim=-1)
    truth = torch.tensor([answers.index(question.answer) for question in questions])
    return confidence, said == truth


def written(model: Any, questions: Sequence[Question], answers: list[str]) -> float:
    """The share of questions answered rightly in JSON by a schema of the allowed values."""
    schema = {"type": "object", "properties": {"answer": {"enum": [json.loads(answer) for answer in answers]}}}
    texts = model.generate([[question.picture, question.text] for question in questions], schema=schema)
    said = [json.loads(text)["answer"] for (text,) in texts]
    return sum(one == json.loads(q.answer) for one, q in zip(said, questions, strict=True)) / len(questions)


# --------------------------------------------------------------------------------------------------------- questions


def counting(count: int, most: int, seed: int = 0, side: int = 96) -> list[Question]:
    """Pictures of 1 to ``most`` discs of one colour on white that do not touch, all numbers alike often.

    Raises:
        XFusionError: so many do not fit.
    """
    cells = 4
    if not 1 <= most <= cells**2:
        raise XFusionError(f"most is {most}: from 1 to {cells**2} things can be counted")
    out = []
    for number in range(count):
        rng, how_many = random.Random(f"{seed}/counting/{number}"), number % most + 1
        colour = rng.choice(list(COLOURS))
        picture = Image.new("RGB", (side, side), "white")
        draw, cell = ImageDraw.Draw(picture), side // cells
        for place in rng.sample(range(cells**2), how_many):
            x, y, radius = place % cells * cell, place // cells * cell, rng.randint(cell // 4, cell // 2 - 2)
            middle = (x + cell // 2, y + cell // 2)
            draw.ellipse(
                (middle[0] - radius, middle[1] - radius, middle[0] + radius, middle[1] + radius), fill=COLOURS[colour]
            )
        text = f"How many {colour} discs are there?"
        out.append(Question(id=f"counting {seed} {number}", picture=picture, text=text, answer=str(how_many)))
    return out


def nlvr(path: Path, count: int) -> list[Question]:
    """The first questions of a parquet file with columns ``image``, ``sentence`` and ``label`` (true or false).

    Raises:
        XFusionError: it cannot be read, or a column is missing.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise XFusionError("NLVR's parquet file needs pyarrow: pip install 'xfusion[train]'") from error
    try:
        table = parquet.ParquetFile(path)
        rows = next(table.iter_batches(batch_size=count)).to_pylist()
    except (OSError, ArrowException, StopIteration) as error:
        raise XFusionError(f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else 'empty'}") from error
    out = []
    for row in rows:
        if missing := [name for name in ("image", "sentence", "label") if name not in row]:
            raise XFusionError(f"{path} has no column {missing[0]!r}; it has {', '.join(row)}")
        picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        side = max(picture.size)
        square = Image.new("RGB", (side, side), "white")  # a model sees squares; nothing is cut away
        square.paste(picture, ((square.width - picture.width) // 2, (square.height - picture.height) // 2))
        text = f"{row['sentence']} True or false?"
        # One sentence stands with several pictures: its questions belong to one part.
        sentence = json.dumps(row["sentence"])
        out.append(Question(id=sentence, picture=square, text=text, answer=str(row["label"]).lower()))
    return out


# ------------------------------------------------------------------------------------------------------------ damage


def compressed(picture: Image.Image, quality: float) -> Image.Image:
    """A picture through JPEG of a quality."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, format="JPEG", quality=int(quality))
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def cropped(picture: Image.Image, share: float) -> Image.Image:
    """The middle of a picture: a share of each side."""
    width, height = (max(1, round(side * share)) for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def coarse(picture: Image.Image, share: float) -> Image.Image:
    """A picture that has lost its detail: made smaller by a share, and large again."""
    small = [max(1, round(side * share)) for side in picture.size]
    return picture.resize((small[0], small[1]), Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC)
