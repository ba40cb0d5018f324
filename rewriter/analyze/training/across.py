"""Losses that are another value on a share of the batch: they compare its items, or weigh them by their number."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TypeGuard

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import OF_TWO, Function, assigned_by, dotted, names_in, reduction_of, walk, walk_own

LOSSES = re.compile(
    r"cross_entropy|nll_loss|log_softmax|logsumexp|kl_div|mse_loss|smooth_l1|binary_cross|hinge|margin|"
    r"criterion|loss(?:_?fn|_?func(?:tion)?)?$|^ce$",
    re.I,
)
_MADE = re.compile(r"^(?:arange|zeros|ones|eye|full|linspace|rand\w*|tensor|as_tensor|empty|Parameter|len|range|int)$")
_NO_BATCH = {"shape", "weight", "bias", "dtype", "device", "ndim"}
_TALLIES = {"bincount", "histc", "histogram", "Counter", "value_counts"}
_WEIGHTS = {"weight", "pos_weight", "class_weights"}
_SPREADS = {"std", "var", "cov", "corrcoef"}
_ORDERED = {"topk", "sort", "kthvalue", "quantile", "median", "argsort"}
_CHOOSES = {"topk", "sort", "argsort", "argmax", "argmin", "kthvalue"}
_SIZES = re.compile(r"^len\(|\.shape\[0\]$|\.size\(0\)$|^(?:self\.)?(?:batch_size|bsz?)$|^(?:2 \* )?[bBnN]$")
_AVERAGES = re.compile(r"^(?:\w*cross_entropy\w*|nll_loss|\w*(?:mse|l1|huber|bce)\w*loss|criterion|loss_fn)$", re.I)
_MODULES = re.compile(r"^(?:torch(?:\.\w+)*|F|nn\.functional|math|np|numpy)$")
_REDUCTIONS = {"reduction", "reduce", "size_average", None}
_KEEP = {"detach", "float", "double", "to", "squeeze", "view", "div", "mul"}
_BENDS = {
    "sqrt", "rsqrt", "log", "log2", "log10", "log1p", "exp", "expm1", "pow", "square", "abs", "relu", "clamp", "clip",
    "clamp_min", "clamp_max", "sigmoid", "tanh", "softplus", "reciprocal", "minimum", "maximum",
}  # fmt: skip
_SAME_SHAPE = {"contiguous", "detach", "float", "half", "to", "clone"}
_NORMS = {"norm", "vector_norm"}
_ALL_ITEMS = {"topk", "sort", "median", "prod", "std", "var", "max", "min", "amax", "amin", "logsumexp", "softmax"}
"""Of the losses of items they make one that is no mean."""
_BATCH = re.compile(r"^(?:b|bs|bsz|bat|batch(?:_?size)?|n_batch|batches)$", re.I)
_OUTSIDE = {"no_grad", "inference_mode"}
_TURNING = {"permute", "transpose", "swapaxes", "movedim", "t", "rearrange", "view", "reshape"}


class Across:
    """Answers for one file, function by function; the module's own statements are one of them."""

    def __init__(self, file: File, taken: Mapping[ast.For | ast.While, set[str]]) -> None:
        """``taken`` are loops that take batches without a loader, each with the names that hold these."""
        self.file = file
        self.taken = taken

    def compared(self) -> Iterator[ast.expr]:
        """Products, distances and spreads over the items of a batch that reach a loss."""
        for flow in self.flows:
            yield from flow.reaching(flow.compares)

    def weighed(self) -> Iterator[ast.expr]:
        """Means over what a mask leaves of a batch that reach a loss."""
        for flow in self.flows:
            yield from flow.reaching(flow.weighs)

    def tallied(self) -> Iterator[ast.expr]:
        """Weights of classes that are counted in a batch: ``F.cross_entropy(out, y, weight=1 / torch.bincount(y))``."""
        for flow in self.flows:
            yield from flow.weights_by_counts()

    def ratios(self) -> Iterator[ast.expr]:
        """Quotients of sums over the batch (Dice, IoU, Tversky) that reach a loss."""
        for flow in self.flows:
            yield from flow.reaching(flow.divides_sums)

    def curved(self) -> Iterator[ast.expr]:
        """Functions of means over the batch that are no multiples of them (roots, powers) and reach a loss."""
        for flow in self.flows:
            yield from flow.reaching(flow.bends)
            yield from flow.reaching(flow.is_chosen)

    def chosen(self) -> Iterator[ast.Call]:
        """``torch.topk(scores.mean(0), 3)`` in a model: a batch chooses together, by what it is on average."""
        calls = {
            _name(call)
            for cls in (node for node in self.file.nodes if isinstance(node, ast.ClassDef))
            for call in walk(cls)
            if isinstance(call, ast.Call)
        }
        for flow in self.flows:
            function = flow.function
            if isinstance(function, Function) and (self.file.names.class_of(function) or function.name in calls):
                yield from (node for node in flow.nodes if isinstance(node, ast.Call) and flow.chooses(node))

    def mixed(self) -> Iterator[ast.expr]:
        """``x @ graph_of(x.mean(0))`` in a module whose first dimension is the batch: each item gets of all others."""
        statistics = set(self.kept())
        kept = {flow.function for flow in self.flows if not statistics.isdisjoint(flow.nodes)}
        for flow in self.flows:
            owner = self.file.names.class_of(flow.function)
            if owner is not None and flow.function not in kept and _is_module(owner) and _counts_batch(owner):
                exprs = (node for node in flow.nodes if isinstance(node, ast.expr) and flow.mixes(node))
                yield from (node for node in exprs if not flow.without_gradients(node))

    def kept(self) -> Iterator[ast.Call]:
        """Statistics of a batch in forwards that write such into what their module holds: batch norms by hand.

        So do methods that forwards call to set parameters by the first batch, as ActNorm does.
        """
        for flow in self.flows:
            owner = self.file.names.class_of(flow.function)
            if owner is None or not isinstance(flow.function, Function):
                continue
            sets = flow.function.name != "forward"
            held = _held_by(owner) if not sets or _forward_calls(owner, flow.function.name) else set()
            if held and any(_writes(node, held) for node in flow.nodes):
                calls = (node for node in flow.nodes if isinstance(node, ast.Call))
                yield from (call for call in calls if flow.is_statistic(call, turned=sets))

    def hooked(self) -> Iterator[ast.Call]:
        """``p.register_hook(lambda g: g.clamp(-1, 1))``: gradients changed otherwise than by a factor or a term."""
        functions = {node.name: node for node in self.file.nodes if isinstance(node, Function)}
        for call in self.file.calls:
            match call:
                case ast.Call(func=ast.Attribute(attr="register_hook"), args=[given]):
                    named = given.id if isinstance(given, ast.Name) else getattr(given, "attr", "")
                    function = given if isinstance(given, ast.Lambda) else functions.get(named)
                    if function is not None and _bends_last(function):
                        yield call

    @cached_property
    def of_items(self) -> set[str]:
        """Names of loss functions that may give the loss of each item: ``mse = nn.MSELoss(reduction="none")``."""
        return {
            _name(target)
            for node in self.file.nodes
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
            if any(k.arg in _REDUCTIONS for k in node.value.keywords)
            for target in node.targets
        }

    @cached_property
    def of_sums(self) -> dict[str, ast.Call]:
        """Names of loss functions that give a sum, each with the call that makes it."""
        return {
            _name(target): node.value
            for node in self.file.nodes
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and _is_summed(node.value)
            for target in node.targets
        }

    def counted_sums(self) -> set[ast.AST]:
        """The losses that are sums and are divided by a count of what is in the batch, and the calls that make them."""
        found: set[ast.AST] = set()
        for flow in self.flows:
            for node in flow.reaching(flow.weighs):
                made = [value for name, value in flow.assigned if name in names_in(node)]
                found |= {item for whole in (node, *made) for item in walk(whole)}
        return found | {self.of_sums[name] for item in found if (name := _name_of(item)) in self.of_sums}

    @cached_property
    def flows(self) -> list[Flow]:
        """What comes of what, for each function that may be part of training: none that knows numpy's arrays only."""
        if self.file.mentions("numpy") and not self.file.mentions("torch"):
            return []
        functions = [node for node in self.file.nodes if isinstance(node, Function)]
        return [Flow(self, f) for f in (self.file.tree, *functions) if not self._is_outside_training(f)]

    def _is_outside_training(self, function: ast.Module | Function) -> bool:
        if isinstance(function, ast.Module):
            return False
        names = [dotted(d.func if isinstance(d, ast.Call) else d) or "" for d in function.decorator_list]
        owner = self.file.names.class_of(function)
        bases = [(dotted(base) or "").split(".")[-1] for base in (owner.bases if owner is not None else ())]
        optimizes = any(base.endswith("Optimizer") for base in bases)
        by_hand = function.name == "backward" and "Function" in bases  # a gradient, and no loss
        return optimizes or by_hand or any(name.split(".")[-1] in _OUTSIDE for name in names)


