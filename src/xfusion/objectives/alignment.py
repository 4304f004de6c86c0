"""Representation alignment: media hidden states are pulled towards a frozen encoder's features of the clean picture.

    L = 1 - cos(W h, f(x_0))

with ``h`` the hidden states after a layer of the media tower and ``W`` one trainable matrix (X-Fusion, arXiv 2504.20996; after
REPA, arXiv 2410.06940, whose projector is an MLP). ``h`` is the mean over a picture's tokens and ``f`` the encoder's global
feature; or, patchwise as in REPA, each token is aligned with its place in the encoder's last feature map. The paper's encoder is
CLIP's, at its penultimate layer, for which `encoder` is a `VisionTransformer`; the default is EfficientNet-Lite0 instead.
``W`` is saved with a pack, so that training can resume; drawing and captioning use neither ``W`` nor the encoder.

Shape legend: ``B`` batch row, ``n`` media rows, ``N`` media items, ``M`` tokens of an item, ``F`` width of a feature.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xfusion.data.sequence import Batch, MediaRows, XFusionError
from xfusion.modalities.base import Encoder
from xfusion.modalities.encoders.efficientnet_lite import EfficientNetLite
from xfusion.objectives.base import Losses, Objective, Run, add_loss, noised_targets

CACHE_BYTES = 256 * 1024 * 1024
"""Size of the in-memory feature cache in bytes; the least recently used features are evicted."""


class Alignment(Objective):
    """L_align: one minus a cosine, for each noised picture with a drawing loss."""

    name = "alignment"

    @dataclass(frozen=True, kw_only=True)
    class Config(Objective.Config):
        """Which hidden states are aligned with which features."""

        weight: float = 0.5
        """Weight of this loss in the sum; the paper states none."""
        layer: int = 8
        """Use the hidden states after this layer of the media tower, counted from 1."""
        encoder: Encoder.Config = field(default_factory=EfficientNetLite.Config)
        """The frozen encoder. It must then not be used to score the model."""
        patchwise: bool = False
        """Align each token with its place in the encoder's last feature map, not their mean with the global feature."""

        def build(self) -> Alignment:
            """The objective."""
            return Alignment(self)

    def __init__(self, config: Config):
        if config.layer < 1:
            raise XFusionError(f"alignment layer {config.layer} must be at least 1, the first layer of the base")
        super().__init__()
        self.config, self.weight = config, config.weight
        self.needs = (f"media.{config.layer}",)
        self.encoders = (config.encoder,)
        self._encoder: list[Encoder] = []  # not a submodule: it is neither trained nor saved
        self._cache: OrderedDict[bytes, Tensor] = OrderedDict()

    def install(self, width: int, modality: Any) -> None:
        """Create W. The encoder is loaded at the first loss, so a pack can be used without it."""
        self.projection = nn.Linear(width, self.config.encoder.width, bias=False)
        self.modality = modality

    # -- features

    @torch.no_grad()
    def _encode(self, tokens: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
        """Features of clean tokens ``[k, M, P]``: ``[k, F]``, or ``[k, M, F]`` patchwise."""
        if not self._encoder:
            self._encoder.append(self.config.encoder.build())
            self._encoder[0].to(tokens.device)
        pictures = self.modality.decode(tokens, size)
        if not self.config.patchwise:
            return self._encoder[0].features(pictures)
        maps = self._encoder[0].maps(pictures)
        if grid[0] > maps.shape[2] or grid[1] > maps.shape[3]:
            raise XFusionError(
                f"alignment: {grid[0]} x {grid[1]} tokens are finer than the encoder's map of {maps.shape[2]} x"
                f" {maps.shape[3]}: set patchwise to False"
            )
        return functional.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)

    def features(self, media: MediaRows) -> dict[int, Tensor]:
        """The encoder's features of the clean pictures with a drawing loss, ``[F]`` or ``[M, F]`` by item number; cached.

        Pictures are copied from a device together and encoded one by one: the bits of a picture's features then do not depend
        on which others were in the cache, and a resumed run, whose cache is empty, computes the same ones.
        """
        clean, features_by_item = media.restored().tokens.float().cpu(), {}
        is_target, items = (media.has_loss & media.noised).cpu(), media.item.cpu()
        grid_row, grid_column = media.grid_row.cpu(), media.grid_column.cpu()
        for item in is_target.nonzero()[:, 0].tolist():
            is_token = items == item
            tokens = clean[is_token]
            key = hashlib.sha256(tokens.numpy().tobytes()).digest()
            if key not in self._cache:
                grid = (int(grid_row[is_token].max()) + 1, int(grid_column[is_token].max()) + 1)
                on_device = tokens[None].to(media.tokens.device)
                self._cache[key] = self._encode(on_device, grid[0] * self.modality.step, grid)[0]
            self._cache.move_to_end(key)
            features_by_item[item] = self._cache[key]
            while len(self._cache) > max(1, CACHE_BYTES // (4 * self._cache[key].numel())):
                self._cache.popitem(last=False)
        return features_by_item

    # -- loss

    def count(self, batch: Batch) -> dict[str, int]:
        """Pictures with a drawing loss."""
        return noised_targets(self.name, batch)

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Sum of the distances (one mean per picture) and the number of pictures."""
        losses: Losses = {}
        for media in batch.media.values():
            is_target = media.has_loss & media.noised
            if not bool(is_target.any()):
                continue
            states = run(batch).states
            if self.needs[0] not in states:
                raise XFusionError(
                    f"alignment layer {self.config.layer}: the base has fewer layers, choose one of them"
                )
            h, device = states[self.needs[0]].float(), media.tokens.device
            with torch.autocast(device.type, enabled=False):  # features and cosines are float32
                features = self.features(media)
                if self.config.patchwise:
                    target_features = torch.zeros(*media.item.shape, self.config.encoder.width, device=device)
                    for item, feature in features.items():
                        target_features[media.item == item] = feature
                    per_item = media.mean(
                        1 - functional.cosine_similarity(self.projection(h), target_features, dim=-1)
                    )[is_target]
                else:
                    pooled = self.projection(media.mean(h)[is_target])
                    per_item = 1 - functional.cosine_similarity(pooled, torch.stack(list(features.values())), dim=-1)
            add_loss(losses, self.name, per_item.sum(), is_target.sum())
        return losses
