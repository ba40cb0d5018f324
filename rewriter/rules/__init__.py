"""All rules, by code: one module a rule, and no rule imports another. ``rule`` says what a rule is."""

from __future__ import annotations

from rewriter.rules import model, ordinary, refusals, training
from rewriter.rules.rule import Rule

FIRST: tuple[Rule, ...] = ordinary.RULES
"""Rules whose results the others see as the files."""
RULES: tuple[Rule, ...] = tuple(
    sorted((*FIRST, *model.RULES, *training.RULES, *refusals.RULES), key=lambda rule: rule.code)
)
BY_CODE = {rule.code: rule for rule in RULES}
