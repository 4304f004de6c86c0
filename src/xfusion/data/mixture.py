"""Which examples make up step k: a pure function of seed and step, so a resumed run continues with the next batch."""

from __future__ import annotations

import heapq
import math
import os
import random
import sys
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Iterable, Iterator
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
MOST_REHEARSED = 4
"""Widths of at most this many times the usual one are compiled ahead. Steps beyond are so rare and so large that each start would
pay more for their graphs than the run."""
MOST_HEIGHTS = 16
"""Most numbers of rows that the parts of a step have where its sources weigh their losses and so divide it: each needs
another compiled graph, so shorter parts are filled up with empty rows."""
LOOKED_AT = 40
"""Steps whose lengths are measured before the first one, to fix the shapes of a run."""
LONGEST_TOKENIZED = 200
"""Texts among which the longest in tokens is searched, the longest in characters: tokenizing all would delay the start."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PendingMedia(Media):
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
        row_slice: returns the rows of a batch whose pictures this process reads; None reads all.
        left_out: examples that cannot be read; more may be added during a run. Each is replaced by the next readable one
            of the source, so a batch stays a function of the step and of the data.
        decoders: threads that read and decode; None uses four, or the number of cores if that is less.
        context_length: positions that the base can read; None if that is not known.

    Raises:
        XFusionError: the source is empty, the captioning batch does not fill its rows, the weights are not one per source, or a
            text is too long for the base.
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
        row_slice: Callable[[int], slice | None] = lambda rows: None,
        left_out: Container[int] = frozenset(),
        decoders: int | None = None,
        context_length: int | None = None,
    ):
        if not len(source.examples):
            raise XFusionError(f"{source.spec}: no pictures to train on")
        if min(config.draw, config.caption) < 0 or config.pack < 1:
            raise XFusionError(
                f"draw {config.draw}, caption {config.caption}, pack {config.pack}: draw and caption are 0 or more samples, pack"
                " at least 1"
            )
        if config.caption % config.pack:
            multiple = -(-config.caption // config.pack) * config.pack
            raise XFusionError(
                f"caption {config.caption} is not a multiple of pack {config.pack}: give the mixture caption {multiple}, or"
                " pack 1"
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
        self.encode, self.begin, self.end, self.row_slice, self.left_out = encode, begin, end, row_slice, left_out
        self.order = order_of(source, config, seed)
        if num_grouped_sources := num_grouped(source):
            shards.make_room(num_grouped_sources * self._groups_at_once())
        self._blank = {size: torch.zeros(math.prod(image.grid(size)), image.token_width) for size in sizes}
        self._tokens: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        largest_grid = max(map(len, self._blank.values()))
        self._max_cached = max(1, TOKENS_KEPT // (largest_grid * image.token_width * 4))
        self._row_positions = largest_grid + 1
        self._ids: dict[str, tuple[int, ...]] = {}
        self._pool = ThreadPoolExecutor(max_workers=decoders or default_decoders(), thread_name_prefix="decode")
        group_numbers: dict[str, int] = {}
        self._groups = [group_numbers.setdefault(example.group, len(group_numbers)) for example in source.examples]
        self._check_groups(group_numbers.values())
        if context_length is not None:
            self._check_longest(context_length)

    def tokens(self, index: int, size: int) -> Tensor:
        """Tokens ``[M, P]`` of a picture at a size, encoded once."""
        if (index, size) not in self._tokens:
            result = self._encode((index, size))
            if isinstance(result, Unreadable):
                raise Unreadable(str(result), {index: str(result)})
            self._cache_tokens((index, size), result)
        return self._tokens[index, size]

    def _encode(self, key: tuple[int, int]) -> Tensor | Unreadable:
        index, size = key
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
            own_rows = (len(self.sizes) == 1 and self.row_slice(rows)) or slice(None)
            counts.append(len({lanes[row * (len(lanes) // rows)] for row in range(rows)[own_rows]}))
        return sum(counts) + max(counts)

    def _readable_index(self, index: int) -> int:
        """The example itself or, if it is left out, its replacement from the same source of a mixture."""
        start, end = 0, len(self.source.examples)
        if isinstance(self.source, Mixed):
            part = bisect_right(self.source.starts, index) - 1
            start, end = self.source.starts[part], self.source.starts[part + 1]
        for offset in range(end - start):
            if (candidate := start + (index - start + offset) % (end - start)) not in self.left_out:
                return candidate
        raise XFusionError(f"{self.source.spec}: of {end - start} examples none can be read")

    def _cache_tokens(self, key: tuple[int, int], encoded: Tensor) -> None:
        self._tokens[key] = encoded
        if len(self._tokens) > self._max_cached:
            self._tokens.popitem(last=False)

    def drawing_target(self, index: int, size: int) -> Media:
        """A picture as target for drawing."""
        return self._pending(index, size, state="noised", has_loss=True)

    def input_picture(self, index: int, size: int) -> Media:
        """A picture as input: clean, or noised up to a noise level and then also with a media loss."""
        cap = self.config.largest_noise
        options: dict[str, Any] = {"state": "noised", "has_loss": True, "largest_noise": cap} if cap else {}
        return self._pending(index, size, **options)

    def _pending(self, index: int, size: int, **options: Any) -> PendingMedia:
        blank = self.image.segment(self._blank[size], self.image.grid(size), group=self._groups[index], **options)
        return PendingMedia(**vars(blank), index=index, size=size)

    def _sizes(self, task: str, step: int, count: int) -> list[int]:
        """Sizes of a task's samples in a step, shuffled. The multiset is the same in every step, so shapes stay fixed; the
        first sizes get one more sample if the samples do not divide evenly.
        """
        sizes = [self.sizes[index % len(self.sizes)] for index in range(count)]
        random.Random(f"{self.seed}/{task}/sizes/{step}").shuffle(sizes)
        return sizes

    def _fill_pictures(self, rows: list[list[Sequence]]) -> list[list[Sequence]]:
        """The rows with the pictures of this process's own rows filled in; all other pictures stay blank."""
        own_rows = set(range(len(rows))[self.row_slice(len(rows)) or slice(None)])
        media = (
            segment
            for row_number in sorted(own_rows)
            for sequence in rows[row_number]
            for segment in sequence.segments
            if isinstance(segment, PendingMedia)
        )
        missing = [key for key in dict.fromkeys((item.index, item.size) for item in media) if key not in self._tokens]
        # Pillow decodes without the GIL. Results are kept outside the bounded cache, which may be smaller than one batch.
        results = dict(zip(missing, self._pool.map(self._encode, missing), strict=True))
        encoded = {key: result for key, result in results.items() if not isinstance(result, Unreadable)}
        if unreadable := {key[0]: str(result) for key, result in results.items() if isinstance(result, Unreadable)}:
            for key, result in encoded.items():
                self._cache_tokens(key, result)
            raise Unreadable(next(iter(unreadable.values())), unreadable)

        def fill(segment: Text | Media) -> Text | Media:
            if not isinstance(segment, PendingMedia):
                return segment
            key = (segment.index, segment.size)
            return replace(segment, tokens=encoded[key] if key in encoded else self.tokens(*key))

        complete_rows = [
            [Sequence(segments=tuple(map(fill, sequence.segments))) for sequence in row]
            if row_number in own_rows
            else row
            for row_number, row in enumerate(rows)
        ]
        for key, result in encoded.items():
            self._cache_tokens(key, result)
        return complete_rows

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text, cached."""
        token_ids = self._ids.get(text)
        if token_ids is None:
            token_ids = self._ids[text] = self.encode(text)
            if len(self._ids) > TEXTS_KEPT:
                self._ids.pop(next(iter(self._ids)))
        return token_ids

    def _samples_of(self, task: str, step: int, count: int) -> Iterator[tuple[int, int]]:
        """Example and size of each sample of a task in a step."""
        indices = map(self._readable_index, self.order.take(task, step * count, count))
        return zip(indices, self._sizes(task, step, count), strict=True)

    def drawings(self, step: int) -> list[Sequence]:
        """The drawing sequences of a step."""
        rng, count = random.Random(f"{self.seed}/draw/words/{step}"), self.config.draw
        sample_prompt = self.config.templates.drawing_words
        return [
            drawing(self.ids, self.begin, sample_prompt(self.source.examples[i], rng), self.drawing_target(i, size))
            for i, size in self._samples_of("draw", step, count)
        ]

    def captionings(self, step: int) -> list[Sequence]:
        """The captioning sequences of a step."""
        rng = random.Random(f"{self.seed}/caption/words/{step}")
        count, examples = self.config.caption, self.source.examples
        # Sampled for every sample, so that one sample's question does not depend on whether the data has one for another.
        templates = self.config.templates
        questions = [templates.question(rng) for _ in range(count)]
        json_rng = random.Random(f"{self.seed}/caption/json/{step}")
        sequences = []
        for position, ((i, size), question) in enumerate(
            zip(self._samples_of("caption", step, count), questions, strict=True)
        ):
            answer, own_question = examples[i].captions[0], examples[i].question
            question, answer = (
                templates.question_and_answer(own_question, answer, json_rng) if own_question else (question, answer)
            )
            shots = [
                (self.input_picture(j, size), examples[j].question or "", examples[j].captions[0])
                for j in self._shots(i, step * count + position)
            ]
            sequences.append(
                captioning(self.ids, self.end, self.input_picture(i, size), answer, question, self.begin, shots)
            )
        return sequences

    def _shots(self, index: int, position: int) -> list[int]:
        """Few-shot examples before a captioning sample: the next ones, in their own order, whose groups all differ.

        Raises:
            XFusionError: too few groups have a readable example.
        """
        groups, shots, num_tried = {self._groups[index]}, list[int](), 0
        candidates = map(self._readable_index, self.order.take("shots", position * self.config.shots, sys.maxsize))
        while len(shots) < self.config.shots:
            if num_tried == len(self._groups):  # or the search might never end
                self._check_groups({g for i, g in enumerate(self._groups) if i not in self.left_out})
            if self._groups[candidate := next(candidates)] not in groups:
                groups.add(self._groups[candidate])
                shots.append(candidate)
            num_tried += 1
        return shots

    def _check_groups(self, groups: Collection[int]) -> None:
        if self.config.caption and self.config.shots >= len(groups):
            raise XFusionError(
                f"{self.source.spec}: {self.config.shots} shots and the picture behind them are of as many groups, but there are"
                f" {len(groups)}: take fewer shots or more pictures"
            )

    def _check_longest(self, context_length: int) -> None:
        """Refuse the longest texts of the source (`_longest_texts`) if a sample with them is longer than the base can read."""
        tasks = zip((self.config.draw, self.config.caption), self._longest_texts, self._longest_samples(), strict=True)
        for count, (index, _), samples in tasks:
            for sample in samples.values() if count else ():
                batch = pack([[sample]])
                tables = batch.text, *(media.rows for media in batch.media.values())
                positions = 1 + max(int(rows.position.max()) for rows in tables if rows.position.numel())
                if positions > context_length:
                    raise XFusionError(
                        f"{self.source.examples[index].origin}: with its text a sample takes {positions} positions, of which"
                        f" {text_length(sample)} are text; the base reads {context_length}: shorten the text, or leave it out"
                    )

    def _rows(self, drawings: list[Sequence], captionings: list[Sequence]) -> tuple[list[list[Sequence]], ...]:
        """Rows of both tasks. Each drawing has its own row, in the order of the samples, unless smaller ones share a row.
        Captions are packed with others of their lane, so that a process finds them in the row groups that it reads. All samples
        of a row have losses of one weight.
        """
        budget = self.config.pack * (1 + self.config.shots) * self._row_positions

        def balance_by_weight(samples: list[Sequence], row_budget: int) -> list[list[Sequence]]:
            """Balanced rows of samples of one loss weight each; with several weights, the number of rows varies by step."""
            groups = self._by_loss_weight([[sample] for sample in samples])
            return [row for group in groups.values() for row in balance([sample for (sample,) in group], row_budget)]

        if len(self.sizes) > 1:  # a lane's pictures may have any size, so their number of rows would vary by step
            return balance_by_weight(drawings, self._row_positions), balance_by_weight(captionings, budget)
        lanes = self.order.group_by_lane("caption", captionings)
        return [[s] for s in drawings], [row for part in lanes for row in balance_by_weight(part, budget)]

    def _by_loss_weight(self, rows: list[list[Sequence]]) -> dict[float | None, list[list[Sequence]]]:
        """Rows by the weight of their losses, in order; all of them under None if there are no weights."""
        weights, starts = self.config.loss_weights, self.source.starts if isinstance(self.source, Mixed) else (0,)
        if not weights:
            return {None: rows}
        by_weight: dict[float | None, list[list[Sequence]]] = {}
        for row in rows:  # a sample is of the source of its last picture: those before it are solved examples
            index = next(s.index for s in reversed(row[0].segments) if isinstance(s, PendingMedia))
            by_weight.setdefault(weights[bisect_right(starts, index) - 1], []).append(row)
        return by_weight

    @cached_property
    def widths(self) -> tuple[int, int]:
        """Text widths of a drawing row and of a packed captioning row that fit nearly all steps, so shapes stay fixed.

        They are computed over all examples, including those left out: a resumed run, which knows these from its start, gets
        the same widths.
        """
        left_out, self.left_out = self.left_out, frozenset()
        try:
            steps = [self._rows(self.drawings(step), self.captionings(step)) for step in range(LOOKED_AT)]
        finally:
            self.left_out = left_out
        draw, caption = ([_longest(rows) for rows in task] for task in zip(*steps, strict=True))
        return _round_up(_ninetieth_percentile(draw), 4), _round_up(_ninetieth_percentile(caption), 4)

    @cached_property
    def further_widths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Text widths of both tasks for rare longer steps, narrowest first: twice the usual one, and one that fits a usual row
        with the longest text of the source in it. Empty where no row can be longer than usual, or there are no rows.
        """
        longest = (max(map(text_length, samples.values())) for samples in self._longest_samples())
        draw, caption = (
            _further_widths(width, length, per_row if len(self.sizes) == 1 else None) if width else ()
            for width, length, per_row in zip(self.widths, longest, (1, self.config.pack), strict=True)
        )
        return draw, caption

    def samples(self, step: int) -> list[Sequence]:
        """The samples of a step with their pictures, unpacked, drawings first: for callers with another layout."""
        rows = [[sample] for sample in (*self.drawings(step), *self.captionings(step))]
        return [sample for (sample,) in self._fill_pictures(rows)]

    def batches(self, step: int) -> list[Batch]:
        """The batches of a step, a pure function of the step."""
        return self._pack_rows(self.drawings(step), self.captionings(step))

    def largest(self) -> list[Batch]:
        """A step in which every sample has the longest text of the source."""
        drawings, captionings = self._longest_samples()
        return self._pack_rows(
            [drawings[size] for size in self._sizes("draw", 0, self.config.draw)],
            [captionings[size] for size in self._sizes("caption", 0, self.config.caption)],
        )

    def wide_batches(self) -> Iterator[Batch]:
        """The batches of a usual step with blank pictures, at each of the `further_widths` that is not far wider than usual:
        each needs its own compiled graphs. None for sources that weigh their losses, which divide a step into parts of many
        heights.
        """
        if self.config.loss_weights:
            return
        for task, (width, further) in enumerate(zip(self.widths, self.further_widths, strict=True)):
            steps = (self._rows(self.drawings(step), self.captionings(step))[task] for step in range(LOOKED_AT))
            rows = next((rows for rows in steps if _longest(rows) <= width), None)
            if rows:
                yield from (pack(rows, text_width=wide) for wide in further if wide <= MOST_REHEARSED * max(width, 8))

    def _longest_samples(self) -> tuple[dict[int, Sequence], dict[int, Sequence]]:
        """Picture size -> a drawing sample and a captioning sample with the longest text of the source."""
        (draw_index, prompt), (caption_index, (question, answer)) = self._longest_texts
        own_question = (
            self.source.examples[caption_index].question or ""
        )  # also where another picture stands in for its own
        draw_index, caption_index = map(self._readable_index, (draw_index, caption_index))
        drawings = {
            size: drawing(self.ids, self.begin, prompt, self.drawing_target(draw_index, size)) for size in self.sizes
        }
        captionings = {
            size: captioning(
                self.ids,
                self.end,
                self.input_picture(caption_index, size),
                answer,
                question,
                self.begin,
                [(self.input_picture(caption_index, size), own_question, answer)] * self.config.shots,
            )
            for size in self.sizes
        }
        return drawings, captionings

    @cached_property
    def _longest_texts(self) -> tuple[tuple[int, str], tuple[int, tuple[str, str]]]:
        """Example and prompt of a drawing sample, example, question and answer of a captioning sample: the longest in tokens."""
        templates, examples = self.config.templates, self.source.examples

        def longest(texts: Iterable[tuple[int, T]], words: Callable[[T], str]) -> tuple[int, T]:
            candidates = heapq.nlargest(LONGEST_TOKENIZED, texts, key=lambda text: len(words(text[1])))
            return max(candidates, key=lambda text: len(self.encode(words(text[1]))))

        index, prompt = longest(((i, c) for i, e in enumerate(examples) for c in e.captions), str)
        longest_question = max(templates.questions, key=len) if templates.question_share else ""
        dialogues = (
            (in_json(e.question), as_json(e.captions[0]))
            if e.question and templates.json_share
            else (e.question or longest_question, e.captions[0])
            for e in examples
        )
        return (index, with_article(prompt) if templates.article_share else prompt), longest(
            enumerate(dialogues), " ".join
        )

    def _pack_rows(self, drawings: list[Sequence], captionings: list[Sequence]) -> list[Batch]:
        batches: list[Batch] = []
        num_rows = self.config.draw, self.config.caption // self.config.pack
        tasks = self._rows(drawings, captionings), self.widths, self.further_widths, num_rows
        for rows, width, further, whole in zip(*tasks, strict=True):
            multiple = -(-whole // MOST_HEIGHTS)
            for weight, part in self._by_loss_weight(rows).items():
                if part:
                    if weight is not None:
                        part = part + [[]] * (-len(part) % multiple)
                    batch = pack(self._fill_pictures(part), text_width=_fit([width, *further], _longest(part)))
                    batches.append(batch if weight is None else WeightedBatch(**vars(batch), loss_weight=weight))
        return batches


def order_of(source: Source, config: MixtureConfig, seed: int) -> Order:
    """The order of a mixture's samples; if pictures come in row groups, its lanes follow the rows of a step."""
    rows, per_row = config.caption // config.pack, config.pack
    lanes = {
        "draw": Lanes.of_rows(config.draw, 1),
        "caption": Lanes.of_rows(rows, per_row),
        "shots": Lanes.of_rows(rows, per_row * config.shots),
    }
    return Order(source, seed, lanes)


class Prefetcher(Generic[T]):
    """Prepares the data of the next step while this one computes; the result is a function of the step either way.

    Args:
        make: returns the data of a step.
        in_thread: prepare in a background thread. If the CPU computes the step itself, the thread only takes cores from it:
            drawing then trained a fifth slower on two cores (docs/speed.md).
    """

    def __init__(self, make: Callable[[int], T], *, in_thread: bool = True):
        self.make, self.in_thread = make, in_thread
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._prepared: tuple[int, Future[T]] | None = None

    def take(self, step: int) -> T:
        """The data of a step; an error of its preparation is raised here."""
        if not self.in_thread:
            return self.make(step)
        is_prepared = self._prepared is not None and self._prepared[0] == step
        # A single thread prepares everything, so `make` need not be thread-safe.
        data = (self._prepared[1] if is_prepared and self._prepared else self._pool.submit(self.make, step)).result()
        self._prepared = (step + 1, self._pool.submit(self.make, step + 1))
        return data

    def forget(self) -> None:
        """Drop the prepared step, because what it depends on has changed or is about to change."""
        if self._prepared is not None:
            wait([self._prepared[1]])
            self._prepared = None

    def close(self) -> None:
        """Stop preparing."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def default_decoders() -> int:
    """Threads that decode pictures: few, since each may hold a whole picture."""
    return min(4, os.cpu_count() or 1)


def _longest(rows: list[list[Sequence]]) -> int:
    """Text positions of the longest row."""
    return max((sum(map(text_length, row)) for row in rows), default=0)


def _ninetieth_percentile(values: list[int]) -> int:
    """The 90th percentile: one rare long caption should not make every step wide."""
    return sorted(values)[(9 * len(values) - 1) // 10]


def _fit(widths: list[int], longest: int) -> int:
    """The narrowest width that fits the longest row: each needs another compiled graph, so there are few. Beyond the last it is
    doubled.
    """
    return next((width for width in widths if width >= longest), _doubled(widths[-1], longest))


def _doubled(width: int, longest: int) -> int:
    while width < longest:
        width = max(8, 2 * width)
    return width


def _further_widths(width: int, longest: int, per_row: int | None) -> tuple[int, ...]:
    """Twice a width, and what fits a usual row with the longest text added; or a row of only such, if that is shorter."""
    most = width + longest if per_row is None else min(width + longest, per_row * longest)
    return tuple(dict.fromkeys((_doubled(width, width + 1), _doubled(width, most)))) if most > width else ()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
