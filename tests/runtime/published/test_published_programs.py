"""Short programs in the published style, one for each behaviour, beside what plain torch does."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn

import bmtrain as bmt

WIDTH, ROWS = 4, 4


class Linear(bmt.DistributedModule):
    def __init__(self, std: float = 0.5) -> None:
        super().__init__()
        self.weight = bmt.DistributedParameter(
            torch.empty(WIDTH, WIDTH), init_method=bmt.ParameterInitializer(nn.init.normal_, mean=0.0, std=std)
        )
        self.bias = bmt.DistributedParameter(torch.empty(WIDTH), init_method=nn.init.zeros_)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(F.linear(x, self.weight, self.bias))
        bmt.inspect.record_tensor(x, "hidden")
        return x


class Model(bmt.DistributedModule):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = bmt.TransformerBlockList([bmt.CheckpointBlock(Linear()) for _ in range(count)])
        self.head = Linear()

    def forward(self, x: torch.Tensor, **options: Any) -> Any:
        out = self.layers(x, **options)
        return (self.head(out[0]), out[1]) if options.get("return_hidden_states") else self.head(out)


def model_of(count: int = 3) -> Model:
    torch.manual_seed(5)
    model = Model(count)
    bmt.init_parameters(model)
    return model


def plain(model: nn.Module) -> Any:
    """The same weights as ``model``, and its forward, in plain torch."""
    device = torch.get_default_device()
    values = {n: nn.Parameter(v.clone().to(device)) for n, v in model.state_dict().items()}
    count = (len(values) - 2) // 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = values
            for name, value in values.items():
                self.register_parameter(name.replace(".", "_"), value)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for prefix in [*(f"layers.{i}." for i in range(count)), "head."]:
                x = torch.tanh(F.linear(x, values[f"{prefix}weight"], values[f"{prefix}bias"]))
            return x

    return Net()


def batch(step: int) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step))


def share(x: torch.Tensor) -> torch.Tensor:
    rows = ROWS // bmt.world_size()
    return x[bmt.rank() * rows : (bmt.rank() + 1) * rows]


def assert_equal_weights(model: nn.Module, reference: Any) -> None:
    for name, value in model.state_dict().items():
        assert torch.allclose(value.cpu(), reference.values[name].detach(), atol=1e-5), name


@on_ranks(1, 2)
def test_initial_values_are_those_of_one_process() -> None:
    model = model_of()
    torch.manual_seed(5)
    for name, value in model.state_dict().items():
        expected = torch.empty_like(value)
        nn.init.normal_(expected, 0.0, 0.5) if "weight" in name else nn.init.zeros_(expected)
        assert torch.equal(value, expected), name


@on_ranks(1, 2)
def test_gradients_are_accumulated_over_backwards() -> None:
    model = model_of()
    reference = plain(model)
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2)
    manager, theirs = (
        bmt.optim.OptimManager(loss_scale=64),
        torch.optim.AdamW(reference.parameters(), 1e-2, weight_decay=0),
    )
    manager.add_optimizer(optimizer)
    for step in range(2):
        manager.zero_grad()
        theirs.zero_grad()
        for micro in range(3):
            manager.backward(model(share(batch(3 * step + micro))).square().mean() / 3)
            reference(batch(3 * step + micro)).square().mean().div(3).backward()
        manager.step()
        theirs.step()
    assert_equal_weights(model, reference)


@on_ranks(1, 2)
def test_what_trains_changes_between_steps() -> None:
    """Layers are frozen and thawed; inputs may need no gradient, or all of the first block be frozen."""
    model = model_of()
    reference = plain(model)
    optimizer, theirs = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(reference.parameters(), 0.1)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    for step, frozen in enumerate(("", "layers.0.", "layers.1.weight", "head.", "layers.", "")):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (frozen and name.startswith(frozen)))
            reference.values[name].requires_grad_(parameter.requires_grad)
        manager.zero_grad()
        theirs.zero_grad()
        manager.backward(model(share(batch(step))).square().mean())
        reference(batch(step)).square().mean().backward()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                assert bmt.gather_grad(parameter) is None, (frozen, name)
        manager.step()
        theirs.step()
        assert_equal_weights(model, reference)


@on_ranks(1, 2)
def test_hidden_states_are_inspected() -> None:
    model = model_of()
    with bmt.inspect.inspect_tensor() as inspector:
        out, hidden = model(share(batch(0)), return_hidden_states=True)
        bmt.optim.OptimManager().backward(out.sum())
    assert hidden.shape == (3, ROWS // bmt.world_size(), WIDTH)
    summary = inspector.get_summary()
    assert [entry["name"] for entry in summary] == [f"{i}.hidden" for i in range(4)]  # once each, though run twice
    reference = plain(model)
    x, outs = batch(0), []
    for prefix in ("layers.0.", "layers.1.", "layers.2.", "head."):
        x = torch.tanh(F.linear(x, reference.values[f"{prefix}weight"], reference.values[f"{prefix}bias"]))
        outs.append(x)
    for entry, value in zip(summary, outs, strict=True):
        assert entry["shape"] == (ROWS, WIDTH)
        assert entry["mean"] == pytest.approx(value.mean().item(), rel=1e-4)
        assert entry["std"] == pytest.approx(value.std().item(), rel=1e-4)
    found = inspector.get_tensor("hidden", None, 1)
    assert found is not None and torch.allclose(found, share(outs[1]), atol=1e-6)
    assert "hidden" in bmt.inspect.format_summary(summary)
    bmt.inspect.record_tensor(found, "nobody looks")
    with pytest.raises(RuntimeError):
        bmt.inspect.record_tensor(model.head.weight, "a parameter")


@on_ranks(1, 2)
def test_states_of_one_optimizer_go_on_in_another(tmp_path: Path) -> None:
    """Through a file, as rank 0 writes it; ours in host memory, ours on the device, torch's."""
    path = os.path.join(tmp_path, "optimizer.pt")
    model = model_of()
    manager = bmt.optim.OptimManager(loss_scale=32)
    first = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2)
    manager.add_optimizer(first)
    for step in range(2):
        manager.zero_grad()
        manager.backward(model(share(batch(step))).square().mean())
        manager.step()
    state = first.state_dict()
    if bmt.rank() == 0:
        torch.save(state, path)
    bmt.synchronize()
    read, weights = torch.load(path), {n: v.clone() for n, v in model.state_dict().items()}
    ends = []
    for kind in (bmt.optim.AdamOptimizer, bmt.optim.AdamOffloadOptimizer):
        model.load_state_dict(weights)
        optimizer = kind(model.parameters(), lr=1e-2)
        optimizer.load_state_dict(copy.deepcopy(read))
        other = bmt.optim.OptimManager()
        other.add_optimizer(optimizer)
        other.zero_grad()
        other.backward(model(share(batch(2))).square().mean())
        other.step()
        ends.append({n: v.clone() for n, v in model.state_dict().items()})
    model.load_state_dict(weights)
    reference = plain(model)
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0)
    theirs.load_state_dict(read)
    reference(batch(2)).square().mean().backward()
    theirs.step()
    for end in ends:
        for name, value in end.items():
            assert torch.allclose(value, reference.values[name].detach(), atol=1e-6), name


