"""The base class of converted modules: built whole, sharded when the outermost constructor returns."""

from __future__ import annotations

import functools
import inspect
from abc import ABCMeta
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from ..autograd import backward_id, constant_in_compiled_code
from ..context import context, is_initialized
from .engine import engine


class _ShardWhenBuilt(type(Protocol)):  # type: ignore[misc]
    """Builds instances as usual; after the outermost constructor, shards what was built.

    Until then every parameter is whole and ordinary, so that any initialisation code means what it says. So it is in
    ``from_pretrained``, which builds a model and then gives it its values.
    Derived from the protocols' metaclass, and so from ABCMeta, so that ``class M(nn.Module, AnAbstractClass)`` and
    ``class M(nn.Module, AProtocol)`` convert.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = ABCMeta.__new__(cls, *args, **kwargs)  # a protocol's own lets nothing else be a generic class's base
        loads = inspect.getattr_static(made, "from_pretrained", None)
        if isinstance(loads, classmethod) and not isinstance(loads, _Loading):
            made.from_pretrained = _Loading(_loading(loads.__func__))
        return made

    @property
    def __signature__(cls) -> inspect.Signature:
        """The constructor's; without this, that of ``__call__`` below."""
        whole = inspect.signature(cls.__init__)  # type: ignore[misc]
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _built(super().__call__, *args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        # ABCMeta's own check is slow, and this class registers no virtual subclasses.
        return type.__instancecheck__(cls, instance)


def _built(build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What ``build`` gives, a module or a module and more; sharded if no other is being built."""
    ctx = context()
    ctx.building += 1
    try:
        built = build(*args, **kwargs)
    finally:
        ctx.building -= 1
    module = built[0] if isinstance(built, tuple) and built else built
    if not ctx.building and isinstance(module, nn.Module):
        engine().shard(module)
    return built


class _Loading(classmethod):  # type: ignore[type-arg]
    """A ``from_pretrained`` that shards what it gives."""


def _loading(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def loading(cls: type, *args: Any, **kwargs: Any) -> Any:
        return _built(load, cls, *args, **kwargs)

    return loading


class DistributedModule(nn.Module, metaclass=_ShardWhenBuilt):
    """An ``nn.Module`` whose parameters, plain submodules' included, are sharded over all ranks (ZeRO-3).

    ``state_dict()``, ``named_parameters()``, shapes and initial values are those of the same ``nn.Module``.
    """

    def __call__(self, *args: object, **kwargs: object) -> Any:
        # A part of a model called by itself: what it needs is gathered on demand.  Not so where a checkpoint of torch's
        # runs it again in the backward, and is to see what it saves; nor where it needs nothing: one rank may do that.
        if _no_forward_runs() and next(self.parameters(), None) is not None:
            return engine().forward(None, False, super().__call__, args, kwargs)
        return super().__call__(*args, **kwargs)


@constant_in_compiled_code  # parameters are of another class where none runs
def _no_forward_runs() -> bool:
    # Not in a process that only reads a pickled model, where it is an ordinary one.
    return is_initialized() and engine().idle and backward_id() is None
