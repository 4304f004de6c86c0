"""Convert examples to sequences: a picture and its text become a drawing sample, a captioning sample or a prompt."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from xfusion.data.sequence import Example, Media, Sequence, Text, XFusionError

QUESTIONS = ("What is this?", "What is in the picture?", "Name this picture.")
"""Questions of a part of the captioning samples; the others have none."""

IN_JSON = " Answer in JSON."
"""Suffix of a question whose answer should be JSON."""


def with_article(words: str) -> str:
    """``red apple`` -> ``a red apple``."""
    return f"{'an' if words[:1].lower() in 'aeiou' else 'a'} {words}"


def question_text(question: str) -> str:
    """The text between a picture and its answer."""
    return f"{question.strip()}\n" if question.strip() else ""


def in_json(question: str) -> str:
    """A question that asks for an answer in JSON."""
    return f"{question.strip()}{IN_JSON}"


def as_json(answer: str) -> str:
    """``3`` -> ``{"answer": 3}``: the answer as an integer, true, false or null if it is one, else as a string."""
    try:
        value = json.loads(answer)
    except ValueError:
        value = answer
    is_plain = value is None or isinstance(value, int)  # True and False, too
    return json.dumps({"answer": value if is_plain else answer}, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class Templates:
    """How examples are worded in training."""

    caption_dropout: float = 0.1
    """Share of drawing samples without a prompt, for classifier-free guidance."""
    article_share: float = 0.1
    """Share of drawing samples that say ``a red apple`` instead of ``red apple``."""
    other_wordings: float = 0.1
    """Share of drawing samples that use another wording than the first, if there is one."""
    question_share: float = 0.1
    """Share of captioning samples that ask a question between the picture and the answer."""
    questions: tuple[str, ...] = QUESTIONS
    """The questions to choose from."""
    json_share: float = 0.0
    """Share of the data's own questions to ask in JSON, as ``{"answer": 3}``. A model never trained on JSON cannot fill in
    the values when a schema forces it to write JSON."""

    def __post_init__(self) -> None:
        for name in ("caption_dropout", "article_share", "other_wordings", "question_share", "json_share"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise XFusionError(f"templates: {name} is {share:g}, but it is a share from 0 to 1")
        if self.question_share and not self.questions:
            raise XFusionError(
                f"templates: question_share is {self.question_share:g}, but questions is empty: give one, or 0"
            )

    def drawing_words(self, example: Example, rng: random.Random) -> str:
        """The prompt of a drawing sample; empty if it is dropped."""
        if rng.random() < self.caption_dropout:
            return ""
        prompt = example.captions[0]
        if len(example.captions) > 1 and rng.random() < self.other_wordings:
            prompt = rng.choice(example.captions[1:])
        return with_article(prompt) if rng.random() < self.article_share else prompt

    def question(self, rng: random.Random) -> str:
        """The question of a captioning sample; mostly empty."""
        return rng.choice(self.questions) if rng.random() < self.question_share else ""

    def question_and_answer(self, question: str, answer: str, rng: random.Random) -> tuple[str, str]:
        """A question of the data and its answer, either plain or in JSON."""
        if self.json_share and rng.random() < self.json_share:
            return in_json(question), as_json(answer)
        return question, answer


Encode = Callable[[str], tuple[int, ...]]
"""Text -> token ids, by the base's tokenizer."""


def with_begin(begin: tuple[int, ...], context: tuple[Text | Media, ...]) -> tuple[Text | Media, ...]:
    """Put the base's BOS tokens before a context that starts with text.

    A decoder uses its first position as an attention sink: from the middle layers on, all first tokens have nearly the
    same hidden state, so a word at that position could not be told from another (docs/training_log.md). A context that
    starts with a picture has its trainable [BOI] there, or BOS if the picture has no position in the base. An empty
    context stays empty.
    """
    if not context:
        return context
    if isinstance(context[0], Media):
        return (Text(ids=begin), *context) if begin and context[0].behind_begin else context
    return (replace(context[0], ids=(*begin, *context[0].ids)), *context[1:])


def drawing(encode: Encode, begin: tuple[int, ...], words: str, picture: Media) -> Sequence:
    """A prompt, then the noised target picture; without a prompt, only the picture."""
    ids = encode(words)
    return Sequence(segments=(*with_begin(begin, (Text(ids=ids),) if ids else ()), picture))


def captioning(
    encode: Encode,
    end: int,
    picture: Media,
    answer: str,
    question: str = "",
    begin: tuple[int, ...] = (),
    examples: Seq[tuple[Media, str, str]] = (),
) -> Sequence:
    """A picture, an optional question, and the target answer, ended by the base's own end token.

    Few-shot examples, each a picture, its own question of the data or "", and its answer, may come first. Their answers are
    targets too, as in OpenFlamingo's interleaved pages, so prompts with fewer examples are also learned. Their end tokens are
    targets but not inputs.
    """

    def asked(asked_picture: Media, its_question: str) -> tuple[Media | Text, ...]:
        ids = encode(question_text(its_question))
        return (asked_picture, Text(ids=ids)) if ids else (asked_picture,)

    shots = [
        (*asked(shot_picture, shot_question), Text(ids=(*encode(shot_answer), end), has_loss=True, unread_end=True))
        for shot_picture, shot_question, shot_answer in examples
    ]
    segments: Seq[Media | Text] = (
        *(segment for shot in shots for segment in shot),
        *asked(picture, question),
        Text(ids=(*encode(answer), end), has_loss=True),
    )
    return Sequence(segments=with_begin(begin, tuple(segments)))
