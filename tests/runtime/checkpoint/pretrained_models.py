"""Models as packages have them, with a method that writes their files.  Nothing here knows bmtrain."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from typing import Any

import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Pretrained(nn.Module):
    """A model as packages have them: the method writes a configuration, and tensors in files of a series."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(5, 5, bias=False)
        self.layers = nn.ModuleList([Layer() for _ in range(2)])
        self.norm = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 5, bias=False)
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.arange(3.0).bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.last(self.norm(self.first(x)))

    def save_pretrained(self, save_directory: str, files: int = 2, only: str = "", fails: bool = False) -> None:
        os.makedirs(save_directory, exist_ok=True)
        state = self.state_dict()
        state = OrderedDict((key, state[key]) for key in state if only in key)
        names = sorted(state)
        with open(f"{save_directory}/config.json", "w") as file:
            json.dump({"names": names, "class": type(self).__name__}, file)
        for number in range(files):
            part = {name: state.pop(name) for name in names[number::files]}
            torch.save(part, f"{save_directory}/model-{number + 1:05}-of-{files:05}.bin")
        if fails:
            raise ValueError("of its own")


class Hooked(Pretrained):
    """The state dict is what a hook makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_renamed)


def _renamed(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
    state[prefix + "renamed"] = state.pop(prefix + "scale")


class Own(Pretrained):
    """The state dict is what a method of the class makes."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict((f"own.{key}", value) for key, value in super().state_dict(*args, **kwargs).items())


class Prompted(Pretrained):
    """What trains is a table of prompts, which the method reads by running it."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.prompts = nn.Embedding(3, 5)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:  # type: ignore[override]
        os.makedirs(save_directory, exist_ok=True)
        torch.save({"prompts": self.prompts(torch.arange(3)).detach()}, f"{save_directory}/prompts.bin")


class Around(nn.Module):
    """As an adapter's model: not sharded itself, with a sharded model and a parameter of its own in it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.factor = inner, nn.Parameter(torch.ones(2))

    save_pretrained = Pretrained.save_pretrained


class Given(Pretrained):
    """The values may be given."""

    def save_pretrained(self, save_directory: str, state_dict: Any = None) -> None:  # type: ignore[override]
        torch.save(state_dict, save_directory)


class Tokenizer:
    """No model."""

    def save_pretrained(self, save_directory: str) -> None:
        os.makedirs(save_directory, exist_ok=True)
        with open(f"{save_directory}/words.txt", "a") as file:
            file.write("once")


class Pipeline:
    """As packages have them: models, and what is none, each in a folder of its own."""

    def __init__(self, **parts: Any) -> None:
        self.parts = list(parts)
        for name, part in parts.items():
            setattr(self, name, part)

    def save_pretrained(self, save_directory: str, fails: bool = False) -> None:
        for name in self.parts:
            getattr(self, name).save_pretrained(os.path.join(save_directory, name))
        with open(f"{save_directory}/index.json", "w") as file:
            json.dump(self.parts, file)
        if fails:
            raise ValueError("of its own")


class Listed(Pipeline):
    """Holds its parts in a dict."""

    def __init__(self, **parts: Any) -> None:
        self.parts, self.held = list(parts), parts

    def __getattr__(self, name: str) -> Any:
        return self.held[name]


class Averages:
    """As packages have them: averages of parameters, put into a new model to be written."""

    def __init__(self, parameters: Any) -> None:
        self.kept = [p.detach().clone() for p in parameters]

    def step(self, parameters: Any) -> None:
        for kept, p in zip(self.kept, parameters, strict=True):
            kept.lerp_(p.detach(), 0.5)

    def save_pretrained(self, save_directory: str) -> None:
        model = Pretrained()
        for p, kept in zip(model.parameters(), self.kept, strict=True):
            p.data.copy_(kept.data)
        model.save_pretrained(save_directory)
