"""Writes docs/zoo.md from the verdicts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.survey.zoo.convert import CLASSES, count
from tests.survey.zoo.packages import PACKAGES
from tests.survey.zoo.prepare import REPOSITORY, source
from tests.survey.zoo.runner import RESULTS, families

HEAD = """# Model zoo

Real models from packages, in tiny configurations with random weights. Each package's source was converted as it ships,
and `rewriter.verify` compared the original on one process with the converted model on 1 and on 2 ranks (CPU, fp32):
keys, initial weights, outputs, loss, gradients of parameters and inputs, with and without dropout, the batch split over
the ranks, three AdamW steps with clipping, checkpoints both ways.

Made by `bash tests/zoo.sh`; do not edit. `bash tests/zoo.sh --subset` verifies nine families, with every change.
The columns:

- **loops**: in the files of the model's classes, loops over containers of blocks that became one call / were kept over
  a stack of blocks / run over a list that was left alone;
- **1 rank**, **2 ranks**: largest difference before any optimizer step, in units in the last place at 1 rank and
  relative to the tensor's largest entry at 2; *after steps*: of the trained weights, relative. The bounds are 0 ulp at
  1 rank, 1e-6 relative at 2, and 1e-4 after three steps (1e-5 after one). What is measured against what is in
  [Checking a conversion](verifying.md).

"""


def write() -> None:
    """Families that have not been verified are left out."""
    found = {name: json.loads(path.read_text()) for name in families() if (path := RESULTS / f"{name}.json").exists()}
    table = _Table(found)
    rows = [table.row(name) for name in found]
    verdicts = Counter(table.verdict(name) for name in found)
    target = REPOSITORY / "docs" / "zoo.md"
    target.parent.mkdir(exist_ok=True)
    text = [HEAD, f"{len(found)} families: {', '.join(f'{n} {verdict}' for verdict, n in verdicts.most_common())}.\n\n"]
    text += ["Classes of loops: " + "; ".join(f"{key} {title}" for key, title in CLASSES.items()) + ".\n\n"]
    text += ["| package | family | classes | loops | edits | 1 rank | 2 ranks | after steps | verdict |\n"]
    text += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n", *rows]
    rest = [name for name in found if table.verdict(name) != "same"]
    if rest:
        text += ["\n## Refused or wrong\n\n", *(f"- **{name}**: {table.reason(name)}\n" for name in rest)]
    target.write_text("".join(text))


class _Table:
    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found
        self.counts: dict[tuple[str, str], Counter[str]] = {}
        self.refused: dict[tuple[str, str], str] = {}
        wanted: dict[str, set[str]] = {}
        for name, result in found.items():
            wanted.setdefault(name.partition("__")[0], set()).update(result["files"])
        for key, files in wanted.items():
            counts, refused = count(source(PACKAGES[key]), sorted(files))
            self.counts.update({(key, file): counter for file, counter in counts.items()})
            self.refused.update({(key, file): message for file, message in refused.items()})

    def refusals(self, name: str) -> list[str]:
        """What the rewriter said of files that it left alone."""
        places = [(name.partition("__")[0], file) for file in self.found[name]["files"]]
        return [f"{file}: {self.refused[key, file]}" for key, file in places if (key, file) in self.refused]

    def verdict(self, name: str) -> str:
        if self.found[name]["held"]:
            return "same"
        return "refused" if self.refusals(name) else "wrong"

    def reason(self, name: str) -> str:
        """In one line, why a family does not count as the same."""
        return "; ".join(self.refusals(name)) or _failure(self.found[name])

    def row(self, name: str) -> str:
        key, _, family = name.partition("__")
        result = self.found[name]
        total = sum((self.counts[key, file] for file in result["files"]), Counter[str]())
        classes = "".join(c for c in CLASSES if total[c]) or "-"
        loops = f"{total['called']} / {total['kept']} / {total['plain']}"
        package = f"{PACKAGES[key].name} {PACKAGES[key].version}"
        verdict = self.verdict(name)
        numbers = ["-"] * 3 if verdict == "refused" else _numbers(result)
        cells = [package, family, classes, loops, str(total["edits"]), *numbers, verdict]
        return f"| {' | '.join(cells)} |\n"


def _numbers(result: dict[str, Any]) -> Iterator[str]:
    rows = [row for row in result["rows"] if row["verdict"] in ("equal", "differs")]
    one = [row["ulp"] for row in rows if row["ranks"] == 1 and row["phase"] not in ("steps",)]
    two = [row["relative"] for row in rows if row["ranks"] == 2 and row["phase"] not in ("steps",)]
    steps = [row["relative"] for row in rows if row["phase"] == "steps" and row["what"] == "weights"]
    for values, form in ((one, "{:.0f} ulp"), (two, "{:.0e}"), (steps, "{:.0e}")):
        yield form.format(max(float(value) for value in values)).replace("0e+00", "0") if values else "-"


def _failure(result: dict[str, Any]) -> str:
    for row in result["rows"]:
        where = f"{row['ranks']} ranks, {row['phase']}, {row['what']}"
        if row["error"]:
            return f"{where}: {row['error'][:200]}"
        if row["verdict"] == "differs":
            first = row["different"][0]
            return f"{where}: {first['path']} {first['why'] or first['relative']}"
    return ", ".join(result["nothing_compared"]) + ": nothing was compared"
