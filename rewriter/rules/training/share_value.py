"""What a loop makes of a rank's share of a batch becomes the whole batch's.

What: in a loop over training data, sums that are added up (``correct += (out == y).sum().item()``, ``seen += len(x)``,
``total += loss.item() * x.size(0)``, ``counts += F.one_hot(y, 9).sum(0)``) and shown (``print(step * len(x))``) are
``bmt.total(...)``; means that are shown, collected or handed to a meter are ``bmt.sum_loss(...)``, the mean over the
ranks; samples' values that are collected (``predictions.extend(out.argmax(1).tolist())``,
``all = torch.cat([all, y])``) are ``bmt.gather_samples(...)``, in the order of the batch. Where the loop may also go
through data that no rank shares, it names the loader: ``bmt.total(len(x), of=loaders[part])``.
Of ``a.sum() / b.sum()`` both are totals. What is made of the batch's first items alone (``out[0].sum()``) is rank 0's.
What an object of the project adds up or lists (``metric(out.argmax(1), y)``, ``counter.count(hits, len(y))``) is made
the batch's where it is given, if its class is seen and nothing that it is given is unclear.
Why: every rank sees its share of each batch, so such a sum or list is this rank's part of the unconverted script's.
A size of a share that is kept in a list, a table or a dict (``history.append({"seen": len(x)})``) is reported; so is a
number of it that a function which trains gives back (``return {"part": part.item()}``), one that a function shows to
which the loop hands its outputs (``show(out, y)``), a number that is read out of a batch which an object keeps
(``self.out.mean().item()``), and a tensor of the loader's batch size that is made in front of the loop.
Refuses when: it is not seen whether a value is a sum or a mean, or what the loop goes through; it is made of some items
(``out[:4]``, ``out[-1]``), is a mean of what a mask leaves, or is made of a spread or an extreme of the batch; values
are put at places of the batch (``matrix[y, p] += 1``, ``scores[index] = out``, sets and tables by item); what the last
batch has left in a name is used behind the loop, and is no tensor of the batch itself, which is collected there
(``x = bmt.gather_samples(x)``): then the line is reported, as are functions of the project that are handed the
training loader, and tests of such counts above calls that all ranks must make.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import ClassInfo, File, FunctionInfo
from rewriter.analyze.read.nodes import dotted, is_backward, item_of, names_in, read_out, walk, walk_own
from rewriter.analyze.training.readings import viewed
from rewriter.analyze.training.roles import Roles, Var, gone_through
from rewriter.analyze.training.shares import Kinds, Share
from rewriter.changes import insert_behind
from rewriter.rules.of_shares import made_whole
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark

_OVER_ALL = re.compile(r"reduce|gather|sync|across|over_ranks", re.I)
_NUMBER_OF_RANKS = re.compile(r"world_?size$|^num_(?:ranks|replicas|processes)$", re.I)
_DEEP = 3
_LOADER = re.compile(r"^train(?:ing)?_?(?:data_?)?(?:loader|dl|dataloader|iter|iterator)$", re.I)
_COUNTS = {"size", "numel", "nelement", "__len__"}
_OVER_RANKS = {"bmtrain.gather_result", "bmtrain.sum_loss", "bmtrain.mean", "bmtrain.distributed.all_reduce"}
_MESSAGES = {
    "total": "what ranks count is added up",
    "mean": "a mean over a share of the batch is averaged over the ranks",
    "samples": "what ranks have of their samples is collected from all",
}
_BATCH_SIZE = re.compile(r"^(?:batch_?size|bsz|n_?batch)$", re.I)
_SHAPED = {"reshape", "view", "expand", "ones", "zeros", "full", "empty", "repeat", "eye", "arange", "init_hidden"}
_DRAWN = {"rand", "randn", "randint", "normal", "uniform"}
_HOOKS = {"register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"}
_KEEPING = {"append", "__setitem__", "setdefault", "update", "add", "extend", "put"}
_PLACES = (ast.Name, ast.Attribute)
_SCALELESS = {"sign", "sign_", "zero_", "shape", "size", "device", "dtype"}
_OF_WEIGHTS = {"parameters", "named_parameters", "buffers", "named_buffers"}
_VALUES = {"item", "tolist", "numpy"}
_OF_NUMBERS = {
    "torch.tensor", "torch.as_tensor", "torch.zeros", "torch.ones", "torch.rand", "torch.randn", "float", "int", "min",
    "max", "abs", "round", "sum", "torch.sigmoid", "torch.exp", "torch.cos", "torch.stack", "torch.cat", "torch.mean",
}  # fmt: skip
_NAMED = (ast.Name, ast.Tuple, ast.List)
_COMPREHENSIONS = (ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)


class _Told:
    """The values of which something is said or done; what stands in one, or around one, needs no more.

    It goes by value, not by line: of ``print(len(x), out.norm().item())`` the first is made whole, the other is not.
    """

    def __init__(self, file: File) -> None:
        self._file, self._values = file, set[ast.AST]()

    def add(self, value: ast.AST) -> None:
        self._values.add(value)

    def __contains__(self, value: ast.AST) -> bool:
        return not self._values.isdisjoint((*ast.walk(value), *self._file.names.ancestors(value)))


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training or facts.scripts.started:
        return
    if facts.scripts.is_parallel(file):
        yield from _shown_of_shares(file, facts, _Told(file))
        return
    if b"backward" in file.source.data and not facts.scripts.shares_data(file):
        return
    made = facts.scripts.collectives.shares(file)
    losses = facts.scripts.collectives.readings(file)
    told = _Told(file)
    yield from _divided_losses(file, facts, told)
    whole = _collected(file, facts, [value for value, share in made.items() if share.kind == "samples"])
    whole |= _listed(file, facts, {*made, *losses}, whole)
    averaged = facts.scripts.collectives.made_of_averaged(file)
    whole |= {variable for variable, value, *_ in facts.scripts.roles[file].assignments if value in averaged}
    yield from _gradients_of_inputs(file, facts, told)
    for value, share in made.items():
        if facts.left_behind.is_whole(file, value) or value in told:
            continue
        if not facts.scripts.in_kept_guard(file, value) and file.source.is_exact(value):
            told.add(value)
            yield Conversion(RULE.code, value.lineno, _MESSAGES[share.kind], (made_whole(value, share),))
    yield from _left_behind(file, facts, told)
    counted: set[Var] = set()
    for value in facts.scripts.collectives.unclear(file):
        parts = value.elts if isinstance(value, ast.List) else [value]
        if parts and all(part in losses for part in parts):
            continue
        if facts.left_behind.is_whole(file, value):
            continue
        statement = file.names.statement_of(value)
        if isinstance(statement, ast.AugAssign):
            variable = facts.scripts.roles[file].var(statement.target)
            counted |= {variable} if variable is not None else set()
        if value not in told:
            told.add(value)
            told_of = value
            if isinstance(statement, ast.AugAssign) and isinstance(value, ast.Constant):
                told_of = statement.target  # what counts by 1
            seen = f"{file.source.code(told_of)} may be of this rank's share of the data"
            message = f"{seen}: see bmt.total, bmt.sum_loss, bmt.gather_samples"
            yield Remark(RULE.code, value.lineno, message, differs=True)
    for node in file.nodes:
        if isinstance(node, ast.For) and _trains(facts, file, node):
            kinds = facts.scripts.handed.kinds(file, node) if node in facts.scripts.handed.of(file) else None
            for item in _own(file, facts, node):
                message = ""
                if kinds is not None and isinstance(item, (ast.AugAssign, ast.Call)) and _is_of_first(kinds, item):
                    continue
                if (
                    isinstance(item, ast.AugAssign)
                    and isinstance(item.op, ast.Add)
                    and _of_share(file, facts, node, item)
                ):
                    message = f"{file.source.code(item.target)} adds up this rank's share of the data only"
                    if item not in told and (v := facts.scripts.roles[file].var(item.target)) is not None:
                        counted.add(v)
                elif (
                    isinstance(item, ast.Call)
                    and item not in losses
                    and not facts.left_behind.is_whole(file, item)
                    and not _is_made_of_averaged(file, facts, item)
                    and (_shown(file, facts, node, item) or _is_handed_on(file, kinds, item))
                    and not _uses(file, facts, item, whole)
                    and not _is_tested(file, facts, item)
                    and not _is_whole_where_read(file, facts, item, made)
                    and not _is_counted(file, facts, node, item)
                    and not _adds_up_whole(file, facts, item, made)
                    and not (kinds is not None and not kinds.of_batch(item) and _is_reduced(file, facts, kinds, item))
                ):
                    message = f"{file.source.code(item)} is of this rank's share of the data"
                if isinstance(item, (ast.AugAssign, ast.Call)) and message and item not in told:
                    told.add(item)
                    yield Remark(RULE.code, item.lineno, message, differs=True)
        elif isinstance(node, ast.Call) and _evaluates(file, facts, node):
            name = file.source.code(node.func)
            message = f"{name}(...) gets the training data, of which every rank sees its share"
            yield Remark(RULE.code, node.lineno, message, differs=True)
    yield from _shown_of_shares(file, facts, told)
    for value in facts.kept_batches.numbers(file):
        if value not in told and value not in losses and not _is_of_all_ranks(file, facts, value):
            told.add(value)
            message = f"{file.source.code(value)} is of this rank's share of a batch that the object keeps"
            yield Remark(RULE.code, value.lineno, message, differs=True)
    yield from _in_hooks(file, facts, told)
    yield from _in_forwards(file, facts, told)
    if counted:
        yield from _decisions(file, facts, counted)
    yield from _sizes(file, facts)


def _left_behind(file: File, facts: Facts, told: _Told) -> Iterator[Finding]:
    """``print(criterion(model(x), y))`` behind the loop that had ``x`` and ``y`` of its last batch."""
    for left in facts.left_behind.of(file):
        whole = set() if facts.scripts.in_kept_guard(file, left.loop) else left.whole
        if whole:
            options = "" if left.loader is None else ", of={loader}"
            lines = [f"{name} = {{bmt}}.gather_samples({name}{options})" for name in sorted(whole)]
            holes = {} if left.loader is None else {"loader": left.loader}
            message = "what the loop leaves of its last batch is collected from all ranks"
            change = insert_behind(left.loop, *lines, **holes)
            yield Conversion(RULE.code, left.loop.lineno, message, (change,))
        for name, reads in sorted(left.reads.items()):
            untold = [read for read in reads if read not in told]
            if name not in whole and untold:
                told.add(untold[0])
                seen = f"{name} is of this rank's share of the loop's last batch"
                message = f"{seen}: see bmt.total, bmt.sum_loss, bmt.gather_samples"
                yield Remark(RULE.code, untold[0].lineno, message, differs=True)


def _is_of_first(kinds: Kinds, node: ast.AugAssign | ast.Call) -> bool:
    """Whether a value is made of the batch's first items alone, which rank 0 has as one process does."""
    return kinds.kind(node.value if isinstance(node, ast.AugAssign) else node) == "item"


