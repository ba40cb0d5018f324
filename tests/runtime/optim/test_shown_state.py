"""``optimizer.state`` of torch's optimizers over sharded parameters is that of whole ones, to read and to change."""

from __future__ import annotations

import copy
import json
import pickle
from collections import defaultdict
from typing import Any

import oracle
import pytest
import torch
from ranks import on_ranks
from test_adam_view import CHANGES, build, forgets_all, gets_an_empty_one

import bmtrain as bmt
from bmtrain.context import context
from bmtrain.errors import UnsupportedError


def managed(optimizer: torch.optim.Optimizer) -> bmt.optim.OptimManager:
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(optimizer)
    return manager


def train(model: Any, manager: bmt.optim.OptimManager, step: int = 0) -> None:
    x = oracle.inputs(step).to(context().device.torch_device)
    manager.zero_grad()
    manager.backward(oracle.mean(model(x.chunk(bmt.world_size())[bmt.rank()])))
    manager.step()


@on_ranks(2)
def test_what_one_rank_keeps_is_not_shown() -> None:
    class LARS(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    self.state[p].setdefault("norm", torch.zeros_like(p)).add_(p.grad / p.grad.norm())
                    p.sub_(self.state[p]["norm"], alpha=0.01)

    model = bmt.BMTrainModelWrapper(build())
    optimizer = LARS(model.parameters())
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(optimizer, step_on="tensors")
    train(model, manager)
    state, weight = optimizer.state, model[0].weight
    for use in (
        lambda: state[weight], lambda: state.get(weight, {}), lambda: state.pop(weight, None), lambda: len(state),
        lambda: weight in state, lambda: state.setdefault(weight, {}), lambda: state.__delitem__(weight),
        lambda: state.__setitem__(weight, {}), lambda: list(state.values()), lambda: bool(state),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match="its owner"):
            use()
    assert all(state["norm"].shape == p.shape for state, p in zip(whole(optimizer), model.parameters(), strict=True))
    optimizer.state.clear()
    train(model, manager)


def whole(optimizer: torch.optim.Optimizer) -> list[Any]:
    return list(optimizer.state_dict()["state"].values())


@on_ranks(1, 2)
def test_changes_are_torchs() -> None:
    device = context().device.torch_device
    for change in CHANGES:
        plain = build().to(device)
        theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0)
        same = forgets_all if change is gets_an_empty_one else change
        model = bmt.BMTrainModelWrapper(build())
        ours = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0)
        manager = managed(ours)
        for step in range(5):
            theirs.zero_grad()
            oracle.mean(plain(oracle.inputs(step).to(device))).backward()
            theirs.step()
            train(model, manager, step)
            if step == 2:
                same(theirs, plain)
                same(ours, model)
        oracle.assert_same_weights(model, plain)


def assigns_data(optimizer: Any, model: Any) -> None:
    for p in model.parameters():
        optimizer.state[p]["exp_avg"].data = torch.full(tuple(p.shape), 0.01, device=p.device)
        optimizer.state[p]["exp_avg_sq"].data = optimizer.state[p]["exp_avg_sq"].data * 0.5


def puts_another_in_its_place(optimizer: Any, model: Any) -> None:
    kept = {p: {name: value.clone() for name, value in optimizer.state[p].items()} for p in model.parameters()}
    optimizer.state[model[0].weight]["exp_avg"].zero_()
    optimizer.state = defaultdict(dict, kept)


@on_ranks(1, 2)
@pytest.mark.parametrize("change", [assigns_data, puts_another_in_its_place])
def test_changes_of_all_of_a_state_are_torchs(change: Any) -> None:
    plain, model = build().to(context().device.torch_device), bmt.BMTrainModelWrapper(build())
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0)
    ours = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0)
    manager = managed(ours)
    for step in range(4):
        step_of_torch(theirs, plain, step)
        train(model, manager, step)
        if step == 1:
            change(theirs, plain)
            change(ours, model)
    oracle.assert_same_weights(model, plain)


