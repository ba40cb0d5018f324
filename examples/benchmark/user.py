"""Measure a user's script beside what it is converted to, and beside what he would write by hand instead.

    python examples/benchmark/user.py                          # the default workloads on one GPU and on all
    python examples/benchmark/user.py 350m:8 1.5b:4:compile 350m:8:accum=8 --ranks 1 2 --json rows.json
    python examples/benchmark/user.py nano:2 --ranks 1 2 --length 32         # also works without a GPU

A workload is SIZE:BATCH, with BATCH sequences per GPU; sizes are in gpt/gpt.py. With memory=8 the converted script is
allowed 8 GiB; the others know no limit. The script (gpt/train.py) runs plain on one GPU, and converted by bmt-convert;
gpt/by_hand.py has DDP and FSDP2.  All train the same model on the same data, and a row whose losses do not agree with
those of plain torch (on several GPUs: DDP's) has failed, however fast it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WARMUP = 6  # steps: by then everything is measured, allocated and compiled
SPELLING = "SIZE:BATCH[:accum=N][:compile][:memory=GIB]"
DEFAULT_WORKLOADS = ["tiny:8", "350m:8", "350m:8:compile", "1.5b:4"]


@dataclass
class Row:
    """What one engine did: milliseconds of a step (median, best), GiB at the peak."""

    workload: str
    engine: str
    ranks: int
    failure: str = ""
    median: float = 0.0
    best: float = 0.0
    gib: float = 0.0
    losses: list[float] = field(default_factory=list)
    said: str = ""

    @property
    def name(self) -> str:
        return f"{self.engine} x{self.ranks}"


@dataclass(frozen=True)
class Workload:
    text: str
    size: str
    batch: int
    accum: int = 1
    compiled: bool = False
    memory: int = 0

    @staticmethod
    def parse(text: str) -> Workload:
        size, batch, *rest = [*text.split(":"), ""]
        accum, compiled, memory = 1, False, 0
        for flag in filter(None, rest):
            name, _, value = flag.partition("=")
            if name == "accum" and value.isdigit():
                accum = int(value)
            elif name == "memory" and value.isdigit():
                memory = int(value)
            elif flag == "compile":
                compiled = True
            else:
                batch = ""
        if not batch.isdigit():
            sys.exit(f"{text!r} is not {SPELLING}")
        return Workload(text, size, int(batch), accum, compiled, memory)

    def arguments(self, ranks: int, options: argparse.Namespace) -> list[str]:
        given = [f"--size={self.size}", f"--batch={self.batch * ranks}", f"--accum={self.accum}"]
        given += [f"--length={options.length}", f"--steps={options.steps}"]
        return given + ["--compile"] * self.compiled


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=DEFAULT_WORKLOADS, metavar=SPELLING)
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of GPUs, 1 and all by default")
    parser.add_argument("--engines", nargs="+", default=["plain", "ddp", "converted", "fsdp2"])
    parser.add_argument("--steps", type=int, default=16, help=f"of which {WARMUP} are not counted")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="by which losses may differ, of their size")
    parser.add_argument(
        "--converted", type=Path, help="the folder gpt/ converted before; it is converted here if not given"
    )
    parser.add_argument(
        "--beside", type=Path, action="append", default=[], help="another copy of this project, for rows of its own"
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one row")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for all; what is left out is said")
    parser.add_argument("--json", type=Path, help="write all rows here, after each")
    options = parser.parse_args()
    if options.ranks is None:
        options.ranks = sorted({1, torch.cuda.device_count() or 2})
    return options


def convert(target: Path) -> Path:
    command = [sys.executable, "-c", "import sys; from rewriter.cli import main; sys.exit(main())"]
    done = subprocess.run(
        [*command, str(HERE / "gpt"), "--output", str(target), "--quiet"],
        env=environment(ROOT), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if not (target / "train.py").exists():
        sys.exit(f"bmt-convert failed: {done.stderr[-500:]}")
    return target


def limited(converted: Path, target: Path, memory: int) -> Path:
    """The same in ``target``, but for what it allows itself."""
    shutil.copytree(converted, target, dirs_exist_ok=True)
    script = target / "train.py"
    script.write_text(script.read_text().replace("init_distributed(", f"init_distributed(memory={memory}, ", 1))
    return target


def environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))}


def engines(options: argparse.Namespace, ranks: int) -> list[tuple[str, str, Path]]:
    """Which rows there are for so many ranks: name, engine, and the tree whose bmtrain it imports."""
    found = []
    for engine in options.engines:
        if (engine == "plain" and ranks > 1) or (engine in ("ddp", "fsdp2") and ranks == 1):
            continue
        found.append((engine, engine, ROOT))
        if engine == "converted":
            found += [(f"{engine} ({tree.name})", engine, tree.resolve()) for tree in options.beside]
    return found


def measure(
    row: Row,
    workload: Workload,
    engine: str,
    tree: Path,
    converted: Path,
    options: argparse.Namespace,
    seconds: float,
) -> None:
    """Fill in ``row``, in so many seconds at most."""
    script = [str((converted if engine == "converted" else HERE / "gpt") / "train.py")]
    if engine in ("ddp", "fsdp2"):
        script = [str(HERE / "gpt" / "by_hand.py"), engine]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={row.ranks}"] if row.ranks > 1 else []
    command = [sys.executable, *launcher, *script, *workload.arguments(row.ranks, options)]
    process = subprocess.Popen(
        command,
        env=environment(tree),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        row.failure = f"not done after {seconds:.0f} s"
        return
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.communicate()
    results = [line for line in out.splitlines() if line.startswith("RESULT ")]
    row.said = "\n".join(line for line in err.splitlines() if line.startswith("bmtrain:"))
    if not results:
        errors = [line for line in err.splitlines() if "Error" in line]
        row.failure = (errors or err.splitlines() or ["printed nothing"])[-1][:200]
        return
    found = json.loads(results[0].removeprefix("RESULT "))
    times = [1e3 * second for second in found["seconds"][min(WARMUP, options.steps - 1) :]]
    row.median, row.best = round(statistics.median(times), 2), round(min(times), 2)
    row.gib, row.losses = round(found["gib"], 2), found["losses"]


def compare(row: Row, rows: list[Row], tolerance: float) -> None:
    """Let ``row`` fail if its losses are not those of the reference for its workload and number of ranks."""
    kind = "plain" if row.ranks == 1 else "ddp"
    for right in rows:
        if (right.workload, right.ranks, right.engine) == (row.workload, row.ranks, kind) and right.losses:
            error = max(abs(a - b) / abs(b) for a, b in zip(row.losses, right.losses, strict=True))
            if not error <= tolerance:
                row.failure = f"losses differ from those of {right.name} by {error:.1e}"


def print_row(row: Row, rows: list[Row]) -> None:
    def over(engine: str) -> str:
        """Times as long as ``engine`` on as many GPUs."""
        same = [r for r in rows if (r.workload, r.ranks, r.engine) == (row.workload, row.ranks, engine) and r.median]
        return f"{row.median / same[0].median:.3f}" if same and row.median else "-"

    numbers = f"{row.median:>9.2f}{row.best:>9.2f}{row.gib:>8.2f}{over('plain'):>9}{over('ddp'):>9}"
    losses = f"{row.losses[0]:.4f} -> {row.losses[-1]:.4f}" if row.losses else ""
    print(f"{row.workload:22}{row.name:28}{numbers}  {losses}  {'FAILED: ' + row.failure if row.failure else ''}")
    if row.said:
        print(f"    {row.said}")
    sys.stdout.flush()


def main() -> int:
    options, begin, rows = parse_options(), time.monotonic(), []
    print(f"{'workload':22}{'engine':28}{'ms':>9}{'best':>9}{'GiB':>8}{'/ plain':>9}{'/ ddp':>9}  losses", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        converted = options.converted or convert(Path(folder) / "converted")
        for workload in map(Workload.parse, options.workloads):
            scripts = converted
            if workload.memory:
                scripts = limited(converted, Path(folder) / f"within-{workload.memory}", workload.memory)
            for ranks in options.ranks:
                for name, engine, tree in engines(options, ranks):
                    row = Row(workload.text, name, ranks)
                    rows.append(row)
                    seconds = min(options.timeout, options.limit - (time.monotonic() - begin))
                    if seconds <= 0:
                        row.failure = "left out: no time left"
                    else:
                        measure(row, workload, engine, tree, scripts, options, seconds)
                        if row.losses:
                            compare(row, rows, options.tolerance)
                    print_row(row, rows)
                    if options.json:
                        options.json.write_text(json.dumps([asdict(each) for each in rows], indent=1))
    return int(any(row.failure for row in rows))


if __name__ == "__main__":
    sys.exit(main())
