"""Optimizers that look beyond an element, against the same in plain torch on the whole batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import models
import oracle
import pytest
import torch
from ranks import on_ranks, run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.optim.step_on import choose

Make = Callable[[list[Any]], torch.optim.Optimizer]


class Stepper(torch.optim.Optimizer):
    """What the classes below have in common."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group)

    def update(self, p: Any, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class LARS(Stepper):
    def update(self, p: Any, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        trust = 0.1 * p.norm() / (g.norm() + 1e-6) if p.dim() > 1 else 1.0
        momentum = state.setdefault("momentum", torch.zeros_like(p))
        momentum.mul_(0.9).add_(g * trust)
        p.add_(momentum, alpha=-group["lr"])


class LAMB(Stepper):
    def update(self, p: Any, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(step=0, m=torch.zeros_like(p.data), v=torch.zeros_like(p.data))
        state["step"] += 1
        state["m"].lerp_(g, 0.1)
        state["v"].lerp_(g * g, 0.01)
        u = state["m"] / (1 - 0.9 ** state["step"]) / ((state["v"] / (1 - 0.99 ** state["step"])).sqrt() + 1e-3)
        p.data -= group["lr"] * p.data.norm() / u.norm() * u


class NovoGrad(Stepper):
    def update(self, p: Any, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        v = state["v"] = 0.9 * state.get("v", 0.0) + 0.1 * float(g.square().sum())
        m = state.setdefault("m", torch.zeros_like(p))
        m.mul_(0.9).add_(g / (v**0.5 + 1e-3))
        p.data = p.data - group["lr"] * m


class Shampoo(Stepper):
    """Ragged state: a list of one matrix for each dimension."""

    def update(self, p: Any, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        roots = state.setdefault("roots", [torch.eye(n) for n in g.shape])
        for dim, root in enumerate(roots):
            flat = g.transpose(0, dim).reshape(g.shape[dim], -1)
            root.add_(flat @ flat.t())
            g = torch.linalg.solve(root, flat).view(g.transpose(0, dim).shape).transpose(0, dim)
        p.sub_(g, alpha=group["lr"])


class Muon(Stepper):
    def update(self, p: Any, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        m = state.setdefault("m", torch.zeros_like(p))
        m.lerp_(g, 0.05)
        u = m / (m.norm() + 1e-3)
        if u.dim() == 2:
            for _ in range(3):
                u = 1.5 * u - 0.5 * u @ u.t() @ u
        p.add_(u, alpha=-group["lr"])


class RowMeans(Stepper):
    """Nobody knows it: a user's own."""

    def update(self, p: Any, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if g.dim() > 1:
            g = g - g.mean(dim=tuple(range(1, g.dim())), keepdim=True)
        p.add_(g, alpha=-group["lr"])


class Prodigious(Stepper):
    """One number over all tensors decides how far each goes, and is kept in the group."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        params = [p for p in group["params"] if p.grad is not None]
        moved = 0.0
        for p in params:
            start = self.state[p].setdefault("start", p.detach().clone())
            moved += float((p.grad * (start - p)).sum()) + 0.01 * float(p.grad.norm())
        group["d"] = max(group.get("d", 0.0), abs(moved))
        for p in params:
            p.add_(p.grad, alpha=-group["lr"] * (0.5 + group["d"]))


class NormedAdam(torch.optim.Adam):
    """Adam by name, with normalised gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.div_(p.grad.norm() + 1e-3)
        return super().step(closure)


class Lion(Stepper):
    def update(self, p: Any, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        momentum = state.setdefault("momentum", torch.zeros_like(p))
        p.add_(torch.tanh(100 * (0.9 * momentum + 0.1 * g)), alpha=-group["lr"])  # its sign, without the jump
        momentum.lerp_(g, 0.01)


class CautiousLion(Lion):
    pass


CautiousLion.__name__ = "Lion"


def _cautious(self: Any, p: Any, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    p.add_(g / (g.abs().mean() + 1e-3), alpha=-group["lr"])


CautiousLion.update = _cautious  # type: ignore[method-assign]


class PlainAdam(torch.optim.AdamW):
    """Adds nothing that steps."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=1e-2, eps=1e-3)

    def describe(self) -> str:
        return "AdamW"


MAKERS: dict[str, tuple[str, Make]] = {
    "sgd": ("shards", lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9)),
    "a subclass": ("shards", PlainAdam),
    "adagrad": ("shards", lambda ps: torch.optim.Adagrad(ps, lr=0.05, initial_accumulator_value=0.1)),
    "nadam": ("shards", lambda ps: torch.optim.NAdam(ps, lr=1e-2, eps=1e-3)),
    "lion": ("shards", Lion),
    "muon": ("tensors", Muon),
    "torch's muon": ("tensors", lambda ps: torch.optim.Muon([p for p in ps if p.dim() == 2], lr=0.05)),
    "adafactor": ("tensors", lambda ps: torch.optim.Adafactor(ps, lr=0.05)),
    "lars": ("tensors", LARS),
    "lamb": ("tensors", LAMB),
    "novograd": ("tensors", NovoGrad),
    "shampoo": ("tensors", Shampoo),
    "a lion that looks around": ("tensors", CautiousLion),
    "row means": ("whole", RowMeans),
    "across tensors": ("whole", Prodigious),
    "a changed adam": ("whole", lambda ps: NormedAdam(ps, lr=1e-2, eps=1e-3)),
}


LIMITS = {"torch's muon": 2e-2}  # it rounds to bf16 on its way


def net(names: models.Names) -> Any:
    class Layer(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.norm = nn.Linear(oracle.WIDTH, oracle.WIDTH), nn.LayerNorm(oracle.WIDTH)
            self.unused = names.Parameter(torch.ones(3))
            self.frozen = names.Parameter(torch.ones(oracle.WIDTH), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(self.lin(self.norm(x))) * self.frozen

    class Model(names.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(oracle.WIDTH, oracle.WIDTH)
            self.layers = names.stack([Layer() for _ in range(2)])
            self.head = nn.Linear(oracle.WIDTH, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    return Model()


def managed(optimizer: torch.optim.Optimizer, **options: Any) -> bmt.optim.OptimManager:
    manager = bmt.optim.OptimManager()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manager.add_optimizer(optimizer, **options)
    return manager


def train(model: Any, manager: bmt.optim.OptimManager, first: int, last: int, clip: bool = True) -> None:
    for step in range(first, last):
        manager.zero_grad()
        for micro in range(2):
            x = models.share(oracle.inputs(2 * step + micro))
            manager.backward(oracle.mean(model(x.to(next(model.parameters()).dtype))) / 2)
        if clip:
            manager.clip_grad_norm(model.parameters(), 0.1)
        manager.step()


def train_plain(model: Any, optimizer: torch.optim.Optimizer, first: int, last: int, clip: bool = True) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        for micro in range(2):
            (oracle.mean(model(oracle.inputs(2 * step + micro))) / 2).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


@on_ranks(1, 2, long=(3,))
def test_steps_are_those_of_one_process() -> None:
    wrong = []
    for name, (way, make) in MAKERS.items():
        reference, model = oracle.pair(net)
        ours, theirs = make(list(model.parameters())), make(list(reference.parameters()))
        if bmt.world_size() > 1 and choose(ours, None) != way:
            wrong.append(f"{name} steps on {choose(ours, None)}")
        train(model, managed(ours), 0, 3)
        train_plain(reference, theirs, 0, 3)
        try:
            oracle.assert_same_weights(model, reference, limit=LIMITS.get(name, 3e-4))
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, wrong


def saved() -> tuple[dict[str, Any], dict[str, Any]]:
    found = {}
    for name, (_, make) in MAKERS.items():
        _, model = oracle.pair(net)
        optimizer = make(list(model.parameters()))
        train(model, managed(optimizer), 0, 2)
        found[name] = model.state_dict(), optimizer.state_dict()
    return found  # type: ignore[return-value]


def resumed(states: dict[str, Any]) -> None:
    wrong = []
    for name, (_, make) in MAKERS.items():
        reference, model = oracle.pair(net)
        optimizer, theirs = make(list(model.parameters())), make(list(reference.parameters()))
        manager = managed(optimizer)
        weights, state = states[name]
        model.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(state))  # torch's keeps the tensors it is given
        train(model, manager, 2, 4)
        reference.load_state_dict(weights)
        theirs.load_state_dict(state)  # a plain script reads it, too
        train_plain(reference, theirs, 2, 4)
        try:
            oracle.assert_same_weights(model, reference, limit=LIMITS.get(name, 3e-4))
        except (AssertionError, KeyError) as error:
            wrong.append(f"{name}: {error!r}")
    assert not wrong, wrong


@pytest.mark.parametrize(
    "before, after",
    [(2, 3), pytest.param(3, 1, marks=pytest.mark.long), pytest.param(1, 2, marks=pytest.mark.long)],
)
def test_states_are_whole_and_fit_any_number_of_ranks(before: int, after: int) -> None:
    states = run_ranks(before, saved)
    for name, (_, state) in states[0].items():
        for _, other in (rank[name] for rank in states[1:]):
            assert str(other) == str(state), f"{name}: every rank gets the same"
    run_ranks(after, resumed, states[0])


@on_ranks(2)
def test_states_lie_on_one_rank() -> None:
    _, model = oracle.pair(net)
    optimizer = LARS(model.parameters())
    train(model, managed(optimizer), 0, 1)
    kept = torch.tensor([sum(state["momentum"].numel() for state in optimizer.state.kept.values())])
    every = bmt.distributed.all_gather(kept)
    total = sum(p.numel() for n, p in model.named_parameters() if "unused" not in n and p.requires_grad)
    assert int(every.sum()) == total and int(every.max()) < 0.6 * total
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(list(model.parameters()))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@on_ranks(1, 3, long=(2,))
def test_low_precision_steps_in_fp32(dtype: torch.dtype) -> None:
    """Steps too small for the parameters' dtype add up."""

    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5, 4, dtype=dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.weight).sum()

    for make in (LARS, RowMeans):
        for rows in (torch.ones(5, 4), torch.tensor([[1.0, 2, 3, 6]] * 5)):
            model = bmt.BMTrainModelWrapper(Weight())
            optimizer = make(model.parameters(), lr=1e-4)
            manager = managed(optimizer)
            plain = nn.Parameter(torch.ones(5, 4))
            theirs = make([plain], lr=1e-4)
            for _ in range(30):
                manager.zero_grad()
                manager.backward(model(rows.to(dtype)).float())
                manager.step()
                plain.grad = rows.clone()
                theirs.step()
            oracle.assert_close(model.state_dict()["weight"].float(), plain.detach().to(dtype).float(), "weight", 1e-6)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as its usual implementation has it."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad * 0.05 / norm)
        self.zero_grad()
        closure()
        for p in params:
            p.data = self.state[p]["old"]
        self.base_optimizer.step()


@on_ranks(1, 2, long=(3,))
def test_closures() -> None:
    for make in (
        lambda ps: torch.optim.LBFGS(ps, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"),
        lambda ps: SAM(ps, torch.optim.SGD, lr=0.1),
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    ):
        reference, model = oracle.pair(net)
        optimizers = make(list(model.parameters())), make(list(reference.parameters()))
        managed(optimizers[0])
        for net_, optimizer, share in zip((model, reference), optimizers, (models.share, lambda x: x), strict=True):
            x = share(oracle.inputs(0))

            def closure(net_: Any = net_, optimizer: Any = optimizer, x: Any = x) -> torch.Tensor:
                optimizer.zero_grad()
                loss = oracle.mean(net_(x))
                loss.backward()
                return loss

            for _ in range(3):
                closure()
                optimizer.step(closure)
        oracle.assert_same_weights(model, reference, limit=1e-3)


class Measured(torch.optim.SGD):
    """Has tensors of its own where the parameters are."""

    def __init__(self, params: list[torch.Tensor], each: bool) -> None:
        super().__init__(params, lr=0.1)
        self.factors = {"one": [torch.ones((), device=params[0].device)]}
        self.param_groups[0]["each"] = torch.tensor(each, device=params[0].device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                steps = self.state[p].setdefault("steps", torch.zeros((), device=p.device)).add_(1)
                size = torch.where(group["each"], torch.ones_like(p), p.grad.norm())
                p -= group["lr"] * p.grad / size * self.factors["one"][0] / steps


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tensors_of_an_optimizers_own_are_tried_as_well(device: str) -> None:
    params = [torch.zeros(3, 4, device=device), torch.zeros(5, device=device)]
    assert choose(Measured(params, True), "shards") == "shards"
    optimizer = Measured(params, False)
    with pytest.raises(bmt.errors.ConfigurationError, match="step_on"):
        choose(optimizer, "shards")
    assert choose(optimizer, "tensors") == "tensors"
    assert optimizer.factors["one"][0].device.type == device and not optimizer.state


def test_a_trial_leaves_every_generator_as_it_is() -> None:
    before = torch.get_rng_state()
    with mock.patch.object(torch.cuda, "manual_seed_all") as seeded:
        assert choose(torch.optim.AdamW([torch.zeros(3, 4)]), None) == "shards"
    assert torch.equal(torch.get_rng_state(), before) and not seeded.called


@on_ranks(2)
def test_what_is_asked_for_is_tried_out() -> None:
    _, model = oracle.pair(net)
    params = list(model.parameters())
    for make, asked in ((RowMeans, "shards"), (LARS, "shards"), (Prodigious, "tensors"), (RowMeans, "everything")):
        with pytest.raises(bmt.errors.ConfigurationError, match="step_on"):
            managed(make(params), step_on=asked)
    with pytest.raises(bmt.errors.ConfigurationError, match="step_on"):
        managed(bmt.optim.AdamOptimizer(params), step_on="whole")
    with pytest.raises(bmt.errors.ConfigurationError, match="Sparse"):
        managed(torch.optim.SparseAdam(params))
    unknown = RowMeans(params)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        bmt.optim.OptimManager().add_optimizer(unknown)
        bmt.optim.OptimManager().add_optimizer(RowMeans(params), step_on="tensors")
        bmt.optim.OptimManager().add_optimizer(torch.optim.SGD(params))
    assert [str(w.message).split()[0] for w in seen] == (["RowMeans"] if bmt.rank() == 0 else [])


@on_ranks(2)
def test_a_step_that_raises_lets_go() -> None:
    reference, model = oracle.pair(net)

    class Once(LARS):
        fails = True

        def update(self, p: Any, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
            if self.fails:
                raise RuntimeError("once")
            super().update(p, g, state, group)

    optimizer, theirs = Once(model.parameters()), LARS(reference.parameters())
    manager = managed(optimizer, step_on="tensors")
    manager.backward(oracle.mean(model(models.share(oracle.inputs(0)))))
    with pytest.raises(RuntimeError, match="once"):
        manager.step()
    Once.fails = False
    train(model, manager, 0, 2)
    train_plain(reference, theirs, 0, 2)
    oracle.assert_same_weights(model, reference, limit=1e-4)


@on_ranks(2)
def test_groups_that_come_later() -> None:
    """What the model got to train since: the same parameters thawed, and a temperature that no module holds."""
    reference, model = oracle.pair(net)
    for make in (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), Lion):
        ours = make([model.stem.weight])
        manager = managed(ours)
        ours.add_param_group({"params": [model.head.weight, nn.Parameter(torch.zeros(1))]})
        manager.backward(oracle.mean(model(models.share(oracle.inputs(0)))))
        if make is Lion:
            with pytest.raises(bmt.errors.ConfigurationError, match="add_optimizer"):
                manager.step()
        else:
            manager.step()
            theirs = make([reference.stem.weight, reference.head.weight])
            oracle.mean(reference(oracle.inputs(0))).backward()
            theirs.step()
            oracle.assert_same_weights(model, reference)
        manager.zero_grad()
