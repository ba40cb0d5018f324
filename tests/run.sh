#!/usr/bin/env bash
# Makes the environment and runs the tests; arguments go to pytest:   bash tests/run.sh -k checkpoint
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/environment test
exec python -m pytest -n 2 "$@" </dev/null
