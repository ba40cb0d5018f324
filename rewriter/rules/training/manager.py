"""An OptimManager runs backward, clips, steps and clears.

What: ``optim_manager = bmt.optim.OptimManager(loss_scale=None)`` behind the optimizer; a GradScaler becomes the manager
itself, with ``loss_scale=2**16``; ``backward``, ``clip_grad_norm_``, ``step`` and ``zero_grad`` go through it, and so
does ``unscale_`` where more than ``clip_grad_norm_`` looks at gradients. An object of the project's that steps an
optimizer inside (``NoamOpt(Adam(...))``, SAM, Lookahead) stays as it is: the optimizer that it holds gets the manager.
Optimizers in a list, a tuple or a dict get one manager, ``for o in opts: optim_manager.step(o)``; those that a loop
writes out, ``for o in (opt_a, opt_b)``, have managers of their own. A step that gets a
closure stays the optimizer's (LBFGS, or one that calls it once); the closure's backward is the manager's. timm's
``NativeScaler`` becomes bmtrain's; one of the project's, which each call gives the optimizer, tells its manager then.
An optimizer that another package's object makes for the model and steps inside, ``algo.optimizer``, has a manager, too,
if the script reads it.
Why: the gradient of a rank is its share of the sum over all ranks; the manager makes it the mean, computes norms over
all shards, and scales the loss for fp16.
Refuses when: ``step`` gets a closure beside a loss scale, or is called in a hook; another package's optimizer makes one
inside; a list of optimizers goes where it is not followed, holds more than these, or has a loss scale. A step in the
``forward`` of a module is reported. A learning-rate scheduler that the script steps stays the script's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import ClassInfo, File, FunctionInfo
from rewriter.analyze.read.nodes import Function, dotted, is_of_autograd, loss_of, walk
from rewriter.analyze.training.entries import is_main_test
from rewriter.analyze.training.managers import Manager, Managers
from rewriter.analyze.training.roles import Roles, Var
from rewriter.changes import Change, Remove, anchor, insert_before, insert_behind, replace
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Refusal, Remark

_UNSCALED = "{bmt}.optim.OptimManager(loss_scale=None)"
_GROWTH = {"growth_factor": "loss_scale_factor", "growth_interval": "loss_scale_steps"}
"""What torch's GradScaler and the manager call the same."""
_HARMLESS = {
    "clip_grad_norm_", "step", "update", "unscale_", "parameters", "item", "print", "float", "int", "round", "isfinite",
    "isnan", "isinf", "append", "zero_grad", "get_scale", "get_last_lr", "format", "list",
}  # fmt: skip
"""Calls that look at no gradient, or that the manager makes instead."""
_NATIVE_SCALERS = {"timm.utils.NativeScaler", "timm.utils.cuda.NativeScaler"}
_SEVERAL = "{} is one optimizer of several, of which each needs a name of its own: write a.step(), b.step()"
_OF_LISTS = {"append", "values", "items", "keys"}
_GOES_THROUGH = {"enumerate", "zip", "len", "reversed", "list", "tuple", "isinstance", "print", "range", "bool"}
_ELSEWHERE = "the optimizers of {} go where they are not followed here, so that a step of theirs may have no manager"
_IN_HOOKS = "{} steps in a hook, while a backward runs, when gradients are not reduced yet: step after it"
_MIXED = "{} has more than optimizers, of which each then needs a name of its own: write a.step(), b.step()"
_INSIDE = (
    "{} is a package's and makes another optimizer inside, which no manager could be told of: have its class in the "
    "project, and it is converted"
)
_OPTIMIZER = re.compile(r"^(?:optimizer|optimiser|optim|opt)$")
_KNOWN = ("torch.", "bmtrain.", "transformers.", "accelerate.", "deepspeed.", "lightning.", "pytorch_lightning.")
_CLIPS_BY = {"limit": "{limit}", "norm_type": "norm_type={norm_type}", "rest": "**{rest}"}
_NOT_FINITE = (
    "the manager's clipping raises no error for a norm that is not finite: look at what it gives, on all ranks the same"
)
_CLOSURE = (
    "step with a closure and a loss scale cannot be converted, as the optimizer would read gradients that are scaled: "
    "where it calls the closure once, call it before, loss = closure(), and step without it"
)


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    managers = facts.managers(file)
    reasons = [(manager, reason) for manager in managers.all if (reason := _reason_against(managers, manager))]
    for manager, reason in reasons:
        yield Refusal(RULE.code, _first_use(file, managers, manager), reason)
    for several in (manager.several for manager in managers.all if manager.several is not None):
        if managers.roles.holds_others(several):
            line = next(s.lineno for v, _, s, _ in managers.roles.assignments if v == several)
            yield Refusal(RULE.code, line, _MIXED.format(several[1]))
        node = _misunderstood(file, facts, managers, several)
        if node is not None:
            yield Refusal(RULE.code, node.lineno, _ELSEWHERE.format(several[1]))  # type: ignore[attr-defined]
    for name, call in managers.roles.packaged:
        yield Refusal(RULE.code, call.lineno, _INSIDE.format(name.split(".")[-1]))
    yield from _of_packages(file, facts, managers.roles)
    yield from _in_forwards(file, facts, managers)
    yield from _in_hooks(file, managers)
    made = [change for manager in managers.all if not manager.existing for change in _creation(file, managers, manager)]
    calls: list[Change] = [*_displayed(managers)]
    for item in _calls(file, facts, managers):
        if isinstance(item, (Remark, Refusal)):
            yield item
        else:
            calls.append(item)
    if made or calls:
        line = file.names.statement_of(_anchor(made[0])).lineno if made else min(_anchor(c).lineno for c in calls)
        message = "an OptimManager runs backward and steps"
        yield Conversion(RULE.code, line, message, (*made, *calls), key="manager")


