"""Where a script reads the value of a loss: ``loss.item()``, ``float(loss.data)``, ``f"{loss:.3f}"``."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import assigned_by, bent, dotted, loss_of, names_in, walk, walk_own
from rewriter.analyze.training.roles import Roles, Var, gone_through
from rewriter.analyze.training.writers import SHOWING_METHODS

_READERS = {"item", "tolist", "numpy"}
_VIEWS = {
    "detach", "cpu", "float", "double", "mean", "clone", "to", "squeeze", "numpy", "unsqueeze", "view", "reshape",
    "flatten",
}  # fmt: skip
_NUMBERS = {"float", "str", "repr"}
_LISTS = {"append", "appendleft", "extend", "insert"}
_CUTS = {"detach", "data"}
_IN_PLACE = {"add_", "sub_", "mul_", "copy_", "lerp_", "fill_", "index_fill_"}
_FILLED = {"zeros", "empty", "ones", "full", "zeros_like", "empty_like"}
_SUMS = (b'"sum"', b"'sum'", b"size_average")
_COUNTS = re.compile(r"num|count|hits|correct|^n_|^n$|total_|tokens", re.I)
_QUESTIONS = {"isnan", "isinf", "isfinite"}
_OF_NUMBERS = {f"{module}.{name}" for module in ("math", "torch", "numpy") for name in _QUESTIONS}
OF_OBJECTS = (ast.Is, ast.IsNot, ast.In, ast.NotIn)
_OF_NUMPY = {"numpy.array", "numpy.asarray", "numpy.float32", "numpy.float64", "numpy.mean"}


def readings(
    file: File,
    roles: Roles,
    attributes: Set[str] = frozenset(),
    kept: Callable[[ast.Call], Iterable[ast.expr]] = lambda call: (),
    gives_mean: Callable[[ast.Call, int], bool] = lambda call, place: False,
    counted: Set[ast.AST] = frozenset(),
    shown: Callable[[ast.Call], Iterable[ast.expr]] = lambda call: (),
    only_shown: Callable[[list[ast.AST], str], bool] = lambda nodes, name: False,
    averaged: Mapping[ast.expr, list[ast.Name]] = {},
) -> dict[ast.expr, ast.expr]:
    """Expressions that give a loss's value away, each with the loss tensor in it.

    ``attributes`` are names under which objects of the project hold a loss, as ``held_path`` has them; ``kept`` tells
    what a call leaves with an object that adds it up, ``gives_mean`` whether one gives a mean over a batch at a place.
    ``counted`` is what becomes that of all ranks where it is added up; ``shown`` tells what a call gives a function of
    the project that only shows it, ``only_shown`` whether that is so of a name among nodes. ``averaged`` is what gets
    a name and is made of losses that are averaged before, each with those.
    """
    found: dict[ast.expr, ast.expr] = {name: name for names in averaged.values() for name in names}
    taken: set[ast.expr] = {*found}
    whole = {v for v, value, *_ in roles.assignments if value in averaged}
    totals = _totals(roles, counted)
    for node in file.nodes:
        given = kept(node) if isinstance(node, ast.Call) else ()
        handed = [part for value in shown(node) for part in _parts(value)] if isinstance(node, ast.Call) else []
        found |= {value: held for value in handed if (held := _of_dict(roles, value)) is not None}
        handed = [value for value in handed if roles.var(viewed(value)) not in roles.loss_dicts]
        for reading in (*candidates(roles, node), *_tested(file, roles, node), *given, *handed):
            loss = viewed(reading)
            known = roles.var(loss) in roles.losses - whole or ast.dump(loss) in roles.loss_parts
            known = known or (_reads(reading) and held_path(loss) in attributes)
            known = known or (_reads(reading) and _is_given(loss, gives_mean))
            known = known or (isinstance(loss, ast.Subscript) and _of_dict(roles, loss) is not None)
            if known and loss not in taken and (_reads(reading) or not _may_be_number(roles, totals, loss)):
                found[reading] = loss
                taken.add(loss)
            elif isinstance(loss, (ast.BinOp, ast.UnaryOp)):
                parts = [name for name in _whole(loss) if roles.var(name) in roles.losses]
                found |= {name: name for name in parts if not _may_be_number(roles, totals, name)}
        found |= dict(_gone_through(file, roles, node, only_shown, counted))
        match node:
            case ast.AugAssign(target=target, op=ast.Add(), value=value) if _is_given(value, gives_mean):
                if roles.var(target) not in roles.trained:
                    found[value] = value
        told = (
            *_returned(file, roles, node),
            *_watched(roles, node),
            *_entered(roles, totals, node),
            *_bent_apart(file, roles, totals, node),
        )
        found |= {name: name for name in told if name not in taken}
    return found


def _of_dict(roles: Roles, value: ast.expr) -> ast.expr | None:
    """A dict of losses, or an entry of one, in ``losses``, ``losses["a"].cpu().data``.

    None where they may be sums, or where it holds counts or outputs, too.
    """
    held = viewed(value)
    owner = held.value if isinstance(held, ast.Subscript) else held
    if roles.var(owner) not in roles.loss_dicts or "loss" not in (dotted(owner) or "").lower():
        return None
    keys = [
        str(node.slice.value)
        for node in roles.file.nodes
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
        and "loss" in (dotted(node.value) or "").lower()
    ]  # fmt: skip
    counts = any(map(_COUNTS.search, keys)) or any(word in roles.file.source.data for word in _SUMS)
    return None if counts else held


def _gone_through(
    file: File,
    roles: Roles,
    node: ast.AST,
    only_shown: Callable[[list[ast.AST], str], bool],
    counted: Set[ast.AST],
) -> Iterator[tuple[ast.expr, ast.expr]]:
    """What is shown in ``{k: v.item() for k, v in losses.items()}``, each with the dict of losses."""
    if not isinstance(node, (ast.For, ast.comprehension)) or not isinstance(node.iter, ast.Call):
        return
    around = list(walk(node if isinstance(node, ast.For) else file.names.parents[node]))
    for name, held in gone_through(node.target, node.iter):
        if isinstance(held, ast.Name) and _of_dict(roles, held) is not None:
            named = [item for item in around if isinstance(item, ast.Name) and item.id == name.id]
            read = [_reading_of(file, item) for item in named if isinstance(item.ctx, ast.Load)]
            if read and counted.isdisjoint(read) and (all(map(_reads, read)) or only_shown(around, name.id)):
                yield from ((item, held) for item in read)


def _reading_of(file: File, name: ast.Name) -> ast.expr:
    """``v.item()``, ``float(v.detach())``, around a name; itself, if nothing reads it."""
    node: ast.expr = name
    for parent in file.names.ancestors(name):
        if _reads(node):
            break
        if isinstance(parent, ast.Call) and viewed(parent) is name:
            node = parent
        elif not isinstance(parent, ast.Attribute):
            break
    return node


def held_path(node: ast.expr) -> str:
    """``loss`` for ``learner.loss``, ``outputs[loss]`` for ``runner.outputs["loss"]`` and ``outputs.get("loss")``."""
    match node:
        case ast.Attribute(attr=attr):
            return attr
        case (
            ast.Subscript(value=inner, slice=ast.Constant(value=str(key)))
            | ast.Call(func=ast.Attribute(value=inner, attr="get"), args=[ast.Constant(value=str(key)), *_])
        ) if path := held_path(inner):
            return f"{path}[{key}]"
    return ""


def _is_given(loss: ast.expr, gives_mean: Callable[[ast.Call, int], bool]) -> bool:
    """``model(x, y)[1]``, ``loss_of(batch)``: the mean over a batch that a model or function of the project gives."""
    match loss:
        case ast.Subscript(value=ast.Call() as call, slice=ast.Constant(value=int(place))) if place >= 0:
            return gives_mean(call, place)
        case ast.Call():
            return gives_mean(loss, -1)
    return False


def _watched(roles: Roles, node: ast.AST) -> Iterator[ast.Name]:
    """The losses that a schedule is told: ``schedule.step(total / count)``."""
    match node:
        case ast.Call(func=ast.Attribute(value=owner, attr="step"), args=[value]):
            if roles.var(owner) not in roles.optimizers | roles.scalers | roles.managers:
                yield from (name for name in _whole(value) if roles.var(name) in roles.losses)


def _returned(file: File, roles: Roles, node: ast.AST) -> Iterator[ast.Name]:
    """The losses that a function which trains has added up, where it returns them: ``return total / count``."""
    if not isinstance(node, ast.Return):
        return
    function = file.names.function_of(node)
    own = [item for statement in (function.body if function is not None else ()) for item in walk_own(statement)]
    sums = {variable for item in own if (variable := _added_to(file, roles, item)) is not None}
    if not sums or not any(_trains(roles, item) for item in own):
        return
    for _ in range(2):
        for item in own:
            match item:
                case ast.Assign(targets=[target], value=value):
                    if any(roles.var(name) in sums for name in _whole(value)):
                        sums |= {variable} if (variable := roles.var(target)) in roles.losses else set()
    yield from (name for name in _whole(node.value) if roles.var(name) in sums)


def _added_to(file: File, roles: Roles, node: ast.AST) -> Var | None:
    """The loss that a statement of a loop adds to, as long as none calls backward on it."""
    target, _ = _addition(node)
    looped = any(isinstance(parent, (ast.For, ast.While)) for parent in file.names.ancestors(node))
    variable = roles.var(target) if isinstance(target, ast.Name) else None
    return variable if looped and variable in roles.losses - roles.trained else None


def _addition(node: ast.AST) -> tuple[ast.expr | None, list[ast.expr]]:
    """What a statement adds to, and what: ``a += x``, ``a = a + x``, ``a = x if first else a + x``."""
    match node:
        case ast.AugAssign(target=target, op=ast.Add(), value=value):
            return target, [value]
        case ast.Assign(targets=[target], value=ast.IfExp(body=one, orelse=other)):
            sums = [_added(target, side) for side in (one, other)]
            if sums.count(None) == 1:
                return target, [given or side for given, side in zip(sums, (one, other), strict=True)]
        case ast.Assign(targets=[target], value=value) if (given := _added(target, value)) is not None:
            return target, [given]
    return None, []


def _added(target: ast.expr, value: ast.expr) -> ast.expr | None:
    """``x`` of ``a + x``, and of ``0.9 * a + x``, for ``a``."""
    match value:
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            for side, other in ((left, right), (right, left)):
                weighed = [side.left, side.right] if isinstance(side, ast.BinOp) else [side]
                if ast.unparse(target) in map(ast.unparse, weighed):  # one is stored, the other loaded
                    return other
    return None


def _totals(roles: Roles, counted: Set[ast.AST]) -> set[Var]:
    """Variables that only losses of this rank's shares are added to: ``total += loss.detach() * k``."""
    added: dict[Var, list[ast.expr]] = {}
    for node in roles.file.nodes:
        target, values = _addition(node)
        if values and target is not None and (variable := roles.var(target)) in roles.losses:
            added.setdefault(variable, []).extend(values)
    return {
        variable
        for variable, values in added.items()
        if all(
            value not in counted
            and not _is_number(value)
            and (
                any(roles.var(name) in roles.losses for name in _whole(value))
                or roles.gives_loss(viewed(value), roles.losses)
            )
            for value in values
        )
    }


