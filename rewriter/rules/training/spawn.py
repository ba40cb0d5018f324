"""Processes that a script starts itself are torchrun's.

What: ``mp.spawn(worker, nprocs=n, args=(n, options))`` becomes ``worker(int(os.environ.get("LOCAL_RANK", 0)), ...)``,
and so does a loop that starts ``mp.Process(target=worker, args=(rank, n))``; the loop that joins them goes. ``n`` is
the number of processes that torchrun started on this machine, also where a test of it decides whether the script starts
processes at all (``if n > 1: mp.spawn(worker, ...)``, ``else: worker(0, ...)``); another test is reported.
``os.environ["MASTER_PORT"] = ...`` and the like give way to what torchrun has set, also where several are assigned
together, come by ``os.environ.update(...)``, or are named by a value. ``os.environ["CUDA_VISIBLE_DEVICES"]
= options.gpu`` holds where it names a GPU for each of the ranks on a machine; where it names fewer, ranks take those of
the launch (``CUDA_VISIBLE_DEVICES=2,3 torchrun ...``).
Why: bmtrain's ranks are torchrun's processes, one a GPU, on any number of machines. One process runs without torchrun.
Refuses when: the result of ``mp.spawn`` is used, or its arguments are not seen; ``mp.Process`` is started in another
way: then the file stays as it is. Where the script reads ``os.environ["CUDA_VISIBLE_DEVICES"]`` again, or sets it in
another way, the line stays, and is reported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import dotted, same, walk
from rewriter.changes import (
    Change,
    Remove,
    Replace,
    ReplaceStatement,
    Template,
    Under,
    insert_before,
    insert_behind,
    replace,
    template,
    wrap,
)
from rewriter.rules.imports import imports
from rewriter.rules.one_rank import unused_name
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Refusal, Remark

_RANK = 'int(os.environ.get("LOCAL_RANK", 0))'
_COUNT = 'int(os.environ.get("LOCAL_WORLD_SIZE", 1))'
_GIVEN = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_LISTED = str(_GIVEN).replace("'", '"')
_READERS = {"get", "getenv", "pop", "putenv", "setdefault"}
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_NO_GPU = {"", "-1"}
_QUEUES = {"Queue", "SimpleQueue", "JoinableQueue", "Pipe"}
_PROCESSES = {"torch.multiprocessing.Process", "multiprocessing.Process"}


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    if b"environ" in file.source.data:
        yield from _variables(file, facts)
    if b"spawn" in file.source.data or b"Process" in file.source.data:
        for call in file.calls:
            name = facts.project.external(file, call.func)
            if name == "torch.multiprocessing.spawn":
                yield from _spawn(file, facts, call)
            elif name in _PROCESSES:
                yield from _process(file, facts, call)


def _variables(file: File, facts: Facts) -> Iterator[Finding]:
    """``os.environ["MASTER_PORT"] = "29500"`` would hide where torchrun's processes meet."""
    for node in file.nodes:
        found: tuple[Change, ...] = ()
        match node:
            case ast.Assign(targets=[ast.Subscript(value=environ, slice=name) as target], value=value):
                key = _key(file, facts, target)
                if key in _GIVEN:
                    line = template("{environ}.setdefault({name}, {value})", environ=environ, name=name, value=value)
                    found = (ReplaceStatement(node, line),)
                elif key == "" and dotted(name) and not _asks(value, environ, name) and _names_given(facts):
                    text = f"{{environ}}.get({{name}}, {{value}}) if {{name}} in {_LISTED} else {{value}}"
                    found = (replace(value, text, environ=environ, name=name, value=value),)
            case ast.Assign(targets=targets):
                found = tuple(_several(file, facts, node, [item for target in targets for item in walk(target)]))
            case ast.Call(func=ast.Attribute(value=environ, attr="update"), args=args, keywords=keywords):
                if _is_environ(facts, file, environ):
                    pairs = [(item.arg, item.value) for item in keywords if item.arg is not None]
                    found = (*_taken(environ, pairs), *(c for item in args for c in _table(file, facts, environ, item)))
            case ast.AugAssign(target=ast.Attribute() as environ, op=ast.BitOr(), value=value):
                found = tuple(_table(file, facts, environ, value)) if _is_environ(facts, file, environ) else ()
            case _:
                continue
        if found:
            message = "what torchrun says of its ranks is taken, if it says so"
            yield Conversion(RULE.code, node.lineno, message, found)
    if _VISIBLE.encode() in file.source.data:
        yield from _visible_gpus(file, facts)