def _collected(file: File, facts: Facts, values: list[ast.expr]) -> set[Var]:
    """The variables that hold what is collected from all ranks, and those that are made of them alone."""
    roles, known = facts.scripts.roles[file], set[Var]()
    for value in values:
        match file.names.statement_of(value):
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=holder))) | ast.AugAssign(target=holder):
                held = roles.var(holder)
            case ast.Assign(targets=[holder]):
                held = roles.var(holder)
            case _:
                held = None
        known |= {held} if held is not None else set()
    for node in file.nodes if known else ():
        if isinstance(node, ast.Assign) and _uses(file, facts, node.value, known):
            known |= {variable for target in node.targets if (variable := roles.var(target)) is not None}
    return known


def _listed(file: File, facts: Facts, values: set[ast.expr], known: set[Var]) -> set[Var]:
    """The lists that only numbers of all ranks are appended to, what is made of these, and names that go through it."""
    roles, lists = facts.scripts.roles[file], dict[Var, list[ast.expr]]()
    for call in file.calls:
        match call:
            case ast.Call(func=ast.Attribute(value=holder, attr="append"), args=[value]):
                if (variable := roles.var(holder)) is not None:
                    lists.setdefault(variable, []).append(value)
    found = {
        variable
        for variable, given in lists.items()
        if all(_is_of_all_ranks(file, facts, value) or not values.isdisjoint(walk(value)) for value in given)
    }
    for node in file.nodes if found else ():
        match node:
            case ast.Assign(targets=targets, value=value) if _uses(file, facts, value, found | known):
                found |= {variable for target in targets if (variable := roles.var(target)) is not None}
            case ast.comprehension(target=target, iter=value) if _uses(file, facts, value, found | known):
                found |= {variable} if (variable := roles.var(target)) is not None else set()
    return found


