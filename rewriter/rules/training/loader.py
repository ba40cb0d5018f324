"""Every rank takes its share of each batch of the training data.

What: ``DataLoader(...)`` whose batches are trained on becomes ``bmt.shard_loader(DataLoader(...))``.
Why: together the ranks see the batches of the unconverted script, in the same order.
A function that makes the loaders of training and evaluation shares out the former: ``if part == "train"``; where it is
not seen what it is given, the usual words of evaluation stay whole.
Refuses when: the loader has a DistributedSampler, or one of the project's that knows the ranks, which shares out the
data already; its batches are not trained on: every rank then evaluates all of them, and sums and counts made from them
are the unconverted script's. A loop that trains on parts of each batch, of which a share has fewer, is reported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import ClassInfo, File, FunctionInfo, ModuleRef
from rewriter.analyze.read.nodes import Function, dotted, names_in, walk
from rewriter.analyze.training.feeds import Feed
from rewriter.changes import Template, replace, template
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark

_EVALUATION = re.compile(r"val|test|eval|dev|infer|pred", re.I)

_EVALUATION_WORD = re.compile(
    r"^(?:val|valid|validate|validation|test|testing|eval|evaluate|evaluation|dev|infer|inference|pred|predict)(?:\d|_|$)",
    re.I,
)
_USUAL = ("dev", "eval", "test", "val", "valid", "validation")
"""Words of evaluation that a value may be which is not seen."""
_UNSEEN = object()
_EVALUATES = re.compile(r"^_?(?:predict|evaluate|validate|infer|test)(?:_|$)")
_HANDED_ON = 4
_AS_MANY = {"chunk", "tensor_split", "array_split", "keys", "values", "items"}
"""What makes as many parts of a share as of a batch."""
_TRAINS = re.compile(r"^(?:self\.|args\.|cfg\.)?(?:is_?)?train(?:ing)?$|^\w+ == ['\"]train(?:ing)?['\"]$")


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training or facts.scripts.started:
        return
    yield from _in_parts(file, facts)
    if b"oader" not in file.source.data:
        return
    if not facts.scripts.feeds_training(file):
        return
    for node in file.calls:
        if not facts.scripts.is_loader(file, node):
            continue
        parent = file.names.parents[node]
        if isinstance(parent, ast.Call) and facts.project.external(file, parent.func) == "bmtrain.shard_loader":
            continue
        if facts.scripts.has_shares(file, node):
            continue
        feed = facts.scripts.feeds.of(file, node)
        if _is_evaluated(file, facts, node, feed):
            message = "every rank evaluates all of this data, with the same result"
            yield Remark(RULE.code, node.lineno, message)
            continue
        if _is_other_case(file, facts, node):
            continue
        case = _case(file, node) or _case_of_argument(file, facts, node)
        if case is None and feed.trained and feed.read:
            case = _case_of_calls(file, facts, node)
        code = "{bmt}.shard_loader({loader})"
        if case is not None:
            code += f" if {case.text} else {{loader}}"
        elif feed.trained and feed.read:
            message = "this data is gone through without training as well: every rank sees its share of it there"
            yield Remark(RULE.code, node.lineno, message, differs=True)
        change = replace(node, code, loader=node, **dict(case.holes if case is not None else ()))
        yield Conversion(RULE.code, node.lineno, "every rank takes its share of each batch", (change,))


def _in_parts(file: File, facts: Facts) -> Iterator[Finding]:
    """Loops that train on parts of a batch one after the other: a share has fewer, so that there are fewer steps."""
    for loop in file.nodes:
        if not isinstance(loop, ast.For) or facts.scripts.is_fed(loop) or not facts.scripts.over_shares(file, loop):
            continue
        if _goes_through_parts(file, loop) and facts.scripts.feeds.trains(file, loop):
            parts = f"this trains on parts of a batch, {file.source.code(loop.iter)}, of which a rank's share has fewer"
            message = f"{parts}: make each smaller, by bmt.world_size(), instead"
            yield Remark(RULE.code, loop.lineno, message, differs=True)


def _goes_through_parts(file: File, loop: ast.For) -> bool:
    """Whether a loop goes through parts of what a loop around it has in hand, of which there may be fewer."""
    if any(isinstance(n, ast.Attribute) and n.attr in _AS_MANY for n in walk(loop.iter)):
        return False
    for around in file.names.ancestors(loop):
        if isinstance(around, Function):
            return False
        if isinstance(around, ast.For):
            held = names_in(around.target)
            for node in (node for statement in around.body for node in walk(statement)):
                if isinstance(node, ast.Assign) and node.lineno < loop.lineno and names_in(node.value) & held:
                    held |= {name for target in node.targets for name in names_in(target)}
            return bool(names_in(loop.iter) & held)
    return False


def _case(file: File, node: ast.Call) -> Template | None:
    """When a loader trains, if not always.

    ``x == "train"`` for ``{x: DataLoader(...) for x in ["train", "val"]}``; ``train`` for ``shuffle=train``.
    """
    shuffled = next((k.value for k in node.keywords if k.arg == "shuffle"), None)
    if isinstance(shuffled, (ast.Name, ast.Attribute, ast.Compare)) and _TRAINS.search(ast.unparse(shuffled)):
        return template("{train}", train=shuffled)
    parent = file.names.parents[node]
    match parent:
        case ast.DictComp(key=ast.Name(id=name), generators=[ast.comprehension(target=ast.Name(id=bound), iter=over)]):
            if bound != name or not isinstance(over, (ast.List, ast.Tuple, ast.Set)):
                return None
            keys = {item: item.value for item in over.elts if isinstance(item, ast.Constant)}
            words = {item: key for item, key in keys.items() if isinstance(key, str)}
            trained = [i for i, key in words.items() if re.search("train", key, re.I) or not _EVALUATION.search(key)]
            if len(words) < len(over.elts) or len(trained) in {0, len(words)}:
                return None
            holes = {f"train_{number}": item for number, item in enumerate(trained)}
            listed = ", ".join(f"{{{hole}}}" for hole in holes)
            return template(f"{name} == {listed}" if len(holes) == 1 else f"{name} in ({listed})", **holes)
    return None


def _case_of_argument(file: File, facts: Facts, node: ast.Call) -> Template | None:
    """``part == "train"`` where a function makes the loaders of training and evaluation, told apart by an argument."""
    function = file.names.function_of(node)
    if function is None:
        return None
    for name in _kept_parameters(function):
        words, tested = _words(function, name)
        values = list(_values_given(file, facts, function, name, 0))
        for value in values:
            tested = tested or isinstance(value, bool)
            words |= {value} if isinstance(value, str) else set()
        evaluated = sorted(word for word in words if _EVALUATION_WORD.match(word))
        trained = sorted(words - set(evaluated))
        if trained and (evaluated or any(re.match("train", word, re.I) for word in trained)):
            return template(f"{name} == {trained[0]!r}" if len(trained) == 1 else f"{name} in {tuple(trained)!r}")
        if evaluated:
            if _UNSEEN in values:
                evaluated = sorted({*evaluated, *_USUAL})
            several = f"{name} not in {tuple(evaluated)!r}"
            return template(f"{name} != {evaluated[0]!r}" if len(evaluated) == 1 else several)
        if tested and not words and _TRAINS.match(name):
            return template(name)
        if tested and not words and _EVALUATION_WORD.match(re.sub("^(?:is|for|do)_", "", name)):
            return template(f"not {name}")
    return None


def _case_of_calls(file: File, facts: Facts, node: ast.Call) -> Template | None:
    """``shuffle`` where a function is called with True for what is trained on, and with False for all else."""
    function = file.names.function_of(node)
    if function is None:
        return None
    feeds = facts.scripts.feeds
    calls = [(other, call, feeds.of(other, place)) for other, place, call in _calls_of(file, facts, function)]
    if any(feed.trained == feed.only_read for *_, feed in calls):
        return None
    for name in _kept_parameters(function):
        values = {
            (feed.trained, *_constants(other, facts, _value_given(function, call, name))) for other, call, feed in calls
        }
        if values == {(True, True), (False, False)}:
            return template(name)
        if values == {(True, False), (False, True)}:
            return template(f"not {name}")
    return None


def _kept_parameters(function: Function) -> list[str]:
    """Names of parameters that hold in the whole function what they were given."""
    stored = {item.id for item in walk(function) if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store)}
    return [name for name in _parameters(function.args) if name not in stored]


def _parameters(given: ast.arguments) -> list[str]:
    return [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]


def _value_given(function: Function, call: ast.Call, name: str) -> ast.expr | None:
    return _given(call, _parameters(function.args), name) or _default(function.args, name)


def _values_given(file: File, facts: Facts, function: Function, name: str, deep: int) -> Iterator[object]:
    """The constants that calls give for a parameter, also through functions that hand theirs on."""
    for other, place, call in _calls_of(file, facts, function):
        value = _value_given(function, call, name)
        known = list(_constants(other, facts, value)) or _looped_over(other, facts, place, value)
        yield from known
        if not known and isinstance(value, ast.Name) and deep < _HANDED_ON:
            around = other.names.function_of(place)
            if around is not None and value.id in {a.arg for a in walk(around.args) if isinstance(a, ast.arg)}:
                known = list(_values_given(other, facts, around, value.id, deep + 1))
            else:
                known = list(_given_to_lambda(other, facts, place, value.id))
            yield from known
        if not known:
            yield _UNSEEN


def _constants(file: File, facts: Facts, value: ast.expr | None) -> Iterator[object]:
    """The constants that a value is: one that is written out, or that a name holds, here or in another file."""
    for made in _made(file, facts, value):
        if isinstance(made, ast.Constant):
            yield made.value


def _made(file: File, facts: Facts, value: ast.expr | None) -> list[ast.expr]:
    """What a name is given, wherever that is; a value that is no name is itself."""
    if not isinstance(value, (ast.Name, ast.Attribute)):
        return [] if value is None else [value]
    variable = facts.scripts.roles[file].var(value)
    held = [
        made
        for other, whole, statement, part in facts.scripts.roles[file].assignments
        if other == variable
        for made in ([whole] if not part else _part_of(statement, variable[1] if variable else ""))
    ]
    if held:
        return held
    if isinstance(value, ast.Attribute):
        found = facts.project.resolve(file, value.value)
        if isinstance(found, ClassInfo):
            return _bound(found.node.body, value.attr)
        return _bound(found.file.tree.body, value.attr) if isinstance(found, ModuleRef) else []
    for node in file.nodes:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == value.id:
                    module = facts.project.find_module(node.module or "", file, node.level)
                    return _bound(module.tree.body, alias.name) if module is not None else []
    return []


def _bound(body: list[ast.stmt], name: str) -> list[ast.expr]:
    """What statements give a name."""
    return [
        made
        for statement in body
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None
        for made in _part_of(statement, name)
    ]


def _part_of(statement: ast.stmt, name: str) -> list[ast.expr]:
    """What ``a, b = 1, 2`` gives one of the names."""
    found: list[ast.expr] = []
    if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
        for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
            targets, values = _flat(target), _flat(statement.value)
            if len(targets) == 1:
                values = [statement.value]
            pairs = zip(targets, values, strict=True) if len(targets) == len(values) else ()
            found += [value for one, value in pairs if dotted(one) == name]
    return found


def _given_to_lambda(file: File, facts: Facts, call: ast.Call, name: str) -> Iterator[object]:
    """The constants that ``get = lambda part: make(part)`` is called with."""
    for parent in file.names.ancestors(call):
        if isinstance(parent, ast.Lambda):
            parameters = _parameters(parent.args)
            if name in parameters:
                for use in _calls_of_held(file, facts, parent):
                    yield from _constants(file, facts, _given(use, parameters, name) or _default(parent.args, name))
                return


def _calls_of_held(file: File, facts: Facts, value: ast.expr) -> Iterator[ast.Call]:
    """The calls of the name that holds a value."""
    roles = facts.scripts.roles[file]
    held = {variable for variable, made, _, part in roles.assignments if made is value and not part}
    yield from (call for call in file.calls if held and roles.var(call.func) in held)


def _default(given: ast.arguments, name: str) -> ast.expr | None:
    """What a parameter is where a call gives nothing for it."""
    positional = [*given.posonlyargs, *given.args]
    pairs = [*zip(reversed(positional), reversed(given.defaults), strict=False)]
    named = [(a, d) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True) if d is not None]
    return next((default for argument, default in [*pairs, *named] if argument.arg == name), None)


def _looped_over(file: File, facts: Facts, call: ast.Call, value: ast.expr | None) -> list[object]:
    """The constants that a name stands for one after the other: ``{x: make(x) for x in ["train", "val"]}``."""
    for parent in file.names.ancestors(call) if isinstance(value, ast.Name) else ():
        rounds = [parent] if isinstance(parent, ast.For) else getattr(parent, "generators", [])
        for item in rounds:
            for listed in _made(file, facts, item.iter):
                match listed:
                    case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
                        if isinstance(value, ast.Name) and dotted(item.target) == value.id:
                            return [constant for part in parts for constant in _constants(file, facts, part)]
    return []


def _words(function: Function, name: str) -> tuple[set[str], bool]:
    """The words that a function compares an argument with, and whether it tests the argument itself."""
    words: set[str] = set()
    tested = False
    for item in walk(function):
        if isinstance(item, ast.Compare) and isinstance(item.left, ast.Name) and item.left.id == name:
            words |= {c.value for c in walk(item) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
        elif isinstance(item, (ast.If, ast.IfExp)):
            test = item.test.operand if isinstance(item.test, ast.UnaryOp) else item.test
            tested = tested or (isinstance(test, ast.Name) and test.id == name)
    return words, tested


def _calls_of(file: File, facts: Facts, function: Function) -> Iterator[tuple[File, ast.Call, ast.Call]]:
    """The calls of a function, also by another name: where each stands, and the call with what a ``partial`` adds."""
    for other in facts.project:
        for call in other.calls if other.mentions(function.name) else ():
            found = facts.project.resolve(other, call.func)
            named = (dotted(call.func) or "").split(".")[-1] == function.name
            method = named and isinstance(call.func, ast.Attribute) and other is file
            if method or (isinstance(found, FunctionInfo) and found.node is function):
                yield other, call, call
            elif call.args and facts.project.external(other, call.func) == "functools.partial":
                bound = facts.project.resolve(other, call.args[0])
                if isinstance(bound, FunctionInfo) and bound.node is function:
                    for use in _calls_of_held(other, facts, call):
                        keywords = [*use.keywords, *call.keywords]
                        yield other, use, ast.Call(use.func, [*call.args[1:], *use.args], keywords)


def _given(call: ast.Call, parameters: list[str], name: str) -> ast.expr | None:
    """What a call gives for a parameter."""
    named = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
    skipped = 1 if parameters[0] in {"self", "cls"} else 0
    index = parameters.index(name) - skipped
    return named if named is not None or not 0 <= index < len(call.args) else call.args[index]


def _is_other_case(file: File, facts: Facts, node: ast.Call) -> bool:
    """Whether a loader is the second half of ``bmt.shard_loader(DataLoader(...)) if x == "train" else ...``."""
    parent = file.names.parents[node]
    return (
        isinstance(parent, ast.IfExp)
        and parent.orelse is node
        and isinstance(parent.body, ast.Call)
        and facts.project.external(file, parent.body.func) == "bmtrain.shard_loader"
    )


def _around(file: File, node: ast.expr) -> Iterator[ast.AST]:
    """What stands around an expression in its statement."""
    for parent in file.names.ancestors(node):
        if isinstance(parent, ast.stmt):
            return
        yield parent


def _is_evaluated(file: File, facts: Facts, node: ast.Call, feed: Feed) -> bool:
    """Whether a loader's batches are only evaluated: by what the loops over them do, else by its names."""
    if feed.trained:
        made = (ast.ListComp, ast.GeneratorExp, ast.Lambda)
        several = feed.read and any(isinstance(parent, made) for parent in _around(file, node))
        return not feed.direct and not several and _for_evaluation(file, facts, node)
    if feed.only_read:
        return True
    if _for_evaluation(file, facts, node):
        return True
    words = [name for name in feed.names if not re.search(r"train", name, re.I)]
    return len(words) == len(feed.names) and any(_EVALUATION_WORD.match(name.lstrip("_")) for name in words)


