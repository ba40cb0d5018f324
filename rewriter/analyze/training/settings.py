"""Options of the command line and fields of settings: what they are by default, and where a program holds them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from rewriter.analyze.read.file import ClassInfo, File, FunctionInfo
from rewriter.analyze.read.nodes import Function, dotted, walk, walk_own
from rewriter.analyze.training.scripts import Scripts

_PARSES = {"parse_args", "parse_known_args", "parse_args_into_dataclasses", "parse"}
_NAMED = re.compile(r"^_?(?:args?|opts?|options?|cfg|config|configs?|conf|params|hparams|hps?|flags|settings)$", re.I)
_DEEP = 2


@dataclass(frozen=True)
class Held:
    """``access`` is the code of a setting in a program; ``where`` the first of its statements that uses it."""

    access: str
    where: ast.stmt


@dataclass(frozen=True)
class Setting:
    """An option's name; the class that has it as a field, if it is seen."""

    name: str
    owner: ClassInfo | None


class Settings:
    """Answers for all files of a project."""

    def __init__(self, scripts: Scripts) -> None:
        self.scripts = scripts
        self.project = scripts.project
        self.instances = scripts.collectives.instances

    # What they are by default ----------------------------------------------------------------------------------

    def read(self, file: File, node: ast.AST) -> Setting | None:
        """The setting that ``args.out`` or ``args["out"]`` reads."""
        match node:
            case ast.Attribute(value=value, attr=name):
                found = self.project.resolve(file, value)
                owner = found if isinstance(found, ClassInfo) else self.instances.class_of(file, value)
                if owner is not None:
                    return Setting(name, owner)
            case ast.Subscript(value=value, slice=ast.Constant(value=str() as name)):
                pass
            case _:
                return None
        path = dotted(value)
        named = path is not None and _NAMED.match(path.split(".")[-1]) is not None
        return Setting(name, None) if named or self._parses(file, value) else None

    def defaults(self, setting: Setting) -> list[tuple[File, ast.expr]]:
        """What a setting is where nobody gives it: an option's ``default``, the value of a field."""
        owner = setting.owner
        if owner is None:
            return self._of_options.get(setting.name, [])
        members = (owner, *self.scripts.classes.ancestors(owner))
        return [found for member in members for name, found in _fields(member) if name == setting.name]

    @cached_property
    def _of_options(self) -> dict[str, list[tuple[File, ast.expr]]]:
        found: dict[str, list[tuple[File, ast.expr]]] = {}
        for file in self.scripts.training:
            for call in file.calls:
                name = (dotted(call.func) or "").split(".")[-1] or getattr(call.func, "attr", "")
                given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
                if name in {"add_argument", "add_option", "option"} and "default" in given:
                    for option in _names(call, given.get("dest")):
                        found.setdefault(option, []).append((file, given["default"]))
                elif name == "set_defaults":
                    for option, value in given.items():
                        found.setdefault(option, []).append((file, value))
            for node in file.class_nodes:
                if _is_dataclass(node):
                    for option, field in _fields(file.class_info(node)):
                        found.setdefault(option, []).append(field)
        return found

    # Where a program holds them --------------------------------------------------------------------------------

    def held(self, program: File, setting: Setting) -> Held | None:
        """Where a program first uses a setting behind its making, among the statements that all ranks come to."""
        if setting.owner is not None and _is_frozen(setting.owner.node):
            return None
        block = self.scripts.entries.get(program, [])
        function = program.names.function_of(block[0]) if block else None
        start, access = 0, ""
        for number, statement in enumerate(block):
            if (found := self._made(program, statement, setting)) is not None:
                start, access = number + 1, found
                break
        if not access:
            access = next(self._from_outside(program, function, block, setting), "")
        if not access:
            return None
        name = re.split(r"[.\[]", access)[0]
        uses = (item for item in block[start:] if not _defines(item) and _uses(program, item, name, setting.name))
        where = next(uses, None)
        return Held(access, where) if where is not None else None

    def _made(self, file: File, statement: ast.stmt, setting: Setting) -> str | None:
        """``args.out`` for ``args = parser.parse_args()``."""
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            return None
        target, value = statement.targets[0], statement.value
        if isinstance(target, (ast.Tuple, ast.List)) and target.elts:
            target = target.elts[0]
        if not isinstance(target, ast.Name) or not self._gives(file, value, setting):
            return None
        as_table = isinstance(value, ast.Call) and (dotted(value.func) or "").split(".")[-1] in {"vars", "asdict"}
        table = as_table or (isinstance(value, ast.Attribute) and value.attr == "__dict__")
        return f'{target.id}["{setting.name}"]' if table else f"{target.id}.{setting.name}"

    def _from_outside(
        self, program: File, function: Function | None, block: list[ast.stmt], setting: Setting
    ) -> Iterator[str]:
        """Settings that a program's function is given, and those that are made in front of it; a class itself."""
        for argument in function.args.args if function is not None and function.body is block else ():
            given = list(self.instances.given(program, function, argument.arg)) if function is not None else []
            if given and all(self._gives(other, value, setting) for other, value in given):
                yield f"{argument.arg}.{setting.name}"
        if function is not None:
            for statement in program.tree.body:
                if (found := self._made(program, statement, setting)) is not None:
                    yield found
        if setting.owner is not None:
            yield f"{setting.owner.name}.{setting.name}"

    def _gives(self, file: File, value: ast.expr, setting: Setting) -> bool:
        if setting.owner is None:
            return self._parses(file, value)
        found = self.instances.class_of(file, value)
        return found is not None and (found is setting.owner or setting.owner in self.scripts.classes.ancestors(found))

    def _parses(self, file: File, value: ast.expr, deep: int = 0) -> bool:
        """Whether a value comes of the command line."""
        for item in walk(value):
            if isinstance(item, ast.Call):
                if isinstance(item.func, ast.Attribute) and item.func.attr in _PARSES:
                    return True
                found = self.project.resolve(file, item.func)
                if isinstance(found, FunctionInfo) and deep < _DEEP:
                    if any(self._parses(found.file, result, deep + 1) for result in _results(found)):
                        return True
            elif isinstance(item, ast.Name) and deep < _DEEP:
                looked = file.names.lookup(item.id, file.names.scope_of(item))
                for binding in looked[1] if looked is not None else ():
                    if isinstance(binding.value, ast.expr) and self._parses(file, binding.value, deep + 1):
                        return True
        return False


