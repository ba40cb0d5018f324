#!/usr/bin/env bash
# Real training scripts: downloads packages, converts them, runs original and converted scripts, writes docs/scripts.md.
# Arguments choose scripts:   bash tests/scripts.sh 'min_gru*' mnist
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/environment test
status=0
python -m tests.survey.scripts run "$@" || status=1
python -m tests.survey.scripts table
exit $status
