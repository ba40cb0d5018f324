"""Compare the losses of the unconverted script with those of the converted one, and draw both.

    python compare.py plain.jsonl converted.jsonl --picture losses.png

Exits with 1 if the losses differ by more than the tolerance, if a resumed run did not repeat the steps it had already
taken, or if nothing was learned.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent / "plain_gpt"))
from train import load_text, unigram_entropy

TOLERANCE = 1e-5  # relative: ranks add up their gradients in another order, so the last bits may differ
LEARNED = 0.7  # the last losses must be below this part of the unigram entropy


def read_losses(path):
    """The loss of every step, in order; and the largest relative difference between steps that were run twice."""
    losses, repeated, largest = {}, 0, 0.0
    with open(path) as lines:
        for line in lines:
            entry = json.loads(line)
            if entry["step"] in losses:
                repeated += 1
                largest = max(largest, difference(entry["loss"], losses[entry["step"]]))
            losses[entry["step"]] = entry["loss"]
    if sorted(losses) != list(range(len(losses))):
        sys.exit(f"{path}: steps are missing")
    return [losses[step] for step in range(len(losses))], repeated, largest


def difference(a, b):
    return abs(a - b) / abs(b)


def draw(plain, converted, differences, entropy, path):
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=[3, 1])
    top.plot(plain, color="tab:orange", linewidth=4, alpha=0.6, label="unconverted, one process")
    top.plot(converted, color="tab:blue", linewidth=1, label="converted, two ranks, interrupted and resumed")
    top.axhline(entropy, color="gray", linestyle=":", label="unigram entropy")
    top.set_ylabel("loss (nats per byte)")
    top.legend()
    bottom.semilogy([max(d, 1e-9) for d in differences], color="black", linewidth=0.8)
    bottom.axhline(TOLERANCE, color="tab:red", linestyle=":", label="tolerance")
    bottom.set_ylabel("relative difference")
    bottom.set_xlabel("step")
    bottom.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain")
    parser.add_argument("converted")
    parser.add_argument("--picture", required=True)
    options = parser.parse_args()

    plain, _, _ = read_losses(options.plain)
    converted, repeated, largest_repeated = read_losses(options.converted)
    if len(plain) != len(converted):
        sys.exit(f"{len(plain)} steps in {options.plain}, {len(converted)} in {options.converted}")
    differences = [difference(c, p) for c, p in zip(converted, plain, strict=True)]
    last = sum(converted[-20:]) / len(converted[-20:])
    entropy = unigram_entropy(load_text()[0])
    draw(plain, converted, differences, entropy, options.picture)

    checks = {
        f"{len(plain)} steps, largest relative difference between converted and unconverted losses "
        f"{max(differences):.1e}, tolerance {TOLERANCE:.0e}": max(differences) <= TOLERANCE,
        f"{repeated} steps run again after resuming, largest relative difference {largest_repeated:.1e}, "
        f"tolerance {TOLERANCE:.0e}": repeated > 0 and largest_repeated <= TOLERANCE,
        f"mean of the last 20 losses {last:.3f}, unigram entropy {entropy:.3f}, "
        f"wanted below {LEARNED} of it": last < LEARNED * entropy,
    }
    for text, held in checks.items():
        print("ok    " if held else "FAILED", text)
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
