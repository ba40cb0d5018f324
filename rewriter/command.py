"""The conversion as a libcst codemod::

    python -m libcst.tool codemod -x --no-format rewriter.command.Convert my_project/

``-x`` is libcst's way of naming a command outside of its own folders; ``--no-format`` keeps it from formatting files
anew. What ``bmt-convert`` prints about a file, the command gives as warnings.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import pickle
import shutil
import tempfile
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import libcst as cst
from libcst.codemod import CodemodCommand, CodemodContext, SkipFile

from rewriter.analyze.read.file import File
from rewriter.convert import plan_paths, plan_text
from rewriter.discover import sources
from rewriter.plan import Options, Plan, known_codes
from rewriter.report import messages
from rewriter.rewrite import changed_module
from rewriter.types import InputError, Result


class Convert(CodemodCommand):
    """Converts one file of a project; what a name means and which loops train is asked of the whole project.

    ``project`` is the folder that is looked at; without it, the package that the file is in, or the file's folder.
    ``snapshots`` is a folder in which processes that convert files of one project share what its files were before.
    """

    DESCRIPTION = "Turns ordinary torch code into bmtrain code."

    @staticmethod
    def add_args(arg_parser: argparse.ArgumentParser) -> None:
        arg_parser.add_argument("--project", metavar="FOLDER", help="what to look at; default: the file's own package")
        arg_parser.add_argument("--unsafe", action="store_true", help="also make changes that may change results")
        add = arg_parser.add_argument
        add("--select", action="extend", type=_codes, default=[], metavar="CODES", help="only these rules")
        add("--ignore", action="extend", type=_codes, default=[], metavar="CODES", help="not these rules")
        arg_parser.add_argument("--blocks", action="append", default=[], metavar="CLASS.ATTRIBUTE", help="a stack")
        arg_parser.add_argument("--tensor-parallel", action="store_true", help="split layers over ranks (BMT008)")
        folder = tempfile.mkdtemp(prefix="bmt-convert-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        arg_parser.set_defaults(snapshots=folder)

    def __init__(
        self,
        context: CodemodContext,
        project: str | None = None,
        unsafe: bool = False,
        select: list[str] | None = None,
        ignore: list[str] | None = None,
        blocks: list[str] | None = None,
        snapshots: str | None = None,
        tensor_parallel: bool = False,
    ) -> None:
        super().__init__(context)
        chosen = tuple(select or ()), tuple(ignore or ()), tuple(blocks or ())
        self._options = Options(unsafe, *chosen, tensor_parallel)
        self._project, self._snapshots = project, snapshots

    def transform_module_impl(self, tree: cst.Module) -> cst.Module:
        try:
            file, plan = self._planned(tree)
            before = file.source if file.original is None else file.original.source
            if before.raw != tree.bytes:
                raise InputError("libcst would not print this file as it is written")
            if file.original is not None:
                tree = cst.parse_module(file.source.raw)
            changed = changed_module(file, plan, tree) if plan.changes else tree
        except InputError as error:
            raise SkipFile(str(error)) from None
        for message in messages(
            (*(file.original.applied if file.original else ()), *plan.applied), plan.hidden, plan.reported
        ):
            self.warn(message)
        return changed

    def _planned(self, tree: cst.Module) -> tuple[File, Plan]:
        name = self.context.filename
        if name is None:  # code that is no file
            return plan_text(tree.code, self._options)
        path = Path(name).resolve()
        root = Path(self._project).resolve() if self._project else _own_project(path)
        plans = _plans(root, self._options, self._snapshots or "")
        found = plans.get(path)
        if found is None:
            raise InputError(f"not among the files of {root}")
        if isinstance(found, str):
            raise InputError(found)
        return found


def _codes(given: str) -> tuple[str, ...]:
    try:
        return known_codes(given, "a list of rules")
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _own_project(path: Path) -> Path:
    """The topmost package that holds a file; its folder if there is none."""
    folder = path.parent
    while (folder / "__init__.py").exists() and (folder.parent / "__init__.py").exists():
        folder = folder.parent
    return folder


@lru_cache(maxsize=1)
def _plans(root: Path, options: Options, snapshots: str) -> dict[Path, tuple[File, Plan] | str]:
    """What is to become of every file of a project, or why it cannot be read.

    libcst makes a command anew for every file, and one project is enough to remember.
    """
    contents = _contents(root, Path(snapshots)) if snapshots else _read(root)
    outcomes, plans = plan_paths(list(contents), options, [root], contents=contents)
    return {
        path: outcome.error if isinstance(outcome, Result) else (outcome, plans[outcome])
        for path, outcome in zip(contents, outcomes, strict=True)
    }


def _read(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sources(root) if path.suffix == ".py"}


def _contents(root: Path, snapshots: Path) -> dict[Path, bytes]:
    """A project's files as they were before any process of this run wrote one.

    A process reads them before it converts its first file; the first that is through publishes what it read. Whoever
    read files that another has written already finds that other's snapshot here, and takes it.
    """
    published = snapshots / sha256(str(root).encode()).hexdigest()
    if not published.exists():
        handle, name = tempfile.mkstemp(dir=snapshots)
        with os.fdopen(handle, "wb") as stream:
            pickle.dump(_read(root), stream)
        with contextlib.suppress(FileExistsError):
            os.link(name, published)
        os.unlink(name)
    found: dict[Path, bytes] = pickle.loads(published.read_bytes())
    return found
