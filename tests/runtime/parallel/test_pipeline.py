"""Models whose blocks are spread over the stages of a pipeline, against the whole model in plain torch."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn

import bmtrain as bmt

WIDTH, VOCABULARY, ROWS, LENGTH = 6, 14, 8, 5


class Layer(nn.Module):
    """Mixes positions where ``mask`` (B, T) lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        scores = (x @ x.transpose(1, 2) + bias).masked_fill(~mask[:, None, :], -1e9)
        mixed = scores.softmax(-1) @ x
        return x + self.down(F.gelu(self.up(self.norm(mixed))))


class Model(nn.Module):
    """Embedding and head are tied; ``bias`` is the same for all rows, and trains."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.bias = nn.Parameter(torch.linspace(-1, 1, LENGTH * LENGTH).view(LENGTH, LENGTH))
        self.layers = layers
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x, mask = self.embedding(tokens), tokens > 2
        if hasattr(self.layers, "num_hidden"):
            x = self.layers(x, mask, self.bias)
        else:
            for layer in self.layers:
                x = layer(x, mask, self.bias)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.reshape(-1))


class Piped(bmt.DistributedModule):
    """The same in the published style."""

    def __init__(self, depth: int, recompute: bool | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.bias = nn.Parameter(torch.linspace(-1, 1, LENGTH * LENGTH).view(LENGTH, LENGTH))
        self.layers = bmt.PipelineTransformerBlockList([
            bmt.Block(Layer(), use_checkpoint=recompute, mode="PIPE") for _ in range(depth)
        ])  # fmt: skip
        self.norm = nn.LayerNorm(WIDTH)

    forward = Model.forward


def pair(depth: int = 3, recompute: bool | None = True, seed: int = 5) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    reference = Model(nn.ModuleList())
    torch.manual_seed(seed)
    embedding = nn.Embedding(VOCABULARY, WIDTH)
    reference.layers = nn.ModuleList(Layer() for _ in range(depth))
    reference.embedding = embedding
    torch.manual_seed(seed)
    model: Any = Piped(depth, recompute)
    oracle.assert_same_weights(model, reference, exact=True)
    return reference, model


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(50 + step))
    tokens[:, 0] = 5
    return tokens[:, :-1], tokens[:, 1:]


def trains(depth: int, recompute: bool | None, kind: str) -> None:
    reference, model = pair(depth, recompute)
    make = bmt.optim.AdamOptimizer if kind == "ours" else torch.optim.AdamW
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1)
    manager = bmt.optim.OptimManager(loss_scale=256.0)
    manager.add_optimizer(optimizer)
    theirs = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(3):
        for micro in range(2):
            whole = reference(*batch(2 * step + micro))
            (whole / 2).backward()
            loss = model(*(bmt.shard_batch(x) for x in batch(2 * step + micro)))
            manager.backward(loss / 2)
            oracle.assert_close(bmt.sum_loss(loss.detach()), whole.detach(), f"the loss of step {step}")
        for (name, p), (same, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
            found = bmt.gather_grad(p)
            assert name == same and found is not None and q.grad is not None, name
            oracle.assert_close(found / 256.0, q.grad, f"the gradient of {name}")
        norm = manager.clip_grad_norm(model.parameters(), 0.05)
        oracle.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.05), f"the norm of step {step}")
        manager.step()
        theirs.step()
        manager.zero_grad()
        theirs.zero_grad()
    oracle.assert_same_weights(model, reference, limit=1e-3)
    ours = optimizer.state_dict()["state"]
    for number, state in theirs.state_dict()["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            oracle.assert_close(ours[number][name], state[name], f"{name} of {number}", 1e-3)


# ranks, init_distributed's arguments, blocks, recompute, optimizer
RUNS = [
    (2, {}, 3, True, "torch's"),
    (4, {}, 2, False, "ours"),
]  # fmt: skip
MORE: list[Any] = [
    (2, {"num_micro_batches": 1}, 2, False, "ours"),
    (2, {"num_micro_batches": 8}, 3, None, "ours"),
    (4, {"shard_size": 1}, 3, True, "torch's"),
]


@pytest.mark.parametrize(
    ("ranks", "options", "depth", "recompute", "kind"),
    [*RUNS, *(pytest.param(*run, marks=pytest.mark.long) for run in MORE)],
)
def test_training_equals_the_whole_model(
    ranks: int, options: dict[str, Any], depth: int, recompute: bool | None, kind: str
) -> None:
    run_ranks(ranks, trains, depth, recompute, kind, init={"pipe_size": 2, **options})
