"""Small training scripts in many styles: converted, run on several ranks, and compared with the original on one.

    python -m tests.survey.styles [NAME...] [--ranks 2] [-j 4] [--keep FOLDER]

Training batches divide evenly over two ranks: elsewhere a mean weighs samples slightly otherwise, with a warning. What
is printed, every file that is written, and what is in it must be the original's. A script's folder may hold
``commands``, one a line (else ``train.py``), and ``said``: what the conversion must say of it, where it is known not to
be the same.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.survey.styles.compare import differences

SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).parents[3]
OWN = {"commands", "said"}


def run(command: list[str], folder: Path, seconds: int) -> tuple[int, str]:
    """The exit code and the output; 124 if it does not end."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    (folder / "stderr").touch()
    with (folder / "stderr").open("a") as errors:
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return 124, ""
    return done.returncode, done.stdout


def run_all(folder: Path, launcher: list[str]) -> tuple[int, str]:
    listed = folder / "commands"
    commands = listed.read_text().splitlines() if listed.exists() else ["train.py"]
    output = ""
    for command in commands:
        code, printed = run([sys.executable, *launcher, *command.split()], folder, 300)
        output += printed
        if code:
            return code, output
    return 0, output


def check(name: str, ranks: list[int], keep: Path) -> list[str]:
    """What is wrong with a script's conversion."""
    work = keep / name
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(SCRIPTS / name, work / "original")
    shutil.copytree(SCRIPTS / name, work / "converted")
    code, expected = run_all(work / "original", [])
    if code:
        return [f"the original ends with {code}"]
    code, report = run([sys.executable, "-m", "rewriter", ".", "--write"], work / "converted", 120)
    (work / "report").write_text(report)
    said = SCRIPTS / name / "said"
    if said.exists():
        missing = [line for line in said.read_text().splitlines() if line not in report]
        return [f"not said: {line}" for line in missing]
    if code:
        return [f"the conversion ends with {code}"]
    found = []
    for count in ranks:
        ran = work / f"ranks-{count}"
        shutil.copytree(work / "converted", ran)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        code, printed = run_all(ran, launcher)
        if code:
            found.append(f"{count} ranks end with {code}")
        else:
            told = differences(work / "original", ran, expected, printed, OWN | {"stderr"})
            found += [f"{count} ranks: {line}" for line in told]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--ranks", default="2")
    parser.add_argument("-j", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "bmtrain-styles")
    options = parser.parse_args()
    names = options.names or sorted(folder.name for folder in SCRIPTS.iterdir())
    ranks = [int(count) for count in options.ranks.split(",")]
    wrong = 0
    with ThreadPoolExecutor(options.j) as pool:
        for name, found in zip(names, pool.map(lambda name: check(name, ranks, options.keep), names), strict=True):
            verdict = "WRONG" if found else "said" if (SCRIPTS / name / "said").exists() else "same"
            print(f"{name:12} {verdict}", *found, sep="\n    ", flush=True)
            wrong += bool(found)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
