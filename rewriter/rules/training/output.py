"""Files and loggers are written by one rank.

What: statements that write files, log or upload (``writer.add_scalar``, ``wandb.log``, ``with open(path, "w")``,
``plt.savefig``, ``cv2.imwrite``, ``tokenizer.push_to_hub``) get ``if bmt.rank() == 0:``. What they show is computed by
every rank first if it needs all of them. A file that is open while all ranks work (``log = open(path, "w")``) is
``os.devnull`` on the other ranks.
``model.save_pretrained(...)`` of transformers, peft and the like becomes ``bmt.save_pretrained(model, ...)``, which
every rank calls and one writes.
Where all ranks then read such a file, they wait for it: ``bmt.synchronize()`` behind it; where a test decides whether
it is read or made, rank 0 answers for all: ``if bmt.agree(os.path.exists(path)):``. Where not all ranks are known to
come there, it is reported.
Why: several ranks that write one file destroy it; one that reads it meanwhile finds a part of it, or nothing; a
collective that one rank alone enters waits forever.
A command that all ranks would run for what it leaves behind (``os.system("perl score.pl > result.txt")``) is one
rank's, and the others wait for it; where not all are known to come there, it is reported.
A picture of the model's layers (``writer.add_graph(model, x)``) is left out on several ranks, as none has all of it.
An archive that is opened to write, and an object whose own ``save(path)`` is not seen, are reported.
Refuses when: the statement gives a value that later code uses, or only one rank reaches it already.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import TypeGuard

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted, walk
from rewriter.analyze.training.collectives import of_own_state
from rewriter.analyze.training.effects import changes_state, functions
from rewriter.analyze.training.varying import of_rank
from rewriter.analyze.training.writers import (
    UPLOADING_METHODS,
    WRITERS,
    gives_count,
    handles_records,
    is_in_memory,
    is_left_to_one,
    maps_to_write,
    opens_for_writing,
    runs_command,
    saves_itself,
    saves_only,
    takes_path,
    writes,
    writes_archive,
    writes_when_called,
)
from rewriter.changes import Arguments, Change, Under, insert_behind, replace, template, wrap
from rewriter.rules.one_rank import guarded, written_once
from rewriter.rules.rule import Example, Rule
from rewriter.rules.waits import waits
from rewriter.types import Conversion, Finding, Remark

_MAKES_TEMPORARY = {"tempfile.mkstemp", "tempfile.mkdtemp"}
_RECORDERS = {
    "gym.wrappers.Monitor", "gym.wrappers.RecordVideo", "gymnasium.wrappers.RecordVideo",
    "stable_baselines3.common.monitor.Monitor", "stable_baselines3.common.vec_env.VecMonitor",
    "stable_baselines3.common.vec_env.VecVideoRecorder",
}  # fmt: skip
_RECORDED_TO = {"directory", "video_folder", "filename"}
_RENAMES = {"os.replace", "os.rename", "os.renames", "shutil.move"}


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training:
        return
    joined: set[ast.AST] = set()
    for node in file.nodes:
        if isinstance(node, ast.stmt) and _uploads_model(file, facts, node):
            joined.update(walk(node))
            yield Remark(RULE.code, node.lineno, _for_all(file, node), differs=True)
            continue
        if _draws_model(node):
            if _is_alone(file, node):
                continue
            joined.update(walk(node))
            alone = Under((node,), template("if {bmt}.world_size() == 1:"))
            yield Conversion(RULE.code, node.lineno, "several ranks draw no model: none has all of it", (alone,))
            continue
        if not isinstance(node, (ast.Expr, ast.With)) or facts.scripts.in_kept_guard(file, node) or node in joined:
            continue
        if runs_command(file, facts.project, node) and not facts.scripts.in_opened_guard(file, node):
            assert isinstance(node, ast.Expr)
            yield _command(file, facts, node)
            continue
        if not writes(file, facts.project, node) or handles_records(file, facts.project, node):
            continue
        if _keeps_state(file, facts, node) or is_in_memory(file, node):
            continue
        if _saves_pretrained(file, facts, node):  # also where a guard was opened for it
            assert isinstance(node, ast.Expr)
            changes = tuple(_by_all(file, facts, node))
            yield Conversion(RULE.code, node.lineno, "one rank writes what all ranks give", changes)
            continue
        if facts.scripts.in_opened_guard(file, node):
            continue
        if saves_only(file, facts.project, node):
            joined.update(walk(node))
            continue  # BMT026 sees to it
        if isinstance(node, ast.With) and (pickled := _pickled(file, facts, node)) is not None:
            joined.update(walk(node))
            message = "an open file gets a model whose values are spread: bmt.save_checkpoint(model, path) writes it"
            yield Remark(RULE.code, pickled.lineno, message, differs=True)
            continue
        guard = guarded(file, facts, node)
        if guard is not None:
            followers = tuple(_followers(file, facts, node))
            joined.update(item for statement in (node, *followers) for item in walk(statement))
            together = Under((node, *followers), guard.head, guard.hoisted)
            yield Conversion(RULE.code, node.lineno, "one rank writes", (together,))
            yield from waits(RULE.code, file, facts, together.statements)
        elif isinstance(node, ast.Expr) and _shares_line(file, facts, node):
            assert isinstance(node.value, ast.Call)
            change = wrap(node.value.func, "{bmt}.on_rank_0({it})")
            yield Conversion(RULE.code, node.lineno, "one rank writes", (change,))
            yield from waits(RULE.code, file, facts, (node,))
        elif isinstance(node, ast.Expr) and not _is_own_method(file, facts, node):
            yield Remark(RULE.code, node.lineno, _for_all(file, node), differs=True)
    for test in facts.scripts.kept_guards(file):
        if not facts.read_back.waits_beside(file, test):
            yield from waits(RULE.code, file, facts, test.body)
    for call in file.calls:
        if call not in joined and opens_for_writing(call) and not is_left_to_one(call):
            yield from _opened(file, facts, call)
        elif call not in joined and _uploads(file, facts, call) and not facts.scripts.in_kept_guard(file, call):
            if not isinstance(file.names.parents[call], ast.Expr):
                change = wrap(call.func, "{bmt}.on_rank_0({it})")
                yield Conversion(RULE.code, call.lineno, "one rank uploads", (change,))
        elif writes_when_called(file, facts.project, call) and not facts.scripts.in_kept_guard(file, call):
            change = wrap(call.func, "{bmt}.on_rank_0({it})")
            yield Conversion(RULE.code, call.lineno, "one rank writes", (change,))
        elif _records(file, facts, call) and not facts.scripts.in_kept_guard(file, call):
            message = "every rank records to this place: give it one of its own, by bmt.rank()"
            yield Remark(RULE.code, call.lineno, message, differs=True)
        elif _opens_database(file, facts, call) and not facts.scripts.in_kept_guard(file, call):
            message = "every rank opens this database to write, and may wait for another: one rank is to"
            yield Remark(RULE.code, call.lineno, message, differs=True)
        elif (
            call not in joined
            and (
                writes_archive(file, facts.project, call)
                or maps_to_write(facts.project, file, call)
                or gives_count(file, call)
                or _saves_itself(file, facts, call)
            )
            and not facts.scripts.in_kept_guard(file, call)
            and not facts.scripts.in_function_of_one_rank(file, call)
            and not is_in_memory(file, file.names.statement_of(call))
        ):
            message = (
                "every rank writes this file: where it needs nothing of the others, if bmt.rank() == 0: is to do it"
            )
            yield Remark(RULE.code, call.lineno, message, differs=True)
        elif _is_renamed(file, facts, call) and not facts.scripts.in_kept_guard(file, call):
            message = "every rank makes this file, and one rank's gets its name: the others' stay; name it by its path"
            yield Remark(RULE.code, call.lineno, f'{message} instead, path + ".tmp"')


def _command(file: File, facts: Facts, node: ast.Expr) -> Finding:
    """``os.system(f"perl score.pl {answers} > result.txt")``: the others go on when it is through."""
    varying = facts.decisions.varying
    same = not any(varying.varies(file, item) or of_rank(file, item) for item in _given(node))
    if same and facts.read_back.reached.by_all(file, node) and file.source.owns_lines(node):
        changes = (Under((node,), template("if {bmt}.rank() == 0:")), insert_behind(node, "{bmt}.synchronize()"))
        return Conversion(RULE.code, node.lineno, "one rank runs this command, the others wait for it", changes)
    message = "every rank runs this command: where it writes a file, one rank is to, and all to wait, bmt.synchronize()"
    return Remark(RULE.code, node.lineno, message)


def _given(node: ast.Expr) -> list[ast.expr]:
    assert isinstance(node.value, ast.Call)
    return [*node.value.args, *(keyword.value for keyword in node.value.keywords)]


def _draws_model(node: ast.AST) -> TypeGuard[ast.Expr]:
    """``writer.add_graph(model, x)``, which traces a forward: what it gathers from other ranks cannot be traced."""
    match node:
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr="add_graph"))):
            return True
    return False


def _is_alone(file: File, node: ast.stmt) -> bool:
    """Whether ``if bmt.world_size() == 1:`` stands around a statement."""
    above = (parent for parent in file.names.ancestors(node) if isinstance(parent, ast.If))
    return any(
        isinstance(item, ast.Call) and (dotted(item.func) or "").endswith("world_size")
        for parent in above
        for item in walk(parent.test)
    )


def _records(file: File, facts: Facts, call: ast.Call) -> bool:
    """Whether a call wraps an environment in one that writes what happens in it, to a path that it is given."""
    name = facts.project.external(file, call.func)
    if name not in _RECORDERS:
        return False
    named = [keyword.value for keyword in call.keywords if keyword.arg in _RECORDED_TO]
    path = next(iter([*call.args[1:2], *named]), None)
    given = path is not None and not (isinstance(path, ast.Constant) and path.value is None)
    return given and not any(isinstance(item, ast.Attribute) and item.attr == "rank" for item in walk(call))


def _keeps_state(file: File, facts: Facts, node: ast.stmt) -> bool:
    """``log.add_scalar(...)`` of a class of the project that notes what it is told: every rank's object is to know.

    What such a method writes is looked at where it writes.
    """
    match node:
        case ast.Expr(value=ast.Call(func=ast.Attribute() as func)):
            instances = facts.scripts.collectives.instances
            return any(changes_state(info.file, instances, info.node) for info in functions(file, instances, func))
    return False


def _is_own_method(file: File, facts: Facts, node: ast.Expr) -> bool:
    """``model.save_pretrained(path)`` of a class of the project: what it writes is looked at where it writes."""
    match node.value:
        case ast.Call(func=ast.Attribute() as func):
            return any(functions(file, facts.scripts.collectives.instances, func))
    return False


def _for_all(file: File, node: ast.stmt) -> str:
    value = node.value if isinstance(node, (ast.Expr, ast.Assign, ast.Return)) else None
    called = file.source.code(value.func if isinstance(value, ast.Call) else node)
    hint = ": bmt.save_pretrained(model, folder, push_to_hub=True, repo_id=...) uploads it once"
    return f"every rank must call {called}, and every rank writes{hint if 'push_to_hub' in called else ''}"


def _uploads_model(file: File, facts: Facts, node: ast.stmt) -> bool:
    """Whether a statement pushes a model to a hub, or a part of one."""
    match node:
        case (
            ast.Expr(value=ast.Call(func=ast.Attribute(value=model, attr="push_to_hub")))
            | ast.Assign(value=ast.Call(func=ast.Attribute(value=model, attr="push_to_hub")))
            | ast.Return(value=ast.Call(func=ast.Attribute(value=model, attr="push_to_hub")))
        ):
            return _is_of_model(file, facts, model)
    return False


def _is_of_model(file: File, facts: Facts, node: ast.expr, deep: int = 0) -> bool:
    """Whether a value is a model, a part of one, or a parameter that is given one."""
    last = node.attr if isinstance(node, ast.Attribute) else ""
    if any(isinstance(item, ast.expr) and facts.scripts.roles[file].is_model(item) for item in walk(node)):
        return "config" not in last and "token" not in last
    function = file.names.function_of(node)
    if not isinstance(node, ast.Name) or function is None or deep > 1:
        return False
    given = facts.scripts.collectives.instances.given(file, function, node.id)
    return any(_is_of_model(other, facts, value, deep + 1) for other, value in given)


def _is_renamed(file: File, facts: Facts, call: ast.Call) -> bool:
    """Whether a call makes a temporary file or folder, with a name of its own on every rank, that gets another name."""
    name = facts.project.external(file, call.func)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    stays = isinstance(kept := given.get("delete"), ast.Constant) and kept.value is False
    function = file.names.function_of(call)
    if function is None or not (name in _MAKES_TEMPORARY or (name == "tempfile.NamedTemporaryFile" and stays)):
        return False
    return any(
        facts.project.external(file, other.func) in _RENAMES
        or (isinstance(other.func, ast.Attribute) and other.func.attr in {"replace", "rename"} and len(other.args) == 1)
        for other in walk(function)
        if isinstance(other, ast.Call)
    )


def _uploads(file: File, facts: Facts, call: ast.Call) -> bool:
    """Whether a call uploads to a hub, or makes a place there."""
    name = facts.project.external(file, call.func)
    if name.startswith("huggingface_hub."):
        return name in WRITERS
    return isinstance(call.func, ast.Attribute) and call.func.attr in UPLOADING_METHODS


def _saves_itself(file: File, facts: Facts, call: ast.Call) -> bool:
    """Whether an object writes a file in a method that is not seen; what is seen is looked at where it writes."""
    if not isinstance(call.func, ast.Attribute) or not saves_itself(file, facts.project, call):
        return False
    instances, roles = facts.scripts.collectives.instances, facts.scripts.roles[file]
    owner = instances.class_of(file, call.func.value)
    if owner is not None:
        return facts.classes.method(owner, call.func.attr) is None and bool(facts.classes.external_bases(owner))
    variable = roles.var(call.func.value)
    made = [value for other, value, _, part in roles.assignments if other == variable is not None and not part]
    made += [call.func.value]
    if any(isinstance(value, ast.Call) and facts.project.external(file, value.func) for value in made):
        return True
    around = file.names.function_of(call)
    others = [info for info in instances.named(call.func.attr) if info.node is not around]
    return not others and not roles.is_model(call.func.value)


def _opens_database(file: File, facts: Facts, call: ast.Call) -> bool:
    given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
    name = facts.project.external(file, call.func)
    if name == "h5py.File":
        mode = given.get("mode", getattr(call.args[1], "value", "r") if len(call.args) > 1 else "r")
        return mode != "r"
    return name in {"lmdb.open", "lmdb.Environment", "sqlite3.connect"} and not given.get("readonly")


def _pickled(file: File, facts: Facts, block: ast.With) -> ast.Call | None:
    """A call in a block that opens a file and writes a whole model to it."""
    roles = facts.scripts.roles[file]
    for call in (item for item in walk(block) if isinstance(item, ast.Call) and item.args):
        writes_object = facts.project.external(file, call.func) in {"torch.save", "pickle.dump"}
        if writes_object and any(
            roles.is_model(item) and not isinstance(file.names.parents[item], (ast.Call, ast.Attribute))
            for item in walk(call.args[0])
        ):
            return call
        if writes_object and roles.is_model(call.args[0]):
            return call
    return None


def _opened(file: File, facts: Facts, call: ast.Call) -> Iterator[Finding]:
    """A file that all ranks open, as what is written needs them or comes later: all but one write to nowhere."""
    held = isinstance(file.names.statement_of(call), (ast.Assign, ast.AnnAssign))
    if facts.scripts.in_kept_guard(file, call) or (facts.scripts.in_opened_guard(file, call) and not held):
        return
    plain = takes_path(call) and bool(call.args) and not isinstance(call.args[0], ast.Starred)
    if any(facts.project.external(file, item) == "os.devnull" for item in call.args):
        return
    if (
        plain
        and file.source.is_exact(call.args[0])
        and _only_writes(call)
        and not changes_state(file, facts.scripts.collectives.instances, call.args[0])
    ):
        changes = written_once(file, call.args[0])
        yield Conversion(RULE.code, call.lineno, "one rank writes this file, the others write to nowhere", changes)
        yield from waits(RULE.code, file, facts, (call,))
    else:
        yield Remark(RULE.code, call.lineno, "every rank writes this file: one rank is to open it", differs=True)


def _only_writes(call: ast.Call) -> bool:
    """Whether a file is opened to be written, not read or made anew."""
    given = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    return not any(isinstance(mode, ast.Constant) and set(str(mode.value)) & {"+", "x", "r"} for mode in given)


def _shares_line(file: File, facts: Facts, node: ast.Expr) -> bool:
    """Whether a statement that one rank may run shares its line, ``np.save(path, x); print("saved")``."""
    if file.source.owns_lines(node) or not isinstance(node.value, ast.Call):
        return False
    known = facts.project.external(file, node.value.func) in WRITERS
    return known or not facts.scripts.collectives.is_collective(file, node.value)


def _followers(file: File, facts: Facts, node: ast.stmt) -> Iterator[ast.stmt]:
    """The statements on the next lines that one rank is to run, too, if nothing in them needs all ranks."""
    block = file.names.siblings(node)
    last = node
    for follower in block[block.index(node) + 1 :]:
        if not isinstance(follower, ast.Expr) or follower.lineno != (last.end_lineno or 0) + 1:
            return
        if follower.lineno in file.source.skips or not writes(file, facts.project, follower) or _draws_model(follower):
            return
        guard = guarded(file, facts, follower)
        if guard is None or guard.hoisted:
            return
        if facts.scripts.collectives.inside(file, follower) is not None or _saves_pretrained(file, facts, follower):
            return
        yield follower
        last = follower


def _saves_pretrained(file: File, facts: Facts, node: ast.stmt) -> bool:
    """Whether a statement saves a model by a package's method."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    return facts.scripts.collectives.saves_pretrained(file, node.value)


