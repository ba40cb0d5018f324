"""A script bears the argument that torch.distributed.launch adds.

What: ``parser.add_argument("--local-rank", ...)`` in front of ``parser.parse_args()``. Where the script has such an
argument and reads it, its default is what torchrun says, ``int(os.environ.get("LOCAL_RANK", -1))``.
Why: ``python -m torch.distributed.launch`` still passes ``--local-rank=N`` to every rank, which a parser that does not
know it ends with an error. torchrun passes nothing; both set the environment that bmt.init_distributed reads. Where
nothing is passed, the options that are read are the script's, so that ``print(args)`` and files made of them stay. A
script that reads the argument would take every rank for the one that no launcher has started.
Refuses when: some parser of the file or of a file that it imports knows the argument, or the parser is not a plain
argparse.ArgumentParser.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.changes import Arguments, Change, insert_before, template, wrap
from rewriter.rules.imports import imports
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding

_KNOWN = {"--local-rank", "--local_rank"}
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.Expr, ast.Return)


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    if b"parse_args" not in file.source.data:
        yield from _from_environment(file, facts)
        return
    if any(_knows(other) for other in facts.scripts.reach(file)):  # add_launch_arguments(parser), parents=[...]
        yield from _from_environment(file, facts)
        return
    for statement in file.nodes:
        if not isinstance(statement, _SIMPLE) or statement.value is None:
            continue
        parser = _parsed(statement.value)
        module = _module(file, facts, parser) if parser else None
        if module is None:
            continue
        hidden = f"default={module}.SUPPRESS, help={module}.SUPPRESS"
        line = f'{parser}.add_argument("--local-rank", "--local_rank", type=int, {hidden})'
        change = insert_before(statement, line)
        yield Conversion(RULE.code, statement.lineno, "the parser takes the launcher's argument", (change,))


def _from_environment(file: File, facts: Facts) -> Iterator[Finding]:
    """``parser.add_argument("--local_rank", type=int, default=-1)``, which torchrun does not pass."""
    if not any(b".local_rank" in other.source.data for other in facts.scripts.training):
        return
    for call in file.calls:
        if not any(isinstance(given, ast.Constant) and given.value in _KNOWN for given in call.args):
            continue
        named = {keyword.arg: keyword.value for keyword in call.keywords}
        default = named.get("default")
        changes: tuple[Change, ...]
        if not isinstance(call.func, ast.Attribute) or call.func.attr != "add_argument" or None in named:
            continue
        if default is None:
            added = template('default=int(os.environ.get("LOCAL_RANK", 0))')
            changes = (*imports(file, "os"), Arguments(call, added=(added,)))
        elif isinstance(_number(default), int):
            changes = (*imports(file, "os"), wrap(default, 'int(os.environ.get("LOCAL_RANK", {it}))'))
        else:
            continue
        yield Conversion(RULE.code, call.lineno, "the launcher says which rank of its node a process is", changes)


def _number(node: ast.expr) -> object:
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) | ast.Constant(value=value):
            return value
    return None


def _parsed(value: ast.expr) -> str | None:
    """The name of the parser whose ``parse_args`` is called."""
    match value:
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="parse_args")):
            return name
    return None


def _module(file: File, facts: Facts, parser: str) -> str | None:
    """How the file spells ``argparse``, if ``parser`` is made by ``argparse.ArgumentParser(...)``."""
    for node in file.nodes:
        match node:
            case ast.Assign(
                targets=[ast.Name(id=name)], value=ast.Call(func=ast.Attribute(value=ast.Name() as module)) as call
            ):
                if name == parser and facts.project.external(file, call.func) == "argparse.ArgumentParser":
                    return module.id
    return None


def _knows(file: File) -> bool:
    return any(isinstance(node, ast.Constant) and node.value in _KNOWN for node in file.nodes)


RULE = Rule(
    code="BMT035",
    title="the parser takes the launcher's argument",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            "import argparse\nimport torch\nimport bmtrain as bmt\n\nparser = argparse.ArgumentParser()\n"
            "options = parser.parse_args()\nbmt.init_distributed()\nmodel = torch.nn.Linear(8, 1)\n"
            "optim_manager = bmt.optim.OptimManager(loss_scale=None)\noptim_manager.backward(model(x).mean())\n",
            "import argparse\nimport torch\nimport bmtrain as bmt\n\nparser = argparse.ArgumentParser()\n"
            'parser.add_argument("--local-rank", "--local_rank", type=int, '
            "default=argparse.SUPPRESS, help=argparse.SUPPRESS)\n"
            "options = parser.parse_args()\nbmt.init_distributed()\nmodel = torch.nn.Linear(8, 1)\n"
            "optim_manager = bmt.optim.OptimManager(loss_scale=None)\noptim_manager.backward(model(x).mean())\n",
        ),
    ),
)
