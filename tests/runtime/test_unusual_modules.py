"""What models do beside matrix products: the right result, or a clear error, never a silently wrong one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import models
import oracle
import pytest
import torch
from oracle import WIDTH, matches, mean
from ranks import on_ranks
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import bmtrain as bmt
from bmtrain.errors import BMTrainError


def wrapped(make: Callable[[], nn.Module], run: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> Any:
    """Builds two layers made by ``make`` in a stack, run one after the other by ``run``."""

    def build(names: models.Names) -> Any:
        class Model(names.Module):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.layers = names.stack([make(), make()])
                self.loose = make()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for layer in [*self.layers, self.loose]:
                    x = run(layer, x)
                return x

        return Model()

    return build


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList([torch.randn(WIDTH) for _ in range(3)])
        self.dict = nn.ParameterDict({"a": torch.randn(WIDTH, WIDTH), "b": torch.randn(())})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.dict["a"] * self.dict["b"] + sum(p for p in self.list)


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, WIDTH, WIDTH) * 0.3)
        self.complex = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("bi,hij->bj", x, self.weight) + torch.baddbmm(
            x.expand(2, -1, -1), x.expand(2, -1, -1), self.weight
        ).sum(0)
        return 0.1 * (y + (x * self.complex).abs())


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, WIDTH, WIDTH) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.weight.unbind(0)
        top = self.weight[0, :2].t()
        y = F.linear(x, q) * F.linear(x, k.t().contiguous().t()) + F.linear(x, v + self.weight[1])
        return y + (x @ top).sum(1, keepdim=True)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[..., torch.Tensor]]] = {
    "attention": (
        lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True),
        lambda m, x: m(*[x[:, None].expand(-1, 3, -1)] * 3)[0][:, 0],
    ),
    "attention of three": (
        lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True),
        lambda m, x: m(*[x[:, None].expand(-1, n, -1) for n in (2, 3, 3)])[0][:, 0],
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, 0.0, batch_first=True),
        lambda m, x: m(x[:, None].expand(-1, 3, -1))[:, 1],
    ),
    "lstm": (lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True), lambda m, x: m(x[:, None].expand(-1, 3, -1))[0][:, -1]),
    "gru": (lambda: nn.GRU(WIDTH, WIDTH, 2), lambda m, x: m(x.expand(2, -1, -1))[0][1]),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), lambda m, x: m(x)),
    "old weight norm": (lambda: nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH)), lambda m, x: m(x)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)), lambda m, x: m(x)),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), lambda m, x: m(x)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv1d(1, 3, 3, padding=1), nn.PReLU(), nn.GroupNorm(1, 3), nn.Conv1d(3, 1, 1)),
        lambda m, x: m(x[:, None])[:, 0],
    ),
    "bilinear": (lambda: nn.Bilinear(WIDTH, WIDTH, WIDTH), lambda m, x: m(x, x)),
    "embedding bag": (
        lambda: nn.EmbeddingBag(5, WIDTH), lambda m, x: x + m((x.abs() * 100).long() % 5),
    ),
    "sparse embedding": (
        lambda: nn.Embedding(5, WIDTH, sparse=True), lambda m, x: x + m((x.abs() * 100).long() % 5).sum(1),
    ),
    "lists": (Lists, lambda m, x: m(x)),
    "einsum": (Einsum, lambda m, x: m(x)),
    "views": (Views, lambda m, x: m(x)),
    "rms norm": (lambda: nn.RMSNorm(WIDTH), lambda m, x: m(x) * m.weight.exp()),
}  # fmt: skip


@on_ranks(1, 2)
@pytest.mark.parametrize("name", LAYERS)
def test_kinds_of_layers(name: str) -> None:
    build = wrapped(*LAYERS[name])
    if name == "spectral norm":  # its power iteration runs twice when recomputed, in torch too
        matches(build, recompute=False)
    elif name == "sparse embedding":
        matches_dense(build)
    else:
        matches(build, limit=3e-5)


def matches_dense(build: Any) -> None:
    reference, model = oracle.pair(build)
    mean(reference(oracle.inputs(0))).backward()
    for p in reference.parameters():
        p.grad = p.grad.to_dense()
    bmt.optim.OptimManager().backward(mean(model(models.share(oracle.inputs(0)))))
    oracle.assert_same_grads(model, reference)


@on_ranks(1, 2)
def test_fused_evaluation_paths() -> None:
    """Fused inference paths read the parameters themselves; their answer is the unsharded model's."""
    for name in ("attention", "encoder layer", "lstm"):
        make, run = LAYERS[name]
        reference, model = oracle.pair(wrapped(make, run))
        reference.eval()
        model.eval()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                oracle.assert_close(model(oracle.inputs(0)), reference(oracle.inputs(0)), name)


def simple(names: models.Names) -> Any:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.gain = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.lin(x)) * self.gain

    return wrapped(Layer, lambda m, x: m(x))(names)


def batch_norm() -> None:
    """Statistics are a rank's own, as in plain data parallelism; equal inputs give the plain model's."""

    def normed() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))

    reference, model = oracle.pair(wrapped(normed, lambda m, x: m(x)), recompute=False)
    for step in range(3):
        mean(reference(oracle.inputs(step))).backward()
        bmt.optim.OptimManager().backward(mean(model(oracle.inputs(step))))
    oracle.assert_same_grads(model, reference)
    oracle.assert_same_weights(model, reference)


def retained() -> None:
    reference, model = oracle.pair(simple)
    whole, loss = mean(reference(oracle.inputs(0))), mean(model(models.share(oracle.inputs(0))))
    whole.backward(retain_graph=True)
    whole.backward()
    manager = bmt.optim.OptimManager()
    manager.scale_loss(loss).backward(retain_graph=True)
    manager.backward(loss)
    oracle.assert_same_grads(model, reference)