def _of_packages(file: File, facts: Facts, roles: Roles) -> Iterator[Conversion]:
    """``algo = torch_ac.PPOAlgo(envs, net)``, which steps ``algo.optimizer`` in its own code: that gets its manager."""
    told = {
        item
        for call in file.calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_optimizer"
        for item in map(dotted, call.args)
    }
    for variable, value, statement, part in roles.assignments:
        name = facts.project.external(file, value.func) if isinstance(value, ast.Call) and not part else ""
        if not isinstance(value, ast.Call) or not name or name.startswith(_KNOWN):
            continue
        if not any(map(roles.is_model, [*value.args, *(keyword.value for keyword in value.keywords)])):
            continue
        used = {
            node.attr
            for node in file.nodes
            if isinstance(node, ast.Attribute) and _OPTIMIZER.match(node.attr) and roles.var(node.value) == variable
        }
        for attr in sorted(used):
            if (path := f"{variable[1]}.{attr}") not in told:
                change = insert_behind(statement, f"{_UNSCALED}.add_optimizer({path})")
                message = "the optimizer that another package's object makes and steps has a manager"
                yield Conversion(RULE.code, statement.lineno, message, (change,))


def _displayed(managers: Managers) -> Iterator[Change]:
    """``for o in (opt_a, opt_b): o.step()`` goes through their managers, which clear and step likewise."""
    for name, items in managers.roles.displayed.items():
        named = [(item, manager.name) for item in items if (manager := managers.by(item)) and not manager.existing]
        yield from (replace(item, called) for item, called in named)
        for call in managers.file.calls if named else ():
            if isinstance(call.func, ast.Attribute) and managers.roles.var(call.func.value) == name:
                if call.args or call.keywords:
                    yield replace(call, f"{name[1]}.{call.func.attr}()")


def _in_hooks(file: File, managers: Managers) -> Iterator[Refusal]:
    """Where optimizers step in functions that are given as hooks.  In whatever lambda, if they are of a list: which of
    them it has when it is called is not followed.
    """
    hooks = [
        item
        for call in file.calls
        if isinstance(call.func, ast.Attribute) and call.func.attr.endswith("hook")
        for item in call.args
    ]
    names = {(dotted(item) or "").split(".")[-1] for item in hooks}
    for call in file.calls:
        if isinstance(call.func, ast.Attribute) and call.func.attr == "step":
            manager = managers.by(call.func.value)
            if manager is not None and any(
                (isinstance(parent, Function) and parent.name in names)
                or (isinstance(parent, ast.Lambda) and (parent in hooks or manager.several is not None))
                for parent in file.names.ancestors(call)
            ):
                yield Refusal(RULE.code, call.lineno, _IN_HOOKS.format(file.source.code(call.func.value)))


def _misunderstood(file: File, facts: Facts, managers: Managers, several: Var) -> ast.AST | None:
    """Where a list of optimizers goes that is not followed."""
    for node in file.nodes:
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            if managers.roles.var(node) == several and not _is_followed(file, facts, node):
                return node
    return None


def _is_followed(file: File, facts: Facts, node: ast.expr) -> bool:
    parent = file.names.parents[node]
    match parent:
        case ast.Subscript(value=held) if held is node:
            return not isinstance(parent.ctx, ast.Del) and not isinstance(parent.slice, ast.Slice)
        case ast.Attribute(attr=attr):
            return attr in _OF_LISTS
        case ast.For(iter=iterated) | ast.comprehension(iter=iterated):
            return iterated is node
        case ast.Call(func=func, args=args) if node in args:
            if isinstance(func, ast.Name) and func.id in _GOES_THROUGH:
                return True
            found = facts.project.resolve(file, func)
            if isinstance(found, FunctionInfo) and args.index(node) < len(found.parameters):
                roles, name = facts.scripts.roles[found.file], found.parameters[args.index(node)]
                return (found.node, name) in roles.lists or not any(
                    isinstance(item, ast.Name) and item.id == name for item in walk(found.node)
                )
        case ast.Assign(value=value):
            return value is node
        case ast.Compare() | ast.If() | ast.IfExp() | ast.Return() | ast.BoolOp():
            return True
        case ast.Tuple():
            return isinstance(file.names.parents[parent], ast.Return)
    return False


def _tells_all(file: File, managers: Managers, manager: Manager) -> Iterator[Change]:
    """Where a manager is made that drives the optimizers of a list, and where it is told each of them."""
    assert manager.several is not None
    several = manager.several
    name, made = several[1], f"{manager.name} = {_UNSCALED}"
    given = [value for v, value, *_ in managers.roles.assignments if v == several and not _is_none(value)]
    each, scope = "each", file.names.scopes.get(several[0])
    while scope is not None and each in scope.bindings:
        each += "_"
    loop = [f"for {each} in {name}{'.values()' if _is_dict(file, managers, several) else ''}:"]
    loop.append(f"    {manager.name}.add_optimizer({each})")
    place = _last_assignment(file, managers, several)
    if place is None:
        first = _first_statement(several)
        if first is not None:
            yield insert_before(first, made, *loop)
        return
    yield insert_behind(place, made, *(() if all(map(_is_empty, given)) else loop))
    for node in file.nodes:
        match node:
            case ast.Call(func=ast.Attribute(value=held, attr="append"), args=[_]) if (
                managers.roles.var(held) == several
            ):
                told = f"{name}[-1]"
            case ast.Assign(targets=[ast.Subscript(value=held) as target]) if managers.roles.var(held) == several:
                told = file.source.code(target)
            case _:
                continue
        yield insert_behind(file.names.statement_of(node), f"{manager.name}.add_optimizer({told})")


def _is_empty(value: ast.expr) -> bool:
    """``[]``, ``{}``, ``dict()``, ``[None] * 2``: what is put there comes later."""
    match value:
        case ast.List(elts=[]) | ast.Dict(values=[]) | ast.BinOp():
            return True
        case ast.Call(func=func, args=args, keywords=[]):
            last = (dotted(func) or "").split(".")[-1]
            return (last in {"list", "dict", "OrderedDict"} and not args) or last == "defaultdict"
    return False