def _results(function: FunctionInfo) -> list[ast.expr]:
    own = (item for statement in function.node.body for item in walk_own(statement))
    return [item.value for item in own if isinstance(item, ast.Return) and item.value is not None]


def _names(call: ast.Call, dest: ast.expr | None) -> list[str]:
    """The name under which an option is read: ``run_name`` for ``"-n", "--run-name"``."""
    if isinstance(dest, ast.Constant) and isinstance(dest.value, str):
        return [dest.value]
    words = [str(item.value) for item in call.args if isinstance(item, ast.Constant)]
    long = [word for word in words if not word.startswith("-") or word.startswith("--")]
    return [(long or words)[0].lstrip("-").replace("-", "_")] if words else []


def _fields(info: ClassInfo) -> Iterator[tuple[str, tuple[File, ast.expr]]]:
    """The fields of a class with their values; of ``field(default_factory=f)`` what ``f`` gives."""
    for statement in info.node.body:
        match statement:
            case (
                ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
                | ast.Assign(targets=[ast.Name(id=name)], value=value)
            ):
                given = {k.arg: k.value for k in value.keywords} if isinstance(value, ast.Call) else {}
                made = given.get("default_factory", given.get("default", value))
                if "default_factory" not in given:
                    yield name, (info.file, made)
                elif isinstance(made, ast.Lambda):
                    yield name, (info.file, made.body)
                else:
                    found = info.file.names.lookup(getattr(made, "id", ""), info.file.names.module)
                    for binding in found[1] if found is not None else ():
                        if isinstance(binding.value, ast.FunctionDef):
                            function = info.file.function_info(binding.value)
                            yield from ((name, (info.file, result)) for result in _results(function))


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(item) for item in node.decorator_list)


def _is_frozen(node: ast.ClassDef) -> bool:
    return any("frozen=True" in ast.unparse(item) for item in node.decorator_list) or any(
        (dotted(base) or "").split(".")[-1] == "NamedTuple" for base in node.bases
    )


def _defines(statement: ast.stmt) -> bool:
    return isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))


def _uses(file: File, statement: ast.stmt, name: str, setting: str) -> bool:
    """Whether a statement uses ``args.setting``, or ``args`` as a whole; not another one of its settings."""
    for item in walk(statement):
        if isinstance(item, ast.Name) and item.id == name:
            match file.names.parents[item]:
                case ast.Attribute(attr=other) | ast.Subscript(slice=ast.Constant(value=other)) if other != setting:
                    continue
            return True
    return False
