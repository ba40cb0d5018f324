"""Runs the original on one process and the converted script under torchrun on two, and compares what they did."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.survey.scripts import prepare
from tests.survey.scripts.table import Script

RESULTS = prepare.HOME / "results"
_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")


@dataclass
class Verdict:
    """What was compared, the largest relative differences, and what is wrong (nothing if ``wrong`` is empty)."""

    losses: int = 0
    difference: float = 0.0
    printed: int = 0
    tensors: int = 0
    saved_difference: float = 0.0
    edits: int = 0
    refused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def check(script: Script) -> Verdict:
    """Prepare, run, compare; the verdict is kept for the table."""
    start = time.monotonic()
    verdict = Verdict()
    prepare.prepare(script)
    findings = json.loads(prepare.report(script).read_text())
    verdict.edits, verdict.refused = _converted(findings)
    if script.refused:
        if not any(script.refused in message for message in verdict.refused):
            verdict.wrong.append(f"not refused with '{script.refused}': {verdict.refused}")
    else:
        alone = _run(script, prepare.original(script), ranks=0)
        ranks = _run(script, prepare.converted(script), ranks=2)
        verdict.wrong += [
            *_compare_losses(script, alone, ranks, verdict),
            *_compare_printed(script, alone, ranks, verdict),
        ]
        verdict.wrong += _compare_saved(script, alone, ranks, verdict)
    verdict.seconds = time.monotonic() - start
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{script.name}.json").write_text(json.dumps(asdict(verdict), indent=1))
    return verdict


def _converted(findings: Any) -> tuple[int, list[str]]:
    """The number of edits, and the reasons given in files that stayed as they were."""
    files = findings["files"]
    edits = sum(finding["state"] == "applied" for file in files for finding in file["findings"])
    left = [
        f"{Path(file['path']).name}:{finding['line']}: {finding['code']} {finding['message']}"
        for file in files
        if not file["changed"]
        for finding in file["findings"]
        if finding["state"] == "left"
    ]
    return edits, left


def _run(script: Script, source: Path, ranks: int) -> Path:
    """The folder that the script ran in, with its losses and output."""
    folder = prepare.HOME / "runs" / script.name / ("ranks" if ranks else "alone")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if script.data is not None:
        script.data(folder)
    words = [str(source / word) if word.endswith(".py") else word for word in shlex.split(script.command)]
    driver = [str(Path(__file__).with_name("driver.py")), str(folder / "losses.json"), *["--still"] * script.still]
    launcher = (
        [
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={ranks}",
            "--standalone",
            *["--local-ranks-filter=0"] * script.logs,
        ]
        if ranks
        else []
    )
    path = [str(source), str(Path(__file__).with_name("stubs")), *[str(prepare.REPOSITORY)] * bool(ranks)]
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCH}
    environment |= {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(folder / "output.txt", "w") as output:
        done = subprocess.run(
            [str(prepare.PYTHON), *launcher, *driver, *words],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=600,
        )  # fmt: skip
    if done.returncode:
        print("".join((folder / "output.txt").read_text().splitlines(keepends=True)[-40:]), file=sys.stderr)
        raise RuntimeError(f"{script.name} ended with {done.returncode} on {ranks or 'no'} ranks; see {folder}")
    return folder


def _compare_losses(script: Script, alone: Path, ranks: Path, verdict: Verdict) -> Iterator[str]:
    one, two = (json.loads((folder / "losses.json").read_text()) for folder in (alone, ranks))
    verdict.losses = len(one)
    if not one or len(one) != len(two):
        yield f"{len(one)} losses on one process, {len(two)} on two ranks"
        return
    if not all(map(math.isfinite, (*one, *two))):
        yield "a loss is not finite"
    verdict.difference = max(abs(a - b) / max(abs(a), 1e-12) for a, b in zip(one, two, strict=True))
    if not verdict.difference <= script.tolerance:
        yield f"losses differ: {one[:6]} and {two[:6]}"


def _compare_printed(script: Script, alone: Path, ranks: Path, verdict: Verdict) -> Iterator[str]:
    if not script.printed:
        return
    one, two = (re.findall(script.printed, (folder / "output.txt").read_text()) for folder in (alone, ranks))
    verdict.printed = len(one)
    if not one or len(one) != len(two):
        yield f"{len(one)} numbers printed by one process, {len(two)} by two ranks"
    for a, b in zip(one, two, strict=False):
        digit = 10.0 ** -len(a.partition(".")[2])
        if abs(float(a) - float(b)) > 1.5 * digit + script.tolerance * abs(float(a)):
            yield f"printed {a} and {b}"


def _compare_saved(script: Script, alone: Path, ranks: Path, verdict: Verdict) -> Iterator[str]:
    for name in script.saved:
        one, two = (_tensors(torch.load(folder / name, weights_only=False)) for folder in (alone, ranks))
        one_named, two_named = dict(one), dict(two)
        if not one_named or one_named.keys() != two_named.keys():
            yield f"{name} holds other things: {sorted(one_named.keys() ^ two_named.keys())[:5]}"
            continue
        for key, a in one_named.items():
            if script.noise and re.search(script.noise, key):
                continue
            b = two_named[key]
            verdict.tensors += 1
            if a.shape != b.shape or a.dtype != b.dtype:
                yield f"{name}: {key} has another shape or type"
                continue
            difference = (
                float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-6))
                if a.numel()
                else 0.0
            )
            verdict.saved_difference = max(verdict.saved_difference, difference)
            if not difference <= 100 * script.tolerance:
                yield f"{name}: {key} differs by {difference:.1e}"


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{path}.{index}")
