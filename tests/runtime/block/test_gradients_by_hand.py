"""Losses on parameters, gradients taken by hand, torch.func: as in plain torch, at any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import WIDTH
from ranks import on_ranks, run_ranks
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

import bmtrain as bmt
from bmtrain.errors import ConfigurationError

Backward = Callable[[Tensor], object]
Idiom = Callable[[Any, Backward], object]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))  # type: ignore[no-any-return]


def make(recompute: bool | None) -> tuple[Any, Any]:
    """Plain and sharded; without blocks for None."""
    made = []
    for sharded in (False, True):
        torch.manual_seed(0)
        layers: list[nn.Module] = [Net() for _ in range(5)]
        if sharded and recompute is not None:
            layers = [bmt.Block(layer, use_checkpoint=recompute) for layer in layers]
        made.append(nn.Sequential(*layers))
    return made[0], bmt.BMTrainModelWrapper(made[1])


def inputs() -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(3))


def values(model: Any) -> dict[str, Tensor]:
    return {n: (p.gather() if isinstance(p, bmt.DistributedParameter) else p) for n, p in model.named_parameters()}


def loss(model: Any, x: Tensor | None = None) -> Tensor:
    return model(inputs() if x is None else x).square().mean()  # type: ignore[no-any-return]


def double_backward(model: Any, backward: Backward) -> None:
    first = loss(model)
    slopes = torch.autograd.grad(first, list(model.parameters()), create_graph=True)
    backward(first + sum(slope.square().sum() for slope in slopes))


def wasserstein(model: Any, backward: Backward) -> None:
    x = inputs().requires_grad_()
    judged = model(x)
    (slope,) = torch.autograd.grad(judged.sum(), x, create_graph=True)
    backward(judged.mean() + 10 * ((slope.norm(2, dim=1) - 1) ** 2).mean())


def meta_learning(model: Any, backward: Backward) -> None:
    slow = dict(model.named_parameters())
    first = functional_call(model, slow, (inputs(),)).square().mean()
    slopes = torch.autograd.grad(first, list(slow.values()), create_graph=True)
    fast = {name: p - 0.1 * slope for (name, p), slope in zip(slow.items(), slopes, strict=True)}
    backward(functional_call(model, fast, (inputs() * 2,)).square().mean())


def in_turn(model: Any, backward: Backward) -> None:
    backward(sum(p.pow(2).sum() for p in model.parameters()))  # type: ignore[arg-type]
    backward(loss(model))
    backward(sum(p.pow(2).sum() for p in model.parameters()))  # type: ignore[arg-type]


IDIOMS: dict[str, Idiom] = {
    "l2": lambda m, back: back(loss(m) + 0.1 * sum(p.pow(2).sum() for p in m.parameters())),
    "l2 first": lambda m, back: back(0.1 * sum(p.pow(2).sum() for p in m.parameters()) + loss(m)),
    "l1": lambda m, back: back(loss(m) + 0.1 * sum(p.abs().sum() for p in m.parameters())),
    "norm": lambda m, back: back(loss(m) + 0.1 * sum(p.norm() for p in m.parameters())),
    "norm 1": lambda m, back: back(loss(m) + 0.1 * sum(torch.norm(p, p=1) for p in m.parameters())),
    "penalty alone": lambda m, back: back(
        sum((p**2).sum() for n, p in m.named_parameters() if n.endswith("weight"))  # type: ignore[arg-type]
    ),
    "spectral": lambda m, back: back(loss(m) + torch.linalg.matrix_norm(m[0].a.weight, ord=2)),
    "anchored": lambda m, back: back(loss(m) + sum((p - torch.ones_like(p)).square().sum() for p in m.parameters())),
    "similarity": lambda m, back: back(F.cosine_similarity(m[0].a.weight, m[1].a.weight).sum() + loss(m)),
    "many units at once": lambda m, back: back(
        loss(m)
        + torch.stack([layer.a.weight for layer in m]).norm()
        + torch.cat(list(torch.stack(torch._foreach_norm(list(m.parameters()))).split(3))).sum()
    ),
    "in turn": in_turn,
    "double backward": double_backward,
    "wasserstein": wasserstein,
    "meta learning": meta_learning,
    "own parameters": lambda m, back: back(functional_call(m, dict(m.named_parameters()), (inputs(),)).square().mean()),
    "gathered parameters": lambda m, back: back(
        functional_call(m, {n: v * 2 for n, v in values(m).items()}, (inputs(),)).square().mean()
    ),
}

RESULTS: dict[str, Callable[[Any], Any]] = {
    "grad": lambda m: torch.autograd.grad(loss(m), list(m.parameters())),
    "func.grad": lambda m: tuple(
        grad(lambda p: functional_call(m, p, (inputs(),)).square().mean())(
            {n: v.detach() for n, v in values(m).items()}
        ).values()
    ),
    "outside": lambda m: (grad(lambda x: (m[0].a.weight * x[0]).sum() + m[1].b.weight.T.sum() * x.sum())(inputs()),),
    "of inputs": lambda m: (grad(lambda x: loss(m, x) + loss(m, x * 2))(inputs()),),
    "jacobian": lambda m: (jacrev(m)(inputs()),),
    "vmap": lambda m: (vmap(m)(inputs()),),
    "of each sample": lambda m: tuple(
        vmap(grad(lambda p, x: functional_call(m, p, (x[None],)).square().mean()), (None, 0))(
            {n: v.detach() for n, v in values(m).items()}, inputs()
        ).values()
    ),
}


@pytest.mark.parametrize("recompute", [None, True, False])
@on_ranks(1, 2, long=(3,))
def test_as_in_plain_torch(recompute: bool | None) -> None:
    plain, model = make(recompute)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    for name, idiom in IDIOMS.items():
        idiom(plain, lambda value: value.backward())  # type: ignore[no-untyped-call]
        idiom(model, manager.backward)
        try:
            oracle.assert_same_grads(model, plain, limit=1e-4)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        sgd.step()
        manager.step()
        sgd.zero_grad()
        manager.zero_grad()
    for name, result in RESULTS.items():
        for theirs, ours in zip(result(plain), result(model), strict=True):
            oracle.assert_close(ours, theirs, name, limit=1e-4)
        loss(plain).backward()  # type: ignore[no-untyped-call]
        manager.backward(loss(model))
        sgd.step()
        manager.step()
        sgd.zero_grad()
        manager.zero_grad()
    oracle.assert_same_weights(model, plain, limit=1e-4)


class Twice(nn.Module):
    """Its layers run twice, so that each is gathered, and cast, anew."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.layers(x))  # type: ignore[no-any-return]