class Flow:
    """What comes of a batch, and of comparisons in it, in one function."""

    def __init__(self, across: Across, function: ast.Module | Function) -> None:
        self.across, self.file, self.function = across, across.file, function
        self.parameters: set[str] = set()
        own = [item for item in function.body if not isinstance(item, (Function, ast.ClassDef))]
        self.nodes = [item for statement in own for item in walk_own(statement)]
        self.batch: set[str] = set()
        self.sizes: set[str] = set()
        if isinstance(function, Function):
            given = function.args
            self.batch = {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)} - {"self", "cls"}
        self.assigned = [
            (target.id, value)
            for node in self.nodes
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and node.value is not None
            for whole, value in (assigned_by(node) if isinstance(node, ast.Assign) else [(node.target, node.value)])
            for target in walk(whole)
            if isinstance(target, ast.Name)
        ]
        loops = [node for node in self.nodes if isinstance(node, (ast.For, ast.While))]
        self.taken: set[str] = set().union(*(across.taken.get(loop, ()) for loop in loops))
        self.batch |= self.taken
        self.taken_here = {*self.taken}  # and what loops go through
        for node in self.nodes:
            if isinstance(node, ast.For):
                names = {item.id for item in walk(node.target) if isinstance(item, ast.Name)}
                if "param" in ast.dump(node.iter):
                    self.parameters |= names
                if "parameters" not in ast.dump(node.iter) and not self._counts(node.iter):
                    self.batch |= names
                    self.taken_here |= names
        for _ in range(3):
            for name, value in self.assigned:
                if _SIZES.search(self.file.source.code(value)):
                    self.sizes.add(name)
                elif self.is_batch(value):
                    self.batch.add(name)

    @staticmethod
    def _counts(iterated: ast.expr) -> bool:
        return isinstance(iterated, ast.Call) and dotted(iterated.func) in {"range", "trange"}

    def is_batch(self, node: ast.expr) -> bool:
        """Whether a value is made of what the function is given, and is no parameter, size or constant."""
        match node:
            case ast.Name(id=name):
                return name in self.batch and name not in self.sizes
            case ast.Attribute(value=value, attr=attr):
                return attr not in _NO_BATCH and self.is_batch(value)
            case ast.Call(func=func, args=args):
                if _MADE.match((dotted(func) or "").split(".")[-1]):
                    return False
                inner = (
                    isinstance(func, ast.Attribute) and func.attr not in {"size", "dim"} and self.is_batch(func.value)
                )
                return inner or any(self.is_batch(a) for a in args)
            case ast.BinOp(left=left, right=right) | ast.Compare(left=left, comparators=[right]):
                return self.is_batch(left) or self.is_batch(right)
            case ast.Subscript(slice=ast.Name(id=name)) if name in self.taken:
                return True
            case ast.Subscript(value=value) | ast.UnaryOp(operand=value) | ast.Starred(value=value):
                return self.is_batch(value)
            case ast.Tuple(elts=elts) | ast.List(elts=elts):
                return any(self.is_batch(item) for item in elts)
        return False

    def reaching(self, asked: Callable[[ast.expr], bool]) -> Iterator[ast.expr]:
        """Values of some kind from which a loss is made in this function."""
        for node in self.nodes:
            if isinstance(node, ast.expr) and asked(node) and not self.without_gradients(node):
                if not _is_read(node) and self._reaches(node):
                    yield node

    def is_statistic(self, call: ast.Call, turned: bool = False) -> bool:
        """``x.mean(0)``, ``torch.var(x, dim=[0, 2, 3])``; ``x.std()``, and ``x.mean(1)`` of what is ``turned``."""
        if _name(call) not in _SPREADS | {"mean", "var_mean", "std_mean"}:
            return False
        values, *rest = _operands(call)
        dims = [*rest[:1], *(k.value for k in call.keywords if k.arg in {"dim", "axis"})]
        numbers = dims[0].elts if dims and isinstance(dims[0], (ast.Tuple, ast.List)) else dims[:1]
        over = any(_integer(item) == 0 for item in numbers) or (turned and (not dims or self._is_turned(values)))
        return self.is_batch(values) and over

    def chooses(self, call: ast.Call) -> bool:
        """Whether a call takes the largest of statistics of the batch, or their order."""
        return _name(call) in _CHOOSES and self._is_made_of_statistic(_operands(call)[0])

    def mixes(self, node: ast.expr) -> bool:
        """Whether a value is no sum and no multiple of statistics of the batch, or of these and of each item."""
        match node:
            case ast.BinOp(left=left, op=ast.Pow()):
                return self._is_made_of_statistic(left)
            case ast.BinOp(op=ast.Div(), right=right):
                return self._is_made_of_statistic(right)
            case ast.BinOp(left=left, op=ast.MatMult(), right=right):
                return self._is_made_of_statistic(left) or self._is_made_of_statistic(right)
            case ast.Call() if _name(node) in _BENDS | {"softmax"}:
                return self._is_made_of_statistic(_operands(node)[0])
            case ast.Call(args=args) if _name(node) in {"mm", "matmul", "bmm", "einsum"}:
                return any(map(self._is_made_of_statistic, args))
        return False

    def _is_made_of_statistic(self, node: ast.expr, deep: int = 0) -> bool:
        return any(
            (isinstance(item, ast.Call) and self.is_statistic(item) and not self._is_stacked(_operands(item)[0]))
            or (
                isinstance(item, ast.Name)
                and deep < 3
                and any(self._is_made_of_statistic(value, deep + 1) for name, value in self.assigned if name == item.id)
            )
            for item in walk(node)
        )

    def _is_stacked(self, node: ast.expr, deep: int = 0) -> bool:
        """Whether the first dimension of a value is that of a list: ``torch.stack(layers)``."""
        if isinstance(node, ast.Name):
            made = [value for name, value in self.assigned if name == node.id and value is not node]
            return deep < 3 and any(self._is_stacked(value, deep + 1) for value in made)
        return isinstance(node, ast.Call) and _name(node) == "stack"

    def _is_turned(self, node: ast.expr, deep: int = 0) -> bool:
        """Whether dimensions of a value have changed places: ``x.permute(1, 0, 2, 3).reshape(channels, -1)``."""
        for item in walk(node):
            if isinstance(item, ast.Call) and _name(item) in _TURNING:
                return True
            if isinstance(item, ast.Name) and deep < 3:
                if any(self._is_turned(value, deep + 1) for name, value in self.assigned if name == item.id):
                    return True
        return False

    def compares(self, node: ast.expr) -> bool:
        match node:
            case ast.BinOp(left=left, op=ast.MatMult(), right=right):
                return self._are_rows(left, right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return self._are_crossed(left, right) or self._is_centred(node) or self._are_picked(left, right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return self._are_crossed(left, right) or self._are_picked(left, right)
            case ast.Call(func=ast.Attribute(attr=attr) | ast.Name(id=attr), args=args):
                if isinstance(node.func, ast.Attribute) and attr in {"mm", "matmul", "bmm"} and len(args) == 1:
                    return self._are_rows(node.func.value, args[0])
                if attr in {"mm", "matmul", "bmm"} and len(args) == 2:
                    return self._are_rows(*args)
                if attr == "einsum":
                    return len(args) == 3 and _crosses(args[0]) and all(map(self.is_batch, args[1:]))
                if attr == "cdist":
                    return len(args) > 1 and all(map(self.is_batch, args[:2]))
                if attr in {"cosine_similarity", "pairwise_distance"}:
                    return len(args) > 1 and (self._are_crossed(*args[:2]) or self._are_picked(*args[:2]))
                if attr == "inner":
                    return len(args) == 2 and all(map(self.is_batch, args))
                if attr == "eye":
                    return bool(args) and self._counts_items(args[0])
                if attr in _SPREADS:
                    return self._spreads(node)
                if attr in _ORDERED:
                    return self._is_per_item(args[0] if dotted(node.func) == f"torch.{attr}" and args else node.func)
                return len(args) == 2 and self._are_crossed(*args)  # nn.CosineSimilarity(dim=2), by its name
        return False

    def weighs(self, node: ast.expr) -> bool:
        """``(nll * mask).sum() / mask.sum()``, ``nll[labels != 0].mean()``."""
        match node:
            case ast.BinOp(left=left, op=ast.Div(), right=right):
                hits = any(isinstance(item, ast.Compare) for item in walk(left))
                return not hits and not self._is_number(left) and self._sums(left) and self._sums(right)
            case ast.Call(func=ast.Attribute(value=value, attr="div"), args=[right]):
                return self._sums(value) and self._sums(right)
            case ast.Call(func=ast.Attribute(value=ast.Subscript(value=value, slice=mask), attr="mean"), args=[]):
                return self.is_batch(value) and self._is_mask(mask)
            case ast.Call(func=ast.Attribute(value=ast.Call() as chosen, attr="mean"), args=[]):
                return _name(chosen) == "masked_select" and self.is_batch(chosen)
        return False

    def weights_by_counts(self) -> Iterator[ast.expr]:
        """What weighs a loss's classes, ``weight=`` or ``w[y]``, and comes of how often they are in the batch."""
        criteria = [(name, value) for name, value in self.assigned if isinstance(value, ast.Call)]
        for node in self.nodes:
            if isinstance(node, ast.Call):
                makers = [value for name, value in criteria if name == _name(node)]
                makers += [node.func] if isinstance(node.func, ast.Call) else []
                is_loss = LOSSES.search(_name(node)) and not _name(node)[:1].isupper()  # which makes one
                for call in (*([node] if is_loss else []), *makers):
                    yield from (k.value for k in call.keywords if k.arg in _WEIGHTS and self._comes_of_counts(k.value))
            elif isinstance(node, ast.Subscript) and self.is_batch(node.slice) and self._comes_of_counts(node.value):
                if not self.without_gradients(node) and self._reaches(node):
                    yield node

    def _comes_of_counts(self, node: ast.expr, deep: int = 0) -> bool:
        for item in walk(node):
            if isinstance(item, ast.Call) and self._counts_classes(item):
                return True
            if isinstance(item, ast.Name) and deep < 4:
                made = (value for name, value in self.assigned if name == item.id and value is not node)
                if any(self._comes_of_counts(value, deep + 1) for value in made):
                    return True
        return False

    def _counts_classes(self, call: ast.Call) -> bool:
        """``torch.bincount(y)``, ``Counter(y.tolist())``, ``F.one_hot(y).sum(0)``, ``(y == c).sum()``."""
        values, *_ = _operands(call)
        if _name(call) == "unique":
            return self.is_batch(values) and any(k.arg == "return_counts" for k in call.keywords)
        if _name(call) == "sum":
            made = [value for name, value in self.assigned if isinstance(values, ast.Name) and name == values.id]
            parts = [item for value in (values, *made) for item in walk(value)]
            marked = any(isinstance(item, ast.Compare) or _name_of(item) == "one_hot" for item in parts)
            return marked and self.is_batch(values) and self._over_batch(call)
        return _name(call) in _TALLIES and self.is_batch(values)

    def divides_sums(self, node: ast.expr) -> bool:
        """``2 * (a * b).sum(dims) / (a.sum(dims) + b.sum(dims))``, with dimensions that may be the batch's."""
        match node:
            case ast.BinOp(left=left, op=ast.Div(), right=right):
                return bool(self._batch_sums(left)) and len(self._batch_sums(right)) > 1
        return False

    def bends(self, node: ast.expr) -> bool:
        """``torch.sqrt(F.mse_loss(a, b))``, ``torch.norm(a - b)``, ``loss / loss.detach()``."""
        match node:
            case ast.BinOp(left=left, op=ast.Pow(), right=right):
                return self._averages(left) and _integer(right) != 1
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return self._averages(left) and self._averages(right)
            case ast.BinOp(op=ast.Div(), right=right):
                return self._averages(right) and not self._sums(right)
            case ast.Call() if _name(node) in _NORMS:
                values, *rest = _operands(node)
                is_norm = len(rest) < 2 and {k.arg for k in node.keywords} <= {"p", "ord"}
                of_object = any(isinstance(one, ast.Name) and one.id in self.taken_here for one in rest)
                return is_norm and self.is_batch(values) and not of_object  # normalizer.norm(x)
            case ast.Call() if _name(node) in OF_TWO | _ALL_ITEMS and (among := _chosen_of(node)):
                return any(map(self._averages, among))
            case ast.Call(args=[ast.Compare() as test, _, _]) | ast.IfExp(test=ast.Compare() as test) if (
                isinstance(node, ast.IfExp) or _name(node) == "where"
            ):
                return self._compares_means(test)
            case ast.Call() if _name(node) in _BENDS:
                values, *_ = _operands(node)
                return self._averages(values)
            case ast.Call() if _name(node) in _ALL_ITEMS:
                values, *rest = _operands(node)
                return _over_items(node, len(node.args) - len(rest)) and self._is_per_item(values)
        return False

    def is_chosen(self, node: ast.expr) -> bool:
        """``a`` in ``if a > b: loss = a``, for means over the items of a batch."""
        statement = self.file.names.parents.get(node)
        test = self.file.names.parents.get(statement) if isinstance(statement, ast.Assign) else None
        if not isinstance(test, ast.If) or not isinstance(test.test, ast.Compare):
            return False
        return self._averages(node) and self._compares_means(test.test)

    def _compares_means(self, test: ast.Compare) -> bool:
        return any(map(self._averages, [test.left, *test.comparators]))

    def _averages(self, node: ast.expr, deep: int = 0) -> bool:
        """Whether a value is a mean over the items of a batch, or made of one by sums and constant factors."""
        match node:
            case ast.Name(id=name):
                values = [value for held, value in self.assigned if held == name and value is not node]
                return deep < 3 and any(self._averages(value, deep + 1) for value in values)
            case ast.BinOp(left=left, right=right):
                return self._averages(left, deep) or self._averages(right, deep)
            case ast.UnaryOp(operand=value) | ast.Subscript(value=value):
                return self._averages(value, deep)
            case ast.Call(func=func, args=args, keywords=keywords):
                method = isinstance(func, ast.Attribute) and (
                    self.is_batch(func.value) or self._averages(func.value, deep)
                )
                if _name(node) == "mean":
                    given, *rest = _operands(node)
                    return self.is_batch(given) and _over_items(node, len(args) - len(rest))
                if _name(node) in _KEEP and isinstance(func, ast.Attribute):
                    return self._averages(func.value, deep)
                if _name(node) in {"softmax", "stack", "cat"}:  # weights of losses, that losses are multiplied by
                    first = _operands(node)[0]
                    held = first.elts if isinstance(first, (ast.List, ast.Tuple)) else [first]
                    return any(self._averages(value, deep) for value in held)
                if _AVERAGES.search(_name(node)) and not method and _name(node) not in self.across.of_items:
                    return all(k.arg not in _REDUCTIONS for k in keywords) and any(map(self.is_batch, args))
        return False

    def _batch_sums(self, node: ast.expr, deep: int = 0) -> set[ast.expr]:
        """The sums over the items of a batch that a value is made of."""
        found: set[ast.expr] = set()
        for item in walk(node):
            if isinstance(item, ast.Call) and _name(item) == "sum" and self.is_batch(item) and self._over_batch(item):
                found.add(item)
            elif isinstance(item, ast.Name) and deep < 3:
                for name, value in self.assigned:
                    if name == item.id and node is not value:
                        found |= self._batch_sums(value, deep + 1)
        return found

    def _over_batch(self, call: ast.Call) -> bool:
        """Whether a sum goes over the first dimension: over all, over 0, or over three and more from the end."""
        position = int(dotted(call.func) == "torch.sum")
        given = [*call.args[position : position + 1], *(k.value for k in call.keywords if k.arg in {"dim", "axis"})]
        if not given:
            return True
        written = [given[0]]
        if isinstance(given[0], ast.Name):
            written = [value for name, value in self.assigned if name == given[0].id]
        tuples = [item for value in written for item in walk(value) if isinstance(item, (ast.Tuple, ast.List))]
        for listed in tuples or written:
            dims = [_integer(item) for item in (listed.elts if isinstance(listed, (ast.Tuple, ast.List)) else [listed])]
            if 0 in dims or (len(dims) > 2 and all(dim is not None and dim < 0 for dim in dims)):
                return True
        return False

    def _sums(self, node: ast.expr) -> bool:
        """Whether a number is a sum over all of a batch, or made of one."""
        for item in walk(node):
            if isinstance(item, ast.Call) and self._is_total(item) and self.is_batch(item):
                return True
            if isinstance(item, ast.Name) and any(
                name == item.id
                and any(
                    isinstance(part, ast.Call) and self._is_total(part) and self.is_batch(part) for part in walk(value)
                )
                for name, value in self.assigned
            ):
                return True
        return False

    def _is_total(self, call: ast.Call) -> bool:
        return _is_total(call) or _is_summed(call) or _name(call) in self.across.of_sums

    def _is_number(self, node: ast.expr, deep: int = 0) -> bool:
        """Whether no gradient comes of a value: ``x.sum().item()``, and what such numbers are added up in."""
        match node:
            case ast.Constant() | ast.Call(func=ast.Attribute(attr="item")) | ast.Call(func=ast.Name(id="len")):
                return True
            case ast.Name(id=name) if deep < 3:
                values = [value for other, value in self.assigned if other == name]
                return bool(values) and all(self._is_number(value, deep + 1) for value in values)
            case ast.BinOp(left=left, right=right):
                return self._is_number(left, deep) and self._is_number(right, deep)
        return False

    def _is_mask(self, index: ast.expr) -> bool:
        made = [value for name, value in self.assigned if isinstance(index, ast.Name) and name == index.id]
        return any(
            isinstance(item, ast.Compare) or (isinstance(item, ast.Call) and _name(item) in {"bool", "ne", "eq"})
            for value in (index, *made)
            for item in walk(value)
        )

    def _is_per_item(self, node: ast.expr, deep: int = 0) -> bool:
        """Whether this is the loss of each item, ``F.cross_entropy(out, y, reduction="none")``, or a view of it."""
        match node:
            case ast.Call(func=func):
                return reduction_of(node) == "none" or self._is_per_item(func, deep)
            case ast.Attribute(value=value) | ast.Subscript(value=value):
                return self._is_per_item(value, deep)
            case ast.Name(id=name) if deep < 2:
                return any(self._is_per_item(value, deep + 1) for held, value in self.assigned if held == name)
        return False

    def _are_rows(self, left: ast.expr, right: ast.expr) -> bool:
        """``a @ b.T``: all rows of one with all of the other; so ``a @ b.mT`` where items are the second dimension."""
        made = [value for name, value in self.assigned if isinstance(right, ast.Name) and name == right.id]
        turned = next(filter(None, map(_turned, (right, *made))), None)
        if turned is None and self._is_swapped(left):
            turned = _turned_inside(right)
        return turned is not None and self.is_batch(left) and self.is_batch(turned)

    def _is_swapped(self, node: ast.expr) -> bool:
        """Whether the items of a batch have been made the second dimension: ``z = z.transpose(0, 1)``."""
        made = [value for name, value in self.assigned if isinstance(node, ast.Name) and name == node.id]
        return any(_swaps(value) for value in (node, *made))

    def _are_crossed(self, left: ast.expr, right: ast.expr) -> bool:
        """``a[:, None]`` with ``b[None]``."""
        sides = {_placed(left), _placed(right)}
        return sides == {"column", "row"} and self.is_batch(left) and self.is_batch(right)

    def _are_picked(self, left: ast.expr, right: ast.expr) -> bool:
        """``x[pairs[:, 0]]`` with ``x[pairs[:, 1]]``: pairs, or triplets, that were found among the items."""
        match left, right:
            case (
                ast.Subscript(value=one, slice=ast.Subscript(value=pairs, slice=ast.Tuple(elts=[ast.Slice(), _]))),
                ast.Subscript(value=other, slice=ast.Subscript(value=same, slice=ast.Tuple(elts=[ast.Slice(), _]))),
            ):
                alike = ast.dump(one) == ast.dump(other) and ast.dump(pairs) == ast.dump(same)
                return alike and self.is_batch(one)
        return False

    def _is_centred(self, node: ast.BinOp) -> bool:
        """``x - x.mean(0)``."""
        match node:
            case ast.BinOp(
                left=left, op=ast.Sub(), right=ast.Call(func=ast.Attribute(value=value, attr="mean")) as call
            ):
                return self.is_batch(left) and ast.dump(left) == ast.dump(value) and _over_items(call)
        return False

    def _spreads(self, call: ast.Call) -> bool:
        """``x.std(0)``, ``torch.var(x, dim=0)``, ``torch.cov(x.T)``."""
        assert isinstance(call.func, (ast.Attribute, ast.Name))
        method = isinstance(call.func, ast.Attribute) and self.is_batch(call.func.value)
        if not method and not (call.args and self.is_batch(call.args[0])):
            return False
        name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id
        return name in {"cov", "corrcoef"} or _over_items(call, 0 if method else 1)

    def _counts_items(self, size: ast.expr) -> bool:
        code = self.file.source.code(size)
        if any(isinstance(item, ast.Name) and item.id in self.sizes for item in walk(size)):
            return True
        named = [item.id for item in walk(size) if isinstance(item, ast.Name)]
        return bool(_SIZES.search(code)) and any(name in self.batch for name in named)

    def without_gradients(self, node: ast.expr) -> bool:
        """Whether ``with torch.no_grad():`` stands around a value."""
        return any(
            isinstance(parent, ast.With) and any((_name(item.context_expr)) in _OUTSIDE for item in parent.items)
            for parent in self.file.names.ancestors(node)
        )

    def _reaches(self, source: ast.expr) -> bool:
        """Whether a loss is made of a value: by a loss function, by its name, or as a mean that is returned."""
        held: set[str] = set()

        def of(node: ast.AST) -> bool:
            return any(item is source or (isinstance(item, ast.Name) and item.id in held) for item in walk(node))

        for _ in range(3):
            held |= {name for name, value in self.assigned if of(value) and (value is source or not _is_lookup(value))}
        for node in self.nodes:
            match node:
                case ast.Call(func=func, args=args):
                    method = isinstance(func, ast.Attribute) and of(func.value)
                    if LOSSES.search(_name(node)) and (method or any(map(of, args))):
                        return True
                    if method and _name(node) == "backward":
                        return True
                case ast.Assign(targets=[ast.Name(id=name)]) | ast.AugAssign(target=ast.Name(id=name)):
                    if "loss" in name.lower() and of(node.value):
                        return True
                case ast.Return(value=ast.expr() as value) if of(value):
                    if self.weighs(source) or any(_is_mean(item) and of(item) for item in walk(value)):
                        return True
        return False


def _forward_calls(owner: ast.ClassDef, method: str) -> bool:
    """Whether a class's forward calls one of its methods."""
    forwards = (node for node in owner.body if isinstance(node, Function) and node.name == "forward")
    calls = (item for forward in forwards for item in walk(forward) if isinstance(item, ast.Call))
    return any(dotted(call.func) == f"self.{method}" for call in calls)


def _is_read(node: ast.expr) -> bool:
    """Whether a value is made of numbers that were read out of the graph: ``hits.sum().item() / n``."""
    made = node.left if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) else node
    return any(isinstance(item, ast.Attribute) and item.attr in {"item", "tolist", "numpy"} for item in walk(made))


def _held_by(owner: ast.ClassDef) -> set[str]:
    """The names of the buffers and parameters that a class makes."""
    found: set[str] = set()
    for node in walk(owner):
        match node:
            case ast.Call(func=ast.Attribute(attr="register_buffer"), args=[ast.Constant(value=str(name)), *_]):
                found.add(name)
            case ast.Assign(targets=[ast.Attribute(value=ast.Name(id="self"), attr=name)], value=ast.Call() as made):
                if _name(made) in {"Parameter", "Buffer"}:
                    found.add(name)
    return found


def _is_module(owner: ast.ClassDef) -> bool:
    return any((dotted(base) or "").split(".")[-1].endswith("Module") for base in owner.bases)


def _counts_batch(owner: ast.ClassDef) -> bool:
    """Whether a class calls a first dimension the batch's: ``b, n, d = x.shape``, ``batch_size = x.size(0)``."""
    for node in walk(owner):
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=[ast.Name(id=name), *_])], value=value):
                shape = value.func if isinstance(value, ast.Call) and not value.args else value
                if getattr(shape, "attr", "") in {"size", "shape"} and _BATCH.match(name):
                    return True
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if _BATCH.match(name):
                if _is_first_size(value):
                    return True
    return False