def _uses(file: File, facts: Facts, node: ast.expr, known: set[Var]) -> bool:
    """Whether a value is made of known variables, and of no others but modules and functions."""
    roles = facts.scripts.roles[file]
    paths = [item for item in ast.walk(node) if isinstance(item, ast.Attribute) and roles.var(item) in known]
    inside = {item for path in paths for item in ast.walk(path)}
    names = [item for item in ast.walk(node) if isinstance(item, ast.Name) and item not in inside]
    own = [name for name in names if facts.project.resolve(file, name) is None]
    return bool(own or paths) and all(roles.var(name) in known for name in own)


def _sizes(file: File, facts: Facts) -> Iterator[Finding]:
    """``torch.ones(batch_size, 1)`` in a loop over shares, where ``batch_size`` is that of the loader."""
    roles, told = facts.scripts.roles[file], set[int]()
    sizes = {
        roles.var(size)
        for call in file.calls
        if facts.project.external(file, call.func) == "torch.utils.data.DataLoader"
        for size in (*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "batch_size"))
        if isinstance(size, (ast.Name, ast.Attribute))
    }
    taken = facts.scripts.batches.of(file)
    shared = {item for node in taken.whole for item in ast.walk(node)}
    for call in file.calls if sizes or taken.sizes else ():
        attr = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        known = (sizes if attr in _SHAPED else set()) | (taken.sizes if attr in _SHAPED | _DRAWN else set())
        of_model = isinstance(call.func, ast.Attribute) and roles.is_model(call.func.value)
        named = [] if facts.scripts.is_loader(file, call) else call.keywords
        by_name = [k.value for k in named if known or of_model or _BATCH_SIZE.match(k.arg or "")]
        known |= sizes if of_model or by_name else set()
        owner = roles.var(call.func.value) if isinstance(call.func, ast.Attribute) else None
        repeated = attr == "repeat" and owner in roles.losses
        made = bool(known) and call not in shared and not repeated  # a mean of the same number is that number
        given = [part for item in call.args for part in (item.elts if isinstance(item, ast.Tuple) else [item])]
        given = [*(given if attr in _SHAPED | _DRAWN or of_model else ()), *by_name]
        size = next((item for item in given if _is_one(roles, item, known - {None})), None)
        if made and size is not None and call.lineno not in told and _is_over_shares(file, facts, call):
            told.add(call.lineno)
            name = file.source.code(size)
            message = f"a rank's share of a batch has fewer than {name} items: take the size from the batch, x.size(0)"
            yield Remark(RULE.code, call.lineno, message, differs=True)
    for call in file.calls if sizes else ():
        for value in _sizes_of_tensors(facts, file, call):
            if _is_one(roles, value, sizes - {None}) and call.lineno not in told:
                told.add(call.lineno)
                whole = f"{file.source.code(call.func)} makes tensors of {file.source.code(value)} items"
                message = f"{whole}, and a rank's share of a batch has fewer: take the size from what it gets"
                yield Remark(RULE.code, call.lineno, message, differs=True)
    for statement in file.nodes if sizes else ():
        if isinstance(statement, ast.Assign) and statement.lineno not in told:
            size = _sized(file, roles, statement.value, sizes - {None})
            held = {variable for target in statement.targets if (variable := roles.var(target)) is not None}
            if size is not None and held and _is_met_by_shares(file, facts, statement, held):
                told.add(statement.lineno)
                message = f"this has {file.source.code(size)} items, and a rank's share of a batch has fewer: "
                yield Remark(RULE.code, statement.lineno, message + "make it as large as x.size(0)", differs=True)


def _is_over_shares(file: File, facts: Facts, node: ast.AST) -> bool:
    """Whether a node stands in a loop that takes shares of batches, by ``next(loader)``, too."""
    loops = [parent for parent in file.names.ancestors(node) if isinstance(parent, (ast.For, ast.While))]
    return facts.scripts.over_shares(file, node) or not facts.scripts.handed.of(file).keys().isdisjoint(loops)


