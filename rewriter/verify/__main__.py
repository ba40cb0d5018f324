"""``python -m rewriter.verify ORIGINAL CONVERTED module:factory --ranks N``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rewriter.types import InputError, Tried
from rewriter.verify.report import as_json, explanations, rows, table, verdict
from rewriter.verify.run import Settings, verify


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m rewriter.verify",
        description="Show that a converted model is the original model: same weights, outputs, losses, gradients.",
        epilog="The factory takes no arguments and returns a model, or (model, inputs) or (model, inputs, loss).",
    )
    made.add_argument("original", type=Path, metavar="ORIGINAL", help="file or folder of the original code")
    made.add_argument("converted", type=Path, metavar="CONVERTED", help="what bmt-convert made of it")
    made.add_argument("factory", metavar="MODULE:FACTORY", help="what builds the model, importable on both sides")
    made.add_argument(
        "--ranks", type=_ranks, default=(1, 2), metavar="N[,N]", help="numbers of ranks to try (default: 1,2)"
    )
    made.add_argument(
        "--tp-size", type=_positive, default=1, metavar="N", help="of so many ranks each holds slices of split layers"
    )
    made.add_argument("--shape", action="append", default=[], metavar="NAME=2x8[:long[:50]]", help="an input's size")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--steps", type=_positive, default=3, help="optimizer steps (default: %(default)s)")
    made.add_argument(
        "--tolerance", type=float, default=1e-6, metavar="T",
        help="largest difference relative to a tensor's largest entry at 2 and more ranks (default: %(default)s); "
        "weights may differ by 10 T after one step and 100 T after all",
    )  # fmt: skip
    made.add_argument("--inexact", action="store_true", help="apply the tolerance at one rank, too, instead of 0 ulp")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--timeout", type=float, default=300.0, metavar="S", help="for each phase")
    made.add_argument("--keep", type=Path, metavar="DIR", help="where tensors that differ are written")
    made.add_argument("--json", action="store_true", help="print json instead of a table")
    return made


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _ranks(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_positive(number) for number in text.split(",")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 everything held, 1 something did not, 2 wrong arguments."""
    options = parser().parse_args(arguments)
    for path in (options.original, options.converted):
        if not path.exists():
            print(f"rewriter.verify: {path}: no such file or folder", file=sys.stderr)
            return 2
    if ":" not in options.factory:
        print(f"rewriter.verify: {options.factory}: write MODULE:FACTORY, such as model:build", file=sys.stderr)
        return 2
    if options.keep is not None:
        try:
            options.keep.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"rewriter.verify: --keep: {error}", file=sys.stderr)
            return 2
    try:
        report = verify(_settings(options))
    except KeyboardInterrupt:
        print("\nrewriter.verify: interrupted; nothing was written", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(as_json(report), indent=1))
    else:
        print("\n".join([*table(report), verdict(report)]))
    return 0 if report.held else 1


def compared(arguments: Sequence[str]) -> Tried:
    """Compare and print; the verdict is not printed yet."""
    options = parser().parse_args(arguments)
    if ":" not in options.factory:
        raise InputError(f"--verify: {options.factory}: write MODULE:FACTORY, such as model:build")
    report = verify(_settings(options))
    print("\n".join(table(report)))
    return Tried("--verify", report.held, verdict(report), tuple(rows(report)), tuple(explanations(report)))


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        original=options.original,
        converted=options.converted,
        factory=options.factory,
        ranks=options.ranks,
        seed=options.seed,
        steps=options.steps,
        shapes=tuple(options.shape),
        tolerance=options.tolerance,
        exact=not options.inexact,
        device=options.device,
        timeout=options.timeout,
        keep=options.keep,
        tp_size=options.tp_size,
    )


if __name__ == "__main__":
    sys.exit(main())
