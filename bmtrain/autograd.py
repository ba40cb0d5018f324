"""What autograd is doing now.  The one place that asks it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from threading import get_ident
from types import FrameType
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd.graph import GradientEdge, _engine_run_backward, _get_grad_fn_or_grad_acc, get_gradient_edge

from .users_code import calling_frame

Node = torch.autograd.graph.Node
P = ParamSpec("P")
T = TypeVar("T")
CallT = TypeVar("CallT", bound=Callable[..., Any])


class ScriptsAsWritten:
    """TorchScript functions run operation by operation inside the ``with``, every time alike.

    Its executor would otherwise profile, and save other tensors from the second or third call on; once it does, it
    does so wherever the function is called.  Holds for the thread that enters, which is the one to leave.
    """

    def __enter__(self) -> None:
        self._thread = get_ident()
        self._optimizes = torch._C._get_graph_executor_optimize()
        torch._C._set_graph_executor_optimize(False)

    def __exit__(self, *_: object) -> None:
        torch._C._set_graph_executor_optimize(self._optimizes)

    @property
    def is_of_this_thread(self) -> bool:
        """Whether the thread that entered is this one."""
        return get_ident() == self._thread


def version_of(tensor: torch.Tensor) -> int:
    """How often it was changed in place; 0 of one made in inference mode, of which torch does not count that."""
    return 0 if tensor.is_inference() else tensor._version


def of_no_graph(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as what keeps saved tensors may keep it: a node's own result holds that node, which holds it.

    The collector of garbage does not see such a circle, which is no matter where a backward runs and lets go of what
    was saved.  Autograd gives back what is kept with the node that it knows.
    """
    return tensor if tensor.is_leaf else tensor.detach()