def cast_and_asked_for(recompute: bool, autocast: bool) -> None:
    """Parameters that are gathered in another dtype than they rest in."""
    plain, model = (Twice(made) for made in make(recompute))

    def asked(m: Any) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return m(inputs()).float().square().mean(), list(m.parameters())

    for chosen in (slice(None), slice(2, 4)):
        slopes = []
        for m in (model, plain):
            value, params = asked(m)
            slopes.append(torch.autograd.grad(value, params[chosen]))
        for ours, theirs in zip(*slopes, strict=True):
            assert ours.dtype == theirs.dtype
            oracle.assert_close(ours, theirs, "autograd.grad", limit=0.1)
        for m in (model, plain):
            value, params = asked(m)
            value.backward(inputs=params[chosen])  # type: ignore[no-untyped-call]
        oracle.assert_same_grads(model, plain, limit=0.1)
        for m in (model, plain):
            m.zero_grad()
            value, params = asked(m)
            slope = torch.autograd.grad(value, params[chosen], create_graph=True)
            (value + sum(one.float().square().sum() for one in slope)).backward()
        oracle.assert_same_grads(model, plain, limit=0.1)
        for m in (model, plain):
            m.zero_grad()
    for m in (model, plain):
        first, other = (next(part.parameters()) for part in m.layers[:2])
        rows = m.layers[0](inputs()).float().sum()
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            torch.autograd.grad(rows, [first, other], retain_graph=True)
        assert torch.autograd.grad(rows, [other], retain_graph=True, allow_unused=True) == (None,)
        (zeros,) = torch.autograd.grad(rows, [other], materialize_grads=True)
        assert zeros.shape == other.shape and zeros.dtype == other.dtype and not zeros.any()


