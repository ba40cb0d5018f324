"""The command line: ``bmt-convert PATH... [--write | --output DIR | --check]``."""

from __future__ import annotations

import argparse
import fnmatch
import gc
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from rewriter import __version__
from rewriter.config import read_settings
from rewriter.convert import convert_bytes, write_file
from rewriter.discover import excludes, sources
from rewriter.docs import explain
from rewriter.formats import check_report, write_report
from rewriter.output import check_target, copy_project, write_back, write_tree, written_place
from rewriter.page import page
from rewriter.plan import Options, known_codes
from rewriter.portions import convert_project
from rewriter.report import closing, diff, left_training, listing
from rewriter.rules import BY_CODE, RULES
from rewriter.spelling import nearest
from rewriter.terminal import progress, show
from rewriter.types import InputError, Result, Tried

CHANGED, FAILED, LEFT, INTERRUPTED = 1, 2, 3, 130
_RANKS, _TIMEOUT = "1,2", 120.0
_SAYS_HOW = {
    "steps": ["prove"], "still": ["prove"], "timeout": ["prove"], "ranks": ["verify", "prove"], "shape": ["verify"],
    "force": ["output"],
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="bmt-convert",
        description="Convert ordinary torch code to bmtrain. Without options it prints a diff and writes nothing.",
        epilog="Exit code: 0 done, 1 --check found something to change, or --verify or --prove did not hold, "
        "2 an input could not be converted, 3 a file that trains was left as it is, 130 interrupted.",
    )
    made.add_argument(
        "paths", nargs="*", type=Path, metavar="PATH", help="Python files, notebooks or folders; - is stdin"
    )
    target = made.add_mutually_exclusive_group()
    target.add_argument("--write", action="store_true", help="change the files in place")
    target.add_argument("--output", type=Path, metavar="DIR", help="write the whole project, converted, to DIR")
    target.add_argument("--check", action="store_true", help="write nothing; exit 1 if something would change")
    made.add_argument("--force", action="store_true", help="let --output write into a folder that is not empty")
    made.add_argument("--diff", action="store_true", help="print a diff (the default when nothing is written)")
    made.add_argument("--unsafe", action="store_true", default=None, help="also apply edits that need a look")
    made.add_argument("--blocks", action="append", default=[], metavar="CLASS.ATTR", help="name a stack of blocks")
    made.add_argument(
        "--tensor-parallel",
        action="store_true",
        default=None,
        help="split the layers of blocks over BMTRAIN_TP_SIZE ranks",
    )
    made.add_argument("--select", action="append", default=[], metavar="CODES", help="apply these rules only")
    made.add_argument("--ignore", action="append", default=[], metavar="CODES", help="do not apply these rules")
    made.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="leave these files or folders out")
    made.add_argument("--report", type=Path, metavar="FILE", help="write a report: a .html, .json, .md or .sarif file")
    made.add_argument(
        "--explain", nargs="?", const="all", metavar="CODE", help="print what a rule does, with examples; or all titles"
    )
    made.add_argument(
        "-j", "--jobs", type=int, default=None, metavar="N", help="processes for large projects (default: one a core)"
    )
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
    made.add_argument("--timeout", type=float, metavar="S", help="--prove ends a run that stalls so long (120)")
    made.add_argument("--ranks", metavar="N[,N]", help="numbers of ranks that --verify and --prove try (1,2)")
    made.add_argument("--shape", action="append", default=[], metavar="NAME=2x8[:long]", help="an input for --verify")
    made.add_argument(
        "--color", choices=["auto", "always", "never"], default="auto", help="colour what a terminal shows"
    )
    made.add_argument("--quiet", "-q", action="store_true", help="print the summary only")
    made.add_argument("--verbose", "-v", action="store_true", help="print every finding, not one a rule and file")
    made.add_argument(
        "--print-completion", choices=["bash", "zsh", "tcsh"], help="print what completes bmt-convert; needs shtab"
    )
    made.add_argument("--version", action="version", version=f"bmt-convert {__version__}")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 ``--check`` found something to change, 2 an input could not be converted, 3 one was left."""
    options = parser().parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else list(arguments)
    options.written = "nothing was written"
    try:
        code = _run(options)
        sys.stdout.flush()
        return code
    except InputError as error:
        print(f"bmt-convert: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as stop:
        print(f"\nbmt-convert: interrupted; {stop.args[0] if stop.args else options.written}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return FAILED
    except OSError as error:
        named = f"{error.filename}: " if error.filename is not None else ""
        print(f"bmt-convert: {named}{error.strerror or error}; {options.written}", file=sys.stderr)
        _give_up_output()
        return FAILED


def _give_up_output() -> None:
    """What cannot be written is not tried again as Python ends, which would make another exit code of it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(options: argparse.Namespace) -> int:
    if options.explain:
        return _explain(options.explain)
    if options.print_completion:
        return _print_completion(options.print_completion)
    _check(options)
    alone = [str(path) for path in options.paths] == ["-"]
    settings = read_settings(Path.cwd() if alone else options.paths[0])
    conversion = _conversion(options, settings)
    if alone:
        return _standard_input(conversion, options)
    results = _convert(options, settings, conversion)
    _check_blocks(conversion.blocks, results)
    for result in results:
        if result.error:
            print(f"bmt-convert: {result.error}", file=sys.stderr)
    told_at_last = options.report is not None and options.report.suffix == ".html"
    if options.report is not None and options.prove is None and not told_at_last:
        _write_report(options.report, write_report(options.report, results))
    _show(options, results)
    tried = _tried(options, results)
    held = all(one.held for one in tried)
    if options.output is not None:
        options.written = write_tree(options.paths, options.output, results)
    elif options.write and held:
        options.written = write_back(results)
    last = _last_lines(options, results, held)
    if told_at_last:
        _write_report(options.report, page(results, last[1:], tried))
    for line in last:
        print(line, file=_stream(options))
    for one in tried:
        print(one.verdict)
    return _exit_code(results, options.check, held)


