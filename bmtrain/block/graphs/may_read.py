"""What the Python of a module may read.

Found by the names in its code, from the forwards of the module, and the functions that a run has called, to whatever
they name: globals, attributes of modules and classes, what lists, dicts and objects hold, functions, and so on.
"""

from __future__ import annotations

import ast
import dis
import inspect
import os
import pickle
import sys
import textwrap
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import Field
from functools import lru_cache, partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from ...own_random import generator_state, is_generator

CONSTANTS = (bool, int, float, str, bytes, type(None), torch.dtype)
CONTAINERS = (dict, list, set, deque)

_MOST = 20_000  # values; comparing more takes longer than a recording saves
_FEW = 64  # elements of a tensor whose values are compared
OURS = ("torch", "bmtrain", "triton")  # what code in these reads does not change, or is looked at elsewhere
_CLOSED = ("logging", "threading", "re", "typing", "weakref", "numpy", *OURS)  # packages of objects
_OPEN = ("torch.optim", "torch.distributions")  # in these, whose objects hold what changes
_UNNAMED = frozenset(("eval", "exec", "globals", "locals", "vars", "import_module", "__import__"))
_ASK_BY_NAME = frozenset(("getattr", "setattr", "hasattr"))
_ASK_FOR_ANY = frozenset(("__getattribute__", "__dict__", "attrgetter"))
_NAMED_BY_PYTHON = ("forward", "__call__", "__getitem__", "__getattr__")
_OF_FUNCTIONS = ("forward", "backward", "setup_context")  # of torch.autograd.Function

Executed = dict[CodeType, dict[str, Any]]
"""Code of functions that were called, and its globals."""


class _Names(NamedTuple):
    """What code names: globals, modules that it imports, and attributes, of whatever."""

    variables: frozenset[str]
    imports: frozenset[str]
    attributes: frozenset[str]


@lru_cache(4096)
def _names_in(code: CodeType) -> _Names:
    variables, imports, attributes = set[str](), set[str](), set[str]()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL"):
            variables.add(step.argval)
        elif step.opname == "IMPORT_NAME":
            imports.add(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "STORE_ATTR", "IMPORT_FROM"):
            attributes.add(step.argval)
    for value in code.co_consts:
        if isinstance(value, CodeType):  # functions inside, which run now or as hooks in the backward
            inner = _names_in(value)
            variables |= inner.variables
            imports |= inner.imports
            attributes |= inner.attributes
        elif isinstance(value, str) and value.isidentifier():
            attributes.add(value)  # of getattr
    return _Names(frozenset(variables), frozenset(imports), frozenset(attributes))


@lru_cache(4096)
def _asks_for_any_name(code: CodeType, names: _Names) -> bool:
    """Whether ``code`` puts names of attributes together while it runs, or may: its source is not there."""
    if (names.variables | names.attributes) & _ASK_FOR_ANY:
        return True
    if not names.variables & _ASK_BY_NAME:
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return True
    asks = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in _ASK_BY_NAME]
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.func in asks)
    return sum(len(call.args) > 1 and isinstance(call.args[1], ast.Constant) for call in calls) < len(asks)


