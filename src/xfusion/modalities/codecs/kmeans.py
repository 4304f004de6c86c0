"""Sounds as codes: the index of a frozen encoder's features' nearest k-means cluster (AudioPaLM, arXiv 2306.12925).

    k = argmin_j |z - e_j|^2,  z the mean of ``pooled`` neighbouring features        e_j the mean of features assigned to j

Clusters capture meaning rather than sound: nothing here decodes them to a waveform.

Shape legend: ``n`` features, ``F`` width of a feature, ``K`` clusters.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from xfusion.data.sequence import XFusionError
from xfusion.modalities.base import SoundCodec
from xfusion.modalities.codecs import files
from xfusion.modalities.codecs.vq import nearest
from xfusion.modalities.encoders.whisper import Whisper

CLUSTERS = "clusters.safetensors"


class KMeans(SoundCodec):
    """Frames of one number each: the cluster index of the features there."""

    width = 1

    @dataclass(frozen=True, kw_only=True)
    class Config(SoundCodec.Config):
        """Which features, and which clusters of them."""

        source: str
        """A folder written by `runs/fit_sound_codes.py`."""
        encoder: SoundCodec.Config = field(default_factory=Whisper.Config)
        """The encoder whose features were clustered."""
        pooled: int = 4
        """Number of neighbouring features averaged per code: 4 of Whisper's give 12.5 codes per second."""

        @property
        def weights(self) -> Path:
            """The file of the clusters."""
            return Path(self.source) / CLUSTERS

        def build(self) -> KMeans:
            """The codec; its clusters are loaded at its first use."""
            return KMeans(self)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.features = config.encoder.build()
        if config.pooled < 1 or self.features.longest % config.pooled:
            raise XFusionError(f"{config.pooled} features to a code do not divide {self.features.longest} features")
        self.rate, self.hop = self.features.rate, self.features.hop * config.pooled
        self.longest = self.features.longest // config.pooled
        self.licence, self.encoders = self.features.licence, self.features.encoders
        self.register_buffer("clusters", torch.empty(0, self.features.width))

    clusters: Tensor
    """``[K, F]``; empty before the first use."""

    def encode(self, sounds: Tensor) -> Tensor:
        """Sounds [N, frames * hop] in [-1, 1] -> cluster indices [N, frames, 1], float32."""
        self.load()
        return nearest(self.means(sounds), self.clusters)[..., None].float()

    def means(self, sounds: Tensor) -> Tensor:
        """The pooled features to be clustered, [N, frames, F]."""
        return self.features.encode(sounds).unflatten(1, (-1, self.config.pooled)).mean(2)

    def load(self) -> None:
        """Load the clusters, once."""
        if len(self.clusters):
            return
        from safetensors.torch import load_file

        folder = Path(self.config.source)
        if not (folder / CLUSTERS).is_file():
            raise XFusionError(f"codes {self.config.source!r}: no {CLUSTERS} there: make it by runs/fit_sound_codes.py")
        stored_settings = files.read_json(folder / "config.json")
        codec_settings = settings(self)
        for name, value in codec_settings.items():
            if stored_settings.get(name) != value:
                raise XFusionError(
                    f"codes {self.config.source!r} were fitted with {name} {stored_settings.get(name)!r}, the model says"
                    f" {value!r}: give the same"
                )
        self.clusters = load_file(folder / CLUSTERS)["clusters"].to(self.clusters.device)

    def save(self, folder: Path) -> None:
        """Write the clusters and the settings that they depend on."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        facts = {"_class_name": "KMeans", "entries": len(self.clusters), **settings(self)}
        (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        save_file({"clusters": self.clusters.contiguous()}, folder / CLUSTERS)


def settings(codec: KMeans) -> dict[str, object]:
    """The settings that clusters depend on."""
    return {"encoders": sorted(codec.encoders), "pooled": codec.config.pooled, "longest": codec.longest}


def fit(x: Tensor, entries: int, *, seed: int = 0, steps: int = 100) -> tuple[Tensor, float]:
    """Cluster features by Lloyd's algorithm from k-means++ (Arthur and Vassilvitskii, 2007) until no assignment changes.

    Args:
        x: ``[n, F]``.
        entries: K.
        seed: seed of the initial clusters.
        steps: maximum number of steps.

    Returns:
        clusters ``[K, F]`` and the mean squared distance of a feature to its cluster.

    Raises:
        XFusionError: there are fewer distinct features than clusters.
    """
    if len(torch.unique(x, dim=0)) < entries:
        raise XFusionError(f"{len(torch.unique(x, dim=0))} different features do not make {entries} clusters")
    generator = torch.Generator().manual_seed(seed)
    clusters = x[torch.randint(len(x), (1,), generator=generator)]
    distance = (x - clusters).square().sum(-1)
    while len(clusters) < entries:  # choose the next with probability proportional to squared distance
        center = x[torch.multinomial(distance.clamp(min=0), 1, generator=generator)]
        clusters = torch.cat([clusters, center])
        distance = torch.minimum(distance, (x - center).square().sum(-1))
    assignment = torch.full((len(x),), -1)
    for _ in range(steps):
        previous, assignment = assignment, nearest(x, clusters)
        if torch.equal(previous, assignment):
            break
        count = torch.bincount(assignment, minlength=entries)
        total = torch.zeros_like(clusters).index_add(0, assignment, x)
        clusters = torch.where(count[:, None] > 0, total / count[:, None].clamp(min=1), clusters)
    error = (x - clusters[nearest(x, clusters)]).square().sum(-1).mean()
    return clusters, error.item()


def explained(x: Tensor, clusters: Tensor) -> float:
    """Share of the variance of features ``[n, F]`` explained by their clusters ``[K, F]``; 1 if each feature is a cluster.

        1 - mean |x - e_k|^2 / mean |x - mean x|^2

    It can be below 0 for features that the clusters were not fitted to.
    """
    error = (x - clusters[nearest(x, clusters)]).square().sum(-1).mean()
    return 1 - (error / (x - x.mean(0)).square().sum(-1).mean()).item()
