"""The command line: ``bmt-convert PATH... [--write | --output DIR | --check]``."""

from __future__ import annotations

import argparse
import fnmatch
import gc
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewriter.config import read_settings
from rewriter.convert import convert_text, write_file
from rewriter.discover import sources, walk
from rewriter.docs import explain
from rewriter.formats import check_report, write_report
from rewriter.plan import Options, known_codes
from rewriter.portions import convert_project
from rewriter.report import diff, left_training, listing
from rewriter.rules import BY_CODE, RULES
from rewriter.spelling import nearest
from rewriter.types import InputError, Result

CHANGED, FAILED, LEFT = 1, 2, 3


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="bmt-convert",
        description="Convert ordinary torch code to bmtrain. Without options it prints a diff and writes nothing.",
        epilog="Exit code: 0 done, 1 --check found something to change, or --verify or --prove did not hold, "
        "2 an input could not be converted, 3 a file that trains was left as it is.",
    )
    made.add_argument(
        "paths", nargs="*", type=Path, metavar="PATH", help="Python files, notebooks or folders; - is stdin"
    )
    target = made.add_mutually_exclusive_group()
    target.add_argument("--write", action="store_true", help="change the files in place")
    target.add_argument("--output", type=Path, metavar="DIR", help="write the whole project, converted, to DIR")
    target.add_argument("--check", action="store_true", help="write nothing; exit 1 if something would change")
    made.add_argument("--diff", action="store_true", help="print a diff (the default when nothing is written)")
    made.add_argument("--unsafe", action="store_true", default=None, help="also apply edits that need a look")
    made.add_argument("--blocks", action="append", default=[], metavar="CLASS.ATTR", help="name a stack of blocks")
    made.add_argument("--select", action="append", default=[], metavar="CODES", help="apply these rules only")
    made.add_argument("--ignore", action="append", default=[], metavar="CODES", help="do not apply these rules")
    made.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="leave these files or folders out")
    made.add_argument("--report", type=Path, metavar="FILE", help="write a report; FILE ends in .json, .md or .sarif")
    made.add_argument(
        "--explain", nargs="?", const="all", metavar="CODE", help="print what a rule does, with examples; or all titles"
    )
    made.add_argument("-j", "--jobs", type=int, default=None, metavar="N", help="processes for large projects")
    made.add_argument(
        "--verify", metavar="MODULE:FACTORY", help="show that what the factory builds is the same model converted"
    )
    made.add_argument(
        "--prove",
        action="append",
        metavar="COMMAND",
        help="run a command as it is and converted, and compare all that they do; a second goes on from the first",
    )
    made.add_argument("--steps", type=int, metavar="N", help="end --prove's runs after N optimizer steps")
    made.add_argument("--still", action="store_true", help="dropout does nothing in --prove's runs")
    made.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="--prove ends a run that stalls so long"
    )
    made.add_argument("--ranks", default="1,2", metavar="N[,N]", help="numbers of ranks that --verify and --prove try")
    made.add_argument("--shape", action="append", default=[], metavar="NAME=2x8[:long]", help="an input for --verify")
    made.add_argument("--color", choices=["auto", "always", "never"], default="auto", help="colour the diff")
    made.add_argument("--quiet", "-q", action="store_true", help="print the summary only")
    made.add_argument("--verbose", "-v", action="store_true", help="print every finding, not one a rule and file")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 ``--check`` found something to change, 2 an input could not be converted, 3 one was left."""
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
    if options.explain:
        return _explain(options.explain)
    _check(options)
    settings = read_settings(options.paths[0] if str(options.paths[0]) != "-" else Path.cwd())
    conversion = _conversion(options, settings)
    if [str(path) for path in options.paths] == ["-"]:
        return _standard_input(conversion, options)
    results = _convert(options, settings, conversion)
    _check_blocks(conversion.blocks, results)
    for result in results:
        if result.error:
            print(f"bmt-convert: {result.error}", file=sys.stderr)
    if options.report is not None and options.prove is None:
        write_file(options.report, write_report(options.report, results).encode())
    held = options.verify is None or _verify(options, results)
    if options.prove is not None:
        _show(options, results)
        held = _prove(options, results) and held
    if options.output is not None:
        _write_tree(options.paths, options.output, results)
    elif options.write and not held:
        print("bmt-convert: nothing was written", file=sys.stderr)
    elif options.write:
        for result in results:
            if result.changed:
                _write_back(result)
    if options.prove is None:
        _show(options, results)
    if any(result.error for result in results):
        return FAILED
    if any(map(left_training, results)):
        return LEFT
    return CHANGED if not held or (options.check and any(result.changed for result in results)) else 0


def _check(options: argparse.Namespace) -> None:
    """Raises InputError for what cannot be meant, before anything is read."""
    if not options.paths:
        raise InputError("give a file or folder, or - for standard input")
    if options.jobs is not None and options.jobs < 1:
        raise InputError(f"--jobs: {options.jobs} is not a number above 0")
    for name, needed in (("steps", "prove"), ("still", "prove"), ("shape", "verify")):
        if getattr(options, name) and not getattr(options, needed):
            raise InputError(f"--{name} says how --{needed} is done; give that, too")
    if options.report is not None:
        check_report(options.report)


def _verify(options: argparse.Namespace, results: Sequence[Result]) -> bool:
    """Whether the project is still the same model; prints what was compared."""
    if len(options.paths) != 1:
        raise InputError("--verify takes one file or folder")
    from rewriter.verify import __main__ as tool  # needs torch, which converting does not

    path = options.paths[0].resolve()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / path.name if path.is_dir() else Path(folder)
        _write_tree([path], target, [replace(result, path=result.path.resolve()) for result in results])
        converted = target if path.is_dir() else target / path.name
        shapes = [item for shape in options.shape for item in ("--shape", shape)]
        return tool.main([str(path), str(converted), options.verify, "--ranks", options.ranks, *shapes]) == 0


def _prove(options: argparse.Namespace, results: Sequence[Result]) -> bool:
    """Whether the converted script does what the original does; prints what was compared."""
    if len(options.paths) != 1:
        raise InputError("--prove takes one file or folder")
    if options.report is not None and options.report.suffix not in (".json", ".md"):
        raise InputError(f"{options.report}: --prove writes a report that ends in .json or .md")
    from rewriter.verify.script import command_line as tool  # needs torch, which converting does not

    path = options.paths[0].resolve()
    changed = [replace(result, path=result.path.resolve()) for result in results]
    with tempfile.TemporaryDirectory(prefix="bmt-prove-") as folder:
        original, converted = Path(folder) / "original", Path(folder) / "converted"
        _write_tree([path], original, [])
        _write_tree([path], converted, changed)
        settings = tool.settings(
            original, converted, options.prove, options.ranks, options.steps, options.timeout, options.still,
            tool.refusal(results),
        )  # fmt: skip
        return tool.run(settings, options.report)


def _convert(options: argparse.Namespace, settings: dict[str, Any], conversion: Options) -> list[Result]:
    output: Path | None = options.output
    if output is not None and any(path.resolve() == output.resolve() for path in options.paths):
        raise InputError(f"{output}: --output must not be the input; use --write to convert in place")
    skip = output.resolve() if output is not None else None
    exclude = _exclude(options, settings)
    paths = list(dict.fromkeys(item for path in options.paths for item in sources(path, exclude, skip)))
    roots = [path for path in options.paths if path.is_dir()]
    progress = _progress if len(paths) > 200 and sys.stderr.isatty() else None
    gc.disable()  # syntax trees hold no garbage worth looking for
    return convert_project(paths, conversion, roots, options.jobs or settings.get("jobs", 1), progress)


def _progress(done: int, total: int) -> None:
    if done % 20 == 0 or done == total:
        end = "\n" if done == total else ""
        print(f"\r{done}/{total} files", end=end, file=sys.stderr, flush=True)


def _show(options: argparse.Namespace, results: Sequence[Result]) -> None:
    writes = options.write or options.output is not None or options.check or options.prove is not None
    if options.diff or not writes:
        color = options.color == "always" or (options.color == "auto" and sys.stdout.isatty())
        for result in results:
            sys.stdout.write(diff(result, color))
    for line in listing(results, options.quiet, options.verbose):
        print(line, file=sys.stdout if writes else sys.stderr)


def _explain(code: str) -> int:
    if code.lower() == "all":
        print("".join(f"{rule.code}  {rule.title}\n" for rule in RULES), end="")
        return 0
    rule = BY_CODE.get(code.upper())
    if rule is None:
        raise InputError(f"no rule {code}{nearest(code, BY_CODE)} --explain lists them: {', '.join(BY_CODE)}")
    print(explain(rule), end="")
    return 0


def _standard_input(conversion: Options, options: argparse.Namespace) -> int:
    """Code in, converted code out."""
    result = convert_text(sys.stdin.read(), conversion)
    _check_blocks(conversion.blocks, [result])
    if result.error:
        print(f"bmt-convert: {result.error}", file=sys.stderr)
        return FAILED
    if options.check:
        return CHANGED if result.changed else 0
    sys.stdout.write(diff(result) if options.diff else result.after.decode())
    return 0


def _exclude(options: argparse.Namespace, settings: dict[str, Any]) -> tuple[str, ...]:
    return (*settings.get("exclude", []), *options.exclude)


def _conversion(options: argparse.Namespace, settings: dict[str, Any]) -> Options:
    def codes(key: str) -> tuple[str, ...]:
        given = [known_codes(value, f"pyproject.toml, {key}") for value in settings.get(key, [])]
        given += [known_codes(value, f"--{key}") for value in getattr(options, key)]
        return tuple(code for codes in given for code in codes)

    unsafe = settings.get("unsafe", False) if options.unsafe is None else options.unsafe
    blocks = [value.strip() for given in (*settings.get("blocks", []), *options.blocks) for value in given.split(",")]
    made = Options(unsafe, codes("select"), codes("ignore"), tuple(filter(None, blocks)))
    made.check()
    return made


def _check_blocks(patterns: Sequence[str], results: Sequence[Result]) -> None:
    known = {name for result in results for name in result.lists}
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) or _path_of(name, pattern) for name in known):
            raise InputError(f"--blocks: no list of modules {pattern} here{nearest(pattern, known) or _some(known)}")


def _path_of(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name.partition(".")[2], pattern)


def _some(known: set[str]) -> str:
    return f"; there are {', '.join(sorted(known)[:8])}" if known else "; there are none"


def _write_back(result: Result) -> None:
    path = result.path.resolve()
    if path.read_bytes() != result.before:
        raise InputError(f"{result.path}: changed while it was being converted; left as it is")
    write_file(path, result.after)


def _write_tree(paths: Sequence[Path], output: Path, results: Sequence[Result]) -> None:
    """The projects whole: converted files, and copies of all others."""
    converted = {result.path: result for result in results}
    for path in paths:
        files = [path] if path.is_file() else walk(path, (), output.resolve(), everything=True)
        base = path.parent if path.is_file() else path
        target = output if len(paths) == 1 or path.is_file() else output / path.resolve().name
        for item in files:
            found = converted.get(item)
            data = item.read_bytes() if found is None or found.error else found.after
            write_file(target / item.relative_to(base), data, mode_of=item)


if __name__ == "__main__":
    sys.exit(main())
