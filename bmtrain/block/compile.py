"""torch.compile for blocks and for what is around them, so that gathers and releases stay outside of compiled code."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from ..context import context
from ..log import warn
from ..shard.engine import engine
from .block import Block
from .linear import land_compiled
from .memory import Size
from .record import has_hooks, record_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def compile(model: ModuleT, **options: Any) -> ModuleT:
    """Compile every Block of ``model`` in place, and what is outside of them, and return it.

    ``options`` are torch.compile's; of modes that record CUDA graphs the rest is done.  Blocks of one class and equal
    shapes share their compiled code; a block inside another is compiled by itself.  ``fullgraph`` holds for blocks:
    code around them ends where one is called.  On several ranks, what is outside of blocks runs as it is written while
    the first losses are compared.  On one rank, blocks that keep their activations, compute in the dtype of their
    parameters and have no hooks are part of the code around them, as in plain torch, from the second run of a size on.
    """
    mode = options.get("mode")
    if mode in _WITHOUT_GRAPHS and context().device.is_cuda:
        warn(
            f"bmt.compile leaves out the CUDA graphs of mode={mode!r}: a later run, such as that of the next equal "
            f"block, would write over their results. mode={_WITHOUT_GRAPHS[mode]!r} says so.",
            stacklevel=2,
        )
        options["mode"] = _WITHOUT_GRAPHS[mode]
    # Else equal blocks would share code whatever hooks modules in them have, of which the first one's alone would run.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for module in blocks:
        land_compiled(module)
        _compile(module, options)
    if model not in blocks:
        land_compiled(model)
        around = options | {"fullgraph": False} if blocks else options
        _compile(model, around)
        whole: Any = model
        whole._compiled_call_impl = _Around(whole, blocks, around)
    return model


def _compile(module: nn.Module, options: dict[str, Any]) -> None:
    if type(module).forward.__module__.startswith("torch."):
        # torch.compile leaves frames of torch's own as they are, unless they are called by others (nn.Sequential,
        # nn.TransformerEncoderLayer).
        called: Any = module
        called._compiled_call_impl = torch.compile(_calls(module._call_impl), **options)
    else:
        module.compile(**options)


def _calls(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return run


def _whole(reference: weakref.ref[Any]) -> Callable[..., Any]:
    # A function of its own: where code ended at a block in a loop once, torch.compile does not look at it again.
    def run_whole(*args: Any, **kwargs: Any) -> Any:
        module: Any = reference()
        return module._call_impl(*args, **kwargs)

    return run_whole


class _Around:
    """Runs a compiled module that has blocks, or is around none.

    Engine's work at a block is no part of compiled code, which ends there.  On one rank there is none where the block
    keeps its activations, so that blocks become part of the code around them, as in plain torch.  Whether all of them
    do is seen in a run of its own; until then blocks alone are compiled, of which equal ones share their code.
    On several ranks the code around them runs as it is written in the first steps, where losses are looked at.
    """

    def __init__(self, module: Any, blocks: Sequence[nn.Module], options: dict[str, Any]) -> None:
        self._module, self._blocks = weakref.ref(module), [weakref.ref(block) for block in blocks]
        self._apart = module._compiled_call_impl
        self._as_one = torch.compile(_whole(self._module), **options)
        self._tried, self._kept = Size(), Size()  # the largest inputs run so; those of which blocks kept activations

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self._module()
        runs = engine()
        if not torch.is_grad_enabled():
            return self._run(runs.may_inline, args, kwargs)
        if runs.looks_at_losses:
            return module._call_impl(*args, **kwargs)
        if not runs.may_inline or not self._blocks:
            return self._run(False, args, kwargs)
        size = Size.of(args, kwargs)
        if not size.numel:  # of objects whose size nobody knows
            return self._run(False, args, kwargs)
        if size.growth_over(self._tried) > 1:
            out, all_kept = runs.whether_all_kept(lambda: self._run(False, args, kwargs))
            if all_kept is not None:
                self._tried.include(size)
            if all_kept:
                self._kept.include(size)
            return out
        return self._run(size.growth_over(self._kept) <= 1, args, kwargs)

    def _run(self, inlined: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        runs = engine()
        for block in filter(None, [reference() for reference in self._blocks]):
            record = record_of(block)
            if record is not None and record.unit is not None:
                # Hooks may come and go: the code of the whole would be made anew each time.
                record.inlined = inlined and not record.unit.precision.casts and not has_hooks(block)
                # The run that was looked at may have left it out, or not have trained it.
                record.keeps = runs.keeps(record.unit, record.recompute)
        return (self._as_one if inlined else self._apart)(*args, **kwargs)
