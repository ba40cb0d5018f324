#!/usr/bin/env bash
# The model zoo, whole: downloads real packages, converts them, verifies their models, writes docs/zoo.md.
# Arguments choose families, or nine of them in an environment of their own, without writing the table:
#
#   bash tests/zoo.sh 'timm*' transformers__gpt2
#   bash tests/zoo.sh --subset
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/environment test
if [ "${1-}" = --subset ]; then
    BMTRAIN_ZOO=$PWD/.venv/zoo exec python -m tests.survey.zoo subset
fi
python -m tests.survey.zoo prepare
status=0
python -m tests.survey.zoo run "$@" || status=1
python -m tests.survey.zoo table
exit $status
