"""Steps whose time is known by hand, and steps that were measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from test_estimate import Net, all_held
from torch import nn

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.errors import ConfigurationError
from bmtrain.estimate import Job, estimate
from bmtrain.estimate import command as tool
from bmtrain.estimate.estimate import Model
from bmtrain.estimate.scaling import Measured, Prediction, Ranks, Unit, Work, completed, predict, usual

ROOT = Path(__file__).parents[3]
MB = 10**6
FOUR = Work((Unit(100 * MB, 100 * MB),) * 4, Unit(0, 0), updated=1000 * MB)
GIVEN: dict[str, Any] = {
    "optimizer_gb_s": 1000.0, "recomputed": False, "compute_ms": 120.0, "contention": 0.0, "host_gather_gb_s": 100.0,
    "host_reduce_gb_s": 50.0, "network_gb_s": 10.0, "host_latency_us": 0.0, "network_latency_us": 0.0,
}  # fmt: skip


def step(gpus: int, shard_size: int, work: Work = FOUR, host: int = 8, **figures: Any) -> Prediction:
    return predict(work, Measured(**{**GIVEN, **figures}), Ranks(gpus, shard_size, host))


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"compute_ms": 0}, "above 0"), ({"compute_ms": float("nan")}, "above 0"), ({"compute_ms": True}, "above 0"),
        ({"compute_ms": "120"}, "above 0"), ({"optimizer_gb_s": None}, "above 0"), ({"host_latency_us": -1}, "from 0"),
        ({"network_gb_s": float("inf")}, "above 0"), ({"host_gather_gb_s": 342e9}, "in GB/s"),
        ({"contention": 1.1}, "from 0 to 1"), ({"backwards": 0}, "above 0"), ({"backwards": 1.5}, "number of back"),
        ({"recomputed": 1}, "true or false"), ({"step_ms": {8: -1.0}}, "step_ms of 8"),
        ({"step_ms": {0: 1.0}}, "by number of GPUs"), ({"step_ms": {2: 200.0}}, "give one of the two"),
        ({"step_ms": {1: 130.0}}, "give one of the two"),
    ],
)  # fmt: skip
def test_figures_that_nothing_has(figures: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Measured(**{**GIVEN, **figures})


@pytest.mark.parametrize(
    ("gpus", "missing"),
    [
        (1, "compute_ms"), (2, "contention"), (2, "host_gather_gb_s"), (2, "host_reduce_gb_s"), (2, "host_latency_us"),
        (16, "network_gb_s"), (16, "network_latency_us"),
    ],
)  # fmt: skip
def test_figures_that_are_missing(gpus: int, missing: str) -> None:
    for shard_size in {gpus, min(gpus, 8)}:
        with pytest.raises(ConfigurationError, match=f"{missing} is missing"):
            step(gpus, shard_size, **{missing: None})


def test_a_figure_is_asked_for_only_where_it_counts() -> None:
    wires = [name for name in GIVEN if name.startswith(("host", "network", "contention"))]
    assert step(1, 1, **dict.fromkeys(wires)).ms == 121
    step(8, 8, network_gb_s=None, network_latency_us=None)
    step(4, 4, host=1, host_latency_us=None)


@pytest.mark.parametrize(
    ("gpus", "shard", "host"), [(12, 12, 8), (8, 3, 8), (16, 12, 8), (24, 16, 8), (4, 8, 8), (0, 1, 8), (12, 4, 6)]
)
def test_ranks_that_cannot_be(gpus: int, shard: int, host: int) -> None:
    with pytest.raises(ConfigurationError):
        Ranks(gpus, shard, host)


@pytest.mark.parametrize(
    ("blocks", "rest", "updated"),
    [((Unit(0, 0),), Unit(1, 1), 1), ((Unit(1, -1),), Unit(0, 0), 1), ((), Unit(-1, 0), 1), ((), Unit(0, 0), -1)],
)
def test_work_that_cannot_be(blocks: tuple[Unit, ...], rest: Unit, updated: int) -> None:
    with pytest.raises(ConfigurationError):
        Work(blocks, rest, updated)


def test_figures_that_contradict_each_other() -> None:
    steps = {**GIVEN, "compute_ms": None, "contention": None}
    with pytest.raises(ConfigurationError, match="compute_ms is missing"):
        completed({8: FOUR}, Measured(**{**steps, "step_ms": {8: 120.0}}))
    with pytest.raises(ConfigurationError, match="one of the two figures is wrong"):
        completed({1: FOUR}, Measured(**{**steps, "step_ms": {1: 0.5}}))
    for ms, message in ((120.0, "A figure is wrong"), (200.0, "The host is the limit")):
        with pytest.raises(ConfigurationError, match=message):
            completed({1: FOUR, 2: FOUR}, Measured(**{**steps, "step_ms": {1: 121.0, 2: ms}}))


def test_one_gpu_moves_nothing() -> None:
    alone = step(1, 1)
    assert (alone.ms, alone.compute_ms, alone.optimizer_ms) == (121, 120, 1)
    assert alone.communication_ms == alone.exposed_ms == 0


def test_compute_hides_all_but_the_ends() -> None:
    # Two ranks: a block is gathered in 0.5 ms and reduced in 1; forwards take 10 ms a block, backwards 20.
    found = step(2, 2)
    assert found.exposed_ms == pytest.approx(0.5 + 1)
    assert found.communication_ms == pytest.approx(6 * 0.5 + 4 * 1)
    assert found.ms == pytest.approx(120 + 0.5 + 1.5)
    beside = 5 * 0.5 + 3 * 1
    assert step(2, 2, contention=0.25).exposed_ms == pytest.approx(1.5 + 0.25 * beside)
    assert step(2, 2, contention=1.0).exposed_ms == pytest.approx(found.communication_ms)


def test_wires_decide() -> None:
    # Over 100 times slower wires a gather takes 50 ms, a reduction 100. Beside forwards of 10 ms: 50, 50, 50 and
    # nothing; beside backwards of 20: nothing, twice both, a reduction.
    found = step(2, 2, host_gather_gb_s=1.0, host_reduce_gb_s=0.5)
    assert found.ms == pytest.approx(50 + (3 * 50 + 10) + (20 + 2 * 150 + 100) + 100 + 0.5)


def test_recomputation_gives_backwards_more_to_hide_behind() -> None:
    # A gather takes 12 ms: longer than a forward of 10, or of 7.5, and shorter than a backward.
    work = Work((Unit(2400 * MB, 0),) * 4, Unit(0, 0), 0)
    assert step(2, 2, work).ms == pytest.approx(12 + 3 * 12 + 10 + 80)
    assert step(2, 2, work, recomputed=True).ms == pytest.approx(12 + 3 * 12 + 7.5 + 90)


def test_a_model_without_blocks_hides_nothing() -> None:
    found = step(2, 2, Work((), Unit(100 * MB, 100 * MB), 0))
    assert found.ms == pytest.approx(120 + 0.5 + 1) and found.communication_ms == found.exposed_ms


def test_every_backward_moves_what_one_does() -> None:
    once, twice = step(2, 2), step(2, 2, backwards=2)
    assert twice.communication_ms == pytest.approx(2 * once.communication_ms)
    assert twice.exposed_ms == pytest.approx(2 * once.exposed_ms) and twice.optimizer_ms == once.optimizer_ms


def test_rings_take_a_step_for_every_rank_but_one() -> None:
    empty = Work((Unit(0, 0), Unit(8, 0)), Unit(0, 0), 0)  # one gather, with nothing before it
    wires = {"host_latency_us": 1000.0, "network_latency_us": 5000.0}
    assert step(8, 8, empty, **wires).communication_ms == pytest.approx(7, abs=1e-3)
    assert step(16, 16, empty, **wires).communication_ms == pytest.approx(13 + 2 * 5, abs=1e-3)
    assert step(4, 4, empty, host=1, **wires).communication_ms == pytest.approx(3 * 5, abs=1e-3)
    assert step(4, 1, empty, host=1, **wires).communication_ms == 0
    reduced = Work((), Unit(0, 8), 0)  # over a host, then there and back between four of them
    assert step(32, 8, reduced, **wires).communication_ms == pytest.approx(7 + 2 * 3 * 5, abs=1e-3)


def test_replicas_share_the_wires_of_a_host() -> None:
    # 80 MB are reduced inside of a host of 8, 7/8 at 50 GB/s; then each has 10 MB to sum over 4 hosts, twice 3/4, and
    # the 8 of them share 10 GB/s.
    reduced = Work((), Unit(0, 80 * MB), 0)
    assert step(32, 8, reduced).communication_ms == pytest.approx(70 / 50 + 8 * 1.5 * 10 / 10)
    # Over two hosts, and two of those groups: 15/16 at 10 GB/s, and 8 times 5 MB, twice 1/2.
    assert step(32, 16, reduced).communication_ms == pytest.approx(75 / 10 + 8 * 5 / 10)
    # Two groups of 4 inside of one host: 3/4, and 20 MB each, all at 50 GB/s.
    assert step(8, 4, reduced).communication_ms == pytest.approx(60 / 50 + 20 / 50)


def test_replicas_win_over_slow_wires_and_lose_over_fast_ones() -> None:
    # Whole copies on each host move two thirds of the bytes between hosts, and leave a host the optimizer of all.
    work = Work((Unit(100 * MB, 100 * MB),) * 4, Unit(0, 0), updated=16_000 * MB)
    ahead = [step(64, 8, work, network_gb_s=speed).ms - step(64, 64, work, network_gb_s=speed).ms for speed in (1, 100)]
    assert ahead[0] < 0 < ahead[1]
    assert step(64, 8, work).optimizer_ms == 8 * step(64, 64, work).optimizer_ms == 2


def test_contention_is_what_makes_the_measured_step() -> None:
    steps = {**GIVEN, "compute_ms": None, "contention": None, "step_ms": {1: 121.0, 2: 123.5}}
    found = completed({1: FOUR, 2: FOUR}, Measured(**steps))
    assert found.compute_ms == pytest.approx(120) and found.contention == pytest.approx(1.5 / 5.5)
    assert predict(FOUR, found, Ranks(2, 2, 8)).ms == pytest.approx(123.5)


def test_usual_ranks() -> None:
    found = [(ranks.gpus, ranks.shard_size) for ranks in usual([1, 4, 8, 64], 8)]
    assert found == [(1, 1), (4, 4), (8, 8), (64, 8), (64, 64)]
    assert [ranks.shard_size for ranks in usual([4], 1)] == [4]


@pytest.fixture
def one_rank() -> Iterator[None]:
    bmt.init_distributed(device="cpu")
    yield
    bmt.shutdown()


def test_what_a_step_moves(one_rank: None) -> None:
    model = Model(lambda: Net(4), torch.bfloat16)
    block = 64 + 64 + (4 * 64 * 64 + 4 * 64) + (4 * 64 * 64 + 64)
    rest, frozen = 2 * 256 * 64, 64 * 64 + 64
    two = model.work(Job(2))
    assert len(two.blocks) == 4
    # Layouts align what is small.
    for unit, moved in ((two.blocks[0], (2 * block, 2 * block)), (two.rest, (2 * (rest + frozen), 2 * rest))):
        assert (unit.gathered, unit.reduced) == pytest.approx(moved, rel=0.02)
    # Values of 2 bytes, what makes masters of them, two moments of 4: read and written; a gradient is read.
    for job, bytes_each in (
        (Job(2), 2 * (2 + 2 + 8) + 2), (Job(2, accumulates=True), 2 * (2 + 2 + 8) + 4), (Job(1), 2 * (2 + 4 + 8) + 2)
    ):  # fmt: skip
        assert model.work(job).updated == pytest.approx((4 * block + rest) * bytes_each, rel=0.02)
    wide = Model(lambda: Net(4)).work(Job(2, autocast=torch.bfloat16))  # of a block the two matrices are cast
    assert 2 * block < wide.blocks[0].gathered < 4 * block


def test_replicas_hold_what_one_group_does(one_rank: None) -> None:
    init = {"schedule": "stress", "shard_size": 2}
    held = estimate(Net, Job(2, 2, 16)).held
    for (real,) in run_ranks(4, all_held, [("float32", False)], init=init):
        assert real == [held.parameters, held.gradients, held.states, held.whole, held.whole_gradients]


def without_stem(layers: int) -> Net:
    """Nothing before its blocks has values that the backward reads, as an embedding has none."""
    net = Net(layers)
    net.frozen = nn.Identity()
    return net


def moved_in_a_step(layers: int, backwards: int) -> tuple[int, int]:
    """Bytes gathered and reduced by the third step, which knows what comes next."""
    model: Any = bmt.BMTrainModelWrapper(without_stem(layers).bfloat16())
    optimizer = bmt.optim.AdamOptimizer(model.parameters())
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(optimizer)
    tokens = torch.randint(256, (2, 16))
    moved = {"all_gather": 0, "reduce_scatter": 0}
    collectives = context().collectives

    def counted(on: Any, name: str, whole_at: int) -> Any:
        plain = getattr(on, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            moved[name] += args[whole_at].nbytes
            return plain(*args, **kwargs)

        return mock.patch.object(on, name, run)

    for _ in range(3):
        moved.update(all_gather=0, reduce_scatter=0)
        with counted(collectives.gather, "all_gather", 1), counted(collectives.reduce, "reduce_scatter", 0):
            manager.zero_grad()
            for _ in range(backwards):
                manager.backward(model(tokens, tokens))
            manager.step()
    return moved["all_gather"], moved["reduce_scatter"]


@pytest.mark.parametrize("backwards", [1, 2])
def test_a_step_moves_what_is_predicted(backwards: int, one_rank: None) -> None:
    work = Model(lambda: without_stem(5), torch.bfloat16).work(Job(2))
    # Each block in the forward, and all but the last two in the backward.
    gathered = work.rest.gathered + 8 * work.blocks[0].gathered
    reduced = work.rest.reduced + 5 * work.blocks[0].reduced
    assert run_ranks(2, moved_in_a_step, 5, backwards) == [(backwards * gathered, backwards * reduced)] * 2


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], one_rank: None) -> None:
    path = tmp_path / "measured.json"
    asked = ["test_estimate:Net(layers=4)", "--batch", "2", "--length", "64", "--scale", "1,2,16"]
    assert tool.main(asked) == 2 and "--measured FILE.json" in capsys.readouterr().err
    measured = ["--measured", str(path)]
    assert tool.main([*asked[:1], *measured]) == 2 and "go together" in capsys.readouterr().err
    asked += measured
    good = {name: value for name, value in GIVEN.items() if name != "contention"}
    for text, message in {
        "": "cannot be read", "[]": "is no object", '{"compute": 3}': "names compute", "{}": "says nothing of opti",
        json.dumps({**good, "step_ms": [449]}): "by number of GPUs", json.dumps({**good, "compute_ms": -1}): "above 0",
        json.dumps({**good, "network_gb_s": None}): "network_gb_s is missing",
        json.dumps({**good, "step_ms": {"16": 200}}): "of several hosts of 8",
    }.items():  # fmt: skip
        path.write_text(text)
        assert tool.main(asked) == 2
        assert message in capsys.readouterr().err
    path.write_text(json.dumps(good))
    for more, message in {
        ("--host-gpus", "5"): "whole hosts of 5", ("--accumulate",): "says backwards=1", ("--gpus", "8"): "--gpus out",
    }.items():  # fmt: skip
        assert tool.main([*asked, *more]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main([*asked, "--scale", "8,0"])
    assert tool.main([*asked, "--card", "80"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2 + 4 + 1 and "with 0 these steps are the shortest" in out
    assert tool.main([*asked, "--card", "1"]) == 1
    assert capsys.readouterr().out.count("does not fit") == 4
    slow = {"host_gather_gb_s": 0.01, "host_reduce_gb_s": 0.01}
    path.write_text(json.dumps({**good, "compute_ms": None, "step_ms": {"1": 121, "2": 171}, **slow}))
    assert tool.main([*asked, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["ranks"]["shard_size"] for row in rows] == [1, 2, 8, 16]
    assert rows[1]["ms"] == pytest.approx(171) and rows[1]["tokens_s"] == pytest.approx(128 / 0.171)
    path.write_text(json.dumps({**good, "compute_ms": None, "step_ms": {"1": 121, "2": 171, "4": 201}, **slow}))
    assert tool.main(asked) == 0
    assert "the step on 2 GPUs took 171 ms; predicted: 1" in capsys.readouterr().err
    assert rows[1]["total"] > rows[2]["total"] > rows[3]["total"]


def test_the_command_says_where_memory_is_not_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_rank: None
) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(GIVEN))
    assert tool.main(["test_estimate:Asks", "--scale", "1,2", "--measured", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out.count("?") == 2 and "the forward needs values" in err


def model_of(name: str) -> Any:
    import gpt
    import model as workload

    return gpt.GPT(*gpt.SIZES[name[4:]], 1024) if name.startswith("gpt-") else workload.Decoder(workload.SIZES[name])


# Model, GPUs, blocks recomputed, compute alone (of GPT a step on one GPU), what was measured.
ROWS = [
    ("7b", 2, True, 391, 432), ("7b", 2, True, 208, 247), ("7b", 2, False, 299, 337), ("7b", 2, False, 579, 623),
    ("13b", 2, True, 1470, 1553), ("1.3b", 2, True, 184, 193), ("1.3b", 2, False, 145, 155),
    ("tiny", 2, False, 8.6, 16.2), ("7b", 4, True, 405, 440), ("7b", 4, True, 211, 247), ("7b", 4, False, 298, 335),
    ("13b", 4, True, 1464, 1541), ("1.3b", 4, True, 185, 195), ("gpt-350m", 2, False, 56.9, 58.2),
    ("gpt-1.5b", 2, False, 123.1, 118.4),
]  # fmt: skip


def test_beside_steps_that_were_measured(monkeypatch: pytest.MonkeyPatch, one_rank: None) -> None:
    for folder in ("benchmark", "benchmark/gpt"):
        monkeypatch.syspath_prepend(ROOT / "examples" / folder)
    measured, docs = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("benchmarks", "scaling"))
    models: dict[str, Model] = {}

    def work(name: str, gpus: int) -> Work:
        gpt = name.startswith("gpt-")
        if name not in models:
            models[name] = Model(lambda: model_of(name), None if gpt else torch.bfloat16)
        return models[name].work(Job(gpus, autocast=torch.bfloat16 if gpt else None))

    # One row gives two figures: half of what it has beside its compute is the optimizer, and contention is the rest.
    first = work("7b", 2)
    assert "| 7B, 2, recomputed | 406 | 449 |" in measured and "About half of what separates" in measured
    figures: dict[str, Any] = {
        "optimizer_gb_s": first.updated / 2 / (449 - 406) * 2 / 1e6, "host_latency_us": 5.0,
        "host_gather_gb_s": 342.0, "host_reduce_gb_s": 212.0,
    }  # fmt: skip
    fitted = completed({2: first}, Measured(**figures, recomputed=True, compute_ms=406.0, step_ms={2: 449.0}))
    assert f"optimizer_gb_s {figures['optimizer_gb_s']:.0f}, contention {fitted.contention:.3f}" in docs
    for name, gpus, recomputed, before, after in ROWS:
        given = {"step_ms": {1: before}} if name.startswith("gpt-") else {"compute_ms": before}
        known = Measured(**figures, **given, recomputed=recomputed, contention=fitted.contention)
        known = completed({1: work(name, 1)}, known)
        found = predict(work(name, gpus), known, Ranks(gpus, gpus, 8))
        off = 100 * (found.ms / after - 1)
        assert name == "tiny" or abs(off) < 5
        line = (
            f"| {before} | {found.ms:.1f} | {after} | {off:+.1f} % | {found.ms - before:+.1f}, {after - before:+.1f} |"
        )
        assert line in docs, line