def _entered(roles: Roles, totals: set[Var], node: ast.AST) -> Iterator[ast.Name]:
    """Losses that entries of a dict add up, and totals that become an entry: ``log["loss"] += loss.detach()``."""
    target, values = _addition(node)
    if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
        if not _is_trained(roles, target.value):
            names = (name for value in values for name in _whole(value) if not _is_number(value))
            yield from (name for name in names if roles.var(name) in roles.losses)
        return
    match node:
        case ast.Assign(targets=[ast.Subscript(slice=ast.Constant())], value=value):
            entries = [value]
        case ast.Dict(values=entries):
            pass
        case _:
            return
    names = (name for value in entries for name in _whole(value) if roles.var(name) in totals - roles.trained)
    yield from (name for name in names if not _may_be_number(roles, totals, name))


def _bent_apart(file: File, roles: Roles, totals: set[Var], node: ast.AST) -> Iterator[ast.Name]:
    """Losses of which a function is made that nothing is trained on: ``perplexity = torch.exp(total / count)``."""
    inner = bent(node) or _clamped(node) or _bent_by_own(file, node)
    if inner is None:
        return
    names = [name for name in _whole(inner) if roles.var(name) in roles.losses]
    is_number = isinstance(node, ast.Call) and (dotted(node.func) or "").startswith("math.")
    is_cut = any(isinstance(item, ast.Attribute) and item.attr in _CUTS for item in walk(inner))
    if is_number or is_cut or all(_is_apart(roles, totals, name) for name in names):
        yield from (name for name in names if not _may_be_number(roles, totals, name))


