"""The report of a conversion as one HTML file: no network, no scripts, readable in any order."""

from __future__ import annotations

import difflib
import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rewriter import __version__
from rewriter.report import left_training, summary
from rewriter.rules import BY_CODE
from rewriter.types import Finding, Result, Tried, place

_STATES = {"left": "left for you", "unsafe": "needs --unsafe", "done": "done"}
_AROUND = 3
"""Lines of a file that are shown before and after those that change."""
_STYLE = """\
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
:root { --old: #d735; --new: #2a53; --hand: #c60; --good: #2a5; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem 2rem 4rem; max-width: 110rem; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0; display: inline; } a { color: inherit; } pre, code, td.code { font-family: monospace; }
.filters { position: sticky; top: 0; background: Canvas; padding: .6rem 0; border-bottom: 1px solid var(--line); }
.filters label { margin-right: 1rem; } select { max-width: min(40ch, 100%); font: inherit; }
.verdict { border-left: .4rem solid var(--good); padding: .2rem .8rem; background: var(--soft); }
.verdict.bad { border-color: #d33; }
table { border-collapse: collapse; } th { text-align: left; font-weight: 600; }
table.list td, table.list th { padding: .15rem .8rem .15rem 0; vertical-align: top; }
td.place { overflow-wrap: anywhere; }
table.list td, table.list th { border-bottom: 1px solid var(--line); }
table.diff { width: 100%; table-layout: fixed; font-size: 13px; line-height: 1.4; margin: .5rem 0 1rem; }
table.diff td { vertical-align: top; padding: 0 .4rem; white-space: pre-wrap; overflow-wrap: anywhere; }
table.diff col.number { width: 4.5em; }
table.diff td.number { text-align: right; opacity: .55; user-select: none; white-space: nowrap; }
table.diff tr.gap td { background: var(--soft); height: .6rem; }
table.diff tr.note td { background: var(--soft); border-left: .3rem solid var(--good); }
table.diff tr.note.left td, table.diff tr.note.unsafe td { border-color: var(--hand); }
td.old { background: var(--old); } td.new { background: var(--new); } td.old b, td.new b { font-weight: 700; }
details { border: 1px solid var(--line); border-radius: .4rem; padding: .5rem .8rem; margin: .6rem 0; }
summary { cursor: pointer; } .state { color: var(--hand); } .state.done { color: var(--good); }
ul { margin: .4rem 0; } .explanation { white-space: pre-wrap; font-family: inherit; margin: .4rem 0; }
"""
_COLUMNS = '<colgroup><col class="number"><col><col class="number"><col></colgroup>'


def page(results: Sequence[Result], closing: Sequence[str] = (), tried: Sequence[Tried] = ()) -> str:
    """The whole file.

    Args:
        closing: what was written and what to run next, a line each.
        tried: what ``--verify`` and ``--prove`` compared.
    """
    shown = [result for result in results if result.changed or result.error or any(_findings(result))]
    names = {result.path: f"f{number}" for number, result in enumerate(shown)}
    codes = sorted({finding.code for result in shown for _, finding in _findings(result)})
    body = "\n".join([
        f"<h1>Conversion to bmtrain</h1>\n<p>{_text(summary(results))}</p>",
        *(f"<p>{_text(line)}</p>" for line in closing),
        *(_tried(one) for one in tried),
        _filters(shown, names, codes),
        *_needs_a_hand(shown, names),
        _rules(shown, codes),
        '<h2 id="files">Files</h2>',
        *(_file(result, names[result.path]) for result in shown),
        '<h2 id="rules">What the rules say</h2>',
        *(_explanation(code) for code in codes),
        f"<p>bmt-convert {_text(__version__)}</p>",
    ])  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Conversion to bmtrain</title>\n'
        f"<style>\n{_STYLE}{_hidden(names.values(), codes)}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _text(text: object) -> str:
    """Anything, as text of the page: nothing in it is markup, and no character is one that HTML does not have."""
    clean = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", str(text))
    return html.escape(clean, quote=True)


def _findings(result: Result) -> Iterator[tuple[str, Finding]]:
    """What was found in a file, what needs the user's hand first."""
    for state, found in zip(_STATES, (result.reported, result.hidden, result.applied), strict=True):
        for finding in sorted(found, key=lambda finding: (finding.line, finding.code)):
            yield state, finding


def _hidden(files: Iterable[str], codes: Sequence[str]) -> str:
    """What each choice of a filter hides. A browser that does not know ``:has`` hides nothing."""
    rules = []
    choices: tuple[tuple[str, Iterable[str]], ...] = (("rule", codes), ("file", files), ("state", _STATES))
    for name, values in choices:
        rules += [
            f'body:has(#{name} option[value="{value}"]:checked) [data-{name}]:not([data-{name}~="{value}"])'
            " { display: none; }\n"
            for value in values
        ]
    return "".join(rules)


