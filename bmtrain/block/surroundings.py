"""What a forward finds around it beside its inputs, and finds again when it runs once more in the backward."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..device import autocast_regions, in_autocast_regions

_C: Any = torch._C

_DYNAMO = "torch._dynamo.eval_frame"


def _compiler_stance() -> Any:
    """What ``torch.compiler.set_stance`` sets; None as long as nothing is compiled."""
    dynamo = sys.modules.get(_DYNAMO)
    return None if dynamo is None else dynamo._stance


def _set_compiler_stance(stance: Any) -> None:
    if stance is not None and stance != _compiler_stance():  # torch refuses it inside of compiled code
        sys.modules[_DYNAMO]._set_stance(stance)


_FLAGS: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
    (_C._get_sdp_priority_order, _C._set_sdp_priority_order),  # the first, see ``settle``
    (_C._get_flash_sdp_enabled, _C._set_sdp_use_flash),
    (_C._get_mem_efficient_sdp_enabled, _C._set_sdp_use_mem_efficient),
    (_C._get_math_sdp_enabled, _C._set_sdp_use_math),
    (_C._get_cudnn_sdp_enabled, _C._set_sdp_use_cudnn),
    (_C._get_overrideable_sdp_enabled, _C._set_sdp_use_overrideable),
    (_C._get_cudnn_enabled, _C._set_cudnn_enabled),
    (_C._get_cudnn_deterministic, _C._set_cudnn_deterministic),
    (_C._get_mkldnn_enabled, _C._set_mkldnn_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (_compiler_stance, _set_compiler_stance),
]
"""What ``sdpa_kernel``, ``torch.backends.*.flags``, ``set_default_dtype`` and ``set_stance`` set: how to read it, in
some nanoseconds, and how to set it."""


class Surroundings:
    """Those of the code that makes it: autocast, default device and dtype, kernels allowed, torch function modes, and
    whether code is compiled.
    """

    def __init__(self) -> None:
        self._autocast = autocast_regions()
        self._flags = [read() for read, _ in _FLAGS]
        self._modes = _function_modes()
        self._all_disabled, self._enabled = _C._is_torch_function_all_disabled(), _C._is_torch_function_enabled()

    def settle(self) -> None:
        """The first run is over.  A GPU's own order of attention kernels is there only once attention has been used."""
        self._flags[0] = _FLAGS[0][0]()

    def are_like(self, others: Surroundings) -> bool:
        """Whether code does the same in either."""
        return (
            self._flags == others._flags
            and self._autocast == others._autocast
            and len(self._modes) == len(others._modes)
            and all(map(operator.is_, self._modes, others._modes))
            and (self._all_disabled, self._enabled) == (others._all_disabled, others._enabled)
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run the body in them."""
        with ExitStack() as stack:
            stack.enter_context(in_autocast_regions(self._autocast))
            there = _function_modes()
            if len(there) != len(self._modes) or any(map(operator.is_not, there, self._modes)):
                stack.callback(_set_function_modes, there)
                _set_function_modes(self._modes)
            present = [read() for read, _ in _FLAGS]
            if present != self._flags:
                stack.callback(_set_flags, present)
                _set_flags(self._flags)
            if self._all_disabled:
                stack.enter_context(_C.DisableTorchFunction())
            elif not self._enabled:
                stack.enter_context(_C.DisableTorchFunctionSubclass())
            yield


def _set_flags(values: list[Any]) -> None:
    for (_, write), value in zip(_FLAGS, values, strict=True):
        write(value)


def _function_modes() -> list[TorchFunctionMode]:
    """Those that are on, the innermost last; a default device is one."""
    return [_C._get_function_stack_at(index) for index in range(_C._len_torch_function_stack())]


def _set_function_modes(modes: list[TorchFunctionMode]) -> None:
    """Let these be on and no others, just as they are: without what entering and leaving them does."""
    while _C._len_torch_function_stack():
        _C._pop_torch_function_stack()
    for mode in modes:
        _C._push_on_torch_function_stack(mode)
