"""Next-token prediction over codes: loss, autoregressive sampling, and infilling.

    L = - sum_i log p(c_i | c_<i, what stands before)        p(c_0 | ...) is read from [BOI]

(DALL-E, arXiv 2102.12092; TEAL, arXiv 2311.04589.) The weight of a modality is its objective's weight. With guidance the
logits are ``l = l_u + s (l_c - l_u)``, where the unconditional pass omits the text (CM3Leon, arXiv 2309.02591, section 3.2).

With ``infill``, a share of the pictures is trained with some runs of codes cut out and moved to the end (CM3,
arXiv 2201.07520). Each run leaves a sentinel in its place and starts with another:

    a b c d e f   ->   a <mask> e f <infill> b c d

Each code is predicted once, by the row before it; sentinels are not predicted. A picture with known parts is completed in this
order, so that new codes can attend to the known codes after them.

Shape legend: ``B`` batch row, ``n`` media rows, ``N`` media items, ``M`` tokens of an item, ``P`` codes per token, ``K``
entries of a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import cross_entropy

from xfusion.data.sequence import IGNORE, Batch, MediaRows, Rows, XFusionError
from xfusion.objectives.base import Drawer, Losses, Objective, Run
from xfusion.objectives.solvers import Solver

MASK, INFILL = -1, -2
"""Sentinels: a run was cut out here; a cut-out run follows."""


class NextCode(Objective):
    """Cross-entropy of the codes of pictures that have a loss."""

    name = "next_code"
    gives = frozenset({"draw"})

    @dataclass(frozen=True, kw_only=True)
    class Config(Objective.Config):
        """How codes are trained and sampled."""

        weight: float = 1.0
        """Weight of this loss in the sum."""
        guidance: float = 1.5
        """Default classifier-free guidance scale; 1 is off."""
        temperature: float = 1.0
        """Sampling temperature of codes; 0 takes the most likely."""
        infill: float = 0.0
        """Share of pictures trained with runs of codes moved to the end; above 0 the port needs 2 sentinels."""
        runs: int = 1
        """Maximum number of runs cut out of such a picture in training; sampling fills any number."""

        def build(self) -> NextCode:
            """The objective."""
            return NextCode(self)

    def __init__(self, config: Config):
        if config.temperature < 0 or not 0 <= config.infill <= 1 or config.runs < 1:
            raise XFusionError(
                f"temperature {config.temperature:g} must be >= 0, infill {config.infill:g} within 0 and 1 and runs"
                f" {config.runs} at least 1"
            )
        super().__init__()
        self.config, self.weight, self.guidance = config, config.weight, config.guidance

    # -- corrupt

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Moves runs of codes to the end in some pictures that have a loss and are the last of their sequence."""
        if not self.config.infill:
            return batch
        for modality, media in batch.media.items():
            last = [
                number
                for number in (media.has_loss & media.noised).nonzero()[:, 0].tolist()
                if _is_last(batch, media, number)
            ]
            if last:
                # Every row gets room for sentinels, used or not, so that shapes stay fixed.
                keep = {number: self._drawn_keep(media, number, generator) for number in last}
                most = max(len({n for n in row if n in keep}) for row in media.item.tolist())
                batch = replace(batch, media={**batch.media, modality: moved(media, keep, 2 * self.config.runs * most)})
        return batch

    def _drawn_keep(self, media: MediaRows, number: int, generator: torch.Generator) -> Tensor:
        """Which tokens of a picture stay in place, bool ``[M]``, at random."""
        keep = torch.ones(int((media.item == number).sum()), dtype=torch.bool)
        if torch.rand((), generator=generator) < self.config.infill:
            for _ in range(int(torch.randint(1, self.config.runs + 1, (), generator=generator))):
                first, last = torch.randint(len(keep), (2,), generator=generator).sort()[0].tolist()
                keep[first : last + 1] = False
        return keep

    # -- loss

    def labels(self, media: MediaRows) -> Tensor:
        """The codes that each row predicts, those of the next row, ``[B, n, P]``; `IGNORE` if none.

        Raises:
            XFusionError: a picture with a loss has bidirectional attention, so that each code would see itself.
        """
        wanted = media.at(media.has_loss)
        if bool((wanted & media.rows.bidirectional).any()):
            raise XFusionError(
                "codes that see each other both ways cannot be predicted: set the image's order to 'causal'"
            )
        codes = media.tokens.round().long()
        labels = torch.where(wanted[..., None] & (codes >= 0), codes, IGNORE)
        return functional.pad(labels[:, 1:], (0, 0, 0, 1), value=IGNORE)

    def count(self, batch: Batch) -> dict[str, int]:
        """Codes that have a loss."""
        count = sum(int((self.labels(media) != IGNORE).sum()) for media in batch.media.values())
        return {self.name: count} if count else {}

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Summed nats and the number of codes."""
        out: Losses = {}
        for modality, media in batch.media.items():
            labels = self.labels(media)
            chosen = (labels != IGNORE).any(-1)
            if bool(chosen.any()):
                scores = run(batch).media[modality][chosen].float().unflatten(-1, (labels.shape[-1], -1))
                total = cross_entropy(scores.flatten(0, 1), labels[chosen].flatten(), reduction="sum")
                out[self.name] = (total, (labels != IGNORE).sum())
        return out

    # -- sample

    def num_steps(self, steps: int, tokens: int) -> int:
        """One per token."""
        del steps
        return tokens

    def choose(self, scores: Tensor, noise: Tensor) -> Tensor:
        """Sample codes ``[N, P]`` from scores ``[N, P * K]`` by inverse CDF: the noise, mapped to (0, 1) by the normal CDF,
        picks a code from the cumulative probabilities. The noise ``[N, P]`` is the only randomness.
        """
        scores = scores.unflatten(-1, (noise.shape[-1], -1))
        if not self.config.temperature:
            return scores.argmax(-1)
        cumulated = (scores.double() / self.config.temperature).softmax(-1).cumsum(-1)
        share = torch.special.ndtr(noise.double())[..., None]
        return (cumulated < share).sum(-1).clamp(max=scores.shape[-1] - 1)

    def sample(
        self,
        predict: Drawer,
        noise: Tensor,
        *,
        steps: int,
        known: Tensor | None = None,
        keep: Tensor | None = None,
        solver: Solver | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Sample token by token, infilled tokens last.

        Args:
            predict: the model.
            noise: standard normal ``[N, M, P]``.
            steps: ignored.
            known: codes ``[N, M, P]``, used where ``keep`` is True.
            keep: bool ``[N, M]``; a model that infills reads all kept codes first, other models only those before each code.
            solver: must be None.

        Yields:
            after every token the codes ``[N, M, P]``, zeros where there is none yet.
        """
        del steps
        if solver is not None:
            raise XFusionError(f"codes are drawn one by one, not by {type(solver).__name__.lower()}: name no solver")
        tokens = torch.zeros_like(noise)
        if known is None or keep is None:
            known, keep = noise, torch.zeros(noise.shape[:2], dtype=torch.bool, device=noise.device)
        infill = self.config.infill > 0 and bool(keep.any())
        if infill and bool((keep != keep[:1]).any()):
            raise XFusionError(
                "pictures that are completed together must keep the same places: complete them one by one"
            )
        places = infilled(keep[0]) if infill else list(range(noise.shape[1]))
        waiting: list[Tensor] = []
        given: list[int] = []
        for place in places:
            if place >= 0:
                drawn = known[:, place]
                if not bool(keep[:, place].all()):
                    behind = torch.stack(waiting, 1) if waiting else noise[:, :0]
                    at = torch.tensor(given, dtype=torch.int64, device=noise.device) if infill else None
                    code = self.choose(predict.following(behind, at), noise[:, place]).to(noise.dtype)
                    drawn, waiting, given = torch.where(keep[:, place, None], drawn, code), [], []
                tokens = tokens.clone()
                tokens[:, place] = drawn
            waiting.append(tokens[:, place] if place >= 0 else torch.full_like(noise[:, 0], place))
            given.append(place)
            if place >= 0:
                yield tokens, tokens


