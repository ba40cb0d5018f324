"""Which expressions are a rank's number: by their names, or by what they are given.

``mp.spawn(worker)`` gives its worker one, a loop that starts processes does, and so does the environment; whoever is
handed such a number, or keeps it, has one, whatever it is called (``gpu``, ``self.gpu_id``).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rewriter.analyze.read.file import ClassInfo, File, FunctionInfo
from rewriter.analyze.read.nodes import Function, assigned_by, dotted, walk
from rewriter.analyze.read.project import Project

_NAMED = re.compile(r"(?:^|_)(?:rank|local_rank|global_rank)$", re.I)
_OF_NODES = re.compile(r"node|machine|host|(?:^|_)(?:nr|rank)$", re.I)
_ROUNDS = 4
_HINTS = (b"rank", b"RANK", b"SLURM_", b"current_device", b"spawn", b"Process", b"master", b"main", b"primary")
_STARTS = {"spawn", "start_processes"}
_PROCESS = "Process"
_JOINS = "init_process_group"
_SOURCES = ("spawn(", "start_processes(", "Process(", "LOCAL_RANK")
_OTHER_LAUNCHERS = ("SLURM_PROCID", "SLURM_LOCALID", "PMI_RANK", "OMPI_COMM_WORLD_RANK")

Holder = tuple[ast.AST | None, str]
"""A name or attribute, with the function, class or file that it belongs to; ``(None, ".gpu")``: of any object."""


def is_rank(file: File, node: ast.expr) -> bool:
    """Whether an expression is a rank's number, in all or in its node (``rank % gpus``)."""
    match node:
        case ast.BinOp(op=ast.Mod(), left=left, right=right):
            return not isinstance(right, ast.Constant) and is_rank(file, left)
        case ast.BinOp(op=ast.Add(), left=ast.BinOp(op=ast.Mult()) as nodes, right=of_node):  # node * gpus + gpu
            return _counts_nodes(nodes) and is_rank(file, of_node)
        case ast.BinOp(op=ast.Add(), left=of_node, right=ast.BinOp(op=ast.Mult()) as nodes):
            return _counts_nodes(nodes) and is_rank(file, of_node)
        case ast.Call(func=func, args=args):
            name = _last(func)
            if name == "int" and len(args) == 1:
                return is_rank(file, args[0])
            if name in {"get", "getenv"} and args and isinstance(args[0], ast.Constant):
                return str(args[0].value).endswith(("RANK", *_OTHER_LAUNCHERS))
            return name in {"rank", "current_device"} or name.endswith("_rank")
        case ast.Subscript(slice=ast.Constant(value=key)):
            return str(key) in {"RANK", "LOCAL_RANK", *_OTHER_LAUNCHERS}
    path = dotted(node)
    if path is None:
        return False
    return bool(_NAMED.search(path.split(".")[-1])) or _holds_rank(file, node, path)


def _counts_nodes(product: ast.BinOp) -> bool:
    """Whether a product is the ranks of the nodes before; ``step * world_size + rank`` counts samples."""
    return any(_OF_NODES.search(_last(side)) for side in (product.left, product.right))


def hand_ranks_on(project: Project) -> None:
    """Note who is given a rank by another file: workers that are started there, whatever they call, and attributes."""
    files = {file for file in project if any(map(file.mentions, _SOURCES))}
    for _ in range(_ROUNDS):
        reached: set[File] = set()
        given = [pair for file in files for call in file.calls for pair in _handed_to_others(project, file, call)]
        for other, holder in (*given, *_attributes_elsewhere(project, files)):
            if holder not in other.given_ranks:
                other.given_ranks.add(holder)
                other.rank_holders = None
                reached.add(other)
        if not reached:
            break
        files |= reached


def _attributes_elsewhere(project: Project, files: set[File]) -> Iterator[tuple[File, Holder]]:
    """Where ``args.gpu`` is read that another file gives a rank, and none another number."""
    found = [(file, *item) for file in files for item in _held(file).items() if item[0][0] is None]
    other = {holder for _, holder, only in found if not only}
    for file, holder, _ in found:
        if holder not in other:
            yield from ((one, holder) for one in project if one is not file and one.mentions(holder[1]))


def _handed_to_others(project: Project, file: File, call: ast.Call) -> Iterator[tuple[File, Holder]]:
    callee = _run_by(call)
    given = (*call.args, *(keyword.value for keyword in call.keywords))
    if callee is None or (callee is call.func and not any(is_rank(file, value) for value in given)):
        return
    found = project.resolve(file, callee)
    if isinstance(found, ClassInfo):
        made = found.methods.get("__init__")
        found = found.file.function_info(made) if made is not None else None
    if isinstance(found, FunctionInfo) and found.file is not file:
        yield from ((found.file, holder) for holder in _handed(file, call, found))


def _holds_rank(file: File, node: ast.expr, path: str) -> bool:
    return any(_held(file).get(holder, False) for holder in _holders(file, node, path))


