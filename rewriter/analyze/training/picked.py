"""Which items of a batch a value is made of: all, the first ones, or some that are others on another rank."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from rewriter.analyze.read.file import ClassInfo, FunctionInfo
from rewriter.analyze.read.nodes import dotted, item_of, names_in, walk_own
from rewriter.analyze.training.roles import LOSS_CALL, Roles

ALL, FIRST, SOME = "all", "first", "some"
_DEEP = 6
_GIVE_SEVERAL = {
    "max", "min", "sort", "topk", "mode", "median", "kthvalue", "unique", "var_mean", "std_mean", "split", "chunk",
    "unbind", "tensor_split", "values", "items", "keys", "get", "pop",
}  # fmt: skip
_SAME_ITEMS = {
    "float", "double", "half", "int", "long", "bool", "detach", "cpu", "cuda", "to", "clone", "contiguous", "data",
    "softmax", "log_softmax", "sigmoid", "tanh", "relu", "exp", "log", "abs", "argmax", "argmin", "sum", "mean", "norm",
    "pow", "sqrt", "square", "clamp", "round", "flatten", "view", "reshape", "squeeze", "unsqueeze", "numpy", "tolist",
}  # fmt: skip
"""Attributes of tensors, calls among them, that leave the items where they are."""
_OF_TENSORS = _SAME_ITEMS | {
    "size", "shape", "dim", "ndim", "dtype", "device", "max", "min", "std", "var", "topk", "permute", "transpose",
    "view_as", "requires_grad", "backward", "type", "numel", "eq", "T",
}  # fmt: skip
_OF_RESULTS = {"logits", "last_hidden_state", "pooler_output", "prediction_logits"}
_ROWS = {"select", "narrow", "index_select"}
_GIVE_ONE = {
    "Linear", "Sequential", "Conv1d", "Conv2d", "Conv3d", "LayerNorm", "Identity", "Dropout", "Softmax", "LogSoftmax",
    "Sigmoid", "Tanh", "ReLU", "Embedding", "Flatten",
}  # fmt: skip
_SIZES = {"shape", "size", "numel", "nelement"}
_DISPLAYS = (ast.Tuple, ast.List, ast.ListComp, ast.Dict)


class Picked:
    """Answers for one loop over batches, or function that gets one.

    ``made`` has what its names are given, each value with its place where it is a part; ``kind`` tells what are
    ``samples``, ``reduced`` what is a sum or a mean over the batch, ``context`` what an answer rests on besides.
    """

    def __init__(
        self,
        roles: Roles,
        place: ast.AST,
        nodes: Sequence[ast.AST],
        made: Mapping[str, list[tuple[ast.expr, int | None]]],
        of_batch: Callable[[ast.AST], bool],
        kind: Callable[[ast.expr], str],
        reduced: Callable[[ast.expr], str],
        context: Callable[[ast.AST], frozenset[object]],
    ) -> None:
        self.file, self.roles, self.nodes, self.made, self.of_batch = roles.file, roles, nodes, made, of_batch
        self._kind, self._reduced, self._asked = kind, reduced, set[ast.AST]()
        self.is_settled = False  # whether ``made`` and what is ``of_batch`` stay as they are
        self._context, self._items = context, dict[tuple[ast.AST, int, frozenset[object]], set[str]]()
        self._whole = ""
        if isinstance(place, ast.For):
            item = item_of(place, self.file.names.values_of)
            self._whole = item.id if isinstance(item, ast.Name) else ""

    def items(self, node: ast.AST, deep: int = 0) -> set[str]:
        """Of which items of the batch a value is made; empty if of none.

        ``x[0]`` is the batch's first item on rank 0, so that this rank's own value is what one process has; ``x[:4]``
        may be more items than rank 0 has, and ``x[0]`` of what may be a tensor or a list is not known.
        """
        if deep > _DEEP or not self.of_batch(node):
            return set()
        if not self.is_settled:
            return self._items_of(node, deep)
        key = node, deep, self._context(node)
        if key not in self._items:
            self._items[key] = self._items_of(node, deep)
        return self._items[key]

    @property
    def asked(self) -> frozenset[object]:
        """What is being asked."""
        return frozenset(self._asked)

    def _items_of(self, node: ast.AST, deep: int) -> set[str]:
        match node:
            case ast.Name(id=name):
                made = [value for value, part in self.made.get(name, ()) if part is None]
                found = {item for value in made for item in self.items(value, deep + 1)}
                return found if made and len(made) == len(self.made[name]) and found else {ALL}
            case ast.Call(func=ast.Attribute(attr=attr), args=[ast.Constant(value=0), *rest]) if attr in _ROWS:
                return {ALL} if any(map(self.of_batch, rest)) else {SOME}
            case ast.Subscript(value=value) if (taken := self._taken(node)) != ALL:
                return {taken} if self.items(value, deep + 1) <= {ALL} else self.items(value, deep + 1)
        return {item for child in ast.iter_child_nodes(node) for item in self.items(child, deep + 1)}

    def _taken(self, node: ast.Subscript) -> str:
        value, place = node.value, node.slice
        first = place.elts[0] if isinstance(place, ast.Tuple) and place.elts else place
        if isinstance(first, ast.Name) and len(given := self.file.names.values_of(first)) == 1:
            first = given[0]
        match first:
            case ast.Constant(value=int(number)) if not isinstance(number, bool):
                several = self._is_several(value)
                if several or self._reduced(node):
                    return ALL
                return self._first(value) if several is False else SOME
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int())):
                return ALL if self._is_several(value) else SOME
            case ast.Slice(lower=lower, upper=upper, step=step):
                whole = getattr(lower, "value", None) in {None, 0} and upper is None and step is None
                return ALL if whole or self._is_several(value) else SOME
        return ALL

    def _first(self, tensor: ast.expr) -> str:
        """What ``x[0]`` takes: the first item of a tensor of samples, or an entry of what is made of all of them."""
        if tensor in self._asked:
            return SOME
        self._asked.add(tensor)
        kind = self._kind(tensor)
        self._asked.discard(tensor)
        return FIRST if kind in {"samples", "item"} else ALL if kind in {"mean", "total"} else SOME

    def _is_several(self, node: ast.expr) -> bool | None:
        """Whether a value is a tuple, list or dict; False for a tensor, or None where neither is seen."""
        match node:
            case ast.Name(id=name):
                return False if name in self._tensors else True if self._holds_several(name) else None
            case ast.BinOp() | ast.Compare() | ast.UnaryOp():
                return False
            case ast.Subscript(value=value, slice=place):
                if isinstance(place, ast.Constant) and isinstance(place.value, str):
                    return False if ast.dump(node) in self._entries else None
                within = self._is_several(value)
                return False if within is False or isinstance(place, ast.Tuple) else None
            case ast.Attribute(value=value, attr=attr):
                if attr in _SIZES:
                    return True
                if attr in _OF_RESULTS or ast.dump(node) in self._entries:
                    return False
                return self._is_several(value) if attr == "data" else None
            case ast.Call(func=ast.Attribute(value=value, attr=attr)):
                if attr in _GIVE_SEVERAL or attr in _SIZES:
                    return True
                library = self.roles.project.external(self.file, node.func).startswith("torch.")
                return False if library or attr in _SAME_ITEMS else self._gives_several(node)
            case ast.Call():
                return self._gives_several(node)
        return True if isinstance(node, _DISPLAYS) else None

    @cached_property
    def _tensors(self) -> set[str]:
        """Names of which something is asked that only a tensor has, or with which something is computed."""
        found: set[str] = set()
        for node in self.nodes:
            match node:
                case ast.Attribute(value=ast.Name(id=name), attr=attr) if attr in _OF_TENSORS:
                    found.add(name)
                case ast.Subscript(value=ast.Name(id=name), slice=ast.Tuple()):
                    found.add(name)
                case ast.BinOp(left=left, right=right) | ast.Compare(left=left, comparators=[right]):
                    found |= {item.id for item in (left, right) if isinstance(item, ast.Name)}
                case ast.Call(args=args) if self._computes(node):
                    found |= {item.id for item in args if isinstance(item, ast.Name)}
        for name, values in self.made.items():
            if values and all(part is None and self._is_computed(value) for value, part in values):
                found.add(name)
        return found

    @cached_property
    def _taken_apart(self) -> set[str]:
        """What is called where names are given the parts of what it gives: ``loss, out = model(x, y)``."""
        made = [value for values in self.made.values() for value, part in values if part is not None and part >= 0]
        return {ast.dump(value.func) for value in made if isinstance(value, ast.Call)}

    @cached_property
    def _entries(self) -> set[str]:
        """``out["a"]`` and ``out.a`` of which something is asked that only a tensor has, or that losses get."""
        asked = [
            part
            for node in self.nodes
            for part in (
                [node.value]
                if isinstance(node, ast.Attribute) and node.attr in _OF_TENSORS
                else node.args
                if isinstance(node, ast.Call) and self._computes(node)
                else []
            )
        ]
        return {ast.dump(item) for item in asked if isinstance(item, (ast.Subscript, ast.Attribute))}

    def _computes(self, call: ast.Call) -> bool:
        """Whether a call is of a loss function, or of one of torch that takes tensors and no list of them."""
        name = self.roles.project.external(self.file, call.func)
        if name.startswith("torch."):
            return name.split(".")[-1] not in {"cat", "stack", "concat", "hstack", "vstack", "save"}
        return _is_loss_call(call)

    def _is_computed(self, value: ast.expr) -> bool:
        if isinstance(value, (ast.BinOp, ast.Compare)):
            return True
        if not isinstance(value, ast.Call):
            return False
        last = value.func.attr if isinstance(value.func, ast.Attribute) else ""
        if last in _GIVE_SEVERAL:
            return False
        if self._gives_several(value) is False:
            return True
        return last in _SAME_ITEMS or self.roles.project.external(self.file, value.func).startswith("torch.")

    def _holds_several(self, name: str) -> bool:
        """Whether a name is that of a whole batch, or gets what is a tuple, a list or a dict."""
        if name == self._whole:
            return True
        for value, part in self.made.get(name, ()):
            if part is None and (isinstance(value, _DISPLAYS) or self._gives_several(value)):
                return True
        return any(
            isinstance(node, ast.Call)
            and _is_loss_call(node)
            and any(isinstance(arg, ast.Subscript) and dotted(arg.value) == name for arg in node.args)
            for node in self.nodes
        )

    def _gives_several(self, value: ast.expr) -> bool | None:
        """Whether a call of a model, or of a function of the project, gives a tuple, a list or a dict.

        False where layers of torch, or what is computed, give a tensor; None where neither is seen.
        """
        if not isinstance(value, ast.Call):
            return None
        found = self.roles.project.resolve(self.file, value.func)
        body, layers = found.node.body if isinstance(found, FunctionInfo) else [], set[str]()
        model = self.roles.model_class(value.func)
        if model is not None and (method := self.roles.classes.method(model, "forward")) is not None:
            body, layers = method[1].body, self._layers(model)
        own = [item for statement in body for item in walk_own(statement)]
        returned = [item.value for item in own if isinstance(item, ast.Return) and item.value is not None]
        assigned = [item for item in own if isinstance(item, ast.Assign)]
        displayed = [target for item in assigned if isinstance(item.value, _DISPLAYS) for target in item.targets]
        several = {name for target in displayed for name in names_in(target)}
        one = {
            target.id
            for item in assigned
            for target in item.targets
            if isinstance(target, ast.Name) and self._is_one(item.value, layers)
        }
        if any(isinstance(v, _DISPLAYS) or (isinstance(v, ast.Name) and v.id in several) for v in returned):
            return True
        if not returned and ast.dump(value.func) in self._taken_apart:
            return True
        known = [self._is_one(v, layers) or (isinstance(v, ast.Name) and v.id in one) for v in returned]
        return False if known and all(known) else None

    def _is_one(self, value: ast.expr, layers: set[str]) -> bool:
        """Whether a value in a forward is a tensor, as far as is seen."""
        return self._is_computed(value) or (isinstance(value, ast.Call) and dotted(value.func) in layers)

    def _layers(self, model: ClassInfo) -> set[str]:
        """``self.head`` of ``self.head = nn.Linear(8, 2)``."""
        return {
            name
            for method in model.methods.values()
            for statement in method.body
            for item in walk_own(statement)
            if isinstance(item, ast.Assign) and isinstance(item.value, ast.Call)
            and self.roles.project.external(model.file, item.value.func).split(".")[-1] in _GIVE_ONE
            for target in item.targets
            if (name := dotted(target)) is not None
        }  # fmt: skip


def _is_loss_call(call: ast.Call) -> bool:
    return bool(LOSS_CALL.search((dotted(call.func) or "").split(".")[-1]))
