"""What a module that owns a shard unit does differently.

The module's own class is replaced by one that also derives from ShardedModule, so that ``isinstance``, attributes,
hooks, ``train()`` and the state dict's keys stay what they were.
"""

from __future__ import annotations

import copy
import inspect
import os
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..alike import misfit
from ..alike import require_same as require_same_values
from ..autograd import outside_of_compiled_code
from ..context import Context, context
from ..errors import BMTrainError, CheckpointError, ConfigurationError, DeviceError, UnsupportedError
from ..log import warn
from ..shard.engine import engine
from ..shard.flat import FlatShard, flat_of, place_of
from ..shard.gathered import gathered, units_of
from ..shard.sharded_tensor import ShardedTensor, slice_for, unsliced
from ..shard.state_copies import OfBuffer, OfNothing, OfParameter, Original, StateTensor
from ..shard.unit import ShardUnit
from ..split_random import SplitRandom
from .batch_norm_statistics import level, note_run
from .in_turn import comes_in_turn, methods_of, named_state
from .pretrained import Written, write_by_rank_0
from .record import Record, record_of, unit_of
from .state import attribute, state_for_pickle

ModuleT = TypeVar("ModuleT", bound="ShardedModule")
_WRAPPER = "module."


class ShardedModule(nn.Module):
    """Mixin of every module that owns a unit: the root of a model, and each Block.

    Attributes:
        last_bases: of the classes made of this one, after the module's own class.
    """

    last_bases: ClassVar[tuple[type, ...]] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        record = record_of(self)
        if torch.compiler.is_dynamo_compiling():
            if record is not None and record.inlined and (record.keeps or not torch.is_grad_enabled()):
                return super().__call__(*args, **kwargs)
            return outside_of_compiled_code(self, *args, **kwargs)  # the engine's work is no part of a graph
        if record is None or record.unit is None:  # still being built
            if record is not None and record.pipes:
                raise ConfigurationError(
                    f'A {type(self).__name__} was made a Block with mode="PIPE". Put it into a '
                    'bmt.PipelineTransformerBlockList and call that, or leave mode="PIPE" out.'
                )
            return super().__call__(*args, **kwargs)
        unit, runs = record.unit, engine()
        precision, outermost = unit.precision, runs.idle
        if outermost and unit.ctx.device.is_captured:
            raise UnsupportedError(
                "A distributed model is captured as a CUDA graph (torch.cuda.graph, make_graphed_callables), which "
                "cannot hold what ranks decide and exchange in a step. Take the capture out, and let blocks run as "
                "CUDA graphs of bmtrain's: BMTRAIN_GRAPHS=1."
            )
        if outermost and unit.ctx.world_size > 1:
            note_run(self, record)
        with _random_numbers(self, record, unit.ctx, outermost), _split_random(self, record, unit.ctx):
            if precision.casts:
                args, kwargs = precision.cast_arguments((args, kwargs))
            # As a loss, which one rank may call alone.  Running statistics are levelled by all together.
            if not (unit.flats or record.is_block or record.has_blocks or record.has_statistics):
                if outermost:
                    runs.note_beside(self)
                out = super().__call__(*args, **kwargs)
            else:
                out = runs.forward(unit, record.recompute, super().__call__, args, kwargs)
        # Inside a model that computes in one precision, the model's output dtype would not fit what comes next.
        cast = precision.casts and (outermost or not unit.inherits_precision)
        return precision.cast_result(out) if cast else out

    # -- whole values in and out ----------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Whole tensors on the CPU under the unconverted model's keys, on every rank.  Collective.

        Each is a copy that keeps the values of now, but what is written into it in place is written to the model, too.
        With ``bmt.config["save_param_to_cpu"] = False`` they are on this process's device.
        """
        if unit_of(self) is None:
            return super().state_dict(*args, **kwargs)
        # What was given and no more: the model's own method may take none of it.
        given = dict(zip(("destination", "prefix", "keep_vars"), args, strict=False)) | kwargs
        others = set(given.get("destination") or ())  # of enclosing modules, which see to them
        with _whole_for_state(self, given.get("destination") is None) as (needed, lent):
            out = super().state_dict(*args, **kwargs)
            if not given.get("keep_vars", False) and isinstance(out, MutableMapping):
                _copy_out(out, needed, lent, others)
            return out

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load whole tensors, the same on every rank; each keeps its part.  Collective.

        Of what DistributedDataParallel or DataParallel has saved, all names begin with "module.", which is left out,
        with a warning.

        Raises CheckpointError that names every missing, unexpected and wrongly shaped key, every value of another kind,
        and what differs between ranks, and RankDivergenceError if another rank does not load; then nothing was loaded.
        """
        state_dict = _without_wrapper(self, state_dict)
        if unit_of(self) is not None:
            require_same(self, state_dict)
        given, renames = state_dict, _renames(self)
        state_dict = own_slices(self, state_dict)
        if renames:  # torch's own checks know better, but come when half is loaded
            with _undone_by_errors(self):
                result = super().load_state_dict(state_dict, strict)
        else:
            _validate(self, state_dict, strict)
            result = super().load_state_dict(state_dict, strict)
        for unit in owned_units(self):
            for flat in unit.flats:
                flat.changed()
                flat.step_on()
        if not renames:
            for name, value in named_state(self).items():
                if isinstance(given.get(name), StateTensor):
                    given[name].was_loaded_into(value)
        return result

    def apply(self: ModuleT, fn: Callable[[nn.Module], None]) -> ModuleT:
        """As in torch: ``fn`` sees whole parameters, one block at a time, and what it writes stays.  Collective."""
        unit = unit_of(self)
        if unit is None:
            return super().apply(fn)
        own = [p for flat in unit.flats for p in flat.params]
        with gathered(own, write=True):
            return super().apply(fn)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """``.to()``, ``.half()``, ``.cuda()``...: dtypes change; parameters stay on this process's device."""
        if unit_of(self) is None:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = context().device.torch_device
        for unit in owned_units(self):
            for flat in unit.flats:
                shard = fn(flat.shard)
                if shard.device.type not in (device.type, "cpu"):
                    raise DeviceError(
                        f"The model is on {device}; it cannot move to {shard.device}. Choose it in init_distributed."
                    )
                if shard.dtype != flat.dtype:
                    flat.convert(shard.to(device))
                elif shard.device == flat.shard.device and shard.data_ptr() != flat.shard.data_ptr():
                    flat.shard.copy_(shard)  # what changes values changes each by itself
                    flat.changed()
        for parameter in self.parameters():
            if flat_of(parameter) is None:  # put in after the model was sharded
                parameter.data = fn(parameter.data).to(device)
                if parameter.grad is not None:
                    parameter.grad = fn(parameter.grad).to(device)
        for module in self.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = fn(buffer).to(device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        theirs = getattr(super(), "__deepcopy__", None)
        return theirs(memo) if theirs is not None else self._copy(memo, lambda state: copy.deepcopy(state, memo))

    def __copy__(self) -> Any:
        theirs = getattr(super(), "__copy__", None)
        return theirs() if theirs is not None else self._copy({}, dict)

    def _copy(self, memo: dict[int, Any], of_state: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
        """As ``copy`` would by ``__reduce_ex__``, which is pickle's alone here."""
        made = memo[id(self)] = type(self).__new__(type(self))
        state = of_state(state_for_pickle(self))
        made.__setstate__(state)  # type: ignore[no-untyped-call]
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError(
            f"{type(self).__name__} cannot be pickled by itself: its values are spread over ranks. Write it with "
            "bmt.save_checkpoint(model, path), which torch.load reads, or save model.state_dict() by bmt.save."
        )

    def to_empty(self: ModuleT, *, device: torch.types.Device, recurse: bool = True) -> ModuleT:
        """Does nothing: a sharded model has its memory."""
        return self


def _random_numbers(module: nn.Module, record: Record, ctx: Context, outermost: bool) -> AbstractContextManager[None]:
    """Lets layers that train draw this rank's own numbers, while ranks go on to decide alike which layers run.

    Where one generator serves both, it is a module without blocks that is let off; else, the whole forward.
    """
    if not module.training or ctx.world_size == 1 or ctx.random == "shared":
        return nullcontext()
    alone = outermost if ctx.device.decides_apart else not record.has_blocks
    return ctx.device.layers_draw_own() if alone else nullcontext()


def _split_random(module: nn.Module, record: Record, ctx: Context) -> AbstractContextManager[None]:
    """Lets draws for split activations be this rank's own; in the first forward that trains each is looked at."""
    return nullcontext() if ctx.split_random is None else _checked(module, record, ctx.split_random)


@contextmanager
def _checked(module: nn.Module, record: Record, random: SplitRandom) -> Iterator[None]:
    wanted = module.training and not record.draws_checked
    with random.forward(module.training, wanted) as check:
        yield
    record.draws_checked = record.draws_checked or (wanted and not (check is not None and check.doubts))


def become(module: nn.Module, mixin: type[ShardedModule]) -> Record:
    """Make ``module`` an instance of ``mixin`` as well, in place; its record, made if there is none."""
    if not isinstance(module, mixin):
        own = next(c for c in type(module).__mro__ if not issubclass(c, ShardedModule))
        module.__class__ = _mixed(mixin, own)  # type: ignore[arg-type]
    return module.__dict__.setdefault("_bmt", Record())  # type: ignore[no-any-return]


@cache
def _mixed(mixin: type[ShardedModule], own: type[nn.Module]) -> type[nn.Module]:
    def body(namespace: dict[str, Any]) -> None:
        namespace.update(__module__=own.__module__, __qualname__=own.__qualname__, __doc__=own.__doc__)
        if hasattr(own, "save_pretrained"):
            namespace["save_pretrained"] = save_pretrained

    return types.new_class(own.__name__, (mixin, own, *mixin.last_bases), {}, body)


def owned_units(module: nn.Module) -> Iterator[ShardUnit]:
    """Every unit owned by ``module`` or a module inside it."""
    for inner in module.modules():
        unit = unit_of(inner)
        if unit is not None:
            yield unit


@contextmanager
def _whole_for_state(module: nn.Module, outermost: bool) -> Iterator[tuple[list[ShardUnit], list[ShardUnit]]]:
    """Whole units for the state of ``module``, which owns one.  Collective.

    Gives those whose values it is to copy, and those that are whole for somebody else, as an enclosing module.
    """
    record, unit = record_of(module), unit_of(module)
    assert record is not None and unit is not None
    if outermost and unit.ctx.world_size > 1:
        engine().meet(f"state_dict of {type(module).__name__}")
        level(module, record)
    needed = [other for other in (*unit.borrows, unit) if outermost or other is unit or not other.pins]
    lent = [other for other in engine().outside.all_pinned() if other not in needed]
    with engine().outside.pinned(needed):
        yield needed, lent


def whole_state(module: nn.Module, prefix: str = "", keep: bool = True) -> dict[str, object]:
    """What ``module.state_dict()`` gives, past ``state_dict`` methods that classes of the model define.  Collective.

    For those methods themselves, which ask for it.  A rank that does not ``keep`` values gets tensors without any.
    """
    state: Any = OrderedDict()
    state._metadata = OrderedDict()
    own = set(owned_units(module))
    outer = [unit for unit in units_of(module) if unit not in own]
    if unit_of(module) is None and context().world_size > 1:
        engine().meet(f"the state of {type(module).__name__}")
    with engine().outside.pinned(outer):
        whole: dict[str, object] = _add_state(module, state, prefix, keep, outermost=True)
        _copy_out(whole, outer, [], set(), keep)
    return whole


def level_statistics(model: nn.Module) -> None:
    """Let batch norms of a sharded model be the same on all ranks, before its values are written.  Collective."""
    record = record_of(model) if isinstance(model, ShardedModule) else None
    if record is not None:
        level(model, record)


def save_pretrained(model: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """``model.save_pretrained(save_directory, ...)`` with its own arguments, written by rank 0 alone.  Collective.

    For models of any package that has this method, with parts of their values on other ranks, also those inside a
    sharded model and around one, and for what holds such models, as a pipeline does, or averages of their parameters;
    a tokenizer is written by rank 0, too.  The files are what the package writes for a
    model of one process; those of a new folder appear all at once, others one by one, each whole.  No rank has whole
    tensors in memory that are not in a file of rank 0's as well, beside what the method itself copies.

    A method in a file that imports bmtrain is run by every rank, as it is; so is one that is given a ``state_dict``.

    Raises CheckpointError on every rank when rank 0 cannot write; then files that were there are as they were.
    """
    kind = next(c for c in type(model).__mro__ if not issubclass(c, ShardedModule))

    def own(folder: str, *args: Any, **kwargs: Any) -> Any:
        return kind.save_pretrained(model, folder, *args, **kwargs)  # type: ignore[attr-defined]

    has_values = any(isinstance(given, Mapping) for given in (*args, kwargs.get("state_dict")))
    if has_values or _is_of_all_ranks(kind.save_pretrained):  # type: ignore[attr-defined]
        own(os.fspath(save_directory), *args, **kwargs)
        return
    ctx = context()
    if ctx.world_size > 1:
        engine().meet(f"save_pretrained of {kind.__name__}")
    with ctx.diary.saving(), _whole_attributes(model), gathered(_beside_a_frozen_model(model)):
        models = [model] if isinstance(model, nn.Module) else _sharded_in(model)
        for each in models:
            level_statistics(each)
        written = [
            Written(each, None if comes_in_turn(each) else each.state_dict(), _own_method(each, model))
            for each in models
        ]
        write_by_rank_0(own, written, save_directory, args, kwargs)


def _sharded_in(holder: object) -> list[nn.Module]:
    """The models with sharded parameters that an object, which is none itself, holds as attributes."""
    held = list(getattr(holder, "__dict__", {}).values())
    for value in list(held):
        if isinstance(value, Mapping):
            held += value.values()
        elif isinstance(value, list | tuple):
            held += value
    modules = {id(value): value for value in held if isinstance(value, nn.Module)}
    return [m for m in modules.values() if any(isinstance(inner, ShardedModule) for inner in m.modules())]


def _beside_a_frozen_model(model: object) -> list[nn.Parameter]:
    """What trains outside of the blocks of a model of which the rest is frozen, as prompts: its method may run that."""
    unit = unit_of(model) if isinstance(model, ShardedModule) else None
    if unit is None or all(p.requires_grad for p in model.parameters()):  # type: ignore[attr-defined]
        return []
    return [p for flat in unit.flats for p in flat.params if p.requires_grad]


@contextmanager
def _whole_attributes(holder: object) -> Iterator[None]:
    """What an object that is no model holds in parts, as averages of parameters, is whole inside.  Collective."""
    held = {} if isinstance(holder, nn.Module) else getattr(holder, "__dict__", {})
    in_parts = {
        name: value
        for name, value in held.items()
        if any(isinstance(leaf, ShardedTensor) for leaf in tree_leaves(value))
    }
    with ExitStack() as whole:
        for name, value in in_parts.items():
            joined = tree_map(lambda x: unsliced(x) if isinstance(x, ShardedTensor) else x, value)
            whole.enter_context(attribute(holder, name, joined))
        yield


def _own_method(module: nn.Module, written: object) -> Callable[..., object] | None:
    """The package's ``save_pretrained`` of a module that is written as part of something else."""
    kind = next(c for c in type(module).__mro__ if not issubclass(c, ShardedModule))
    method = getattr(kind, "save_pretrained", None)
    return None if module is written or method is None else partial(method, module)


def _is_of_all_ranks(method: Callable[..., object]) -> bool:
    """Whether a method was written for, or converted to, this library, so that every rank is to run it."""
    known = getattr(inspect.unwrap(method), "__globals__", {})
    return any(value is sys.modules["bmtrain"] for value in known.values())


def _add_state(module: nn.Module, state: Any, prefix: str, keep: bool, outermost: bool = False) -> Any:
    facts: dict[str, Any] = {"version": module._version}
    others = set(state)  # of enclosing modules, which see to them
    state._metadata[prefix[:-1]] = facts
    owned: AbstractContextManager[tuple[list[ShardUnit], list[ShardUnit]]] = nullcontext(([], []))
    if unit_of(module) is not None:
        owned = _whole_for_state(module, outermost)
    with owned as (needed, lent):
        for before in module._state_dict_pre_hooks.values():
            before(module, prefix, False)
        module._save_to_state_dict(state, prefix, False)
        for name, child in module._modules.items():
            if child is not None:
                _add_state(child, state, f"{prefix}{name}.", keep)
        for after in module._state_dict_hooks.values():
            replaced = after(module, state, prefix, facts)
            state = state if replaced is None else replaced  # which counts for the outermost alone, as in torch
        if needed:
            _copy_out(state, needed, lent, others, keep)
    return state


def _copy_out(
    state: MutableMapping[str, object],
    units: list[ShardUnit],
    lent: list[ShardUnit],
    others: set[str],
    keep: bool = True,
) -> None:
    """Replace views of these units' memory by copies; what was tied stays one tensor.  Buffers come along.

    ``others`` are the keys that are somebody else's, as are views of the memory of ``lent`` units.
    """
    to_cpu, apart = context().save_param_to_cpu, context().device.is_apart

    def copied(value: torch.Tensor, original: Original) -> torch.Tensor:
        if not keep:
            return torch.empty_like(value, device="meta")
        return StateTensor.of(value.detach().to("cpu" if to_cpu else None, copy=True), original)

    places: dict[int, tuple[FlatShard, torch.Tensor]] = {}
    for flat in [flat for unit in (*units, *lent) for flat in unit.flats]:
        memory = flat.buffer.tensor if flat.buffer is not None else flat.shard
        places[memory.untyped_storage().data_ptr()] = (flat, memory)
    copies: dict[Any, torch.Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or key in others:
            continue
        if isinstance(value, ShardedTensor):  # a buffer that was made of a parameter
            state[key] = copied(unsliced(value), OfBuffer(value))
            continue
        lies_in = (
            places.get(value.untyped_storage().data_ptr()) if value.layout is torch.strided and value.numel() else None
        )
        if lies_in is not None and lies_in[0].unit in lent:
            continue
        if lies_in is not None:
            place = (value.data_ptr(), value.shape, value.stride())
            if place not in copies:
                original = _original(value, *lies_in)
                flat, values = lies_in[0], value.detach()
                if flat.is_slice:
                    if not isinstance(original, OfParameter):
                        raise UnsupportedError(
                            f"A state_dict hook has made {key!r} of a part of a parameter of which tensor-parallel "
                            "ranks have slices, so that the whole is not known. Split it after state_dict() instead."
                        )
                    values = flat.joined(original.index, values)
                copies[place] = copied(values, original)
            state[key] = copies[place]
        elif apart and to_cpu and not isinstance(value, StateTensor):
            is_linked = not keep or value.layout is torch.strided  # a sparse one has no memory to be linked by
            state[key] = copied(value, OfBuffer(value)) if is_linked else value.detach().to("cpu")


def _original(value: torch.Tensor, flat: FlatShard, memory: torch.Tensor) -> Original:
    parameter = flat.param_at(int(value.storage_offset() - memory.storage_offset()), tuple(value.shape))
    return OfNothing() if parameter is None or not value.is_contiguous() else OfParameter(parameter)


def require_same(module: nn.Module, state_dict: Mapping[str, object]) -> None:
    """Raises CheckpointError on every rank unless all were given the same to load into ``module``.  Collective."""
    kind = type(module).__name__
    engine().meet(f"load_state_dict of {kind}")
    given = {k: v for k, v in sorted(state_dict.items()) if not isinstance(v, torch.Tensor) or flat_of(v) is None}
    given = {k: v for k, v in given.items() if not isinstance(v, ShardedTensor)}
    tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor) and v.layout == torch.strided}
    others = [f"{k} ({type(v).__name__})" for k, v in given.items() if k not in tensors]
    advice = "Read the same file on every rank, or use bmt.load(model, path)."
    require_same_values("state dict", kind, tensors, others, advice)


def own_slices(module: nn.Module, state_dict: Mapping[str, object]) -> Mapping[str, object]:
    """``state_dict`` with this rank's slices in place of what tensor-parallel layers hold slices of."""
    if context().tensor_group.world_size == 1:
        return state_dict
    out: Any = copy.copy(state_dict)  # with its _metadata
    for name, value in named_state(module).items():
        flat = flat_of(value)
        if value is None or not isinstance(out.get(name), torch.Tensor):
            continue
        if flat is not None:
            out[name] = flat.own_slice(place_of(value)[1], out[name])
        elif isinstance(value, ShardedTensor):
            out[name] = slice_for(value, out[name])
    return out  # type: ignore[no-any-return]


def _without_wrapper(module: nn.Module, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict under the model's own names where a wrapper of the model has saved it."""
    if not state_dict or "module" in module._modules or not all(str(k).startswith(_WRAPPER) for k in state_dict):
        return state_dict
    text = f"The names that {type(module).__name__} loads begin with {_WRAPPER!r}, as a wrapper wrote them: left out."
    warn(text, stacklevel=3)
    out: Any = OrderedDict((name.removeprefix(_WRAPPER), value) for name, value in state_dict.items())
    if (versions := getattr(state_dict, "_metadata", None)) is not None:
        out._metadata = {key.removeprefix("module").removeprefix("."): value for key, value in versions.items()}
    return out  # type: ignore[no-any-return]


def _renames(module: nn.Module) -> bool:
    """Whether the model changes keys or values while it loads them."""
    return any(m._load_state_dict_pre_hooks or "_load_from_state_dict" in methods_of(m) for m in module.modules())


def _validate(module: nn.Module, state_dict: Mapping[str, Any], strict: bool) -> None:
    expected = named_state(module)
    problems = []
    if strict:
        problems += [f"missing: {key}" for key in expected if key not in state_dict]
        problems += [f"unexpected: {key}" for key in state_dict if key not in expected]
    for key, value in expected.items():
        if isinstance(value, torch.Tensor) and key in state_dict:
            reason = misfit(state_dict[key], value.shape, value.dtype, value.layout)
            if reason is not None:
                problems.append(f"{key}: {reason}")
    if problems:
        raise CheckpointError("The checkpoint does not fit the model; nothing was loaded.\n  " + "\n  ".join(problems))


@contextmanager
def _undone_by_errors(module: nn.Module) -> Iterator[None]:
    """Parameters and buffers as they were, if the body raises.  What torch reports becomes a CheckpointError."""
    flats = [flat for unit in owned_units(module) for flat in unit.flats]
    held: list[Any] = [t for flat in flats for t in (flat.shard, flat.remainder, flat.buffer and flat.buffer.tensor)]
    held += [buffer for buffer in module.buffers() if not isinstance(buffer, ShardedTensor) and not buffer.is_meta]
    before = [(tensor, tensor.clone()) for tensor in held if tensor is not None]
    try:
        yield
    except BaseException as error:
        with torch.no_grad():
            for tensor, values in before:
                tensor.copy_(values)
        for flat in flats:
            flat.changed()
        if isinstance(error, RuntimeError) and not isinstance(error, BMTrainError):
            raise CheckpointError(f"Nothing was loaded: {error}") from error
        raise
