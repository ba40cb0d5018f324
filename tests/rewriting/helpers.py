"""What the rewriter's tests share."""

from __future__ import annotations

from rewriter.convert import convert_text
from rewriter.plan import Options


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
