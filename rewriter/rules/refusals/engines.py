"""Scripts written for another engine are left alone.

What: a script that uses Lightning, Fabric, the transformers Trainer, Megatron, FSDP, Horovod, Colossal-AI, apex.amp,
Ignite, mmengine, fastai, skorch, TRL, Composer, Detectron2 or Catalyst, or accelerate or DeepSpeed in ways that are not
understood, is recognised and reported, with the reasons or the lines that an ordinary loop has instead (for DeepSpeed,
line by line, with the numbers of a configuration that is a dict in the script or a json file beside it); nothing in it,
nor in files that only it uses, is changed. Where a library file holds such a trainer beside models that it does not
make itself, the models are converted. A script that uses apex.amp or Horovod under a test (``if args.fp16:``) is
converted; where it is asked for, the script says so and ends.
Why: these engines own the training loop, the optimizer and the parameters. Half a conversion would train wrongly.
Refuses when: always, but for apex.amp and Horovod under a test; go back to an ordinary torch loop first.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import ClassInfo, External, File
from rewriter.analyze.training.engine_lines import deepspeed_lines
from rewriter.changes import ReplaceStatement, template
from rewriter.rules.asked_for import under_test
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Refusal

_CALLS = {
    "accelerate.Accelerator": "accelerate",
    "deepspeed.initialize": "DeepSpeed",
    "apex.amp.initialize": "apex.amp",
    "horovod.torch.init": "Horovod",
    "colossalai.launch_from_torch": "Colossal-AI",
    "colossalai.booster.Booster": "Colossal-AI",
    "torch.distributed.fsdp.FullyShardedDataParallel": "FSDP",
    "torch.distributed.fsdp.fully_shard": "FSDP",
    "megatron.training.pretrain": "Megatron",
    "megatron.initialize.initialize_megatron": "Megatron",
    "ignite.engine.Engine": "Ignite",
    "ignite.engine.create_supervised_trainer": "Ignite",
    "mmengine.runner.Runner": "mmengine",
    "mmengine.runner.Runner.from_cfg": "mmengine",
    "skorch.NeuralNetClassifier": "skorch",
    "skorch.NeuralNetRegressor": "skorch",
    "fastai.learner.Learner": "fastai",
    "fastai.vision.all.vision_learner": "fastai",
}
_TRAINERS = {
    "trl": "TRL", "sentence_transformers": "Sentence Transformers", "composer": "Composer", "detectron2": "Detectron2",
    "catalyst": "Catalyst", "torchtnt": "TorchTNT", "adapters": "the transformers Trainer",
    "transformers": "the transformers Trainer",
}  # fmt: skip
_LIGHTNING = ("lightning.", "pytorch_lightning.", "lightning_fabric.", "lightning_lite.")
_TOP = ("Trainer", "Fabric", "LightningModule", "LightningLite", "LightningDataModule")
_MODELS = ("BMT001", "BMT002", "BMT003", "BMT004", "BMT005", "BMT006")
_ORDINARY = {
    "the transformers Trainer": (
        "instead of trainer.train(): for batch in loader: loss = model(**batch).loss; loss.backward(); "
        "optimizer.step(); optimizer.zero_grad()"
    ),
    "Lightning": (
        "instead of trainer.fit(module): for i, batch in enumerate(loader): loss = module.training_step(batch, i); "
        "loss.backward(); optimizer.step(); optimizer.zero_grad(), with torch.nn.Module for LightningModule"
    ),
    "DeepSpeed": (
        "instead of deepspeed.initialize(...): optimizer = torch.optim.AdamW(model.parameters(), lr=...); "
        "engine.backward(loss) is loss.backward(), engine.step() is optimizer.step(); optimizer.zero_grad()"
    ),
}
_OPTIONAL = {
    "apex.amp": ("apex.amp cannot train a bmtrain model: run without it; torch.autocast does the same", "apex.amp."),
    "Horovod": ("Horovod cannot train a bmtrain model: run without it, with torchrun", "horovod.torch."),
}
"""What a script may do without: what it says where it is asked for, and what its functions' names begin with."""
_EVERYWHERE = {"apex.amp.master_params", "apex.amp.state_dict", "apex.amp.load_state_dict"}
_HINTS = (
    b"accelerate",
    b"deepspeed",
    b"apex",
    b"horovod",
    b"colossalai",
    b"fsdp",
    b"megatron",
    b"lightning",
    b"ignite",
    b"mmengine",
    b"skorch",
    b"fastai",
    *(name.encode() for name in _TRAINERS),
)