def _is_dict(file: File, managers: Managers, several: Var) -> bool:
    """Whether the optimizers are in a dict."""
    roles = managers.roles
    values = [value for variable, value, _, _ in roles.assignments if variable == several]
    named = any(isinstance(v, (ast.Dict, ast.DictComp)) or dotted(getattr(v, "func", v)) == "dict" for v in values)
    return named or any(
        (
            isinstance(node, ast.Attribute)
            and node.attr in {"values", "items", "keys"}
            and roles.var(node.value) == several
        )
        or (
            isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Constant)
            and isinstance(node.slice.value, str)
            and roles.var(node.value) == several
        )
        for node in file.nodes
    )


def _in_forwards(file: File, facts: Facts, managers: Managers) -> Iterator[Finding]:
    """Steps in a forward, whose parameters stay whole and old until it ends."""
    for call in file.calls:
        function = file.names.function_of(call)
        if function is None or function.name != "forward" or not isinstance(call.func, ast.Attribute):
            continue
        owner = file.names.class_of(call)
        if call.func.attr == "step" and managers.roles.var(call.func.value) in managers.of and owner is not None:
            if facts.classes.is_module(file.class_info(owner)):
                what = f"{file.source.code(call.func.value)} steps in {owner.name}.forward"
                message = f"{what}, which fails on several ranks: train in another method, and call the model there"
                yield Remark(RULE.code, call.lineno, message, differs=True)


def _anchor(change: Change) -> ast.stmt | ast.expr:
    node = anchor(change)
    assert node is not None
    return node


def _reason_against(managers: Managers, manager: Manager) -> str:
    """Why a manager's optimizer or scaler is not understood well enough to convert the file."""
    if manager.existing:
        return ""
    if manager.several is not None:
        path = manager.several[1]
        made = _last_assignment(managers.file, managers, manager.several) is not None
        if ("." in path and path.split(".")[0] != "self") or not (made or managers.is_argument(manager.several)):
            return f"{path} is not made in this file, so where its manager would be made is not known"
    for variable in (*manager.optimizers, *([manager.scaler] if manager.scaler else [])):
        path = variable[1]
        if "." in path and path.split(".")[0] not in {"self", "cls"}:
            root = variable[0], path.split(".")[0]
            made = _owner_place(managers.file, managers, variable) is not None or managers.is_argument(root)
            if manager.scaler is None and made:
                continue
            return f"{path} belongs to another object, so where its manager would be made is not known"
        if not managers.is_argument(variable) and not any(v == variable for v, *_ in managers.roles.assignments):
            if variable != manager.scaler and _inherited_place(managers, variable) is not None:
                continue
            if any(isinstance(n, ast.For) and dotted(n.target) == path for n in walk(variable[0])):
                return _SEVERAL.format(path)
            return f"{path} is not made in this file, so where its manager would be made is not known"
    if manager.scaler is not None:
        for optimizer in manager.optimizers:
            if optimizer in managers.roles.optimizer_holders:
                return f"{optimizer[1]} steps another optimizer inside, which would not know of the loss scale"
            place = _last_assignment(managers.file, managers, optimizer)
            if _made_again(managers.file, managers, optimizer, place):
                return f"{optimizer[1]} is made again while its scaler stays: make both anew, or neither"
    if (
        manager.scaler is not None
        and not _scaler_is_made_here(managers, manager)
        and not managers.is_argument(manager.scaler)
    ):
        return f"{manager.scaler[1]} is no GradScaler made in this file"
    return ""


def _first_use(file: File, managers: Managers, manager: Manager) -> int:
    variables = {*manager.optimizers, manager.scaler, manager.several}
    lines = [
        n.lineno for n in file.nodes if isinstance(n, (ast.Name, ast.Attribute)) and managers.roles.var(n) in variables
    ]
    return min(lines, default=1)


# Where managers are made and told their optimizers -------------------------------------------------------------


def _creation(file: File, managers: Managers, manager: Manager) -> Iterator[Change]:
    """Where a manager is made and told its optimizers."""
    if manager.scaler is not None and managers.is_argument(manager.scaler):
        yield from _scaler_argument(managers, manager)
        return
    branch = _branch_of_scaler(file, managers, manager)
    if branch is not None:
        yield insert_before(branch, f"{manager.name} = {_UNSCALED}")
    if manager.scaler is not None:
        yield from _scaler_creation(file, managers, manager)
    if manager.several is not None:
        yield from _tells_all(file, managers, manager)
    for optimizer in manager.optimizers:
        place = _last_assignment(file, managers, optimizer) or _owner_place(file, managers, optimizer)
        place = place or _inherited_place(managers, optimizer)
        if manager.scaler is not None:
            yield from _joined(file, managers, manager, optimizer, place, branch)
            continue
        add = f"{manager.name}.add_optimizer({optimizer[1]})"
        lines = [f"{manager.name} = {_UNSCALED}", add]
        for made in _by_functions(file, managers, optimizer):
            yield insert_behind(made, f"global {manager.name}", *lines)
        again = _made_again(file, managers, optimizer, place)
        if again:
            for made in again:
                yield insert_behind(made, *lines)
        elif place is not None:
            if any(_may_be_none(given) for given in _given(managers, optimizer)):
                lines[1:] = _unless_none(optimizer, add)
            yield insert_behind(place, *lines)
        else:
            first = _first_statement(optimizer)
            if first is not None:
                if _may_be_none(optimizer):
                    lines[1:] = _unless_none(optimizer, add)
                yield insert_before(first, *lines)


def _owner_place(file: File, managers: Managers, optimizer: Var) -> ast.stmt | None:
    """For ``trainer.optimizer``: the statement after which ``trainer`` certainly has it, if it is made here."""
    root = optimizer[0], optimizer[1].split(".")[0]
    if root[1] == optimizer[1] or root[1] in {"self", "cls"}:
        return None
    return _last_assignment(file, managers, root)


def _unless_none(optimizer: Var, add: str) -> list[str]:
    return [f"if {optimizer[1]} is not None:", f"    {add}"]


def _setters(managers: Managers, optimizer: Var) -> Iterator[tuple[ClassInfo, ast.expr]]:
    """For ``self.optimizer`` of a class: each class, it or one above it, that sets it, with the value."""
    owner, path = optimizer
    if not isinstance(owner, ast.ClassDef):
        return
    info = managers.file.class_info(owner)
    for above in (info, *managers.roles.classes.ancestors(info)):
        for node in walk(above.node):
            if isinstance(node, ast.Assign) and path in map(dotted, node.targets):
                yield above, node.value


