"""Fixtures of the rewriter's tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def fork_server() -> None:
    """Whatever forks first chooses what is loaded for all that follow: comparisons are not to leave ranks without."""
    from tests.runtime.ranks import start_fork_server

    start_fork_server()
