"""A compiled model is compiled by bmt.compile.

What: ``torch.compile(model)``, and ``model.compile()``, become ``bmt.compile(model)``. Of other code that calls the
model, or a loss that counts on all ranks, ``fullgraph=True`` is left out.
Why: gathering and releasing parameters stay outside the compiled code, and the state-dict keys stay the model's.
Refuses when: what is compiled is not the model. What is said by ``**options`` is reported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import walk
from rewriter.changes import Arguments, replace, template
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark

_OF_MODELS = {"parameters", "named_parameters", "buffers", "forward", "modules", "state_dict"}


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training or b"compile" not in file.source.data:
        return
    roles = facts.scripts.roles[file]
    for node in file.calls:
        compiles = facts.project.external(file, node.func) == "torch.compile"
        if compiles and node.args and roles.is_model(node.args[0]):
            change = replace(node.func, "{bmt}.compile")
            yield Conversion(RULE.code, node.lineno, "the blocks are compiled one by one", (change,))
        elif _compiles_itself(file, node) and isinstance(node.func, ast.Attribute) and roles.is_model(node.func.value):
            moved = Arguments(node, first=template("{model}", model=node.func.value))
            change = replace(node.func, "{bmt}.compile")
            yield Conversion(RULE.code, node.lineno, "the blocks are compiled one by one", (change, moved))
        elif compiles or _hands_on(file, facts, node):
            yield from _in_pieces(file, facts, node)


def _compiles_itself(file: File, call: ast.Call) -> bool:
    """``model.compile(...)``."""
    alone = isinstance(file.names.parents[call], ast.Expr) and not call.args
    return alone and getattr(call.func, "attr", "") == "compile"


def _hands_on(file: File, facts: Facts, call: ast.Call) -> bool:
    """``partial(torch.compile, fullgraph=True)``."""
    return bool(call.args) and facts.project.external(file, call.args[0]) == "torch.compile"


def _in_pieces(file: File, facts: Facts, call: ast.Call) -> Iterator[Finding]:
    """Code that is to be one graph and may call blocks, or ask other ranks, is compiled in pieces."""
    whole = [keyword for keyword in call.keywords if keyword.arg == "fullgraph"]
    if any(isinstance(keyword.value, ast.Constant) and keyword.value.value for keyword in whole):
        if not _is_computed(file, facts, call):
            message = "what calls the model, or counts on all ranks, is compiled in pieces: bmtrain works between them"
            yield Conversion(RULE.code, call.lineno, message, (Arguments(call, dropped=tuple(whole)),))
    elif (whole or any(keyword.arg is None for keyword in call.keywords)) and b"fullgraph" in file.source.data:
        written_out = any(isinstance(keyword.value, ast.Constant) for keyword in whole)
        if not written_out and not _is_computed(file, facts, call):
            message = "with fullgraph=True this fails where it calls the model or counts on all ranks: leave it out"
            yield Remark(RULE.code, call.lineno, message)


def _is_computed(file: File, facts: Facts, call: ast.Call) -> bool:
    """Whether a call compiles a function that is seen, and that calls functions of torch alone, on what it is given."""
    decorated = file.names.parents[call]
    found: object = decorated if isinstance(decorated, ast.FunctionDef) else None
    if found is None and call.args:
        function = facts.project.resolve(file, call.args[0])
        found = function.node if isinstance(function, FunctionInfo) and function.file is file else None
    if not isinstance(found, ast.FunctionDef) or file.names.class_of(found) is not None:
        return False
    roles = facts.scripts.roles[file]
    calls = [item for statement in found.body for item in walk(statement) if isinstance(item, ast.Call)]
    names = [item for statement in found.body for item in walk(statement) if isinstance(item, ast.Name)]
    given = [keyword.arg for item in calls for keyword in item.keywords]
    library = all(
        facts.project.external(file, item.func).startswith(("torch.", "math."))
        or (isinstance(item.func, ast.Attribute) and item.func.attr not in _OF_MODELS)
        for item in calls
    )
    return library and not {"ignore_index", "weight"} & set(given) and not any(map(roles.is_model, names))


RULE = Rule(
    code="BMT032",
    title="a compiled model is compiled by bmt.compile",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            "import torch\nimport bmtrain as bmt\n\nbmt.init_distributed()\nmodel = torch.nn.Linear(8, 1)\n"
            "model = torch.compile(model)\noptim_manager = bmt.optim.OptimManager(loss_scale=None)\n"
            "optim_manager.backward(model(x).mean())\n",
            "import torch\nimport bmtrain as bmt\n\nbmt.init_distributed()\nmodel = torch.nn.Linear(8, 1)\n"
            "model = bmt.compile(model)\noptim_manager = bmt.optim.OptimManager(loss_scale=None)\n"
            "optim_manager.backward(model(x).mean())\n",
        ),
    ),
)