def _is_environ(facts: Facts, file: File, node: ast.expr) -> bool:
    return facts.project.external(file, node) == "os.environ"


def _key(file: File, facts: Facts, target: ast.AST) -> str | None:
    """The variable that an assignment sets, empty where it is named by a value; None for anything else."""
    match target:
        case ast.Subscript(value=environ, slice=name) if _is_environ(facts, file, environ):
            return str(name.value) if isinstance(name, ast.Constant) else ""
    return None


def _several(file: File, facts: Facts, node: ast.Assign, targets: list[ast.AST]) -> Iterator[Change]:
    """``os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "localhost", "12355"``, or one value for both."""
    set_here = [item for item in targets if isinstance(item, ast.Subscript) and _key(file, facts, item) in _GIVEN]
    for number, target in enumerate(set_here):
        name = unused_name(file, number, len(set_here))
        yield Replace(target, Template(name))
        line = f"{{environ}}.setdefault({{key}}, {name})"
        yield insert_behind(node, line, environ=target.value, key=target.slice)


def _taken(environ: ast.expr, pairs: list[tuple[str, ast.expr]]) -> Iterator[Change]:
    for key, value in pairs:
        if key in _GIVEN and not _asks(value, environ, ast.Constant(key)):
            yield wrap(value, f'{{environ}}.get("{key}", {{it}})', environ=environ)


def _asks(value: ast.expr, environ: ast.expr, name: ast.expr) -> bool:
    """Whether a value is what the environment has under this name, if it has: ``os.environ.get(name, ...)``."""
    return any(
        isinstance(item, ast.Call)
        and isinstance(item.func, ast.Attribute)
        and dotted(item.func.value) == dotted(environ)
        and any(same(given, name) for given in item.args)
        for item in walk(value)
    )


def _table(file: File, facts: Facts, environ: ast.expr, table: ast.expr) -> Iterator[Change]:
    """``os.environ.update({"MASTER_PORT": "29500"})``; a table that is not seen gives way where it has these names."""
    match table:
        case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
            named = [
                (key.value, value) for key, value in zip(keys, values, strict=True) if isinstance(key, ast.Constant)
            ]
            yield from _taken(environ, [(str(key), value) for key, value in named])
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords) if all(item.arg for item in keywords):
            yield from _taken(environ, [(item.arg or "", item.value) for item in keywords])
        case _ if _names_given(facts) and not any(dotted(i) == dotted(environ) for i in walk(table)):
            text = f"{{**dict({{it}}), **{{name: {{environ}}[name] for name in {_LISTED} if name in {{environ}}}}}}"
            yield wrap(table, text, environ=environ)


def _names_given(facts: Facts) -> bool:
    """Whether one of these names is a value of the scripts, given to a function or kept in a table."""
    return any(_is_handed(file, node) for file in facts.scripts.training for node in _names(file))


def _names(file: File) -> Iterator[ast.Constant | ast.keyword]:
    for node in file.nodes if any(name.encode() in file.source.data for name in _GIVEN) else ():
        match node:
            case ast.Constant(value=str() as name) | ast.keyword(arg=str() as name) if name in _GIVEN:
                yield node


def _is_handed(file: File, node: ast.Constant | ast.keyword) -> bool:
    match file.names.parents[node]:
        case ast.Subscript() | ast.Compare():
            return False
        case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)):
            return name not in _READERS
    return True


