"""One call of a list of blocks that is cut into stages, each on ranks of its own.

Every rank of a pipeline reads a batch of its own.  A call brings the batches of all its ranks to the first stage, cut
into micro-batches; each stage runs its blocks on one after the other and hands them on; from the last stage every rank
gets what belongs to its batch.  To the rest of the model this is one differentiable function, so that embeddings, heads
and losses before and behind it are sharded and trained over all ranks, as without a pipeline.

Autograd takes the same way back.  It runs nodes in the reverse order of their making, so that the last micro-batch
comes first; ``token``, a number that every send and receive passes on, ties together what no tensor of this rank
connects.  A backward that is to reach some leaves alone, ``backward(inputs=...)``, comes through all stages or none:
what blocks get beside the hidden values comes out of the first node, too, and whoever asks for parameters of a stage
asks for ``token`` as well.

The order is that of GPipe: all forwards, then all backwards, with the activations of all micro-batches in between.
A schedule that begins backwards earlier (1F1B) cannot come out of a call inside a model: the first backward needs the
loss, which the model computes after the call has returned.  With recomputation what is kept of a micro-batch is the
input of each block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map

from ..autograd import Node, backward_id, in_function_transform, version_of, will_run
from ..comm import Communicator
from ..context import context
from ..errors import ConfigurationError, RankDivergenceError
from ..shard.parameter import ShardedParameter
from ..shard.unit import ShardUnit
from ..topology import share
from .block_list import TransformerBlockList
from .engine import Engine
from .frame import Frame
from .sharded import owned_units

_MOST_PIECES = 4
"""Of each rank's batch, where the number of micro-batches is not given."""
_MOST_DIMENSIONS = 8
_DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
_Facts = tuple[torch.Size, torch.dtype]


def count_of(batch: int, stages: int, asked: int | None) -> int:
    """How many micro-batches are made of ``stages`` batches of ``batch`` rows.

    As ``asked``, by ``init_distributed(num_micro_batches=)``; else each rank's batch gives 4, or the next fewer that
    divides it.  More of them let stages wait less (stages - 1 of all turns), fewer compute on larger pieces.

    Raises ConfigurationError unless they are equally large.
    """
    if asked is None:
        return stages * next(pieces for pieces in range(_MOST_PIECES, 0, -1) if not batch % pieces)
    total = batch * stages
    if total % asked:
        good = [number for number in range(1, total + 1) if not total % number]
        raise ConfigurationError(
            f"A pipeline of {stages} ranks with a batch of {batch} rows each cannot cut these {total} rows into "
            f"num_micro_batches={asked} equal pieces. Use one of {good}, or leave num_micro_batches out."
        )
    return asked


def _buffers_of(elements: Sequence[nn.Module]) -> list[tuple[str, torch.Tensor, int]]:
    """What state dicts take of ``elements`` beside parameters, as it is now."""
    return [
        (f"{type(module).__name__}.{name}", buffer, version_of(buffer))
        for element in elements
        for module in element.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]


def _refuse_changes(buffers: Sequence[tuple[str, torch.Tensor, int]]) -> None:
    changed = [name for name, buffer, version in buffers if version_of(buffer) != version]
    if changed:
        raise ConfigurationError(
            f"A forward in a pipeline has changed the buffer {changed[0]}, which state dicts hold: only one stage "
            "would have its values, once for every micro-batch. Register it with persistent=False if it is no state, "
            "or keep the module outside of the pipeline."
        )


