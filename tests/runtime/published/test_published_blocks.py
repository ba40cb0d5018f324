"""Blocks and lists of blocks as published scripts make, ask and call them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.errors import ConfigurationError, UnsupportedError

WIDTH = 4


class Layer(bmt.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = bmt.DistributedParameter(
            torch.randn(WIDTH, WIDTH), init_method=bmt.ParameterInitializer(nn.init.normal_, std=0.1), group="matrices"
        )
        self.bias = bmt.DistributedParameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor, shift: Any = None) -> torch.Tensor:
        return torch.tanh(F.linear(x, self.weight) + self.bias) + (0 if shift is None else shift)


class Model(bmt.DistributedModule):
    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layers(*args, **kwargs)


def model_of(kind: Any = bmt.TransformerBlockList, **options: Any) -> Any:
    torch.manual_seed(0)
    return Model(kind([bmt.CheckpointBlock(Layer(), **options) for _ in range(3)]))


# ---- names that a module has itself come first -----------------------------------------------------------------------


class HasNamesItself(nn.Module):
    reference = "of the class"

    def __init__(self) -> None:
        super().__init__()
        self.pre_hook, self._module = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.release = 3
        self.register_buffer("_param_info", torch.ones(WIDTH))
        self.pre_module = nn.Parameter(torch.ones(WIDTH))

    def init_parameters(self) -> str:
        return "its own"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._module(self.pre_hook(x)) * self.pre_module + self._param_info * self.release  # type: ignore[no-any-return]


class HandsOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = HasNamesItself()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@on_ranks(1, 2)
def test_a_modules_own_names_come_first() -> None:
    torch.manual_seed(0)
    plain = HasNamesItself()
    torch.manual_seed(0)
    block = bmt.Block(HasNamesItself())
    x = torch.randn(2, WIDTH)
    assert torch.allclose(block(x), plain(x), atol=1e-6)
    assert (block.release, block.init_parameters(), block.reference) == (3, "its own", "of the class")
    assert list(block.state_dict()) == list(plain.state_dict())
    hands_on = bmt.Block(HandsOn())
    assert hands_on.release == 3 and hands_on._module is hands_on.inner._module
    assert not hasattr(nn.Linear(2, 2), "_storage_params") and not hasattr(block, "no such name")


# ---- what a block says -----------------------------------------------------------------------------------------------


@on_ranks(1, 2)
def test_what_a_block_says_of_its_parameters() -> None:
    model = model_of()
    block = model.layers[1]
    assert block._module is block and isinstance(block, bmt.Block) and isinstance(block, Layer)
    model(torch.randn(2, WIDTH)).sum().backward()
    infos, buffers, parameters = block._param_info, block._storage_info, block._storage_params
    assert [info["name"] for info in infos] == ["weight", "bias"]
    whole = block.state_dict()
    for info in infos:
        name, facts, part = info["name"], buffers[info["kw_name"]], parameters[info["kw_name"]]
        assert info["parameter"] is dict(block.named_parameters())[name] and info["shape"] == whole[name].shape
        start = max(0, info["offset"] - facts["begin"])
        values = part.detach()[start : start + info["end"] - info["begin"]]
        assert torch.equal(values, whole[name].reshape(-1)[info["begin"] : info["end"]].to(values.device))
        grad = bmt.gather_grad(info["parameter"])
        assert part.grad is not None and grad is not None
        assert torch.equal(part.grad[start : start + len(values)], grad.reshape(-1)[info["begin"] : info["end"]])
        assert part.numel() == facts["partition_size"] == facts["end"] - facts["begin"]
        assert facts["total"] == bmt.world_size() * facts["partition_size"]
    assert infos[0]["group"] == "matrices" and infos[1]["group"] is None
    groups = {group: [p.shape for p in parameters] for group, parameters in block.grouped_parameters()}
    assert groups == {"matrices": [(WIDTH, WIDTH)], None: [(WIDTH,)]}
    assert groups.keys() == dict(bmt.grouped_parameters(model)).keys()
    before = whole["weight"].clone()
    block.init_parameters()
    after = block.state_dict()
    assert not torch.equal(after["weight"], before) and torch.equal(after["bias"], whole["bias"])
    assert float(after["weight"].std()) < 0.5


@on_ranks(1, 2)
def test_what_is_asked_of_a_block_too_early() -> None:
    class Early(bmt.DistributedModule):
        def __init__(self) -> None:
            super().__init__()
            self.block = bmt.Block(Layer())
            with pytest.raises(ConfigurationError, match="still being built"):
                self.block._param_info  # noqa: B018

    Early()


@on_ranks(1)
def test_what_a_block_refuses() -> None:
    block = bmt.Block(Layer())
    for name, says in {
        "set_pre_module": "order", "pre_module": "layers", "next_module": "layers", "release_next_module": "release",
        "reference": "both places", "pre_hook": "gathered", "post_hook": "gathered",
    }.items():  # fmt: skip
        with pytest.raises(UnsupportedError, match=says):
            getattr(block, name)(*([block] if name in ("set_pre_module", "reference") else []))


@on_ranks(1, 2)
def test_release_between_forward_and_backward() -> None:
    x, expected = torch.randn(2, WIDTH), None
    for releases in (False, True):
        model = model_of(zero_level=2)
        loss = model(x).square().sum()
        if releases:
            for block in model.layers:
                block.release()
        loss.backward()
        grads = [bmt.gather_grad(p) for p in model.parameters()]
        if expected is not None:
            for found, theirs in zip(grads, expected, strict=True):
                assert found is not None and theirs is not None and torch.equal(found, theirs)
        expected = grads


@on_ranks(1, 2)
def test_facts_of_a_parameter() -> None:
    model = model_of()
    parameter = model.layers[0].weight
    outside = bmt.DistributedParameter(torch.zeros(3, 2), tp_mode=True, tp_split_dim=0)
    assert (outside._tp_mode, outside._tp_split_dim, outside._in_block) == (True, 0, False)
    assert (outside._start_partition, outside._end_partition) == (0, 6)
    assert parameter._original_shape == parameter._tp_original_shape == parameter.shape == (WIDTH, WIDTH)
    assert (parameter._tp_mode, parameter._tp_split_dim) == (False, -1)
    assert parameter._zero_comm is bmt.config["zero_comm"] and parameter._in_block
    assert parameter.group == parameter._group == "matrices" and parameter._init_method is not None
    whole = model.state_dict()["layers.0.weight"].clone()
    for gather in (parameter.gather, parameter.gather_all, parameter.tp_gather):
        assert torch.equal(gather().detach().cpu(), whole)
    start, end = parameter._start_partition, parameter._end_partition
    held = bmt.store.allgather_objects((start, end))
    assert held[0][0] == 0 and held[-1][1] in (whole.numel(), 0)
    assert sum(b - a for a, b in held) == whole.numel()
    # The local part is what the published `.data` was.
    data: Any = parameter.data
    local = data.part.read() if bmt.world_size() > 1 else data.reshape(-1)
    assert torch.equal(local.cpu(), whole.reshape(-1)[start:end])
    parameter._copy_data(torch.full((WIDTH, WIDTH), 2.0))
    assert torch.equal(model.state_dict()["layers.0.weight"], torch.full((WIDTH, WIDTH), 2.0))

    class Root(bmt.DistributedModule):
        def __init__(self) -> None:
            super().__init__()
            self.own = bmt.DistributedParameter(torch.zeros(2), tp_mode=True, tp_split_dim=0)
            self.block = bmt.Block(nn.Linear(2, 2))

    import copy

    root = copy.deepcopy(Root())
    assert (root.own._in_block, root.block.weight._in_block) == (False, True)
    assert (root.own._tp_mode, root.own._tp_split_dim) == (True, 0)


# ---- lists -----------------------------------------------------------------------------------------------------------


@on_ranks(1, 2)
def test_a_list_and_its_hidden_states() -> None:
    x, shift = torch.randn(2, WIDTH), torch.randn(WIDTH)
    expected = None
    for kind in (bmt.TransformerBlockList, bmt.PipelineTransformerBlockList):
        model = model_of(kind)
        out, hidden = model(x, shift, return_hidden_states=True)
        steps = [x]
        for block in model.layers:
            steps.append(block(steps[-1], shift))
        assert torch.allclose(out, steps[-1]) and torch.allclose(hidden, torch.stack(steps[:-1]))
        assert torch.allclose(model(x, shift), out) and torch.allclose(model(x, shift=shift), out)
        (out.square().sum() + hidden.sum()).backward()
        grads = [bmt.gather_grad(p) for p in model.parameters()]
        if expected is not None:
            assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))  # type: ignore[arg-type]
        expected = grads
        assert len(model.layers) == 3 and model.layers[-1] is model.layers[2] and list(model.layers[1:])


@on_ranks(1, 2)
def test_a_pipeline_of_one_stage() -> None:
    torch.manual_seed(0)
    model = Model(bmt.PipelineTransformerBlockList([bmt.Block(Layer(), mode="PIPE") for _ in range(2)]))
    x, mask = torch.randn(2, WIDTH), torch.ones(2, WIDTH)
    assert torch.equal(model(x, mask, batch_related=[0]), model(x, mask))
    assert list(model.state_dict()) == [f"layers.{i}.{n}" for i in range(2) for n in ("weight", "bias")]
    with pytest.raises(ConfigurationError, match="num_hidden"):
        bmt.PipelineTransformerBlockList([Layer()], num_hidden=0)
    with pytest.raises(ConfigurationError, match="PIPES"):
        bmt.Block(Layer(), mode="PIPES")


@on_ranks(1, 2)
def test_one_module_twice() -> None:
    """Published: the second place refers to the first's parameters; here it is the same block."""
    torch.manual_seed(0)
    layer = Layer()
    model = Model(bmt.TransformerBlockList([layer, Layer(), layer]))
    assert model.layers[0] is model.layers[2] and len(model.layers) == 3
    x = torch.randn(2, WIDTH)
    model(x).sum().backward()
    grad = bmt.gather_grad(model.layers[0].weight)
    values = {n: v.to(x.device, copy=True).requires_grad_() for n, v in model.state_dict().items()}
    out = x
    for i in (0, 1, 0):
        out = torch.tanh(F.linear(out, values[f"layers.{i}.weight"]) + values[f"layers.{i}.bias"])
    out.sum().backward()
    assert grad is not None and torch.allclose(grad, values["layers.0.weight"].grad, atol=1e-5)  # type: ignore[arg-type]


