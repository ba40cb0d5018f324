"""Converts the files of a project: reads them, plans and applies, gives results. Writing is a separate step."""

from __future__ import annotations

import contextlib
import difflib
import os
import stat
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File, Original
from rewriter.analyze.read.notebook import Notebook
from rewriter.analyze.read.project import Project
from rewriter.analyze.read.source import Source
from rewriter.discover import Tell
from rewriter.plan import Options, Plan, make_first_plans, make_plans
from rewriter.rules import BY_CODE
from rewriter.spelling import nearest
from rewriter.types import Conversion, InputError, Refusal, Remark, Result, failure


def convert_paths(
    paths: Sequence[Path],
    options: Options,
    roots: Iterable[Path] = (),
    tell: Tell | None = None,
    derived: dict[bytes, list[Path]] | None = None,
    absent: frozenset[str] = frozenset(),
) -> list[Result]:
    """Results of all files, in the order given.

    Where ``paths`` are a portion of a project, ``derived`` is the project's, and ``absent`` are keys of findings that
    other portions are known not to apply.
    """
    outcomes, plans = plan_paths(paths, options, roots, derived, absent, tell=tell)
    results = []
    for number, outcome in enumerate(outcomes):
        results.append(outcome if isinstance(outcome, Result) else apply_plan(outcome, plans[outcome]))
        if tell is not None:
            tell("converting", number + 1, len(outcomes))
    return results


def plan_paths(
    paths: Sequence[Path],
    options: Options,
    roots: Iterable[Path] = (),
    derived: dict[bytes, list[Path]] | None = None,
    absent: frozenset[str] = frozenset(),
    contents: Mapping[Path, bytes] | None = None,
    tell: Tell | None = None,
) -> tuple[list[File | Result], dict[File, Plan]]:
    """All files, or why they cannot be read, in the order given, and what is to become of them.

    ``contents`` are bytes of files that are not asked of the disk. A file of a script for another engine that is an
    ordinary one with other names is that ordinary file, and ``File.original`` what it was.
    """
    refused: dict[Path, tuple[Refusal, ...]] = {}
    while True:
        outcomes, facts = _read(paths, options, list(roots), derived, contents or {}, {}, tell)
        files = [outcome for outcome in outcomes if isinstance(outcome, File)]
        first: dict[Path, Original] = {}
        if any(hint in file.source.data for file in files for hint in (b"accelerat", b"deepspeed")):
            first, refused = _first(files, facts, options, refused)
        if first:
            outcomes, facts = _read(paths, options, list(roots), derived, contents or {}, first, tell)
            files = [outcome for outcome in outcomes if isinstance(outcome, File)]
        facts.refused = refused
        plans = make_plans(files, facts, options, absent, tell)
        stopped = {
            file.path: tuple(f for f in plans[file].reported if isinstance(f, Refusal) and not f.spared)
            for file in files
            if file.original is not None
        }
        stopped = {path: reasons for path, reasons in stopped.items() if reasons}
        if not stopped:
            return outcomes, plans
        lines = {file.path: file.original for file in files}
        for path, reasons in stopped.items():
            refused[path] = tuple(replace(reason, line=_line(lines[path], reason.line)) for reason in reasons)


def _first(
    files: list[File], facts: Facts, options: Options, refused: Mapping[Path, tuple[Refusal, ...]]
) -> tuple[dict[Path, Original], dict[Path, tuple[Refusal, ...]]]:
    """The files of scripts that become ordinary ones first, as they are then, and why others do not."""
    from rewriter.rewrite import rewritten

    plans, reasons = make_first_plans(files, facts, options, refused)
    made = {}
    for file, plan in plans.items():
        try:
            made[file.path] = Original(file.source, plan.applied, rewritten(file, plan))
        except InputError as error:
            reasons[file.path] = (Refusal("BMT090", 1, f"the ordinary loop would be broken: {error}"),)
            return _first(files, facts, options, reasons)
    return made, reasons


def _read(
    paths: Sequence[Path],
    options: Options,
    roots: list[Path],
    derived: dict[bytes, list[Path]] | None,
    contents: Mapping[Path, bytes],
    first: Mapping[Path, Original],
    tell: Tell | None,
) -> tuple[list[File | Result], Facts]:
    project = Project(roots, derived)
    outcomes = []
    for number, path in enumerate(paths):
        if tell is not None:
            tell("reading", number, len(paths))
        original = first.get(path)
        outcome = _load(project, path, contents.get(path) if original is None else original.after)
        if isinstance(outcome, File):
            outcome.original = original
        outcomes.append(outcome)
    return outcomes, Facts(project, options.blocks, options.tensor_parallel)


def _line(original: Original | None, line: int) -> int:
    """The line of the original that a line of the ordinary file comes from, or the one before."""
    if original is None:
        return line
    before, after = original.source.raw.splitlines(), original.after.splitlines()
    found = 1
    for block in difflib.SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks():
        if block.b < line:
            found = block.a + min(line - block.b, max(block.size, 1))
    return min(found, max(len(before), 1))


