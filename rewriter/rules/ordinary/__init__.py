"""Rules that come before all others: scripts of other engines that are ordinary loops with other names."""

from __future__ import annotations

from rewriter.rules.ordinary import accelerate, deepspeed

RULES = (accelerate.RULE, deepspeed.RULE)
