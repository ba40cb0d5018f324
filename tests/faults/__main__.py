"""Carries out every attack and writes docs/faults.md; arguments choose attacks, which are only shown.

--update also puts those chosen into the table that is there, in place of what came of them before; --rest takes
those that have no row there yet, and adds theirs.
--jobs N carries out N at a time, which loads the machine and so lengthens what is measured.  With
BMTRAIN_TEST_DEVICE=cuda ranks are on GPUs, and the table is written to docs/faults-gpu.md.
"""

from __future__ import annotations

import fnmatch
import os
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from .attacks import Attack, attacks
from .judge import Finding, judge

HEAD = """# When a rank dies, differs or stalls{title}

Made by `bash tests/faults.sh`; do not edit. One rank of a small training script on {device}, `tests/faults/script.py`,
does what the first column says. The job must end within 10 s, or go on where that is said; every rank that still runs
must name the rank at fault within 10 s, with the places of both in the script; exit codes must tell, no process may
stay behind and no file be half-written. Seconds are counted from the fault. After a death, torchrun ends the other
ranks itself and names the one that died; what they had said by then counts. With `shard_size` or `tp_size`, four ranks
form groups, and what happens in one must reach the others. Some rows may be of a later run than the others.

"""


def main(words: list[str]) -> int:
    jobs = 1
    if "--jobs" in words:
        at = words.index("--jobs")
        jobs, words = int(words[at + 1]), words[:at] + words[at + 2 :]
    rest = "--rest" in words
    updates = "--update" in words or rest
    words = [word for word in words if word not in ("--update", "--rest")]
    every = [a for a in attacks() if not words or any(fnmatch.fnmatch(a.name, pattern) for pattern in words)]
    on_gpus = os.environ.get("BMTRAIN_TEST_DEVICE") == "cuda"
    if on_gpus:  # torchrun's local ranks are GPUs; by hand several ranks share one
        left_out = [a for a in every if a.torchrun and a.ranks > torch.cuda.device_count()]
        every = [a for a in every if a not in left_out]
        print(f"{len(left_out)} attacks under torchrun are left out: there are fewer GPUs than ranks" * bool(left_out))
    file = Path(__file__).parents[2].joinpath("docs", "faults-gpu.md" if on_gpus else "faults.md")
    known = _known(file.read_text()) if updates and file.exists() else {}
    if rest:
        every = [a for a in every if _head(a) not in known]
    wrong = False
    with ThreadPoolExecutor(jobs) as pool:
        judged = {pool.submit(judge, attack): attack for attack in every}
        for future in as_completed(judged):
            attack, found = judged[future], future.result()
            print(f"{attack.name}: {found.verdict} {_seconds(found)}", flush=True)
            if words or found.problems:
                print("    " + found.output.replace("\n", "\n    "), flush=True)
            wrong = wrong or bool(found.problems)
            known[_head(attack)] = _row(attack, found)
            if updates:  # after each, so that what was done is there when time runs out
                _write(file, known, on_gpus)
    if not words and not updates:
        _write(file, known, on_gpus)
    return int(wrong)


def _write(file: Path, known: dict[str, str], on_gpus: bool) -> None:
    lines = [known[_head(attack)] for attack in attacks() if _head(attack) in known]
    file.write_text(HEAD.format(title=", on GPUs" * on_gpus, device="GPUs" if on_gpus else "CPUs") + _table(lines))


def _table(lines: list[str]) -> str:
    right = sum(line.endswith("| right |") for line in lines)
    head = [
        f"{right} of {len(lines)} as they must be{_left(len(lines))}.", "",
        "| one rank | rank | started by | must | reported after | ended after | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    return "\n".join([*head, *lines]) + "\n"


def _left(shown: int) -> str:
    left = len(list(attacks())) - shown
    return f"; {left} others have not been run here" if left else ""


def _head(attack: Attack) -> str:
    """How an attack's row begins, which no other's does."""
    launcher = "torchrun" if attack.torchrun else "hand"
    must = {"ends": "end", "reported": "be reported and go on", "unharmed": "go on"}[attack.outcome]
    return f"| {attack.text} | {attack.rank} of {attack.ranks} | {launcher} | {must} |"


def _row(attack: Attack, found: Finding) -> str:
    return f"{_head(attack)} {_second(found.reported_after)} | {_second(found.ended_after)} | {found.verdict} |"


def _known(text: str) -> dict[str, str]:
    """The rows of a table, by their heads."""
    return {"|".join(line.split("|")[:5]) + "|": line for line in text.splitlines() if line.startswith("| ")}


def _second(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


def _seconds(found: Finding) -> str:
    seconds = f"reported after {_second(found.reported_after)}, ended after {_second(found.ended_after)}"
    return f"({seconds}, exit codes {found.exit_codes})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
