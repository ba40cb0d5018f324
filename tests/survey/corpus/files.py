"""Converts every file of a folder and checks what must hold of the results."""

from __future__ import annotations

import gc
import io
import multiprocessing
import tempfile
import time
import tokenize
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.read.project import Project
from rewriter.analyze.read.source import Source
from rewriter.convert import apply_plan, convert_paths
from rewriter.discover import sources
from rewriter.plan import Options, Plan, make_plans
from rewriter.portions import WHOLE, cut, derived, missing, relied_on
from rewriter.rewrite import touched
from rewriter.types import InputError, Refusal, Result

from .loops import Record, records

SECOND = "second run:"
MUST_BE_ZERO = ("broken", "uncompiled", "unstable", "bytes", "comments")


@dataclass
class Measured:
    """Counts for one folder, its loops, and remarks on what went wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    loops: list[Record] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, part: Measured) -> None:
        peak = max(self.counts["MB"], part.counts["MB"])
        self.counts.update(part.counts)
        self.counts["MB"] = peak
        self.loops.extend(part.loops)
        self.remarks.extend(part.remarks)


def measure(folder: Path) -> Measured:
    """Everything about one folder. Large ones are cut as ``bmt-convert`` cuts them, one process at a time."""
    paths = [path for path in sources(folder) if path.suffix == ".py"]
    sizes = {path: path.stat().st_size for path in paths}
    whole = sum(sizes.values()) <= WHOLE
    below = None if whole else derived(paths)
    portions = [paths] if whole else cut(paths, sizes)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        parts = [pool.apply(measure_portion, (folder, part, below, frozenset())) for part in portions]
        absent = missing(result for _, results in parts for result in results)
        for number, (_, results) in enumerate(parts):
            if relied_on(results) & absent:
                parts[number] = pool.apply(measure_portion, (folder, portions[number], below, absent))
        found = Measured()
        for part, _ in parts:
            found.add(part)
        converted = {result.path: result.after for _, results in parts for result in results}
        found.remarks.extend(pool.apply(twice, (folder, converted)))
    found.counts["unstable"] = sum(remark.startswith(SECOND) for remark in found.remarks)
    return found


def measure_portion(
    folder: Path, paths: list[Path], below: dict[bytes, list[Path]] | None, absent: frozenset[str]
) -> tuple[Measured, list[Result]]:
    gc.disable()
    found = Measured()
    counts = found.counts
    start = time.process_time()
    project = Project([folder], below)
    files = []
    for path in paths:
        try:
            source = Source(path, path.read_bytes())
            _ = source.tree
            files.append(project.add(source))
        except (InputError, OSError) as error:
            counts["unreadable"] += 1
            found.remarks.append(str(error))
    facts = Facts(project)
    plans = make_plans(files, facts, Options(), absent)
    results = [apply_plan(file, plans[file]) for file in files]
    counts["ms"] = round(1000 * (time.process_time() - start))
    for file, result in zip(files, results, strict=True):
        check(file, plans[file], result, found)
    counts["files"] = len(files)
    counts["changed"] = sum(result.changed for result in results)
    counts["edits"] = sum(len(result.applied) for result in results)
    counts["MB"] = memory()
    left = {
        file: next((f.message for f in plan.reported if isinstance(f, Refusal)), "") for file, plan in plans.items()
    }
    whole = {file: reason for file, reason in left.items() if reason and not plans[file].changes}
    found.loops.extend(records(facts, folder, whole))
    return found, results


def memory() -> int:
    """The most memory that this process has had, in MB. ``getrusage`` counts what the parent had, too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    return 0


def check(file: File, plan: Plan, result: Result, found: Measured) -> None:
    """One file's output against what must hold."""
    counts, remarks = found.counts, found.remarks
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
    if not untouched_lines_survive(file, plan, result.after):
        counts["bytes"] += 1
        remarks.append(f"{result.path}: bytes changed outside changes")
    lost = comments(result.before) - comments(result.after)
    counts["comments"] += lost.total()
    if lost:
        remarks.append(f"{result.path}: comments gone with what they described: {sorted(lost)[:3]}")


def untouched_lines_survive(file: File, plan: Plan, after: bytes) -> bool:
    """Whether every line that no change may print anew is in the output, with its end, as often as before."""
    changed = touched(file, plan.changes)
    lines = file.source.data.splitlines(keepends=True)
    kept = Counter(line for number, line in enumerate(lines, 1) if number not in changed)
    missing = kept - Counter(Source(file.path, after).data.splitlines(keepends=True))
    return all(not line.strip() or line == lines[-1] for line in missing)


def comments(data: bytes) -> Counter[str]:
    try:
        return Counter(t.string for t in tokenize.tokenize(io.BytesIO(data).readline) if t.type == tokenize.COMMENT)
    except (tokenize.TokenError, SyntaxError):
        return Counter()


def twice(folder: Path, converted: dict[Path, bytes]) -> list[str]:
    """What a second run over the converted files would change: nothing."""
    remarks = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / folder.resolve().name
        paths = []
        for original, data in converted.items():
            path = root / original.relative_to(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            paths.append(path)
        gc.disable()
        for again in convert_paths_of(paths, root):
            if again.changed or again.error:
                what = again.error or "; ".join(f"{f.line} {f.code} {f.message}" for f in again.applied[:3])
                remarks.append(f"{SECOND} {again.path.relative_to(root)}: {what}")
    return remarks


def convert_paths_of(paths: list[Path], root: Path) -> list[Result]:
    """As ``bmt-convert`` does it, but in this process: a pool's workers have no pools."""
    if sum(path.stat().st_size for path in paths) <= WHOLE:
        return convert_paths(paths, Options(), [root])
    sizes = {path: path.stat().st_size for path in paths}
    below = derived(paths)
    return [result for part in cut(paths, sizes) for result in convert_paths(part, Options(), [root], derived=below)]