# ---- whole by hand, and recomputed -----------------------------------------------------------------------------------


@on_ranks(1, 2)
def test_whole_by_hand() -> None:
    from bmtrain.hook_func import zero_post_forward, zero_pre_backward, zero_pre_forward
    from bmtrain.zero_context import ZeroContext

    model = model_of()
    block, whole = model.layers[0], model.state_dict()["layers.0.weight"]
    zero_pre_forward(block, ())
    assert torch.equal(block.weight.detach().cpu(), whole)
    with pytest.raises(ConfigurationError, match="whole already"):
        zero_pre_forward(block, ())
    zero_post_forward(block, (), None)
    with pytest.raises(ConfigurationError, match="first"):
        zero_post_forward(block, (), None)
    with pytest.raises(UnsupportedError, match="by itself"):
        zero_pre_backward(block, ())
    context = ZeroContext(block, {})
    context.enter(0, requires_grad=True)
    F.linear(torch.ones(1, WIDTH), block.weight).sum().backward()
    context.exit(0, backward=True)
    grad = bmt.gather_grad(block.weight)
    assert grad is not None and torch.equal(grad.cpu(), torch.ones(WIDTH, WIDTH))


@on_ranks(1, 2)
def test_whole_by_hooks() -> None:
    from bmtrain.hook_func import zero_post_forward, zero_pre_forward

    grads = []
    for hooked in (False, True):
        torch.manual_seed(3)
        model = bmt.BMTrainModelWrapper(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)))
        for module in model if hooked else ():
            module.register_forward_pre_hook(zero_pre_forward)
            module.register_forward_hook(zero_post_forward)
        x = torch.ones(2, WIDTH)
        with torch.no_grad():
            model(x)
        model[2](model[0](x)).sum().backward()
        model(x).sum().backward()
        grads.append([bmt.gather_grad(p) for p in model.parameters()])
    for plain, hooked_grad in zip(*grads, strict=True):
        assert plain is not None and hooked_grad is not None and torch.allclose(plain, hooked_grad, atol=1e-6)


