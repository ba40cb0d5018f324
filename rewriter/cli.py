"""The command line: ``bmt-convert PATH... [--write | --output DIR | --check]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rewriter.convert import convert_paths, write_file
from rewriter.discover import sources, walk
from rewriter.plan import Options
from rewriter.report import diff, listing
from rewriter.types import InputError, Result

CHANGED, FAILED = 1, 2


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="bmt-convert",
        description="Convert ordinary torch code to bmtrain. Without options it prints a diff and writes nothing.",
    )
    made.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="Python files or folders")
    target = made.add_mutually_exclusive_group()
    target.add_argument("--write", action="store_true", help="change the files in place")
    target.add_argument("--output", type=Path, metavar="DIR", help="write the whole project, converted, to DIR")
    target.add_argument("--check", action="store_true", help="write nothing; exit 1 if something would change")
    made.add_argument("--diff", action="store_true", help="print a diff (the default when nothing is written)")
    made.add_argument("--unsafe", action="store_true", help="also apply edits that need a look")
    made.add_argument("--quiet", "-q", action="store_true", help="print the summary only")
    made.add_argument("--blocks", action="append", default=[], metavar="CLASS.ATTR", help="name a stack of blocks")
    made.add_argument("--select", action="append", default=[], metavar="CODES", help="apply these rules only")
    made.add_argument("--ignore", action="append", default=[], metavar="CODES", help="do not apply these rules")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 ``--check`` found something to change, 2 an input could not be converted."""
    options = parser().parse_args(arguments)
    try:
        return _run(options)
    except InputError as error:
        print(f"bmt-convert: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        sys.stderr.close()
        return FAILED


def _run(options: argparse.Namespace) -> int:
    output: Path | None = options.output
    if output is not None and any(path.resolve() == output.resolve() for path in options.paths):
        raise InputError(f"{output}: --output must not be the input; use --write to convert in place")
    skip = output.resolve() if output is not None else None
    paths = list(dict.fromkeys(item for path in options.paths for item in sources(path, (), skip)))
    roots = [path for path in options.paths if path.is_dir()]
    results = convert_paths(paths, _conversion(options), roots)
    for result in results:
        if result.error:
            print(f"bmt-convert: {result.error}", file=sys.stderr)
    if output is not None:
        _write_tree(options.paths, output, results)
    elif options.write:
        for result in results:
            if result.changed:
                _write_back(result)
    if options.diff or not (options.write or output is not None or options.check):
        for result in results:
            sys.stdout.write(diff(result, sys.stdout.isatty()))
    stream = sys.stdout if options.write or output is not None or options.check else sys.stderr
    for line in listing(results, options.quiet):
        print(line, file=stream)
    if any(result.error for result in results):
        return FAILED
    return CHANGED if options.check and any(result.changed for result in results) else 0


def _conversion(options: argparse.Namespace) -> Options:
    def codes(values: list[str]) -> tuple[str, ...]:
        return tuple(code.strip() for value in values for code in value.split(",") if code.strip())

    return Options(options.unsafe, codes(options.select), codes(options.ignore), tuple(options.blocks))


def _write_back(result: Result) -> None:
    path = result.path.resolve()
    if path.read_bytes() != result.before:
        raise InputError(f"{result.path}: changed while it was being converted; left as it is")
    write_file(path, result.after)


def _write_tree(paths: Sequence[Path], output: Path, results: Sequence[Result]) -> None:
    """The projects whole: converted files, and copies of all others."""
    converted = {result.path: result for result in results}
    for path in paths:
        files = [path] if path.is_file() else walk(path, (), output.resolve())
        base = path.parent if path.is_file() else path
        target = output if len(paths) == 1 or path.is_file() else output / path.resolve().name
        for item in files:
            found = converted.get(item)
            data = item.read_bytes() if found is None or found.error else found.after
            write_file(target / item.relative_to(base), data, mode_of=item)


if __name__ == "__main__":
    sys.exit(main())