def _visible_gpus(file: File, facts: Facts) -> Iterator[Finding]:
    """``os.environ["CUDA_VISIBLE_DEVICES"] = "0"`` would leave all ranks but the first without a GPU."""
    read = any(_reads_visible(other, facts) for other in facts.scripts.reach(file))
    for node in file.nodes:
        match node:
            case ast.Assign(targets=[ast.Subscript(value=environ, slice=ast.Constant(value=key))], value=value):
                pass
            case ast.Expr(
                value=ast.Call(
                    func=ast.Attribute(value=environ, attr="setdefault"), args=[ast.Constant(value=key), value]
                )
            ):
                pass
            case _:
                continue
        if key != _VISIBLE or facts.project.external(file, environ) != "os.environ" or _is_counted(file, node):
            continue
        named = value.value if isinstance(value, ast.Constant) else None
        if isinstance(named, str) and named.strip() in _NO_GPU:
            continue
        count, given = str(named.count(",") + 1) if isinstance(named, str) else "", file.source.code(value)
        given = ast.unparse(value) if "\n" in given else given
        if not count and _is_the_same_twice(value):
            simple = isinstance(value, (ast.Name, ast.Attribute, ast.Subscript, ast.Call, ast.JoinedStr))
            quote = "'" if '"' in given else '"'
            count = f"len({given if simple else f'({given})'}.split({quote},{quote}))"
        if read or not count or not file.source.owns_lines(node):
            message = (
                "each rank needs a GPU of its own: name as many here as there are ranks, or leave this to the launch, "
                f"{_VISIBLE}=0,1 torchrun ..."
            )
            yield Remark(RULE.code, node.lineno, message, differs=True)
            continue
        head = f'if int({file.source.code(environ)}.get("LOCAL_WORLD_SIZE", 1)) <= {count}:'
        message = "these GPUs are taken where there is one for each rank; else the launch names them"
        yield Conversion(RULE.code, node.lineno, message, (Under((node,), template(head)),))


def _is_counted(file: File, node: ast.AST) -> bool:
    """Whether a test around a statement compares with the number of ranks on a machine."""
    tests = (parent.test for parent in file.names.ancestors(node) if isinstance(parent, ast.If))
    return any(isinstance(item, ast.Constant) and item.value == "LOCAL_WORLD_SIZE" for t in tests for item in walk(t))


def _is_the_same_twice(value: ast.expr) -> bool:
    """Whether a value only names what is there: another call may choose a GPU, and another one the second time."""
    calls = (item.func for item in walk(value) if isinstance(item, ast.Call))
    return all(
        func.id in {"str", "map", "repr"}
        if isinstance(func, ast.Name)
        else isinstance(func, ast.Attribute) and func.attr in {"join", "format", "strip", "replace"}
        for func in calls
    )


def _reads_visible(file: File, facts: Facts) -> bool:
    """``len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))``, which fails where the variable is not set."""
    return any(
        isinstance(node, ast.Subscript)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.slice, ast.Constant)
        and node.slice.value == _VISIBLE
        and facts.project.external(file, node.value) == "os.environ"
        for node in (file.nodes if _VISIBLE.encode() in file.source.data else ())
    )


def _spawn(file: File, facts: Facts, call: ast.Call) -> Iterator[Finding]:
    statement = file.names.statement_of(call)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    given.update(zip(("fn", "args", "nprocs", "join"), call.args, strict=False))
    arguments = given.get("args", ast.Tuple(elts=[], ctx=ast.Load()))
    worker, count = given.get("fn"), given.get("nprocs")
    alone = isinstance(statement, ast.Expr) and statement.value is call and None not in given
    if not alone or worker is None or not isinstance(arguments, (ast.Tuple, ast.List)):
        message = "mp.spawn starts its own processes; call the function directly and start the script with torchrun"
        yield Refusal(RULE.code, call.lineno, message)
        return
    made = _call(worker, [Template(_RANK)], arguments.elts, count)
    choice = _choice(file, statement, worker)
    decides = choice is not None and count is not None and any(same(item, count) for item in walk(choice.test))
    start: ast.stmt = choice if choice is not None and decides else statement
    changes = [Replace(call, made), *_counted(file, facts, count, start, decides), *imports(file, "os")]
    if choice is not None and count is not None and decides and dotted(count) is None:
        counted = [item for item in walk(choice.test) if isinstance(item, ast.expr) and same(item, count)]
        changes += [replace(item, _COUNT) for item in counted]
    yield Conversion(RULE.code, call.lineno, "torchrun starts the processes", tuple(changes))
    if choice is not None and not decides:
        other = next(item for item in _calls(file, choice, worker) if item is not call)
        test = file.source.code(choice.test)
        message = (
            f"all ranks that come here take themselves for rank 0: see that {test} sends them to line {call.lineno}"
        )
        if not _is_told_its_rank(file, facts, other):
            yield Remark(RULE.code, other.lineno, message, differs=True)


