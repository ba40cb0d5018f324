"""Converts the files of a project: reads them, plans and applies, gives results. Writing is a separate step."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rewriter.analyze.facts import Facts
from rewriter.analyze.project import File, Project
from rewriter.analyze.source import Source
from rewriter.notebook import Notebook
from rewriter.plan import Options, Plan, make_plans
from rewriter.transform import apply_edits
from rewriter.types import ConflictError, InputError, Result


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
    project = Project(roots, derived)
    outcomes = [_load(project, path) for path in paths]
    facts = Facts(project, options.blocks)
    plans = make_plans([outcome for outcome in outcomes if isinstance(outcome, File)], facts, options, absent)
    results = []
    for number, outcome in enumerate(outcomes):
        results.append(outcome if isinstance(outcome, Result) else apply_plan(outcome, plans[outcome]))
        if progress is not None:
            progress(number + 1, len(outcomes))
    return results


def _load(project: Project, path: Path) -> File | Result:
    try:
        raw = path.read_bytes()
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
    project = Project()
    file = project.add(Source(path, text.encode("utf-8", "surrogatepass")))
    options = options or Options()
    return apply_plan(file, make_plans([file], Facts(project, options.blocks), options)[file])


def apply_plan(file: File, plan: Plan) -> Result:
    """The file after its plan. A conversion that would not parse is an error and changes nothing."""
    source = file.source
    raw = file.notebook.raw if file.notebook is not None else source.raw
    if not plan.edits:
        return Result(file.path, raw, raw, (), plan.hidden, plan.reported)
    try:
        after = source.encode(apply_edits(source.data, plan.edits))
        _ = Source(file.path, after).tree
    except (InputError, ConflictError, RecursionError, UnicodeError) as error:
        message = f"{file.path}: left unchanged, the conversion would be broken: {error}"
        return Result(file.path, raw, raw, error=message)
    if file.notebook is not None:
        after = file.notebook.with_text(after.decode())
    return Result(file.path, raw, after, plan.applied, plan.hidden, plan.reported)


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
