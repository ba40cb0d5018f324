"""The whole proof: the original on one process, the converted script on every number of ranks, and what differs."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from rewriter.verify.script.compare import (
    CRASHED,
    FILES,
    NOTHING,
    OF_SPLIT,
    REFUSED,
    STALLED,
    Comparison,
    Finding,
    Outcome,
    noise_of,
    split_words,
)
from rewriter.verify.script.files import compare_left, left_by, snapshot
from rewriter.verify.script.runs import Command, Host, Run
from rewriter.verify.script.split import Split, split_test
from rewriter.verify.script.story import losses_of
from rewriter.verify.script.text import Origins


@dataclass(frozen=True)
class Settings:
    """What to run and how strictly to compare."""

    original: Path
    """The project as it is; it is copied for every run."""
    converted: Path
    command: Command
    ranks: tuple[int, ...] = (1, 2)
    tolerance: float = 1e-4
    """Largest relative difference of losses, weights, and numbers that are printed or saved."""
    refused: str = ""
    """Why there is nothing to prove."""


@dataclass
class Report:
    """What was compared and what was found."""

    outcomes: list[Outcome] = field(default_factory=list)
    split: Split = field(default=Split("not tried"))
    trouble: list[Finding] = field(default_factory=list)
    """What concerns no number of ranks."""

    @property
    def findings(self) -> list[Finding]:
        """All, the first ones first."""
        found = [finding for outcome in self.outcomes for finding in sorted(outcome.findings, key=lambda f: f.moment)]
        return [*self.trouble, *found]

    @property
    def held(self) -> bool:
        """Whether everything held and something was compared."""
        return bool(self.outcomes) and not self.findings


def prove(settings: Settings, host: Host | None = None) -> Report:
    """Run and compare everything. ``host``: where runs are started, if one is there already."""
    if settings.refused:
        return Report(trouble=[Finding(0, REFUSED, settings.refused)])
    with tempfile.TemporaryDirectory(prefix="bmt-prove-", ignore_cleanup_errors=True) as folder:
        if host is not None:
            return _Proof(settings, host, Path(folder)).all()
        with Host() as own:
            return _Proof(settings, own, Path(folder)).all()


class _Proof:
    def __init__(self, settings: Settings, host: Host, work: Path) -> None:
        self.settings, self.host, self.work = settings, host, work
        self.report = Report()
        self.origins = Origins(settings.original, settings.converted)
        self.original = lru_cache(lambda ranks: self._run(f"original{ranks}", settings.original, ranks))
        self.again = lru_cache(lambda ranks: self._run(f"again{ranks}", settings.original, ranks))

    def all(self) -> Report:
        settings = self.settings
        # A script that shares its batches over processes itself is compared with itself on as many.
        alone, launched = self.original(0), _shares(settings.original)
        launched = (launched or not (alone.succeeded or alone.of("loss"))) and self.original(1).succeeded
        if not (alone.succeeded or launched):
            self.report.trouble.append(_failed(alone))
            return self.report
        if launched:
            self.report.split = Split("the original shares its batches itself")
        else:
            losses = losses_of(alone)
            # A batch that no loader gives is known in the converted script only, by the call that takes a rank's share.
            source = settings.original if losses and losses[0].loaded else settings.converted
            self.report.split = split_test(alone, lambda part: self._run(part, source, part=part), settings.tolerance)
        for ranks in settings.ranks:
            processes = ranks if launched else 0
            original = self.original(processes)
            if not original.succeeded:
                self.report.trouble.append(_failed(original))
                return self.report
            run = self._run(f"ranks{ranks}", settings.converted, ranks)
            comparison = Comparison(
                original, run, self.report.split, settings.tolerance, partial(self.again, processes)
            )
            outcome = comparison.all()
            if run.succeeded:
                self._files(original, run, comparison)
            if not outcome.losses and not outcome.findings:
                comparison.note(NOTHING, "the script calls backward on no loss")
            self.report.outcomes.append(outcome)
            shutil.rmtree(run.root, ignore_errors=True)
        self._note_split()
        return self.report

    def _run(self, name: str, source: Path, ranks: int = 0, part: str = "") -> Run:
        root = self.work / name / "project"
        shutil.copytree(source, root, symlinks=True)
        converted = source == self.settings.converted
        run = self.host.run(self.settings.command, root, self.work / name / "record", ranks, converted, part)
        if converted:
            run.origin = self.origins
            for event in (event for events in run.events for event in events):
                event["at"] = self.origins(event["at"])
        return run

    def _files(self, original: Run, run: Run, comparison: Comparison) -> None:
        ours = original.root, left_by(original.root, snapshot(self.settings.original))
        theirs = run.root, left_by(run.root, snapshot(self.settings.converted))
        slack = _slack(original)
        found = compare_left(ours, theirs, comparison.tolerance, slack)
        if found.different:
            found = compare_left(ours, theirs, comparison.tolerance, slack, comparison.again().root)
        outcome = comparison.outcome
        outcome.files, outcome.tensors, outcome.file_difference = found.files, found.tensors, found.largest
        for path, how in found.different:
            comparison.note(FILES, f"{path}: {how}")

    def _note_split(self) -> None:
        """A loss that looks across items is trouble where no run on several ranks has shown that it is the same."""
        shown = any(outcome.ranks > 1 and outcome.losses for outcome in self.report.outcomes)
        told = any(finding.kind in OF_SPLIT.values() for finding in self.report.findings)
        split = self.report.split
        if split.kind and not shown and not told:
            self.report.trouble.append(Finding(0, OF_SPLIT[split.kind], split_words(split), split.at, 0))


def _shares(project: Path) -> bool:
    """Whether a script starts torch.distributed itself."""
    return any(b"init_process_group" in path.read_bytes() for path in project.rglob("*.py") if path.is_file())


def _failed(original: Run) -> Finding:
    crashes = [event for rank in range(original.ranks) for event in original.of("crash", rank)]
    if crashes:
        return Finding(0, CRASHED, f"the original itself: {crashes[0]['message']}", crashes[0]["at"])
    waiting = "; ".join(original.waiting(rank) for rank in range(original.ranks))
    if original.stalled:
        return Finding(0, STALLED, f"the original itself {waiting}")
    tail = original.errors[0].strip().splitlines()[-1:] or [""]
    return Finding(0, CRASHED, f"the original itself {waiting} {tail[0]}".strip())


def _slack(original: Run) -> dict[tuple[Any, ...], float]:
    """By the digest of each trained weight, how far rounding error may have led it."""
    found: dict[tuple[Any, ...], float] = {}
    steps = [event for event in original.of("weights") if event["when"] == "after"]
    for step, spread in zip(steps, noise_of(original), strict=False):
        for digest, allowed in zip(step["digests"], spread.get(step["optimizer"], []), strict=False):
            found[tuple(map(str, digest))] = allowed
    return found
