"""DeepSpeed's documented behaviour for one process, in plain torch: what converted scripts are compared with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler


class WarmupLR:
    """The rate rises from the lowest to the highest, and then stays; the first step has the lowest, too."""

    def __init__(self, optimizer: Any, warmup_max_lr: float, warmup_min_lr: float = 0.0, **told: Any) -> None:
        self.optimizer, self.least, self.most = optimizer, warmup_min_lr, warmup_max_lr
        self.warm = max(2, told.get("warmup_num_steps", 1000))
        self.linear = told.get("warmup_type", "log") == "linear"
        self.done = -1
        self._set(self.least)

    def _set(self, rate: float) -> None:
        self._last = [rate for _ in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def step(self) -> None:
        self.done += 1
        rising = self.done / self.warm if self.linear else math.log(self.done + 1) / math.log(self.warm)
        part = rising if self.done < self.warm else self.behind()
        self._set(self.least + (self.most - self.least) * part)

    def behind(self) -> float:
        return 1.0

    def get_last_lr(self) -> list[float]:
        return self._last

    def state_dict(self) -> dict[str, int]:
        return {"last_batch_iteration": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["last_batch_iteration"]


class WarmupDecayLR(WarmupLR):
    """Then the rate falls to 0 along a line."""

    def __init__(self, optimizer: Any, total_num_steps: int, **told: Any) -> None:
        self.total = total_num_steps
        super().__init__(optimizer, **told)

    def behind(self) -> float:
        return max(0.0, (self.total - self.done) / max(1.0, self.total - self.warm))


class Engine(torch.nn.Module):
    """A model that keeps its own steps."""

    def __init__(self, module: torch.nn.Module, config: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.told = module, config
        self.micro_steps = self.global_steps = 0
        self.local_rank = self.global_rank = 0
        self.device = torch.device("cpu")
        self.optimizer: Any = None
        self.lr_scheduler: Any = None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)

    def gradient_accumulation_steps(self) -> int:
        return int(self.told.get("gradient_accumulation_steps", 1))

    def train_micro_batch_size_per_gpu(self) -> int:
        whole = self.told.get("train_batch_size", 0) // self.gradient_accumulation_steps()
        return int(self.told.get("train_micro_batch_size_per_gpu", whole))

    def train_batch_size(self) -> int:
        return self.train_micro_batch_size_per_gpu() * self.gradient_accumulation_steps()

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.gradient_accumulation_steps()).backward()

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary():
            if self.told.get("gradient_clipping"):
                torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.told["gradient_clipping"])
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()
            self.global_steps += 1
        self.micro_steps += 1

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def save_checkpoint(self, save_dir: str, tag: Any = None, client_state: dict[str, Any] | None = None) -> None:
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        folder = Path(save_dir) / tag
        folder.mkdir(parents=True, exist_ok=True)
        states = [self.module.state_dict(), self.optimizer.state_dict()]
        states += [self.lr_scheduler.state_dict() if self.lr_scheduler is not None else {}]
        torch.save([*states, self.micro_steps, self.global_steps, client_state or {}], folder / "states.pt")
        (Path(save_dir) / "latest").write_text(tag)

    def load_checkpoint(self, load_dir: str, tag: Any = None) -> tuple[str | None, dict[str, Any] | None]:
        latest = Path(load_dir) / "latest"
        if tag is None and not latest.exists():
            return None, None
        folder = Path(load_dir) / str(latest.read_text() if tag is None else tag)
        module, optimizer, scheduler, self.micro_steps, self.global_steps, client = torch.load(folder / "states.pt")
        self.module.load_state_dict(module)
        self.optimizer.load_state_dict(optimizer)
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(scheduler)
        return str(folder), client


def initialize(
    args: Any = None,
    model: Any = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    config: Any = None,
    collate_fn: Any = None,
) -> tuple[Engine, Any, Any, Any]:
    told = json.loads(Path(config).read_text()) if isinstance(config, str) else config
    engine = Engine(model, told)
    if optimizer is None:
        numbers = dict(told["optimizer"].get("params", {}))
        decoupled = told["optimizer"]["type"] == "AdamW" or numbers.pop("adam_w_mode", True)
        kind: Any = torch.optim.AdamW if decoupled else torch.optim.Adam
        if told["optimizer"]["type"] == "SGD":
            kind = torch.optim.SGD
        else:
            numbers = {"lr": 1e-3, "weight_decay": 0.0, **numbers}
        optimizer = kind(model.parameters() if model_parameters is None else model_parameters, **numbers)
    if "scheduler" in told:
        schedule = {"WarmupLR": WarmupLR, "WarmupDecayLR": WarmupDecayLR}[told["scheduler"]["type"]]
        lr_scheduler = schedule(optimizer, **told["scheduler"]["params"])
    engine.optimizer, engine.lr_scheduler = optimizer, lr_scheduler
    loader = None
    if training_data is not None:
        size, order = engine.train_micro_batch_size_per_gpu(), DistributedSampler(training_data, 1, 0)
        loader = DataLoader(training_data, size, sampler=order, collate_fn=collate_fn)
    return engine, optimizer, loader, lr_scheduler


def add_config_arguments(parser: Any) -> Any:
    parser.add_argument("--deepspeed", action="store_true")
    parser.add_argument("--deepspeed_config", default=None)
    return parser


def init_distributed(dist_backend: str = "nccl") -> None:
    """One process needs no others."""
