"""Results of the benchmark as text and as a picture."""

import sys
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

from model import FLOPS_FORMULA, SIZES, count_parameters, flops_per_token

# Dense bf16 TFLOP/s, from the makers' data sheets; the first name that occurs in the device's name counts.
PEAK_TFLOPS = {"GH200": 989.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "B200": 2250.0, "A100": 312.0}

RECOMPUTE = {"full": "every block recomputed", "none": "nothing recomputed", "best": "every engine at its best"}


@dataclass(frozen=True)
class Workload:
    size: str
    batch: int
    recompute: str
    compiled: bool

    @staticmethod
    def parse(text: str) -> "Workload":
        size, batch, recompute, *rest = [*text.split(":"), "", ""]
        flags = [flag for flag in rest if flag]
        known = size in SIZES and batch.isdigit() and recompute in RECOMPUTE and flags in ([], ["compile"])
        if not known:
            sys.exit(
                f"{text!r} is not SIZE:BATCH:RECOMPUTE[:compile], with SIZE one of {', '.join(SIZES)}, "
                f"RECOMPUTE one of {', '.join(RECOMPUTE)}"
            )
        return Workload(size, int(batch), recompute, bool(flags))

    def describe(self, options: Namespace) -> str:
        millions = count_parameters(SIZES[self.size]) / 1e6
        return (
            f"{self.size} ({millions:,.0f} M parameters), {options.ranks} ranks, "
            f"{self.batch} x {options.sequence} tokens per rank, "
            f"{RECOMPUTE[self.recompute]}{', compiled blocks' if self.compiled else ''}"
        )


@dataclass
class Result:
    """Of one engine: times in ms per step, tokens per second and GPU, memory in GiB."""

    engine: str
    failure: str | None = None
    device: str = ""
    milliseconds: float = 0.0
    fastest: float = 0.0
    slowest: float = 0.0
    tokens: float = 0.0
    active: float = 0.0
    reserved: float = 0.0
    used: float = 0.0
    losses: list[float] = field(default_factory=list)
    profile: list[str] = field(default_factory=list)


def print_table(workload: Workload, results: list[Result], options: Namespace) -> None:
    by_name = {result.engine: result for result in results if not result.failure}
    device = next((result.device for result in by_name.values()), "")
    peak = options.peak or next((peak for name, peak in PEAK_TFLOPS.items() if name in device), None)
    flops = flops_per_token(SIZES[workload.size], options.sequence)
    print(
        f"{'engine':20}{'ms/step':>9}{'min':>9}{'max':>9}{'tok/s/GPU':>11}{'/ fsdp2':>9}{'/ floor':>9}{'MFU':>7}"
        f"{'active':>8}{'reserved':>9}{'device':>8}{'loss':>15}"
    )
    for result in results:
        if result.failure:
            print(f"{result.engine:20}{result.failure}")
            continue
        ratios = "".join(f"{ratio(result, by_name.get(other)):>9}" for other in ("fsdp2", "floor"))
        mfu = f"{result.tokens * flops / (peak * 1e12):.1%}" if peak else "-"
        memory = "".join(
            f"{f'{value:.1f}' if value else '-':>{width}}"
            for value, width in ((result.active, 8), (result.reserved, 9), (result.used, 8))
        )
        print(
            f"{result.engine:20}{result.milliseconds:9.1f}{result.fastest:9.1f}{result.slowest:9.1f}"
            f"{result.tokens:11,.0f}{ratios}{mfu:>7}{memory}{result.losses[0]:8.3f}{result.losses[-1]:7.3f}"
        )
    if peak:
        print(f"MFU = tokens/s/GPU x FLOPs per token / {peak:.0f} TFLOP/s")
        print(f"FLOPs per token = {FLOPS_FORMULA} = {flops:.3e}")
        print("Memory in GiB of rank 0, highest: torch's active and reserved, and all that is in use on the device.")
    for result in results:
        for line in result.profile:
            print(f"{result.engine}: {line}")


def compare(results: list[Result], tolerance: float) -> None:
    """Let those fail whose losses are not FSDP2's, or where it did not run, the next one's: all begin with the same."""
    trained = [result for result in results if result.losses and result.engine != "floor"]
    trained.sort(key=lambda result: not result.engine.startswith("fsdp2"))
    for result, right in ((result, trained[0]) for result in trained[1:]):
        error = max(abs(a - b) / abs(b) for a, b in zip(result.losses, right.losses, strict=True))
        if not error <= tolerance:
            result.failure = f"failed: its losses differ from those of {right.engine} by {error:.1e}"


def ratio(result: Result, other: Result | None) -> str:
    return f"{result.tokens / other.tokens:.3f}" if other else "-"


def draw(everything: dict[str, list[Result]], path: Path) -> None:
    """One group of bars a workload: tokens per second and GPU of every engine."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(everything), figsize=(3.2 * len(everything) + 1, 4), squeeze=False)
    for axis, (text, results) in zip(axes[0], everything.items(), strict=True):
        done = [result for result in results if not result.failure]
        colours = {"floor": "lightgray", "bmtrain": "tab:blue"}
        bars = axis.bar(
            [result.engine for result in done], [result.tokens for result in done],
            color=[colours.get(result.engine, "tab:orange") for result in done],
        )
        axis.bar_label(bars, fmt="{:,.0f}", fontsize=8)
        axis.set_title(text, fontsize=10)
        axis.tick_params(axis="x", rotation=45)
    axes[0][0].set_ylabel("tokens per second and GPU")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