def _is_told_its_rank(file: File, facts: Facts, call: ast.Call) -> bool:
    """``worker(rank, n)`` where ``rank = int(os.environ["RANK"])``: what the launcher says of each."""
    roles = facts.scripts.roles[file]
    variable = roles.var(call.args[0]) if call.args else None
    made = [value for other, value, _, part in roles.assignments if variable is not None and other == variable]
    return bool(made) and all(
        any(isinstance(item, ast.Constant) and item.value in {"RANK", "LOCAL_RANK"} for item in walk(value))
        for value in made
    )


def _choice(file: File, start: ast.stmt, worker: ast.expr) -> ast.If | None:
    """The test that decides between many processes and one: ``if n > 1: spawn(worker, ...) else: worker(0, ...)``."""
    for parent in file.names.ancestors(start):
        if isinstance(parent, ast.If) and any(_calls(file, parent, worker)):
            return parent
        if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)):
            break
    for before in file.names.siblings(start):
        if before is start:
            break
        if isinstance(before, ast.If) and isinstance(before.body[-1], ast.Return) and any(_calls(file, before, worker)):
            return before
    return None


def _calls(file: File, node: ast.AST, worker: ast.expr) -> Iterator[ast.Call]:
    """The direct calls of the function that processes would run."""
    for item in walk(node):
        if isinstance(item, ast.Call) and same(item.func, worker):
            yield item


def _process(file: File, facts: Facts, call: ast.Call) -> Iterator[Finding]:
    """``for rank in range(n): p = mp.Process(target=worker, args=(rank, n)); p.start(); processes.append(p)``."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    worker, arguments = given.get("target"), given.get("args")
    found = facts.project.resolve(file, worker) if worker is not None else None
    if not isinstance(found, FunctionInfo) or not _is_rank_of(facts, found):
        return
    if _works_for_another(file, facts, arguments) and not facts.scripts.steps(found.file, found.node):
        message = "every rank starts these processes, which work for it by queues: start the script as one process"
        yield Remark(RULE.code, call.lineno, message, differs=True)
        return
    loop = file.names.enclosing(call, (ast.For,))
    message = "processes are started here; call the function directly and start the script with torchrun"
    if not isinstance(loop, ast.For) or not isinstance(arguments, (ast.Tuple, ast.List)) or worker is None:
        yield Refusal(RULE.code, call.lineno, message)
        return
    match loop:
        case ast.For(target=ast.Name(id=number), iter=ast.Call(func=ast.Name(id="range"), args=[count])):
            pass
        case _:
            yield Refusal(RULE.code, call.lineno, message)
            return
    first = [i for i, item in enumerate(arguments.elts) if isinstance(item, ast.Name) and item.id == number]
    nested = [n for item in arguments.elts for n in walk(item) if isinstance(n, ast.Name) and n.id == number]
    if len(nested) != len(first) or not all(_only_starts(item, call) for item in loop.body):
        yield Refusal(RULE.code, call.lineno, message)
        return
    made = _call(worker, [], arguments.elts, count, dict.fromkeys(first, _RANK))
    joined = [Remove(item) for item in _joins(file, loop)]
    changes = (ReplaceStatement(loop, made), *joined, *_counted(file, facts, count, loop), *imports(file, "os"))
    yield Conversion(RULE.code, loop.lineno, "torchrun starts the processes", changes)


def _is_rank_of(facts: Facts, function: FunctionInfo) -> bool:
    """Whether a function trains, or joins a process group: then its processes are ranks, and no loaders of data."""
    if facts.scripts.steps(function.file, function.node):
        return True
    return any(facts.scripts.entry.needs_init(function.file, statement) for statement in function.node.body)


def _works_for_another(file: File, facts: Facts, arguments: ast.expr | None) -> bool:
    """Whether processes get queues: they take work and give results, as one alone would not."""
    made = {
        variable
        for variable, value, _, _ in facts.scripts.roles[file].assignments
        if isinstance(value, ast.Call) and (dotted(value.func) or "").split(".")[-1] in _QUEUES
    }
    given = [item for item in walk(arguments) if isinstance(item, (ast.Name, ast.Attribute))] if arguments else []
    return any(facts.scripts.roles[file].var(item) in made for item in given)


def _only_starts(statement: ast.stmt, call: ast.Call) -> bool:
    """Whether a statement of the loop makes, starts or keeps a process, and no more."""
    if isinstance(statement, ast.Assign):
        return statement.value is call
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        func = statement.value.func
        return isinstance(func, ast.Attribute) and func.attr in {"start", "append"}
    return False


def _joins(file: File, loop: ast.For) -> Iterator[ast.For]:
    """The loops behind that join the processes."""
    block = file.names.siblings(loop)
    for statement in block[block.index(loop) + 1 :]:
        match statement:
            case ast.For(body=[ast.Expr(value=ast.Call(func=ast.Attribute(attr="join"), args=[]))]):
                yield statement


def _call(
    worker: ast.expr,
    first: list[Template],
    given: list[ast.expr],
    count: ast.expr | None,
    put: dict[int, str] | None = None,
) -> Template:
    """``worker(rank, n, ...)``, where what is the number of processes is torchrun's."""
    parts, holes = [item.text for item in first], {"worker": worker}
    for number, item in enumerate(given):
        if put is not None and number in put:
            parts.append(put[number])
        elif count is not None and same(item, count):
            parts.append(_COUNT)
        else:
            parts.append(f"{{given_{number}}}")
            holes[f"given_{number}"] = item
    return template(f"{{worker}}({', '.join(parts)})", **holes)


