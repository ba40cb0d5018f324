"""Losses that are sums over a batch: on a rank's share of it they are smaller by the number of ranks."""

from __future__ import annotations

import ast

from rewriter.analyze.read.classes import Classes
from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import Function, dotted, names_in, walk_own
from rewriter.analyze.training.instances import Instances
from rewriter.analyze.training.roles import Roles, Var

_VIEWS = {
    "float", "double", "to", "squeeze", "backward", "detach", "clone", "cpu", "item", "cuda", "div", "mul",
    "view", "reshape", "unsqueeze", "flatten",
}  # fmt: skip
_DEEP = 10
_EACH = {"add": ast.Add(), "sub": ast.Sub(), "mul": ast.Mult(), "div": ast.Div()}
_JOINS = {"stack", "cat", "concat", "hstack"}
_COLLECTS = _JOINS | {"tensor", "list", "tuple", "as_tensor"}


class Sums:
    """Answers for one file; ``sources`` are the calls that make the sums that were found."""

    def __init__(self, file: File, classes: Classes, roles: dict[File, Roles], instances: Instances) -> None:
        self.file, self.classes, self.project = file, classes, classes.project
        self._instances = instances
        self.all_roles = roles
        self.sources: set[ast.Call] = set()
        self._looks_into = False
        self._changing: dict[Var, str | None] = {}

    def is_sum(self, node: ast.expr) -> bool:
        """Whether a loss is a sum over the batch, however weighed by what is the same on all ranks."""
        sources: set[ast.Call] = set()
        found = self._kind(self.file, node, None, 0, sources) == "sum"
        self.sources |= sources if found else set()
        return found

    def divided(self, node: ast.expr) -> set[ast.Call]:
        """The calls that make sums of which a loss is the mean: it divides them by how many items there are."""
        sources: set[ast.Call] = set()
        return sources if self._kind(self.file, node, None, 0, sources) == "mean" else set()

    def of(self, node: ast.expr) -> str:
        """``sum`` or ``mean`` for what a loss function makes of a batch, also as one of several values; else empty."""
        found = self._kind(self.file, node, None, 0, set())
        return found if found in {"sum", "mean"} else ""

    def in_parts(self, node: ast.expr, place: int | None) -> str:
        """``sum`` or ``mean`` for what a call gives at a place, or, without one, for each value in a collection.

        Other than for a loss that is trained on, models and what functions collect are looked into.
        """
        before, self._looks_into = self._looks_into, True
        try:
            if place is None:
                found = self._elements(self.file, node, 0, set()) or ""
            else:
                found = self._kind(self.file, node, place if place >= 0 else None, 0, set())
        finally:
            self._looks_into = before
        return found if found in {"sum", "mean"} else ""

    def looks_into(self, call: ast.Call) -> bool:
        """Whether the code that a call runs is the project's."""
        before, self._looks_into = self._looks_into, True
        try:
            return self._criterion(self.file, call) is None and self._function(self.file, call) is not None
        finally:
            self._looks_into = before

    def may_add_items(self, node: ast.expr) -> bool:
        """Whether a loss adds up what may be the items of the batch, or one of its terms does."""
        return self._kind(self.file, node, None, 0, set()) == "items"

    def _kind(self, file: File, node: ast.expr, part: int | None, deep: int, sources: set[ast.Call]) -> str:
        """``sum``, ``mean``, ``items`` for what may be a sum, ``same`` for what no batch is in, else empty."""
        if deep > _DEEP:
            return ""

        def kind(inner: ast.expr) -> str:
            return self._kind(file, inner, None, deep + 1, sources)

        match node:
            case ast.Constant():
                return "same"
            case ast.Name() | ast.Attribute():
                return self._variable(file, node, part, deep, sources)
            case ast.Subscript(value=ast.Name() as value, slice=ast.Constant(value=int(index))) if index >= 0:
                return self._variable(file, value, index, deep, sources)
            case ast.Subscript(value=ast.Call() as value, slice=ast.Constant(value=int(index))) if index >= 0:
                return self._call(file, value, index, deep, sources)
            case ast.UnaryOp(operand=value):
                return kind(value)
            case ast.Tuple(elts=elts):
                return kind(elts[part]) if part is not None and part < len(elts) else ""
            case ast.BinOp(left=left, op=op, right=right):
                return _joined(kind(left), kind(right), op, is_size(right) or self._names_size(file, right))
            case ast.Call():
                return self._call(file, node, part, deep, sources)
        return ""

    def _names_size(self, file: File, node: ast.expr) -> bool:
        """``n`` where it is ``x.size(0)`` and nothing else."""
        roles = self.all_roles[file]
        variable = roles.var(node) if isinstance(node, ast.Name) else None
        values = [value for value, _, part in roles.assigned(variable) if not part]
        return bool(values) and all(map(is_size, values))

    def _variable(self, file: File, node: ast.expr, part: int | None, deep: int, sources: set[ast.Call]) -> str:
        roles = self.all_roles[file]
        variable = roles.var(node)
        if variable is None:
            return ""
        kinds: set[str] = set()
        divided = False
        for value, statement, is_part in roles.assigned(variable):
            if (again := _changed(roles, value, variable)) is not None and not is_part:
                divided = divided or again is value
                kinds |= {self._added(file, again, deep, sources)} if again is not value else set()
                continue
            place = _place(roles, statement, variable) if is_part else part
            if is_part and part is not None:
                return ""
            kinds.add("" if is_part and place is None else self._kind(file, value, place, deep + 1, sources))
        for item in roles.augmented.get(variable, ()):
            if isinstance(item.op, ast.Div) and (is_size(item.value) or self._names_size(file, item.value)):
                divided = True
            elif not (isinstance(item.op, (ast.Div, ast.Mult)) and isinstance(item.value, ast.Constant)):
                kinds.add(self._added(file, item.value, deep, sources))
        if "items" in kinds or (divided and kinds - {"same"} == {"sum"}):
            return "mean" if divided else "items"
        if not kinds:
            return "same" if "." in variable[1] or roles.is_argument(variable) else ""
        kinds -= {"same"} if len(kinds) > 1 else set()
        return kinds.pop() if len(kinds) == 1 else ""

    def _added(self, file: File, value: ast.expr, deep: int, sources: set[ast.Call]) -> str:
        """What is added to a loss: ``items`` in a loop that may go through the items of the batch."""
        kind = self._kind(file, value, None, deep + 1, sources)
        batch = self._batches(file, value)
        loops = [p.iter for p in _around(file, value) if isinstance(p, ast.For) and _outer(file, p)]
        return "items" if kind != "same" and any(_over_items(loop, batch) for loop in loops) else kind

    def _batches(self, file: File, node: ast.AST) -> set[str]:
        """The names that the loops around a node take out of what they go through, if that is no output of a model."""
        loops = [parent for parent in _around(file, node) if isinstance(parent, ast.For)]
        named = [loop for loop in loops if not (isinstance(loop.iter, ast.Call) and dotted(loop.iter.func) == "range")]
        return {name for loop in named if not self._of_models(file, loop.iter) for name in names_in(loop.target)}

    def _of_models(self, file: File, iterated: ast.expr) -> bool:
        """Whether a loop goes through what models gave alone, as the scales of a discriminator: ``zip(fake, real)``."""
        roles = self.all_roles[file]
        if isinstance(iterated, ast.Call):
            passed = isinstance(iterated.func, ast.Name) and iterated.func.id in {"zip", "enumerate"}
            return roles.is_model(iterated.func) or (passed and all(self._of_models(file, a) for a in iterated.args))
        variable = roles.var(iterated)
        made = [(value, part) for value, _, part in roles.assigned(variable)]
        calls = [isinstance(v, ast.Call) and roles.is_model(v.func) and not part for v, part in made]
        return bool(calls) and all(calls)

    def _elements(self, file: File, node: ast.expr, deep: int, sources: set[ast.Call]) -> str | None:
        """What each value in ``[a, b]``, ``torch.stack(x)``, ``x.values()`` is; None for what is no collection."""
        roles = self.all_roles[file]
        if deep > _DEEP:
            return None
        match node:
            case ast.List(elts=elts) | ast.Tuple(elts=elts) | ast.Dict(values=elts) if elts:
                kinds = {
                    self._elements(file, item.value, deep + 1, sources) or ""
                    if isinstance(item, ast.Starred)
                    else self._kind(file, item, None, deep + 1, sources)
                    for item in elts
                }
                kinds -= {"same"} if len(kinds) > 1 else set()
                return "items" if "items" in kinds else kinds.pop() if len(kinds) == 1 else ""
            case ast.ListComp(elt=elt, generators=made) | ast.GeneratorExp(elt=elt, generators=made):
                batch = self._batches(file, node)
                if any(_over_items(generator.iter, batch) for generator in made):
                    return "items"
                return self._kind(file, elt, None, deep + 1, sources)
            case ast.Call(func=ast.Attribute(value=inner, attr="values"), args=[]):
                return self._elements(file, inner, deep + 1, sources)
            case ast.Call(func=ast.Name(id="dict"), args=[], keywords=[_, *_] as entries):
                values = ast.copy_location(ast.Tuple([entry.value for entry in entries], ast.Load()), node)
                return self._elements(file, values, deep + 1, sources)
            case (
                ast.Call(args=[inner, *_])
                | ast.Call(args=[], keywords=[ast.keyword(arg="tensors" | "data", value=inner), *_])
            ) if _called(node) in _COLLECTS:
                held = self._elements(file, inner, deep + 1, sources)
                return "" if held is None and _called(node) in _JOINS else held
            case ast.Call() if (over := _over_first(node)) is not None:
                # The columns of a batch, whose first dimension it is; what is stacked has another one.
                known = self._elements(file, over, deep + 1, sources) is not None
                sources |= {node} if _called(node) == "sum" and not known else set()
                return "" if known else _called(node)
            case ast.Call() if (function := self._function(file, node)) is not None:
                given = {self._elements(function.file, value, deep + 1, sources) for value in _returned(function)}
                return given.pop() if len(given) == 1 else None
            case ast.BinOp(left=left, op=op, right=right):
                return self._each(file, left, op, right, deep, sources)
            case ast.UnaryOp(operand=inner) | ast.Subscript(value=inner, slice=ast.Slice()):
                return self._elements(file, inner, deep + 1, sources)
            case ast.Call(func=ast.Attribute(value=inner, attr=attr), args=[other]) if attr in _EACH:
                return self._each(file, inner, _EACH[attr], other, deep, sources)
            case ast.Call(func=ast.Attribute(value=inner, attr=attr)) if attr in _VIEWS:
                return self._elements(file, inner, deep + 1, sources)
            case ast.Call(func=func, args=args):  # a root or an exponential of each
                operands = [*args[:1], *([func.value] if isinstance(func, ast.Attribute) else [])]
                collected = any(self._elements(file, value, deep + 1, sources) is not None for value in operands)
                return "" if collected else None
            case ast.Name() | ast.Attribute() if (variable := roles.var(node)) is not None:
                if variable in self._changing:  # in what changes it
                    return self._changing[variable]
                return self._held(file, variable, deep, sources)
        return None

    def _held(self, file: File, variable: Var, deep: int, sources: set[ast.Call]) -> str | None:
        """What each value that a variable holds is, whatever puts it there."""
        roles = self.all_roles[file]
        scope, name = variable
        found: list[str | None] = []
        if isinstance(scope, Function):
            given = self._instances.given(file, scope, name)
            kinds = {self._elements(other, value, deep + 1, sources) for other, value in given}
            found += ["" if len(kinds) > 1 else kind for kind in kinds]
            rest = self._instances.given_rest(file, scope, name)
            found += [self._elements(other, several, deep + 1, sources) for other, several in rest]
        made = [(value, part) for value, _, part in roles.assigned(variable)]
        changes = [value for value, _ in made if any(roles.var(item) == variable for item in ast.walk(value))]
        for value, part in made:
            if value not in changes and not _is_empty(value):
                found.append(None if part else self._elements(file, value, deep + 1, sources))
        for item in file.nodes:
            match item:
                case (
                    ast.Call(func=ast.Attribute(value=holder, attr="append"), args=[value])
                    | ast.Assign(targets=[ast.Subscript(value=holder)], value=value)
                    | ast.AugAssign(target=ast.Subscript(value=holder), op=ast.Add(), value=value)
                ) if (found or made) and roles.var(holder) == variable:
                    found.append(self._added(file, value, deep, sources))
                case (
                    ast.Call(func=ast.Attribute(value=holder, attr="extend"), args=[value])
                    | ast.AugAssign(target=ast.Name() as holder, op=ast.Add(), value=value)
                ) if (found or made) and roles.var(holder) == variable:
                    grown = self._elements(file, value, deep + 1, sources)
                    found += [grown] if grown is not None else []
        first = _one_of(found)
        self._changing[variable] = first
        try:  # losses = losses * w, and no loss = loss.sum(), which is read behind
            found += [self._elements(file, value, deep + 1, sources) for value in changes if not _reduces(value)]
        finally:
            del self._changing[variable]
        return _one_of(found)

    def _each(
        self, file: File, left: ast.expr, op: ast.operator, right: ast.expr, deep: int, sources: set[ast.Call]
    ) -> str | None:
        """What each value is in ``torch.exp(-variances) * torch.stack([a, b]) + variances``."""
        found = [self._elements(file, side, deep + 1, sources) for side in (left, right)]
        if not {*found} - {None, "same"}:
            return None if None in found else "same"
        beside = [
            self._kind(file, side, None, deep + 1, set()) if held is None else held
            for side, held in zip((left, right), found, strict=True)
        ]
        # What meets a few values is as many, or one: a parameter's, and not those of a batch, unless it is reduced.
        known = [
            "same" if held is None and kind not in {"sum", "items"} else kind
            for kind, held in zip(beside, found, strict=True)
        ]
        return _joined(known[0], known[1], op, is_size(right))

    def _call(self, file: File, node: ast.Call, part: int | None, deep: int, sources: set[ast.Call]) -> str:
        name = self.project.external(file, node.func)
        last = _called(node)
        if name.startswith("torch.nn.functional."):
            found = _reduction(node)
            sources |= {node} if found == "sum" else set()
            return found
        made = self._criterion(file, node)
        if made is not None:
            found = _reduction(made)
            sources |= {made} if found == "sum" else set()
            return found
        given = [a for a in node.args if not isinstance(a, ast.Starred)]
        if last in {"sum", "mean"}:
            method = isinstance(node.func, ast.Attribute) and not name
            whole = len(given) == (0 if method else 1) and not node.keywords
            if name == "" and not method:
                held = self._elements(file, given[0], deep, sources) if len(given) == 1 else None
                return held or ""
            inner = node.func.value if method and isinstance(node.func, ast.Attribute) else given[0] if given else node
            held = self._elements(file, inner, deep, sources) if whole and isinstance(inner, ast.expr) else None
            if held is not None:
                return "mean" if last == "mean" and held == "items" else held or ("items" if last == "sum" else "")
            if whole and isinstance(inner, ast.expr):
                known = self._kind(file, inner, None, deep + 1, set())
                found = known if known in {"sum", "mean"} and inner is not node else last
                sources |= {node} if found == "sum" else set()
                return found
            return ""
        if isinstance(node.func, ast.Attribute) and last in _VIEWS and not name:
            return self._kind(file, node.func.value, part, deep + 1, sources)
        function = self._function(file, node)
        if function is None:
            return ""
        kinds = {self._kind(function.file, value, part, deep + 1, sources) for value in _returned(function)}
        kinds -= {"same"} if self._looks_into and len(kinds) > 1 else set()
        return kinds.pop() if len(kinds) == 1 else ""

    def _criterion(self, file: File, node: ast.Call, deep: int = 0) -> ast.Call | None:
        """``nn.MSELoss(reduction="sum")`` where what it makes is called."""
        if isinstance(node.func, ast.Call):
            made = [node.func]
        else:
            roles = self.all_roles[file]
            variable = roles.var(node.func)
            made = [
                v  # type: ignore[misc]
                for v, _, is_part in roles.assigned(variable)
                if not is_part and not _moves(v, node.func)
            ]
            if not made and variable is not None and isinstance(variable[0], Function) and deep < _DEEP:
                given = list(self._instances.given(file, variable[0], variable[1]))
                found = [
                    self._criterion(other, ast.copy_location(ast.Call(value, [], []), value), deep + 1)
                    for other, value in given
                ]
                return found[0] if len(set(found)) == 1 else None
        if len(made) != 1 or not isinstance(made[0], ast.Call):
            return None
        name = self.project.external(file, made[0].func)
        return made[0] if name.startswith("torch.nn.") and name.endswith("Loss") else None

    def _function(self, file: File, node: ast.Call) -> FunctionInfo | None:
        found = self.project.resolve(file, node.func)
        if isinstance(found, FunctionInfo):
            return found
        if isinstance(node.func, ast.Attribute):
            owner = None
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "self":
                inside = file.names.class_of(node)
                owner = file.class_info(inside) if inside is not None else None
            else:
                owner = self.all_roles[file].model_class(node.func.value)
            method = self.classes.method(owner, node.func.attr) if owner is not None else None
            if method is not None or not self._looks_into:
                return method[0].file.function_info(method[1]) if method is not None else None
        owner = self._instances.class_of(file, node.func) if self._looks_into else None
        if owner is not None:
            name = "forward" if self.classes.is_module(owner) else "__call__"
            method = self.classes.method(owner, name)
            return method[0].file.function_info(method[1]) if method is not None else None
        return None