def _given(managers: Managers, optimizer: Var) -> Iterator[Var]:
    """The arguments that a class takes for ``self.optimizer``."""
    for info, value in _setters(managers, optimizer):
        function = info.file.names.function_of(value)
        if isinstance(value, ast.Name) and function is not None:
            yield function, value.id


def _inherited_place(managers: Managers, optimizer: Var) -> ast.stmt | None:
    """The ``super().__init__(...)`` behind which a class has the ``self.optimizer`` of a class in another file."""
    owner, _ = optimizer
    if not isinstance(owner, ast.ClassDef) or not any(
        info.file is not managers.file for info, _ in _setters(managers, optimizer)
    ):
        return None
    made = managers.file.class_info(owner).methods.get("__init__")
    return next((s for s in (made.body if made is not None else ()) if _runs_base(s)), None)


def _runs_base(statement: ast.stmt) -> bool:
    """``super().__init__(...)`` or ``Base.__init__(self, ...)``."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Call)
        and isinstance(statement.value.func, ast.Attribute)
        and statement.value.func.attr == "__init__"
    )


def _branch_of_scaler(file: File, managers: Managers, manager: Manager) -> ast.stmt | None:
    """The ``if`` under which alone the scaler is made, where code behind it runs also without: it needs a manager."""
    makers = [statement for statement, _ in _makers(managers, manager)]
    branches = [_outermost_branch(file, made, managers, manager) for made in makers]
    if not branches or any(branch is not branches[0] for branch in branches):
        return None  # made in any case, or by several statements of which one is the other's default
    branch = branches[0]
    if branch is None or _makes(branch, makers):
        return None
    steered = {*manager.optimizers, manager.scaler}
    within = set(walk(branch))
    used = any(
        isinstance(node.func, ast.Attribute) and managers.roles.var(node.func.value) in steered
        for node in file.calls
        if node not in within
    )
    return branch if used else None


def _outermost_branch(file: File, statement: ast.stmt, managers: Managers, manager: Manager) -> ast.stmt | None:
    """The outermost ``if``, ``try`` or ``match`` around a statement in its block of a function, class or loop.

    One that makes all the optimizers, too, is none: without it nothing steps (``if __name__ == "__main__":``).
    """
    places = [_last_assignment(file, managers, optimizer) for optimizer in manager.optimizers]
    found = None
    for parent in file.names.ancestors(statement):
        if isinstance(parent, (ast.If, ast.Try, ast.Match)):
            if is_main_test(parent) or _holds_all(parent, places):
                break
            found = parent
        elif isinstance(parent, ast.stmt) and not isinstance(parent, ast.With):
            break
    return found


def _holds_all(branch: ast.stmt, places: list[ast.stmt | None]) -> bool:
    """Whether statements stand in a branch, and none is the branch itself."""
    within = set(walk(branch)) - {branch}
    return bool(places) and all(place in within for place in places)


def _makes(statement: ast.stmt, makers: list[ast.stmt]) -> bool:
    """Whether a scaler, or None in its place, is made whichever way a statement goes that does not leave the block."""
    if isinstance(statement, ast.If):
        return _one_makes(statement.body, makers) and _one_makes(statement.orelse, makers)
    if isinstance(statement, ast.Try):
        tried = _one_makes([*statement.body, *statement.orelse], makers)
        return tried and all(_one_makes(handler.body, makers) for handler in statement.handlers)
    if isinstance(statement, ast.With):
        return _one_makes(statement.body, makers)
    return statement in makers or isinstance(statement, (ast.Return, ast.Raise, ast.Continue, ast.Break))


def _one_makes(block: list[ast.stmt], makers: list[ast.stmt]) -> bool:
    return any(_makes(statement, makers) for statement in block)


def _joined(
    file: File, managers: Managers, manager: Manager, optimizer: Var, place: ast.stmt | None, branch: ast.stmt | None
) -> Iterator[Change]:
    """Tell a manager its optimizer wherever the later of the two is made."""
    add = f"{manager.name}.add_optimizer({optimizer[1]})"
    makers = [statement for statement, _ in _makers(managers, manager)]
    if place is None:  # the optimizer comes from outside
        first = _first_statement(optimizer) if managers.is_argument(optimizer) else None
        if first is not None and all(file.names.function_of(made) is optimizer[0] for made in makers):
            yield from (insert_behind(statement, add) for statement in ([branch] if branch is not None else makers))
        elif first is not None and _is_told_by_calls(file, managers, manager):
            asked = f"if {optimizer[1]} not in {manager.name}.optimizers:"
            yield insert_before(first, asked, f"    {add}")
        return
    if branch is not None:
        yield insert_behind(place if place.lineno > branch.lineno and place not in walk(branch) else branch, add)
        return
    if any(made.lineno < place.lineno for made in makers):
        yield insert_behind(place, add)
    for made in makers:
        if made.lineno > place.lineno:
            yield insert_behind(made, add)


def _is_told_by_calls(file: File, managers: Managers, manager: Manager) -> bool:
    """Whether a scaler stays while functions are given the optimizers that it steps, as timm's NativeScaler does."""
    return any(
        managers.is_argument(optimizer)
        and _last_assignment(file, managers, optimizer) is None
        and any(file.names.function_of(made) is not optimizer[0] for made, _ in _makers(managers, manager))
        for optimizer in manager.optimizers
    )


def _scaler_argument(managers: Managers, manager: Manager) -> Iterator[Change]:
    """A function that may be given no scaler makes its own manager then."""
    assert manager.scaler is not None
    function, name = manager.scaler
    first = _first_statement(manager.scaler)
    given = [v for v in manager.optimizers if v[0] is function and managers.is_argument(v)]
    if first is None or not given or not any(_asks_for_none(node, name) for node in walk(function)):
        return
    lines = [f"if {name} is None:", f"    {name} = {_UNSCALED}"]
    lines += [f"    {name}.add_optimizer({variable[1]})" for variable in given]
    yield insert_before(first, *lines)


