"""Mixed precision as a policy, against a plain model whose modules are called with their weights cast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks, run_ranks
from torch import nn
from torch.utils._pytree import tree_map

import bmtrain as bmt
from bmtrain.errors import ConfigurationError

WIDTH = oracle.WIDTH
STEPS = 3


class Layer(nn.Module):
    """Norm, matrices, a bare parameter, a buffer that stays fp32, keyword arguments and a dict of results."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH, bias=False)
        self.gain = nn.Parameter(torch.full((WIDTH,), 0.7))
        self.register_buffer("offset", torch.linspace(-1, 1, WIDTH) / 3)
        self.seen: set[torch.dtype] = set()

    def forward(self, x: torch.Tensor, *, bias: torch.Tensor, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        assert self.offset.dtype == torch.float32 and rows.dtype == torch.int64
        self.seen |= {x.dtype, bias.dtype, *(p.dtype for p in self.parameters())}
        y = self.gain * self.down(F.gelu(self.up(self.norm(x)))) + bias
        return {"y": x + y + self.offset[None][rows * 0]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.layers = nn.ModuleList([Layer() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(x), device=x.device)
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x, bias=x[:1], rows=rows)["y"]
        return self.head(x.to(self.head.weight.dtype))


class Cast(nn.Module):
    """The oracle: ``inner`` called with its parameters and inputs cast, and its result."""

    def __init__(self, inner: nn.Module, policy: bmt.Precision) -> None:
        super().__init__()
        self.inner, self.policy = inner, policy

    def own(self) -> Iterator[tuple[str, nn.Parameter]]:
        nested = [id(p) for m in self.inner.modules() if isinstance(m, Cast) for p in m.parameters()]
        return ((n, p) for n, p in self.inner.named_parameters() if id(p) not in nested)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        policy = self.policy
        cast = {n: p if policy.param is None else p.to(policy.param) for n, p in self.own()}
        if policy.cast_inputs:
            args, kwargs = to((args, kwargs), policy.param)
        return to(torch.func.functional_call(self.inner, cast, args, kwargs), policy.output)


def to(tree: Any, dtype: torch.dtype | None) -> Any:
    return tree_map(lambda t: t if dtype is None or not t.is_floating_point() else t.to(dtype), tree)


def build(device: str) -> Net:
    torch.manual_seed(7)
    return Net().to(device)


def make_plain(policies: list[bmt.Precision], root: bmt.Precision, device: str) -> Cast:
    plain = build(device)
    inside = [replace(p, output=None) if p == root else p for p in policies]  # of init_distributed, the root's alone
    plain.layers = nn.ModuleList([Cast(layer, p) for layer, p in zip(plain.layers, inside, strict=True)])
    return Cast(plain, root)


def make_sharded(policies: list[bmt.Precision], root: bmt.Precision, recompute: bool, device: str) -> Any:
    """``root`` is the policy of ``init_distributed``."""
    model = build(device)
    for layer, policy in zip(model.layers, policies, strict=True):
        bmt.Block(layer, use_checkpoint=recompute, precision=None if policy == root else policy)
    return bmt.BMTrainModelWrapper(model)


def share_of(x: torch.Tensor, rank: int) -> torch.Tensor:
    return x.chunk(bmt.world_size())[rank]


def train(policies: list[bmt.Precision], root: bmt.Precision, recompute: bool, device: str) -> None:
    plain, model = make_plain(policies, root, device), make_sharded(policies, root, recompute, device)
    assert list(model.state_dict()) == list(build("cpu").state_dict())
    theirs, ours = torch.optim.SGD(plain.parameters(), lr=0.05), torch.optim.SGD(model.parameters(), lr=0.05)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(ours)
    for step in range(STEPS):
        x = oracle.inputs(step).to(device)
        losses = [oracle.mean(plain(share_of(x, rank))) for rank in range(bmt.world_size())]
        sum_gradients(plain, losses, policies, root)
        loss = oracle.mean(model(share_of(x, bmt.rank())))
        assert step or torch.equal(loss, losses[bmt.rank()]), "the first forward is the same to the bit"
        manager.backward(loss)
        compare(model, plain)
        manager.step()
        theirs.step()
        manager.zero_grad()
        theirs.zero_grad()
    # A rank's checkpoint is the masters', in their own dtype and under their own names.
    for (name, value), p in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert value.dtype == torch.float32
        oracle.assert_close(value, p.cpu(), name, 1e-2)


def sum_gradients(plain: Cast, losses: list[torch.Tensor], policies: list[bmt.Precision], root: bmt.Precision) -> None:
    """Every rank's gradient rounded to what travels, summed in fp32, the sum rounded once, and their mean."""
    ranks = []
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
        ranks.append([p.grad for p in plain.parameters()])
        plain.zero_grad()
    for (name, p), *grads in zip(plain.named_parameters(), *ranks, strict=True):
        policy = next((q for i, q in enumerate(policies) if f"layers.{i}." in name), root)
        travels = policy.reduce or policy.param or torch.float32
        total = sum(g.to(travels).float() for g in grads if g is not None).to(travels).float()  # type: ignore[union-attr]
        p.grad = total / bmt.world_size()


def compare(model: Any, plain: Cast) -> None:
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.dtype == torch.float32
        found = bmt.gather_grad(p)
        assert found is not None and found.dtype == torch.float32 and q.grad is not None
        oracle.assert_close(found, q.grad, name, 1e-5)


BF16, FP32 = bmt.Precision("bf16"), bmt.Precision("fp32")
EXACT = bmt.Precision("bf16", reduce="fp32", output="fp32")
POLICIES: dict[str, tuple[bmt.Precision, list[bmt.Precision]]] = {
    "bf16": (BF16, [BF16] * 3),
    "bf16, reduced in fp32": (EXACT, [EXACT] * 3),
    "one block in fp32": (BF16, [BF16, FP32, BF16]),
    "one block in bf16": (bmt.Precision(), [bmt.Precision(), EXACT, bmt.Precision()]),
    "fp32, reduced in bf16": (bmt.Precision(reduce="bf16"), [bmt.Precision(reduce="bf16")] * 3),
}


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.long)])
def test_training_is_that_of_cast_weights(world_size: int, name: str, recompute: bool) -> None:
    root, policies = POLICIES[name]
    run_ranks(world_size, train, policies, root, recompute, "cpu", init={"precision": root, "device": "cpu"})


