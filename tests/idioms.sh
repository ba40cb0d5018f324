#!/usr/bin/env bash
# Runs what users write around a model at 1, 2 and 3 ranks and writes docs/idioms.md.  Arguments choose themes or idioms,
# which are only shown; BMTRAIN_TEST_DEVICE=cuda takes GPUs:   bash tests/idioms.sh penalties gradients.clip_by_value
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/environment test
PYTHONPATH=.:tests/runtime exec python -m idioms "$@" </dev/null
