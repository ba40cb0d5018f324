"""What ``.data`` and ``.grad`` of sharded parameters are: tensors in parts that compute what whole ones compute."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import models
import oracle
import pytest
import torch
import torch.optim.swa_utils
from ranks import RanksFailed, on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.errors import ShardedAccessError


class Net(nn.Module):
    """Parameters that one rank holds, that ranks share, a single number, and one of no elements."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 90)
        self.norm = nn.LayerNorm(90)
        self.last = nn.Linear(90, 6)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.none = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)).tanh()) * self.scale + self.none.sum()  # type: ignore[no-any-return]


def pair(seed: int = 5) -> tuple[Any, Any]:
    """Plain, and the same in parts."""
    return oracle.pair(lambda names: Net() if names.Module is nn.Module else bmt.BMTrainModelWrapper(Net()), seed=seed)


def whole(value: Any) -> Any:
    """``value`` with whole tensors in it."""
    if isinstance(value, torch.Tensor):
        return value.full_tensor() if hasattr(value, "full_tensor") else value
    if isinstance(value, (list, tuple)):
        return [whole(v) for v in value]
    return {k: whole(v) for k, v in value.items()} if isinstance(value, dict) else value


def assert_alike(found: Any, expected: Any, what: str) -> None:
    if expected is None:
        assert found is None, what
        return
    found = whole(found)
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), what
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other, what)
    elif isinstance(expected, dict):
        assert list(found) == list(expected), what
        for key, value in expected.items():
            assert_alike(found[key], value, f"{what} ({key})")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape, (what, found, expected)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda m: f"{what}: {m}")
    else:
        assert found == pytest.approx(expected, rel=1e-5, nan_ok=True), what


def same(name: str) -> torch.Tensor:
    """A whole tensor like the parameter of that name, the same on all ranks."""
    shape = dict(Net().named_parameters())[name].shape
    made = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(len(name)), device="cpu")
    return made.to(torch.get_default_device())


