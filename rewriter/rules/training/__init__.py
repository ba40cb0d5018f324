"""Rules about the code that trains: starting, data, losses, optimizers, output, checkpoints, values of parameters."""

from __future__ import annotations

from rewriter.rules.training import (
    batches,
    compiled,
    ddp,
    decision,
    dist,
    folder,
    init,
    launch_argument,
    loader,
    loss_value,
    manager,
    optimizer,
    output,
    printing,
    progress,
    rank_guard,
    save,
    spawn,
    values,
    wrapper,
)

RULES = (
    batches.RULE,
    compiled.RULE,
    ddp.RULE,
    decision.RULE,
    dist.RULE,
    folder.RULE,
    init.RULE,
    launch_argument.RULE,
    loader.RULE,
    loss_value.RULE,
    manager.RULE,
    optimizer.RULE,
    output.RULE,
    printing.RULE,
    progress.RULE,
    rank_guard.RULE,
    save.RULE,
    spawn.RULE,
    values.RULE,
    wrapper.RULE,
)