class MayRead:
    """What the forwards of ``module``, and functions that were ``executed`` meanwhile, may read.

    Goes from name to name.

    Attributes:
        dicts, others: containers whose elements count.
        names: namespaces, and names in them.
        slots: objects, and names of their slots that are filled.
        cells: variables of enclosing functions.
        asked: by object and attribute, gives what is not held in any of these.
        tensors: those that are there, for where they lie.
        reason: why not all that counts can be compared.
        unseen: why not all that counts may have been found.
    """

    def __init__(self, module: nn.Module, executed: Executed) -> None:
        self.dicts: list[dict[Any, Any]] = []
        self.others: list[Any] = []
        self.names: list[tuple[Mapping[str, Any], str]] = []
        self.slots: list[tuple[object, str]] = []
        self.cells: list[CellType] = []
        self.asked: dict[tuple[int, str], Callable[[], Any]] = {}
        self.tensors: list[torch.Tensor] = []
        self.reason: str | None = None
        self.unseen: str | None = None
        self._inside = set(module.modules())
        self._home = next((parameter.device for parameter in module.parameters()), None)
        self._seen: dict[int, object] = {}
        self._code: set[CodeType] = set()
        self._count = 0
        self._owners: dict[type | ModuleType, None] = {}
        self._known: set[type] = set()  # classes of torch
        self._any_name = False  # whether code puts names of attributes together
        self._all_of: set[ModuleType | type] = set()
        self._attributes = set(_NAMED_BY_PYTHON)
        self._waiting: list[Any] = []
        for inner in module.modules():
            self._holds(inner.__dict__)
            self._is_instance(type(inner))
        for code, variables in executed.items():
            self._runs(code, variables)
        resolved: set[tuple[type | ModuleType, str]] = set()
        while self._waiting or self._resolve(resolved):
            while self._waiting and self.reason is None:
                self._look(self._waiting.pop())
                if self._count > _MOST:
                    self.reason = "its Python may read more than can be compared"
            if self.reason is not None:
                break

    def _resolve(self, resolved: set[tuple[type | ModuleType, str]]) -> bool:
        """Look at what classes and modules have under the names that came up; whether there is anything new."""
        new = [(owner, name) for owner in self._owners for name in self._attributes.intersection(vars(owner))]
        new = [pair for pair in new if pair not in resolved]
        resolved.update(new)
        for owner, name in new:
            self._names(vars(owner), name)
        if not new and self._any_name:
            for owner in self._owners:
                self._names_all(owner)
        return bool(new or self._waiting)

    def _names_all(self, owner: ModuleType | type) -> None:
        """Compare all that ``owner`` has.  What functions among it read is looked at where they are called."""
        if owner in self._all_of:
            return
        self._all_of.add(owner)
        space = vars(owner)
        self.names += [(space, name) for name in space]
        self._waiting += [value for value in space.values() if isinstance(value, CONTAINERS)]

    def _names(self, space: Mapping[str, Any], name: str) -> object:
        value = space.get(name)
        self._count += 1
        self.names.append((space, name))
        self._waiting.append(value)
        return value

    def _holds(self, container: Any) -> None:
        self._count += len(container)
        if self._count > _MOST:
            return
        if isinstance(container, dict):
            self.dicts.append(container)
            self._waiting += container.values()
        else:
            if not isinstance(container, (tuple, frozenset)):
                self.others.append(container)
            self._waiting += container

    def _asks(self, value: Any, name: str, ask: Callable[[], Any]) -> None:
        self.asked[id(value), name] = ask
        self._waiting.append(ask())

    def _is_instance(self, of_class: type) -> None:
        for base in of_class.__mro__:
            if is_in(base.__module__, OURS):
                if base not in self._known:
                    self._known.add(base)
                    self._names_alone(base, ("forward",))
            elif base.__module__ not in sys.stdlib_module_names:
                self._owners[base] = None

    def _names_alone(self, owner: ModuleType | type, names: Iterable[str]) -> list[Any]:
        """What torch has under these names, which others may put something else under, and which keeps nothing."""
        space = vars(owner)
        there = [name for name in names if name in space]
        self.names += [(space, name) for name in there]
        return [space[name] for name in there]

    def _runs(self, code: CodeType, variables: dict[str, Any]) -> None:
        if code in self._code:
            return
        self._code.add(code)
        names = _names_in(code)
        self._attributes |= names.attributes
        if names.variables & _UNNAMED:
            self.unseen = self.unseen or f"{code.co_name}() may read what it does not name"
        any_name = _asks_for_any_name(code, names)
        self._any_name |= any_name
        owners = [self._names(variables, name) for name in names.variables if name in variables]
        owners += [sys.modules.get(name) for name in names.imports]
        known: set[int] = set()
        while owners:
            owner = owners.pop()
            if not isinstance(owner, (ModuleType, type)) or id(owner) in known:
                continue
            known.add(id(owner))
            package = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
            if package == "os":
                self._waiting.append(os.environ)
            elif is_in(package, OURS):
                owners += filter(_is_module, self._names_alone(owner, names.attributes))
            elif package not in sys.stdlib_module_names:
                space = vars(owner)
                owners += [self._names(space, name) for name in names.attributes if name in space]
                if any_name:
                    self._names_all(owner)

    def _look(self, value: Any) -> None:
        # A class has read its fields (of a dataclass) when it was made; what defaults it has are its attributes.
        if isinstance(value, (*CONSTANTS, BuiltinFunctionType, Field)) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, ModuleType):
            if not is_in(value.__name__, (*_CLOSED, *sys.stdlib_module_names)):
                self._owners[value] = None
        elif isinstance(value, nn.Module):
            if value not in self._inside:
                self.unseen = self.unseen or f"it may read a {type(value).__name__} that is not inside"
        elif isinstance(value, torch.Tensor):
            if type(value) is torch.Tensor and value.layout is torch.strided:
                self._look_at_tensor(value)
        elif isinstance(value, FunctionType):
            self._look_at_function(value)
        elif isinstance(value, type):
            self._is_instance(value)
            if issubclass(value, torch.autograd.Function):
                self._attributes.update(_OF_FUNCTIONS)
        elif isinstance(value, MethodType):
            self._waiting += (value.__self__, value.__func__)
        elif isinstance(value, partial):
            self._waiting += (value.func, value.args, value.keywords)
        elif isinstance(value, property):
            self._waiting.append(value.fget)
        elif isinstance(value, (staticmethod, classmethod)):
            self._waiting.append(value.__func__)
        elif isinstance(value, (*CONTAINERS, tuple, frozenset)):
            self._holds(value)
        elif is_generator(value):
            self.asked[id(value), ""] = lambda: pickle.dumps(generator_state(value))
        elif isinstance(value, ContextVar):
            self._asks(value, "", lambda: value.get(None))
        elif isinstance(value, weakref.ref):
            self._asks(value, "", value)
        elif isinstance(value, _arrays()):
            self._count += value.size
            self.asked[id(value), ""] = value.tobytes
        elif isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools"):
            self.reason = f"its Python may read a {type(value).__name__}, which is another each time"
        elif not is_in(type(value).__module__, _CLOSED) or type(value).__module__.startswith(_OPEN):
            self._look_at_object(value)

    def _look_at_tensor(self, tensor: torch.Tensor) -> None:
        self.tensors.append(tensor)
        if tensor.device.type != "cpu" or self._home in (None, tensor.device):
            return
        # Read by the host, its value is a constant of the recording.
        few = tensor.numel() <= _FEW
        ask = partial(_bytes_of, tensor) if few else partial(getattr, tensor, "_version")
        self.asked[id(tensor), "value"] = ask
        if not few:
            self.unseen = self.unseen or "it may read a large tensor on the CPU"

    def _look_at_function(self, function: FunctionType) -> None:
        if is_in(function.__module__ or "", (*OURS, *sys.stdlib_module_names)):
            return
        for cell in function.__closure__ or ():
            value = contents(cell)
            if not isinstance(value, type):  # as of super()
                self.cells.append(cell)
            self._waiting.append(value)
        self._waiting += (function.__defaults__, function.__kwdefaults__, vars(function))
        self._runs(function.__code__, function.__globals__)

    def _look_at_object(self, value: Any) -> None:
        self._is_instance(type(value))
        held = getattr(value, "__dict__", None)
        if isinstance(held, dict):
            self._holds(held)
        if held is None and not any("__slots__" in vars(base) for base in type(value).__mro__):
            if type(value).__module__ not in sys.stdlib_module_names:
                self.unseen = self.unseen or f"it may read a {type(value).__name__}, which does not show what it holds"
        for base in type(value).__mro__:
            slots = vars(base).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name.startswith("__"):
                    continue
                if hasattr(value, name):
                    self.slots.append((value, name))
                    self._waiting.append(getattr(value, name))
                else:
                    self._asks(value, name, partial(getattr, value, name, None))


def is_in(module: str, packages: Sequence[str]) -> bool:
    """Whether ``module`` is one of ``packages``, or inside."""
    return module.partition(".")[0] in packages


def contents(cell: CellType) -> Any:
    """What the variable of an enclosing function holds; None if nothing."""
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _is_module(value: object) -> bool:
    return isinstance(value, ModuleType)


def _arrays() -> tuple[type[Any], ...]:
    numpy = sys.modules.get("numpy")
    return () if numpy is None else (numpy.ndarray,)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().reshape(-1).contiguous().view(torch.uint8).tolist())
