"""Tables of bandwidth."""

from __future__ import annotations

import contextlib
import io

import pytest
from ranks import run_ranks

from bmtrain import benchmark


def bandwidth() -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        benchmark.all_gather(sizes=[1 << 10, 3 << 20])
        benchmark.reduce_scatter(sizes=[1 << 10])
        benchmark.send_recv(sizes=[1 << 10])
    return output.getvalue()


def test_benchmarks_print_a_table_on_rank_0() -> None:
    table, *others = run_ranks(3, bandwidth)
    assert others == ["", ""]
    lines = table.splitlines()
    assert [line for line in lines if "==" in line] != [] and len(lines) == 3 * 2 + 4
    size, milliseconds, rate, bus = lines[3].rsplit(maxsplit=3)
    assert size.strip() == "3 MB"
    assert float(rate) == pytest.approx((3 << 20) / (float(milliseconds) * 1e-3) / 1e9, rel=0.2, abs=1e-3)
    assert float(bus) == pytest.approx(float(rate) * 2 / 3, rel=0.05, abs=2e-3)