def _may_be_none(variable: Var) -> bool:
    """Whether an argument is None by default, or the function asks whether it, or what goes with it, is."""
    function, name = variable
    if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return False
    return (
        _has_default_none(function, name)
        or any(_asks_for_none(node, name) for node in walk(function))
        or _steps_only_beside_another(function, name)
    )


def _steps_only_beside_another(function: Function, name: str) -> bool:
    """Whether all that is done with an argument stands under ``if other is not None:`` or ``if train:`` of another."""
    others = {argument.arg for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)}
    uses = {node for node in walk(function) if isinstance(node, ast.Name) and node.id == name}
    guarded = {
        inner
        for node in walk(function)
        if isinstance(node, ast.If)
        and any(_asks_for_none(part, other) or dotted(part) == other for part in _parts(node.test) for other in others)
        for statement in node.body
        for inner in walk(statement)
    }
    return bool(uses) and uses <= guarded


def _parts(test: ast.expr) -> Iterator[ast.expr]:
    """The conditions of which a test is made."""
    if isinstance(test, ast.BoolOp):
        for value in test.values:
            yield from _parts(value)
    else:
        yield test.operand if isinstance(test, ast.UnaryOp) else test


def _has_default_none(function: Function, name: str) -> bool:
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    defaults = dict(zip((a.arg for a in reversed(positional)), reversed(given.defaults), strict=False))
    defaults.update((a.arg, d) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True) if d is not None)
    return name in defaults and _is_none(defaults[name])


def _asks_for_none(node: ast.AST, name: str) -> bool:
    if isinstance(node, (ast.If, ast.IfExp)):
        return dotted(node.test) == name
    return isinstance(node, ast.Compare) and dotted(node.left) == name and _is_none(node.comparators[0])


def _makers(managers: Managers, manager: Manager) -> Iterator[tuple[ast.stmt, ast.expr]]:
    """The statements that give the scaler's variable a scaler, or None."""
    for variable, value, statement, part in managers.roles.assignments:
        if (
            variable == manager.scaler
            and not part
            and (managers.roles.scaler_call(value) is not None or _is_none(value))
        ):
            yield statement, value


def _scaler_is_made_here(managers: Managers, manager: Manager) -> bool:
    """Whether the file makes the scaler."""
    return any(managers.roles.scaler_call(value) is not None for _, value in _makers(managers, manager))


def _scaler_creation(file: File, managers: Managers, manager: Manager) -> Iterator[Change]:
    roles = managers.roles
    for statement, value in _makers(managers, manager):
        call = roles.scaler_call(value)
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if roles.var(target) == manager.scaler and file.source.code(target) != manager.name:
                    yield replace(target, manager.name)
        if call is None:
            yield replace(value, _UNSCALED)
            continue
        given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
        scale = "{init_scale}" if "init_scale" in given else "2**16"
        place: ast.expr = call
        if isinstance(value, ast.IfExp):
            place, given["enabled"] = value, value.test
            inverted = isinstance(value.body, ast.Constant)
            scale += " if not {enabled} else None" if inverted else " if {enabled} else None"
        elif "enabled" in given:
            scale += " if {enabled} else None"
        options = [f"{new}={{{old}}}" for old, new in _GROWTH.items() if old in given]
        used = {name: node for name, node in given.items() if name in {"init_scale", "enabled", *_GROWTH}}
        yield replace(place, f"{{bmt}}.optim.OptimManager({', '.join([f'loss_scale={scale}', *options])})", **used)


def _last_assignment(file: File, managers: Managers, variable: Var) -> ast.stmt | None:
    """The statement after which a variable certainly has its value, seen from the block it is used in."""
    found = [s for v, value, s, _ in managers.roles.assignments if v == variable and not _is_none(value)]
    others = _by_functions(file, managers, variable)
    found = [statement for statement in found if statement not in others]
    if not found:
        return None
    if len(found) == 1:
        return found[0]
    chains = [[s, *(a for a in file.names.ancestors(s) if isinstance(a, ast.stmt))] for s in found]
    common = [item for item in chains[0] if all(item in chain for chain in chains[1:])]
    owner: ast.AST = common[0] if common else file.tree
    if isinstance(owner, ast.If):
        return owner
    inside = [item for item in chains[-1] if file.names.parents.get(item) is owner]
    return inside[0] if inside else found[-1]


def _by_functions(file: File, managers: Managers, variable: Var) -> list[ast.stmt]:
    """The statements of functions that give a variable of the module, ``global optimizer``, another value."""
    made = [s for v, value, s, _ in managers.roles.assignments if v == variable and not _is_none(value)]
    inside = [statement for statement in made if file.names.function_of(statement) is not None]
    return inside if variable[0] is file.tree and len(inside) < len(made) else []


def _made_again(file: File, managers: Managers, optimizer: Var, place: ast.stmt | None) -> list[ast.stmt]:
    """The statements that make an optimizer which is used before it is made for the last time: each needs a manager."""
    others = _by_functions(file, managers, optimizer)
    given = [s for v, value, s, _ in managers.roles.assignments if v == optimizer and not _is_none(value)]
    made = [statement for statement in given if statement not in others]
    if place is None or len(made) < 2:
        return []
    used = [
        node
        for node in file.calls
        if isinstance(node.func, ast.Attribute)
        and node.func.attr in {"step", "zero_grad", "unscale_"}
        and optimizer in {managers.roles.var(held) for held in (node.func.value, *node.args[:1])}
        and any(
            made[0].lineno < reached.lineno <= (place.end_lineno or place.lineno)
            for reached in (node, *_calls_around(file, node))
            if file.names.function_of(reached) is file.names.function_of(made[0])
        )
    ]
    return made if used else []


