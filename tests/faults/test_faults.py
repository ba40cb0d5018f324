"""A rank that dies, differs or stalls is named on all ranks within seconds.  The whole table: bash tests/faults.sh."""

from __future__ import annotations

import pytest

from .attacks import FAST, attacks
from .judge import judge

BY_NAME = {attack.name: attack for attack in attacks()}


@pytest.mark.parametrize("name", FAST)
def test_attack(name: str) -> None:
    found = judge(BY_NAME[name], forked=True)
    assert not found.problems, f"{found.verdict}\n{found.output}"
