"""Real training scripts from packages, converted and run whole on two ranks.

    python -m tests.survey.scripts run [NAME...]     download, convert, run, compare
    python -m tests.survey.scripts table             write docs/scripts.md

Everything is kept under $BMTRAIN_SCRIPTS (default ~/.cache/bmtrain-scripts), with an environment of its own.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys

from tests.survey.scripts import document, runner, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    if options.command == "table":
        document.write()
        return 0
    wrong = 0
    for script in table.SCRIPTS:
        if any(fnmatch.fnmatch(script.name, name) for name in options.names or ["*"]):
            wrong += not _checked(script)
    return int(wrong > 0)


def _checked(script: table.Script) -> bool:
    try:
        verdict = runner.check(script)
    except Exception as error:  # the next script may still tell something
        print(f"{script.name:20} failed   {type(error).__name__}: {error}", flush=True)
        return False
    told = "WRONG" if verdict.wrong else "refused" if script.refused else "same"
    numbers = f"{verdict.losses} losses, {verdict.difference:.0e}, {verdict.seconds:.0f} s"
    print(f"{script.name:20} {told:8} {numbers}", *verdict.wrong, sep="\n    ", flush=True)
    return not verdict.wrong


if __name__ == "__main__":
    sys.exit(main())
