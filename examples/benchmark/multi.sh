#!/usr/bin/env bash
# Tests and measures on all GPUs of one machine, four or more, in two parts of ten minutes at most:
#
#   bash examples/benchmark/multi.sh tests OUT     # results against plain torch, then a user's script beside DDP and FSDP2
#   bash examples/benchmark/multi.sh rows OUT      # models beside FSDP2 and DeepSpeed, weak scaling from one GPU to all
#
# Everything goes into the folder OUT, after each row, so that what was done is there when time runs out; `rows` ends
# with OUT/multi.json and OUT/multi.png. SECONDS_EACH (540) is what a part may take. PYTHON is one that has torch and
# the tests' packages, where it is not to be .venv's.
set -uo pipefail
cd "$(dirname "$0")/../.."
part=${1:?tests or rows}
out=$(realpath -m "${2:?the folder for results}")
seconds=${SECONDS_EACH:-540}
python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$python")" ] || { . .ci/environment test; python=python; }
mkdir -p "$out"
gpus=$("$python" -c "import torch; print(torch.cuda.device_count())")
[ "$gpus" -ge 1 ] || echo "no GPU here: this goes through the motions on two CPU ranks"
left() { echo $((seconds - SECONDS > 1 ? seconds - SECONDS : 1)); }
within() {  # SHARE COMMAND: at most this part, in percent, of what is left
    timeout --signal=INT --kill-after=20 "$(($(left) * $1 / 100 + 1))" "${@:2}" || echo "ended with exit code $?: ${*:2}"
}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ "$gpus" -ge 1 ]; then
    "$python" setup.py build_ext --inplace > "$out/build.log" 2>&1 || { tail "$out/build.log"; exit 1; }
    export BMTRAIN_TEST_DEVICE=cuda BMTRAIN_TEST_DEFAULT_DEVICE=cuda
fi

case $part in
    tests)
        # What runs on 4 and 8 ranks: meshes of all dimensions, parity in fp32 and bf16, checkpoints from any into any.
        within 55 "$python" -m pytest -q --long -p no:cacheprovider --junit-xml "$out/tests.xml" \
            tests/runtime/parallel tests/runtime/test_shard_size.py tests/runtime/test_parity.py \
            -k "4 or 8 or mesh" 2>&1 | tee "$out/tests.log" | tail -25
        sizes="350m:8 1.5b:4"
        [ "$gpus" -ge 1 ] || sizes="nano:1 --length 32 --steps 8"
        within 95 "$python" examples/benchmark/user.py $sizes --limit "$(($(left) * 9 / 10))" --json "$out/user.json" \
            2>&1 | tee "$out/user.log"
        ;;
    rows)
        engines="floor bmtrain fsdp2 deepspeed"
        big="7b:2:full 7b:1:full 13b:4:full 1.3b:4:none tiny:4:none 7b:2:best"
        scaled=1.3b:4:none
        if [ "$gpus" -eq 0 ]; then
            big="nano:1:full nano:1:none" scaled=nano:1:none gpus=2
            set -- --sequence 32 --steps 2 --warmup 1
        else
            set -- --steps 6 --warmup 3
        fi
        within 75 "$python" examples/benchmark/run.py $big --engines $engines --ranks "$gpus" "$@" \
            --limit "$(($(left) * 7 / 10))" --json "$out/rows.json" --picture "$out/rows.png" 2>&1 | tee "$out/rows.log"
        ranks=1
        while [ "$ranks" -le "$gpus" ]; do
            within 50 "$python" examples/benchmark/run.py "$scaled" --engines bmtrain --ranks "$ranks" "$@" \
                --limit "$(($(left) / 2))" --json "$out/weak.$ranks.json" --picture "$out/weak.$ranks.png" \
                2>&1 | tee -a "$out/rows.log"
            ranks=$((2 * ranks))
        done
        "$python" examples/benchmark/multi.py "$out"
        ;;
    *) echo "$part: it must be tests or rows" >&2; exit 2 ;;
esac