def _sizes_of_tensors(facts: Facts, file: File, call: ast.Call) -> Iterator[ast.expr]:
    """What a call gives a project's class for sizes of tensors that it makes: ``Rays(batch_size, 32)``."""
    made = facts.project.resolve(file, call.func) if call.args or call.keywords else None
    method = facts.classes.method(made, "__init__") if isinstance(made, ClassInfo) else None
    if method is None:
        return
    constructor = method[0].file.function_info(method[1])
    held = {
        dotted(target): node.value.id
        for node in walk(constructor.node)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name)
        for target in node.targets
    }
    sizes: set[str | None] = set()
    for item in (inner for each in method[0].methods.values() for inner in walk(each)):
        name = (dotted(item.func) or "").split(".")[-1] if isinstance(item, ast.Call) else ""
        if isinstance(item, ast.Call) and (getattr(item.func, "attr", name) in _SHAPED or name.endswith("Tensor")):
            first = item.args[:1]
            first = list(getattr(first[0], "elts", first))[:1] if first else []
            sizes |= {held.get(dotted(value), dotted(value)) for value in first}
    yield from (value for name, value in constructor.given(call) if name in sizes)


def _sized(file: File, roles: Roles, value: ast.expr, sizes: set[Var | None]) -> ast.expr | None:
    """The loader's batch size in a value that makes a tensor of it: ``torch.zeros(size, 3)``, ``Tensor(size)``."""
    for call in (item for item in ast.walk(value) if isinstance(item, ast.Call)):
        name = (dotted(call.func) or "").split(".")[-1]
        given = [part for item in call.args for part in (item.elts if isinstance(item, ast.Tuple) else [item])]
        if name in _SHAPED | _DRAWN or name.endswith("Tensor"):
            size = next((item for item in given if _is_one(roles, item, sizes)), None)
            if size is not None:
                return size
    return None


def _is_met_by_shares(file: File, facts: Facts, statement: ast.Assign, held: set[Var]) -> bool:
    """Whether a loop over shares reads what stands in front of it."""
    scripts = facts.scripts
    return not scripts.over_shares(file, statement) and any(
        _is_one(scripts.roles[file], use, held) and isinstance(use.ctx, ast.Load) and scripts.over_shares(file, use)
        for use in file.nodes
        if isinstance(use, (ast.Name, ast.Attribute))
    )


def _is_made_of_averaged(file: File, facts: Facts, value: ast.expr) -> bool:
    """``psnr.item()`` where ``psnr = -10 * torch.log10(error)``, in which the error is that of all ranks."""
    averaged = set(facts.scripts.collectives.readings(file).values())
    read = viewed(value)
    made = file.names.values_of(read) if isinstance(read, ast.Name) else []
    return bool(made) and all(not averaged.isdisjoint(ast.walk(item)) for item in made)


def _shown_of_shares(file: File, facts: Facts, told: _Told) -> Iterator[Finding]:
    """``history.append({"seen": len(x)})`` and other totals and means of a share that are shown or kept."""
    handed = facts.scripts.handed
    made = facts.scripts.collectives.shares(file)
    losses = set(facts.scripts.collectives.readings(file).values())
    places = [(kinds, kinds.shown()) for kinds in (handed.kinds(file, place) for place in handed.of(file))]
    places += [(kinds, kinds.shown_inside()) for _, kinds in handed.showing(file)]
    for kinds, shown in places:
        for value, kind in shown:
            if value in made or value in told or _is_reduced(file, facts, kinds, value):
                continue
            if not losses.isdisjoint(ast.walk(value)) or _is_made_whole_by_callers(file, facts, value):
                continue
            told.add(value)
            code = file.source.code(value)
            if kind == "unknown":
                yield Remark(RULE.code, value.lineno, f"{code} is of this rank's share of the batch", differs=True)
                continue
            what = "the size" if kinds.is_size(value) else "a count" if kind == "total" else "a mean"
            call = f"bmt.total({code})" if kind == "total" else f"bmt.sum_loss({code})"
            message = f"{code} is {what} of this rank's share of the batch: the batch's is {call}, made by every rank"
            yield Remark(RULE.code, value.lineno, message, differs=True)


def _divided_losses(file: File, facts: Facts, told: _Told) -> Iterator[Finding]:
    """``loss.item() / len(x)`` of a loss that is a mean: the size is then the whole batch's, as in one process."""
    scripts, readings = facts.scripts, facts.scripts.collectives.readings(file)
    for node in file.nodes:
        match node:
            case ast.BinOp(left=left, op=ast.Div(), right=right) if left in readings:
                place = scripts.handed.around(file, node)
                if place is None or isinstance(file.names.statement_of(node), ast.AugAssign):
                    continue
                kinds = scripts.handed.kinds(file, place)
                if kinds.kind(right) != "total" or not kinds.is_size(right):
                    continue
                reduced = scripts.sums(file).of(readings[left])
                if reduced == "sum" or right in scripts.collectives.shares(file):
                    continue
                told.add(right)
                guarded = scripts.in_kept_guard(file, node) or scripts.in_opened_guard(
                    file, file.names.statement_of(node)
                )
                if reduced == "mean" and not guarded:
                    change = made_whole(right, Share("total", None))
                    yield Conversion(RULE.code, right.lineno, _MESSAGES["total"], (change,))
                    continue
                code = file.source.code(right)
                message = (
                    f"{file.source.code(node)} divides by the size of this rank's share of the batch: of a loss that "
                    f"is a mean, the script's is divided by bmt.total({code}), made by every rank"
                )
                yield Remark(RULE.code, right.lineno, message, differs=True)


def _is_made_whole_by_callers(file: File, facts: Facts, value: ast.expr) -> bool:
    """Whether all calls of a function name what it returns, and the batch's is made of it where it is read."""
    function, returned = file.names.function_of(value), file.names.parents[value]
    place = None
    if isinstance(returned, ast.Tuple):
        place, returned = returned.elts.index(value), file.names.parents[returned]
    if function is None or not isinstance(returned, ast.Return):
        return False
    calls = list(facts.scripts.collectives.instances.calls(file, function))
    for other, call in calls:
        statement = other.names.parents[call]
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if place is not None:
            parts = target.elts if isinstance(target, ast.Tuple) else []
            target = parts[place] if place < len(parts) else None
        if not isinstance(target, ast.Name):
            return False
        made = facts.scripts.collectives.shares(other)
        for item in _reads(other, facts, target, other.nodes):
            if made.keys().isdisjoint((item, *other.names.ancestors(item))):
                return False
    return bool(calls)