@pytest.mark.gpu
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_training_on_gpus_is_that_of_cast_weights(world_size: int, name: str) -> None:
    root, policies = POLICIES[name]
    for recompute in (True, False):
        run_ranks(world_size, train, policies, root, recompute, "cuda", init={"precision": root, "device": "cuda"})


@on_ranks(1, 2, init={"precision": "bf16"})
def test_a_block_may_have_its_own_policy() -> None:
    model = build("cpu")
    model.layers[1] = bmt.CheckpointBlock(model.layers[1], precision=torch.float32)
    model.layers = bmt.TransformerBlockList(model.layers, precision=bmt.Precision("fp16", output="fp32"))
    bmt.BMTrainModelWrapper(model)
    results: list[torch.dtype] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, out: results.append(out["y"].dtype))
    out = model(oracle.inputs(0))
    assert [layer.seen for layer in model.layers] == [{torch.float16}, {torch.float32}, {torch.float16}]
    # The offset is fp32, and so is what it is added to; a forward hook sees the result before it is cast.
    assert results == [torch.float32] * 3 and out.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):  # the policy decides, not autocast
        model(oracle.inputs(0))
    assert [layer.seen for layer in model.layers] == [{torch.float16}, {torch.float32}, {torch.float16}]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    exact = build("cpu").state_dict()
    with bmt.gathered(model):  # whole values on request are the masters
        for name, p in model.named_parameters():
            assert torch.equal(p, exact[name]), name
    assert all(torch.equal(value, exact[name]) for name, value in model.state_dict().items())


@on_ranks(1, 2)
def test_a_policy_may_come_later() -> None:
    """A policy for a block that is sharded already, and back."""
    model = bmt.BMTrainModelWrapper(build("cpu"))
    before = model.state_dict()
    x = oracle.inputs(0)
    for policy, dtype in ((None, torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for layer in model.layers:
            bmt.Block(layer, precision=policy)
            layer.seen.clear()
        model(x).sum().backward()
        assert all(layer.seen == {dtype} for layer in model.layers), policy
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@on_ranks(1, 2, init={"precision": bmt.Precision("bf16", output="fp32")})
def test_the_models_output_dtype_is_not_its_blocks() -> None:
    model = bmt.BMTrainModelWrapper(build("cpu"))
    seen: list[torch.dtype] = []
    for layer in model.layers:
        bmt.Block(layer)
        layer.down.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    x = oracle.inputs(0)
    assert model(x).dtype == torch.float32 and set(seen) == {torch.bfloat16}
    linear = nn.Sequential(bmt.Block(nn.Linear(WIDTH, WIDTH)), nn.Linear(WIDTH, 2))
    assert bmt.BMTrainModelWrapper(linear)(x).dtype == torch.float32, "the plain layer gets what its weight is"


@on_ranks(1)
def test_inputs_may_be_left_alone() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
            assert angles.dtype == torch.float32
            return self.linear((x * angles.cos()).to(self.linear.weight.dtype))

    policy = bmt.Precision(torch.bfloat16, output=torch.float32, cast_inputs=False)
    block = bmt.Block(Mixer(), precision=policy)
    assert block(oracle.inputs(0), torch.linspace(0, 1, WIDTH)).dtype == torch.float32


def float16_with_a_loss_scale() -> list[float]:
    """Small gradients that vanish in fp16 survive under a loss scale."""
    losses = []
    for scale in (None, 2.0**14):
        model = bmt.BMTrainModelWrapper(build("cpu"))
        manager = bmt.optim.OptimManager(loss_scale=scale)
        manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=5e6))
        for _ in range(4):
            loss = model(oracle.inputs(0)).float().square().mean()
            manager.zero_grad()
            manager.backward(loss * 1e-9)
            manager.step()
        losses.append(float(loss.detach()))
    return losses


def test_float16_with_a_loss_scale() -> None:
    for without, scaled in run_ranks(2, float16_with_a_loss_scale, init={"precision": "fp16"}):
        assert scaled < 0.9 * without


def init_with(precision: Any) -> str:
    with pytest.raises(ConfigurationError) as error:
        bmt.init_distributed(precision=precision)
    return str(error.value)


@pytest.mark.parametrize("given", ["int8", torch.int8, torch.float64, 16])
def test_other_dtypes_are_refused(given: Any) -> None:
    for field in ("param", "reduce", "output"):
        with pytest.raises(ConfigurationError, match=f"The {field} dtype .*'bf16'"):
            bmt.Precision(**{field: given})
    assert repr(given) in run_ranks(1, init_with, given, initialize=False)[0]