def _clamped(node: ast.AST) -> ast.expr | None:
    """``x`` of ``x ** 2``, ``x.clamp(max=2)`` and ``torch.clamp(x, max=2)``."""
    match node:
        case ast.BinOp(left=left, op=ast.Pow()):
            return left
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="clamp" | "square"), args=[value, *_]):
            return value
        case ast.Call(func=ast.Attribute(value=value, attr="clamp" | "square" | "pow" | "clamp_max" | "clamp_min")):
            return value
    return None


def curved(
    file: File, roles: Roles, only_shown: Callable[[list[ast.AST], str], bool]
) -> dict[ast.expr, list[ast.Name]]:
    """``ppl = torch.exp(loss)`` and ``rmse = loss ** 0.5`` that are only shown: the value, and the losses in it.

    The mean of the ranks' perplexities is not that of the mean loss, so it is the losses that are averaged.
    """
    made: dict[Var, list[ast.Assign]] = {}
    for node in file.nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if (variable := roles.var(node.targets[0])) is not None:
                made.setdefault(variable, []).append(node)
    found: dict[ast.expr, list[ast.Name]] = {}
    for variable, statements in made.items():
        held = {statement.value: _bends(roles, statement.value) for statement in statements}
        if variable not in roles.trained and all(names is not None for names in held.values()):
            function = file.names.function_of(statements[0])
            body = function.body if function is not None else file.tree.body
            nodes = [item for statement in body for item in walk_own(statement)]
            named = [item for item in nodes if isinstance(item, ast.Name) and item.id == variable[1]]
            cut = {item for item in named if isinstance(item.ctx, ast.Load) and _reads(_reading_of(file, item))}
            left = any(isinstance(item.ctx, ast.Load) for item in named if item not in cut)
            if not left or only_shown([item for item in nodes if item not in cut], variable[1]):
                found |= {value: names for value, names in held.items() if names is not None}
    return found


