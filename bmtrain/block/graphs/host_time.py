"""Whether steps are as long as the host needs to queue them, which recorded blocks would mend."""

from __future__ import annotations

from collections.abc import Callable

from ...context import Context
from ...device import Stopwatch
from ...log import say

_FROM, _UNTIL = 6, 8  # steps whose last forward is measured; by then it is settled what stays (``memory``)
_SHARE = 0.9  # of the device's time
_WORTH = 0.5  # of it: backward and optimizer ask more of the host than the forward, whose last operation is a long one


class HostTime:
    """Measures some forwards; if the host takes long enough, calls ``begin`` once, or says so if it is refused.

    Args:
        begin: lets blocks be recorded and returns True, or returns False.

    Attributes:
        wanted: whether a forward that begins is to be measured.
    """

    def __init__(self, ctx: Context, begin: Callable[[], bool]) -> None:
        self._ctx, self._begin = ctx, begin
        self._watch: Stopwatch | None = None
        self._found: list[tuple[float, float]] = []
        self._is_over = False

    @property
    def wanted(self) -> bool:
        """Whether a forward that begins is to be measured."""
        return not self._is_over and self._ctx.diary.step >= _FROM

    def forward_starts(self) -> None:
        """An outermost forward begins."""
        self._watch = self._ctx.device.stopwatch()

    def forward_ends(self) -> None:
        """It is over."""
        if self._watch is not None:
            self._watch.stop()

    def optimizer_stepped(self, has_blocks: bool) -> None:
        """A step is over; ``has_blocks``: there is something to be recorded."""
        watch, self._watch = self._watch, None
        times = None if watch is None else watch.read()
        if times is not None:
            self._found.append(times)
        if self._ctx.diary.step < _UNTIL:
            return
        self._is_over = True
        if not self._found or not has_blocks:
            return
        host, device = min(self._found, key=lambda pair: pair[0] / max(pair[1], 1e-9))  # not one that was late once
        if host < _WORTH * device or self._begin():
            return
        if self._ctx.rank == 0 and host >= _SHARE * device:
            say(
                f"the GPU waits for the host, which takes {1e3 * host:.1f} ms of a forward's {1e3 * device:.1f} ms: "
                "BMTRAIN_GRAPHS=1 lets blocks run as CUDA graphs, which are queued at once (docs/training.md)."
            )