def _is_reduced(file: File, facts: Facts, kinds: Kinds, value: ast.expr, deep: int = 0) -> bool:
    """Whether a value, or what it is made of, comes of a call over all ranks, or is handed to one.

    So does ``len(x) * world_size``, the batch's size of a script that counts on ranks.
    """
    if _is_of_all_ranks(file, facts, value):
        return True
    for item in ast.walk(value):
        if isinstance(item, ast.BinOp) and isinstance(item.op, ast.Mult):
            sides = (side.func if isinstance(side, ast.Call) else side for side in (item.left, item.right))
            if any(_NUMBER_OF_RANKS.search((dotted(side) or "").split(".")[-1]) for side in sides):
                return True
        if isinstance(item, ast.Call):
            if _OVER_ALL.search((dotted(item.func) or "").split(".")[-1]) or kinds.is_of_all_ranks(item):
                return True
        if isinstance(item, (ast.Name, ast.Attribute)):
            if facts.decisions.varying.is_made_equal(file, item):
                return True
        if isinstance(item, ast.Name) and deep < _DEEP:
            if any(_is_reduced(file, facts, kinds, made, deep + 1) for made, _ in kinds.made.get(item.id, ())):
                return True
    return False


def _in_hooks(file: File, facts: Facts, told: _Told) -> Iterator[Finding]:
    """Numbers that hooks of modules make of what a forward or backward has in hand."""
    hooks = [
        call.args[0]
        for call in file.calls
        if isinstance(call.func, ast.Attribute) and call.func.attr in _HOOKS and call.args
    ]
    for hook in hooks:
        while isinstance(hook, ast.Call):  # functools.partial(hook, name), make_hook(name)
            hook = hook.args[0] if (dotted(hook.func) or "").split(".")[-1] == "partial" and hook.args else hook.func
        found = facts.project.resolve(file, hook)
        body: ast.AST | None = hook if isinstance(hook, ast.Lambda) else None
        if isinstance(found, FunctionInfo) and found.file is file:
            body = found.node
        for item in ast.walk(body) if body is not None else ():
            match item:
                case ast.Call(func=ast.Attribute(attr=attr), args=[]) if attr in _VALUES and item not in told:
                    if not _is_of_all_ranks(file, facts, item):
                        told.add(item)
                        message = (
                            f"{file.source.code(item)} in a hook is of this rank's share of the data: see bmt.sum_loss"
                        )
                        yield Remark(RULE.code, item.lineno, message, differs=True)
        yield from _kept_by_hook(file, facts, body, told) if body is not None else ()


def _kept_by_hook(file: File, facts: Facts, hook: ast.AST, told: _Told) -> Iterator[Finding]:
    """``print(seen["h"].mean().item())``, where a hook has put what a module gave into ``seen``."""
    given = {item.arg for item in walk(hook) if isinstance(item, ast.arg)}
    kept: set[str] = set()
    for item in walk(hook):
        match item:
            case ast.Assign(targets=[ast.Subscript(value=holder) | (ast.Attribute() as holder)], value=value):
                kept |= {dotted(holder) or ""} if names_in(value) & given else set()
            case ast.Call(func=ast.Attribute(value=holder, attr=attr), args=values) if attr in _KEEPING:
                kept |= {dotted(holder) or ""} if any(names_in(value) & given for value in values) else set()
    for call in file.calls if kept - {""} else ():
        inside = call is hook or hook in file.names.ancestors(call)
        read = read_out(call)
        if read is None or inside or call in told:
            continue
        if any(dotted(n) in kept for n in walk(read) if isinstance(n, _PLACES)):
            if not _is_of_all_ranks(file, facts, call):
                told.add(call)
                code = file.source.code(call)
                message = f"{code} is of this rank's share of the data, which a hook has kept: see bmt.sum_loss"
                yield Remark(RULE.code, call.lineno, message, differs=True)


def _gradients_of_inputs(file: File, facts: Facts, told: _Told) -> Iterator[Finding]:
    """``x.grad.abs().mean()`` of a batch: of a loss that is the mean over a share, which has fewer items."""
    for place in facts.scripts.handed.of(file):
        kinds = facts.scripts.handed.kinds(file, place)
        for node in kinds.nodes:
            match node:
                case ast.Attribute(value=ast.Name() as name, attr="grad", ctx=ast.Load()) if name.id in kinds.batch:
                    around = [item for item in file.names.ancestors(node) if isinstance(item, ast.expr)]
                    if node not in told and not any(
                        isinstance(n, ast.Attribute) and n.attr in _SCALELESS for n in around
                    ):
                        told.add(node)
                        message = (
                            f"{file.source.code(node)} is of the mean over this rank's share of the batch, "
                            "bmt.world_size() times as large as of the mean over the batch"
                        )
                        yield Remark(RULE.code, node.lineno, message, differs=True)


