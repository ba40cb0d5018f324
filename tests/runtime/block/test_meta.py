"""Models built on the meta device."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import nn

import bmtrain as bmt
from bmtrain.block.sharded import owned_units
from bmtrain.errors import ConfigurationError


def make_model(tied: bool) -> nn.Module:
    class Layer(bmt.DistributedModule):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.linear(self.norm(x))

    class Net(bmt.DistributedModule):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 6)
            self.layers = bmt.TransformerBlockList([Layer() for _ in range(3)])
            self.head = nn.Linear(6, 7, bias=False)
            if tied:
                self.head.weight = self.embed.weight
            self.apply(self._init_weights)

        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, nn.Linear) and module.out_features == 6:
                nn.init.constant_(module.weight, 0.25)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.layers(self.embed(tokens)))

    return Net()


def build_and_train(tied: bool) -> tuple[dict[str, torch.Tensor], bool, bool]:
    with torch.device("meta"):
        model = make_model(tied)
    before = model.state_dict()
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=0.1)
    model(torch.arange(6).view(2, 3)).square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    same_tensor = after["head.weight"].data_ptr() == after["embed.weight"].data_ptr()
    return before, same_tensor, not torch.equal(before["layers.0.linear.weight"], after["layers.0.linear.weight"])


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_initialised_alike_on_all_ranks(world_size: int, tied: bool) -> None:
    results = run_ranks(world_size, build_and_train, tied)
    for state, same_tensor, trained in results:
        assert trained
        assert same_tensor == tied
        assert all(torch.isfinite(value).all() for value in state.values())
        assert all((state[f"layers.{i}.linear.weight"] == 0.25).all() for i in range(3))
        assert all(torch.equal(state[f"layers.{i}.norm.weight"], torch.ones(6)) for i in range(3))
        assert all(torch.equal(state[key], results[0][0][key]) for key in state)


def build_without_initialisation() -> str:
    class Bare(bmt.DistributedModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(ConfigurationError) as error, torch.device("meta"):
        Bare()
    return str(error.value)


def build_with_lost_buffer() -> str:
    class Masked(bmt.DistributedModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("mask", torch.ones(3), persistent=False)

    with pytest.raises(ConfigurationError) as error, torch.device("meta"):
        Masked()
    return str(error.value)


def test_what_nothing_initialises_is_named() -> None:
    assert "scale" in run_ranks(1, build_without_initialisation)[0]


def test_a_lost_buffer_is_named() -> None:
    assert "mask" in run_ranks(1, build_with_lost_buffer)[0]


class Positions(nn.Module):
    """Its buffers are filled by the model, which says what it would do to a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("ids", torch.arange(4), persistent=False)
        self.register_buffer("angles", torch.ones(3), persistent=False)
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool), persistent=False)


class Model(nn.Module):
    def __init__(self, fills: str) -> None:
        super().__init__()
        self.fills, self.positions = fills, Positions()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, Positions) and "i" in self.fills:
            module.ids.copy_(torch.arange(4, device="cpu"))
        if isinstance(module, Positions) and "a" in self.fills:
            module.angles.fill_(2.0)


def buffers_that_the_model_fills() -> list[str]:
    said = []
    for fills, mask in (("", False), ("i", False), ("ia", True)):
        with torch.device("meta"):
            model = Model(fills)
        if not mask:
            del model.positions.mask
        try:
            bmt.BMTrainModelWrapper(model)
        except ConfigurationError as error:
            said.append(str(error))
    with torch.device("meta"):
        model = Model("ia")
    del model.positions.mask
    bmt.BMTrainModelWrapper(model)
    assert model.positions.ids.tolist() == [0, 1, 2, 3] and model.positions.angles.tolist() == [2.0, 2.0, 2.0]
    assert float(model.positions.linear.weight.gather().sum()) == 9.0
    return said


@pytest.mark.parametrize("world_size", [1, 2])
def test_buffers_that_the_model_fills(world_size: int) -> None:
    for said in run_ranks(world_size, buffers_that_the_model_fills):
        assert "ids, positions.angles" in said[0]
        assert "buffers positions.angles were" in said[1]
        assert "buffers positions.mask were" in said[2]


# ---- memory
# ---------------------------------------------------------------------------------------------------------------------

DEPTH, WIDTH = 20, 1024
BLOCK = 2 * WIDTH * WIDTH * 4  # bytes
SLACK = 6 * 2**20  # of allocators, and Python's own


def make_deep() -> nn.Module:
    class Layer(bmt.DistributedModule):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    class Deep(bmt.DistributedModule):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(2 * WIDTH, WIDTH)  # as large as a block
            self.layers = bmt.TransformerBlockList([Layer() for _ in range(DEPTH)])

    with torch.device("meta"):
        return Deep()


def host_memory(name: str) -> int:
    """Bytes of this process by the kernel's account: VmRSS, or its peak VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{name} is not in /proc/self/status")


def memory_of_building(device: str) -> tuple[int, int]:
    """Bytes that building took at its peak, and bytes that stay."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model = make_deep()
        kept = shard_bytes(model)
        stays = torch.cuda.memory_allocated() - before
        # Shards that NCCL allocated are not in torch's account.
        return torch.cuda.max_memory_allocated() - before + kept - stays, kept
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: a freed tensor leaves the process, as large ones do
    with torch.device("meta"):
        make_model(tied=False)  # what libraries allocate on first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = host_memory("VmRSS")
    model = make_deep()
    return host_memory("VmHWM") - before, shard_bytes(model)


def shard_bytes(model: nn.Module) -> int:
    return sum(flat.shard.nbytes for unit in owned_units(model) for flat in unit.flats)


def check_memory(world_size: int, device: str) -> None:
    for peak, shards in run_ranks(world_size, memory_of_building, device, init={"device": device}, fresh=True):
        assert shards == pytest.approx((DEPTH + 1) * BLOCK / world_size, rel=0.01)
        assert peak >= shards, "the measure sees the shards"
        assert peak - shards <= 2 * BLOCK + SLACK, f"{(peak - shards) / BLOCK:.1f} whole blocks beside the shards"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_building_holds_two_whole_blocks_at_most(world_size: int) -> None:
    check_memory(world_size, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_building_on_gpus_holds_two_whole_blocks_at_most(world_size: int) -> None:
    check_memory(world_size, "cuda")
