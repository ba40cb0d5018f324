"""Views of sharded parameters, taken outside of forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch

from .flat import flat_of
from .parameter import DistributedParameter


class ViewOfSharded(torch.Tensor):
    """A copy of a part of whole parameters, which shows what they hold and writes to them, as the view would.

    Outside of autograd only: a copy that requires grad is an ordinary tensor.

    Attributes:
        parameters: of what it is a view.
        again: makes the view itself, while they are whole.
        operation: carries out a torch function that got at least one; ``rules``, which stands above, sets it.
    """

    operation: ClassVar[Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]]
    parameters: Sequence[DistributedParameter]
    again: Callable[[], torch.Tensor]
    _versions: list[int]

    @classmethod
    def of(
        cls, copy: torch.Tensor, parameters: Sequence[DistributedParameter], again: Callable[[], torch.Tensor]
    ) -> ViewOfSharded:
        """``copy``, which is as fresh as can be, with what makes it follow."""
        made = copy.as_subclass(cls)
        made.parameters, made.again = parameters, again
        made._versions = made._present_versions()
        return made

    @property
    def is_fresh(self) -> bool:
        """Whether nobody has changed the parameters since."""
        return self._versions == self._present_versions()

    def refresh(self, values: torch.Tensor) -> None:
        """Take ``values``, which are the present ones."""
        self.as_subclass(torch.Tensor).copy_(values)
        self._versions = self._present_versions()

    def _present_versions(self) -> list[int]:
        return [flat.version for flat in map(flat_of, self.parameters) if flat is not None]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return cls.operation(func, args, kwargs or {})
