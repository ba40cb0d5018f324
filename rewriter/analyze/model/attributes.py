"""What the attributes of a module are, as its constructor makes them."""

from __future__ import annotations

import ast
import re
from functools import lru_cache

from rewriter.analyze.model.tensors import WHOLE, Chain, Linear, Num, Object, Simple, Tensor, Value
from rewriter.analyze.read.classes import Classes
from rewriter.analyze.read.file import ClassInfo, External, File
from rewriter.analyze.read.nodes import Function, self_path, walk

_EACH = {
    "GELU", "ReLU", "SiLU", "Dropout", "Identity", "Tanh", "Sigmoid", "LeakyReLU", "ELU", "Mish", "Hardswish",
    "Softplus", "ReLU6", "AlphaDropout", "CELU", "SELU", "LogSigmoid", "Softsign",
}  # fmt: skip
_NORMS = {"LayerNorm", "RMSNorm"}
_TABLES = ("transformers.activations.ACT2FN", "transformers.activations.get_activation")
_OPTIONS = {"bias", "device", "dtype", "in_features", "out_features"}
HEADS = re.compile(r"head|slope|alibi", re.I)


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
                        given = [(self_path(target, me), node.value) for target in node.targets]
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
            hidden = value.func.attr == "register_parameter"
            if not hidden and any(HEADS.search(word) for word in _words(value.args[1])):
                hidden = True  # one value for each head
            return Tensor(hidden=hidden)
        found = self.project.resolve(file, value.func)
        if found is None and isinstance(value.func, ast.Name):
            found = self._default(value.func.id, file, function)
        if isinstance(found, ClassInfo) and self.classes.kind(found) in ("module", "distributed"):
            return Object(found, path)
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
            return Tensor(hidden=True)
        if name.startswith("torch.nn."):
            kind = simple_kind(name)
            return Simple(path, kind) if kind else Tensor(hidden=True)
        return Simple(path, "each") if simple_kind(name) else None

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


def _words(node: ast.AST) -> list[str]:
    return [getattr(item, "id", getattr(item, "attr", "")) or "" for item in walk(node)]


def _one_of(made: list[Value], path: str) -> Value:
    """What is certain of an attribute that is one of several things."""
    if all(isinstance(value, Simple) for value in made):
        norm = any(isinstance(value, Simple) and value.kind == "norm" for value in made)
        return Simple(path, "norm" if norm else "each")
    if all(isinstance(value, Tensor) and not value.hidden for value in made):
        return WHOLE
    return made[0] if len(set(made)) == 1 else Tensor(hidden=True)