def _returned(function: FunctionInfo) -> list[ast.expr]:
    return [
        item.value
        for statement in function.node.body
        for item in walk_own(statement)
        if isinstance(item, ast.Return) and item.value is not None
    ]


def _moves(value: ast.expr, name: ast.expr) -> bool:
    """``criterion = criterion.cuda()``."""
    match value:
        case ast.Call(func=ast.Attribute(value=inner, attr="cuda" | "to" | "cpu")):
            return dotted(inner) == dotted(name) is not None
    return False


def _place(roles: Roles, statement: ast.stmt, variable: Var) -> int | None:
    for target in statement.targets if isinstance(statement, ast.Assign) else ():
        if isinstance(target, (ast.Tuple, ast.List)):
            return next((i for i, item in enumerate(target.elts) if roles.var(item) == variable), None)
    return None


def _changed(roles: Roles, value: ast.expr, variable: Var) -> ast.expr | None:
    """What ``loss = loss + x`` adds, or the value itself where a size divides it; None for another value."""
    match value:
        case ast.BinOp(left=left, op=ast.Add(), right=right) if roles.var(left) == variable:
            return right
        case ast.BinOp(left=left, op=ast.Add(), right=right) if roles.var(right) == variable:
            return left
        case ast.BinOp(left=left, op=ast.Div(), right=right) if roles.var(left) == variable and is_size(right):
            return value
    return None


