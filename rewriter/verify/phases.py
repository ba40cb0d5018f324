"""What is recorded of a model. The same code runs on both sides; only how they train differs (``sides``).

Every phase begins with the same weights, buffers and generator states, so a phase that fails spoils no other.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rewriter.verify.dropout import no_dropout
from rewriter.verify.inputs import Case, InputsError, make_case
from rewriter.verify.sides import Converted, Original, Side, seed_all
from rewriter.verify.tree import map_tensors, recorded, tensors

Record = dict[str, Any]
TRACE_BYTES = 2**29


class Phases:
    """One process's model and everything that is asked of it."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.seed: int = job["seed"]
        self.rank: int = job["rank"]
        self.device = torch.device(job["device"])
        self.job = job
        self.side: Side = Original() if job["side"] == "original" else Converted(job["tp_size"])
        self.case: Case

    def build(self) -> Record:
        """The model, its keys, shapes and initial values, and what will go in."""
        module, _, factory = self.job["factory"].partition(":")
        self.side.start(self.seed, self.device.type, self.job["meeting"])
        made: Any = importlib.import_module(module)
        for name in factory.split("."):
            made = getattr(made, name)
        self.case = make_case(made(), self.job["shapes"])
        model = self.case.model
        if self.job["side"] == "original":
            model.to(self.device)
        state = recorded(model.state_dict())
        self._initial = copy.deepcopy(dict(model.state_dict()))
        return {
            "keys and shapes": {k: _shape(v) for k, v in state.items() if not k.endswith("<type>")},
            "initial weights": self._on_first(state),
            "inputs": recorded((self.case.args, self.case.kwargs)),
            "unsharded": self.side.unsharded(model),
            "split": self.side.split(model),
            "files": _files_under(model, [Path(root) for root in self.job["roots"]]),
        }

    def reset(self) -> Record:
        """The initial weights again."""
        self.case.model.load_state_dict(self._initial)
        return {}

    def evaluate(self) -> Record:
        """Evaluation mode, no gradients."""
        with self._fresh(train=False), torch.no_grad():
            out, loss = self._forward(*self._inputs(False))
            return {"outputs": recorded(out), "loss": recorded(loss)}

    def gradients(self, input_grads: bool | None = None) -> Record:
        """Evaluation mode (so no dropout) with gradients, of inputs too where the model bears it.

        ``input_grads`` None: try, and tell.
        """
        if input_grads is None:
            try:
                return self.gradients(True)
            except RuntimeError as error:  # such as an input changed in place
                why = f"the original cannot be run with inputs that need gradients: {error}".splitlines()[0]
                return {**self.gradients(False), "no_input_grads": why}
        with self._fresh(train=False):
            args, kwargs = self._inputs(input_grads)
            record = self._forward_backward(args, kwargs)
            of_inputs = [t.grad for t in tensors((args, kwargs)) if t.requires_grad]
            needed = any(g is not None for g in of_inputs)
            if needed:
                record["gradients of inputs"] = recorded(of_inputs)
            record["input_grads"] = input_grads
            record["no_input_grads"] = "" if needed or not of_inputs else "the loss does not depend on them"
            return record

    def train(self, still: bool = False) -> Record:
        """Training mode: dropout and whatever else draws random numbers is on; ``still``: dropout does nothing."""
        with self._fresh(train=True), _dropout_off(still):
            record = self._forward_backward(*self._inputs(False))
            record["buffers"] = recorded({n: b for n, b in self.case.model.named_buffers() if b is not None})
            return record

    def split(self, shares: int, still: bool = False) -> Record:
        """The batch in shares: a rank takes its own, the original takes all, one after the other."""
        if not self._batch(shares):
            return {"unsplit": True}
        if self.job["side"] == "converted":
            with self._fresh(train=True), _dropout_off(still):
                return self._forward_backward(*self._share(self.rank // self.job["tp_size"], shares))
        outputs, losses = [], []
        with self._fresh(train=True), _dropout_off(still):
            for number in range(shares):
                with self._fresh(train=True, clear=False):
                    out, loss = self._forward(*self._share(number, shares))
                    self.side.backward(loss / shares)
                    outputs.append(recorded(out))
                    losses.append(recorded(loss))
            return {"outputs": outputs, "loss": losses, "gradients": self._grads()}

    def steps(self, count: int, max_norm: float, still: bool = False) -> Record:
        """Training: forward, backward, clipping and AdamW, ``count`` times. Leaves the weights changed."""
        with _dropout_off(still):
            return self._steps(count, max_norm)

    def _steps(self, count: int, max_norm: float) -> Record:
        self._clear()
        self.side.optimizer(self.case.model.parameters())
        losses, norms, first = [], [], None
        self.case.model.train()
        for number in range(count):
            seed_all(self.seed + 1 + number)
            _, loss = self._forward(*self._inputs(False))
            losses.append(float(loss.detach()))
            self.side.backward(loss)
            norms.append(self.side.step(max_norm))
            if number == 0:
                first = self._on_first(recorded(self.case.model.state_dict()))
        self._clear()
        return {
            "losses": recorded(torch.tensor(losses)),
            "gradient norms": recorded(torch.tensor(norms)),
            "weights after one": first,
            "weights": self._on_first(recorded(self.case.model.state_dict())),
        }

    def save(self, path: str) -> Record:
        """Write a checkpoint; what it holds and what the model gives with it."""
        self.side.save(self.case.model, path)
        return self.loaded()

    def load(self, path: str) -> Record:
        """Read a checkpoint of the other side."""
        self.case.model.load_state_dict(torch.load(path, map_location="cpu", weights_only=False))
        return self.loaded()

    def loaded(self) -> Record:
        """The state now, and the outputs it gives."""
        state = self._on_first(recorded(self.case.model.state_dict()))
        return {"weights": state, "outputs": self.evaluate()["outputs"]}

    def trace(self, train: bool) -> Record:
        """The output of every module, in the order in which they return."""
        calls: list[tuple[str, Any]] = []
        room = TRACE_BYTES

        def hook(name: str) -> Any:
            def note(module: Any, args: Any, output: Any) -> None:
                nonlocal room
                room -= sum(t.nbytes for t in tensors(output))
                calls.append((name, recorded(output) if room > 0 else {}))

            return note

        handles = [m.register_forward_hook(hook(n)) for n, m in self.case.model.named_modules() if n]
        try:
            with self._fresh(train=train), torch.set_grad_enabled(train):
                self._forward(*self._inputs(False))
        finally:
            for handle in handles:
                handle.remove()
        return {"calls": calls}

    # -- parts ----------------------------------------------------------------------------------------------------

    def _inputs(self, grads: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def fresh(tensor: torch.Tensor) -> torch.Tensor:
            made = tensor.detach().to(self.device, copy=True)
            return made.requires_grad_(grads and (made.is_floating_point() or made.is_complex()))

        return map_tensors(self.case.args, fresh), map_tensors(self.case.kwargs, fresh)

    def _batch(self, shares: int) -> int:
        """Size of the inputs' first dimension, if it can be split."""
        sizes = [t.shape[0] for t in tensors((self.case.args, self.case.kwargs)) if t.dim() > 0]
        return sizes[0] if sizes and sizes[0] >= shares and sizes[0] % shares == 0 else 0

    def _share(self, number: int, shares: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        batch = self._batch(shares)

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.chunk(shares)[number].clone() if tensor.dim() and tensor.shape[0] == batch else tensor

        args, kwargs = self._inputs(False)
        return map_tensors(args, cut), map_tensors(kwargs, cut)

    def _forward(self, args: Any, kwargs: Any) -> tuple[Any, torch.Tensor]:
        out = self.case.model(*args, **kwargs)
        if isinstance(out, types.GeneratorType):
            out = tuple(out)
        return out, self.case.loss(out) if self.case.loss is not None else default_loss(out)

    def _forward_backward(self, args: Any, kwargs: Any) -> Record:
        out, loss = self._forward(args, kwargs)
        record: Record = {"outputs": recorded(out), "loss": recorded(loss)}
        self.side.backward(loss)
        return {**record, "gradients": self._grads()}

    def _grads(self) -> Record:
        named = [(name, self.side.grad(p)) for name, p in self.case.model.named_parameters()]
        return self._on_first({name: leaf for name, g in named for leaf in recorded(g).values()})

    def _on_first(self, record: Record) -> Record | Any:
        return record if self.rank == 0 else None

    def _clear(self) -> None:
        for parameter in self.case.model.parameters():
            parameter.grad = None

    @contextmanager
    def _fresh(self, train: bool, clear: bool = True) -> Iterator[None]:
        model = self.case.model
        kept = [(m, k, b.clone()) for m in model.modules() for k, b in m._buffers.items() if b is not None]
        model.train(train)
        seed_all(self.seed)
        if clear:
            self._clear()
        try:
            yield
        finally:
            for module, key, value in kept:
                module._buffers[key] = value
            if clear:
                self._clear()


@contextmanager
def _dropout_off(off: bool) -> Iterator[None]:
    undo = no_dropout() if off else None
    try:
        yield
    finally:
        if undo is not None:
            undo()


def default_loss(output: Any) -> torch.Tensor:
    """The output's own loss, or itself if it is a number, or a fixed random projection of everything it holds.

    No entry of the projection is negative: where they cancel, the rounding error of each is large beside their sum.
    """
    own = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(own, torch.Tensor) and own.numel() == 1:
        return own.reshape(())
    found = [t for t in tensors(output) if t.is_floating_point()]
    found = [t for t in found if t.requires_grad] or found
    if len(found) == 1 and found[0].numel() == 1:
        return found[0].reshape(())
    generator = torch.Generator().manual_seed(0)
    if not found:
        raise InputsError(
            "the output holds no floating-point tensor to make a loss of; let the factory return a function that does, "
            "too: (model, inputs, loss)"
        )
    total = torch.zeros((), device=found[0].device)
    for tensor in found:
        weights = torch.randn(tensor.shape, generator=generator).to(tensor)
        total = total + torch.nn.functional.softplus(tensor.nan_to_num(0.0, 0.0, 0.0) * weights).mean()
    return total


def _files_under(model: torch.nn.Module, roots: list[Path]) -> list[str]:
    """The files below ``roots`` that define the classes of the model's modules."""
    found: set[str] = set()
    for kind in {base for m in model.modules() for base in type(m).__mro__}:
        try:
            file = Path(inspect.getfile(kind)).resolve()
        except (TypeError, OSError):
            continue
        found.update(str(file.relative_to(root)) for root in roots if file.is_relative_to(root))
    return sorted(found)


def _shape(leaf: Any) -> str:
    if not isinstance(leaf, torch.Tensor):
        return type(leaf).__name__
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
