"""One object that says who this process is and how it talks: topology, communicators, device, precision.

``init_distributed`` makes it; nothing else reads environment variables or keeps process-wide state.
"""

from __future__ import annotations

import difflib
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal, Protocol, TypeVar, get_args

import torch
from torch._C._distributed_c10d import PrefixStore, Store

from .comm import Communicator, GlooCommunicator, Launcher, LocalCommunicator, Meeting, let_others_speak_first, meet
from .connect import Collectives, Connector
from .device import (
    Device,
    Schedule,
    choose_deterministic_algorithms,
    choose_device,
    is_in_use,
    let_segments_grow,
)
from .errors import ConfigurationError, NotInitializedError
from .log import warn
from .precision import Precision, as_precision
from .split_random import SplitRandom
from .topology import Mesh, Topology
from .watch import Diary, Hooks, Interrupts, Timeouts, Watchdog
from .watch import start as start_watchdog

Random = Literal["own", "shared"]
_LATER = timedelta(seconds=30)


class Engine(Protocol):
    """What the block layer adds to the context; ``shard.engine`` knows it whole."""

    @property
    def idle(self) -> bool:
        """Whether no distributed module is running."""

    def collect(self) -> None:
        """Give back the memory of models that are gone.  Collective."""

    def comes_to(self, what: str) -> None:
        """Every rank does ``what`` next, outside of any forward or in one.

        Raises RankDivergenceError when another rank is found to do something else.
        """

    def note_hooks(self, parameter: torch.Tensor) -> None:
        """``parameter``, which is sharded, has got hooks on its gradient."""

    def show_at_rest(self, parameter: torch.Tensor) -> None:
        """Show ``parameter``, and what is gathered with it, in the dtype in which it rests, if that can be done now."""

    def all_gather(self, shard: torch.Tensor, whole: torch.Tensor, what: str) -> None:
        """``all_gather`` in the shard group as part of ``what``; raises RankDivergenceError as above."""


class BackgroundWriter(Protocol):
    """A thread that writes a file."""

    problem: str | None
    """Why it could not, once that is known."""

    def join(self) -> None:
        """Wait for its end."""


Gradients = Literal["mean", "sum"]
MemoryUse = Literal["lean", "auto"]
EngineT = TypeVar("EngineT", bound=Callable[["Context"], Engine])