def _is_first_size(node: ast.expr) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(attr="size"), args=[place]):
            return _integer(place) == 0
        case ast.Subscript(value=ast.Attribute(attr="shape"), slice=place):
            return _integer(place) == 0
    return False


def _writes(node: ast.AST, held: set[str]) -> bool:
    """``self.running.mul_(0.9)``, ``self.running = ...``, ``self.bias.data.copy_(...)``."""
    match node:
        case ast.Call(func=ast.Attribute(value=value, attr=attr)) if attr.endswith("_") and not attr.startswith("_"):
            written = value.value if isinstance(value, ast.Attribute) and value.attr == "data" else value
        case ast.Attribute(ctx=ast.Store(), attr="data", value=value):
            written = value
        case ast.Attribute(ctx=ast.Store()):
            written = node
        case ast.Subscript(ctx=ast.Store(), value=value):
            written = value
        case _:
            return False
    match written:
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return name in held
    return False


def _bends_last(function: ast.Lambda | Function) -> bool:
    """Whether a hook gives a root, a norm or a clamped value of its gradient."""
    given = function.args.args[-1].arg if function.args.args else ""
    if not isinstance(function, ast.Lambda) and not any(
        isinstance(node, ast.Return) and node.value is not None for node in walk(function)
    ):
        return False  # it only looks
    return any(
        isinstance(node, ast.Call)
        and _name(node).rstrip("_") in _BENDS | _NORMS | {"sign"}
        and any(isinstance(item, ast.Name) and item.id == given for item in walk(_operands(node)[0]))
        for node in walk(function)
    )


