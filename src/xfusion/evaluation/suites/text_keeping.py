"""How far a pack's text is the base's: perplexity of a text, last words (LAMBADA) and questions with choices (ARC-Easy).

The base and the fused stack read the same items one at a time, so the change is a paired difference, with an interval over
resampled items. A fusion that preserves text declares a change of 0; its fused stack is computed all the same.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from xfusion.data.sequence import XFusionError, first_line
from xfusion.evaluation.metrics.clusters import RESAMPLES, bootstrap
from xfusion.evaluation.verify import bit_equal
from xfusion.storage import file_hash

STACKS = ("base", "fused")
WINDOW = 256
"""Tokens of a piece of the text whose perplexity is measured: an item of its interval."""
LARGEST_NATS = 700.0
"""Largest mean of nats whose exponential is a double."""

T = TypeVar("T")


def run(
    model: Any,
    *,
    progress: Callable[[str, int, int], None],
    perplexity: str | None = None,
    lambada: str | None = None,
    arc_easy: str | None = None,
    max_items: int | None = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Text scores of one model's base and of its fused stack.

    Files are ``.parquet``, ``.jsonl`` with an object per line, or plain text, whose lines are the column ``text``.

    Args:
        model: any model.
        progress: see `evaluate`.
        perplexity: a file with the column ``text``, such as WikiText-2; its rows are one text, cut into pieces of 256 tokens.
        lambada: a file with the column ``text``: passages of which the last word is to be guessed, such as LAMBADA.
        arc_easy: a file with the columns ``question``, ``choices`` and ``answer``, the number of the right choice from 0, or
            with ``choices`` and ``answerKey`` as in ARC.
        max_items: score at most this many pieces, passages and questions each, chosen at random; None is all.
        seed: seed of the choice of items and of the intervals.

    Returns:
        for each file ``perplexity``, the share of last words that greedy decoding finds (``lambada``), or the share of questions
        whose right choice has the highest log-likelihood per character (``arc_easy``), as ``_base``, ``_fused`` and ``_change``,
        fused minus base; with ``_base_interval`` and ``_change_interval``, 95 % over resampled items, None for fewer than five.
        ``arc_easy_near_chance`` says whether the base's interval includes ``chance_arc_easy``: the change then says nothing.
        ``text_bit_equal``: whether all logits of both stacks are equal to the bit; ``text_declared_equal``: whether the fusion
        declares that they are.

    Raises:
        XFusionError: no file is named, or one cannot be read.
    """
    files = {"perplexity": perplexity, "lambada": lambada, "arc_easy": arc_easy}
    files = {name: path for name, path in files.items() if path is not None}
    if not files:
        raise XFusionError(
            "name a file: perplexity=FILE, lambada=FILE or arc_easy=FILE, .parquet, .jsonl or plain text"
        )
    stacks, metrics, settings = _Stacks(model), dict[str, Any](), dict[str, Any]()

    def chosen(items: Sequence[T]) -> list[T]:
        count = len(items) if max_items is None else min(max_items, len(items))
        return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), count))]

    parts: dict[str, Callable[[str], tuple[list[Any], Callable[[Any], _Scores]]]] = {
        "perplexity": lambda path: (chosen(_pieces(model, path)), stacks.read_piece),
        "lambada": lambda path: (chosen(_passages(path)), stacks.guess_last_word),
        "arc_easy": lambda path: (chosen(_questions(path)), stacks.choose),
    }
    prepared = {name: parts[name](path) for name, path in files.items()}  # an unreadable file fails before any scoring
    for name, (items, score) in prepared.items():
        scores = []
        for done, item in enumerate(items):
            progress(name, done, len(items))
            scores.append(score(item))
        progress(name, len(items), len(items))
        metrics |= _compare(name, scores, seed, exponential=name == "perplexity")
        if name == "arc_easy":
            chance = sum(1 / len(question.choices) for question in items) / len(items)
            interval = metrics["arc_easy_base_interval"]
            near = None if interval is None else interval[0] <= chance <= interval[1]
            metrics |= {"chance_arc_easy": chance, "arc_easy_near_chance": near}
        settings |= {name: Path(files[name]).name, f"{name}_sha256": file_hash(_path(files[name]))}
        settings |= {f"num_{name}": len(items)}
    text = {"text_bit_equal": stacks.equal, "text_declared_equal": bool(model.fusion.preserves_text)}
    settings |= {"max_items": max_items, "seed": seed, "window": WINDOW, "resamples": RESAMPLES}
    return {**text, **metrics, "settings": settings}


