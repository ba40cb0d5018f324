"""Stands in for wandb: prints what is logged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

run = SimpleNamespace(name="", save=lambda: None, define_metric=lambda *args, **kwargs: None)
config: dict[str, Any] = {}


def init(*args: Any, **kwargs: Any) -> SimpleNamespace:
    return run


def log(values: dict[str, Any], step: int | None = None) -> None:
    print("logged", step, values)


def watch(*args: Any, **kwargs: Any) -> None: ...


def finish() -> None: ...
