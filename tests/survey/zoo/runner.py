"""Verifies families and keeps the verdicts."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rewriter.verify.processes import preload
from rewriter.verify.report import as_json
from rewriter.verify.run import Settings, verify
from tests.survey.zoo import diffusion, hub, hub_media, sequences, text, vision
from tests.survey.zoo.packages import PACKAGES
from tests.survey.zoo.prepare import HOME, PYTHON, converted, source

MODULES = (hub, hub_media, text, vision, sequences, diffusion)
SHARED = (
    "torch._dynamo", "torch.fx", "torch.nn.attention.flex_attention", "torch.distributed.tensor", "numpy", "einops",
    "yaml", "tokenizers", "safetensors.torch", "huggingface_hub", "requests", "regex", "tqdm",
    "tests.survey.zoo.common",
)  # fmt: skip
"""What many of the packages import: loaded once."""
RESULTS = HOME / "results"


def families() -> dict[str, str]:
    """``package__family`` -> ``module:factory``."""
    return {
        name: f"{module.__name__}:{name}"
        for module in MODULES
        for name, value in vars(module).items()
        if inspect.isfunction(value) and "__" in name and value.__module__ == module.__name__
    }


def run(names: list[str], again: bool) -> int:
    """Exit code 0 when every family is the same model."""
    if Path(sys.prefix).resolve() != (HOME / "venv").resolve():  # the packages are there
        return subprocess.run([str(PYTHON), "-m", "tests.survey.zoo", "run", *names, *["--again"] * again]).returncode
    RESULTS.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    preload([name for name in SHARED if importlib.util.find_spec(name.partition(".")[0]) is not None])
    wrong = 0
    for name in names:
        file = RESULTS / f"{name}.json"
        start = time.monotonic()
        if again or not file.exists():
            file.write_text(json.dumps(_verify(name), indent=1))
        found = json.loads(file.read_text())
        wrong += not found["held"]
        print(f"{name:40} {_verdict(found)}  {time.monotonic() - start:.0f} s", flush=True)
    print(f"{len(names) - wrong} of {len(names)} families are the same model after conversion")
    return int(wrong > 0)


def _verify(name: str) -> dict[str, Any]:
    package = PACKAGES[name.partition("__")[0]]
    others = {str(source(other)) for other in PACKAGES.values()}
    beside = [str(source(PACKAGES[other])) for other in package.beside]
    sys.path[:] = [entry for entry in sys.path if entry not in others] + beside
    settings = Settings(
        source(package), converted(package), families()[name], device="cpu", keep=RESULTS / name, timeout=600
    )
    return as_json(verify(settings))


def _verdict(found: dict[str, Any]) -> str:
    if found["held"]:
        return "same"
    for row in found["rows"]:
        where = f"{row['ranks']}, {row['phase']}"
        if row["error"]:
            return f"ERROR ({where}): {row['error'][:150]}"
    for row in found["rows"]:
        where = f"{row['ranks']}, {row['phase']}"
        if row["verdict"] == "differs":
            first = row["different"][0]
            where += f", {row['what']}"
            return f"DIFFERS ({where}): {first['path']} {first['why'] or first}"[:190]
        if row["verdict"] == "nothing to compare":
            return f"EMPTY ({row['ranks']}, {row['phase']}, {row['what']})"
    return found.get("crash", "?")[-150:]
