"""Files that ``.gitignore`` names, or that lie in a folder for what is built, and that a project's own files import.

git goes on keeping what it kept before a pattern named it, and patterns such as ``lib/`` or ``models/`` name folders of
code in many projects: what a script imports is its own, whatever is said of it.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

_MADE_NAME = re.compile(r"[./]*(\w+)(?:[./]|$)")
_IMPORTERS = ("import_module", "__import__")


def imported(found: Collection[Path], left_out: Collection[Path], root: Path) -> list[Path]:
    """What of ``left_out``, files and folders, the files ``found`` import: by a statement, by a name that is made at
    run time, or from a folder that they put on the path.
    """
    names = {path.stem for path in left_out}
    taken: dict[Path, None] = {}
    for path in found:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        if any(name in text for name in names):
            taken |= dict.fromkeys(_asked_for(path, text, left_out, root))
    return list(taken)


def _asked_for(path: Path, text: str, left_out: Collection[Path], root: Path) -> Iterator[Path]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError):
        return  # no Python of today, or a notebook
    above = [place for place in path.parents if place == root or root in place.parents]
    on_path = [place for place in left_out if "sys.path" in text and place.name in text and place.is_dir()]
    by_name = any(name in text for name in _IMPORTERS)
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _found(alias.name.split("."), above, on_path, left_out)
        elif isinstance(node, ast.ImportFrom):
            package = node.module.split(".") if node.module else []
            bases = [path.parents[node.level - 1]] if 0 < node.level <= len(path.parents) else above
            for alias in node.names:
                yield from _found([*package, alias.name], bases, [] if node.level else on_path, left_out)
        elif by_name and isinstance(node, ast.Constant) and isinstance(node.value, str):
            if (made := _MADE_NAME.match(node.value)) is not None:
                places = (base / made.group(1) for base in above)
                yield from (place for place in places if place in left_out and any(place.glob("*.py")))


def _found(
    parts: Sequence[str], above: Sequence[Path], on_path: Sequence[Path], left_out: Collection[Path]
) -> Iterator[Path]:
    """What was left out on the way of a dotted name, from the first folder that has its first part."""
    for base in [*above, *on_path]:
        if not _is_code(base / parts[0], parts[1:]):
            continue
        if base in on_path:
            yield base
        for number in range(len(parts)):
            place = base.joinpath(*parts[: number + 1])
            yield from (way for way in (place, place.with_name(f"{place.name}.py")) if way in left_out)
        return


def _is_code(place: Path, rest: Sequence[str]) -> bool:
    """Whether a name leads to a module, or to a package that has the next part: a folder of data is neither."""
    if place.with_name(f"{place.name}.py").is_file() or (place / "__init__.py").is_file():
        return True
    return bool(rest) and place.is_dir() and _is_code(place / rest[0], rest[1:])
