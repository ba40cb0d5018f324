"""Which layers of a project's models tensor-parallel ranks can share, by the plan that the model's constructor gets."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from rewriter.analyze.model.attributes import Attributes
from rewriter.analyze.model.elements import Element
from rewriter.analyze.model.forwards import Edit, Forward, Taken
from rewriter.analyze.model.given import trained
from rewriter.analyze.model.stack import Stack
from rewriter.analyze.model.stacks import Stacks
from rewriter.analyze.model.tensors import Object
from rewriter.analyze.model.unplanned import layers
from rewriter.analyze.read.classes import Classes
from rewriter.analyze.read.file import ClassInfo, External, File
from rewriter.analyze.read.nodes import Function, self_path, walk

Style = str
_IN_PLACE = re.compile(r"^(register_|add_module|set_|apply)|[a-z]_$")
_SUMS = {"norm", "vector_norm", "matrix_norm", "sum", "mean", "std", "var", "dot", "max", "min"}
_FACTS = {"grad", "shape", "size", "numel", "nelement", "dim", "ndim", "requires_grad", "element_size"}
_INIT = re.compile(r"init|reset", re.I)
_ADAPTERS = ("peft", "loralib", "bitsandbytes")


@dataclass(frozen=True)
class Block:
    """What of the blocks of one class is split, and how: the code of a plan's values, by names in the block."""

    cls: ClassInfo
    styles: dict[str, Style]
    heads: tuple[str, ...]
    edits: tuple[Edit, ...]
    left: tuple[Taken, ...]
    unread: tuple[tuple[str, str], ...] = ()
    """Name and kind of layers that the forward which was read does not call by their names."""
    assumed: bool = False
    """Whether what the blocks get is taken for (batch, sequence, features)."""


