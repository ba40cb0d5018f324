"""A model of another package is wrapped.

What: ``model = resnet18()`` becomes ``model = bmt.BMTrainModelWrapper(resnet18())`` where the script trains the model,
also inside ``DDP(...)``; so does a part that replaces another, ``model.fc = nn.Linear(512, 10)``, and a model of
transformers or diffusers that a module of the project holds, so that its blocks are blocks, and one that a pipeline of
such a package holds, in front of its optimizer. Where the model first gets
tokens (``resize_token_embeddings``) or an adapter (``peft.get_peft_model``), it is wrapped behind that.
Why: a class of the project becomes a DistributedModule by its base; a torch layer, a Sequential or a class of another
package cannot, and its parameters would train without their gradients being reduced.
Refuses when: the value is a class of the project that becomes a DistributedModule, is wrapped already, or comes from
a package that is not known to hold models.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.classes import external_kind
from rewriter.analyze.read.file import ClassInfo, External, File, FunctionInfo
from rewriter.analyze.read.nodes import dotted, walk
from rewriter.analyze.training.completed import completing, is_adapted, is_wrapped_in
from rewriter.analyze.training.roles import Var
from rewriter.analyze.training.scripts import DATA_PARALLEL
from rewriter.changes import insert_before, insert_behind, wrap
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding

_PACKAGES = {
    "torch", "torchvision", "torchaudio", "timm", "transformers", "diffusers", "open_clip", "clip", "monai",
    "efficientnet_pytorch", "segmentation_models_pytorch", "sentence_transformers",
    "torch_geometric", "vit_pytorch", "x_transformers",
    "fairseq", "pytorchvideo", "peft", "torchtune", "esm", "whisper",
}  # fmt: skip
_TRAINED = {"parameters", "named_parameters"}
_WRAPPERS = ("bmtrain.", "torch.compile", "torch.nn.parallel.", "torch.nn.DataParallel", "copy.")
_EMPTY = {"Identity", "Dropout", "ReLU", "GELU", "SiLU", "Tanh", "Sigmoid", "Softmax", "Flatten", "LogSoftmax"}
_CHAINED = {"to", "cuda", "cpu", "train", "eval", "half", "float", "bfloat16", "double", "requires_grad_", "apply"}

_SAME = {"torch.compile", "torch.nn.SyncBatchNorm.convert_sync_batchnorm"}

_MODEL_OF_HUB = re.compile(
    r"(?:transformers|diffusers)\.(?:[\w.]+\.)?"
    r"(?!\w*(?:Config|Tokenizer|Processor|Scheduler|Pipeline))\w*(?:Model|For[A-Z]\w+|AutoencoderKL)"
    r"(?:\.from_(?:pretrained|config|encoder_decoder_pretrained))?$"
)

_WRAPPED = "{bmt}.BMTrainModelWrapper({it})"


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    roles = facts.scripts.roles[file]
    yield from _parts(file, facts)
    yield from _inside(file, facts)
    yield from _held(file, facts)
    wrapped = set[ast.stmt]()
    also: dict[Var, set[str]] = {}
    for variable, value, _, part in reversed(roles.assignments):  # engine = net; engine.parameters()
        held = _without_wrappers(file, facts, value)
        same = roles.var(held) if not part and isinstance(held, (ast.Name, ast.Attribute)) else None
        if same is not None:
            also.setdefault(same, set()).update(roles.methods_called.get(variable, set()), also.get(variable, set()))
    for variable, value, statement, part in roles.assignments:
        trained = (roles.methods_called.get(variable, set()) | also.get(variable, set())) & _TRAINED
        if part or not trained or variable not in roles.models or not roles.steps:
            continue
        owner = file.names.class_of(statement)
        if owner is not None and facts.classes.is_module(file.class_info(owner)):
            continue
        value = _in_wrapper(file, facts, value)
        if statement in wrapped or not isinstance(value, ast.Call) or not _foreign(file, facts, value):
            continue
        last = completing(file, facts.project, roles, variable, statement)
        if last is None:
            message, change = "the model is another package's, so it is wrapped", wrap(value, _WRAPPED)
            yield Conversion(RULE.code, statement.lineno, message, (change,))
        elif last not in wrapped and not (isinstance(last, ast.Assign) and roles.var(last.targets[0]) == variable):
            wrapped.update(item for item in walk(last) if isinstance(item, ast.stmt))
            behind = insert_behind(last, "{model} = {bmt}.BMTrainModelWrapper({model})", model=_target(statement))
            yield Conversion(RULE.code, last.lineno, "the model is another package's, so it is wrapped here", (behind,))


def _in_wrapper(file: File, facts: Facts, value: ast.expr) -> ast.expr:
    """``net`` of ``DDP(net)``."""
    while isinstance(value, ast.Call) and value.args and facts.project.external(file, value.func) in DATA_PARALLEL:
        value = value.args[0]
    return value


def _without_wrappers(file: File, facts: Facts, value: ast.expr) -> ast.expr:
    """``net`` of ``DDP(convert_sync_batchnorm(net.to(device)))``."""
    while isinstance(value, ast.Call):
        name = facts.project.external(file, value.func)
        if value.args and (name in DATA_PARALLEL or name in _SAME):
            value = value.args[0]
        elif isinstance(value.func, ast.Attribute) and value.func.attr in _CHAINED:
            value = value.func.value
        else:
            break
    return value


def _inside(file: File, facts: Facts) -> Iterator[Finding]:
    """Models of transformers or diffusers that a module of the project holds: their blocks become blocks."""
    for statement in file.nodes:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Call):
            continue
        owner = file.names.class_of(statement)
        path = dotted(statement.targets[0])
        if owner is None or path is None or not path.startswith("self.") or path.count(".") != 1:
            continue
        if facts.classes.kind(file.class_info(owner)) not in {"module", "distributed"}:
            continue
        if _MODEL_OF_HUB.match(facts.project.external(file, statement.value.func)):
            message = "the part is another package's model, so it is wrapped"
            yield Conversion(RULE.code, statement.lineno, message, (wrap(statement.value, _WRAPPED),))


def _held(file: File, facts: Facts) -> Iterator[Finding]:
    """``pipe.unet`` of an object that a package makes, where the optimizer gets its parameters."""
    roles = facts.scripts.roles[file]
    for variable, value, statement, _ in roles.assignments:
        if variable not in roles.optimizers or not isinstance(value, ast.Call):
            continue
        for item in walk(value):
            if not isinstance(item, ast.Call) or not isinstance(item.func, ast.Attribute):
                continue
            if item.func.attr not in _TRAINED:
                continue
            model = item.func.value
            given = [v for var, v, _, part in roles.assignments if var == roles.var(model) and not part]
            part = given[0] if isinstance(model, ast.Name) and len(given) == 1 else model
            again = any(is_wrapped_in(facts.project, file, roles, roles.var(model), node) for node in file.nodes)
            if isinstance(part, ast.Attribute) and not again and _is_packages_holder(file, facts, part.value):
                line = "{model} = {bmt}.BMTrainModelWrapper({model})"
                message = "the part is another package's model, so it is wrapped here"
                yield Conversion(RULE.code, statement.lineno, message, (insert_before(statement, line, model=model),))


def _is_packages_holder(file: File, facts: Facts, node: ast.expr) -> bool:
    """Whether a variable holds what a package makes of files, and that is no model itself: a pipeline."""
    roles = facts.scripts.roles[file]
    made = [value for variable, value, _, part in roles.assignments if variable == roles.var(node) and not part]
    return bool(made) and all(
        isinstance(value, ast.Call)
        and (name := facts.project.external(file, value.func)).split(".")[0] in _PACKAGES - {"torch"}
        and "Pipeline" in name
        for value in made
    )


def _target(statement: ast.stmt) -> ast.expr:
    assert isinstance(statement, (ast.Assign, ast.AnnAssign))
    return statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]


def _parts(file: File, facts: Facts) -> Iterator[Finding]:
    """Torch layers that are put into a model after it was built."""
    for statement in file.nodes:
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            continue
        target, value = statement.targets[0], statement.value
        owner = file.names.class_of(statement)
        if not isinstance(target, (ast.Attribute, ast.Subscript)) or not isinstance(value, ast.Call):
            continue
        if owner is not None and facts.classes.is_module(file.class_info(owner)):
            continue
        name = facts.project.external(file, value.func)
        if not name.startswith("torch.nn.") or external_kind(name) != "leaf" or name.split(".")[-1] in _EMPTY:
            continue
        base: ast.expr = target.value
        while isinstance(base, (ast.Attribute, ast.Subscript)) and not facts.scripts.roles[file].is_model(base):
            base = base.value
        if facts.scripts.roles[file].is_model(base):
            message = "the new part of the model is sharded, too"
            yield Conversion(RULE.code, statement.lineno, message, (wrap(value, _WRAPPED),))


def _foreign(file: File, facts: Facts, call: ast.Call) -> bool:
    """Whether a call yields a model that no base class of the project shards."""
    while isinstance(call.func, ast.Attribute) and call.func.attr in _CHAINED:
        if not isinstance(call.func.value, ast.Call):
            return False
        call = call.func.value
    roles = facts.scripts.roles[file]
    if is_adapted(facts.project, file, roles, call) is None and any(map(roles.is_model, call.args)):
        return False
    if roles.gives_parameters(call):
        return False  # averages of them, say
    found = facts.project.resolve(file, call.func)
    if isinstance(found, ClassInfo):
        return facts.classes.kind(found) in {"leaf", "external"}
    if isinstance(found, External):
        return found.name.split(".")[0] in _PACKAGES and not found.name.startswith(_WRAPPERS)
    if isinstance(found, FunctionInfo):
        return _returns_container(facts, found) or not any(
            isinstance(node, ast.Call)
            and isinstance(made := facts.project.resolve(found.file, node.func), ClassInfo)
            and facts.classes.kind(made) in {"module", "distributed"}
            for node in walk(found.node)
        )
    return False


def _returns_container(facts: Facts, function: FunctionInfo) -> bool:
    """Whether a function returns a torch container that it makes, of whatever modules."""
    made: dict[str, list[ast.expr]] = {}
    returned: list[ast.expr] = []
    for node in walk(function.node):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            made.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.Return) and node.value is not None:
            returned.append(node.value)
    values = [v for item in returned for v in (made.get(item.id, []) if isinstance(item, ast.Name) else [item])]
    return any(
        isinstance(value, ast.Call) and facts.project.external(function.file, value.func) == "torch.nn.Sequential"
        for value in values
    )


RULE = Rule(
    code="BMT034",
    title="a model of another package is wrapped",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
from torchvision.models import resnet18
import bmtrain as bmt

bmt.init_distributed()
model = resnet18()
model.fc = torch.nn.Linear(512, 10)
optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-3)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(optimizer)
optim_manager.backward(model(x).mean())
""",
            """import torch
from torchvision.models import resnet18
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(resnet18())
model.fc = bmt.BMTrainModelWrapper(torch.nn.Linear(512, 10))
optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-3)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(optimizer)
optim_manager.backward(model(x).mean())
""",
        ),
    ),
)
