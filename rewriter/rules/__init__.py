"""All rules, by code. One file a rule."""

from __future__ import annotations

from rewriter.rules import base_class, block_list, loop, parameter
from rewriter.types import Rule

RULES: tuple[Rule, ...] = tuple(
    sorted((module.RULE for module in (base_class, parameter, block_list, loop)), key=lambda rule: rule.code)
)
BY_CODE = {rule.code: rule for rule in RULES}
