"""Differentiable collectives: values against plain arithmetic on all ranks' inputs, gradients against what they
document.
"""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

import bmtrain as bmt
from bmtrain.comm import LocalCommunicator, ops
from bmtrain.context import context
from bmtrain.errors import CommunicationError, NotInitializedError

OPS = ["sum", "avg", "max", "min", "prod"]
WORLDS = [1, 2, 3]


def input_of(rank: int, shape: tuple[int, ...] = (6, 2)) -> torch.Tensor:
    # Whole numbers with ties and zeros between ranks: reductions are exact in any order.
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(rank)).float()


def reference(op: str, stacked: torch.Tensor) -> torch.Tensor:
    reductions = {
        "sum": lambda x: x.sum(0),
        "avg": lambda x: x.mean(0),
        "max": lambda x: x.amax(0),
        "min": lambda x: x.amin(0),
        "prod": lambda x: x.prod(0),
    }
    return reductions[op](stacked)


def local_gradient(op: str, stacked: torch.Tensor, rank: int, grad: torch.Tensor) -> torch.Tensor:
    """What a rank's gradient is, given the gradient of the whole result."""
    if op == "sum":
        return grad
    if op == "avg":
        return grad / len(stacked)
    if op == "prod":
        return grad * torch.cat([stacked[:rank], stacked[rank + 1 :]]).prod(0)
    return grad * (stacked[rank] == reference(op, stacked))


# ---- on the ranks
# ------------------------------------------------------------------------------------------------------


