"""Which examples make up step k: a pure function of seed and step, so a resumed run continues with the next batch."""

from __future__ import annotations

import math
import os
import random
import sys
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from xfusion.data import shards
from xfusion.data.latents import tokens
from xfusion.data.mixed import Mixed
from xfusion.data.order import Lanes, Order, num_grouped
from xfusion.data.pack import balance, pack, text_length
from xfusion.data.sequence import Batch, Media, Sequence, Text, Unreadable, XFusionError
from xfusion.data.sources import Source
from xfusion.data.templates import Encode, Templates, as_json, captioning, drawing, in_json, with_article
from xfusion.modalities.base import Modality

T = TypeVar("T")
TOKENS_KEPT = 512 * 1024 * 1024
"""Bytes of picture tokens to cache in memory; the oldest are removed first."""
TEXTS_KEPT = 200_000
"""Number of texts whose token ids are cached; the oldest are removed first."""
LOOKED_AT = 40
"""Steps whose lengths are measured before the first one, to fix the shapes of a run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Awaited(Media):
    """A picture whose tokens are zeros until this process turns out to need its row."""

    index: int
    """Index of the example."""
    size: int
    """Side in pixels."""


@dataclass(kw_only=True)
class WeightedBatch(Batch):
    """A batch of samples whose losses have a weight of their own (`MixtureConfig.loss_weights`)."""

    loss_weight: float
    """Factor of the sums of all its losses; their counts stay."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """The samples of one optimizer step."""

    draw: int = 64
    """Drawing samples per step."""
    caption: int = 32
    """Captioning samples per step (the paper's ratio is 2 : 1)."""
    pack: int = 4
    """Captioning sequences packed into one row; with several picture sizes, a row fits this many of the largest and more
    of the others."""
    shots: int = 0
    """Few-shot examples, pictures with their answers, before the picture of every captioning sample (Flamingo's interleaved
    prompts). All answers are learned, so prompts with fewer examples work as well; all pictures are from different groups."""
    largest_noise: float = 0.0
    """Largest noise level of pictures in captioning samples; 0 keeps them clean, which the paper finds best. Noised
    ones also get the media loss (Transfusion caps at 0.5)."""
    templates: Templates = Templates()
    """How examples are worded."""
    loss_weights: tuple[float, ...] = ()
    """Weight of the losses of each source of the data, in the order of --data, such as 1 0.2 for photos+emoji: a loss is the sum
    over all samples of the step, each with the weight of its source, divided by their plain number. Empty weighs all alike."""


class Mixture:
    """Drawing and captioning batches of one source.

    Args:
        source: pictures with captions.
        image: converts pictures, or sounds, to tokens.
        sizes: its sizes; a step has equally many pictures of each, assigned at random.
        encode: the base's tokenizer.
        begin: the base's BOS tokens, which precede text at the start of a sequence.
        end: the base's end token.
        config: samples per step.
        seed: seed of order and wordings.
        share: returns the rows of a batch whose pictures this process reads; None reads all.
        left_out: examples that cannot be read; more may be added during a run. Each is replaced by the next readable one
            of the source, so a batch stays a function of the step and of the data.
        decoders: threads that read and decode; None uses four, or the number of cores if that is less.

    Raises:
        XFusionError: the source is empty, the captioning batch does not fill its rows, or the weights are not one per source.
    """

    def __init__(
        self,
        source: Source,
        image: Modality,
        sizes: tuple[int, ...],
        encode: Encode,
        begin: tuple[int, ...],
        end: int,
        config: MixtureConfig,
        seed: int,
        share: Callable[[int], slice | None] = lambda rows: None,
        left_out: Container[int] = frozenset(),
        decoders: int | None = None,
    ):
        if not len(source.examples):
            raise XFusionError(f"{source.spec}: no pictures to train on")
        if config.caption % config.pack:
            fits = -(-config.caption // config.pack) * config.pack
            raise XFusionError(
                f"caption {config.caption} is not a multiple of pack {config.pack}: give the mixture caption {fits}, or pack 1"
            )
        if not 0 <= config.largest_noise <= 1:
            raise XFusionError(f"largest_noise {config.largest_noise:g} is not within 0 and 1, the clean and the noise")
        if config.shots < 0:
            raise XFusionError(f"shots {config.shots}: 0, or how many solved examples stand before a picture")
        if config.draw + config.caption == 0:
            raise XFusionError("draw and caption are both 0: there is nothing to learn")
        number, weights = len(source.sources) if isinstance(source, Mixed) else 1, config.loss_weights
        if weights and not (len(weights) == number and all(0 <= w < math.inf for w in weights) and any(weights)):
            raise XFusionError(
                f"loss_weights {' '.join(f'{w:g}' for w in weights)}: {source.spec} has {number} source{'s' * (number > 1)}: give"
                " one weight from 0 on for each, in their order, and not 0 for all"
            )
        self.source, self.image, self.sizes, self.config, self.seed = source, image, sizes, config, seed
        self.encode, self.begin, self.end, self.share, self.left_out = encode, begin, end, share, left_out
        self.order = order_of(source, config, seed)
        if grouped := num_grouped(source):
            shards.make_room(grouped * self._groups_at_once())
        self._blank = {size: torch.zeros(math.prod(image.grid(size)), image.token_width) for size in sizes}
        self._tokens: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        largest = max(map(len, self._blank.values()))
        self._kept = max(1, TOKENS_KEPT // (largest * image.token_width * 4))
        self._room = largest + 1
        self._ids: dict[str, tuple[int, ...]] = {}
        self._pool = ThreadPoolExecutor(max_workers=decoders or default_decoders(), thread_name_prefix="decode")
        numbers: dict[str, int] = {}
        self._groups = [numbers.setdefault(example.group, len(numbers)) for example in source.examples]
        if config.caption and config.shots >= len(numbers):
            raise XFusionError(
                f"{source.spec}: {config.shots} shots and the picture behind them are of as many groups, but there are"
                f" {len(numbers)}: take fewer shots or more pictures"
            )

    def tokens(self, index: int, size: int) -> Tensor:
        """Tokens ``[M, P]`` of a picture at a size, encoded once."""
        if (index, size) not in self._tokens:
            made = self._encoded((index, size))
            if isinstance(made, Unreadable):
                raise Unreadable(str(made), {index: str(made)})
            self._keep((index, size), made)
        return self._tokens[index, size]

    def _encoded(self, wanted: tuple[int, int]) -> Tensor | Unreadable:
        index, size = wanted
        try:
            return tokens(self.source, index, self.image, size)
        except Unreadable as error:
            return error

    def _groups_at_once(self) -> int:
        """Row groups of one source that this process's rows read concurrently: one per lane and task, plus as many as may be
        replaced by their successors at the same time.
        """
        captions, counts = self.config.caption // self.config.pack, [0]
        for task, rows in (("draw", self.config.draw), ("caption", captions), ("shots", captions)):
            if task == "shots" and not self.config.shots:
                continue
            lanes = self.order.lanes(task).of_place
            own = (len(self.sizes) == 1 and self.share(rows)) or slice(None)
            counts.append(len({lanes[row * (len(lanes) // rows)] for row in range(rows)[own]}))
        return sum(counts) + max(counts)

    def _standing(self, index: int) -> int:
        """The example itself or, if it is left out, its replacement from the same source of a mixture."""
        start, end = 0, len(self.source.examples)
        if isinstance(self.source, Mixed):
            part = bisect_right(self.source.starts, index) - 1
            start, end = self.source.starts[part], self.source.starts[part + 1]
        for step in range(end - start):
            if (other := start + (index - start + step) % (end - start)) not in self.left_out:
                return other
        raise XFusionError(f"{self.source.spec}: of {end - start} examples none can be read")

    def _keep(self, which: tuple[int, int], made: Tensor) -> None:
        self._tokens[which] = made
        if len(self._tokens) > self._kept:
            self._tokens.popitem(last=False)

    def drawn(self, index: int, size: int) -> Media:
        """A picture as target for drawing."""
        return self._awaited(index, size, state="noised", has_loss=True)

    def shown(self, index: int, size: int) -> Media:
        """A picture as input: clean, or noised up to a noise level and then also with a media loss."""
        cap = self.config.largest_noise
        how: dict[str, Any] = {"state": "noised", "has_loss": True, "largest_noise": cap} if cap else {}
        return self._awaited(index, size, **how)

    def _awaited(self, index: int, size: int, **how: Any) -> Awaited:
        blank = self.image.segment(self._blank[size], self.image.grid(size), group=self._groups[index], **how)
        return Awaited(**vars(blank), index=index, size=size)

    def _sizes(self, task: str, step: int, count: int) -> list[int]:
        """Sizes of a task's samples in a step, shuffled. The multiset is the same in every step, so shapes stay fixed; the
        first sizes get one more sample if the samples do not divide evenly.
        """
        even = [self.sizes[place % len(self.sizes)] for place in range(count)]
        random.Random(f"{self.seed}/{task}/sizes/{step}").shuffle(even)
        return even

    def _filled(self, rows: list[list[Sequence]]) -> list[list[Sequence]]:
        """The rows with the pictures of this process's own rows filled in; all other pictures stay blank."""
        own = set(range(len(rows))[self.share(len(rows)) or slice(None)])
        media = (s for n in sorted(own) for q in rows[n] for s in q.segments if isinstance(s, Awaited))
        missing = [i for i in dict.fromkeys((m.index, m.size) for m in media) if i not in self._tokens]
        # Pillow decodes without the GIL. Results are kept outside the bounded cache, which may be smaller than one batch.
        made = dict(zip(missing, self._pool.map(self._encoded, missing), strict=True))
        fresh = {which: found for which, found in made.items() if not isinstance(found, Unreadable)}
        if broken := {which[0]: str(found) for which, found in made.items() if isinstance(found, Unreadable)}:
            for which, found in fresh.items():
                self._keep(which, found)
            raise Unreadable(next(iter(broken.values())), broken)

        def fill(segment: Text | Media) -> Text | Media:
            if not isinstance(segment, Awaited):
                return segment
            which = (segment.index, segment.size)
            return replace(segment, tokens=fresh[which] if which in fresh else self.tokens(*which))

        filled = [
            [Sequence(segments=tuple(map(fill, q.segments))) for q in row] if n in own else row
            for n, row in enumerate(rows)
        ]
        for which, found in fresh.items():
            self._keep(which, found)
        return filled

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text, cached."""
        found = self._ids.get(text)
        if found is None:
            found = self._ids[text] = self.encode(text)
            if len(self._ids) > TEXTS_KEPT:
                self._ids.pop(next(iter(self._ids)))
        return found

    def _chosen(self, task: str, step: int, count: int) -> Iterator[tuple[int, int]]:
        """Example and size of each sample of a task in a step."""
        order = map(self._standing, self.order.take(task, step * count, count))
        return zip(order, self._sizes(task, step, count), strict=True)

    def drawings(self, step: int) -> list[Sequence]:
        """The drawing sequences of a step."""
        rng, count = random.Random(f"{self.seed}/draw/words/{step}"), self.config.draw
        words = self.config.templates.drawing_words
        return [
            drawing(self.ids, self.begin, words(self.source.examples[i], rng), self.drawn(i, size))
            for i, size in self._chosen("draw", step, count)
        ]

    def captionings(self, step: int) -> list[Sequence]:
        """The captioning sequences of a step."""
        rng, count, examples = (
            random.Random(f"{self.seed}/caption/words/{step}"),
            self.config.caption,
            self.source.examples,
        )
        # Sampled for every sample, so that one sample's question does not depend on whether the data has one for another.
        templates = self.config.templates
        drawn = [templates.question(rng) for _ in range(count)]
        wording = random.Random(f"{self.seed}/caption/json/{step}")
        out = []
        for place, ((i, size), question) in enumerate(zip(self._chosen("caption", step, count), drawn, strict=True)):
            answer, own = examples[i].captions[0], examples[i].question
            question, answer = templates.asked(own, answer, wording) if own else (question, answer)
            solved = [(self.shown(j, size), examples[j].captions[0]) for j in self._shots(i, step * count + place)]
            out.append(captioning(self.ids, self.end, self.shown(i, size), answer, question, self.begin, solved))
        return out

    def _shots(self, asked: int, place: int) -> list[int]:
        """Few-shot examples before a captioning sample: the next ones, in their own order, whose groups all differ."""
        groups, found = {self._groups[asked]}, list[int]()
        following = map(self._standing, self.order.take("shots", place * self.config.shots, sys.maxsize))
        while len(found) < self.config.shots:
            if self._groups[one := next(following)] not in groups:
                groups.add(self._groups[one])
                found.append(one)
        return found

    def _rows(self, drawings: list[Sequence], captionings: list[Sequence]) -> tuple[list[list[Sequence]], ...]:
        """Rows of both tasks. Each drawing has its own row, in the order of the samples, unless smaller ones share a row.
        Captions are packed with others of their lane, so that a process finds them in the row groups that it reads. All samples
        of a row have losses of one weight.
        """
        budget = self.config.pack * (1 + self.config.shots) * self._room

        def packed(samples: list[Sequence], room: int) -> list[list[Sequence]]:
            """Rows of samples, whose number varies by step if there are several weights."""
            alike = self._by_loss_weight([[sample] for sample in samples])
            return [row for part in alike.values() for row in balance([sample for (sample,) in part], room)]

        if len(self.sizes) > 1:  # a lane's pictures may have any size, so their number of rows would vary by step
            return packed(drawings, self._room), packed(captionings, budget)
        parts = self.order.by_lane("caption", captionings)
        return [[s] for s in drawings], [row for part in parts for row in packed(part, budget)]

    def _by_loss_weight(self, rows: list[list[Sequence]]) -> dict[float | None, list[list[Sequence]]]:
        """Rows by the weight of their losses, in order; all of them under None if there are no weights."""
        weights, starts = self.config.loss_weights, self.source.starts if isinstance(self.source, Mixed) else (0,)
        if not weights:
            return {None: rows}
        by_weight: dict[float | None, list[list[Sequence]]] = {}
        for row in rows:  # a sample is of the source of its last picture: those before it are solved examples
            index = next(s.index for s in reversed(row[0].segments) if isinstance(s, Awaited))
            by_weight.setdefault(weights[bisect_right(starts, index) - 1], []).append(row)
        return by_weight

    @cached_property
    def widths(self) -> tuple[int, int]:
        """Text widths of a drawing row and of a packed captioning row that fit nearly all steps, so shapes stay fixed.

        They are computed over all examples, including those left out: a resumed run, which knows these from its start, gets
        the same widths.
        """
        known, self.left_out = self.left_out, frozenset()
        steps = [self._rows(self.drawings(step), self.captionings(step)) for step in range(LOOKED_AT)]
        self.left_out = known
        draw, caption = ([_longest(rows) for rows in task] for task in zip(*steps, strict=True))
        return _up(_most(draw), 4), _up(_most(caption), 4)

    def samples(self, step: int) -> list[Sequence]:
        """The samples of a step with their pictures, unpacked, drawings first: for callers with another layout."""
        alone = [[sample] for sample in (*self.drawings(step), *self.captionings(step))]
        return [sample for (sample,) in self._filled(alone)]

    def batches(self, step: int) -> list[Batch]:
        """The batches of a step, a pure function of the step."""
        return self._packed(self.drawings(step), self.captionings(step))

    def largest(self) -> list[Batch]:
        """A step in which every sample has the longest text of the source, counted in characters.

        Tokenizing a whole data set to count tokens would delay the start. Only a wording with fewer characters but more
        tokens can make a wider step.
        """
        templates, examples = self.config.templates, self.source.examples
        wordings = [(len(c), i, c) for i, e in enumerate(examples) for c in e.captions]
        _, drawn, words = max(wordings)
        drawn = self._standing(drawn)
        words = with_article(words) if templates.article_share else words
        drawable = max(templates.questions, key=len) if templates.question_share else ""
        asked = [
            (in_json(e.question), as_json(e.captions[0]))
            if e.question and templates.json_share
            else (e.question or drawable, e.captions[0])
            for e in examples
        ]
        _, named = max((len(question) + len(answer), i) for i, (question, answer) in enumerate(asked))
        question, answer = asked[named]
        named = self._standing(named)
        draw = {s: drawing(self.ids, self.begin, words, self.drawn(drawn, s)) for s in self.sizes}
        caption = {
            s: captioning(
                self.ids,
                self.end,
                self.shown(named, s),
                answer,
                question,
                self.begin,
                [(self.shown(named, s), answer)] * self.config.shots,
            )
            for s in self.sizes
        }
        return self._packed(
            [draw[s] for s in self._sizes("draw", 0, self.config.draw)],
            [caption[s] for s in self._sizes("caption", 0, self.config.caption)],
        )

    def _packed(self, drawings: list[Sequence], captionings: list[Sequence]) -> list[Batch]:
        batches: list[Batch] = []
        for rows, width in zip(self._rows(drawings, captionings), self.widths, strict=True):
            for weight, part in self._by_loss_weight(rows).items():
                if part:
                    batch = pack(self._filled(part), text_width=_fit(width, _longest(part)))
                    batches.append(batch if weight is None else WeightedBatch(**vars(batch), loss_weight=weight))
        return batches


def order_of(source: Source, config: MixtureConfig, seed: int) -> Order:
    """The order of a mixture's samples; if pictures come in row groups, its lanes follow the rows of a step."""
    rows, each = config.caption // config.pack, config.pack
    lanes = {
        "draw": Lanes.of_rows(config.draw, 1),
        "caption": Lanes.of_rows(rows, each),
        "shots": Lanes.of_rows(rows, each * config.shots),
    }
    return Order(source, seed, lanes)


class Ahead(Generic[T]):
    """Prepares the data of the next step while this one computes; the result is a function of the step either way.

    Args:
        make: returns the data of a step.
        in_thread: prepare in a background thread. If the CPU computes the step itself, the thread only takes cores from it:
            drawing then trained a fifth slower on two cores (docs/speed.md).
    """

    def __init__(self, make: Callable[[int], T], *, in_thread: bool = True):
        self.make, self.in_thread = make, in_thread
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._next: tuple[int, Future[T]] | None = None

    def take(self, step: int) -> T:
        """The data of a step; an error of its preparation is raised here."""
        if not self.in_thread:
            return self.make(step)
        known = self._next is not None and self._next[0] == step
        # A single thread prepares everything, so `make` need not be thread-safe.
        made = (self._next[1] if known and self._next else self._pool.submit(self.make, step)).result()
        self._next = (step + 1, self._pool.submit(self.make, step + 1))
        return made

    def forget(self) -> None:
        """Drop the prepared step, because what it depends on has changed or is about to change."""
        if self._next is not None:
            wait([self._next[1]])
            self._next = None

    def close(self) -> None:
        """Stop preparing."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def default_decoders() -> int:
    """Threads that decode pictures: few, since each may hold a whole picture."""
    return min(4, os.cpu_count() or 1)


def _longest(rows: list[list[Sequence]]) -> int:
    """Text positions of the longest row."""
    return max((sum(map(text_length, row)) for row in rows), default=0)


def _most(values: list[int]) -> int:
    """The 90th percentile: one rare long caption should not make every step wide."""
    return sorted(values)[(9 * len(values) - 1) // 10]


def _fit(width: int, longest: int) -> int:
    """The width, doubled until the longest row fits: each width needs another compiled graph, so there should be few."""
    while width < longest:
        width = max(8, 2 * width)
    return width


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
