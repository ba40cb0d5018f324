"""What a loop makes of each rank's share of a batch: counts, means and samples' values that are to be the batch's."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import (
    BENT,
    Scope,
    bent,
    dotted,
    is_backward,
    item_of,
    names_in,
    positional,
    walk,
    walk_own,
)
from rewriter.analyze.training.keepers import Keepers, Kept
from rewriter.analyze.training.over_ranks import gives_whole
from rewriter.analyze.training.picked import ALL, FIRST, Picked
from rewriter.analyze.training.roles import Roles, Var, gone_through
from rewriter.analyze.training.showing import gives_text, is_text, joined_texts
from rewriter.analyze.training.writers import SHOWING_METHODS

_SIZES = {"size", "numel", "nelement", "__len__"}
_VIEWS = {
    "item", "float", "double", "int", "long", "detach", "cpu", "clone", "to", "squeeze", "numpy", "flatten", "view",
    "reshape", "half", "bool", "cuda", "type", "contiguous", "astype", "unsqueeze",
}  # fmt: skip
_FUNCTIONS = {"torch", "np", "numpy", "F", "nn.functional", "torch.nn.functional"}
_ITEM_BY_ITEM = {
    "one_hot", "relu", "gelu", "tanh", "exp", "log", "log10", "sign", "clamp", "clip", "ne", "ge", "le", "gt", "lt",
    "masked_fill", "where",
}  # fmt: skip
_NUMBERS = {"float", "int", "round", "abs", "sqrt"}
_SPELLED = {"str", "repr", "format"}
_SHOWN_AS = _SPELLED | {"round"}
_CUTS = {"item", "tolist", "numpy", "detach", "argmax", "data"}
_NAMED_MEANS = re.compile(
    r"^_?(?:\w+_)?(?:acc\d*|accuracy|prec\d*|precision|recall|top_?\d|iou|miou|dice|f1|psnr|ssim|mae|rmse|ppl|err\d+|error_rate)(?:_\w+)?$",
    re.I,
)
_BARS = 3
_PASSED = {"enumerate", "tqdm", "iter", "list", "track", "tqdm_notebook"}
_ALL = {"bmtrain.gather_result", "bmtrain.sum_loss", "bmtrain.mean", "bmtrain.total", "bmtrain.gather_samples"}
_REDUCED = {"sum": "total", "mean": "mean"}
_COMES_OF_IT = {"total", "mean", "samples", "unknown"}
_SOME = -1  # a part of a value, it is not known which
_EACH = -2  # one after another of what a value holds
Loop = ast.For | ast.While
Place = ast.For | ast.While | ast.FunctionDef | ast.AsyncFunctionDef
"""A loop that takes batches, or a function that one hands them to."""
Grown = tuple[ast.expr, bool, ast.expr]
"""A variable, whether it gets something behind what it holds, and what."""
_KEEPS = {"add", "put", "insert", "appendleft"}
"""Methods by which a set or queue takes a value; a tensor's ``add`` gives another one."""
_IN_PLACE = {"add_", "sub_", "copy_", "index_add_", "index_copy_", "index_put_", "scatter_", "scatter_add_", "fill_"}
_AT = re.compile(r"^(?:np|numpy)\.\w+\.at$")
_NO_MEANS = {"norm", "std", "var", "max", "min", "median", "amax", "amin"}
_OF_ALL_ITEMS = {"quantile", "nanquantile", "percentile", "nanpercentile", "nanmedian", "corrcoef", "cov", "dist"}
_CRITERION = re.compile(r"torch\.nn\.(?:functional\.(?:\w+_loss|\w*cross_entropy\w*|kl_div)|\w+Loss)$")
_METRICS = ("sklearn.metrics.", "scipy.stats.")
_AVERAGED = re.compile(r"accuracy_score$|mean_|loss$")
_FILES = {
    "json.dump", "pickle.dump", "torch.save", "numpy.save", "numpy.savez", "numpy.savez_compressed", "numpy.savetxt",
    "scipy.io.savemat", "yaml.dump", "joblib.dump", "torchvision.utils.save_image", "pandas.DataFrame",
    "pandas.Series", "wandb.Histogram", "wandb.Table",
}  # fmt: skip
_PICTURES = {
    "imshow", "matshow", "plot", "scatter", "hist", "hist2d", "bar", "barh", "boxplot", "violinplot", "pcolormesh",
    "contourf", "heatmap", "histplot", "scatterplot",
}  # fmt: skip
_ALL_OF = {"add_histogram", "add_images", "add_embedding"}
_ROWS = {"tolist", "numpy", "detach", "cpu"}
_OF_SHAPE = {"shape", "size", "dtype", "device", "dim", "type"}
_SUMS = {"count", "n", "num", "cnt", "total", "sum", "samples", "n_samples"}
_COUNTED = {"bincount"}
_METERS = {"update", "add", "log", "append_value", "record", "put"}


@dataclass(frozen=True)
class Share:
    """``total``, ``mean``, ``samples``: how the ranks' values become the batch's; what the loop goes through.

    ``unknown`` is what leaves the loop too, and of which it is not seen what it is.
    """

    kind: str
    loader: ast.expr | None


def shares(file: File, places: Mapping[Place, bool], kinds_of: Callable[[Place], Kinds]) -> dict[ast.expr, Share]:
    """Expressions over a rank's share of the data whose values leave the loop, or function, that has it.

    ``places`` says of each whether its data are known to be shares; where they may also be whole, the loader tells.
    Where none can be named, means in a loop that trains are averaged in any case: of whole data they are all the same.
    """
    found: dict[ast.expr, Share] = {}
    for place, known in places.items():
        loader = None if known or not isinstance(place, ast.For) else loop_over(place)
        only_means = not known and loader is None
        if only_means and not (isinstance(place, ast.For) and _runs_backward(place)):
            continue
        kinds = kinds_of(place)
        kinds.totals_become_whole = not only_means
        for expression, kind in kinds.leaving():
            if only_means and not (kind == "mean" and _reads_number(expression)):
                continue
            expression = expression if kind == "samples" else _exact(expression)
            kind = kind if kinds.comes_once(expression) else "unknown"
            if not any(parent in found for parent in (expression, *file.names.ancestors(expression))):
                found[expression] = Share(kind, loader)
    return found


def _curved(node: ast.AST) -> ast.expr | None:
    """``x`` of ``math.sqrt(x)``, ``x.log()`` and ``x ** 0.5``: the mean of the ranks' is not that of the mean."""
    match node:
        case ast.Call(func=ast.Name(id=name), args=[value]) if name in BENT:
            return value
        case ast.BinOp(left=left, op=ast.Pow()) if bent(node) is None:
            return left
        case ast.Call(func=ast.Attribute(value=value, attr=attr), args=args) if attr in _ITEM_BY_ITEM:
            return args[0] if dotted(value) in _FUNCTIONS and args else value
    return bent(node)


def loop_over(loop: ast.For) -> ast.expr | None:
    """The loader in ``enumerate(tqdm(loader))``, if it can be named again."""
    node = loop.iter
    while isinstance(node, ast.Call):
        if (dotted(node.func) or "").split(".")[-1] not in _PASSED or not node.args:
            return None
        node = node.args[0]
    inner = node
    while isinstance(inner, (ast.Attribute, ast.Subscript)):
        if isinstance(inner, ast.Subscript) and not isinstance(inner.slice, (ast.Constant, ast.Name)):
            return None
        inner = inner.value
    return node if isinstance(inner, ast.Name) else None


