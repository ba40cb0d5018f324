#!/usr/bin/env bash
# Runs the tests of the runtime and of the kernels on GPUs, several ranks on one where there are fewer GPUs than ranks.
# About twenty minutes on one GPU and 16 cores; WORKERS (7) of them test at once.  Arguments go to pytest:
#
#   bash tests/gpu.sh tests/runtime/shard -k state
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/environment test
[ $# -gt 0 ] || set -- tests/runtime tests/kernels
export BMTRAIN_TEST_DEVICE=cuda BMTRAIN_TEST_DEFAULT_DEVICE=cuda
exec python -m pytest -n "${WORKERS:-7}" --dist worksteal --timeout 150 --files "$@" </dev/null