@on_ranks(1, 2)
def test_the_loss_scale_follows_overflows() -> None:
    model = model_of()
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2)
    manager = bmt.optim.OptimManager(
        loss_scale=2.0**20, loss_scale_factor=4, loss_scale_steps=2, min_loss_scale=2**10, max_loss_scale=2**21
    )
    manager.add_optimizer(optimizer, bmt.lr_scheduler.NoDecay(optimizer, 1e-2, 10, 20))
    before = {n: v.clone() for n, v in model.state_dict().items()}

    def step(factor: float) -> None:
        manager.zero_grad()
        # One rank's overflow is everybody's.
        manager.backward(model(share(batch(0))).sum() * (factor if bmt.rank() == 0 else 1.0))
        manager.step()

    step(float("inf"))
    assert (manager.loss_scale, manager.lr_schedulers[0].num_iter) == (2.0**18, 0)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    step(1.0)
    assert (manager.steps_since_last_scale, manager.lr_schedulers[0].num_iter) == (1, 1)
    step(1.0)
    assert manager.loss_scale == 2.0**20
    for _ in range(2):
        step(1.0)
    assert manager.loss_scale == 2.0**21  # not above
    for _ in range(8):
        step(float("nan"))
    assert manager.loss_scale == 2.0**10  # not below
    assert manager.loss_scale_enabled and manager.optimizers == [optimizer]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0, *, shift: Any = None) -> Any:
        return torch.tanh(self.left(a)) * scale, torch.tanh(self.right(b)) + (0 if shift is None else shift)