def _around(file: File, node: ast.AST) -> list[ast.AST]:
    """What stands around a node in its function."""
    found: list[ast.AST] = []
    for parent in file.names.ancestors(node):
        if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            break
        found.append(parent)
    return found


def _outer(file: File, loop: ast.For) -> bool:
    return any(isinstance(parent, (ast.For, ast.While)) for parent in _around(file, loop))


def _over_items(iterated: ast.expr, batch: set[str]) -> bool:
    """Whether a loop may go through the items of a batch: ``zip(out, y)``, ``range(len(x))``, ``x``."""
    if isinstance(iterated, ast.Call) and isinstance(iterated.func, ast.Name):
        if iterated.func.id == "range" and iterated.args:
            last = iterated.args[min(1, len(iterated.args) - 1)]
            return is_size(last) and bool(names_in(last) & batch)
        if iterated.func.id in {"zip", "enumerate", "tqdm", "reversed"}:
            return any(_over_items(item, batch) for item in iterated.args)
    return isinstance(iterated, ast.Name) and iterated.id in batch


def _is_empty(value: ast.expr) -> bool:
    """``[]``, ``{}``, ``dict()``, ``torch.zeros(2)``: what is filled later."""
    match value:
        case ast.List(elts=held) | ast.Dict(values=held):
            return not held
        case ast.Call(func=ast.Name(id="list" | "dict" | "OrderedDict"), args=[], keywords=[]):
            return True
        case ast.Call():
            return _called(value) in {"defaultdict", "zeros", "empty"}
    return False


