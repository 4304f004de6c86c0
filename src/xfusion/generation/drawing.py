"""Drawing: from noise, or code after code, to pictures and codes of sounds, behind whatever stands before them.

Text before a picture is computed once per prompt and kept as keys and values; a denoising step then runs the media
tower's rows of the picture alone. Every item has a generator of its own, so a batch gives the pictures of its singles.
"""

from __future__ import annotations

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
from xfusion.data.templates import opened
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
    _, run = model.run_pass(batch.with_media(name, **vars(before)), cache=cache, update=True, final=False)
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
    with model.drawing():
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
    denoised: Pass | None = None
    """The first denoising pass: those behind it see the same."""

    def __call__(self, x: Tensor, time: float) -> Tensor:
        """The head at all tokens ``[N, M, P]`` at a noise level -> ``[N, M, Q]``; the cache stays."""
        first, last = self.model.media_objective.guidance_interval
        if self.scale != 1 and not first < time <= last:
            return self.unguided(x, time)
        return self._guided(self._states(self.target, x, time))

    @cached_property
    def unguided(self) -> _Drawing:
        """The same behind the contexts alone: the first half of the rows."""
        rows = torch.arange(len(self.begin) // 2, device=self.begin.device)
        return replace(
            self,
            step=self.step.index(rows),
            target=self.target.index(rows),
            cache=self.cache.index(rows),
            begin=self.begin[rows],
            scale=1,
            denoised=None,
        )

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

    def _states(self, rows: MediaRows, tokens: Tensor, time: float, *, update: bool = False) -> Tensor:
        tokens = tokens if self.scale == 1 else torch.cat([tokens, tokens])
        view = replace(rows, tokens=tokens, time=torch.full((len(tokens),), time, device=tokens.device))
        name = self.model.modality.name
        batch = replace(self.step, media={name: view})
        like = None if update else self.denoised
        _, run = self.model.run_pass(batch, cache=self.cache, update=update, final=False, like=like)
        self.denoised = None if update else like or run
        return run.states[name]

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
    chosen = seeds_of(seed, seeds, len(prompts), "prompts")
    native, wanted = draw_size(model, size)
    contexts = [text_segment(model, prompt) for prompt in prompts]
    out: list[PILImage.Image] = []
    for start in range(0, len(prompts), base.BATCH):
        part = slice(start, start + base.BATCH)
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
        out += pictures_of(model, tokens, native, wanted)
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
        mask: white where to draw anew, of the picture's size, either as its EXIF tag turns it; a token is redrawn if any of its
            pixels is white.
        prompt: what the whole picture shall show.
        seed: of the noise.
        steps: steps from noise to picture.
        guidance: classifier-free guidance scale; None takes the model's own.
        progress: told after every step.

    Raises:
        XFusionError: picture and mask differ in size, or nothing of what is drawn is white.
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
    size = model.image.sizes[0]
    redrawn = torch.stack([_redrawn(picture, mask, model.image.grid(size)) for picture, mask, _ in items])
    known = model.image.encode([picture for picture, _, _ in items], size)
    tokens = draw_tokens(
        model,
        [text_segment(model, prompt) for _, _, prompt in items],
        size,
        seeds=seeds,
        steps=steps,
        guidance=guidance,
        known=known,
        keep=~redrawn,
        progress=progress,
    )
    return pictures_of(model, tokens, size, size)


def _redrawn(picture: PILImage.Image, mask: PILImage.Image, grid: tuple[int, int]) -> Tensor:
    """Which tokens of a picture a mask says to draw anew, bool ``[M]``."""
    picture, mask = ImageOps.exif_transpose(picture), ImageOps.exif_transpose(mask)
    if picture.size != mask.size:
        raise XFusionError(f"the picture has {picture.size} pixels, the mask {mask.size}: give both the same size")
    found = touched(mask, grid)
    if not bool(found.any()):
        raise XFusionError(
            f"the mask of {mask.size} pixels has no white one in the middle square that is drawn: make white what to draw anew"
        )
    return found


def pictures_of(model: Model, tokens: Tensor, native: int, wanted: int) -> list[PILImage.Image]:
    pictures = model.image.to_pil(model.image.decode(tokens, native))
    if wanted == native:
        return pictures
    return [p.resize((wanted, wanted), PILImage.Resampling.BICUBIC) for p in pictures]


def codes(model: Model, tokens: Tensor, frames: int) -> list[Tensor]:
    """The codes of sounds, int64 ``[frames]`` each: there is nothing that would make waves of them."""
    return list(model.modality.decode(tokens, frames)[..., 0].round().long().cpu())
