"""Whole gradients on their way into the buffer that is reduced.

Where it can be, a gradient is computed there (``Landing.place``); what autograd has accumulated by itself is brought
there when the backward is through (``Landing.collect``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..alike import differ, sums_of
from ..comm import Communicator
from ..errors import ConfigurationError
from .layout import Layout
from .parameter import DistributedParameter, raw_grads, set_raw_grad
from .pools import Buffer

_COMPARED = 3
"""How many of the first reductions are compared."""


class Landing:
    """The whole gradients of one flat shard; the buffer is taken from the pool when the first one comes.

    Args:
        alike: the tensor-parallel ranks, where all of them are to compute the same gradients.
    """

    def __init__(
        self,
        layout: Layout,
        params: Sequence[DistributedParameter],
        names: Sequence[str],
        acquire: Callable[[], Buffer],
        alike: Communicator | None,
    ) -> None:
        self._layout, self._params, self._names, self._acquire = layout, params, names, acquire
        self._alike, self._compares = alike, 0 if alike is None else _COMPARED
        self._buffer: Buffer | None = None
        self._landed = [False] * len(layout.slots)

    def place(self, index: int) -> tuple[torch.Tensor, bool]:
        """Where a whole gradient of parameter ``index`` goes, and whether it is the first to come."""
        if self._buffer is None:
            self._buffer = self._acquire()
        first, self._landed[index] = not self._landed[index], True
        return self._buffer.views(self._layout)[index], first

    def collect(self, touched: list[bool]) -> Buffer:
        """The buffer, with all gradients in it; notes in ``touched`` which parameters have one.

        A parameter without a gradient on this rank counts as zeros: another rank may have one.
        """
        buffer, landed = self._buffer or self._acquire(), self._landed
        self._buffer, self._landed = None, [False] * len(landed)
        views = buffer.views(self._layout)
        self._bring(views, landed, touched)
        if self._compares:
            self._require_alike(views)
        return buffer

    def _bring(self, views: list[torch.Tensor], landed: list[bool], touched: list[bool]) -> None:
        """Bring what did not land there to ``views``."""
        sources, targets = [], []
        for index, (raw, view) in enumerate(zip(raw_grads(self._params), views, strict=True)):
            if raw is not None and self._params[index].requires_grad:
                dense = raw.to_dense() if raw.is_sparse else raw
                if landed[index]:
                    view.add_(dense)
                else:
                    sources.append(dense)
                    targets.append(view)
                set_raw_grad(self._params[index], None)
            elif not landed[index]:
                view.zero_()
                continue
            touched[index] = True
        if sources:
            torch._foreach_copy_(targets, sources)

    def _require_alike(self, whole: list[torch.Tensor]) -> None:
        """Raises ConfigurationError when tensor-parallel ranks have computed different gradients of what is no slice.

        Collective in the tensor-parallel group.
        """
        assert self._alike is not None
        self._compares -= 1
        real = [torch.view_as_real(gradient) if gradient.is_complex() else gradient for gradient in whole]
        facts = torch.stack([sums_of(gradient.view(-1)) for gradient in real])
        every = facts.new_empty((self._alike.world_size, *facts.shape))
        self._alike.all_gather(facts, every)
        differing = differ(every).tolist()
        names = [name for name, differs in zip(self._names, differing, strict=True) if differs]
        if names:
            raise ConfigurationError(
                f"The tensor-parallel ranks have computed different gradients of {', '.join(names[:5])}"
                f"{' ...' if len(names) > 5 else ''}, as for parameters that see some rows of the batch only. Let "
                "activations be the same on all of them: ColumnParallelLinear(gather_input=False) and "
                "RowParallelLinear(all_reduce_output=True), and the same batch (bmt.shard_loader, bmt.shard_batch)."
            )

    def forget(self, index: int) -> None:
        """Nothing of a backward that an exception ended is wanted."""
        self._landed[index] = False

    def forget_all(self) -> None:
        """The same for all parameters."""
        self._landed = [False] * len(self._landed)

    def release(self) -> None:
        """The buffer goes, and what is in it."""
        self._buffer = None
        self.forget_all()

    @property
    def is_used(self) -> bool:
        """Whether whole gradients wait in the buffer."""
        return self._buffer is not None and any(self._landed)
