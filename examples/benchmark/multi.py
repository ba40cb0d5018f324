"""Put what multi.sh has measured into one JSON and one picture, and beside it what was aimed at.

    python examples/benchmark/multi.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

# Tokens per second of bmtrain over those of FSDP2 and of the compute alone, on four GPUs.
TARGETS = {
    "7b:2:full": (1.20, 0.93),
    "7b:1:full": (1.38, 0.87),
    "7b:2:best": (1.17, 0.90),
    "13b:4:full": (1.10, 0.95),
    "1.3b:4:none": (1.17, 0.93),
    "tiny:4:none": (2.0, None),
}
WEAK = 0.93
"""Tokens per second and GPU on all GPUs, over those on one."""


def read(folder: Path) -> dict[str, Any]:
    """All results: workloads by name, tokens per second and GPU by number of ranks, rows of the user's script."""
    found: dict[str, Any] = {"rows": {}, "weak": {}, "user": []}
    if (folder / "rows.json").exists():
        found["rows"] = json.loads((folder / "rows.json").read_text())
    if (folder / "user.json").exists():
        found["user"] = json.loads((folder / "user.json").read_text())
    for path in sorted(folder.glob("weak.*.json"), key=lambda path: int(path.suffixes[0][1:])):
        for results in json.loads(path.read_text()).values():
            done = [result for result in results if not result["failure"]]
            if done:
                found["weak"][path.suffixes[0][1:]] = done[0]["tokens"]
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """Each target beside what came."""
    said = []
    for workload, results in found["rows"].items():
        speed = {result["engine"]: result["tokens"] for result in results if not result["failure"]}
        memory = {result["engine"]: result["used"] for result in results if not result["failure"]}
        for other, target in zip(("fsdp2", "floor"), TARGETS.get(workload, (None, None)), strict=True):
            if "bmtrain" in speed and other in speed:
                ratio = speed["bmtrain"] / speed[other]
                said.append(f"{workload}: {ratio:.3f} of {other}'s tokens per second" + aimed(ratio, target))
        if memory.get("bmtrain") and memory.get("fsdp2"):
            verdict = "met" if memory["bmtrain"] <= memory["fsdp2"] else "NOT met"
            said.append(f"{workload}: {memory['bmtrain']:.1f} GiB, aimed at FSDP2's {memory['fsdp2']:.1f}: {verdict}")
        failures = {result["engine"]: result["failure"] for result in results if result["failure"]}
        said += [f"{workload}: {engine}: {failure}" for engine, failure in failures.items()]
    if "1" in found["weak"] and len(found["weak"]) > 1:
        ranks = max(found["weak"], key=int)
        ratio = found["weak"][ranks] / found["weak"]["1"]
        said.append(f"weak scaling from 1 to {ranks}: {ratio:.3f}" + aimed(ratio, WEAK))
    return said


def aimed(ratio: float, target: float | None) -> str:
    """What to say behind a ratio that should be at least so large."""
    return "" if target is None else f", aimed at {target:.2f}: {'met' if ratio >= target else 'NOT met'}"


def draw(found: dict[str, Any], path: Path) -> None:
    """Tokens per second over FSDP2's for each workload, and per GPU for each number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for workload, results in found["rows"].items():
        speed = {result["engine"]: result["tokens"] for result in results if not result["failure"]}
        for engine, marker in (("bmtrain", "o"), ("floor", "_"), ("deepspeed", "x")):
            if engine in speed and "fsdp2" in speed:
                left.plot(workload, speed[engine] / speed["fsdp2"], marker, color="black")
    left.axhline(1.0, color="lightgray")
    left.set_ylabel("tokens per second over FSDP2's (o bmtrain, _ compute alone, x DeepSpeed)")
    left.tick_params(axis="x", rotation=45)
    right.plot(list(map(int, found["weak"])), list(found["weak"].values()), "o-")
    right.set_xlabel("GPUs")
    right.set_ylabel("tokens per second and GPU")
    right.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    folder = Path(sys.argv[1])
    found = read(folder)
    (folder / "multi.json").write_text(json.dumps(found, indent=1))
    draw(found, folder / "multi.png")
    print("\n".join(lines(found)))
    print(f"written to {folder / 'multi.json'}, drawn in {folder / 'multi.png'}")


if __name__ == "__main__":
    main()
