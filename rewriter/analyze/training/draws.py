"""Random numbers that a training loop draws for the batch it has: noise, masks, time steps, permutations."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import Function, dotted, names_in, walk
from rewriter.analyze.training.across import Flow
from rewriter.analyze.training.scripts import Scripts

_LIKE = {"rand_like", "randn_like", "randint_like", "bernoulli", "poisson", "dropout"}
_SIZED = {"rand", "randn", "randint", "randperm", "normal"}
_IN_PLACE = {"normal_", "uniform_", "bernoulli_", "exponential_", "random_", "log_normal_", "cauchy_", "geometric_"}
_TORCH = ("torch.", "torch.nn.functional.")
_OF_POLICIES = {"multinomial", "gumbel_softmax"}
_OF_DISTRIBUTIONS = {"sample", "rsample", "sample_n"}
_DISTRIBUTION = re.compile(r"dist(?:ribution)?$|posterior|^q_?z", re.I)
"""What a distribution is called that is made of a batch: ``vae.encode(images).latent_dist``."""
_NUMPY_SIZED = {
    "rand", "randn", "randint", "random", "random_sample", "random_integers", "normal", "uniform", "permutation",
    "choice", "standard_normal", "binomial", "exponential", "beta", "gamma", "poisson", "laplace", "lognormal",
}  # fmt: skip
_HARMLESS = {
    "to", "cuda", "cpu", "view", "view_as", "reshape", "expand", "unsqueeze", "squeeze", "type", "type_as", "float",
    "long", "int", "half", "bool", "clone", "size", "dim", "numel", "requires_grad_", "mul", "mul_", "add", "clamp",
    "sqrt", "exp", "log", "new", "new_empty", "new_zeros", "repeat", "double", "sign", "pow", "abs", "flip", "roll",
}  # fmt: skip
_BUILT_IN = {"len", "int", "float", "max", "min", "tuple", "list", "range", "zip", "enumerate"}
_LISTING = {"append", "extend", "add"}
_GENERATORS = {"random.Random", "numpy.random.RandomState", "numpy.random.default_rng"}


def drawn_for_a_batch(file: File, scripts: Scripts) -> Iterator[ast.Call]:
    """Calls in training loops, and in functions that only these call, that draw as many numbers as a batch asks for."""
    taken = scripts.batches.of(file)
    batches = [*taken.whole, *taken.parts, *(node for node, _ in taken.left)]
    common = taken.orders | {item for batch in batches for item in walk(batch)}
    for flow in scripts.across(file).flows:
        function = flow.function if isinstance(flow.function, Function) else None
        sizes = flow.sizes | (_given_sizes(file, scripts, function) if function is not None else set())
        owner = file.names.class_of(function) if function is not None else None
        if owner is not None and scripts.classes.is_module(file.class_info(owner)):
            continue
        drawn = [
            node
            for node in flow.nodes
            if isinstance(node, ast.Call)
            and _draws(file, scripts, flow, sizes, node)
            and not flow.without_gradients(node)
            and not _is_own(file, scripts, node)
            and node not in common
        ]
        helps = function is not None and bool(drawn) and _only_trains(file, scripts, function)
        yield from (node for node in drawn if helps or in_training_loop(file, node))


def drawn_for_items(file: File, scripts: Scripts) -> Iterator[tuple[ast.Call, ast.stmt, bool]]:
    """What is drawn for each item of a batch: the call, the statement that goes through the items, by own generator.

    As in ``negatives = [random.randrange(items) for user in users]`` in a loop that trains, or in what that calls.
    """
    taken = scripts.batches.of(file)
    common = taken.orders | {item for batch in [*taken.whole, *taken.parts] for item in walk(batch)}
    for call in file.calls:
        by_generator = _is_of_generator(file, scripts, call)
        if call in common or not (by_generator or _draws_anything(file, scripts, call)) or _is_own(file, scripts, call):
            continue
        place = scripts.handed.around(file, call)
        around = list(file.names.ancestors(call))
        function = file.names.function_of(call)
        if place is not None:
            around, held = around[: around.index(place)], scripts.handed.kinds(file, place).batch
        elif function is not None and _only_trains(file, scripts, function):
            around, held = around[: around.index(function)], _given_batches(file, scripts, function)
        else:
            continue
        over = [node for node in around if _is_over_items(node, held)]
        if over:
            yield call, file.names.statement_of(over[-1]), by_generator


def _is_over_items(node: ast.AST, held: set[str]) -> bool:
    """``for user in users``, ``[... for i in range(len(users))]``; a loop that trains is over parts of a batch."""
    match node:
        case ast.For(iter=iterated) if not any(
            isinstance(item, ast.Attribute) and item.attr == "backward" for item in walk(node)
        ):
            return bool(names_in(iterated) & held)
        case (
            ast.ListComp(generators=[one, *_])
            | ast.GeneratorExp(generators=[one, *_])
            | ast.SetComp(generators=[one, *_])
        ):
            return bool(names_in(one.iter) & held)
    return False


def _draws_anything(file: File, scripts: Scripts, call: ast.Call) -> bool:
    """Whether a call draws from a stream that all ranks share."""
    if any(keyword.arg == "generator" for keyword in call.keywords):
        return False
    known = scripts.project.external(file, call.func) if dotted(call.func) else ""
    if known.startswith("random."):
        return known[7:8].islower() and known not in {"random.seed", "random.getstate", "random.setstate"}
    drawn = _LIKE - {"dropout"} | _SIZED | {"multinomial"}
    return _numpy_name(file, scripts, call) in _NUMPY_SIZED | {"shuffle"} or _torch_name(file, scripts, call) in drawn


def _is_of_generator(file: File, scripts: Scripts, call: ast.Call) -> bool:
    """``rng.randint(9)`` of ``rng = np.random.RandomState(0)``, or ``torch.rand(3, generator=g)``."""
    if any(keyword.arg == "generator" for keyword in call.keywords):
        return bool(_torch_name(file, scripts, call))
    if not isinstance(call.func, ast.Attribute) or not isinstance(call.func.value, (ast.Name, ast.Attribute)):
        return False
    roles = scripts.roles[file]
    variable = roles.var(call.func.value)
    made = [value for held, value, _, part in roles.assignments if held == variable and not part]
    return any(
        isinstance(value, ast.Call) and scripts.project.external(file, value.func) in _GENERATORS for value in made
    )


def _given_batches(file: File, scripts: Scripts, function: Function) -> set[str]:
    """The parameters for which every call that trains gives a batch, or a part of one."""
    found = set()
    for argument in (*function.args.args, *function.args.kwonlyargs):
        given = [
            g for g in scripts.collectives.instances.given(file, function, argument.arg) if g[0] in scripts.training
        ]
        places = [(other, scripts.handed.around(other, value), value) for other, value in given]
        if places and all(
            place is not None and scripts.handed.kinds(other, place).of_batch(value) for other, place, value in places
        ):
            found.add(argument.arg)
    return found


def acts_by_draws(file: File, scripts: Scripts) -> bool:
    """Whether a program acts in an environment, on all ranks alike, by what the forward of a model draws."""
    files = scripts.reach(file) & scripts.training
    if scripts.shares_data(file) or any(map(scripts.is_parallel, files)):
        return False
    return any(map(_steps_environment, files)) and any(_draws_in_forward(other, scripts) for other in files)


def _steps_environment(file: File) -> bool:
    """``state, reward, done, info = env.step(action)``."""
    if b".step(" not in file.source.data:
        return False
    return any(
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and len(node.targets[0].elts) > 2
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr == "step"
        and bool(node.value.args)
        for node in file.nodes
    )


def _draws_in_forward(file: File, scripts: Scripts) -> bool:
    """Whether a model has layers that draw, or draws in its forward, or in methods that this calls."""
    for cls in scripts.classes.all(file):
        if not scripts.classes.is_module(cls):
            continue
        calls = [item for item in walk(cls.node) if isinstance(item, ast.Call)]
        if any(scripts.project.external(file, call.func).startswith("torch.nn.Dropout") for call in calls):
            return True
        names, waiting = set[str](), ["forward"]
        while waiting:
            name = waiting.pop()
            method = scripts.classes.method(cls, name)
            if name in names or method is None:
                continue
            names.add(name)
            for call in (item for item in walk(method[1]) if isinstance(item, ast.Call)):
                func = call.func
                if _torch_name(method[0].file, scripts, call) in _LIKE | _SIZED | _OF_POLICIES:
                    return True
                if isinstance(func, ast.Attribute):
                    if func.attr in _IN_PLACE | _OF_DISTRIBUTIONS:
                        return True
                    waiting += [func.attr] if dotted(func.value) == "self" else []
    return False


def is_plain(file: File, scripts: Scripts, statement: ast.stmt) -> bool:
    """Whether a statement only computes with tensors, so that it runs no model and no collective."""
    if isinstance(statement, (ast.For, ast.While, ast.If)):
        inner = [*statement.body, *statement.orelse]
        head = statement.iter if isinstance(statement, ast.For) else statement.test
        calls = (call for call in walk(head) if isinstance(call, ast.Call))
        return all(_is_harmless(file, scripts, call) for call in calls) and all(
            isinstance(item, ast.Pass | ast.Break | ast.Continue) or is_plain(file, scripts, item) for item in inner
        )
    if isinstance(statement, ast.Expr):
        call = statement.value
        listed = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in _LISTING
        return listed and all(
            _is_harmless(file, scripts, c) for c in walk(call) if isinstance(c, ast.Call) and c is not call
        )
    if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return)):
        return False
    return all(_is_harmless(file, scripts, call) for call in walk(statement) if isinstance(call, ast.Call))


def in_training_loop(file: File, node: ast.AST) -> bool:
    """Whether a loop around a node also runs a backward."""
    return any(
        isinstance(item, ast.Attribute) and item.attr == "backward"
        for loop in file.names.ancestors(node)
        if isinstance(loop, (ast.For, ast.While))
        for item in walk(loop)
    )


def _draws(file: File, scripts: Scripts, flow: Flow, sizes: set[str], call: ast.Call) -> bool:
    if any(keyword.arg == "generator" for keyword in call.keywords):
        return False
    name, where = _torch_name(file, scripts, call), call.func
    given = [*call.args, *(k.value for k in call.keywords if k.arg in {"size", "input"})]
    if _numpy_name(file, scripts, call) in _NUMPY_SIZED:
        return any(_counts(flow, sizes, item) for item in given)
    if name in _LIKE:
        return bool(given) and _is_of_batch(flow, given[0])
    if name in _SIZED:
        return any(_counts(flow, sizes, item) for item in given)
    if isinstance(where, ast.Attribute) and where.attr in _IN_PLACE and isinstance(where.value, ast.Call):
        inner = where.value
        asked = [*inner.args, *([inner.func.value] if isinstance(inner.func, ast.Attribute) else [])]
        return any(_counts(flow, sizes, item) or _is_of_batch(flow, item) for item in asked)
    if isinstance(where, ast.Attribute) and where.attr in _OF_DISTRIBUTIONS:
        named = where.value.attr if isinstance(where.value, ast.Attribute) else dotted(where.value) or ""
        return bool(_DISTRIBUTION.search(named)) and _is_of_batch(flow, where.value)
    return False


def _counts(flow: Flow, sizes: set[str], size: ast.expr) -> bool:
    """``len(x)``, ``x.shape[0]``, ``x.shape``, ``(x.size(0), 1)`` of a batch ``x``, or a name for one of these."""
    for item in walk(size):
        match item:
            case ast.Attribute(value=value, attr="shape" | "size") if _is_of_batch(flow, value):
                return True
            case ast.Call(func=ast.Name(id="len"), args=[value]) if _is_of_batch(flow, value):
                return True
            case ast.Name(id=name) if name in sizes:
                return True
    return False


def _is_of_batch(flow: Flow, node: ast.expr) -> bool:
    """Whether a value is made of what a loop over data gives; parameters and gradients are no batch."""
    names = [item for item in walk(node) if isinstance(item, (ast.Name, ast.Attribute))]
    words = {item.id if isinstance(item, ast.Name) else item.attr for item in names}
    return flow.is_batch(node) and not words & ({"grad", "data", "weight", "parameters"} | flow.parameters)


def _only_trains(file: File, scripts: Scripts, function: Function) -> bool:
    """Whether every call of a function in code that trains stands in a loop that trains."""
    calls = [c for c in scripts.collectives.instances.calls(file, function) if c[0] in scripts.training]
    return bool(calls) and all(in_training_loop(other, call) for other, call in calls)


def _given_sizes(file: File, scripts: Scripts, function: Function) -> set[str]:
    """The parameters for which every call gives the number of items of a batch."""
    found = set()
    for argument in (*function.args.args, *function.args.kwonlyargs):
        given = [
            g for g in scripts.collectives.instances.given(file, function, argument.arg) if g[0] in scripts.training
        ]
        if given and all(_counts_there(other, scripts, value) for other, value in given):
            found.add(argument.arg)
    return found


def _counts_there(file: File, scripts: Scripts, value: ast.expr) -> bool:
    around = file.names.function_of(value) or file.tree
    return any(flow.function is around and _counts(flow, flow.sizes, value) for flow in scripts.across(file).flows)


def _is_own(file: File, scripts: Scripts, node: ast.AST) -> bool:
    """Whether ``with bmt.own_random():`` stands around it, or it is a batch that is shared out."""
    for parent in file.names.ancestors(node):
        wanted = [item.context_expr for item in parent.items] if isinstance(parent, ast.With) else [parent]
        for expression in wanted:
            if isinstance(expression, ast.Call):
                known = scripts.project.external(file, expression.func)
                if known in {"bmtrain.own_random", "bmtrain.shard_batch"}:
                    return True
    return False


def _is_harmless(file: File, scripts: Scripts, call: ast.Call) -> bool:
    if _torch_name(file, scripts, call) or (isinstance(call.func, ast.Name) and call.func.id in _BUILT_IN):
        return True
    if _numpy_name(file, scripts, call) or _is_tensor_type(file, scripts, call.func):
        return True
    if dotted(call.func) and scripts.project.external(file, call.func).startswith("random."):
        return True
    return isinstance(call.func, ast.Attribute) and call.func.attr in (_HARMLESS | _IN_PLACE)


def _torch_name(file: File, scripts: Scripts, call: ast.Call) -> str:
    """``randn`` for ``torch.randn``; empty for what is not torch's."""
    known = scripts.project.external(file, call.func) if dotted(call.func) else None
    head, _, name = (known or "").rpartition(".")
    return name if head + "." in _TORCH else ""


def _numpy_name(file: File, scripts: Scripts, call: ast.Call) -> str:
    """``normal`` for ``numpy.random.normal``; empty for what numpy's global generator does not draw."""
    known = scripts.project.external(file, call.func) if dotted(call.func) else ""
    return known.removeprefix("numpy.random.") if known.startswith("numpy.random.") else ""


def _is_tensor_type(file: File, scripts: Scripts, node: ast.expr) -> bool:
    """``torch.FloatTensor``, ``Variable``, or ``Tensor = torch.cuda.FloatTensor if cuda else torch.FloatTensor``."""
    known = scripts.project.external(file, node)
    if known:
        return known.startswith("torch.") and known.endswith(("Tensor", "Variable"))
    if not isinstance(node, ast.Name):
        return False
    found = file.names.lookup(node.id, file.names.scope_of(node))
    made = [file.names.parents.get(binding.node) for binding in found[1]] if found else []
    values = [statement.value for statement in made if isinstance(statement, ast.Assign)]
    chosen = [choice for v in values for choice in ((v.body, v.orelse) if isinstance(v, ast.IfExp) else (v,))]
    return bool(chosen) and all(
        isinstance(choice, ast.Attribute) and _is_tensor_type(file, scripts, choice) for choice in chosen
    )