class Kinds:
    """What the values in one loop are, as far as they come of a batch: ``total``, ``mean``, ``samples``, ``loss``.

    What is made of the batch's first items alone (``x[0].sum()``) is an ``item``, which rank 0 has as one process does.

    ``held`` are the names that the loop, or a function in its stead, gets its batch by; ``reduced`` says of what a loss
    function makes whether it is a ``sum`` or a ``mean``, and ``in_parts`` of what a call gives at a place, or of each
    value in a collection. ``inside`` gives the same for a function that is called with something of the batch;
    ``of_all_ranks`` are values that are made of the losses of all ranks where they get a name.
    """

    def __init__(
        self,
        file: File,
        roles: Roles,
        loop: Place,
        reduced: Callable[[ast.expr], str],
        in_parts: Callable[[ast.expr, int | None], str],
        held: set[str],
        keepers: Keepers,
        inside: Callable[[FunctionInfo, set[str]], Kinds | None] = lambda function, held: None,
        shown_by: Callable[[ast.Call], list[ast.expr]] = lambda call: [],
        of_all_ranks: Collection[ast.expr] = (),
    ) -> None:
        self.file, self.roles, self.loop, self.reduced, self.keepers = file, roles, loop, reduced, keepers
        self.in_parts, self._inside, self._shown_by_call = in_parts, inside, shown_by
        self._made_of_all_ranks = of_all_ranks
        self._within: dict[tuple[ast.AST, frozenset[str], frozenset[str]], Kinds | None] = {}
        self._means = frozenset[str]()  # names that a function gets a mean or a loss by
        self.totals_become_whole = False
        self._over_ranks: dict[ast.Call, bool] = {}
        self.nodes = list(_own(loop))
        self.batch, self._held, self._asked = set(held), held, set[str]()
        self._kinds: dict[tuple[ast.expr, int, bool, frozenset[str], frozenset[object]], str] = {}
        self._rests_on: dict[ast.AST, frozenset[str]] = {}
        self.made: dict[str, list[tuple[ast.expr, int | None]]] = {}
        for node in self.nodes:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
                    if (pairs := list(assigned(target, node.value)))[1:]:
                        for part, value in pairs:
                            if isinstance(part, ast.Name):
                                self.made.setdefault(part.id, []).append((value, None))
                        continue
                    for index, part in enumerate(parts):
                        if isinstance(part, ast.Name):
                            place = None if part is target else index
                            self.made.setdefault(part.id, []).append((node.value, place))
        for node in self.nodes:
            if isinstance(node, (ast.For, ast.comprehension)):
                held_in = dict(gone_through(node.target, node.iter, displays=True))
                columns = dict(_columns(node.target, node.iter))
                for item in walk(node.target):
                    if isinstance(item, ast.Name) and item in columns:
                        self.made.setdefault(item.id, []).extend((value, None) for value in columns[item])
                    elif isinstance(item, ast.Name) and not self._is_key(node, item, held_in):
                        place = _EACH if item in held_in else _SOME
                        self.made.setdefault(item.id, []).append((held_in.get(item, node.iter), place))
        self.picked = Picked(roles, loop, self.nodes, self.made, self.of_batch, self.kind, reduced, self._asked_of)
        self.added, self.of_items = set[str](), set[str]()
        self.added, self.of_items = self._added_anew()
        self.grown = self._growing()
        for name in {
            target.id for parts in self.grown.values() for target, _, _ in parts if isinstance(target, ast.Name)
        }:
            self.made.pop(name, None)
            self.added.add(name)
        self.blended = self._blended()
        for name in {target.id for n in self.blended for target in n.targets if isinstance(target, ast.Name)}:
            self.made.pop(name, None)
            self.added.add(name)
        for _ in range(3):
            for name, values in self.made.items():
                if any(self.of_batch(value) and not self._is_drawn(value, part) for value, part in values):
                    self.batch.add(name)
        self.of_items = {name for name in self.of_items if any(self._per_item(node) for node, _ in self._growth[name])}
        self.batch |= self.of_items
        self.picked.is_settled = True

    @cached_property
    def _growth(self) -> dict[str, list[tuple[ast.AST, ast.expr]]]:
        """By name, where what is added to it: ``n += x``, ``x.append(y)``, ``x["a"] = y``."""
        found: dict[str, list[tuple[ast.AST, ast.expr]]] = {}
        for node in self.nodes:
            match node:
                case ast.AugAssign(target=ast.Name(id=name), value=value):
                    found.setdefault(name, []).append((node, value))
                case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"), args=[value]):
                    found.setdefault(name, []).append((node, value))
                case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name), slice=ast.Constant())], value=value):
                    found.setdefault(name, []).append((node, value))
        return found

    def _added_anew(self) -> tuple[set[str], set[str]]:
        """The names that the loop's passes add to, and those that each pass makes anew before it adds to them."""
        added, anew = set[str](), set[str]()
        for name, growth in self._growth.items():
            if all(self._is_made_before(name, node) for node, _ in growth):
                anew.add(name)
                self.made[name] += [(value, None) for _, value in growth]
            else:
                added |= {name} if any(isinstance(node, ast.AugAssign) for node, _ in growth) else set()
                if all(_is_nothing(value) for value, _ in self.made.get(name, ())):
                    self.made.pop(name, None)  # it begins again: ``if i % 10 == 0: print(hits); hits = 0``
        return added, anew

    def _is_made_before(self, name: str, node: ast.AST) -> bool:
        """Whether a pass of the loop gives a name a value, whatever is tested, before it comes to a node."""
        around = {node, *self.file.names.ancestors(node)}
        for value, _ in self.made.get(name, ()):
            statement = self.file.names.statement_of(value)
            block = self.file.names.siblings(statement)
            behind = block[block.index(statement) + 1 :] if statement in block else []
            if isinstance(statement, (ast.Assign, ast.AnnAssign)) and any(item in around for item in behind):
                return True
        return False

    def _growing(self) -> dict[ast.Assign, list[Grown]]:
        """The assignments that add to what a variable holds, and those under a test that give it the first."""
        found = {n: parts for n in self.nodes if isinstance(n, ast.Assign) and (parts := list(_grown(n)))}
        for name in {dotted(target) for parts in found.values() for target, _, _ in parts}:
            own = [n for n in self.nodes if isinstance(n, ast.Assign) and [dotted(t) for t in n.targets] == [name]]
            first = [node for node in own if node not in found]
            listed = all(part[1] for node in own for part in found.get(node, ()))
            tested = all(isinstance(self.file.names.parents[node], ast.If) for node in first)
            if name in self.batch or (first and not (listed and tested)):
                for node in own:
                    found.pop(node, None)
            else:
                found |= {node: [(node.targets[0], True, node.value)] for node in first}
        return found

    def _blended(self) -> dict[ast.Assign, list[ast.expr]]:
        """What of a batch goes into ``average = 0.9 * average + 0.1 * x.mean()``, and into what it is at first."""
        found: dict[ast.Assign, list[ast.expr]] = {}
        for name, values in self.made.items():
            statements = [self.file.names.statement_of(value) for value, _ in values]
            simple = [s for s in statements if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name)]
            mixes = [s for s in simple if name in _named(s.value) and _blends(s.value)]
            first = [s for s in simple if s not in mixes]
            tested = all(isinstance(self.file.names.parents[s], ast.If) and name not in _named(s.value) for s in first)
            if len(mixes) == 1 and len(simple) == len(statements) and tested:
                found |= {statement: list(_without(statement.value, name)) for statement in simple}
        return found

    def _is_drawn(self, value: ast.expr, part: int | None) -> bool:
        """Whether a part of what a function of the project gives comes of nothing that it is given of the batch."""
        found = self.roles.project.resolve(self.file, value.func) if isinstance(value, ast.Call) else None
        if not isinstance(found, FunctionInfo) or not isinstance(value, ast.Call) or part is None or part < 0:
            return False
        listed = positional(found.node)
        held = {name for name, given in zip(listed, value.args, strict=False) if self.of_batch(given)}
        held |= {keyword.arg for keyword in value.keywords if keyword.arg and self.of_batch(keyword.value)}
        if any(isinstance(given, ast.Starred) for given in value.args) or len(value.args) > len(listed):
            return False
        own = [item for statement in found.node.body for item in walk_own(statement)]
        for _ in range(3):
            for item in own:
                if isinstance(item, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.For, ast.NamedExpr)):
                    source = item.iter if isinstance(item, ast.For) else item.value
                    if source is not None and _named(source) & held:
                        targets = item.targets if isinstance(item, ast.Assign) else [item.target]
                        held |= {name for target in targets for name in _named(target)}
        returned = [item.value for item in own if isinstance(item, ast.Return)]
        return bool(returned) and all(
            isinstance(item, ast.Tuple) and part < len(item.elts) and not _named(item.elts[part]) & held
            for item in returned
        )

    def of_batch(self, node: ast.AST, bound: frozenset[str] = frozenset()) -> bool:
        """Whether a value comes of the loop's batch and is not made the ranks' yet; ``bound`` are names of its own."""
        if isinstance(node, ast.Call) and self.is_of_all_ranks(node):
            return False
        if node in self._made_of_all_ranks:
            return False
        if isinstance(node, ast.Name):
            return node.id in self.batch and node.id not in self.added and node.id not in bound
        if isinstance(node, ast.Attribute) and node.attr in {"dtype", "device", "ndim"}:
            return False
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            for one in node.generators:
                if self.of_batch(one.iter, bound):
                    return True
                bound |= names_in(one.target)  # which hold nothing else here, whatever they do elsewhere
        return any(self.of_batch(child, bound) for child in ast.iter_child_nodes(node))

    def is_of_all_ranks(self, call: ast.Call) -> bool:
        """Whether a call makes what it is given that of all ranks."""
        if call not in self._over_ranks:
            made = self.roles.project.external(self.file, call.func) in _ALL
            self._over_ranks[call] = made or gives_whole(self.roles.project, self.file, call)
        return self._over_ranks[call]

    def leaving(self) -> Iterator[tuple[ast.expr, str]]:
        """The expressions that are added up, collected, handed to meters or shown."""
        for node in self.nodes:
            yield from self._leaving_by(node)
        yield from self._shown_after()

    def shown(self) -> Iterator[tuple[ast.expr, str]]:
        """The totals and means that are shown or collected; of what is given back, all numbers of the batch."""
        for node in self.nodes:
            match node:
                case ast.Call(func=ast.Attribute(attr="append" | "writerow"), args=[value]):
                    found = self._collected("append", value)
                case ast.Return(value=ast.expr() as value) if not isinstance(self.loop, (ast.For, ast.While)):
                    parts = [part for part in self._given_back(value) if self._is_number(part)]
                    found = ((part, self.kind(part)) for part in parts)
                    yield from ((part, "unknown") for part in parts if self._is_of_some(part))
                case _:
                    found = (pair for shown in self._shown_there(node) for pair in self._entries_shown(*shown))
            yield from ((_exact(value), kind) for value, kind in found if kind in {"total", "mean"})

    def shown_inside(self) -> Iterator[tuple[ast.expr, str]]:
        """The totals and means that a function shows of what it is handed, or puts into text that it gives back."""
        for node in self.nodes:
            if isinstance(node, ast.FormattedValue):
                shown = [(node.value, self.kind(node.value))]
            else:
                shown = [pair for found in self._shown_there(node) for pair in self._entries_shown(*found)]
            yield from ((_exact(value), kind) for value, kind in shown if kind in {"total", "mean"})

    def _entries_shown(self, value: ast.expr, kind: str) -> Iterator[tuple[ast.expr, str]]:
        """What is shown, or what a dict holds that is shown by its name."""
        if kind == "unknown" and isinstance(value, ast.Name) and self._is_written_out(value):
            held = [part for made, _ in self.made[value.id] for part in _entries(made) or ()]
            yield from ((part, self.kind(part)) for part in held)
        else:
            yield value, kind

    def _is_of_some(self, node: ast.expr) -> bool:
        """Whether a number that is read is neither a sum nor a mean over the batch: ``x.max().item()``."""
        of_some = self.kind(node) in {"samples", "unknown"}
        return of_some and _reads_number(node) and self._is_statistic(_viewed(_read(node)))

    def _is_number(self, node: ast.expr) -> bool:
        """Whether a value is read out of the graph, as what is only told is: a loss that is returned is no such."""
        match node:
            case ast.Call(func=ast.Name(id="float" | "int")):
                return True
        return self._is_cut(node)

    def _given_back(self, value: ast.expr, deep: int = 0) -> Iterator[ast.expr]:
        """What a function returns, or holds in the display that it returns."""
        match value:
            case ast.Dict(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts):
                for part in parts:
                    yield from self._given_back(part, deep)
            case ast.Name(id=name) if deep < 3 and name in self.made:
                for made, _ in self.made[name]:
                    yield from self._given_back(made, deep + 1)
            case _:
                yield value

    def whole(self, test: ast.expr) -> list[tuple[ast.expr, str]] | None:
        """The totals and means in a test, if it is of nothing else of the batch; ``None`` where it is."""
        found: list[tuple[ast.expr, str]] = []
        for side in [test.left, *test.comparators] if isinstance(test, ast.Compare) else [test]:
            if self.of_batch(side):
                kind = "mean" if (kind := self.kind(side)) == "loss" else kind
                if kind not in {"total", "mean"} or isinstance(side, ast.Compare):
                    return None
                found.append((side, kind))
        return found

    def _leaving_by(self, node: ast.AST) -> Iterator[tuple[ast.expr, str]]:
        match node:
            case ast.AugAssign():
                yield from self._added_up(node)
            case ast.Assign(targets=[_]) if node in self.blended:
                yield from self._blended_in(node)
            case ast.Expr(value=ast.Call(func=func, args=[kept, place, *_])) if _AT.match(dotted(func) or ""):
                if not self._holds_inside(kept) and (self.of_batch(place) or self.of_batch(node)):
                    yield place, "unknown"
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=holder, attr=attr), args=args)) if (
                attr in _IN_PLACE and not self._holds_inside(holder)
            ):
                yield from self._put_in_place(attr, args)
            case ast.Assign() if node in self.grown:
                yield from self._put_behind(node)
            case ast.Assign(targets=[ast.Subscript() as target], value=value):
                added = _added_to_entry(target, value)
                yield from self._put_at(target, value) if added is None else self._added_at(target, added)
            case ast.Dict() | ast.Call() if (parts := _entries(node)) and any(map(self._is_number_read, parts)):
                yield from ((part, self.kind(part)) for part in parts if self._is_made_whole(part))
            case ast.Call(func=ast.Name(id="locals"), args=[]):
                held = [value for values in self.made.values() for value, part in values if part is None]
                if any(_reads_number(value) and self.kind(value) in {"mean", "total"} for value in held):
                    yield node, "unknown"
            case ast.Call(func=ast.Attribute(value=holder, attr="append" | "extend" as attr), args=[value]):
                if not self._bound_inside(holder):
                    yield from self._collected(attr, value)
            case ast.Call() if (left := self.keepers.kept(self.file, node)) is not None:
                if not self._holds_inside(node.func) or self._is_of_list(node.func):
                    yield from self._left_with_object(left, node.func)
            case ast.Call() if given := self._shown_by_call(node):
                yield from self._handed_to_show(given)
            case ast.Call(func=ast.Attribute(value=held, attr="tofile" | "dump")) if self.of_batch(held):
                yield from self._put_in_file([held])
            case ast.Call() if self._draws(node.func):
                given = [*node.args, *(keyword.value for keyword in node.keywords)]
                yield from self._put_in_file([value for value in given if not any(map(_takes_first, walk(value)))])
            case ast.Call() if (
                self.roles.project.external(self.file, node.func) in _FILES or getattr(node.func, "attr", "") in _ALL_OF
            ):
                yield from self._put_in_file([*node.args, *(keyword.value for keyword in node.keywords)])
            case ast.Call(func=ast.Attribute(attr=attr)) if attr in _METERS:
                yield from self._handed_to_meter(node, attr)
            case _:
                yield from self._shown_there(node)

    def _added_up(self, node: ast.AugAssign) -> Iterator[tuple[ast.expr, str]]:
        """``n += len(x)``."""
        target, value = node.target, node.value
        if isinstance(target, ast.Subscript) and self.of_batch(target.slice):
            if not self._holds_inside(target.value):
                yield target, "unknown"
        elif not isinstance(node.op, (ast.Add, ast.Sub)):
            if not self._holds_inside(target) and self.kind(value) in _COMES_OF_IT:
                yield value, "unknown"
        elif not self._bound_inside(target):
            kind = self.kind(value) or ("" if self.comes_once(value) else self._per_item(node))
            yield from self._split(value) if kind == "mixed" else ()
            if kind in {"total", "mean", "unknown"} or (kind == "samples" and self._is_list(value)):
                yield value, kind
            elif kind == "samples" and not self._holds_inside(target):
                yield value, "unknown"

    def _added_at(self, target: ast.Subscript, value: ast.expr) -> Iterator[tuple[ast.expr, str]]:
        """``n["seen"] = n["seen"] + len(x)``, ``n[k] = n.get(k, 0) + len(x)``."""
        kind = self.kind(value)
        if self._holds_inside(target.value):
            return
        if self.of_batch(target.slice):
            yield target, "unknown"
        elif kind == "mixed":
            yield from self._split(value)
        elif kind in _COMES_OF_IT:
            yield value, kind if kind != "samples" or self._is_list(value) else "unknown"

    def _blended_in(self, node: ast.Assign) -> Iterator[tuple[ast.expr, str]]:
        """``average = 0.9 * average + 0.1 * x.mean()``."""
        for value in self.blended[node]:
            kind = self.kind(value)
            if _is_extreme(node.value) and kind in _COMES_OF_IT:
                yield value, "unknown"
            elif kind in {"total", "mean"} or (kind == "unknown" and self._is_entry(value)):
                yield value, kind

    def _put_in_place(self, attr: str, args: list[ast.expr]) -> Iterator[tuple[ast.expr, str]]:
        """``n.add_(len(x))``."""
        kinds = [(value, self.kind(value)) for value in args]
        for value, kind in [(v, k) for v, k in kinds if k in _COMES_OF_IT][:1]:
            yield value, "total" if kind == "total" and attr in {"add_", "sub_"} else "unknown"

    def _put_behind(self, node: ast.Assign) -> Iterator[tuple[ast.expr, str]]:
        """``all = torch.cat([all, x])``, ``n = n + len(x)``."""
        for variable, listed, value in self.grown[node]:
            kind = "" if self._bound_inside(variable) else self.kind(value)
            if kind == "mixed" and not listed:
                yield from self._split(value)
            elif listed and kind in {"samples", "unknown", "mean", "total"}:
                cut = kind in {"samples", "unknown"} and self._is_cut(value)
                yield value, "samples" if cut else "unknown"
            elif kind in {"total", "mean", "unknown"} or (kind == "samples" and self._is_list(value)):
                yield value, kind

    def _put_at(self, target: ast.Subscript, value: ast.expr) -> Iterator[tuple[ast.expr, str]]:
        """``values[step] = x.mean()``, ``logs["a"] = x.mean().item()``."""
        kept, place = target.value, target.slice
        if isinstance(place, ast.Constant) and self._is_mean_read(value):
            yield value, "mean"
        elif isinstance(place, ast.Constant) and not self._holds_inside(kept) and _reads_rows(value):
            if self.kind(value) in {"samples", "unknown"}:
                yield value, "unknown"
        if self._bound_inside(kept) or isinstance(place, ast.Constant):
            return
        kind = self.kind(value)
        some = self.of_batch(place) or self._counts(place) or (_reads_number(value) and not self._holds_inside(kept))
        if kind in {"samples", "unknown"} and some:
            yield value, "unknown"
        elif self.of_batch(place) and not self._holds_inside(kept):
            yield target, "unknown"
        elif (kind in {"mean", "total"} or (kind and _counts_distinct(value))) and not self._holds_inside(kept):
            yield value, kind

    def _is_mean_read(self, value: ast.expr, deep: int = 0) -> bool:
        """``x.mean().item()``, or a name of it: the number of a mean, which becomes that of all ranks there."""
        held = [value]
        if isinstance(value, ast.Name) and value.id not in self._growth:
            held = [made if part is None else value for made, part in self.made.get(value.id, ())]
        read = bool(held) and all(map(_reads_number, held))
        return read and self.kind(value, deep) == "mean" and self.comes_once(value)

    def _is_number_read(self, value: ast.expr, deep: int = 0) -> bool:
        """``loss.item()``, ``x.mean().item()``: what tells that a dict is of numbers to show or keep."""
        return self._is_mean_read(value, deep) or (self.kind(value, deep) == "loss" and self._is_read_loss(value, deep))

    def _is_made_whole(self, value: ast.expr, deep: int = 0) -> bool:
        """Whether an entry beside such a number becomes that of all ranks where it is written."""
        if self._is_mean_read(value, deep):
            return True
        return (
            self.totals_become_whole
            and self.kind(value, deep) == "total"
            and (_reads_number(value) or self.is_size(value) or _is_whole_number(value))
            and self.comes_once(value)
        )

    def _is_written_out(self, node: ast.expr) -> bool:
        """Whether a name holds a dict that each pass of the loop writes out, so that its keys are none of the batch."""
        if not isinstance(node, ast.Name):
            return False
        later = [value for _, value in self._growth.get(node.id, ())]
        values = [value for value, part in self.made.get(node.id, []) if value not in later and part is None]
        return bool(values) and all(_entries(value) is not None for value in values)

    def _is_dict(self, node: ast.expr) -> bool:
        """Whether a name holds a dict: one that is written out, or that gets entries by names."""
        made = self.made.get(node.id, []) if isinstance(node, ast.Name) else []
        if self._is_written_out(node) or any(self._gives_numbers(value) for value, _ in made):
            return True
        return any(
            isinstance(item, ast.Subscript) and isinstance(item.ctx, ast.Store)
            and isinstance(item.slice, ast.Constant) and isinstance(item.slice.value, str)
            and isinstance(node, ast.Name) and dotted(item.value) == node.id
            for item in self.nodes
        )  # fmt: skip

    def _holds_whole_numbers(self, name: str, deep: int) -> bool:
        """Whether all that such a dict is given, at once or later, is of all ranks, or nothing of the batch."""
        later = [value for _, value in self._growth.get(name, ())]
        return deep < 8 and all(
            self._is_read_loss(value, deep) or self._is_mean_read(value, deep + 1)
            if value in later
            else self.kind(value, deep + 1) in {"", "item", "loss"}
            for value, _ in self.made[name]
        )

    def _collected(self, attr: str, value: ast.expr) -> Iterator[tuple[ast.expr, str]]:
        """``values.append(x.mean())``, ``labels.extend(y.tolist())``."""
        kind = self.kind(value)
        if isinstance(value, (ast.DictComp, ast.ListComp)) and all(map(self._goes_through_parts, value.generators)):
            yield from self._collected("append", value.value if isinstance(value, ast.DictComp) else value.elt)
        elif isinstance(value, (ast.Tuple, ast.List, ast.Dict)):
            yield from self._of_row(value)
        elif kind in {"total", "mean"} and attr == "append":
            yield value, kind
        elif kind == "mixed":
            yield from self._split(value)
        elif kind in {"samples", "unknown"} and self._is_cut(value) and not is_text(value):
            unclear = _is_no_mean(value) or self._is_crossed(value) or self._is_dict(value)
            unclear = unclear or self._gives_places(value) or self._is_bent(value)
            unclear = unclear or self._is_of_no_rows(value) or self._is_of_metric(value)
            yield value, "unknown" if unclear or self._is_number_of_model(value) else "samples"
        elif kind in {"samples", "unknown"} and not is_text(value):
            yield value, "unknown"

    def _gives_places(self, node: ast.expr, deep: int = 0) -> bool:
        """Whether a value tells places in the batch, which are others in a share: ``torch.where(y == 0)[0]``."""
        for item in walk(node):
            if isinstance(item, ast.Call) and _asks_where(item):
                return True
            if isinstance(item, ast.Name) and deep < 3:
                if any(self._gives_places(value, deep + 1) for value, _ in self.made.get(item.id, ())):
                    return True
        return False

    def _is_bent(self, node: ast.expr, deep: int = 0) -> bool:
        """Whether a value is made of a function of a mean or total, and no multiple: ``10 * x.mean().log10()``."""
        for item in walk(node):
            if isinstance(item, ast.expr) and self._is_curve(item, 0):
                return True
            made = self.made.get(item.id, ()) if isinstance(item, ast.Name) and deep < 3 else ()
            if any(self._is_bent(value, deep + 1) for value, part in made if part is None):
                return True
        return False

    def _is_curve(self, node: ast.expr, deep: int) -> bool:
        """Whether a value is such a function itself, and not made of one: ``x.mean().log10()``, ``1 / x.mean()``."""
        inner = _curved(node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            return self.kind(node.right, deep + 1) == "mean"
        return inner is not None and self.kind(inner, deep + 1) in {"mean", "total"}

    def _is_of_no_rows(self, node: ast.expr, deep: int = 0) -> bool:
        """Whether a list has no row for each item: ``x.mean(0).tolist()``, ``[(y == c).sum() for c in classes]``."""
        made = self.made.get(node.id, ()) if isinstance(node, ast.Name) and deep < 3 else ()
        if any(part is None and self._is_of_no_rows(value, deep + 1) for value, part in made):
            return True
        match node:
            case ast.ListComp(generators=[one, *_]) | ast.Dict(values=[ast.ListComp(generators=[one, *_])]):
                return not self.of_batch(one.iter)
            case ast.Call(func=ast.Attribute(value=inner, attr="tolist")):
                return self.kind(inner) in {"mean", "total"}
        return False

    def _is_of_metric(self, node: ast.expr, deep: int = 0) -> bool:
        """Whether a value is made of all items together: ``roc_auc_score(y, p)``, ``np.percentile(x, 90)``."""
        for item in walk(node):
            made = self.made.get(item.id, ()) if isinstance(item, ast.Name) and deep < 3 else ()
            if any(part is None and self._is_of_metric(value, deep + 1) for value, part in made):
                return True
            name = self.roles.project.external(self.file, item.func) if isinstance(item, ast.Call) else ""
            if name.startswith(_METRICS) and not _AVERAGED.search(name):
                return True
            if isinstance(item, ast.Call) and getattr(item.func, "attr", "") in _OF_ALL_ITEMS:
                return True
        return False

    def _put_in_file(self, given: list[ast.expr]) -> Iterator[tuple[ast.expr, str]]:
        """``np.save(path, out.numpy())``, ``json.dump({"labels": y.tolist()}, file)`` of each batch, or of the last."""
        for value in _parts([item for part in given for item in (_entries(part) or [part])]):
            kind = self.kind(value)
            if kind in {"total", "mean"}:
                if _reads_number(value) or self.is_size(value):
                    yield value, kind
                elif self._is_cut(value):
                    yield value, "unknown"
            elif kind in {"samples", "unknown"} and not is_text(value):
                yield value, "unknown"

    def _draws(self, func: ast.expr) -> bool:
        """Whether a call draws a picture: ``plt.imshow``, ``axis.scatter``, not a tensor's ``scatter``."""
        if self.roles.project.external(self.file, func) == "wandb.Image":
            return True
        if not isinstance(func, ast.Attribute) or func.attr not in _PICTURES:
            return False
        return dotted(func.value) not in _FUNCTIONS and not self.of_batch(func.value)

    def _is_number_of_model(self, value: ast.expr) -> bool:
        """Whether a value is the number that a model gives beside others, ``out, used = model(x)``: ``used.item()``."""
        if not _reads_number(value):
            return False
        names = [item.id for item in walk(value) if isinstance(item, ast.Name) and item.id in self.made]
        made = [(given, part) for name in names for given, part in self.made[name]]
        return len(names) == 1 and all(
            part is not None and isinstance(given, ast.Call) and self.roles.is_model(given.func) for given, part in made
        )

    def _handed_to_meter(self, call: ast.Call, attr: str) -> Iterator[tuple[ast.expr, str]]:
        """``meter.update(acc, len(x))``."""
        given = list(_parts([*call.args, *(keyword.value for keyword in call.keywords)]))
        kinds = [(value, self.kind(value)) for value in given]
        sizes_only = all(kind != "total" or self.is_size(value) for value, kind in kinds)
        sizes_only = sizes_only and not self._shows_sum(call.func)
        for value, kind in kinds:
            if kind == "mean" or (kind == "total" and not sizes_only):
                yield value, kind
            elif kind in {"samples", "unknown"} and (
                attr == "update"
                or self._is_kept(call)
                or (attr == "log" and self._is_cut(value) and not isinstance(value, ast.Dict))
            ):
                yield value, "unknown"
            elif kind == "mixed":
                yield from self._split(value)

    def _shows_sum(self, func: ast.expr) -> bool:
        """Whether more is read of what adds up than its average: ``meter.count`` of ``meter.update(loss, len(x))``."""
        holder = dotted(func.value) if isinstance(func, ast.Attribute) else dotted(func)
        return holder is not None and any(
            isinstance(item, ast.Attribute) and item.attr in _SUMS and dotted(item.value) == holder
            for item in self.file.nodes
        )

    def _handed_to_show(self, given: list[ast.expr]) -> Iterator[tuple[ast.expr, str]]:
        """``self.log({"accuracy": hits.mean()}, n=len(x))`` of a method of the project that only shows it."""
        for value in _parts(given):
            kind = self.kind(value)
            if kind in {"total", "mean"}:
                yield value, kind
            elif kind == "mixed":
                yield from self._split(value)
            elif kind == "unknown" and (self._is_entry(value) or _reads_number(value)):
                yield value, kind

    def _left_with_object(self, kept: Kept, func: ast.expr) -> Iterator[tuple[ast.expr, str]]:
        """``metric(out.argmax(1), y)``, ``counter.count(hits, len(y))`` of an object of the project that adds up."""
        kinds = [(value, self.kind(value)) for value in kept.given]
        averages = all(kind in {"mean", "loss", ""} or self.is_size(value) for value, kind in kinds)
        averages = averages and not self._shows_sum(func)
        for value, kind in kinds:
            if kind == "unknown" or (kind == "samples" and not (kept.seen and self._is_table(value))):
                yield value, "unknown"
                return
        for value, kind in kinds:
            if kind == "loss" and not kept.seen and self._is_tensor(value):
                yield value, "unknown"
            elif kind in {"mean", "samples"} or (kind == "total" and not (averages and len(kinds) > 1)):
                yield value, kind
            elif kind == "mixed":
                yield from self._split(value)

    def _is_of_list(self, func: ast.expr) -> bool:
        """``for metric in metrics: metric(out, y)``, of objects that are there before the batch is."""
        while isinstance(func, ast.Attribute):
            func = func.value
        return isinstance(func, ast.Name) and all(
            part is not None and part < 0 and not self.of_batch(value)
            for value, part in self.made.get(func.id, [(func, None)])
        )

    def _is_table(self, node: ast.expr) -> bool:
        """Whether a value of all samples has a row for each, and leaves no gradient behind."""
        all_at_once = (
            isinstance(self.loop, ast.For) and isinstance(node, ast.Name) and dotted(self.loop.target) == node.id
        )
        return self._is_cut(node) and not all_at_once

    @staticmethod
    def _is_tensor(node: ast.expr) -> bool:
        """Whether a loss is given as it is, and not as a number that was read of it."""
        return not any(isinstance(item, ast.Attribute) and item.attr in {"item", "tolist"} for item in walk(node))

    def _shown_there(self, node: ast.AST) -> Iterator[tuple[ast.expr, str]]:
        """``print(len(x))``."""
        for value in self._shown(node):
            kind = self.kind(value)
            if isinstance(value, ast.Dict) and kind == "unknown":
                yield from self._of_row(value)
            elif kind in {"total", "mean"}:
                yield value, kind
            elif kind == "mixed":
                yield from self._split(value)
            elif kind == "unknown" and (self._is_entry(value) or self._is_written_out(value)):
                yield value, kind
            elif kind in {"samples", "unknown"} and any(
                f(value) for f in (self._is_cut, self.is_size, _is_one_number, self._is_bent)
            ):
                if _counts_distinct(value) or self.is_size(value) or not (_tells_shape(value) or is_text(value)):
                    yield value, "unknown"

    def _shown_after(self) -> Iterator[tuple[ast.expr, str]]:
        """What the last batch has left in names, where it is shown behind the loop."""
        if not isinstance(self.loop, (ast.For, ast.While)):
            return
        following: list[ast.AST] = []
        statement: ast.AST = self.loop
        while isinstance(statement, ast.stmt) and not isinstance(statement, Scope):
            block = self.file.names.siblings(statement)
            following += [item for other in block[block.index(statement) + 1 :] for item in walk_own(other)]
            statement = self.file.names.parents[statement]
        anew = {item.id for item in following if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store)}
        for value in (value for item in following for value in self._shown(item)):
            kind = "" if _named(value) & anew else self.kind(value)
            if (kind in {"total", "mean"} and not self._holds_loss(value)) or (
                kind == "unknown" and self._is_written_out(value)
            ):
                yield value, kind

    def _holds_loss(self, node: ast.expr) -> bool:
        """Whether a name in a value holds a loss's number, which is read as that of all ranks."""
        held = [self.made[name] for name in _named(node) if name in self.made]
        return any(all(self.kind(value) in {"", "loss"} for value, _ in values) for values in held)

    def _is_kept(self, call: ast.Call) -> bool:
        """Whether a set, or a queue, takes what a call gives it."""
        holder = call.func.value if isinstance(call.func, ast.Attribute) else call.func
        kept = isinstance(call.func, ast.Attribute) and call.func.attr in _KEEPS
        return kept and isinstance(self.file.names.parents[call], ast.Expr) and not self._holds_inside(holder)

    def _holds_inside(self, target: ast.expr) -> bool:
        """Whether something is, or is a part of, what is made anew for each batch."""
        while isinstance(target, (ast.Subscript, ast.Attribute)):
            target = target.value
        return self._bound_inside(target)

    def _is_entry(self, node: ast.expr) -> bool:
        """``logs["a"]`` of what was made of the batch."""
        match node:
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str())):
                return name in self.made
            case ast.Call(func=ast.Attribute(value=inner, attr="item")):
                return self._is_entry(inner)
        return False

    def _split(self, node: ast.expr) -> Iterator[tuple[ast.expr, str]]:
        """The totals in ``step * size + len(x)``; the rest of it is what one process has, too."""
        kind = self.kind(node)
        if kind != "mixed":
            yield from [(node, kind)] if kind else []
            return
        match node:
            case ast.BinOp(left=left, right=right):
                yield from self._split(left)
                yield from self._split(right)
            case ast.UnaryOp(operand=inner) | ast.Call(func=ast.Name(), args=[inner, *_]):
                yield from self._split(inner)
            case ast.Call(func=ast.Attribute(value=inner)):
                yield from self._split(inner)
            case _:
                yield node, "unknown"

    def _of_row(self, row: ast.Tuple | ast.List | ast.Dict) -> Iterator[tuple[ast.expr, str]]:
        """What a row of a table is made of; losses in it are read by themselves, and so is what a text shows."""
        for value in row.values if isinstance(row, ast.Dict) else row.elts:
            if isinstance(value, (ast.Tuple, ast.List, ast.Dict)):
                yield from self._of_row(value)
            elif not is_text(value):
                kind = self.kind(value)
                if kind in {"total", "mean"}:
                    yield value, kind
                elif kind in {"samples", "unknown"}:
                    yield value, "unknown"

    def comes_once(self, node: ast.AST) -> bool:
        """Whether every rank comes to a value once for each batch, or behind the loop, whatever its share holds."""
        around = {self.loop, *self.file.names.ancestors(self.loop)}
        for parent in self.file.names.ancestors(node):
            if parent in around:
                return True
            if isinstance(parent, (ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)):
                if not all(map(self._goes_through_parts, parent.generators)):
                    return False
            elif isinstance(parent, ast.For) and self._goes_through_parts(parent):
                continue
            if isinstance(parent, (ast.For, ast.While, ast.Try, ast.comprehension, ast.Lambda, ast.BoolOp)):
                return False
            if isinstance(parent, (ast.If, ast.IfExp)) and self._asks_of_items(parent.test):
                return False
        return False

    def _is_key(self, loop: ast.For | ast.comprehension, name: ast.Name, held_in: Mapping[ast.Name, ast.expr]) -> bool:
        """Whether a name is that of what a function collects, in ``for name, loss in losses.items()``."""
        if self._is_written_out(loop.iter) or (
            name not in held_in and any(map(self._is_written_out, held_in.values()))
        ):
            return True
        of_items = isinstance(loop.iter, ast.Call) and getattr(loop.iter.func, "attr", "") == "items"
        return of_items and name not in held_in and any(self.in_parts(holder, None) for holder in held_in.values())

    def _goes_through_parts(self, loop: ast.For | ast.comprehension) -> bool:
        """Whether it goes through what is written out, or what a function collects: ``losses.items()``."""
        if any(column for _, column in _columns(loop.target, loop.iter)):
            return True
        holders = [holder for _, holder in gone_through(loop.target, loop.iter, displays=True)]
        of_batch = [holder for holder in holders if self.of_batch(holder)]
        return bool(of_batch) and all(
            isinstance(holder, (ast.Tuple, ast.List)) or self._display(holder) is not None
            or self.in_parts(holder, None) for holder in of_batch
        )  # fmt: skip

    def _display(self, holder: ast.expr) -> ast.Tuple | ast.List | None:
        """``[a, b]`` where a name gets it, and nothing else."""
        match self.made.get(holder.id, []) if isinstance(holder, ast.Name) else []:
            case [((ast.Tuple() | ast.List()) as display, None)] if display.elts:
                return display
        return None

    def _shown(self, node: ast.AST) -> Iterator[ast.expr]:
        """What a node shows, without the texts that it is joined with."""
        for value in self._shown_by(node):
            yield from joined_texts(value)

    def _shown_by(self, node: ast.AST) -> Iterator[ast.expr]:
        match node:
            case ast.FormattedValue(value=value):
                yield value
            case ast.Call(func=ast.Name(id="print"), args=values):
                yield from (value.value if isinstance(value, ast.DictComp) else value for value in values)
            case ast.Call() | ast.BinOp() if (held := self._put_into_text(node)) is not None:
                is_spelled = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                yield from (value for value in held if not is_spelled or self.kind(value) in {"total", "mean"})
            case ast.Call(func=ast.Attribute(attr=attr)):
                if attr in SHOWING_METHODS or attr in {"write", "writelines"}:
                    yield from _parts([*node.args, *(keyword.value for keyword in node.keywords)])

    def _put_into_text(self, node: ast.AST) -> list[ast.expr] | None:
        """What ``f"{x}"``, ``form.format(x)``, ``form % x``, ``str(x)`` and ``" ".join([x])`` make a text of."""
        match node:
            case ast.JoinedStr(values=values):
                return [part.value for part in values if isinstance(part, ast.FormattedValue)]
            case ast.Call(func=ast.Name(id=name), args=[value, *_]) if name in _SPELLED:
                return [value]
            case ast.Call(func=ast.Attribute(attr="format") as func, args=args, keywords=keywords):
                is_text = self.roles.function_called(func) is None
                return [*args, *(keyword.value for keyword in keywords)] if is_text else None
            case ast.Call(func=ast.Attribute(attr="join", value=between), args=[joined]) if self._is_string(between):
                return self._joined_values(joined)
            case ast.BinOp(op=ast.Mod(), right=ast.Tuple(elts=held)):
                return held
            case ast.BinOp(left=left, op=ast.Mod(), right=right) if self._is_string(left):
                return [right]
        return None

    def _joined_values(self, node: ast.expr) -> list[ast.expr] | None:
        """``x, y`` of ``[x, y]``, ``map(str, (x, y))`` and, if each is something else, ``[str(v) for v in (x, y)]``."""
        match node:
            case ast.List(elts=held) | ast.Tuple(elts=held):
                return held
            case ast.Call(func=ast.Name(id="map"), args=[ast.Name(id=name), inner]) if name in _SPELLED:
                return self._joined_values(inner)
            case ast.ListComp(generators=[one]) | ast.GeneratorExp(generators=[one]):
                alike = self._part(one.iter, _EACH, "", 0) != "unknown"  # then it is made whole where it is shown
                return None if alike else self._joined_values(one.iter)
        return None

    def _is_string(self, node: ast.expr) -> bool:
        made = self.file.names.values_of(node) if isinstance(node, ast.Name) else [node]
        return bool(made) and all(isinstance(one, ast.Constant) and isinstance(one.value, str) for one in made)

    def _is_line(self, node: ast.expr) -> bool:
        """``"=" * n``, or a name of text, to which more may be added: how long it is, is no size of a batch."""
        match node:
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return self._is_string(left) or self._is_string(right)
            case ast.Name():
                values = [one for one in self.file.names.values_of(node) if not self._adds(one)]
                return bool(values) and all(is_text(one) or self._is_string(one) for one in values)
        return is_text(node)

    def _adds(self, value: ast.expr) -> bool:
        return isinstance(self.file.names.parents.get(value), ast.AugAssign)

    def _is_whole_in_text(self, value: ast.expr, deep: int) -> bool:
        """Whether a text has the number of all ranks where a value is put into it."""
        return self._is_read_loss(value, deep) or self.kind(value, deep + 1) in {"", "total", "mean"}

    def _per_item(self, node: ast.AST) -> str:
        """``unknown`` for ``hits += 1`` in a loop over the items of a batch, or where they are as asked.

        In a loop that trains on parts of a batch it counts steps; that there are fewer is said of the loop.
        """
        for parent in self.file.names.ancestors(node):
            if parent is self.loop or (isinstance(parent, ast.For) and _runs_backward(parent)):
                return ""
            asked = parent.iter if isinstance(parent, ast.For) else getattr(parent, "test", None)
            named = isinstance(parent, ast.For) and self._goes_through_parts(parent)
            if asked is not None and not named and self._asks_of_items(asked):
                return "unknown"
        return ""

    def _bound_inside(self, target: ast.expr) -> bool:
        """Whether a name is made anew for each batch."""
        return isinstance(target, ast.Name) and (target.id in self.made or target.id in self.batch)

    def is_size(self, node: ast.expr, deep: int = 0) -> bool:
        if isinstance(node, ast.Name):
            return deep < 4 and any(self.is_size(value, deep + 1) for value, _ in self.made.get(node.id, []))
        match node:
            case ast.Call(func=ast.Name(id="len")) | ast.Subscript(value=ast.Attribute(attr="shape")):
                return True
            case ast.Call(func=ast.Attribute(attr=attr)):
                return attr in _SIZES
        return False

    def counts_parts(self, node: ast.expr) -> bool:
        """Whether ``len(batch)`` is how many tensors it has: ``x, y = batch``, ``[t.to(device) for t in batch]``."""
        match node:
            case ast.Call(func=ast.Name(id="len"), args=[ast.Name(id=name)]):
                return name in self._in_parts
        return False

    @cached_property
    def _in_parts(self) -> set[str]:
        """The names of batches that are lists of tensors, as they are unpacked, read in two places, or moved."""
        found, places = set(), dict[str, set[int]]()
        for node in self.nodes:
            match node:
                case (
                    ast.Assign(targets=[ast.Tuple() | ast.List()], value=ast.Name(id=name))
                    | ast.Assign(
                        targets=[ast.Tuple() | ast.List()],
                        value=ast.ListComp(generators=[ast.comprehension(iter=ast.Name(id=name), ifs=[])])
                        | ast.GeneratorExp(generators=[ast.comprehension(iter=ast.Name(id=name), ifs=[])])
                        | ast.Call(func=ast.Name(id="map"), args=[_, ast.Name(id=name)]),
                    )
                ):
                    found.add(name)
                case ast.Assign(targets=[target], value=value):
                    for _, given in assigned(target, value):
                        match _viewed(given):
                            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int(place))):
                                places.setdefault(name, set()).add(place)
                case ast.Call(args=args) if args and isinstance(args[-1], ast.Starred):
                    found |= {args[-1].value.id} if isinstance(args[-1].value, ast.Name) else set()
                case ast.ListComp(elt=elt, generators=[each]) | ast.GeneratorExp(elt=elt, generators=[each]):
                    match elt, each.target, each.iter:
                        case (
                            ast.Call(func=ast.Attribute(value=ast.Name(id=part), attr="to" | "cuda")),
                            ast.Name(id=bound),
                            ast.Name(id=name),
                        ) if part == bound:
                            found.add(name)
        found |= {name for name, seen in places.items() if len(seen) > 1}
        return found & self.batch

    def _is_list(self, node: ast.expr) -> bool:
        called = node.func if isinstance(node, ast.Call) else None
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        return isinstance(node, (ast.ListComp, ast.List)) or name in {"tolist", "list"}

    def _counts(self, place: ast.expr) -> bool:
        """Whether a place is counted up from batch to batch: ``values[seen : seen + len(x)]``."""
        return any(isinstance(item, ast.Name) and item.id in self.added for item in walk(place))

    def _is_cut(self, node: ast.expr, deep: int = 0) -> bool:
        """Whether a value is outside of the graph, so that no gradient is lost when it is gathered."""
        if self._without_gradients or _counts_distinct(node):
            return True
        if isinstance(node, ast.Name):
            made = self.made.get(node.id) if deep < 4 else None  # of what is made of itself, ``y = y.cpu()``
            return any(self._is_cut(value, deep + 1) for value, _ in made) if made else node.id in self.batch
        if any(isinstance(item, ast.Attribute) and item.attr in _CUTS for item in walk(node)):
            return True
        if self._gives_numbers(node):
            return True
        return (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and self._is_cut(node.func.value, deep)
        )

    def _gives_numbers(self, node: ast.expr) -> bool:
        """Whether a function of the project gives a dict that is written out, with numbers that it has read."""
        function = self.roles.function_called(node.func) if isinstance(node, ast.Call) else None
        return function is not None and any(
            isinstance(value, ast.Dict) and any(map(_reads_number, value.values)) for value in _returned(function, None)
        )

    @cached_property
    def _without_gradients(self) -> bool:
        """Whether the loop stands under ``torch.no_grad()``, or in a function that does."""
        for parent in self.file.names.ancestors(self.loop):
            around: list[ast.expr] = []
            if isinstance(parent, ast.With):
                around = [item.context_expr for item in parent.items]
            elif isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)):
                around = parent.decorator_list
            for item in around:
                called = item.func if isinstance(item, ast.Call) else item
                if self.roles.project.external(self.file, called) in {"torch.no_grad", "torch.inference_mode"}:
                    return True
            if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)):
                return False
        return False

    # Kinds -----------------------------------------------------------------------------------------------------

    def kind(self, node: ast.expr, deep: int = 0) -> str:
        """Empty for what does not come of the batch."""
        name = node.id if isinstance(node, ast.Name) else ""
        if name in self._asked:  # ``x = x.to(device)``
            return "samples" if name in self._held else ""
        if not self.picked.is_settled:
            return self._kind_within(name, node, deep)
        key = node, deep, self.totals_become_whole, self._means, self._asked_of(node)
        if key not in self._kinds:
            self._kinds[key] = self._kind_within(name, node, deep)
        return self._kinds[key]

    def _kind_within(self, name: str, node: ast.expr, deep: int) -> str:
        """The kind of ``node``, while its ``name`` counts as asked, if it is one."""
        self._asked |= {name} - {""}
        found = self._kind(node, deep)
        self._asked.discard(name)
        return found

    def _asked_of(self, node: ast.AST) -> frozenset[object]:
        """What is being asked further out, of all that an answer about ``node`` may rest on."""
        if node not in self._rests_on:
            self._rests_on[node] = frozenset().union(*(self._made_of.get(name, {name}) for name in _named(node)))
        return (self._rests_on[node] & self._asked) | self.picked.asked

    @cached_property
    def _made_of(self) -> dict[str, set[str]]:
        """The names that a name is made of, itself among them, and those that they are made of."""
        direct = {name: {name}.union(*(_named(value) for value, _ in values)) for name, values in self.made.items()}
        for name, values in self._growth.items():
            direct.setdefault(name, {name}).update(*(_named(value) for _, value in values))
        found = {name: set(names) for name, names in direct.items()}
        for _ in found:
            more = {name: names.union(*(found.get(one, ()) for one in names)) for name, names in found.items()}
            if more == found:
                break
            found = more
        return found

    def _kind(self, node: ast.expr, deep: int) -> str:
        if deep > 8 or not self.of_batch(node):
            return ""
        variable: Var | None = self.roles.var(node) if isinstance(node, (ast.Name, ast.Attribute)) else None
        if variable is not None and variable in self.roles.losses:
            return "total" if self.reduced(node) == "sum" else "loss"
        if self.picked.items(node) == {FIRST}:
            return "item"
        if self._is_curve(node, deep) or (isinstance(node, ast.Call) and self._is_of_metric(node, 3)):
            return "unknown"
        if (bends := _curved(node)) is not None and self.kind(bends, deep + 1) == "loss":
            if self._is_read_loss(bends, deep):
                return ""  # whose number is that of all ranks
        match node:
            case ast.Call(func=ast.Name(id="len"), args=[text]) if self._is_line(text):
                return ""
            case ast.BinOp(op=ast.Mult()) if self._is_line(node):
                return ""
            case ast.Call() | ast.JoinedStr() | ast.BinOp() if (held := self._put_into_text(node)) is not None:
                return "" if all(self._is_whole_in_text(value, deep) for value in held) else "unknown"
            case ast.Dict() | ast.DictComp() | ast.Call() if (held := _entries(node)) is not None:
                if all(self._is_read_loss(value, deep) for value in held):
                    return "loss"
                return "" if self._is_of_whole_numbers(held, deep) else "unknown"
            case ast.Call() if (given := self._given(node)) != "unknown":
                return given
            case ast.Call() if self.roles.gives_loss(node, self.roles.losses):
                return "loss"
            case ast.Name(id=name):
                if name not in self.made:
                    return "mean" if name in self._means else "samples"
                if name in self.of_items:
                    return "unknown"
                if self._is_written_out(node) and self._holds_whole_numbers(name, deep):
                    return ""
                kinds = {self._part(value, part, name, deep) for value, part in self.made[name]}
                again = name in self._growth or any(name in _named(value) for value, _ in self.made[name])
                if again and len(kinds) > 1:
                    kinds -= {""}  # what it is before anything is added, or made of it
                if kinds == {""}:  # a function's loss, which is read there
                    return ""
                if kinds == {"loss"} and all(self._is_read_loss(value, deep) for value, _ in self.made[name]):
                    return "loss"  # a number, which is read as that of all ranks where it gets its name
                if kinds == {"loss", "mean"}:
                    return "mean"
                if any(self._is_skewed(value, deep) for value, part in self.made[name] if part is None):
                    return "unknown"
                if any(self._is_crossed(value, deep + 1) for value, part in self.made[name] if part is None):
                    return "samples" if kinds == {"samples"} else "unknown"
                return _REDUCED.get(self.reduced(node)) or (kinds.pop() if len(kinds) == 1 else "unknown")
            case ast.expr() if _counts_distinct(node):
                return "unknown"
            case ast.Call(func=ast.Name(id="len")) | ast.Subscript(value=ast.Attribute(attr="shape")):
                return self._total_of(node) if self._first_dimension(node) and not self.counts_parts(node) else ""
            case ast.Call(
                func=ast.Attribute(attr="stack" | "tensor"), args=[ast.List(elts=held) | ast.Tuple(elts=held)]
            ):
                kinds = {self.kind(item, deep + 1) for item in held}
                return "mean" if kinds <= {"mean", "loss"} else "unknown" if "unknown" in kinds else "samples"
            case ast.Call(
                func=ast.Attribute(attr="cat" | "concat" | "concatenate"),
                args=[ast.List(elts=held) | ast.Tuple(elts=held), *place],
                keywords=keywords,
            ) if any(_is_behind_first(item) for item in (*place, *(k.value for k in keywords))):
                return "samples" if {self.kind(item, deep + 1) for item in held} == {"samples"} else "unknown"
            case ast.Call(func=ast.Name(id="sum"), args=[value]):
                return self._total_of(node) if self.kind(value, deep + 1) in {"samples", "unknown"} else "unknown"
            case ast.Call(func=ast.Attribute(value=value, attr=attr), args=args, keywords=keywords):
                if attr in _SIZES:
                    return self._total_of(node) if self._first_dimension(node) else ""
                whole = not args and not keywords
                if dotted(value) in _FUNCTIONS and args:
                    whole, value = len(args) == 1 and not keywords, args[0]
                    args = args[1:]
                whole = whole or _is_first_dimension([*args, *(k.value for k in keywords if k.arg in {"dim", "axis"})])
                if attr in _REDUCED:
                    if (inner := self.kind(value, deep + 1)) in {"loss", "mean", "total"}:
                        return inner
                    if self._is_crossed(value, deep + 1) or self._is_statistic(value) or not self._is_of_all(value):
                        return "unknown"
                    if attr == "mean" and self._is_masked(value):
                        return "unknown"
                    return _REDUCED[attr] if whole else "samples"
                if attr in _VIEWS:
                    return self.kind(value, deep + 1)
                if attr in _COUNTED and any(k.arg == "minlength" for k in keywords):
                    return self._total_of(node)
                if attr == "tolist":
                    return "unknown" if self._gives_places(value) else "samples"
                if attr in _ITEM_BY_ITEM and not _asks_where(node):
                    return "samples" if self.kind(value, deep + 1) == "samples" else "unknown"
                return self._of_criterion(node) or self._named(attr, node)
            case ast.Call(func=ast.Name(id=name), args=[value, *_]) if name in _NUMBERS:
                return self.kind(value, deep + 1)
            case ast.Call(func=func):
                return self._of_criterion(node) or self._named((dotted(func) or "").split(".")[-1], node)
            case ast.Attribute(value=value, attr="data"):
                return self.kind(value, deep + 1)
            case ast.BinOp(left=left, op=op, right=right):
                return self._joined(
                    self.kind(left, deep + 1), self.kind(right, deep + 1), op, self.is_size(_exact(right))
                )
            case ast.UnaryOp(operand=value):
                return self.kind(value, deep + 1)
            case ast.Subscript(value=ast.Name() as value, slice=ast.Name() | ast.Constant(value=str())) if (
                self._is_written_out(value) and not self.kind(value, deep + 1)
            ):
                return ""
            case ast.Subscript(value=ast.Name() as value, slice=ast.Name() | ast.Constant(value=str())) if (
                each := _REDUCED.get(self.in_parts(value, None))
            ):
                return each
            case ast.Subscript(value=ast.Name() as value) if not self.kind(value, deep + 1):
                return ""
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(key))) if (
                given := self._given_at(name, key)
            ) != "unknown":
                return given
            case ast.Subscript(value=ast.Name() as value, slice=ast.Constant(value=int(place))):
                if (given := self._given_at(value.id, place)) != "unknown":
                    return given
                kind = _REDUCED.get(self.reduced(node)) or self.kind(value, deep + 1)
                return kind if kind in {"mean", "total"} else "unknown"
            case ast.Compare():
                return "samples"
            case ast.Tuple(elts=held) | ast.List(elts=held):
                return "loss" if all(self._is_read_loss(value, deep) for value in held) else "unknown"
        return "unknown"

    def _given_at(self, name: str, place: int | str) -> str:
        """What the tuple, or dict, has at a place that a name gets of a function: ``out = step(x)``, ``out[1]``."""
        match self.made.get(name, []):
            case [(ast.Call() as call, None)]:
                return self._given(call, place)
        return "unknown"

    def _is_of_all(self, node: ast.expr) -> bool:
        """Whether a value is made of no part of the batch that would be another part on another rank."""
        return self.picked.items(node) == {ALL}

    def _is_statistic(self, node: ast.expr, deep: int = 0) -> bool:
        """Whether a value is one of all items that is no sum of what each rank has: ``x.std(0)``, ``x.max()``."""
        if isinstance(node, ast.Name):
            made = [value for value, part in self.made.get(node.id, ()) if part is None]
            return deep < 3 and any(self._is_statistic(value, deep + 1) for value in made)
        return self.of_batch(node) and _is_no_mean(node, over_items=True)

    def _is_skewed(self, node: ast.expr, deep: int) -> bool:
        """Whether a value is a sum or mean that is neither of all items nor of the first ones, whatever its name."""
        node = _viewed(node)
        summed = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in _REDUCED
        return summed and self.kind(node, deep + 1) == "unknown"

    def _is_masked(self, node: ast.expr, deep: int = 0) -> bool:
        """Whether a value is what a mask leaves of the batch, ``x[y == 1]``: ranks have more of it or fewer."""
        node = _viewed(node)
        match node:
            case ast.Name(id=name) if deep < 3:
                return any(self._is_masked(value, deep + 1) for value, part in self.made.get(name, ()) if part is None)
            case ast.Call(func=ast.Attribute(attr="masked_select")):
                return True
            case ast.Subscript(slice=place):
                made = [v for item in walk(place) if isinstance(item, ast.Name) for v, _ in self.made.get(item.id, ())]
                return any(isinstance(item, ast.Compare) for value in (place, *made) for item in walk(value))
        return False

    def _total_of(self, node: ast.expr) -> str:
        """What a number of items is that are the batch's, or some of it: ``len(x)``, ``len(x[:4])``."""
        return "total" if self._is_of_all(node) else "unknown"

    def _is_crossed(self, node: ast.expr, deep: int = 0, names: int = 0) -> bool:
        """Whether samples are compared with what is made of all in the batch: ``x - x.mean(0)``, ``x / x.max()``."""
        for item in walk(node):
            if isinstance(item, ast.BinOp):
                for one, other in ((item.left, item.right), (item.right, item.left)):
                    of_all = self.kind(other, deep + 1) in {"mean", "total"} or (
                        _is_no_mean(other) and self.of_batch(other)
                    )
                    if of_all and not _is_no_mean(one) and self.kind(one, deep + 1) == "samples":
                        return True
            elif isinstance(item, ast.Name) and names < 3:
                made = (value for value, part in self.made.get(item.id, ()) if part is None)
                if any(self._is_crossed(value, deep + 1, names + 1) for value in made):
                    return True
        return False

    def _is_read_loss(self, node: ast.expr, deep: int) -> bool:
        """Whether a value is the number of a loss, which is read as that of all ranks, or nothing of the batch."""
        kind = self.kind(node, deep + 1)
        if isinstance(node, ast.Name) and node.id in self.made:
            return kind in {"", "loss"} and all(self._is_read_loss(value, deep + 1) for value, _ in self.made[node.id])
        read = any(isinstance(item, ast.Attribute) and item.attr == "item" for item in walk(node))
        read = read or (isinstance(node, ast.Call) and dotted(node.func) == "float")
        return kind in {"", "item"} or (kind == "loss" and read)

    def _is_of_whole_numbers(self, held: list[ast.expr], deep: int) -> bool:
        """Whether the entries of a dict are numbers of all ranks by the time it is kept, or none of the batch."""
        return (
            deep < 8
            and any(not self.kind(value, deep + 1) or self._is_number_read(value, deep + 1) for value in held)
            and all(self._is_read_loss(value, deep) or self._is_made_whole(value, deep + 1) for value in held)
        )

    def _given(self, call: ast.Call, part: int | str | None = None) -> str:
        """What a call of a function of the project gives, or has at a place or by a key; ``unknown`` if it is not seen.

        A loss that is read there, and numbers of a dict that becomes whole there, are nothing of the batch any more.
        """
        function = self.roles.function_called(call.func)
        if function is not None and gives_text(function):
            return ""
        held = {name for name, value in function.given(call) if self.of_batch(value)} if function is not None else set()
        if function is None or not held:
            return "unknown"
        means = frozenset(name for name, value in function.given(call) if self.kind(value) in {"mean", "loss"})
        key = (function.node, frozenset(held), means)
        if key not in self._within:
            inner = self._within[key] = self._inside(function, held)
            if inner is not None:
                inner._means = means
        inner, kinds = self._within[key], set[str]()
        for value in _returned(function, part):
            if inner is None or value is None or (_entries(value) is not None and not inner.totals_become_whole):
                return "unknown"
            kind = inner.kind(value)
            kind = "" if kind == "loss" and inner._is_read_loss(value, 0) else kind
            if isinstance(part, str) and inner.totals_become_whole and inner._is_made_whole(value):
                kind = ""
            kinds.add("unknown" if kind in {"loss", "mixed"} or (not kind and _is_of_object(value)) else kind)
        return kinds.pop() if len(kinds) == 1 else "unknown"

    def _asks_of_items(self, test: ast.expr) -> bool:
        """Whether a test may have another answer on another rank; one of a loss is made equal."""
        return self.of_batch(test) and any(
            isinstance(node, ast.Name)
            and node.id in self.batch
            and self.roles.var(node) not in self.roles.losses
            and self.kind(node) not in {"", "loss"}
            for node in walk(test)
        )

    def _part(self, value: ast.expr, part: int | None, name: str, deep: int) -> str:
        """What a name is that gets a value, or a part of it."""
        if part == _EACH and self._is_written_out(value) and not self.kind(value, deep + 1):
            return ""
        if part == _EACH and isinstance(value, (ast.Tuple, ast.List)):
            kinds = {self.kind(item, deep + 1) for item in value.elts}
            if kinds == {"total"}:
                return "total"
            return "mean" if kinds and kinds <= {"mean", "loss"} else "unknown"
        if part == _EACH and isinstance(value, ast.Name) and (display := self._display(value)) is not None:
            return self._part(display, part, name, deep + 1)
        if part is not None and part >= 0 and isinstance(value, ast.Call):
            if (given := self._given(value, part)) != "unknown":
                return given
        if part is not None:
            given = ""
            if part == _EACH or (part >= 0 and isinstance(value, ast.Call)):
                given = _REDUCED.get(self.in_parts(value, None if part == _EACH else part), "")
            return given or ("mean" if _NAMED_MEANS.match(name) else "unknown")
        kind = self.kind(value, deep + 1)
        unclear = self._is_skewed(value, deep) or self._is_bent(value)
        return "mean" if kind == "unknown" and _NAMED_MEANS.match(name) and not unclear else kind

    def _of_criterion(self, call: ast.Call) -> str:
        """``mean`` or ``total`` for what a loss of torch makes: ``F.l1_loss(x, y)``, ``nn.L1Loss()(x, y)``."""
        held = self.roles.assigned(self.roles.var(call.func)) if not isinstance(call.func, ast.Call) else ()
        made = [value for value, _, part in held if not part and len(held) == 1] or [call.func]
        named = [one.func if isinstance(one, ast.Call) else one for one in made]
        known = all(_CRITERION.match(self.roles.project.external(self.file, one)) for one in named)
        return _REDUCED.get(self.reduced(call), "") if known else ""

    def _named(self, name: str, call: ast.Call) -> str:
        if self.roles.is_model(call.func):
            return "samples"
        if _NAMED_MEANS.match(name) and name not in {"acc", "prec"}:
            of_loss = bool(call.args) and all(self.kind(given) == "loss" for given in call.args)
            return "loss" if of_loss else "mean"  # a ratio of signals, of the mean over the ranks
        return "samples" if name in {"argmax", "max", "eq", "softmax", "sigmoid", "log_softmax", "topk"} else "unknown"

    @staticmethod
    def _first_dimension(node: ast.expr) -> bool:
        """Whether a size is that of the batch: ``x.size(0)``, ``x.shape[0]``, ``len(x)``, ``x.numel()``."""
        match node:
            case ast.Call(func=ast.Attribute(attr="size"), args=args):
                return len(args) == 1 and isinstance(args[0], ast.Constant) and args[0].value == 0
            case ast.Subscript(slice=ast.Constant(value=value)):
                return value == 0
            case ast.Subscript():
                return False
        return True

    @staticmethod
    def _joined(left: str, right: str, op: ast.operator, by_size: bool) -> str:
        pair = {left or "same", right or "same"}
        if "mixed" in pair:
            scaled = isinstance(op, (ast.Mult, ast.Add, ast.Sub)) or not right
            return "mixed" if pair <= {"same", "mixed"} and scaled else "unknown"
        if isinstance(op, ast.Mult):
            if "total" in pair:
                return "total" if pair & {"same", "mean", "loss"} else "unknown"
            if pair <= {"same", "mean"}:
                return "mean"
        elif isinstance(op, (ast.Div, ast.FloorDiv)):
            if left == right == "total":
                return "mean" if by_size else "mixed"
            if not right and left in {"total", "mean"}:
                return left
        elif isinstance(op, (ast.Add, ast.Sub)):
            if left == right:
                return left
            if pair == {"same", "mean"}:
                return "mean"
            if pair == {"same", "total"}:
                return "mixed"
        if pair <= {"same", "loss"} or (left == "loss" and right == "total" and isinstance(op, ast.Div)):
            return "loss"
        return "samples" if "samples" in pair and "unknown" not in pair else "unknown"