def step_of_torch(optimizer: Any, model: Any, step: int) -> None:
    optimizer.zero_grad()
    oracle.mean(model(oracle.inputs(step).to(context().device.torch_device))).backward()
    optimizer.step()


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, bmt.optim.AdamOptimizer])
def test_what_dicts_do_works(kind: Any) -> None:
    model = bmt.BMTrainModelWrapper(build())
    optimizer = kind(model.parameters(), lr=1e-2)
    train(model, managed(optimizer))
    state, names = optimizer.state[model[0].weight], ["step", "exp_avg", "exp_avg_sq"]
    for made in (state.copy(), copy.copy(state), dict(state), {**state}, state | {}, {} | state):
        assert type(made) is dict and list(made) == names
        oracle.assert_close(made["exp_avg"].norm(), state["exp_avg"].norm(), "exp_avg")
    assert list(state | {"step": 7, "more": 8}) == [*names, "more"] and list({"step": 7} | state) == names
    assert len(optimizer.state.copy()) == len(optimizer.state | {}) == 4


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, bmt.optim.AdamOptimizer])
def test_states_are_dicts(kind: Any) -> None:
    model = bmt.BMTrainModelWrapper(build())
    optimizer = kind(model.parameters(), lr=1e-2)
    assert not optimizer.state and optimizer.state == {} and json.dumps(optimizer.state) == "{}"
    train(model, managed(optimizer))
    state, sums = optimizer.state[model[0].weight], {}
    assert isinstance(optimizer.state, dict) and isinstance(state, dict)
    for name, value in state.items():
        sums[name] = float(value.sum())
    assert json.loads(json.dumps(state, default=lambda value: float(value.sum()))) == sums
    assert {name: float(value.sum()) for name, value in dict(**state).items()} == sums
    assert list(reversed(state)) == [*sums][::-1] and state != {} and optimizer.state != {} and bool(state)
    assert {name: float(value.sum()) for name, value in ({} | state).items()} == sums
    other: dict[str, Any] = {}
    other.update(state)
    assert list(other) == [*sums] and sorted(other) == sorted(state) and str(state).startswith("{'step'")
    assert pickle.loads(pickle.dumps({"step": state["step"]}))["step"] == 1 and len(optimizer.state.items()) == 4
    state |= {"step": torch.tensor(5.0, device="cpu")}
    assert float(optimizer.state[model[0].weight]["step"]) == 5.0
    held = optimizer.state
    held |= {model[0].weight: {**state, "step": torch.tensor(7.0, device="cpu")}}
    assert float(optimizer.state[model[0].weight]["step"]) == 7.0
    assert state.pop("more", None) is None and state.get("more") is None and "more" not in state


@on_ranks(1, 2)
def test_copies_of_an_optimizer_whose_states_are_on_one_rank_each() -> None:
    model = bmt.BMTrainModelWrapper(build())
    first, second = (p for p in model.parameters() if p.dim() == 2)
    optimizer = torch.optim.Muon([first], lr=1e-2)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer, step_on="tensors")
    train(model, manager)
    optimizer.add_param_group({"params": [second]})
    optimizer.param_groups.reverse()  # so that a copy gives each of them to another rank
    train(model, manager, 1)
    other, copied = copy.deepcopy((model, optimizer))
    again = managed(copied)
    alone = copy.deepcopy(optimizer)
    managed(alone)
    for one in (copied, alone):
        for state, same in zip(whole(one), whole(optimizer), strict=True):
            assert torch.equal(state["momentum_buffer"], same["momentum_buffer"])
    train(model, manager, 2)
    train(other, again, 2)
    oracle.assert_same_weights(other, model)


@on_ranks(1, 2)
def test_copies_show_whole_states() -> None:
    model = bmt.BMTrainModelWrapper(build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, managed(optimizer))
    expected = whole(optimizer)
    other, copied = copy.deepcopy((model, optimizer))
    alone = copy.deepcopy(optimizer)
    for found in (list(copied.state.values()), list(alone.state.values()), whole(alone)):
        for state, one in zip(found, expected, strict=True):
            oracle.assert_close(state["exp_avg"].sum(), one["exp_avg"].sum(), "exp_avg")
            assert state["exp_avg"].shape == one["exp_avg"].shape
    optimizer.state.clear()
    train(other, managed(copied))
    assert [float(state["step"]) for state in whole(copied)] == [2.0] * 4


@on_ranks(2)
def test_the_state_of_an_optimizer_that_steps_in_another_way_is_refused() -> None:
    model = bmt.BMTrainModelWrapper(build())
    matrices = [p for p in model.parameters() if p.dim() == 2]
    muon = torch.optim.Muon(matrices, lr=1e-2)
    train(model, managed(muon))
    for other in (torch.optim.Muon(matrices, lr=1e-2), torch.optim.SGD(matrices, lr=1e-2)):
        other.state = muon.state
        with pytest.raises(UnsupportedError, match="load_state_dict"):
            managed(other)


