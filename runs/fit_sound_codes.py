"""Fit k-means clusters of a speech encoder's features: the codes of the recipe `audiopalm`.

    python runs/fit_sound_codes.py digits/train.jsonl -o codes

Every sound's own features are clustered, not those of the silence behind it but for one; what clusters are of (encoder,
window, features to a code) is written beside them, and a model with other settings refuses them. How much of the variance
they explain and how many of them are used, of the sounds and of others that no cluster was fitted to, is told and, where
a file is named, written:

    python runs/fit_sound_codes.py digits/train.jsonl -o codes --held digits/held_speaker.jsonl --result FILE.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from xfusion.data.sources import Sounds, open_source
from xfusion.evaluation.machine import origin
from xfusion.modalities.audio import resampled
from xfusion.modalities.codecs.kmeans import KMeans, explained, fit
from xfusion.modalities.codecs.vq import code_use, nearest
from xfusion.modalities.encoders.whisper import Whisper
from xfusion.storage import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--encoder", default="openai/whisper-tiny.en")
    parser.add_argument("--window", type=float, default=2.0)
    parser.add_argument("--pooled", type=int, default=4)
    parser.add_argument("--entries", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held", nargs="*", default=[], help="other sounds, which only measure the clusters")
    parser.add_argument("--result", type=Path, help="a JSON file to write the figures to")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} is there already: name another folder")
    if len({"train", *(Path(name).stem for name in options.held)}) <= len(options.held):
        parser.error(
            f"--held {' '.join(options.held)}: figures go by file names, which must differ from each other and from train"
        )
    sources: dict[str, Sounds] = {}
    for part, name in (("train", options.data), *((Path(name).stem, name) for name in options.held)):
        source = open_source(name)
        if not isinstance(source, Sounds):
            parser.error(f"{name} holds no sounds")
        sources[part] = source
    provenance = origin("runs")
    encoder = Whisper.Config(source=options.encoder, window=options.window)
    codec = KMeans.Config(source=str(options.out), encoder=encoder, pooled=options.pooled).build()
    features = {part: features_of(source, codec, part) for part, source in sources.items()}
    codec.clusters, _ = fit(features["train"], options.entries, seed=options.seed)
    codec.save(options.out)
    parts = {part: figures_of(x, codec.clusters) for part, x in features.items()}
    for part, figures in parts.items():
        print(
            f"{part}: {figures['features']} features in {options.entries} clusters explain {figures['explained']:.3f} of the"
            f" variance; {figures['codes_used']:.0%} of the clusters in use, perplexity {figures['perplexity']:.1f}"
        )
    if options.result:
        settings = {"encoder": Path(options.encoder).name, "window": options.window, "pooled": options.pooled}
        write_json(
            options.result, {**provenance, **settings, "entries": options.entries, "seed": options.seed, "parts": parts}
        )


def features_of(source: Sounds, codec: KMeans, name: str) -> Tensor:
    """What is clustered of some sounds, [n, F]."""
    features = []
    for index in range(len(source)):
        samples = resampled(source.sound(index), codec.rate)
        frames = min(-(-len(samples) // codec.hop) + 1, codec.longest)
        wave = torch.zeros(1, frames * codec.hop)
        wave[0, : len(samples)] = samples[: wave.shape[1]]
        features.append(codec.means(wave)[0])
        if index % 100 == 99:
            print(f"{name}: {index + 1} of {len(source)} sounds", flush=True)
    return torch.cat(features)


def figures_of(x: Tensor, clusters: Tensor) -> dict[str, float]:
    """How many features there are, the share of their variance that clusters explain, and how the clusters are used."""
    used, perplexity = code_use(nearest(x, clusters), len(clusters))
    return {"features": len(x), "explained": explained(x, clusters), "codes_used": used, "perplexity": perplexity}


if __name__ == "__main__":
    main()
