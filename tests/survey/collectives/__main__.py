"""Converts folders, and searches the result for calls that all ranks must make under tests that may differ by rank.

    python -m tests.survey.collectives FOLDER... [--converted]

It knows nothing of the rewriter's own analysis: calls are followed by their bare names through the whole project, so
that it finds too much rather than too little. Found are ``if``, ``while``, conditional expressions, ``and``/``or`` and
caught errors above such a call, and tests with a ``continue``, ``break`` or ``return`` in a loop or function that goes
on to one. A test may differ if it holds, or is made of names that were given in the same function, the clock, files,
random numbers, the environment or the rank. With --converted, the folders are searched as they are. The exit code is
the number of places, at most 100; those in files that are left unconverted do not count.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from rewriter.convert import convert_paths
from rewriter.discover import sources
from rewriter.plan import Options
from rewriter.rules import RULES

FOR_ALL = {
    "save", "save_checkpoint", "load", "sum_loss", "synchronize", "gathered", "gather_grad", "gather_batch",
    "gather_result", "BMTrainModelWrapper", "all_reduce", "all_gather", "broadcast", "broadcast_object", "agree",
}  # fmt: skip
OF_MANAGERS = {"backward", "step", "clip_grad_norm"}
DIFFER = {
    "exists", "isfile", "isdir", "is_file", "is_dir", "getsize", "getmtime", "listdir", "glob", "iglob", "iterdir",
    "time", "perf_counter", "monotonic", "now", "random", "randint", "uniform", "choice", "getenv", "environ",
}  # fmt: skip
EQUAL = {"agree", "sum_loss", "broadcast_object", "all_reduce"}
_OF_MODULES = {
    "time": {"time"},
    "random": {"random", "np", "numpy"},
    "load": {"bmt", "bmtrain"},
    "save": {"bmt", "bmtrain"},
}
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_LOOPS = (ast.For, ast.While)


class Search:
    """The functions of a project, by name, that make such a call themselves or through others."""

    def __init__(self, trees: dict[Path, ast.Module]) -> None:
        self.trees = trees
        self.parents = {
            child: node for tree in trees.values() for node in ast.walk(tree) for child in ast.iter_child_nodes(node)
        }
        self.functions: dict[str, list[ast.AST]] = {}
        self.given: dict[ast.AST, dict[str, list[ast.expr]]] = {}
        for tree in trees.values():
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    self.functions.setdefault(node.name, []).append(node)
        self.calls = {
            name: {called(node) for function in several for node in own(function) if isinstance(node, ast.Call)}
            for name, several in self.functions.items()
        }
        self.making = {name for name, several in self.functions.items() if any(map(self._makes_itself, several))}
        before = -1
        while before != len(self.making):
            before = len(self.making)
            self.making |= {
                name
                for name, several in self.functions.items()
                if name not in self.making and len(several) == 1 and self.calls[name] & self.making
            }

    def _makes_itself(self, function: ast.AST) -> bool:
        return any(isinstance(node, ast.Call) and self.is_for_all(node, direct=True) for node in own(function))

    def is_for_all(self, call: ast.Call, direct: bool = False) -> bool:
        name, owner = called(call), ast.unparse(call.func).rpartition(".")[0]
        if name in FOR_ALL and owner.split(".")[0] in {"bmt", "bmtrain"}:
            return True
        if name in OF_MANAGERS and "manager" in owner:
            return True
        return not direct and name in self.making and len(self.functions[name]) == 1

    def places(self, path: Path) -> Iterator[str]:
        tree = self.trees[path]
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and self.is_for_all(n)]
        told: set[int] = set()
        reached: dict[ast.AST, ast.Call] = {}
        for call in calls:
            for child, parent in self.above(call):
                tests = _tests(parent, child)
                for test in tests:
                    if self.differs(test) and parent.lineno not in told:
                        told.add(parent.lineno)
                        yield f"{path}:{parent.lineno}: {ast.unparse(test)}: {ast.unparse(call)[:60]}"
                if isinstance(parent, (*_LOOPS, *_DEFINITIONS)):
                    if parent not in reached or reached[parent].lineno < call.lineno:
                        reached[parent] = call
        for node in ast.walk(tree):
            if isinstance(node, (ast.Break, ast.Continue, ast.Return)):
                for test, call in self._jumped(node, reached):
                    if self.differs(test) and test.lineno not in told:
                        told.add(test.lineno)
                        yield f"{path}:{test.lineno}: {ast.unparse(test)}: {ast.unparse(call)[:60]}"

    def _jumped(self, node: ast.stmt, reached: dict[ast.AST, ast.Call]) -> Iterator[tuple[ast.expr, ast.Call]]:
        tests: list[ast.expr] = []
        for child, parent in self.above(node):
            tests += _tests(parent, child)
            ends = isinstance(parent, _LOOPS) and not isinstance(node, ast.Return)
            if (ends or isinstance(parent, _DEFINITIONS)) and parent in reached:
                if isinstance(node, ast.Break) or reached[parent].lineno > node.lineno:
                    yield from ((test, reached[parent]) for test in tests)
            if ends:
                return

    def above(self, node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
        while (parent := self.parents.get(node)) is not None:
            yield node, parent
            if isinstance(parent, _DEFINITIONS):
                return
            node = parent

    def differs(self, test: ast.expr, deep: int = 0) -> bool:
        """Whether a test, or what its names were last given in its function, asks for something of this rank."""
        for node in outside_of_equal(test):
            if isinstance(node, ast.Call) and called(node) in DIFFER and _is_meant(node):
                return True
            if isinstance(node, ast.Attribute) and node.attr == "environ":
                return True
            if isinstance(node, ast.Name) and deep < 3:
                if any(self.differs(value, deep + 1) for value in self._given(node)):
                    return True
        return False

    def _given(self, name: ast.Name) -> Iterator[ast.expr]:
        around: ast.AST | None = next(
            (p for _, p in self.above(name) if isinstance(p, (*_DEFINITIONS, ast.Module))), None
        )
        if around is None:
            return
        if around not in self.given:
            table = self.given[around] = {}
            for node in own(around):
                if isinstance(node, ast.Assign):
                    for target in node.targets:
                        if isinstance(target, ast.Name):
                            table.setdefault(target.id, []).append(node.value)
        yield from self.given[around].get(name.id, ())


def own(function: ast.AST) -> Iterator[ast.AST]:
    stack = list(ast.iter_child_nodes(function))
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, _DEFINITIONS):
            stack.extend(ast.iter_child_nodes(node))


def outside_of_equal(test: ast.expr) -> Iterator[ast.AST]:
    stack: list[ast.AST] = [test]
    while stack:
        node = stack.pop()
        if not (isinstance(node, ast.Call) and called(node) in EQUAL):
            yield node
            stack.extend(ast.iter_child_nodes(node))


def called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _is_meant(call: ast.Call) -> bool:
    """Whether ``x.time()`` is the module's."""
    modules = _OF_MODULES.get(called(call))
    owner = ast.unparse(call.func).rpartition(".")[0]
    return modules is None or owner.split(".")[0] in modules


