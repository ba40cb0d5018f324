"""What the published library hung around a block's forward.  Here the engine does it; a script may still do it by hand.

Gradients need no hooks: those of whole parameters are reduced when the backward is through.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from ..errors import ConfigurationError, UnsupportedError
from .block_layer import CheckpointBlockContext

__all__ = ["zero_post_backward", "zero_post_forward", "zero_pre_backward", "zero_pre_forward"]

_HELD = "_bmt_whole"  # in the module's __dict__


def zero_pre_forward(module: torch.nn.Module, inputs: Any) -> None:
    """Make ``module``'s parameters whole until ``zero_post_forward``.  Collective."""
    if _HELD in module.__dict__:
        raise ConfigurationError(f"zero_pre_forward: {type(module).__name__} is whole already; end that first.")
    module.__dict__[_HELD] = context = CheckpointBlockContext(module)
    context.enter()


def zero_post_forward(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
    """Release what ``zero_pre_forward`` has made whole."""
    context = module.__dict__.pop(_HELD, None)
    if context is None:
        raise ConfigurationError(f"zero_post_forward: call zero_pre_forward on {type(module).__name__} first.")
    context.exit()


def zero_pre_backward(module: torch.nn.Module, grad_inputs: Any) -> NoReturn:
    """Raises UnsupportedError: the backward gathers what it needs by itself."""
    raise UnsupportedError(
        "The backward of a block gathers its parameters and reduces their gradients by itself; leave out "
        "zero_pre_backward and zero_post_backward. To act on gradients, use module.register_full_backward_hook."
    )


zero_post_backward = zero_pre_backward
