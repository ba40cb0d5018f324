"""Measures the rewriter on folders of real code and prints a table.

    python tests/rewriting/corpus.py FOLDER... [--remarks] [--loops loops.jsonl.gz]

Columns: files, files changed, milliseconds (reading, planning, applying), memory; block-chain loops called, kept with
a stack, kept on a plain list; loops over pairs; and what must be zero: files that would break, outputs that do not
compile, files that a second run changes, bytes changed outside edits. Comments go with a statement that goes. With
--loops, a survey of the same packages (one JSON object a line: src, file, line, shape, blockish), the loops that only
one of the two calls chains.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import gzip
import io
import json
import multiprocessing
import resource
import sys
import tempfile
import time
import tokenize
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from rewriter.analyze.facts import Facts
from rewriter.analyze.loops import is_chain, is_pairs
from rewriter.analyze.project import Project
from rewriter.analyze.source import Source
from rewriter.convert import apply_plan
from rewriter.discover import sources
from rewriter.plan import Options, make_plans
from rewriter.portions import WHOLE, convert_project, cut, derived
from rewriter.types import Edit, InputError, Result


def measure(folder: Path) -> tuple[Counter[str], list[str]]:
    """Counts for one folder, and remarks on what went wrong."""
    counts: Counter[str] = Counter()
    remarks: list[str] = []
    paths = [path for path in sources(folder) if path.suffix == ".py"]
    sizes = {path: path.stat().st_size for path in paths}
    large = sum(sizes.values()) > WHOLE
    tasks = [(folder, part, derived(paths)) for part in cut(paths, sizes)] if large else [(folder, paths, None)]
    converted: dict[Path, bytes] = {}
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for part_counts, part_remarks, part_converted in pool.imap(measure_portion, tasks):
            counts.update(part_counts)
            remarks.extend(part_remarks)
            converted.update(part_converted)
    twice(folder, converted, counts, remarks)
    return counts, remarks


def measure_portion(task: Any) -> tuple[Counter[str], list[str], dict[Path, bytes]]:
    folder, paths, below = task
    gc.disable()
    counts: Counter[str] = Counter()
    remarks: list[str] = []
    start = time.perf_counter()
    project = Project([folder], below)
    files = []
    for path in paths:
        try:
            source = Source(path, path.read_bytes())
            _ = source.tree
            files.append(project.add(source))
        except (InputError, OSError) as error:
            counts["unreadable"] += 1
            remarks.append(str(error))
    facts = Facts(project)
    plans = make_plans(files, facts, Options())
    results = [apply_plan(file, plans[file]) for file in files]
    counts["ms"] = round(1000 * (time.perf_counter() - start))
    for file, result in zip(files, results, strict=True):
        check(file.source, plans[file].edits, result, counts, remarks)
    counts["files"] = len(files)
    counts["changed"] = sum(result.changed for result in results)
    loop_counts(facts, counts)
    counts["MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return counts, remarks, {result.path: result.after for result in results}


def check(source: Source, edits: tuple[Edit, ...], result: Result, counts: Counter[str], remarks: list[str]) -> None:
    """One file's output against what must hold."""
    if result.error:
        counts["broken"] += 1
        remarks.append(result.error)
        return
    if not result.changed:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(result.after, str(result.path), "exec", dont_inherit=True)
        except SyntaxError as error:
            try:
                compile(result.before, str(result.path), "exec", dont_inherit=True)
            except SyntaxError:
                return
            counts["uncompiled"] += 1
            remarks.append(f"{result.path}: {error}")
    if not untouched_bytes_survive(source.data, result.after, source, edits):
        counts["bytes"] += 1
        remarks.append(f"{result.path}: bytes changed outside edits")
    lost = comments(result.before) - comments(result.after)
    counts["comments"] += lost.total()
    if lost:
        remarks.append(f"{result.path}: comments gone with what they described: {sorted(lost)[:3]}")


