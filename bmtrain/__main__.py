"""``bmt COMMAND ...``, also ``python -m bmtrain COMMAND ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__, doctor, plot
from .checkpoint import command as checkpoint
from .estimate import command as estimate

_COMMANDS: dict[str, tuple[Any, str]] = {
    "doctor": (doctor, "what this machine has for training, and what stands in the way"),
    "estimate": (estimate, "how much memory a model takes to train, before there is a GPU for it"),
    "plot": (plot, "draw what bmt.Meter wrote"),
    "checkpoint": (checkpoint, "look at, verify, convert and compare checkpoints (bmt-checkpoint)"),
}


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    made = argparse.ArgumentParser(
        prog="bmt", description="Tools of bmtrain; bmt-convert is another.", epilog="bmt COMMAND --help says more."
    )
    made.add_argument("--version", action="version", version=f"bmtrain {__version__}")
    made.add_argument(
        "--print-completion", choices=["bash", "zsh", "tcsh"], help="print what completes bmt in a shell; needs shtab"
    )
    commands = made.add_subparsers(dest="command", metavar="COMMAND")
    for name, (tool, text) in _COMMANDS.items():
        parent = tool.parser(add_help=False)
        commands.add_parser(name, help=text, description=parent.description, parents=[parent])
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the command; 2 if there is none."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in _COMMANDS:
        return int(_COMMANDS[given[0]][0].main(given[1:]))
    made = parser()
    options = made.parse_args(given)
    if options.print_completion is None:
        made.print_help(sys.stderr)
        return 2
    try:
        import shtab  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        print("bmt: --print-completion needs shtab: pip install shtab", file=sys.stderr)
        return 2
    print(shtab.complete(made, shell=options.print_completion))
    return 0


if __name__ == "__main__":
    sys.exit(main())