@dataclass
class Plan:
    """For one outermost model: what stands behind the last statement of its constructor."""

    root: ClassInfo
    behind: ast.stmt
    styles: dict[str, Style] = field(default_factory=dict)
    heads: dict[str, None] = field(default_factory=dict)
    blocks: list[tuple[Stack, Block]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    outside: tuple[tuple[str, str], ...] = ()
    """Name and kind of layers outside of the blocks."""


@dataclass(frozen=True)
class Whole:
    """A stack whose blocks stay whole, and why."""

    stack: Stack
    reason: str
    file: File
    line: int


class Splits:
    """Plans of a project's models."""

    def __init__(self, stacks: Stacks) -> None:
        self.stacks = stacks
        self.classes: Classes = stacks.classes
        self.project = stacks.project
        self.attributes = Attributes(self.classes)
        self.plans: dict[ClassInfo, Plan] = {}
        self.whole: list[Whole] = []
        self._blocks: dict[ClassInfo, Block] = {}
        against = self._against_all()
        for stack in stacks.found:
            if against is not None:
                self.whole.append(Whole(stack, *against))
            else:
                self._plan(stack)
        for plan in self.plans.values():
            plan.outside = tuple(layers(self.attributes, plan.root, plan.paths))

    # -- blocks ---------------------------------------------------------------------------------------------------

    def _plan(self, stack: Stack) -> None:
        builds = stack.builds
        line = builds[0].call.lineno
        members = {_class_of(element) for build in builds for element in build.elements}
        block = next(iter(members)) if len(members) == 1 else None
        reason = ""
        if block is None or not stack.whole:
            reason = "its blocks are not of one class of the project"
        elif self.classes.method(block, "forward") is None:
            reason = "the forward of its blocks is not seen"
        roots = list(self._roots(stack.owner, stack.path, 0)) if not reason else []
        reason = next((root for root in roots if isinstance(root, str)), reason)
        if reason or block is None:
            self.whole.append(Whole(stack, reason, builds[0].file, line))
            return
        found = self.block(block)
        for root in roots:
            assert isinstance(root, tuple)
            info, path = root
            plan = self.plans.get(info)
            if plan is None:
                plan = self.plans[info] = Plan(info, info.methods["__init__"].body[-1])
            plan.blocks.append((stack, found))
            plan.paths.append(path)
            plan.styles |= {f"{path}.*.{name}": style for name, style in found.styles.items()}
            plan.heads |= dict.fromkeys(found.heads)

    def block(self, cls: ClassInfo) -> Block:
        if cls not in self._blocks:
            taken: dict[str, Taken] = {}
            given = self._trained(cls)
            while True:
                forward = Forward(self.classes, self.attributes, cls, taken, given)
                reached = {name: self._reached(forward, name) for name in _split(forward)}
                more = {name: why for name, why in reached.items() if why is not None}
                if not more:
                    break
                taken |= more
            unread = tuple(item for item in layers(self.attributes, cls) if item[0] not in forward.linear)
            self._blocks[cls] = _block(cls, forward, tuple(dict.fromkeys(taken.values())), unread)
        return self._blocks[cls]

    def _trained(self, cls: ClassInfo) -> set[str]:
        """The arguments of blocks of a class that are made of parameters, in whatever stack these are."""
        found: set[str] = set()
        for stack in self.stacks.found:
            if any(_class_of(element) is cls for build in stack.builds for element in build.elements):
                for member in {cls, *self.classes.ancestors(cls)}:
                    if "forward" in member.methods:
                        found |= trained(self.attributes, stack, member.methods["forward"])
        return found

    def _reached(self, forward: Forward, name: str) -> Taken | None:
        """Where a layer is used otherwise than in the forward that was read."""
        parent, _, own = name.rpartition(".")
        while own.isdecimal():
            parent, _, own = parent.rpartition(".")
        owner = self._owner(forward.block, parent)
        calls = {call.func for call in forward.reading.sites.get(name, ()) if isinstance(call, ast.Call)}
        for file in self.project:
            for node in file.nodes if file.mentions(own) else ():
                if isinstance(node, ast.Constant) and node.value == own and _by_name(file.names.parents.get(node)):
                    reason = f"{ast.unparse(file.names.parents.get(node, node))[:60]} uses {own}, too"
                    return Taken(frozenset({name}), reason, file, node.lineno)
                if isinstance(node, ast.Attribute) and node.attr == own and node not in calls:
                    if self._is_other(file, node, owner) or self._is_harmless(file, node):
                        continue
                    reason = f"{ast.unparse(file.names.parents.get(node, node))[:60]} uses {own}, too"
                    return Taken(frozenset({name}), reason, file, node.lineno)
        return None

    def _owner(self, block: ClassInfo, path: str) -> ClassInfo | None:
        current: ClassInfo | None = block
        for name in filter(None, path.split(".")):
            found = self.attributes.value(Object(current, ""), name) if current is not None else None
            current = found.cls if isinstance(found, Object) else None
        return current

    def _is_other(self, file: File, node: ast.Attribute, owner: ClassInfo | None) -> bool:
        """Whether ``self.own`` is an attribute of another class."""
        around = file.names.class_of(node)
        function = file.names.function_of(node)
        first = function.args.args[0].arg if function is not None and function.args.args else ""
        if around is None or owner is None or not isinstance(node.value, ast.Name) or node.value.id != first:
            return False
        here = file.class_info(around)
        return here not in (owner, *self.classes.ancestors(owner), *self.classes.descendants(owner))

    def _is_harmless(self, file: File, node: ast.Attribute) -> bool:
        """Whether it is used while the model is built, and ties nothing."""
        function = file.names.function_of(node)
        if function is None or not _INIT.search(function.name):
            return False
        statement = file.names.statement_of(node)
        if not isinstance(statement, ast.Assign):
            return True
        outer: ast.AST = node
        parent = file.names.parents.get(node)
        if isinstance(parent, ast.Attribute) and parent.attr in ("weight", "bias"):
            outer = parent
        if any(target is node for target in statement.targets):
            return isinstance(statement.value, (ast.Call, ast.IfExp))
        return outer is not statement.value and not any(target is outer for target in statement.targets)

    # -- models ---------------------------------------------------------------------------------------------------

    def _roots(self, owner: ClassInfo, path: str, depth: int) -> Iterator[tuple[ClassInfo, str] | str]:
        """The outermost models that hold what is ``path`` in ``owner``, and its name there; or why that is not seen."""
        inside, outside = [], False
        for file in self.project:
            for call in file.calls if file.mentions(owner.name) else ():
                if self.project.resolve(file, call.func) is owner:
                    around = file.names.class_of(call)
                    holder = file.class_info(around) if around is not None else None
                    if holder is None or holder is owner or not self.classes.is_module(holder):
                        outside = True
                    else:
                        inside.append((file, call, holder))
        if inside and outside:
            yield f"{owner.name} is made by itself, and inside another model, too"
        elif not inside:
            yield from self._root(owner, path)
        else:
            for file, call, holder in inside:
                statement = file.names.statement_of(call)
                function = file.names.function_of(call)
                name = ""
                if isinstance(statement, ast.Assign) and statement.value is call and function is not None:
                    name = self_path(statement.targets[0], function.args.args[0].arg if function.args.args else "")
                    name = name if function.name == "__init__" else ""
                if not name or depth > 8:
                    yield f"how {holder.name} holds {owner.name} is not seen"
                else:
                    yield from self._roots(holder, f"{name}.{path}", depth + 1)

    def _root(self, root: ClassInfo, path: str) -> Iterator[tuple[ClassInfo, str] | str]:
        function = root.methods.get("__init__")
        if function is None:
            yield f"{root.name} has no constructor of its own"
        elif any("__init__" in below.methods for below in self.classes.descendants(root)):
            yield f"classes that derive from {root.name} go on building it"
        elif any(isinstance(node, ast.Return) for node in walk(function)):
            yield f"the constructor of {root.name} may end early"
        elif not root.file.convert:
            yield f"{root.file.path.name} is not converted"
        else:
            yield root, path

    def _against_all(self) -> tuple[str, File, int] | None:
        """What speaks against a plan for any model of the project."""
        for file in self.project:
            if any(file.mentions(word) for word in _ADAPTERS):
                for node in file.nodes:
                    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                    names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                    if any(name.split(".")[0] in _ADAPTERS for name in names):
                        return (
                            f"{names[0]} puts other layers into models that are built",
                            file,
                            getattr(node, "lineno", 1),
                        )
            for node in file.nodes if any(map(file.mentions, ("Linear", ".apply(", "init", "parameters"))) else ():
                reason = self._is_after(file, node)
                function = file.names.function_of(node) if reason else None
                if function is not None and _INIT.search(function.name):
                    reason = reason if self._called_later(function) else ""
                if reason:
                    at = node.iter if isinstance(node, ast.comprehension) else node
                    return reason, file, getattr(at, "lineno", 1)
        return None

    def _called_later(self, function: Function) -> bool:
        """Whether a function that initialises is used by whoever has the built model."""
        if function.name == "__init__":
            return False
        for file in self.project:
            for node in file.nodes if file.mentions(function.name) else ():
                if getattr(node, "attr", getattr(node, "id", "")) == function.name:
                    around = file.names.function_of(node)
                    if around is None or not _INIT.search(around.name):
                        return True
        return False

    def _is_after(self, file: File, node: ast.AST) -> str:
        """Whether code looks at the layers of a built model, which are of other classes where they are split."""
        parent = file.names.parents.get(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "apply":
            base = self.project.resolve(file, node.func.value)
            method = file.names.function_of(node)
            own = isinstance(node.func.value, ast.Name) and node.func.value.id == "self" and method is not None
            if base is None and len(node.args) == 1 and not own and not node.keywords:
                return f"{ast.unparse(node)[:60]} goes over the layers of a model that is built"
        if isinstance(node, ast.Call) and self.project.external(file, node.func).startswith("torch.nn.init."):
            return f"{ast.unparse(node)[:60]} gives parameters of a model that is built other values"
        if isinstance(node, (ast.For, ast.comprehension)) and _sums_up(file, node):
            return f"{ast.unparse(node.iter)[:60]} are added up, of which a rank has its share"
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(
            parent, (ast.Call, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Compare)
        ):
            called = isinstance(parent, ast.Call) and parent.func is node
            found = self.project.resolve(file, node) if not called else None
            if isinstance(found, External) and found.name == "torch.nn.Linear":
                inside = any(isinstance(item, ast.Call) and _asks(item) for item in file.names.ancestors(node))
                asked = inside or not isinstance(parent, ast.Call)
                if asked and not self._only_looks(file, node):
                    return "code asks which layers are torch.nn.Linear after the model is built, and may change them"
        return ""

    def _only_looks(self, file: File, node: ast.AST) -> bool:
        """Whether ``isinstance`` asks, of which what is split is an ``nn.Linear``, too, and nothing is changed."""
        function = file.names.function_of(node)
        statement = file.names.statement_of(node)
        if function is None:
            return False
        uses = [node]
        if (
            isinstance(statement, ast.Assign)
            and file.names.parents.get(file.names.parents.get(node, node)) is statement
        ):
            kinds = {target.id for target in statement.targets if isinstance(target, ast.Name)}
            uses = [
                n for n in walk(function) if isinstance(n, ast.Name) and n.id in kinds and n not in statement.targets
            ]
            if len(kinds) != len(statement.targets):
                return False
        named = set()
        for use in uses:
            outer = file.names.parents.get(use)
            outer = file.names.parents.get(outer) if isinstance(outer, ast.Tuple) else outer
            if not (isinstance(outer, ast.Call) and isinstance(outer.func, ast.Name) and outer.func.id == "isinstance"):
                return False
            named |= {module.id for module in outer.args[:1] if isinstance(module, ast.Name)}
        for item in walk(function):
            kept = isinstance(item, ast.Name) and item.id in named and isinstance(item.ctx, ast.Load)
            by = file.names.parents.get(item)
            harmless = isinstance(by, ast.Attribute) or (isinstance(by, ast.Call) and _asks(by))
            if kept and not harmless:
                return False  # whoever gets the module may change it
            if _changes(item):
                return False
        return True


def _class_of(element: Element) -> ClassInfo | None:
    """That of every member which an expression yields."""
    made = element.node
    if isinstance(made, ast.Call) and element.kind == "wrapped" and made.args:
        made = made.args[0]
    return None if isinstance(made, ast.IfExp) else element.cls


def _by_name(node: ast.AST | None) -> bool:
    """Whether a call gets something by its name."""
    func = node.func if isinstance(node, ast.Call) else None
    name = getattr(func, "id", getattr(func, "attr", ""))
    return name in ("getattr", "setattr", "delattr", "get_submodule", "get_parameter", "set_submodule", "attrgetter")


def _sums_up(file: File, loop: ast.For | ast.comprehension) -> bool:
    """Whether a loop over a model's parameters adds up entries of theirs, of which a rank has its share."""
    over = [
        node.func.attr
        for node in walk(loop.iter)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    if not {"parameters", "named_parameters"} & {*over}:
        return False
    names = {item.id for item in walk(loop.target) if isinstance(item, ast.Name)}
    inside = loop if isinstance(loop, ast.For) else file.names.parents.get(loop, loop)
    uses = (node for node in walk(inside) if isinstance(node, ast.Name) and node.id in names)
    return any(_is_summed(file, node) for node in uses)


def _is_summed(file: File, node: ast.AST) -> bool:
    for around in file.names.ancestors(node):
        if not isinstance(around, ast.expr) or (isinstance(around, ast.Attribute) and around.attr in _FACTS):
            return False
        func = around.func if isinstance(around, ast.Call) else None
        if isinstance(func, ast.Attribute) and func.attr in _SUMS:
            return True
    return False


def _asks(node: ast.AST) -> bool:
    names = ("isinstance", "issubclass", "type")
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def _changes(node: ast.AST) -> bool:
    """Whether a node gives an object's attribute, a parameter or a module another value, or hands them on to do so."""
    if isinstance(node, (ast.Attribute, ast.Delete)) and isinstance(
        getattr(node, "ctx", ast.Del()), (ast.Store, ast.Del)
    ):
        return True
    if isinstance(node, ast.Attribute):
        return node.attr in ("data", "copy_", "init", "_modules", "_parameters") or bool(_IN_PLACE.search(node.attr))
    name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else "print"
    return name in ("setattr", "delattr") or not hasattr(builtins, name)


def _split(forward: Forward) -> list[str]:
    return sorted({*forward.reading.rows, *forward.reading.columns})


def _block(cls: ClassInfo, forward: Forward, reached: tuple[Taken, ...], unread: tuple[tuple[str, str], ...]) -> Block:
    reading = forward.reading
    styles: dict[str, Style] = {}
    for name in sorted(reading.columns, key=lambda name: list(forward.linear).index(name)):
        parts = reading.parts.get(name, 1)
        styles[name] = '"colwise"'
        fused = name in reading.grouped and all(one == {name} for one in reading.rows.values() if name in one)
        if parts > 1 or fused:
            styles[name] = f'("packed_colwise", {parts})'
    styles |= dict.fromkeys(reading.rows, '"rowwise"')
    styles |= dict.fromkeys(reading.norms, '"replicated_with_grad_allreduce"')
    order = {name: number for number, name in enumerate(forward.linear)}

    def key(name: str) -> tuple[str, int, int]:
        """Each module's layers together, those that give shares before those that take them."""
        place = 0 if name in reading.columns else 1 if name in reading.norms else 2
        return name.rpartition(".")[0], place, order.get(name, len(order))

    styles = {name: styles[name] for name in sorted(styles, key=key)}
    heads = tuple(sorted({name for names in reading.heads.values() for name in names}))
    known = frozenset(forward.linear)
    found = (replace(taken, origins=taken.origins & known) for taken in (*reached, *forward.found))
    left = tuple(dict.fromkeys(taken for taken in found if taken.origins))
    return Block(cls, styles, heads, tuple(reading.edits.values()), left, unread, bool(forward.assumed))