def _bends(roles: Roles, value: ast.expr) -> list[ast.Name] | None:
    """The losses that are no numbers yet in a function of losses that is no multiple of them; None if it is another."""
    names = [
        item
        for item in walk(value)
        if isinstance(item, ast.Name) and roles.var(item) in roles.losses and not _asks_kind(roles.file, item)
    ]

    def holds(node: ast.AST) -> bool:
        return any(item in names for item in walk(node))

    others = [item for item in walk(value) if isinstance(item, ast.Name) and item not in names]
    if not all(_is_constant(roles, item) for item in others):
        return None
    for item in walk(value):
        match item:
            case ast.Call() | ast.BinOp() if (inner := bent(item)) is not None and holds(inner):
                break
            case ast.BinOp(left=left, op=ast.Pow()) if holds(left):
                break
            case ast.BinOp(op=ast.Div(), right=right) if holds(right):
                break
    else:
        return None
    return [name for name in names if not _reads(_reading_of(roles.file, name))]


def _is_constant(roles: Roles, name: ast.Name) -> bool:
    """Whether a name is that of a module, of a built-in function, or of a number that is written out."""
    found = roles.file.names.lookup(name.id, roles.file.names.scope_of(name))
    if found is None or roles.project.external(roles.file, name):
        return True
    made = roles.file.names.values_of(name)
    return bool(made) and all(isinstance(value, ast.Constant) for value in made)