def _grown(node: ast.Assign) -> Iterator[Grown]:
    """What is added to a variable by ``n = n + len(x)``, ``all = torch.cat([all, x])``, ``all = np.append(all, x)``.

    ``all = x if all is None else torch.cat([all, x])`` gives it the first, too.
    """
    if len(node.targets) > 1:
        return
    for target, value in assigned(node.targets[0], node.value):
        if dotted(target) is not None:
            yield from _grown_by(target, value)


def assigned(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """What each of several targets gets, where that is written out."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        yield from zip(target.elts, value.elts, strict=True)
    else:
        yield target, value


def _grown_by(target: ast.expr, value: ast.expr) -> Iterator[Grown]:
    if isinstance(value, ast.IfExp):
        for one, other in ((value.body, value.orelse), (value.orelse, value.body)):
            added = _added(target, one)
            if added is not None and added[0]:
                yield target, True, added[1]
                yield target, True, other
    elif (added := _added(target, value)) is not None:
        yield target, *added


def _added(target: ast.expr, value: ast.expr) -> tuple[bool, ast.expr] | None:
    """Whether something is put behind what a variable holds, or added to it, and what."""
    match value:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            listed, parts = False, [left, right]
        case ast.List(elts=[ast.Starred(value=left), ast.Starred(value=right)]):
            listed, parts = True, [left, right]
        case ast.Call(func=func, args=[ast.List(elts=parts) | ast.Tuple(elts=parts), *_]):
            listed = (dotted(func) or "").split(".")[-1] in {"cat", "concat", "concatenate", "hstack", "vstack"}
            parts = parts if listed else []
        case ast.Call(func=func, args=[_, _] as parts):
            listed = (dotted(func) or "").split(".")[-1] == "append"
            parts = parts if listed else []
        case _:
            return None
    paths = [dotted(part) for part in parts]
    if len(parts) != 2 or paths.count(dotted(target)) != 1:
        return None
    return listed, parts[1 - paths.index(dotted(target))]


def _added_to_entry(target: ast.Subscript, value: ast.expr) -> ast.expr | None:
    """``x`` of ``n["a"] + x`` and ``n.get("a", 0) + x`` for ``n["a"]``."""
    if not isinstance(value, ast.BinOp) or not isinstance(value.op, ast.Add):
        return None
    holder, key = ast.unparse(target.value), ast.unparse(target.slice)
    for side, other in ((value.left, value.right), (value.right, value.left)):
        match side:
            case (
                ast.Subscript(value=held, slice=place)
                | ast.Call(func=ast.Attribute(value=held, attr="get"), args=[place, *_])
            ) if ast.unparse(held) == holder and ast.unparse(place) == key:
                return other
    return None


def _reads_rows(node: ast.expr) -> bool:
    """``pred.tolist()``, ``out.detach()``."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _ROWS


def _without(node: ast.expr, name: str) -> Iterator[ast.expr]:
    """The largest parts of a sum that have nothing of a variable."""
    if name not in _named(node):
        yield node
    elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        yield from _without(node.left, name)
        yield from _without(node.right, name)
    elif isinstance(node, ast.IfExp):
        yield from _without(node.body, name)
        yield from _without(node.orelse, name)
    elif _is_extreme(node):
        for part in node.args if isinstance(node, ast.Call) else ():
            yield from _without(part, name)


def _blends(node: ast.expr) -> bool:
    """Whether a value is a sum, an extreme, or one of two of these."""
    if isinstance(node, ast.IfExp):
        return any(isinstance(side, ast.BinOp) for side in (node.body, node.orelse))
    return isinstance(node, ast.BinOp) or _is_extreme(node)


def _reads_number(node: ast.expr) -> bool:
    """``x.item()`` and ``float(x)``, alone, rounded, or by a number: ``100 * x.item()``."""
    match node:
        case ast.Call(func=ast.Name(id="round"), args=[inner, *_]):
            return _reads_number(inner)
        case ast.BinOp(left=left, op=ast.Mult() | ast.Div(), right=right):
            return _reads_number(left) != _reads_number(right)
        case ast.Call(func=ast.Attribute(attr="item"), args=[]) | ast.Call(func=ast.Name(id="float"), args=[_]):
            return True
    return False


def _read(node: ast.expr) -> ast.expr:
    """``x`` of ``float(x)``."""
    match node:
        case ast.Call(func=ast.Name(), args=[inner]):
            return inner
    return node


def _is_of_object(node: ast.expr) -> bool:
    """Whether a value is, or has, what an object holds: ``self.total``."""
    called = {item.func for item in walk(node) if isinstance(item, ast.Call)}
    return any(isinstance(item, ast.Attribute) and item not in called for item in walk(node))


def _returned(function: FunctionInfo, part: int | str | None) -> list[ast.expr | None]:
    """What a function returns, or has at a place of the tuples, or by a key of the dicts, that it returns.

    None for what has no such place.
    """
    own = [item for statement in function.node.body for item in walk_own(statement)]
    if any(isinstance(item, (ast.Yield, ast.YieldFrom)) for item in own):
        return [None]
    given = [item.value for item in own if isinstance(item, ast.Return)]
    told = [value for value in given if value is not None and not isinstance(value, ast.Constant)]
    if part is None:
        return [*told]
    if isinstance(part, str):
        return [_entry(value, part) for value in told]
    return [value.elts[part] if isinstance(value, ast.Tuple) and part < len(value.elts) else None for value in told]


def _entry(node: ast.expr, key: str) -> ast.expr | None:
    """What a dict that is written out has by a key."""
    keys = node.keys if isinstance(node, ast.Dict) else []
    places = [place for place, item in enumerate(keys) if isinstance(item, ast.Constant) and item.value == key]
    return node.values[places[0]] if isinstance(node, ast.Dict) and len(places) == 1 else None


def _columns(target: ast.expr, iterated: ast.expr) -> Iterator[tuple[ast.expr, list[ast.expr]]]:
    """The names of ``for name, value in (("a", a), ("b", b))``, each with the values that it has in turn."""
    if isinstance(target, ast.Tuple) and isinstance(iterated, (ast.Tuple, ast.List)):
        rows = [row.elts for row in iterated.elts if isinstance(row, (ast.Tuple, ast.List))]
        if len(rows) == len(iterated.elts) and all(len(row) == len(target.elts) for row in rows):
            yield from ((name, list(column)) for name, *column in zip(target.elts, *rows, strict=True))


def _is_whole_number(node: ast.expr) -> bool:
    """``int(x.sum())``."""
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "int"


def _is_extreme(node: ast.expr) -> bool:
    """``max(best, x)``."""
    called = (dotted(node.func) or "").split(".")[-1] if isinstance(node, ast.Call) else ""
    return called in {"max", "min", "maximum", "minimum", "fmax", "fmin"}


def _counts_distinct(node: ast.expr) -> bool:
    """``len(set(y))``, ``y.unique().numel()``: how many there are on all ranks is no sum of how many on each."""
    match node:
        case (
            ast.Call(func=ast.Name(id="len"), args=[value])
            | ast.Call(func=ast.Attribute(value=value, attr="size" | "numel" | "nelement"))
            | ast.Subscript(value=ast.Attribute(value=value, attr="shape"))
        ):
            return _is_set(value)
    return False


def _is_set(node: ast.expr) -> bool:
    """``set(y)``, ``torch.unique(y)``: of equal items it has one."""
    called = (dotted(node.func) or "").split(".")[-1] if isinstance(node, ast.Call) else ""
    return called in {"set", "unique", "Counter", "dict"} or isinstance(node, (ast.Set, ast.SetComp, ast.DictComp))


def _is_no_mean(node: ast.expr, over_items: bool = False) -> bool:
    """``x.norm().item()``: a number of which the mean over ranks is not the batch's.

    With ``over_items``, ``x.std(0)`` is such a value, too.
    """
    if _counts_distinct(node):
        return True
    match _viewed(node):
        case ast.Call(func=ast.Attribute(attr=attr), args=args, keywords=keywords) if attr in _NO_MEANS:
            dimensions = [*args, *(k.value for k in keywords if k.arg in {"dim", "axis"})]
            return not args if not over_items else not dimensions or _is_first_dimension(dimensions[:1])
    return False


def _is_one_number(node: ast.expr) -> bool:
    """Whether a value is one number of many, though nothing reads it as such: ``x.max()``, ``x.sum()``."""
    return _is_no_mean(node) or (
        isinstance(node := _viewed(node), ast.Call) and getattr(node.func, "attr", "") in _REDUCED and not node.args
    )


def _viewed(node: ast.expr) -> ast.expr:
    """What is there before it is moved, cut or cast: ``x.max()`` of ``x.max().item()``."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _VIEWS:
        node = node.func.value
    return node


def _is_first_dimension(given: list[ast.expr]) -> bool:
    """Whether ``x.sum(0)``, or ``x.sum((0, 2))``, is over the batch."""
    dimensions = given[0].elts if len(given) == 1 and isinstance(given[0], (ast.Tuple, ast.List)) else given
    return len(given) == 1 and any(isinstance(item, ast.Constant) and item.value == 0 for item in dimensions)


def _asks_where(call: ast.Call) -> bool:
    """``torch.where(y == 0)``, ``mask.nonzero()``."""
    name = getattr(call.func, "attr", "")
    return name in {"nonzero", "argwhere", "flatnonzero"} or (name == "where" and len(call.args) == 1)


def _is_nothing(node: ast.expr) -> bool:
    """``0``, ``0.0``, ``[]``: what adding up begins with."""
    return (isinstance(node, ast.Constant) and node.value == 0) or (isinstance(node, ast.List) and not node.elts)


def _takes_first(node: ast.AST) -> bool:
    """``x[0]``, ``x[0, :2]``: of a batch's pictures rank 0 draws the first, as one process does."""
    if not isinstance(node, ast.Subscript):
        return False
    first = node.slice.elts[0] if isinstance(node.slice, ast.Tuple) and node.slice.elts else node.slice
    return isinstance(first, ast.Constant) and first.value == 0


def _is_behind_first(place: ast.expr) -> bool:
    """Whether it is the number of a dimension behind the first."""
    match place:
        case ast.Constant(value=int(number)):
            return number > 0
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=1)):
            return True
    return False