def _write_report(report: Path, text: str) -> None:
    # A name of a file may hold bytes that are no text.
    write_file(report.resolve(), text.encode("utf-8", "backslashreplace"))


def _exit_code(results: Sequence[Result], check: bool, held: bool = True) -> int:
    if any(result.error for result in results):
        return FAILED
    if any(map(left_training, results)):
        return LEFT
    return CHANGED if not held or (check and any(result.changed for result in results)) else 0


def _check(options: argparse.Namespace) -> None:
    """Raises InputError for what cannot be meant, before anything is read."""
    if not options.paths:
        raise InputError("give a file or folder, or - for standard input")
    if options.jobs is not None and options.jobs < 1:
        raise InputError(f"--jobs: {options.jobs} is not a number above 0")
    for name, needed in _SAYS_HOW.items():
        value = getattr(options, name)
        if (value or value == 0) and value is not False and not any(getattr(options, one) for one in needed):
            known = " or ".join(f"--{one}" for one in needed)
            raise InputError(f"--{name} says how {known} is done; give that, too")
    if options.report is not None:
        check_report(options.report)
    if options.output is not None:
        check_target(options.paths, options.output, options.force)
    tried = [name for name in ("verify", "prove") if getattr(options, name)]
    if any(str(path) == "-" for path in options.paths):
        if len(options.paths) > 1:
            raise InputError("- is standard input, and goes alone")
        for name in ("write", "output", *tried):
            if getattr(options, name):
                raise InputError(f"--{name} needs files; what comes on standard input goes to standard output")
    if tried and len(options.paths) != 1:
        raise InputError(f"--{tried[0]} takes one file or folder")


def _tried(options: argparse.Namespace, results: Sequence[Result]) -> list[Tried]:
    """Whether the project is still the same; prints what was compared."""
    found = []
    if options.verify is not None:
        found.append(_verify(options, results))
    if options.prove is not None:
        found.append(_prove(options, results))
    return found


def _verify(options: argparse.Namespace, results: Sequence[Result]) -> Tried:
    from rewriter.verify import __main__ as tool  # needs torch, which converting does not

    path = options.paths[0].resolve()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / path.name if path.is_dir() else Path(folder)
        copy_project([path], target, [replace(result, path=result.path.resolve()) for result in results])
        converted = target if path.is_dir() else target / path.name
        shapes = [item for shape in options.shape for item in ("--shape", shape)]
        slices = ["--tp-size", os.environ.get("BMTRAIN_TP_SIZE", "2")] if options.tensor_parallel else []
        return tool.compared(
            [str(path), str(converted), options.verify, "--ranks", options.ranks or _RANKS, *slices, *shapes]
        )


def _prove(options: argparse.Namespace, results: Sequence[Result]) -> Tried:
    report: Path | None = options.report
    if report is not None and report.suffix == ".sarif":
        raise InputError(f"{report}: --prove writes a report that ends in .html, .json or .md")
    from rewriter.verify.script import command_line as tool  # needs torch, which converting does not

    path, timeout = options.paths[0].resolve(), _TIMEOUT if options.timeout is None else options.timeout
    changed = [replace(result, path=result.path.resolve()) for result in results]
    with tempfile.TemporaryDirectory(prefix="bmt-prove-") as folder:
        original, converted = Path(folder) / "original", Path(folder) / "converted"
        copy_project([path], original, [])
        copy_project([path], converted, changed)
        settings = tool.settings(
            original, converted, options.prove, options.ranks or _RANKS, options.steps, timeout, options.still,
            tool.refusal(results),
        )  # fmt: skip
        return tool.run(settings, None if report is not None and report.suffix == ".html" else report)