@on_ranks(1, 2)
def test_several_hidden_states_and_arguments_by_name() -> None:
    torch.manual_seed(1)
    net = nn.ModuleList([Pair() for _ in range(2)])
    blocks = bmt.TransformerBlockList(copy.deepcopy(list(net)), num_hidden=2)
    a, b, shift = batch(0), batch(1), torch.randn(WIDTH)
    with torch.no_grad():  # no gradient, two outputs
        blocks(a, b)
    expected = (a, b)
    for layer in net:
        expected = layer(*expected, shift=shift)
    found = blocks(a, b, shift=shift)
    assert isinstance(found, tuple) and all(
        torch.allclose(x, y, atol=1e-6) for x, y in zip(found, expected, strict=True)
    )
    sum(x.sum() for x in found).backward()
    sum(x.sum() for x in expected).backward()  # type: ignore[attr-defined]
    for ours, theirs in zip(blocks.parameters(), net.parameters(), strict=True):
        grad = bmt.gather_grad(ours)
        assert grad is not None and torch.allclose(grad, theirs.grad, atol=1e-5)  # type: ignore[arg-type]
    *out, first, second = blocks(a, b, 2.0, return_hidden_states=True)
    assert len(out) == 2 and first.shape == second.shape == (2, ROWS, WIDTH) and torch.equal(first[0], a)


@on_ranks(1, 2)
def test_a_model_of_somebody_else(tmp_path: Path) -> None:
    """``BMTrainModelWrapper``; saved, and read by the plain model."""

    def build() -> nn.Module:
        torch.manual_seed(2)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)
        return nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)})

    reference, model = build(), bmt.BMTrainModelWrapper(build())
    x = torch.randn(ROWS, 3, WIDTH)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    theirs = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(2):
        manager.zero_grad()
        theirs.zero_grad()
        manager.backward(model["encoder"](share(x)).square().mean())  # type: ignore[index]
        reference["encoder"](x).square().mean().backward()  # type: ignore[index]
        manager.step()
        theirs.step()
    path = os.path.join(tmp_path, "model.pt")
    bmt.save(model, path)
    again = build()
    again.load_state_dict(torch.load(path))
    for ours, expected in zip(again.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours, expected, atol=1e-5)


@on_ranks(1, 2)
def test_losses() -> None:
    for dtype in (torch.float32, torch.half, torch.bfloat16):
        logits = torch.randn(5, 7).to(dtype).requires_grad_()
        target = torch.tensor([1, 2, -100, 0, 6])
        plain_logits = logits.detach().float().requires_grad_()
        for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.1}):
            logits.grad = plain_logits.grad = None
            found = bmt.loss.FusedCrossEntropy(ignore_index=-100, **options)(logits, target)  # type: ignore[arg-type]
            expected = F.cross_entropy(plain_logits, target, ignore_index=-100, **options)  # type: ignore[arg-type]
            assert torch.allclose(found.float(), expected, atol=1e-3), (dtype, options)
            found.sum().backward()
            expected.sum().backward()
            assert torch.allclose(logits.grad.float(), plain_logits.grad, atol=1e-2), (dtype, options)  # type: ignore[union-attr, arg-type]
    from bmtrain.loss import _function

    flag = torch.zeros(1, dtype=torch.uint8)
    _function.has_inf_nan(torch.ones(3, dtype=torch.half), flag)
    assert not flag.item()
    _function.has_inf_nan(torch.tensor([1.0, float("nan")], dtype=torch.half), flag)
    assert flag.item()


@on_ranks(1, 2)
def test_schedules_give_the_published_rates() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)
    rates = {
        "NoDecay": [0.0, 0.5, 1.0, 1.0, 1.0], "Linear": [0.0, 0.5, 1.0, 0.5, 0.0],
        "Cosine": [0.0, 0.5, 1.0, 0.5, 0.0], "Exponential": [0.0, 0.5, 1.0, 0.95, 0.95**2],
        "Noam": [0.0, 0.5 / 2**0.5, 2**-0.5, 3**-0.5, 0.5],
    }  # fmt: skip
    for kind, expected in rates.items():
        schedule = getattr(bmt.lr_scheduler, kind)(optimizer, start_lr=1.0, warmup_iter=2, end_iter=4, num_iter=0)
        found = [optimizer.param_groups[0]["lr"]]  # set at once
        for _ in range(4):
            schedule.step()
            found.append(schedule.current_lr)
        assert found == pytest.approx(expected, abs=1e-12), kind
        again = getattr(bmt.lr_scheduler, kind)(optimizer, 5.0, 1, 9, 0)
        again.load_state_dict(schedule.state_dict())
        assert again.current_lr == found[-1] and again.get_lr() == found[-1]
