#!/usr/bin/env bash
# Lets ranks die, differ and stall in every way and writes docs/faults.md.  Arguments choose attacks, which are only
# shown:   bash tests/faults.sh 'kill-*' skip-batch-1of2-bare
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/environment test
exec python -m tests.faults "$@" </dev/null
