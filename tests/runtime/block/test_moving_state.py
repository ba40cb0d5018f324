"""Recomputed blocks whose forward changes something of their own: the second run starts where the first did."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import Tensor, nn

import bmtrain as bmt

WIDTH = 6


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)


class SpectralBuffers(Base):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.utils.parametrizations.spectral_norm(self.lin)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.lin(x))


class SpectralHook(SpectralBuffers):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.lin = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))


class Counter(Base):
    """A number in Python, and one in a buffer, decide what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        self.calls += 1
        x = x + torch.tanh(self.lin(x)) * self.n
        return x * torch.sigmoid(self.calls * x) if self.n % 2 else x


class Codebook(Base):
    """Moves by averages, written past autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(4, WIDTH))
        self.register_buffer("counts", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        nearest = torch.cdist(y.detach(), self.codes).argmin(1)
        chosen = F.one_hot(nearest, 4).to(y.dtype)
        self.counts.data.mul_(0.5).add_(chosen.sum(0), alpha=0.5)
        self.codes.data.copy_(torch.lerp(self.codes, chosen.t() @ y.detach() / self.counts[:, None], 0.5))
        return y + torch.tanh(self.codes[nearest] * y)


class ActNorm(Base):
    """Initialised by the first batch it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("done", torch.zeros(()))
        self.register_buffer("shift", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            self.shift.copy_(x.detach().mean(0))
            self.done.fill_(1)
            return torch.tanh(self.lin(x - self.shift)) * x.exp()
        return torch.tanh(self.lin(x - self.shift))


class Lazy(Base):
    """Builds what it needs in its first forward."""

    table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "table"):
            self.table = torch.linspace(0, 1, WIDTH)
            x = x.exp()
        return torch.tanh(self.lin(x) * self.table)


class Memory(Base):
    """Goes on from what it has seen, held in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.seen is None else x * torch.sigmoid(self.seen)
        self.seen = y.detach()
        return y + torch.tanh(self.lin(y))


class Late(Base):
    """Its buffer moves from the sixth run on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        if self.steps > 5:
            self.mean.lerp_(x.detach().mean(0), 0.5)
        return torch.tanh(self.lin(x)) * torch.cos(x - self.mean)


class History(Base):
    """A list that grows decides what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.past: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.past.append(len(x))
        return torch.tanh(self.lin(x) * len(self.past)) * x


class Cache(Base):
    """What a dict holds decides what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        known = self.cache.setdefault("rows", 0)
        self.cache["rows"] = known + len(x)
        return torch.tanh(self.lin(x)) * x if known else torch.tanh(self.lin(x.exp()))


class Norm(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + torch.tanh(self.lin(x))).sigmoid()


KINDS: list[Callable[[], Base]] = [
    SpectralBuffers, SpectralHook, Counter, Codebook, ActNorm, Lazy, Memory, Late, History, Cache, Norm,
]  # fmt: skip


def stack(kind: Callable[[], Base]) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(kind(), kind())


@on_ranks(1, 2)
def test_second_runs_start_where_the_first_did() -> None:
    for kind in KINDS:
        plain = stack(kind)
        model = bmt.BMTrainModelWrapper(nn.Sequential(*(bmt.Block(m, use_checkpoint=True) for m in stack(kind))))
        manager = bmt.optim.OptimManager()
        manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
        for step in range(8):
            x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(step))
            sgd.zero_grad()
            manager.zero_grad()
            expected, found = plain(x).square().mean(), model(x).square().mean()
            oracle.assert_close(found, expected, f"{kind} {step}")
            expected.backward()
            manager.backward(found)
            oracle.assert_same_grads(model, plain)
            sgd.step()
            manager.step()
            for (name, ours), (_, theirs) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
                oracle.assert_close(ours.double(), theirs.double(), f"{kind} {name}")
        oracle.assert_same_weights(model, plain)
        for name in ("n", "past", "cache"):
            assert vars(model[0]).get(name) == vars(plain[0]).get(name), name


@on_ranks(1, 2)
def test_hooks_of_a_recomputed_block_run_once() -> None:
    for observes in (True, False):
        plain = stack(Norm)
        model = bmt.BMTrainModelWrapper(nn.Sequential(*(bmt.Block(m, use_checkpoint=True) for m in stack(Norm))))
        called: dict[int, list[str]] = {0: [], 1: []}
        for key, m in enumerate((plain, model)):
            said = called[key]

            def before(_: Any, args: Any, said: list[str] = said, observes: bool = observes) -> Any:
                said.append("before")
                return None if observes else (args[0].exp() * 2,)

            def after(_: Any, args: Any, out: Tensor, said: list[str] = said, observes: bool = observes) -> Any:
                said.append("after")
                return None if observes else out.sin()

            m[0].register_forward_pre_hook(before)
            m[1].register_forward_hook(after)
            m[1].register_full_backward_hook(lambda *_, said=said: said.append("backward"))
            m[1].register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs), with_kwargs=True)
        for _ in range(2):
            x = torch.randn(5, WIDTH)
            plain(x).square().mean().backward()
            bmt.optim.OptimManager().backward(model(x).square().mean())
            oracle.assert_same_grads(model, plain)
        assert called[0] == called[1], called
        copied = copy.deepcopy(model)
        assert "forward" not in vars(copied[0])


