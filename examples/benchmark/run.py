"""Measure bmtrain beside FSDP2, DeepSpeed and the bare compute, on one machine, one after the other.

    python examples/benchmark/run.py                           # one GPU a rank, the default workloads
    python examples/benchmark/run.py 7b:2:full 1.3b:4:none     # SIZE:BATCH:RECOMPUTE, add :compile for compiled blocks
    python examples/benchmark/run.py nano:2:full --ranks 2 --sequence 64      # also works without a GPU
    python examples/benchmark/run.py --startup 13b             # how long a model takes to be ready, and what that needs

RECOMPUTE: `full` computes every block's activations again in backward, `none` keeps them, `best` is every engine at its
best: ours decides for itself, the others keep all, and all compile. Every engine runs in processes of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from engines import ENGINES, why_not
from model import SIZES
from startup import Startup, print_startup
from table import Result, Workload, compare, draw, print_table

HERE = Path(__file__).parent
BEGIN = time.monotonic()
DEFAULT_WORKLOADS = ["1.3b:4:full", "1.3b:4:none", "7b:2:full", "7b:2:full:compile", "7b:2:best"]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=DEFAULT_WORKLOADS, metavar="SIZE:BATCH:RECOMPUTE[:compile]")
    parser.add_argument("--startup", nargs="+", choices=SIZES, metavar="SIZE", help="only build models of these sizes")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--sequence", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=8, help="measured steps; the median counts")
    parser.add_argument("--warmup", type=int, default=8, help="steps before them, in which ours decides what to keep")
    parser.add_argument("--clip", type=float, default=0.0, help="largest gradient norm; 0 does not clip")
    parser.add_argument("--peak", type=float, help="TFLOP/s of one GPU that MFU is measured against")
    parser.add_argument("--profile", action="store_true", help="also say what the GPU's streams did")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one engine and workload")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for all; what is left out is said")
    parser.add_argument(
        "--tolerance", type=float, default=5e-3 if torch.cuda.is_available() else 1e-4,
        help="by which losses may differ, of their size: 5e-3 in bf16 on GPUs, else 1e-4",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write all results here, after each workload")
    parser.add_argument("--picture", type=Path, default=Path("benchmark.png"))
    return parser.parse_args()


def worker_arguments(engine: str, workload: Workload, options: argparse.Namespace) -> list[str]:
    recompute, compiled = workload.recompute, workload.compiled
    if recompute == "best":
        recompute, compiled = ("auto" if engine.startswith("bmtrain") else "none"), True
    arguments = [f"--size={workload.size}", f"--batch={workload.batch}", f"--recompute={recompute}"]
    arguments += [f"--{name}={getattr(options, name)}" for name in ("sequence", "steps", "warmup", "clip")]
    return arguments + ["--compile"] * compiled + ["--profile"] * options.profile


def launch(engine: str, arguments: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Start one engine on all ranks and read what its rank 0 printed: the fields of a result."""
    if reason := why_not(engine, "cuda" if torch.cuda.is_available() else "cpu"):
        return {"failure": reason}
    left = options.limit - (time.monotonic() - BEGIN)
    if left <= 0:
        return {"failure": "left out: no time left"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
    command = [*launcher, str(HERE / "worker.py"), engine, *arguments]
    print(f"  {engine} ...", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=min(options.timeout, left), check=False)
    except subprocess.TimeoutExpired:
        return {"failure": f"not done after {min(options.timeout, left):.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return dict(json.loads(line.removeprefix("RESULT ")))
    if "OutOfMemoryError" in done.stderr:
        return {"failure": "out of memory"}
    print(done.stderr[-4000:], file=sys.stderr)
    return {"failure": f"failed with exit code {done.returncode}"}


def start_up(size: str, options: argparse.Namespace) -> list[Startup]:
    results = []
    for engine in options.engines:
        if engine in ("floor", "fsdp2-bf16-reduce"):  # the first shards nothing, the other starts as fsdp2 does
            continue
        begin = time.perf_counter()
        found = launch(engine, [f"--size={size}", "--batch=1", "--startup"], options)
        results.append(Startup(engine, ready=time.perf_counter() - begin, **found))
    return results


def main() -> None:
    options = parse_options()
    if options.profile and not torch.cuda.is_available():
        sys.exit("--profile reads the GPU's streams: there is no GPU here")
    if options.startup:
        for size in options.startup:
            print_startup(size, start_up(size, options), options)
        return
    everything: dict[str, list[Result]] = {}
    for text in options.workloads:
        workload = Workload.parse(text)
        print(f"\n{workload.describe(options)}", flush=True)
        results = everything[text] = []
        for engine in options.engines:
            results.append(Result(engine, **launch(engine, worker_arguments(engine, workload, options), options)))
        compare(results, options.tolerance)
        print_table(workload, results, options)
        if options.json:
            plain = {text: [vars(result) for result in results] for text, results in everything.items()}
            options.json.write_text(json.dumps(plain, indent=1))
    draw(everything, options.picture)
    print(f"\ndrawn in {options.picture}")
    if any(result.engine == "bmtrain" and result.failure for rows in everything.values() for result in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
