"""Applies edits to source. Bytes outside the edits are never printed again, so they cannot change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rewriter.types import ConflictError, Edit, Span


def apply_edits(data: bytes, edits: Iterable[Edit]) -> bytes:
    """``data`` with all edits applied, inner edits first.

    Raises:
        ConflictError: two edits overlap and neither contains the other.
    """
    unique = list(dict.fromkeys(edits))
    ordered = sorted(unique, key=_order)
    return _render(data, Span(0, len(data)), ordered)


def _order(edit: Edit) -> tuple[int, int, int, int]:
    """Insertions before what starts at their place, then outer before inner."""
    span = edit.span
    if span.start == span.end:
        return (span.start, 0, edit.rank, 0)
    return (span.start, 1, -span.end, -edit.rank)


def _render(data: bytes, whole: Span, edits: Sequence[Edit]) -> bytes:
    pieces: list[bytes] = []
    position = whole.start
    index = 0
    while index < len(edits):
        outer = edits[index]
        index += 1
        if outer.span.start < position:
            raise ConflictError(f"edits overlap at byte {outer.span.start}")
        inner: list[Edit] = []
        while index < len(edits) and _inside(edits[index].span, outer.span):
            inner.append(edits[index])
            index += 1
        pieces.append(data[position : outer.span.start])
        pieces.extend(_parts(data, outer, inner))
        position = outer.span.end
    if position > whole.end:
        raise ConflictError(f"an edit ends behind byte {whole.end}")
    pieces.append(data[position : whole.end])
    return b"".join(pieces)


def _parts(data: bytes, edit: Edit, inner: Sequence[Edit]) -> Iterable[bytes]:
    for part in edit.parts:
        if isinstance(part, str):
            yield part.encode("utf-8", "surrogatepass")
            continue
        kept = []
        for other in inner:
            # The pieces of an insertion at either end of the part belong to what surrounds it.
            if part.contains(other.span) and not (other.span.start == other.span.end and other.span.start == part.end):
                kept.append(other)
            elif other.span.start < part.end and part.start < other.span.end and not _inside(part, other.span):
                raise ConflictError(f"edits overlap at byte {other.span.start}")
        yield _render(data, part, kept)


def _inside(span: Span, outer: Span) -> bool:
    if span.start == span.end:
        return outer.start < span.start < outer.end
    return outer.contains(span)
