"""Measures the rewriter on folders of real code and prints tables.

    python -m tests.survey.corpus FOLDER... [--remarks] [--loops loops.jsonl.gz] [--docs docs/corpus.md] [--speed]

One folder is one project, by the name of the folder. The first table has a row for each: files, files changed, edits,
CPU seconds (reading, planning, applying), memory of the largest process; loops over blocks that became one call, were
kept, are left to bmt.BMTrainModelWrapper, or refused; loops over lists that hold no blocks; and what must be
zero: files that would break, outputs that do not compile, files that a second run changes, files with bytes changed
outside edits. Comments go with a statement that goes. The second table has a row for each class of loops.

With --loops, a survey of the same packages (one JSON object a line: src, file, line, shape, blockish, form), the loops
that the two see differently, by the reason. With --sample N, N refused loops and N loops that became calls, drawn with
a fixed seed, for reading. With --docs, the tables go into that file, between its marks. With --speed, files a second
and the time against libcst, if that is installed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path

from .files import MUST_BE_ZERO, Measured, measure
from .loops import CLASSES, NOT_BLOCKS, STATES, Record, macro_share, table
from .speed import speed
from .survey import compare

COLUMNS = ("files", "changed", "edits", "s", "MB", "called", "kept", "wrapper", "refused", "no blocks", "share")
HEAD = ("package", *COLUMNS, "unreadable", *MUST_BE_ZERO)


def row(name: str, found: Measured) -> list[str]:
    counts = Counter(found.counts)
    chains = [record for record in found.loops if record.chain]
    blocks = [record for record in chains if not record.reason.startswith(NOT_BLOCKS)]
    counts.update(record.state for record in blocks)
    counts["no blocks"] = len(chains) - len(blocks)
    share = f"{macro_share(blocks, ('called', 'kept', 'wrapper')):.0f} %" if blocks else "-"
    cells = {"s": f"{counts['ms'] / 1000:.1f}", "share": share}
    return [name, *(cells.get(column, str(counts[column])) for column in HEAD[1:])]


def markdown(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def class_table(found: list[Record]) -> str:
    head = ("class", "loops", *STATES, "with blocks, macro")
    rows = [[f"{row[0]}: {CLASSES[row[0]]}" if row[0] in CLASSES else row[0], *row[1:]] for row in table(found)]
    return markdown(head, rows)


def sample(found: list[Record], count: int) -> list[Record]:
    """Refused loops and calls to be read by a person."""
    draw = random.Random(0)
    refused = sorted(r for r in found if r.chain and r.state == "refused")
    called = sorted(r for r in found if r.state == "called")
    return [*draw.sample(refused, min(count, len(refused))), *draw.sample(called, min(count, len(called)))]


def write_docs(path: Path, text: str) -> None:
    before, begin, rest = path.read_text().partition("<!-- tables: written by tests/survey/corpus -->\n")
    _, end, after = rest.partition("<!-- end of tables -->\n")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--remarks", action="store_true", help="print what went wrong")
    parser.add_argument("--loops", type=Path, metavar="FILE", help="compare with a survey of loops")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write the tables into this file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every loop, one JSON object a line")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="print N refused loops and N calls")
    parser.add_argument("--speed", action="store_true", help="measure speed instead")
    options = parser.parse_args()
    if options.speed:
        for folder in options.folders:
            print(speed(folder), flush=True)
        return 0
    rows, loops, bad = [], [], 0
    print(*HEAD, sep="\t")
    for folder in options.folders:
        found = measure(folder)
        rows.append(row(folder.name, found))
        loops.extend(found.loops)
        bad += sum(found.counts[name] for name in MUST_BE_ZERO)
        print(*rows[-1], sep="\t", flush=True)
        for remark in found.remarks if options.remarks else ():
            print("   ", remark)
    text = class_table(loops)
    if options.loops is not None:
        text += f"\n{compare(loops, options.loops)}"
    print(f"\n{text}")
    for record in sample(loops, options.sample):
        print(f"{record.state}\t{record.shape}\t{record.place}\t{record.owner}.{record.path}\t{record.reason}")
    if options.json is not None:
        options.json.write_text("".join(json.dumps(record._asdict()) + "\n" for record in loops))
    if options.docs is not None:
        write_docs(options.docs, f"{text}\n{markdown(HEAD, rows)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