def _held(file: File) -> dict[Holder, bool]:
    """What is given a rank in a file; False for what is given something else as well."""
    if file.rank_holders is None:
        held: dict[Holder, bool] = {}
        file.rank_holders = held
        functions = _functions(file)
        for _ in range(_ROUNDS if may_know_ranks(file) else 0):
            before = held.copy()  # of those who hand on what they were given in the round before
            held.update(dict.fromkeys((*file.given_ranks, *_given(file, functions)), True))
            held.update(dict.fromkeys(_given_another(file), False))
            if held == before:
                break
    return file.rank_holders


def may_know_ranks(file: File) -> bool:
    """Whether anything in a file may be a rank, or say which one this is: a cheap question."""
    return bool(file.given_ranks) or any(hint in file.source.data for hint in _HINTS)


def _functions(file: File) -> dict[str, FunctionInfo]:
    """By the name that calls have, those of which there is one; of a class what makes its objects."""
    found: dict[str, Function | None] = {}
    for item in file.nodes:
        function: Function | None
        match item:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                function = item
            case ast.ClassDef(name=name):
                function = file.class_info(item).methods.get("__init__")
            case _:
                continue
        found[name] = function if name not in found else None
    return {name: file.function_info(function) for name, function in found.items() if function is not None}


def _holders(file: File, node: ast.expr, path: str) -> Iterator[Holder]:
    """What an expression may stand for: of a name that of the closest function which binds it."""
    if isinstance(node, ast.Attribute):
        own = isinstance(node.value, ast.Name) and node.value.id == "self"
        yield (file.names.class_of(node), path) if own else (None, f".{node.attr}")
        return
    found = file.names.lookup(path, file.names.scope_of(node))
    if found is not None:
        yield found[0].node, path


def _given(file: File, functions: dict[str, FunctionInfo]) -> Iterator[Holder]:
    """Who is given a rank, as far as is known by now."""
    for call in file.calls:
        told = [keyword.value for keyword in call.keywords if keyword.arg == "rank"]
        if _last(call.func) == _JOINS and told:
            yield from _holders(file, told[0], dotted(told[0]) or "")
        elif (function := functions.get(_last(_run_by(call)))) is not None:
            yield from _handed(file, call, function)
    for node in file.nodes:
        for target, value in assigned_by(node) if isinstance(node, ast.Assign) and len(node.targets) == 1 else ():
            if isinstance(target, (ast.Name, ast.Attribute)) and is_rank(file, value):
                yield from _holders(file, target, dotted(target) or "")


def _given_another(file: File) -> Iterator[Holder]:
    """Who is given another number than a rank, or than what stands for the only process."""
    for node in file.nodes:
        match node:
            case ast.Assign(targets=[_]):
                others = [t for t, value in assigned_by(node) if not (is_rank(file, value) or _is_of_one(value))]
            case ast.Assign(targets=targets):
                others = targets
            case ast.AugAssign(target=target) | ast.For(target=target):
                others = [target]
            case _:
                continue
        for target in others:
            for item in walk(target):
                if isinstance(item, (ast.Name, ast.Attribute)) and isinstance(item.ctx, ast.Store):
                    yield from _holders(file, item, dotted(item) or "")


def _run_by(call: ast.Call) -> ast.expr | None:
    """What a call runs: the worker of ``spawn(worker)`` and ``Process(target=worker)``, else what it calls."""
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if _last(call.func) in _STARTS:
        return named.get("fn", call.args[0] if call.args else None)
    return named.get("target") if _last(call.func) == _PROCESS else call.func


def _handed(file: File, call: ast.Call, function: FunctionInfo) -> Iterator[Holder]:
    """The parameters of the function that a call runs which get a rank by it."""
    if _last(call.func) in _STARTS:
        names = function.parameters[:1]
    elif _last(call.func) == _PROCESS:
        names = [
            name for name, value in zip(function.parameters, _arguments(call), strict=False) if _counts(file, value)
        ]
    else:
        names = [name for name, value in function.given(call) if is_rank(file, value)]
    yield from ((function.node, name) for name in names)


def _arguments(call: ast.Call) -> list[ast.expr]:
    """``[i, n]`` of ``Process(target=worker, args=(i, n))``."""
    given = next((keyword.value for keyword in call.keywords if keyword.arg == "args"), None)
    return given.elts if isinstance(given, (ast.Tuple, ast.List)) else []


def _counts(file: File, node: ast.expr) -> bool:
    """Whether a value is what the loop around counts: ``for i in range(n):``."""
    match file.names.enclosing(node, (ast.For,)):
        case ast.For(target=ast.Name(id=number), iter=ast.Call(func=ast.Name(id="range"), args=[_])):
            return isinstance(node, ast.Name) and node.id == number
    return False


def _last(called: ast.expr | None) -> str:
    return (dotted(called) or "").split(".")[-1] if called is not None else ""


def _is_of_one(value: ast.expr) -> bool:
    """What stands for the rank where there is one process: None, 0 or -1."""
    match value:
        case ast.Constant(value=None | 0) | ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=1)):
            return True
    return False


def varies_by_rank(file: File, node: ast.expr) -> bool:
    """Whether a seed is another one on every rank."""
    return any(
        isinstance(item, ast.expr) and (is_rank(file, item) or (isinstance(item, ast.Name) and "offset" in item.id))
        for item in walk(node)
    )
