"""What a script calls this process's rank and the number of ranks: what it tells torch's process group.

A worker's arguments, options of the command line, arithmetic on both: nothing that torchrun's launch changes. The
process group of a converted script is made of what the launcher says, and so are these names to be.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import assigned_by, dotted, same, walk
from rewriter.analyze.training.scripts import Scripts

JOIN = "torch.distributed.init_process_group"
_POSITIONS = ("backend", "init_method", "timeout", "world_size", "rank")
_LAUNCHERS = {"rank": "RANK", "world_size": "WORLD_SIZE"}
_ASKED = {"get_rank", "get_world_size"}
_ON_DEVICE = {"cuda", "to", "set_device", "device", "xpu"}
_DEVICES = {"device", "map_location", "gpu", "local_rank", "device_id"}
_DEEP = 2


def tellings(file: File, scripts: Scripts) -> Iterator[tuple[ast.Call, dict[str, ast.expr]]]:
    """The calls of a file that tell torch's process group by names, or a function that does, and these names."""
    instances = scripts.collectives.instances
    for other in scripts.training:
        for call in other.calls if other.mentions("init_process_group") else ():
            if scripts.project.external(other, call.func) != JOIN:
                continue
            names = _told(call)
            if other is file:
                yield call, names
            function = other.names.function_of(call)
            handed: dict[ast.Call, dict[str, ast.expr]] = {}
            for what, name in names.items():
                if function is None or not _is_argument(other, name):
                    continue
                for place, given in instances.given(other, function, dotted(name) or ""):
                    caller = place.names.enclosing(given, (ast.Call,))
                    if place is file and isinstance(caller, ast.Call) and _is_name(given):
                        handed.setdefault(caller, {})[what] = given
            yield from handed.items()


def _told(call: ast.Call) -> dict[str, ast.expr]:
    """What a call that makes the process group is given as ``rank`` and ``world_size``, where it is a name."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    given.update(zip(_POSITIONS, call.args, strict=False))
    return {what: given[what] for what in _LAUNCHERS if what in given and _is_name(given[what])}


def names_to_set(file: File, scripts: Scripts, call: ast.Call, names: dict[str, ast.expr]) -> dict[str, ast.expr]:
    """Of these, what is read elsewhere and may be another number than the launcher's, and not the number of a GPU."""
    found = _not_the_launchers(file, scripts, call, names)
    return {what: name for what, name in found.items() if not _is_of_a_gpu(file, what, name)}


def is_of_a_gpu(file: File, scripts: Scripts, node: ast.expr, deep: int = 0) -> bool:
    """Whether an expression is what a worker is called and also names its GPU: its number on this machine."""
    function = file.names.function_of(node)
    for call, names in tellings(file, scripts):
        name = _not_the_launchers(file, scripts, call, names).get("rank")
        if name is not None and same(name, node) and file.names.function_of(call) is function:
            return _is_of_a_gpu(file, "rank", name)
    if function is None or not _is_argument(file, node) or deep == _DEEP:
        return False
    given = scripts.collectives.instances.given(file, function, dotted(node) or "")
    return any(is_of_a_gpu(other, scripts, value, deep + 1) for other, value in given)


def _not_the_launchers(file: File, scripts: Scripts, call: ast.Call, names: dict[str, ast.expr]) -> dict[str, ast.expr]:
    found: dict[str, ast.expr] = {}
    for what, name in names.items():
        values = list(_values(scripts, file, name))
        launchers = bool(values) and all(_is_launchers(value, what) for value in values)
        if not launchers and _is_read(scripts, file, call, name):
            found[what] = name
    return found


def _is_of_a_gpu(file: File, what: str, name: ast.expr) -> bool:
    return what == "rank" and _is_argument(file, name) and _names_device(file, name)


def _is_name(node: ast.expr) -> bool:
    match node:
        case ast.Subscript(value=inner, slice=ast.Constant()):
            return _is_name(inner)
    return dotted(node) is not None


def _values(scripts: Scripts, file: File, name: ast.expr) -> Iterator[ast.expr]:
    """What a name, an attribute of any object or an entry of any table is assigned, in all files of the scripts."""
    function = file.names.function_of(name)
    for other in scripts.training if not isinstance(name, ast.Name) else (file,):
        for node in other.nodes:
            if isinstance(name, ast.Name) and file.names.function_of(node) not in (function, None):
                continue
            match node:
                case ast.Assign():
                    pairs = list(assigned_by(node))
                case ast.AugAssign(target=target, value=value):
                    pairs = [(target, value)]
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    pairs = [(target, value)]
                case _:
                    continue
            yield from (value for target, value in pairs if any(_is_stored(item, name) for item in walk(target)))


def _is_other_place_of(node: ast.AST, name: ast.expr) -> bool:
    """Whether a node may be the same variable."""
    match node, name:
        case ast.Name(id=one), ast.Name(id=two):
            return one == two
        case ast.Attribute(attr=one), ast.Attribute(attr=two):
            return one == two
        case ast.Subscript(slice=ast.Constant(value=one)), ast.Subscript(slice=ast.Constant(value=two)):
            return bool(one == two)
    return False


def _is_launchers(value: ast.expr, what: str) -> bool:
    """Whether a value is what torchrun has set, or what torch says of its process group."""
    for node in walk(value):
        match node:
            case ast.Constant(value=str() as text) if text == _LAUNCHERS[what]:
                return True
            case ast.Call(func=func) if (dotted(func) or "").split(".")[-1] in {*_ASKED, what}:
                return True
    return False


def _is_read(scripts: Scripts, file: File, call: ast.Call, name: ast.expr) -> bool:
    """Whether a name is read elsewhere: in the same function, an attribute or entry of that name anywhere."""
    own = set(walk(call))
    if isinstance(name, ast.Name):
        around = file.names.function_of(name) or file.tree
        return any(node not in own and _is_loaded(node, name) for node in walk(around))
    return any(node not in own and _is_loaded(node, name) for other in scripts.training for node in other.nodes)


def _is_loaded(node: ast.AST, name: ast.expr) -> bool:
    return _is_other_place_of(node, name) and isinstance(getattr(node, "ctx", None), ast.Load)


def _is_stored(node: ast.AST, name: ast.expr) -> bool:
    return _is_other_place_of(node, name) and isinstance(getattr(node, "ctx", None), ast.Store)


def _is_argument(file: File, name: ast.expr) -> bool:
    function = file.names.function_of(name)
    if not isinstance(name, ast.Name) or function is None:
        return False
    given = function.args
    return any(item.arg == name.id for item in (*given.posonlyargs, *given.args, *given.kwonlyargs))


def _names_device(file: File, name: ast.expr) -> bool:
    """Whether a number is handed on as it is to what takes a device, or kept for that."""
    around = file.names.function_of(name) or file.tree
    for node in walk(around):
        if not _is_loaded(node, name):
            continue
        match file.names.parents[node]:
            case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called)) if called in _ON_DEVICE:
                return True
            case ast.IfExp(test=test) if node is not test:
                return True
            case ast.keyword(arg=word) if word in _DEVICES:
                return True
            case ast.List() | ast.FormattedValue() | ast.Assign() | ast.Dict() | ast.Tuple():
                return True
    return False