# Of w and v, two tensors of one shape, and n, an ordinary one of the same shape.
OUT_OF_PLACE: dict[str, Callable[..., Any]] = {
    "arithmetic": lambda w, v, n: [w + v, w - 1, 2 * w, w / v, -w, w**2, 2**w, 1 - w, abs(w), w % 0.3, w // 0.3],
    "mixed": lambda w, v, n: [w + n, n * w, torch.maximum(w, n), torch.where(n > 0, w, n), torch.lerp(w, n, 0.1)],
    "one number": lambda w, v, n: [w * torch.tensor(2.0), torch.tensor(3.0) - w, w / w.norm().clamp(min=1e-3)],
    "comparisons": lambda w, v, n: [w > 0, w == v, w.isnan(), torch.isfinite(w), (w > 0) & (v > 0)],
    "functions": lambda w, v, n: [w.sign(), w.exp(), w.tanh(), w.clamp(-0.1, 0.1), w.clamp(min=v), w.round()],
    "three": lambda w, v, n: [torch.addcmul(w, v, n), torch.addcdiv(w, v, v.abs() + 1, value=2), w.lerp(v, 0.3)],
    "kinds": lambda w, v, n: [w.double(), w.to(torch.bfloat16).float(), w.half(), w.type_as(n), w.cpu()],
    "copies": lambda w, v, n: [w.clone(), w.detach(), w.data, w.contiguous(), copy.deepcopy(w), w.detach().clone()],
    "alike": lambda w, v, n: [torch.zeros_like(w), torch.ones_like(w), torch.full_like(w, 3)],
    "shapes": lambda w, v, n: [w.view(-1), w.flatten(), w.reshape(w.shape), w.unsqueeze(0), w.view_as(v)],
    "flat": lambda w, v, n: [w.view(-1) + n.view(-1), w.view(-1).dot(v.view(-1)), torch.vdot(w.flatten(), v.flatten())],
    "sums": lambda w, v, n: [w.sum(), w.mean(), (w * v).sum(), w.sum(dtype=torch.float64), w.nansum(), w.prod()],
    "norms": lambda w, v, n: [w.norm(), w.norm(2), w.norm(p=1), w.norm(float("inf")), w.norm(0), torch.norm(w, 3)],
    "linalg": lambda w, v, n: [torch.linalg.vector_norm(w, -1), torch.linalg.norm(w.view(-1)), torch.dist(w, v)],
    "ranges": lambda w, v, n: [*((w.max(), w.min(), w.amax(), w.amin(), torch.aminmax(w)) if w.numel() else ())],
    "spread": lambda w, v, n: [w.std(), w.var(unbiased=False), *torch.std_mean(w), w.var(correction=2)],
    "logic": lambda w, v, n: [(w > 0).any(), (w > -9).all(), w.isnan().any(), w.count_nonzero(), (w > 0).sum()],
    "all dimensions": lambda w, v, n: [w.sum(tuple(range(w.dim())), keepdim=True), w.mean(tuple(range(w.dim())))],
    "python": lambda w, v, n: [w.sum().item(), float(w.norm()), torch.equal(w, v), torch.equal(w, w), len(w.shape)],
    "close": lambda w, v, n: [torch.allclose(w, v), torch.allclose(w, w + 1e-9), torch.allclose(w, n)],
    "lists": lambda w, v, n: [torch._foreach_norm([w, v]), torch._foreach_mul([w, v], 2.0)],
    "mixed lists": lambda w, v, n: [torch._foreach_sub([w], [n]), torch._foreach_add([n], [w])],
    "other kinds": lambda w, v, n: [(w > 0).max() if w.numel() else 0, (w * 9).long().sum(), w.bfloat16().norm()],
    "not a number": lambda w, v, n: [(w / 0).sum(), (w / 0).isinf().any(), (w * float("nan")).sum(), (w / 0).norm()],
    "NaN in one place": lambda w, v, n: [torch.where(w == w.max(), v * float("nan"), w).max() if w.numel() else 0],
}  # fmt: skip

IN_PLACE: dict[str, Callable[..., Any]] = {
    "numbers": lambda w, v, n: w.mul_(0.5).add_(1).sub_(0.25).div_(2),
    "operands": lambda w, v, n: w.add_(v, alpha=0.1).mul_(n).sub_(n, alpha=2),
    "moving average": lambda w, v, n: w.mul_(0.9).add_(v, alpha=0.1),
    "lerp": lambda w, v, n: w.lerp_(v, 0.1).lerp_(n, 0.5),
    "copy": lambda w, v, n: w.copy_(v).add_(w),
    "copy of an ordinary one": lambda w, v, n: w.copy_(n.double()),
    "fill": lambda w, v, n: w.fill_(2.0).add_(v),
    "zero": lambda w, v, n: w.zero_().sub_(v),
    "clamp": lambda w, v, n: w.clamp_(-0.1, 0.1).clamp_(min=-0.05),
    "masked": lambda w, v, n: w.masked_fill_(v > 0, 7.0),
    "three": lambda w, v, n: w.addcmul_(v, n, value=0.1).addcdiv_(v, v.abs() + 1),
    "operators": lambda w, v, n: [w.__iadd__(v), w.__imul__(2), w.__isub__(n), w.__itruediv__(3)],
    "functions": lambda w, v, n: w.abs_().sqrt_().neg_().sign_(),
    "random": lambda w, v, n: w.normal_(0, 0.1).add_(torch.randn_like(w)).mul_(torch.rand_like(v)),
    "init": lambda w, v, n: [nn.init.uniform_(w, -1, 1), nn.init.trunc_normal_(v), nn.init.constant_(n, 2)],
    "flat view": lambda w, v, n: w.view(-1).add_(n.view(-1)),
    "data of data": lambda w, v, n: w.data.detach().mul_(3),
    "lists": lambda w, v, n: [torch._foreach_mul_([w, v], 0.9), torch._foreach_add_([w, v], [n, n], alpha=0.1)],
    "more lists": lambda w, v, n: [torch._foreach_lerp_([w], [v], 0.1), torch._foreach_copy_([v], [n])],
    "into an ordinary one": lambda w, v, n: [n.add_(w), n.copy_(v), torch._foreach_add_([n], [w]), n.mul_(w + v)],
    "out": lambda w, v, n: torch.add(w, v, out=w),
    "assigned data": lambda w, v, n: setattr(w, "data", v * 2),
}  # fmt: skip


@on_ranks(3, long=(2,))
def test_data_is_what_it_is_for_torch() -> None:
    plain, model = pair()
    _, other = pair(seed=6)
    others = dict(pair(seed=6)[0].named_parameters())
    for what, run in OUT_OF_PLACE.items():
        for name, p in model.named_parameters():
            q, partner = dict(plain.named_parameters())[name], dict(other.named_parameters())[name]
            try:
                expected = run(q.data, others[name].data, same(name))
            except (RuntimeError, IndexError) as error:  # of no elements
                with pytest.raises(type(error)):
                    run(p.data, partner.data, same(name))
                continue
            assert_alike(run(p.data, partner.data, same(name)), expected, f"{what} of {name}")
    oracle.assert_same_weights(model, plain, exact=True)


@on_ranks(3, long=(2,), drawn_on_cpu=False)
def test_data_changes_as_for_torch() -> None:
    for what, run in IN_PLACE.items():
        (plain, model), (others, other) = pair(), pair(seed=6)
        taken: list[list[Any]] = []
        for ours, theirs in ((model, other), (plain, others)):
            torch.manual_seed(3)
            taken.append([])
            for index, ((name, p), q) in enumerate(zip(ours.named_parameters(), theirs.parameters(), strict=True)):
                for make in [(lambda p: p.data), (lambda p: p.data.clone()), (lambda p: p.detach())][index % 2 :: 2]:
                    operands = [make(p), make(q), same(name)]
                    with torch.no_grad():
                        run(*operands)
                    taken[-1] += operands
        assert_alike(taken[0], taken[1], what)
        assert_alike(model.state_dict(), plain.state_dict(), what)
        assert_alike(other.state_dict(), others.state_dict(), what)
        x = oracle.inputs(0)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5, equal_nan=True)


