"""Waiting for what one rank writes."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.changes import insert_before, insert_behind, wrap
from rewriter.types import Conversion, Finding, Remark


def waits(code: str, file: File, facts: Facts, nodes: Sequence[ast.stmt | ast.Call]) -> Iterator[Finding]:
    """The other ranks wait where they may read a file, or look into a folder, that rank 0 has not made; else a word.

    ``nodes`` are statements that one rank runs together, or a call that opens a file or makes a writer.
    """
    told: set[ast.AST] = set()
    for race in (race for node in nodes for race in facts.read_back.races(file, node)):
        where = f"line {race.call.lineno}" if race.file is race.where else f"{race.file.path.name}:{race.call.lineno}"
        place = race.behind or race.front or race.test
        if place in told:
            continue
        if place is not None:
            told.add(place)
        line = nodes[0].lineno
        said = f"all ranks wait for what one writes, and read it then ({where})"
        if race.reached and race.where is file and race.behind is not None:
            first = nodes[0]  # what stands behind the others goes with them to one rank
            behind = first if race.behind in nodes and isinstance(first, ast.stmt) else race.behind
            yield Conversion(code, line, said, (insert_behind(behind, "{bmt}.synchronize()"),))
        elif race.reached and race.where is file and race.front is not None:
            yield Conversion(code, line, said, (insert_before(race.front, "{bmt}.synchronize()"),))
        elif race.reached and race.where is file and race.test is not None:
            message = f"rank 0 decides for all whether a file is written or read ({where})"
            yield Conversion(code, line, message, (wrap(race.test.test, "{bmt}.agree({it})"),))
        else:
            wait = "put bmt.synchronize() between the two"
            if race.test is not None:
                wait = f"let rank 0 decide for all, if bmt.agree({file.source.code(race.test.test)})"
            message = f"one rank writes this file, and others may read it too early ({where}): {wait}"
            yield Remark(code, line, message, differs=True)
            return
