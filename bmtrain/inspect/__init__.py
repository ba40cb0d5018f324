"""Statistics of parameters, gradients and intermediate results, for looking at a training run."""

from .format import format_summary
from .model import inspect_model
from .tensor import InspectTensor, inspect_tensor, record_tensor

__all__ = ["InspectTensor", "format_summary", "inspect_model", "inspect_tensor", "record_tensor"]