@on_ranks(2)
def test_what_needs_whole_values_is_refused() -> None:
    """With the way out in the message, and nothing changed."""
    plain, model = pair()
    p, grad_of = model.first.weight, model.last.weight
    bmt.optim.OptimManager().backward(oracle.mean(model(models.share(oracle.inputs(0)))))
    for value in (p.data, p.data.clone(), grad_of.grad.view(90, 6), p.detach()):
        wrong: list[Callable[[Any], object]] = [
            lambda w: w[0], lambda w: w.t(), lambda w: w.T, lambda w: w @ w.view(6, 90), lambda w: w.sum(0),
            lambda w: w.norm(dim=1), lambda w: w.max(0), lambda w: w.tolist(), lambda w: w.numpy(), lambda w: list(w),
            lambda w: w.sort(), lambda w: w.median(), lambda w: w.cumsum(0), lambda w: torch.cat([w, w]),
            lambda w: w.argmax(), lambda w: torch.softmax(w, 0), lambda w: w.data_ptr(), lambda w: w.untyped_storage(),
            lambda w: w.__setitem__(0, 1.0), lambda w: w[w > 0], lambda w: w.index_fill_(0, torch.tensor([0]), 0.0),
            lambda w: nn.init.eye_(w), lambda w: w + torch.ones(4, 90, 6),
            lambda w: w.add_(torch.ones(6, 90)), lambda w: w.expand(2, 90, 6), lambda w: nn.functional.linear(w, w),
            lambda w: w.requires_grad_(), lambda w: nn.Parameter(w), lambda w: pickle.dumps(w), lambda w: w.t().zero_(),
            lambda w: torch.save({"w": w}, io.BytesIO()), lambda w: [row.zero_() for row in w.unbind()],
            lambda w: torch.bernoulli(w.abs().clamp(max=1)), lambda w: w.item(), lambda w: w.fill_diagonal_(0),
            lambda w: w.view(torch.int32), lambda w: w.view(dtype=torch.uint8),
        ]  # fmt: skip
        for number, attempt in enumerate(wrong):
            with pytest.raises(
                (ShardedAccessError, RuntimeError), match=r"full_tensor|gathered|save_checkpoint|Scalar"
            ):
                raise AssertionError(f"number {number} gave {attempt(value)}")
    assert "nan" not in repr(p.data) and "sharded" in f"{p.data} sharded" and "first.weight" in repr(p.data)
    oracle.assert_same_weights(model, plain, exact=True)


class _Trained:
    """A plain model and the same in parts, with gradients of the same batch."""

    def __init__(self, step: int = 0, build: Callable[[], Any] = pair) -> None:
        self.plain, self.model = build()
        self.manager = bmt.optim.OptimManager()
        self.manager.add_optimizer(torch.optim.SGD(self.model.parameters(), lr=0.1))
        self.sgd = torch.optim.SGD(self.plain.parameters(), lr=0.1)
        self.backward(step)

    def backward(self, step: int) -> None:
        oracle.mean(self.plain(oracle.inputs(step))).backward()
        self.manager.backward(oracle.mean(self.model(models.share(oracle.inputs(step)))))

    def step(self) -> None:
        self.manager.step()
        self.sgd.step()
        self.manager.zero_grad()
        self.sgd.zero_grad()

    def both(self, change: Callable[[Any], Any]) -> Any:
        torch.manual_seed(1)
        found = change(self.model)
        torch.manual_seed(1)
        expected = change(self.plain)
        assert_alike(found, expected, "what the idiom gave")
        return found


def user_clipper(model: Any) -> list[float]:
    total = 0.0
    for p in model.parameters():
        if p.grad is not None and p.grad.numel():
            total += p.grad.data.norm(2).item() ** 2
    for p in model.parameters():
        p.grad.data.mul_(0.01 / (total**0.5 + 1e-6))
    return [total]


def clip_norm(model: Any, **options: Any) -> torch.Tensor:
    return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01, **options)


def noise(model: Any) -> None:
    for p in model.parameters():
        p.grad.add_(torch.randn_like(p.grad), alpha=0.1)


def replace(model: Any) -> None:
    for p in model.parameters():
        p.grad = p.grad * 2 + p.detach() * 0.1
    model.last.weight.grad = None
    assert model.last.weight.grad is None
    model.first.bias.grad = torch.full((90,), 0.5)
    model.first.weight.grad.data = model.first.weight.grad.data.sign()


def zero(model: Any) -> None:
    model.zero_grad(set_to_none=False)
    assert not model.first.weight.grad.any()


def statistics(model: Any) -> Any:
    grads = [p.grad for p in model.parameters() if p.numel()]
    return [
        *(g.abs().mean().item() for g in grads), *(g.isnan().any().item() for g in grads),
        *(g.abs().max() for g in grads), torch.stack([g.norm() for g in grads]).norm(),
        *(torch.dot(p.grad.view(-1), p.data.view(-1)) for p in model.parameters()),
    ]  # fmt: skip