@on_ranks(1, 2)
def test_another_optimizer_goes_on_with_the_same_state() -> None:
    plain, model = build().to(context().device.torch_device), bmt.BMTrainModelWrapper(build())
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2, eps=1e-4)
    ours = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    manager = managed(ours)
    for step in range(4):
        step_of_torch(theirs, plain, step)
        train(model, manager, step)
        if step == 1:
            first = theirs, ours
            theirs = torch.optim.AdamW(plain.parameters(), lr=2e-2, eps=1e-4)
            ours = torch.optim.AdamW(model.parameters(), lr=2e-2, eps=1e-4)
            theirs.state, ours.state = first[0].state, first[1].state
            manager = managed(ours)
    oracle.assert_same_weights(model, plain)


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", ["AdamW", "Muon"])
def test_hooks_of_a_step_see_whole_values(kind: str) -> None:
    plain, model = build().to(context().device.torch_device), bmt.BMTrainModelWrapper(build())
    seen: list[list[Any]] = []
    for trained in (plain, model):
        matrices = [p for p in trained.parameters() if p.dim() == 2]
        optimizer = getattr(torch.optim, kind)(matrices, lr=1e-2)
        found: list[Any] = []

        def before(_: Any, args: Any, kwargs: Any, found: Any = found, matrices: Any = matrices) -> None:
            found.extend((len(args), len(kwargs), float(torch.nn.utils.clip_grad_norm_(matrices, 1e-3))))

        def after(optimizer: Any, *_: Any, found: Any = found, matrices: Any = matrices) -> None:
            found.extend(float(value) for p in matrices for value in (p.detach().norm(), p.grad.norm(), p.shape[1]))
            if kind == "AdamW":
                found.extend(float(state["exp_avg"].abs().sum()) for state in optimizer.state.values())

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        if trained is plain:
            step_of_torch(optimizer, plain, 0)
        else:
            train(model, managed(optimizer))
        seen.append(found)
    assert seen[1] == pytest.approx(seen[0], rel=1e-4)
    oracle.assert_same_weights(model, plain)


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", ["Adam", "SGD", "Adagrad", "RMSprop", "ASGD"])
def test_readings_are_of_whole_states(kind: str) -> None:
    model = bmt.BMTrainModelWrapper(build())
    options = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-2, **options)
    manager = managed(optimizer)
    assert len(optimizer.state) == (4 if kind == "Adagrad" else 0)
    train(model, manager)
    copied = [copy.deepcopy(optimizer.state_dict()) for _ in range(2)][1]  # making one changes nothing of what is shown
    again = getattr(torch.optim, kind)(model.parameters(), lr=1e-2, **options)
    managed(again)
    again.load_state_dict(copied)
    for shown in (optimizer, again):
        assert len(shown.state) == 4 and len(list(shown.state.items())) == 4
        for number, p in enumerate(model.parameters()):
            state, expected = shown.state[p], copied["state"][number]
            assert list(state) == list(expected) and state.keys() == expected.keys()
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim():
                    assert value.shape == p.shape
                    oracle.assert_close(value.norm().cpu(), expected[name].norm(), name)
                    oracle.assert_close(value.sum().cpu(), expected[name].sum(), name)
                else:
                    assert value == expected[name]


class ScheduleFree(torch.optim.Optimizer):
    """Has a second place for parameters, to which ``eval`` moves them and ``train`` back."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "steps": 0})

    @torch.no_grad()
    def move(self, weight: float) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.lerp_(end=self.state[p]["z"], weight=weight)

    def eval(self) -> None:
        self.move(1 - 1 / 0.9)

    def train(self) -> None:
        self.move(1 - 0.9)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    z, share = self.state[p].setdefault("z", p.clone()), 1 / (group["steps"] + 1)
                    p.lerp_(end=z, weight=share).add_(p.grad, alpha=group["lr"] * (0.9 * (1 - share) - 1))
                    z.sub_(p.grad, alpha=group["lr"])
            group["steps"] += 1


@on_ranks(1, 2)
@pytest.mark.parametrize("step_on", [None, "shards", "whole", "tensors"])
def test_methods_beside_step_see_whole_states(step_on: Any) -> None:
    plain = build().to(context().device.torch_device)
    model = bmt.BMTrainModelWrapper(build())
    theirs, ours = ScheduleFree(plain.parameters()), ScheduleFree(model.parameters())
    manager = bmt.optim.OptimManager(loss_scale=None)
    manager.add_optimizer(ours, step_on=step_on)
    if step_on == "tensors" and bmt.world_size() > 1:
        with pytest.raises(UnsupportedError, match="its owner"):
            ours.train()
        return
    for step in range(4):
        theirs.train()
        ours.train()
        theirs.zero_grad()
        oracle.mean(plain(oracle.inputs(step).to(context().device.torch_device))).backward()
        theirs.step()
        train(model, manager, step)
        theirs.eval()
        ours.eval()
        oracle.assert_same_weights(model, plain)
