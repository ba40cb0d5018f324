"""What must be there before anything else is imported, and what to do where it is not."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import TracebackType

OLDEST = (2, 9)
PRIVATE = (
    "torch._C._dynamo.eval_frame._FrameAction",
    "torch._C._dynamo.eval_frame._FrameExecStrategy",
    "torch._C._dynamo.eval_frame.set_code_exec_strategy",
    "torch._C._distributed_c10d.HashStore",
    "torch._C._distributed_c10d.PrefixStore",
    "torch._C._distributed_c10d.Store",
    "torch._C._distributed_c10d.TCPStore",
    "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack",
    "torch._guards.TracingContext",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch.autograd.graph._engine_run_backward",
    "torch.autograd.graph._get_grad_fn_or_grad_acc",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.nn.modules.batchnorm._NormBase",
    "torch.nn.modules.module._IncompatibleKeys",
    "torch.utils._pytree.keystr",
    "torch.utils._pytree.TreeSpec",
    "torch.utils._pytree.tree_flatten",
    "torch.utils._pytree.tree_flatten_with_path",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._pytree.tree_leaves",
    "torch.utils._pytree.tree_map",
    "torch.utils._pytree.tree_map_only",
    "torch.utils._pytree.tree_unflatten",
)
"""Names that torch does not promise to keep, and that are imported here."""


def check() -> None:
    """Raises ImportError, in one line, where torch is missing, too old, or without something that is needed of it."""
    wanted = f"bmtrain trains with torch {'.'.join(map(str, OLDEST))} or later"
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"{wanted}, and torch is not installed: pip install 'bmtrain[train]', or the build of torch for your GPU "
            "as https://pytorch.org says (bmt-convert works without it)"
        ) from None
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found and tuple(map(int, found.groups())) < OLDEST:
        raise ImportError(f"{wanted}, and this is torch {torch.__version__}: pip install --upgrade torch")
    missing = [name for name in PRIVATE if not _is_there(name)]
    if missing:
        raise ImportError(
            f"bmtrain needs {', '.join(missing)}, which torch {torch.__version__} does not have: "
            "install a newer bmtrain, or the torch before this one"
        )


def _is_there(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ImportError:
        return False


def _of_command() -> str:
    """The command of bmtrain's that this process is, to whose user a traceback says nothing; "" for any other."""
    name = Path(sys.argv[0]).name if sys.argv else ""
    if name == "-m" and sys.orig_argv[-len(sys.argv)].removeprefix("-m").split(".")[0] == "bmtrain":
        return "bmt"
    return name if name in ("bmt", "bmt-checkpoint", "bmt-doctor") else ""


def _interrupted(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(f"\n{_of_command()}: interrupted; nothing was done", file=sys.stderr)
    else:
        sys.__excepthook__(kind, value, traceback)


if _of_command():
    sys.excepthook = _interrupted  # what a command loads takes seconds; later it sees to that itself
try:
    check()
except ImportError as problem:
    if _of_command():
        sys.exit(f"{_of_command()}: {problem}")
    raise
