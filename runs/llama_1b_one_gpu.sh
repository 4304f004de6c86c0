#!/usr/bin/env bash
# A dual tower on Llama-3.2-1B at 256 px by Stable Diffusion 1.5's VAE: 256 picture tokens, the paper's shape of a picture.
#
# NOT MEASURED: this has not been run. Every figure below is a plan, none a result.
#
# data      SHARDS, webdataset tars of pictures with captions (001.jpg beside 001.txt), parquet files, or a data set that
#           `datasets` saved. Download a dataset of the hub first:
#               hf download ORG/NAME --repo-type dataset --local-dir shards
#           Its licence is its owner's. Latents take 16 kB per picture: 16 GB for a million.
# base      meta-llama/Llama-3.2-1B, frozen (accept its licence on the hub, then `hf auth login`)
# codec     stable-diffusion-v1-5/stable-diffusion-v1-5, folder vae (CreativeML Open RAIL-M)
# machine   one GPU; HOURS of training after encoding (default 24)
# expected  not measured
#
#     SHARDS='shards/{000..099}.tar' HOURS=24 bash runs/llama_1b_one_gpu.sh [FOLDER]
#     PROCESSES=8 ...     that many GPUs of one machine, each with its share of a step. SHARD=new shards the new weights with
#                         their optimizer, SHARD=all the base too, and none (the default) nothing
#
# Repeat the command after an interruption: encoding and training continue where they stopped.
set -euo pipefail
out="${1:-runs/llama_1b}" shards="${SHARDS:?name the pictures: SHARDS='shards/{000..099}.tar'}"
hours="${HOURS:-24}" processes="${PROCESSES:-1}" shard="${SHARD:-none}"
minutes=$(awk -v hours="$hours" 'BEGIN { print hours * 60; exit !(hours + 0 > 0) }') || { echo "HOURS=$hours: give a number above 0" >&2; exit 1; }
base="meta-llama/Llama-3.2-1B" codec="autoencoder_kl:stable-diffusion-v1-5/stable-diffusion-v1-5:vae"

# One pass of the VAE over all pictures. Up to one bad picture in a hundred is left out and named.
xfusion data encode "$shards" --codec "$codec" --size 256 --batch 64 --allow-bad 0.01 --base "$base" -o "$out/latents"

# Stride 4 puts a block at four of sixteen layers. Captions are sentences, so no article is put before them.
train=(train xfusion --data "$out/latents" --minutes "$minutes" --shard "$shard" -o "$out/run"
    --model.backbone.source "$base" --model.fusion.stride 4 --model.fusion.mlp 2048
    --model.image.codec "$codec" --model.image.patch 2 --model.image.sizes 256
    --stages.0.mixture.draw 64 --stages.0.mixture.caption 32 --stages.0.rate 3e-4
    --stages.0.mixture.templates.article-share 0)
compgen -G "$out/run/state/step_*" > /dev/null && train+=(--resume)
if [ "$processes" -gt 1 ]; then
    torchrun --standalone --nproc-per-node "$processes" -m xfusion.apps.cli "${train[@]}"
else
    xfusion "${train[@]}"
fi

xfusion verify "$out/run"
xfusion generate "$out/run" "a lighthouse at dusk" -n 4 -o "$out/drawn.png"