@torch._disable_dynamo  # type: ignore[attr-defined]
def outside_of_compiled_code(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``call(*args, **kwargs)``, which is no part of a graph: in one it would happen when that is made, or never."""
    return call(*args, **kwargs)


# What torch says where a script asks for one graph around it; a name of ours alone would tell nobody what to do.
outside_of_compiled_code._torchdynamo_disable = True  # type: ignore[attr-defined]
outside_of_compiled_code._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "bmtrain gathers parameters, and asks other ranks, between pieces of compiled code. Leave out fullgraph=True, or "
    "compile the model by bmt.compile(model, fullgraph=True), which holds for each block"
)


def runs_as_written(call: CallT) -> CallT:
    """Decorator for what ends in a collective, or is called by autograd, between pieces of compiled code.

    torch.compile leaves its frames alone, and those of what it calls; it would look for code to compile in each.
    """
    function: Any = call
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return call


def never_compiled(call: Callable[P, T]) -> Callable[P, T]:
    """Decorator: ``call`` runs outside of compiled code, wherever it is called."""

    @runs_as_written
    @functools.wraps(call)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_dynamo_compiling():
            return outside_of_compiled_code(call, *args, **kwargs)
        return call(*args, **kwargs)

    return run


def constant_in_compiled_code(call: CallT) -> CallT:
    """Decorator for what compiled code asks once, when it is made; other guards of it must tell when that changes.

    As torch.compiler.assume_constant_result, which imports what compiles code, for seconds.
    """
    call._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return call


def backward_id() -> int | None:
    """A number of the backward that is running in this thread; None if none is."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else task


def when_backward_ends(call: Callable[[], None]) -> None:
    """Let the running backward ``call`` when it is through."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def running_backward() -> tuple[tuple[torch.Tensor | GradientEdge, ...], FrameType | None]:
    """What the running backward began with, and where it was called; nothing if that is not found.

    On a GPU a thread of autograd's runs its nodes, and whoever has called it waits in another.
    """
    waiting = [_caller_of_engine(frame) for thread, frame in sys._current_frames().items() if thread != get_ident()]
    for at in (_caller_of_engine(sys._getframe(1)), *waiting):
        if at is not None:
            return tuple(at.f_locals["t_outputs"]), at
    return (), None


def _caller_of_engine(at: FrameType | None) -> FrameType | None:
    while at is not None and at.f_code is not _engine_run_backward.__code__:
        at = at.f_back
    return at


_OUTPUT = "bmt_output"


def is_for_edge() -> bool:
    """Whether torch.autograd.graph.get_gradient_edge waits for what runs now."""
    at = calling_frame()
    if at is None or at.f_back is None or at.f_code is not _get_grad_fn_or_grad_acc.__code__:
        return False
    return at.f_back.f_code is get_gradient_edge.__code__


def mark_output(node: Node) -> None:
    """``node`` made what a model returned.  The mark holds nothing, and lives as long as the node."""
    _notes(node)[_OUTPUT] = True


def is_output(node: Node) -> bool:
    """Whether that was marked."""
    return _OUTPUT in _notes(node)


def _notes(node: Node) -> dict[str, object]:
    notes: Any = node.metadata  # a property, whatever torch's annotations say
    return cast(dict[str, object], notes)


def in_function_transform() -> bool:
    """Whether a transform of torch.func (grad, vmap, ...) is running; under it nothing may see what autograd saves."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def outside_function_transforms() -> AbstractContextManager[object]:
    """Tensors made inside the ``with`` are ordinary ones, whatever transform of torch.func is running."""
    return temporarily_clear_interpreter_stack()


def running_node() -> Node:
    """The node whose backward, or whose hook, is running."""
    return torch._C._current_autograd_node()


def accumulator_among_inputs(parameter: torch.Tensor) -> Node:
    """The node that adds to ``parameter.grad``, in the graph of the running node, which has it as an input.

    Not the one that the parameter itself would name: a gather in another dtype than it rests in makes autograd forget
    that one and give the parameter another, which is in no graph yet.
    """
    for node, _ in running_node().next_functions:
        if getattr(node, "variable", None) is parameter:
            assert node is not None
            return node
    raise AssertionError("the parameter is no input of the code that computes its gradient")


def edge_of(leaf: torch.Tensor) -> GradientEdge:
    """Where gradients of ``leaf`` arrive now, in graphs to come.  Raises RuntimeError unless it requires grad."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.autograd.graph.get_gradient_edge(leaf)


def leaves_behind(roots: Iterable[torch.Tensor | GradientEdge | Node]) -> Iterator[tuple[torch.Tensor, GradientEdge]]:
    """Every leaf that ``roots`` were computed from, and where its gradient arrives in their graph.

    Walks the whole graph, which costs the host about a microsecond for every node.
    """
    seen: set[Node] = set()
    waiting: list[Node | None] = [
        root.grad_fn if isinstance(root, torch.Tensor) else root.node if isinstance(root, GradientEdge) else root
        for root in roots
    ]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(edge[0] for edge in node.next_functions)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, torch.Tensor):
            yield leaf, GradientEdge(node, 0)


def is_accumulated(node: Node | None) -> bool | None:
    """Whether the running backward adds to the ``.grad`` whose node this is.

    False for a backward that does not reach it; None where torch.autograd.grad is to return it.
    """
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return None


def will_run(node: Node) -> bool:
    """Whether the running backward comes to ``node``, which adds to no ``.grad``."""
    return torch._C._will_engine_execute_node(node)


def running_node_saves_with(pack: Callable[[torch.Tensor], object], unpack: Callable[[object], torch.Tensor]) -> None:
    """Let what the running node saves, as its backward is to be differentiated in turn, go through these hooks.

    They end with the node: the engine runs each with the hooks that were there when the backward began.
    """
    if backward_id() is not None:
        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def saves_with(pack: Callable[[torch.Tensor], object]) -> bool:
    """Whether tensors that are saved now come to ``pack``, and not to hooks of somebody else inside."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return top is not None and top[0] is pack
