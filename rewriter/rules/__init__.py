"""All rules, by code. One file a rule."""

from __future__ import annotations

from rewriter.rules import (
    base_class,
    batches,
    block_list,
    checkpoint,
    compiled,
    ddp,
    dist,
    engines,
    init,
    launch_argument,
    loader,
    loop,
    loss_value,
    manager,
    optimizer,
    output,
    pairs,
    parameter,
    printing,
    progress,
    rank_guard,
    save,
    share_value,
    unsupported,
    values,
    wrapper,
)
from rewriter.rules.rule import Rule

_MODULES = (
    base_class,
    batches,
    block_list,
    checkpoint,
    compiled,
    ddp,
    dist,
    engines,
    init,
    launch_argument,
    loader,
    loop,
    loss_value,
    manager,
    optimizer,
    output,
    pairs,
    parameter,
    printing,
    progress,
    rank_guard,
    save,
    share_value,
    unsupported,
    values,
    wrapper,
)
RULES: tuple[Rule, ...] = tuple(sorted((module.RULE for module in _MODULES), key=lambda rule: rule.code))
BY_CODE = {rule.code: rule for rule in RULES}
