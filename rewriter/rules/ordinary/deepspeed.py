"""A script that trains through DeepSpeed is an ordinary loop.

What: ``deepspeed.initialize(...)`` becomes the model, the optimizer, the schedule and the loader that its configuration
describes, and each use of the engine what an ordinary loop on one process has, which the other rules then convert:
``engine.backward(loss)`` is ``loss.backward()`` over the accumulation steps, ``engine.step()`` clips, steps, clears and
follows the schedule when so many batches have been counted, ``save_checkpoint`` writes all states in one file.
Why: such a script owns its loop; only the names differ. ZeRO's stages need nothing: bmtrain shards. Every rank trains
on its share of the batches that the script would see on one process, so batch sizes are those of all ranks together,
unless a DistributedSampler shares out the data. Checkpoints that DeepSpeed itself has written are not read.
Refuses when: the configuration is not a dict in the script or a json file beside it; anything in it, or done with the
engine, is not understood: fp16, other optimizers and schedules, pipelines, experts, compression, NVMe. Then the whole
script stays as it is, with the reasons and the lines of an ordinary loop.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import External, File
from rewriter.analyze.read.nodes import dotted, walk
from rewriter.analyze.training.deepspeed_config import Code, Config, as_code, enabled, number, read_config, section
from rewriter.analyze.training.deepspeeds import INITIALIZE, DeepSpeeds, is_unused
from rewriter.changes import Arguments, Change, Remove, insert_before, replace, template
from rewriter.rules.imports import imports
from rewriter.rules.quoted import quoted
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Refusal

_DEVICE = 'torch.device("cuda" if torch.cuda.is_available() else "cpu")'
_WITHOUT_MEANING = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "fp16", "bf16", "bfloat16", "zero_optimization", "steps_per_print", "timers",
    "dump_state", "memory_breakdown", "communication_data_type", "seq_parallel_communication_data_type",
    "prescale_gradients", "gradient_predivide_factor", "activation_checkpointing", "aio", "checkpoint",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "disable_allgather", "dataloader_drop_last",
    "data_types", "sparse_gradients", "wall_clock_breakdown",
}  # fmt: skip
"""What a configuration may hold; some of it has its own reasons against it."""
_INITIALIZED = {
    "args", "model", "optimizer", "model_parameters", "training_data", "lr_scheduler", "distributed_port",
    "dist_init_required", "collate_fn", "config", "config_params",
}  # fmt: skip
_OF_ADAM = {"lr", "betas", "eps", "weight_decay", "bias_correction", "torch_adam", "adam_w_mode", "amsgrad"}
_OF_SGD = {"lr", "momentum", "dampening", "nesterov", "weight_decay"}
_OF_WARMUP = {"warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type"}
_ADAMS = {"deepspeed.ops.adam.FusedAdam", "deepspeed.ops.adam.DeepSpeedCPUAdam"}
_MODULE = {
    "train", "eval", "parameters", "named_parameters", "modules", "named_modules", "children", "named_children",
    "buffers", "named_buffers", "state_dict", "load_state_dict", "training", "requires_grad_", "apply", "forward",
    "register_buffer", "add_module", "get_parameter", "generate", "config", "save_pretrained",
}  # fmt: skip
"""What an engine has because it is a module, or its model one of transformers."""
_CONSTANTS = {
    "fp16_enabled": "False",
    "amp_enabled": "False",
    "dynamic_loss_scale": "False",
    "zero_optimization": "False",
}
"""Methods that ask for what is refused, or that nothing does here."""
_OWN_NAMES = {"engine_tag", "engine_state", "engine_latest"}
_STATE = '"mp_rank_00_model_states.pt"'


def find(file: File, facts: Facts) -> Iterator[Finding]:
    for files, deepspeeds in facts.deepspeeds.items():
        if file in files:
            uses = _Uses(file, facts, deepspeeds)
            changes = tuple(uses.changes())
            yield from (Refusal(RULE.code, line, message) for line, message in sorted(set(uses.reasons)))
            if changes:
                message = "the script is an ordinary loop without DeepSpeed"
                message += "" if uses.samples_itself else ": its batch sizes are those of all ranks together"
                yield Conversion(RULE.code, min(uses.lines, default=1), message, changes)


class _Uses:
    """The uses of DeepSpeed in one file: what takes their place, and reasons against it."""

    def __init__(self, file: File, facts: Facts, held: DeepSpeeds) -> None:
        self.file, self.facts, self.held = file, facts, held
        self.project = facts.project
        self.reasons: list[tuple[int, str]] = []
        self.lines: list[int] = []

    def refuse(self, node: ast.AST, message: str) -> None:
        self.reasons.append((getattr(node, "lineno", 1), message))

    def changes(self) -> Iterator[Change]:
        makes = [call for file, call in self.held.made if file is self.file]
        if len(self.held.made) > 1:
            for call in makes:
                self.refuse(call, "the script makes several engines: one conversion knows one")
            return
        for call in makes:
            yield from self._made(call)
        if self.reasons:
            return
        for node in self.file.nodes:
            if isinstance(node, ast.Attribute) and self.held.is_held("engine", self.file, node.value):
                self.lines.append(node.lineno)
                yield from self._use(node)
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
                parent = self.file.names.parents[node]
                if self.held.is_held("engine", self.file, node):
                    self._itself(node, parent)
                elif self.held.is_held("optimizer", self.file, node):
                    self._optimizer_used(parent)
                if not isinstance(parent, ast.Attribute):
                    yield from self._name(node, self.project.external(self.file, node))
        self._unseen()
        yield from self._imports()

    def _unseen(self) -> None:
        """Refuses what looks like the engine, under a name that is not known to hold it."""
        for call in self.file.calls:
            if isinstance(call.func, ast.Attribute) and not self.held.is_held("engine", self.file, call.func.value):
                owner = self.facts.scripts.roles[self.file].var(call.func.value)
                loss = owner is not None and owner in self.facts.scripts.roles[self.file].losses
                given = call.func.attr == "backward" and call.args and not loss
                if given or call.func.attr == "is_gradient_accumulation_boundary":
                    code = self.file.source.code(call.func.value)
                    self.refuse(call, f"{code} may be the engine, and how it gets here is not seen: hand it on by name")

    # What the engine was told -----------------------------------------------------

    @cached_property
    def config(self) -> Config:
        file, call = self.held.made[0]
        return read_config(file, call) or {}

    @cached_property
    def given(self) -> dict[str, ast.expr]:
        return self.held.given(self.held.made[0][1]) or {}

    @cached_property
    def steps(self) -> str:
        """Over how many batches gradients are added up, as code."""
        return number(self.config, "gradient_accumulation_steps") or "1"

    @property
    def _micro(self) -> str | None:
        """The size of a batch, as code."""
        named = number(self.config, "train_micro_batch_size_per_gpu")
        whole = number(self.config, "train_batch_size")
        if named is not None or whole is None:
            return named
        size = whole if self.steps == "1" else f"{whole} // {self.steps}"
        return f"{size} // {{bmt}}.world_size()" if self.samples_itself else size

    @property
    def _whole(self) -> str | None:
        """How many samples a step takes, as code."""
        whole, micro = number(self.config, "train_batch_size"), self._micro
        if whole is not None or micro is None:
            return whole
        size = micro if self.steps == "1" else f"{micro} * {self.steps}"
        return f"{size} * {{bmt}}.world_size()" if self.samples_itself else size

    @cached_property
    def samples_itself(self) -> bool:
        """Whether the script shares out its data, so that its batches are those of one rank."""
        return any(b"DistributedSampler" in file.source.data for file in self.held.files)

    @cached_property
    def _counts(self) -> bool:
        """Whether the engine's steps are counted."""
        asked = {"global_steps", "micro_steps", "save_checkpoint", "load_checkpoint"}
        return self.steps != "1" or any(
            isinstance(node, ast.Attribute) and node.attr in asked and self.held.is_held("engine", file, node.value)
            for file in self.held.files
            for node in file.nodes
        )

    @cached_property
    def _has_schedule(self) -> bool:
        return "lr_scheduler" in self.given or bool(section(self.config, "scheduler"))

    def _against_config(self, config: Config) -> Iterator[str]:
        """Why a configuration cannot be done without DeepSpeed."""
        for name, value in config.items():
            off = value in (None, False, 0) or (isinstance(value, dict) and value.get("enabled") is False)
            if name not in _WITHOUT_MEANING and not off:
                yield f'"{name}" is the engine\'s own'
        for part in ("fp16", "bf16", "bfloat16"):
            if isinstance(section(config, part).get("enabled", False), (Code, str)):
                yield f'whether "{part}" is enabled is known only at run time: say true or false'
        if section(config, "fp16").get("enabled") is True:
            yield '"fp16" needs a loss scale: use "bf16", or a GradScaler in an ordinary loop'
        zero = section(config, "zero_optimization")
        for part in ("offload_optimizer", "offload_param"):
            device = section(zero, part).get("device", "none")
            if device not in {"none", "cpu"}:
                yield f'"{part}" to {as_code(device)} is the engine\'s own'
        if isinstance(config.get("gradient_clipping"), (Code, str)):
            yield '"gradient_clipping" is known only at run time: name a number'
        for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            if name in config and number(config, name) is None:
                yield f'"{name}" is {as_code(config[name])}, which only the transformers Trainer knows: name a number'
        yield from self._against_sizes(config)
        yield from self._against_optimizer(section(config, "optimizer"))
        yield from self._against_schedule(section(config, "scheduler"))

    @staticmethod
    def _against_sizes(config: Config) -> Iterator[str]:
        whole, micro = config.get("train_batch_size"), config.get("train_micro_batch_size_per_gpu")
        steps = config.get("gradient_accumulation_steps")
        if whole is None or micro is None:
            return
        if steps is None and whole != micro:
            yield 'the sizes leave "gradient_accumulation_steps" to the number of GPUs: name it'
        elif not isinstance(whole, int) or not isinstance(micro, int) or not isinstance(steps or 1, int):
            yield 'whether the sizes agree is known only at run time: leave out "train_batch_size"'
        elif whole != micro * (steps or 1):
            yield (
                f'"train_batch_size" {whole} is not {micro} * {steps or 1}, so it is for several GPUs: leave out '
                '"train_micro_batch_size_per_gpu", as batch sizes are those of all ranks together'
            )

    def _against_optimizer(self, named: Config) -> Iterator[str]:
        if "optimizer" in self.given:
            return
        if not named:
            yield 'no optimizer is named: give one, or "optimizer" in the configuration'
            return
        kind, told = str(named.get("type")), section(named, "params")
        known = _OF_ADAM if kind.lower() in {"adam", "adamw"} else _OF_SGD if kind == "SGD" else set()
        if not known:
            yield f"the optimizer {kind} is the engine's own: use Adam, AdamW or SGD"
        for name, value in told.items():
            if known and (name not in known or _is_told_at_run_time(value)):
                yield f'"{name}" of the optimizer is {as_code(value)}, which is not known here'
        if told.get("bias_correction", True) is not True or told.get("amsgrad", False) is not False:
            yield "the optimizer is told what torch's has not"
        if any(not isinstance(told.get(name, False), bool) for name in ("torch_adam", "adam_w_mode")):
            yield "which Adam it is is known only at run time"

    def _against_schedule(self, named: Config) -> Iterator[str]:
        if not named:
            return
        kind, told = str(named.get("type")), section(named, "params")
        if "lr_scheduler" in self.given:
            yield 'there are two schedules: leave out lr_scheduler=..., or "scheduler" in the configuration'
        known = _OF_WARMUP | ({"total_num_steps"} if kind == "WarmupDecayLR" else set())
        if kind not in {"WarmupLR", "WarmupDecayLR"}:
            yield f"the schedule {kind} is the engine's own: use WarmupLR, WarmupDecayLR, or one of torch's in the loop"
            return
        for name, value in told.items():
            if name not in known or _is_told_at_run_time(value) or isinstance(value, list):
                yield f'"{name}" of the schedule is {as_code(value)}, which is not known here'
        if told.get("warmup_type", "log") not in {"log", "linear"}:
            yield '"warmup_type" is neither "log" nor "linear"'
        least = {"warmup_max_lr"} | ({"total_num_steps"} if kind == "WarmupDecayLR" else set())
        for name in sorted(least - told.keys()):
            yield f'name "{name}" of the schedule'
        if told.get("warmup_max_lr") in (0, 0.0):
            yield '"warmup_max_lr" is 0'
        if "optimizer" in self.given and isinstance(told.get("warmup_max_lr"), Code):
            yield "the schedule of an optimizer of the script's needs numbers"
        total, warm = told.get("total_num_steps"), told.get("warmup_num_steps", 1000)
        if isinstance(total, int) and isinstance(warm, int) and total <= max(2, warm):
            yield '"total_num_steps" are no more than "warmup_num_steps"'

    # The engine itself -----------------------------------------------------

    def _made(self, call: ast.Call) -> Iterator[Change]:
        file, code = self.file, self.file.source.code
        statement = file.names.statement_of(call)
        self.lines.append(statement.lineno)
        config = read_config(file, call)
        given, results = self.held.given(call), self.held.results(file, call)
        if config is None:
            self.refuse(
                call,
                "its configuration is known only at run time: write config={...}, or "
                'config="ds_config.json" with a file beside the script, and change nothing in it',
            )
        if given is None or results is None:
            self.refuse(call, "write engine, optimizer, loader, scheduler = deepspeed.initialize(model=..., ...)")
        if config is None or given is None or results is None:
            return
        for name in sorted(given.keys() - _INITIALIZED):
            self.refuse(call, f"deepspeed.initialize({name}=...) is the engine's own")
        for message in self._against_config(config):
            self.refuse(call, message)
        if "model" not in given:
            self.refuse(call, "the model is not named: model=...")
        if any(isinstance(p, (ast.If, ast.For, ast.While, ast.Try)) for p in self._around(statement)):
            self.refuse(call, "the engine is made under a test or in a loop, so the script also trains without it")
        if self._is_pipeline():
            self.refuse(call, "pipelines and experts are the engine's own")
        if self.reasons:
            return
        yield from self._ordinary(statement, config, given, results, code)

    def _around(self, statement: ast.stmt) -> Iterator[ast.AST]:
        """The compound statements around a statement in its function, without ``if __name__ == "__main__":``."""
        for parent in self.file.names.ancestors(statement):
            if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)):
                return
            if not (isinstance(parent, ast.If) and any(getattr(n, "id", "") == "__name__" for n in walk(parent.test))):
                yield parent

    def _is_pipeline(self) -> bool:
        return any(
            self.project.external(file, node).startswith(
                ("deepspeed.pipe.", "deepspeed.moe.", "deepspeed.PipelineModule")
            )
            for file in self.held.files
            for node in file.nodes
            if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load)
        )

    def _ordinary(
        self,
        statement: ast.stmt,
        config: Config,
        given: dict[str, ast.expr],
        results: dict[str, ast.expr],
        code: Callable[[ast.expr], str],
    ) -> Iterator[Change]:
        engine, model = code(results["engine"]), given["model"]
        lines, holes = list(self._process_group()), dict(given)
        if code(model) != engine:
            lines.append(f"{engine} = {{model}}")
        if enabled(config, "bf16") or enabled(config, "bfloat16"):
            cast = 'torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16)'
            lines.append(f"{engine}.forward = {cast}({engine}.forward)")
        optimizer, scheduler = self.held.named("optimizer"), self.held.named("scheduler")
        if "optimizer" in given:
            self._check_client(given["optimizer"])
            if code(given["optimizer"]) != optimizer:
                lines.append(f"{optimizer} = {{optimizer}}")
        else:
            parameters = "{model_parameters}" if "model_parameters" in given else f"{engine}.parameters()"
            lines.append(f"{optimizer} = {_optimizer(config, parameters)}")
        for kind, name in (("optimizer", optimizer), ("scheduler", scheduler)):
            self._check_name(statement, kind, name, results, given)
        if section(config, "scheduler"):
            told = section(section(config, "scheduler"), "params")
            if "optimizer" in given:
                lines.append(f"for group in {optimizer}.param_groups:")
                lines.append(f'    group["lr"] = {as_code(told["warmup_max_lr"])}')
            lines.append(f"{scheduler} = torch.optim.lr_scheduler.LambdaLR({optimizer}, lambda step: {_rate(config)})")
            yield from imports(self.file, *(["math"] if "math." in _rate(config) else []))
        elif "lr_scheduler" in given:
            if dotted(given["lr_scheduler"]) is None and not isinstance(given["lr_scheduler"], ast.Call):
                self.refuse(given["lr_scheduler"], "lr_scheduler is a function: make the schedule in the script")
            if code(given["lr_scheduler"]) != scheduler:
                lines.append(f"{scheduler} = {{lr_scheduler}}")
        if "loader" in results and not ("training_data" not in given and is_unused(self.file, results["loader"])):
            lines += self._loader(results["loader"], given)
        elif "training_data" in given:
            self.refuse(given["training_data"], "training_data is given, and its loader has no name")
        if self._counts:
            lines.append(f"{engine}.micro_steps = 0")
        yield from imports(self.file, "torch")
        used = {name: value for name, value in holes.items() if any(f"{{{name}}}" in line for line in lines)}
        for value in (v for name, v in config.items() if isinstance(v, Code) and name != "gradient_clipping"):
            self._check_seen(value, statement, statement)
        yield insert_before(statement, *lines, **used)
        yield Remove(statement)

    def _process_group(self) -> Iterator[str]:
        """The line that starts torch's processes, where the script uses them and leaves the start to the engine."""
        starts = {"deepspeed.init_distributed", "torch.distributed.init_process_group"}
        calls = [self.project.external(file, call.func) for file in self.held.files for call in file.calls]
        if starts.isdisjoint(calls) and self._uses_processes:
            yield 'torch.distributed.init_process_group("nccl")'

    @cached_property
    def _uses_processes(self) -> bool:
        return self.samples_itself or any(
            self.project.external(file, call.func).startswith("torch.distributed.")
            for file in self.held.files
            for call in file.calls
        )

    def _loader(self, target: ast.expr, given: dict[str, ast.expr]) -> list[str]:
        name = self.file.source.code(target)
        if "training_data" not in given:
            self.refuse(target, f"{name} is used, and training_data is not given")
            return []
        size = self._micro
        if size is None:
            self.refuse(target, "the size of its batches is not named in the configuration")
        drop = ", drop_last=True" if self.config.get("dataloader_drop_last") is True else ""
        collate = ", collate_fn={collate_fn}" if "collate_fn" in given else ""
        drawn = "generator=torch.Generator().manual_seed(0)"  # the order of the engine's own first epoch
        sampler = f"torch.utils.data.RandomSampler({{training_data}}, {drawn})"
        line = f"{name} = torch.utils.data.DataLoader({{training_data}}, {size}, sampler={sampler}{collate}{drop})"
        if dotted(given["training_data"]) is None:
            self.refuse(given["training_data"], "training_data has no name: give it one")
        return [line]

    def _check_client(self, node: ast.expr) -> None:
        """Refuses an optimizer of the script's that is a function."""
        roles = self.facts.scripts.roles[self.file]
        made = isinstance(node, ast.Call) and "opt" in (dotted(node.func) or "").lower() + "opt"
        if not made and roles.var(node) is None:
            self.refuse(node, "optimizer is a function: make it in the script")

    def _check_name(
        self, statement: ast.stmt, kind: str, name: str, results: dict[str, ast.expr], given: dict[str, ast.expr]
    ) -> None:
        """Refuses a name of our own that means something else already."""
        client = given.get("lr_scheduler" if kind == "scheduler" else kind)
        own = kind not in results and (client is None or dotted(client) is None)
        if not own or (kind == "scheduler" and not self._has_schedule):
            return
        taken = {n.id for n in self.file.nodes if isinstance(n, ast.Name)} | {
            n.attr for n in self.file.nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
        }
        if name.split(".")[-1] in taken:
            self.refuse(statement, f"the {kind} has no name, and {name} is another: name it among the results")

    def _check_seen(self, value: str, node: ast.AST, place: ast.AST) -> None:
        """Refuses code of the configuration where its names may mean something else."""
        file, call = self.held.made[0]
        names = self.file.names
        for item in ast.walk(ast.parse(value, mode="eval")):
            if not isinstance(item, ast.Name):
                continue
            here, there = (n.lookup(item.id, n.scope_of(p)) for n, p in ((names, place), (file.names, call)))
            if file is not self.file or here is None or there is None or here[0] is not there[0]:
                self.refuse(node, f"{value}, of the configuration, is not known here: name a number")

    def _itself(self, node: ast.expr, parent: ast.AST) -> None:
        """The engine where it is handed on."""
        if isinstance(parent, (ast.Attribute, ast.Compare, ast.Expr, ast.withitem)):
            return
        if self.held.receivers(self.file, node):
            return
        call = self.file.names.parents[parent] if isinstance(parent, ast.keyword) else parent
        if isinstance(call, ast.Call) and call.func is node:
            return
        if isinstance(call, ast.Call):
            found = self.project.resolve(self.file, call.func)
            called = getattr(call.func, "id", "")
            known = called in {"isinstance", "hasattr", "getattr", "print", "len", "type", "sum", "str", "id"}
            if known or isinstance(found, External) or self.project.external(self.file, call.func) in INITIALIZE:
                return
        self.refuse(node, f"{self.file.source.code(node)}, the engine, is handed to code that is not seen")

    def _optimizer_used(self, attribute: ast.AST) -> None:
        if not isinstance(attribute, ast.Attribute):
            return
        if attribute.attr == "step":
            self.refuse(attribute, "the script steps the optimizer itself: that is the engine's step")
        elif attribute.attr in {"zero_grad", "backward"} and (self.steps != "1" or attribute.attr == "backward"):
            self.refuse(
                attribute, f"what optimizer.{attribute.attr} does to gradients that are added up is the engine's"
            )

    # Its attributes and methods -----------------------------------------------------

    def _use(self, node: ast.Attribute) -> Iterator[Change]:
        call = self.file.names.parents[node]
        if not isinstance(node.ctx, ast.Load):
            self.refuse(node, f"{self.file.source.code(node)} is set")
        elif isinstance(call, ast.Call) and call.func is node:
            method: Callable[[ast.Call], Iterator[Change]] | None = getattr(self, f"_{node.attr}_call", None)
            if method is not None:
                yield from method(call)
            elif node.attr in _CONSTANTS:
                yield replace(call, _CONSTANTS[node.attr])
            elif node.attr not in _MODULE and not self._is_models_own(node.attr):
                self._unknown(node)
        elif node.attr == "module":
            yield replace(node, "{engine}", engine=node.value)
        elif node.attr in {"optimizer", "lr_scheduler"}:
            kind = "optimizer" if node.attr == "optimizer" else "scheduler"
            yield replace(node, self._seen(kind, node) or "None")
        elif node.attr == "device":
            yield from imports(self.file, "torch")
            yield replace(node, quoted(self.file, node, _DEVICE))
        elif node.attr in {"local_rank", "global_rank"}:
            yield from self._rank(node, call)
        elif node.attr == "global_steps":
            counted = template("{engine}.micro_steps", engine=node.value)
            yield replace(node, f"({counted.text} // {self._steps(node)})", engine=node.value)
        elif node.attr != "micro_steps" and node.attr not in _MODULE and not self._is_models_own(node.attr):
            self._unknown(node)

    def _unknown(self, node: ast.Attribute) -> None:
        self.refuse(node, f"{self.file.source.code(node)} has no counterpart in an ordinary loop")

    def _is_models_own(self, name: str) -> bool:
        """Whether a module of the project has an attribute of that name."""
        for file in self.project:
            for info in self.facts.classes.all(file):
                if self.facts.classes.is_module(info):
                    held = any(isinstance(n, ast.Attribute) and n.attr == name for n in walk(info.node))
                    if held or name in info.methods:
                        return True
        return False

    def _rank(self, node: ast.Attribute, parent: ast.AST) -> Iterator[Change]:
        compared = isinstance(parent, ast.Compare) or (
            isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.Not)
        )
        call = self.file.names.parents[parent] if isinstance(parent, ast.keyword) else parent
        moved = isinstance(call, ast.Call) and getattr(call.func, "attr", "") in {"to", "cuda", "device"}
        placed = isinstance(parent, ast.keyword) and parent.arg in {"device", "map_location"}
        if compared:
            yield replace(node, "{bmt}.rank()")
        elif (
            node.attr == "local_rank"
            and (moved or placed)
            and getattr(getattr(call, "func", None), "attr", "") != "device"
        ):
            yield from imports(self.file, "torch")
            yield replace(node, quoted(self.file, node, _DEVICE))
        elif node.attr == "global_rank":
            yield replace(node, "{bmt}.rank()")
        else:
            self.refuse(
                node, f"{self.file.source.code(node)} is used as a number: use engine.device, or global_rank == 0"
            )

    def _seen(self, kind: str, node: ast.AST) -> str:
        """The name of the optimizer or schedule at a place; empty for a schedule that is not there."""
        if kind == "scheduler" and not self._has_schedule:
            return ""
        name = self.held.name_at(kind, self.file, node)
        if not name:
            own = self.held.named(kind)
            function = self.file.names.function_of(node)
            called = function.name if function is not None else "the function"
            self.refuse(node, f"{own} is not seen here: hand it on beside the engine, def {called}(engine, {own}, ...)")
        return name

    def _steps(self, node: ast.AST) -> str:
        if isinstance(self.config.get("gradient_accumulation_steps"), Code):
            self._check_seen(self.steps, node, node)
        return self.steps

    def _alone(self, call: ast.Call) -> ast.stmt | None:
        statement = self.file.names.statement_of(call)
        if isinstance(statement, ast.Expr) and statement.value is call:
            return statement
        self.refuse(call, f"{self.file.source.code(call.func)}(...) gives a value that is used")
        return None

    def _backward_call(self, call: ast.Call) -> Iterator[Change]:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        loss = call.args[0] if call.args else given.pop("loss", None)
        if self._alone(call) is None:
            return
        if loss is None or len(call.args) > 1 or set(given) - {"retain_graph"}:
            self.refuse(call, "backward with arguments that are not known")
            return
        steps = self._steps(call)
        text = "{loss}.backward(" if steps == "1" else f"({{loss}} / {steps}).backward("
        if steps == "1" and not isinstance(loss, (ast.Name, ast.Attribute, ast.Call, ast.Subscript)):
            text = "({loss}).backward("
        kept = {"kept": given["retain_graph"]} if given else {}
        yield replace(call, text + ("retain_graph={kept})" if kept else ")"), loss=loss, **kept)

    def _step_call(self, call: ast.Call) -> Iterator[Change]:
        statement = self._alone(call)
        if statement is None:
            return
        if call.args or call.keywords:
            self.refuse(call, "step with arguments that are not known")
            return
        assert isinstance(call.func, ast.Attribute)
        optimizer, scheduler = self._seen("optimizer", call), self._seen("scheduler", call)
        clipping, steps = self.config.get("gradient_clipping"), self._steps(call)
        lines = []
        if clipping:
            lines.append(f"torch.nn.utils.clip_grad_norm_({{engine}}.parameters(), {as_code(clipping)})")
            yield from imports(self.file, "torch")
        lines += [f"{optimizer}.step()", f"{optimizer}.zero_grad()"]
        lines += [f"{scheduler}.step()"] if scheduler else []
        if steps != "1":
            lines = [f"if {{engine}}.micro_steps % {steps} == 0:", *(f"    {line}" for line in lines)]
        if self._counts:
            lines.insert(0, "{engine}.micro_steps += 1")
        holes = {"engine": call.func.value} if any("{engine}" in line for line in lines) else {}
        yield insert_before(statement, *lines, **holes)
        yield Remove(statement)

    def _zero_grad_call(self, call: ast.Call) -> Iterator[Change]:
        if self.steps != "1":
            self.refuse(call, "zero_grad on gradients that are added up: leave it out, the step clears them")
        yield from ()

    def _is_gradient_accumulation_boundary_call(self, call: ast.Call) -> Iterator[Change]:
        assert isinstance(call.func, ast.Attribute)
        if self.steps == "1":
            yield replace(call, "True")
        else:
            text = f"(({{engine}}.micro_steps + 1) % {self._steps(call)} == 0)"
            yield replace(call, text, engine=call.func.value)

    def _gradient_accumulation_steps_call(self, call: ast.Call) -> Iterator[Change]:
        yield replace(call, self._steps(call))

    def _train_micro_batch_size_per_gpu_call(self, call: ast.Call) -> Iterator[Change]:
        yield from self._size(call, self._micro)

    def _train_batch_size_call(self, call: ast.Call) -> Iterator[Change]:
        yield from self._size(call, self._whole)

    def _size(self, call: ast.Call, size: str | None) -> Iterator[Change]:
        if size is None:
            self.refuse(call, "the size of batches is not named in the configuration")
            return
        for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            if isinstance(value := self.config.get(name), Code):
                self._check_seen(value, call, call)
        yield replace(call, size if size.isdigit() else f"({size})")

    def _get_lr_call(self, call: ast.Call) -> Iterator[Change]:
        if optimizer := self._seen("optimizer", call):
            rates = f'[group["lr"] for group in {optimizer}.param_groups]'
            yield replace(call, quoted(self.file, call, rates))

    def _bfloat16_enabled_call(self, call: ast.Call) -> Iterator[Change]:
        if enabled(self.config, "bf16") or enabled(self.config, "bfloat16"):
            self.refuse(call, "what bf16 changes in the script is not known: the model runs under torch.autocast then")
        yield replace(call, "False")

    def _zero_optimization_stage_call(self, call: ast.Call) -> Iterator[Change]:
        yield replace(call, "0")

    # Files -----------------------------------------------------

    def _save_checkpoint_call(self, call: ast.Call) -> Iterator[Change]:
        known = ("save_dir", "tag", "client_state", "save_latest")
        given = self._arguments(call, known, "save_checkpoint")
        statement = self._alone(call)
        if given is None or statement is None or not isinstance(call.func, ast.Attribute):
            return
        parts = ['"module": {engine}.state_dict()', f'"optimizer": {self._seen("optimizer", call)}.state_dict()']
        if scheduler := self._seen("scheduler", call):
            parts.append(f'"lr_scheduler": {scheduler}.state_dict()')
        parts.append('"micro_steps": {engine}.micro_steps')
        parts.append('"client_state": ' + ("{client_state}" if "client_state" in given else "{}"))
        tag = (
            "engine_tag = {tag}"
            if "tag" in given
            else f'engine_tag = f"global_step{{{{engine}}.micro_steps // {self._steps(call)}}}"'
        )
        lines = [
            tag,
            "os.makedirs(os.path.join({save_dir}, str(engine_tag)), exist_ok=True)",
            f"engine_state = {{{', '.join(parts)}}}",
            f"torch.save(engine_state, os.path.join({{save_dir}}, str(engine_tag), {_STATE}))",
        ]
        latest = given.get("save_latest")
        if not (isinstance(latest, ast.Constant) and latest.value is False):
            lines += [
                'with open(os.path.join({save_dir}, "latest"), "w") as engine_latest:',
                "    engine_latest.write(str(engine_tag))",
            ]
        yield from self._files(statement, lines, {**given, "engine": call.func.value})

    def _load_checkpoint_call(self, call: ast.Call) -> Iterator[Change]:
        known = ("load_dir", "tag", "load_optimizer_states", "load_lr_scheduler_states", "load_module_only")
        given = self._arguments(call, known, "load_checkpoint")
        statement = self.file.names.statement_of(call)
        into: list[ast.expr] = []
        match statement:
            case ast.Assign(targets=[ast.Tuple(elts=[_, _] as into)], value=value) if value is call:
                pass
            case ast.Expr(value=value) if value is call:
                pass
            case _:
                self.refuse(call, "write path, client_state = engine.load_checkpoint(...)")
                return
        if given is None or not isinstance(call.func, ast.Attribute):
            return
        flags = {name: getattr(given.pop(name, None), "value", default) for name, default in _LOADED.items()}
        if any(not isinstance(flag, bool) for flag in flags.values()):
            self.refuse(call, "what is loaded is known only at run time")
            return
        alone = flags["load_module_only"]
        folder = "os.path.join({load_dir}, str(engine_tag))"
        path = f"os.path.join({{load_dir}}, str(engine_tag), {_STATE})"
        lines = [f'engine_state = torch.load({path}, map_location="cpu", weights_only=False)']
        lines.append('{engine}.load_state_dict(engine_state["module"])')
        if flags["load_optimizer_states"] and not alone:
            lines.append(f'{self._seen("optimizer", call)}.load_state_dict(engine_state["optimizer"])')
        scheduler = self._seen("scheduler", call)
        if scheduler and flags["load_lr_scheduler_states"] and not alone:
            lines.append(f'{scheduler}.load_state_dict(engine_state["lr_scheduler"])')
        lines += ['{engine}.micro_steps = engine_state["micro_steps"]'] if not alone else []
        code = self.file.source.code
        if into:
            lines.append(f'{code(into[0])}, {code(into[1])} = {folder}, engine_state["client_state"]')
        if "tag" in given:
            lines.insert(0, "engine_tag = {tag}")
        else:
            found = [
                'with open(os.path.join({load_dir}, "latest")) as engine_latest:',
                "    engine_tag = engine_latest.read().strip()",
            ]
            lines = [
                'if os.path.exists(os.path.join({load_dir}, "latest")):',
                *(f"    {line}" for line in [*found, *lines]),
            ]
            if into:
                lines.insert(0, f"{code(into[0])}, {code(into[1])} = None, None")
        yield from self._files(statement, lines, {**given, "engine": call.func.value})

    def _save_16bit_model_call(self, call: ast.Call) -> Iterator[Change]:
        given = self._arguments(call, ("save_dir", "save_filename"), "save_16bit_model")
        statement = self._alone(call)
        if given is None or statement is None or not isinstance(call.func, ast.Attribute):
            return
        if enabled(self.config, "bf16") or enabled(self.config, "bfloat16"):
            self.refuse(call, "save_16bit_model of a model whose weights are float32 here: save its state_dict")
        file = "{save_filename}" if "save_filename" in given else '"pytorch_model.bin"'
        lines = [
            "os.makedirs({save_dir}, exist_ok=True)",
            f"torch.save({{engine}}.state_dict(), os.path.join({{save_dir}}, {file}))",
        ]
        yield from self._files(statement, lines, {**given, "engine": call.func.value})

    def _arguments(self, call: ast.Call, known: tuple[str, ...], name: str) -> dict[str, ast.expr] | None:
        """What a call is given, by keyword."""
        plain = not any(isinstance(item, ast.Starred) for item in call.args) and len(call.args) <= len(known)
        given = dict(zip(known, call.args, strict=False)) | {k.arg or "*": k.value for k in call.keywords}
        folder = given.get(known[0])
        if not plain or folder is None or set(given) - set(known):
            self.refuse(call, f"{name} with arguments that are not known")
            return None
        if any(isinstance(item, ast.Call) and dotted(item.func) != "os.path.join" for item in walk(folder)):
            self.refuse(call, f"{name} in a folder that a call names: give it a name first")
            return None
        return {
            key: value for key, value in given.items() if not (isinstance(value, ast.Constant) and value.value is None)
        }

    def _files(self, statement: ast.stmt, lines: list[str], given: dict[str, ast.expr]) -> Iterator[Change]:
        """Lines that write or read files take a statement's place."""
        taken = {n.id for n in self.file.nodes if isinstance(n, ast.Name)} & _OWN_NAMES
        if taken:
            self.refuse(statement, f"{', '.join(sorted(taken))} is taken: give it another name")
        holes = {name: value for name, value in given.items() if any(f"{{{name}}}" in line for line in lines)}
        yield from imports(self.file, "os", "torch")
        yield insert_before(statement, *lines, **holes)
        yield Remove(statement)

    # Other names of DeepSpeed -----------------------------------------------------

    def _name(self, node: ast.expr, name: str) -> Iterator[Change]:
        if not name.startswith("deepspeed.") or name in INITIALIZE:
            return
        self.lines.append(node.lineno)
        call = self.file.names.parents[node]
        if not isinstance(call, ast.Call) or call.func is not node:
            if not self._is_annotation(node):
                self.refuse(node, f"{name} has no counterpart in an ordinary loop")
        elif name == "deepspeed.add_config_arguments" and len(call.args) == 1:
            yield from self._arguments_of_parser(call)
        elif name in {"deepspeed.init_distributed", "deepspeed.comm.init_distributed"}:
            if (statement := self._alone(call)) is not None:
                if self._uses_processes:
                    yield from imports(self.file, "torch")
                    yield replace(call, 'torch.distributed.init_process_group("nccl")')
                else:
                    yield Remove(statement)
        elif name in _ADAMS:
            yield from self._adam(call)
        else:
            self.refuse(node, f"{name} has no counterpart in an ordinary loop")

    def _is_annotation(self, node: ast.expr) -> bool:
        parent = self.file.names.parents[node]
        if isinstance(parent, (ast.arg, ast.AnnAssign)):
            self.refuse(node, "an annotation names DeepSpeed: leave it out")
        return isinstance(parent, (ast.arg, ast.AnnAssign))

    def _arguments_of_parser(self, call: ast.Call) -> Iterator[Change]:
        statement = self.file.names.statement_of(call)
        line = '{parser}.add_argument("--deepspeed", action="store_true")'
        asked = any(isinstance(n, ast.Attribute) and n.attr == "deepspeed_config" for n in self.file.nodes)
        if asked or dotted(call.args[0]) is None:
            self.refuse(call, "args.deepspeed_config is known only at run time: name the configuration in the script")
        elif isinstance(statement, ast.Assign) and statement.value is call:
            yield insert_before(statement, line, parser=call.args[0])
            if [dotted(target) for target in statement.targets] == [dotted(call.args[0])]:
                yield Remove(statement)
            else:
                yield replace(call, "{parser}", parser=call.args[0])
        elif self._alone(call) is not None:
            yield replace(call, line, parser=call.args[0])

    def _adam(self, call: ast.Call) -> Iterator[Change]:
        given = {keyword.arg: keyword for keyword in call.keywords}
        mode = given.get("adam_w_mode") or given.get("adamw_mode")
        decoupled = getattr(mode.value, "value", None) if mode is not None else True
        known = {"params", "model_params", "lr", "betas", "eps", "weight_decay", "adam_w_mode", "adamw_mode"}
        if len(call.args) > 2 or set(given) - known or not isinstance(decoupled, bool) or "model_params" in given:
            self.refuse(call, "an optimizer of DeepSpeed's with arguments that are not known: use torch.optim.AdamW")
            return
        yield from imports(self.file, "torch")
        yield replace(call.func, "torch.optim.AdamW" if decoupled else "torch.optim.Adam")
        added = () if "weight_decay" in given else (template("weight_decay=0.0"),)
        if added or mode is not None:
            yield Arguments(call, added=added, dropped=(mode,) if mode is not None else ())

    def _imports(self) -> Iterator[Change]:
        """Imports of DeepSpeed go, as nothing uses them any more."""
        for node in self.file.nodes:
            match node:
                case ast.ImportFrom(module=str() as module, level=0) if module.split(".")[0] == "deepspeed":
                    yield Remove(node)
                case ast.Import(names=names) if any(alias.name.split(".")[0] == "deepspeed" for alias in names):
                    if len(names) > 1:
                        self.refuse(node, "import deepspeed in a line of its own")
                    yield Remove(node)


