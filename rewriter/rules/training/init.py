"""A script starts with bmt.init_distributed.

What: ``torch.manual_seed(n)`` becomes ``bmt.init_distributed(seed=n)`` when nothing before it needs the ranks;
otherwise ``bmt.init_distributed(seed=n)`` is put in front of the first statement that does, or that draws data, an
order or a division of the data (``random_split``) without a seed of its own. A seed that the script
draws at random is rank 0's on all ranks. Where calls of torch.distributed stay as they are, or a script that made
torch's process group calls packages that use it (``timm.utils.reduce_tensor``), one is registered behind it. So is what
keeps loguru and structlog to one rank, where no line of the script says where they print: other ranks warn.
Why: models, output and data all depend on the ranks. init_distributed seeds torch the same way on every rank, so the
initial weights are those of the unconverted script.
Where every rank acts in an environment by what the forward of a model draws, and nothing shares out the work, ranks are
to draw alike in layers, too: ``random="shared"``.
Of files that run when they are imported, the first that needs the ranks starts them; a seed or output needs none. A
function that another script calls, too, starts them where they are not started yet.
Refuses when: the script already calls it; the file is a library that another script runs. A training loop that no
script of the project starts is reported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File, FunctionInfo
from rewriter.analyze.read.nodes import dotted, is_backward, walk, walk_own
from rewriter.analyze.training.default_sinks import QUIETED, default_sinks
from rewriter.analyze.training.draws import acts_by_draws
from rewriter.analyze.training.folders import asked_by_all
from rewriter.analyze.training.moments import contains
from rewriter.analyze.training.rank_names import varies_by_rank
from rewriter.analyze.training.torch_distributed import calls_of_packages, calls_that_stay
from rewriter.changes import Change, insert_before, insert_behind, replace
from rewriter.rules.imports import imports
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark

_SEEDED = "{bmt}.init_distributed(seed={seed})"
_SUBMITTED = "each process of this job would train alone, as submitit tells it no rank: let the job run torchrun"
_GROUP = "{bmt}.distributed.register_process_group()"
_DRAWN = re.compile(r"random\.|numpy\.random\.|time\.|secrets\.|os\.(?:urandom|getpid)|torch\.(?:\w*seed|randint)")


def find(file: File, facts: Facts) -> Iterator[Finding]:
    scripts = facts.scripts
    if scripts.submits(file) and scripts.reach(file) & scripts.training:
        call = next(
            c for c in file.calls if isinstance(c.func, ast.Attribute) and c.func.attr in {"submit", "map_array"}
        )
        yield Remark(RULE.code, call.lineno, _SUBMITTED)
        return
    if file not in scripts.training or (b"init_distributed" in file.source.data and _present(file, facts)):
        return
    first = _first(file, facts)
    if first is None:
        yield from _without_script(file, facts)
        return
    if file in scripts.started_at_import:
        return
    block = scripts.entries[file]
    alike = 'random="shared"' if acts_by_draws(file, facts.scripts) else ""
    seeded = _SEEDED.replace(")", f", {alike})") if alike else _SEEDED
    bare = f"{{bmt}}.init_distributed({alike})"
    reached = scripts.reach(file) & scripts.training
    stay = any(calls_that_stay(f, facts.project) for f in reached) or calls_of_packages(reached, facts.project)
    group = [_GROUP] if stay else []
    more: list[Change] = []
    for package in () if scripts.was_parallel(file) or scripts.started else default_sinks(reached, facts.project):
        modules, quiet = QUIETED[package]
        group += ["if {bmt}.rank() != 0:", f"    {quiet}"]
        more += imports(file, *modules)
    seed = _seed(file, facts, block)
    drawn = _drawn(file, facts, seed[1].args[0], block) if seed is not None else None
    if seed is not None and drawn is not None:
        lines = [bare, *group]
        if drawn.lineno < first.lineno:
            lines.append("{seed} = {bmt}.store.broadcast_object({seed})")
        start = insert_before(first, *lines, seed=seed[1].args[0])
        yield Conversion(RULE.code, first.lineno, "the script starts the ranks", (start, *more), key="init")
        return
    if seed is not None and seed[0] is first and len(first_calls(first)) == 1:
        call = seed[1]
        changes: list[Change] = [*more, replace(call, seeded, seed=call.args[0])]
        if group:
            changes.append(insert_behind(first, *group))
        yield Conversion(RULE.code, first.lineno, "the seed starts the ranks", tuple(changes), key="init")
        return
    value = _common_part(file, facts, block)
    if seed is not None and _available(file, seed[1].args[0], block, first):
        value = seed[1].args[0]
    start = insert_before(first, bare, *group)
    imported = _seed_at_import(file, facts)
    if _is_called_elsewhere(file, facts, first):
        lines = [bare if value is None else seeded, *group]
        holes = {} if value is None else {"seed": value}
        start = insert_before(first, "if not {bmt}.is_initialized():", *(f"    {line}" for line in lines), **holes)
    elif value is not None:
        start = insert_before(first, seeded, *group, seed=value)
    elif seed is None and imported is not None:
        start = insert_before(first, seeded.replace("{seed}", str(imported)), *group)
    yield Conversion(RULE.code, first.lineno, "the script starts the ranks", (start, *more), key="init")


def _first(file: File, facts: Facts) -> ast.stmt | None:
    """The first statement of a script that needs the ranks."""
    scripts = facts.scripts
    block = scripts.entries[file] if file in scripts.programs or file in scripts.starters else []
    statements = [statement for statement in block if not _is_definition(statement)]
    entry = scripts.entry
    named = [s for moment in facts.moments.folders(file) for s in moment.statements(file)]
    named += [held.where for held in facts.moments.shared(file)]
    named += asked_by_all(file, block)
    needing = (s for s in statements if entry.needs_init(file, s) or entry.makes_files(file, s) or contains(s, named))
    first = next(needing, None)
    return statements[0] if first is None and statements and scripts.drives(file) else first


def _is_called_elsewhere(file: File, facts: Facts, first: ast.stmt) -> bool:
    """Whether the function that starts the ranks is also called by another script, which has started them."""
    function = file.names.function_of(first)
    others = (other for other in facts.scripts.training if other is not file) if function is not None else ()
    return any(
        isinstance(found := facts.project.resolve(other, call.func), FunctionInfo)
        and found.node is function
        and _first(other, facts) is not None
        for other in others
        for call in other.calls
    )


def _without_script(file: File, facts: Facts) -> Iterator[Finding]:
    """A remark on a training loop that no script of the project starts."""
    scripts = facts.scripts
    if facts.project.partial or scripts.started or file not in scripts.unstarted[:1]:
        return  # one remark is enough for a project
    call = next(filter(is_backward, file.calls))
    message = "no script here starts this training: call bmt.init_distributed() before the model is made"
    yield Remark(RULE.code, call.lineno, message)


def _common_part(file: File, facts: Facts, block: list[ast.stmt]) -> ast.expr | None:
    """``1337`` where the script seeds each rank with ``1337 + rank``."""
    for statement in block:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            call = statement.value
            if facts.project.external(file, call.func) == "torch.manual_seed" and len(call.args) == 1:
                seed = call.args[0]
                if isinstance(seed, ast.BinOp) and isinstance(seed.op, ast.Add):
                    for side in (seed.left, seed.right):
                        if isinstance(side, ast.Constant):
                            return side
    return None


def _seed_at_import(file: File, facts: Facts) -> int | None:
    """The seed that a file which the script imports gives torch: starting the ranks must not undo it."""
    seeds = (facts.scripts.entry.seed_at_import(target) for target in facts.scripts.reach(file) if target is not file)
    return next((seed for seed in seeds if seed is not None), None)


def first_calls(statement: ast.stmt) -> list[ast.Call]:
    return [node for node in walk_own(statement) if isinstance(node, ast.Call)]


def _present(file: File, facts: Facts) -> bool:
    return any(
        isinstance(node, ast.Call) and facts.project.external(file, node.func) == "bmtrain.init_distributed"
        for node in file.nodes
    )


def _is_definition(statement: ast.stmt) -> bool:
    return isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom))


def _seed(file: File, facts: Facts, block: list[ast.stmt]) -> tuple[ast.stmt, ast.Call] | None:
    """The block's own ``torch.manual_seed(n)``, if its argument is the same on every rank."""
    for statement in block:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            call = statement.value
            if facts.project.external(file, call.func) == "torch.manual_seed" and len(call.args) == 1:
                return None if varies_by_rank(file, call.args[0]) else (statement, call)
    return None


