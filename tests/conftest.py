"""Tests marked ``long`` run with ``--long`` only: variants of what a shorter test of the same file shows already.

With ``--files`` every test file is named when its first test begins.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time
from collections.abc import Generator

import pytest

# More threads make nothing here faster, but wait for their next part by looking for it; before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Whoever is woken waits for who runs to stop by itself. Else a rank that sends is interrupted by the one that receives
# while it holds a lock of gloo's, and a thread of gloo's looks for that lock to be free until it runs again.
if hasattr(os, "SCHED_BATCH"):
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long, too")
    parser.addoption("--files", action="store_true", help="name each test file when its first test begins")


@pytest.hookimpl(trylast=True)  # when the reporter is there
def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for jobs in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if config.getoption("--files") and reporter is not None:
        config.pluginmanager.register(Files(reporter))


class Files:
    """Names files on the terminal. Where several processes test, this is the one that hears of all of them."""

    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self.reporter = reporter
        self.seen: set[str] = set()
        self.began = time.monotonic()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        file = nodeid.partition("::")[0]
        if file not in self.seen:
            self.seen.add(file)
            self.reporter.ensure_newline()
            self.reporter.write_line(f"{time.monotonic() - self.began:5.0f} s  {file}", flush=True)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The thousands of tests and what they import are no garbage: looking through them again and again takes long."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    kept = [item for item in items if not item.get_closest_marker("long")]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = kept
