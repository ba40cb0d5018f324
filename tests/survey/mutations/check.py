"""What becomes of a script when it is converted and run on several ranks."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from tests.survey.mutations import run
from tests.survey.mutations.scripts import compose
from tests.survey.styles.compare import differences

BAD = ("WRONG", "CRASH", "HANG")
# What the report's last line asks for, or why it asks for nothing. Remarks that leave a script ready do not count.
_ASKS = re.compile(r"^(?:not ready|nothing to launch|before the launch|first[ ,:]|.* error: ).*$", re.MULTILINE)
_RUN_SAYS = re.compile(
    r"^.*(?:bmtrain\S*(?:Warning|Error|Differ\w*)|bmtrain\.errors\.).*$|^.*UserWarning: .*$", re.MULTILINE
)


class Verdict(NamedTuple):
    seed: int
    word: str
    differs: list[str]
    said: list[str]
    drawn: dict[str, str]


def check(seed: int, ranks: int, keep: Path) -> Verdict:
    script = compose(seed)
    work = keep / str(seed)
    shutil.rmtree(work, ignore_errors=True)
    for folder in ("original", "converted"):
        (work / folder).mkdir(parents=True)
        for name, text in script.files.items():
            (work / folder / name).write_text(text)
    original, converted = work / "original", work / "converted"

    def verdict(word: str, *differs: str, said: list[str] | None = None) -> Verdict:
        return Verdict(seed, word, list(differs), said or [], script.drawn)

    for command in script.commands:
        if code := run.run(command.split(), original):
            last = run.output(original, "err").strip().splitlines()[-1:]
            return verdict("BROKEN", f"the original ends with {code}", *last)
    report = work / "report"
    report.mkdir()
    code = run.run(["rewriter", str(converted), "--write"], report)
    said = _ASKS.findall(run.output(report, "out") + run.output(report, "err"))
    if code not in (0, 3):
        return verdict("CRASH", f"the conversion ends with {code}")
    if code:
        return verdict("said", "not converted", said=said)
    for command in script.commands:
        code = run.run(command.split(), converted, ranks)
        if code == run.HANGS:
            return verdict("HANG", f"{command} does not end", said=said)
        if code:
            break
    errors = run.output(converted, "err")
    told = list(dict.fromkeys(_RUN_SAYS.findall(errors)))
    if code:
        lines = [line for line in errors.splitlines() if re.match(r"[\w.]*(Error|Exception|Differ\w*)\b", line)]
        named = [line for line in lines if line.startswith("bmtrain.")]
        found = said or named
        return verdict("said" if found else "CRASH", f"ends with {code}", *(named or lines)[:2], said=found)
    differs = differences(original, converted, run.output(original, "out"), run.output(converted, "out"), set())
    if not differs:
        shutil.rmtree(work)
        return verdict("same")
    return verdict("said" if said or told else "WRONG", *differs, said=[*said, *(f"ready: {line}" for line in told)])