def _drawn(file: File, facts: Facts, seed: ast.expr, block: list[ast.stmt]) -> ast.stmt | None:
    """The first statement that draws a seed at random, or from the clock, so that ranks have different ones."""
    path = dotted(seed)
    for statement in (item for item in _stored(block) if isinstance(item, ast.Assign)):
        if path is not None and any(dotted(target) == path for target in statement.targets):
            calls = (item for item in walk(statement.value) if isinstance(item, ast.Call))
            if any(_DRAWN.match(facts.project.external(file, call.func)) for call in calls):
                return statement
    return None


def _available(file: File, argument: ast.expr, block: list[ast.stmt], first: ast.stmt) -> bool:
    """Whether the seed can be computed in front of the first statement that needs it."""
    for node in walk(argument):
        if isinstance(node, ast.Call):
            return False
        if isinstance(node, ast.Attribute) and any(
            isinstance(item, ast.Attribute)
            and isinstance(item.ctx, ast.Store)
            and dotted(item) == dotted(node)
            and item.lineno >= first.lineno
            for item in _stored(block)
        ):
            return False
        if isinstance(node, ast.Name):
            found = file.names.lookup(node.id, file.names.scope_of(argument))
            if found is None:
                continue
            if any(getattr(b.node, "lineno", 0) >= first.lineno and b.node in _stored(block) for b in found[1]):
                return False
    return True


def _stored(block: list[ast.stmt]) -> set[ast.AST]:
    return {node for statement in block for node in walk(statement)}


RULE = Rule(
    code="BMT020",
    title="a script starts with bmt.init_distributed",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
from torch import nn


def main():
    torch.manual_seed(1337)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()


if __name__ == "__main__":
    main()
""",
            """import torch
from torch import nn
import bmtrain as bmt


def main():
    bmt.init_distributed(seed=1337)
    model = bmt.BMTrainModelWrapper(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optim_manager = bmt.optim.OptimManager(loss_scale=None)
    optim_manager.add_optimizer(optimizer)
    optim_manager.backward(model(torch.ones(1, 4)).sum())
    optim_manager.step()


if __name__ == "__main__":
    main()
""",
        ),
    ),
)