def _for_evaluation(file: File, facts: Facts, node: ast.Call) -> bool:
    """Whether a loader's batches are only evaluated, by its name or its function's."""
    statement = file.names.statement_of(node)
    names: list[str] = []
    if isinstance(statement, ast.Assign):
        targets = [t for target in statement.targets for t in _flat(target)]
        values = _flat(statement.value)
        if len(values) == len(targets) and node in values:
            targets = [targets[values.index(node)]]
        names += [(dotted(target) or "").split(".")[-1] for target in targets]
    function = file.names.function_of(node)
    yielded = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Yield)
    if function is not None and (isinstance(statement, ast.Return) or yielded or _EVALUATES.match(function.name)):
        names.append(function.name)
    parent = file.names.parents[node]
    if isinstance(parent, ast.keyword):
        names.append(parent.arg or "")
    elif isinstance(parent, ast.Dict):
        key = next((k for k, value in zip(parent.keys, parent.values, strict=True) if value is node), None)
        names.append(str(getattr(key, "value", "")))
    elif isinstance(parent, ast.Call) and node in parent.args:
        names += _parameter(file, facts, parent, parent.args.index(node))
    return any(_EVALUATION.search(name) and not re.search(r"train", name, re.I) for name in names)


def _parameter(file: File, facts: Facts, call: ast.Call, index: int) -> list[str]:
    """What a function or class of the project calls its argument."""
    found = facts.project.resolve(file, call.func)
    function = found.node if isinstance(found, FunctionInfo) else None
    if isinstance(found, ClassInfo):
        method = facts.classes.method(found, "__init__")
        function, index = (method[1] if method is not None else None), index + 1
    if function is None:
        return []
    given = [*function.args.posonlyargs, *function.args.args]
    return [given[index].arg] if index < len(given) else []


def _flat(node: ast.expr) -> list[ast.expr]:
    return list(node.elts) if isinstance(node, (ast.Tuple, ast.List)) else [node]


RULE = Rule(
    code="BMT024",
    title="every rank takes its share of each batch",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
from torch.utils.data import DataLoader

model = torch.nn.Linear(8, 1)
train_loader = DataLoader(train_set, batch_size=8, shuffle=True)
test_loader = DataLoader(test_set, batch_size=8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for x in train_loader:
    model(x).mean().backward()
    optimizer.step()
""",
            """import torch
from torch.utils.data import DataLoader
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 1))
train_loader = bmt.shard_loader(DataLoader(train_set, batch_size=8, shuffle=True))
test_loader = DataLoader(test_set, batch_size=8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(optimizer)
for x in train_loader:
    optim_manager.backward(model(x).mean())
    optim_manager.step()
""",
        ),
    ),
)
