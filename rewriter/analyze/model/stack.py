"""One stack of blocks, and why a list of modules is none."""

from __future__ import annotations

import ast
import fnmatch
import re
from dataclasses import dataclass, field

from rewriter.analyze.model.call_form import CallForm
from rewriter.analyze.model.elements import FROM_ELSEWHERE, KEPT, Build
from rewriter.analyze.model.loops import SETUP, Loop, is_chain, runs_parts, takes_apart
from rewriter.analyze.read.file import ClassInfo, File
from rewriter.analyze.read.nodes import self_path, walk

_NOT_BLOCKS = re.compile(r"head|expert|norm|embed|pool|loss|lora|router|gate|classifier|codebook|quantiz", re.I)
SINGLE_LAYERS = "the members are single torch layers, not blocks"
_MARK = re.compile(r"#\s*bmt:\s*blocks\b")


@dataclass(eq=False)
class Stack:
    """All builds of one attribute that holds a stack of blocks."""

    owner: ClassInfo
    path: str
    builds: list[Build]
    loops: list[Loop]
    num_hidden: int = 1
    use_checkpoint: bool = True
    whole: bool = True  # False: the container stays what it is, its members become blocks
    calls: dict[ast.For, CallForm] = field(default_factory=dict)
    reasons: dict[ast.For, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.owner.name}.{self.path}"

    def key(self) -> str:
        return f"{self.owner.file.place}\0{self.owner.node.lineno}\0{self.path}"

    def requirement(self) -> tuple[str, ...]:
        """What an edit that relies on the stack requires: its conversion, if it is not converted already."""
        return () if all(build.is_stack_already for build in self.builds) else (self.key(),)


@dataclass(frozen=True, eq=False)
class Left:
    """A chain loop that stays as it is, and why; ``path`` is the list's, as a loop may run over several."""

    file: File
    node: ast.AST
    reason: str
    path: str = ""


def reason_against(stack: Stack, chosen: tuple[str, ...]) -> str:
    """Why a container is not a stack of blocks; empty if it is one."""
    reason = _reason_against(stack, chosen)
    if not reason and not stack.whole and any(build.form in {"given", "attribute"} for build in stack.builds):
        return "the list is made elsewhere, and not of blocks alone"
    return reason


def _reason_against(stack: Stack, chosen: tuple[str, ...]) -> str:
    if any(build.container == KEPT for build in stack.builds):
        stack.whole = False
    if any(build.is_stack_already for build in stack.builds):
        return ""
    name = f"{stack.owner.name}.{stack.path}"
    if any(fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(stack.path, pattern) for pattern in chosen):
        return ""
    if any(_MARK.search(build.file.source.comment(build.call.lineno)) for build in stack.builds):
        return ""
    kinds = {element.kind for build in stack.builds for element in build.elements}
    blocks = bool(kinds & {"block", "wrapped"})
    chains = [loop for loop in stack.loops if is_chain(loop)]
    if any(build.container == KEPT for build in stack.builds):
        if not blocks and not (kinds == {"unknown"} and chains):
            return "what the container holds is not known to be blocks"
    elif "container" in kinds:
        return _against_groups(stack)
    elif kinds & {"leaf", "none"} and not blocks:
        return SINGLE_LAYERS
    if _is_odd(stack):
        return _is_odd(stack)
    if "none" in kinds:
        stack.whole = False
    if all(build.container == "torch.nn.Sequential" for build in stack.builds):
        known = kinds <= {"block", "wrapped"} and kinds and all(b.form != "other" for b in stack.builds)
        filled = kinds or any(b.form == "other" for b in stack.builds)
        likely = chains and filled and kinds <= {"block", "wrapped", "unknown"}
        if (known or likely) and not _has_names(stack) and _called_whole(stack):
            return ""
        stack.whole = False
        if blocks and chains:
            return ""
        return "what the Sequential holds is not known" if likely else "a Sequential of other things than blocks"
    if not chains and not (blocks and any(b.container == KEPT for b in stack.builds) and _is_called(stack)):
        return "no loop carries anything from member to member"
    if kinds <= {"external", "unknown"} and any(build.form == "other" for build in stack.builds):
        return "what the list holds is not known"
    return _bypass(chains)


def _is_odd(stack: Stack) -> str:
    """What speaks against a list whatever its members are."""
    shared = any(element.kind == "shared" for build in stack.builds for element in build.elements)
    if shared or any(build.form == "repeated" for build in stack.builds):
        return "the same object is in the list more than once, or held elsewhere, too"
    return "by its name the list holds no blocks" if _NOT_BLOCKS.search(stack.path.split(".")[-1]) else ""


def _against_groups(stack: Stack) -> str:
    """Why a list of groups of modules, such as pairs, is no stack: a group is whole while a loop has it in hand."""
    if any(build.container != "torch.nn.ModuleList" or build.form in FROM_ELSEWHERE for build in stack.builds):
        return "the members are groups of modules, not blocks"
    if not any(takes_apart(loop) or runs_parts(loop) for loop in stack.loops):
        return "the members are groups of modules, and no loop takes them apart"
    return _is_odd(stack)


def _is_called(stack: Stack) -> bool:
    """Whether the container is called, as a container class with a forward of its own."""
    for function in stack.owner.methods.values():
        me = function.args.args[0].arg if function.args.args else ""
        for node in walk(function):
            if isinstance(node, ast.Call) and self_path(node.func, me) == stack.path:
                return True
    return False


def _has_names(stack: Stack) -> bool:
    """Whether members of a Sequential have names, which are its state-dict keys."""
    added = [a for build in stack.builds for a in build.appends if isinstance(a, ast.Call)]
    names = {call.func.attr for call in added if isinstance(call.func, ast.Attribute)}
    return "add_module" in names or any(build.form == "named" for build in stack.builds)


def _called_whole(stack: Stack) -> bool:
    """Whether a Sequential is only called, never taken apart."""
    for function in stack.owner.methods.values():
        me = function.args.args[0].arg if function.args.args else ""
        for node in walk(function):
            if isinstance(node, ast.Call) and self_path(node.func, me) == stack.path:
                return len(node.args) == 1 and not node.keywords
    return any(is_chain(loop) for loop in stack.loops)


def _bypass(chains: list[Loop]) -> str:
    """Whether a loop that calls members also calls parts of them: blocks would stay whole then."""
    for loop in chains:
        for statement in loop.node.body:
            for node in walk(statement):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                called, method = node.func.value, node.func.attr
                if SETUP.match(method) or method == "__call__":
                    continue
                if loop.is_element(called) and method != "forward":
                    return f"a loop calls {ast.unparse(called)}.{method}(...) beside the block"
                if isinstance(called, ast.Attribute) and loop.is_element(called.value):
                    return f"a loop reaches into the block ({ast.unparse(called)}.{method})"
    return ""