_LOADED = {"load_optimizer_states": True, "load_lr_scheduler_states": True, "load_module_only": False}


def _optimizer(config: Config, parameters: str) -> str:
    """The optimizer that a configuration names, with what DeepSpeed's has where it says nothing."""
    named = section(config, "optimizer")
    kind, told = str(named.get("type")), dict(section(named, "params"))
    if kind != "SGD":
        kind = "AdamW" if kind.lower() == "adamw" or told.get("adam_w_mode", True) else "Adam"
        decay = 0.01 if told.get("torch_adam") and kind == "AdamW" else 0.0
        known = {name: value for name, value in told.items() if name in {"lr", "betas", "eps", "weight_decay"}}
        told = {"lr": 1e-3, **known, "weight_decay": known.get("weight_decay", decay)}
    if section(config, "scheduler"):
        told["lr"] = section(section(config, "scheduler"), "params")["warmup_max_lr"]
    listed = "".join(f", {name}={as_code(value)}" for name, value in told.items())
    return f"torch.optim.{kind}({parameters}{listed})"


def _rate(config: Config) -> str:
    """The learning rate of a step over the highest, as code: how WarmupLR and WarmupDecayLR have it."""
    named = section(config, "scheduler")
    told = section(named, "params")
    most, least = as_code(told["warmup_max_lr"]), told.get("warmup_min_lr", 0.0)
    given = told.get("warmup_num_steps", 1000)
    warm = f"max(2, {given})" if isinstance(given, Code) else str(max(2, given))
    done = "max(step - 1, 0)"  # the first two steps have the lowest rate
    rising = f"{done} / {warm}"
    if told.get("warmup_type", "log") == "log":
        rising = f"math.log(max(step, 1)) / math.log({warm})"
    parts = [rising, "1.0"]
    if named.get("type") == "WarmupDecayLR":
        total = as_code(told["total_num_steps"])
        parts.append(f"max(0.0, ({total} - {done}) / ({total} - {warm}))")
    rate = f"min({', '.join(parts)})"
    if least in (0, 0.0):
        return rate
    low = as_code(least)
    return f"({low} + ({most} - {low}) * {rate}) / {most}"