def find(file: File, facts: Facts) -> Iterator[Finding]:
    reasons = list(facts.refused.get(file.path, ()))
    if reasons and not any(_engine(facts.project.external(file, call.func)) == "DeepSpeed" for call in file.calls):
        known = any(file in held.holders() for held in facts.deepspeeds.values())
        stays = f"the script is written for {'DeepSpeed' if known else 'accelerate'} and stays: "
        yield from (Refusal(RULE.code, reason.line, f"{stays}{reason.message}") for reason in reasons)
        return
    if not any(hint in file.source.data for hint in _HINTS):
        return
    parts: dict[ast.stmt, str] = {}
    for node, engine in _uses(file, facts):
        if engine in _OPTIONAL and (choice := _choice(file, facts, node, engine)) is not None:
            message = f"the script trains without {engine}; where it is asked for, this line raises an error"
            code = f'raise RuntimeError("{_OPTIONAL[engine][0]}")'
            yield Conversion(RULE.code, choice.lineno, message, (ReplaceStatement(choice, template(code)),))
            continue
        message = f"the script is written for {engine}; bmtrain needs an ordinary torch loop, so it stays as it is"
        part = _definition(file, node)
        if part is None or file in facts.scripts.entries or _makes_a_model(file, facts, part):
            if reasons and engine == "DeepSpeed":
                first, *reasons = reasons
                at = "" if first.line == getattr(node, "lineno", 1) else f" (line {first.line})"
                message = f"the script is written for {engine} and stays: {first.message}{at}"
            exact = list(deepspeed_lines(file, facts.project)) if engine == "DeepSpeed" else []
            lines = exact[0][1] if exact else _ORDINARY.get(engine)
            yield Refusal(RULE.code, getattr(node, "lineno", 1), f"{message}; {lines}" if lines else message)
            yield from (Refusal(RULE.code, r.line, f"it also stays for this: {r.message}") for r in reasons)
            yield from _lines_of(file, node, exact[1:])
            return
        parts.setdefault(part, engine)
    for part, engine in parts.items():
        name = getattr(part, "name", "")
        message = f"{name} is written for {engine}, so it stays as it is; its models need an ordinary torch loop"
        end = part.end_lineno or part.lineno
        yield Refusal(RULE.code, part.lineno, message, spared=_MODELS, end=end)


def _lines_of(file: File, node: ast.AST, exact: list[tuple[int, str]]) -> Iterator[Finding]:
    """What to write line by line, behind the reason, which stands where the engine is made."""
    first = getattr(node, "lineno", 1)
    for line, text in exact:
        at = f" in line {line}" if line < first else ""
        yield Refusal(RULE.code, max(line, first), f"for an ordinary torch loop, {' '.join(text.split())}{at}")


def _uses(file: File, facts: Facts) -> Iterator[tuple[ast.AST, str]]:
    for node in file.nodes:
        engine = ""
        if isinstance(node, ast.Call):
            engine = _engine(facts.project.external(file, node.func))
        elif isinstance(node, ast.ClassDef):
            bases = [base for _, base in facts.classes.bases(file.class_info(node))]
            engine = next((e for b in bases if isinstance(b, External) and (e := _engine(b.name))), "")
        if engine:
            yield node, engine


def _choice(file: File, facts: Facts, call: ast.AST, engine: str) -> ast.stmt | None:
    """The statement that sets up an engine, if all that uses it is under tests: the script trains without it, too."""
    statement = file.names.statement_of(call)
    names = [(c, facts.project.external(file, c.func)) for c in file.calls]
    used = [c for c, name in names if name.startswith(_OPTIONAL[engine][1]) and name not in _EVERYWHERE]
    chosen = file.source.owns_lines(statement) and all(under_test(file, item) for item in used)
    return statement if chosen else None


def _definition(file: File, node: ast.AST) -> ast.stmt | None:
    """The class or function at the top of the file that a node belongs to; None for a model or the file's own code."""
    around = [node, *file.names.ancestors(node)]
    part = next((n for n in around if file.names.parents.get(n) is file.tree), None)
    return part if isinstance(part, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) else None


def _makes_a_model(file: File, facts: Facts, part: ast.stmt) -> bool:
    """Whether the engine's part makes a model of the file itself: then the engine owns that model."""
    for node in ast.walk(part):
        if isinstance(node, ast.Call):
            found = facts.project.resolve(file, node.func)
            if isinstance(found, ClassInfo) and found.node is not part and facts.classes.is_module(found):
                return True
    return False


def _engine(name: str) -> str:
    if name in _CALLS:
        return _CALLS[name]
    if name.startswith(_LIGHTNING) and name.split(".")[-1] in _TOP:
        return "Lightning"
    if name.endswith(("Trainer", "Runner")) and name.split(".")[0] in _TRAINERS:
        return _TRAINERS[name.split(".")[0]]
    if name.startswith("accelerate.") and name.endswith("Accelerator"):
        return "accelerate"
    return ""


RULE = Rule(
    code="BMT090",
    title="scripts written for another engine are left alone",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            "import deepspeed\nimport torch\n\n\nclass Net(torch.nn.Module):\n    pass\n\n\n"
            "model, *_ = deepspeed.initialize(model=Net())\n"
        ),
    ),
)