@pytest.mark.parametrize(("recompute", "precision"), [(True, "bf16"), (False, "bf16"), (False, None)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_parameters_that_are_cast(ranks: int, recompute: bool, precision: str | None) -> None:
    run_ranks(ranks, cast_and_asked_for, recompute, precision is None, init={"precision": precision})


@on_ranks(1, 2)
def test_optimizers_that_step_inside_a_backward_are_refused() -> None:
    _, model = make(None)
    manager = bmt.optim.OptimManager()
    for p in model.parameters():
        own = torch.optim.SGD([p], lr=0.1)
        manager.add_optimizer(own)
        p.register_post_accumulate_grad_hook(lambda _, own=own: own.step())
    with pytest.raises(ConfigurationError, match="inside a backward"):
        manager.backward(loss(model))


class Contrastive(nn.Module):
    """A momentum encoder and a queue of keys from all ranks."""

    def __init__(self, whole_batch: bool) -> None:
        super().__init__()
        self.whole_batch = whole_batch
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        for p, q in zip(self.query.parameters(), self.key.parameters(), strict=True):
            q.data.copy_(p.data)
            q.requires_grad = False
        self.register_buffer("queue", F.normalize(torch.randn(WIDTH, 24), dim=0))
        self.register_buffer("at", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        query = F.normalize(self.query(x), dim=1)
        with torch.no_grad():
            for p, q in zip(self.query.parameters(), self.key.parameters(), strict=True):
                q.data = q.data * 0.9 + p.data * 0.1
            key = F.normalize(self.key(x), dim=1)
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.clone().detach()], 1)
        with torch.no_grad():
            keys = key if self.whole_batch else bmt.distributed.all_gather(key).flatten(0, 1)
            start = int(self.at)
            self.queue[:, start : start + len(keys)] = keys.t()
            self.at[0] = (start + len(keys)) % 24
        return F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.int64))


@on_ranks(1, 2, 3)
def test_a_queue_of_gathered_keys() -> None:
    torch.manual_seed(0)
    plain = Contrastive(True)
    torch.manual_seed(0)
    model = bmt.BMTrainModelWrapper(Contrastive(False))
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (plain, model)]
    sgd = torch.optim.SGD(trained[0], lr=0.1)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(trained[1], lr=0.1))
    for step in range(5):
        sgd.zero_grad()
        manager.zero_grad()
        plain(oracle.inputs(step)).backward()
        manager.backward(model(models.share(oracle.inputs(step))))
        sgd.step()
        manager.step()
    oracle.assert_same_weights(model, plain)


def embedding(names: models.Names) -> Any:
    class Model(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, WIDTH, max_norm=1.0)
            self.bags = nn.EmbeddingBag(9, WIDTH, max_norm=0.5, norm_type=1.0)
            self.layers = names.stack([nn.Linear(WIDTH, WIDTH)])

        def forward(self, x: Tensor) -> Tensor:
            rows = (x * 4).long().abs().clamp(max=8)
            return self.layers[0](self.words(rows).sum(1) + self.bags(rows))  # type: ignore[no-any-return]

    return Model()


@on_ranks(1, 2, 3)
def test_embeddings_with_a_largest_norm() -> None:
    oracle.matches(embedding, steps=4)
