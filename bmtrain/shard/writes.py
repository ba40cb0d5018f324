"""Whether user code has changed whole parameters in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Writes:
    """Notices writes into ``params``: by torch's version counts, or because ``.data`` was handed out."""

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        self._params = params
        self.forget()

    def expose(self, shown: torch.Tensor | None = None) -> None:
        """User code holds ``p.data`` of a whole parameter; ``shown``, to learn in ``seen`` what it has done with it."""
        self._exposed = True
        if shown is not None:
            self._shown.append((shown, shown._version))

    @property
    def happened(self) -> bool:
        """Whether there may be any since ``forget``."""
        return self._exposed or self._versions != self._present()

    def seen(self) -> list[int]:
        """The parameters that certainly were written to since."""
        written = {p.data_ptr() for p, version in self._shown if p._version != version}
        with torch._C.DisableTorchFunctionSubclass():
            addresses = [p.data_ptr() for p in self._params]
        present = zip(self._versions, self._present(), addresses, strict=True)
        return [n for n, (before, now, address) in enumerate(present) if before != now or address in written]

    def forget(self) -> None:
        """What was written until now is kept already, or unwanted."""
        self._exposed, self._versions = False, self._present()
        self._shown: list[tuple[torch.Tensor, int]] = []

    def _present(self) -> list[int]:
        with torch._C.DisableTorchFunctionSubclass():
            return [p._version for p in self._params]