def _load(project: Project, path: Path, content: bytes | None) -> File | Result:
    raw = b""
    try:
        raw = path.read_bytes() if content is None else content
        notebook = Notebook(str(path), raw) if path.suffix == ".ipynb" else None
        source = Source(path, raw) if notebook is None else Source(path, notebook.text().encode(), notebook.places())
        _ = source.tree
        _check_skips(source)
        file = project.add(source)
        file.notebook = notebook
        return file
    except InputError as error:
        return Result(path, raw, raw, error=str(error))
    except OSError as error:
        return Result(path, b"", b"", error=f"{path}: cannot read: {error.strerror or error}")


def _check_skips(source: Source) -> None:
    for line, codes in source.skips.items():
        for code in sorted(codes - BY_CODE.keys()):
            raise InputError(f"{source.at(line)}: skip[{code}]: no such rule{nearest(code, BY_CODE)}")


def convert_text(text: str, options: Options | None = None, path: Path = Path("stdin.py")) -> Result:
    """One file given as text, on its own."""
    return apply_plan(*plan_text(text, options or Options(), path))


def convert_bytes(content: bytes, options: Options, path: Path = Path("stdin.py")) -> Result:
    """One file given as bytes, on its own."""
    (outcome,), plans = plan_paths([path], options, contents={path: content})
    return outcome if isinstance(outcome, Result) else apply_plan(outcome, plans[outcome])


def plan_text(text: str, options: Options, path: Path = Path("stdin.py")) -> tuple[File, Plan]:
    """One file given as text, on its own, and what is to become of it.

    Raises:
        InputError: it is no Python.
    """
    (outcome,), plans = plan_paths([path], options, contents={path: text.encode("utf-8", "surrogatepass")})
    if isinstance(outcome, Result):
        raise InputError(outcome.error)
    return outcome, plans[outcome]


def apply_plan(file: File, plan: Plan) -> Result:
    """The file after its plan. A conversion that would not parse is an error and changes nothing.

    Raises:
        InputError: the changes cannot be made for a fault of the converter's own.
    """
    original = file.original
    raw = file.notebook.raw if file.notebook is not None else file.source.raw
    if original is not None:
        raw, plan = original.source.raw, _on_lines_of(original, plan)
    if not plan.changes:
        after = raw if original is None else original.after
        return Result(file.path, raw, after, *_found(plan), lists=plan.lists, cells=file.source.cells)
    from rewriter.rewrite import rewritten  # libcst takes half a second to import, and many runs change nothing

    try:
        after = rewritten(file, plan)
    except InputError as error:
        message = f"{file.path}: left unchanged, the conversion would be broken: {error}"
        return Result(file.path, raw, raw, error=message, lists=plan.lists)
    except Exception as error:
        raise failure("making the changes", file.path, error) from error
    if file.notebook is not None:
        after = file.notebook.with_text(after.decode())
    return Result(file.path, raw, after, *_found(plan), lists=plan.lists, cells=file.source.cells)


def _on_lines_of(original: Original, plan: Plan) -> Plan:
    """A plan whose findings name lines of the original file, and those by which it became an ordinary one."""
    return replace(
        plan,
        applied=(*original.applied, *(replace(f, line=_line(original, f.line)) for f in plan.applied)),
        hidden=tuple(replace(finding, line=_line(original, finding.line)) for finding in plan.hidden),
        reported=tuple(replace(finding, line=_line(original, finding.line)) for finding in plan.reported),
    )


def _found(plan: Plan) -> tuple[tuple[Conversion, ...], tuple[Conversion, ...], tuple[Remark | Refusal, ...]]:
    return _told(plan.applied), _told(plan.hidden), plan.reported


def _told(found: tuple[Conversion, ...]) -> tuple[Conversion, ...]:
    """Without the changes, which hold on to the file's syntax tree."""
    return tuple(replace(conversion, changes=()) for conversion in found)


def write_file(path: Path, data: bytes, like: Path | None = None, owner: bool = False) -> None:
    """Write a file whole or not at all, with the mode and attributes of ``like``, else of what it replaces.

    ``owner``: also with its owner and group.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".bmt-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())  # a machine that stops now must not leave the new name with nothing in it
        like = like or path
        if like.exists():
            _take_over(name, like, owner)
        else:
            os.chmod(name, 0o644)
        os.replace(name, path)
        sync_folder(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _take_over(name: str, like: Path, owner: bool) -> None:
    """Give a new file what belongs to another, but for its times: caches go by these."""
    facts = like.stat()
    if owner and (facts.st_uid, facts.st_gid) != (os.geteuid(), os.getegid()):
        os.chown(name, facts.st_uid, facts.st_gid)
    os.chmod(name, stat.S_IMODE(facts.st_mode))  # after the owner, which may take bits away
    if hasattr(os, "listxattr"):
        for attribute in _attributes(like):
            with contextlib.suppress(OSError):  # of a kind that this file system or user may not set
                os.setxattr(name, attribute, os.getxattr(like, attribute))


def _attributes(path: Path) -> list[str]:
    try:
        return os.listxattr(path)
    except OSError:
        return []


def sync_folder(folder: Path) -> None:
    """Let the names in a folder outlast a machine that stops."""
    with contextlib.suppress(OSError):  # not everywhere a folder can be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