class LateSwitch(nn.Module):
    """Begins to bind another number when its inputs grow."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.scale, self.seen, self.kind = 1.0, None, "small"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.tanh(self.lin(x) * self.scale) * (0.5 if self.seen else 1.0) * len(self.kind)
        if x.detach().abs().max() > 1:
            self.scale, self.seen, self.kind = self.scale + 1.0, (x.shape[0],), "large!"  # type: ignore[assignment]
        return out


@on_ranks(1, 2)
def test_attributes_that_begin_late() -> None:
    made = []
    for block in (lambda m: bmt.Block(m, use_checkpoint=True), lambda m: m):
        torch.manual_seed(0)
        made.append(nn.Sequential(block(LateSwitch())))
    model, plain = bmt.BMTrainModelWrapper(made[0]), made[1]
    for step in range(8):
        x = torch.full((2, 3), 0.1 if step < 5 else 1.1)
        for one in (model, plain):
            one.zero_grad()
            one(x).square().sum().backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(bmt.gather_grad(ours), theirs.grad, msg=lambda m, step=step: f"step {step}: {m}")
        assert (model[0].scale, model[0].seen, model[0].kind) == (plain[0].scale, plain[0].seen, plain[0].kind)


class KeepsWhatItMade(nn.Module):
    """As attention's weights for a picture, or keys for the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.kept = nn.Linear(WIDTH, WIDTH), None
        self.register_buffer("last", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = self.lin(x).softmax(-1)
        if not self.training:
            self.last = self.kept.mean(0)
        return self.kept @ torch.eye(WIDTH)  # type: ignore[no-any-return]


@on_ranks(1, 2)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_what_an_evaluation_has_left_in_a_block(mode: Any) -> None:
    torch.manual_seed(1)
    plain = nn.Sequential(KeepsWhatItMade(), KeepsWhatItMade())
    model = bmt.BMTrainModelWrapper(nn.Sequential(*(bmt.Block(m) for m in copy.deepcopy(plain))))
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(4):
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(step))
        for net in (plain, model):
            net.eval()
            with mode():
                net(x)
            net.train()
        sgd.zero_grad()
        manager.zero_grad()
        plain(x).square().mean().backward()
        manager.backward(model(x).square().mean())
        sgd.step()
        manager.step()
    oracle.assert_same_weights(model, plain, limit=1e-5)


class Frozen(OrderedDict[str, int]):
    """As configurations of packages: it refuses to be changed."""

    def update(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        raise TypeError("frozen")

    def pop(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("frozen")

    __delitem__ = pop


class Result(Frozen):
    """As outputs of packages: fields may be set, and none goes."""


class Configured(Base):
    """Has a configuration, and keeps what it gave last."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.last = Frozen(width=WIDTH), Result(calls=0)

    def forward(self, x: Tensor) -> Tensor:
        self.last["calls"] += 1
        return torch.tanh(self.lin(x) * self.last["calls"]) * self.config["width"]


@on_ranks(1, 2)
def test_attributes_that_refuse_to_be_changed() -> None:
    plain = stack(Configured)
    model = bmt.BMTrainModelWrapper(nn.Sequential(*(bmt.Block(m, use_checkpoint=True) for m in stack(Configured))))
    for step in range(6):
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(step))
        plain.zero_grad()
        model.zero_grad()
        plain(x).square().mean().backward()
        bmt.optim.OptimManager().backward(model(x).square().mean())
        oracle.assert_same_grads(model, plain)
        assert model[0].last == plain[0].last == {"calls": step + 1}


class Store:
    """What one layer has put there."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None

    def put(self, x: Tensor) -> Tensor:
        self.rows = x if self.rows is None else torch.cat([self.rows, x])
        return self.rows


class InTables:
    """As a cache of keys and values: stores in a list, and what is there already in a dict."""

    def __init__(self) -> None:
        self.layers, self.is_there = [Store(), Store()], dict[int, bool]()

    def put(self, x: Tensor, number: int) -> Tensor:
        self.is_there[number] = True
        return self.layers[number].put(x)


class Around:
    """A cache in another one."""

    def __init__(self) -> None:
        self.inner = InTables()

    def put(self, x: Tensor, number: int) -> Tensor:
        return self.inner.put(x, number)


class Inplace(InTables):
    """Written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = torch.zeros(WIDTH)

    def put(self, x: Tensor, number: int) -> Tensor:
        self.sum += x.detach().mean(0)
        return x * self.sum.clone()


class Untouched:
    """Only read."""

    factor = 2.0

    def __init__(self) -> None:
        self.shift = 0.5

    def put(self, x: Tensor, number: int) -> Tensor:
        return x * self.factor + self.shift


class Filling(Base):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        rows = cache.put(self.lin(x), self.number)
        return torch.tanh(rows[-len(x) :] * rows.mean()) + x


class Filled(nn.Module):
    def __init__(self, block: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList([block(Filling(number)) for number in range(2)])

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, cache)
        return x


@on_ranks(1, 2)
def test_what_a_block_puts_into_an_object_it_is_given_is_not_put_twice() -> None:
    for kind in (InTables, Around, Inplace, Untouched, Store):
        plain, model = Filled(lambda m: m), bmt.BMTrainModelWrapper(Filled(lambda m: bmt.Block(m, use_checkpoint=True)))
        for step in range(6):
            x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(step))
            plain.zero_grad()
            model.zero_grad()
            caches: list[Any] = [kind(), kind()]
            if kind is Store:
                caches = [_OneForAll(), _OneForAll()]
            plain(x, caches[0]).square().mean().backward()
            bmt.optim.OptimManager().backward(model(x, caches[1]).square().mean())
            oracle.assert_same_grads(model, plain)


class _OneForAll(Store):
    def put(self, x: Tensor, number: int = 0) -> Tensor:
        return super().put(x)
