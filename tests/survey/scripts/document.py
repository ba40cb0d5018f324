"""Writes docs/scripts.md from the verdicts."""

from __future__ import annotations

import json

from tests.survey.scripts.prepare import REPOSITORY
from tests.survey.scripts.runner import RESULTS, Verdict
from tests.survey.scripts.table import SCRIPTS, Script

HEAD = """# Training scripts

Real training scripts from packages. Script and package were converted as they ship, made small by their own constants
and options, and given small synthetic data. The original ran on one process, the converted script under
`torchrun --nproc_per_node=2` (CPU, fp32, gloo), with the same options, so with the same global batch. Dropout was off,
because on two ranks it draws other numbers than on one.

Made by `bash tests/scripts.sh`; do not edit. The columns:

- **losses**: how many the script called backward on, and the largest relative difference between the two runs (bound
  1e-5; on two ranks the mean over the ranks);
- **printed**: numbers that the script itself printed or logged, losses of validation among them, all equal as printed;
- **saved**: tensors in the checkpoints that it wrote, and their largest difference relative to the tensor's largest
  entry (bound 1e-3: Adam turns a rounding of a tiny gradient into a step).

"""


def write() -> None:
    """Scripts that have not been run are left out."""
    found = [
        (script, Verdict(**json.loads(path.read_text())))
        for script in SCRIPTS
        if (path := RESULTS / f"{script.name}.json").exists()
    ]
    text = [HEAD, "| script | what | edits | losses | printed | saved | verdict |\n"]
    text += ["| --- | --- | --- | --- | --- | --- | --- |\n"]
    text += [_row(script, verdict) for script, verdict in found if not script.refused]
    text += ["\n## Refused\n\n", *(_refusal(s, v) for s, v in found if s.refused)]
    (REPOSITORY / "docs" / "scripts.md").write_text("".join(text))


def _row(script: Script, verdict: Verdict) -> str:
    saved = f"{verdict.tensors}, {verdict.saved_difference:.0e}" if verdict.tensors else "-"
    cells = [
        f"{script.package} {script.version}: `{_called(script)}`",
        script.what,
        str(verdict.edits),
        f"{verdict.losses}, {verdict.difference:.0e}",
        str(verdict.printed or "-"),
        saved,
        "wrong: " + verdict.wrong[0] if verdict.wrong else "same",
    ]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n"


def _called(script: Script) -> str:
    words = script.command.split()
    return " ".join(words[: 2 if words[0] == "-m" else 1])


def _refusal(script: Script, verdict: Verdict) -> str:
    told = [message for message in verdict.refused if script.refused in message]
    said = told[0].partition(" ")[2] if told else "not refused"
    return f"- {script.package} {script.version}, `{script.command}`: {said}\n"
