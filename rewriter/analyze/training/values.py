"""Statements that read or write the values of a model's parameters outside a forward."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import cached_property

from rewriter.analyze.read.classes import Classes
from rewriter.analyze.read.file import External, File
from rewriter.analyze.read.nodes import dotted, walk, walk_own
from rewriter.analyze.training.roles import Roles
from rewriter.analyze.training.states import written_states

_PARAMETERS = {"parameters", "named_parameters"}
_MODULES = {"modules", "named_modules", "children", "named_children"}
_KNOWN_WITHOUT = {
    "shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "name", "grad_fn", "size", "dim", "numel",
    "nelement", "element_size", "is_floating_point", "requires_grad_", "stride", "register_hook", "__class__",
    "is_cuda", "type", "retain_grad", "register_post_accumulate_grad_hook", "new_zeros", "new_ones", "get_device",
}  # fmt: skip
_ELEMENTWISE = {
    "copy_", "zero_", "fill_", "add_", "sub_", "mul_", "div_", "neg_", "lerp_", "clamp_", "addcmul_", "addcdiv_",
    "sign_", "abs_", "sqrt_", "pow_", "clamp_min_", "clamp_max_",
}  # fmt: skip
_WITHOUT_VALUES = {"id", "len", "isinstance", "type", "hasattr", "getattr", "setattr", "print", "repr", "str"}
_COLLECTING = {"append", "add", "extend", "insert", "get", "pop", "setdefault", "index", "discard", "remove"}
_VIEWS = {"data", "detach", "float", "cpu", "to", "view", "flatten", "reshape", "contiguous", "t", "squeeze"}
_WHOLE_THERE = re.compile(r"init|reset|^forward$|^__|configure_optim", re.I)
"""Methods of modules in which parameters are whole."""
_WEIGHTS = re.compile(r"^(?:\w*_)?(?:weight|bias|kernel|embedding|scale|gamma|beta)$")


_HELD = {
    "torch.nn.Parameter": False, "torch.nn.parameter.Parameter": False, "bmtrain.DistributedParameter": False,
    "torch.nn.ParameterDict": True, "torch.nn.ParameterList": True,
}  # fmt: skip
"""What makes a parameter, and (True) a list or dict of them."""


class Access(Enum):
    """What code does with one parameter."""

    NONE = auto()  # nothing that needs its values
    READ = auto()
    WRITE = auto()
    ASSIGN = auto()  # ``p.data = x``
    LOCAL = auto()  # element-wise changes, which every rank can make to its share


_ACCESS_OF_FUNCTIONS = (
    ("torch.nn.init.", Access.WRITE),
    ("torch.distributed.broadcast", Access.WRITE),
    ("torch.optim.", Access.NONE),
    ("torch.zeros_like", Access.NONE),
    ("torch.ones_like", Access.NONE),
    ("torch.empty_like", Access.NONE),
    ("numpy.zeros_like", Access.NONE),
    ("numpy.ones_like", Access.NONE),
    ("numpy.empty_like", Access.NONE),
    ("torch.", Access.READ),
    ("numpy.", Access.READ),
)
"""What functions of other packages do with a parameter they are given: the first row whose start their name has."""


@dataclass(frozen=True, eq=False)
class ValueUse:
    """``node`` needs whole values of ``models`` (source text), or, if ``local``, only each rank's share.

    ``data`` are ``p.data`` expressions that stand for ``p`` in element-wise updates; ``kept`` are values that code
    keeps, which must be copies; ``states`` are calls of ``state_dict()`` whose tensors must be the parameters. ``read``
    are models that are not written; ``then`` are the statements behind ``node`` that need them, too.
    """

    node: ast.stmt
    models: tuple[ast.expr, ...]
    writes: bool
    local: bool = False
    data: tuple[ast.Attribute, ...] = ()
    kept: tuple[ast.expr, ...] = ()
    states: tuple[ast.Call, ...] = ()
    read: tuple[ast.expr, ...] = ()
    then: tuple[ast.stmt, ...] = ()


class Values:
    """The uses of one file."""

    def __init__(self, file: File, classes: Classes, roles: Roles, made: Callable[[], Mapping[str, bool]]) -> None:
        """``made`` gives the names of parameters that the project's modules make, and of lists and dicts of them."""
        self.file, self.classes, self.project, self.roles, self._made = file, classes, classes.project, roles, made

    @cached_property
    def uses(self) -> list[ValueUse]:
        """Statements that need parameters where these are not whole. One that holds others speaks for them."""
        found: dict[ast.AST, ValueUse] = {}
        for use in self._all():
            if self._is_whole_there(use.node) or not self.file.source.owns_lines(use.node):
                continue
            around = next((parent for parent in self.file.names.ancestors(use.node) if parent in found), None)
            if around is None:
                found[use.node] = use
            elif not use.local:
                outer = found[around]
                found[around] = replace(outer, local=False, writes=outer.writes or outer.local or use.writes)
        return list(found.values())

    @cached_property
    def gathered(self) -> list[ast.stmt | ast.expr]:
        """Where every rank must help, once it is converted: to make parameters or gradients whole."""
        return [*(use.node for use in self.uses if not use.local), *self.gradients, *self.shown]

    @cached_property
    def shown(self) -> set[ast.expr]:
        """``model.head.weight``, ``model.logit_scale`` where ``.item()``, ``float(...)`` or a text takes its values."""
        found: set[ast.expr] = set()
        for read in (value for node in self.file.nodes for value in _read_by_python(node)):
            item = read
            while True:
                if isinstance(item, ast.Call) and isinstance(item.func, ast.Attribute) and item.func.attr in _VIEWS:
                    item = item.func.value
                elif isinstance(item, ast.Attribute) and item.attr == "data":
                    item = item.value
                else:
                    break
            if self.is_parameter(item):
                found.add(item)
        return {item for item in found | self._one_read if not self._is_used(item)}

    def _is_used(self, item: ast.expr) -> bool:
        """Whether a parameter is whole where it stands, or will be."""
        statement = self.file.names.statement_of(item)
        around = {statement, *self.file.names.ancestors(statement)}
        return self._is_whole_there(statement) or any(use.node in around for use in self.uses)

    @cached_property
    def _one(self) -> dict[ast.expr, Access]:
        """Each ``model.head.weight`` of which ``.data`` or ``.detach()`` is taken, and what is done with that."""
        found: dict[ast.expr, Access] = {}
        parents = self.file.names.parents
        for node in self.file.nodes:
            if (
                not isinstance(node, ast.Attribute)
                or not isinstance(node.ctx, ast.Load)
                or not self._is_one(node.value)
            ):
                continue
            if node.attr == "data" or (node.attr == "detach" and isinstance(parents[node], ast.Call)):
                found[node.value] = self._access(node.value)
        return found

    def _is_one(self, item: ast.expr) -> bool:
        """Whether a value is a parameter, by a name that buffers and layers seldom have."""
        if isinstance(item, ast.Attribute) and item.attr not in self._made() and item.attr not in {"weight", "bias"}:
            return False
        return self.is_parameter(item)

    @cached_property
    def _one_read(self) -> set[ast.expr]:
        """Those that are read, and under no name by which they might be written, or be expected to change."""
        found = {item for item, access in self._one.items() if access is Access.READ and not self._named(item)}
        for item in self._one:
            match self._named(item):
                case ast.Assign(targets=[ast.Name(id=name)]) as statement if self._reads_soon(statement, name):
                    found.add(item)
        return found

    @cached_property
    def unclear(self) -> list[ast.Assign]:
        """``w = model.head.weight.data`` of which parts are read where the parameter may have changed."""
        found: list[ast.Assign] = []
        for item in self._one:
            match self._named(item):
                case ast.Assign(targets=[ast.Name(id=name)]) as statement if self._uses_of(statement, name) is None:
                    variable = self.roles.var(statement.targets[0])
                    uses = [n for n in self.file.nodes if isinstance(n, ast.Name) and n.id == name]
                    uses = [n for n in uses if isinstance(n.ctx, ast.Load) and self.roles.var(n) == variable]
                    parents = map(self.file.names.parents.__getitem__, uses)
                    parts = any(isinstance(p, ast.Subscript) or _is_product(p) for p in parents)
                    if parts and not self._is_used(item):
                        found.append(statement)
        return found

    def _named(self, item: ast.expr) -> ast.Assign | None:
        """``w = model.head.weight.data``: the statement that gives a parameter's view a name."""
        parents = self.file.names.parents
        parent = parents[item]
        while isinstance(parent, ast.expr):
            view = isinstance(parent, ast.Attribute) and parent.attr in _VIEWS
            if not view and not (isinstance(parent, ast.Call) and parent.func is item):
                return None
            item, parent = parent, parents[parent]
        return parent if isinstance(parent, ast.Assign) and parent.value is item else None

    def _uses_of(self, statement: ast.Assign, name: str) -> tuple[list[ast.stmt], list[ast.Name]] | None:
        """This statement and those beside it up to the last that has what it gives the name, and its uses.

        None where others may have it, or where a step may change it between.
        """
        variable = self.roles.var(statement.targets[0])
        uses = [
            n for n in self.file.nodes if isinstance(n, ast.Name) and n.id == name and self.roles.var(n) == variable
        ]
        body = self.file.names.siblings(statement)
        after = body[body.index(statement) + 1 :]
        again = next((i for i, part in enumerate(after) if _binds(part, name)), len(after))
        having = [i for i, part in enumerate(after[: again + 1]) if any(item in uses for item in walk(part))]
        reached = after[: having[-1] + 1] if having else []
        inside = {item for part in reached for item in walk(part)}
        targets = {target for part in (statement, *after[again : again + 1]) for target in getattr(part, "targets", ())}
        mine = [use for use in uses if use in inside and use not in targets]
        steps = any(isinstance(n, ast.Attribute) and n.attr in {"step", "backward"} for n in inside)
        bound = any(not isinstance(use.ctx, ast.Load) and not self._adds(use) for use in mine)
        others = (use for use in uses if use not in inside and use not in targets and isinstance(use.ctx, ast.Load))
        shared = any(self._binding(use, name) in {None, statement} for use in others)
        return None if steps or bound or shared or not mine else ([statement, *reached], mine)

    def _binding(self, use: ast.Name, name: str) -> ast.stmt | None:
        """The statement before a use, beside it or around, that gives its name a value."""
        inner = self.file.names.statement_of(use)
        for around in (inner, *self.file.names.ancestors(inner)):
            if isinstance(around, ast.stmt):
                body = self.file.names.siblings(around)
                before = body[: body.index(around)]
                if (found := next((part for part in reversed(before) if _binds(part, name)), None)) is not None:
                    return found
            if isinstance(around, (ast.For, ast.While, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                return None
        return None

    def _adds(self, name: ast.Name) -> bool:
        """``w /= n``."""
        return isinstance(self.file.names.parents[name], ast.AugAssign)

    def _named_accesses(self, uses: list[ast.Name]) -> set[Access]:
        return {self._access(use) if isinstance(use.ctx, ast.Load) else Access.LOCAL for use in uses}

    def _reads_soon(self, statement: ast.Assign, name: str) -> bool:
        """Whether what a parameter's view is called is read, never written, and that before the next step."""
        found = self._uses_of(statement, name)
        accesses = self._named_accesses(found[1]) if found is not None else set()
        return Access.READ in accesses and not accesses & {Access.WRITE, Access.LOCAL, Access.ASSIGN}

    def is_parameter(self, item: ast.expr) -> bool:
        """Whether a value is a parameter of a model, by its usual name or because a class makes it one."""
        match item:
            case ast.Subscript(value=held):
                return self.holds_parameters(held)
            case ast.Attribute(attr=attr, value=owner):
                usual = bool(_WEIGHTS.match(attr)) and self._is_of_model(owner)
                return usual or (self._made().get(attr) is False and self._is_of_module(owner))
        return False

    def holds_parameters(self, item: ast.expr) -> bool:
        """Whether a value is a list or dict of parameters that a class makes: ``model.scales``."""
        return (
            isinstance(item, ast.Attribute) and self._made().get(item.attr) is True and self._is_of_module(item.value)
        )

    def _is_of_module(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name) and node.id == "self":
            around = self.file.names.class_of(node)
            return around is not None and self.classes.is_module(self.file.class_info(around))
        return self._is_of_model(node)

    def _is_of_model(self, node: ast.expr) -> bool:
        """Whether a value is a model or a part of one."""
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            if self.roles.is_model(node):
                return True
            node = node.value
        return self.roles.is_model(node)

    def _is_whole_there(self, node: ast.stmt) -> bool:
        for parent in self.file.names.ancestors(node):
            if isinstance(parent, ast.With):
                calls = [item.context_expr.func for item in parent.items if isinstance(item.context_expr, ast.Call)]
                if any(self.project.external(self.file, call) == "bmtrain.gathered" for call in calls):
                    return True
        function, owner = self.file.names.function_of(node), self.file.names.class_of(node)
        if function is None or owner is None:
            return False
        if self.classes.is_module(self.file.class_info(owner)):
            return bool(_WHOLE_THERE.search(function.name))
        return any((dotted(base) or "").split(".")[-1] in {"Optimizer", "Dataset"} for base in owner.bases)

    def _all(self) -> Iterator[ValueUse]:
        for node in self.file.nodes:
            if isinstance(node, ast.For):
                yield from self._loop(node)
                yield from self._state(node)
            elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.Return)):
                if node.value is not None:
                    yield from self._statement(node, node.value)

    @cached_property
    def gradients(self) -> set[ast.Attribute]:
        """``p.grad`` where a loop over a model's parameters reads it, and does not change it in place."""
        found: set[ast.Attribute] = set()
        for node in self.file.nodes:
            if not isinstance(node, (ast.For, ast.GeneratorExp, ast.ListComp)):
                continue
            head = node.generators[0] if isinstance(node, (ast.GeneratorExp, ast.ListComp)) else node
            iterated = self._iterated(head.iter, head.target)
            names = iterated[1] if iterated is not None else set()
            body: list[ast.AST] = [node.elt] if isinstance(node, (ast.GeneratorExp, ast.ListComp)) else list(node.body)
            for item in (item for part in body for item in walk_own(part)):
                if isinstance(item, ast.Attribute) and item.attr == "grad" and isinstance(item.ctx, ast.Load):
                    if isinstance(item.value, ast.Name) and item.value.id in names and self._is_read(item):
                        found.add(item)
        return found

    def _is_read(self, item: ast.expr) -> bool:
        parents = self.file.names.parents
        parent = parents[item]
        while isinstance(parent, ast.Attribute):
            if parent.attr.endswith("_") or not isinstance(parent.ctx, ast.Load):
                return False
            item, parent = parent, parents[parent]
            if isinstance(parent, ast.Call) and parent.func is item:
                item, parent = parent, parents[parent]
        if isinstance(parent, ast.Subscript) or self._is_written_by(parent):
            return False
        tests = (ast.Compare, ast.If, ast.BoolOp, ast.UnaryOp, ast.comprehension)
        return not isinstance(parent, (ast.Expr, ast.AugAssign, *tests))

    def _is_written_by(self, call: ast.AST) -> bool:
        """Whether what a call has gets the result: ``torch.nan_to_num(p.grad, out=p.grad)``, ``relu_(p.grad)``."""
        if isinstance(call, ast.keyword):
            return call.arg == "out"
        if not isinstance(call, ast.Call):
            return False
        name = (dotted(call.func) or "").split(".")[-1]
        return (name.endswith("_") and not name.endswith("__")) or any(
            keyword.arg == "out" and isinstance(keyword.value, ast.Attribute) and keyword.value.attr in {"grad", "data"}
            for keyword in call.keywords
        )

    def _loop(self, node: ast.For) -> Iterator[ValueUse]:
        found = self._iterated(node.iter, node.target)
        if found is not None:
            yield from self._judge(node, *found, [item for statement in node.body for item in walk_own(statement)])

    def _state(self, node: ast.For) -> Iterator[ValueUse]:
        calls = written_states(self.file, node)
        if calls:
            written, *read = [call.func.value for call in calls if isinstance(call.func, ast.Attribute)]
            yield ValueUse(node, (written,), True, states=tuple(calls), read=tuple(read))

    def _statement(self, node: ast.stmt, value: ast.expr) -> Iterator[ValueUse]:
        together: ValueUse | None = None
        for item in walk_own(value):
            if isinstance(item, (ast.GeneratorExp, ast.ListComp, ast.DictComp)) and len(item.generators) == 1:
                found = self._iterated(item.generators[0].iter, item.generators[0].target)
                if found is not None:
                    elements = [item.key, item.value] if isinstance(item, ast.DictComp) else [item.elt]
                    for use in self._judge(node, *found, [n for element in elements for n in walk(element)]):
                        together = use if together is None else _joined(together, use)
        if together is not None:
            yield together
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield from self._averaging(node, node.value)
            yield from self._initialisation(node, node.value)
        yield from self._written(node)

    def _written(self, node: ast.stmt) -> Iterator[ValueUse]:
        """``model.head.weight.data[0] = x``, or a name that ``model.head.weight.data`` gets and is written by."""
        for item in walk_own(node):
            if not isinstance(item, ast.expr) or self._one.get(item) is not Access.WRITE:
                continue
            named = self._named(item)
            if named is None:
                yield ValueUse(node, (item,), True)
            elif isinstance(named.targets[0], ast.Name) and len(named.targets) == 1:
                found = self._uses_of(named, named.targets[0].id)
                accesses = self._named_accesses(found[1]) if found is not None else set()
                by_all = accesses <= {Access.NONE, Access.LOCAL} or accesses <= {Access.NONE, Access.READ}
                if found is not None and not by_all:
                    yield ValueUse(node, (item,), True, then=tuple(found[0][1:]))

    def _averaging(self, node: ast.Expr, call: ast.Call) -> Iterator[ValueUse]:
        """``averaged.update_parameters(model)`` of torch.optim.swa_utils."""
        match call:
            case ast.Call(func=ast.Attribute(value=averaged, attr="update_parameters"), args=[model], keywords=[]):
                if dotted(averaged) is not None and dotted(model) is not None:
                    yield ValueUse(node, (averaged,), True, read=(model,))

    def _initialisation(self, node: ast.Expr, call: ast.Call) -> Iterator[ValueUse]:
        """``nn.init.zeros_(model.head.weight)``, ``model.head.weight.data.normal_()``."""
        target: ast.expr | None = None
        if self.project.external(self.file, call.func).startswith("torch.nn.init.") and call.args:
            target = call.args[0]
        elif isinstance(call.func, ast.Attribute) and call.func.attr.endswith("_"):
            target = call.func.value if isinstance(call.func.value, ast.Attribute) else None
            if target is not None and target.attr != "data":
                return
        if isinstance(target, ast.Attribute) and target.attr == "data":
            target = target.value
        if isinstance(target, ast.Attribute) and _WEIGHTS.match(target.attr):
            owner: ast.expr = target.value
            while isinstance(owner, (ast.Attribute, ast.Subscript)) and not self.roles.is_model(owner):
                owner = owner.value
            if self.roles.is_model(owner) and dotted(owner) != "self" and not self._is_factory(node, owner):
                yield ValueUse(node, (target,), True)

    def _is_factory(self, node: ast.stmt, owner: ast.expr) -> bool:
        """Whether code makes a layer of torch's for others: it returns it, or a module gives it to itself."""
        if (dotted(owner) or "").startswith("self."):
            return True
        if self.roles.model_class(owner) is not None:
            return False
        function = self.file.names.function_of(node)
        return function is not None and any(
            isinstance(item, ast.Return) and item.value is not None and dotted(item.value) == dotted(owner)
            for item in walk(function)
        )

    def _iterated(self, iterated: ast.expr, target: ast.expr) -> tuple[list[ast.expr], set[str], set[str]] | None:
        """What a loop goes through: models, names of their parameters, names of their modules."""
        if isinstance(iterated, ast.Call) and isinstance(iterated.func, ast.Name):
            name, given = iterated.func.id, iterated.args
            if name in {"list", "tuple", "sorted", "reversed", "tqdm"} and given:
                return self._iterated(given[0], target)
            if name == "filter" and len(given) == 2:
                return self._iterated(given[1], target)
            if name == "enumerate" and given and isinstance(target, ast.Tuple) and len(target.elts) == 2:
                return self._iterated(given[0], target.elts[1])
            if name == "zip" and isinstance(target, ast.Tuple) and len(target.elts) == len(given):
                parts = [self._iterated(a, t) for a, t in zip(given, target.elts, strict=True)]
                known = [part for part in parts if part is not None]
                if not known:
                    return None
                models = [model for part in known for model in part[0]]
                return models, set().union(*(p[1] for p in known)), set().union(*(p[2] for p in known))
            return None
        if isinstance(iterated, ast.Attribute) and isinstance(target, ast.Name):
            return ([iterated], {target.id}, set()) if self.holds_parameters(iterated) else None
        if not isinstance(iterated, ast.Call) or not isinstance(iterated.func, ast.Attribute):
            return None
        if iterated.func.attr in {"values", "items"} and isinstance(held := iterated.func.value, ast.Attribute):
            one = target.elts[-1] if isinstance(target, ast.Tuple) and iterated.func.attr == "items" else target
            if isinstance(one, ast.Name) and self.holds_parameters(held):
                return [held], {one.id}, set()
        method, owner = iterated.func.attr, iterated.func.value
        if method not in _PARAMETERS | _MODULES or dotted(owner) is None or iterated.args:
            return None
        bound = target
        if method.startswith("named_"):
            if not isinstance(target, ast.Tuple) or len(target.elts) != 2:
                return None
            bound = target.elts[1]
        if not isinstance(bound, ast.Name):
            return None
        names = {bound.id}
        return ([owner], names, set()) if method in _PARAMETERS else ([owner], set(), names)

    def _judge(
        self, node: ast.stmt, models: list[ast.expr], names: set[str], modules: set[str], items: list[ast.AST]
    ) -> Iterator[ValueUse]:
        accesses: set[Access] = set()
        data: list[ast.Attribute] = []
        for item in items:
            if not self._is_parameter(item, names, modules):
                continue
            assert isinstance(item, ast.expr)
            access, parent = self._access(item), self.file.names.parents[item]
            accesses.add(access)
            if access is Access.LOCAL and isinstance(parent, ast.Attribute) and parent.attr == "data":
                data.append(parent)
        if accesses & {Access.READ, Access.WRITE}:
            used = [item for item in items if self._is_parameter(item, names, modules)]
            kept = [top for item in used if isinstance(item, ast.expr) and (top := self._kept(item)) is not None]
            writes = bool(accesses & {Access.WRITE, Access.ASSIGN, Access.LOCAL})
            yield ValueUse(node, tuple(models), writes, kept=tuple(kept))
        elif data:
            yield ValueUse(node, tuple(models), True, True, tuple(data))

    def _kept(self, item: ast.expr) -> ast.expr | None:
        """``p.data`` in ``kept[name] = p.data`` or ``[p.detach() for ...]``: a view that code keeps."""
        parents, start = self.file.names.parents, item
        parent = parents[item]
        while isinstance(parent, ast.Attribute) and parent.attr in _VIEWS:
            call = parents[parent]
            called = isinstance(call, ast.Call) and call.func is parent
            if parent.attr != "data" and not called:
                return None
            item = call if called and isinstance(call, ast.Call) else parent
            parent = parents[item]
        if item is start:
            return None
        if isinstance(parent, ast.Assign) and parent.value is item:
            stored = (t for t in parent.targets if isinstance(t, (ast.Subscript, ast.Attribute)))
            return item if any(not isinstance(t, ast.Attribute) or t.attr != "data" for t in stored) else None
        if isinstance(parent, ast.Call) and item in parent.args:
            return item if isinstance(parent.func, ast.Attribute) and parent.func.attr in _COLLECTING else None
        return item if isinstance(parent, (ast.DictComp, ast.ListComp)) else None

    @staticmethod
    def _is_parameter(item: ast.AST, names: set[str], modules: set[str]) -> bool:
        if isinstance(item, ast.Name):
            return item.id in names and isinstance(item.ctx, ast.Load)
        return (
            isinstance(item, ast.Attribute)
            and isinstance(item.value, ast.Name)
            and item.value.id in modules
            and bool(_WEIGHTS.match(item.attr))
        )

    def _access(self, item: ast.expr) -> Access:
        """What is done with a parameter, ``p`` or ``layer.weight``."""
        parents = self.file.names.parents
        parent = parents[item]
        is_data = False
        if isinstance(parent, ast.Attribute) and parent.attr == "data":
            if not isinstance(parent.ctx, ast.Load):
                return Access.WRITE if isinstance(parents[parent], ast.AugAssign) else Access.ASSIGN
            is_data, item, parent = True, parent, parents[parent]
        if isinstance(parent, ast.Attribute):
            return self._method(parent)
        if isinstance(parent, ast.Subscript) and parent.value is item:
            read = isinstance(parent.ctx, ast.Load) and not self._written_view(parent)
            return Access.READ if read else Access.WRITE
        if isinstance(parent, ast.Call) and item in parent.args:
            return self._argument(parent, is_data)
        if isinstance(parent, (ast.BinOp, ast.UnaryOp)) or _formats(parent):
            return Access.READ
        if is_data and isinstance(parent, (ast.Assign, ast.Tuple)):
            assigned = parents[parent] if isinstance(parent, ast.Tuple) else parent
            named = isinstance(assigned, ast.Assign) and isinstance(assigned.targets[0], (ast.Name, ast.Tuple))
            return Access.WRITE if named else Access.READ  # what is done by another name is not looked into
        return Access.READ if is_data else Access.NONE

    def _method(self, attribute: ast.Attribute) -> Access:
        """What ``p.name``, or a call of it, does."""
        name, call = attribute.attr, self.file.names.parents[attribute]
        if name in _ELEMENTWISE and isinstance(call, ast.Call) and call.func is attribute:
            return Access.LOCAL if self._only_chained(call) else Access.WRITE
        if self._written_view(attribute):
            return Access.WRITE
        if name in _KNOWN_WITHOUT or name in {"grad", "main_grad"}:
            return Access.NONE
        return Access.WRITE if name.endswith("_") and not name.startswith("__") else Access.READ

    def _written_view(self, view: ast.expr) -> bool:
        """Whether a view is written to: ``p.detach().zero_()``."""
        parents = self.file.names.parents
        while isinstance(view, ast.Subscript) or (
            isinstance(view, ast.Attribute) and view.attr in {"data", "detach", "view", "t"}
        ):
            parent = parents[view]
            view = parents[parent] if isinstance(parent, ast.Call) and parent.func is view else parent  # type: ignore[assignment]
        in_place = isinstance(view, ast.Attribute) and view.attr.endswith("_") and not view.attr.startswith("_")
        return in_place and isinstance(parents[view], ast.Call)

    def _only_chained(self, call: ast.Call) -> bool:
        """Whether only element-wise calls follow: ``p.mul_(a).add_(q)``."""
        parent = self.file.names.parents[call]
        while isinstance(parent, ast.Attribute):
            after = self.file.names.parents[parent]
            if parent.attr not in _ELEMENTWISE or not isinstance(after, ast.Call):
                return False
            parent = self.file.names.parents[after]
        return isinstance(parent, ast.Expr)

    def _argument(self, call: ast.Call, is_data: bool) -> Access:
        """What a call does with a parameter, or its ``.data``, that it is given."""
        if isinstance(call.func, ast.Attribute) and call.func.attr in _ELEMENTWISE:
            return Access.LOCAL
        found = self.project.resolve(self.file, call.func)
        if isinstance(found, External):
            rows = (access for start, access in _ACCESS_OF_FUNCTIONS if found.name.startswith(start))
            return next(rows, Access.NONE)
        name = (dotted(call.func) or "").split(".")[-1]
        if isinstance(call.func, ast.Attribute) and name.startswith(("add_histogram", "log_histogram")):
            return Access.READ
        if name in _WITHOUT_VALUES:
            return Access.NONE
        if isinstance(call.func, ast.Name) and name in {"float", "int"}:
            return Access.READ
        return Access.READ if is_data else Access.NONE