def _is_told_at_run_time(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, Code) and value not in {"log", "linear"}


RULE = Rule(
    code="BMT011",
    title="a script that trains through DeepSpeed is an ordinary loop",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
import deepspeed
from torch.utils.data import DataLoader

net = torch.nn.Linear(8, 1)
loader = DataLoader(train_set, batch_size=8)
config = {
    "train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
    "zero_optimization": {"stage": 2},
}
engine, _, _, _ = deepspeed.initialize(model=net, config=config)
for x in loader:
    loss = engine(x).mean()
    engine.backward(loss)
    engine.step()
""",
            """import torch

from torch.utils.data import DataLoader
import bmtrain as bmt

bmt.init_distributed()
net = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 1))
loader = bmt.shard_loader(DataLoader(train_set, batch_size=8))
config = {
    "train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
    "zero_optimization": {"stage": 2},
}
engine = net
optimizer = bmt.optim.AdamOptimizer(engine.parameters(), lr=0.01, weight_decay=0.0)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(optimizer)
engine.micro_steps = 0
for x in loader:
    loss = engine(x).mean()
    optim_manager.backward(loss / 2)
    engine.micro_steps += 1
    if engine.micro_steps % 2 == 0:
        optim_manager.clip_grad_norm(optimizer.param_groups, 1.0)
        optim_manager.step()
        optim_manager.zero_grad()
""",
        ),
    ),
)
