"""Both sides of a comparison are forks."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def forks(fork_server: None) -> None:
    """From the same server as ranks."""
