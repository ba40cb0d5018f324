"""Rules about the code of models: base classes, parameters, lists of blocks and the loops over them."""

from __future__ import annotations

from rewriter.rules.model import base_class, block_list, checkpoint, loop, pairs, parameter, split

RULES = (base_class.RULE, block_list.RULE, checkpoint.RULE, loop.RULE, pairs.RULE, parameter.RULE, split.RULE)