def _counted(
    file: File, facts: Facts, count: ast.expr | None, start: ast.stmt, decides: bool = False
) -> Iterator[Change]:
    """``n = torch.cuda.device_count()`` where n is the number of processes; what a test asks is set in any case."""
    found = False
    for node in file.nodes if count is not None and dotted(count) else ():
        if isinstance(node, ast.Assign) and any(_is_same_name(target, count) for target in node.targets):
            if isinstance(node.value, ast.Call):
                if facts.project.external(file, node.value.func) == "torch.cuda.device_count":
                    found = not _under_test(file, node)
                    yield replace(node.value, _COUNT)
    if count is not None and dotted(count) and (decides or isinstance(count, ast.Attribute)) and not found:
        yield insert_before(start, f"{dotted(count)} = {_COUNT}")


def _under_test(file: File, node: ast.AST) -> bool:
    """Whether a statement runs in some cases only: ``if torch.cuda.is_available(): n = torch.cuda.device_count()``."""
    return any(isinstance(parent, (ast.If, ast.Try, ast.For, ast.While)) for parent in file.names.ancestors(node))


def _is_same_name(target: ast.expr, count: ast.expr | None) -> bool:
    return count is not None and dotted(target) is not None and dotted(target) == dotted(count)


RULE = Rule(
    code="BMT040",
    title="processes that a script starts itself are torchrun's",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import os
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def worker(rank, world_size, lr):
    os.environ["MASTER_PORT"] = "29500"
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model(torch.ones(1, 8)).mean().backward()
    optimizer.step()


if __name__ == "__main__":
    world_size = torch.cuda.device_count()
    mp.spawn(worker, args=(world_size, 0.1), nprocs=world_size, join=True)
""",
            """import os
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import bmtrain as bmt


def worker(rank, world_size, lr):
    os.environ.setdefault("MASTER_PORT", "29500")
    bmt.init_distributed()
    model = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    optim_manager = bmt.optim.OptimManager(loss_scale=None)
    optim_manager.add_optimizer(optimizer)
    optim_manager.backward(model(torch.ones(1, 8)).mean())
    optim_manager.step()


if __name__ == "__main__":
    world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    worker(int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 0.1)
""",
        ),
    ),
)
