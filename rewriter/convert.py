"""Converts the files of a project: reads them, plans and applies, gives results. Writing is a separate step."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.read.notebook import Notebook
from rewriter.analyze.read.project import Project
from rewriter.analyze.read.source import Source
from rewriter.plan import Options, Plan, make_plans
from rewriter.types import Conversion, InputError, Result


def convert_paths(
    paths: Sequence[Path],
    options: Options,
    roots: Iterable[Path] = (),
    progress: Callable[[int, int], None] | None = None,
    derived: dict[bytes, list[Path]] | None = None,
    absent: frozenset[str] = frozenset(),
) -> list[Result]:
    """Results of all files, in the order given.

    Where ``paths`` are a portion of a project, ``derived`` is the project's, and ``absent`` are keys of findings that
    other portions are known not to apply.
    """
    outcomes, plans = plan_paths(paths, options, roots, derived, absent)
    results = []
    for number, outcome in enumerate(outcomes):
        results.append(outcome if isinstance(outcome, Result) else apply_plan(outcome, plans[outcome]))
        if progress is not None:
            progress(number + 1, len(outcomes))
    return results


def plan_paths(
    paths: Sequence[Path],
    options: Options,
    roots: Iterable[Path] = (),
    derived: dict[bytes, list[Path]] | None = None,
    absent: frozenset[str] = frozenset(),
    contents: Mapping[Path, bytes] | None = None,
) -> tuple[list[File | Result], dict[File, Plan]]:
    """All files, or why they cannot be read, in the order given, and what is to become of them.

    ``contents`` are bytes of files that are not asked of the disk.
    """
    project = Project(roots, derived)
    outcomes = [_load(project, path, (contents or {}).get(path)) for path in paths]
    facts = Facts(project, options.blocks)
    files = [outcome for outcome in outcomes if isinstance(outcome, File)]
    return outcomes, make_plans(files, facts, options, absent)


def _load(project: Project, path: Path, content: bytes | None) -> File | Result:
    try:
        raw = path.read_bytes() if content is None else content
        notebook = Notebook(str(path), raw) if path.suffix == ".ipynb" else None
        source = Source(path, notebook.text().encode() if notebook is not None else raw)
        _ = source.tree
        file = project.add(source)
        file.notebook = notebook
        return file
    except InputError as error:
        return Result(path, b"", b"", error=str(error))
    except OSError as error:
        return Result(path, b"", b"", error=f"{path}: cannot read: {error.strerror or error}")


def convert_text(text: str, options: Options | None = None, path: Path = Path("stdin.py")) -> Result:
    """One file given as text, on its own."""
    return apply_plan(*plan_text(text, options or Options(), path))


def plan_text(text: str, options: Options, path: Path = Path("stdin.py")) -> tuple[File, Plan]:
    """One file given as text, on its own, and what is to become of it.

    Raises:
        InputError: it is no Python.
    """
    project = Project()
    file = project.add(Source(path, text.encode("utf-8", "surrogatepass")))
    return file, make_plans([file], Facts(project, options.blocks), options)[file]


def apply_plan(file: File, plan: Plan) -> Result:
    """The file after its plan. A conversion that would not parse is an error and changes nothing."""
    raw = file.notebook.raw if file.notebook is not None else file.source.raw
    if not plan.changes:
        return Result(file.path, raw, raw, (), _told(plan.hidden), plan.reported)
    from rewriter.rewrite import rewritten  # libcst takes half a second to import, and many runs change nothing

    try:
        after = rewritten(file, plan)
    except InputError as error:
        message = f"{file.path}: left unchanged, the conversion would be broken: {error}"
        return Result(file.path, raw, raw, error=message)
    if file.notebook is not None:
        after = file.notebook.with_text(after.decode())
    return Result(file.path, raw, after, _told(plan.applied), _told(plan.hidden), plan.reported)


def _told(found: tuple[Conversion, ...]) -> tuple[Conversion, ...]:
    """Without the changes, which hold on to the file's syntax tree."""
    return tuple(replace(conversion, changes=()) for conversion in found)


def write_file(path: Path, data: bytes, mode_of: Path | None = None) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        like = mode_of or path
        os.chmod(name, like.stat().st_mode & 0o777 if like.exists() else 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
