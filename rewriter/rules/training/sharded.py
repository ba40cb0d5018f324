"""Under --unsafe, checkpoints of training are written and read in parts, each rank its own.

What: ``torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), ...}, path)`` becomes
``bmt.checkpoint.save_sharded`` of the objects, whose path is a folder then; ``torch.load`` becomes ``load_sharded``,
which reads plain files, too, ``model.load_state_dict(...)`` becomes ``bmt.checkpoint.load_state_dict(model, ...)``, and
what copies, renames or removes files does so with folders. A script that has an option to resume goes on by itself when
torchrun starts its ranks again.
Why: without it every rank gathers the whole state, one writes it while all wait, and resuming reads all of it into
every rank.
Refuses when: it is not seen what is saved, or what is saved is used otherwise; a file of the project that stays as it
is reads files of torch, or something needs a file: an upload, a library's reader. Then the plain file stays.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.training.saves import OfFile, Resumed
from rewriter.changes import Arguments, Change, Unblock, insert_before, replace, template
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark

_ROOT = "{bmt}.checkpoint."


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if not any(b"torch" in other.source.data and b"save" in other.source.data for other in facts.scripts.training):
        return
    found = facts.saves.found
    left = facts.saves.left
    if left is not None:
        where, node, why = left
        first = facts.saves.first or facts.saves.unclear
        if first is not None and first[0] is file:
            _, save = first
            place = "" if where is file and node is save else f" ({where.path.name}:{getattr(node, 'lineno', 1)})"
            message = f"the checkpoint stays one plain file: {why}{place}"
            yield Remark(RULE.code, save.lineno, message, unsafe=True)
        return
    here = found.get(file)
    if here is None:
        return
    changes = tuple(_changes(file, here))
    if changes:
        line = min(_line(change) for change in changes)
        others = tuple(_key(other) for other, one in found.items() if any(True for _ in _changes(other, one)))
        message = "each rank writes and reads its own part of a checkpoint: it is a folder then"
        yield Conversion(RULE.code, line, message, changes, unsafe=True, key=_key(file), requires=others)
    for node, why in here.alone:
        message = f"it does not go on by itself when its ranks are started again: {why}"
        yield Remark(RULE.code, getattr(node, "lineno", 1), message, unsafe=True)


def _key(file: File) -> str:
    return f"{file.place}\0sharded"


def _line(change: Change) -> int:
    node = getattr(change, "node", None) or getattr(change, "statement", None)
    return node.lineno if isinstance(node, (ast.expr, ast.stmt)) else 1


def _changes(file: File, here: OfFile) -> Iterator[Change]:
    for call in here.saves:
        yield replace(call.func, _ROOT + "save_sharded")
    yield from map(Unblock, here.opened)
    for state, of in here.states.items():
        yield replace(state, _ROOT + "Sharded({object})", object=of)
    for call in here.loads:
        yield replace(call.func, _ROOT + "load_sharded")
    for call in here.taken:
        assert isinstance(call.func, ast.Attribute)
        yield replace(call.func, _ROOT + "load_state_dict")
        yield Arguments(call, first=template("{object}", object=call.func.value))
    for call, what in here.moves.items():
        yield replace(call.func, _ROOT + f"{what}_sharded")
    for method in here.asked:
        yield replace(method, "{owner}.exists", owner=method.value)
    yield from map(_resume, here.resumed)


def _resume(resumed: Resumed) -> Change:
    variable = ast.unparse(resumed.variable)
    lines: tuple[str, ...]
    if resumed.kind == "word":
        assert resumed.word is not None
        lines = (
            "if " + _ROOT + "newest() is not None:  # torchrun has started the ranks again",
            f"    {variable} = {ast.unparse(resumed.word)}",
        )
    elif resumed.kind == "path":
        lines = (f"{variable} = {_ROOT}newest({variable})  # where torchrun has started the ranks again",)
    else:
        lines = (f"{variable} = {_ROOT}newest() is not None or {variable}  # torchrun has started the ranks again",)
    return insert_before(resumed.before, *lines)


RULE = Rule(
    code="BMT045",
    title="checkpoints of training are written and read in parts (unsafe)",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(optimizer)
start = 0
if args.resume:
    checkpoint = torch.load(args.resume)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    start = checkpoint["step"]
for step in range(start, 10):
    optim_manager.backward(model(x).mean())
    optim_manager.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
    torch.save(state, "last.pt")
""",
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = bmt.BMTrainModelWrapper(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(optimizer)
start = 0
args.resume = bmt.checkpoint.newest(args.resume)  # where torchrun has started the ranks again
if args.resume:
    checkpoint = bmt.checkpoint.load_sharded(args.resume)
    bmt.checkpoint.load_state_dict(model, checkpoint["model"])
    bmt.checkpoint.load_state_dict(optimizer, checkpoint["optimizer"])
    start = checkpoint["step"]
for step in range(start, 10):
    optim_manager.backward(model(x).mean())
    optim_manager.step()
    state = {"model": bmt.checkpoint.Sharded(model), "optimizer": bmt.checkpoint.Sharded(optimizer), "step": step + 1}
    bmt.checkpoint.save_sharded(state, "last.pt")
""",
            unsafe=True,
        ),
    ),
)
