"""Requests for a picture in chat wording, and ordinary chat: the training data of the opening head.

``requests.json`` has wordings, subjects, answers and chat in two disjoint parts, so ``held`` measures generalisation to new
wordings. A conversation ends with the turn to classify.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from xfusion.data.sequence import XFusionError

PICTURE = "(picture)"
"""Stands for a picture in a conversation that is read as text only."""
_FIELDS = ("requests", "subjects", "follow_ups", "chats", "about_subjects", "answers")
LONGEST_HISTORY = 2
"""Largest number of turns, with their answers, before the one to classify."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A conversation, and whether its last turn asks for a picture."""

    messages: tuple[dict[str, str], ...]
    """Messages with ``role`` and ``content``, the oldest first; the last is the user's."""
    draws: bool
    """Whether it asks for a picture."""
    subject: tuple[int, int] | None = None
    """Character span of the last message that says what to draw; None if there is none."""


def read(
    split: Literal["train", "held"], path: str | Path | None = None, *, repeat: int = 6, seed: int = 0
) -> list[Request]:
    """All wordings of a part, each ``repeat`` times with different subjects, half of them after earlier turns.

    Args:
        split: which part.
        path: a JSON file in the format of ``requests.json``; None uses that one.
        repeat: how often a wording with a subject appears; plain chat appears a third as often.
        seed: seed of the subjects and the earlier turns.

    Raises:
        XFusionError: the file cannot be read, or a field is missing.
    """
    part = _part(split, path)
    rng = random.Random(f"{split} {seed}")
    rare_repeat = max(1, repeat // 3)
    requests: list[Request] = []
    for wording in part["requests"] * repeat:
        text, span = _fill_in(wording, rng.choice(part["subjects"]))
        requests.append(Request(messages=(*_history(part, rng), _user(text)), draws=True, subject=span))
    for text in part["follow_ups"] * rare_repeat:
        drawing_turn = _drawing_turn(part, rng)
        requests.append(Request(messages=(*drawing_turn, _user(text)), draws=True))
    for text in part["chats"] * rare_repeat:
        requests.append(Request(messages=(*_history(part, rng), _user(text)), draws=False))
    for wording in part["about_subjects"] * repeat:
        text, _ = _fill_in(wording, rng.choice(part["subjects"]))
        requests.append(Request(messages=(*_history(part, rng), _user(text)), draws=False))
    return requests


def _part(split: str, path: str | Path | None) -> dict[str, list[str]]:
    file = Path(path) if path else resources.files("xfusion.data") / "requests.json"
    try:
        part: Any = json.loads(file.read_text(encoding="utf-8"))[split]
        missing = [name for name in _FIELDS if not part.get(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise XFusionError(f"{file}: wordings cannot be read: {error!r}; see xfusion/data/requests.json") from error
    if missing:
        raise XFusionError(f"{file}: {split!r} has no {missing[0]!r}; it needs {', '.join(_FIELDS)}")
    malformed = [w for name in ("requests", "about_subjects") for w in part[name] if w.count("{}") != 1]
    if malformed:
        raise XFusionError(f"{file}: {malformed[0]!r} must hold one {{}} for the subject")
    return part


def _fill_in(wording: str, subject: str) -> tuple[str, tuple[int, int]]:
    start = wording.index("{}")
    if start == 0 and wording[2:].strip() and not wording.islower():
        subject = subject[0].upper() + subject[1:]
    return wording.replace("{}", subject), (start, start + len(subject))


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _drawing_turn(part: dict[str, list[str]], rng: random.Random) -> tuple[dict[str, str], ...]:
    subject = rng.choice(part["subjects"])
    text, _ = _fill_in(rng.choice(part["requests"]), subject)
    answer = f"{PICTURE}\n{subject.partition(' ')[2] or subject}" if rng.random() < 0.7 else PICTURE
    return _user(text), _assistant(answer)


def _chat_turn(part: dict[str, list[str]], rng: random.Random) -> tuple[dict[str, str], ...]:
    return _user(rng.choice(part["chats"])), _assistant(rng.choice(part["answers"]))


def _history(part: dict[str, list[str]], rng: random.Random) -> list[dict[str, str]]:
    """Empty half of the time; otherwise one or two turns of either kind."""
    if rng.random() < 0.5:
        return []
    turns = [
        _drawing_turn(part, rng) if rng.random() < 0.5 else _chat_turn(part, rng)
        for _ in range(rng.randint(1, LONGEST_HISTORY))
    ]
    return [message for turn in turns for message in turn]