def _in_forwards(file: File, facts: Facts, told: _Told) -> Iterator[Finding]:
    """Numbers that a module's forward makes of what it gets, and keeps: ``self.stats["mean"] = h.mean().item()``."""
    losses = facts.scripts.collectives.readings(file)
    for cls in facts.classes.all(file):
        forward = cls.methods.get("forward") if facts.classes.is_module(cls) else None
        for statement in (node for node in walk(forward) if isinstance(node, ast.Assign)) if forward else ():
            kept = (dotted(t.value if isinstance(t, ast.Subscript) else t) or "" for t in statement.targets)
            if not any(name.startswith("self.") for name in kept):
                continue
            for item in walk(statement.value):
                match item:
                    case ast.Call(func=ast.Attribute(value=value, attr="item"), args=[]) if item not in losses:
                        whole = _is_of_all_ranks(file, facts, value) or _is_of_weights(file, facts, value)
                        if item not in told and not whole and not (dotted(_bare(value)) or "").startswith("self."):
                            told.add(item)
                            code = file.source.code(item)
                            message = f"{code} in a forward is of this rank's share of the data: see bmt.sum_loss"
                            yield Remark(RULE.code, item.lineno, message, differs=True)


def _decisions(file: File, facts: Facts, counted: set[Var]) -> Iterator[Finding]:
    """Tests of such counts above calls that every rank must make."""
    known, roles = set(counted), facts.scripts.roles[file]
    for node in file.nodes:
        if isinstance(node, ast.Assign) and any(_is_one(roles, item, known) for item in ast.walk(node.value)):
            known |= {variable for target in node.targets if (variable := roles.var(target)) is not None}
    for node in file.nodes:
        if isinstance(node, ast.If) and any(_is_one(roles, item, known) for item in ast.walk(node.test)):
            call = next((c for s in node.body if (c := facts.scripts.collectives.inside(file, s)) is not None), None)
            if call is not None:
                what = file.source.code(call.func)
                message = f"if ranks decide otherwise here, {what}(...) waits forever: decide from values of all ranks"
                yield Remark(RULE.code, node.lineno, message, differs=True)


def _is_one(roles: Roles, node: ast.AST, known: set[Var] | set[Var | None]) -> bool:
    return isinstance(node, (ast.Name, ast.Attribute)) and roles.var(node) in known


def _trains(facts: Facts, file: File, loop: ast.For) -> bool:
    """Whether a loop goes through training data: it calls backward, or its data are called so."""
    if any(_is_loader(item) for item in ast.walk(loop.iter)):
        return True
    return any(is_backward(item) for statement in loop.body for item in walk_own(statement))


