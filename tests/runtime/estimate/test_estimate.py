"""The estimate beside what is there when the same model trains, and beside what was measured on GPUs."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn import functional as F

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.errors import ConfigurationError
from bmtrain.estimate import Job, estimate
from bmtrain.estimate import command as tool
from bmtrain.estimate.live import LiveBytes, as_on_gpu
from bmtrain.precision import as_precision

ROOT = Path(__file__).parents[3]


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, layers: int = 3, width: int = 64) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(256, width), nn.Linear(width, 256, bias=False)
        self.layers = nn.ModuleList([Layer(width) for _ in range(layers)])
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.register_buffer("scale", torch.ones(width))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.embed(tokens)) * self.scale
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())


class Asks(Net):
    """Its constructor and its forward read values."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        self.tied = nn.Linear(64, 256, bias=False)
        self.tied.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens, targets) * tokens.sum().item()


class Doubts(Net):
    """Its forward asks about values."""

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if tokens.ge(0).all() and not (tokens > 0).any():
            tokens = torch.cat([tokens, tokens])
        return super().forward(tokens, targets)


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    bmt.init_distributed(device="cpu")
    yield
    bmt.shutdown()


def test_what_cannot_be_estimated(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bmt"])
    wrong = {
        "nothing": "write MODULE:FACTORY", "no.such.module:Net": "No module named", "test_estimate:Nets": "'Nets'",
        "test_estimate:Net(": "does not work", "test_estimate:Layer": "missing 1 required",
        "json:dumps(1)": "made a str",
        "test_estimate:nn.LazyLinear(3)": "has no shape yet", "test_estimate:Net(layers='3')": "does not work",
    }  # fmt: skip
    for model, message in wrong.items():
        assert tool.main([model]) == 2, model
        assert message in capsys.readouterr().err
    for shape, message in {
        "tokens": "write NAME=BxT:long", "words=BxT": "forward takes tokens, targets", "tokens=B,T": "write sizes",
        "tokens=BxT:quad": "kinds are long",
    }.items():  # fmt: skip
        assert tool.main(["test_estimate:Net", "--input", shape]) == 2
        assert message in capsys.readouterr().err
    for option in (["--gpus", "0"], ["--batch", "x"], ["--dtype", "fp64"]):
        with pytest.raises(SystemExit):
            tool.main(["test_estimate:Net", *option])
    assert context().building == 0


def test_a_forward_that_reads_values(capsys: pytest.CaptureFixture[str]) -> None:
    found = estimate(Asks, Job(gpus=2))
    assert found.problem and found.kept is None
    assert found.parameters == sum(p.numel() for p in Net().parameters())  # the tied one counts once
    assert tool.main(["test_estimate:Asks", "--card", "80"]) == 2
    out, err = capsys.readouterr()
    assert "activations, at their most" not in err and "the forward needs values" in err and "?" in out


def test_a_forward_that_tests_values(capsys: pytest.CaptureFixture[str]) -> None:
    plain, tests = (estimate(made, Job(2, 2, 16)) for made in (Net, Doubts))
    assert (plain.tests, tests.tests) == (0, 2) and plain.kept == tests.kept
    assert tool.main(["test_estimate:Doubts"]) == 0
    assert "taken for true, as of a mask that hides nothing: 2" in capsys.readouterr().out


def forget_others() -> None:
    """Let buffers of models before this one go."""
    gc.collect()
    bmt.synchronize()


def held_in_training(dtype: str, accumulates: bool) -> list[int]:
    """Bytes of shards, gradients, states and buffers on this rank, after two steps."""
    forget_others()
    model: Any = Net().to(getattr(torch, dtype))
    model = bmt.BMTrainModelWrapper(model)
    optimizer = bmt.optim.AdamOptimizer(model.parameters())
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(optimizer)
    tokens = torch.randint(256, (2, 16))
    flats: dict[int, Any] = {}
    for _ in range(2):
        manager.zero_grad()
        for _ in range(1 + accumulates):
            manager.backward(model(tokens, tokens))
        manager.step()
    for parameter in model.parameters():
        flats[id(parameter._flat)] = parameter._flat
    every = list(flats.values())
    gradients = [
        kept.nbytes for flat in every for kept in (flat.gradient._came, flat.gradient._sum) if kept is not None
    ]
    states = sum(
        kept.nbytes
        for state in optimizer._states.values()
        for kept in (state.exp_avg, state.exp_avg_sq, state.master)
        if kept is not None
    ) + sum(flat.remainder.nbytes for flat in every if flat.remainder is not None)
    pools = every[0].unit.pools
    whole, whole_gradients = pool_bytes(pools.params) + pool_bytes(pools.casts), pool_bytes(pools.grads)
    return [sum(flat.shard.nbytes for flat in every), sum(gradients), states, whole, whole_gradients]


def pool_bytes(pool: Any) -> int:
    return sum(key[0] * key[1].itemsize * count for key, count in pool._made.items())


def all_held(cases: list[tuple[str, bool]]) -> list[list[int]]:
    return [held_in_training(*case) for case in cases]


@pytest.mark.parametrize(
    ("precision", "cases"),
    [(None, [("float32", False), ("bfloat16", True), ("float16", False)]), ("bf16", [("float32", False)])],
)
def test_what_is_held_is_exact(precision: str | None, cases: list[tuple[str, bool]]) -> None:
    init = {"schedule": "stress", "precision": precision}  # under which a CPU keeps buffers as a GPU does
    for ranks in run_ranks(2, all_held, cases, init=init):
        for (dtype, accumulates), real in zip(cases, ranks, strict=True):
            job = Job(2, 2, 16, getattr(torch, dtype), as_precision(precision), accumulates=accumulates)
            found = estimate(Net, job).held
            assert real == [found.parameters, found.gradients, found.states, found.whole, found.whole_gradients]


def saved_bytes(model: nn.Module, *inputs: torch.Tensor) -> int:
    """Of all memory that autograd keeps for the backward of a real forward, parameters and buffers left out."""
    sizes: dict[int, torch.UntypedStorage] = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *inputs)}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*inputs)
    assert loss.requires_grad
    return sum(-(-storage.nbytes() // 512) * 512 for storage in sizes.values())


def counted_bytes(model: nn.Module, *inputs: torch.Tensor) -> int:
    model, inputs = model.to("meta"), tuple(given.to("meta") for given in inputs)
    with as_on_gpu([]), LiveBytes([*model.parameters(), *model.buffers(), *inputs]) as counted:
        loss = model(*inputs)
        now = counted.now
    return now - -(-loss.nbytes // 512) * 512


@pytest.mark.parametrize("layers", [1, 4])
def test_activations_are_what_autograd_saves(layers: int) -> None:
    tokens = torch.randint(256, (4, 32))
    real, counted = (of(Net(layers), tokens, tokens) for of in (saved_bytes, counted_bytes))
    assert real == counted > 4 * 32 * 64 * 4 * layers


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.RMSNorm(64), nn.Linear(64, 192, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).view(2, 512, 3, 4, 16).permute(2, 0, 3, 1, 4)
        y: torch.Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)
        return F.dropout(y.transpose(1, 2).reshape(2, 512, 64), 0.1)


def test_kernels_of_a_gpu() -> None:
    x = torch.zeros(2, 512, 64, requires_grad=True)
    size, rows = 2 * 512 * 64 * 4, 2 * 512 * 4
    # x itself is an input; the norm's result and rows, q, k, v, the attention's output and rows, a mask of bytes, and
    # what comes out.
    assert counted_bytes(Attends(), x) == size + rows + 3 * size + size + 4 * rows + size // 4


def test_recomputed_blocks_keep_their_input() -> None:
    (few, many) = (estimate(lambda layers=n: Net(layers, 256), Job(2, 8, 64)) for n in (4, 12))
    assert few.recomputed and few.kept and many.recomputed and many.kept
    assert many.recomputed - few.recomputed == 8 * (8 * 64 * 256 * 4)
    assert many.kept - few.kept == 8 * (8 * 64 * (1 + 1 + 4 + 4) * 256 * 4 + 2 * 8 * 64 * 4)
    assert estimate(lambda: nn.Sequential(nn.Linear(8, 8)), Job(2, inputs={"input": "Bx8"})).blocks == 0


def test_blocks_that_were_told() -> None:
    def told(use_checkpoint: bool) -> nn.Module:
        net = Net()
        for layer in net.layers:
            bmt.Block(layer, use_checkpoint=use_checkpoint)
        return net

    free, always, never = (estimate(make, Job(2, 8, 64)) for make in (Net, lambda: told(True), lambda: told(False)))
    assert free.recomputed == always.recomputed == always.kept
    assert free.kept == never.recomputed == never.kept
    assert always.held == free.held and always.blocks == 3


def test_one_rank_holds_whole_gradients() -> None:
    one, two = (estimate(Net, Job(gpus, 2, 16)) for gpus in (1, 2))
    assert one.held.gradients == one.held.whole == one.held.whole_gradients == 0
    assert one.recomputed is not None and two.recomputed is not None
    assert one.recomputed - two.recomputed > 0.5 * one.held.parameters


@pytest.mark.parametrize(
    ("size", "batch", "gib", "kept"),
    [
        ("1.3b", 4, 15.7, 30.5),
        pytest.param("7b", 2, 51.0, None, marks=pytest.mark.long),
        pytest.param("7b", 1, 49.6, None, marks=pytest.mark.long),
        pytest.param("13b", 4, 97.0, None, marks=pytest.mark.long),
    ],
)
def test_beside_what_two_gpus_had_in_use(
    monkeypatch: pytest.MonkeyPatch, size: str, batch: int, gib: float, kept: float | None
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmark")
    import model as workload

    table = (ROOT / "docs" / "benchmarks.md").read_text()
    found = estimate(lambda: workload.Decoder(workload.SIZES[size]), Job(2, batch, 2048, torch.bfloat16))
    for keep, measured in ((False, gib), (True, kept)):
        if measured is not None:
            assert abs((found.total(keep) / 2**30 + tool._OVERHEAD) / measured - 1) < 0.01
            assert f"| {measured} |" in table


@pytest.mark.parametrize(
    ("size", "batch", "gib"), [("350m", 8, 15.3), pytest.param("1.5b", 4, 32.9, marks=pytest.mark.long)]
)
def test_autocast_beside_the_peak_on_one_gpu(
    monkeypatch: pytest.MonkeyPatch, size: str, batch: int, gib: float
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmark" / "gpt")
    import gpt

    found = estimate(lambda: gpt.GPT(*gpt.SIZES[size], 1024), Job(1, batch, 1024, autocast=torch.bfloat16))
    assert abs(found.total(keep=True) / 2**30 / gib - 1) < 0.05
    assert f"| {gib} |" in (ROOT / "docs" / "benchmarks.md").read_text()


def autocast_gathers() -> int:
    """Bytes of what is made for whole parameters, after a step under autocast."""
    forget_others()
    model = bmt.BMTrainModelWrapper(Net())
    tokens = torch.randint(256, (2, 16))
    with torch.autocast(context().device.torch_device.type, torch.bfloat16):
        loss = model(tokens, tokens)
    loss.backward()
    pools = model.embed.weight._flat.unit.pools
    return pool_bytes(pools.params) + pool_bytes(pools.casts)


def test_autocast_gathers_what_it_would_cast() -> None:
    found = estimate(Net, Job(2, 2, 16, autocast=torch.bfloat16)).held
    assert run_ranks(2, autocast_gathers, init={"schedule": "stress"}, fresh=True) == [found.whole] * 2
    assert found.whole < estimate(Net, Job(2, 2, 16)).held.whole


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["test_estimate:Net(layers=4)", "--gpus", "8", "--batch", "2", "--length", "64"]
    assert tool.main([*asked, "--card", "2.3"]) == 0
    out = capsys.readouterr().out
    assert "in 5 units (4 blocks); 8 ranks" in out and "2 x 64 on each" in out and "loss: the output" in out
    assert " 64 GPUs" in out and "recomputed fits, kept fits" in out and "largest batch" in out
    assert tool.main([*asked, "--card", "2"]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert tool.main([*asked, "--precision", "bf16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["held"]["whole"] > 0 and told["total"] > told["overhead"] and told["problem"] == ""
    for text in ("Not checked", "within 1 %"):
        assert text in tool.parser().format_help()


def test_wrong_factories_leave_no_trace() -> None:
    for wrong in (lambda: 3, lambda: nn.LazyLinear(3)):
        with pytest.raises(ConfigurationError):
            estimate(wrong, Job())
    assert context().building == 0
