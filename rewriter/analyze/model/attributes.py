"""What the attributes of a module are, as its constructor makes them."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Mapping
from functools import lru_cache

from rewriter.analyze.model.tensors import WHOLE, Chain, Dim, Linear, Num, Object, Simple, Tensor, Value
from rewriter.analyze.read.classes import Classes
from rewriter.analyze.read.file import ClassInfo, External, File, FunctionInfo
from rewriter.analyze.read.nodes import Function, assigned_by, self_path, walk

_EACH = {
    "GELU", "ReLU", "SiLU", "Dropout", "Identity", "Tanh", "Sigmoid", "LeakyReLU", "ELU", "Mish", "Hardswish",
    "Softplus", "ReLU6", "AlphaDropout", "CELU", "SELU", "LogSigmoid", "Softsign",
}  # fmt: skip
_NORMS = {"LayerNorm", "RMSNorm"}
_TABLES = ("transformers.activations.ACT2FN", "transformers.activations.get_activation")
_OPTIONS = {"bias", "device", "dtype", "in_features", "out_features"}
_HEADS = re.compile(r"head|slope|alibi", re.I)
_OF_ONE_HEAD = re.compile(r"head_?(dim|size|width)|(dim|size|width|d)_?(per_)?head$", re.I)
_MADE_OF_SIZES = {"ones", "zeros", "empty", "rand", "randn"}


def simple_kind(name: str) -> str:
    """How a class of torch works, by its whole name: "each", "norm", or nothing that is known."""
    package, _, last = name.rpartition(".")
    if package != "torch.nn":
        return "each" if name.startswith(_TABLES) else ""
    return "each" if last in _EACH else "norm" if last in _NORMS else ""


class Attributes:
    """Answers about the attributes of modules, remembered."""

    def __init__(self, classes: Classes) -> None:
        self.classes = classes
        self.project = classes.project
        self.assigned = lru_cache(maxsize=None)(self._assigned)

    def _assigned(self, info: ClassInfo) -> dict[str, list[tuple[ast.expr, File, Function]]]:
        """What a class and those above give each attribute; buffers and parameters that are registered, too."""
        found: dict[str, list[tuple[ast.expr, File, Function]]] = {}
        for member in (info, *self.classes.ancestors(info)):
            for function in member.methods.values():
                me = function.args.args[0].arg if function.args.args else ""
                for node in walk(function):
                    given: list[tuple[str, ast.expr]] = []
                    if isinstance(node, ast.Assign):
                        given = [(self_path(item, me), value) for item, value in assigned_by(node)]
                    elif isinstance(node, ast.AnnAssign) and node.value is not None:
                        given = [(self_path(node.target, me), node.value)]
                    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) == 2:
                        if node.func.attr in ("register_buffer", "register_parameter", "add_module"):
                            name = node.args[0]
                            if isinstance(name, ast.Constant) and isinstance(node.func.value, ast.Name):
                                given = [(str(name.value), node)]
                    for path, value in given:
                        if path:
                            found.setdefault(path, []).append((value, member.file, function))
        return found

    def value(self, owner: Object, name: str) -> Value:
        """What ``owner.name`` is."""
        given = self.assigned(owner.cls).get(name, [])
        path = f"{owner.name}.{name}" if owner.name else name
        found = (self._made(value, file, function, path) for value, file, function in given)
        made = [value for value in found if value is not None]
        if not made:
            return Num(path, attribute=name)
        if len(made) == 1 and isinstance(made[0], (Linear, Object, Chain, Simple, Tensor)):
            return made[0]
        return _one_of(made, path)

    def _made(self, value: ast.expr, file: File, function: Function, path: str) -> Value | None:
        """A module, or a tensor, or nothing that this says."""
        if isinstance(value, ast.IfExp):
            sides = [self._made(side, file, function, path) for side in (value.body, value.orelse)]
            kinds = [side for side in sides if side is not None]
            return _one_of(kinds, path) if kinds else None
        if isinstance(value, ast.Subscript) and self.project.external(file, value.value) in _TABLES:
            return Simple(path, "each")
        if not isinstance(value, ast.Call):
            return None
        if isinstance(value.func, ast.Attribute) and value.func.attr in ("register_buffer", "register_parameter"):
            return Tensor(hidden=value.func.attr == "register_parameter" or self._for_heads(value.args[1], function))
        found = self.project.resolve(file, value.func)
        if found is None and isinstance(value.func, ast.Name):
            found = self._default(value.func.id, file, function)
        if isinstance(found, ClassInfo) and self.classes.kind(found) in ("module", "distributed"):
            return Object(found, path)
        if self._may_be_tensor(value, found, file, path) and self._for_heads(value, function):
            return Tensor(hidden=True)
        if isinstance(found, External):
            return self._external(found.name, value, file, function, path)
        return Tensor(hidden=True) if isinstance(found, ClassInfo) and self.classes.is_module(found) else None

    def _external(self, name: str, call: ast.Call, file: File, function: Function, path: str) -> Value | None:
        if name == "torch.nn.Linear":
            plain = all(keyword.arg in _OPTIONS for keyword in call.keywords) and function.name == "__init__"
            if not plain or any(isinstance(argument, ast.Starred) for argument in call.args):
                return Tensor(hidden=True)
            out = next((k.value for k in call.keywords if k.arg == "out_features"), None)
            return Linear(path, call.args[1] if len(call.args) > 1 else out)
        if name == "torch.nn.Sequential" and not any(isinstance(argument, ast.Starred) for argument in call.args):
            members = [
                self._made(argument, file, function, f"{path}.{number}") for number, argument in enumerate(call.args)
            ]
            whole = [member for member in members if member is not None]
            return Chain(tuple(whole)) if len(whole) == len(members) and whole else Tensor(hidden=True)
        if name in ("torch.nn.Parameter", "bmtrain.DistributedParameter"):
            return Tensor(self._sizes(call, file, path), hidden=True)
        if name.startswith("torch.nn."):
            kind = simple_kind(name)
            several = kind == "norm" and any(isinstance(argument, (ast.Tuple, ast.List)) for argument in call.args)
            return Simple(path, kind) if kind and not several else Tensor(hidden=True)
        return Simple(path, "each") if simple_kind(name) else None

    def _may_be_tensor(self, call: ast.Call, found: object, file: File, path: str) -> bool:
        """Whether a call may make a tensor: a function does that is not known, and ``torch.ones(2).view(1, -1)``."""
        if is_count(path.rpartition(".")[2]):
            return False
        if isinstance(found, FunctionInfo) or (isinstance(call.func, ast.Name) and found is None):
            return not hasattr(builtins, getattr(call.func, "id", ""))
        while isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Call):
            call = call.func.value
        package, _, _ = self.project.external(file, call.func).rpartition(".")
        return package == "torch"

    def _sizes(self, call: ast.Call, file: File, path: str) -> tuple[Dim, ...] | None:
        """The dimensions of ``nn.Parameter(torch.ones(width))``, where they are seen."""
        made = call.args[0] if call.args else None
        if not isinstance(made, ast.Call):
            return None
        package, _, name = self.project.external(file, made.func).rpartition(".")
        if package != "torch" or not (name in _MADE_OF_SIZES or name == "tensor"):
            return None
        if name == "tensor":
            return () if len(made.args) == 1 and isinstance(made.args[0], ast.Constant) else None
        sizes = made.args
        if len(sizes) == 1 and isinstance(sizes[0], (ast.Tuple, ast.List)):
            sizes = sizes[0].elts
        elif len(sizes) == 1 and re.search(r"shape$|sizes$|dims$", ast.unparse(sizes[0])):
            return None
        if not sizes or any(isinstance(size, ast.Starred) for size in sizes):
            return None
        return tuple(Dim("1" if ast.unparse(size) == "1" else f"{path}[{i}]") for i, size in enumerate(sizes))

    def _for_heads(self, value: ast.AST, function: Function) -> bool:
        """Whether a tensor may have an entry for each head: what it is made of counts heads, also by other names."""
        names = {
            target.id: node.value
            for node in walk(function)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        me = function.args.args[0].arg if function.args.args else ""
        names |= {
            f"{me}.{self_path(target, me)}": node.value
            for node in walk(function)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if self_path(target, me)
        }
        return _counts_heads(value, names, set())

    def _default(self, name: str, file: File, function: Function) -> External | ClassInfo | None:
        """The class that an argument ``act_layer=nn.GELU`` stands for, if nobody gives it one of another kind."""
        arguments = [*function.args.posonlyargs, *function.args.args]
        pairs = list(zip(reversed([a.arg for a in arguments]), reversed(function.args.defaults), strict=False))
        pairs += [(a.arg, d) for a, d in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True) if d]
        default = next((value for argument, value in pairs if argument == name), None)
        found = self.project.resolve(file, default) if default is not None else None
        if not isinstance(found, External) or not simple_kind(found.name):
            return None
        for other in self.project:
            for call in other.calls if other.mentions(name) else ():
                for keyword in call.keywords:
                    given = self.project.resolve(other, keyword.value) if keyword.arg == name else found
                    if given is not None and (not isinstance(given, External) or not _alike(given.name, found.name)):
                        return None
        return found


def _alike(one: str, other: str) -> bool:
    return simple_kind(one) == simple_kind(other)


def is_count(word: str) -> bool:
    """Whether something that is called so may count heads, or have an entry for each."""
    return bool(_HEADS.search(word)) and not _OF_ONE_HEAD.search(word)


def _counts_heads(node: ast.AST, names: Mapping[str, ast.expr], seen: set[str]) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Div, ast.FloorDiv)):
        return False  # the width of one
    if isinstance(node, (ast.Name, ast.Attribute)):
        word = node.id if isinstance(node, ast.Name) else node.attr
        if is_count(word):
            return True
        path = ast.unparse(node)
        if path in names and path not in seen:
            return _counts_heads(names[path], names, seen | {path})
    return any(_counts_heads(child, names, seen) for child in ast.iter_child_nodes(node))


def _one_of(made: list[Value], path: str) -> Value:
    """What is certain of an attribute that is one of several things."""
    if all(isinstance(value, Simple) for value in made):
        norm = any(isinstance(value, Simple) and value.kind == "norm" for value in made)
        return Simple(path, "norm" if norm else "each")
    if all(isinstance(value, Tensor) and not value.hidden for value in made):
        return WHOLE
    return made[0] if len(set(made)) == 1 else Tensor(hidden=True)
