"""Where in a model infinity or NaN began: the step's forwards are run once more, with every module looked at."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..alike import on_all_ranks
from ..context import context
from ..errors import BMTrainError, NonFiniteError
from ..log import say
from ..objects import allgather_objects
from ..shard.engine import MOST_RUNS, Run, engine
from ..written import replacing
from .nonfinite import OnNonFinite, Pending
from .pieces import Home, homes_of

_ADVICE = (
    'OptimManager(nonfinite="skip") leaves such steps out, "dump" writes their batches to files before it stops, and '
    '"ignore" trains on as torch does.'
)


def stop(step: Pending, params: list[Any], how: OnNonFinite) -> NoReturn:
    """Raises NonFiniteError on every rank, with the rank, the step and the module where it began.  Collective."""
    ctx = context()
    spike = step.outcome.spike
    if spike is not None and step.spikes is not None:
        text = f"Step {step.number} is {'made' if step.is_made else 'not made'}: {step.spikes.words(spike)}."
        raise NonFiniteError(f"{text}{_dumped(step, {}) if how == 'dump' else ''} {_ADVICE}")
    own = [float(loss) for loss in step.losses]
    every = allgather_objects(own)
    bad = {rank: [x for x in theirs if not _finite(x)] for rank, theirs in enumerate(every)}
    bad = {rank: values for rank, values in bad.items() if values}
    if bad:
        what = "; ".join(f"the loss is {values[0]} on rank {rank}" for rank, values in bad.items())
    else:
        what = "a gradient is not finite, though every loss is"
    text = f"Step {step.number} {'has spoiled parameters' if step.is_made else 'is not made'}: {what}."
    if ctx.rank == 0:  # should the search fail, this is known
        say(f"{text} Looking for where it began.")
    if how == "dump":
        text += _dumped(step, bad)
    try:
        began = _found(step, params, bool(bad))
    except BMTrainError:
        raise
    except Exception as error:  # of the model's own code
        began = f"Where it began is not known, as the forward cannot be run again: {type(error).__name__}: {error}."
    raise NonFiniteError(f"{text} {began} {_ADVICE}")


def _dumped(step: Pending, bad: dict[int, list[float]]) -> str:
    """Write the batches of the ranks at fault, of all where that is not known."""
    ctx = context()
    path = ""
    if not bad or ctx.rank in bad:
        folder = Path(ctx.reports)
        path = str(folder / f"bmtrain-nonfinite-step{step.number}-rank{ctx.rank}-{int(time.time())}.pt")
        given = [(run.args, run.kwargs) for run in step.runs() if run is not None]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(Path(path)) as temporary:
                torch.save(tree_map_only(torch.Tensor, lambda t: t.detach().cpu(), given), temporary)
        except Exception as error:  # a full disk, what cannot be pickled: the others wait for the verdict
            path = f"nothing by rank {ctx.rank} ({type(error).__name__}: {error})"
    return f" Written: {', '.join(filter(None, allgather_objects(path)))}."


def _found(step: Pending, params: list[Any], in_forward: bool) -> str:
    """Collective."""
    runs = on_all_ranks(context(), step.runs(), MOST_RUNS)
    spoiled = _first(_not_finite(runs, params, lambda home: home.shard))
    if spoiled:
        return f"Parameters are not finite {'since' if step.is_made else 'before'} it: {spoiled[1]}."
    if not runs:
        return "Where it began is not known: no module's own forward was run."
    search = _Search()
    with torch.compiler.set_stance("force_eager"):
        outs = [search.again(run) for run in runs]
        found = _first(search.found or search.minus_infinity)
        if found is None and not in_forward:
            search.backward(outs, params)
            found = _first(search.found) or _first(_not_finite(runs, params, _gradient, "the gradient of "))
    if found is not None:
        return f"It began on rank {found[0]}, {found[1]}."
    return "Run once more, every module's values and gradients are finite: look at how the loss is computed from them."


def _first(own: str | None) -> tuple[int, str] | None:
    """The first rank that has found something, and what.  Collective."""
    for rank, theirs in enumerate(allgather_objects(own or "")):
        if theirs:
            return rank, theirs
    return None


def names_of(runs: Sequence[Run]) -> dict[int, str]:
    """Of the parameters of the modules that ran, by their ids."""
    return {id(p): f"{_class(run.module)}.{name}" for run in runs for name, p in run.module.named_parameters()}


def _gradient(home: Home) -> torch.Tensor | None:
    return home.gradient.values()[0] if home.gradient.present else None


def _not_finite(
    runs: Sequence[Run], params: list[Any], values: Callable[[Home], torch.Tensor | None], what: str = ""
) -> str | None:
    """Of which parameters this rank's part is not finite."""
    names, bad = names_of(runs), []
    for home in homes_of(params):
        of_home = values(home)
        for index, p in enumerate(home.params if of_home is not None else []):
            assert of_home is not None
            if not bool(home.local(of_home, index).isfinite().all()):
                bad.append(names.get(id(p), "one of no module that ran"))
    return f"{what}{', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}" if bad else None