def centralized(model: Any) -> None:
    for p in model.parameters():
        if p.grad.numel():
            p.grad.sub_(p.grad.mean())


def decay_by_hand(model: Any) -> None:
    for p in model.parameters():
        p.grad.add_(p.data, alpha=0.1)
    with torch.no_grad():
        torch._foreach_mul_([p.grad for p in model.parameters()], 0.5)


def step_by_hand(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.data.add_(p.grad, alpha=-0.1)
            p.add_(p.grad.sign(), alpha=-0.01)
            p -= 0.1 * p.grad


GRADIENTS: list[Callable[[Any], Any]] = [
    user_clipper, clip_norm, noise, replace, zero, statistics, centralized, decay_by_hand, step_by_hand,
]  # fmt: skip


@on_ranks(1, 3, long=(2,))
def test_gradients_are_what_they_are_for_torch() -> None:
    for change in GRADIENTS:
        trained = _Trained()
        trained.both(change)
        oracle.assert_same_grads(trained.model, trained.plain)
        trained.step()
        oracle.assert_same_weights(trained.model, trained.plain)
        assert all(p.grad is None for p in trained.model.parameters())
    for options in ({"foreach": True}, {"foreach": False}, {"norm_type": 1.0}, {"norm_type": float("inf")}):
        trained = _Trained(
            build=lambda: oracle.pair(
                lambda names: (
                    nn.Linear(6, 90) if names.Module is nn.Module else bmt.BMTrainModelWrapper(nn.Linear(6, 90))
                )
            )
        )
        trained.both(lambda model, options=options: clip_norm(model, **options))
        oracle.assert_same_grads(trained.model, trained.plain)
    for options in ({}, {"foreach": True}, {"foreach": False}):
        trained = _Trained()
        trained.both(
            lambda model, options=options: torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3, **options)
        )
        oracle.assert_same_grads(trained.model, trained.plain)
        trained.step()
        trained.backward(1)
        oracle.assert_same_grads(trained.model, trained.plain)


@on_ranks(1, 2)
def test_gradients_that_are_held_keep_their_values() -> None:
    trained = _Trained()
    held = [[p.grad for p in m.parameters()] for m in (trained.model, trained.plain)]
    assert_alike(*held, "as taken")
    trained.backward(1)
    assert_alike(*held, "with another backward's added")
    trained.step()
    trained.backward(2)
    assert_alike(*held, "cleared since")
    oracle.assert_same_grads(trained.model, trained.plain)


