"""What the proof is made of: distances, inputs, nestings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from rewriter.verify.compare import compare, distance_of, first_difference
from rewriter.verify.inputs import InputsError, make_case
from rewriter.verify.phases import default_loss
from rewriter.verify.tree import leaves, map_tensors


def test_ulps_count_representable_numbers() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        one = torch.ones(3, dtype=dtype)
        up = torch.nextafter(one, one + 1) if dtype is not torch.float16 else one + torch.finfo(dtype).eps
        assert distance_of("x", one, up).ulp == 1
        assert distance_of("x", one, one.clone()).ulp == 0
    tiny = torch.tensor([torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps])
    assert distance_of("x", tiny, -tiny).ulp == 2  # zero lies between


def test_what_is_no_number_counts_too() -> None:
    nan, one = torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 1.0])
    assert distance_of("x", nan, nan.clone()).why == ""
    assert distance_of("x", nan, one).relative == math.inf
    assert distance_of("x", torch.tensor([math.inf]), torch.tensor([-math.inf])).relative == math.inf
    assert "became" in distance_of("x", one, one.double()).why
    assert "1 of 2 entries" in distance_of("x", torch.tensor([1, 2]), torch.tensor([1, 3])).why
    assert compare({"x": torch.full((2,), math.nan)}, {"x": torch.full((2,), math.nan)}, 0.0).compared == 0
    assert [d.why for d in compare({"a": 1}, {"b": 1}, 0.0).different] == [
        "only in the original",
        "only in the converted",
    ]


def test_rounding_error_of_a_zero_gradient_is_none_but_a_wrong_gradient_is_one() -> None:
    ours = {"big": torch.ones(2), "zero": torch.tensor([1e-9, -2e-9])}
    theirs = {"big": torch.ones(2), "zero": torch.tensor([-1e-9, 2e-9])}
    assert compare(ours, theirs, 1e-6).different
    assert not compare(ours, theirs, 1e-6, noise=True).different
    theirs["zero"] = torch.tensor([1e-3, 0.0])
    assert compare(ours, theirs, 1e-6, noise=True).different


def test_first_difference_follows_the_order_of_calls() -> None:
    ours = [("a", {"value": torch.ones(1)}), ("b", {"value": torch.ones(1)}), ("a", {"value": torch.zeros(1)})]
    theirs = [*ours[:2], ("a", {"value": torch.ones(1)})]
    found = first_difference(ours, theirs, 0.0)
    assert found is not None and found[0] == "a"
    assert first_difference(ours, list(ours), 0.0) is None
    found = first_difference(ours, ours[1:], 0.0)
    assert found is not None and found[0] == "a"


@dataclass
class Output:
    logits: torch.Tensor
    cache: list[tuple[torch.Tensor, torch.Tensor]]
    note: str = "x"


def test_any_nesting() -> None:
    made = Output(torch.ones(2), [(torch.zeros(1), torch.ones(1))])
    found = leaves({"out": made})
    assert found["['out'].note"] == "x"
    assert found["['out']<type>"] == "Output"
    assert torch.equal(found["['out'].cache[0][1]"], torch.ones(1))
    doubled = map_tensors(made, lambda tensor: tensor * 2)
    assert torch.equal(doubled.logits, torch.full((2,), 2.0)) and torch.equal(made.logits, torch.ones(2))
    assert float(default_loss({"loss": torch.tensor(3.0), "logits": torch.ones(2)})) == 3.0
    assert not torch.equal(default_loss(made), default_loss(doubled))


def test_a_loss_of_outputs_does_not_cancel() -> None:
    for seed in range(50):
        out = torch.randn(4, 6, 14, generator=torch.Generator().manual_seed(seed))
        assert float(default_loss(out)) > 0.5
    nothing = torch.zeros(3, requires_grad=True)  # as of a head whose weights begin at 0
    default_loss(nothing).backward()
    assert nothing.grad is not None and bool((nothing.grad != 0).all())


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(5, 2)

    def forward(self, tokens: torch.LongTensor, scale: float = 1.0) -> torch.Tensor:
        return self.table(tokens) * scale  # type: ignore[no-any-return]


def test_inputs_from_annotations() -> None:
    case = make_case(Model(), ["tokens=3x4"])
    tokens = case.kwargs["tokens"]
    assert tokens.dtype == torch.int64 and tokens.shape == (3, 4) and int(tokens.max()) < 5
    assert make_case(Model(), ["tokens=3x4:long:2"]).kwargs["tokens"].max() < 2
    with pytest.raises(InputsError, match="--shape tokens=2x8:long"):
        make_case(Model(), [])
    with pytest.raises(InputsError, match="names other, but forward takes tokens"):
        make_case(Model(), ["other=2"])
    with pytest.raises(InputsError, match="must return"):
        make_case(3, [])
    model, loss = Model(), torch.sum
    case = make_case((model, (torch.zeros(1),), {"scale": 2.0}, loss), [])
    assert case.loss is loss and case.kwargs == {"scale": 2.0} and len(case.args) == 1
