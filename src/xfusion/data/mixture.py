"""Which examples make up step k: a pure function of seed and step, so that a resumed run goes on with the next batch."""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from xfusion.data.latents import tokens
from xfusion.data.order import Order
from xfusion.data.pack import balance, pack, text_length
from xfusion.data.sequence import Batch, Media, Sequence, XFusionError
from xfusion.data.sources import Source
from xfusion.data.templates import QUESTIONS, Encode, Templates, captioning, drawing, with_article
from xfusion.modalities.image import ImageModality

TOKENS_KEPT = 512 * 1024 * 1024
"""Bytes of picture tokens that are kept in memory; the oldest go first."""
LOOKED_AT = 40
"""Steps whose lengths are looked at before the first one, to fix the shapes of a run."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """What one optimiser step reads."""

    draw: int = 64
    """Drawing samples per step."""
    caption: int = 32
    """Captioning samples per step (the paper's ratio is 2 : 1)."""
    pack: int = 4
    """Captioning sequences packed into one row."""
    largest_noise: float = 0.0
    """Noise levels of pictures in captioning samples go from 0 to this; 0 keeps them clean, as the paper finds best.
    Noised ones also carry the media loss (Transfusion caps at 0.5)."""
    templates: Templates = Templates()
    """How examples are worded."""


class Mixture:
    """Drawing and captioning batches of one source.

    Args:
        source: pictures with captions.
        image: turns pictures into tokens.
        size: side in pixels.
        encode: the base's tokenizer.
        begin: the base's beginning of text, which stands before words that open a sequence.
        end: the base's end token.
        config: samples per step.
        seed: of order and wordings.

    Raises:
        XFusionError: the source is empty, or the captioning batch does not fill rows.
    """

    def __init__(
        self,
        source: Source,
        image: ImageModality,
        size: int,
        encode: Encode,
        begin: tuple[int, ...],
        end: int,
        config: MixtureConfig,
        seed: int,
    ):
        if not len(source.examples):
            raise XFusionError(f"{source.spec}: no pictures to train on")
        if config.caption % config.pack:
            raise XFusionError(f"caption {config.caption} is not a multiple of pack {config.pack}: choose one that is")
        if not 0 <= config.largest_noise <= 1:
            raise XFusionError(f"largest_noise {config.largest_noise:g} is not within 0 and 1, the clean and the noise")
        if config.draw + config.caption == 0:
            raise XFusionError("draw and caption are both 0: there is nothing to learn")
        self.source, self.image, self.size, self.config, self.seed = source, image, size, config, seed
        self.encode, self.begin, self.end = encode, begin, end
        rows, columns = image.grid(size)
        self.grid = (rows, columns)
        self.order = Order(source, seed)
        self._tokens: OrderedDict[int, Tensor] = OrderedDict()
        self._kept = max(1, TOKENS_KEPT // (rows * columns * image.token_width * 4))
        self._ids: dict[str, tuple[int, ...]] = {}

    def tokens(self, index: int) -> Tensor:
        """Tokens ``[M, P]`` of a picture, encoded once."""
        if index not in self._tokens:
            self._tokens[index] = tokens(self.source, index, self.image, self.size)
            if len(self._tokens) > self._kept:
                self._tokens.popitem(last=False)
        return self._tokens[index]

    def drawn(self, index: int) -> Media:
        """A picture to learn to draw."""
        return self.image.segment(self.tokens(index), self.grid, state="noised", has_loss=True)

    def shown(self, index: int) -> Media:
        """A picture to learn to read: clean, or up to a noise level, and then it is also learned to be drawn."""
        cap = self.config.largest_noise
        if not cap:
            return self.image.segment(self.tokens(index), self.grid)
        return self.image.segment(self.tokens(index), self.grid, state="noised", has_loss=True, largest_noise=cap)

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text, looked up once."""
        if text not in self._ids:
            self._ids[text] = self.encode(text)
        return self._ids[text]

    def drawings(self, step: int) -> list[Sequence]:
        """The drawing sequences of a step."""
        rng, count = random.Random(f"{self.seed}/draw/words/{step}"), self.config.draw
        words = self.config.templates.drawing_words
        return [
            drawing(self.ids, self.begin, words(self.source.examples[i], rng), self.drawn(i))
            for i in self.order.take("draw", step * count, count)
        ]

    def captionings(self, step: int) -> list[Sequence]:
        """The captioning sequences of a step."""
        rng, count, examples = (
            random.Random(f"{self.seed}/caption/words/{step}"),
            self.config.caption,
            self.source.examples,
        )
        question = self.config.templates.question
        return [
            captioning(self.ids, self.end, self.shown(i), examples[i].captions[0], question(rng))
            for i in self.order.take("caption", step * count, count)
        ]

    @cached_property
    def widths(self) -> tuple[int, int]:
        """Text positions of a drawing and of a packed captioning row that nearly all steps fit: shapes stay fixed."""
        steps = range(LOOKED_AT)
        draw = [max(map(text_length, self.drawings(step)), default=0) for step in steps]
        packed = [balance(self.captionings(step), self.config.pack) for step in steps]
        longest = [max((sum(map(text_length, row)) for row in rows), default=0) for rows in packed]
        return _up(_most(draw), 4), _up(_most(longest), 4)

    def batches(self, step: int) -> list[Batch]:
        """The batches of a step, a pure function of the step."""
        return self._packed(self.drawings(step), self.captionings(step))

    def largest(self) -> list[Batch]:
        """A step in which every sample has the longest words of the source, counted in characters.

        Tokenising a whole data set to count tokens would hold up its start; only a wording that is shorter in
        characters and longer in tokens can make a wider step.
        """
        templates, examples = self.config.templates, self.source.examples
        wordings = [(len(c), i, c) for i, e in enumerate(examples) for c in e.captions]
        _, drawn, words = max(wordings)
        _, named, answer = max((len(e.captions[0]), i, e.captions[0]) for i, e in enumerate(examples))
        words = with_article(words) if templates.article_share else words
        question = max(QUESTIONS, key=len) if templates.question_share else ""
        draw = drawing(self.ids, self.begin, words, self.drawn(drawn))
        caption = captioning(self.ids, self.end, self.shown(named), answer, question)
        return self._packed([draw] * self.config.draw, [caption] * self.config.caption)

    def _packed(self, drawings: list[Sequence], captionings: list[Sequence]) -> list[Batch]:
        out = []
        if drawings:
            width = _fit(self.widths[0], max(map(text_length, drawings)))
            out.append(pack([[s] for s in drawings], text_width=width))
        if captionings:
            rows = balance(captionings, self.config.pack)
            out.append(pack(rows, text_width=_fit(self.widths[1], max(sum(map(text_length, row)) for row in rows))))
        return out


def _most(values: list[int]) -> int:
    """The value that nine tenths do not exceed: one rare long caption shall not make every step wide."""
    return sorted(values)[(9 * len(values) - 1) // 10]


def _fit(width: int, longest: int) -> int:
    """The width, doubled until the longest row fits: each width is another compiled graph, so there are few of them."""
    while width < longest:
        width = max(8, 2 * width)
    return width


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
