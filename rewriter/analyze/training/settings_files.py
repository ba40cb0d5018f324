"""What files of settings name, of which hydra makes objects: ``_target_: trainer.Trainer``, once ``class:``."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rewriter.analyze.read.file import File

_TARGET = re.compile(rb"""^\s*(?:-\s*)?["']?(?:_target_|class)["']?\s*:\s*["']?([A-Za-z_][\w.]*)""", re.MULTILINE)
_MOST = 10_000
"""Files and folders among which settings are looked for: data may lie beside them."""


def modules_in_settings(file: File) -> Iterator[str]:
    """The modules whose classes and functions are named under a script's ``@hydra.main(config_path="conf")``."""
    for path in (path for folder in _folders(file) for path in _settings(folder)):
        with suppress(OSError):
            names = _TARGET.findall(path.read_bytes())
            yield from (name.decode().rpartition(".")[0] for name in names)


def _folders(file: File) -> Iterator[Path]:
    for call in file.calls if b"hydra" in file.source.data else ():
        match call.func:
            case ast.Attribute(value=ast.Name(id="hydra"), attr="main"):
                given = [*call.args[:1], *(keyword.value for keyword in call.keywords if keyword.arg == "config_path")]
                for named in (item.value for item in given if isinstance(item, ast.Constant)):
                    if isinstance(named, str):
                        place = file.folder / named
                        yield place.parent if place.suffix == ".yaml" else place  # as hydra had it before 1.0


def _settings(place: Path) -> Iterator[Path]:
    seen = 0
    for folder, inner, names in os.walk(place):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        paths = (Path(folder, name) for name in sorted(names) if name.endswith(".yaml"))
        yield from (path for path in paths if path.is_file())  # no pipe
        seen += len(inner) + len(names)
        if seen > _MOST:
            return