class Expert(nn.Module):
    """Of two experts, ranks use one each."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 40) for _ in range(2)])
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor, which: int) -> torch.Tensor:
        return self.experts[which](x)  # type: ignore[no-any-return]


@on_ranks(2)
def test_all_ranks_see_a_gradient_that_one_of_them_made() -> None:
    model = bmt.BMTrainModelWrapper(Expert())
    assert all(p.grad is None for p in model.parameters())
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5))
    manager.backward(model(torch.ones(2, 6), bmt.rank()).sum())
    assert all((p.grad is None) == (n == "unused") for n, p in model.named_parameters())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    expected = {n: bmt.gather_grad(p) for n, p in model.named_parameters()}
    assert abs(sum(float(g.norm()) ** 2 for g in expected.values() if g is not None) ** 0.5 - 1e-2) < 1e-5
    assert norm > 1 and model.unused.grad is None
    model.experts[0].weight.grad = None
    assert model.experts[0].weight.grad is None and model.experts[1].weight.grad is not None
    before = model.experts[0].weight.gather()
    manager.step()
    assert torch.equal(model.unused.gather(), torch.ones(3)), "no rank has a gradient: it is not even decayed"
    assert torch.equal(model.experts[0].weight.gather(), before)


@on_ranks(2)
def test_gradients_of_low_precision_are_shown_in_fp32() -> None:
    model = bmt.BMTrainModelWrapper(nn.Linear(6, 90)).bfloat16()
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    manager.backward(model(torch.ones(2, 6, dtype=torch.bfloat16)).float().square().mean())
    grad = model.weight.grad
    assert grad.dtype == torch.float32 and torch.equal(grad.full_tensor(), bmt.gather_grad(model.weight))
    before = model.weight.gather()
    manager.step()
    assert not torch.equal(model.weight.gather(), before)
    model.weight.data.copy_(before)  # the fp32 master follows
    assert torch.equal(model.weight.gather(), before)
    model.weight.data.clamp_(-0.01, 0.01)
    manager.zero_grad()
    manager.backward(model(torch.zeros(2, 6, dtype=torch.bfloat16)).float().square().mean())
    manager.step()
    assert float(model.weight.gather().abs().max()) <= 0.0101


class SAM:
    """Sharpness-aware minimisation as it goes round."""

    def __init__(self, params: Any, rho: float = 0.05) -> None:
        self.params, self.rho, self.state = list(params), rho, {}

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.norm(torch.stack([p.grad.norm(p=2).to("cpu") for p in self.params if p.grad is not None]), p=2)
        for p in self.params:
            if p.grad is None:
                continue
            self.state[p] = p.data.clone()
            p.add_(p.grad * (self.rho / (norm + 1e-12)).to(p))

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.params:
            if p.grad is not None:
                p.data = self.state[p]


@on_ranks(1, 2, 3)
def test_sharpness_aware_minimisation() -> None:
    trained = _Trained()
    for step in range(3):
        both = [SAM(m.parameters()) for m in (trained.model, trained.plain)]
        for sam in both:
            sam.first_step()
        oracle.assert_same_weights(trained.model, trained.plain)
        trained.manager.zero_grad()
        trained.sgd.zero_grad()
        trained.backward(step)
        for sam in both:
            sam.second_step()
        trained.step()
        trained.backward(step + 1)
    oracle.assert_same_weights(trained.model, trained.plain)


# -- moving averages: each takes a model and gives what updates the average and what it is -----------------------------

D = 0.9


def by_name(model: Any) -> Any:
    ema = {n: p.data.clone() for n, p in model.named_parameters()}

    def update() -> None:
        for n, p in model.named_parameters():
            ema[n].mul_(D).add_(p.data, alpha=1 - D)

    return update, lambda: ema


def detached(model: Any) -> Any:
    ema = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def update() -> None:
        for n, p in model.named_parameters():
            ema[n] = D * ema[n] + (1 - D) * p.detach()

    return update, lambda: ema


def by_index(model: Any) -> Any:
    ema = [torch.zeros_like(p) for p in model.parameters()]
    for e, p in zip(ema, model.parameters(), strict=True):
        e.copy_(p.data)

    def update() -> None:
        for i, p in enumerate(model.parameters()):
            ema[i].sub_((1.0 - D) * (ema[i] - p.data))

    return update, lambda: ema


def of_parameters(model: Any) -> Any:
    ema = copy.deepcopy([p.data for p in model.parameters()])

    @torch.no_grad()
    def update() -> None:
        for e, p in zip(ema, model.parameters(), strict=True):
            e.lerp_(p, 1 - D)

    return update, lambda: ema


def with_lists(model: Any) -> Any:
    ema = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update() -> None:
        torch._foreach_mul_(ema, D)
        torch._foreach_add_(ema, [p.data for p in model.parameters()], alpha=1 - D)
        torch._foreach_lerp_(ema, list(model.parameters()), 1 - D)

    return update, lambda: ema


def deep_copied(model: Any) -> Any:
    ema = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update() -> None:
        for e, p in zip(ema.parameters(), model.parameters(), strict=True):
            e.data.mul_(D).add_(p.data, alpha=1 - D)
        for e, p in zip(ema.parameters(), model.parameters(), strict=True):
            e.data = e.data * D + p.data * (1 - D)
        for e, p in zip(ema.parameters(), model.parameters(), strict=True):
            e.data.lerp_(p.data, 1 - D)

    return update, lambda: dict(ema.state_dict())


def averaged(model: Any) -> Any:
    ema = torch.optim.swa_utils.AveragedModel(model)
    return lambda: ema.update_parameters(model), lambda: dict(ema.module.state_dict())


def averaged_by(model: Any) -> Any:
    ema = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda e, p, n: D * e + (1 - D) * p)
    return lambda: ema.update_parameters(model), lambda: dict(ema.module.state_dict())


def averaged_by_lists(model: Any) -> Any:
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(D))
    return lambda: ema.update_parameters(model), lambda: dict(ema.module.state_dict())


def copied_through_state_dicts(model: Any) -> Any:
    ema = copy.deepcopy(model)

    @torch.no_grad()
    def update() -> None:
        for e, p in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
            e.copy_(D * e + (1 - D) * p)

    return update, lambda: dict(ema.state_dict())


def by_state_dict(model: Any) -> Any:
    ema = copy.deepcopy(dict(model.state_dict()))

    def update() -> None:
        for n, v in model.state_dict().items():
            ema[n].mul_(D).add_(v, alpha=1 - D)

    return update, lambda: ema


def adam_like(model: Any) -> Any:
    first, second = ({n: torch.zeros_like(p.data) for n, p in model.named_parameters()} for _ in range(2))

    def update() -> None:
        for n, p in model.named_parameters():
            first[n].mul_(D).add_(p.data, alpha=1 - D)
            second[n].mul_(D).addcmul_(p.data, p.data, value=1 - D)

    return update, lambda: {n: first[n] / (second[n].sqrt() + 1e-8) for n in first}


AVERAGES: list[Callable[[Any], Any]] = [
    by_name, detached, by_index, of_parameters, with_lists, deep_copied, averaged, averaged_by, averaged_by_lists,
    by_state_dict, copied_through_state_dicts, adam_like,
]  # fmt: skip


@on_ranks(1, 2)
def test_moving_averages() -> None:
    trained = _Trained()
    kept = [[average(m) for average in AVERAGES] for m in (trained.model, trained.plain)]
    for step in range(3):
        trained.step()
        for averages in kept:
            for update, _ in averages:
                update()
        trained.backward(step)
    for average, (_, ours), (_, theirs) in zip(AVERAGES, *kept, strict=True):
        assert_alike(ours(), theirs(), average.__name__)


@on_ranks(1, 2)
def test_an_average_is_swapped_in_and_out() -> None:
    for way in range(4):
        trained = _Trained()
        stores = [by_name(m) for m in (trained.model, trained.plain)]
        for (update, _), m in zip(stores, (trained.model, trained.plain), strict=True):
            with torch.no_grad():
                for p in m.parameters():
                    p.data.mul_(2)
            update()
        outs = []
        for (_, ema), m in zip(stores, (trained.model, trained.plain), strict=True):
            backup = {}
            for n, p in m.named_parameters():
                if way == 0:
                    p.data, backup[n] = ema()[n], p.data
                elif way == 1:
                    backup[n] = p.data
                    p.data = ema()[n]
                elif way == 2:
                    backup[n] = p.data.clone()
                    p.data.copy_(ema()[n])
                else:
                    backup[n] = p.detach().clone()
                    with torch.no_grad():
                        p.copy_(ema()[n])
            outs.append(m(oracle.inputs(0)).detach())
            for n, p in m.named_parameters():
                if way < 2:
                    p.data = backup[n]
                else:
                    p.data.copy_(backup[n])
        assert_alike(outs[0], outs[1], f"way {way}")
        oracle.assert_same_weights(trained.model, trained.plain)
        assert_alike(stores[0][1](), stores[1][1](), f"way {way}")
        trained.backward(1)
        trained.step()
        oracle.assert_same_weights(trained.model, trained.plain)


@on_ranks(1, 2)
def test_an_average_is_saved_and_loaded(tmp_path: Any) -> None:
    trained = _Trained()
    update, ema = by_name(trained.model)
    theirs = by_name(trained.plain)[1]()
    update()
    bmt.save_checkpoint({"ema": ema(), "step": 3, "list": [*ema().values()]}, tmp_path / "ema.pt")
    saved = torch.load(tmp_path / "ema.pt", weights_only=True)
    assert saved["step"] == 3 and all(type(v) is torch.Tensor for v in saved["ema"].values())
    assert_alike(saved["ema"], theirs, "the file")
    _, other = pair(seed=9)
    other.load_state_dict(ema())
    oracle.assert_same_weights(other, trained.plain)
    other.load_state_dict(saved["ema"])
    oracle.assert_same_weights(other, trained.plain)
    pair(seed=9)[0].load_state_dict(ema())
    bmt.save(trained.model.last, tmp_path / "last.pt")  # an ordinary module inside
    oracle.assert_close(torch.load(tmp_path / "last.pt")["weight"], trained.plain.last.weight.detach(), "last")
    other.last.load_state_dict(trained.model.last.state_dict())
    averaged_model = torch.optim.swa_utils.AveragedModel(trained.model)
    averaged_model.load_state_dict(averaged_model.state_dict())
    ours = {n: v.to(torch.get_default_device()) for n, v in saved["ema"].items()}
    for n, p in trained.model.named_parameters():  # goes on with what was read, whole
        ours[n].mul_(D).add_(p.data, alpha=1 - D)
        theirs[n].mul_(D).add_(dict(trained.plain.named_parameters())[n].data, alpha=1 - D)
    assert_alike(ours, theirs, "whole averages of parts")


@on_ranks(1, 2)
def test_averages_follow_parameters_that_freezing_has_moved() -> None:
    """Frozen after the average began: at the first step parameters come to lie elsewhere."""
    plain, model = pair()
    stores = [by_name(m) for m in (model, plain)]
    held = [m.first.weight.data for m in (model, plain)]
    for m in (model, plain):
        m.first.bias.requires_grad_(False)
        m.norm.weight.requires_grad_(False)
    trained = _Trained(build=lambda: (plain, model))
    trained.step()
    for update, _ in stores:
        update()
        update()
    assert_alike(stores[0][1](), stores[1][1](), "averages")
    for tensor in held:
        tensor.mul_(0.5)
    assert_alike(held[0], held[1], "data that was taken before")
    oracle.assert_same_weights(model, plain)


@on_ranks(1, 2)
def test_other_idioms() -> None:
    def both(m: Any, t: Any) -> Any:
        return zip(m.parameters(), t.parameters(), strict=True)

    trained = _Trained()
    others = list(reversed(pair(seed=8)))
    for m, target in zip((trained.model, trained.plain), others, strict=True):
        for p, q in zip(m.parameters(), target.parameters(), strict=True):
            q.data.copy_(0.1 * p.data + 0.9 * q.data)  # a target network
        for p in m.parameters():
            p.data.clamp_(-0.05, 0.05)  # weight constraints
    oracle.assert_same_weights(others[0], others[1])
    facts = [
        [
            *(p.data.abs().mean().item() for p in m.parameters() if p.numel()),
            sum((p.data - q.data).pow(2).sum() for p, q in both(m, t)).sqrt().item(),
            sum(p.data.norm() ** 2 for p in m.parameters()) ** 0.5,
            any(p.data.isnan().any() for p in m.parameters()),
            max(p.data.abs().max() for p in m.parameters() if p.numel()),
            torch.nn.functional.cosine_similarity(m.first.bias.data, t.first.bias.data, dim=0),
        ]
        for m, t in zip((trained.model, trained.plain), others, strict=True)
    ]  # fmt: skip
    assert_alike(facts[0], facts[1], "facts")


@on_ranks(1, 2)
def test_under_autograd_operands_are_gathered() -> None:
    """A pull towards old values, as in continual learning, inside a forward."""

    class Pulled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 5)
            self.old: Any = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.lin(x).tanh().square().mean()
            if self.old is None:
                return out
            return out + sum((f * (p - o) ** 2).sum() for p, (o, f) in zip(self.parameters(), self.old, strict=True))

    plain, model = oracle.pair(lambda n: Pulled() if n.Module is nn.Module else bmt.BMTrainModelWrapper(Pulled()))
    for m in (plain, model):
        m.old = [(p.data.clone() * 0.5, p.data.abs() + 1) for p in m.parameters()]
    plain(oracle.inputs(0)).backward()
    bmt.optim.OptimManager().backward(model(models.share(oracle.inputs(0))))
    oracle.assert_same_grads(model, plain)
    x = torch.ones(5, 6, dtype=torch.float64, requires_grad=True)
    for like in (model.lin.weight, model.lin.weight.data):
        x.to(like).type_as(like).view_as(like).expand_as(like).sum().backward()
    assert torch.equal(x.grad, torch.full((5, 6), 2.0, dtype=torch.float64))
    with torch.inference_mode():
        assert_alike(model.lin.weight.data.norm(), plain.lin.weight.data.norm(), "in inference mode")
        assert_alike(torch.isclose(model.lin.weight.data, plain.lin.weight).all(), torch.tensor(True), "composed")


@on_ranks(1, 2)
def test_masks_in_hooks_and_after_steps() -> None:
    """Some weights stay zero: masked after steps, and their gradients on their way through autograd."""
    trained = _Trained()
    for m in (trained.model, trained.plain):
        masks = {n: (p.data.abs() > 0.05).float() for n, p in m.named_parameters()}
        for n, p in m.named_parameters():
            p.data.mul_(masks[n])
            p.register_hook(lambda grad, mask=masks[n]: grad * mask)
    trained.step()
    for step in range(2):
        trained.backward(step)
        oracle.assert_same_grads(trained.model, trained.plain)
        trained.step()
    oracle.assert_same_weights(trained.model, trained.plain)


@on_ranks(2)
def test_gradients_of_one_rank_are_no_parts() -> None:
    _, model = pair()
    sums = torch.zeros_like(model.first.weight.data)
    kept = torch.ones_like(model.last.weight.data)
    handle = model.first.weight.register_hook(sums.add_)
    with pytest.raises(ShardedAccessError, match="full_tensor"):
        bmt.optim.OptimManager().backward(oracle.mean(model(models.share(oracle.inputs(0)))))
    handle.remove()
    model.zero_grad()
    for parameter in (model.last.weight, model.norm.weight):
        parameter.register_hook(lambda grad: kept if grad.dim() > 1 else torch.zeros_like(model.norm.weight.data) + 1)
    bmt.optim.OptimManager().backward(oracle.mean(model(models.share(oracle.inputs(0)))))
    for parameter in (model.last.weight, model.norm.weight):
        assert torch.equal(bmt.gather_grad(parameter), torch.ones(parameter.shape)), "the mean of ones"


@on_ranks(1, 2, init={"precision": "bf16"})
def test_where_parameters_are_gathered_in_another_precision() -> None:
    plain, model = pair()
    for m in (plain, model):
        ema = {n: p.data.clone() for n, p in m.named_parameters()}
        for n, p in m.named_parameters():
            p.data.mul_(0.5)
            ema[n].add_(p.data, alpha=2)
        with torch.no_grad():
            for n, p in m.named_parameters():
                p.copy_(ema[n] - p.data)
    oracle.assert_same_weights(model, plain)
    assert model.first.weight.stride() == (6, 1) and model.first.weight.is_contiguous()
    assert abs(float(model.first.weight.data.norm()) - float(plain.first.weight.norm())) < 1e-5
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    manager.backward(oracle.mean(model(models.share(oracle.inputs(0)))))
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-4)
    assert all(float(bmt.gather_grad(p).abs().sum()) <= 1e-4 * p.numel() for p in model.parameters())
    manager.step()


def alone(what: str) -> str:
    engine: Any = context().engine
    engine.schedule.trace._patience = timedelta(seconds=2)
    _, model = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    x = models.share(oracle.inputs(0))
    p = model.first.weight
    ema = p.data.clone()
    for step in range(3):
        manager.zero_grad()
        manager.backward(oracle.mean(model(x)))
        manager.step()
        if bmt.rank() == 0 and step == 1:
            {
                "read": lambda: p.data.norm(),
                "write": lambda: p.data.mul_(2),
                "average": lambda: ema.mul_(0.9).add_(p.data),
            }[what]()
    return "silent"


@pytest.mark.parametrize("what", ["read", "write", "average"])
def test_what_one_rank_does_alone_is_found_out(what: str) -> None:
    with pytest.raises(RanksFailed, match="RankDivergenceError"):
        run_ranks(2, alone, what, timeout=30, fresh=True)


MIXTURES: dict[str, Callable[[Any, Any, Any, Any], Any]] = {  # w and s are on a device, v and t on the CPU
    "copied": lambda w, s, v, t: w.copy_(v),
    "copied back": lambda w, s, v, t: v.copy_(w),
    "copied to a whole one": lambda w, s, v, t: on_cpu(3, 2).copy_(w),
    "a row copied": lambda w, s, v, t: w.copy_(on_cpu(2)),
    "numbers copied": lambda w, s, v, t: s.copy_(t),
    "times a number": lambda w, s, v, t: w * on_cpu(),
    "times a number in place": lambda w, s, v, t: w.mul_(on_cpu()),
    "times a number in parts": lambda w, s, v, t: w.mul_(t),
    "numbers": lambda w, s, v, t: s * on_cpu(),
    "numbers, reversed": lambda w, s, v, t: on_cpu().double() * s,
    "numbers in parts": lambda w, s, v, t: t * s,
    "numbers in place": lambda w, s, v, t: s.lerp_(t, 0.5),
    "numbers out": lambda w, s, v, t: torch.add(s, on_cpu(), out=s),
    "numbers clamped": lambda w, s, v, t: s.clamp_(on_cpu()),
    "filled": lambda w, s, v, t: w.fill_(on_cpu()),
    "numbers filled": lambda w, s, v, t: s.fill_(t),
    "where": lambda w, s, v, t: torch.where(w > 0, w, on_cpu()),
    "plus": lambda w, s, v, t: w + v,
    "plus a whole one": lambda w, s, v, t: w.add_(on_cpu(3, 2)),
    "plus in place": lambda w, s, v, t: v.add_(w),
    "times one element": lambda w, s, v, t: w * on_cpu(1),
    "masked": lambda w, s, v, t: w.masked_fill_(v > 0, 0.0),
    "compared": lambda w, s, v, t: torch.eq(w, v),
    "lists copied": lambda w, s, v, t: torch._foreach_copy_([w, s], [v, t]),
    "lists times a number": lambda w, s, v, t: torch._foreach_mul_([w, s], on_cpu()),
    "lists added": lambda w, s, v, t: torch._foreach_add_([w], [v]),
}


def on_cpu(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="cpu")


@on_ranks(1, 2)
def test_devices_mix_as_in_torch() -> None:
    """A number on the CPU goes with everything, a copy goes anywhere, all else is refused; "meta" is the device."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.tensor(1.0))

    def outcome(mix: Callable[..., Any], *tensors: Any) -> Any:
        try:
            out = mix(*tensors)
        except RuntimeError:
            return "refused"
        return (out.device, out.dtype, out.shape) if isinstance(out, torch.Tensor) else None

    model = bmt.BMTrainModelWrapper(Net())
    with torch.no_grad():
        for what, mix in MIXTURES.items():
            plain = (on_cpu(3, 2), on_cpu())
            parts = [p.data.cpu().clone() for p in model.parameters()]
            found = outcome(mix, *(p.data.to("meta") for p in model.parameters()), *parts)
            assert found == outcome(mix, *(x.to("meta") for x in plain), *plain), what
    if bmt.world_size() > 1:
        with pytest.raises(ShardedAccessError, match="needs a tensor on meta"):
            model.weight.data.to("meta").data = on_cpu(3, 2)


@on_ranks(1, 2)
def test_a_number_is_filled_with_a_tensor() -> None:
    for start in (torch.tensor(2.0), torch.ones(3)):
        plain, model = nn.ParameterDict({"p": start.clone()}), nn.ParameterDict({"p": start.clone()})
        bmt.BMTrainModelWrapper(model)
        ours, theirs = model["p"].data, plain["p"].data
        for fill in (
            lambda x: x.fill_(torch.tensor(3.0)),
            lambda x: x.masked_fill_(x > 2, torch.tensor(5.0)),
            lambda x: x.masked_fill_(x > 9, torch.tensor(7.0)),
            lambda x: x.copy_(x.masked_fill(x > 2, torch.tensor(4.0))),
            lambda x: x.copy_(torch.fill(x, torch.tensor(8.0))),
            lambda x: x.fill_(x.max()),
        ):
            fill(ours)
            fill(theirs)
            assert_alike(model["p"].gather(), plain["p"].detach(), "filled")
