"""A script that trains through accelerate is an ordinary loop.

What: ``Accelerator()`` and all its uses become what an ordinary loop on one process has, which the other rules then
convert: ``accelerator.backward(loss)`` is ``loss.backward()``, ``accumulate`` and ``sync_gradients`` are a test of the
step, ``prepare`` goes, ``save_state`` writes each state under accelerate's own file name, and so on.
Why: such a script owns its loop; only the names differ. Every rank trains on its share of the batches that the script
would see on one process, so batch sizes are those of all ranks together, and schedulers step once a step.
Refuses when: anything that the script does with accelerate is not understood: a plugin, fp16, another tracker than
TensorBoard and wandb, values of other processes whose data are not known. Then the whole script stays as it is, with
the reasons. Where an option names the tracker, it is TensorBoard, and another is an error when it starts.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cached_property

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import walk
from rewriter.analyze.training.accelerators import (
    CLASSES,
    PREPARES,
    SKIPS,
    TESTS,
    Accelerators,
    last_name,
    targets,
)
from rewriter.analyze.training.collectives import as_guard
from rewriter.changes import (
    Arguments,
    Change,
    Import,
    Remove,
    ReplaceStatement,
    Unblock,
    Under,
    insert_before,
    insert_behind,
    replace,
    template,
    wrap,
)
from rewriter.rules.imports import imports
from rewriter.rules.quoted import quoted
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Refusal

_DEVICE = 'torch.device("cuda" if torch.cuda.is_available() else "cpu")'
_WITHOUT_MEANING = {
    "split_batches", "dispatch_batches", "even_batches", "project_dir", "project_config", "log_with", "cpu",
    "mixed_precision", "gradient_accumulation_steps", "gradient_accumulation_plugin", "step_scheduler_with_optimizer",
    "kwargs_handlers", "dataloader_config", "device_placement", "logging_dir",
}  # fmt: skip
"""What an Accelerator may be told; some of it has its own reasons against it."""
_HARMLESS_HANDLERS = {"DistributedDataParallelKwargs", "InitProcessGroupKwargs"}
_PURE = {
    "DistributedType", "ProjectConfiguration", "DistributedDataParallelKwargs", "InitProcessGroupKwargs",
    "DataLoaderConfiguration", "GradientAccumulationPlugin", "send_to_device", "convert_outputs_to_fp32", "Accelerator",
    "__version__", "check_min_version", "LoggerType", "find_executable_batch_size", "release_memory",
}  # fmt: skip
"""Names of accelerate that mean the same without an Accelerator."""
_IS_THERE = re.compile(r"is_\w+_available")
_CONSTANTS = {
    "num_processes": "1",
    "optimizer_step_was_skipped": "False",
    "use_distributed": "False",
    "device": _DEVICE,
    "is_main_process": "{bmt}.rank() == 0",
    "is_local_main_process": "{bmt}.rank() == 0",
    "is_last_process": "{bmt}.rank() == {bmt}.world_size() - 1",
}
_INDEX = {"process_index", "local_process_index"}
_LEFT_OUT = {"wait_for_everyone": "{bmt}.synchronize()", "free_memory": "", "clear": "", "unscale_gradients": ""}
_OWN = {"trackers": {"trackers", "get_tracker"}, "trigger": {"set_trigger", "check_trigger"}}
"""What stands for an Accelerator has as attributes, and the names that need them."""
_PLUGINS = {"deepspeed_plugin", "fsdp_plugin", "megatron_lm_plugin", "torch_tp_plugin"}
"""What an engine's state is asked for, and has not."""
_NO_LENGTH = {"islice", "iter", "cycle", "chain", "map", "filter", "zip", "enumerate"}
"""What gives batches and does not know how many."""
_STATES = {"model": "pytorch_model", "optimizer": "optimizer", "scheduler": "scheduler"}
"""What accelerate calls the files of a state."""
_REPEATABLE = {"join", "str", "format", "Path", "int", "split", "splitext", "basename"}
_OF_PLAIN_TESTS = (
    ast.Name, ast.Attribute, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp,
    ast.expr_context, ast.cmpop, ast.boolop, ast.unaryop,
)  # fmt: skip
"""What a test is made of that may be asked again."""
_UNNUMBERED = -1
"""For what follows a part that may not be there."""
_RANDOM_FILE = '"random_states_0.pkl"'
_RANDOM = {
    "random_state": ("random.getstate", "random.setstate"),
    "numpy_random_seed": ("numpy.random.get_state", "numpy.random.set_state"),
    "torch_manual_seed": ("torch.get_rng_state", "torch.set_rng_state"),
}
"""What accelerate calls the states of generators, and what reads and writes them."""


def find(file: File, facts: Facts) -> Iterator[Finding]:
    for files, accelerators in facts.accelerators.items():
        if file in files:
            uses = _Uses(file, facts, accelerators)
            changes = tuple(uses.changes())
            yield from (Refusal(RULE.code, line, message) for line, message in sorted(set(uses.reasons)))
            if changes:
                line = min(getattr(node, "lineno", 1) for node in uses.seen) if uses.seen else 1
                yield Conversion(RULE.code, line, "the script is an ordinary loop without accelerate", changes)


