"""Broken and odd variants of known files: the converter never crashes, and what compiled still does."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from survey.corpus.files import untouched_lines_survive

from rewriter.analyze.facts import Facts
from rewriter.analyze.read.project import Project
from rewriter.analyze.read.source import Source
from rewriter.convert import apply_plan, convert_text
from rewriter.plan import Options, make_plans
from rewriter.rules import RULES
from rewriter.types import InputError

from .rules.model.test_stacks import HEAD, KEPT, STAYS

SOURCES = [example.before for rule in RULES for example in rule.examples]
SOURCES += [path.read_text() for path in sorted((Path(__file__).parent / "fixtures").glob("*.py"))]
SOURCES += [HEAD.format(build=f"        {build}", loop="        pass") for build in STAYS.values()]
SOURCES += [
    HEAD.format(
        build="        " + build.replace("\n", "\n        "), loop="        " + loop.replace("\n", "\n        ")
    )
    for build, _, loop in KEPT.values()
]
CASES_PER_GROUP = 150
PATH = Path("fuzz.py")
Lines = list[str]
Mutation = Callable[[random.Random, Lines], None]


def delete(draw: random.Random, lines: Lines) -> None:
    del lines[draw.randrange(len(lines))]


def duplicate(draw: random.Random, lines: Lines) -> None:
    at = draw.randrange(len(lines))
    lines.insert(at, lines[at])


def swap(draw: random.Random, lines: Lines) -> None:
    one, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]


def rename(draw: random.Random, lines: Lines) -> None:
    names = re.findall(r"[A-Za-z_]\w*", "\n".join(lines))
    if names:
        old, new = draw.choice(names), draw.choice([*names, "bmt", "é", "nn", "torch", "self"])
        lines[:] = [re.sub(rf"\b{old}\b", new, line) for line in lines]


def indent(draw: random.Random, lines: Lines) -> None:
    at = draw.randrange(len(lines))
    lines[at] = draw.choice(["    ", "\t", " ", "\x0c"]) + lines[at]


def dedent(draw: random.Random, lines: Lines) -> None:
    at = draw.randrange(len(lines))
    lines[at] = lines[at][draw.choice([1, 4]) :]


def comment(draw: random.Random, lines: Lines) -> None:
    at = draw.randrange(len(lines))
    lines[at] += draw.choice(
        ["  # über", "  # bmt: skip", "  # type: ignore", "  # bmt: skip[BMT003]", " # \U0001f642"]
    )


def decorate(draw: random.Random, lines: Lines) -> None:
    places = [at for at, line in enumerate(lines) if line.lstrip().startswith(("def ", "class "))]
    if places:
        at = draw.choice(places)
        space = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        lines.insert(at, space + draw.choice(["@torch.no_grad()", "@staticmethod", "@(\n    wrap\n)", "@f  # why"]))


def continuation(draw: random.Random, lines: Lines) -> None:
    at = draw.randrange(len(lines))
    spaces = [match.start() for match in re.finditer(" ", lines[at].rstrip()) if lines[at][: match.start()].strip()]
    if spaces:
        cut = draw.choice(spaces)
        lines[at] = lines[at][:cut] + " \\\n  " + lines[at][cut + 1 :]


def brackets(draw: random.Random, lines: Lines) -> None:
    at = draw.randrange(len(lines))
    lines[at] = re.sub(r"\(", draw.choice(["(\n", "(  # opens\n", "( "]), lines[at], count=1)


def join(draw: random.Random, lines: Lines) -> None:
    at = draw.randrange(len(lines))
    if at + 1 < len(lines):
        lines[at : at + 2] = [lines[at] + "; " + lines[at + 1].lstrip()]


def one_line(draw: random.Random, lines: Lines) -> None:
    places = [at for at in range(len(lines) - 1) if lines[at].endswith(":")]
    if places:
        at = draw.choice(places)
        lines[at : at + 2] = [lines[at] + " " + lines[at + 1].lstrip()]


def form_feed(draw: random.Random, lines: Lines) -> None:
    lines.insert(draw.randrange(len(lines)), "\x0c")


def text_around(draw: random.Random, lines: Lines) -> None:
    at = draw.randrange(len(lines))
    lines.insert(at, draw.choice(['"""', "'''", "x = '''", "f'{", "if True:", "try:", "else:", "async def f():"]))


def truncate(draw: random.Random, lines: Lines) -> None:
    text = "\n".join(lines)
    lines[:] = text[: draw.randrange(len(text) + 1)].split("\n")


MUTATIONS: list[Mutation] = [
    delete, duplicate, swap, rename, rename, indent, dedent, comment, comment, decorate, decorate, continuation,
    brackets, join, one_line, form_feed, text_around, truncate,
]  # fmt: skip


def mutated(seed: int) -> str:
    """A variant of one of the sources, the same for the same seed."""
    draw = random.Random(seed)
    lines = draw.choice(SOURCES).split("\n")
    for _ in range(draw.choice([1, 1, 2, 3, 6])):
        if lines:
            draw.choice(MUTATIONS)(draw, lines)
    return draw.choice(["\n", "\n", "\r\n"]).join("\n".join(lines).split("\n"))


def compiles(data: bytes) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(data, "fuzz", "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            return False
    return True


def check(text: str, options: Options) -> None:
    project = Project()
    try:
        source = Source(PATH, text.encode())
        file = project.add(source)
        plan = make_plans([file], Facts(project, options.blocks), options)[file]
    except InputError:
        assert not compiles(text.encode())
        return
    result = apply_plan(file, plan)
    if not compiles(text.encode()):
        return  # what compiles only in part (a return outside a function) is converted as far as it parses
    if "accelerat" in text or "deepspeed" in text:  # an ordinary script first: its lines are other ones
        result = convert_text(text, options)
        assert not result.error, result.error
        assert compiles(result.after) and convert_text(result.after.decode(), options).after == result.after
        return
    if "does not read" in result.error:
        assert ("\x0c" in text or "\t" in text) and not result.changed
        return
    assert not result.error, result.error
    assert compiles(result.after)
    assert untouched_lines_survive(file, plan, result.after)
    again = convert_text(result.after.decode(), options)
    assert not again.error, again.error
    assert again.after == result.after


@pytest.mark.parametrize("group", [*range(3), *(pytest.param(group, marks=pytest.mark.long) for group in range(3, 8))])
def test_variants(group: int) -> None:
    for seed in range(group * CASES_PER_GROUP, (group + 1) * CASES_PER_GROUP):
        text = mutated(seed)
        try:
            check(text, Options(unsafe=seed % 3 == 0))
        except Exception as error:
            raise AssertionError(f"seed {seed}\n{text}") from error


def test_most_variants_compile() -> None:
    """The check is worth little on files that are broken before."""
    assert sum(compiles(mutated(seed).encode()) for seed in range(200)) > 80
