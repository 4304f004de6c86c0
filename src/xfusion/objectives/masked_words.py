"""Masked language modelling and matching with a cross-modal encoder on frozen states: LXMERT (arXiv 1908.07490, 2 and 3.1).

    L_words = -mean_i log softmax(E n(gelu(G h_i)))_(w_i)        L_match = -mean_p log softmax(C tanh(P h_0))_(y_p)

with h the states of the text and v those of the picture. In each layer A is cross-attention with one set of weights for both
directions (as in the released code), S and F are self-attention and feed-forward networks of each stream, n layer norms:

    h, v <- n(h + A(h, v)), n(v + A(v, h));    h <- n(h + S_h(h));    h <- n(h + F_h(h));    v likewise.

Text enters as the frozen causal decoder's hidden states after its last norm; E is its LM head. A masked token is replaced at
the decoder's input by a trained row ([MASK], the row used for [EOI] elsewhere), so the token itself never enters. Text after
it is visible only in these layers, whose attention is bidirectional. A picture enters as the pass's media states, which
include positions (`xfusion.fusion.connectors.object_encoder`), after [BOI]. The first position of a text, the base's BOS
token, is never masked; matching is read from it, as from LXMERT's [CLS].

Shape legend: ``B`` batch row, ``n`` positions of one owner, ``N`` pairs of a batch, ``k`` pairs to score, ``w`` text tokens
and ``m`` rows of a picture, ``W`` width of the encoder, ``D`` model width, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xfusion.data.sequence import END_OF_MEDIA, Batch, XFusionError
from xfusion.objectives.base import Losses, Objective, Output, Run
from xfusion.objectives.contrastive import has_pairs, pair_places
from xfusion.objectives.matching import excluded_pairs, item_columns

EPSILON = 1e-12
"""Epsilon of the layer norms, as in BERT."""

Stream = tuple[Tensor, Tensor]
"""Hidden states ``[k, w, W]`` and their mask, bool ``[k, w]``, False at padding."""


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=EPSILON)


def _attention(width: int, heads: int) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(width, heads, batch_first=True)


def _attend(attention: nn.Module, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return attention(x, y, y, key_padding_mask=~mask, need_weights=False)[0]


class SelfAttentionLayer(nn.Module):
    """Self-attention and a feed-forward network of one stream, post-norm."""

    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.attention, self.attention_norm = _attention(width, heads), _norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))
        self.mlp_norm = _norm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``[k, w, W]`` -> ``[k, w, W]``; ``mask`` is False at padding."""
        x = self.attention_norm(x + _attend(self.attention, x, x, mask))
        return self.mlp_norm(x + self.mlp(x))


class CrossLayer(nn.Module):
    """One layer over text and pictures (LXMERT, section 2.2, "Cross-Modality Encoder"). The last layer updates only the text,
    because nothing reads the picture states after it.
    """

    def __init__(self, width: int, heads: int, mlp: int, *, last: bool = False):
        super().__init__()
        self.cross, self.cross_norm = _attention(width, heads), _norm(width)
        self.words = SelfAttentionLayer(width, heads, mlp)
        self.media = None if last else SelfAttentionLayer(width, heads, mlp)

    def forward(self, words: Stream, media: Stream) -> tuple[Stream, Stream]:
        """Both streams after the layer."""
        (h, text_mask), (v, media_mask) = words, media
        new_h = self.words(self.cross_norm(h + _attend(self.cross, h, v, media_mask)), text_mask)
        if self.media is not None:
            v = self.media(self.cross_norm(v + _attend(self.cross, v, h, text_mask)), media_mask)
        return (new_h, text_mask), (v, media_mask)