class _Uses:
    """The uses of an Accelerator in one file: what takes their place, and reasons against it."""

    def __init__(self, file: File, facts: Facts, held: Accelerators) -> None:
        self.file, self.facts, self.held = file, facts, held
        self.project = facts.project
        self.reasons: list[tuple[int, str]] = []
        self.seen: list[ast.AST] = []
        self._counted: set[ast.For] = set()
        self._dropped: dict[ast.Call, list[ast.keyword]] = {}

    def _new(self, name: str) -> str:
        """A name for what the new code holds; another one where the file gives this name to something."""
        while any(name in scope.bindings for scope in self.file.names.scopes.values()):
            name += "_"
        return name

    def refuse(self, node: ast.AST, message: str) -> None:
        self.reasons.append((getattr(node, "lineno", 1), message))

    def changes(self) -> Iterator[Change]:
        yield from self._constructors()
        for node in self.file.nodes:
            if isinstance(node, ast.Attribute) and self.held.is_one(self.file, node.value):
                self.seen.append(node)
                yield from self._use(node)
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
                if self.held.is_one(self.file, node):
                    yield from self._itself(node)
                elif isinstance(node, ast.Name) or not isinstance(self.file.names.parents[node], ast.Attribute):
                    yield from self._name(node, self.project.external(self.file, node))
        yield from self._loops()
        for call, dropped in self._dropped.items():
            yield Arguments(call, dropped=tuple(dropped))
        yield from self._imports()

    # The Accelerator itself -----------------------------------------------------

    def _constructors(self) -> Iterator[Change]:
        for name, values in self.held.options.items():
            for file, value in values:
                if file is self.file and (reason := self._against(name, value)):
                    self.refuse(value, reason)
        statements = {self.file.names.statement_of(call) for file, call in self.held.made if file is self.file}
        for statement in sorted(statements, key=lambda item: item.lineno):
            self.seen.append(statement)
            if not isinstance(statement, (ast.Assign, ast.AnnAssign)) or len(targets(statement)) != 1:
                self.refuse(statement, "an Accelerator that is given no name")
            elif not _is_made(statement.value):
                self.refuse(statement, "an Accelerator inside another expression")
            elif self._is_handed_on:
                yield from self._held_values(statement)
            else:
                yield Remove(statement)

    def _held_values(self, statement: ast.Assign | ast.AnnAssign) -> Iterator[Change]:
        """The name that is handed on means what the Accelerator was told, where that is asked for elsewhere."""
        found = {name: self.held.option(name) for name in sorted(self.held.asked_elsewhere)}
        values = {name: value for name, value in found.items() if value is not None}
        own = {"trackers": "[]", "trigger": "False"}
        first = [f"{name}={value}" for name, value in own.items() if self._has_own(name)]
        (target,) = targets(statement)
        if not values and not first:
            yield ReplaceStatement(statement, template("{target} = None", target=target))
        elif any(file is not self.file for file, _ in values.values()):
            self.refuse(statement, "what the Accelerator is told stands in another file")
        else:
            given = ", ".join([*(f"{name}={{{name}}}" for name in values), *first])
            holes = {name: value for name, (_, value) in values.items()}
            code = f"{{target}} = types.SimpleNamespace({given})"
            yield from imports(self.file, "types")
            yield ReplaceStatement(statement, template(code, target=target, **holes))

    @cached_property
    def _is_handed_on(self) -> bool:
        """Whether the Accelerator itself stands anywhere, so that its name must mean something."""
        return (
            bool(self.held.asked_elsewhere)
            or any(map(self._has_own, _OWN))
            or any(
                (self.held.is_one(file, node) and not isinstance(file.names.parents[node], ast.Attribute))
                or (isinstance(node, (ast.Nonlocal, ast.Global)) and self.held.names & set(node.names))
                for file in self.held.files
                for node in file.nodes
            )
        )

    def _has_own(self, name: str) -> bool:
        """Whether what stands for the Accelerator needs an attribute of its own: it is asked for, or set."""
        return any(
            isinstance(node, ast.Attribute) and node.attr in _OWN[name] and self.held.is_one(file, node.value)
            for file in self.held.files
            for node in file.nodes
        )

    def _against(self, name: str, value: ast.expr) -> str:
        """Why an Accelerator that is told something cannot be done without."""
        constant = value.value if isinstance(value, ast.Constant) else ...
        if constant is None or (constant is False and name != "device_placement"):
            return ""
        if name not in _WITHOUT_MEANING:
            return (
                "Accelerator(**options) may hold anything" if name == "*" else f"Accelerator({name}=...) is an engine's"
            )
        if name == "mixed_precision" and constant in {"fp16", "fp8"}:
            return f"mixed_precision={constant!r} needs a loss scale: use bf16, or a GradScaler in an ordinary loop"
        if name == "cpu" and constant is True:
            return "cpu=True: run the script with CUDA_VISIBLE_DEVICES= instead"
        if name == "log_with" and self._names_a_tracker(value) and constant not in {"tensorboard", "wandb"}:
            return 'log_with is not one of "tensorboard" and "wandb": name the one that is used'
        if name == "device_placement" and constant is not True:
            return "device_placement is not known: move batches with .to(device) in an ordinary loop"
        if name == "kwargs_handlers":
            handlers = {last_name(item.func) for item in walk(value) if isinstance(item, ast.Call)}
            handlers |= {n for item in walk(value) if isinstance(item, ast.Name) for n in self._made_by(item)}
            if handlers - _HARMLESS_HANDLERS:
                return f"kwargs_handlers={self.file.source.code(value)} is an engine's"
        if name == "project_config":
            for item in (item for code in (value, *self._values_of(value)) for item in walk(code)):
                if isinstance(item, ast.keyword) and item.arg not in {"project_dir", "logging_dir", "total_limit"}:
                    return f"ProjectConfiguration({item.arg}=...) names folders by itself: name them in the script"
        if name == "step_scheduler_with_optimizer" and constant is not True:
            return "step_scheduler_with_optimizer is not known"
        return ""

    @staticmethod
    def _names_a_tracker(value: ast.expr) -> bool:
        """Whether the code itself says where logs go; an option that does is looked at when the tracker starts."""
        return not (isinstance(value, (ast.Name, ast.Attribute)) and not last_name(value).isupper())

    def _values_of(self, node: ast.expr) -> Iterator[ast.expr]:
        """What a variable of this file is given."""
        roles = self.facts.scripts.roles[self.file]
        if isinstance(node, (ast.Name, ast.Attribute)):
            yield from (value for variable, value, _, _ in roles.assignments if variable == roles.var(node))

    def _made_by(self, node: ast.Name) -> Iterator[str]:
        yield from (last_name(value.func) for value in self._values_of(node) if isinstance(value, ast.Call))

    def _itself(self, node: ast.expr) -> Iterator[Change]:
        """The Accelerator where it is handed on, or asked whether it is one."""
        parent = self.file.names.parents[node]
        if isinstance(parent, ast.Attribute):
            return
        if not self.held.is_handed_on(self.file, node):
            self.refuse(node, f"{self.file.source.code(node)} is handed to code that is not known")
        yield from ()

    # What it was told -----------------------------------------------------

    def _told(self, name: str, node: ast.Attribute) -> str | None:
        """The code of what the Accelerator, of which a node is an attribute, was told; None if that is nothing."""
        found = self.held.option(name)
        if found is None:
            return None
        file, value = found
        if self.held.is_known(name, self.file, node):
            return file.source.code(value)
        return f"{self.file.source.code(node.value)}.{name}"

    def _steps(self, node: ast.Attribute) -> str:
        """Over how many batches gradients are added up, as code."""
        plugin = self.held.option("gradient_accumulation_plugin")
        if plugin is not None:
            self.refuse(node, "gradient_accumulation_plugin: say gradient_accumulation_steps=n")
        return self._told("gradient_accumulation_steps", node) or "1"

    @cached_property
    def _precision(self) -> bool:
        """Whether the model runs in another precision, or may do so."""
        found = self.held.option("mixed_precision")
        return found is not None and not (isinstance(found[1], ast.Constant) and found[1].value == "no")

    # Its attributes and methods -----------------------------------------------------

    def _use(self, node: ast.Attribute) -> Iterator[Change]:
        call = self.file.names.parents[node]
        if isinstance(call, ast.Call) and call.func is node:
            method: Callable[[ast.Call], Iterator[Change]] | None = getattr(self, f"_{node.attr.strip('_')}_call", None)
            if node.attr in PREPARES:
                yield from self._prepare(call)
            elif node.attr in _LEFT_OUT:
                yield from self._left_out(call, _LEFT_OUT[node.attr])
            elif method is not None:
                yield from method(call)
            else:
                self.refuse(node, f"{self.file.source.code(node)}(...) has no counterpart in an ordinary loop")
        elif not isinstance(node.ctx, ast.Load):
            yield from self._set(node)
        elif node.attr in _CONSTANTS:
            if not self._is_dropped(node):
                yield from self._code(node, _CONSTANTS[node.attr])
        elif node.attr in _INDEX:
            compared = isinstance(call, ast.Compare) or (isinstance(call, ast.UnaryOp) and isinstance(call.op, ast.Not))
            yield replace(node, "{bmt}.rank()" if compared else "0")
        elif node.attr == "sync_gradients":
            yield from self._sync(node)
        elif node.attr == "gradient_accumulation_steps":
            yield replace(node, self._steps(node))
        elif node.attr == "mixed_precision":
            yield replace(node, f'({self._told("mixed_precision", node)} or "no")' if self._precision else '"no"')
        elif node.attr == "distributed_type":
            yield from self._distributed_type(node)
        elif node.attr == "save" and isinstance(call, ast.keyword):
            if not self._is_dropped(node):
                yield from self._code(node, "torch.save")
        elif node.attr == "unwrap_model":  # handed on as a function
            yield replace(node, "(lambda model, **_: model)")
        elif node.attr in {"project_dir", "logging_dir"} and (told := self._told(node.attr, node)) is not None:
            yield replace(node, told)
        elif node.attr == "trackers":
            yield from ()  # a list of its own, which init_trackers fills
        elif node.attr == "state" and isinstance(call, ast.Call) and self._alone(call):
            yield Remove(self.file.names.statement_of(call))  # a line of the log about the engine
        elif node.attr == "state" and (asked := self._asked_of_state(node)) is not None:
            yield replace(asked, "None")
        else:
            self.refuse(node, f"{self.file.source.code(node)} has no counterpart in an ordinary loop")

    def _set(self, node: ast.Attribute) -> Iterator[Change]:
        """``accelerator.native_amp = False`` on a Mac, which no rank is."""
        statement = self.file.names.statement_of(node)
        tests = [parent.test for parent in self.file.names.ancestors(statement) if isinstance(parent, ast.If)]
        asked = [self.project.external(self.file, test.func) for test in tests if isinstance(test, ast.Call)]
        if node.attr == "native_amp" and "torch.backends.mps.is_available" in asked:
            yield Remove(statement)
        else:
            self.refuse(node, f"{self.file.source.code(node)} is set")

    def _asked_of_state(self, node: ast.expr) -> ast.expr | None:
        """What asks the engine's state for its plugin; there is none."""
        match self.file.names.parents[node]:
            case ast.Attribute(attr=name) as asked if name in _PLUGINS:
                return asked
            case (
                ast.Call(
                    func=ast.Name(id="getattr"), args=[state, ast.Constant(value=name), ast.Constant(value=None)]
                ) as asked
            ):
                return asked if state is node and name in _PLUGINS else None
        return None

    def _alone(self, call: ast.Call) -> bool:
        statement = self.file.names.statement_of(call)
        return isinstance(statement, ast.Expr) and statement.value is call

    def _is_dropped(self, node: ast.expr) -> bool:
        """Whether a value is an argument of ``save_pretrained`` that says no more than what is so without it; if so,
        it goes.
        """
        keyword = self.file.names.parents[node]
        if not isinstance(keyword, ast.keyword) or keyword.arg not in {"is_main_process", "save_function"}:
            return False
        call = self.file.names.parents[keyword]
        if not isinstance(call, ast.Call) or last_name(call.func) != "save_pretrained":
            return False
        self._dropped.setdefault(call, []).append(keyword)
        return True

    def _code(self, node: ast.expr, text: str, **holes: ast.expr) -> Iterator[Change]:
        """Other code in the place of a node, with the imports that it needs."""
        named = ("torch", "os", "itertools", "contextlib", "logging")
        yield from imports(self.file, *(module for module in named if f"{module}." in text))
        yield replace(node, quoted(self.file, node, text), **holes)

    def _distributed_type(self, node: ast.Attribute) -> Iterator[Change]:
        if any(self.project.external(self.file, n) == "accelerate.DistributedType" for n in self._names_of_module()):
            yield replace(node, "DistributedType.NO")
        else:
            self.refuse(node, "the kind of processes is asked for under a name that is not known")

    def _names_of_module(self) -> list[ast.Name]:
        return [n for n in self.file.nodes if isinstance(n, ast.Name) and n.id == "DistributedType"]

    def _left_out(self, call: ast.Call, instead: str) -> Iterator[Change]:
        statement = self.file.names.statement_of(call)
        code = self.file.source.code
        into = targets(statement) if isinstance(statement, ast.Assign) and statement.value is call else []
        if into and [code(target) for target in into] == [code(item) for item in call.args]:
            yield Remove(statement)  # the names of what they held are given something else, or end
        elif not self._alone(call):
            self.refuse(call, f"{self.file.source.code(call.func)}(...) gives a value that is used")
        elif instead:
            yield replace(call, instead)
        else:
            yield Remove(self.file.names.statement_of(call))

    def _prepare(self, call: ast.Call) -> Iterator[Change]:
        statement = self.file.names.statement_of(call)
        into = targets(statement) if isinstance(statement, ast.Assign) and statement.value is call else []
        if any(isinstance(item, ast.Starred) for item in call.args) or not call.args:
            self.refuse(call, "what is prepared is not known: name each in the call")
            return
        for _, made, item, kind in self.held.prepared:
            if made is call and not kind:
                self.refuse(
                    item, f"whether {self.file.source.code(item)} is a model, an optimizer or a loader is not known"
                )
        kinds = [kind for _, made, _, kind in self.held.prepared if made is call]
        code = self.file.source.code
        names = into if len(into) == len(call.args) else list(call.args)
        if into and len(into) != len(call.args):
            self.refuse(call, "what is prepared goes to one variable: give each its own")
        elif not into and not self._alone(call):
            yield replace(call, "{only}", only=call.args[0])
            if len(call.args) > 1 or self._precision:
                self.refuse(call, "what is prepared has no name")
            return
        lines: list[str] = []
        for name, kind in zip(names, kinds, strict=True):
            if kind == "model" and self._precision:
                lines += self._in_precision(code(name), _attribute(call))
        if not into or all(code(a) == code(b) for a, b in zip(into, call.args, strict=True)):
            yield from self._imports_for(lines)
            if lines:
                yield insert_before(statement, *lines)
            yield Remove(statement)
        else:
            yield from self._imports_for(lines)
            holes = {f"value_{number}": item for number, item in enumerate(call.args)}
            yield replace(call, ", ".join(f"{{{name}}}" for name in holes), **holes)
            if lines:
                yield insert_behind(statement, *lines)

    def _imports_for(self, lines: list[str]) -> Iterator[Change]:
        if lines:
            yield from imports(self.file, "torch")
        if lines and "convert_outputs_to_fp32" not in self.file.names.module.bindings:
            yield Import("from accelerate.utils import convert_outputs_to_fp32")

    def _in_precision(self, model: str, node: ast.Attribute) -> list[str]:
        """Lines that make a model run as accelerate lets it run in bf16."""
        told = self._told("mixed_precision", node)
        cast = 'torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16)'
        line = f"{model}.forward = convert_outputs_to_fp32({cast}({model}.forward))"
        found = self.held.option("mixed_precision")
        if found is not None and isinstance(found[1], ast.Constant):
            return [line]
        return [
            f'if {told} not in (None, "no", "bf16"):',
            f'    raise ValueError(f"{{{told}}} needs a loss scale: use bf16")',
            f'if {told} == "bf16":',
            f"    {line}",
        ]

    def _backward_call(self, call: ast.Call) -> Iterator[Change]:
        if len(call.args) != 1 or any(keyword.arg in {"learning_rate", None} for keyword in call.keywords):
            self.refuse(call, "backward with arguments that are not known")
            return
        steps = self._steps(_attribute(call))
        holes = {keyword.arg or "": keyword.value for keyword in call.keywords}
        given = ", ".join(f"{name}={{{name}}}" for name in holes)
        loss = "{loss}" if steps == "1" else f"({{loss}} / {_operand(steps)})"
        yield replace(call, f"{loss}.backward({given})", loss=call.args[0], **holes)

    def _clip_grad_norm_call(self, call: ast.Call) -> Iterator[Change]:
        yield from self._code(call.func, "torch.nn.utils.clip_grad_norm_")

    def _clip_grad_value_call(self, call: ast.Call) -> Iterator[Change]:
        yield from self._code(call.func, "torch.nn.utils.clip_grad_value_")

    def _print_call(self, call: ast.Call) -> Iterator[Change]:
        yield replace(call.func, "print")

    def _unwrap_model_call(self, call: ast.Call) -> Iterator[Change]:
        yield from self._of_model(call, "{model}")

    def _get_state_dict_call(self, call: ast.Call) -> Iterator[Change]:
        yield from self._of_model(call, "{model}.state_dict()")

    def _of_model(self, call: ast.Call, text: str) -> Iterator[Change]:
        """What is made of the model that a call is given; what it is told of wrappers means nothing without one."""
        models = [*call.args[:1], *(keyword.value for keyword in call.keywords if keyword.arg == "model")]
        if len(models) != 1 or isinstance(models[0], ast.Starred) or any(k.arg is None for k in call.keywords):
            self.refuse(call, "a model that is not named")
        else:
            yield replace(call, text, model=models[0])

    def _skip_first_batches_call(self, call: ast.Call) -> Iterator[Change]:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        number = call.args[1] if len(call.args) > 1 else given.get("num_batches")
        loader = call.args[0] if call.args else given.get("dataloader")
        if number is None or loader is None:
            self.refuse(call, "skip_first_batches with arguments that are not known")
            return
        yield replace(call, "{bmt}.skip_batches({loader}, {number})", loader=loader, number=number)

    # Blocks -----------------------------------------------------

    def _accumulate_call(self, call: ast.Call) -> Iterator[Change]:
        block = self._block(call)
        if block is None:
            self.refuse(call, "accumulate(...) that is not the only part of a with statement")
            return
        yield Unblock(block)
        if self._steps(_attribute(call)) != "1" and (loop := self._counting_loop(call)) is not None:
            yield from self._only_when_synchronised(loop, _attribute(call))

    def _no_sync_call(self, call: ast.Call) -> Iterator[Change]:
        block = self._block(call)
        if block is not None:
            yield Unblock(block)
        else:
            yield from self._code(call, "contextlib.nullcontext()")

    def _main_process_first_call(self, call: ast.Call) -> Iterator[Change]:
        yield replace(call, "{bmt}.rank_0_first()")

    def _local_main_process_first_call(self, call: ast.Call) -> Iterator[Change]:
        yield replace(call, "{bmt}.rank_0_first()")

    def _autocast_call(self, call: ast.Call) -> Iterator[Change]:
        if not self._precision:
            yield from self._no_sync_call(call)
            return
        told = self._told("mixed_precision", _attribute(call))
        yield from self._code(
            call,
            'torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16, '
            f'enabled={told} == "bf16")',
        )

    def _split_between_processes_call(self, call: ast.Call) -> Iterator[Change]:
        block = self._block(call)
        part = block.items[0].optional_vars if block is not None else None
        if block is None or part is None or self.held.trains(self.file, block):
            self.refuse(call, "split_between_processes(...) over what is trained on")
            return
        yield insert_before(block, "{part} = {whole}", part=part, whole=call.args[0])
        yield Unblock(block)

    def _block(self, call: ast.Call) -> ast.With | None:
        """The with statement of which a call is all."""
        item = self.file.names.parents[call]
        block = self.file.names.parents[item] if isinstance(item, ast.withitem) else None
        return block if isinstance(block, ast.With) and len(block.items) == 1 else None

    def _sync(self, node: ast.Attribute) -> Iterator[Change]:
        loop = self.held.loop_around(self.file, node)
        counts = loop is not None and self._accumulates(loop) and self._steps(node) != "1"
        test = self.file.names.parents[node]
        if not counts:
            if isinstance(test, ast.If) and test.test is node and not test.orelse:
                yield Unblock(test)
            else:
                yield replace(node, "True")
        elif (counted := self._counting_loop(node)) is not None:
            if any(call.lineno > node.lineno for call in self._accumulations(counted)):
                self.refuse(node, "sync_gradients is that of the batch before here: ask for it behind accumulate")
            yield replace(node, f"({self._condition(counted, node)})")

    def _accumulates(self, loop: ast.For | ast.While) -> bool:
        return any(True for _ in self._accumulations(loop))

    def _accumulations(self, loop: ast.AST) -> Iterator[ast.Call]:
        """The calls of ``accumulate`` in a loop."""
        for item in walk(loop):
            if isinstance(item, ast.Call) and isinstance(item.func, ast.Attribute) and item.func.attr == "accumulate":
                if self.held.is_one(self.file, item.func.value):
                    yield item

    def _counting_loop(self, node: ast.AST) -> ast.For | None:
        """The loop whose steps tell when gradients are complete."""
        loop = self.held.loop_around(self.file, node)
        if not isinstance(loop, ast.For):
            self.refuse(
                node, "gradients are added up over batches in a loop that does not go through a prepared loader"
            )
            return None
        if self._index(loop) is None:
            self.refuse(loop, "the step of this loop is not known: write for step, batch in enumerate(loader)")
            return None
        return loop

    def _index(self, loop: ast.For) -> str | None:
        """The name of a loop's step; ``index`` for a loop without one."""
        inner, starts = loop.iter, 0
        enumerated = False
        while isinstance(inner, ast.Call) and inner.args:
            name = last_name(inner.func)
            if name in {"skip_first_batches", "islice"}:
                return None
            if name == "enumerate":
                enumerated = enumerated or inner is loop.iter
                starts += len(inner.args) + len(inner.keywords) - 1
            inner = inner.args[0]
        if starts or not isinstance(inner, (ast.Name, ast.Attribute)):
            return None
        if any(name in _NO_LENGTH for name in self._made_of(inner)):
            return None
        if not enumerated:
            return (
                None
                if isinstance(loop.iter, ast.Call) and last_name(loop.iter.func) == "enumerate"
                else self._new("index")
            )
        target = loop.target
        name = target.elts[0].id if isinstance(target, ast.Tuple) and isinstance(target.elts[0], ast.Name) else ""
        inside = (item for statement in loop.body for item in walk(statement))
        stored = any(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store) for n in inside)
        return None if stored else name or None

    def _made_of(self, node: ast.expr) -> Iterator[str]:
        """The names of the calls that give a variable its values."""
        roles = self.facts.scripts.roles[self.file]
        for variable, value, _, _ in roles.assignments:
            if variable == roles.var(node) and isinstance(value, ast.Call):
                yield last_name(value.func)

    def _condition(self, loop: ast.For, node: ast.Attribute) -> str:
        """When gradients are complete: after so many batches, and at the end of the data."""
        index, steps = self._index(loop), self._steps(node)
        self._counted.add(loop)
        loader = self.file.source.code(self.held.loader(self.file, loop.iter))
        return f"({index} + 1) % {_operand(steps)} == 0 or {index} + 1 == len({loader})"

    def _only_when_synchronised(self, loop: ast.For, node: ast.Attribute) -> Iterator[Change]:
        """Steps of what is prepared act when gradients are complete."""
        stepped = self.held.names_of("optimizer")
        stepped |= self.held.names_of("scheduler") if self._scheduler_follows else set()
        blocks = [block for item in walk(loop) for name in ("body", "orelse") if (block := getattr(item, name, None))]
        for block in blocks:
            run: list[ast.stmt] = []
            for statement in [*(block if isinstance(block, list) else []), None]:
                if statement is not None and self._is_step(statement, stepped):
                    run.append(statement)
                elif run:
                    if run[0].lineno < node.lineno:
                        self.refuse(
                            run[0], "this acts when the batch before has completed the gradients: put it behind"
                        )
                    elif not self._is_guarded(run[0]):
                        yield Under(tuple(run), template(f"if {self._condition(loop, node)}:"))
                    run = []

    @property
    def _scheduler_follows(self) -> bool:
        found = self.held.option("step_scheduler_with_optimizer")
        return found is None or not (isinstance(found[1], ast.Constant) and found[1].value is False)

    @staticmethod
    def _is_step(statement: ast.stmt, stepped: set[str]) -> bool:
        match statement:
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=owner, attr="step" | "zero_grad"))):
                return last_name(owner) in stepped
        return False

    def _is_guarded(self, statement: ast.stmt) -> bool:
        return any(
            isinstance(parent, ast.If) and any(getattr(n, "attr", "") == "sync_gradients" for n in walk(parent.test))
            for parent in self.file.names.ancestors(statement)
        )

    # Values of other processes -----------------------------------------------------

    def _gather_call(self, call: ast.Call) -> Iterator[Change]:
        if not call.args:
            self.refuse(call, "gather with arguments that are not known")
            return
        value = call.args[0]
        shared = self.held.shares(self.file, value, self.file.names.statement_of(call))
        if shared is None:
            self.refuse(call, f"whether {self.file.source.code(value)} is of a rank's share of the data is not known")
        elif not shared:
            yield replace(call, "{value}", value=value)
        elif isinstance(value, (ast.Tuple, ast.List)):
            holes = {f"value_{number}": item for number, item in enumerate(value.elts)}
            yield replace(call, "(" + ", ".join(f"{{bmt}}.gather_result({{{name}}})" for name in holes) + ",)", **holes)
        else:
            yield replace(call, "{bmt}.gather_result({value})", value=value)

    def _gather_for_metrics_call(self, call: ast.Call) -> Iterator[Change]:
        yield from self._gather_call(call)

    def _pad_across_processes_call(self, call: ast.Call) -> Iterator[Change]:
        if self.held.shares(self.file, call.args[0], self.file.names.statement_of(call)) is False:
            yield replace(call, "{value}", value=call.args[0])
        else:
            self.refuse(call, "pad_across_processes of values of a share: bmt.gather_result takes different lengths")

    def _reduce_call(self, call: ast.Call) -> Iterator[Change]:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        how = call.args[1] if len(call.args) > 1 else given.get("reduction")
        operation = "sum" if how is None else getattr(how, "value", "")
        if "scale" in given or len(call.args) > 2 or operation not in {"sum", "mean"} or not call.args:
            self.refuse(call, "reduce with arguments that are not known")
            return
        shared = self.held.shares(self.file, call.args[0], self.file.names.statement_of(call))
        if shared is None:
            code = self.file.source.code(call.args[0])
            self.refuse(call, f"whether {code} is of a rank's share of the data is not known")
        elif shared:
            name = "sum" if operation == "sum" else "avg"
            yield replace(call, f'{{bmt}}.distributed.all_reduce({{value}}, "{name}")', value=call.args[0])
        else:
            yield replace(call, "{value}", value=call.args[0])

    # Files -----------------------------------------------------

    def _save_call(self, call: ast.Call) -> Iterator[Change]:
        safe = [keyword for keyword in call.keywords if keyword.arg == "safe_serialization"]
        if any(not (isinstance(k.value, ast.Constant) and k.value.value is False) for k in safe):
            self.refuse(call, "save(..., safe_serialization=...): write torch.save")
            return
        yield from self._code(call.func, "torch.save")
        if safe:
            yield Arguments(call, dropped=tuple(safe))

    def _save_model_call(self, call: ast.Call) -> Iterator[Change]:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        model = call.args[0] if call.args else given.get("model")
        folder = call.args[1] if len(call.args) > 1 else given.get("save_directory")
        if model is None or folder is None or not self._alone(call) or not _is_repeatable(folder):
            self.refuse(call, "save_model with arguments that are not known")
            return
        statement = self.file.names.statement_of(call)
        yield insert_before(statement, "os.makedirs({folder}, exist_ok=True)", folder=folder)
        line = 'torch.save({model}.state_dict(), os.path.join({folder}, "pytorch_model.bin"))'
        yield from self._code(call, line, model=model, folder=folder)

    def _save_state_call(self, call: ast.Call) -> Iterator[Change]:
        lines, unsaved = ["os.makedirs({folder}, exist_ok=True)"], self._new("unsaved")
        parts = self._parts(call)
        hooks = [self.file.source.code(hook) for hook in self._hooks(call, "register_save_state_pre_hook")]
        if hooks:
            models = self._listed(parts, lines)
            lines.append(f"{unsaved} = [None] * len({models})  # from which a hook takes what it has saved")
            lines += [f"{hook}({models}, {unsaved}, {{folder}})" for hook in hooks]
        for name, file, test in parts:
            saved = f'torch.save({name}.state_dict(), os.path.join({{folder}}, "{file}"))'
            tests = [test] if test else []
            if hooks and file.startswith(_STATES["model"]):
                tests.append(f"{{bmt}}.agree(len({unsaved}) > {_number_of(file)})")
            lines += _under(tests, [saved])
        random = ", ".join(f'"{name}": {read}()' for name, (read, _) in _RANDOM.items())
        lines.append(f"torch.save({{{random}}}, os.path.join({{folder}}, {_RANDOM_FILE}))")
        yield from self._state(call, "output_dir", lines)

    def _load_state_call(self, call: ast.Call) -> Iterator[Change]:
        lines: list[str] = []
        unread, weights, drawn = self._new("unread"), self._new("state_file"), self._new("drawn")
        parts = self._parts(call)
        hooks = [self.file.source.code(hook) for hook in self._hooks(call, "register_load_state_pre_hook")]
        if hooks:
            lines.append(f"{unread} = [*{self._listed(parts, lines)}]  # from which a hook takes what it has read")
            lines += [f"{hook}({unread}, {{folder}})" for hook in hooks]
        for name, file, test in parts:
            tests = [test] if test else []
            own: list[str] = []
            state = f'torch.load(os.path.join({{folder}}, "{file}"), map_location="cpu")'
            if file.startswith(_STATES["model"]):  # what accelerate itself has written
                safe = file.replace(".bin", ".safetensors").replace(_STATES["model"], "model")
                own.append(f'{weights} = os.path.join({{folder}}, "{safe}")')
                if hooks:
                    tests.append(f"len({unread}) > {_number_of(file)}")
                state = f"safetensors.torch.load_file({weights}) if os.path.exists({weights}) else {state}"
                yield Import("import safetensors.torch")
            own.append(f"{name}.load_state_dict({state})")
            lines += _under(tests, own)
        lines.append(f"{drawn} = torch.load(os.path.join({{folder}}, {_RANDOM_FILE}), weights_only=False)")
        lines += [f'{write}({drawn}["{name}"])' for name, (_, write) in _RANDOM.items()]
        yield from self._state(call, "input_dir", lines)

    def _register_save_state_pre_hook_call(self, call: ast.Call) -> Iterator[Change]:
        yield from self._hook(call, ("models", "weights", "output_dir"))

    def _register_load_state_pre_hook_call(self, call: ast.Call) -> Iterator[Change]:
        yield from self._hook(call, ("models", "input_dir"))

    def _hook(self, call: ast.Call, parameters: tuple[str, ...]) -> Iterator[Change]:
        """A function that is called where a state is written or read, before the rest of it."""
        function = self._hooked(call)
        if function is None or len(function.parameters) != len(parameters) or not self._alone(call):
            self.refuse(call, f"{self.file.source.code(call)}: give it a function of the script")
            return
        weights = function.parameters[1] if len(parameters) == 3 else ""
        for node in walk(function.node):
            if isinstance(node, ast.Name) and node.id == weights and isinstance(node.ctx, ast.Load):
                if not self._only_counts(node):
                    self.refuse(node, f"a hook that looks into {weights}: take them from the models")
        yield Remove(self.file.names.statement_of(call))

    def _only_counts(self, node: ast.Name) -> bool:
        """Whether a list of states is only made shorter, or asked whether it has any."""
        parent = self.file.names.parents[node]
        match parent:
            case ast.Attribute(attr="pop"):
                popped = self.file.names.parents[parent]
                return isinstance(popped, ast.Call) and not popped.args and self._alone(popped)
            case ast.Call(func=ast.Name(id="len")):
                return True
        return isinstance(parent, (ast.If, ast.While)) and parent.test is node

    def _hooked(self, call: ast.Call) -> FunctionInfo | None:
        found = self.project.resolve(self.file, call.args[0]) if len(call.args) == 1 and not call.keywords else None
        return found if isinstance(found, FunctionInfo) and found.file is self.file else None

    def _hooks(self, call: ast.Call, name: str) -> list[ast.expr]:
        """The hooks that are registered under a name, in their order."""
        found = []
        for file in self.held.files:
            for node in file.calls:
                if isinstance(node.func, ast.Attribute) and node.func.attr == name and node.args:
                    if self.held.is_one(file, node.func.value):
                        found.append(node.args[0])
                        here = self.file.names.function_of(call)
                        if file is not self.file or file.names.function_of(node) is not here:
                            self.refuse(call, f"{name}(...) stands elsewhere: save each part by torch.save")
        return found

    def _state(self, call: ast.Call, keyword: str, lines: list[str]) -> Iterator[Change]:
        given = {item.arg: item.value for item in call.keywords}
        folder = call.args[0] if call.args else given.get(keyword)
        if folder is None or not self._alone(call) or set(given) - {keyword}:
            self.refuse(call, f"{self.file.source.code(call.func)}(...) in a folder that is not named here")
            return
        yield from imports(self.file, "os", "torch", "random", "numpy")
        named = isinstance(folder, (ast.Name, ast.Constant))
        code = "{folder}" if named else self._new("state_folder")
        lines = [*([] if named else [f"{code} = {{folder}}"]), *(line.replace("{folder}", code) for line in lines)]
        statement = self.file.names.statement_of(call)
        yield insert_before(statement, *lines, folder=folder)
        yield Remove(statement)

    def _listed(self, parts: list[tuple[str, str, str]], lines: list[str]) -> str:
        """A list of the models among the parts of a state, as code; what it needs before is added to lines."""
        models = [(name, test) for name, file, test in parts if file.startswith(_STATES["model"])]
        if not any(test for _, test in models):
            return f"[{', '.join(name for name, _ in models)}]"
        tests = {test: [name for name, of in models if of in ("", test)] for _, test in models}
        listed = self._new("prepared")
        lines.append(f"{listed} = []")
        for test in tests:
            lines += _under([test] if test else [], [f"{listed} += [{', '.join(n for n, of in models if of == test)}]"])
        return listed

    def _parts(self, call: ast.Call) -> list[tuple[str, str, str]]:
        """What a state is made of, by name, the file of each, and the test under which it is one."""
        return list(self._parts_of(call))

    def _parts_of(self, call: ast.Call) -> Iterator[tuple[str, str, str]]:
        function = self.file.names.function_of(call)
        parts = [(file, made, item, kind) for file, made, item, kind in self.held.prepared if kind in _STATES]
        registered = [
            (file, node, item)
            for file in self.held.files
            for node in file.calls
            if isinstance(node.func, ast.Attribute)
            and node.func.attr == "register_for_checkpointing"
            and self.held.is_one(file, node.func.value)
            for item in node.args
        ]
        ways: dict[tuple[str, str], list[tuple[ast.If, bool] | None]] = {}
        for file, made, item, kind in [*parts, *((f, m, i, "custom") for f, m, i in registered)]:
            statement = file.names.statement_of(made)
            into = targets(statement) if isinstance(statement, ast.Assign) and statement.value is made else made.args
            name = file.source.code(into[made.args.index(item)] if len(into) == len(made.args) else item)
            own = name.startswith("self.") and file is self.file
            if not own and (file is not self.file or file.names.function_of(made) is not function):
                self.refuse(call, f"{name}, a part of the state, is prepared elsewhere: save each part by torch.save")
            ways.setdefault((kind, name), []).append(self._way(file, statement, call))
        counts: dict[str, int] = {}
        for (kind, name), taken in ways.items():
            test = self._test_of(name, taken, call)
            number = counts.get(kind, 0)
            counts[kind] = number + 1 if not test else _UNNUMBERED
            if number == _UNNUMBERED:
                self.refuse(call, f"{name} is behind a part of the state that may not be there: prepare that last")
            if kind == "custom":
                yield name, f"custom_checkpoint_{number}.pkl", test
            else:
                yield name, _STATES[kind] + (f"_{number}" if number else "") + ".bin", test

    def _way(self, file: File, statement: ast.stmt, call: ast.Call) -> tuple[ast.If, bool] | None:
        """The branch in which something is prepared, where a state is written or read outside of it."""
        inner: ast.AST = statement
        for parent in file.names.ancestors(statement):
            if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)) or call in walk(parent):
                break
            if isinstance(parent, ast.If):
                return parent, inner in parent.body
            inner = parent
        return None

    def _test_of(self, name: str, taken: list[tuple[ast.If, bool] | None], call: ast.Call) -> str:
        """The test under which a part of a state is one, as code; empty where it always is."""
        ways = {(id(way[0]), way[1]) for way in taken if way is not None}
        first = taken[0]
        if first is None or None in taken or {(id(first[0]), True), (id(first[0]), False)} <= ways:
            return ""
        node, answer = first
        if len(ways) > 1 or not all(isinstance(item, _OF_PLAIN_TESTS) for item in walk(node.test)):
            self.refuse(call, f"{name}, a part of the state, is prepared under a test: save each part by torch.save")
        code = self.file.source.code(node.test)
        return code if answer else f"not ({code})"

    def _register_for_checkpointing_call(self, call: ast.Call) -> Iterator[Change]:
        yield from self._left_out(call, "")

    # Trackers -----------------------------------------------------

    @cached_property
    def _tracker(self) -> str:
        """The tracker that the script starts; empty if it starts none, in which case logs go nowhere."""
        found = self.held.option("log_with")
        if found is None or not any(self._starts()):
            return ""
        return str(found[1].value) if isinstance(found[1], ast.Constant) else "tensorboard"

    def _starts(self) -> Iterator[tuple[File, ast.Call]]:
        """The calls of ``init_trackers``."""
        for file in self.held.files:
            for node in file.calls:
                if isinstance(node.func, ast.Attribute) and node.func.attr == "init_trackers":
                    if self.held.is_one(file, node.func.value):
                        yield file, node

    @cached_property
    def _is_conditional(self) -> bool:
        """Whether there may be no tracker: an option says so, or it is started under a test of something else than
        the rank.
        """
        found = self.held.option("log_with")
        return (found is not None and not isinstance(found[1], ast.Constant)) or any(
            isinstance(parent, ast.If) and as_guard(file, parent) is None and not _is_main(parent)
            for file, call in self._starts()
            for parent in file.names.ancestors(call)
        )

    def _init_trackers_call(self, call: ast.Call) -> Iterator[Change]:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        given |= dict(zip(("project_name", "config", "init_kwargs"), call.args, strict=False))
        name, config = given.get("project_name"), given.get("config")
        if not self._tracker:
            yield from self._left_out(call, "")
            return
        if name is None or "init_kwargs" in given or not self._alone(call) or len(list(self._starts())) > 1:
            self.refuse(call, "init_trackers with arguments that are not known: make the writer in the script")
            return
        statement = self.file.names.statement_of(call)
        owner = self.file.source.code(_attribute(call).value)
        listed = f'{owner}.trackers.append(types.SimpleNamespace(name="{self._tracker}", tracker={{it}}, {{its}}))'
        if self._has_own("trackers"):
            yield from imports(self.file, "types")
        if self._tracker == "wandb":
            yield Import("import wandb")
            holes = {"name": name} | ({"config": config} if config is not None else {})
            told = ", config={config}" if config is not None else ""
            yield replace(call, f"wandb.init(project={{name}}{told})", **holes)
            if self._has_own("trackers"):
                yield insert_behind(
                    statement, listed.replace("{it}", "wandb.run").replace("{its}", "run=wandb.run, log=wandb.log")
                )
            return
        folder = self._folder(_attribute(call))
        yield Import("from torch.utils.tensorboard import SummaryWriter")
        yield from imports(self.file, "os")
        tests = [p for p in self.file.names.ancestors(statement) if isinstance(p, ast.If) and not _is_main(p)]
        guards = [test for test in tests if as_guard(self.file, test) is not None]
        place: ast.stmt = guards[-1] if guards else statement
        inside = {n.id for n in walk(place) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        values = list(self._values_of(name)) if isinstance(name, ast.Name) and name.id in inside else []
        name = values[0] if len(values) == 1 and _is_repeatable(values[0]) else name
        if guards and any(isinstance(n, ast.Name) and n.id in inside for n in walk(name)):
            self.refuse(call, "the name of the trackers is made on one rank")
        tracker = self._new("tracker")
        lines = [f"{tracker} = SummaryWriter(os.path.join({folder}, {{name}}))"]
        if self._has_own("trackers"):
            lines.append(listed.replace("{it}", tracker).replace("{its}", f"writer={tracker}"))
        hparams = [] if config is None else [f"{tracker}.add_hparams({{config}}, {{}})"]
        if self._is_conditional:
            yield insert_before(tests[-1] if tests else statement, f"{tracker} = None")
        asked = self._asked_tracker(call)
        if asked is not None:
            lines = [
                f'if {asked} not in (None, "tensorboard"):',
                f"    raise ValueError(f\"{{{asked}}} is no tracker of this script: say 'tensorboard'\")",
                f"if {asked} is not None:",
                *(f"    {line}" for line in lines),
            ]
            hparams = [f"if {tracker} is not None:", *(f"    {line}" for line in hparams)] if hparams else []
        # What closes it stands outside of the guard.
        yield insert_before(place, *lines, name=name)
        if config is not None:
            yield insert_before(statement, *hparams, config=config)
        yield Remove(statement)

    def _asked_tracker(self, call: ast.Call) -> str | None:
        """The code of the option that says where logs go; None where the script itself says it."""
        found = self.held.option("log_with")
        if found is None or isinstance(found[1], ast.Constant):
            return None
        if not self.held.is_known("log_with", self.file, call):
            self.refuse(call, "the option that names the tracker is not known here: make the writer in the script")
        return found[0].source.code(found[1])

    def _folder(self, node: ast.Attribute) -> str:
        """Where logs go, as code."""
        folder = self._told("logging_dir", node) or self._told("project_dir", node)
        if folder is None:
            self.refuse(node, "a writer of logs needs a folder: say project_dir=folder")
        return folder or "."

    def _log_call(self, call: ast.Call) -> Iterator[Change]:
        if not self._tracker:
            yield from self._left_out(call, "")
            return
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        given |= dict(zip(("values", "step"), call.args, strict=False))
        values, step = given.get("values"), given.get("step")
        if values is None or set(given) - {"values", "step"} or not self._alone(call) or not self._is_tracked(call):
            self.refuse(call, "log(...) with arguments that are not known, or away from init_trackers")
            return
        holes = {"step": step} if step is not None else {}
        at = ", {step}" if step is not None else ""
        if self._tracker == "wandb":
            lines = ["wandb.log({values}" + (", step={step})" if step is not None else ")")]
            holes["values"] = values
        elif isinstance(values, ast.Dict) and all(key is not None for key in values.keys):
            lines = []
            for number, (key, value) in enumerate(zip(values.keys, values.values, strict=True)):
                assert key is not None
                lines += self._to_show(value, f"{{key_{number}}}", f"{{value_{number}}}", at)
                holes |= {f"key_{number}": key, f"value_{number}": value}
        else:
            names = self._new("name"), self._new("value")
            lines = [f"for {names[0]}, {names[1]} in {{values}}.items():"]
            lines += [f"    {line}" for line in self._by_kind(*names, at)]
            holes["values"] = values
        yield from self._to_tracker(call, lines, holes)

    def _to_show(self, value: ast.expr, key: str, code: str, at: str) -> list[str]:
        """Lines that show a value under its key, as accelerate's tracker does: by what it is."""
        if isinstance(value, ast.JoinedStr) or last_name(getattr(value, "func", value)) == "str":
            return [f"{self._new('tracker')}.add_text({key}, {code}{at})"]
        if self._is_number(value):
            return [f"{self._new('tracker')}.add_scalar({key}, {code}{at})"]
        if all(isinstance(item, (ast.Name, ast.Attribute, ast.Load)) for item in walk(value)):
            return self._by_kind(key, code, at)
        shown = self._new("value")
        return [f"{shown} = {code}", *self._by_kind(key, shown, at)]

    def _by_kind(self, key: str, value: str, at: str) -> list[str]:
        """Lines that show a value of a kind that is not known; of other kinds accelerate shows nothing."""
        tracker = self._new("tracker")
        return [
            f"if isinstance({value}, dict):",
            f"    {tracker}.add_scalars({key}, {value}{at})",
            f"elif isinstance({value}, str):",
            f"    {tracker}.add_text({key}, {value}{at})",
            f"elif isinstance({value}, (int, float)):",
            f"    {tracker}.add_scalar({key}, {value}{at})",
        ]

    def _is_number(self, value: ast.expr, deep: int = 0) -> bool:
        """Whether an expression is a number by all that is seen of it."""
        match value:
            case ast.Constant():
                return isinstance(value.value, (int, float))
            case ast.Call():
                return last_name(value.func) in {"item", "float", "int", "len", "round", "exp"}
            case ast.BinOp(op=ast.Div() | ast.FloorDiv() | ast.Sub() | ast.Pow()):
                return True
            case ast.BinOp(left=left, right=right):
                return self._is_number(left, deep) or self._is_number(right, deep)
            case ast.Subscript(value=ast.Call(func=func)):
                return last_name(func) == "get_last_lr"
            case ast.Name() if deep < 4:
                roles = self.facts.scripts.roles[self.file]
                given = [(v, part) for var, v, _, part in roles.assignments if var == roles.var(value)]
                counts = any(_counts(node, value.id) for node in self.file.nodes if isinstance(node, ast.For))
                if all(not part and self._is_number(v, deep + 1) for v, part in given):
                    return bool(given) or counts
        return False

    def _to_tracker(self, call: ast.Call, lines: list[str], holes: dict[str, ast.expr]) -> Iterator[Change]:
        """Lines for a tracker, if there is one."""
        statement = self.file.names.statement_of(call)
        if self._tracker == "wandb":
            yield Import("import wandb")
        if self._is_conditional:
            there = "wandb.run is not None" if self._tracker == "wandb" else f"{self._new('tracker')} is not None"
            lines = [f"if {there}:", *(f"    {line}" for line in lines)]
        yield insert_before(statement, *lines, **holes)
        yield Remove(statement)

    def _is_tracked(self, call: ast.Call) -> bool:
        """Whether the tracker is known where it is used."""
        function = self.file.names.function_of(call)
        return self._tracker == "wandb" or any(
            file is self.file and file.names.function_of(start) is function for file, start in self._starts()
        )

    def _set_trigger_call(self, call: ast.Call) -> Iterator[Change]:
        if not self._alone(call):
            self.refuse(call, "set_trigger() gives a value that is used")
            return
        code = template("{owner}.trigger = True", owner=_attribute(call).value)
        yield ReplaceStatement(self.file.names.statement_of(call), code)

    def _check_trigger_call(self, call: ast.Call) -> Iterator[Change]:
        """Whether any rank has set it; then it is set back."""
        test = self.file.names.parents[call]
        if not isinstance(test, ast.If) or test.test is not call:
            self.refuse(call, "check_trigger() that is not all of a test")
            return
        owner = _attribute(call).value
        yield replace(call, "{bmt}.total(int({owner}.trigger)) > 0", owner=owner)
        yield insert_before(test.body[0], "{owner}.trigger = False", owner=owner)

    def _get_tracker_call(self, call: ast.Call) -> Iterator[Change]:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        given |= dict(zip(("name", "unwrap"), call.args, strict=False))
        name, unwrap = given.get("name"), given.get("unwrap")
        if name is None or not (unwrap is None or isinstance(unwrap, ast.Constant)) or not self._tracker:
            self.refuse(call, "get_tracker(...) with arguments that are not known, or without init_trackers")
            return
        owner = self.file.source.code(_attribute(call).value)
        inner = ".tracker" if unwrap is not None and unwrap.value else ""
        yield replace(call, f"next(t for t in {owner}.trackers if t.name == {{name}}){inner}", name=name)

    def _end_training_call(self, call: ast.Call) -> Iterator[Change]:
        if not self._tracker:
            yield from self._left_out(call, "")
            return
        if not self._alone(call) or not self._is_tracked(call):
            self.refuse(call, "end_training() away from init_trackers")
            return
        yield from self._to_tracker(
            call, ["wandb.finish()" if self._tracker == "wandb" else f"{self._new('tracker')}.close()"], {}
        )

    # Other names of accelerate -----------------------------------------------------

    def _name(self, node: ast.expr, name: str) -> Iterator[Change]:
        if not name.startswith("accelerate."):
            return
        call = self.file.names.parents[node]
        last = name.split(".")[-1]
        if (
            name in CLASSES
            or name.startswith(TESTS)
            or last in _PURE
            or _IS_THERE.fullmatch(last)
            or "DistributedType." in name
        ):
            return
        self.seen.append(node)
        if not isinstance(call, ast.Call) or call.func is not node:
            self.refuse(node, f"{name} has no counterpart in an ordinary loop")
        elif name == "accelerate.state.is_initialized" and not call.args:
            yield replace(call, "False")
        elif last == "AcceleratorState" and (asked := self._asked_of_state(call)) is not None:
            yield replace(asked, "None")
        elif name in SKIPS:
            yield from self._skip_first_batches_call(call)
        elif name in {"accelerate.utils.set_seed", "accelerate.utils.random.set_seed"}:
            yield from self._seed(call)
        elif name == "accelerate.logging.get_logger":
            yield from self._logger(call)
        elif name == "accelerate.utils.extract_model_from_parallel":
            yield from self._unwrap_model_call(call)
        else:
            self.refuse(node, f"{name} has no counterpart in an ordinary loop")

    def _seed(self, call: ast.Call) -> Iterator[Change]:
        statement = self.file.names.statement_of(call)
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        seed = call.args[0] if call.args else given.pop("seed", None)
        given.pop("device_specific", None)  # what is drawn apart on the ranks is drawn from other seeds anyway
        plain = all(isinstance(v, ast.Constant) and v.value is False for v in given.values())
        if seed is None or len(call.args) > 1 or not plain or not self._alone(call) or not _is_repeatable(seed):
            self.refuse(call, "a seed with arguments that are not known")
            return
        yield from imports(self.file, "random", "numpy", "torch")
        yield insert_behind(statement, "random.seed({seed})", "numpy.random.seed({seed})", seed=seed)
        yield replace(call, "torch.manual_seed({seed})", seed=seed)

    def _logger(self, call: ast.Call) -> Iterator[Change]:
        statement = self.file.names.statement_of(call)
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        given |= dict(zip(("name", "log_level"), call.args, strict=False))
        level = given.get("log_level")
        if not isinstance(statement, ast.Assign) or statement.value is not call or set(given) - {"name", "log_level"}:
            self.refuse(call, "a logger that is given no name")
            return
        if level is not None:
            told = [keyword for keyword in call.keywords if keyword.value is level]
            yield Arguments(call, dropped=tuple(told) or (level,))
            logger = {"logger": statement.targets[0], "level": level}
            yield insert_behind(
                statement, *(f"{{logger}}{at}.setLevel({{level}}.upper())" for at in ("", ".root")), **logger
            )
        yield from self._code(call.func, "logging.getLogger")
        yield from imports(self.file, "os")
        line = '{logger}.disabled = os.environ.get("RANK", "0") != "0"'
        yield insert_behind(statement, line, logger=statement.targets[0])
        name = last_name(statement.targets[0])
        for file_call in self.file.calls:
            if isinstance(file_call.func, ast.Attribute) and last_name(file_call.func.value) == name:
                own = tuple(k for k in file_call.keywords if k.arg in {"main_process_only", "in_order"})
                if own:
                    yield Arguments(file_call, dropped=own)

    # Loops and imports -----------------------------------------------------

    def _loops(self) -> Iterator[Change]:
        """Batches go to the model's device, and loops count where they must."""
        inside = {item for loop in self.held.loops for item in walk(loop.iter)}
        for loop, file in self.held.loops.items():
            if file is not self.file:
                continue
            plain = loop.target
            counted = isinstance(loop.iter, ast.Call) and last_name(loop.iter.func) == "enumerate"
            if counted and isinstance(plain, ast.Tuple) and len(plain.elts) == 2:
                plain = plain.elts[1]
            batch = self.file.source.code(plain)
            several = isinstance(plain, ast.Tuple) and not batch.startswith("(")
            yield insert_before(loop.body[0], f"{batch} = {{bmt}}.to_device({f'({batch})' if several else batch})")
            if loop in self._counted and not counted:
                index = self._new("index")
                target = f"{index}, ({{target}})" if several else f"{index}, {{target}}"
                yield replace(loop.target, target, target=loop.target)
                yield replace(loop.iter, "enumerate({loader})", loader=loop.iter)
        for node in self.file.calls:
            if node in inside or not any(self.held.is_prepared_loader(self.file, item) for item in node.args):
                continue
            if last_name(node.func) == "next":
                yield wrap(node, "{bmt}.to_device({it})")
            elif last_name(node.func) in {"zip", "list"}:
                code = self.file.source.code(node)
                self.refuse(node, f"{code} takes batches of a prepared loader: go through it in a loop")

    def _imports(self) -> Iterator[Change]:
        """Names of accelerate that nothing uses any more go from their imports."""
        for node in self.file.nodes:
            if isinstance(node, ast.ImportFrom) and any(alias.name in self.held.names for alias in node.names):
                self.refuse(node, "the Accelerator is imported from another file: hand it on as an argument")
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "accelerate" or node.level:
                continue
            kept = [alias for alias in node.names if alias.name == "*" or self._stays(alias.asname or alias.name)]
            if not kept:
                yield Remove(node)
            elif len(kept) < len(node.names):
                names = ", ".join(f"{a.name} as {a.asname}" if a.asname else a.name for a in kept)
                yield ReplaceStatement(node, template(f"from {node.module} import {names}"))

    def _stays(self, name: str) -> bool:
        """Whether a name is used where nothing takes its place."""
        gone = {
            item
            for statement in {self.file.names.statement_of(c) for f, c in self.held.made if f is self.file}
            for item in walk(statement)
        }
        replaced = {"get_logger", "set_seed", "skip_first_batches", "extract_model_from_parallel"}
        return any(
            isinstance(node, ast.Name) and node.id == name and node not in gone and name not in replaced
            for node in self.file.nodes
        )


def _attribute(call: ast.Call) -> ast.Attribute:
    """The method that is called."""
    assert isinstance(call.func, ast.Attribute)
    return call.func


def _is_made(value: ast.expr | None) -> bool:
    """Whether a value is a call, or one of two."""
    if isinstance(value, ast.IfExp):
        return _is_made(value.body) and _is_made(value.orelse)
    return isinstance(value, ast.Call) and last_name(value.func) in {"Accelerator"}


def _is_main(node: ast.AST) -> bool:
    """``if __name__ == "__main__":``."""
    return isinstance(node, ast.If) and any(getattr(n, "id", "") == "__name__" for n in walk(node.test))


def _number_of(file: str) -> str:
    """The number in the name of a model's file."""
    return re.sub(r"\D", "", file) or "0"


def _under(tests: list[str], lines: list[str]) -> list[str]:
    """Lines under the tests of a list."""
    return [f"if {' and '.join(tests)}:", *(f"    {line}" for line in lines)] if tests else lines


def _counts(loop: ast.For, name: str) -> bool:
    """Whether a loop counts in a variable."""
    if not isinstance(loop.iter, ast.Call):
        return False
    match loop.target:
        case ast.Name(id=found) | ast.Tuple(elts=[ast.Name(id=found), *_]) if found == name:
            return last_name(loop.iter.func) in (
                {"range", "trange"} if isinstance(loop.target, ast.Name) else {"enumerate"}
            )
    return False


def _operand(code: str) -> str:
    """Code that can stand beside an operator."""
    return code if all(c.isalnum() or c in "._[]\"'()" for c in code) else f"({code})"


def _is_repeatable(node: ast.expr) -> bool:
    """Whether an expression may be evaluated several times."""
    return all(
        getattr(item.func, "attr", getattr(item.func, "id", "")) in _REPEATABLE
        for item in walk(node)
        if isinstance(item, ast.Call)
    )


RULE = Rule(
    code="BMT010",
    title="a script that trains through accelerate is an ordinary loop",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

accelerator = Accelerator(gradient_accumulation_steps=2)
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
train_loader = DataLoader(train_set, batch_size=8)
model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
for x in train_loader:
    with accelerator.accumulate(model):
        loss = model(x).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
""",
            """import torch
from torch.utils.data import DataLoader
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(optimizer)
train_loader = bmt.shard_loader(DataLoader(train_set, batch_size=8))
for (index, x) in enumerate(train_loader):
    x = bmt.to_device(x)
    loss = model(x).mean()
    optim_manager.backward(loss / 2)
    if (index + 1) % 2 == 0 or index + 1 == len(train_loader):
        optim_manager.step()
        optim_manager.zero_grad()
""",
        ),
    ),
)
