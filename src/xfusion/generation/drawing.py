"""Drawing: generates pictures and sound codes after a context, by denoising or autoregressively code by code.

The text before a picture is computed once per prompt and stored in the KV cache. A denoising step then runs only the picture's
rows through the media tower. Every item has its own random generator, so a batch gives the same pictures as single calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor

from xfusion.backbone import Cache
from xfusion.data.pack import pack
from xfusion.data.sequence import Batch, Media, MediaRows, Rows, Sequence, Text, XFusionError
from xfusion.data.templates import with_begin
from xfusion.fusion.base import Pass
from xfusion.generation import base
from xfusion.generation.base import Progress, draw_size, refuse_to_draw, seeds_of, text_segment
from xfusion.modalities.image import touched
from xfusion.model import Model
from xfusion.objectives.solvers import Solver


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
    """Draw one picture, or generate the codes of one sound, after each context.

    Args:
        model: a model that can draw.
        contexts: the segments before each picture.
        size: a size that the model supports: a side in pixels, or a number of frames.
        seeds: one per picture; the noise of a picture depends on nothing else.
        steps: steps from noise to picture.
        guidance: classifier-free guidance scale, against an empty context; 1 is off, None uses the model's own.
        known: clean tokens ``[N, M, P]``, of which those in ``keep`` are kept.
        keep: which tokens are kept, bool ``[N, M]``.
        solver: the solver to sample with; None uses the model's own.
        progress: called after every step.

    Returns:
        tokens ``[N, M, P]``.
    """
    refuse_to_draw(model)
    grid = model.modality.grid(size)
    scale = model.guidance if guidance is None else guidance
    if not math.isfinite(scale):
        raise XFusionError(f"guidance {scale}: give a number, such as 3; 1 is off")
    count, width = grid[0] * grid[1], model.modality.token_width
    # Sampled on the CPU, so that a seed gives the same picture on every device.
    noise = torch.stack([torch.randn(count, width, generator=torch.Generator().manual_seed(s)) for s in seeds])
    x = noise = noise.to(model.device)
    options: dict[str, Any] = {} if solver is None else {"solver": solver}
    if known is not None and keep is not None:
        options |= {"known": known.to(model.device), "keep": keep.to(model.device)}
    predict = _after(model, contexts, grid, scale)
    samples = model.media_objective.sample(predict, noise, steps=steps, **options)
    total = model.media_objective.num_steps(steps, count)
    with model.drawing():
        for done, (tokens, estimate) in enumerate(samples, start=1):
            x = tokens
            if progress:
                progress(done, total, estimate)
    return x


def _after(model: Model, contexts: Seq[tuple[Text | Media, ...]], grid: tuple[int, int], scale: float) -> _Drawing:
    """The drawer of one item after each context: reads the contexts, and an empty one for each if there is guidance."""
    name, count = model.modality.name, grid[0] * grid[1]
    blank = model.modality.segment(torch.zeros(count, model.modality.token_width), grid, state="noised")
    prompts = [(*with_begin(model.backbone.begin_ids, context), blank) for context in contexts]
    if scale != 1:
        prompts += [(blank,) for _ in contexts]
    batch = pack([[Sequence(segments=segments)] for segments in prompts]).to(model.device)
    media = batch.media[name]
    cache = model.backbone.new_cache(model.fusion.num_towers, len(prompts))

    # The target's tokens are the last of each row; the media rows before them (context pictures, [BOI]) are run first.
    is_target = media.item == media.item.amax(dim=1, keepdim=True)
    columns = is_target.int().argsort(dim=1, stable=True)
    context_rows, target = (_select_columns(media, some) for some in (columns[:, :-count], columns[:, -count:]))
    context_batch = replace(batch, media=batch.media | {name: context_rows})
    _, run = model.run_pass(context_batch, cache=cache, update=True, final=False)
    # The last of these rows is the target's [BOI]; padding has the order -1.
    begin = run.states[name].gather(
        1, context_rows.rows.order.argmax(dim=1)[:, None, None].expand(-1, 1, model.backbone.hidden_size)
    )

    # Items are renumbered, since context pictures are no longer among them.
    item = torch.arange(len(prompts), device=model.device)
    target = replace(target, item=item[:, None].expand(-1, count).contiguous(), noised=item >= 0)
    step = replace(batch, text=batch.text.none(), text_ids=batch.text_ids[:, :0])
    return _Drawing(model=model, step=step, target=target, cache=cache, begin=begin, scale=scale)


@dataclass(kw_only=True)
class _Drawing:
    """The model as the `xfusion.objectives.base.Drawer` of an objective, after cached contexts."""

    model: Model
    step: Batch
    """A batch without text."""
    target: MediaRows
    """The items being drawn; with guidance, once after their contexts and once without context."""
    cache: Cache
    begin: Tensor
    """Final hidden states ``[B, 1, D]`` of [BOI]."""
    scale: float
    """Guidance scale; 1 is off."""
    done: int = 0
    """Tokens of each item that are already in the cache."""
    first_pass: Pass | None = None
    """The first denoising pass; later ones attend to the same positions and reuse its attention masks."""

    def __call__(self, x: Tensor, time: float) -> Tensor:
        """Head output at all tokens ``[N, M, P]`` at a noise level -> ``[N, M, Q]``; the cache is unchanged."""
        low, high = self.model.media_objective.guidance_interval
        if self.scale != 1 and not low < time <= high:
            return self.unguided(x, time)
        return self._guided_prediction(self._states(self.target, x, time))

    @cached_property
    def unguided(self) -> _Drawing:
        """This drawer without guidance: only the rows with contexts, which are the first half."""
        rows = torch.arange(len(self.begin) // 2, device=self.begin.device)
        return replace(
            self,
            step=self.step.index(rows),
            target=self.target.index(rows),
            cache=self.cache.index(rows),
            begin=self.begin[rows],
            scale=1,
            first_pass=None,
        )

    def following(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """Head output at the last position, ``[N, Q]``, after appending finished tokens ``[N, k, P]`` to the cache."""
        if not tokens.shape[1]:
            return self._guided_prediction(self.begin)[:, 0]
        offsets = torch.arange(self.done, self.done + tokens.shape[1], device=tokens.device)
        columns = offsets if places is None else places.clamp(min=0)
        rows = _select_columns(self.target, columns.expand(self.begin.shape[0], -1))
        if places is not None:  # grid coordinates follow the token's place, order and position follow its turn
            target_rows, first_positions = self.target.rows, self.target.rows.columns(slice(0, 2)).position
            step = first_positions[:, -1:] - first_positions[:, :1]
            shifted_rows = replace(
                rows.rows, order=target_rows.order[:, :1] + offsets, position=first_positions[:, :1] + step * offsets
            )
            rows = replace(rows, rows=shifted_rows)
        self.done += tokens.shape[1]
        return self._guided_prediction(self._states(rows, tokens, 0.0, update=True)[:, -1:])[:, 0]

    def _states(self, rows: MediaRows, tokens: Tensor, time: float, *, update: bool = False) -> Tensor:
        tokens = tokens if self.scale == 1 else torch.cat([tokens, tokens])
        view = replace(rows, tokens=tokens, time=torch.full((len(tokens),), time, device=tokens.device))
        name = self.model.modality.name
        batch = replace(self.step, media={name: view})
        like = None if update else self.first_pass
        _, run = self.model.run_pass(batch, cache=self.cache, update=update, final=False, like=like)
        self.first_pass = None if update else like or run
        return run.states[name]

    def _guided_prediction(self, states: Tensor) -> Tensor:
        prediction = self.model.port.readout(states).float()
        if self.scale == 1:
            return prediction
        conditional, unconditional = prediction.chunk(2)
        return unconditional + self.scale * (conditional - unconditional)


def _select_columns(media: MediaRows, columns: Tensor) -> MediaRows:
    """The given columns ``[B, k]`` of each row."""

    def gathered(t: Tensor) -> Tensor:
        return t.gather(1, columns) if t.ndim == 2 else t.gather(1, columns[..., None].expand(-1, -1, t.shape[2]))

    rows = Rows(**{name: gathered(getattr(media.rows, name)) for name in media.rows.__dataclass_fields__})
    names = ("tokens", "item", "boundary", "grid_row", "grid_column")
    return replace(media, rows=rows, **{name: gathered(getattr(media, name)) for name in names})


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
        prompts: texts; an empty prompt draws without guidance.
        size: output side in pixels (None: the trained size).
        seed: picture i uses the seed ``seed + i``.
        seeds: one seed per picture instead.
        steps: steps from noise to picture.
        guidance: classifier-free guidance scale; None uses the model's own.
        solver: the solver to sample with (`xfusion.objectives.solvers`); None uses the model's own.
        progress: called after every step of every batch.
    """
    picture_seeds = seeds_of(seed, seeds, len(prompts), "prompts")
    native, output_size = draw_size(model, size)
    contexts = [text_segment(model, prompt) for prompt in prompts]
    pictures: list[PILImage.Image] = []
    for start in range(0, len(prompts), base.BATCH):
        batch_slice = slice(start, start + base.BATCH)
        tokens = draw_tokens(
            model,
            contexts[batch_slice],
            native,
            seeds=picture_seeds[batch_slice],
            steps=steps,
            guidance=guidance,
            solver=solver,
            progress=progress,
        )
        pictures += pictures_of(model, tokens, native, output_size)
    return pictures


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
    """Redraw a part of a picture and keep the rest.

    Args:
        model: a model that can draw.
        picture: the picture to change; cropped to its middle square and resized to the trained size.
        mask: white where to redraw, of the same size as the picture, each after its own EXIF rotation; a token is redrawn if
            any of its pixels is white. What is transparent is not white (OpenAI's masks, which the server takes, mark by it).
        prompt: describes the whole resulting picture.
        seed: seed of the noise.
        steps: steps from noise to picture.
        guidance: classifier-free guidance scale; None uses the model's own.
        progress: called after every step.

    Raises:
        XFusionError: picture and mask differ in size, or the mask has no white pixel in the middle square.
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
    """`inpaint` for a batch of (picture, mask, prompt), with one seed each."""
    seeds, size = seeds_of(0, seeds, len(items), "pictures"), model.image.sizes[0]
    redraw_masks = torch.stack([_redraw_mask(picture, mask, model.image.grid(size)) for picture, mask, _ in items])
    known = model.image.encode([picture for picture, _, _ in items], size)
    tokens = draw_tokens(
        model,
        [text_segment(model, prompt) for _, _, prompt in items],
        size,
        seeds=seeds,
        steps=steps,
        guidance=guidance,
        known=known,
        keep=~redraw_masks,
        progress=progress,
    )
    return pictures_of(model, tokens, size, size)


def _redraw_mask(picture: PILImage.Image, mask: PILImage.Image, grid: tuple[int, int]) -> Tensor:
    """Which tokens of a picture the mask marks for redrawing, bool ``[M]``."""
    picture, mask = ImageOps.exif_transpose(picture), ImageOps.exif_transpose(mask)
    if picture.size != mask.size:
        raise XFusionError(f"the picture has {picture.size} pixels, the mask {mask.size}: give both the same size")
    redraw = touched(mask, grid)
    if not bool(redraw.any()):
        raise XFusionError(
            f"the mask of {mask.size} pixels has no white one in the middle square that is drawn: make white what to draw anew"
        )
    return redraw


def pictures_of(model: Model, tokens: Tensor, native: int, output_size: int) -> list[PILImage.Image]:
    """Pictures of tokens ``[N, M, P]`` drawn at a side of ``native`` pixels, resized to ``output_size`` pixels."""
    pictures = model.image.to_pil(model.image.decode(tokens, native))
    if output_size == native:
        return pictures
    return [p.resize((output_size, output_size), PILImage.Resampling.BICUBIC) for p in pictures]


def codes(model: Model, tokens: Tensor, frames: int) -> list[Tensor]:
    """The codes of sounds, int64 ``[frames]`` each; there is no decoder that turns them into waveforms."""
    return list(model.modality.decode(tokens, frames)[..., 0].round().long().cpu())
