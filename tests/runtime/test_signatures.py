"""What one package of bmtrain takes from another is typed: no Any in its signature, but for those told here."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import bmtrain

OF_THE_MODEL = "nn.Module's own signature: arguments, results and state are the model's"
AS_IT_CAME = "gives back whatever was put in, which its caller alone knows"
OF_RANDOM = "the words of a state, of several types, as the standard library's own signature has them"
LEFT = {
    "bmtrain.block.block.Block.__new__": "gives back the module that it was given, which is of its own class, too",
    "bmtrain.block.block_list.TransformerBlockList.forward": OF_THE_MODEL,
    "bmtrain.block.sharded.ShardedModule.__call__": OF_THE_MODEL,
    "bmtrain.block.sharded.ShardedModule.load_state_dict": OF_THE_MODEL,
    "bmtrain.block.sharded.ShardedModule.state_dict": OF_THE_MODEL,
    "bmtrain.checkpoint.files.write": "torch.save's options",
    "bmtrain.debug.get": AS_IT_CAME,
    "bmtrain.objects.broadcast_object": AS_IT_CAME,
    "bmtrain.own_random.HostState.numpy": OF_RANDOM,
    "bmtrain.own_random.OfNumpy.now": OF_RANDOM,
    "bmtrain.own_random.HostState.python": OF_RANDOM,
    "bmtrain.shard.module.DistributedModule.__call__": OF_THE_MODEL,
    "bmtrain.shard.state_copies.StateTensor.numpy": "torch's own signature: numpy may be missing",
    "bmtrain.wire.from_bytes": AS_IT_CAME,
}
"""Why each that is left has one."""


class Package:
    """The files of a package, and which module uses what of which other."""

    def __init__(self, root: Path) -> None:
        self.trees: dict[str, ast.Module] = {}
        self.folders: set[str] = set()
        for path in sorted(root.rglob("*.py")):
            name = ".".join((root.name, *path.relative_to(root).with_suffix("").parts))
            if path.name == "__init__.py":
                name = name.removesuffix(".__init__")
                self.folders.add(name)
            self.trees[name] = ast.parse(path.read_text())
        self.names = {module: dict(self._imported(module)) for module in self.trees}

    def _imported(self, module: str) -> Iterator[tuple[str, str]]:
        """What names in ``module`` stand for."""
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Import):
                yield from ((alias.asname or alias.name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                up = node.level - (module in self.folders)
                base = module.rsplit(".", up)[0] if up else module
                source = ".".join(part for part in (base if node.level else "", node.module) if part)
                yield from ((alias.asname or alias.name, f"{source}.{alias.name}") for alias in node.names)

    def origin(self, name: str, seen: tuple[str, ...] = ()) -> str:
        """Where what is called ``name`` is defined, past all that hands it on."""
        module, _, rest = name.rpartition(".")
        if name in self.trees or name in seen or module not in self.trees:
            return name
        return self.origin(self.names[module].get(rest, name), (*seen, name))

    def users(self) -> dict[str, set[str]]:
        """By what is defined somewhere, the modules that use it; to hand it on by ``__all__`` is no use."""
        found = defaultdict(set)
        for module, tree in self.trees.items():
            handed_on = {
                constant.value
                for node in tree.body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
                for constant in ast.walk(node.value)
                if isinstance(constant, ast.Constant)
            }
            for local, name in self.names[module].items():
                if local not in handed_on:
                    found[self.origin(name)].add(module)
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    source = self.origin(self.names[module].get(node.value.id, ""))
                    if source in self.trees:
                        found[self.origin(f"{source}.{node.attr}")].add(module)
        return found

    def signatures(self) -> Iterator[tuple[str, str, list[ast.expr | None]]]:
        """What other packages may use: its name, that of the whole that they import, and the annotations."""
        for module, tree in self.trees.items():
            for node in tree.body:
                if isinstance(node, ast.FunctionDef):
                    yield f"{module}.{node.name}", f"{module}.{node.name}", annotations(node)
                elif isinstance(node, ast.AnnAssign):
                    yield (
                        f"{module}.{ast.unparse(node.target)}",
                        f"{module}.{ast.unparse(node.target)}",
                        [node.annotation],
                    )
                elif isinstance(node, ast.ClassDef):
                    whole = f"{module}.{node.name}"
                    for part in node.body:
                        if isinstance(part, ast.FunctionDef) and (part.name[0] != "_" or part.name in CALLED):
                            yield f"{whole}.{part.name}", whole, annotations(part)
                    for part in ast.walk(node):
                        if isinstance(part, ast.AnnAssign) and (part in node.body or is_of_self(part.target)):
                            name = ast.unparse(part.target).removeprefix("self.")
                            if name[0] != "_":
                                yield f"{whole}.{name}", whole, [part.annotation]

    def aliases(self) -> set[str]:
        """Names of types with Any in them."""
        given = {
            f"{module}.{ast.unparse(node.targets[0])}": node.value
            for module, tree in self.trees.items()
            for node in tree.body
            if isinstance(node, ast.Assign)
            and not isinstance(node.value, ast.Call)  # which makes a TypeVar, or a value
        }
        found, before = set[str](), None
        while found != before:
            before = set(found)
            found |= {name for name, value in given.items() if self._has_any(value, name.rpartition(".")[0], found)}
        return found

    def _has_any(self, annotation: ast.expr | None, module: str, aliases: set[str]) -> bool:
        for node in ast.walk(annotation) if annotation is not None else ():
            name = getattr(node, "id", getattr(node, "attr", ""))
            if name == "Any" or self.origin(f"{module}.{name}") in aliases:
                return True
        return False

    def with_any(self) -> set[str]:
        """What has Any in its signature and is used by another package."""
        users, aliases = self.users(), self.aliases()
        return {
            name
            for name, whole, given in self.signatures()
            if any(self._has_any(annotation, whole.rpartition(".")[0], aliases) for annotation in given)
            and {of(module) for module in users[whole]} - {of(whole)}
        }


CALLED = ("__init__", "__new__", "__call__")


def of(name: str) -> str:
    """The folder or file at the top that something is in."""
    return ".".join(name.split(".")[:2])


def is_of_self(target: ast.expr) -> bool:
    return isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"


def annotations(function: ast.FunctionDef) -> list[ast.expr | None]:
    given = function.args
    everything = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [function.returns, *(argument.annotation for argument in everything if argument is not None)]


def test_no_any_between_packages() -> None:
    assert Package(Path(bmtrain.__file__).parent).with_any() == set(LEFT)


def test_any_is_found_however_it_is_written_and_used(tmp_path: Path) -> None:
    files = {
        "__init__": "from .low import handed_on\n__all__ = ['handed_on']\n",
        "low.__init__": "from .inner import again, Given as Renamed\nfrom . import inner\n",
        "low.inner": """
