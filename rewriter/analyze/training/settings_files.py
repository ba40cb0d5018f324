"""What files of settings name, of which hydra makes objects: ``_target_: trainer.Trainer``, once ``class:``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rewriter.analyze.read.file import File

_TARGET = re.compile(rb"""^\s*(?:-\s*)?["']?(?:_target_|class)["']?\s*:\s*["']?([A-Za-z_][\w.]*)""", re.MULTILINE)
_MOST = 1000
"""Files of settings that are looked into."""


def modules_in_settings(file: File) -> Iterator[str]:
    """The modules whose classes and functions are named under a script's ``@hydra.main(config_path="conf")``."""
    for call in file.calls if b"hydra" in file.source.data else ():
        match call.func:
            case ast.Attribute(value=ast.Name(id="hydra"), attr="main"):
                given = [*call.args[:1], *(keyword.value for keyword in call.keywords if keyword.arg == "config_path")]
                folders = [item.value for item in given if isinstance(item, ast.Constant)]
                for folder in (item for item in folders if isinstance(item, str)):
                    place = file.folder / folder
                    place = place.parent if place.suffix == ".yaml" else place  # as hydra had it before 1.0
                    for path in sorted(place.glob("**/*.yaml"))[:_MOST]:
                        names = _TARGET.findall(path.read_bytes()) if path.is_file() else []
                        yield from (name.decode().rpartition(".")[0] for name in names)
