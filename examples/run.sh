#!/usr/bin/env bash
# The whole way on this machine, no GPU needed: convert plain_gpt, train it on two ranks with an interruption, compare
# with the unconverted script, sample from the converted run's checkpoint with the unconverted model.
#
#   bash examples/run.sh [FOLDER]        everything written goes to FOLDER (default examples/out), which is emptied
set -euo pipefail
mkdir -p "${1:-$(dirname "$0")/out}"
out=$(cd "${1:-$(dirname "$0")/out}" && pwd)
cd "$(dirname "$0")/.."
exec </dev/null
export CUDA_VISIBLE_DEVICES=  # the same on every machine: two ranks would need two GPUs
export OMP_NUM_THREADS=1  # two processes share two cores; threads on top would only wait for each other
step() { printf '\n== %s  [%d s so far]\n' "$*" "$SECONDS"; }

step "0. the environment: once, two to four minutes; the rest takes about three"
. .ci/environment examples
rm -rf "$out"/{converted,converted_run,plain_run,converted.jsonl,plain.jsonl,losses.png}

step "1. convert (seconds)"
bmt-convert examples/plain_gpt --output "$out/converted"

train_converted() {
    torchrun --standalone --nproc_per_node=2 "$out/converted/train.py" \
        --out "$out/converted_run" --losses "$out/converted.jsonl" "$@"
}
step "2. train on two ranks, until it is interrupted after step 220 (about a minute)"
train_converted --stop-after 220
step "2. resume from the checkpoint of step 200 (about half a minute)"
train_converted --resume

step "3. the unconverted script, one process, the same global batches (about a minute)"
python examples/plain_gpt/train.py --out "$out/plain_run" --losses "$out/plain.jsonl"
step "3. compare both (seconds)"
python examples/compare.py "$out/plain.jsonl" "$out/converted.jsonl" --picture "$out/losses.png"

step "4. sample from the converted run's checkpoint with the unconverted model (seconds)"
python examples/plain_gpt/sample.py "$out/converted_run/checkpoint.pt" --prompt "The with statement"
step "done: the losses are drawn in $out/losses.png"
