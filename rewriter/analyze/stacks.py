"""Which containers are stacks of blocks, and what becomes of the loops over them."""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from rewriter.analyze.classes import Classes
from rewriter.analyze.containers import Containers
from rewriter.analyze.elements import Build, self_path
from rewriter.analyze.loops import CallForm, Loop, call_form, find_loops, is_chain
from rewriter.analyze.names import walk
from rewriter.analyze.project import ClassInfo, File, Project

_NOT_BLOCKS = re.compile(r"head|expert|norm|embed|pool|loss|lora|router|gate|classifier|codebook|quantiz", re.I)
_MARK = re.compile(r"#\s*bmt:\s*blocks\b")
_SETUP = re.compile(
    r"^_?(?:init|reset|set_|get_|freeze|unfreeze|enable|disable|load|save|prune|no_|group_|tie|post_init)"
)
_CACHE = re.compile(r"(?:^|_)(?:past|cache|kv|incremental_state|inference_params|layer_past|state)s?(?:_|$)", re.I)


@dataclass(eq=False)
class Stack:
    """All builds of one attribute that holds a stack of blocks."""

    owner: ClassInfo
    path: str
    builds: list[Build]
    loops: list[Loop]
    num_hidden: int = 1
    use_checkpoint: bool = True
    calls: dict[ast.For, CallForm] = field(default_factory=dict)
    reasons: dict[ast.For, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.owner.name}.{self.path}"

    def key(self) -> str:
        return f"stack:{self.owner.file.path}:{self.owner.node.lineno}:{self.path}"

    def requirement(self) -> tuple[str, ...]:
        """What an edit that relies on the stack requires: its conversion, if it is not converted already."""
        return () if all(build.is_stack_already for build in self.builds) else (self.key(),)


@dataclass(frozen=True, eq=False)
class Left:
    """A chain loop or a container that stays as it is, and why."""

    file: File
    node: ast.AST
    reason: str
    kind: Literal["loop", "container"] = "loop"