def _filters(shown: Sequence[Result], names: dict[Path, str], codes: Sequence[str]) -> str:
    files = [(names[result.path], result.path.as_posix()) for result in shown]
    rules = [(code, f"{code} {BY_CODE[code].title}" if code in BY_CODE else code) for code in codes]
    boxes = (("rule", "all rules", rules), ("file", "all files", files), ("state", "all", list(_STATES.items())))
    labels = []
    for name, everything, choices in boxes:
        options = "".join(f'<option value="{value}">{_text(text)}</option>' for value, text in choices)
        options = f'<option value="">{everything}</option>{options}'
        labels.append(f'<label>{name} <select id="{name}">{options}</select></label>')
    return f'<div class="filters">{"".join(labels)}</div>'


def _tried(one: Tried) -> str:
    verdict = f'<p class="verdict{"" if one.held else " bad"}">{_text(one.verdict)}</p>'
    table = ""
    if one.rows:
        head, *rows = (["".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in row)] for tag, row in _tagged(one.rows))
        table = f'<table class="list"><tr>{head[0]}</tr>{"".join(f"<tr>{row[0]}</tr>" for row in rows)}</table>'
    notes = "".join(f"<li>{_text(note)}</li>" for note in one.notes)
    return f"<h2>{_text(one.title)}</h2>\n{verdict}\n{table}" + (f"\n<ul>{notes}</ul>" if notes else "")


def _tagged(rows: Sequence[Sequence[str]]) -> Iterator[tuple[str, Sequence[str]]]:
    for number, row in enumerate(rows):
        yield "td" if number else "th", row


def _needs_a_hand(shown: Sequence[Result], names: dict[Path, str]) -> Iterator[str]:
    """Errors, files that train and stay, places left, edits that wait: one row for all places of one reason."""
    yield '<h2 id="hand">Needs your hand</h2>'
    rows = []
    for result in shown:
        name, why = names[result.path], left_training(result)
        reasons = ([f"not understood: {result.error}"] if result.error else []) + (
            [f"trains, and was left as it is: {why}"] if why and not result.error else []
        )
        link = f'<a href="#{name}">{_text(result.path)}</a>'
        rows += [
            f'<tr data-file="{name}" data-state="left"><td class="place">{link}</td><td></td>'
            f"<td>{_text(reason)}</td></tr>"
            for reason in reasons
        ]
    groups: dict[tuple[str, str, str], list[Result]] = {}
    places: dict[tuple[str, str, str], list[str]] = {}
    for result in shown:
        for number, (state, finding) in enumerate(_findings(result)):
            if state != "done":
                key = state, finding.code, finding.message
                at = f'<a href="#{names[result.path]}-{number}">{_text(result.at(finding.line))}</a>'
                groups.setdefault(key, []).append(result)
                places.setdefault(key, []).append(at)
    for state in ("left", "unsafe"):
        for key in (key for key in groups if key[0] == state):
            files = " ".join(dict.fromkeys(names[result.path] for result in groups[key]))
            code, reason = _text(key[1]), _text(key[2])
            rows.append(
                f'<tr data-rule="{code}" data-file="{files}" data-state="{state}">'
                f'<td class="place">{"<br>".join(places[key])}</td><td><a href="#{code}">{code}</a></td>'
                f'<td><span class="state">{_STATES[state]}</span>: {reason}</td></tr>'
            )
    yield f'<table class="list">{"".join(rows)}</table>' if rows else "<p>Nothing.</p>"


def _rules(shown: Sequence[Result], codes: Sequence[str]) -> str:
    counts = Counter((finding.code, state) for result in shown for state, finding in _findings(result))
    rows = []
    for code in codes:
        title = BY_CODE[code].title if code in BY_CODE else ""
        cells = "".join(f"<td>{counts[code, state] or ''}</td>" for state in _STATES)
        rows.append(f'<tr data-rule="{code}"><td><a href="#{code}">{code}</a></td><td>{_text(title)}</td>{cells}</tr>')
    head = "".join(f"<th>{text}</th>" for text in ("rule", "", *_STATES.values()))
    return f'<h2 id="counts">By rule</h2>\n<table class="list"><tr>{head}</tr>{"".join(rows)}</table>'


