"""Runs every idiom at 1, 2 and 3 ranks and writes the table; arguments choose themes or theme.idiom and write nothing.

--once does not run again, alone, what came out otherwise than expected.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from .registry import RANKS, THEMES, idioms
from .table import render
from .verdicts import verdicts


def main(chosen: list[str]) -> int:
    again = "--once" not in chosen
    chosen = [word for word in chosen if word != "--once"]
    whole = {word for word in chosen if "." not in word}
    themes = [theme for theme in THEMES if not chosen or theme in {word.partition(".")[0] for word in chosen}]
    table: dict[str, dict[str, tuple[str, ...]]] = {}
    unexpected = 0
    for theme in themes:
        start = time.monotonic()
        only = None if not chosen or theme in whole else [word.partition(".")[2] for word in chosen]
        found = [verdicts(theme, ranks, only, again) for ranks in RANKS]
        table[theme] = {name: tuple(at[name].word for at in found) for name in found[0]}
        for name, words in table[theme].items():
            it = idioms(theme)[name]
            bad = [at[name] for at, word in zip(found, it.expected, strict=True) if at[name].word != word]
            unexpected += bool(bad)
            if bad or only is not None:
                print(f"{theme}.{name}: {' '.join(words)}, expected {' '.join(it.expected)}")
                print(
                    "    " + (bad[0].detail.strip()[-2500:].replace("\n", "\n    ") if bad else "as expected"),
                    flush=True,
                )
        print(f"{theme}: {len(found[0])} idioms, {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    if not chosen:
        Path(__file__).parents[3].joinpath("docs", "idioms.md").write_text(render(table))
    return int(unexpected > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
