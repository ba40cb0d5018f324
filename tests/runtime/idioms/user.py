"""What conversion changes in a user's code, and nothing else: every idiom is written against a ``User``."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import models
import torch
from torch import nn
from torch.nn import functional as F

import bmtrain as bmt
from bmtrain.context import context

INPUTS, WIDTH, CLASSES, ROWS = 6, 8, 5, 12

Batch = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Layer(nn.Module):
    """A residual block."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """(rows, INPUTS) to (rows, CLASSES): a stack of residual blocks between two linear layers."""

    def __init__(
        self, layers: int = 2, width: int = WIDTH, inputs: int = INPUTS, outputs: int = CLASSES, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, width)
        self.layers = nn.ModuleList([Layer(width, dropout) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


class PlainManager:
    """A step as it is written without bmtrain."""

    def __init__(self, optimizers: Iterable[Any], schedulers: Iterable[Any]) -> None:
        self.optimizers, self.schedulers = list(optimizers), list(schedulers)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def clip_grad_norm(self, groups: Any, max_norm: float) -> torch.Tensor:
        return nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], max_norm)

    def step(self) -> None:
        for step in (*self.optimizers, *self.schedulers):
            step.step()


class User:
    """Somebody who trains: by torch alone with whole batches, or sharded with this rank's share of them.

    Attributes:
        models: all that were sharded, and their weights then.
        moved: whether an optimizer has stepped.
        losses: what was shown of each step, in order.
    """

    def __init__(self, sharded: bool, device: torch.device | str) -> None:
        self.sharded, self.device = sharded, torch.device(device)
        self.rank, self.ranks = (bmt.rank(), bmt.world_size()) if sharded else (0, 1)
        self.names = models.sharded() if sharded else models.plain()
        self.models: list[tuple[Any, dict[str, torch.Tensor]]] = []
        self.moved = False
        self.losses: list[float] = []

    # -- models
    @property
    def Module(self) -> Any:
        """The base class of converted modules."""
        return self.names.Module

    @property
    def Parameter(self) -> Any:
        """The class of converted parameters."""
        return self.names.Parameter

    def stack(self, modules: Iterable[nn.Module]) -> Any:
        """A converted ModuleList."""
        return self.names.stack(modules)

    def shard(self, model: Any) -> Any:
        """A model that is written without bmtrain, ready to train."""
        if not self.sharded:
            return model.to(self.device)
        first = {name: value.clone() for name, value in tensors(model.state_dict()).items()}
        model = bmt.BMTrainModelWrapper(model)
        self.models.append((model, first))
        return model

    def net(self, **options: Any) -> Net:
        """A ``Net`` that trains."""
        return self.shard(Net(**options))

    def gathered(self, what: Any, write: bool = False) -> Any:
        """Where converted code reads or writes whole values."""
        return bmt.gathered(what, write=write) if self.sharded else contextlib.nullcontext()

    def compile(self, model: Any, **options: Any) -> Any:
        """``torch.compile``, converted."""
        return bmt.compile(model, **options) if self.sharded else torch.compile(model, **options)

    def stored(self, value: Any) -> Any:
        """Through a file and back: ``torch.save``, converted."""
        with tempfile.TemporaryDirectory() as folder:
            shared: list[str] = [folder]
            if self.sharded:
                shared = bmt.store.allgather_objects(folder)
            path = os.path.join(shared[0], "file.pt")
            (bmt.save_checkpoint if self.sharded else torch.save)(value, path)
            read = torch.load(path, map_location="cpu", weights_only=False)
            if self.sharded:
                bmt.synchronize()
            return read

    # -- data
    def share(self, batch: Any) -> Any:
        """What this process gets of a global batch."""
        if isinstance(batch, torch.Tensor):
            batch = batch.to(self.device)
        return bmt.shard_batch(batch) if self.sharded else batch

    def loader(self, loader: Any) -> Any:
        """A loader of global batches."""
        return bmt.shard_loader(loader) if self.sharded else loader

    def randn(self, *shape: int, seed: int = 0) -> torch.Tensor:
        """The same numbers for everybody."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed)).to(self.device)

    def randint(self, high: int, *shape: int, seed: int = 0) -> torch.Tensor:
        """The same integers for everybody."""
        return torch.randint(high, shape, generator=torch.Generator().manual_seed(2000 + seed)).to(self.device)

    def batches(self, steps: int = 2, rows: int = ROWS) -> Iterator[Batch]:
        """Shares of inputs (rows, INPUTS) and classes (rows,)."""
        for step in range(steps):
            yield self.share(self.randn(rows, INPUTS, seed=step)), self.share(self.randint(CLASSES, rows, seed=step))

    def batch(self, step: int = 0) -> Batch:
        """One of them."""
        return list(self.batches(step + 1))[step]

    def own_random(self) -> Any:
        """Where converted code draws for its share alone."""
        return bmt.own_random() if self.sharded else contextlib.nullcontext()

    # -- steps
    def manage(
        self, *optimizers: Any, scheduler: Any = None, loss_scale: float | None = None, model: Any = None
    ) -> Any:
        """What drives a step, an OptimManager where sharded."""
        self.moved = True
        if not self.sharded:
            return PlainManager(optimizers, [] if scheduler is None else [scheduler])
        manager = bmt.optim.OptimManager(loss_scale=loss_scale)
        for optimizer in optimizers:
            manager.add_optimizer(optimizer, scheduler if optimizer is optimizers[0] else None)
        return manager

    def sgd(self, model: Any, lr: float = 0.1, **options: Any) -> Any:
        """A manager of SGD over a model or parameters."""
        parameters = model.parameters() if isinstance(model, nn.Module) else model
        return self.manage(torch.optim.SGD(parameters, lr=lr, **options))

    def adam(self, parameters: Any, lr: float = 1e-2, **options: Any) -> Any:
        """AdamW, converted."""
        made = bmt.optim.AdamOptimizer if self.sharded else torch.optim.AdamW
        return made(parameters, lr=lr, eps=1e-4, **({"weight_decay": 0.01} | options))

    def after_backward(
        self, model: Any, manager: Any, steps: int = 2, loss: Loss = F.cross_entropy
    ) -> Iterator[torch.Tensor]:
        """Steps whose body stands between backward and the optimizer; it gets the loss."""
        for x, y in self.batches(steps):
            manager.zero_grad()
            value = loss(model(x), y)
            manager.backward(value)
            self.losses.append(self.mean(value))
            yield value
            manager.step()

    def train(self, model: Any, manager: Any, steps: int = 2, loss: Loss = F.cross_entropy) -> Any:
        """Steps as everybody writes them; the model again."""
        for _ in self.after_backward(model, manager, steps, loss):
            pass
        return model

    def step(self, manager: Any, loss: torch.Tensor) -> None:
        """One step on this loss."""
        manager.zero_grad()
        manager.backward(loss)
        self.losses.append(self.mean(loss))
        manager.step()

    def mean_of(self, values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """A mean in a loss whose counts differ between ranks, converted."""
        if self.sharded:
            return bmt.mean(values, mask)
        return values.mean() if mask is None else (values * mask).sum() / mask.sum()

    def cross_entropy(self, **options: Any) -> Any:
        """``nn.CrossEntropyLoss``, converted."""
        return (bmt.loss.FusedCrossEntropy if self.sharded else nn.CrossEntropyLoss)(**options)

    # -- what is seen
    def mean(self, value: Any) -> float:
        """A number that is shown: the mean of the ranks' means."""
        value = value.detach() if isinstance(value, torch.Tensor) else value
        return float(bmt.sum_loss(value)) if self.sharded else float(value)

    def average(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of what the ranks have computed of their shares."""
        return bmt.distributed.all_reduce(value.detach(), "avg") if self.sharded else value

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """All ranks' rows."""
        return bmt.gather_result(rows) if self.sharded else rows.detach()

    def weights(self, model: Any) -> dict[str, torch.Tensor]:
        """The state dict's tensors."""
        return {name: value.clone() for name, value in tensors(model.state_dict()).items()}

    def grads(self, model: Any) -> dict[str, torch.Tensor | None]:
        """The whole gradient of every parameter."""
        read = bmt.gather_grad if self.sharded else lambda p: p.grad
        found = {name: read(p) for name, p in model.named_parameters()}
        return {name: None if grad is None else grad.detach().clone() for name, grad in found.items()}


def tensors(state: Any) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, on the CPU."""
    return {name: value.detach().cpu() for name, value in state.items() if isinstance(value, torch.Tensor)}


def device_of_ranks() -> torch.device:
    """Where this rank computes."""
    return context().device.torch_device