class _Search:
    """Looks at what goes into every module and what comes out, and at the gradients of the latter.

    Attributes:
        found: where the first NaN or infinity was, in words.
        minus_infinity: where the first negative infinity was; masks are full of them, so it is only a second guess.
    """

    def __init__(self) -> None:
        self.found: str | None = None
        self.minus_infinity: str | None = None
        self._inside: list[str] = []
        self._finite_until = ""  # the module whose output's gradient was looked at last

    def again(self, run: Run) -> Any:
        """Run a forward once more, as it was."""
        device = context().device.torch_device.type
        self._look((run.args, run.kwargs), f"in what {_class(run.module)} was given")
        with self._hooks(run.module), torch.enable_grad(), torch.autocast(
            device, dtype=run.autocast, enabled=run.autocast is not None
        ):  # fmt: skip
            return run.module(*run.args, **run.kwargs)

    def backward(self, outs: Sequence[Any], params: list[Any]) -> None:
        """A backward from the sum of what forwards gave: the derivatives of modules are looked at."""
        for home in homes_of(params):
            home.clear_grad()
        leaves = [t for t in tree_leaves(outs) if isinstance(t, torch.Tensor) and t.requires_grad]
        if leaves:
            sum(t.float().sum() for t in leaves).backward()  # type: ignore[union-attr]
        engine().finish_backward()

    @contextmanager
    def _hooks(self, root: nn.Module) -> Iterator[None]:
        handles = []
        for name, module in root.named_modules():
            path = f"{_class(root)}.{name} ({_class(module)})" if name else _class(root)
            handles.append(module.register_forward_pre_hook(partial(self._enters, path), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(self._leaves, path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enters(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._inside:
            self._look((args, kwargs), f"in {self._inside[-1]}, in what it gives to {path}")
        self._inside.append(path)

    def _leaves(self, path: str, module: nn.Module, args: Any, out: Any) -> None:
        self._inside.pop()
        self._look(out, f"in {path}, whose inputs are finite")
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(partial(self._came_back, path))  # type: ignore[no-untyped-call]

    def _came_back(self, path: str, grad: torch.Tensor) -> None:
        if self.found is None and not bool(grad.isfinite().all()):
            later = f", that of the output of {self._finite_until}, which comes later, is" if self._finite_until else ""
            self.found = f"in the backward: the gradient of the output of {path} is not finite{later}"
        self._finite_until = path

    def _look(self, values: Any, where: str) -> None:
        if self.found is not None:
            return
        for leaf in tree_leaves(values):
            if isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex()) and leaf.numel():
                real = torch.view_as_real(leaf.detach()) if leaf.is_complex() else leaf.detach()
                bad = real.isnan() | real.isposinf()
                if bool(bad.any()):
                    self.found = f"{where}: {int(bad.sum())} of {leaf.numel()} values are infinite or NaN"
                    return
                if self.minus_infinity is None and bool(real.isneginf().any()):
                    self.minus_infinity = f"{where}: {int(real.isneginf().sum())} of {leaf.numel()} values are -inf"


def _class(module: nn.Module) -> str:
    return type(module).__name__


def _finite(value: float) -> bool:
    return value - value == 0
