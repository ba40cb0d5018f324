"""Training scripts composed of idioms: converted, run on several ranks, and compared with the original on one process.

    python -m tests.survey.mutations [--count 100] [--seed 0] [--ranks 2] [--jobs 2] [--keep FOLDER] [--show SEED]

What is printed, every file that is written and what is in it must be the original's, or something must have said
why not: a line of the report that asks for the user's hand, a warning or an error of bmtrain. Verdicts:

    same     nothing differs
    said     something differs, and what was said of it is printed; "ready" marks those said only by the run
    WRONG    something differs, and nothing was said
    CRASH    the conversion or the run ends with an error that is not bmtrain's, and nothing was said
    HANG     the run does not end

The last three keep their folder, print what was drawn, and make the exit code 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tests.survey.mutations import run
from tests.survey.mutations.check import BAD, check
from tests.survey.mutations.scripts import compose


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "bmtrain-mutations")
    parser.add_argument("--show", type=int, metavar="SEED", help="print the script of a seed, and run nothing")
    options = parser.parse_args()
    if options.show is not None:
        print(*(f"# {name}\n{text}" for name, text in compose(options.show).files.items()), sep="\n")
        return 0
    words: Counter[str] = Counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, initializer=run.load) as pool:
        seeds = range(options.seed, options.seed + options.count)
        for found in pool.map(partial(check, ranks=options.ranks, keep=options.keep), seeds):
            words[found.word] += 1
            print(f"{found.seed:5} {found.word}", *found.differs, *(f"  {line}" for line in found.said), sep="\n      ")
            if found.word in BAD:
                print(f"      in {options.keep / str(found.seed)}: {found.drawn}")
            sys.stdout.flush()
    print(", ".join(f"{number} {word}" for word, number in sorted(words.items())))
    return int(any(word in BAD or word == "BROKEN" for word in words))


if __name__ == "__main__":
    sys.exit(main())
