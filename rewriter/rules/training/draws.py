"""Noise, masks and time steps for a share of a batch are drawn by each rank alone.

What: ``noise = torch.randn_like(x)`` in a loop that trains goes under ``with bmt.own_random():``, and so does
everything else that draws as many numbers as the batch has: ``torch.rand(len(x))``, ``torch.randperm(x.size(0))``,
``np.random.normal(0, 1, (x.shape[0], 8))``; and what is drawn for each item, ``[random.choice(words) for _ in users]``.
Why: outside of models all ranks draw the same numbers, so that they agree on data and weights. N ranks that draw alike
for their shares have 1/N as many different numbers for the batch of the unconverted script.
Refuses when: the statement does more than compute with tensors (reported); the size is not taken from a batch; it is
drawn without gradients, or by a generator of its own (reported where it draws item by item: ranks' generators would go
apart); nothing shares out the batches, so that all ranks do the same
work (BMT023 says so). Layers of models in training draw apart without this.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.file import File
from rewriter.analyze.training.draws import drawn_for_a_batch, drawn_for_items, is_plain
from rewriter.changes import Under, template
from rewriter.rules.rule import Example, Rule
from rewriter.types import Conversion, Finding, Remark

_WORDS = re.compile(rb"rand|rng|sample|normal|uniform|bernoulli|exponential|poisson|dropout")


def find(file: File, facts: Facts) -> Iterator[Finding]:
    if file not in facts.scripts.training or not _WORDS.search(file.source.data) or _all_have_the_same(file, facts):
        return
    runs: list[list[ast.stmt]] = []
    drawn = {call: file.names.statement_of(call) for call in drawn_for_a_batch(file, facts.scripts)}
    told = set[ast.stmt]()
    for call, statement, by_generator in drawn_for_items(file, facts.scripts):
        if not by_generator:
            drawn[call] = statement
        elif statement not in told and not facts.scripts.in_kept_guard(file, call):
            told.add(statement)
            message = (
                "each rank draws for its own items here, and the ranks' generators stand at different places then: "
                "draw from one that is for this alone, with bmt.rank() in its seed"
            )
            yield Remark(RULE.code, call.lineno, message, differs=True)
    for call, statement in sorted(drawn.items(), key=lambda pair: (pair[0].lineno, pair[0].col_offset)):
        if facts.scripts.in_kept_guard(file, call) or (statement in told):
            continue
        plain = is_plain(file, facts.scripts, statement) or _is_drawn_beside(file, facts, statement, call)
        if not plain or not file.source.owns_lines(statement):
            message = "all ranks draw the same numbers here, for other shares of the batch: bmt.own_random() would do"
            told.add(statement)
            yield Remark(RULE.code, call.lineno, message, differs=True)
        elif runs and statement is runs[-1][-1]:
            continue
        elif runs and _follows(file, runs[-1][-1], statement):
            runs[-1].append(statement)
        else:
            runs.append([statement])
    for statements in runs:
        change = Under(tuple(statements), template("with {bmt}.own_random():"))
        yield Conversion(RULE.code, statements[0].lineno, "every rank draws its own numbers for its share", (change,))


def _is_drawn_beside(file: File, facts: Facts, statement: ast.stmt, call: ast.Call) -> bool:
    """``latents = vae.encode(images).latent_dist.sample()``: what else is done there needs no other rank."""
    inside = facts.scripts.collectives.inside(file, statement)
    own = isinstance(call.func, ast.Attribute) and not isinstance(call.func.value, ast.Name)
    return own and isinstance(statement, ast.Assign) and inside is None


def _all_have_the_same(file: File, facts: Facts) -> bool:
    """Whether all ranks train on the same batches: they draw the same for them, as one process does."""
    scripts = facts.scripts
    if scripts.was_parallel(file) or scripts.shares_data(file):
        return False
    programs = [program for program in scripts.programs if file in scripts.reach(program)] or [file]
    files = set().union(*map(scripts.reach, programs)) | {file}
    return not any(scripts.batches.of(other).left for other in files & scripts.training)


def _follows(file: File, first: ast.stmt, second: ast.stmt) -> bool:
    siblings = file.names.siblings(first)
    return second in siblings and siblings.index(second) == siblings.index(first) + 1


RULE = Rule(
    code="BMT041",
    title="what is drawn for a share of a batch is each rank's own",
    explanation=__doc__,
    find=find,
    examples=(
        Example(
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = torch.nn.Linear(8, 8)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
for x in bmt.shard_loader(loader):
    level = torch.rand(len(x), 1)
    noise = torch.randn_like(x)
    loss = (model(x + level * noise) - noise).pow(2).mean()
    optim_manager.backward(loss)
    optim_manager.step()
""",
            """import torch
import bmtrain as bmt

bmt.init_distributed()
model = torch.nn.Linear(8, 8)
optim_manager = bmt.optim.OptimManager(loss_scale=None)
optim_manager.add_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
for x in bmt.shard_loader(loader):
    with bmt.own_random():
        level = torch.rand(len(x), 1)
        noise = torch.randn_like(x)
    loss = (model(x + level * noise) - noise).pow(2).mean()
    optim_manager.backward(loss)
    optim_manager.step()
""",
        ),
    ),
)