def _file(result: Result, name: str) -> str:
    found = list(_findings(result))
    counts = Counter(state for state, _ in found)
    said = ", ".join(f"{counts[state]} {text}" for state, text in _STATES.items() if counts[state])
    codes, states = (" ".join(dict.fromkeys(kinds)) for kinds in ((f.code for _, f in found), (s for s, _ in found)))
    notes = {number: _note(result, name, number, *one) for number, one in enumerate(found)}
    error = f'<p class="state">{_text(result.error)}</p>' if result.error else ""
    return (
        f'<details open id="{name}" data-file="{name}"{_data("rule", codes)}{_data("state", states)}>\n'
        f"<summary><h3>{_text(result.path)}</h3> {_text(said)}</summary>\n"
        f"{error}{_diff(result, found, notes)}\n</details>"
    )


def _data(name: str, values: str) -> str:
    return f' data-{name}="{_text(values)}"' if values else ""


def _note(result: Result, name: str, number: int, state: str, finding: Finding) -> str:
    code = f'<a href="#{_text(finding.code)}">{_text(finding.code)}</a>'
    where = _text(place(result.cells, finding.line))
    return (
        f'<tr class="note {state}" id="{name}-{number}" data-rule="{_text(finding.code)}" data-state="{state}">'
        f'<td colspan="4">{where}: {code} <span class="state {state}">{_STATES[state]}</span>: {_text(finding.message)}'
        "</td></tr>"
    )


def _diff(result: Result, found: Sequence[tuple[str, Finding]], notes: dict[int, str]) -> str:
    """Both sides of what changes, and of what was said of other lines; findings stand above their lines."""
    before, after = (data.decode("utf-8", "replace").splitlines() for data in (result.before, result.after))
    if result.cells:  # the lines of a notebook's file are no lines of its code
        head, at = list(notes.values()), dict[int, list[str]]()
    else:
        head, at = [], {}
        for number, (_, finding) in enumerate(found):
            line = min(max(finding.line, 1), max(len(before), 1)) - 1
            at.setdefault(line, []).append(notes[number])
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    rows, last = head, (0, 0)
    for kind, i, i_end, j, j_end in _pieces(matcher.get_opcodes(), at):
        if (i, j) != last:
            rows.append('<tr class="gap"><td colspan="4"></td></tr>')
        last = i_end, j_end
        for step in range(max(i_end - i, j_end - j)):
            old, new = i + step if i + step < i_end else None, j + step if j + step < j_end else None
            if old is not None:
                rows += at.pop(old, [])
            rows.append(_row(kind, before, after, old, new))
    rows += [note for line in sorted(at) for note in at[line]]
    return f'<table class="diff">{_COLUMNS}{"".join(rows)}</table>'


def _pieces(
    opcodes: Sequence[tuple[str, int, int, int, int]], noted: dict[int, list[str]]
) -> Iterator[tuple[str, int, int, int, int]]:
    """What changes, and of what stays only what is near a change or has a note."""
    for position, (kind, i, i_end, j, j_end) in enumerate(opcodes):
        if kind != "equal":
            yield kind, i, i_end, j, j_end
            continue
        near = set(range(i, i + _AROUND)) if position else set()
        near |= set(range(i_end - _AROUND, i_end)) if position < len(opcodes) - 1 else set()
        for line in noted:
            near |= set(range(line - 1, line + 2))
        for line in range(i, i_end):
            if line in near:
                yield kind, line, line + 1, j + line - i, j + line - i + 1


def _row(kind: str, before: Sequence[str], after: Sequence[str], old: int | None, new: int | None) -> str:
    one, other = "" if old is None else before[old], "" if new is None else after[new]
    both = kind == "replace" and old is not None and new is not None
    start, end = _common(one, other) if both else (0, 0)
    cells = []
    for side, number, text in (("old", old, one), ("new", new, other)):
        marked = _text(text)
        if both and (start or end):
            stop = len(text) - end
            marked = f"{_text(text[:start])}<b>{_text(text[start:stop])}</b>{_text(text[stop:])}"
        changed = f" {side}" if kind != "equal" and number is not None else ""
        shown = "" if number is None else number + 1
        cells.append(f'<td class="number">{shown}</td><td class="code{changed}">{marked}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _common(one: str, other: str) -> tuple[int, int]:
    """How many characters two lines begin and end with alike."""
    most = min(len(one), len(other))
    start = next((n for n in range(most) if one[n] != other[n]), most)
    end = next((n for n in range(most - start) if one[-1 - n] != other[-1 - n]), most - start)
    return start, end


def _explanation(code: str) -> str:
    rule = BY_CODE.get(code)
    title, text = (rule.title, rule.explanation.strip()) if rule is not None else ("", "")
    return (
        f'<details id="{_text(code)}" data-rule="{_text(code)}"><summary>{_text(code)}: {_text(title)}</summary>'
        f'<pre class="explanation">{_text(text)}</pre></details>'
    )
