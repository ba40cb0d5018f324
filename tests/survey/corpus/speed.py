"""How fast the rewriter is: files without edits a second, and against libcst on the files that it edits."""

from __future__ import annotations

import gc
import time
from pathlib import Path

from rewriter.convert import convert_paths
from rewriter.discover import sources
from rewriter.plan import Options
from rewriter.types import Result

from .files import memory


def speed(folder: Path) -> str:
    """One line: converting the folder whole in this process; its files without edits; libcst, if installed."""
    gc.disable()
    paths = [path for path in sources(folder) if path.suffix == ".py"]
    whole, results = _timed(paths, folder)
    plain = [result.path for result in results if not result.changed]
    edited = [result.path for result in results if result.changed]
    alone, _ = _timed(plain, folder)
    words = [
        f"{folder.name}: {len(paths)} files in {whole:.1f} s",
        f"{len(plain)} without edits at {len(plain) / alone:.0f} a second",
        _against_libcst(edited, folder, whole),
        f"{memory()} MB",
    ]
    return "; ".join(words)


def _timed(paths: list[Path], folder: Path) -> tuple[float, list[Result]]:
    start = time.process_time()
    results = convert_paths(paths, Options(), [folder])
    return time.process_time() - start, results


def _against_libcst(edited: list[Path], folder: Path, whole: float) -> str:
    """The time for the whole folder against a bare parse and print of the files that get edits."""
    try:
        import libcst
    except ImportError:
        return "libcst is not installed"
    texts = [path.read_text() for path in edited]
    start = time.process_time()
    for text in texts:
        _ = libcst.parse_module(text).code
    bare = time.process_time() - start
    return (
        f"libcst parses and prints the {len(edited)} edited ones in {bare:.1f} s, {whole / bare:.2f} of which this is"
    )
