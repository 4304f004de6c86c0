"""Sampling: lists of segments in, generated segments out; drawing, captioning, scoring.

Text before a picture is computed once per prompt and kept as keys and values; a denoising step then runs the media
tower's rows of the picture alone. Every item has a generator of its own, so a batch gives the pictures of its singles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from PIL import Image as PILImage
from torch import Tensor

from xfusion.backbone import Cache
from xfusion.data.pack import pack
from xfusion.data.requests import PICTURE
from xfusion.data.sequence import Audio, Batch, Image, Media, MediaRows, Rows, Sequence, Sound, Text, XFusionError
from xfusion.data.templates import opened, question_text
from xfusion.modalities.audio import AudioModality
from xfusion.model import Model
from xfusion.objectives.solvers import Solver

Progress = Callable[[int, int, Tensor | None], None]
"""Called with steps done, steps in all, and the current clean estimate ``[N, M, P]`` while drawing."""
Listener = Callable[[int, int], bool]
"""Called with the number of a list and each token of its answer as it is chosen; False ends that answer."""

MAX_PROMPT_TOKENS = 2048
BATCH = 64
"""Items per forward pass when many are asked for."""
LENGTH_GROUPS = 4
"""Groups of like length that candidate answers are scored in."""

Segment = str | Text | PILImage.Image | Image | Sound | Audio
Shown = PILImage.Image | Sound
"""What a model is shown: a picture or a sound, whichever it knows."""
DrawMode = Literal["never", "auto", "always"]
"""Whether answers open with a picture: not at all, where one is asked for, at every turn."""
Message = dict[str, Any]
"""A turn of a conversation: ``role``, and ``content``, words or a list of words, pictures and sounds."""


def _encode_prompt(model: Model, text: str | Text) -> tuple[int, ...]:
    ids = text.ids if isinstance(text, Text) else model.backbone.encode(text)
    limit = min(MAX_PROMPT_TOKENS, getattr(model.backbone.config, "max_position_embeddings", MAX_PROMPT_TOKENS))
    if len(ids) > limit:
        raise XFusionError(f"the prompt has {len(ids)} tokens, more than the {limit} that are allowed: shorten it")
    return ids


def refuse_to_draw(model: Model) -> None:
    """Refuse a model that cannot draw.

    Raises:
        XFusionError: it learned something else.
    """
    if "draw" not in model.capabilities:
        raise XFusionError(
            f"this model cannot draw, only {', '.join(sorted(model.capabilities))}: train one with a media objective, such"
            " as the recipe xfusion"
        )


def draw_size(model: Model, size: int | None) -> tuple[int, int]:
    """The size that a picture is drawn at and the size that it is returned at.

    A picture is drawn at the nearest size that the model was made for and resized; beyond 4 times that is refused.
    """
    sizes = model.image.sizes
    if size is None:
        return sizes[0], sizes[0]
    if size < 1:
        raise XFusionError(f"picture size {size} must be at least 1 pixel")
    native = min(sizes, key=lambda s: (abs(s - size), s))
    if not native / 4 <= size <= 4 * native:
        legal = ", ".join(f"{-(-s // 4)} to {4 * s}" for s in sizes)
        raise XFusionError(f"picture size {size} is out of reach of the trained sizes {sizes}: choose {legal} pixels")
    return native, size


@torch.no_grad()
def draw_tokens(
    model: Model,
    contexts: Seq[tuple[Text | Media, ...]],
    size: int,
    *,
    seeds: Seq[int],
    steps: int,
    guidance: float | None,
    known: Tensor | None = None,
    keep: Tensor | None = None,
    solver: Solver | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Draw one picture behind each context, or make one sound's codes.

    Args:
        model: a model that can draw.
        contexts: what stands before each picture.
        size: one that the model was made for: a side in pixels, or a number of frames.
        seeds: one per picture; the noise of a picture depends on nothing else.
        steps: steps from noise to picture.
        guidance: classifier-free guidance; 1 is off, None takes the model's own. The other end is no context.
        known: clean tokens ``[N, M, P]`` of which some are kept.
        keep: which tokens are kept, bool ``[N, M]``.
        solver: takes the steps; None takes the model's own.
        progress: told after every step.

    Returns:
        tokens ``[N, M, P]``.
    """
    refuse_to_draw(model)
    grid, name = model.modality.grid(size), model.modality.name
    count, width = grid[0] * grid[1], model.modality.token_width
    device = model.device
    # Drawn on the CPU, so that a seed means the same picture on every device.
    noise = torch.stack([torch.randn(count, width, generator=torch.Generator().manual_seed(s)) for s in seeds])
    blank = model.modality.segment(torch.zeros(count, width), grid, state="noised")
    scale = model.guidance if guidance is None else guidance
    guided = scale != 1
    prompts = [(*opened(model.backbone.begin_ids, context), blank) for context in contexts]
    if guided:
        prompts += [(blank,) for _ in contexts]
    batch = pack([[Sequence(segments=segments)] for segments in prompts]).to(device)
    media = batch.media[name]
    cache = model.backbone.new_cache(model.fusion.num_towers, len(prompts))

    # The target's tokens are the last of each row; what lies before them (context pictures, [BOI]) goes in first.
    is_target = media.item == media.item.amax(dim=1, keepdim=True)
    columns = is_target.int().argsort(dim=1, stable=True)
    before, columns = _pick(media, columns[:, :-count]), columns[:, -count:]
    _, run = model.run_pass(replace(batch, media={name: before}), cache=cache, update=True)
    # The last of these rows is the target's [BOI]; padding has the order -1.
    begin = run.states[name].gather(
        1, before.rows.order.argmax(dim=1)[:, None, None].expand(-1, 1, model.backbone.hidden_size)
    )

    target = _pick(media, columns)
    # What belongs to an item is counted anew: context pictures are no longer among them.
    item = torch.arange(len(prompts), device=device)
    target = replace(target, item=item[:, None].expand(-1, count).contiguous(), noised=item >= 0)
    step = replace(batch, text=batch.text.none(), text_ids=batch.text_ids[:, :0])
    predict = _Drawing(model=model, step=step, target=target, cache=cache, begin=begin, scale=scale)

    x = noise = noise.to(device)
    asked: dict[str, Any] = {} if solver is None else {"solver": solver}
    if known is not None and keep is not None:
        asked |= {"known": known.to(device), "keep": keep.to(device)}
    walk = model.media_objective.sample(predict, noise, steps=steps, **asked)
    total = model.media_objective.num_steps(steps, count)
    for done, (current, estimate) in enumerate(walk, start=1):
        x = current
        if progress:
            progress(done, total, estimate)
    return x