def _tests(parent: ast.AST, child: ast.AST) -> list[ast.expr]:
    match parent:
        case ast.If(test=test) | ast.IfExp(test=test) if child is not test:
            return [test]
        case ast.While(test=test):
            return [test]
        case ast.BoolOp(values=values) if child in values:
            return values[: values.index(child)]
    return []


def search(files: dict[Path, bytes]) -> Iterator[str]:
    trees = {}
    for path, data in files.items():
        try:
            trees[path] = ast.parse(data)
        except (SyntaxError, ValueError):
            continue
    found = Search(trees)
    for path in trees:
        if b"bmtrain" in files[path]:
            yield from found.places(path)


def converted(folder: Path) -> dict[Path, bytes]:
    paths = [path for path in sources(folder) if path.suffix == ".py"]
    return {result.path: result.after for result in convert_paths(paths, Options(), [folder]) if not result.error}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--converted", action="store_true", help="search the folders as they are")
    parser.add_argument("--examples", action="store_true", help="search what the rules' examples become")
    options = parser.parse_args()
    count = 0
    groups: list[tuple[str, dict[Path, bytes]]] = []
    if options.examples:
        groups += [
            (rule.code, {Path(f"{rule.code}-{number}.py"): (example.after or example.before).encode()})
            for rule in RULES
            for number, example in enumerate(rule.examples)
        ]
    for folder in options.folders:
        paths = list(folder.rglob("*.py")) if options.converted else []
        groups.append((folder.name, {p: p.read_bytes() for p in paths} if options.converted else converted(folder)))
    for name, files in groups:
        places = list(search(files))
        count += len(places)
        if places or name in {folder.name for folder in options.folders}:
            print(f"{name}: {len(files)} files, {len(places)} places", flush=True)
        for place in places:
            print("   ", place)
    return min(count, 100)


if __name__ == "__main__":
    sys.exit(main())
