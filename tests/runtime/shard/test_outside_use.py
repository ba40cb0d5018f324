"""Parameters used outside of their module's forward: any operation, with gradients; initialisation after sharding."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.errors import CommunicationError, RankDivergenceError, ShardedAccessError


class Net(nn.Module):
    """A plain model that the tests wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6, padding_idx=2)
        self.conv = nn.Conv1d(6, 6, 1)
        self.lin = nn.Linear(6, 9)
        self.attention = nn.MultiheadAttention(6, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.frozen = nn.Parameter(torch.randn(4, 6), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.emb.weight) * self.scale + self.lin(x).mean()


def make() -> tuple[Any, Any]:
    torch.manual_seed(3)
    plain = Net()
    torch.manual_seed(3)
    return plain, bmt.BMTrainModelWrapper(Net())


USES: dict[str, Callable[[Any], torch.Tensor]] = {
    "T": lambda m: m.emb.weight.T,
    "mT": lambda m: m.emb.weight.mT,
    "expand": lambda m: m.token.expand(5, -1, -1),
    "expand_cat": lambda m: torch.cat([m.token.expand(2, -1, -1), torch.ones(2, 3, 6)], dim=1),
    "clone": lambda m: m.lin.weight.clone(),
    "times": lambda m: m.lin.weight * 2,
    "reflected": lambda m: 1 - m.lin.weight,
    "sum": lambda m: m.lin.weight.sum(),
    "norm": lambda m: m.lin.weight.norm(),
    "linalg_norm": lambda m: torch.linalg.norm(m.lin.weight),
    "mean": lambda m: m.lin.weight.mean(0),
    "max": lambda m: m.lin.weight.max(),
    "stack": lambda m: torch.stack([m.lin.bias, m.lin.bias * 2]),
    "cat": lambda m: torch.cat([m.emb.weight, m.frozen, m.emb.weight]),
    "slice": lambda m: m.emb.weight[:3],
    "row": lambda m: m.emb.weight[2],
    "fancy": lambda m: m.emb.weight[torch.tensor([0, 0, 5])],
    "mask": lambda m: m.emb.weight[torch.arange(11) % 2 == 0],
    "normalize": lambda m: F.normalize(m.emb.weight),
    "iterate": lambda m: torch.stack([row * i for i, row in enumerate(m.lin.weight)]),
    "split": lambda m: torch.cat([part.tanh() for part in m.attention.in_proj_weight.chunk(3)], dim=1),
    "to": lambda m: m.lin.weight.to(torch.float64),
    "double": lambda m: m.lin.weight.double(),
    "type": lambda m: m.lin.weight.type(torch.float64),
    "cpu": lambda m: m.lin.weight.cpu() * 1,
    "view": lambda m: m.lin.weight.view(-1)[5:9],
    "reshape": lambda m: m.lin.weight.reshape(3, 18),
    "permute": lambda m: m.token.permute(2, 0, 1),
    "matmul": lambda m: m.lin.weight @ m.emb.weight.T,
    "einsum": lambda m: torch.einsum("ij,kj->ik", m.lin.weight, m.emb.weight),
    "two_models": lambda m: m.lin.weight.sum() * m.scale,
    "scale_exp": lambda m: m.scale.exp() * torch.ones(3),
    "where": lambda m: torch.where(m.lin.weight > 0, m.lin.weight, 0.0),
    "vector": lambda m: nn.utils.parameters_to_vector(m.parameters()),
    "gather": lambda m: m.lin.weight.gather() if hasattr(m.lin.weight, "_flat") else m.lin.weight.clone(),
    "linear": lambda m: F.linear(torch.ones(2, 6), m.lin.weight, m.lin.bias),
    "svd": lambda m: torch.linalg.svdvals(m.lin.weight),
    "penalty": lambda m: sum(p.pow(2).sum() for p in m.parameters()),
    "abs": lambda m: sum(p.abs().sum() for p in m.parameters()),
    "norms": lambda m: torch.stack([p.norm() for p in m.parameters()]).norm(),
    "power": lambda m: m.lin.weight**2,
    "half_in_place": lambda m: m.lin.weight.clone().mul_(3),
    "broadcast": lambda m: m.token + m.emb.weight,
    "method": lambda m: m.attention(torch.ones(2, 1, 6), torch.ones(2, 1, 6), torch.ones(2, 1, 6))[0],
    "submodule": lambda m: m.lin(torch.ones(2, 6)),
    "conv": lambda m: m.conv(torch.ones(2, 6, 3)),
}


@on_ranks(1, 3, long=(2,))
def test_any_operation_and_its_gradient() -> None:
    plain, model = make()
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for name, use in USES.items():
        expected, found = use(plain), use(model)
        oracle.assert_close(found.double(), expected.double(), name)
        assert found.stride() == expected.stride() or expected._is_view(), name
        with torch.no_grad():
            oracle.assert_close(use(model).double(), use(plain).double(), name)
        plain.zero_grad()
        manager.zero_grad()
        expected.double().tanh().sum().backward()
        manager.backward(found.double().tanh().sum())
        oracle.assert_same_grads(model, plain)
    plain.zero_grad()
    manager.zero_grad()
    x = torch.randn(6, 6)
    for m, back in ((plain, lambda loss: loss.backward()), (model, manager.backward)):
        back(m(x).square().mean() + 0.1 * USES["penalty"](m) + USES["normalize"](m).sum())
    oracle.assert_same_grads(model, plain)


def mutate(name: str) -> Callable[[Any], object]:
    return {
        "normal_": lambda m: nn.init.normal_(m.lin.weight, 0.0, 0.02),
        "uniform_": lambda m: nn.init.uniform_(m.lin.weight),
        "xavier_uniform_": lambda m: nn.init.xavier_uniform_(m.lin.weight),
        "xavier_normal_": lambda m: nn.init.xavier_normal_(m.lin.weight),
        "kaiming_uniform_": lambda m: nn.init.kaiming_uniform_(m.conv.weight, a=math.sqrt(5)),
        "kaiming_normal_": lambda m: nn.init.kaiming_normal_(m.conv.weight),
        "orthogonal_": lambda m: nn.init.orthogonal_(m.lin.weight),
        "trunc_normal_": lambda m: nn.init.trunc_normal_(m.lin.weight, std=0.02),
        "sparse_": lambda m: nn.init.sparse_(m.lin.weight, 0.5),
        "eye_": lambda m: nn.init.eye_(m.lin.weight),
        "dirac_": lambda m: nn.init.dirac_(m.conv.weight),
        "constant_": lambda m: nn.init.constant_(m.lin.bias, 0.25),
        "ones_": lambda m: nn.init.ones_(m.lin.bias),
        "zeros_": lambda m: nn.init.zeros_(m.lin.bias),
        "method_normal_": lambda m: m.lin.weight.normal_(),
        "method_uniform_": lambda m: m.emb.weight.uniform_(-1, 1).mul_(3),
        "bernoulli_": lambda m: m.lin.weight.bernoulli_(0.3),
        "exponential_": lambda m: m.lin.weight.exponential_(),
        "setitem": lambda m: m.emb.weight.__setitem__(3, 0.5),
        "setitem_mask": lambda m: m.emb.weight.__setitem__(m.emb.weight > 0, 0.5),
        "row_zero_": lambda m: m.emb.weight[m.emb.padding_idx].zero_(),
        "row_normal_": lambda m: m.emb.weight[4:6].normal_(),
        "view_of_view": lambda m: m.emb.weight[4:6].t()[1].fill_(3.0),
        "view_as": lambda m: m.lin.weight.view_as(m.lin.weight).copy_(torch.ones(9, 6)),
        "chunks": lambda m: [part.normal_() for part in m.attention.in_proj_weight.chunk(3)],
        "augmented": lambda m: m.emb.weight[1].__iadd__(1),
        "erfinv_": lambda m: m.lin.weight.uniform_(-0.5, 0.5).erfinv_(),
        "masked_fill_": lambda m: m.lin.weight.masked_fill_(m.lin.weight > 0, 0.0),
        "index_fill_": lambda m: m.lin.weight.index_fill_(0, torch.tensor([1, 2]), 7.0),
        "transposed": lambda m: m.lin.weight.t().copy_(torch.arange(54.0).view(6, 9)),
        "division": lambda m: m.lin.weight.div_(m.lin.weight.norm()),
        "out": lambda m: torch.mul(m.lin.weight, 2, out=m.lin.weight),
        "foreach": lambda m: torch._foreach_mul_(list(m.parameters()), 0.5),
        "bias_of_another": lambda m: m.frozen.add_(m.token[0]),
        "another_parameter": lambda m: m.emb.weight.add_(m.token[0, 0]).sub_(m.frozen[0]),
        "copied": lambda m: m.frozen.copy_(m.emb.weight[:4]),
        "added": lambda m: m.lin.weight.add_(torch.randn(9, 6)),
        "reset_linear": lambda m: m.lin.reset_parameters(),
        "reset_embedding": lambda m: m.emb.reset_parameters(),
        "reset_conv": lambda m: m.conv.reset_parameters(),
        "reset_attention": lambda m: m.attention._reset_parameters(),
        "loop": lambda m: [nn.init.normal_(p) if p.dim() > 1 else nn.init.zeros_(p) for p in m.parameters()],
        "applied": lambda m: m.apply(lambda part: part.reset_parameters() if hasattr(part, "reset_parameters") else 0),
        "to_vector": lambda m: nn.utils.vector_to_parameters(torch.randn(USES["vector"](m).numel()), m.parameters()),
    }[name]


WRITES = [
    "normal_", "uniform_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "orthogonal_",
    "trunc_normal_", "sparse_", "eye_", "dirac_", "constant_", "ones_", "zeros_", "method_normal_", "method_uniform_",
    "bernoulli_", "exponential_", "setitem", "setitem_mask", "row_zero_", "row_normal_", "view_of_view", "view_as",
    "chunks", "augmented", "erfinv_", "masked_fill_", "index_fill_", "transposed", "division", "out", "foreach",
    "bias_of_another", "another_parameter", "copied", "added", "reset_linear", "reset_embedding", "reset_conv",
    "reset_attention", "loop", "applied", "to_vector",
]  # fmt: skip


@on_ranks(1, 2, 3)
def test_values_written_after_sharding_are_those_of_the_plain_model() -> None:
    plain, model = make()
    for name in WRITES:
        for m in (plain, model):
            torch.manual_seed(7)
            with torch.no_grad():
                mutate(name)(m)
            m.next = torch.rand(())
        assert torch.equal(plain.next, model.next), f"{name} draws as many numbers"
        ours = model.state_dict()
        for key, value in plain.state_dict().items():
            assert torch.equal(ours[key], value), f"{name}: {key}"
    oracle.assert_close(model(torch.ones(2, 6)), plain(torch.ones(2, 6)), "the forward")


def gather_all(model: Any) -> float:
    with bmt.gathered(model):
        return float(model.lin.weight.sum())


def in_no_grad(use: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return torch.no_grad()(use)


ALONE: dict[str, Callable[[Any], Any]] = {
    "norm": lambda m: m.lin.weight.norm(),
    "no_grad norm": in_no_grad(lambda m: m.lin.weight.norm()),
    "row": in_no_grad(lambda m: m.lin.weight[0]),
    "gather": lambda m: m.lin.weight.gather(),
    "gathered": gather_all,
    "scale": in_no_grad(lambda m: m.lin.weight.mul_(2)),
    "fill": in_no_grad(lambda m: m.lin.weight.normal_()),
    "row write": in_no_grad(lambda m: m.lin.weight.__setitem__(0, 0.0)),
    "copy": in_no_grad(lambda m: m.lin.weight.copy_(torch.ones(9, 6))),
    "state_dict": lambda m: m.state_dict(),
}


def alone(name: str, before: bool, where: str) -> str:
    """Rank 0 reads or writes what rank 1 does not; what each rank is told."""
    engine: Any = context().engine
    engine.schedule.trace._patience = timedelta(seconds=2)
    context().timeout = timedelta(seconds=2)
    _, model = make()
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    start = time.monotonic()
    try:
        if before:
            ALONE[name](model)
        for step in range(5):
            loss = model(torch.ones(2, 6)).square().mean()
            if before and step < 3:
                ALONE[name](model)
            if step == 3 and where == "before backward" and bmt.rank() == 0:
                ALONE[name](model)
            manager.backward(loss)
            manager.step()
            if step == 3 and where == "after step" and bmt.rank() == 0:
                ALONE[name](model)
    except (RankDivergenceError, CommunicationError) as error:
        assert time.monotonic() - start < 20
        return f"{type(error).__name__} {error}"
    return "no error"


@pytest.mark.parametrize(
    ("name", "before", "where"),
    [
        ("norm", False, "after step"),
        ("no_grad norm", True, "after step"),
        ("row", True, "before backward"),
        ("scale", True, "before backward"),
        ("fill", False, "after step"),
        ("state_dict", True, "after step"),
    ],
)
def test_what_one_rank_does_alone_is_an_error(name: str, before: bool, where: str) -> None:
    # A rank that waits for a GPU cannot raise: the watchdog says so and ends it, which tests/faults attacks.
    said = run_ranks(2, alone, name, before, where, timeout=40, fresh=True, init={"device": "cpu"})
    assert all("Rank" in text for text in said), said


@on_ranks(2)
def test_reads_by_python_say_what_to_do() -> None:
    _, model = make()
    for read in (model.scale.item, model.scale.tolist, lambda: float(model.scale), lambda: f"{model.scale:.3f}"):
        with pytest.raises(ShardedAccessError, match=r"gather\(\)"):
            read()
    assert "sharded" in f"{model.scale}{model.lin.weight}" and "nan" not in str(model.scale)
    with pytest.raises(RuntimeError, match="requires grad"):
        model.lin.weight.normal_()
    with pytest.raises(RuntimeError, match="requires grad"):
        model.lin.weight[0] = 1.0


@on_ranks(2)
def test_ranks_that_write_different_values_keep_rank_0s() -> None:
    _, model = make()
    torch.manual_seed(bmt.rank())
    with pytest.warns(UserWarning) if bmt.rank() == 0 else nullcontext(), torch.no_grad():
        nn.init.normal_(model.lin.weight)
    torch.manual_seed(0)
    assert torch.equal(model.lin.weight.gather(), nn.init.normal_(torch.empty(9, 6)))
    with pytest.warns(UserWarning) if bmt.rank() == 0 else nullcontext(), torch.no_grad():
        model.lin.weight[1:] = float(bmt.rank())
        model.lin.bias.copy_(torch.full((9,), float(bmt.rank())))
        model.emb.weight.add_(torch.full((11, 6), float(bmt.rank())))
    assert not model.lin.weight.gather()[1:].any() and not model.lin.bias.gather().any()
    whole = model.emb.weight.gather()
    assert torch.equal(bmt.distributed.broadcast(whole, 0), whole)


@on_ranks(1, 2)
def test_views_follow_the_parameter() -> None:
    plain, model = make()
    seen = []
    for m in (plain, model):
        with torch.no_grad():
            row, part = m.emb.weight[1], m.lin.weight[2:4].t()
            m.emb.weight[1] = 5.0
            m.lin.weight.mul_(2)
            row += 1
            seen.append([row + 0, part + 0, part.clone()])
    for ours, theirs in zip(*seen, strict=True):
        assert torch.equal(ours, theirs) and type(ours) is torch.Tensor
    oracle.assert_same_weights(model, plain, exact=True)


def with_made_of_values(name: str, layer: nn.Linear) -> None:
    """What a layer gets that is made of its weight's values."""
    if name == "parameter":
        layer.more = nn.Parameter(layer.weight.data[:2])
    elif name == "buffer":
        layer.register_buffer("more", layer.weight.detach())
    else:
        layer.more = nn.ParameterList([layer.weight.data, layer.bias.data])


@on_ranks(1, 2, init={"schedule": "stress"})
@pytest.mark.parametrize("name", ["parameter", "buffer", "list"])
def test_what_a_module_gets_in_gathered_keeps_its_values(name: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with_made_of_values(name, model[1])
    expected = {key: value.clone() for key, value in model.state_dict().items() if "more" in key}
    torch.manual_seed(0)
    model = bmt.BMTrainModelWrapper(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    with bmt.gathered(model):
        with_made_of_values(name, model[1])
    for _ in range(2):
        model(torch.ones(2, 3)).sum().backward()
    made = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for key, value in expected.items():
        assert torch.equal(made[key].detach().cpu(), value), key