def _binds(statement: ast.stmt, name: str) -> bool:
    """``name = x``."""
    return isinstance(statement, ast.Assign) and any(
        isinstance(t, ast.Name) and t.id == name for t in statement.targets
    )


def _is_product(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)


def _joined(one: ValueUse, other: ValueUse) -> ValueUse:
    """Two uses in one statement."""
    return ValueUse(
        one.node,
        (*one.models, *other.models),
        one.writes or other.writes,
        one.local and other.local,
        (*one.data, *other.data),
        (*one.kept, *other.kept),
    )


def _formats(node: ast.AST) -> bool:
    """Whether a part of a text asks for digits, for which a value is read: ``f"{p:.3f}"``."""
    return isinstance(node, ast.FormattedValue) and node.format_spec is not None


def _read_by_python(node: ast.AST) -> Iterator[ast.expr]:
    """Values that a node takes out of tensors: ``x.item()``, ``float(x)``, ``f"{x:.3f}"``, ``"%.3f" % x``."""
    match node:
        case ast.Call(func=ast.Attribute(value=value, attr="numpy" | "tolist" | "item")):
            yield value
        case ast.Call(func=ast.Name(id="float" | "int"), args=[value]):
            yield value
        case ast.FormattedValue(value=value, format_spec=ast.JoinedStr()):
            yield value
        case ast.BinOp(left=ast.Constant(value=str()), op=ast.Mod(), right=ast.Tuple(elts=values)):
            yield from values
        case ast.BinOp(left=ast.Constant(value=str()), op=ast.Mod(), right=value):
            yield value
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str()), attr="format"), args=values, keywords=named):
            yield from (*values, *(keyword.value for keyword in named))


def names_of_parameters(files: Iterable[File], classes: Classes) -> dict[str, bool]:
    """The attributes that modules make parameters of, ``self.scale = nn.Parameter(...)``; True for lists and dicts."""
    found: dict[str, bool] = {}
    for file in files:
        if b"Parameter" not in file.source.data:
            continue
        for info in classes.all(file):
            for node in (item for method in info.methods.values() for item in walk(method)):
                match node:
                    case ast.Assign(
                        targets=[ast.Attribute(value=ast.Name(id="self"), attr=name)], value=ast.Call(func=func)
                    ):
                        held = _HELD.get(classes.project.external(file, func))
                        if held is not None and classes.is_module(info):
                            found[name] = held
    return found
