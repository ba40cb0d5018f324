"""Settings in ``pyproject.toml``, table ``[tool.bmt-convert]``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from rewriter.spelling import nearest
from rewriter.types import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

KEYS = {
    "select": list, "ignore": list, "blocks": list, "exclude": list, "unsafe": bool, "jobs": int,
    "tensor-parallel": bool,
}  # fmt: skip


def read_settings(start: Path) -> dict[str, Any]:
    """The table of the nearest ``pyproject.toml`` at or above a path; empty without one.

    Raises:
        InputError: the file cannot be read, or has an unknown or wrongly typed key.
    """
    folder = start.resolve()
    for place in (folder, *folder.parents):
        path = place / "pyproject.toml"
        if path.is_file():
            found = _table(path)
            for key, value in found.items():
                if key not in KEYS:
                    known = nearest(key, KEYS) or f"; known: {', '.join(KEYS)}"
                    raise InputError(f"{path}: unknown key {key!r} in [tool.bmt-convert]{known}")
                if not _fits(value, KEYS[key]):
                    what = {list: "a list of strings", int: "a whole number", bool: "true or false"}[KEYS[key]]
                    raise InputError(f"{path}: {key!r} in [tool.bmt-convert] must be {what}")
                if KEYS[key] is int and value < 1:
                    raise InputError(f"{path}: {key!r} in [tool.bmt-convert] must be above 0")
            return found
    return {}


def _fits(value: object, kind: type) -> bool:
    if isinstance(value, list):
        return kind is list and all(isinstance(item, str) for item in value)
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


def _table(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read: {error}") from None
    if "convert" not in text:
        return {}
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: {error}") from None
    tools = content.get("tool", {})
    tools = tools if isinstance(tools, dict) else {}
    for name in tools:
        if name != "bmt-convert" and re.sub(r"[\W_]|rain", "", name.lower()) == "bmtconvert":
            raise InputError(f"{path}: a table [tool.{name}]; did you mean [tool.bmt-convert]?")
    table = tools.get("bmt-convert", {})
    if not isinstance(table, dict):
        raise InputError(f"{path}: [tool.bmt-convert] must be a table")
    return table
