"""Which code must run on every rank, and which tests keep it to one."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from rewriter.analyze.read.circles import AnyCalled
from rewriter.analyze.read.classes import Classes
from rewriter.analyze.read.file import ClassInfo, External, File, FunctionInfo
from rewriter.analyze.read.nodes import all_arguments, children, dotted, held_in, loss_of, positional, walk, walk_own
from rewriter.analyze.read.project import Project
from rewriter.analyze.training.extremes import extremes
from rewriter.analyze.training.instances import Instances
from rewriter.analyze.training.keepers import Keepers
from rewriter.analyze.training.rank_names import is_rank, may_know_ranks
from rewriter.analyze.training.readings import curved, held_path, readings
from rewriter.analyze.training.roles import Roles, unwrapped
from rewriter.analyze.training.shares import Share
from rewriter.analyze.training.showing import Showing
from rewriter.analyze.training.values import Values, names_of_parameters

_SEPARATE = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_DEEP = 5
_SMALL_STATE = re.compile(r"sched|scaler|sampler|loader|lr_|tokenizer|metric|manager", re.I)
_BESIDE_MODEL = re.compile(r"token|process|config|extractor|sched|vocab|collat", re.I)
_ONE_RANK_ONLY = re.compile(r"^(?:rank_?zero|master|main|main_process|rank_?0)_only$|^on_main_process$")
_MAIN_NAME = re.compile(
    r"(?:^|_)(?:is_)?(?:master|main|primary|rank_?0|rank_zero|main_process|master_process|is_main)(?:_(?:process|rank|proc|node))?$",
    re.I,
)
_ARE_FIRST = (ast.Eq, ast.In, ast.LtE, ast.Lt, ast.Is)
_ARE_OTHERS = (ast.NotEq, ast.NotIn, ast.Gt, ast.GtE, ast.IsNot)
_LOCAL_METHODS = {
    "train", "eval", "parameters", "named_parameters", "buffers", "named_buffers", "modules", "named_modules",
    "children", "to", "cuda", "cpu", "half", "float", "bfloat16", "requires_grad_", "zero_grad", "get_num_params",
    "register_buffer", "register_forward_hook", "compile", "share_memory", "print_trainable_parameters",
    "gradient_checkpointing_enable", "gradient_checkpointing_disable", "enable_input_require_grads", "tie_weights",
    "get_input_embeddings", "get_output_embeddings", "num_parameters", "get_nb_trainable_parameters", "get_parameter",
    "get_buffer", "get_submodule", "get_extra_state", "named_children", "register_parameter", "register_module",
    "add_module", "extra_repr",
}  # fmt: skip
_COLLECTIVE_METHODS = {"state_dict", "load_state_dict", "forward", "generate", "sample", "predict", "__call__"}
_COLLECTING = {"append", "extend", "update", "add", "insert", "setdefault", "put", "add_param_group"}
"""Methods that only keep what they are given."""
_SAVING = re.compile(r"^save(?!\w*image)|^checkpoint$|_checkpoint$")
_BARRIERS = {"torch.distributed.barrier", "bmtrain.synchronize"}
_MAKE_WHOLE = {"bmtrain.total", "bmtrain.sum_loss", "bmtrain.gather_samples"}
_LOCAL_BMT = {
    "bmtrain.rank", "bmtrain.world_size", "bmtrain.print_rank", "bmtrain.is_initialized", "bmtrain.on_rank_0",
    *(f"bmtrain.checkpoint.{name}" for name in
      ("Sharded", "load_sharded", "copy_sharded", "rename_sharded", "remove_sharded")),
}  # fmt: skip


class Collectives:
    """Answers for all files of a project, remembered per function."""

    def __init__(
        self,
        classes: Classes,
        roles: dict[File, Roles],
        files: Callable[[], Iterable[File]],
        shares: Callable[[File], dict[ast.expr, Share]],
        gives_mean: Callable[[File, ast.Call, int], bool],
    ) -> None:
        self.classes = classes
        self.project = classes.project
        self.roles = roles
        self.instances = Instances(classes, roles, files)
        self.keepers = Keepers(self.instances, roles)
        self.showing = Showing(roles)
        self._makes_one = AnyCalled()
        self._values: dict[File, Values] = {}
        self._readings: dict[File, dict[ast.expr, ast.expr]] = {}
        self._made_of_averaged: dict[File, dict[ast.expr, list[ast.Name]]] = {}
        self._shares: dict[File, dict[ast.expr, Share]] = {}
        self._unclear: dict[File, list[ast.expr]] = {}
        self._find_shares, self._gives_mean = shares, gives_mean

    def values(self, file: File) -> Values:
        if file not in self._values:
            self._values[file] = Values(file, self.classes, self.roles[file], lambda: self._parameters)
        return self._values[file]

    @cached_property
    def _parameters(self) -> dict[str, bool]:
        return names_of_parameters(self.instances.files(), self.classes)

    def readings(self, file: File) -> dict[ast.expr, ast.expr]:
        """What shows a loss in a file, and the loss in it, whose mean over the ranks every rank must help to make."""
        if file not in self._readings:
            counted = {item for value in self.shares(file) for item in walk(value)}
            found = readings(
                file,
                self.roles[file],
                self._held_losses,
                lambda call: self._left_with_objects(file, call),
                lambda call, place: self._gives_mean(file, call, place),
                counted,
                lambda call: self.showing.given(file, call),
                lambda nodes, name: self.showing.only(file, nodes, name),
                self.made_of_averaged(file),
            )
            self._readings[file] = {
                reading: loss
                for reading, loss in found.items()
                if loss not in counted and not self._is_made_whole(file, reading)
            }
        return self._readings[file]

    def made_of_averaged(self, file: File) -> dict[ast.expr, list[ast.Name]]:
        """Functions of losses that get a name and are only shown, and the least of losses, each with the losses in it.

        They are made of the losses of all ranks.
        """
        if file not in self._made_of_averaged:
            roles = self.roles[file]
            found = curved(file, roles, lambda nodes, name: self.showing.only(file, nodes, name))
            self._made_of_averaged[file] = found | extremes(file, roles)
        return self._made_of_averaged[file]

    def _left_with_objects(self, file: File, call: ast.Call) -> Iterable[ast.expr]:
        """What a call leaves with an object of a class that is seen, which adds it up."""
        kept = self.keepers.kept(file, call)
        return kept.given if kept is not None and kept.seen else ()

    def _is_made_whole(self, file: File, node: ast.expr) -> bool:
        """Whether a value stands in a call that makes it that of all ranks."""
        return any(
            isinstance(parent, ast.Call) and self.project.external(file, parent.func) in _MAKE_WHOLE
            for parent in file.names.ancestors(node)
        )

    @cached_property
    def _held_losses(self) -> set[str]:
        """Attributes that hold a loss, and entries of dicts that they hold: ``self.loss``, ``self.outputs["loss"]``."""
        found: set[str] = set()
        for file in self.instances.files():
            found |= {loss.attr for call in file.calls if isinstance(loss := loss_of(call), ast.Attribute)}
            for node in file.nodes:
                for path, value, place in _kept_in_attributes(node):
                    found |= {f"{path}{entry}" for entry in self._entries_of_losses(file, value, place)}
        return found

    def _entries_of_losses(self, file: File, value: ast.expr, place: int | None = None, deep: int = 0) -> Iterator[str]:
        """Empty for what is a loss itself, ``[loss]`` for a dict that has one by this name; ``place`` is a tuple's."""
        match value:
            case ast.Tuple(elts=elts) if place is not None and place < len(elts):
                yield from self._entries_of_losses(file, elts[place], None, deep)
            case ast.Call(func=ast.Attribute(value=inner, attr="detach"), args=[]):
                yield from self._entries_of_losses(file, inner, place, deep)
            case ast.Call(func=func) if deep < 1 and not self.project.external(file, func):
                found = self.project.resolve(file, func)
                functions = [found] if isinstance(found, FunctionInfo) else []
                functions += self.instances.methods(file, func) if isinstance(func, ast.Attribute) else []
                for function in functions:
                    for node in (node for statement in function.node.body for node in walk_own(statement)):
                        if isinstance(node, ast.Return) and node.value is not None:
                            yield from self._entries_of_losses(function.file, node.value, place, deep + 1)
            case _ if place is not None:
                return
            case ast.Dict(keys=keys, values=values):
                for key, item in zip(keys, values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(key.value, str):
                        yield from (f"[{key.value}]{e}" for e in self._entries_of_losses(file, item, None, deep))
            case ast.Name() if self.roles[file].var(value) in self.roles[file].losses:
                yield ""

    def shares(self, file: File) -> dict[ast.expr, Share]:
        """Values of a rank's share of a batch that become the whole batch's, which every rank must help to make."""
        if file not in self._shares:
            self._shares[file] = {}
            found = self._find_shares(file)
            self._unclear[file] = [value for value, share in found.items() if share.kind == "unknown"]
            self._shares[file] = {value: share for value, share in found.items() if share.kind != "unknown"}
        return self._shares[file]

    def unclear(self, file: File) -> list[ast.expr]:
        """Values of a rank's share of a batch that leave its loop, of which it is not seen what they are."""
        self.shares(file)
        return self._unclear.get(file, [])

    def inside(self, file: File, node: ast.AST) -> ast.Call | None:
        """A call in the node that every rank must make, if there is one. Barriers, which scripts pair up, are none."""
        return next((item for item in self.outermost(file, node) if isinstance(item, ast.Call)), None)

    def outermost(self, file: File, node: ast.AST) -> Iterator[ast.expr]:
        """What every rank must evaluate in the node, without what stands inside another one."""
        stack = [node]
        while stack:
            item = stack.pop()
            if isinstance(item, ast.Call) and self.is_collective(file, item) and not self.is_barrier(file, item):
                yield item
                continue
            if isinstance(item, ast.expr) and (item in self.readings(file) or item in self.shares(file)):
                yield item
                continue
            stack.extend(
                child for child in reversed(list(ast.iter_child_nodes(item))) if not isinstance(child, _SEPARATE)
            )

    def needs_all(self, file: File, node: ast.AST) -> ast.Call | None:
        """A call in the node that every rank must make once the file is converted, ``torch.save`` among these."""
        saving = (item for item in walk(node) if isinstance(item, ast.Call) and self._saves(file, item))
        return self.inside(file, node) or next(saving, None)

    def gradient_read(self, node: ast.AST) -> ast.Attribute | None:
        """What a node reads of a parameter's ``grad``: the ranks ask each other, also whether there is one."""
        if isinstance(node, ast.Attribute) and node.attr == "grad" and isinstance(node.ctx, ast.Load):
            return node
        below = (child for child in ast.iter_child_nodes(node) if not isinstance(child, _SEPARATE))
        return next((found for child in below if (found := self.gradient_read(child)) is not None), None)

    def is_barrier(self, file: File, call: ast.Call) -> bool:
        """Whether a call only waits for the other ranks, itself or in a function of the project."""
        if self.project.external(file, call.func) in _BARRIERS:
            return True
        found = self.project.resolve(file, call.func)
        if not isinstance(found, FunctionInfo):
            return False
        calls = [item for item in walk(found.node) if isinstance(item, ast.Call)]
        made = [item for item in calls if self.is_collective(found.file, item)]
        return bool(made) and all(self.project.external(found.file, item.func) in _BARRIERS for item in made)

    def is_collective(self, file: File, call: ast.Call) -> bool:
        roles = self.roles[file]
        if roles.is_model(call.func) or call in self.readings(file) or call in self.shares(file):
            return True
        found = self.project.resolve(file, call.func)
        if isinstance(found, FunctionInfo):
            return self.function(found.file, found.node) or self._runs_given_model(file, call, found)
        if isinstance(found, External):
            if found.name.startswith("bmtrain."):
                return found.name not in _LOCAL_BMT
            if found.name.startswith("torch.distributed.") and found.name.split(".")[-1] in _DIST_COLLECTIVES:
                return True
            if found.name == "torch.save":
                return self._holds_model(file, call)
            if not found.name.startswith(_WITHOUT_MODELS):
                given = found.name.split(".")[-1] not in _COLLECTING and roles.gives_parameters(call)
                return given or any(map(roles.is_model, all_arguments(call)))
            return False
        if isinstance(call.func, ast.Attribute):
            return self._method(file, call, call.func)
        if found is not None:
            return False
        return self._runs(self.instances.called(file, call.func)) or self._may_run(file, call.func)

    def _holds_model(self, file: File, call: ast.Call) -> bool:
        """Whether ``torch.save`` is given a whole model, or a part of one, by itself or in a list or table."""
        roles, given = self.roles[file], [*call.args[:1], *(k.value for k in call.keywords if k.arg == "obj")]
        return any(
            roles.is_model(item) or (isinstance(item, ast.Attribute) and roles.is_model(item.value))
            for held in given
            for item in held_in(held)
        )

    def _runs_given_model(self, file: File, call: ast.Call, function: FunctionInfo) -> bool:
        """Whether a function of the project runs a model that it is given, ``print_summary(net, inputs)``, or gives it
        to what a package makes, which may run it: ``pipeline = Pipeline(unet=net)``.
        """
        given = dict(zip(positional(function.node), call.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
        models = {name for name, value in given.items() if self.roles[file].is_model(value)}
        calls = [node for node in walk(function.node) if isinstance(node, ast.Call)] if models else []
        return any(
            (isinstance(node.func, ast.Name) and node.func.id in models)
            or (
                any(isinstance(value, ast.Name) and value.id in models for value in all_arguments(node))
                and (name := self.project.external(function.file, node.func)) != ""
                and not name.startswith((*_WITHOUT_MODELS, "bmtrain."))
            )
            for node in calls
        )

    def _may_run(self, file: File, func: ast.expr, deep: int = 0) -> bool:
        """Whether one of the functions that a value may be, or is made of, makes a call that every rank must make.

        A name may be bound more than once, be a parameter, or stand for a lambda, a ``partial``, a wrapped function,
        an item of a table.
        """
        if deep > _DEEP:
            return False
        if isinstance(func, ast.Lambda):
            return self._makes_one(func, lambda: self._calls_one(file, walk(func.body)))
        if isinstance(func, ast.Name):
            functions = [found for found in self.project.meanings(file, func) if isinstance(found, FunctionInfo)]
            if self._runs(functions):
                return True
        if isinstance(func, (ast.Name, ast.Attribute)):
            return any(self._may_run(other, value, deep + 1) for other, value in self.instances.given_to(file, func))
        if isinstance(func, ast.Call):
            parts = [*func.args, *(keyword.value for keyword in func.keywords)]
        else:
            parts = [item for item in children(func) if isinstance(item, ast.expr)]
        return any(self._may_run(file, part, deep + 1) for part in parts)

    def _runs(self, functions: Iterable[FunctionInfo]) -> bool:
        return any(self.function(function.file, function.node) for function in functions)

    def _method(self, file: File, call: ast.Call, func: ast.Attribute) -> bool:
        roles, name = self.roles[file], func.attr
        receiver = roles.var(func.value)
        if name == "state_dict" and not _SMALL_STATE.search(dotted(func.value) or ""):
            return True
        if name == "backward" or self.saves_pretrained(file, call):
            return True
        if receiver in roles.optimizers or receiver in roles.managers or roles.list_of(func.value) is not None:
            return name in {"state_dict", "load_state_dict", "step", "clip_grad_norm", "backward"}
        if roles.is_model(func.value):
            if name in _COLLECTIVE_METHODS:
                return True
            if name == "save_pretrained" and any(keyword.arg == "state_dict" for keyword in call.keywords):
                return self.saves_pretrained(file, call)
            cls = roles.model_class(func.value)
            method = self.classes.method(cls, name) if cls is not None else None
            if method is not None:
                return self.function(method[0].file, method[1])
            return name not in _LOCAL_METHODS and not self._is_known_as_local(name)
        if isinstance(func.value, ast.Name) and func.value.id == "self":
            owner = file.names.class_of(call)
            if owner is not None:
                method = self.classes.method(file.class_info(owner), name)
                if method is not None:
                    return self.function(method[0].file, method[1])
                return self._may_run(file, func)
        known = [*self.instances.methods(file, func), *self.instances.called(file, func)]
        if self._runs(known):
            return True
        if not known and name not in _COLLECTING and roles.gives_parameters(call):  # reads or writes them
            return True
        return self._may_run(file, func)

    def saves_for_package(self, file: File, call: ast.Call) -> bool:
        """``saver.save_checkpoint(epoch)`` of an object that a package makes of the model, such as timm's.

        ``save_pretrained`` of such a one is all ranks' to call: it becomes bmtrain's, which finds the model in it.
        """
        func = call.func
        if not isinstance(func, ast.Attribute) or not _SAVING.search(func.attr) or func.attr == "save_pretrained":
            return False
        if not isinstance(func.value, (ast.Name, ast.Attribute)) or self.roles[file].is_model(func.value):
            return False
        made = [(file, func.value), *self.instances.given_to(file, func.value)]
        made += [
            (other, value)
            for other, holder in list(made)
            for variable, value, _, _ in self.roles[other].assignments
            if variable == self.roles[other].var(holder)
        ]
        return any(
            isinstance(value, ast.Call)
            and not isinstance(self.project.resolve(other, value.func), (ClassInfo, FunctionInfo))
            and (dotted(value.func) or "self").split(".")[0] not in {"self", "cls"}
            and not self.project.external(other, value.func).startswith(_OTHERWISE_SEEN)
            and any(map(self.roles[other].is_model, [*value.args, *(keyword.value for keyword in value.keywords)]))
            for other, value in made
        )

    def saves_pretrained(self, file: File, call: ast.Call) -> bool:
        """Whether a call is the ``save_pretrained`` of a package, and of what may be a model: no tokenizer, say."""
        func, roles = call.func, self.roles[file]
        if not isinstance(func, ast.Attribute) or func.attr != "save_pretrained" or not (call.args or call.keywords):
            return False
        if len(call.args) > 2 or any(isinstance(item, ast.Starred) for item in call.args):
            return False
        own_state, model = of_own_state(roles, call), unwrapped(func.value) or func.value
        if any(keyword.arg == "state_dict" and keyword is not own_state for keyword in call.keywords):
            return False
        if roles.is_model(model):
            cls = roles.model_class(model)
            return cls is None or self.classes.method(cls, func.attr) is None
        path = dotted(model)
        if path is None or any(self.instances.methods(file, func)) or path.split(".")[0] == "bmt":
            return False
        owner = file.names.class_of(call)
        if path == "self" and owner is not None and self.classes.method(file.class_info(owner), func.attr) is not None:
            return False
        variable = roles.var(model)
        made = [value for other, value, _, _ in roles.assignments if other == variable and isinstance(value, ast.Call)]
        names = [path.split(".")[-1], *(self.project.external(file, value.func) for value in made)]
        return not any(map(_BESIDE_MODEL.search, names))

    def _is_known_as_local(self, name: str) -> bool:
        """Whether methods of this name are in the project, and none of them makes a call that is for all ranks."""
        known = self.instances.named(name)
        return bool(known) and not self._runs(known)

    def _saves(self, file: File, call: ast.Call) -> bool:
        """Whether a call is a ``torch.save`` that becomes bmtrain's, for all ranks to make."""
        if self.project.external(file, call.func) != "torch.save":
            return False
        return not any(isinstance(p, ast.If) and as_guard(file, p) is not None for p in file.names.ancestors(call))

    def _gathers(self, file: File, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        """Whether a function's own code is to gather parameters, which every rank must do."""
        return file.convert and any(
            file.names.function_of(place) is node
            and not any(isinstance(p, ast.If) and as_guard(file, p) is not None for p in file.names.ancestors(place))
            for place in self.values(file).gathered
        )

    def _runs_module(self, module: ClassInfo, call: ast.Call) -> bool:
        """Whether a call in a module's method runs the module or one of its parts."""
        path = dotted(call.func) or ""
        if path == "self":
            return True
        first, *parts = path.split(".")
        if first != "self":
            return False
        part = len(parts) == 1 and self.classes.method(module, parts[0]) is None and parts[0] not in _LOCAL_METHODS
        return part or parts[-1] in {"forward", "state_dict", "generate"}

    def function(self, file: File, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        """Whether a function makes a call that every rank must make."""
        return self._makes_one(node, lambda: self._gathers(file, node) or self._runs_one(file, node))

    def _runs_one(self, file: File, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        owner = file.names.class_of(node)
        info = file.class_info(owner) if owner is not None else None
        module = info if info is not None and self.classes.is_module(info) else None
        items = [item for statement in node.body for item in walk_own(statement)]
        return self._calls_one(file, items) or any(
            isinstance(item, ast.Call)
            and ((module is not None and self._runs_module(module, item)) or self._saves(file, item))
            for item in items
        )

    def _calls_one(self, file: File, items: Iterable[ast.AST]) -> bool:
        return any(isinstance(item, ast.Call) and self.is_collective(file, item) for item in items)


_OTHERWISE_SEEN = (
    "torch.",
    "bmtrain.",
    "deepspeed.",
    "accelerate.",
    "lightning.",
    "pytorch_lightning.",
    "transformers.",
)
"""What these make is asked for otherwise."""
_WITHOUT_MODELS = ("torch.", "os.", "pathlib.", "shutil.", "glob.", "logging.", "json.", "yaml.")
"""Where functions run no model that they are given; what is called a model may also be its folder."""
_DIST_COLLECTIVES = {
    "all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier", "reduce",
    "gather", "scatter", "reduce_scatter", "all_to_all", "gather_object",
    "all_gather_into_tensor", "reduce_scatter_tensor",
}  # fmt: skip


def of_own_state(roles: Roles, call: ast.Call) -> ast.keyword | None:
    """The keyword of ``model.save_pretrained(path, state_dict=model.state_dict())`` that says no more than without."""
    for keyword in call.keywords:
        match keyword.value, call.func:
            case ast.Call(func=ast.Attribute(value=given, attr="state_dict"), args=[], keywords=[]), ast.Attribute(
                value=receiver
            ):
                path = dotted(given)
                same = path is not None and path in {dotted(receiver), _other_name(roles, receiver)}
                return keyword if same and keyword.arg == "state_dict" else None
    return None


def _other_name(roles: Roles, node: ast.expr) -> str | None:
    """``model`` for ``inner`` of ``inner = model``, where ``model`` is given nothing else from there on."""
    made = [(value, statement) for v, value, statement, _ in roles.assignments if v == roles.var(node)]
    if len(made) != 1 or not isinstance(made[0][0], (ast.Name, ast.Attribute)):
        return None
    value, statement = made[0]
    since = (other for v, _, other, _ in roles.assignments if v == roles.var(value))
    return dotted(value) if all(other.lineno < statement.lineno for other in since) else None


# Rank guards --------------------------------------------------------------------------------------------------


def _kept_in_attributes(node: ast.AST) -> Iterator[tuple[str, ast.expr, int | None]]:
    """Where a statement keeps something in an attribute, or in a dict that is one, and what: at a place of a tuple."""
    match node:
        case ast.Assign(targets=[ast.Tuple(elts=targets)], value=value):
            yield from ((path, value, place) for place, item in enumerate(targets) if (path := held_path(item)))
        case ast.Assign(targets=[target], value=value) if path := held_path(target):
            yield path, value, None
        case ast.Call(func=ast.Name(id="setattr"), args=[_, ast.Constant(value=str(path)), value]):
            yield path, value, None


@dataclass(frozen=True, eq=False)
class Guard:
    """An ``if`` that lets one rank in. ``rest`` holds the operands of its ``and`` that are not about ranks.

    ``either``: those ``and`` beside which there is another way in: ``if not parallel or (parallel and rank == 0)``.
    """

    node: ast.If
    rest: tuple[ast.expr, ...]
    either: tuple[ast.BoolOp, ...] = ()


def guards(file: File) -> Iterator[Guard]:
    for node in file.nodes if may_know_ranks(file) else ():
        if isinstance(node, ast.If):
            guard = as_guard(file, node)
            if guard is not None:
                yield guard


def as_guard(file: File, node: ast.If) -> Guard | None:
    if is_rank_test(file, node.test):
        return Guard(node, ())
    if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And):
        rest = tuple(value for value in node.test.values if not is_rank_test(file, value))
        if len(rest) < len(node.test.values):
            return Guard(node, rest)
    if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.Or):
        found = [(value, rest_of(file, value)) for value in node.test.values]
        either = tuple(value for value, rest in found if rest and isinstance(value, ast.BoolOp))
        if either:
            others = [value for value, _ in found if value not in either]
            return Guard(node, (*others, *(item for _, rest in found for item in rest)), either)
    return None


def lets_one_rank_in(file: File, project: Project, decorator: ast.expr) -> bool:
    """Whether a decorator calls what it decorates on one rank only: ``@master_only``, ``@rank_zero_only``."""
    func = decorator.func if isinstance(decorator, ast.Call) else decorator
    found = project.resolve(file, func)
    if not isinstance(found, FunctionInfo):
        return bool(_ONE_RANK_ONLY.search((dotted(func) or "").split(".")[-1]))
    inside = set(walk(found.node))
    return any(guard.node in inside and not guard.rest for guard in guards(found.file)) or any(
        leaves.node in inside and not leaves.rest for leaves in exits(found.file)
    )


@dataclass(frozen=True, eq=False)
class Exit:
    """An ``if`` by which all ranks but one leave a loop or a function, and the statements that one goes on to.

    ``rest`` holds the operands of its ``or`` that are not about ranks: ``if rank != 0 or epoch % 2: continue``;
    ``alone`` says that there is nothing else in it, so that it may go.
    """

    node: ast.If
    rest: tuple[ast.expr, ...]
    behind: tuple[ast.stmt, ...]
    alone: bool


def exits(file: File) -> Iterator[Exit]:
    for node in file.nodes if may_know_ranks(file) else ():
        if isinstance(node, ast.If) and isinstance(node.body[-1], (ast.Return, ast.Continue, ast.Break)):
            operands = [node.test]
            if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.Or):
                operands = node.test.values
            rest = tuple(operand for operand in operands if not lets_first_pass(file, operand))
            if len(rest) < len(operands):
                behind, looped = _behind(file, node, isinstance(node.body[-1], ast.Return))
                alone = not node.orelse and len(node.body) == 1
                yield Exit(node, rest, behind, alone and looped == isinstance(node.body[-1], ast.Continue))


def _behind(file: File, node: ast.stmt, returns: bool) -> tuple[tuple[ast.stmt, ...], bool]:
    """What follows a statement in its loop, or in its function if it returns; and whether it stands in a loop."""
    found: list[ast.stmt] = []
    looped, child = False, node
    for parent in file.names.ancestors(node):
        block = file.names.siblings(child)
        found += block[block.index(child) + 1 :]
        looped = looped or isinstance(parent, (ast.For, ast.While))
        if (looped and not returns) or not isinstance(parent, ast.stmt) or isinstance(parent, _SEPARATE):
            break
        child = parent
    return tuple(found), looped


def lets_first_pass(file: File, test: ast.expr) -> bool:
    """Whether a test is true on other ranks than the first only: ``rank > 0``, ``launched and rank != 0``."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return any(lets_first_pass(file, value) for value in test.values)
    return is_other_rank_test(file, test)


def rest_of(file: File, test: ast.expr) -> list[ast.expr]:
    """What ``parallel and rank == 0`` asks beside the rank; empty for what asks for no rank."""
    if not isinstance(test, ast.BoolOp) or not isinstance(test.op, ast.And):
        return []
    rest = [value for value in test.values if not is_rank_test(file, value)]
    return rest if len(rest) < len(test.values) else []


def is_rank_test(file: File, test: ast.expr) -> bool:
    """Whether an expression is true on one rank (of a node) only."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or):
        return any(is_rank_test(file, value) for value in test.values)
    if isinstance(test, ast.Compare):
        compared = _compared(file, test)
        return compared is not None and isinstance(compared[0], _ARE_FIRST) and _ends_at_first(*compared)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        compared = _compared(file, test.operand)
        other = compared is not None and isinstance(compared[0], _ARE_OTHERS) and _ends_at_first(*compared)
        return other or is_rank(file, test.operand)
    if isinstance(test, ast.Call):
        return bool(_MAIN_NAME.search((dotted(test.func) or "").split(".")[-1]))
    path = dotted(test)
    return path is not None and (bool(_MAIN_NAME.search(path.split(".")[-1])) or path in rank_flags(file))


def asks_for_launcher(file: File, test: ast.expr) -> bool:
    """``RANK == -1``, ``RANK >= 0``: whether a launcher has started the process; all ranks have the same answer."""
    compared = _compared(file, test)
    if compared is None:
        return False
    operator, numbers = compared
    if isinstance(operator, (ast.Lt, ast.GtE)):
        return numbers == {0}
    return numbers == {-1}


def _compared(file: File, test: ast.expr) -> tuple[ast.cmpop, set[int]] | None:
    """How a test compares a rank with numbers, the rank on the left."""
    if not isinstance(test, ast.Compare) or len(test.ops) != 1:
        return None
    left, operator, right = test.left, test.ops[0], test.comparators[0]
    if not is_rank(file, left) and is_rank(file, right):
        left, right = right, left
        turned: dict[type[ast.cmpop], ast.cmpop] = {
            ast.Lt: ast.Gt(), ast.Gt: ast.Lt(), ast.LtE: ast.GtE(), ast.GtE: ast.LtE(),
        }  # fmt: skip
        operator = turned.get(type(operator), operator)
    if not is_rank(file, left):
        return None
    values = right.elts if isinstance(right, (ast.Tuple, ast.List, ast.Set)) else [right]
    numbers = {_integer(value) for value in values if not (isinstance(value, ast.Constant) and value.value is None)}
    known = {number for number in numbers if number is not None}
    return (operator, known) if known == numbers and known else None


def _ends_at_first(operator: ast.cmpop, numbers: set[int]) -> bool:
    """Whether a comparison tells rank 0, and what no launcher started, from all others."""
    if isinstance(operator, (ast.Lt, ast.GtE)):
        return numbers == {1}
    return 0 in numbers and numbers <= {0, -1}


def rank_flags(file: File) -> dict[str, bool]:
    """Names and attributes that hold the outcome of a rank test, and whether of something else as well."""
    if file.rank_flags is None:
        file.rank_flags = {}
        for node in file.nodes:
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and dotted(node.targets[0]):
                value, path = node.value, dotted(node.targets[0]) or ""
                if isinstance(value, ast.BoolOp) and isinstance(value.op, ast.And):
                    if any(is_rank_test(file, operand) for operand in value.values):
                        file.rank_flags[path] = True
                elif isinstance(value, (ast.Compare, ast.Call, ast.BoolOp, ast.UnaryOp)) and is_rank_test(file, value):
                    file.rank_flags.setdefault(path, False)
    return file.rank_flags


def is_other_rank_test(file: File, test: ast.expr) -> bool:
    """Whether an expression is true on all ranks but one."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return is_rank_test(file, test.operand)
    if isinstance(test, ast.Compare):
        compared = _compared(file, test)
        if compared is not None and (_ends_at_first(*compared) or asks_for_launcher(file, test)):
            return isinstance(compared[0], _ARE_OTHERS) and _ends_at_first(*compared)
        unlike = len(test.ops) == 1 and isinstance(test.ops[0], (ast.NotEq, ast.Gt, ast.NotIn))
        return unlike and is_rank(file, test.left)
    return is_rank(file, test)


def _integer(node: ast.expr) -> int | None:
    if isinstance(node, ast.Constant) and node.value in {"0", "-1"}:
        return int(str(node.value))  # of the environment
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -node.operand.value if isinstance(node.operand.value, int) else None
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, int) else None