def untouched_bytes_survive(before: bytes, after: bytes, source: Source, edits: tuple[Edit, ...]) -> bool:
    """Whether the pieces between the outermost edits are in the output, in order."""
    data = Source(source.path, after).data
    position, start = 0, 0
    for edit in sorted(edits, key=lambda edit: (edit.span.start, -edit.span.end)):
        if edit.span.start < start:
            continue
        piece = before[start : edit.span.start]
        found = data.find(piece, position)
        if found < 0 or (start == 0 and found != 0):
            return False
        position, start = found + len(piece), edit.span.end
    return data[position:].endswith(before[start:])


def comments(data: bytes) -> Counter[str]:
    try:
        return Counter(t.string for t in tokenize.tokenize(io.BytesIO(data).readline) if t.type == tokenize.COMMENT)
    except (tokenize.TokenError, SyntaxError):
        return Counter()


def loop_counts(facts: Facts, counts: Counter[str]) -> None:
    called = {loop for stack in facts.stacks.found for loop in stack.calls}
    on_stack = {loop.node for stack in facts.stacks.found for loop in stack.loops}
    for loop in facts.stacks.loops:
        if is_pairs(loop):
            counts["pairs"] += 1
        if not is_chain(loop):
            continue
        counts["chains"] += 1
        if loop.node in called:
            counts["called"] += 1
        elif loop.node in on_stack:
            counts["kept"] += 1
        else:
            counts["plain"] += 1
    counts["stacks"] = len(facts.stacks.found)


def twice(folder: Path, converted: dict[Path, bytes], counts: Counter[str], remarks: list[str]) -> None:
    """A second run over the converted files."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / folder.resolve().name
        paths = []
        for original, data in converted.items():
            path = root / original.relative_to(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            paths.append(path)
        for again in convert_project(paths, Options(), [root]):
            if again.changed or again.error:
                counts["unstable"] += 1
                message = again.error or "; ".join(f"{f.line} {f.code} {f.message}" for f in again.applied[:3])
                remarks.append(f"{again.path.relative_to(root)}: second run: {message}")


COLUMNS = (
    "files", "changed", "ms", "MB", "stacks", "chains", "called", "kept", "plain", "pairs", "unreadable", "broken",
    "uncompiled", "unstable", "bytes", "comments",
)  # fmt: skip


def compare(folder: Path, survey: Path) -> None:
    """Where this view of which loops are chains differs from a survey's."""
    project = Project([folder])
    for path in sources(folder):
        with contextlib.suppress(InputError, OSError):
            source = Source(path, path.read_bytes())
            _ = source.tree
            project.add(source)
    here = {}
    for loop in Facts(project).stacks.loops:
        key = (loop.file.path.relative_to(folder).as_posix(), loop.node.lineno)
        here[key] = "pairs" if is_pairs(loop) else "chain" if is_chain(loop) else "other"
    there = {}
    with gzip.open(survey, "rt") as lines:
        for entry in (json.loads(line) for line in lines):
            if entry["src"] == folder.name and entry["blockish"]:
                there[entry["file"], entry["line"]] = entry["shape"]
    table = Counter((shape, here.get(key, "not seen")) for key, shape in there.items())
    table.update(("not in the survey", kind) for key, kind in here.items() if key not in there and kind == "chain")
    for (shape, kind), count in sorted(table.items()):
        places = (f"{k[0]}:{k[1]}" for k, s in there.items() if s == shape and here.get(k, "not seen") == kind)
        example = next(places, "")
        example = example or next((f"{k[0]}:{k[1]}" for k, v in here.items() if k not in there and v == kind), "")
        print(f"    survey {shape:18s} here {kind:9s} {count:5d}   {example}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--remarks", action="store_true", help="print what went wrong")
    parser.add_argument("--loops", type=Path, metavar="FILE", help="compare with a survey of loops")
    options = parser.parse_args()
    print(f"{'':24s}" + "".join(f"{name[:8]:>9s}" for name in COLUMNS))
    bad = 0
    for folder in options.folders:
        counts, remarks = measure(folder)
        print(f"{folder.name[:24]:24s}" + "".join(f"{counts[name]:9d}" for name in COLUMNS), flush=True)
        bad += counts["broken"] + counts["uncompiled"] + counts["unstable"] + counts["bytes"]
        for remark in remarks if options.remarks else ():
            print("   ", remark)
        if options.loops is not None:
            compare(folder, options.loops)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