def _asks_kind(file: File, name: ast.Name) -> bool:
    """``loss.device``, ``loss.shape``."""
    parent = file.names.parents[name]
    return isinstance(parent, ast.Attribute) and parent.attr in {"device", "dtype", "shape", "size", "grad"}


def _bent_by_own(file: File, node: ast.AST) -> ast.expr | None:
    """``x`` of ``psnr(x)``, where the file's ``psnr`` makes a logarithm or the like of it."""
    match node:
        case ast.Call(func=ast.Name(id=name), args=[value], keywords=[]):
            made = (item for item in file.nodes if isinstance(item, ast.FunctionDef) and item.name == name)
            for function in made:
                given = {argument.arg for argument in function.args.args[:1]}
                inner = (bent(item) for item in walk(function))
                if any(part is not None and given & names_in(part) for part in inner):
                    return value
    return None


def _is_apart(roles: Roles, totals: set[Var], name: ast.Name, deep: int = 0) -> bool:
    """Whether what a variable holds is cut off from its graph, or is what losses are added up to."""
    variable = roles.var(name)
    if variable in roles.trained or deep > 3:
        return False
    if variable in totals:
        return True
    made = [value for held, value, _, part in roles.assignments if held == variable and not part]
    for value in (value for value in made if not isinstance(value, ast.Constant)):
        parts = [part for part in _whole(value) if roles.var(part) in roles.losses]
        if "detach" not in ast.unparse(value):
            if not parts or not all(_is_apart(roles, totals, part, deep + 1) for part in parts):
                return False
    return bool(made)


def _is_kept_apart(roles: Roles, holder: ast.expr, loss: ast.expr) -> bool:
    """``losses.append(loss / 4)`` in the loop that calls ``loss.backward()``, of a list that nothing is trained on."""

    def loop_of(node: ast.AST) -> ast.AST | None:
        return next((item for item in roles.file.names.ancestors(node) if isinstance(item, (ast.For, ast.While))), None)

    while isinstance(holder, (ast.Subscript, ast.Call)):  # ``history["loss"]``, ``history.setdefault("loss", [])``
        held = holder.value if isinstance(holder, ast.Subscript) else holder.func
        holder = held.value if isinstance(held, ast.Attribute) and isinstance(holder, ast.Call) else held
    losses = {variable for name in _whole(loss) if (variable := roles.var(name)) in roles.losses}
    loop = loop_of(loss)
    if loop is None or not losses <= roles.trained or _is_trained(roles, holder):
        return False
    trained = {roles.var(of) for call in roles.file.calls if (of := loss_of(call)) and loop_of(call) is loop}
    return bool(losses) and losses <= trained


def _is_trained(roles: Roles, holder: ast.expr) -> bool:
    """Whether backward is called on what a dict or list holds, or on what is made of that."""
    held = roles.var(holder)
    made = [value for variable, value, _, _ in roles.assignments if variable in roles.trained]
    made += [value for call in roles.file.calls if (loss := loss_of(call)) for value in (loss, *call.args)]
    return any(roles.var(item) == held for value in made for item in ast.walk(value) if isinstance(item, ast.Name))


