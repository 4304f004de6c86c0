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
from xfusion.objectives.base import Drawer, Losses, Objective, Run, add_loss
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
                item
                for item in (media.has_loss & media.noised).nonzero()[:, 0].tolist()
                if _is_last(batch, media, item)
            ]
            if last:
                # Every row gets room for sentinels, used or not, so that shapes stay fixed.
                keep = {item: self._sample_keep(media, item, generator) for item in last}
                max_items = max(len({n for n in row if n in keep}) for row in media.item.tolist())
                batch = replace(
                    batch,
                    media={**batch.media, modality: reorder_for_infill(media, keep, 2 * self.config.runs * max_items)},
                )
        return batch

    def _sample_keep(self, media: MediaRows, item: int, generator: torch.Generator) -> Tensor:
        """Which tokens of a picture stay in place, bool ``[M]``, at random."""
        keep = torch.ones(int((media.item == item).sum()), dtype=torch.bool)
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
        is_target = media.at(media.has_loss)
        if bool((is_target & media.rows.bidirectional).any()):
            raise XFusionError(
                "codes that see each other both ways cannot be predicted: set the image's order to 'causal'"
            )
        codes = media.tokens.round().long()
        labels = torch.where(is_target[..., None] & (codes >= 0), codes, IGNORE)
        return functional.pad(labels[:, 1:], (0, 0, 0, 1), value=IGNORE)

    def count(self, batch: Batch) -> dict[str, int]:
        """Codes that have a loss."""
        count = sum(int((self.labels(media) != IGNORE).sum()) for media in batch.media.values())
        return {self.name: count} if count else {}

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Summed nats and the number of codes."""
        losses: Losses = {}
        for modality, media in batch.media.items():
            labels = self.labels(media)
            has_label = (labels != IGNORE).any(-1)
            if bool(has_label.any()):
                logits = run(batch).media[modality][has_label].float().unflatten(-1, (labels.shape[-1], -1))
                total = cross_entropy(logits.flatten(0, 1), labels[has_label].flatten(), reduction="sum")
                add_loss(losses, self.name, total, (labels != IGNORE).sum())
        return losses

    # -- sample

    def num_steps(self, steps: int, tokens: int) -> int:
        """One per token."""
        del steps
        return tokens

    def choose(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Sample codes ``[N, P]`` from scores ``[N, P * K]`` by inverse CDF: the noise, mapped to (0, 1) by the normal CDF,
        picks a code from the cumulative probabilities. The noise ``[N, P]`` is the only randomness.

        Probabilities are float64, and so on the CPU: Apple's GPUs have none.
        """
        logits = logits.unflatten(-1, (noise.shape[-1], -1))
        if not self.config.temperature:
            return logits.argmax(-1)
        cumulative = (logits.cpu().double() / self.config.temperature).softmax(-1).cumsum(-1)
        quantile = torch.special.ndtr(noise.cpu().double())[..., None]
        return (cumulative < quantile).sum(-1).clamp(max=logits.shape[-1] - 1).to(logits.device)

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
        places = infill_order(keep[0]) if infill else list(range(noise.shape[1]))
        pending_tokens: list[Tensor] = []
        pending_places: list[int] = []
        for place in places:
            if place >= 0:
                new_codes = known[:, place]
                if not bool(keep[:, place].all()):
                    appended = torch.stack(pending_tokens, 1) if pending_tokens else noise[:, :0]
                    appended_places = (
                        torch.tensor(pending_places, dtype=torch.int64, device=noise.device) if infill else None
                    )
                    code = self.choose(predict.following(appended, appended_places), noise[:, place]).to(noise.dtype)
                    new_codes, pending_tokens, pending_places = (
                        torch.where(keep[:, place, None], new_codes, code),
                        [],
                        [],
                    )
                tokens = tokens.clone()
                tokens[:, place] = new_codes
            pending_tokens.append(tokens[:, place] if place >= 0 else torch.full_like(noise[:, 0], place))
            pending_places.append(place)
            if place >= 0:
                yield tokens, tokens


def infill_order(keep: Tensor) -> list[int]:
    """Places in infilling order: the kept ones with a `MASK` for each missing run, then each run after an `INFILL`.

    Args:
        keep: bool ``[M]``.
    """
    order: list[int] = []
    runs: list[list[int]] = []
    for place, is_kept in enumerate(keep.tolist()):
        if is_kept:
            order.append(place)
        elif order[-1:] == [MASK]:
            runs[-1].append(place)
        else:
            order.append(MASK)
            runs.append([place])
    return order + [place for run in runs for place in (INFILL, *run)]


def reorder_for_infill(media: MediaRows, keep: dict[int, Tensor], room: int) -> MediaRows:
    """Rows with the tokens of some items, each the last of its sequence, put in infilling order.

    Args:
        media: rows of a modality.
        keep: which tokens of an item stay in place, bool ``[M]`` by item number.
        room: rows reserved for the sentinels of a batch row, used or not.
    """
    width, empty = media.rows.count + room, (-1, 0, -1, 0)
    table = []
    for batch_row, items in enumerate(media.item.tolist()):
        order, position = media.rows.order[batch_row].tolist(), media.rows.position[batch_row].tolist()
        row = []  # source column, mark, order, position
        for column, item in enumerate(items):
            if item not in keep:
                row += [(column, 0, order[column], position[column])] * (order[column] >= 0)
            elif item != items[column - 1]:
                step = position[column] - position[column - 1]  # 1 after [BOI], also if all tokens share one position
                step = position[column + 1] - position[column] if len(keep[item]) > 1 else step
                for rank, place in enumerate(infill_order(keep[item])):
                    row.append(
                        (column + max(place, 0), min(place, 0), order[column] + rank, position[column] + step * rank)
                    )
        table.append(row + [empty] * (width - len(row)))
    device = media.tokens.device
    source, mark, order, position = (t.contiguous() for t in torch.tensor(table, device=device).unbind(-1))
    is_present, columns = source >= 0, source.clamp(min=0)

    def gathered(t: Tensor, padding: int) -> Tensor:
        return torch.where(is_present, t.gather(1, columns), padding)

    rows, padding_values = media.rows, {"sample": -1, "segment": -1}
    flags = ("bidirectional", "visible_to_later", "after_media")
    tables = {name: gathered(getattr(rows, name), padding_values[name]) for name in padding_values}
    tables |= {name: gathered(getattr(rows, name).long(), 0).bool() for name in flags}
    tokens = media.tokens.gather(1, columns[..., None].expand(-1, -1, media.tokens.shape[2])) * is_present[..., None]
    return replace(
        media,
        rows=Rows(order=order, position=position, **tables),
        tokens=torch.where(mark[..., None] < 0, mark[..., None].to(tokens.dtype), tokens),
        item=gathered(media.item, -1),
        boundary=gathered(media.boundary.long(), 0).bool(),
        grid_row=gathered(media.grid_row, 0),
        grid_column=gathered(media.grid_column, 0),
    )


def _is_last(batch: Batch, media: MediaRows, item: int) -> bool:
    """Whether an item is the last in its sequence."""
    row, column = (media.item == item).nonzero()[-1].tolist()
    sample, order = media.rows.sample[row, column], media.rows.order[row, column]
    tables = [batch.text, *(rows.rows for rows in batch.media.values())]
    return not any(bool(((t.sample[row] == sample) & (t.order[row] > order)).any()) for t in tables)
