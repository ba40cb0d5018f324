"""Mixed precision as a policy: in which dtypes fp32 models compute, travel and answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map

from .errors import ConfigurationError

T = TypeVar("T")

_NAMES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, init=False)
class Precision:
    """The dtypes of a module's computation; what rests on the ranks, and so checkpoints, keeps its own dtype.

    Attributes:
        param: floating parameters are gathered in this dtype, and the module computes in it. None leaves them as they
            are, or as autocast would cast them.
        reduce: gradients travel and are summed over ranks in this dtype; None means the one they were computed in.
            However they travel, they are accumulated in fp32.
        output: floating tensors in the module's result are cast to this dtype; None leaves them. Given to
            ``init_distributed``, it concerns the model that is called, not the blocks inside it.
        cast_inputs: floating tensors among the module's arguments are cast to ``param``. Buffers are never cast.

    Each dtype is torch.float32, torch.float16, torch.bfloat16 or its name: "fp32", "fp16", "bf16".
    Raises ConfigurationError for any other.
    """

    param: torch.dtype | None
    reduce: torch.dtype | None
    output: torch.dtype | None
    cast_inputs: bool

    def __init__(
        self,
        param: torch.dtype | str | None = None,
        reduce: torch.dtype | str | None = None,
        output: torch.dtype | str | None = None,
        cast_inputs: bool = True,
    ) -> None:
        for field, given in (("param", param), ("reduce", reduce), ("output", output)):
            dtype = _NAMES.get(given, given) if isinstance(given, str) else given
            if dtype is not None and dtype not in _NAMES.values():
                raise ConfigurationError(
                    f"The {field} dtype of a precision is {given!r}; it must be None or one of "
                    f"{', '.join(map(repr, _NAMES))} (or that torch dtype)."
                )
            object.__setattr__(self, field, dtype)
        object.__setattr__(self, "cast_inputs", cast_inputs)

    @property
    def casts(self) -> bool:
        """Whether anything is cast where a module is called."""
        return self.output is not None or (self.cast_inputs and self.param is not None)

    def cast_arguments(self, arguments: T) -> T:
        """A tree of arguments as the module is to see them."""
        return _cast(arguments, self.param) if self.cast_inputs and self.param is not None else arguments

    def cast_result(self, result: T) -> T:
        """A tree of results as the caller is to see them."""
        return _cast(result, self.output) if self.output is not None else result


def as_precision(given: Precision | torch.dtype | str | None) -> Precision:
    """The policy that a user's argument names: a Precision, or the dtype to gather and compute in."""
    if isinstance(given, Precision):
        return given
    return Precision(param=given)


def _cast(tree: T, dtype: torch.dtype) -> T:
    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return tree_map(cast, tree)  # type: ignore[no-any-return]
