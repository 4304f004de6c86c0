"""BLIP-2's query transformer (Q-Former, arXiv 2301.12597, section 3.1): learned queries read a frozen encoder's features.

A block is post-norm; every second one has cross-attention to the features. Queries and text share the self-attention and
have separate feed-forward networks:

    x = n1(x + SelfAttention(x));  q = n2(q + CrossAttention(q, Z));  q = n3(q + FFN_q(q)),  w = n4(w + FFN_w(w))

for queries q and text w in ``x = [q; w]``. The attention mask is one of three (`attention_pattern`): ``apart`` for the
contrastive loss, ``causal`` for text generation, ``together`` for matching. After the last block each query is projected to
the model's width.

Shape legend: ``N`` media items, ``M`` features of an item, ``F`` width of a feature, ``K`` queries, ``W`` width of the
queries, ``D`` model width, ``n`` text tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from xfusion.data.sequence import MediaRows, XFusionError
from xfusion.fusion.connectors.base import Connector, ItemFeatures, gather_features, scatter_states

EPSILON = 1e-12
"""Epsilon of the layer norms, as in BERT."""


def attention_pattern(pattern: Literal["apart", "causal", "together"], queries: int, words: int) -> Tensor:
    """Which positions of [queries; text] see which, bool ``[K + n, K + n]`` (figure 2, right).

    Args:
        pattern: ``apart``: queries and text see their own kind; ``causal``: queries see queries, a text token sees all queries
            and the text up to itself; ``together``: full attention.
        queries: number of queries.
        words: number of text tokens.
    """
    is_word = torch.arange(queries + words) >= queries
    if pattern == "together":
        return torch.ones(len(is_word), len(is_word), dtype=torch.bool)
    if pattern == "apart":
        return is_word[:, None] == is_word
    order = torch.where(is_word, torch.arange(queries + words), 0)
    return order[None, :] <= order[:, None]


def _perceptron(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class Block(nn.Module):
    """One layer over [queries; text]."""

    def __init__(self, width: int, heads: int, mlp: int, feature_width: int | None, words: bool):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        if feature_width is not None:
            self.cross = nn.MultiheadAttention(width, heads, kdim=feature_width, vdim=feature_width, batch_first=True)
            self.cross_norm = nn.LayerNorm(width, eps=EPSILON)
        self.has_cross_attention = feature_width is not None
        self.query_mlp, self.query_norm = _perceptron(width, mlp), nn.LayerNorm(width, eps=EPSILON)
        if words:
            self.word_mlp, self.word_norm = _perceptron(width, mlp), nn.LayerNorm(width, eps=EPSILON)

    def forward(
        self,
        x: Tensor,
        features: Tensor,
        present: Tensor | None,
        queries: int,
        visible: Tensor | None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """``[N, K + n, W]`` -> ``[N, K + n, W]``.

        Args:
            x: queries, followed by the text if there is any.
            features: features from the frozen encoder, ``[N, M, F]``.
            present: which features exist (are not padding), bool ``[N, M]``; None means all.
            queries: number of queries.
            visible: a mask from `attention_pattern`; None means full attention.
            padding: which positions of ``x`` nothing attends to, bool ``[N, K + n]``; None means none.
        """
        blocked_mask = None if visible is None else ~visible
        attended = self.attention(x, x, x, key_padding_mask=padding, attn_mask=blocked_mask, need_weights=False)[0]
        x = self.norm(x + attended)
        q, words = x[:, :queries], x[:, queries:]
        if self.has_cross_attention:
            padding_mask = None if present is None else ~present
            attended = self.cross(q, features, features, key_padding_mask=padding_mask, need_weights=False)[0]
            q = self.cross_norm(q + attended)
        q = self.query_norm(q + self.query_mlp(q))
        return torch.cat([q, self.word_norm(words + self.word_mlp(words))], dim=1) if words.shape[1] else q


class QueryTransformer(nn.Module):
    """Learned queries, optionally followed by text, and the blocks."""

    def __init__(
        self, *, queries: int, width: int, heads: int, layers: int, mlp: int, feature_width: int, words: bool = False
    ):
        super().__init__()
        if width % heads:
            raise XFusionError(f"query transformer: width {width} is not a multiple of its {heads} heads")
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp, None if index % 2 else feature_width, words) for index in range(layers)
        )

    def forward(
        self,
        features: Tensor,
        present: Tensor | None = None,
        words: Tensor | None = None,
        visible: Tensor | None = None,
        said: Tensor | None = None,
    ) -> Tensor:
        """Features ``[N, M, F]`` -> queries ``[N, K, W]``, followed by the text if given.

        Args:
            features: features from the frozen encoder.
            present: which features exist (are not padding), bool ``[N, M]``; None means all.
            words: text embeddings ``[N, n, W]``.
            visible: one of the three masks of `attention_pattern`; None means full attention.
            said: which words exist (are not padding), bool ``[N, n]``; None means all.
        """
        padding = None
        if said is not None:
            padding = torch.cat([said.new_zeros(len(said), len(self.queries)), ~said], dim=1)
        x = self.queries.expand(len(features), -1, -1)
        x = self.norm(x if words is None else torch.cat([x, words.to(x.dtype)], dim=1))
        for block in self.blocks:
            x = block(x, features, present, len(self.queries), visible, padding)
        return x


class Queries(Connector):
    """The query transformer in front of a frozen model: one state per query, for any number of features."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Connector.Config):
        """Size of the query transformer."""

        queries: int = 7
        """Number of learned queries: the tokens of a picture."""
        query_width: int = 256
        """Width of the queries; BLIP-2's is 768."""
        heads: int = 4
        """Attention heads."""
        depth: int = 4
        """Number of blocks; every second one, starting with the first, reads the features."""
        mlp: int = 1024
        """Width of the feed-forward networks."""
        words: bool = False
        """Whether words may stand beside the queries (`Queries.read`): they have feed-forward networks of their own, which are
        trained by `xfusion.objectives.query_pretraining`."""

    def __init__(self, config: Config, width: int, token_width: int, scale: float):
        super().__init__(config, width, token_width, scale)
        self.query_width, self.reads_words = config.query_width, config.words
        self.transformer = QueryTransformer(
            queries=config.queries,
            width=config.query_width,
            heads=config.heads,
            layers=config.depth,
            mlp=config.mlp,
            feature_width=self.feature_width,
            words=config.words,
        )
        self.project = nn.Linear(config.query_width, width)
        nn.init.normal_(self.project.weight, std=scale / math.sqrt(config.query_width))
        nn.init.zeros_(self.project.bias)

    def connect(self, media: MediaRows) -> Tensor:
        """All features of an item at once."""
        items = gather_features(self, media)
        return scatter_states(self.project(self.transformer(items.features, _present(items))), items, media)

    def features(self, media: MediaRows) -> tuple[Tensor, Tensor]:
        """The features of each item ``[N, M, F]``, and which of them exist, bool ``[N, M]``."""
        items = gather_features(self, media)
        return items.features, _present(items)

    def read(
        self,
        features: Tensor,
        present: Tensor,
        words: Tensor,
        said: Tensor,
        pattern: Literal["apart", "causal", "together"],
    ) -> tuple[Tensor, Tensor]:
        """Queries ``[N, K, W]`` and words ``[N, n, W]`` after the last block, under one of the three masks (`Config.words`).

        Args:
            features: features of each item, ``[N, M, F]``.
            present: which of them exist, bool ``[N, M]``.
            words: text embeddings, ``[N, n, W]``.
            said: which words exist, bool ``[N, n]``.
            pattern: who attends to whom.
        """
        queries = len(self.transformer.queries)
        visible = attention_pattern(pattern, queries, words.shape[1]).to(words.device)
        x = self.transformer(features, present, words, visible, said)
        return x[:, :queries], x[:, queries:]


def _present(items: ItemFeatures) -> Tensor:
    """Which features exist, or all where an item has no rows in this pass: a softmax needs a key."""
    return items.present | ~items.present.any(dim=1, keepdim=True)