def _chosen_of(call: ast.Call) -> list[ast.expr]:
    """``a`` and ``b`` of ``max(a, b)``, ``a.max(b)``, ``max([a, b])`` and ``torch.stack([a, b]).max()``."""
    values = _operands(call)
    match values[0]:
        case ast.List(elts=held) | ast.Tuple(elts=held):
            return held
        case ast.Call(args=[ast.List(elts=held) | ast.Tuple(elts=held), *_]) if _name(values[0]) in {"stack", "cat"}:
            return held
    return values if _name(call) in OF_TWO and len(values) > 1 and _integer(values[1]) is None else []


def _operands(call: ast.Call) -> list[ast.expr]:
    """``x`` and the other arguments of ``x.norm(2)``, ``torch.norm(x, 2)``."""
    func = call.func
    if isinstance(func, ast.Attribute) and not _MODULES.match(dotted(func.value) or ""):
        return [func.value, *call.args]
    return call.args or [func]


def _name(node: ast.expr) -> str:
    func = node.func if isinstance(node, ast.Call) else node
    return str(getattr(func, "attr", getattr(func, "id", "")))


def _turned(node: ast.expr) -> ast.expr | None:
    """The tensor under ``.T``, ``.t().contiguous()``, ``.transpose(0, 1)`` or ``torch.t(...)``."""
    match node:
        case ast.Call(func=ast.Attribute(value=value, attr=attr)) if attr in _SAME_SHAPE:
            return _turned(value)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="t"), args=[value]):
            return value
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="transpose"), args=[value, first, second]):
            return value if {_integer(first), _integer(second)} == {0, 1} else None
        case ast.Attribute(value=value, attr="T"):
            return value
        case ast.Call(func=ast.Attribute(value=value, attr="t"), args=[]):
            return value
        case ast.Call(func=ast.Attribute(value=value, attr="transpose" | "permute"), args=[first, second]):
            places = {getattr(first, "value", None), getattr(second, "value", None)}
            return value if places == {0, 1} else None
    return None