def _own(file: File, facts: Facts, loop: ast.For) -> Iterator[ast.AST]:
    """The nodes of a loop's body without those of loops in it: they are looked at by themselves."""
    stack: list[ast.AST] = list(loop.body)
    while stack:
        item = stack.pop()
        if isinstance(item, (ast.For, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(item, _COMPREHENSIONS) and _goes_through_other_data(file, facts, loop, item.generators[0].iter):
            continue
        yield item
        stack.extend(ast.iter_child_nodes(item))


def _goes_through_other_data(file: File, facts: Facts, loop: ast.For, iterated: ast.expr) -> bool:
    """Whether a comprehension takes what a loop neither binds nor trains on: ``sum(loss(b) for b in valid)``."""
    bound = {name.id for name in walk(loop) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    taken = [place.iter for place in facts.scripts.handed.of(file) if isinstance(place, ast.For)]
    read, trained = _variables(file, facts, [iterated]), _variables(file, facts, taken)
    return bool(read) and not read & trained and not names_in(iterated) & bound


def _variables(file: File, facts: Facts, values: list[ast.expr]) -> set[Var]:
    """What the project's own names in values are, and not what ``enumerate`` is."""
    roles = facts.scripts.roles[file]
    names = [item for value in values for item in ast.walk(value) if isinstance(item, (ast.Name, ast.Attribute))]
    own = [n for n in names if isinstance(n, ast.Attribute) or file.names.lookup(n.id, file.names.scope_of(n))]
    return {variable for name in own if (variable := roles.var(name)) is not None}


def _is_loader(node: ast.AST) -> bool:
    return isinstance(node, (ast.Name, ast.Attribute)) and bool(_LOADER.match((dotted(node) or "").split(".")[-1]))


def _of_share(file: File, facts: Facts, loop: ast.For, node: ast.AugAssign) -> bool:
    """Whether what is added is a size, other than that of what the loop goes through, or a sum that is no loss."""
    roles = facts.scripts.roles[file]
    iterated = {ast.dump(item) for item in ast.walk(loop.iter)}
    place = facts.scripts.handed.around(file, node)
    kinds = facts.scripts.handed.kinds(file, place) if place is not None else None
    if _is_of_all_ranks(file, facts, node.value):
        return False
    shapes = {
        part
        for made in ast.walk(node.value)
        if isinstance(made, ast.Call) and isinstance(made.func, ast.Attribute) and made.func.attr in _SHAPED | _DRAWN
        for argument in made.args
        for part in ast.walk(argument)
    }  # of tensors that are made there, not counted
    for item in (item for item in ast.walk(node.value) if item not in shapes):
        match item:
            case ast.Call(func=ast.Attribute(attr="sum"), args=[*given]) if _compares(item, given):
                return True
            case ast.Call(func=ast.Attribute(value=value, attr=attr)):
                shown = attr in _VALUES and roles.var(_bare(value)) not in roles.losses and _sums(value)
                if attr in _COUNTS or shown:
                    return True
            case ast.Call(func=ast.Name(id="len"), args=[held]) if ast.dump(held) in iterated or (
                kinds is not None and kinds.counts_parts(item)
            ):
                pass
            case ast.Call(func=ast.Name(id="len")) | ast.Subscript(value=ast.Attribute(attr="shape")):
                return True
    return False


def _compares(call: ast.Call, given: list[ast.expr]) -> bool:
    """Whether ``(out == y).sum()`` or ``torch.sum(out == y)`` counts hits."""
    assert isinstance(call.func, ast.Attribute)
    return any(isinstance(item, ast.Compare) for item in (call.func.value, *given))


def _shown(file: File, facts: Facts, loop: ast.For, call: ast.Call) -> bool:
    """Whether ``x.item()``, or ``float(x)`` of what comes of a loop's batch, is of no loss, no norm and no sum."""
    match call:
        case ast.Call(func=ast.Name(id="float" | "int"), args=[value]) if not _comes_of_batch(file, loop, value):
            return False
        case (
            ast.Call(func=ast.Attribute(value=value, attr="item"), args=[])
            | ast.Call(func=ast.Name(id="float" | "int"), args=[value])
        ):
            roles, bare = facts.scripts.roles[file], _bare(value)
            if isinstance(call.func, ast.Name):
                while isinstance(bare, ast.Subscript):
                    bare = _bare(bare.value)
            variable = roles.var(bare)
            made = [made for v, made, _, _ in roles.assignments if v == variable]
            names = [(dotted(m.func) or "").split(".")[-1] for m in made if isinstance(m, ast.Call)]
            given = variable is None or variable in roles.losses or any("clip_grad" in name for name in names)
            given = given or any(_is_of_all_ranks(file, facts, m) for m in (value, *made))
            given = given or _is_of_weights(file, facts, value)
            held = [m for n in ast.walk(value) if isinstance(n, ast.Name) for m in file.names.values_of(n)]
            return not given and not any("grad" in (dotted(n) or "") for part in (value, *held) for n in ast.walk(part))
    return False


def _is_tested(file: File, facts: Facts, call: ast.Call) -> bool:
    """Whether a value is the answer of a test, which is made that of all ranks where it decides about their calls."""
    asks = isinstance(file.names.statement_of(call), (ast.If, ast.While, ast.Assert, ast.Assign))
    return asks and bool(facts.decisions.truths.of(file, None, call))


def _is_whole_where_read(file: File, facts: Facts, call: ast.Call, made: Mapping[ast.expr, Share]) -> bool:
    """Whether a value gets a name, and wherever that is read the batch's is made of it: ``print(hits)``.

    So it is where it stands in ``[a, b]`` and a loop over that has the name: ``for v in values: print(v)``.
    """
    reads: list[ast.Name] = []
    match file.names.parents[call]:
        case ast.Assign(targets=[ast.Name() as target], value=value) if value is call:
            reads = _reads(file, facts, target, file.nodes)
        case (ast.Tuple() | ast.List()) as display:
            for loop in (node for node in file.nodes if isinstance(node, (ast.For, ast.comprehension))):
                for name, held in gone_through(loop.target, loop.iter, displays=True):
                    if held is display or (isinstance(held, ast.Name) and file.names.values_of(held) == [display]):
                        around = loop if isinstance(loop, ast.For) else file.names.parents[loop]
                        reads += _reads(file, facts, name, list(walk(around)))
    return bool(reads) and all(not made.keys().isdisjoint((item, *file.names.ancestors(item))) for item in reads)


def _reads(file: File, facts: Facts, name: ast.Name, nodes: list[ast.AST]) -> list[ast.Name]:
    """Where a variable is read among nodes."""
    roles = facts.scripts.roles[file]
    variable = roles.var(name)
    names = [item for item in nodes if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Load)]
    return [item for item in names if item.id == name.id and roles.var(item) == variable]


def _is_handed_on(file: File, kinds: Kinds | None, call: ast.Call) -> bool:
    """Whether a number of the batch is given to what is not seen: ``track(error=(out - y).abs().mean().item())``."""
    given = file.names.parents[call]
    reads = isinstance(call.func, ast.Attribute) and call.func.attr == "item" and not call.args
    handed = isinstance(given, ast.keyword) or (isinstance(given, ast.Call) and call in given.args)
    return kinds is not None and reads and handed and kinds.kind(call) in {"mean", "total"}


def _adds_up_whole(file: File, facts: Facts, call: ast.Call, made: Mapping[ast.expr, Share]) -> bool:
    """Whether a number is read out of what only totals of all ranks are added to: ``counts.sum().item()``."""
    roles, bare = facts.scripts.roles[file], _bare(call)
    added = [
        item.value
        for item in file.nodes
        if isinstance(item, ast.AugAssign) and isinstance(bare, ast.Name) and roles.var(item.target) == roles.var(bare)
    ]
    return bool(added) and all(value in made for value in added)


def _is_counted(file: File, facts: Facts, loop: ast.For, node: ast.expr, known: frozenset[Var] = frozenset()) -> bool:
    """Whether a value is made of numbers and counters alone, as a temperature is, or of data that nobody trains on."""
    roles = facts.scripts.roles[file]

    def are(nodes: list[ast.expr], more: frozenset[Var] = known) -> bool:
        return all(_is_counted(file, facts, loop, item, more) for item in nodes)

    match node:
        case ast.Constant():
            return True
        case ast.BinOp(left=left, right=right):
            return are([left, right])
        case ast.UnaryOp(operand=inner) | ast.Call(func=ast.Attribute(value=inner, attr="item" | "clone" | "mean")):
            return are([inner])
        case ast.ListComp(generators=[one]) | ast.GeneratorExp(generators=[one]):
            return _goes_through_other_data(file, facts, loop, one.iter)
        case ast.Call(func=ast.Name(id="len"), args=[held]):
            bound = {name.id for name in walk(loop) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
            return not names_in(held) & bound  # of a loader, of data
        case ast.Call(func=func, args=args, keywords=[]):
            name = facts.project.external(file, func) or (dotted(func) or "")
            return (name.startswith("math.") or name in _OF_NUMBERS) and are(args)
        case ast.Name() if (variable := roles.var(node)) is not None:
            if variable in known:
                return True
            values: list[ast.expr] = []
            for item in file.nodes:
                if isinstance(item, ast.Name) and item.id == node.id and roles.var(item) == variable:
                    given = _given(file, item)
                    if given is None and not _is_filled_apart(file, facts, loop, item):
                        return False
                    values += given or []
            return bool(values) and are(values, known | {variable})
    return False


def _given(file: File, name: ast.Name) -> list[ast.expr] | None:
    """What a variable gets where its name stands: nothing where it is only read; None where it is not seen."""
    parent = file.names.parents[name]
    if isinstance(name.ctx, ast.Load):
        changed = isinstance(parent, ast.Subscript) and not isinstance(parent.ctx, ast.Load)
        in_place = isinstance(parent, ast.Attribute) and parent.attr.endswith("_")
        return None if changed or in_place else []
    match parent:
        case ast.Assign(value=value) | ast.AugAssign(value=value) | ast.AnnAssign(value=ast.expr() as value):
            return [value]
        case ast.For(iter=ast.Call(func=ast.Name(id="range"))):
            return [ast.Constant(0)]
        case ast.Tuple(elts=[first, *_]) if first is name:
            loop = file.names.parents[parent]
            numbered = isinstance(loop, ast.For) and item_of(loop, file.names.values_of) is not loop.target
            return [ast.Constant(0)] if numbered else None
    return None


def _is_filled_apart(file: File, facts: Facts, loop: ast.For, name: ast.Name) -> bool:
    """Whether an entry gets its value in a loop within ``loop`` over other data: ``losses[k] = loss(batch)``."""
    inner = next((item for item in file.names.ancestors(name) if isinstance(item, ast.For)), None)
    return inner is not None and inner is not loop and _goes_through_other_data(file, facts, loop, inner.iter)


def _comes_of_batch(file: File, loop: ast.For, value: ast.expr) -> bool:
    """Whether a value is a tensor, or an entry of some, that was made of a loop's batch."""
    read = {item.attr for item in ast.walk(value) if isinstance(item, ast.Attribute)}
    if not isinstance(_bare(value), (ast.Name, ast.Subscript)) or read & (_COUNTS | _VALUES | {"shape"}):
        return False
    held = names_in(item_of(loop, file.names.values_of))
    for statement in loop.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Assign) and names_in(node.value) & held:
                held |= {name for made in node.targets for name in names_in(made) if isinstance(made, _NAMED)}
    return bool(names_in(value) & held)


def _is_of_weights(file: File, facts: Facts, node: ast.expr) -> bool:
    """Whether a value is made of a model's parameters alone: of ``p`` in a loop over them, of ``model.head.weight``."""
    roles, values = facts.scripts.roles[file], facts.values(file)
    root = node = _bare(node)
    if values.is_parameter(node):
        return True
    while isinstance(root, (ast.Attribute, ast.Subscript)):
        root = root.value
    if not isinstance(root, ast.Name):
        return False
    if root is not node and roles.is_model(root):
        return True
    if root is node and (made := [value for value in file.names.values_of(root) if value is not node]):
        if all(isinstance(value, ast.Attribute) and _is_of_weights(file, facts, value) for value in made):
            return True
    for parent in file.names.ancestors(node):
        loops: list[ast.For | ast.comprehension] = [parent] if isinstance(parent, ast.For) else []
        if isinstance(parent, (ast.GeneratorExp, ast.ListComp, ast.SetComp, ast.DictComp)):
            loops += parent.generators
        for loop in loops:
            if any(isinstance(item, ast.Name) and item.id == root.id for item in ast.walk(loop.target)):
                over = loop.iter.func if isinstance(loop.iter, ast.Call) else loop.iter
                if not isinstance(over, ast.Attribute):
                    return False
                return over.attr in _OF_WEIGHTS or values.holds_parameters(over) or values.holds_parameters(over.value)
    return False


def _is_of_all_ranks(file: File, facts: Facts, node: ast.expr) -> bool:
    """Whether a value is made from what all ranks have."""
    return any(isinstance(n, ast.Call) and facts.project.external(file, n.func) in _OVER_RANKS for n in ast.walk(node))


def _sums(node: ast.expr) -> bool:
    return any(isinstance(item, ast.Attribute) and item.attr == "sum" for item in ast.walk(node))


def _bare(node: ast.expr) -> ast.expr:
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        node = node.func.value
    if isinstance(node, ast.Attribute) and node.attr == "data":
        return _bare(node.value)
    return node


def _evaluates(file: File, facts: Facts, call: ast.Call) -> bool:
    """Whether a function of the project that does not train is handed the training loader."""
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    if not any(_is_loader(argument) for argument in given):
        return False
    found = facts.project.resolve(file, call.func)
    if not isinstance(found, FunctionInfo):
        return False
    hands_on = any(isinstance(item, (ast.Yield, ast.YieldFrom)) for s in found.node.body for item in walk_own(s))
    return not hands_on and not facts.scripts.steps(found.file, found.node)


RULE = Rule(
    code="BMT037",
    title="what is made of a rank's share of the data becomes the batch's",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
from torch.utils.data import DataLoader

model = torch.nn.Linear(8, 2)
train_loader = DataLoader(train_set, batch_size=8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
correct = seen = 0
for x, y in train_loader:
    out = model(x)
    torch.nn.functional.cross_entropy(out, y).backward()
    optimizer.step()
    correct += (out.argmax(1) == y).sum().item()
    seen += len(y)
    predictions.extend(out.argmax(1).tolist())
""",
            """import torch
from torch.utils.data import DataLoader
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 2))
train_loader = bmt.shard_loader(DataLoader(train_set, batch_size=8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(optimizer)
correct = seen = 0
for x, y in train_loader:
    out = model(x)
    optim_manager.backward(torch.nn.functional.cross_entropy(out, y))
    optim_manager.step()
    correct += bmt.total((out.argmax(1) == y).sum().item())
    seen += bmt.total(len(y))
    predictions.extend(bmt.gather_samples(out.argmax(1).tolist()))
""",
        ),
    ),
)
