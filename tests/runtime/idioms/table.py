"""The table of idioms as a page of the docs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from .registry import RANKS, VERDICTS, idioms

_HEAD = """# Idioms

Small pieces of code as users write them around a model, each run by plain torch on one process with the whole batch,
and sharded on 1, 2 and 3 ranks with a share of it. Compared are losses, gradients, weights after some steps, and what
was printed, on every rank.

Made by `bash tests/idioms.sh`; do not edit. What an idiom does exactly is the function of its name in
`tests/runtime/idioms/`.

- **right**: the numbers of plain torch on every rank;
- **refused**: an error of bmtrain's on every rank, which says what to do, before weights change;
- **said**: other numbers, and a warning that says which and what to do;
- **silent**: other numbers and neither; **raw**: another error, or not on all ranks; **hang**: no end. These are
  defects; each is listed with its reason.
"""


def render(found: Mapping[str, Mapping[str, tuple[str, ...]]]) -> str:
    """The page: for each theme and idiom, one verdict for each of RANKS."""
    lines = [_HEAD]
    total = [Counter(v[i] for theme in found.values() for v in theme.values()) for i in range(len(RANKS))]
    count = sum(len(theme) for theme in found.values())
    lines += [f"{count} idioms:", "", f"| ranks | {' | '.join(VERDICTS)} |", "| --- |" + " --- |" * len(VERDICTS)]
    for ranks, counted in zip(RANKS, total, strict=True):
        lines.append(f"| {ranks} | " + " | ".join(str(counted[word]) for word in VERDICTS) + " |")
    for theme, rows in found.items():
        lines += ["", f"## {theme.capitalize()}", "", "| idiom | | 1 rank | 2 ranks | 3 ranks |", "| --- " * 5 + "|"]
        for name, words in rows.items():
            it = idioms(theme)[name]
            text = it.text + (f" *({it.why})*" if it.why else "") + (f" (names `{it.says}`)" if it.says else "")
            lines.append(f"| `{name}` | {text.replace('|', chr(92) + '|')} | " + " | ".join(words) + " |")
    return "\n".join(lines) + "\n"
