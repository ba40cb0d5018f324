"""Renders the rules, with their own examples as diffs, into markdown: ``python -m rewriter.docs``."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from rewriter.rules import RULES
from rewriter.rules.rule import Example, Rule


def rules_markdown() -> str:
    """One section a rule: what it does, why, when it refuses, and its examples as ``-/+`` diffs."""
    return "\n".join(section for rule in RULES for section in _section(rule)).rstrip() + "\n"


def explain(rule: Rule) -> str:
    """A rule for the terminal."""
    parts = [f"{rule.code}: {rule.title}", "", rule.explanation.strip()]
    for example in rule.examples:
        parts.extend(["", example_diff(example).rstrip() or example.before.rstrip() + "\n(left as it is)"])
    return "\n".join(parts) + "\n"


def _section(rule: Rule) -> Iterator[str]:
    yield f"#### {rule.code}: {rule.title}"
    yield ""
    body = rule.explanation.strip().splitlines()
    yield (
        "\n".join(line for line in body[1:])
        .strip()
        .replace("\nWhat:", "\n\nWhat:")
        .replace("\nWhy:", "\n\nWhy:")
        .replace("\nRefuses when:", "\n\nRefuses when:")
    )
    yield ""
    for example in rule.examples:
        if example.after:
            yield f"```diff\n{example_diff(example)}```\n"


def example_diff(example: Example) -> str:
    """The lines that change, with a little around them, without file names and positions."""
    before, after = example.before.splitlines(), (example.after or example.before).splitlines()
    lines = list(difflib.unified_diff(before, after, lineterm="", n=2))[2:]
    return "".join(f"{line}\n" for line in lines if not line.startswith("@@"))


if __name__ == "__main__":
    print(rules_markdown(), end="")
