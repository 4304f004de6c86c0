"""Masked words and matching by a cross-modal encoder above frozen states: LXMERT (arXiv 1908.07490, sections 2 and 3.1).

    L_words = -mean_i log softmax(E n(gelu(G h_i)))_(w_i)        L_match = -mean_p log softmax(C tanh(P h_0))_(y_p)

with h the words and v the places of a picture behind layers of, A being one set of weights for both directions (as in the
released code), S and F self-attentions and feed-forward networks of either kind, n layer norms,

    h, v <- n(h + A(h, v)), n(v + A(v, h));    h <- n(h + S_h(h));    h <- n(h + F_h(h));    v likewise.

Words enter as states of the frozen causal decoder behind its last norm, E is its vocabulary head. A masked word is a trained
row at its input ([MASK], the row that stands for [EOI] elsewhere), so that the word itself never enters; what stands behind it
is heard of in these layers alone, where all see all. A picture enters as the pass's media states, which know their places
(`xfusion.fusion.connectors.object_encoder`), behind [BOI]. The first position of a text, the base's beginning of text, is never
masked, and matching is read from it, as from LXMERT's [CLS].

Shape legend: ``B`` batch row, ``n`` positions of one owner, ``N`` pairs of a batch, ``k`` pairs that are read, ``w`` words and
``m`` rows of a picture, ``W`` width of the encoder, ``D`` model width, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xfusion.data.sequence import END_OF_MEDIA, Batch, XFusionError
from xfusion.objectives.base import Losses, Objective, Output, Run
from xfusion.objectives.contrastive import pair_places, same
from xfusion.objectives.matching import members

EPSILON = 1e-12
"""Of the layer norms, as in BERT."""

Stream = tuple[Tensor, Tensor]
"""States ``[k, w, W]`` and which of them there are, bool ``[k, w]``."""


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=EPSILON)


def _attention(width: int, heads: int) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(width, heads, batch_first=True)


def _read(attention: nn.Module, x: Tensor, y: Tensor, there: Tensor) -> Tensor:
    return attention(x, y, y, key_padding_mask=~there, need_weights=False)[0]


class OwnLayer(nn.Module):
    """Self-attention and a feed-forward network of one kind of states, norms behind each."""

    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.attention, self.attention_norm = _attention(width, heads), _norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))
        self.mlp_norm = _norm(width)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """``[k, w, W]`` -> ``[k, w, W]``; ``there`` says which states there are."""
        x = self.attention_norm(x + _read(self.attention, x, x, there))
        return self.mlp_norm(x + self.mlp(x))


class CrossLayer(nn.Module):
    """One layer over words and pictures (LXMERT, section 2.2, "Cross-Modality Encoder"); the last one, behind which nothing is
    read of pictures, is for words alone.
    """

    def __init__(self, width: int, heads: int, mlp: int, *, last: bool = False):
        super().__init__()
        self.cross, self.cross_norm = _attention(width, heads), _norm(width)
        self.words = OwnLayer(width, heads, mlp)
        self.media = None if last else OwnLayer(width, heads, mlp)

    def forward(self, words: Stream, media: Stream) -> tuple[Stream, Stream]:
        """Both streams behind the layer."""
        (h, said), (v, shown) = words, media
        spoken = self.words(self.cross_norm(h + _read(self.cross, h, v, shown)), said)
        if self.media is not None:
            v = self.media(self.cross_norm(v + _read(self.cross, v, h, said)), shown)
        return (spoken, said), (v, shown)


class MaskedWords(Objective):
    """Words that are masked are said, and true pairs are told from wrong ones, by what stands above words and pictures.

    Words stand before their picture, as in samples that are drawn; others are left out. Matching reads all words: their states
    are the frozen decoder's and looked up. The wrong words of a picture are those of the next pair of the batch that is no twin.
    """

    name = "masked_words"
    needs = ("text", "media")
    scope = "batch"
    gives = frozenset({"fill", "match"})

    @dataclass(frozen=True, kw_only=True)
    class Config(Objective.Config):
        """Size of the cross-modal encoder, and what it learns."""

        matching: float = 1.0
        """Factor of the matching loss in the sum; LXMERT adds all losses alike."""
        share: float = 0.15
        """Share of a text's tokens that are masked; at least one is."""
        width: int = 256
        """Width of the encoder; LXMERT's is 768."""
        heads: int = 4
        """Attention heads."""
        depth: int = 2
        """Layers; LXMERT has 5."""
        mlp: int = 1024
        """Width of the feed-forward networks."""

        def build(self) -> MaskedWords:
            """The objective."""
            if min(self.width, self.depth, self.heads) < 1 or self.width % self.heads or not 0 < self.share <= 1:
                raise XFusionError(
                    f"masked words: width {self.width}, {self.heads} heads, depth {self.depth}, share {self.share:g}: take"
                    " positive sizes, a width that the heads divide, and a share above 0 and up to 1"
                )
            return MaskedWords(self)

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.weight = config, config.weight

    @property
    def weights(self) -> dict[str, float]:
        """Of both losses."""
        return {self.name: self.weight, "matching": self.config.matching}

    def install(self, width: int, modality: Any) -> None:
        """The encoder with its ways in, and the heads."""
        del modality
        own = self.config.width
        self.words_in, self.words_norm = nn.Linear(width, own), _norm(own)
        self.media_in, self.media_norm = nn.Linear(width, own), _norm(own)
        self.layers = nn.ModuleList(
            CrossLayer(own, self.config.heads, self.config.mlp, last=number == self.config.depth - 1)
            for number in range(self.config.depth)
        )
        self.guess = nn.Sequential(nn.Linear(own, width), nn.GELU(), _norm(width))
        self.judge = nn.Sequential(nn.Linear(own, own), nn.Tanh(), nn.Linear(own, 2))

    # -- masks

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Some words of each pair masked, chosen by chance."""
        if not _learns(batch):
            return batch
        score = torch.rand(batch.text_ids.shape, generator=generator).to(batch.text_ids.device)
        ids = batch.text_ids.masked_fill(self.masked(batch, score), END_OF_MEDIA)
        return replace(batch, text_ids=ids, clean_ids=batch.unmasked().text_ids)

    def masked(self, batch: Batch, score: Tensor) -> Tensor:
        """Which words are masked, bool ``[B, n]``: of each text with a picture the share whose scores ``[B, n]`` are lowest."""
        text = batch.text
        alike = (text.sample[:, :, None] == text.sample[:, None, :]) & (text.order >= 0)[:, None, :]
        may = (alike & (text.order[:, None, :] < text.order[:, :, None])).any(-1) & (text.order >= 0)  # not the first
        shown = torch.zeros_like(may)
        for media in batch.media.values():
            own = torch.where(media.item >= 0, media.rows.sample, -1)
            shown |= (text.sample[:, :, None] == own[:, None, :]).any(-1)
        may &= shown
        alike &= may[:, None, :]
        wanted = (self.config.share * alike.sum(-1)).round().clamp(min=1)
        return may & ((alike & (score[:, None, :] < score[:, :, None])).sum(-1) < wanted)

    # -- what is read

    def judged(self, run: Run, batch: Batch, pictures: Tensor, words: Tensor) -> Tensor:
        """Logits ``[k, 2]`` (no match, match) of pictures and words by the numbers of their pairs, int64 ``[k]`` each."""
        return self._judged(self._said(run(batch.words_alone()), batch), self._shown(run, batch), pictures, words)

    def guessed(self, run: Run, batch: Batch) -> Tensor:
        """Vocabulary logits ``[k, V]`` of the masked words of a batch, pair by pair in reading order."""
        return self._guessed(run, batch, self._shown(run, batch))

    def _judged(self, said: Stream, shown: Stream, pictures: Tensor, words: Tensor) -> Tensor:
        (h, _), _ = self.fused((said[0][words], said[1][words]), (shown[0][pictures], shown[1][pictures]))
        return self.judge(h[:, 0])

    def _guessed(self, run: Run, batch: Batch, shown: Stream) -> Tensor:
        out = run(replace(batch.words_alone(), text_ids=batch.text_ids))
        (h, _), _ = self.fused(self._said(out, batch), shown)
        return out.vocabulary(self.guess(h[_at_words(batch, batch.text_ids <= END_OF_MEDIA)]))

    def fused(self, words: Stream, media: Stream) -> tuple[Stream, Stream]:
        """Both streams behind all layers."""
        for layer in self.layers:
            words, media = layer(words, media)
        return words, media

    def _said(self, out: Output, batch: Batch) -> Stream:
        """The words of each picture, of a pass over words alone.

        Raises:
            XFusionError: a picture stands without words.
        """
        row, columns, there = _words(batch)
        if not bool(there.any(dim=1).all()):
            raise XFusionError(
                "masked words: a picture of the batch has no words: set the templates' caption_dropout to 0"
            )
        states = out.states["text"][row, columns].to(self.words_in.weight.dtype)
        return self.words_norm(self.words_in(states)), there

    def _shown(self, run: Run, batch: Batch) -> Stream:
        """The places of each picture behind [BOI], a trained row."""
        (media,) = batch.media.values()
        inside = media.item >= 0
        row, sample = pair_places(media)
        segment = torch.zeros_like(row).scatter(0, media.item[inside], media.rows.segment[inside])
        columns, there = members(media.rows, row, sample, segment)
        states = run(batch.media_alone()).states["media"][row[:, None], columns].to(self.media_in.weight.dtype)
        return self.media_norm(self.media_in(states)), there

    # -- loss

    def count(self, batch: Batch) -> dict[str, int]:
        """Masked words, and pairs that are judged: two for each picture that has a wrong partner, else one."""
        if not _learns(batch):
            return {}
        (media,) = batch.media.values()
        pairs = len(media.noised) + int((following(_excluded(batch)) >= 0).sum())
        masked = int(self.masked(batch, batch.text.order.float()).sum())
        return {"matching": pairs} | ({self.name: masked} if masked else {})

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Both, in summed nats.

        Raises:
            XFusionError: a picture stands without words.
        """
        if not _learns(batch):
            return {}
        shown, clean = self._shown(run, batch), batch.unmasked()
        wrong = following(_excluded(clean))
        own, some = torch.arange(len(wrong), device=wrong.device), wrong >= 0
        said = self._said(run(clean.words_alone()), batch)
        judged = self._judged(said, shown, torch.cat([own, own[some]]), torch.cat([own, wrong[some]]))
        truth = torch.zeros(len(judged), dtype=torch.int64, device=own.device)
        truth[: len(own)] = 1
        total = functional.cross_entropy(judged.float(), truth, reduction="sum")
        out: Losses = {"matching": (total, torch.tensor(len(judged), device=own.device))}
        row, columns, _ = _words(batch)
        labels = clean.text_ids[row, columns][_at_words(batch, batch.text_ids <= END_OF_MEDIA)]
        if len(labels):
            guessed = self._guessed(run, batch, shown)
            total = functional.cross_entropy(guessed.float(), labels, reduction="sum")
            out[self.name] = (total, torch.tensor(len(labels), device=own.device))
        return out