def _trains(roles: Roles, node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(attr="backward")):
            return True
        case ast.Assign(value=value):
            return roles.gives_loss(value, roles.losses)
    return False


def _whole(node: ast.expr | None) -> Iterator[ast.Name]:
    """The names in a value that are in it as tensors: of ``(total / count, right.item())`` the first."""
    match node:
        case ast.Name():
            yield node
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Dict(values=parts):
            yield from (name for part in parts for name in _whole(part))
        case ast.BinOp(left=left, right=right):
            yield from (*_whole(left), *_whole(right))
        case ast.Call(func=ast.Attribute(value=value, attr=attr)) if attr in _VIEWS:
            yield from _whole(value)
        case ast.Attribute(value=value, attr="data"):
            yield from _whole(value)
        case ast.UnaryOp(operand=value):
            yield from _whole(value)
        case ast.Call(func=ast.Name(id="min" | "max"), args=[value, ast.Constant()]):
            yield from _whole(value)
        case ast.Call() | ast.BinOp() if (inner := bent(node)) is not None:
            yield from _whole(inner)


def candidates(roles: Roles, node: ast.AST) -> Iterator[ast.expr]:
    """What shows the value of a loss, if it holds one."""
    match node:
        case ast.Call(func=ast.Attribute(attr=attr), args=[], keywords=[]) if attr in _READERS:
            yield node
        case ast.Call(func=ast.Name(), args=[_]) if _is_number_type(node):
            yield node
        case ast.Call(args=[value]) if roles.project.external(roles.file, node.func) in _OF_NUMPY:
            yield value
        case ast.Assign(targets=[ast.Subscript(value=holder)], value=value):
            numbers = roles.var(viewed(value)) in roles.losses and _is_of_numbers(roles, holder)
            if numbers or _is_kept_apart(roles, holder, value):
                yield value
        case ast.FormattedValue(value=value):
            yield value
        case ast.Call(func=ast.Name(id="print"), args=values):
            yield from values
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str()), attr="format"), args=values, keywords=named):
            yield from (*values, *(keyword.value for keyword in named))
        case ast.BinOp(left=ast.Constant(value=str()), op=ast.Mod(), right=right):
            yield from _parts(right)
        case ast.Call(func=ast.Attribute(value=holder, attr=attr), args=[*_, value]) if attr in _LISTS:
            yield from (p for p in _parts(value) if p is not viewed(p) or _is_kept_apart(roles, holder, p))
        case ast.AugAssign(target=holder, op=ast.Add(), value=ast.List(elts=values)):
            yield from (
                p for value in values for p in _parts(value) if p is not viewed(p) or _is_kept_apart(roles, holder, p)
            )
        case ast.Call(func=ast.Attribute(value=holder, attr=attr), args=[*values]) if attr in _IN_PLACE:
            if not _is_trained(roles, _first_of(holder)):
                yield from values
        case ast.Call(func=ast.Attribute(attr=attr)) if attr in SHOWING_METHODS:
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            yield from (part for value in given for part in _parts(value))
        case _ if isinstance(node, ast.Call) and roles.project.external(roles.file, node.func) == "wandb.log":
            yield from (part for value in node.args for part in _parts(value))
        case ast.Call(args=[what, _, *_]) if roles.project.external(roles.file, node.func) == "torch.save":
            written = [what, *(roles.file.names.values_of(what) if isinstance(what, ast.Name) else ())]
            yield from (part for value in written if isinstance(value, ast.Dict) for part in _parts(value))


