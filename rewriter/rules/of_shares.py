"""What makes a value of a rank's share of a batch that of the whole batch."""

from __future__ import annotations

import ast

from rewriter.analyze.training.shares import Share
from rewriter.changes import Change, wrap

_CODE = {
    "total": "{bmt}.total({it}{options})",
    "mean": "{bmt}.sum_loss({it})",
    "samples": "{bmt}.gather_samples({it}{options})",
}


def made_whole(value: ast.expr, share: Share) -> Change:
    """``bmt.total(len(x))``, ``bmt.sum_loss(accuracy)``, ``bmt.gather_samples(guesses, of=loader)``."""
    if share.loader is None or share.kind == "mean":
        return wrap(value, _CODE[share.kind].replace("{options}", ""))
    return wrap(value, _CODE[share.kind].replace("{options}", ", of={loader}"), loader=share.loader)