@dataclass(eq=False)
class Context:
    """Everything one process knows of the job it belongs to."""

    topology: Topology
    device: Device
    store: Store
    world: Communicator
    """All ranks: what they agree on, and collectives of user code, on tensors of ``device``."""
    control: Communicator
    """All ranks: small facts and objects, always on CPU tensors."""
    shard_group: Communicator
    """The ranks that keep the parts of one copy of the parameters: what is made of the parts; ``world`` if all do.

    Stages of a pipeline are among them; of a stage's parameters the others keep empty parts.
    """
    replicate_group: Communicator
    """The ranks that keep the same parts as this one, in other replicas."""
    tensor_group: Communicator
    """The ranks that hold the slices of one tensor-parallel layer."""
    model_group: Communicator
    """The ranks that hold one replica of the model: ``shard_group``, in all its slices."""
    data_group: Communicator
    """The ranks that hold the same slices and see different data; ``world`` without tensor parallelism."""
    pipe_group: Communicator
    """The stages of one pipeline: activations."""
    pipe_control: Communicator
    """The same, for small facts, on CPU tensors."""
    stage_group: Communicator
    """The ranks that hold the same stage of a pipeline; ``world`` without pipelines."""
    stage_data_group: Communicator
    """Those of them that hold the same slices."""
    stage_collectives: Collectives
    """Gathers and reductions of what a stage alone has, among the ranks that have it."""
    collectives: Collectives
    """Gathers and reductions of all other parameters, in the shard group."""
    timeout: timedelta
    """The longest that ranks wait for each other."""
    diary: Diary
    """What this rank has done with the others."""
    watchdog: Watchdog | None
    """Compares it with theirs; None for one rank, and where it is switched off."""
    interrupts: Interrupts
    """Says in one line that Ctrl-C has ended the job."""
    precision: Precision = field(default_factory=Precision)
    """Of every module that was given none of its own."""
    random: Random = "own"
    """Whether layers in training draw other numbers on every rank."""
    split_random: SplitRandom | None = None
    """From which stream they draw inside tensor-parallel layers; None where no rank has slices, or all draw alike."""
    gradient_divisor: int = 1
    """What the sum of all ranks' gradients is divided by: their number, or 1 where a script wants the sum."""
    memory: MemoryUse | float = "auto"
    """Whether free memory is spent to save time, and up to how many GiB."""
    graphs: bool | None = None
    """Whether blocks may be recorded; None: where that is seen to save time."""
    save_param_to_cpu: bool = True
    """Whether state dicts are copies on the CPU; else they are on ``device``."""
    options: dict[str, object] = field(default_factory=dict)
    """Whatever user code stores in ``bmt.config``."""
    engine: Engine = field(init=False)
    writer: BackgroundWriter | None = None
    """What still writes a checkpoint to a file; on rank 0 only."""
    meter: Path | None = None
    """Where what every step took is written though the script says nothing of it; None: nowhere."""
    reports: str = field(default_factory=tempfile.gettempdir)
    """The folder for what a process leaves behind when it fails."""
    num_micro_batches: int | None = None
    """Into how many pieces a pipeline cuts the batches of its ranks; None: it chooses."""
    launcher: Launcher = field(default_factory=Launcher)
    """What started the ranks, and remembers where they saved."""
    went_on: bool = False
    """Whether this process was told where the attempt before it saved."""
    groups: int = 0
    """How many ``host_group`` were made."""
    samplers: int = 0
    """How many samplers were made that follow rank 0's."""
    building: int = 0
    """How many constructors of distributed modules are running, one inside the other."""

    @property
    def rank(self) -> int:
        """This process among all."""
        return self.topology.rank

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        return self.topology.world_size

    @property
    def shard_rank(self) -> int:
        """Which parts of parameters this process keeps."""
        return self.topology.shard_rank

    def host_group(self, name: str, timeout: timedelta) -> Communicator:
        """All ranks once more, on CPU tensors, for a thread of its own.  Collective."""
        self.groups += 1
        if self.world_size == 1:
            return LocalCommunicator()
        store = PrefixStore(f"{name}/{self.groups}", self.store)
        return GlooCommunicator(store, self.rank, self.world_size, timeout)

    @property
    def _communicators(self) -> tuple[Communicator, ...]:
        groups = self.shard_group, self.replicate_group, self.tensor_group, self.model_group, self.data_group
        pipes = self.pipe_group, self.pipe_control, self.stage_group, self.stage_data_group
        kinds = self.stage_collectives, self.collectives
        of_parameters = (one for kind in kinds for one in (kind.gather, kind.reduce, kind.reduce_unsliced))
        return *of_parameters, *groups, *pipes, self.world, self.control

    def abort(self) -> None:
        """Leave the other ranks at once, so that they fail instead of waiting.  The context is not used afterwards.

        What works on a device is left to the watchdog, where there is one: it may take longer than the caller can wait.
        """
        apart = self.watchdog is not None and self.device.is_cuda
        for communicator in (self.control, self.pipe_control) if apart else self._communicators:
            communicator.abort()

    def close(self) -> None:
        """Give back communicators.  The context is not used afterwards."""
        self.interrupts.close()
        if self.watchdog is not None:
            self.watchdog.leave()
        for communicator in self._communicators:
            communicator.close()


class _State:
    """The process's one Context, and how to complete it."""

    context: Context | None = None
    make_engine: Callable[[Context], Engine] | None = None


def engine_factory(factory: EngineT) -> EngineT:
    """Decorator for the one class that completes a new Context (the block layer's engine)."""
    _State.make_engine = factory
    return factory


def context() -> Context:
    """The process's Context.  Raises NotInitializedError before ``init_distributed``."""
    if _State.context is None:
        raise NotInitializedError(
            "Call bmt.init_distributed() first, before any bmtrain module, parameter or optimizer is made."
        )
    return _State.context


def is_initialized() -> bool:
    """Whether ``init_distributed`` has run."""
    return _State.context is not None