def _one_of(found: list[str | None]) -> str | None:
    """What all of them are, if it is one thing, beside what is the same on all ranks; None if one is no collection."""
    kinds = {*found} - {"same"} or {*found}
    if not kinds or None in kinds:
        return None
    return "items" if "items" in kinds else kinds.pop() if len(kinds) == 1 else ""


def _reduces(value: ast.expr) -> bool:
    """``losses.sum()``, ``torch.mean(losses * w)``, of which nothing else is made."""
    return isinstance(value, ast.Call) and _called(value) in {"sum", "mean"}


def _over_first(call: ast.Call) -> ast.expr | None:
    """``x`` of ``x.mean(0)``, ``torch.sum(x, dim=(0, 1))``, which are over the first dimension and leave others."""
    if _called(call) not in {"sum", "mean"} or not isinstance(call.func, ast.Attribute):
        return None
    of_torch = isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
    values = call.args[:1] if of_torch else [call.func.value]
    dims = [*call.args[of_torch:], *(keyword.value for keyword in call.keywords if keyword.arg in {"dim", "axis"})]
    held = dims[0].elts if dims and isinstance(dims[0], (ast.Tuple, ast.List)) else dims[:1]
    first = any(isinstance(item, ast.Constant) and item.value == 0 for item in held)
    return values[0] if values and first else None