class MaskedWords(Objective):
    """Predicts masked tokens and tells true pairs from wrong ones, with a cross-modal encoder above text and picture states.

    Text comes before its picture, as in drawing samples; other samples are skipped. Matching reads the unmasked text, whose
    states come from the frozen decoder and are looked up. The wrong text for a picture is that of the next pair of the batch
    whose picture group and text both differ.
    """

    name = "masked_words"
    needs = ("text", "media")
    scope = "batch"
    gives = frozenset({"fill", "match"})

    @dataclass(frozen=True, kw_only=True)
    class Config(Objective.Config):
        """Size of the cross-modal encoder, and its losses."""

        matching: float = 1.0
        """Weight of the matching loss in the sum; LXMERT weights all losses equally."""
        share: float = 0.15
        """Share of a text's tokens to mask; at least one is masked."""
        width: int = 256
        """Width of the encoder; LXMERT's is 768."""
        heads: int = 4
        """Attention heads."""
        depth: int = 2
        """Number of layers; LXMERT has 5."""
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
        """Weights of both losses."""
        return {self.name: self.weight, "matching": self.config.matching}

    def install(self, width: int, modality: Any) -> None:
        """Create the encoder, its input projections, and the heads."""
        del modality
        inner = self.config.width
        self.words_in, self.words_norm = nn.Linear(width, inner), _norm(inner)
        self.media_in, self.media_norm = nn.Linear(width, inner), _norm(inner)
        self.layers = nn.ModuleList(
            CrossLayer(inner, self.config.heads, self.config.mlp, last=layer == self.config.depth - 1)
            for layer in range(self.config.depth)
        )
        self.guess = nn.Sequential(nn.Linear(inner, width), nn.GELU(), _norm(width))
        self.judge = nn.Sequential(nn.Linear(inner, inner), nn.Tanh(), nn.Linear(inner, 2))

    # -- masks

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Masks some text tokens of each pair, chosen at random."""
        if not has_pairs(batch):
            return batch
        score = torch.rand(batch.text_ids.shape, generator=generator).to(batch.text_ids.device)
        ids = batch.text_ids.masked_fill(self.masked(batch, score), END_OF_MEDIA)
        return replace(batch, text_ids=ids, clean_ids=batch.unmasked().text_ids)

    def masked(self, batch: Batch, score: Tensor) -> Tensor:
        """Which tokens to mask, bool ``[B, n]``: in each text with a picture, the `share` with the lowest ``score``."""
        text = batch.text
        same_text = (text.sample[:, :, None] == text.sample[:, None, :]) & (text.order >= 0)[:, None, :]
        is_maskable = (same_text & (text.order[:, None, :] < text.order[:, :, None])).any(-1) & (
            text.order >= 0
        )  # not the first
        has_picture = torch.zeros_like(is_maskable)
        for media in batch.media.values():
            media_sample = torch.where(media.item >= 0, media.rows.sample, -1)
            has_picture |= (text.sample[:, :, None] == media_sample[:, None, :]).any(-1)
        is_maskable &= has_picture
        same_text &= is_maskable[:, None, :]
        num_masked = (self.config.share * same_text.sum(-1)).round().clamp(min=1)
        return is_maskable & ((same_text & (score[:, None, :] < score[:, :, None])).sum(-1) < num_masked)

    # -- what is read

    def match_logits(self, run: Run, batch: Batch, pictures: Tensor, words: Tensor) -> Tensor:
        """Logits ``[k, 2]`` (no match, match) of pictures and texts, given by their pairs' indices, int64 ``[k]`` each."""
        return self._match_logits(
            self._text_stream(run(batch.words_alone()), batch), self._media_stream(run, batch), pictures, words
        )

    def masked_logits(self, run: Run, batch: Batch) -> Tensor:
        """Vocabulary logits ``[k, V]`` at the masked tokens of a batch, pair by pair in reading order."""
        return self._masked_logits(run, batch, self._media_stream(run, batch))

    def _match_logits(self, text_stream: Stream, media_stream: Stream, pictures: Tensor, words: Tensor) -> Tensor:
        (h, _), _ = self.fused(
            (text_stream[0][words], text_stream[1][words]), (media_stream[0][pictures], media_stream[1][pictures])
        )
        return self.judge(h[:, 0])

    def _masked_logits(self, run: Run, batch: Batch, media_stream: Stream) -> Tensor:
        output = run(replace(batch.words_alone(), text_ids=batch.text_ids))
        (h, _), _ = self.fused(self._text_stream(output, batch), media_stream)
        return output.vocabulary(self.guess(h[_by_pair(batch, batch.text_ids <= END_OF_MEDIA)]))

    def fused(self, words: Stream, media: Stream) -> tuple[Stream, Stream]:
        """Both streams after all layers."""
        for layer in self.layers:
            words, media = layer(words, media)
        return words, media

    def _text_stream(self, output: Output, batch: Batch) -> Stream:
        """The text of each picture as a stream, from a text-only pass.

        Raises:
            XFusionError: a picture has no text.
        """
        row, columns, mask = _text_columns(batch)
        if not bool(mask.any(dim=1).all()):
            raise XFusionError(
                "masked words: a picture of the batch has no words: set the templates' caption_dropout to 0"
            )
        states = output.states["text"][row, columns].to(self.words_in.weight.dtype)
        return self.words_norm(self.words_in(states)), mask

    def _media_stream(self, run: Run, batch: Batch) -> Stream:
        """Each picture as a stream: [BOI], a trained row, then its tokens."""
        (media,) = batch.media.values()
        is_item = media.item >= 0
        row, sample = pair_places(media)
        segment = torch.zeros_like(row).scatter(0, media.item[is_item], media.rows.segment[is_item])
        columns, mask = item_columns(media.rows, row, sample, segment)
        states = run(batch.media_alone()).states["media"][row[:, None], columns].to(self.media_in.weight.dtype)
        return self.media_norm(self.media_in(states)), mask

    # -- loss

    def count(self, batch: Batch) -> dict[str, int]:
        """Masked tokens, and scored pairs: two for each picture that has a wrong partner, otherwise one."""
        if not has_pairs(batch):
            return {}
        (media,) = batch.media.values()
        pairs = len(media.noised) + int((next_partner(excluded_pairs(batch, media)) >= 0).sum())
        masked = int(self.masked(batch, batch.text.order.float()).sum())
        return {"matching": pairs} | ({self.name: masked} if masked else {})

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Both losses, summed in nats.

        Raises:
            XFusionError: a picture has no text.
        """
        if not has_pairs(batch):
            return {}
        media_stream, clean = self._media_stream(run, batch), batch.unmasked()
        (media,) = clean.media.values()
        partner = next_partner(excluded_pairs(clean, media))
        pair_index, has_partner = torch.arange(len(partner), device=partner.device), partner >= 0
        text_stream = self._text_stream(run(clean.words_alone()), batch)
        match_logits = self._match_logits(
            text_stream,
            media_stream,
            torch.cat([pair_index, pair_index[has_partner]]),
            torch.cat([pair_index, partner[has_partner]]),
        )
        match_labels = torch.zeros(len(match_logits), dtype=torch.int64, device=pair_index.device)
        match_labels[: len(pair_index)] = 1
        total = functional.cross_entropy(match_logits.float(), match_labels, reduction="sum")
        losses: Losses = {"matching": (total, torch.tensor(len(match_logits), device=pair_index.device))}
        row, columns, _ = _text_columns(batch)
        labels = clean.text_ids[row, columns][_by_pair(batch, batch.text_ids <= END_OF_MEDIA)]
        if len(labels):
            word_logits = self._masked_logits(run, batch, media_stream)
            total = functional.cross_entropy(word_logits.float(), labels, reduction="sum")
            losses[self.name] = (total, torch.tensor(len(labels), device=pair_index.device))
        return losses


def _text_columns(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Batch row ``[N, 1]`` and columns ``[N, w]`` of each picture's text, and their mask, bool ``[N, w]``."""
    (media,) = batch.media.values()
    row, sample = pair_places(media)
    return row[:, None], *item_columns(batch.text, row, sample)


def _by_pair(batch: Batch, selected: Tensor) -> Tensor:
    """A selection of text positions, bool ``[B, n]``, regrouped by pair, ``[N, w]``."""
    row, columns, mask = _text_columns(batch)
    return selected[row, columns] & mask


def next_partner(excluded: Tensor) -> Tensor:
    """For each pair the next one that is not excluded, in cyclic order: int64 ``[N]``, -1 for none.

    Args:
        excluded: bool ``[N, N]``.
    """
    pair_index = torch.arange(len(excluded), device=excluded.device)
    distance = (pair_index - pair_index[:, None]) % max(1, len(pair_index))
    nearest = distance.masked_fill(excluded, len(pair_index)).argmin(dim=1)
    return torch.where(excluded.all(dim=1), -1, nearest)
