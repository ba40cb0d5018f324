"""A sharded parameter shows its whole shape, answers what needs no values, and never lets wrong values through."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import models
import oracle
import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.errors import ShardedAccessError


class Net(nn.Module):
    """A plain model that the tests wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(3)])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("saved", torch.arange(3.0))
        self.register_buffer("unsaved", torch.arange(2.0), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.emb(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def make(seed: int = 0) -> tuple[Net, Net]:
    torch.manual_seed(seed)
    plain = Net()
    torch.manual_seed(seed)
    return plain, bmt.BMTrainModelWrapper(Net())


def tokens(step: int = 0) -> torch.Tensor:
    return torch.randint(11, (12, 4), generator=torch.Generator().manual_seed(step))


@on_ranks(1, 2, 3)
def test_shows_its_whole_shape() -> None:
    plain, model = make()
    for (name, p), (same, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert name == same and p.shape == q.shape and p.dim() == q.dim()
        assert p.numel() == q.numel() and len(p) == len(q)
        assert p.dtype == q.dtype and p.requires_grad and p.is_leaf and isinstance(p, nn.Parameter)
        assert p.size(0) == q.size(0) and p.element_size() == q.element_size() and p.data.shape == q.shape
    assert model.head.weight is model.emb.weight
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    if bmt.world_size() > 1:
        p = model.emb.weight
        for wrong in (
            lambda: p.tolist(), lambda: p.numpy(), lambda: p.item(), lambda: bool(p), lambda: 0.0 in p,
            lambda: model.layers[0][0].bias.__array__(), lambda: pickle.dumps(p), lambda: p.share_memory_(),
            lambda: torch.save(p, io.BytesIO()),
        ):  # fmt: skip
            with pytest.raises(ShardedAccessError, match=r"gathered|state_dict"):
                wrong()
    assert "11, 6" in repr(model.emb.weight) or bmt.world_size() == 1
    oracle.assert_same_weights(model, plain, exact=True)


@on_ranks(1, 2, 3)
def test_gathered_shows_and_keeps_whole_values() -> None:
    plain, model = make()
    with bmt.gathered(model):
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, q)
    with bmt.gathered(model.layers[0][0].weight, write=True), torch.no_grad():
        model.layers[0][0].weight.mul_(2)
        model.layers[0][0].weight[1] = 7.0
    with torch.no_grad():
        plain.layers[0][0].weight.mul_(2)
        plain.layers[0][0].weight[1] = 7.0
    oracle.assert_same_weights(model, plain, exact=True)
    with pytest.raises(KeyError), bmt.gathered([model.emb.weight], write=True):
        raise KeyError
    if bmt.world_size() > 1:
        assert "sharded" in repr(model.emb.weight), "sharded again after an exception"
    oracle.assert_same_weights(model, plain, exact=True)
    with bmt.gathered(model), bmt.gathered(model.emb):
        assert torch.equal(model.emb.weight, plain.emb.weight)
    assert torch.equal(model.emb.weight.gather(), plain.emb.weight)


@on_ranks(1, 2, 3)
def test_values_may_change_between_steps() -> None:
    plain, model = make()
    with torch.no_grad():
        for m in (plain, model):
            w, v = m.emb.weight, m.layers[1][2].bias
            w.mul_(0.5)
            w.add_(torch.ones(6))  # broadcast
            w.clamp_(-1, 1)
            v.zero_()
            v.fill_(0.25)
            m.layers[1][2].weight.copy_(3)
            m.layers[0][2].bias.copy_(other=torch.arange(6.0))
            v.copy_(torch.arange(6.0))
            m.layers[0][0].weight.data = torch.full((9, 6), 0.125)
            m.layers[0][2].weight.lerp_(torch.ones(6, 9), 0.25)
    oracle.assert_same_weights(model, plain, exact=True)
    assert torch.allclose(model(tokens()), plain(tokens()), atol=1e-6)
    for wrong in (torch.zeros(4, 4), torch.zeros(6), torch.zeros(11, 6, dtype=torch.float64)):
        with pytest.raises(ShardedAccessError, match="cannot become"):
            model.emb.weight.data = wrong
    with pytest.raises((ShardedAccessError, RuntimeError)), torch.no_grad():
        model.emb.weight.copy_(torch.zeros(4, 4))
    oracle.assert_same_weights(model, plain, exact=True)


@on_ranks(1, 2)
def test_a_function_for_all_tensors_changes_their_values() -> None:
    plain = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    model = bmt.BMTrainModelWrapper(copy.deepcopy(plain))
    for net in (plain, model):
        net._apply(lambda tensor: tensor * 2 if tensor.is_floating_point() else tensor)
    oracle.assert_same_weights(model, plain, exact=True)
    assert torch.equal(model(torch.ones(3, 5)), plain(torch.ones(3, 5)))


@on_ranks(1, 2, 3)
def test_moving_averages_over_a_deep_copy() -> None:
    """The usual exponential moving average: a deep copy, updated in place after every step."""
    plain, model = make()
    means = [copy.deepcopy(m).requires_grad_(False) for m in (plain, model)]
    oracle.assert_same_weights(means[1], means[0], exact=True)
    assert means[1].head.weight is means[1].emb.weight and means[1].head.weight is not model.head.weight
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(3):
        manager.zero_grad()
        sgd.zero_grad()
        oracle.mean(plain(tokens(step))).backward()
        manager.backward(oracle.mean(model(models.share(tokens(step)))))
        sgd.step()
        manager.step()
        with torch.no_grad():
            for source, mean in zip((plain, model), means, strict=True):
                for p, q in zip(source.parameters(), mean.parameters(), strict=True):
                    q.lerp_(p, 0.1)
                for p, q in zip(source.parameters(), mean.parameters(), strict=True):
                    q.mul_(0.99).add_(p, alpha=0.01)
    oracle.assert_same_weights(model, plain)
    oracle.assert_same_weights(means[1], means[0])
    with torch.no_grad():
        assert torch.allclose(means[1](tokens()), means[0](tokens()), atol=1e-5)


@on_ranks(1, 2)
def test_deep_copies_are_models_of_their_own() -> None:
    plain, model = make()
    copied = copy.deepcopy(model)
    for m in (model, copied):
        manager = bmt.optim.OptimManager()
        manager.add_optimizer(torch.optim.SGD(m.parameters(), lr=0.1))
        manager.backward(oracle.mean(m(models.share(tokens()))))
        plain.zero_grad()
        oracle.mean(plain(tokens())).backward()
        oracle.assert_same_grads(m, plain)
    before = model.state_dict()
    with bmt.gathered(copied, write=True), torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the copy has its own memory"
    assert not copied.emb.weight.gather().any()


@on_ranks(1, 2, 3)
def test_half_after_wrapping() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        plain, model = make()
        plain.to(dtype)
        assert model.to(dtype) is model
        assert all(p.dtype == dtype for p in model.parameters()) and model.saved.dtype == dtype
        oracle.assert_same_weights(model, plain, exact=True)
        if dtype != torch.float16:
            assert torch.equal(model(tokens()), plain(tokens()))
    plain, model = make()
    assert torch.equal(model.half().float().head.weight.gather(), plain.half().float().head.weight)
    assert model.to("cpu") is model and model.cpu() is model


@on_ranks(1, 2, 3)
def test_initialisation_code_means_what_it_says() -> None:
    """As written, in any constructor; and after it through apply and init_parameters."""

    def build(names: models.Names) -> Any:
        class Part(names.Module):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.lin = nn.Linear(5, 5)
                self.gain = names.Parameter(torch.ones(5))
                self.gain.data.uniform_(0.5, 1.5)
                self.lin.weight.data[0] = self.gain.data

        class Model(names.Module):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.parts = names.stack([Part() for _ in range(3)])
                self.out = nn.Linear(5, 1)
                self.apply(lambda m: nn.init.orthogonal_(m.weight) if isinstance(m, nn.Linear) else None)
                for name, p in self.named_parameters():
                    if p.dim() == 1:
                        nn.init.normal_(p, std=0.1 * (1 + len(name)))
                with torch.no_grad():
                    self.out.weight /= self.out.weight.norm()
                    self.total = float(sum(p.sum() for p in self.parameters()))

        return Model()

    reference, model = oracle.pair(build)
    assert model.total == reference.total
    for m in (reference, model):
        torch.manual_seed(11)
        m.apply(lambda part: nn.init.normal_(part.weight) if isinstance(part, nn.Linear) else None)
    oracle.assert_same_weights(model, reference, exact=True)


@on_ranks(1, 2)
def test_init_parameters_draws_as_torch_does() -> None:
    class Linear(bmt.DistributedModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = bmt.DistributedParameter(
                torch.empty(7, 5), init_method=bmt.ParameterInitializer(nn.init.normal_, mean=1.0, std=2.0)
            )
            self.bias = bmt.DistributedParameter(torch.zeros(7), init_method=lambda p: p.uniform_(), group="bias")

    model = Linear()
    torch.manual_seed(4)
    bmt.init_parameters(model)
    torch.manual_seed(4)
    weight = nn.init.normal_(torch.empty(7, 5), mean=1.0, std=2.0)
    assert torch.equal(model.weight.gather(), weight)
    assert torch.equal(model.bias.gather(), torch.zeros(7).uniform_())
    groups = dict(bmt.grouped_parameters(model))
    assert groups["bias"] == [model.bias] and groups[None][0] is model.weight


def prints_on_one_rank() -> str:
    _, model = make()
    return repr(model) + str(next(model.parameters())) if bmt.rank() == 0 else ""


def test_printing_on_one_rank_does_not_hang() -> None:
    text = run_ranks(2, prints_on_one_rank, timeout=30)[0]
    assert "Linear(in_features=6" in text and "shape=(11, 6)" in text


@on_ranks(1, 2)
def test_requires_grad_may_change_between_steps() -> None:
    """Frozen and thawed between steps: what is frozen is not reduced and keeps no gradient."""
    plain, model = make()
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(6):
        for m in (plain, model):
            m.layers.requires_grad_(step % 2 == 0)
            m.emb.weight.requires_grad_(step % 3 != 1)
            m.layers[1][0].bias.requires_grad_(True)
        oracle.mean(plain(tokens(step))).backward()
        manager.backward(oracle.mean(model(models.share(tokens(step)))))
        oracle.assert_same_grads(model, plain)
        sgd.step()
        manager.step()
        sgd.zero_grad()
        manager.zero_grad()
    oracle.assert_same_weights(model, plain)


@on_ranks(1, 2)
def test_gradients_can_be_read_and_set() -> None:
    plain, model = make()
    bmt.optim.OptimManager().backward(oracle.mean(model(models.share(tokens()))))
    oracle.mean(plain(tokens())).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and p.grad.shape == q.grad.shape
        if bmt.world_size() == 1:
            oracle.assert_close(p.grad, q.grad, "p.grad")
    doubled = {n: bmt.gather_grad(p) * 2 for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = doubled[name]
    for name, p in model.named_parameters():
        assert torch.equal(bmt.gather_grad(p), doubled[name])
    model.zero_grad()
    assert all(p.grad is None and bmt.gather_grad(p) is None for p in model.parameters())


@on_ranks(1, 2, 3)
def test_writes_into_whole_parameters_stay() -> None:
    """Parameters changed in place while whole: by ``.data``, under no_grad, by assignment; at any precision."""

    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 6)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.scale.data.clamp_(max=1.5)
            with torch.no_grad():
                self.lin.bias.clamp_(-0.1, 0.1)
            self.lin.weight.data = nn.functional.normalize(self.lin.weight.data, dim=1)
            return self.lin(x) * self.scale  # type: ignore[no-any-return]

    def build(names: models.Names) -> Any:
        class Model(names.Module):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.layers = names.stack([Clamped(), Clamped()])

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for layer in self.layers:
                    x = layer(x)
                return x

        return Model()

    oracle.matches(build, steps=4)
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = build(models.sharded()).to(dtype)
        optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-4)
        manager = bmt.optim.OptimManager()
        manager.add_optimizer(optimizer)
        for _ in range(3):
            manager.zero_grad()
            manager.backward(model(torch.ones(2, 6, dtype=dtype)).float().square().mean())
            manager.step()
        assert abs(float(model.layers[0].scale.gather()) - 1.5) < 0.02, "the clamp is lost to the optimizer's master"


@on_ranks(1, 2)
def test_reading_data_costs_no_precision() -> None:
    """Reading ``p.data`` costs a bfloat16 model no precision: steps below its resolution still add up."""
    model = bmt.BMTrainModelWrapper(nn.Linear(4, 4, bias=False)).bfloat16()
    with bmt.gathered(model, write=True), torch.no_grad():
        model.weight.fill_(1.0)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=1e-3))
    for _ in range(20):
        manager.zero_grad()
        manager.backward(model(torch.ones(1, 4, dtype=torch.bfloat16)).mean() * 4)
        with bmt.gathered(model):
            model.weight.data.norm()
        manager.step()
    assert torch.allclose(model.weight.gather().float(), torch.full((4, 4), 0.98), atol=4e-3)