def _calls_around(file: File, node: ast.AST) -> Iterator[ast.Call]:
    """The calls, by its name, of the function that a node stands in."""
    function = file.names.function_of(node)
    for call in file.calls if function is not None else ():
        if isinstance(call.func, ast.Name) and function is not None and call.func.id == function.name:
            yield call


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _first_statement(variable: Var) -> ast.stmt | None:
    """The first statement of the function whose argument the variable is."""
    owner = variable[0]
    if not isinstance(owner, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    body = owner.body
    documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and len(body) > 1
    return body[1] if documented else body[0]


# The calls that go through a manager ---------------------------------------------------------------------------


def _calls(file: File, facts: Facts, managers: Managers) -> Iterator[Change | Remark | Refusal]:
    """Changes of every backward, clip, step, zero_grad and scaler call of a file; remarks on those left."""
    for node in file.calls:
        called = facts.project.external(file, node.func)
        if called == "torch.nn.utils.clip_grad_norm_":
            yield from _clip(file, facts, managers, node)
        elif called in _NATIVE_SCALERS:
            yield replace(node.func, "{bmt}.optim.NativeScaler")
        elif isinstance(node.func, ast.Attribute):
            variable = managers.roles.var(node.func.value)
            manager = managers.by(node.func.value)
            if node.func.attr == "backward":
                yield from _backward(file, facts, managers, node, node.func)
            elif manager is not None and manager.scaler is not None and variable == manager.scaler:
                yield from _scaler(file, facts, managers, manager, node, node.func)
            elif manager is not None and (variable in manager.optimizers or _is_listed(managers, manager, node.func)):
                yield from _optimizer(file, facts, managers, manager, node, node.func)
            elif node.func.attr == "zero_grad" and managers.roles.is_model(node.func.value):
                seen = managers.for_call(node)
                if seen is not None and not seen.existing and managers.is_only(seen, node):
                    yield replace(node, f"{seen.name}.zero_grad()")  # of several, each clears what no other does


def _backward(
    file: File, facts: Facts, managers: Managers, node: ast.Call, func: ast.Attribute
) -> Iterator[Change | Remark | Refusal]:
    roles = managers.roles
    if roles.var(func.value) in roles.managers or facts.project.external(file, _called(func.value)).startswith(
        "bmtrain."
    ):
        return
    function = file.names.function_of(node)
    receiver = func.value
    if isinstance(receiver, ast.Call) and isinstance(receiver.func, ast.Name) and receiver.func.id == "super":
        return
    if function is not None and function.name in {"backward", "forward"}:
        return
    if is_of_autograd(func):
        given = loss_of(node)
        if given is None:
            return  # gradients by hand, as of a reversible layer: part of the backward of a loss
        receiver = given
    elif _is_own_method(file, facts, roles, node, receiver):
        return
    loss, manager = receiver, managers.for_call(node)
    if isinstance(receiver, ast.Call) and isinstance(receiver.func, ast.Attribute):
        scaling = roles.var(receiver.func.value)
        if receiver.func.attr == "scale_loss":
            return
        if receiver.func.attr == "scale" and scaling in managers.of and len(receiver.args) == 1:
            loss, manager = receiver.args[0], managers.of[scaling]
    name = manager.name if manager is not None else _UNSCALED
    if manager is None and not roles.steps and not roles.scalers and function is None:
        return  # a demonstration that steps nothing
    if manager is None and roles.scalers:
        message = "backward here does not know the loss scale of the scaler elsewhere in the file"
        yield Refusal(RULE.code, node.lineno, message)
    if is_of_autograd(func):
        whole = "sum({loss})" if isinstance(loss, (ast.List, ast.Tuple)) else "{loss}"
        flags = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg is not None}
        flagged = f".scale_loss({whole}).backward({', '.join(f'{flag}={{{flag}}}' for flag in flags)})"
        yield replace(node, name + (flagged if flags else f".backward({whole})"), loss=loss, **flags)
    elif node.args or node.keywords:
        yield replace(func, f"{name}.scale_loss({{loss}}).backward", loss=loss)
    else:
        yield replace(node, f"{name}.backward({{loss}})", loss=loss)


def _is_own_method(file: File, facts: Facts, roles: Roles, node: ast.Call, receiver: ast.expr) -> bool:
    """Whether an object that is no loss runs the backward, of what it is given: ``self.trainer.backward(loss)``."""
    values = [value for variable, value, _, part in roles.assignments if not part and variable == roles.var(receiver)]
    if isinstance(receiver, ast.Call):
        values = [receiver]
    for value in values:
        found = facts.project.resolve(file, value.func) if isinstance(value, ast.Call) else None
        if isinstance(found, ClassInfo) and facts.classes.method(found, "backward") is not None:
            return True
    owner = file.names.class_of(node) if dotted(receiver) == "self" else None
    if owner is not None and facts.classes.method(file.class_info(owner), "backward") is not None:
        return True
    return bool(node.args) and roles.var(node.args[0]) in roles.losses


def _called(node: ast.expr) -> ast.expr:
    return node.func if isinstance(node, ast.Call) else node


def _scaler(
    file: File, facts: Facts, managers: Managers, manager: Manager, node: ast.Call, func: ast.Attribute
) -> Iterator[Change | Remark | Refusal]:
    statement = file.names.statement_of(node)
    alone = isinstance(statement, ast.Expr) and statement.value is node
    if func.attr == "update" and alone:
        yield Remove(statement)
    elif func.attr == "unscale_" and alone:
        if not _looks_at_gradients(file, managers, manager, statement):
            yield Remove(statement)
        elif node.args and _drives_several(facts, managers, manager):
            yield replace(node, f"{manager.name}.unscale({{optimizer}})", optimizer=node.args[0])
        else:
            yield replace(node, f"{manager.name}.unscale()")
    elif func.attr == "step":
        if len(node.args) > 1 or node.keywords:
            yield Refusal(RULE.code, node.lineno, _CLOSURE)
        several = bool(node.args) and _drives_several(facts, managers, manager)
        yield from _step(file, managers, manager, node, node.args[0] if several else None)
    elif func.attr == "get_scale":
        yield replace(node, f"{manager.name}.loss_scale")
    elif func.attr == "is_enabled":
        yield replace(node, f"({manager.name}.loss_scale is not None)")
    elif func.attr in {"state_dict", "load_state_dict"} and _is_told_by_calls(file, managers, manager):
        named = func.attr.replace("state", "scaler_state")
        yield replace(func, f"{manager.name}.{named}")
    elif func.attr in {"state_dict", "load_state_dict"}:
        yield replace(func.value, manager.name)
        message = f"the scaler's {func.attr} is now the manager's, which has another layout"
        yield Remark(RULE.code, node.lineno, message)


