"""What the rewriter's tests share."""

from __future__ import annotations

import contextlib
import io

from rewriter.convert import convert_text
from rewriter.plan import Options

IMPORTS = """import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
"""
NET = """class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.b = nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(x).relu())
"""


def converted(text: str, **options: object) -> str:
    """The text after conversion, checked to be stable under a second one."""
    chosen = Options(**options)  # type: ignore[arg-type]
    result = convert_text(text, chosen)
    assert not result.error, result.error
    after = result.after.decode()
    again = convert_text(after, chosen)
    assert not again.error, again.error
    assert again.after.decode() == after
    return after


def weights_after(text: str) -> float:
    """The sum of what ``net`` weighs when a program has run; for a rank."""
    given = {"__name__": "__main__"}
    exec(compile(text, "program.py", "exec"), given)
    return float(sum(value.double().sum() for value in given["net"].state_dict().values()))  # type: ignore[attr-defined]


def printed(text: str) -> list[str]:
    """The lines that a program prints; for a rank."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(text, "train.py", "exec"), {"__name__": "__main__"})
    return output.getvalue().splitlines()
