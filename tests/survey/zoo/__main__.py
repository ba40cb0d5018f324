"""The model zoo: real models from packages, converted from the source they ship, verified on 1 and 2 ranks.

    python -m tests.survey.zoo prepare [PACKAGE...]     download, unpack, convert
    python -m tests.survey.zoo run [FAMILY...]          verify; FAMILY may end in * (all of one package: transformers*)
    python -m tests.survey.zoo table                    write docs/zoo.md
    python -m tests.survey.zoo subset                   prepare and verify nine families, anew

Everything is kept under $BMTRAIN_ZOO (default ~/.cache/bmtrain-zoo), with an environment of its own.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys

from tests.survey.zoo import prepare, runner, table
from tests.survey.zoo.packages import PACKAGES, SUBSET


def subset() -> int:
    """Exit code 0 when all were the same, and, with a message, where no package can be had."""
    try:
        prepare.prepare(list(dict.fromkeys(name.partition("__")[0] for name in SUBSET)), again=True)
    except prepare.UnreachableError as error:
        print(f"SKIPPED: {len(SUBSET)} families of the model zoo were not verified: {error}")
        return 0
    return runner.run(list(SUBSET), again=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "run", "table", "subset"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--again", action="store_true", help="verify or convert also what has been done before")
    options = parser.parse_intermixed_args()
    if options.command == "prepare":
        prepare.prepare(options.names or list(PACKAGES), options.again)
        return 0
    if options.command == "table":
        table.write()
        return 0
    if options.command == "subset":
        return subset()
    wanted = [name for name in runner.families() if any(fnmatch.fnmatch(name, n) for n in options.names or ["*"])]
    return runner.run(wanted, options.again)


if __name__ == "__main__":
    sys.exit(main())
