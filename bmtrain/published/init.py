"""``context``'s functions under the published module name, and the published view of which ranks form which group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..context import context, init_distributed, is_initialized
from ..errors import ConfigurationError

__all__ = ["init_distributed", "is_initialized", "topology"]


class topology:
    """Where this rank stands.  Integers, under the published names.

    Of each kind of group, ``..._idx`` is the number of the group that this rank is in, and ``..._id`` its place there:
    ``tp`` (the slices of one layer), ``pipe`` (the stages of one pipeline; its place is ``stage_id``), ``zero`` (all
    ranks), ``pp_zero`` (those of one stage), ``tp_zero`` (those with one slice), ``pp_tp_zero`` (those with one slice
    of one stage).

    Args:
        config: ``bmt.config``, which says the same of every job.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        here = context().topology
        self.rank = here.rank
        self.stages = here.pipe_size
        self.stage_id = here.pipe_rank
        self.tp_id = here.tp_rank
        self.tp_idx = here.rank // here.tp_size
        self.pipe_idx = self.pp_zero_id = here.pipeline * here.tp_size + here.tp_rank
        self.pp_zero_idx = here.pipe_rank
        self.tp_zero_id = here.data_rank
        self.tp_zero_idx = here.tp_rank
        self.pp_tp_zero_id = here.pipeline
        self.pp_tp_zero_idx = here.pipe_rank * here.tp_size + here.tp_rank
        self.zero_id, self.zero_idx = here.rank, 0

    def get_group_id(self, group_name: str) -> int:
        """The number of this rank's group of a kind: "pipe", "zero", "tp_zero" or "tp"."""
        return self._of(group_name)[0]

    def get_group_rank(self, group_name: str) -> int:
        """This rank's place in that group."""
        return self._of(group_name)[1]

    def _of(self, group_name: str) -> tuple[int, int]:
        kinds = {
            "pipe": (self.pipe_idx, self.stage_id), "zero": (self.zero_idx, self.zero_id),
            "tp_zero": (self.tp_zero_idx, self.tp_zero_id), "tp": (self.tp_idx, self.tp_id),
        }  # fmt: skip
        if group_name not in kinds:
            raise ConfigurationError(f"There is no group {group_name!r}; there are {', '.join(kinds)}.")
        return kinds[group_name]