def _turned_inside(node: ast.expr) -> ast.expr | None:
    """The tensor under ``.mT``, ``.transpose(1, 2)`` or ``.transpose(-2, -1)``."""
    match node:
        case ast.Attribute(value=value, attr="mT"):
            return value
        case ast.Call(func=ast.Attribute(value=value, attr="transpose"), args=[first, second]):
            return value if {_integer(first), _integer(second)} in ({1, 2}, {-1, -2}) else None
        case ast.Call(func=ast.Attribute(value=value, attr="permute"), args=[first, second, third]):
            return value if [_integer(item) for item in (first, second, third)] == [0, 2, 1] else None
    return None


def _swaps(node: ast.expr) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(attr="transpose" | "swapaxes"), args=[first, second]):
            return {_integer(first), _integer(second)} == {0, 1}
        case ast.Call(func=ast.Attribute(attr="permute"), args=[first, second, *_]):
            return _integer(first) == 1 and _integer(second) == 0
    return False


def _placed(node: ast.expr) -> str:
    """``column`` for ``a[:, None]`` and ``a.unsqueeze(1)``, ``row`` for ``a[None]`` and ``a.unsqueeze(0)``."""
    match node:
        case (
            ast.Subscript(slice=ast.Constant(value=None))
            | ast.Subscript(slice=ast.Tuple(elts=[ast.Constant(value=None), *_]))
        ):
            return "row"
        case ast.Subscript(slice=ast.Tuple(elts=[ast.Slice(lower=None, upper=None), ast.Constant(value=None), *_])):
            return "column"
        case ast.Call(func=ast.Attribute(attr="unsqueeze"), args=[ast.Constant(value=0 | 1 as place)]):
            return "column" if place else "row"
    return ""