def _learns(batch: Batch) -> bool:
    """Whether a batch is pairs of words and the picture behind them."""
    return bool(batch.media) and not batch.text_reads_media and batch.text.count > 0


def _words(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Batch row ``[N, 1]`` and columns ``[N, w]`` of the words of each picture, and which there are, bool ``[N, w]``."""
    (media,) = batch.media.values()
    row, sample = pair_places(media)
    return row[:, None], *members(batch.text, row, sample)


def _at_words(batch: Batch, chosen: Tensor) -> Tensor:
    """Chosen words ``[B, n]`` by pair, bool ``[N, w]``."""
    row, columns, there = _words(batch)
    return chosen[row, columns] & there


def _excluded(batch: Batch) -> Tensor:
    """Which pairs have no wrong words for a pair, itself among them, bool ``[N, N]``."""
    (media,) = batch.media.values()
    return same(batch, media).fill_diagonal_(True)


def following(excluded: Tensor) -> Tensor:
    """For each pair the next one behind it, the first being behind the last, that is not excluded: int64 ``[N]``, -1 for none.

    Args:
        excluded: bool ``[N, N]``.
    """
    own = torch.arange(len(excluded), device=excluded.device)
    behind = (own - own[:, None]) % max(1, len(own))
    nearest = behind.masked_fill(excluded, len(own)).argmin(dim=1)
    return torch.where(excluded.all(dim=1), -1, nearest)