import typing
from typing import Any
def again(x: Any): ...
def positional(x: list[typing.Any]): ...
def star(*args: Any): ...
def stars(**kwargs: dict[str, Any]): ...
def gives() -> Any | None: ...
def handed_on(x: Any): ...
def at_home(x: Any): ...
def is_typed(x: AnyOf, any: object) -> None: ...
Words = list[Any]
More = dict[str, Words]
T = TypeVar("T", bound=Words)
def by_another_name(x: More): ...
def of_its_own(x: T) -> T: ...
value: Any = 1
class Given:
    field: Any
    _hidden: Any
    def __init__(self, *, x: Any = None):
        self.made: Any = x
        self._kept: Any = x
        local: Any = x
    def method(self) -> tuple[Any, ...]: ...
    def _own(self, x: Any): ...
class Unused:
    field: Any
""",
        "low.beside": "from .inner import at_home\n",
        "high.__init__": "",
        "high.user": """
from ..low import Renamed, again, inner as known
from ..low.inner import by_another_name, is_typed, of_its_own, positional
import root.low.inner
def work():
    from ..low.inner import gives
    known.star(); known.stars(); known.value
""",
    }
    for name, text in files.items():
        path = tmp_path / "root" / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    inner = "root.low.inner."
    functions = ("again", "positional", "star", "stars", "gives", "by_another_name", "value")
    expected = (*functions, "Given.field", "Given.made", "Given.__init__", "Given.method")
    assert Package(tmp_path / "root").with_any() == {inner + name for name in expected}
