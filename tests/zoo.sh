#!/usr/bin/env bash
# The model zoo, whole: downloads real packages, converts them, verifies their models, writes docs/zoo.md.
# Arguments choose families:   bash tests/zoo.sh 'timm*' transformers__gpt2
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/environment test
python -m tests.zoo prepare
status=0
python -m tests.zoo run "$@" || status=1
python -m tests.zoo table
exit $status
