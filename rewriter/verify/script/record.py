"""One process of a run: hooks that write down what a script does, then the script, as ``python`` would run it.

Everything goes into one stream of events, a line of json each. User code sees nothing of it: names, arguments, the
folder and ``sys.path`` are those of ``python train.py``.
"""

from __future__ import annotations

import builtins
import contextlib
import faulthandler
import importlib
import io
import json
import os
import random
import runpy
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any, TextIO
from weakref import WeakKeyDictionary

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from rewriter.verify.dropout import no_dropout
from rewriter.verify.script import digests

STACKS = getattr(signal, "SIGRTMIN", signal.SIGUSR2) + (7 if hasattr(signal, "SIGRTMIN") else 0)
"""The signal on which a process writes where it is; scripts use the lower ones."""
NOISE = 1e-6
"""An entry of a gradient below this part of the largest is rounding error; Adam makes a step of full size of it."""


class Enough(BaseException):
    """The run has shown what it was to show."""


class Stream:
    """The events of one process."""

    def __init__(self, path: str, root: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._root, self._pid = os.path.realpath(root) + os.sep, os.getpid()
        self._start = time.monotonic()

    def emit(self, kind: str, **fields: Any) -> None:
        """Write an event, with the time and the line of the project that it comes from."""
        if os.getpid() == self._pid:  # a loader's workers are no ranks
            now = round(time.monotonic() - self._start, 3)
            event = {"kind": kind, "time": now, "at": self.line(), **fields}
            os.write(self._file, json.dumps(event).encode() + b"\n")

    def line(self) -> str:
        """``train.py:12``: the innermost line of the project that is being run."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename.startswith(self._root):
                return f"{frame.f_code.co_filename.removeprefix(self._root)}:{frame.f_lineno}"
            frame = frame.f_back
        return ""

    def inside(self, path: Any) -> str:
        """The path within the project; nothing if it is elsewhere."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return ""
        full = os.path.abspath(os.fsdecode(path))
        parent = os.path.realpath(os.path.dirname(full))
        full = os.path.join(parent, os.path.basename(full))
        return full.removeprefix(self._root) if full.startswith(self._root) else ""


class Recorder:
    """What is hooked, and what is known between the hooks."""

    def __init__(self, spec: dict[str, Any], stream: Stream) -> None:
        self.spec, self.stream = spec, stream
        self._in_backward = self._in_module = self._was_autocast = False
        self._scaled: torch.Tensor | None = None
        self._losses = self._steps = 0
        self._loaders: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._optimizers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._held: dict[int, bool] = {}
        """Optimizers that a manager drives just now, and whether they have stepped."""
        self._models: WeakKeyDictionary[torch.nn.Module, None] = WeakKeyDictionary()

    def install(self) -> None:
        """Hook everything."""
        self._watch_backward()
        self._watch_loaders()
        self._watch_modules()
        self._watch_autocast()
        self._watch_files()
        register_optimizer_step_pre_hook(self._before_step)
        register_optimizer_step_post_hook(self._after_step)
        self._watch_scaling(torch.amp.GradScaler, "scale")
        if self.spec["converted"]:
            # By name: the rewriter does not depend on bmtrain; the converted code that runs here does.
            bmt: Any = importlib.import_module("bmtrain")
            self._watch_scaling(bmt.optim.OptimManager, "scale_loss")
            self._watch_manager(bmt.optim.OptimManager)
            if self.spec["part"]:
                bmt.shard_batch = lambda batch: self.cut(batch)
        if self.spec["still"]:
            no_dropout()

    # -- losses -------------------------------------------------------------------------------------------------------

    def _watch_backward(self) -> None:
        of_tensor, of_autograd = torch.Tensor.backward, torch.autograd.backward

        def tensor_backward(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            with self._backward(tensor):
                of_tensor(tensor, *args, **kwargs)  # type: ignore[no-untyped-call]

        def autograd_backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            with self._backward(tensors if isinstance(tensors, torch.Tensor) else next(iter(tensors))):
                of_autograd(tensors, *args, **kwargs)

        torch.Tensor.backward = tensor_backward  # type: ignore[method-assign,assignment]
        torch.autograd.backward = autograd_backward

    @contextlib.contextmanager
    def _backward(self, loss: torch.Tensor) -> Iterator[None]:
        if self._in_backward:
            yield
            return
        if loss is not self._scaled:
            self._loss(loss)
        self._scaled = None
        self._in_backward = True
        try:
            yield
        finally:
            self._in_backward = False

    def _watch_scaling(self, owner: Any, name: str) -> None:
        """Losses are noted before they are scaled."""
        scale = getattr(owner, name)

        def scaled(scaler: Any, loss: Any) -> Any:
            if isinstance(loss, torch.Tensor):
                self._loss(loss)
            self._scaled = scale(scaler, loss)
            return self._scaled

        setattr(owner, name, scaled)

    def _loss(self, loss: torch.Tensor) -> None:
        self._losses += 1
        fields: dict[str, Any] = {}
        models = list(self._models)
        if self._losses == 1 and self.spec["world"] <= 1:
            with torch.no_grad():
                fields["initial"] = [digests.of_tensor(whole(p)) for model in models for p in model.parameters()]
        if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for model in models for m in model.modules()):
            fields["batch_norm"] = True
        if self._was_autocast or loss.element_size() < 4 or any(map(_is_low, models)):
            fields["low"] = True
        value = float(loss.detach().double().mean())
        self.stream.emit("loss", value=value, generators=digests.of_generators(), **fields)
        if self.spec["part"]:
            raise Enough

    # -- what the model gets ------------------------------------------------------------------------------------------

    def cut(self, batch: Any) -> Any:
        """The part of a batch that this run is about."""
        return digests.cut(batch, self.spec["part"]) if self.spec["part"] else batch

    def _watch_loaders(self) -> None:
        start = DataLoader.__iter__

        def watched(loader: Any) -> Any:
            number = self._loaders.setdefault(loader, len(self._loaders))
            return Delivered(start(loader), lambda batch: self._batch(number, batch))

        DataLoader.__iter__ = watched  # type: ignore[method-assign]

    def _batch(self, loader: int, batch: Any) -> Any:
        batch = self.cut(batch)
        rows, loose = digests.rows_of(batch)
        self.stream.emit(
            "batch", loader=loader, rows=rows, loose=loose, trains=torch.is_grad_enabled(),
            generators=digests.of_generators(),
        )  # fmt: skip
        return batch

    def _watch_modules(self) -> None:
        call = torch.nn.Module.__call__

        def called(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._in_module or self._in_backward or not torch.is_grad_enabled():
                return call(module, *args, **kwargs)
            self._in_module = True
            try:
                self._models.setdefault(module, None)
                rows, _ = digests.rows_of((args, kwargs))
                self.stream.emit("input", rows=rows, generators=digests.of_generators())
                return call(module, *args, **kwargs)
            finally:
                self._in_module = False

        torch.nn.Module.__call__ = called  # type: ignore[method-assign]

    def _watch_autocast(self) -> None:
        """Backward usually runs behind the block, and the loss is in single precision all the same."""
        enter: Any = torch.autocast.__enter__

        def entered(context: torch.autocast) -> Any:
            result = enter(context)
            self._was_autocast = self._was_autocast or any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
            return result

        torch.autocast.__enter__ = entered  # type: ignore[method-assign]

    # -- weights ------------------------------------------------------------------------------------------------------

    def _watch_manager(self, manager_class: Any) -> None:
        """While an optimizer of torch's steps it sees shards; before and after the manager's step all is whole."""
        step = manager_class.step

        def managed(manager: Any) -> None:
            for optimizer in manager.optimizers:
                self._record_before(optimizer, manager.loss_scale)
                self._held[id(optimizer)] = False
            step(manager)
            for optimizer in manager.optimizers:
                if self._held.pop(id(optimizer), False):
                    self._record_after(optimizer)

        manager_class.step = managed

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) not in self._held:
            self._record_before(optimizer, 1.0)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) in self._held:
            self._held[id(optimizer)] = True
        else:
            self._record_after(optimizer)

    @torch.no_grad()
    def _record_before(self, optimizer: torch.optim.Optimizer, scale: float) -> None:
        new = optimizer not in self._optimizers
        number = self._optimizers.setdefault(optimizer, len(self._optimizers))
        if new:
            self._weights(optimizer, number, "resumed" if self.spec["number"] else "initial")
        norms, largest, gradients = [], 0.0, []
        for parameter in parameters_of(optimizer):
            gradient = gradient_of(parameter)
            norms.append(None if gradient is None else float(gradient.double().norm()) / scale)
            gradients.append(gradient)
            if gradient is not None and gradient.numel():
                largest = max(largest, float(gradient.abs().max()))
        noise = [
            0 if gradient is None else int(((gradient != 0) & (gradient.abs() < NOISE * largest)).sum())
            for gradient in gradients
        ]
        rates = [float(group["lr"]) for group in optimizer.param_groups for _ in group["params"]]
        self.stream.emit("gradients", optimizer=number, norms=norms, noise=noise, rates=rates)

    @torch.no_grad()
    def _record_after(self, optimizer: torch.optim.Optimizer) -> None:
        number = self._optimizers.setdefault(optimizer, len(self._optimizers))
        self._weights(optimizer, number, "after")
        self._steps += number == 0
        if self.spec["steps"] and self._steps >= self.spec["steps"]:
            raise Enough

    def _weights(self, optimizer: torch.optim.Optimizer, number: int, when: str) -> None:
        found = [digests.of_tensor(whole(parameter)) for parameter in parameters_of(optimizer)]
        self.stream.emit("weights", optimizer=number, when=when, digests=found)

    # -- files --------------------------------------------------------------------------------------------------------

    def _watch_files(self) -> None:
        save, load = torch.save, torch.load

        def saved(value: Any, f: Any, *args: Any, **kwargs: Any) -> None:
            self._file("save", f)  # torch's own writer opens files where Python does not see it
            save(value, f, *args, **kwargs)

        def loaded(f: Any, *args: Any, **kwargs: Any) -> Any:
            if name := self.stream.inside(f):
                self.stream.emit("load", path=name)
            return load(f, *args, **kwargs)

        torch.save, torch.load = saved, loaded  # type: ignore[assignment]
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = set(mode) & set("wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)
            if writes:
                self._file("write", path)
        elif event == "os.rename":
            self._file("rename", args[1])
        elif event == "shutil.rmtree":
            self._file("remove", args[0])
        elif event == "os.mkdir":
            self._file("mkdir", args[0])

    def _file(self, how: str, path: Any) -> None:
        name = self.stream.inside(path)
        if name and "__pycache__" not in name:
            self.stream.emit("file", how=how, path=name)


class Delivered:
    """A loader's iterator; each batch passes through ``deliver``."""

    def __init__(self, inner: Any, deliver: Callable[[Any], Any]) -> None:
        self._inner, self._deliver = inner, deliver

    def __iter__(self) -> Delivered:
        return self

    def __next__(self) -> Any:
        return self._deliver(next(self._inner))

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Printed(io.TextIOWrapper):
    """Standard output, of which every line is an event, too."""

    stream: Stream
    _begun = ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self.stream.emit("print", text=line.rsplit("\r", 1)[-1])
        return super().write(text)


def _is_low(model: torch.nn.Module) -> bool:
    """Whether a model computes in low precision by its parameters' dtype."""
    return any(parameter.is_floating_point() and parameter.element_size() < 4 for parameter in model.parameters())


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """In the order of ``param_groups``."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """The value, gathered if it is sharded; then every rank must be here."""
    bmt: Any = sys.modules.get("bmtrain")
    if bmt is not None and isinstance(parameter, bmt.DistributedParameter):
        gathered: torch.Tensor = parameter.gather()
        return gathered
    return parameter


def gradient_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """The gradient, likewise."""
    bmt: Any = sys.modules.get("bmtrain")
    gradient: torch.Tensor | None
    if bmt is not None and isinstance(parameter, bmt.DistributedParameter):
        gradient = bmt.gather_grad(parameter)
    else:
        gradient = parameter.grad
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def main(spec: dict[str, Any]) -> int:
    """Run the script of ``spec``; the exit code that ``python`` would give."""
    os.chdir(spec["root"])
    stacks: TextIO = open(spec["base"] + ".stacks", "w")  # noqa: SIM115 - open as long as the process lives
    faulthandler.register(STACKS, file=stacks, all_threads=True)
    stream = Stream(spec["base"] + ".events", spec["root"])
    Printed.stream = stream
    sys.stdout = Printed(io.FileIO(1, "w", closefd=False), encoding="utf-8", line_buffering=True)
    torch.set_num_threads(1)
    _seed()
    Recorder(spec, stream).install()
    code = 0
    try:
        _run(spec["command"], spec["root"])
    except Enough:
        stream.emit("end", code=0)
        sys.stdout.flush()
        os._exit(0)  # not through the script's own end: a run that was cut short has nothing to tidy up
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        code = 1
        traceback.print_exc()
        frames = [stream.inside(f.filename) + f":{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        at = next((frame for frame in reversed(frames) if not frame.startswith(":")), "")
        stream.emit("crash", message=f"{type(error).__name__}: {error}"[:300], at=at)
    stream.emit("end", code=code)
    return code


def _seed() -> None:
    """As ``bmt.init_distributed`` does where the script sets no seed."""
    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def _run(command: list[str], root: str) -> None:
    if command[0] == "-m":
        sys.path[0] = os.path.realpath(root)
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        return
    path = os.path.realpath(command[0])
    sys.path[0] = os.path.dirname(path)
    sys.argv = command
    made = types.ModuleType("__main__")
    made.__dict__.update({"__file__": path, "__builtins__": builtins, "__cached__": None})
    sys.modules["__main__"] = made
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec")
    exec(code, made.__dict__)