def _optimizer(
    file: File, facts: Facts, managers: Managers, manager: Manager, node: ast.Call, func: ast.Attribute
) -> Iterator[Change | Remark | Refusal]:
    several = len(manager.optimizers) > 1 or manager.several is not None
    if func.attr == "step":
        if (node.args or node.keywords) and not _gets_none(file, facts, node):
            if manager.scaler is not None:
                yield Refusal(RULE.code, node.lineno, _CLOSURE)
            return  # the optimizer runs the closure, whose backward is the manager's, and steps on what that leaves
        yield from _step(file, managers, manager, node, func.value if several else None)
    elif func.attr == "zero_grad" and not several:  # an optimizer of several clears its own
        yield replace(node, f"{manager.name}.zero_grad()")


def _is_listed(managers: Managers, manager: Manager, func: ast.Attribute) -> bool:
    """Whether a method is called on an optimizer of the manager's list."""
    return manager.several is not None and managers.roles.var(func.value) != manager.several


def _gets_none(file: File, facts: Facts, step: ast.Call) -> bool:
    """Whether ``self.optimizer.step(closure)`` hands on an argument that no call gives: it is None."""
    function = file.names.function_of(step)
    given = [*step.args, *(keyword.value for keyword in step.keywords)]
    if len(given) != 1 or not isinstance(given[0], ast.Name) or function is None:
        return False
    if not _has_default_none(function, given[0].id):
        return False
    for other, value in facts.scripts.collectives.instances.given(file, function, given[0].id):
        call = next(parent for parent in other.names.ancestors(value) if isinstance(parent, ast.Call))
        holder = call.func.value if isinstance(call.func, ast.Attribute) else call.func
        passed_on = call is step or facts.scripts.roles[other].var(holder) in facts.scripts.roles[other].scalers
        if not passed_on and not _is_none(value) and not _is_schedule(other, facts, holder):
            return False
    return True


def _is_schedule(file: File, facts: Facts, holder: ast.expr) -> bool:
    roles = facts.scripts.roles[file]
    made = [value for variable, value, _, _ in roles.assignments if variable == roles.var(holder)]
    names = [facts.project.external(file, value.func) for value in made if isinstance(value, ast.Call)]
    return bool(names) and all(name.startswith("torch.optim.lr_scheduler.") for name in names)


def _step(
    file: File, managers: Managers, manager: Manager, node: ast.Call, optimizer: ast.expr | None
) -> Iterator[Change]:
    """A step of the manager, or of one optimizer of several; steps of all that follow each other are one."""
    if optimizer is None:
        yield replace(node, f"{manager.name}.step()")
        return
    together = list(_steps_together(file, managers, manager, node))
    if len(together) < 2 or {stepped for _, stepped in together} != set(manager.optimizers):
        yield replace(node, f"{manager.name}.step({{optimizer}})", optimizer=optimizer)
    elif together[0][0] is node:
        yield replace(node, f"{manager.name}.step()")
    else:
        yield Remove(file.names.statement_of(node))


def _steps_together(
    file: File, managers: Managers, manager: Manager, node: ast.Call
) -> Iterator[tuple[ast.Call, Var | None]]:
    """The steps of a manager's optimizers around ``node`` with nothing between them, in order."""
    block, here = file.names.siblings(file.names.statement_of(node)), file.names.statement_of(node)
    steps = [_stepped(managers, manager, statement) for statement in block]
    first = last = next(i for i, statement in enumerate(block) if statement is here)
    while first > 0 and steps[first - 1] is not None:
        first -= 1
    while last + 1 < len(block) and steps[last + 1] is not None:
        last += 1
    yield from (step for step in steps[first : last + 1] if step is not None)


def _stepped(managers: Managers, manager: Manager, statement: ast.stmt) -> tuple[ast.Call, Var | None] | None:
    """The call and the optimizer of ``scaler.step(optimizer)`` and ``optimizer.step()``, for those of ``manager``."""
    match statement:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=holder, attr="step"), args=args) as call):
            holder = args[0] if args and managers.roles.var(holder) == manager.scaler else holder
            stepped = managers.roles.var(holder)
            return (call, stepped) if stepped in manager.optimizers else None
    return None


def _drives_several(facts: Facts, managers: Managers, manager: Manager) -> bool:
    """Whether a scaler has several optimizers, here or where it is handed on from."""
    if len(manager.optimizers) > 1:
        return True
    if manager.scaler is None or not managers.is_argument(manager.scaler):
        return False
    every = (other for file in facts.scripts.training for other in facts.managers(file).all)
    return any(other.scaler is not None and len(other.optimizers) > 1 for other in every)


def _looks_at_gradients(file: File, managers: Managers, manager: Manager, statement: ast.stmt) -> bool:
    """Whether code between ``unscale_`` and the step may read gradients otherwise than by ``clip_grad_norm_``."""
    while True:
        block = file.names.siblings(statement)
        for following in block[next(i for i, other in enumerate(block) if other is statement) + 1 :]:
            nodes = list(walk(following))
            steps = [
                node
                for node in nodes
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "step"
                and managers.roles.var(node.func.value) == manager.scaler
            ]
            if steps and isinstance(following, ast.Expr):
                return False
            if any(isinstance(node, ast.Attribute) and node.attr == "grad" for node in nodes):
                return True
            calls = [node for node in nodes if isinstance(node, ast.Call)]
            if not all((dotted(call.func) or "").split(".")[-1] in _HARMLESS for call in calls):
                return True
            if steps:
                return False
        parent = file.names.parents[statement]
        if not isinstance(parent, (ast.If, ast.With, ast.Try)):
            return True
        statement = parent


