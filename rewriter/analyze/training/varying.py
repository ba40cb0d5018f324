"""Which values may differ between ranks: the clock, files, random numbers, what a model gives, and all made of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cached_property

from rewriter.analyze.read.file import ClassInfo, File, FunctionInfo
from rewriter.analyze.read.nodes import children, walk, walk_own
from rewriter.analyze.training.collectives import Collectives
from rewriter.analyze.training.rank_names import is_rank
from rewriter.analyze.training.roles import Roles, Var

_HOST = {
    "os.path.exists", "os.path.isfile", "os.path.isdir", "os.path.islink", "os.path.lexists", "os.path.getsize",
    "os.path.getmtime", "os.path.getctime", "os.listdir", "os.scandir", "os.walk", "os.stat", "os.access", "os.getpid",
    "os.getenv", "os.environ.get", "os.environ", "glob.glob", "glob.iglob", "shutil.disk_usage", "socket.gethostname",
    "platform.node", "time.time", "time.time_ns", "time.perf_counter", "time.monotonic", "time.process_time",
    "timeit.default_timer", "datetime.datetime.now", "datetime.datetime.today", "datetime.datetime.utcnow",
    "uuid.uuid4", "input", "numpy.random.default_rng",
}  # fmt: skip
_DRAWS = {
    "random", "randint", "uniform", "choice", "choices", "randrange", "gauss", "sample", "rand", "randn", "normal",
    "random_sample", "binomial", "permutation", "bernoulli", "getrandbits", "betavariate", "triangular", "poisson",
    "beta", "exponential",
}  # fmt: skip
_LISTING = {"os.listdir", "os.scandir", "os.walk", "glob.glob", "glob.iglob"}
_OF_PATHS = {"exists", "is_file", "is_dir", "iterdir", "rglob", "stat"}
_OF_RANKS = {"RANK", "LOCAL_RANK"}
_OF_JOB = {"WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_ALIKE = {"get_scale", "get_last_lr", "get_lr", "state_dict", "parameters", "named_parameters", "num_embeddings"}
"""Methods whose results are the same on all ranks."""
_OF_KIND = {"dtype", "device", "ndim", "requires_grad", "is_cuda", "training", "__class__", "__name__", "grad_fn"}
_KIND_METHODS = {"dim", "is_floating_point", "parameters", "type", "keys"}
_KIND_FUNCTIONS = {"isinstance", "hasattr", "callable", "type", "id", "issubclass"}
_GATHERING = {
    "all_reduce", "broadcast", "all_gather", "broadcast_object_list", "all_gather_object", "all_gather_into_tensor",
}  # fmt: skip
_GROWING = {"append", "extend", "add", "update", "insert", "appendleft", "setdefault", "put"}
_MEMORY = ("torch.cuda.memory", "torch.cuda.max_memory", "torch.cuda.mem_get", "psutil.")

State = tuple[File, ast.AST | Var, bool, object]
"""A node or variable of a file, whether only its being None is asked for, and the key of the one item that is."""
Given = tuple[ast.expr, ast.AST, int | None, object]
"""A value, the statement that gives it, its place in a tuple, and the key under which it is put."""


class Varying:
    """Answers for all files of a project."""

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives
        self.instances = collectives.instances
        self.project = collectives.project
        self.roles = collectives.roles
        self.settled: set[ast.AST] = set()
        """Tests that are known to be made equal: what stands under them is the same on all ranks."""
        self._alike: set[tuple[ast.AST | Var, bool, object]] = set()
        self._varies: set[ast.AST] = set()
        self._made_equal: dict[File, set[Var]] = {}
        self._signalled: dict[File, set[Var]] = {}

    def varies(self, file: File, node: ast.expr) -> bool:
        """Whether an expression may have another value on another rank, as far as can be seen."""
        if node in self._varies:
            return True
        start: State = (file, node, False, None)
        seen, stack = {start}, [start]
        while stack:
            current = stack.pop()
            key = current[1], current[2], current[3]
            if key in self._alike:
                continue
            if self._is_source(*current[:3]):
                self._varies.add(node)
                return True
            for following in self._made_of(*current):
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
        self._alike |= {(what, only, key) for _, what, only, key in seen}
        return False

    def lists(self, file: File, iterated: ast.expr) -> bool:
        """Whether what a loop goes through is a list of files, or made of one."""
        for item in self._sources_of(file, iterated):
            if isinstance(item, ast.Call):
                name = self.project.external(file, item.func)
                if name in _LISTING:
                    return True
                if isinstance(item.func, ast.Attribute) and item.func.attr in {"iterdir", "rglob"}:
                    return not name
        return False

    def _sources_of(self, file: File, node: ast.expr) -> Iterator[ast.AST]:
        """An expression's nodes, and those of what it is given where it is a name of the same file."""
        variable = self.roles[file].var(node) if isinstance(node, ast.Name) else None
        values = (
            [value for value, _, part, _ in self._assigned(file).get(variable, ()) if part is None] if variable else []
        )
        for value in (node, *values):
            made_equal = isinstance(value, ast.Call) and self.project.external(file, value.func).startswith("bmtrain.")
            yield from () if made_equal else walk(value)

    def _of_signals(self, file: File) -> set[Var]:
        """The variables that a handler of signals sets: a rank gets its signal between other steps than another."""
        if file not in self._signalled:
            found = self._signalled[file] = set[Var]()
            roles = self.roles[file]
            for _, handlers in self.instances.signal_handlers(file):
                for item in (item for handler in handlers if handler.file is file for item in walk(handler.node)):
                    match item:
                        case ast.Assign(targets=[ast.Subscript(value=held) | (ast.Name() | ast.Attribute() as held)]):
                            pass
                        case ast.Call(func=ast.Attribute(value=held, attr="set")):
                            pass
                        case _:
                            continue
                    if (variable := roles.var(held)) is not None:
                        found.add(variable)
        return self._signalled[file]

    # Where values come from ------------------------------------------------------------------------------------

    def _is_source(self, file: File, node: ast.AST | Var, only_none: bool) -> bool:
        if isinstance(node, tuple) and node in self._of_signals(file):
            return True
        if isinstance(node, tuple):
            return not only_none and node in self.roles[file].losses and node not in self._equal(file)
        if isinstance(node, ast.Call):
            return self._call_varies(file, node, only_none)
        if isinstance(node, ast.Subscript):
            return self.project.external(file, node.value) == "os.environ" and not _names(node.slice, _OF_JOB)
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
            return self.project.external(file, node.comparators[0]) == "os.environ" and not _names(node.left, _OF_JOB)
        return False

    def _call_varies(self, file: File, call: ast.Call, only_none: bool) -> bool:
        name = self.project.external(file, call.func)
        if name in {"os.getenv", "os.environ.get"}:
            return not any(_names(item, _OF_JOB) for item in call.args[:1])
        if name in _HOST or name.startswith(_MEMORY):
            return True
        if name.startswith(("random.", "numpy.random.", "torch.")) and name.split(".")[-1] in _DRAWS:
            return not only_none and name.count(".") < 3
        func = call.func
        if isinstance(func, ast.Attribute) and func.attr in _OF_PATHS and not name and not call.args:
            return self.project.resolve(file, func) is None
        roles = self.roles[file]
        if only_none:
            return False
        return roles.is_model(func) or (isinstance(func, ast.Attribute) and self._runs_model(roles, func))

    def _runs_model(self, roles: Roles, func: ast.Attribute) -> bool:
        return roles.is_model(func.value) and func.attr in {"forward", "generate", "sample", "predict"}

    # What values are made of -----------------------------------------------------------------------------------

    def _made_of(self, file: File, node: ast.AST | Var, only_none: bool, key: object) -> Iterator[State]:
        if isinstance(node, tuple):
            yield from self._of_variable(file, node, only_none, key)
        elif node in self.collectives.readings(file):
            return
        elif (keyed := _keyed(node)) is not None:
            yield file, keyed[0], only_none, keyed[1]
        elif isinstance(node, ast.Call):
            yield from self._of_call(file, node, only_none, key)
        elif isinstance(node, (ast.Name, ast.Attribute)):
            yield from self._of_path(file, node, only_none, key)
        elif isinstance(node, ast.Dict) and key is not None:
            for name, value in zip(node.keys, node.values, strict=True):
                if not isinstance(name, ast.Constant) or name.value == key:
                    yield file, value, only_none, None
        elif isinstance(node, ast.Compare) and _is_none_test(node):
            yield file, node.left, True, None
        elif isinstance(node, ast.Compare) and _asks_for_key(node):
            yield from ((file, right, only_none, None) for right in node.comparators if self.lists(file, right))
        elif isinstance(node, ast.IfExp):
            yield from ((file, part, only_none, key) for part in (node.body, node.orelse))
            if node not in self.settled:
                yield file, node.test, False, None
        elif not isinstance(node, (ast.Lambda, ast.Constant, *_DEFINITIONS)):
            if only_none and not isinstance(node, (ast.BoolOp, ast.NamedExpr, ast.Await)):
                return  # what is computed is not None
            yield from ((file, child, only_none, key) for child in children(node) if not isinstance(child, ast.keyword))

    def _of_call(self, file: File, call: ast.Call, only_none: bool, key: object) -> Iterator[State]:
        if self._is_alike(file, call):
            return
        found = self.project.resolve(file, call.func)
        if isinstance(found, ClassInfo):
            return
        functions = [found] if isinstance(found, FunctionInfo) else []
        if not functions and isinstance(call.func, ast.Attribute):
            functions = self.instances.methods(file, call.func)
        elif not functions and found is None:
            functions = self.instances.called(file, call.func)
        for function in functions:
            yield from self._of_function(function, only_none, key)
        if functions or only_none:
            return
        if isinstance(call.func, ast.Name) and call.func.id == "len":
            yield from ((file, argument, only_none, None) for argument in call.args if self.lists(file, argument))
            return
        if isinstance(call.func, ast.Attribute):
            yield file, call.func.value, only_none, key
        yield from ((file, argument, only_none, key) for argument in call.args)
        yield from ((file, k.value, only_none, key) for k in call.keywords if key is None or k.arg in (None, key))

    def _is_alike(self, file: File, call: ast.Call) -> bool:
        """Whether a call's result is the same on all ranks, or only tells of what kind something is."""
        name = self.project.external(file, call.func)
        if name.startswith("bmtrain.") or name == "torch.nn.utils.clip_grad_norm_":
            return True
        if name.startswith(("torch.distributed.", "torch.load", "json.load", "yaml.", "argparse.")):
            return True
        if isinstance(call.func, ast.Attribute):
            if self.roles[file].var(call.func.value) in self.roles[file].managers:
                return True
            return call.func.attr in _ALIKE | _KIND_METHODS | {"parse_args", "clip_grad_norm"}
        return isinstance(call.func, ast.Name) and call.func.id in _KIND_FUNCTIONS

    def _of_function(self, function: FunctionInfo, only_none: bool, key: object) -> Iterator[State]:
        for statement in function.node.body:
            for item in walk_own(statement):
                if isinstance(item, ast.Return):
                    if item.value is not None:
                        yield function.file, item.value, only_none, key
                    if item.value is None or _is_fixed(item.value):
                        yield from self._tests_above(function.file, item)

    def _of_path(self, file: File, node: ast.Name | ast.Attribute, only_none: bool, key: object) -> Iterator[State]:
        if isinstance(node, ast.Attribute) and node.attr in _OF_KIND:
            return
        variable = self.roles[file].var(node)
        if variable is not None and variable in self._equal(file):
            return
        if isinstance(node, ast.Name):
            if variable is not None and node.id not in {"self", "cls"}:
                yield file, variable, only_none, key
            return
        owner = self.instances.class_of(file, node.value)
        if owner is not None:
            for member in (owner, *self.collectives.classes.ancestors(owner)):
                yield member.file, (member.node, f"self.{node.attr}"), only_none, key
                yield from self._set_from_outside(member, node.attr, only_none, key)
                method = member.methods.get(node.attr)
                if method is not None:  # a property
                    yield from self._of_function(member.file.function_info(method), only_none, key)
            return
        if variable is not None:
            yield file, variable, only_none, key
        if not only_none:
            yield file, node.value, only_none, node.attr

    def _set_from_outside(self, owner: ClassInfo, name: str, only_none: bool, key: object) -> Iterator[State]:
        """What ``trainer.stop = ...`` gives an attribute of a trainer, or of an object whose class is not seen."""
        for file, target, value, statement in self.instances.attributes.get(name, ()):
            known = self.instances.class_of(file, target.value)
            if known is None or known is owner or owner in self.collectives.classes.ancestors(known):
                yield file, value, only_none, key
                if isinstance(statement, ast.AugAssign) or _is_fixed(value):
                    yield from self._tests_above(file, statement)

    def _of_variable(self, file: File, variable: Var, only_none: bool, key: object) -> Iterator[State]:
        """What a variable is given; with ``key`` what its item of that key is given."""
        scope, path = variable
        for value, statement, part, at in self._assigned(file).get(variable, ()):
            if at is not None and key is not None and at != key:
                continue
            yield from self._of_part(file, value, part, only_none, None if at is not None else key)
            if isinstance(statement, ast.AugAssign) or _is_fixed(value):
                yield from self._tests_above(file, statement)
        if "." not in path:
            yield from self._of_argument(file, scope, path, only_none, key)

    def _of_part(self, file: File, value: ast.expr, part: int | None, only_none: bool, key: object) -> Iterator[State]:
        """What a variable is given: a value, or one place of a tuple."""
        if part is None:
            yield file, value, only_none, key
            return
        if isinstance(value, (ast.Tuple, ast.List)) and part < len(value.elts):
            yield file, value.elts[part], only_none, key
            return
        found = self.project.resolve(file, value.func) if isinstance(value, ast.Call) else None
        returned = [
            item.value
            for statement in (found.node.body if isinstance(found, FunctionInfo) else ())
            for item in walk_own(statement)
            if isinstance(item, ast.Return)
        ]
        if isinstance(found, FunctionInfo) and returned and all(isinstance(item, ast.Tuple) for item in returned):
            for item in returned:
                if isinstance(item, ast.Tuple) and part < len(item.elts):
                    yield found.file, item.elts[part], only_none, key
            return
        yield file, value, only_none, key

    def _of_argument(self, file: File, scope: ast.AST, name: str, only_none: bool, key: object) -> Iterator[State]:
        if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for other, value in self.instances.given(file, scope, name):
                yield other, value, only_none, key

    def _tests_above(self, file: File, statement: ast.AST) -> Iterator[State]:
        """The tests that decide whether a statement runs, in its function, but those that are made equal."""
        child = statement
        for parent in file.names.ancestors(statement):
            if isinstance(parent, _DEFINITIONS):
                return
            if isinstance(parent, (ast.If, ast.While)) and child is not parent.test and parent not in self.settled:
                yield file, parent.test, False, None
            child = parent

    # Tables of a file ------------------------------------------------------------------------------------------

    def _assigned(self, file: File) -> dict[Var, list[Given]]:
        if file not in self._tables:
            table = self._tables[file] = {}
            for node, target, value, part in _assignments(file):
                keyed = _keyed(target)
                owner, key = keyed if keyed is not None else (_container(target), None)
                variable = self.roles[file].var(owner)
                if variable is not None:
                    table.setdefault(variable, []).append((value, node, part, key))
        return self._tables[file]

    @cached_property
    def _tables(self) -> dict[File, dict[Var, list[Given]]]:
        return {}

    def is_made_equal(self, file: File, node: ast.expr) -> bool:
        """Whether some statement makes a variable equal on all ranks."""
        return self.roles[file].var(node) in self._equal(file)

    def _equal(self, file: File) -> set[Var]:
        """Variables that some statement makes equal on all ranks, such as ``dist.all_reduce(x)``."""
        if file not in self._made_equal:
            found = self._made_equal[file] = set()
            for call in file.calls:
                name = self.project.external(file, call.func)
                if name.startswith(("torch.distributed.", "bmtrain.distributed.")):
                    if name.split(".")[-1] in _GATHERING and call.args:
                        variable = self.roles[file].var(call.args[0])
                        if variable is not None:
                            found.add(variable)
        return self._made_equal[file]


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def of_rank(file: File, test: ast.expr) -> bool:
    """Whether a test compares a rank with something else than a number: each rank has another answer."""
    for item in walk(test):
        if isinstance(item, ast.Compare):
            sides = [item.left, *item.comparators]
            ranks = [side for side in sides if any(isinstance(n, ast.expr) and is_rank(file, n) for n in walk(side))]
            constant = all(
                isinstance(n, (ast.Constant, ast.UnaryOp, ast.USub, ast.List, ast.Tuple, ast.Set, ast.Load))
                for side in sides
                if side not in ranks
                for n in walk(side)
            )
            modulo = any(isinstance(n, ast.Mod) for side in ranks for n in walk(side))
            if ranks and (not constant or modulo):
                return True
    return False