def _tells_shape(node: ast.expr) -> bool:
    return any(isinstance(item, ast.Attribute) and item.attr in _OF_SHAPE for item in walk(node))


def _named(node: ast.AST) -> set[str]:
    return {item.id for item in walk(node) if isinstance(item, ast.Name)}


def _entries(node: ast.AST) -> list[ast.expr] | None:
    """The values of a dict that is written out with its keys, and other dicts that go into it."""
    match node:
        case ast.Dict(values=values):
            return values
        case ast.DictComp(value=value):
            return [value]
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            return [keyword.value for keyword in keywords] if all(keyword.arg for keyword in keywords) else None
    return None


def _parts(values: list[ast.expr]) -> Iterator[ast.expr]:
    """Values, and those in dicts among them."""
    for value in values:
        yield from value.values if isinstance(value, ast.Dict) else [value]


def _exact(node: ast.expr) -> ast.expr:
    """The number under ``round(...)`` and ``str(...)``, which come after what is made of all ranks'."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _SHOWN_AS and node.args:
        node = node.args[0]
    return node


def taken_by(loop: ast.For, roles: Roles) -> set[str]:
    """The names that a loop gives what it goes through, if that is no number."""
    listed = isinstance(loop.iter, (ast.List, ast.Tuple, ast.Constant))
    return set() if listed or _counts(loop.iter, roles) else names_in(item_of(loop, roles.file.names.values_of))


def _counts(iterated: ast.expr, roles: Roles, deep: int = 0) -> bool:
    """Whether a loop goes through numbers, which a bar or a name may hold."""
    if isinstance(iterated, (ast.Name, ast.Attribute)) and deep < _BARS:
        variable = roles.var(iterated)
        made = [value for value, _, part in roles.assigned(variable) if not part]
        made += [
            item.context_expr
            for item in roles.file.nodes
            if isinstance(item, ast.withitem) and item.optional_vars and roles.var(item.optional_vars) == variable
        ]
        return bool(made) and all(_counts(value, roles, deep + 1) for value in made)
    if not isinstance(iterated, ast.Call):
        return False
    called = (dotted(iterated.func) or "").split(".")[-1]
    if called in _PASSED and iterated.args and deep < _BARS:
        return _counts(iterated.args[0], roles, deep + 1)
    return called in {"range", "trange", "tnrange", "count", "arange"}


def _runs_backward(loop: ast.For) -> bool:
    return any(map(is_backward, walk(loop)))


def _own(loop: Place) -> Iterator[ast.AST]:
    """The nodes of a loop's body, without those of functions in it."""
    stack: list[ast.AST] = list(loop.body)
    while stack:
        item = stack.pop(0)
        if not isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            yield item
            stack[:0] = ast.iter_child_nodes(item)
