"""One plan for memory: what a step leaves free is spent where it saves time.

At first nothing is kept: blocks that were not told (``use_checkpoint=None``) are recomputed, and parameters are whole
only while they are used.  The first steps measure how many bytes each block's activations would take and what the rest
of a step needs.  Then, in this order and as far as it fits, blocks keep their activations, and units stay whole from
one step to the next: an all-gather follows the optimizer, and forward and backward gather nothing.  Optimizer states
and gradients stay sharded.  Every way gives the same numbers.

Units do not stay where that saves nothing: where forwards do not wait for their gathers, and blocks are not to run as
CUDA graphs, for which they have to stay (``graphs``).  On a GPU that is measured in some steps more, after the first
ones, in which kernels are loaded and much is looked at once.

Units stay only in what a step of twice the size would leave free.  They are given up when a rank needs more than was
measured: for larger inputs, or when the allocator had to look twice.  It says so to the others during the step, after
which all give up together; until then it recomputes all blocks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.utils._pytree import tree_leaves

from ..comm.nccl_library import arena_bytes
from ..context import Context
from ..device import Stopwatch, Waits
from ..log import say
from ..shard.unit import ShardUnit

_MEASURED_STEPS = 2  # by then the optimizer's state and every buffer are allocated
WATCHED_STEPS = 3  # of which a forward is timed, from one after these on: the next allocates what blocks keep
_MOST_PLANS = 4  # inputs that grow again and again are not followed for ever
_GIB = 2**30
# Shares of what a forward takes on the device.
_FOR_GATHERS = 0.05  # waited for gathers: so little is not worth memory; a backward has twice the time to hide them
_TO_RECORD = 0.6  # needed by the host, where blocks may run as CUDA graphs: with units that stay it needs less


class MemoryPlan:
    """Decides which blocks keep their activations, and which units stay whole.

    Where memory cannot be measured (on a CPU) every block keeps its activations after as many steps of its own, as in
    the script that was converted, and no units stay; with a number of GiB nothing is kept, as with
    ``init_distributed(memory="lean")``.

    Args:
        watches: steps of which a forward is timed before units stay; 0: they stay wherever they fit.

    Attributes:
        may_record: whether there are blocks that run as CUDA graphs if their parameters stay and somebody begins it.
    """

    def __init__(self, ctx: Context, watches: int = 0) -> None:
        self._ctx, self._watches = ctx, watches
        self.may_record = False
        self._steps = self._peak = self._plans = 0
        self._is_planned = self._is_over = False  # which activations are kept is decided; all is
        self._first: dict[int, int] = {}  # the step in which a block ran first, where these are counted
        self._bytes: dict[int, int] = {}
        self._sizes: dict[int, int] = {}  # of all blocks that were measured, for good
        self._inputs: dict[int, int] = {}
        self._kept: set[int] = set()
        self._staying: list[weakref.ref[ShardUnit]] = []  # not emptied as models go, which ranks see at other times
        self._run = Size()  # the largest inputs of whole forwards, when that was planned
        self._seen = Size()  # the same since then
        self._free = self._spare = self._reserve = 0  # for all that is kept; beside it; to be left for larger steps
        self._moving = self._retries = 0  # what a step takes beside what always stays
        self._is_short = self._was_short = False  # this forward needs more than that; any since the others were told
        self._answer: Callable[[], bool] | None = None  # whether any rank was short
        self._watched: list[tuple[Stopwatch, Waits]] = []  # forwards that are timed, the last of which may be running

    @property
    def measuring(self) -> bool:
        """Whether frames should count what they would keep."""
        return self._measures and not self._plans

    @property
    def _measures(self) -> bool:
        """Whether a plan is to be made."""
        return not self._is_over and self._ctx.device.measures_memory and self._ctx.memory != "lean"

    @property
    def _counts(self) -> bool:
        """Whether blocks keep their activations after so many steps, as nobody can say what that takes or leaves."""
        return self._ctx.memory == "auto" and not self._ctx.device.measures_memory

    @property
    def is_open(self) -> bool:
        """Whether blocks that are recomputed now may come to keep their activations."""
        return self.measuring or self._counts

    # -- activations ------------------------------------------------------------------------------------------------

    def recomputes(self, unit: ShardUnit, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
        """Whether this forward of ``unit``'s block is to be recomputed."""
        if self._counts:
            return not self.keeps(unit)
        if self._is_short or not (self._plans or self._measures):
            return True
        size = sum([t.numel() for t in _tensors(args, kwargs)])
        if self.measuring:
            self._inputs[unit.index] = max(size, self._inputs.get(unit.index, 0))
            return True
        # What was measured says nothing of larger inputs.
        return unit.index not in self._kept or size > self._inputs.get(unit.index, 0)

    def keeps(self, unit: ShardUnit) -> bool:
        """Whether activations of ``unit``'s block are kept, of inputs as large as were measured."""
        if self._counts:
            return self._steps >= self._first.setdefault(unit.index, self._steps) + _MEASURED_STEPS
        return unit.index in self._kept

    def measured(self, unit: ShardUnit, kept: int) -> None:
        """A forward of ``unit`` would have kept so many bytes."""
        self._bytes[unit.index] = max(kept, self._bytes.get(unit.index, 0))

    def has_room(self) -> bool:
        """Whether as much is free as a step takes beside what always stays."""
        return self._measured_budget()[0] > 0

    def leaves(self, size: int) -> bool:
        """Whether a step of twice the size would leave so many bytes, and what is free is there to be used."""
        free, moving = self._measured_budget()
        return self._ctx.memory != "lean" and free - moving >= size

    def part_in_recordings(self, blocks: Sequence[ShardUnit]) -> float:
        """What recordings of ``blocks`` would keep for good, of a step's peak: activations and gradients of each.

        Of those whose activations were measured; infinite if none's were.
        """
        measured = [(unit, self._sizes[unit.index]) for unit in blocks if unit.index in self._sizes]
        if not measured or not self._peak:
            return float("inf")
        return sum(size + unit.whole_bytes(at_rest=True) for unit, size in measured) / self._peak

    # -- the plan ---------------------------------------------------------------------------------------------------

    def optimizer_stepped(self) -> bool:
        """An optimizer has updated its parameters.  Returns whether all ranks are to ``give_up`` what stays now."""
        answer, self._answer = self._answer, None
        if answer is not None and answer():
            return True
        self._steps += self._counts or self._measures
        if self._measures:
            self._look()
        return False

    def run_starts(self, units: Mapping[int, ShardUnit]) -> None:
        """A training run begins; ``units`` are all there are.  Collective twice, when enough has been measured."""
        if not self._measures:
            return
        self._look()
        if self._steps < _MEASURED_STEPS:
            return
        if not self._is_planned:
            self._is_planned = True
            self._keep_activations(units)
            self._plans += 1
        timed = self._steps - _MEASURED_STEPS  # steps of which a forward was to be
        if self._watches and timed <= self._watches:
            if timed > len(self._watched):
                self._watched.append((self._ctx.device.stopwatch(), self._ctx.device.watch_gathers()))
            return
        self._is_over = True
        self._let_units_stay(units)

    def run_ends(self) -> None:
        """Its forward is over."""
        if self._watched and self._watched[-1][1].is_on:
            watch, waits = self._watched[-1]
            watch.stop()
            waits.is_on = False

    def note_inputs(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """A forward begins that will train on these.  Collective if anything stays: ranks tell who is short."""
        if not self._measures and not self._staying:
            return
        size = Size.of(args, kwargs)
        self._seen.include(size)
        if not self._staying:
            return
        self._is_short = self._moving * (size.growth_over(self._run) - 1) > self._spare
        self._was_short |= self._is_short
        if self._answer is None:  # nobody waits for it: it comes while the step is computed
            self._was_short |= self._ctx.device.allocation_retries() > self._retries
            short, self._was_short = torch.tensor([self._was_short], dtype=torch.uint8, device="cpu"), False
            wait = self._ctx.control.start_all_reduce(short, "max")

            def answer() -> bool:
                wait()
                return bool(short)

            self._answer = answer

    def give_up(self) -> None:
        """Nothing stays from here on, on any rank; of a model that is gone, on one rank as on the others."""
        for reference in self._staying:
            unit = reference()
            if unit is not None:
                unit.stay_no_longer()
        self._staying, self._watched = [], []
        self._is_short = self._was_short = self._is_planned = False
        self._steps, self._is_over = 0, self._plans >= _MOST_PLANS
        self._retries = self._ctx.device.allocation_retries()
        if self._ctx.rank == 0:
            say("memory became scarce; parameters are whole only while they are used.")

    def _look(self) -> None:
        """Note the peak so far.  It is not reset, which is the user's to do, at any time."""
        self._peak = max(self._peak, self._ctx.device.peak_memory())

    def _keep_activations(self, units: Mapping[int, ShardUnit]) -> None:
        """As many as fit.  Collective."""
        count = self._most(max(list(units), default=-1) + 1)
        free, self._moving = self._budget()
        reserve = self._moving if isinstance(self._ctx.memory, str) else 0  # a number is the user's word
        own = [-free, reserve, *(self._bytes.get(i, 0) for i in range(count))]
        facts = torch.tensor(own, dtype=torch.int64, device="cpu")
        self._ctx.control.all_reduce(facts, "max")
        free, self._reserve, *agreed = facts.tolist()
        self._free = self._spare = -free
        self._bytes = {i: size for i, size in enumerate(agreed) if size}
        self._sizes |= self._bytes
        for index in sorted(self._bytes, reverse=True):  # the last blocks' activations are held for the shortest time
            if self._bytes[index] > self._spare:
                break
            self._spare -= self._bytes[index]
            self._kept.add(index)
        self._run.include(self._seen)  # larger ones that come before units stay take more than was measured

    def _let_units_stay(self, units: Mapping[int, ShardUnit]) -> None:
        """As many as fit, if that saves time.  Collective."""
        units = dict(units)  # those that are there now
        count = self._most(max(units, default=-1) + 1)
        # Whether a unit may not stay, or is gone already, which ranks notice at different times.
        refused = [int(unit is None or not unit.may_stay) for unit in map(units.get, range(count))]
        facts = torch.tensor([int(self._staying_saves()), *refused], device="cpu")
        self._ctx.control.all_reduce(facts, "max")
        saves, *refused = facts.tolist()
        candidates = [units[i] for i, no in enumerate(refused) if not no]
        # Outside of training they are whole in other dtypes, two at a time, which may not have been measured.
        self._spare -= 2 * max((unit.whole_bytes(at_rest=True) for unit in candidates), default=0)
        whole = 0
        for unit in candidates if saves else ():  # what is needed first has least to hide behind
            if unit.whole_bytes() <= self._spare - self._reserve - whole:
                whole += unit.whole_bytes()
                unit.stays = True
                self._staying.append(weakref.ref(unit))
        if self._staying:
            self._ctx.device.empty_cache()  # transports take their memory from the device itself
        self._spare -= whole
        self._retries = self._ctx.device.allocation_retries()
        sizes, self._bytes = self._bytes, {}
        if self._ctx.rank == 0 and (sizes or candidates):
            self._say(sizes, len(candidates), whole, bool(saves))

    def _staying_saves(self) -> bool:
        """Whether steps become shorter here if units stay.  Waits for the device."""
        watched, self._watched = self._watched, []
        if watched:
            self._ctx.device.synchronize()
        read = [(watch.read(), waits.seconds()) for watch, waits in watched]
        times = [(*time, waited) for time, waited in read if time is not None]
        if not times:
            return True
        # The least: a rank whose host is late once lets the others wait, and that is no gather's fault.
        host = min(host / device for host, device, _ in times)
        waited = min(waited / device for _, device, waited in times)
        return waited >= _FOR_GATHERS or (self.may_record and host >= _TO_RECORD)

    def _most(self, number: int) -> int:
        largest = torch.tensor([number], device="cpu")
        self._ctx.control.all_reduce(largest, "max")
        return int(largest)

    def _say(self, sizes: dict[int, int], candidates: int, whole: int, saves: bool) -> None:
        said = [f"{max(self._free, 0) / _GIB:.1f} GiB to spare"]
        if sizes:
            kept, block = len(self._kept), max(sizes.values()) / _GIB
            said.append(
                f"{kept} of {len(sizes)} blocks keep their activations ({block:.2f} GiB a block), "
                f"{len(sizes) - kept} are recomputed"
            )
        if candidates and not saves:
            said.append("parameters are whole only while they are used, as computation hides their gathers")
        elif candidates:
            staying = len(self._staying)
            said.append(f"parameters of {staying} of {candidates} units stay whole ({whole / _GIB:.2f} GiB)")
        say(f"{'; '.join(said)}.")

    def _measured_budget(self) -> tuple[int, int]:
        """As ``_budget``; nothing is free where memory cannot be measured."""
        if not self._ctx.device.measures_memory:
            return 0, 0
        self._look()
        return self._budget()

    def _budget(self) -> tuple[int, int]:
        """Bytes that a step, as run so far, leaves free, and that it takes beside what is allocated between steps."""
        now, limit = self._ctx.device.memory(), self._ctx.memory
        moving = max(0, self._peak - now.allocated)
        if isinstance(limit, str):
            return int(now.free - moving - max(_GIB, 0.04 * now.total)), moving
        free = min(limit * _GIB - now.allocated - arena_bytes(), now.free - 0.01 * now.total)
        return int(free - moving), moving


def _tensors(args: tuple[object, ...], kwargs: dict[str, object]) -> list[torch.Tensor]:
    """The tensors among inputs.  Asked of every block, most of which get tensors alone."""
    found: list[torch.Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif value is not None and not isinstance(value, bool | int | float | str):
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found


class Size:
    """How large the inputs of a forward are: elements in all, and along the longest axis."""

    def __init__(self, numel: int = 0, longest: int = 0) -> None:
        self.numel, self.longest = numel, longest

    @classmethod
    def of(cls, args: tuple[object, ...], kwargs: dict[str, object]) -> Size:
        """Of these inputs."""
        size = cls()
        for tensor in _tensors(args, kwargs):
            size.numel += tensor.numel()
            size.longest = max(size.longest, *tensor.shape, 0)
        return size

    def include(self, other: Size) -> None:
        """Become at least as large."""
        self.numel, self.longest = max(self.numel, other.numel), max(self.longest, other.longest)

    def growth_over(self, other: Size) -> float:
        """How many times as much memory a step may take as with ``other``; attention may grow with the square."""
        numel, longest = self.numel / max(other.numel, 1), self.longest / max(other.longest, 1)
        return max(numel, 1.0) * max(longest, 1.0)