def strides_by_rank(file: File, iterated: ast.expr) -> bool:
    """``range(rank, n, world_size)`` and ``items[rank::world_size]``."""
    for item in walk(iterated):
        match item:
            case ast.Call(func=ast.Name(id="range"), args=[start, _, _]) if is_rank(file, start):
                return True
            case ast.Slice(lower=ast.expr() as start, step=ast.expr()) if is_rank(file, start):
                return True
    return False


def of_environment_rank(test: ast.expr) -> bool:
    return any(_names(item, _OF_RANKS) for item in walk(test))


def _names(node: ast.AST, words: set[str]) -> bool:
    return isinstance(node, ast.Constant) and node.value in words


def _is_none_test(node: ast.Compare) -> bool:
    right = node.comparators[0]
    return isinstance(node.ops[0], (ast.Is, ast.IsNot)) and isinstance(right, ast.Constant) and right.value is None


def _asks_for_key(node: ast.Compare) -> bool:
    return isinstance(node.ops[0], (ast.In, ast.NotIn)) and isinstance(node.left, ast.Constant)


def _assignments(file: File) -> Iterator[tuple[ast.AST, ast.expr, ast.expr, int | None]]:
    """(statement, target, value, place in a tuple) of all that gives a variable a value, or adds to it."""
    for node in file.nodes:
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    yield from _parts(node, target, value)
            case ast.AnnAssign(target=target, value=ast.expr() as value) | ast.NamedExpr(target=target, value=value):
                yield node, target, value, None
            case ast.AugAssign(target=target, value=value):
                yield node, target, value, None
            case ast.For(target=target, iter=iterated) | ast.comprehension(target=target, iter=iterated):
                for name, value in _iterated(target, iterated):
                    yield node, name, value, None
            case ast.Call(func=ast.Attribute(value=owner, attr=attr), args=values) if attr in _GROWING:
                for value in values:
                    yield node, owner, value, None


