"""Whether ranks draw the same random numbers for samples that differ, asked at the start."""

from __future__ import annotations

from ...context import Context
from ...log import warn
from ...users_code import users_line
from .steps import FirstSteps

_STEPS = 4
"""How many optimizer steps of a model are looked at."""

_OFTEN = 2
"""What is drawn in so many steps before the forward is drawn for a batch."""


class FirstDraws:
    """Draws from the stream that all ranks share, where those of layers are each rank's own.

    Before a forward only a GPU's generator is looked at: the CPU's also gives the order of the data, which is to be
    shared.  In a forward that draws alike, as on a CPU, both draw from the same.  There ``random`` and numpy are looked
    at, too, in layers as well, for which they have no streams of their own.
    """

    def __init__(self, ctx: Context, first_steps: FirstSteps) -> None:
        split = ctx.tensor_group.world_size > 1 or ctx.topology.mesh.size("pipe") > 1  # whose streams are others
        self._can_differ = ctx.topology.data_size > 1 and ctx.random != "shared" and not split
        self._ctx, self._first_steps, self._before, self._place = ctx, first_steps, 0, ""
        self._is_over = False
        self._draws, self._hosts = ctx.device.watch_shared_draws(False), ctx.device.watch_host_draws(False)
        self._between = False  # whether no forward has begun since a step

    def renew(self) -> None:
        """A model begins to train."""
        self._is_over, self._before = False, 0

    def forward_starts(self) -> None:
        """An outermost forward begins that is to train."""
        if not self._can_differ or self._is_over or self._first_steps.age >= _STEPS:
            if self._draws is not None:
                self._end()
            return
        if self._draws is None:
            self._draws, self._hosts = (
                self._ctx.device.watch_shared_draws(True),
                self._ctx.device.watch_host_draws(True),
            )
            self._between = False
            assert self._draws is not None
            self._draws.begin_here()
        self._draws.look()
        if self._draws.found and self._between and self._ctx.device.decides_apart:
            self._before += 1
            if self._before == _OFTEN:
                self._warn("before the model is called", users_line())
                return
        self._between = self._draws.found = False
        self._place = users_line()
        if self._hosts is not None:
            self._hosts.begin_here()
            self._hosts.found = False

    def forward_ends(self) -> None:
        """It is over."""
        if self._draws is None:
            return
        self._draws.look()
        if self._draws.found:
            self._warn("by a model's own forward, or what that calls beside its layers", self._place)
        elif self._hosts is not None:
            self._hosts.look()
            if self._hosts.found:
                self._warn("by numpy or Python's random in a model's forward", self._place)

    def optimizer_stepped(self) -> None:
        """What is drawn from here on is for another batch."""
        if self._draws is None:
            return
        self._draws.begin_here()
        self._draws.found, self._between = False, True

    def _warn(self, where: str, place: str) -> None:
        self._end()
        self._is_over = True
        if self._ctx.rank == 0:
            warn(
                f"Random numbers are drawn {where} ({place}): the same on all ranks, which is right for what decides "
                "for all of them alike. Noise, masks or time steps of a rank's own samples should differ: draw them "
                "inside `with bmt.own_random():`.",
                stacklevel=2,
            )

    def _end(self) -> None:
        self._draws, self._hosts = self._ctx.device.watch_shared_draws(False), None
        self._ctx.device.watch_host_draws(False)