class Stacks:
    """Stacks of a project; ``chosen`` holds patterns of ``Class.path`` that the user names as stacks."""

    def __init__(self, project: Project, classes: Classes, chosen: tuple[str, ...] = ()) -> None:
        self.project = project
        self.classes = classes
        self.containers = Containers(classes)
        self.chosen = chosen
        self.left: list[Left] = []
        self.loops: list[Loop] = []
        self.inside: dict[ClassInfo, Stack] = {}  # classes that are parts of a stack's blocks
        self.found = self._outermost(list(self._candidates()))
        for stack in self.found:
            self._decide_loops(stack)

    def _modules(self) -> Iterator[ClassInfo]:
        for file in self.project:
            if (
                b"ModuleList" in file.source.data
                or b"Sequential" in file.source.data
                or b"BlockList" in file.source.data
            ):
                for info in self.classes.all(file):
                    if self.classes.kind(info) in {"module", "distributed"}:
                        yield info
            elif b"for " in file.source.data and file.convert:
                for info in self.classes.all(file):
                    if self.classes.kind(info) in {"module", "distributed"} and self.classes.ancestors(info):
                        yield info

    def _candidates(self) -> Iterator[Stack]:
        owners = list(self._modules())
        loops = _Loops()
        for info in owners:
            if info.file.convert:
                self.loops.extend(loops[info])
        for info in owners:
            for path, builds in self.containers.of(info).items():
                family = [info, *self.classes.descendants(info), *self.classes.ancestors(info)]
                over = [loop for member in family for loop in loops[member] if loop.path == path]
                stack = Stack(info, path, builds, over)
                reason = self._reason_against(stack)
                if not reason:
                    yield stack
                else:
                    for loop in over:
                        if is_chain(loop) and loop.owner is info:
                            self.left.append(Left(loop.file, loop.node, reason))

    def _reason_against(self, stack: Stack) -> str:
        """Why a container is not a stack of blocks; empty if it is one."""
        if any(build.is_stack_already for build in stack.builds):
            return ""
        name = f"{stack.owner.name}.{stack.path}"
        if any(
            fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(stack.path, pattern) for pattern in self.chosen
        ):
            return ""
        if any(_MARK.search(build.file.source.comments.get(build.call.lineno, "")) for build in stack.builds):
            return ""
        kinds = {element.kind for build in stack.builds for element in build.elements}
        if "container" in kinds:
            return "the members are groups of modules, not blocks"
        if kinds & {"leaf", "none"}:
            return "the members are single torch layers, not blocks"
        if "shared" in kinds or any(build.form == "repeated" for build in stack.builds):
            return "the same object is in the list more than once"
        if _NOT_BLOCKS.search(stack.path.split(".")[-1]):
            return "by its name the list holds no blocks"
        chains = [loop for loop in stack.loops if is_chain(loop)]
        sequential = all(build.container == "torch.nn.Sequential" for build in stack.builds)
        if sequential:
            ready = kinds <= {"block", "wrapped"} and kinds and all(b.form != "other" for b in stack.builds)
            return "" if ready and self._called_whole(stack) else "a Sequential of other things than blocks"
        if not chains:
            return "no loop carries anything from member to member"
        if kinds <= {"external", "unknown"} and any(build.form == "other" for build in stack.builds):
            return "what the list holds is not known"
        return self._bypass(stack)

    def _called_whole(self, stack: Stack) -> bool:
        """Whether a Sequential is only called, never taken apart."""
        for function in stack.owner.methods.values():
            me = function.args.args[0].arg if function.args.args else ""
            for node in walk(function):
                if isinstance(node, ast.Call) and self_path(node.func, me) == stack.path:
                    return len(node.args) == 1 and not node.keywords
        return any(is_chain(loop) for loop in stack.loops)

    def _bypass(self, stack: Stack) -> str:
        """Whether a loop calls parts of a member instead of the member, which would then not be gathered."""
        for loop in stack.loops:
            if _SETUP.match(loop.function.name) or not loop.element:
                continue
            for statement in loop.node.body:
                for node in walk(statement):
                    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                        if loop.is_element(node.func.value) and not _SETUP.match(node.func.attr):
                            return f"a loop calls {loop.element}.{node.func.attr}(...) instead of the block"
                        if isinstance(node.func.value, ast.Attribute) and loop.is_element(node.func.value.value):
                            part = f"{node.func.value.attr}.{node.func.attr}"
                            return f"a loop reaches into the block ({loop.element}.{part})"
        return ""

    def _outermost(self, stacks: list[Stack]) -> list[Stack]:
        """Drop stacks whose owner is itself part of another stack's block."""
        inside = self.inside
        for stack in stacks:
            for build in stack.builds:
                for element in build.elements:
                    if element.cls is not None:
                        for part in self._parts(element.cls):
                            inside.setdefault(part, stack)
        kept = []
        for stack in stacks:
            outer = inside.get(stack.owner)
            already = any(build.is_stack_already for build in stack.builds)
            if outer is None or outer is stack or already:
                kept.append(stack)
                continue
            for loop in stack.loops:
                self.left.append(Left(loop.file, loop.node, f"it runs inside a block of {outer.name}"))
        return kept

    def _parts(self, info: ClassInfo) -> set[ClassInfo]:
        """Project module classes that a class constructs, at any depth, itself included."""
        found: set[ClassInfo] = set()
        queue = [info]
        while queue:
            current = queue.pop()
            if current in found:
                continue
            found.add(current)
            queue.extend(self.classes.ancestors(current))
            for node in walk(current.node):
                if isinstance(node, ast.Call):
                    used = self.project.resolve(current.file, node.func)
                    if isinstance(used, ClassInfo) and self.classes.is_module(used):
                        queue.append(used)
        return found

    # Loops -----------------------------------------------------------------------------------------------------

    def _decide_loops(self, stack: Stack) -> None:
        certain = self._always_a_stack(stack)
        widths: set[int] = set()
        for loop in stack.loops:
            if not is_chain(loop) or loop.node in stack.calls:
                continue
            if any(self._takes_cache(call) for call in loop.calls()):
                stack.use_checkpoint = False
            form = call_form(loop, self.project)
            if not isinstance(form, str) and form.checkpoint and not stack.use_checkpoint:
                form = "the blocks fill a cache, and the branch that saves memory stays"
            reason = form if isinstance(form, str) else certain or self._width_reason(stack, form, widths)
            reason = reason or ("the loop runs while the model is built" if loop.function.name == "__init__" else "")
            if reason or isinstance(form, str):
                stack.reasons[loop.node] = reason
                self.left.append(Left(loop.file, loop.node, reason))
            else:
                stack.calls[loop.node] = form
                widths.add(len(form.targets))
        if widths and not any(build.is_stack_already for build in stack.builds):
            stack.num_hidden = widths.pop()

    @staticmethod
    def _takes_cache(call: ast.Call) -> bool:
        """Whether a block gets a cache, which recomputation would fill twice."""
        values = [*call.args[1:], *(keyword.value for keyword in call.keywords)]
        names = [node.id for value in values for node in walk(value) if isinstance(node, ast.Name)]
        return any(_CACHE.search(name) and not name.startswith("use_") for name in names)

    def _always_a_stack(self, stack: Stack) -> str:
        """Whether every assignment of the attribute, in subclasses too, makes it a TransformerBlockList."""
        for member in (stack.owner, *self.classes.ancestors(stack.owner), *self.classes.descendants(stack.owner)):
            if stack.path in self.containers.other_assignments(member):
                return f"{member.name} also gives {stack.path} something else"
            if member is not stack.owner and stack.path in self.containers.of(member):
                return f"{member.name} builds {stack.path} too"
        containers = {build.container for build in stack.builds}
        if "torch.nn.Sequential" in containers and len(containers) > 1:
            return f"{stack.path} is sometimes a Sequential"
        return ""

    def _width_reason(self, stack: Stack, form: CallForm, widths: set[int]) -> str:
        width = len(form.targets)
        if widths and width not in widths:
            return "another loop over the list carries another number of values"
        existing = [build for build in stack.builds if build.is_stack_already]
        for build in existing:
            if _declared_width(build.call) != width:
                return "the list was built for another number of hidden values"
        if any(build.container == "torch.nn.Sequential" for build in stack.builds) and width != 1:
            return "a Sequential carries one value"
        return ""


class _Loops(dict[ClassInfo, list[Loop]]):
    """The loops of classes, found when first asked for."""

    def __missing__(self, info: ClassInfo) -> list[Loop]:
        self[info] = list(find_loops(info))
        return self[info]


def _declared_width(call: ast.expr) -> int:
    """The ``num_hidden`` that a TransformerBlockList is built with; 0 if it is not a constant."""
    if isinstance(call, ast.Call):
        for keyword in call.keywords:
            if keyword.arg == "num_hidden":
                value = keyword.value
                return value.value if isinstance(value, ast.Constant) and isinstance(value.value, int) else 0
    return 1