def _crosses(node: ast.expr) -> bool:
    """Whether an einsum keeps the first dimensions of both operands apart: ``id,jd->ij``."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return False
    found = re.match(r"^([A-Za-z]+),([A-Za-z]+)->([A-Za-z]+)$", node.value.replace(" ", ""))
    if found is None:
        return False
    left, right, out = found.groups()
    return left[0] not in right and right[0] not in left and {left[0], right[0]} <= set(out)


def _over_items(call: ast.Call, position: int = 0) -> bool:
    """Whether a reduction goes over the first dimension, or over all."""
    given = [*call.args[position : position + 1], *(k.value for k in call.keywords if k.arg in {"dim", "axis"})]
    return not given or (isinstance(given[0], ast.Constant) and given[0].value == 0 and given[0].value is not False)


def _is_mean(node: ast.AST) -> bool:
    """``x.mean()``, ``torch.sum(x)``: one number of all."""
    if not isinstance(node, ast.Call) or _name(node) not in {"mean", "sum"} or node.keywords:
        return False
    return len(node.args) == int(dotted(node.func) in {"torch.mean", "torch.sum"})


def _is_total(node: ast.AST) -> TypeGuard[ast.Call]:
    """``x.sum()``: one number of all."""
    return _is_mean(node) and isinstance(node, ast.Call) and _name(node) == "sum"


def _is_summed(call: ast.Call) -> bool:
    """``F.cross_entropy(out, y, reduction="sum")``."""
    return reduction_of(call) == "sum"


def _name_of(node: ast.AST) -> str:
    return _name(node) if isinstance(node, ast.Call) else ""


def _is_lookup(node: ast.expr) -> bool:
    """Whether a value only says where something is, or how many there are."""
    return isinstance(node, ast.Call) and _name(node) in {"argmax", "argmin", "topk", "size", "len", "item", "argsort"}


def _integer(node: ast.expr) -> int | None:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))):
            return -number
    return None