def _convert(options: argparse.Namespace, settings: dict[str, Any], conversion: Options) -> list[Result]:
    skip = options.output.resolve() if options.output is not None else None
    exclude = _exclude(options, settings)
    for pattern in options.exclude:
        if not all(path.is_file() for path in options.paths) and not excludes(pattern, options.paths):
            print(f"bmt-convert: --exclude {pattern}: nothing here has such a name", file=sys.stderr)
    with progress(sys.stderr, options.quiet, _colored(options.color, sys.stderr)) as tell:
        paths = list(dict.fromkeys(item for path in options.paths for item in sources(path, exclude, skip, tell)))
        roots = [path for path in options.paths if path.is_dir()]
        gc.disable()  # syntax trees hold no garbage worth looking for
        jobs = options.jobs or settings.get("jobs") or os.cpu_count() or 1
        return convert_project(paths, conversion, roots, jobs, tell)


def _show(options: argparse.Namespace, results: Sequence[Result]) -> None:
    if options.diff or not _writes(options):
        for result in results:
            sys.stdout.write(diff(result, _colored(options.color, sys.stdout)))
    if not options.quiet:
        stream = _stream(options)
        show(listing(results, options.verbose), stream, _colored(options.color, stream))


def _last_lines(options: argparse.Namespace, results: Sequence[Result], held: bool) -> list[str]:
    """Counts, what was written, and what to run next, unless a comparison says something else."""
    output: Path | None = options.output
    place: Callable[[Path], Path] = lambda path: path  # noqa: E731
    if output is not None:
        place = lambda path: written_place(options.paths, output, path)  # noqa: E731
    again = "" if options.write or options.output else _command_that_writes(options)
    return list(closing(results, options.written, again, place))[: 3 if held else 2]


def _command_that_writes(options: argparse.Namespace) -> str:
    command = shlex.join(["bmt-convert", *(a for a in options.arguments if a not in ("--check", "--diff")), "--write"])
    return command if len(command) < 200 else "the same command with --write"


def _writes(options: argparse.Namespace) -> bool:
    """Whether standard output is not for diffs alone."""
    return bool(options.write or options.output or options.check or options.prove)


def _stream(options: argparse.Namespace) -> TextIO:
    return sys.stdout if _writes(options) else sys.stderr


def _colored(choice: str, stream: TextIO) -> bool:
    """As https://no-color.org and https://force-color.org have it; an option goes before the environment."""
    if choice != "auto":
        return choice == "always"
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def _explain(code: str) -> int:
    if code.lower() == "all":
        print("".join(f"{rule.code}  {rule.title}\n" for rule in RULES), end="")
        return 0
    rule = BY_CODE.get(code.upper())
    if rule is None:
        raise InputError(f"no rule {code}{nearest(code, BY_CODE)} --explain lists them: {', '.join(BY_CODE)}")
    print(explain(rule), end="")
    return 0


def _print_completion(shell: str) -> int:
    try:
        import shtab  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise InputError("--print-completion needs shtab: pip install shtab") from None
    print(shtab.complete(parser(), shell=shell))
    return 0


def _standard_input(conversion: Options, options: argparse.Namespace) -> int:
    """Code in, converted code out; what was found goes to standard error."""
    stream = getattr(sys.stdin, "buffer", None)
    result = convert_bytes(stream.read() if stream is not None else sys.stdin.read().encode(), conversion)
    _check_blocks(conversion.blocks, [result])
    if options.report is not None:
        _write_report(options.report, write_report(options.report, [result]))
    if result.error:
        print(f"bmt-convert: {result.error}", file=sys.stderr)
    elif options.diff:
        sys.stdout.write(diff(result, _colored(options.color, sys.stdout)))
    elif not options.check:
        sys.stdout.flush()
        sys.stdout.buffer.write(result.after)
        sys.stdout.flush()
    if not options.quiet:
        show(listing([result], options.verbose), sys.stderr, _colored(options.color, sys.stderr))
    return _exit_code([result], options.check)


def _exclude(options: argparse.Namespace, settings: dict[str, Any]) -> tuple[str, ...]:
    return (*settings.get("exclude", []), *options.exclude)


def _conversion(options: argparse.Namespace, settings: dict[str, Any]) -> Options:
    def codes(key: str) -> tuple[str, ...]:
        given = [known_codes(value, f"pyproject.toml, {key}") for value in settings.get(key, [])]
        given += [known_codes(value, f"--{key}") for value in getattr(options, key)]
        return tuple(code for codes in given for code in codes)

    unsafe = settings.get("unsafe", False) if options.unsafe is None else options.unsafe
    blocks = [value.strip() for given in (*settings.get("blocks", []), *options.blocks) for value in given.split(",")]
    split = settings.get("tensor-parallel", False) if options.tensor_parallel is None else options.tensor_parallel
    options.tensor_parallel = split
    made = Options(unsafe, codes("select"), codes("ignore"), tuple(filter(None, blocks)), split)
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


if __name__ == "__main__":
    sys.exit(main())