def input_gradients() -> None:
    for recompute in (True, False):
        reference, model = oracle.pair(simple, recompute)
        x = oracle.inputs(0).requires_grad_()
        y = models.share(oracle.inputs(0)).requires_grad_()
        (expected,) = torch.autograd.grad(mean(reference(x)), x)
        (found,) = torch.autograd.grad(mean(model(y)), y)
        oracle.assert_close(found / bmt.world_size(), models.share(expected), "the gradient of the input")
        assert all(bmt.gather_grad(p) is None for p in model.parameters())


@pytest.mark.parametrize("recompute", [True, False])
@on_ranks(1, 2)
def test_gradient_penalties(recompute: bool) -> None:
    """A gradient penalty differentiates twice."""
    reference, model = oracle.pair(simple, recompute)

    def loss(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        return slope.square().sum(1).mean()

    loss(reference, oracle.inputs(0)).backward()
    bmt.optim.OptimManager().backward(loss(model, models.share(oracle.inputs(0))))
    oracle.assert_same_grads(model, reference)


def parameter_hooks() -> None:
    """A hook on a parameter sees and may change the whole gradient of this rank's share."""
    reference, model = oracle.pair(simple)
    for m in (reference, model):
        m.layers[0].lin.weight.register_hook(lambda g: g * 2)
        m.loose.gain.register_hook(lambda g: g + g)
    mean(reference(oracle.inputs(0))).backward()
    bmt.optim.OptimManager().backward(mean(model(models.share(oracle.inputs(0)))))
    oracle.assert_same_grads(model, reference)


def autocast() -> None:
    reference, model = oracle.pair(simple)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, loss = mean(reference(oracle.inputs(0))), mean(model(models.share(oracle.inputs(0))))
    whole.backward()
    bmt.optim.OptimManager().backward(loss)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    oracle.assert_close(bmt.sum_loss(loss.detach()), whole.detach(), "loss", 1e-3)
    oracle.assert_same_grads(model, reference, limit=2e-2)


def adversaries() -> None:
    """Two models, each trained against the other."""
    pairs = [oracle.pair(simple, seed=seed) for seed in (1, 2)]
    managers = []
    for _, model in pairs:
        managers.append(bmt.optim.OptimManager())
        managers[-1].add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    plains = [torch.optim.SGD(reference.parameters(), lr=0.1) for reference, _ in pairs]
    for step in range(3):
        for turn in (0, 1):
            both = []
            for kind in (0, 1):  # plain, sharded
                x = oracle.inputs(step) if kind == 0 else models.share(oracle.inputs(step))
                fake = pairs[0][kind](x)
                both.append(mean(pairs[1][kind](fake if turn else fake.detach()) + x))
            both[0].backward()
            managers[turn].backward(both[1])
            chosen = (1, 0)[turn]
            oracle.assert_same_grads(pairs[chosen][1], pairs[chosen][0])
            plains[chosen].step()
            managers[chosen].step()
            for index in (0, 1):
                plains[index].zero_grad()
                managers[index].zero_grad()
    for reference, model in pairs:
        oracle.assert_same_weights(model, reference, limit=1e-4)


def replaced_modules() -> None:
    """A head replaced after sharding: an optimizer takes it as it is, and wrapped again it is sharded."""
    reference, model = oracle.pair(simple)
    torch.manual_seed(9)
    reference.loose = nn.Linear(WIDTH, 2)
    torch.manual_seed(9)
    model.loose = nn.Linear(WIDTH, 2)
    bmt.optim.AdamOptimizer(model.parameters())
    model = bmt.BMTrainModelWrapper(model)
    mean(reference(oracle.inputs(0))).backward()
    bmt.optim.OptimManager().backward(mean(model(models.share(oracle.inputs(0)))))
    oracle.assert_same_grads(model, reference)
    oracle.assert_same_weights(model, reference, exact=True)


def functional() -> None:
    """torch.func on whole parameters, and on the model itself: right, or told."""
    reference, model = oracle.pair(simple)
    x = oracle.inputs(0)
    with bmt.gathered(model):
        values = {n: p.detach().clone() for n, p in model.named_parameters()}
        expected = torch.func.functional_call(reference, {n: v * 2 for n, v in values.items()}, (x,))
    try:
        found = torch.func.functional_call(model, {n: v * 2 for n, v in values.items()}, (x,))
    except (BMTrainError, RuntimeError):
        return
    oracle.assert_close(found.detach(), expected.detach(), "functional_call")


def in_a_thread() -> None:
    """A whole step in another thread, as notebooks and data servers do."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            matches(simple, steps=2, recompute=True)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def autograd_of_parameters() -> None:
    """torch.autograd.grad for parameters bypasses the reduction: whole values of this rank's share, or an error."""
    reference, model = oracle.pair(simple, recompute=False)
    expected = torch.autograd.grad(mean(reference(oracle.inputs(0))), list(reference.parameters()))
    try:
        found = torch.autograd.grad(mean(model(oracle.inputs(0))), list(model.parameters()))
    except (BMTrainError, RuntimeError):
        return
    for ours, theirs in zip(found, expected, strict=True):
        oracle.assert_close(ours, theirs, "autograd.grad")


USES = {
    use.__name__: use
    for use in (
        batch_norm, retained, input_gradients, parameter_hooks, autocast, adversaries, replaced_modules, functional,
        in_a_thread, autograd_of_parameters,
    )
}  # fmt: skip


@on_ranks(1, 2)
@pytest.mark.parametrize("name", USES)
def test_uses_of_autograd_and_modules(name: str) -> None:
    USES[name]()
