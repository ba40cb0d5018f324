"""Whether user code has changed whole parameters in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Writes:
    """Notices writes into ``params``: by torch's version counts, or because ``.data`` was handed out."""

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        self._params = params
        self.forget()

    def expose(self) -> None:
        """User code holds ``p.data`` of a whole parameter, and may write to it unseen."""
        self._exposed = True

    @property
    def happened(self) -> bool:
        """Whether there may be any since ``forget``."""
        return self._exposed or self._versions != self._present()

    def forget(self) -> None:
        """What was written until now is kept already, or unwanted."""
        self._exposed, self._versions = False, self._present()

    def _present(self) -> list[int]:
        with torch._C.DisableTorchFunctionSubclass():
            return [p._version for p in self._params]
