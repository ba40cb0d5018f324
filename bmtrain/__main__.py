"""``python -m bmtrain doctor | checkpoint``."""

import sys

from . import __version__, doctor
from .checkpoint import command as checkpoint
from .estimate import command as estimate

USAGE = """usage: python -m bmtrain COMMAND ...

commands:
  doctor       what this machine has for training, and what stands in the way
  estimate     how much memory a model takes to train, before there is a GPU for it
  checkpoint   look at, verify, convert and compare checkpoints (bmt-checkpoint)
  --version    the version"""


def main(arguments: list[str]) -> int:
    """Exit code of the command; 2 if there is none."""
    command, *rest = arguments or [""]
    if command == "doctor":
        return doctor.main(rest)
    if command == "estimate":
        return estimate.main(rest)
    if command == "checkpoint":
        return checkpoint.main(rest)
    if command == "--version":
        print(f"bmtrain {__version__}")
        return 0
    print(USAGE, file=sys.stdout if command in ("-h", "--help") else sys.stderr)
    return 0 if command in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