def infilled(keep: Tensor) -> list[int]:
    """Places in infilling order: the kept ones with a `MASK` for each missing run, then each run after an `INFILL`.

    Args:
        keep: bool ``[M]``.
    """
    first: list[int] = []
    runs: list[list[int]] = []
    for place, kept in enumerate(keep.tolist()):
        if kept:
            first.append(place)
        elif first[-1:] == [MASK]:
            runs[-1].append(place)
        else:
            first.append(MASK)
            runs.append([place])
    return first + [place for run in runs for place in (INFILL, *run)]


def moved(media: MediaRows, keep: dict[int, Tensor], room: int) -> MediaRows:
    """Rows with the tokens of some items, each the last of its sequence, put in infilling order.

    Args:
        media: rows of a modality.
        keep: which tokens of an item stay in place, bool ``[M]`` by item number.
        room: rows reserved for the sentinels of a batch row, used or not.
    """
    width, empty = media.rows.count + room, (-1, 0, -1, 0)
    filled = []
    for r, items in enumerate(media.item.tolist()):
        order, position = media.rows.order[r].tolist(), media.rows.position[r].tolist()
        row = []  # source column, mark, order, position
        for column, number in enumerate(items):
            if number not in keep:
                row += [(column, 0, order[column], position[column])] * (order[column] >= 0)
            elif number != items[column - 1]:
                step = position[column] - position[column - 1]  # 1 after [BOI], also if all tokens share one position
                step = position[column + 1] - position[column] if len(keep[number]) > 1 else step
                for rank, place in enumerate(infilled(keep[number])):
                    row.append(
                        (column + max(place, 0), min(place, 0), order[column] + rank, position[column] + step * rank)
                    )
        filled.append(row + [empty] * (width - len(row)))
    device = media.tokens.device
    source, mark, order, position = (t.contiguous() for t in torch.tensor(filled, device=device).unbind(-1))
    there, pick = source >= 0, source.clamp(min=0)

    def take(t: Tensor, padding: int) -> Tensor:
        return torch.where(there, t.gather(1, pick), padding)

    old, none = media.rows, {"sample": -1, "segment": -1}
    flags = ("bidirectional", "visible_to_later", "after_media")
    tables = {name: take(getattr(old, name), none[name]) for name in none}
    tables |= {name: take(getattr(old, name).long(), 0).bool() for name in flags}
    tokens = media.tokens.gather(1, pick[..., None].expand(-1, -1, media.tokens.shape[2])) * there[..., None]
    return replace(
        media,
        rows=Rows(order=order, position=position, **tables),
        tokens=torch.where(mark[..., None] < 0, mark[..., None].to(tokens.dtype), tokens),
        item=take(media.item, -1),
        boundary=take(media.boundary.long(), 0).bool(),
        grid_row=take(media.grid_row, 0),
        grid_column=take(media.grid_column, 0),
    )


def _is_last(batch: Batch, media: MediaRows, number: int) -> bool:
    """Whether an item is the last in its sequence."""
    row, column = (media.item == number).nonzero()[-1].tolist()
    sample, order = media.rows.sample[row, column], media.rows.order[row, column]
    tables = [batch.text, *(rows.rows for rows in batch.media.values())]
    return not any(bool(((t.sample[row] == sample) & (t.order[row] > order)).any()) for t in tables)