def _parts(
    node: ast.AST, target: ast.expr, value: ast.expr
) -> Iterator[tuple[ast.AST, ast.expr, ast.expr, int | None]]:
    if isinstance(target, (ast.Tuple, ast.List)):
        for number, item in enumerate(target.elts):
            yield node, item, value, number
    else:
        yield node, target, value, None


def _keyed(node: ast.AST) -> tuple[ast.expr, object] | None:
    """The table and the key of ``table["key"]`` and ``table.get("key")``."""
    match node:
        case ast.Subscript(value=value, slice=ast.Constant(value=key)):
            return value, key
        case ast.Call(func=ast.Attribute(value=value, attr="get"), args=[ast.Constant(value=key), *_]):
            return value, key
    return None


def _is_fixed(value: ast.expr) -> bool:
    """``True``, ``-1``: a flag, or where a count begins."""
    return isinstance(value, ast.Constant) or (
        isinstance(value, ast.UnaryOp) and isinstance(value.operand, ast.Constant)
    )


def _container(target: ast.expr) -> ast.expr:
    """``table`` for ``table[key]``."""
    while isinstance(target, (ast.Subscript, ast.Starred)):
        target = target.value
    return target


def _iterated(target: ast.expr, iterated: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    if isinstance(iterated, ast.Call) and isinstance(iterated.func, ast.Name) and iterated.args:
        name = iterated.func.id
        if name == "enumerate" and isinstance(target, ast.Tuple) and len(target.elts) == 2:
            yield from _iterated(target.elts[1], iterated.args[0])
            return
        if name == "range":
            return
    for item in walk(target):
        if isinstance(item, ast.Name):
            yield item, iterated