def _called(call: ast.Call) -> str:
    """The last part of the name of what is called."""
    return str(dotted(call.func) or getattr(call.func, "attr", "")).split(".")[-1]


def _reduction(call: ast.Call) -> str:
    """How a loss function of torch reduces."""
    given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
    if given.get("size_average") is False:
        return "sum"
    found = given.get("reduction", "mean")
    found = "mean" if found == "batchmean" else found
    return found if found in {"sum", "mean"} else ""


def is_size(node: ast.expr) -> bool:
    """``len(x)``, ``x.size(0)``, ``x.shape[0]``."""
    match node:
        case ast.Call(func=ast.Name(id="len")) | ast.Call(func=ast.Attribute(attr="size" | "numel" | "nelement")):
            return True
        case ast.Subscript(value=ast.Attribute(attr="shape")):
            return True
    return False


def _joined(left: str, right: str, op: ast.operator, by_size: bool) -> str:
    if "items" in {left, right} and isinstance(op, (ast.Add, ast.Sub)):
        return "items"
    if isinstance(op, (ast.Add, ast.Sub)):
        kinds = {left, right} - {"same"} if "same" in {left, right} and left != right else {left, right}
        return kinds.pop() if len(kinds) == 1 else ""
    if isinstance(op, ast.Pow):
        return "same" if left == right == "same" else ""
    if isinstance(op, ast.Mult):
        return right if left == "same" else left if right == "same" else ""
    if isinstance(op, ast.Div):
        return "mean" if by_size and left in {"sum", "items"} else left if right == "same" else ""
    return ""
