#!/usr/bin/env bash
# Makes the environment, runs the tests and says which file is running; arguments go to pytest:
#
#   bash tests/run.sh -k checkpoint
set -euo pipefail
cd "$(dirname "$0")/.."
echo "tests: about 15 minutes on two cores; an argument such as tests/rewriting/test_cli.py runs a part of them"
. .ci/environment test
status=0
# Three at a time on two cores: ranks of a test often wait for each other, or for a limit to pass. Each begins with a
# third of its own, so that tests of one file find the ranks and the references of the test before.
python -m pytest -n 3 --dist worksteal --files "$@" </dev/null || status=$?
case $status in
    0) echo "tests: all that ran have passed  ($SECONDS s)" ;;
    *) echo "tests: NOT passed, see above (pytest's exit code $status)  ($SECONDS s)" ;;
esac
exit $status