class PipelineCall:
    """What all stages know of the call, and this rank's part of the work.

    Args:
        is_first: none was made of this list before, so that what blocks change in themselves is looked at.
    """

    def __init__(
        self,
        blocks: TransformerBlockList,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        batch_related: Sequence[int | str] | None,
        states: bool,
        is_first: bool,
    ) -> None:
        ctx = context()
        self.ctx, self.engine, self.blocks = ctx, cast(Engine, ctx.engine), blocks
        self.comm, self.control = ctx.pipe_group, ctx.pipe_control
        self.stages, self.stage = self.comm.world_size, self.comm.rank
        self.is_first, self.is_last = self.stage == 0, self.stage == self.stages - 1
        self.carried, self.states, self.is_first_call = blocks.num_hidden, states, is_first
        if len(args) < self.carried:
            raise ConfigurationError(
                f"The list carries {self.carried} hidden values; it got {len(args)} positional ones."
            )
        self.hidden = list(args[: self.carried])
        self.others: dict[int | str, Any] = dict(enumerate(args[self.carried :])) | dict(kwargs)
        if not all(isinstance(value, torch.Tensor) and value.dim() for value in self.hidden):
            raise ConfigurationError("The hidden values of a pipeline are tensors (B, ...), cut along the first size.")
        self.batch = self.hidden[0].shape[0]
        self.related = self._related(batch_related)
        cut = [*self.hidden, *(self.others[key] for key in self.related)]
        if not self.batch or any(value.shape[0] != self.batch for value in cut):
            raise ConfigurationError(
                f"What a pipeline cuts into micro-batches has one row for each item of the batch; the first sizes are "
                f"{[value.shape[0] for value in cut]}."
            )
        for value in cut:
            _facts_fit(value)
        self.count = count_of(self.batch, self.stages, ctx.num_micro_batches)
        self.rows = self.batch * self.stages // self.count
        self.frame: Frame | None = None
        self.units: list[ShardUnit] = []
        self.comes: list[_Facts] = []  # what the stage before sends of each micro-batch
        self.leaves: list[_Facts] = []  # what this one sends, or gives back

    def _related(self, given: Sequence[int | str] | None) -> list[int | str]:
        tensors = {key: value for key, value in self.others.items() if isinstance(value, torch.Tensor) and value.dim()}
        if given is None:
            return [key for key, value in tensors.items() if value.shape[0] == self.batch]
        unknown = [key for key in given if key not in tensors]
        if unknown:
            raise ConfigurationError(
                f"batch_related names {unknown}, which are no tensors among what blocks get beside the hidden values: "
                f"{list(tensors)} are."
            )
        return [key for key in tensors if key in given]

    def __call__(self) -> Any:
        grad, frames = torch.is_grad_enabled(), self.engine.backward.frames
        if backward_id() is not None or in_function_transform() or (grad and (not frames or frames[-1].recompute)):
            raise ConfigurationError(
                "A pipeline cannot run inside of what is recomputed in the backward, such as a Block with "
                "use_checkpoint=True, nor in a transform of torch.func. Its own blocks may be recomputed."
            )
        self.frame = frames[-1] if grad else None
        self._meet(grad)
        elements: list[nn.Module] = list(self.blocks._modules.values())
        self.units = [unit for element in elements for unit in owned_units(element)]
        self.engine.schedule.prepare_stages(self.units)
        own = [elements[index] for index in share(len(elements), self.stages, self.stage)]
        tensors = [*self.hidden, *(self.others[key] for key in self.related)]
        token: Any = torch.zeros((), device=self.ctx.device.torch_device, requires_grad=grad)
        token.goes_with = self.units
        shared = self._shared()
        token, *made = _Enter.apply(self, token, len(tensors), *tensors, *shared)  # type: ignore[no-untyped-call]
        enter, pieces = token.grad_fn, made[: len(made) - len(shared)]
        others = self._others_with(shared, made[len(pieces) :])
        before = _buffers_of(own) if self.is_first_call else []
        with self._as_stage():
            results, inputs, token = self._run_stage(own, pieces, others, token)
        _refuse_changes(before)
        flat = [*(value for values in results for value in values), *(value for values in inputs for value in values)]
        found = _Leave.apply(self, enter, token, len(own), *flat)  # type: ignore[no-untyped-call]
        if self.states:
            return tuple(found)
        return found[0] if self.carried == 1 else tuple(found)

    def _shared(self) -> list[torch.Tensor]:
        """What blocks get beside the hidden values that is not cut, and has a gradient."""
        given = [self.others[key] for key in self.others if key not in self.related]
        return list({id(x): x for x in tree_leaves(given) if _is_shared(x)}.values())

    def _others_with(self, shared: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> dict[int | str, Any]:
        """``others`` with what the first node has made of ``shared``; not kept here, where it would hold the graph."""
        if not shared:
            return self.others
        found = dict(zip(map(id, shared), made, strict=True))
        return tree_map(lambda value: found.get(id(value), value), self.others)  # type: ignore[no-any-return]

    def _run_stage(
        self, own: list[nn.Module], pieces: list[torch.Tensor], given: Mapping[int | str, Any], token: torch.Tensor
    ) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]], torch.Tensor]:
        """Run this stage's blocks on all micro-batches.

        Returns the last stage's results, micro-batch by micro-batch, and of each micro-batch and block its inputs.
        """
        self.engine.schedule.prefetch_stage(self.units, self.ctx.device.autocast())
        results: list[list[torch.Tensor]] = []
        inputs: list[list[torch.Tensor]] = []
        at = self.carried * self.count if self.is_first else 0
        for number in range(self.count):
            if self.is_first:
                hidden = pieces[number : at : self.count]
            else:
                token, *hidden = _Receive.apply(self, token)  # type: ignore[no-untyped-call]
            others = dict(given)
            for index, key in enumerate(self.related):
                others[key] = pieces[at + index * self.count + number]
            extra = [value for key, value in others.items() if isinstance(key, int)]
            named = {key: value for key, value in others.items() if isinstance(key, str)}
            for block in own:
                if self.states:
                    inputs.append(hidden)
                out = block(*hidden, *extra, **named)
                hidden = self._checked([out] if self.carried == 1 else list(out))
            self._agree_on(hidden, first=not number)
            if self.is_last:
                results.append(hidden)
            else:
                token = _Send.apply(self, token, *hidden)  # type: ignore[no-untyped-call]
        return results, inputs, token

    def _checked(self, hidden: list[Any]) -> list[torch.Tensor]:
        if len(hidden) != self.carried:
            raise ConfigurationError(
                f"With num_hidden={self.carried} a block returns {self.carried} values, not {len(hidden)}."
            )
        for value in hidden:
            if not isinstance(value, torch.Tensor) or not value.dim() or value.shape[0] != self.rows:
                said = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise ConfigurationError(
                    f"A block of a pipeline got a micro-batch of {self.rows} rows and gave {said}; hidden values are "
                    "tensors with a row for each."
                )
        return hidden

    def _agree_on(self, hidden: list[torch.Tensor], first: bool) -> None:
        """Tell the next stage what comes, which is the same for all micro-batches."""
        facts = [_facts_fit(value) for value in hidden]
        if first:
            self.leaves = facts
            if not self.is_last:
                self.control.send(_as_numbers(facts), self.stage + 1)
        elif facts != self.leaves:
            raise ConfigurationError(
                f"A stage gave {facts} for one micro-batch and {self.leaves} for the first: results of blocks are to "
                "have the same shapes and dtypes for all."
            )

    def incoming(self) -> list[_Facts]:
        """What the stage before sends."""
        if not self.comes:
            numbers = torch.zeros(self.carried, 2 + _MOST_DIMENSIONS, dtype=torch.int64, device="cpu")
            self.control.recv(numbers, self.stage - 1)
            self.comes = _from_numbers(numbers)
        return self.comes

    def results_of_all(self) -> list[_Facts]:
        """What the last stage has of a micro-batch.  Collective in the pipeline."""
        numbers = _as_numbers(self.leaves)
        self.control.broadcast(numbers, self.stages - 1)
        return _from_numbers(numbers)

    def inputs_of_all(self, blocks: int, inputs: Sequence[torch.Tensor]) -> list[tuple[int, list[_Facts]]]:
        """For every stage, how many blocks there are, and what each gets of a micro-batch.  Collective likewise."""
        own = [_facts_fit(value) for value in inputs[: self.carried]]
        for value, facts in zip(inputs, own * (len(inputs) // self.carried), strict=True):
            if _facts_fit(value) != facts:
                raise ConfigurationError(
                    "With return_hidden_states the inputs of all blocks are to have one shape and dtype; a stage has "
                    f"{facts} and {_facts_fit(value)}."
                )
        sent = torch.cat((torch.tensor([blocks], device="cpu"), _as_numbers(own).view(-1)))
        every = torch.empty(self.stages * sent.numel(), dtype=sent.dtype, device="cpu")
        self.control.all_gather(sent, every)
        return [(int(row[0]), _from_numbers(row[1:].view(self.carried, -1))) for row in every.view(self.stages, -1)]

    @contextmanager
    def _as_stage(self) -> Iterator[None]:
        """Inside, this rank does what only its stage does; afterwards all ranks are to draw alike again."""
        diary, device = self.ctx.diary, self.ctx.device
        trains = self.blocks.training
        start = device.rng_state() if trains else None
        drawn: list[bool] = []
        diary.is_apart = True
        try:
            if start is not None and self.ctx.random == "own":
                with device.layers_draw_own():
                    inside = device.rng_state()
                    yield
                    drawn = device.drawn_since(inside)
            else:
                yield
                drawn = [] if start is None else device.drawn_since(start)
            if start is not None:
                anywhere = torch.tensor(drawn, dtype=torch.uint8, device="cpu")
                self.control.all_reduce(anywhere, "max")
                device.go_back_to(start, anywhere.bool().tolist())
        finally:
            diary.is_apart = False

    def _meet(self, grad: bool) -> None:
        """Raises RankDivergenceError on all ranks of the pipeline unless they have come with the same.  Collective."""
        cut = [(key, self.others[key].requires_grad, *_facts_fit(self.others[key])) for key in self.related]
        said = repr(
            (cut, [_facts_fit(v) for v in self.hidden], grad, self.states, self.blocks.training, len(self.blocks))
        )
        digest = int.from_bytes(hashlib.blake2b(said.encode(), digest_size=7).digest(), "little")
        shape = self.hidden[0].shape
        own = torch.tensor([digest, len(shape), *shape, *[0] * (_MOST_DIMENSIONS - len(shape))], device="cpu")
        every = torch.empty(self.stages * own.numel(), dtype=own.dtype, device="cpu")
        self.control.all_gather(own, every)
        rows = every.view(self.stages, -1).tolist()
        if all(row[0] == digest for row in rows):
            return
        ranks = self.ctx.topology.pipe_group()
        shapes = [f"rank {rank} {tuple(row[2 : 2 + row[1]])}" for rank, row in zip(ranks, rows, strict=True)]
        raise RankDivergenceError(
            "The ranks of a pipeline must call it with the same shapes and dtypes, in the same mode. The hidden values "
            f"are: {', '.join(shapes)}. This rank: {said}. Let batches be equally large (drop_last=True) and padded to "
            "one length on all ranks of a pipeline."
        )


# -- tensors on their way -------------------------------------------------------------------------------------------


def _facts_fit(value: torch.Tensor) -> _Facts:
    """Shape and dtype.  Raises ConfigurationError for what a stage cannot send."""
    if value.dtype not in _DTYPES or value.dim() > _MOST_DIMENSIONS or value.layout != torch.strided:
        raise ConfigurationError(
            f"A pipeline cannot send a tensor of {value.dtype}, {value.layout}, with {value.dim()} dimensions."
        )
    return value.shape, value.dtype


def _as_numbers(facts: Sequence[_Facts]) -> torch.Tensor:
    rows = [
        [_DTYPES.index(dtype), len(shape), *shape, *[0] * (_MOST_DIMENSIONS - len(shape))] for shape, dtype in facts
    ]  # fmt: skip
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _from_numbers(numbers: torch.Tensor) -> list[_Facts]:
    return [(torch.Size(row[2 : 2 + row[1]]), _DTYPES[row[0]]) for row in numbers.tolist()]


def _has_gradient(value: torch.Tensor | torch.dtype) -> bool:
    dtype = value if isinstance(value, torch.dtype) else value.dtype
    return dtype.is_floating_point or dtype.is_complex


def _to(comm: Communicator, root: int, own: torch.Tensor) -> torch.Tensor | None:
    """On ``root`` all ranks' ``own``, (B, ...), one after the other: (ranks * B, ...)."""
    if comm.rank != root:
        comm.send(own.detach().contiguous(), root)
        return None
    size = own.shape[0]
    whole = own.new_empty((comm.world_size * size, *own.shape[1:]))
    for rank, rows in enumerate(torch.split(whole, size)):
        if rank == root:
            rows.copy_(own.detach())
        else:
            comm.recv(rows, rank)
    return whole


def _from(comm: Communicator, root: int, whole: torch.Tensor | None, own: torch.Tensor) -> torch.Tensor:
    """The reverse: fill ``own`` with this rank's rows of what ``root`` has."""
    if comm.rank != root:
        comm.recv(own, root)
        return own
    assert whole is not None
    for rank, rows in enumerate(torch.split(whole.contiguous(), own.shape[0])):
        if rank == root:
            own.copy_(rows)
        else:
            comm.send(rows, rank)
    return own


def _cut(whole: torch.Tensor, rows: int) -> list[torch.Tensor]:
    """Pieces of their own memory, which blocks may change in place."""
    return [piece.clone() for piece in torch.split(whole, rows)]


def _passed(token: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(token)


def _for_autograd(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    ctx.mark_non_differentiable(*(value for value in outputs if not _has_gradient(value)))
    return outputs


def _is_shared(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad and not isinstance(value, ShardedParameter)


class _Enter(torch.autograd.Function):
    """Hidden values to the first stage and what goes with the batch to all, cut into micro-batches.

    Other values pass as they are, so that no gradient of a block ends on this side of the first stage.
    """

    @staticmethod
    def forward(
        ctx: Any, run: PipelineCall, token: torch.Tensor, cut: int, *given: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        tensors, shared = given[:cut], given[cut:]
        ctx.run, ctx.facts = run, [(value.shape, value.dtype, value.device) for value in tensors]
        ctx.needed = [value.requires_grad for value in tensors]
        pieces: list[torch.Tensor] = []
        for value in tensors[: run.carried]:
            whole = _to(run.comm, 0, value)
            if whole is not None:
                pieces += _cut(whole, run.rows)
        for value in tensors[run.carried :]:
            every = value.new_empty((run.stages * run.batch, *value.shape[1:]))
            sent = value.detach().contiguous()
            run.comm.all_gather(*((x.view(torch.uint8) if x.dtype == torch.bool else x) for x in (sent, every)))
            pieces += _cut(every, run.rows)
        return _for_autograd(ctx, _passed(token), *pieces, *shared)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: torch.Tensor, *grads: torch.Tensor) -> tuple[Any, ...]:
        run: PipelineCall = ctx.run
        found: list[torch.Tensor | None] = []
        at = 0
        for index, (shape, dtype, device) in enumerate(ctx.facts):
            is_hidden = index < run.carried
            pieces = grads[at : at + run.count] if run.is_first or not is_hidden else ()
            at += len(pieces)
            if not _has_gradient(dtype) or not (is_hidden or ctx.needed[index]):
                found.append(None)
                continue
            whole = torch.cat(pieces) if pieces else None
            own = torch.empty(shape, dtype=dtype, device=device)
            if is_hidden:
                found.append(_from(run.comm, 0, whole, own))
            else:
                assert whole is not None
                run.comm.reduce_scatter(whole.contiguous(), own)
                found.append(own)
        assert run.frame is not None
        run.engine.backward.leaves_stage(run.frame, run.units)
        return None, _passed(token), None, *found, *grads[at:]


class _Receive(torch.autograd.Function):
    """A micro-batch from the stage before."""

    @staticmethod
    def forward(ctx: Any, run: PipelineCall, token: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.run = run
        hidden = [torch.empty(shape, dtype=dtype, device=token.device) for shape, dtype in run.incoming()]
        for value in hidden:
            run.comm.recv(value, run.stage - 1)
        return _for_autograd(ctx, _passed(token), *hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: torch.Tensor, *grads: torch.Tensor) -> tuple[Any, ...]:
        run: PipelineCall = ctx.run
        for grad, (_, dtype) in zip(grads, run.comes, strict=True):
            if _has_gradient(dtype):
                run.comm.send(grad.contiguous(), run.stage - 1)
        return None, _passed(token)


class _Send(torch.autograd.Function):
    """A micro-batch to the next stage."""

    @staticmethod
    def forward(ctx: Any, run: PipelineCall, token: torch.Tensor, *hidden: torch.Tensor) -> torch.Tensor:
        ctx.run, ctx.device = run, token.device
        for value in hidden:
            run.comm.send(value.detach().contiguous(), run.stage + 1)
        return _passed(token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: torch.Tensor) -> tuple[Any, ...]:
        run: PipelineCall = ctx.run
        grads: list[torch.Tensor | None] = []
        for shape, dtype in run.leaves:
            grads.append(torch.empty(shape, dtype=dtype, device=ctx.device) if _has_gradient(dtype) else None)
            if grads[-1] is not None:
                run.comm.recv(grads[-1], run.stage + 1)
        return None, _passed(token), *grads


class _Leave(torch.autograd.Function):
    """Results from the last stage, and inputs of blocks from all stages, to the ranks whose batches they are of."""

    @staticmethod
    def forward(
        ctx: Any, run: PipelineCall, enter: Node | None, token: torch.Tensor, blocks: int, *tensors: torch.Tensor
    ) -> tuple[Any, ...]:
        ctx.run, ctx.enter, ctx.blocks, ctx.given = run, enter, blocks, len(tensors)
        ctx.save_for_backward(token)  # so that all stages refuse to come here again, once the graph is freed
        carried = run.carried
        split = carried * run.count if run.is_last else 0
        results, inputs = tensors[:split], tensors[split:]
        ctx.results = run.results_of_all()
        found = []
        for index, (shape, dtype) in enumerate(ctx.results):
            whole = torch.cat(results[index::carried]) if run.is_last else None
            own = torch.empty((run.batch, *shape[1:]), dtype=dtype, device=token.device)
            found.append(_from(run.comm, run.stages - 1, whole, own))
        ctx.inputs = run.inputs_of_all(blocks, inputs) if run.states else []
        for index in range(carried if run.states else 0):
            parts = []
            for stage, (count, facts) in enumerate(ctx.inputs):
                shape, dtype = facts[index]
                whole = None
                if stage == run.stage:
                    whole = torch.cat([
                        torch.stack(inputs[index + number * carried * blocks :: carried][:blocks], 1)
                        for number in range(run.count)
                    ])  # fmt: skip
                own = torch.empty((run.batch, count, *shape[1:]), dtype=dtype, device=token.device)
                parts.append(_from(run.comm, stage, whole, own))
            found.append(torch.cat(parts, 1).transpose(0, 1).contiguous())
        return _for_autograd(ctx, *found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        run: PipelineCall = ctx.run
        (token,) = ctx.saved_tensors
        if not will_run(ctx.enter):
            raise ConfigurationError(
                "A backward for some leaves alone came to a pipeline without reaching its first stage, for which the "
                "other ranks would wait. Call backward() without inputs, or with parameters of the model as inputs."
            )
        assert run.frame is not None
        run.engine.backward.enters_stage(run.frame, run.units)
        carried, last = run.carried, run.stages - 1
        found: list[torch.Tensor | None] = [None] * ctx.given
        split = carried * run.count if run.is_last else 0
        for index, (_, dtype) in enumerate(ctx.results):
            whole = _to(run.comm, last, grads[index]) if _has_gradient(dtype) else None
            if whole is not None:
                found[index:split:carried] = torch.split(whole, run.rows)
        for index in range(carried if run.states else 0):
            parts = torch.split(grads[carried + index].transpose(0, 1), [count for count, _ in ctx.inputs], 1)
            for stage, (count, facts) in enumerate(ctx.inputs):
                whole = _to(run.comm, stage, parts[stage]) if _has_gradient(facts[index][1]) else None
                if whole is not None:
                    pieces = [part for piece in torch.split(whole, run.rows) for part in piece.unbind(1)]
                    assert len(pieces) == count * run.count
                    found[split + index :: carried] = pieces
        return None, None, _passed(token), None, *found