def rank() -> int:
    """This process's number; before ``init_distributed`` what the launcher calls it (``RANK``), or 0."""
    return _State.context.rank if _State.context else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together; 1 before ``init_distributed``."""
    return _State.context.world_size if _State.context else 1


def mesh() -> Mesh:
    """The ranks as a grid with named dimensions: their sizes, this process's coordinates, who forms which group.

    Raises NotInitializedError before ``init_distributed``.
    """
    return context().topology.mesh


def synchronize() -> None:
    """Wait until every rank has come here and all its device work is done; free what deleted models held."""
    here = context()
    here.device.synchronize()
    here.engine.collect()
    here.control.barrier()


def init_distributed(
    init_method: str = "env://",
    seed: int = 0,
    pipe_size: int = -1,
    num_micro_batches: int | None = None,
    tp_size: int | None = None,
    *,
    device: str | None = None,
    schedule: Schedule = "overlap",
    timeout: timedelta | Timeouts = timedelta(minutes=30),
    watch: bool = True,
    precision: Precision | torch.dtype | str | None = None,
    random: Random = "own",
    gradients: Gradients = "mean",
    memory: MemoryUse | float = "auto",
    shard_size: int | None = None,
    graphs: bool | None = None,
    **old: object,
) -> None:
    """Join the other ranks.  Call once, before models and optimizers are made.

    Reads what torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT); without
    them this process is the whole world.  With BMTRAIN_TOKEN in the environment, the same secret on every rank, only
    processes that have it take part.  With BMTRAIN_METER=run.jsonl rank 0 appends to that file what steps take, as
    ``bmt.Meter`` does, without a line in the script.  Seeds ``random``, numpy and torch with ``seed`` on every rank
    alike, so that every rank builds the same initial weights.  On a GPU torch's allocator gets
    ``expandable_segments:True``, unless PYTORCH_CUDA_ALLOC_CONF is set.

    Args:
        init_method: ``env://``, ``tcp://HOST:PORT`` or ``file://PATH``.
        seed: for all generators, the same on all ranks.
        pipe_size: a ``bmt.PipelineTransformerBlockList`` is cut into this many stages, each on other ranks; 1 or -1:
            none is.  Each rank of a pipeline still reads a batch of its own.
        num_micro_batches: into how many pieces a pipeline cuts the batches of its ranks together; None: as many as
            are sensible (``block.pipeline_call.count_of``).  All ranks say the same.
        tp_size: this many ranks that follow each other hold the slices of tensor-parallel layers (``bmt.nn``); they see
            the same data. None: BMTRAIN_TP_SIZE in the environment, or 1, so that a launch says how many GPUs a layer
            takes, as it says how many there are.
        device: "cpu" or "cuda"; None takes this local rank's GPU if there is one.
        schedule: "overlap"; "serial" and "stress" are for finding errors (see ``bmtrain.device.Schedule``).
        timeout: how long ranks wait for each other before the job is ended, in all cases or (bmt.Timeouts) at the
            start, in a step and in a save.
        watch: whether a thread on every rank compares what the ranks do. It names a rank that dies, differs or stalls
            on all of them, with the places in the code; of the first two it ends the job, with exit code 70 where no
            error can be raised. BMTRAIN_WATCH=0 in the environment switches it off, too. Before a process ends it
            writes its last 200 collectives to a file in the folder BMTRAIN_DIARY_DIR (else that for temporary files).
        precision: a bmt.Precision, or the dtype to gather fp32 parameters and compute in ("bf16", torch.bfloat16);
            None follows the model's dtypes and autocast. Blocks may have their own.
        random: "own" lets a training model's layers draw other dropout masks and noise on every rank, each for its
            share of the batch; outside of forwards all ranks draw alike (see ``bmt.own_random``). Tensor-parallel
            ranks draw other numbers for what is split over them, and alike else. "shared" draws the same everywhere, as
            the published library did.
        gradients: "mean": ``loss.backward()`` gives the mean over ranks, as does an OptimManager. "sum": it gives the
            sum, as it did in the published releases, for scripts that divide by the number of ranks themselves.
        memory: "auto" spends what the first steps leave free on a GPU to save time: blocks that were not told keep
            their activations, parameters stay whole from step to step; what stays is given up when memory becomes
            scarce. A number: the same within so many GiB for each process. "lean": nothing is kept. The results are
            the same. On a CPU nothing is measured, and "auto" keeps activations after two steps. Alike on all ranks.
        shard_size: spread parameters, gradients and optimizer states over groups of this many ranks that follow each
            other, as those of one host do. Every group keeps all of them; gathers stay inside, and gradients are summed
            inside and then over the groups. None: one group of all ranks, which takes least memory. Results are the
            same up to rounding, and checkpoints fit any. All ranks say the same.
        graphs: True lets blocks run as CUDA graphs, where that is possible: their Python runs in the first steps only,
            and then the host queues a block's forward, and its backward, by one call each (see
            ``bmtrain.block.graphs.blocks``). The results are the same. False: never. None: as BMTRAIN_GRAPHS in the
            environment says (0 or 1); without it where GPUs wait for their hosts (on one rank if that takes little
            memory), and only blocks of which all that their Python reads can be compared.

    Raises ConfigurationError, DeviceError, CommunicationError.
    """
    if _State.context is not None:
        raise ConfigurationError("bmt.init_distributed() was already called in this process; call it once.")
    _warn_of_old(old)
    policy = as_precision(precision)
    _check_chosen(schedule, random, gradients, memory, num_micro_batches)
    env = os.environ
    _warn_of_names(env)
    _refuse_tasks_alone(env)
    if tp_size is None:
        tp_size = _integer(env, "BMTRAIN_TP_SIZE", 1)
    topology = Topology(
        _integer(env, "RANK", 0), _integer(env, "WORLD_SIZE", 1), _integer(env, "LOCAL_RANK", 0),
        _integer(env, "LOCAL_WORLD_SIZE", 1), tp_size, max(pipe_size, 1), shard_size,
    )  # fmt: skip
    meter = _meter_file(env.get("BMTRAIN_METER", ""), topology.rank)
    chosen = choose_device(device, topology.local_rank)
    if chosen.type == "cuda" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & env.keys():
        let_segments_grow()
    if topology.world_size > 1:
        env.setdefault("MASTER_ADDR", "localhost")
        env.setdefault("MASTER_PORT", "10010")
    timeouts = timeout if isinstance(timeout, Timeouts) else Timeouts(timeout, timeout, timeout)
    token = env.get("BMTRAIN_TOKEN", "")
    meeting = meet(init_method, topology.rank, topology.world_size, timeouts.start, token)
    watches = watch and _switch(env, "BMTRAIN_WATCH") is not False
    may_record = _switch(env, "BMTRAIN_GRAPHS") if graphs is None else bool(graphs)
    made = _connect(
        topology, Device(chosen, schedule, topology.data_rank), meeting, timeouts, watches, memory, num_micro_batches,
        meter is not None,
    )  # fmt: skip
    assert _State.make_engine is not None, "bmtrain.block completes the context on import"
    made.precision, made.random, made.memory = policy, random, memory
    made.graphs = may_record
    made.launcher = Launcher.of(env, token)
    if tp_size > 1 and random == "own":
        made.split_random = SplitRandom(made.device.generator, topology.tp_rank)
    made.meter = meter
    made.reports = env.get("BMTRAIN_DIARY_DIR") or made.reports
    made.gradient_divisor = topology.data_size if gradients == "mean" else 1
    made.engine = _State.make_engine(made)
    _State.context = made
    _seed_everything(seed)


def deterministic() -> None:
    """From here on, equal runs give equal bits: libraries choose algorithms that do, or raise an error.

    Call it first of all, before anything uses a GPU.  With as many ranks, on machines of one kind, a job that goes on
    from a ``bmt.checkpoint.Checkpointer`` then has the bits of one that was never interrupted.  Some operations become
    slower.

    Raises ConfigurationError when it is too late, or when CUBLAS_WORKSPACE_CONFIG says otherwise.
    """
    known = (":4096:8", ":16:8")  # the values that cuBLAS documents as deterministic
    given = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if given is None and is_in_use():
        raise ConfigurationError(
            "bmt.deterministic() comes too late: this process has used a GPU already. Call it first of all, or set "
            f"CUBLAS_WORKSPACE_CONFIG={known[0]} in the environment."
        )
    if given is not None and given not in known:
        raise ConfigurationError(
            f"CUBLAS_WORKSPACE_CONFIG is {given!r}, with which cuBLAS may give other bits each time. Set it to "
            f"{known[0]} or {known[1]}, or leave it out."
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", known[0])
    choose_deterministic_algorithms()


def own_random() -> AbstractContextManager[None]:
    """Inside the ``with``, what torch, numpy and ``random`` draw is this rank's own; else all ranks draw alike.

    For noise, masks or time steps that belong to this rank's share of a batch: ``with bmt.own_random(): noise =
    torch.randn_like(x)``.  What is drawn follows from where the shared stream stands (``torch.manual_seed``) and from
    the rank.  Layers in training draw from torch so without this; ``random`` and numpy stay shared there.
    """
    here = _State.context
    if here is None or here.world_size == 1 or here.random == "shared":
        return nullcontext()
    return here.device.all_draw_own()


def shutdown() -> None:
    """Leave the job; ``init_distributed`` may be called again.  Models made before are no longer usable."""
    if _State.context is not None:
        _State.context.close()
        _State.context = None


def _check_chosen(
    schedule: str, random: str, gradients: str, memory: MemoryUse | float, micro_batches: int | None
) -> None:
    for name, value, known in (
        ("schedule", schedule, Schedule),
        ("random", random, Random),
        ("gradients", gradients, Gradients),
        *([("memory", memory, MemoryUse)] if isinstance(memory, str) else []),
    ):
        if value not in get_args(known):
            raise ConfigurationError(f"{name} must be one of {', '.join(get_args(known))}, not {value!r}.")
    if not isinstance(memory, str) and not (type(memory) in (int, float) and 0 < memory < float("inf")):
        raise ConfigurationError(f'memory must be "auto", "lean" or a number of GiB, not {memory!r}.')
    if micro_batches is not None and (type(micro_batches) is not int or micro_batches < 1):
        raise ConfigurationError(f"num_micro_batches must be a whole number above 0, not {micro_batches!r}.")


def _connect(
    topology: Topology,
    device: Device,
    meeting: Meeting,
    timeouts: Timeouts,
    watches: bool,
    memory: MemoryUse | float,
    micro_batches: int | None,
    meters: bool,
) -> Context:
    # Who waits too long is named by the watchdog; the transport's own limit says nothing, so it comes later.
    timeout = timeouts.longest + (_LATER if watches else timedelta(0))
    connect = Connector(topology, device, meeting.store, timeout, Diary())
    if topology.world_size > 1 and watches:
        let_others_speak_first()
        connect.watchdog = start_watchdog(
            meeting.store, topology.rank, topology.world_size, meeting.host, connect.diary, timeouts,
            os.environ.get("BMTRAIN_DIARY_DIR", ""), Hooks(connect.abort, connect.check, device.is_busy),
            meeting.secret,
        )  # fmt: skip
    mesh = topology.mesh
    pipes = mesh.group("pipe")
    control = connect.on_host("control", list(range(mesh.size())))
    try:
        _check_alike(control, topology, memory, micro_batches, meters)
    except ConfigurationError:
        if connect.watchdog is not None:
            connect.watchdog.leave()
        control.close()
        raise
    # In this order on every rank.
    world = connect.group("world", *Mesh.mesh_dim_names)
    shard_group, replicate_group = connect.group("shard", "shard", "pipe"), connect.group("replicate", "replicate")
    model_group = connect.group("model", "shard", "pipe", "tensor")
    data_group = connect.group("data", "replicate", "shard", "pipe")
    tensor_group = connect.on_device("tensor", mesh.group("tensor"))  # for activations, which are large
    pipe_group, pipe_control = connect.on_device("pipe", pipes), connect.on_host("pipe/control", pipes)
    stage_group = connect.group("stage", "replicate", "shard", "tensor")
    stage_data_group = connect.group("stage/data", "replicate", "shard")
    collectives = connect.collectives("", "shard", "pipe")
    stage_collectives = connect.collectives("stage/", "shard") if len(pipes) > 1 else collectives
    return Context(
        topology, device, meeting.store, world, control, shard_group, replicate_group, tensor_group, model_group,
        data_group, pipe_group, pipe_control, stage_group, stage_data_group, stage_collectives, collectives,
        timeouts.longest, connect.diary, connect.watchdog, Interrupts(topology.rank), num_micro_batches=micro_batches,
    )  # fmt: skip


def _check_alike(
    control: Communicator, topology: Topology, memory: MemoryUse | float, micro_batches: int | None, meters: bool
) -> None:
    """Raises ConfigurationError on every rank unless all were given the same.  Collective."""
    asked = {"lean": 0.0, "auto": -1.0}[memory] if isinstance(memory, str) else float(memory)
    facts = [*map(float, topology.mesh.shape), float(meters), float(micro_batches or 0), asked]
    own = torch.tensor(facts, dtype=torch.float64, device="cpu")
    bounds = torch.stack((own, -own))
    control.all_reduce(bounds, "max")
    *of_mesh, of_meters, of_pieces, of_memory = (bounds[0] != -bounds[1]).tolist()
    if any(of_mesh):
        raise ConfigurationError(
            "tp_size, pipe_size and shard_size must be the same on all ranks, as must their number; on rank "
            f"{topology.rank} they make a mesh of {dict(zip(Mesh.mesh_dim_names, topology.mesh.shape, strict=True))}."
        )
    if of_meters:
        raise ConfigurationError(
            f"BMTRAIN_METER must be in the environment of all ranks or of none; rank {topology.rank} has "
            f"{'it' if meters else 'none'}. Where each host has a launcher, set it for all of them."
        )
    if of_pieces:
        raise ConfigurationError(
            f"num_micro_batches must be the same on all ranks; it is {micro_batches!r} on rank {topology.rank}."
        )
    if of_memory:
        raise ConfigurationError(f"memory must be the same on all ranks; it is {memory!r} on rank {topology.rank}.")


def _refuse_tasks_alone(env: os._Environ[str]) -> None:
    """Raises ConfigurationError where another launcher than torchrun has started several processes."""
    if "RANK" in env or "WORLD_SIZE" in env:
        return
    for name, launcher in (("SLURM_PROCID", "srun"), ("OMPI_COMM_WORLD_RANK", "mpirun"), ("PMI_RANK", "mpiexec")):
        if _integer(env, name, 0) > 0:
            raise ConfigurationError(
                f"{launcher} started this process as number {env[name]}, which torchrun's RANK and WORLD_SIZE do not "
                "tell: each process would train alone. Let it start one torchrun on each node (srun "
                "--ntasks-per-node=1 torchrun --nnodes=... --nproc_per_node=... script.py), or set RANK, WORLD_SIZE, "
                "LOCAL_RANK, MASTER_ADDR and MASTER_PORT of each process before bmt.init_distributed()."
            )


def _integer(env: os._Environ[str], name: str, default: int) -> int:
    value = env.get(name, "")
    try:
        return int(value) if value else default
    except ValueError:
        raise ConfigurationError(f"The environment variable {name} is {value!r}; it must be an integer.") from None


def _switch(env: Mapping[str, str], name: str) -> bool | None:
    """What an environment variable says; None: nothing."""
    value = env.get(name, "")
    if value not in ("", "0", "1"):
        raise ConfigurationError(f"The environment variable {name} is {value!r}; it must be 0 or 1.")
    return value == "1" if value else None


def _warn_of_names(env: Mapping[str, str]) -> None:
    """A variable with nearly the name of one that is read would do nothing."""
    known = [f"BMTRAIN_{name}" for name in ("DIARY_DIR", "GRAPHS", "METER", "TOKEN", "TP_SIZE", "WATCH")]
    for name in env:
        if name.upper().startswith("BMTRAIN") and name not in known and env.get("RANK", "0") == "0":
            for near in difflib.get_close_matches(name.upper(), known, 1, 0.9):
                warn(f"{name} is in the environment, which nobody reads; did you mean {near}?", stacklevel=3)


def _meter_file(name: str, rank: int) -> Path | None:
    """The file that BMTRAIN_METER names, wherever the script goes; rank 0 sees that it can be written."""
    if not name:
        return None
    path = Path(name).absolute()
    if path.suffix != ".jsonl":
        raise ConfigurationError(
            f"The environment variable BMTRAIN_METER is {name!r}; it must be a file that ends in .jsonl, as in "
            "BMTRAIN_METER=run.jsonl, to which what is measured is appended."
        )
    if rank == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            raise ConfigurationError(
                f"The file that BMTRAIN_METER names cannot be written: {path}: {error.strerror or error}."
            ) from None
    return path


def _warn_of_old(old: dict[str, object]) -> None:
    known = {
        "zero_level": "give zero_level to each bmt.Block instead",
        "loss_scale_factor": "give it to bmt.optim.OptimManager",
        "loss_scale_steps": "give it to bmt.optim.OptimManager",
    }
    for name in old:
        if name not in known:
            raise TypeError(f"init_distributed() got an unexpected keyword argument {name!r}")
        warnings.warn(f"init_distributed({name}=...) has no effect any more: {known[name]}.", DeprecationWarning, 3)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(seed % 2**32)