def _by_all(file: File, facts: Facts, node: ast.Expr) -> Iterator[Change]:
    call = node.value
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
    yield replace(call.func, "{bmt}.save_pretrained")
    dropped = of_own_state(facts.scripts.roles[file], call)
    yield Arguments(
        call, dropped=() if dropped is None else (dropped,), first=template("{model}", model=call.func.value)
    )


RULE = Rule(
    code="BMT033",
    title="files and loggers are written by one rank",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import json
import torch
import bmtrain as bmt

bmt.init_distributed()
model = torch.nn.Linear(8, 1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
for step, x in enumerate(batches):
    loss = model(x).mean()
    optim_manager.backward(loss)
    writer.add_scalar("loss", loss.item(), step)
with open("done.json", "w") as file:
    json.dump({"steps": step}, file)
""",
            """import json
import torch
import bmtrain as bmt

bmt.init_distributed()
model = torch.nn.Linear(8, 1)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
for step, x in enumerate(batches):
    loss = model(x).mean()
    optim_manager.backward(loss)
    value = bmt.sum_loss(loss).item()
    if bmt.rank() == 0:
        writer.add_scalar("loss", value, step)
if bmt.rank() == 0:
    with open("done.json", "w") as file:
        json.dump({"steps": step}, file)
""",
        ),
    ),
)
