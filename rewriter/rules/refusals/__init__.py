"""Rules that change nothing: what cannot be converted, and what the user should look at."""

from __future__ import annotations

from rewriter.rules.refusals import engines, unsupported

RULES = (engines.RULE, unsupported.RULE)