@on_ranks(1, 2)
def test_recomputed_functions() -> None:
    from bmtrain.checkpointing import checkpoint

    calls = []

    @checkpoint
    def mixed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x.sin() * y.exp()

    class Net(bmt.DistributedModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.block = Layer(), bmt.Block(Layer())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = checkpoint(self.layer, mixed(x, x))
            return checkpoint(lambda h: self.block(h).square(), x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Net()
    device = torch.get_default_device()
    values = {n: v.to(device, copy=True).requires_grad_() for n, v in model.state_dict().items()}
    for _ in range(2):
        calls.clear()
        x = torch.randn(2, WIDTH, requires_grad=True)
        model(x).sum().backward()
        assert len(calls) == 2  # once more in the backward
        found = {n: bmt.gather_grad(p) for n, p in model.named_parameters()}
        model.zero_grad()
        y = x.detach().clone().requires_grad_()
        out = torch.tanh(F.linear(y.sin() * y.exp(), values["layer.weight"]) + values["layer.bias"])
        out = torch.tanh(F.linear(out, values["block.weight"]) + values["block.bias"]).square()
        for value in values.values():
            value.grad = None
        out.sum().backward()
        assert torch.allclose(x.grad, y.grad, atol=1e-6)  # type: ignore[arg-type]
        for name, value in values.items():
            assert torch.allclose(found[name].cpu(), value.grad, atol=1e-5), name  # type: ignore[union-attr, arg-type]