def _first_of(node: ast.expr) -> ast.expr:
    """``a`` of ``a.mul_(0.9).add_``."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        node = node.func.value
    return node


def _is_of_numbers(roles: Roles, holder: ast.expr) -> bool:
    """``losses`` of ``losses = torch.zeros(n)``, which takes a loss's value."""
    variable = roles.var(holder)
    given = (pair for node in roles.file.nodes if isinstance(node, ast.Assign) for pair in assigned_by(node))
    made = [value for target, value in given if variable is not None and roles.var(target) == variable]
    return bool(made) and all(
        isinstance(value, ast.Call) and (dotted(value.func) or "").split(".")[-1] in _FILLED for value in made
    )


def _tested(file: File, roles: Roles, node: ast.AST) -> Iterator[ast.expr]:
    """What a test compares, or asks for being finite."""
    match node:
        case ast.Compare(left=left, comparators=others) if not isinstance(node.ops[0], OF_OBJECTS):
            compared = [left, *others]
        case ast.Call(args=[value]) if roles.project.external(file, node.func) in _OF_NUMBERS:
            compared = [value]
        case ast.Call(func=ast.Attribute(value=value, attr=attr), args=[]) if attr in _QUESTIONS:
            compared = [value]
        case _:
            return
    child: ast.AST = node
    for parent in file.names.ancestors(node):
        if isinstance(parent, (ast.If, ast.While, ast.IfExp, ast.Assert)):
            if child is parent.test:
                yield from compared
            return
        if isinstance(parent, ast.stmt):
            return
        child = parent


def _parts(node: ast.expr) -> Iterator[ast.expr]:
    """What a row, a tuple or a dict is made of."""
    if isinstance(node, (ast.Tuple, ast.List)):
        yield from (part for item in node.elts for part in _parts(item))
    elif isinstance(node, ast.Dict):
        yield from (part for item in node.values for part in _parts(item))
    else:
        yield node


def _is_number_type(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id in _NUMBERS


def _reads(node: ast.expr) -> bool:
    """Whether an expression makes a number of a tensor, so that it was a tensor before."""
    return isinstance(node, ast.Call) and (
        _is_number_type(node) or (isinstance(node.func, ast.Attribute) and node.func.attr in _READERS)
    )


def viewed(node: ast.expr) -> ast.expr:
    """The tensor under ``.detach()``, ``.cpu()``, ``.data`` and the like, in any order."""
    while True:
        match node:
            case ast.Call(func=ast.Attribute(value=value, attr=attr)) if attr in _VIEWS:
                node = value
            case ast.Call(func=ast.Attribute(value=value, attr=attr), args=[], keywords=[]) if attr in _READERS:
                node = value
            case ast.Call(func=func, args=[value], keywords=[]) if isinstance(func, ast.Name) and func.id in _NUMBERS:
                node = value
            case ast.Attribute(value=value, attr="data"):
                node = value
            case ast.Call(func=ast.Name(id="round"), args=[value, *_]):
                node = value
            case ast.Call(func=ast.Name(id="min" | "max"), args=[value, ast.Constant()]):
                node = value
            case ast.Call() | ast.BinOp() if (inner := bent(node)) is not None:
                node = inner
            case _:
                return node


def _may_be_number(roles: Roles, totals: set[Var], loss: ast.expr) -> bool:
    """Whether a variable is given a number somewhere: then it has been averaged, or is no rank's own.

    The 0 that a loss starts as, to which its parts are added before backward is called on it, is no such number; nor is
    the start of what losses are added up in: ``total = 0.0``, and then ``total += loss.detach()``.
    """
    total = roles.var(loss)
    made = [value for variable, value, _, _ in roles.assignments if variable == total]
    if total in totals:
        made = [value for value in made if not isinstance(value, ast.Constant)]
    elif total in roles.trained:
        made = [value for value in made if not (isinstance(value, ast.Constant) and value.value == 0)]
    return any(map(_is_number, made))


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return True
    names = {item.attr if isinstance(item, ast.Attribute) else getattr(item, "id", "") for item in ast.walk(node)}
    return bool(names & {"item", "tolist", "float", "numpy"})