@dataclass(frozen=True)
class _Scores:
    """An item's sum of scores by stack, and their number: nats and tokens, or 1 for a right answer and 1."""

    sums: Mapping[str, float]
    count: int = 1


@dataclass(frozen=True)
class _Question:
    """A question, its choices, and the number of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int


class _Stacks:
    """Reads items through both stacks, and notes whether all logits were equal."""

    def __init__(self, model: Any):
        self.model, self.equal = model, True

    def read_piece(self, ids: tuple[int, ...]) -> _Scores:
        """Nats of a piece of text, each token after the ones before it."""
        log_probs, _, count = self._read((), ids)
        return _Scores({stack: -float(values.sum()) for stack, values in log_probs.items()}, count)

    def guess_last_word(self, passage: tuple[str, str]) -> _Scores:
        """Whether every token of the last word is the likeliest one."""
        _, likeliest, _ = self._read(*_split_ids(self.model.backbone.encode, *passage))
        return _Scores({stack: float(values.all()) for stack, values in likeliest.items()})

    def choose(self, question: _Question) -> _Scores:
        """Whether the right choice has the highest log-likelihood per character, as in lm-eval's ``acc_norm``."""
        ratings: dict[str, list[float]] = {stack: [] for stack in STACKS}
        for choice in question.choices:
            prompt = f"Question: {question.text}\nAnswer:"
            log_probs, _, _ = self._read(*_split_ids(self.model.backbone.encode, prompt, f" {choice}"))
            for stack, values in log_probs.items():
                ratings[stack].append(float(values.sum()) / len(choice))
        # The first of equal choices, as an argmax takes it.
        return _Scores({s: float(rated.index(max(rated)) == question.answer) for s, rated in ratings.items()})

    @torch.no_grad()
    def _read(self, context: tuple[int, ...], ids: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        """Log-probabilities of ``ids`` after a context, whether each is the likeliest, and their number.

        The base's beginning-of-text token comes first. A first token without anything before it is not scored, and of a context
        that is too long for the base the end is kept.
        """
        backbone = self.model.backbone
        tokens = (*backbone.begin_ids, *context, *ids)
        tokens = tokens[-(backbone.context_length or len(tokens)) :]
        count = min(len(ids), len(tokens) - 1)
        row = torch.tensor([tokens], device=backbone.device)
        logits = {stack: self.model.text_logits(row, stack=stack)[0] for stack in STACKS}
        self.equal = self.equal and bit_equal(*logits.values())
        labels = row[0, -count:]
        # In float64, which Apple's GPUs lack, and only where a token is scored: a vocabulary is wide.
        place = torch.device("cpu") if row.device.type == "mps" else row.device
        labels = labels.to(place)
        scored = {stack: values[-count - 1 : -1].to(place).double() for stack, values in logits.items()}
        log_probs = {
            stack: values.log_softmax(dim=-1).gather(1, labels[:, None])[:, 0].cpu() for stack, values in scored.items()
        }
        likeliest = {stack: (values.argmax(dim=-1) == labels).cpu() for stack, values in scored.items()}
        return log_probs, likeliest, count


def _split_ids(
    encode: Callable[[str], tuple[int, ...]], context: str, ending: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a context and of its ending, which are encoded together, as a text is."""
    whole, length = encode(context + ending), len(encode(context))
    length = min(length, len(whole) - 1)  # a tokenizer may merge both at their border
    return whole[:length], whole[length:]


def _compare(name: str, scores: list[_Scores], seed: int, *, exponential: bool) -> dict[str, Any]:
    """Scores of both stacks and their difference, with intervals over the items."""
    sums = {stack: torch.tensor([s.sums[stack] for s in scores], dtype=torch.float64) for stack in STACKS}
    counts = torch.tensor([s.count for s in scores], dtype=torch.float64)

    def score(stack: str, items: Tensor) -> Tensor:
        mean = sums[stack][items].sum(dim=-1) / counts[items].sum(dim=-1)
        return mean.clamp(max=LARGEST_NATS).exp() if exponential else mean

    base, fused = (float(score(stack, torch.arange(len(scores)))) for stack in STACKS)
    change = bootstrap(lambda items: score("fused", items) - score("base", items), len(scores), seed=seed)
    return {
        f"{name}_base": base,
        f"{name}_fused": fused,
        f"{name}_change": fused - base,
        f"{name}_base_interval": bootstrap(partial(score, "base"), len(scores), seed=seed),
        f"{name}_change_interval": change,
    }


# -------------------------------------------------------------------------------------------------------------- files


def _path(name: str) -> Path:
    return Path(name).expanduser()


def _rows(name: str) -> list[dict[str, Any]]:
    """The rows of a file.

    Raises:
        XFusionError: it cannot be read, or has none.
    """
    path = _path(name)
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            rows = parquet.read_table(path).to_pylist()
        else:
            lines = path.read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) if path.suffix == ".jsonl" else {"text": line} for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise XFusionError(f"{name} cannot be read: {first_line(error)}") from error
    if not rows:
        raise XFusionError(f"{name} has no rows")
    return rows


def _texts(name: str) -> list[str]:
    texts = [row.get("text") if isinstance(row, dict) else None for row in _rows(name)]
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise XFusionError(f"{name}: row {number} has no column 'text' with a text")
    return [text for text in texts if text and text.strip()]


def _pieces(model: Any, name: str) -> list[tuple[int, ...]]:
    """The token ids of a file's text in pieces of `WINDOW`, or of what the base can read; a last one of one token is left out."""
    backbone = model.backbone
    ids = [token for text in _texts(name) for token in backbone.encode(text if text.endswith("\n") else f"{text}\n")]
    width = min(WINDOW, (backbone.context_length or WINDOW + 1) - len(backbone.begin_ids))
    pieces = [tuple(ids[start : start + width]) for start in range(0, len(ids), width)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise XFusionError(f"{name} has no text of two tokens or more")
    return pieces


def _passages(name: str) -> list[tuple[str, str]]:
    """Passages without their last word, and the word with the space before it."""
    passages = [text.rstrip().rpartition(" ") for text in _texts(name)]
    for number, (context, _, _) in enumerate(passages):
        if not context:
            raise XFusionError(f"{name}: passage {number} has no word before its last one")
    return [(context, f"{space}{word}") for context, space, word in passages]


def _questions(name: str) -> list[_Question]:
    questions = []
    for number, row in enumerate(_rows(name)):
        try:
            choices = row["choices"]
            if isinstance(choices, Mapping):  # as the hub has ARC
                choices, answer = choices["text"], list(choices["label"]).index(row["answerKey"])
            else:
                answer = row["answer"]
            question = _Question(str(row["question"]), tuple(map(str, choices)), int(answer))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise XFusionError(
                f"{name}: row {number} is no question: it needs question, choices, and answer, the number of the right choice"
            ) from error
        if not 0 <= question.answer < len(question.choices) or not all(question.choices):
            raise XFusionError(
                f"{name}: row {number} has {len(question.choices)} choices and the answer {question.answer}"
            )
        questions.append(question)
    return questions
