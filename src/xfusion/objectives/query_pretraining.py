"""BLIP-2's first stage: three losses of queries and words in one query transformer (arXiv 2301.12597, section 3.2).

    s_tp = max_k  g(a_t) . f(q_pk)                                   apart:     queries and words see their own kind
    L_itc = -mean_i 1/2 (log softmax_p(s s_ip)_(p=i) + log softmax_t(s s_ti)_(t=i))
    L_itm = -mean_p log softmax(mean_k C q_pk)_(y_p)                 together:  all see all
    L_itg = -mean_j log softmax(E n(gelu(G b_j)))_(w_(j+1))          causal:    words see queries and the words before them

with q the queries and a, b the words after the last block, f and g projections to unit length, s a learned scale, C a two-class
head and E the frozen base's own LM head. The text is read behind a trained row, as in BERT: [CLS], whose state a_t summarises the
text, or [DEC], from which its first token is predicted; the last target is the base's end token. Words enter as the frozen
base's own embeddings, through one matrix, with learned positions. The frozen base's layers do not run.

Contrastive negatives and the scale are those of `contrastive`, matching's hard negatives those of `matching`. Only samples with
text before a picture (drawing samples) are pairs; captioning samples belong to the second stage and are skipped.

Shape legend: ``N`` pairs of a batch, ``k`` pairs to score, ``K`` queries, ``n`` text tokens, ``W`` width of the query
transformer, ``D`` model width, ``E`` width of a vector, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xfusion.backbone import Backbone
from xfusion.data.sequence import IGNORE, Batch, MediaRows, XFusionError
from xfusion.objectives.base import Losses, Objective, Run
from xfusion.objectives.contrastive import (
    FIRST_SCALE,
    clipped_scale,
    duplicates,
    full_precision,
    has_pairs,
    pair_places,
    project,
    symmetric_loss,
)
from xfusion.objectives.matching import excluded_pairs, item_columns, matched_pairs

ROW_STD = 0.02
"""Standard deviation that positions and the two rows start with, as in BERT and as the queries."""


class QueryPretraining(Objective):
    """Contrast, matching and generation over the pairs of a batch, in the media port's query transformer.

    It gives no ability: a later stage moves the queries on which its heads were trained.
    """

    name = "contrastive"
    scope = "batch"

    @dataclass(frozen=True, kw_only=True)
    class Config(Objective.Config):
        """The joint space, and the weights of the losses; `weight` is the contrastive one's. BLIP-2 weights all equally."""

        matching: float = 1.0
        """Weight of the matching loss in the sum."""
        generation: float = 1.0
        """Weight of the generation loss in the sum."""
        width: int = 256
        """Embedding width."""
        length: int = 32
        """Tokens of a text that are read, from its start; BLIP-2 reads as many."""

        def build(self) -> QueryPretraining:
            """The objective."""
            if min(self.width, self.length) < 1:
                raise XFusionError(
                    f"query pretraining: width {self.width}, length {self.length}: give at least 1 of each"
                )
            return QueryPretraining(self)

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.weight = config, config.weight

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the three losses."""
        return {self.name: self.weight, "matching": self.config.matching, "generation": self.config.generation}

    def attach(self, port: Any, frozen: Callable[[], Backbone]) -> None:
        """Keep the port, whose query transformer is trained here, and the base, whose embeddings and LM head are used.

        Raises:
            XFusionError: the port has no queries, or words cannot stand beside them.
        """
        if not getattr(port, "reads_words", False):
            raise XFusionError(
                f"query pretraining: the port {type(port).__name__} reads no words beside queries: take the query transformer"
                " (Queries) with words True"
            )
        self._parts = port, frozen  # not a submodule: the model trains and saves the port once

    def install(self, width: int, modality: Any) -> None:
        """Create the way in for words, and the heads."""
        del modality
        inner = self._parts[0].query_width
        self.words_in = nn.Linear(width, inner)
        self.places = nn.Embedding(1 + self.config.length, inner)
        nn.init.normal_(self.places.weight, std=ROW_STD)
        self.summary, self.start = (nn.Parameter(ROW_STD * torch.randn(inner)) for _ in range(2))
        self.words = nn.Linear(inner, self.config.width, bias=False)
        self.media = nn.Linear(inner, self.config.width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))
        self.judge = nn.Linear(inner, 2)
        self.guess = nn.Sequential(nn.Linear(inner, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12))

    # -- pairs

    def _texts(self, batch: Batch, media: MediaRows) -> tuple[Tensor, Tensor, Tensor]:
        """The text of each pair without the base's BOS: ids ``[N, n]``, which of them exist, bool ``[N, n]``, and the targets
        of [DEC] and each token, int64 ``[N, 1 + n]``. A text that is cut off does not end.

        Raises:
            XFusionError: a picture has no text.
        """
        frozen = self._parts[1]()
        row, sample = pair_places(media)
        columns, said = item_columns(batch.text, row, sample)
        begin = len(frozen.begin_ids)
        columns, said = columns[:, begin:], said[:, begin:]
        if not bool(said.any(dim=1).all()):
            raise XFusionError(
                "query pretraining: a picture of the batch has no words: set the templates' caption_dropout to 0"
            )
        ids = batch.unmasked().text_ids[row[:, None], columns]
        length = said.sum(dim=1, keepdim=True)
        offset = torch.arange(1 + ids.shape[1], device=ids.device)
        targets = functional.pad(ids, (0, 1)).masked_fill(offset == length, frozen.end_id)
        targets = targets.masked_fill(offset > length, IGNORE)
        ids, said = ids[:, : self.config.length], said[:, : self.config.length]
        targets = targets[:, : 1 + self.config.length]
        targets[length[:, 0] > self.config.length, -1] = IGNORE
        return ids.masked_fill(~said, 0), said, targets

    def _behind(self, row: Tensor, ids: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
        """Texts behind a trained row: ``[N, 1 + n, W]``, and which of the rows exist, bool ``[N, 1 + n]``."""
        with torch.no_grad():
            embeddings = self._parts[1]().embed(ids)
        words = self.words_in(embeddings.to(self.words_in.weight.dtype))
        words = torch.cat([row.to(words.dtype).expand(len(ids), 1, -1), words], dim=1)
        return words + self.places.weight[: words.shape[1]], functional.pad(said, (1, 0), value=True)

    # -- loss

    def count(self, batch: Batch) -> dict[str, int]:
        """Pairs; scored pairs, three for each pair that has a negative, otherwise one; and tokens to generate."""
        if not has_pairs(batch):
            return {}
        (media,) = batch.media.values()
        num_pairs, (_, _, targets) = len(media.noised), self._texts(batch, media)
        num_with_negative = int((~excluded_pairs(batch, media)).any(dim=1).sum())
        return {
            self.name: num_pairs,
            "matching": num_pairs + 2 * num_with_negative,
            "generation": int((targets != IGNORE).sum()),
        }

    def loss(self, run: Run, batch: Batch) -> Losses:
        """The three losses, summed in nats.

        Raises:
            XFusionError: a picture has no text.
        """
        del run
        if not has_pairs(batch):
            return {}
        port: Any = self._parts[0]
        (media,) = batch.media.values()
        features, present = port.features(media.restored())
        ids, said, targets = self._texts(batch, media)
        text, text_mask = self._behind(self.summary, ids, said)

        queries, words = port.read(features, present, text, text_mask, "apart")
        twins = duplicates(batch, media)
        with full_precision(ids):
            dtype = self.words.weight.dtype
            text_vectors = project(self.words, words[:, 0].to(dtype))
            media_vectors = project(self.media, queries.to(dtype))
            similarity = torch.einsum("te,pke->tpk", text_vectors, media_vectors).amax(dim=-1)
            scores = clipped_scale(self.log_scale) * similarity
            contrastive = symmetric_loss(scores, scores.T, twins, torch.arange(len(ids), device=ids.device))

        pictures, texts, labels = matched_pairs(similarity.detach(), twins.clone().fill_diagonal_(True))
        queries, _ = port.read(features[pictures], present[pictures], text[texts], text_mask[texts], "together")
        with full_precision(ids):
            logits = self.judge(queries.to(self.judge.weight.dtype)).mean(dim=1)
            matching = functional.cross_entropy(logits, labels, reduction="sum")

        is_target = targets != IGNORE
        text, text_mask = self._behind(self.start, ids, said)
        _, words = port.read(features, present, text, text_mask, "causal")
        logits = self._parts[1]().logits(self.guess(words[is_target])[None])[0]
        logits = logits.to(self.words.weight.dtype)
        generation = functional.cross_entropy(logits, targets[is_target], reduction="sum")
        return {
            self.name: (contrastive, torch.tensor(len(ids), device=ids.device)),
            "matching": (matching, torch.tensor(len(labels), device=ids.device)),
            "generation": (generation, is_target.sum()),
        }