def call(name: str, *args: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(result, its gradient on this rank, the input's gradient)."""
    x = input_of(bmt.rank()).requires_grad_()
    y = getattr(bmt.distributed, name)(x, *args)
    grad = input_of(100 + bmt.rank(), tuple(y.shape))
    y.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.detach(), input_of(bmt.rank())), "the input must stay as it was"
    return y.detach(), grad, x.grad


def transposed_input() -> list[torch.Tensor]:
    x = input_of(bmt.rank()).t()
    return [bmt.distributed.all_gather(x), bmt.distributed.all_reduce(x), bmt.distributed.broadcast(x, 1)]


def pass_on() -> list[torch.Tensor | None]:
    """Rank 0 sends to 1, 1 sends on to 2."""
    rank, received = bmt.rank(), []
    for x in (torch.arange(6.0).view(2, 3).t(), torch.tensor(True), torch.zeros(0, 4).half(), torch.tensor([2**40])):
        here = bmt.distributed.recv_activations(rank - 1) if rank > 0 else x
        if rank < bmt.world_size() - 1:
            bmt.distributed.send_activations(here, rank + 1)
        received.append(here)
    return received


def misuse() -> list[str]:
    messages = []
    for attempt in (
        lambda: bmt.distributed.all_reduce(torch.zeros(2), "median"),  # type: ignore[arg-type]
        lambda: bmt.distributed.reduce_scatter(torch.zeros(3, 2)),
        lambda: bmt.distributed.reduce_scatter(torch.tensor(1.0)),
        lambda: bmt.distributed.send_activations(torch.zeros(2, dtype=torch.complex64), 1),
    ):
        with pytest.raises(CommunicationError) as error:
            attempt()
        messages.append(str(error.value))
    return messages


def half_precision_sum() -> torch.Tensor:
    x = torch.full((5,), 1.0 + bmt.rank(), dtype=torch.bfloat16, requires_grad=True)
    y = bmt.distributed.all_reduce(x, "prod").view(-1)
    (y * y).sum().div(2).backward()
    assert x.grad is not None
    return x.grad


def losses_and_results() -> dict[str, object]:
    rank = bmt.rank()
    rows = torch.arange(12.0).view(4, 3)[:, :2]
    return {
        "number": bmt.sum_loss(1.0 + bmt.rank()),
        "average": bmt.sum_loss(torch.tensor(float(rank))),
        "sliced": bmt.gather_result(rows[rank::2]),
        "uneven": bmt.gather_result(torch.full((rank + 1, 2), rank)),
        "scalar": bmt.gather_result(torch.tensor(10 + rank)),
        "objects": bmt.store.allgather_objects({"rank": rank, "text": "x" * (rank * 10)}),
        "object": bmt.store.broadcast_object(["from", rank], bmt.config["comm"], src=1),
    }


# ---- the tests
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
def test_all_gather(world: int) -> None:
    stacked = torch.stack([input_of(rank) for rank in range(world)])
    for rank, (y, grad, x_grad) in enumerate(run_ranks(world, call, "all_gather")):
        assert torch.equal(y, stacked)
        assert torch.equal(x_grad, grad[rank])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world", WORLDS)
def test_all_reduce(world: int, op: str) -> None:
    stacked = torch.stack([input_of(rank) for rank in range(world)])
    for rank, (y, grad, x_grad) in enumerate(run_ranks(world, call, "all_reduce", op)):
        torch.testing.assert_close(y, reference(op, stacked))
        torch.testing.assert_close(x_grad, local_gradient(op, stacked, rank, grad))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world", WORLDS)
def test_reduce_scatter(world: int, op: str) -> None:
    stacked = torch.stack([input_of(rank) for rank in range(world)])
    results = run_ranks(world, call, "reduce_scatter", op)
    whole_grad = torch.cat([grad for _, grad, _ in results])
    torch.testing.assert_close(torch.cat([y for y, _, _ in results]), reference(op, stacked))
    for rank, (_, _, x_grad) in enumerate(results):
        torch.testing.assert_close(x_grad, local_gradient(op, stacked, rank, whole_grad))


@pytest.mark.parametrize("world", WORLDS)
def test_broadcast(world: int) -> None:
    root = world - 1
    results = run_ranks(world, call, "broadcast", root)
    total = sum(grad for _, grad, _ in results)
    for y, _, x_grad in results:
        assert torch.equal(y, input_of(root))
        assert torch.equal(x_grad, total)


def test_the_sum_of_a_reduce_scatter_is_the_all_reduces_gradient() -> None:
    # For a loss that is computed alike on all ranks, the documented local gradients are the true ones.
    inputs = [input_of(rank).requires_grad_() for rank in range(2)]
    loss = torch.stack(inputs).mean(0).pow(3).sum()
    expected = torch.autograd.grad(loss, inputs)
    for grad, actual in zip(expected, run_ranks(2, replicated_loss), strict=True):
        torch.testing.assert_close(actual, grad)


def replicated_loss() -> torch.Tensor:
    x = input_of(bmt.rank()).requires_grad_()
    bmt.distributed.all_reduce(x, "avg").pow(3).sum().backward()
    assert x.grad is not None
    return x.grad


def test_inputs_of_any_strides() -> None:
    inputs = [input_of(rank).t() for rank in range(2)]
    for gathered, summed, sent in run_ranks(2, transposed_input):
        assert torch.equal(gathered, torch.stack(inputs))
        assert torch.equal(summed, inputs[0] + inputs[1])
        assert torch.equal(sent, inputs[1])


def test_activations_pass_from_rank_to_rank() -> None:
    first, *others = run_ranks(3, pass_on)
    for received in others:
        for one, other in zip(received, first, strict=True):
            assert one is not None and other is not None
            assert one.dtype == other.dtype and torch.equal(one, other)


def test_the_product_in_bfloat16() -> None:
    # Rank r holds r + 1; the loss is half the squared product, so its gradient is the product times the others'.
    for rank, grad in enumerate(run_ranks(3, half_precision_sum)):
        assert torch.equal(grad, torch.full((5,), 36.0 / (rank + 1), dtype=torch.bfloat16))


def test_misuse_is_explained() -> None:
    median, rows, scalar, dtype = run_ranks(2, misuse)[0]
    assert "median" in median and "prod" in median
    assert "2 equal parts" in rows and "(3, 2)" in rows and "()" in scalar
    assert "complex64" in dtype


def test_sum_loss_averages_and_results_are_joined() -> None:
    for results in run_ranks(2, losses_and_results):
        assert results["average"] == 0.5
        assert results["number"] == 1.5
        rows = torch.arange(12.0).view(4, 3)[:, :2]
        assert torch.equal(results["sliced"], torch.cat([rows[0::2], rows[1::2]]))  # type: ignore[arg-type]
        assert torch.equal(results["uneven"], torch.tensor([[0, 0], [1, 1], [1, 1]]))  # type: ignore[arg-type]
        assert torch.equal(results["scalar"], torch.tensor([10, 11]))  # type: ignore[arg-type]
        assert results["objects"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "x" * 10}]
        assert results["object"] == ["from", 1]


def test_one_rank_alone_and_none_at_all() -> None:
    x = input_of(0).requires_grad_()
    assert torch.equal(ops.all_reduce(x, "prod", LocalCommunicator()), x)
    assert ops.all_gather(x, LocalCommunicator()).shape == (1, 6, 2)
    with pytest.raises(NotInitializedError, match="init_distributed"):
        context()
    with pytest.raises(NotInitializedError, match="init_distributed"):
        bmt.distributed.all_reduce(x)
