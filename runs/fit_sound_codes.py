"""Fit k-means clusters of a speech encoder's features: the codes of the recipe `audiopalm`.

    python runs/fit_sound_codes.py digits/train.jsonl -o codes

Every sound's own features are clustered, not those of the silence behind it but for one; what clusters are of (encoder,
window, features to a code) is written beside them, and a model with other settings refuses them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from xfusion.data.sources import Sounds, open_source
from xfusion.modalities.audio import resampled
from xfusion.modalities.codecs.kmeans import KMeans, fit
from xfusion.modalities.encoders.whisper import Whisper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--encoder", default="openai/whisper-tiny.en")
    parser.add_argument("--window", type=float, default=2.0)
    parser.add_argument("--pooled", type=int, default=4)
    parser.add_argument("--entries", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.out.exists():
        parser.error(f"{asked.out} is there already: name another folder")
    source = open_source(asked.data)
    if not isinstance(source, Sounds):
        parser.error(f"{asked.data} holds no sounds")
    encoder = Whisper.Config(source=asked.encoder, window=asked.window)
    codec = KMeans.Config(source=str(asked.out), encoder=encoder, pooled=asked.pooled).build()
    found = []
    for index in range(len(source)):
        samples = resampled(source.sound(index), codec.rate)
        frames = min(-(-len(samples) // codec.hop) + 1, codec.longest)
        wave = torch.zeros(1, frames * codec.hop)
        wave[0, : len(samples)] = samples[: wave.shape[1]]
        found.append(codec.means(wave)[0])
        if index % 100 == 99:
            print(f"{index + 1} of {len(source)} sounds", flush=True)
    features = torch.cat(found)
    clusters, error = fit(features, asked.entries, seed=asked.seed)
    codec.clusters = clusters
    codec.save(asked.out)
    variance = (features - features.mean(0)).square().sum(-1).mean().item()
    print(f"{len(features)} features in {asked.entries} clusters explain {1 - error / variance:.3f} of the variance")


if __name__ == "__main__":
    main()