@dataclass(kw_only=True)
class _Drawing:
    """The model as an objective draws with it (`xfusion.objectives.base.Drawer`), behind cached contexts."""

    model: Model
    step: Batch
    """A batch without text."""
    target: MediaRows
    """The items that are drawn; under guidance once behind their contexts and once behind none."""
    cache: Cache
    begin: Tensor
    """Final states ``[B, 1, D]`` of [BOI]."""
    scale: float
    """Strength of guidance; 1 is off."""
    done: int = 0
    """Tokens of each item that stand in the cache."""

    def __call__(self, x: Tensor, time: float) -> Tensor:
        """The head at all tokens ``[N, M, P]`` at a noise level -> ``[N, M, Q]``; the cache stays."""
        return self._guided(self._states(self.target, x, time, update=False))

    def following(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """The head at the last position, ``[N, Q]``, once finished tokens ``[N, k, P]`` stand behind the others."""
        if not tokens.shape[1]:
            return self._guided(self.begin)[:, 0]
        behind = torch.arange(self.done, self.done + tokens.shape[1], device=tokens.device)
        columns = behind if places is None else places.clamp(min=0)
        rows = _pick(self.target, columns.expand(self.begin.shape[0], -1))
        if places is not None:  # where a token lies in the grid is its place's, when it is read is its turn's
            first, both = self.target.rows, self.target.rows.columns(slice(0, 2)).position
            step = both[:, -1:] - both[:, :1]
            turn = replace(rows.rows, order=first.order[:, :1] + behind, position=both[:, :1] + step * behind)
            rows = replace(rows, rows=turn)
        self.done += tokens.shape[1]
        return self._guided(self._states(rows, tokens, 0.0, update=True)[:, -1:])[:, 0]

    def _states(self, rows: MediaRows, tokens: Tensor, time: float, *, update: bool) -> Tensor:
        tokens = tokens if self.scale == 1 else torch.cat([tokens, tokens])
        view = replace(rows, tokens=tokens, time=torch.full((len(tokens),), time, device=tokens.device))
        name = self.model.modality.name
        batch = replace(self.step, media={name: view})
        return self.model.run_pass(batch, cache=self.cache, update=update)[1].states[name]

    def _guided(self, states: Tensor) -> Tensor:
        prediction = self.model.port.readout(states).float()
        if self.scale == 1:
            return prediction
        with_words, without = prediction.chunk(2)
        return without + self.scale * (with_words - without)


def _pick(media: MediaRows, columns: Tensor) -> MediaRows:
    """Chosen columns ``[B, k]`` of each row."""

    def take(t: Tensor) -> Tensor:
        return t.gather(1, columns) if t.ndim == 2 else t.gather(1, columns[..., None].expand(-1, -1, t.shape[2]))

    rows = Rows(**{name: take(getattr(media.rows, name)) for name in media.rows.__dataclass_fields__})
    names = ("tokens", "item", "boundary", "grid_row", "grid_column")
    return replace(media, rows=rows, **{name: take(getattr(media, name)) for name in names})


def draw(
    model: Model,
    prompts: Seq[str],
    *,
    size: int | None = None,
    seed: int = 0,
    seeds: Seq[int] | None = None,
    steps: int = 25,
    guidance: float | None = None,
    solver: Solver | None = None,
    progress: Progress | None = None,
) -> list[PILImage.Image]:
    """Draw a picture for each prompt.

    Args:
        model: a model that can draw.
        prompts: words; an empty prompt draws without guidance.
        size: output side in pixels (None: the trained size).
        seed: picture i has the seed ``seed + i``.
        seeds: one seed per picture instead.
        steps: steps from noise to picture.
        guidance: classifier-free guidance scale; None takes the model's own.
        solver: takes the steps (`xfusion.objectives.solvers`); None takes the model's own.
        progress: told after every step of every batch.
    """
    chosen = list(seeds) if seeds is not None else [seed + i for i in range(len(prompts))]
    if len(chosen) != len(prompts):
        raise XFusionError(f"{len(chosen)} seeds for {len(prompts)} prompts: give one each")
    native, wanted = draw_size(model, size)
    contexts = [_text_segment(model, prompt) for prompt in prompts]
    out: list[PILImage.Image] = []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        tokens = draw_tokens(
            model,
            contexts[part],
            native,
            seeds=chosen[part],
            steps=steps,
            guidance=guidance,
            solver=solver,
            progress=progress,
        )
        out += _pictures(model, tokens, native, wanted)
    return out


def inpaint(
    model: Model,
    picture: PILImage.Image,
    mask: PILImage.Image,
    prompt: str,
    *,
    seed: int = 0,
    steps: int = 25,
    guidance: float | None = None,
    progress: Progress | None = None,
) -> PILImage.Image:
    """Draw a part of a picture anew and keep the rest.

    Args:
        model: a model that can draw.
        picture: what to change; cut to its middle square at the trained size.
        mask: white where to draw anew, of the picture's size; a token is redrawn if any of its pixels is white.
        prompt: what the whole picture shall show.
        seed: of the noise.
        steps: steps from noise to picture.
        guidance: classifier-free guidance scale; None takes the model's own.
        progress: told after every step.

    Raises:
        XFusionError: picture and mask differ in size.
    """
    return inpaint_batch(
        model, [(picture, mask, prompt)], seeds=[seed], steps=steps, guidance=guidance, progress=progress
    )[0]


def inpaint_batch(
    model: Model,
    items: Seq[tuple[PILImage.Image, PILImage.Image, str]],
    *,
    seeds: Seq[int],
    steps: int = 25,
    guidance: float | None = None,
    progress: Progress | None = None,
) -> list[PILImage.Image]:
    """`inpaint` for many: a picture, a mask and a prompt each, with a seed each."""
    for picture, mask, _ in items:
        if picture.size != mask.size:
            raise XFusionError(f"the picture has {picture.size} pixels, the mask {mask.size}: give both the same size")
    size = model.image.sizes[0]
    known = model.image.encode([picture for picture, _, _ in items], size)
    masks = model.image.from_pil([mask.convert("RGB") for _, mask, _ in items], size)
    white = masks.amax(dim=1) > 0  # [N, size, size]
    rows, columns = model.image.grid(size)
    redrawn = white.view(-1, rows, size // rows, columns, size // columns).any(dim=4).any(dim=2).flatten(1)
    tokens = draw_tokens(
        model,
        [_text_segment(model, prompt) for _, _, prompt in items],
        size,
        seeds=seeds,
        steps=steps,
        guidance=guidance,
        known=known,
        keep=~redrawn,
        progress=progress,
    )
    return _pictures(model, tokens, size, size)


def _text_segment(model: Model, text: str | Text) -> tuple[Text, ...]:
    ids = _encode_prompt(model, text)
    return (Text(ids=ids),) if ids else ()


def _pictures(model: Model, tokens: Tensor, native: int, wanted: int) -> list[PILImage.Image]:
    pictures = model.image.to_pil(model.image.decode(tokens, native))
    if wanted == native:
        return pictures
    return [p.resize((wanted, wanted), PILImage.Resampling.BICUBIC) for p in pictures]


def _codes(model: Model, tokens: Tensor, frames: int) -> list[Tensor]:
    """The codes of sounds, int64 ``[frames]`` each: there is nothing that would make waves of them."""
    return list(model.modality.decode(tokens, frames)[..., 0].round().long().cpu())


def _media_segment(model: Model, shown: Seq[Shown], size: int | None = None) -> list[Media]:
    media = model.modality
    wanted = media.sizes[0] if size is None else size
    if wanted not in media.sizes:
        raise XFusionError(
            f"pictures of {wanted} px cannot be read: the model was made for {', '.join(map(str, media.sizes))} px,"
            " choose one of these"
        )
    return [media.segment(t, media.grid(wanted)) for t in media.encode(list(shown), wanted).cpu()]


# -------------------------------------------------------------------------------------------------------------- text


@torch.no_grad()
def answer_tokens(
    model: Model,
    contexts: Seq[tuple[Text | Media, ...]],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seeds: Seq[int],
    allowed: Seq[tuple[int, ...]] | None = None,
    listen: Listener | None = None,
) -> list[list[int]]:
    """Continue contexts that hold media with text, with keys and values kept per tower.

    With ``allowed`` every answer is one of these token sequences: at each step no token can be chosen but those with which one
    of them goes on. An answer ends where it is one of them and the end token is chosen, or none goes on.
    """
    # An empty text behind the media makes [EOI] appear: the first word is read from it.
    prompts = [c if isinstance(c[-1], Text) else (*c, Text(ids=())) for c in contexts]
    prompts = [opened(model.backbone.begin_ids, prompt) for prompt in prompts]
    batch = pack([[Sequence(segments=segments)] for segments in prompts]).to(model.device)
    cache = model.backbone.new_cache(model.fusion.num_towers, len(prompts))
    hidden, run = model.run_pass(batch, cache=cache, update=True)
    rows = torch.arange(len(prompts), device=model.device)
    tail = batch.text.order.argmax(dim=1)
    logits = model.engine.backbone.logits(hidden[:, run.slices["text"]][rows, tail][:, None])[:, 0]
    order = cache.rows.order.amax(dim=1).cpu()
    position = cache.rows.position.amax(dim=1).cpu()
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    ends = set(model.backbone.end_ids)
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for done in range(max_tokens):
        if allowed is not None:
            logits = _restricted(logits, answers, allowed, model.backbone.end_ids[0])
        token = model.text_objective.choose(logits.cpu(), temperature, top_p, generators)
        for i in sorted(open_rows):
            if int(token[i]) in ends:
                open_rows.discard(i)
            else:
                answers[i].append(int(token[i]))
                if listen and not listen(i, int(token[i])):
                    open_rows.discard(i)
        if not open_rows or done == max_tokens - 1:
            break
        order, position = order + 1, position + 1
        flag = torch.zeros(len(prompts), 1, dtype=torch.bool)
        table = Rows(
            order=order[:, None],
            sample=torch.zeros_like(order)[:, None],
            position=position[:, None],
            segment=torch.full_like(order, 1 << 20)[:, None],
            bidirectional=flag,
            visible_to_later=~flag,
            after_media=~flag,
        )
        following = Batch(text=table, text_ids=token[:, None], labels=token[:, None])
        hidden, _ = model.run_pass(following.to(model.device), cache=cache, update=True)
        logits = model.engine.backbone.logits(hidden)[:, 0]
    return answers


def _restricted(logits: Tensor, answers: Seq[Seq[int]], allowed: Seq[tuple[int, ...]], end: int) -> Tensor:
    """Logits ``[B, V]`` in which only tokens stand with which an answer so far becomes one of those that are allowed."""
    out = torch.full_like(logits, -torch.inf)
    for row, so_far in enumerate(answers):
        chosen = torch.tensor(_going_on(so_far, allowed, end), device=logits.device)
        out[row, chosen] = logits[row, chosen]
    return out


def _going_on(so_far: Seq[int], allowed: Seq[tuple[int, ...]], end: int) -> list[int]:
    """Tokens with which an answer so far becomes the beginning of one that is allowed; ``end`` where it is one."""
    done, begun = len(so_far), tuple(so_far)
    further = {one[done] for one in allowed if len(one) > done and one[:done] == begun}
    return sorted(further | ({end} if not further or begun in allowed else set()))


LARGEST_SCHEMA = 4096
"""Answers that a schema may allow: they are written out, so that decoding is exact."""


def schema_answers(schema: dict[str, Any]) -> list[str]:
    """All JSON texts that a schema allows: an object of required properties, each ``enum``, ``const``, ``boolean``, ``null`` or
    an ``integer`` from ``minimum`` to ``maximum``; objects may stand in objects.

    Raises:
        XFusionError: the schema says something else, allows nothing, or more than `LARGEST_SCHEMA` texts.
    """
    known = {"type", "enum", "const", "minimum", "maximum", "properties", "required", "additionalProperties", "title"}
    known |= {"description", "$schema"}
    if unknown := sorted(set(schema) - known):
        raise XFusionError(f"schema: {unknown[0]!r} is not understood; it may have {', '.join(sorted(known))}")
    kind = schema.get("type")
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else list(schema["enum"])
        _small(len(values))
        found = [json.dumps(value, ensure_ascii=False) for value in values]
    elif kind in ("boolean", "null"):
        found = ["true", "false"] if kind == "boolean" else ["null"]
    elif kind == "integer":
        if not {"minimum", "maximum"} <= set(schema):
            raise XFusionError("schema: an integer needs minimum and maximum, so that its values can be written out")
        low, high = math.ceil(schema["minimum"]), math.floor(schema["maximum"])
        _small(high - low + 1)
        found = [str(value) for value in range(low, high + 1)]
    elif kind == "object":
        properties = schema.get("properties") or {}
        if missing := sorted(set(properties) - set(schema.get("required", properties))):
            raise XFusionError(f"schema: property {missing[0]!r} is optional: name it in required, or leave it out")
        found = ["{"]
        for number, (name, inner) in enumerate(properties.items()):
            values = schema_answers(inner)
            _small(len(found) * len(values))
            head = f"{', ' if number else ''}{json.dumps(name, ensure_ascii=False)}: "
            found = [f"{text}{head}{value}" for text in found for value in values]
        found = [f"{text}}}" for text in found]
    else:
        raise XFusionError(f"schema: type {kind!r} is not one of object, integer, boolean, null, or an enum")
    if not found:
        raise XFusionError("schema: it allows no answer")
    return found


def _small(count: int) -> None:
    if not 0 < count <= LARGEST_SCHEMA:
        raise XFusionError(f"schema: it allows {count} answers, from 1 to {LARGEST_SCHEMA} can be written out")


def answer_json(
    model: Model,
    pictures: Seq[PILImage.Image],
    question: str,
    schema: dict[str, Any],
) -> list[dict[str, Any]]:
    """Answers about pictures as JSON values of a schema (`schema_answers`), greedily: no other text can be said.

    Args:
        model: a model that can caption.
        pictures: any size.
        question: what to ask, or nothing.
        schema: which answers there are.
    """
    given = [[picture, question.strip()] if question.strip() else [picture] for picture in pictures]
    return [json.loads(answer[-1]) for answer in generate(model, given, schema=schema)]


def caption(
    model: Model,
    pictures: Seq[Shown],
    *,
    question: str = "",
    size: int | None = None,
    max_tokens: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Say what pictures show, or sounds say.

    Args:
        model: a model that can caption.
        pictures: any size; cut to the middle square and resized as in training. Or sounds, for a model that hears.
        question: what to ask, or nothing.
        size: side in pixels that pictures are read at, one that the model was made for (None: the first).
        max_tokens: longest answer.
        temperature: 0 is greedy.
        top_p: nucleus sampling.
        seed: answer i has the seed ``seed + i``.
    """
    asked = model.backbone.encode(question_text(question))
    tail: tuple[Text, ...] = (Text(ids=asked),) if asked else ()
    out: list[str] = []
    for start in range(0, len(pictures), BATCH):
        contexts = [(media, *tail) for media in _media_segment(model, pictures[start : start + BATCH], size)]
        seeds = [seed + start + i for i in range(len(contexts))]
        ids = answer_tokens(model, contexts, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seeds=seeds)
        out += [model.backbone.decode(i).strip() for i in ids]
    return out


@torch.no_grad()
def score_names(
    model: Model,
    pictures: Seq[Shown] | None,
    names: Seq[str],
    *,
    size: int | None = None,
    question: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Mean log-likelihood per token (end token included) of each name after each picture.

    Args:
        model: a model that can caption.
        pictures: or sounds; None scores the names behind an empty picture slot: [EOI] alone.
        names: candidate answers.
        size: side in pixels that pictures are read at, one that the model was made for (None: the first).
        question: what stands between picture and answer, or nothing.
        progress: told pictures done and in all.

    Returns:
        float32 ``[pictures, names]``, one row without pictures.
    """
    asked, end = model.backbone.encode(question_text(question)), model.backbone.end_ids[0]
    answers = [(*model.backbone.encode(name), end) for name in names]
    ranked = sorted(range(len(answers)), key=lambda i: len(answers[i]))
    width = -(-len(ranked) // LENGTH_GROUPS)  # names of like length go through together: less padding
    groups = [ranked[start : start + width] for start in range(0, len(ranked), width)]
    media = _media_segment(model, pictures, size) if pictures is not None else [None]
    out = torch.empty(len(media), len(names))
    for done, item in enumerate(media, start=1):
        cache, first = _before_answers(model, item, asked)
        for group in groups:
            out[done - 1, group] = _mean_likelihood(model, cache, first, [answers[i] for i in group]).cpu()
        if progress:
            progress(done, len(media))
    return out


def _before_answers(model: Model, item: Media | None, asked: tuple[int, ...] = ()) -> tuple[Cache, Tensor]:
    """Keys and values of a picture, its [EOI] and a question, and the log-probabilities ``[V]`` of the first token behind it."""
    blank = model.modality.segment(torch.zeros(1, model.modality.token_width), (1, 1))
    prompt = opened(model.backbone.begin_ids, (item or blank, Text(ids=asked)))
    batch = pack([[Sequence(segments=prompt)]]).to(model.device)
    if item is None:  # the end-of-media row without what stands before it, as if the picture were not there
        place = torch.arange(batch.text.count, device=model.device)[None]
        batch = replace(batch, media={}, text=replace(batch.text, order=place, position=place))
    cache = model.backbone.new_cache(model.fusion.num_towers, 1)
    hidden, run = model.run_pass(batch, cache=cache, update=True)
    logits = model.engine.backbone.logits(hidden[:, run.slices["text"]][:, -1:])
    return cache, logits.float().log_softmax(dim=-1)[0, 0]


def _mean_likelihood(model: Model, cache: Cache, first: Tensor, answers: Seq[tuple[int, ...]]) -> Tensor:
    """Mean log-likelihood per token of each answer behind a cached beginning, ``[answers]``."""
    device, count, length = model.device, len(answers), max(map(len, answers))
    ids = torch.tensor([[*a[:-1], *[0] * (length - len(a))] for a in answers], dtype=torch.int64, device=device)
    labels = torch.tensor([[*a, *[-1] * (length - len(a))] for a in answers], device=device)
    total = first[labels[:, 0]]
    if length > 1:
        offset = torch.arange(1, length, device=device)
        valid = labels[:, 1:] >= 0
        order = torch.where(valid, cache.rows.order.max() + offset, -1)
        flag = torch.zeros_like(valid)
        table = Rows(
            order=order,
            sample=torch.where(valid, 0, -1),
            position=(cache.rows.position.max() + offset).expand(count, -1),
            segment=torch.full_like(order, 1 << 20),
            bidirectional=flag,
            visible_to_later=~flag,
            after_media=~flag,
        )
        following = Batch(text=table, text_ids=ids, labels=ids)
        wide = cache.index(torch.zeros(count, dtype=torch.int64, device=device))
        hidden, _ = model.run_pass(following, cache=wide)
        chosen = model.engine.backbone.logits(hidden[valid][None])[0].float()
        found = chosen.log_softmax(dim=-1).gather(1, labels[:, 1:][valid][:, None])[:, 0]
        total = total.index_add(0, valid.nonzero()[:, 0], found)
    return total / (labels >= 0).sum(dim=1)


# ----------------------------------------------------------------------------------------------------------- vectors


@torch.no_grad()
def embed(
    model: Model,
    items: Seq[str | PILImage.Image],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Vectors of texts and pictures in one space: those of a picture and of its words have a large product.

    Args:
        model: a model that can embed, such as one of the recipe clip.
        items: texts and pictures, in any order.
        progress: told items done and in all.

    Returns:
        float32 ``[items, width]``, each of unit length.
    """
    if "embed" not in model.capabilities:
        raise XFusionError(
            f"this model cannot embed, only {', '.join(sorted(model.capabilities))}: train one with a contrastive objective,"
            " such as the recipe clip"
        )
    if isinstance(items, (str, PILImage.Image)):
        raise XFusionError("embed takes a list of texts and pictures: write [item]")
    objective: Any = next(o for o in model.objectives if "embed" in o.gives)
    texts = [i for i, item in enumerate(items) if isinstance(item, str)]
    pictures = [i for i, item in enumerate(items) if not isinstance(item, str)]
    out, done = torch.empty(len(items), objective.embedding_width), 0
    for members, of_words in ((texts, True), (pictures, False)):
        for start in range(0, len(members), BATCH):
            part = members[start : start + BATCH]
            chosen = [items[i] for i in part]
            segments = (
                [opened(model.backbone.begin_ids, (Text(ids=_encode_prompt(model, cast(str, t))),)) for t in chosen]
                if of_words
                else [(media,) for media in _media_segment(model, cast("list[PILImage.Image]", chosen))]
            )
            batch = pack([[Sequence(segments=s)] for s in segments]).to(model.device)
            vectors = objective.of_words(model, batch) if of_words else objective.of_media(model, batch)
            out[part] = vectors.float().cpu()
            done += len(part)
            if progress:
                progress(done, len(items))
    return out


@torch.no_grad()
def match(model: Model, pictures: Seq[PILImage.Image], texts: Seq[str]) -> Tensor:
    """Probability that a text says what a picture shows, by the head that learned to tell pairs.

    Args:
        model: a model that can match, such as one of the recipe blip.
        pictures: any size.
        texts: each is read behind each picture.

    Returns:
        float32 ``[pictures, texts]`` in [0, 1].
    """
    if "match" not in model.capabilities:
        raise XFusionError(
            f"this model cannot match, only {', '.join(sorted(model.capabilities))}: train one with a matching objective,"
            " such as the recipe blip"
        )
    if isinstance(texts, str):
        raise XFusionError("match takes a list of texts: write [text]")
    objective: Any = next(o for o in model.objectives if "match" in o.gives)
    begin, media = model.backbone.begin_ids, _media_segment(model, pictures)
    said = [opened(begin, (Text(ids=_encode_prompt(model, text)),)) for text in texts]
    pairs = [(i, j) for i in range(len(media)) for j in range(len(said))]
    out = torch.empty(len(media), len(said))
    for start in range(0, len(pairs), BATCH):
        part = pairs[start : start + BATCH]
        rows = [[Sequence(segments=(*said[j], media[i]))] for i, j in part]
        batch, own = pack(rows).to(model.device), torch.arange(len(part), device=model.device)
        probability = objective.judged(model, batch, own, own).float().softmax(dim=-1)[:, 1].cpu()
        for (i, j), value in zip(part, probability, strict=True):
            out[i, j] = value
    return out


# ---------------------------------------------------------------------------------------------------------- segments


def generate(
    model: Model,
    items: Seq[Segment] | Seq[Seq[Segment]],
    *,
    seed: int = 0,
    seeds: Seq[int] | None = None,
    steps: int = 25,
    guidance: float | None = None,
    solver: Solver | None = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    schema: dict[str, Any] | None = None,
    progress: Progress | None = None,
    listen: Listener | None = None,
) -> list[Any]:
    """Continue a list of segments, or a batch of such lists.

    Each `Image` is a picture to draw where it stands, each `Audio` a sound to make, of which the codes are given; a list
    that ends in text, a picture or a sound is answered in words.
    Text-only lists are continued by the base model's own ``generate``.

    Args:
        model: a model.
        items: ``[str | PIL.Image | Sound | Image | Audio, ...]`` or a list of such lists; `Text` stands for words
            that are token ids.
        seed: list i uses ``seed + i``.
        seeds: one seed per list instead.
        steps: steps from noise to picture.
        guidance: classifier-free guidance scale; None takes the model's own.
        solver: takes the steps (`xfusion.objectives.solvers`); None takes the model's own.
        max_tokens: longest answer in tokens.
        temperature: 0 is greedy.
        top_p: nucleus sampling.
        schema: answers in words are JSON texts of this schema and no others (`schema_answers`).
        progress: told while drawing.
        listen: told every token of an answer in words as it is chosen.

    Returns:
        the generated segments (``str``, ``PIL.Image``, or codes of a sound, int64) of the list, or a list of such lists for a
        batch.
    """
    if isinstance(items, str) or not isinstance(items, (list, tuple)) or not items:
        raise XFusionError(
            "generate takes a list of segments such as ['a red apple', xfusion.Image()], or a list of lists"
        )
    single = not isinstance(items[0], (list, tuple))
    lists = [cast("Seq[Segment]", item) for item in ([items] if single else items)]
    chosen = list(seeds) if seeds is not None else [seed + i for i in range(len(lists))]
    if len(chosen) != len(lists):
        raise XFusionError(f"{len(chosen)} seeds for {len(lists)} lists: give one each")
    allowed = None if schema is None else [model.backbone.encode(text) for text in schema_answers(schema)]
    if allowed is not None and (longest := 1 + max(map(len, allowed))) > max_tokens:
        raise XFusionError(f"max_tokens {max_tokens} is too few for the schema's longest answer: give {longest}")
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, item in enumerate(lists):
        kinds.setdefault(kinds_of(model, item), []).append(i)
    out: list[Any] = [None] * len(lists)
    for members in kinds.values():  # lists of the same kinds of segments go through together
        for start in range(0, len(members), BATCH):
            part = members[start : start + BATCH]
            answers = _generate_batch(
                model,
                [lists[i] for i in part],
                [chosen[i] for i in part],
                steps=steps,
                guidance=guidance,
                solver=solver,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                allowed=allowed,
                progress=progress,
                listen=_for_part(listen, part),
            )
            for i, answer in zip(part, answers, strict=True):
                out[i] = answer
    return out[0] if single else out


def _for_part(listen: Listener | None, part: Seq[int]) -> Listener | None:
    """A listener that is told the numbers of a part of the lists."""
    return None if listen is None else lambda row, token: listen(part[row], token)


def kinds_of(model: Model, items: Seq[Segment]) -> tuple[Any, ...]:
    """The kinds of a list's segments: lists of equal kinds go through `generate` in one batch.

    Raises:
        XFusionError: something that is no segment, or a picture of a size out of reach.
    """
    return tuple(_kind(model, segment) for segment in items)


def _kind(model: Model, segment: Segment) -> Any:
    if isinstance(segment, (str, Text)):
        return "text"
    if isinstance(segment, (PILImage.Image, Sound)):
        return "shown"
    if isinstance(segment, Image):
        return ("draw", *draw_size(model, segment.size))
    if isinstance(segment, Audio):
        return ("sound", *_sound_size(model, segment))
    raise XFusionError(
        f"a {type(segment).__name__} is not a segment: give str, PIL.Image.Image, xfusion.Sound, xfusion.Image or xfusion.Audio"
    )


def _sound_size(model: Model, asked: Audio) -> tuple[int, int]:
    """Frames of a sound that is made, twice: sounds come at the length that the model was made for."""
    audio = model.modality
    if not isinstance(audio, AudioModality) or "draw" not in model.capabilities:
        raise XFusionError("this model makes no sound: it can " + ", ".join(sorted(model.capabilities)))
    seconds = audio.config.seconds
    if asked.seconds not in (None, seconds):
        raise XFusionError(f"this model makes sounds of {seconds:g} s, not of {asked.seconds:g}: leave seconds out")
    return audio.sizes[0], audio.sizes[0]


def _generate_batch(
    model: Model,
    lists: Seq[Seq[Segment]],
    seeds: Seq[int],
    *,
    steps: int,
    guidance: float | None,
    solver: Solver | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    allowed: Seq[tuple[int, ...]] | None,
    progress: Progress | None,
    listen: Listener | None,
) -> list[list[Any]]:
    contexts: list[tuple[Text | Media, ...]] = [() for _ in lists]
    out: list[list[Any]] = [[] for _ in lists]
    kinds = [_kind(model, s) for s in lists[0]]
    for place, kind in enumerate(kinds):
        if kind == "text":
            new = [_text_segment(model, cast("str | Text", item[place])) for item in lists]
            contexts = [(*context, *segment) for context, segment in zip(contexts, new, strict=True)]
        elif kind == "shown":
            shown = _media_segment(model, [cast("Shown", item[place]) for item in lists])
            contexts = [(*context, media) for context, media in zip(contexts, shown, strict=True)]
        else:
            what, native, wanted = kind
            tokens = draw_tokens(
                model, contexts, native, seeds=seeds, steps=steps, guidance=guidance, solver=solver, progress=progress
            )
            made = _pictures(model, tokens, native, wanted) if what == "draw" else _codes(model, tokens, native)
            for answer, item in zip(out, made, strict=True):
                answer.append(item)
            grid = model.modality.grid(native)
            # The finished item stands clean before anything later.
            contexts = [
                (*context, model.modality.segment(t, grid)) for context, t in zip(contexts, tokens.cpu(), strict=True)
            ]
    if isinstance(kinds[-1], tuple):
        return out
    if any(isinstance(segment, Media) for segment in contexts[0]):
        if kinds[-1] == "text":  # a question behind a picture ends as it did in training
            newline = Text(ids=model.backbone.encode("\n"))
            contexts = [
                (*context, newline) if item[-1] else context for item, context in zip(lists, contexts, strict=True)
            ]
        ids = answer_tokens(
            model,
            contexts,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seeds=seeds,
            allowed=allowed,
            listen=listen,
        )
    else:
        ids = [
            _base_generate(model, context, max_tokens, temperature, top_p, s, allowed, _for_part(listen, [i]))
            for i, (context, s) in enumerate(zip(contexts, seeds, strict=True))
        ]
    for answer, tokens in zip(out, ids, strict=True):
        answer.append(model.backbone.decode(tokens))
    return out


class _Ended(Exception):
    """A listener wants no more words."""


@dataclass
class _Streamer:
    """What the base's own ``generate`` tells a listener by: it puts the prompt first, then token after token."""

    listen: Listener
    ends: set[int]
    answer: list[int] | None = None

    def put(self, ids: Tensor) -> None:
        if self.answer is None:
            self.answer = []
            return
        for token in ids.flatten().tolist():
            self.answer.append(token)
            if token not in self.ends and not self.listen(0, token):
                raise _Ended

    def end(self) -> None:
        """Nothing is held back that would have to be told now."""


def _base_generate(
    model: Model,
    context: tuple[Text | Media, ...],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    allowed: Seq[tuple[int, ...]] | None = None,
    listen: Listener | None = None,
) -> list[int]:
    ids = [i for segment in context if isinstance(segment, Text) for i in segment.ids]
    if not ids:
        raise XFusionError("there is nothing to continue: the prompt is empty")
    prompt = torch.tensor([ids], device=model.backbone.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    if allowed is not None:
        end = model.backbone.end_ids[0]
        sampling["prefix_allowed_tokens_fn"] = lambda _, so_far: _going_on(so_far[len(ids) :].tolist(), allowed, end)
    streamer = None if listen is None else _Streamer(listen, set(model.backbone.end_ids))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            whole = model.text_model().generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_tokens,
                pad_token_id=model.backbone.end_ids[0],
                streamer=streamer,
                **sampling,
            )
        except _Ended:
            assert streamer is not None
            return streamer.answer or []
    return whole[0, len(ids) :].tolist()


# ------------------------------------------------------------------------------------------------------ conversations


def conversation(model: Model, messages: Seq[Message], *, own_pictures: bool = True) -> list[Segment]:
    """A conversation as a list of segments, to be continued by `generate`.

    Words alone stand in the base's own chat template, and the base answers them as it answers everyone. With a picture
    among them, or one to draw (`Image`), the turns stand in reading order, a line each and without roles: that is how a
    picture and a question stood in training, and no template knows pictures.

    Args:
        model: a model.
        messages: ``{"role": ..., "content": words or a list of segments}``, the oldest first.
        own_pictures: whether the assistant's pictures are looked at; else they are called ``(picture)``, and the base
            answers where the user shows none.

    Raises:
        XFusionError: the base's template refuses these roles.
    """
    turns = [
        [m["content"]]
        if isinstance(m["content"], str)
        else [_as_words(m)]
        if m["role"] == "assistant" and not own_pictures
        else list(m["content"])
        for m in messages
    ]
    if all(isinstance(segment, str) for turn in turns for segment in turn):
        words = [
            {"role": message["role"], "content": "".join(turn)} for message, turn in zip(messages, turns, strict=True)
        ]
        return [Text(ids=model.backbone.chat(words))]
    out: list[Segment] = []
    for number, turn in enumerate(turns):
        for segment in ["\n", *turn] if number else turn:
            if isinstance(segment, str) and out and isinstance(out[-1], str):
                out[-1] += segment
            else:
                out.append(segment)
    return out


def answer(
    model: Model,
    messages: Seq[Message],
    *,
    draw: DrawMode = "auto",
    size: int | None = None,
    **settings: Any,
) -> list[Any]:
    """The next turn of a conversation, in words or in a picture with words behind it.

    In words it is `generate`'s answer to `conversation`; where all words are, that is the base's own. Under ``auto`` the
    pack's opening head reads the base's last hidden state, beside the vocabulary, and an answer that opens with a picture
    draws what the user's last words name; words behind it name the finished picture, by a pack that can. Pictures that
    the pack drew itself are then called ``(picture)`` among the words that follow, so that the base goes on answering;
    pictures that the user shows are looked at.

    Args:
        model: a model.
        messages: as `conversation` takes them.
        draw: ``never`` runs nothing of this, ``always`` draws at every turn.
        size: side of pictures in pixels; None takes the trained one.
        settings: of `generate`: ``seed``, ``steps``, ``guidance``, ``max_tokens``, ``listen``, ...

    Returns:
        ``[words]``, ``[picture]`` or ``[picture, words]``.

    Raises:
        XFusionError: the model cannot draw, or ``auto`` is asked of a pack without an opening head.
    """
    what = opens(model, messages, draw)
    if what is None:
        return generate(model, conversation(model, messages, own_pictures=draw == "never"), **settings)
    drawing = {name: settings[name] for name in _DRAWING & set(settings)}
    (picture,) = generate(model, [what, Image(size=size)], **drawing)
    return [picture, *(generate(model, [picture], **settings) if "caption" in model.capabilities else [])]


_DRAWING = {"seed", "seeds", "steps", "guidance", "solver", "progress"}
"""Settings of `generate` that a picture takes."""


def opens(model: Model, messages: Seq[Message], draw: DrawMode = "auto") -> str | None:
    """What the next turn of a conversation draws; None where it is words.

    It is what the last turn of the user names, or the one before where that names nothing ("another one"); all of the
    last words where the pack has no opening head, or finds nothing.

    Args:
        model: a model.
        messages: as `conversation` takes them.
        draw: see `answer`.

    Raises:
        XFusionError: see `answer`; or the conversation does not end with the user.
    """
    if draw not in get_args(DrawMode):
        raise XFusionError(f"draw {draw!r} is not one of {', '.join(get_args(DrawMode))}")
    if draw == "never":
        return None
    if "draw" not in model.capabilities:
        raise XFusionError(f"this model cannot draw, only {', '.join(sorted(model.capabilities))}: take draw='never'")
    head, words = model.opening, [{"role": m["role"], "content": _as_words(m)} for m in messages]
    if draw == "auto":
        if head is None:
            raise XFusionError(
                "this pack has no opening head, which decides whether to draw: make one with xfusion train opening PACK,"
                " or take draw='never' or 'always'"
            )
        if head.probability(model.backbone, words) <= 0.5:
            return None
    asked = [message["content"] for message in words if message["role"] == "user"]
    if not asked:
        raise XFusionError("there is no turn of the user that could say what to draw")
    found = (head.what(model.backbone, turn) for turn in reversed(asked)) if head else ()
    return next(filter(None, found), asked[-1])


def _as_words(message: Message) -> str:
    """The content of a turn, its pictures by what they are called."""
    content = message["content"]
    segments = [content] if isinstance(content, str) else content
    return "\n".join(segment if isinstance(segment, str) else PICTURE for segment in segments)


def prompt_length(model: Model, items: Seq[Segment]) -> int:
    """Tokens of a list of segments: of its words, and of its pictures and sounds, given ones and those to draw.

    Raises:
        XFusionError: some words are too long, or a picture's size is out of reach.
    """
    total = 0
    for segment, kind in zip(items, kinds_of(model, items), strict=True):
        if kind == "text":
            total += len(_encode_prompt(model, cast("str | Text", segment)))
        else:
            rows, columns = model.modality.grid(kind[1] if isinstance(kind, tuple) else model.modality.sizes[0])
            total += rows * columns
    return total


__all__ = [
    "answer",
    "answer_json",
    "caption",
    "conversation",
    "draw",
    "embed",
    "generate",
    "inpaint",
    "inpaint_batch",
    "match",
    "opens",
    "prompt_length",
    "schema_answers",
    "score_names",
]