def _is_of_optimizer(file: File, node: ast.AST) -> bool:
    """Whether a node stands in a class of optimizers."""
    owner = file.names.class_of(node)
    return owner is not None and any((dotted(base) or "").split(".")[-1].endswith("Optimizer") for base in owner.bases)


def _clip(file: File, facts: Facts, managers: Managers, node: ast.Call) -> Iterator[Change | Remark | Refusal]:
    manager = managers.for_call(node)
    values = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    values.update(zip(("parameters", "max_norm", "norm_type", "error_if_nonfinite"), node.args, strict=False))
    settings = [keyword.value for keyword in node.keywords if keyword.arg is None]
    parameters, limit = values.get("parameters"), values.get("max_norm")
    spread = any(isinstance(item, ast.Starred) for item in node.args) or len(settings) > 1
    if parameters is None or spread or (limit is None and not settings):
        yield Refusal(RULE.code, node.lineno, "clip_grad_norm_ with arguments that are not understood")
        return
    holes: dict[str, ast.expr] = {}
    if _is_of_optimizer(file, node):
        return  # torch's function, in the step of an optimizer: gradients are unscaled, and as one process has them
    alone = manager is not None and len(manager.optimizers) == 1 and len(managers.all) == 1
    if manager is not None and alone and _whole(file, managers, parameters) and not _has_free_parameters(facts):
        groups = f"{manager.optimizers[0][1]}.param_groups"
    elif isinstance(parameters, (ast.Name, ast.Attribute, ast.Subscript)):
        groups, holes["parameters"] = "{parameters}", parameters  # some, or a single one
    else:
        called = dotted(parameters.func) if isinstance(parameters, ast.Call) else ""
        listed = isinstance(parameters, ast.List) or called == "list"
        groups = '[{"params": {parameters}}]' if listed else '[{"params": list({parameters})}]'
        holes["parameters"] = parameters
    given = {"limit": limit, "norm_type": values.get("norm_type"), "rest": next(iter(settings), None)}
    others = "".join(f", {_CLIPS_BY[name]}" for name, value in given.items() if value is not None)
    holes |= {name: value for name, value in given.items() if value is not None}
    if not _is_false(values.get("error_if_nonfinite")):
        yield Remark(RULE.code, node.lineno, _NOT_FINITE, differs=True)
    if manager is not None and manager.scaler is not None and not _unscales(file):
        message = "gradients are clipped with the loss scale on them here; the manager clips them without it"
        yield Remark(RULE.code, node.lineno, message)
    name = manager.name if manager is not None else _UNSCALED
    yield replace(node, f"{name}.clip_grad_norm({groups}{others})", **holes)


def _is_false(node: ast.expr | None) -> bool:
    return node is None or (isinstance(node, ast.Constant) and not node.value)


def _unscales(file: File) -> bool:
    """Whether ``scaler.unscale_`` is called anywhere in the file, under whatever name the scaler has there."""
    return any(isinstance(call.func, ast.Attribute) and call.func.attr == "unscale_" for call in file.calls)


def _whole(file: File, managers: Managers, node: ast.expr) -> bool:
    """Whether an expression is all parameters of the model, where no other has any that may be its optimizer's."""
    match node:
        case ast.Call(func=ast.Attribute(value=held, attr="parameters"), args=[]):
            path, model = (dotted(held) or "").removeprefix("self."), _model(managers, held)
        case _:
            return False
    if model is None or "." in path or not managers.roles.is_model(held):
        return False
    others = {_model(managers, _holder(call)) for call in file.calls} - _made_of(file, managers, model)
    return not any(other is not None and other != model and other[0] is model[0] for other in others)


def _has_free_parameters(facts: Facts) -> bool:
    """Whether the scripts make parameters that no module holds, which an optimizer may have beside a model's."""
    return any(
        _makes_parameter(file, facts, call) and file.names.class_of(call) is None
        for file in facts.scripts.training
        if any(mark in file.source.data for mark in (b"Parameter(", b"requires_grad=True", b"requires_grad_("))
        for call in file.calls
    )


def _makes_parameter(file: File, facts: Facts, call: ast.Call) -> bool:
    called = facts.project.external(file, call.func)
    if called in {"torch.nn.Parameter", "torch.nn.parameter.Parameter"}:
        return True
    if isinstance(call.func, ast.Attribute) and call.func.attr == "requires_grad_" and not call.args:
        return isinstance(call.func.value, ast.Call)  # of a tensor that is made here
    return called.startswith("torch.") and any(
        keyword.arg == "requires_grad" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        for keyword in call.keywords
    )


def _made_of(file: File, managers: Managers, model: Var) -> set[Var | None]:
    """What a model is another name for, or is given when it is made, and then holds: ``ddp = DDP(net)``."""
    found: set[Var | None] = set()
    for node in file.nodes:
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Call, ast.Name)):
            if model in {managers.roles.var(item) for target in node.targets for item in walk(target)}:
                call = node.value if isinstance(node.value, ast.Call) else None
                given = [node.value] if call is None else [*call.args, *(word.value for word in call.keywords)]
                found |= set(map(managers.roles.var, given))
    return found - {None, model}


def _holder(node: ast.expr) -> ast.expr | None:
    """What a call takes the parameters of."""
    match node:
        case ast.Call(func=ast.Attribute(value=held, attr="parameters" | "named_parameters")):
            return held
    return None


def _model(managers: Managers, node: ast.expr | None) -> Var | None:
    """The model that a node is, or is a part of; any name that has parameters counts as one."""
    while isinstance(node, ast.Attribute) and not managers.roles.is_model(node):
        node = node.value
    return managers.roles.var(node) if node is not None else None


RULE = Rule(
    code="BMT022",
    title="an OptimManager runs backward, clips, steps and clears",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cuda", enabled=half)
for x in batches:
    loss = model(x).mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
""",
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optim_manager = bmt.optim.OptimManager(loss_scale=2**16 if half else None)
optim_manager.add_optimizer(optimizer)
for x in batches:
    loss = model(x).mean()
    optim_manager.backward(loss)
    optim_manager.clip_grad_norm(optimizer.param_groups, 1.0)
    optim_manager.step()
    optim_manager.zero_grad()
""",
        ),
    ),
)
