"""Which containers are stacks of blocks, and what becomes of the loops over them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cached_property

from rewriter.analyze.model.call_form import CallForm, call_form
from rewriter.analyze.model.checkpoints import is_checkpoint
from rewriter.analyze.model.containers import Containers
from rewriter.analyze.model.elements import Element
from rewriter.analyze.model.loops import Loop, is_chain
from rewriter.analyze.model.stack import SINGLE_LAYERS, Left, Stack, reason_against
from rewriter.analyze.read.classes import Classes
from rewriter.analyze.read.file import ClassInfo, File, FunctionInfo
from rewriter.analyze.read.nodes import walk
from rewriter.analyze.read.project import Project

_CONTAINER_WORDS = (b"ModuleList", b"Sequential", b"BlockList", b"ModuleDict")
NO_MODULES = re.compile(r"hooks?$|transforms?$|metric|callback|loss", re.I)
_CACHE = re.compile(r"(?:^|(?<!hidden)_)(?:past|cache|kv|incremental_state|inference_params|state)s?(?:_|$)", re.I)
# ``model.encoder.layers = nn.ModuleList(...)``, by whoever has the model, and ``setattr(model, "layers", ...)``
_REPLACED = re.compile(
    rb"(?:([\w.\[\]]+)\.(\w+)\s*=\s*(?:\w+\.)*(?:ModuleList|Sequential)\()|\bsetattr\(\s*[\w.]+,\s*[\"'](\w+)[\"']"
)


class Stacks:
    """Stacks of a project; ``chosen`` holds patterns of ``Class.path`` that the user names as stacks."""

    def __init__(self, project: Project, classes: Classes, chosen: tuple[str, ...] = ()) -> None:
        self.project = project
        self.classes = classes
        self.containers = Containers(classes)
        self.chosen = chosen
        self._names: dict[File, list[str]] = {}
        self.left: list[Left] = []
        self.loops: list[Loop] = []
        self.inside: dict[ClassInfo, Stack] = {}  # classes that are parts of a stack's blocks
        self.found = self._outermost(list(self._candidates()))
        for stack in self.found:
            self._decide_loops(stack)
        self._note_others()

    def names(self, file: File) -> tuple[str, ...]:
        """``Class.path`` of every container of modules that a file's classes make, stack or not."""
        return tuple(self._names.get(file, ()))

    def _modules(self) -> Iterator[ClassInfo]:
        for file in self.project:
            data = file.source.data
            if any(word in data for word in _CONTAINER_WORDS) or (b"for " in data and file.convert):
                for info in self.classes.all(file):
                    if self.classes.kind(info) in {"module", "distributed"}:
                        yield info

    def _candidates(self) -> Iterator[Stack]:
        loops = self.containers.loops
        owners: dict[ClassInfo, None] = {}
        for info in list(self._modules()):
            owners[info] = None
            if info.file.convert:
                self.loops.extend(loops[info])
                if loops[info]:  # a base that is read only now may make the list
                    owners.update(dict.fromkeys(self.classes.ancestors(info)))
        for info in owners:
            for path, builds in self.containers.of(info).items():
                family = [info, *self.classes.descendants(info), *self.classes.ancestors(info)]
                over = [loop for member in family for loop in loops[member] if loop.path == path]
                stack = Stack(info, path, builds, over)
                self._names.setdefault(info.file, []).append(stack.name)
                reason = reason_against(stack, self.chosen)
                if not reason:
                    yield stack
                else:
                    for loop in over:
                        if is_chain(loop) and loop.file.convert:
                            self.left.append(Left(loop.file, loop.node, reason, loop.path))

    def _outermost(self, stacks: list[Stack]) -> list[Stack]:
        """Drop stacks whose owner is itself part of another stack's block."""
        inside = self.inside
        for stack in stacks:
            for build in stack.builds:
                for element in build.elements:
                    for made in self._made(element.file or build.file, element):
                        for part in self._parts(made):
                            inside.setdefault(part, stack)
        kept = []
        for stack in stacks:
            outer = inside.get(stack.owner)
            already = any(build.is_stack_already for build in stack.builds)
            if outer is None or outer is stack or already:
                kept.append(stack)
                continue
            for loop in stack.loops:
                self.left.append(Left(loop.file, loop.node, f"it runs inside a block of {outer.name}", loop.path))
        return kept

    def _made(self, file: File, element: Element) -> Iterator[ClassInfo]:
        """Project classes that an expression for a member constructs: of a Sequential, those of its parts."""
        if element.cls is not None:
            yield element.cls
        for node in walk(element.node):
            found = self.project.resolve(file, node.func) if isinstance(node, ast.Call) else None
            if isinstance(found, FunctionInfo):
                yield from self._returned(found)
            elif isinstance(found, ClassInfo) and self.classes.is_module(found):
                yield found

    def _returned(self, function: FunctionInfo) -> Iterator[ClassInfo]:
        """The classes of which a factory function returns new objects."""
        for node in walk(function.node):
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
                found = self.project.resolve(function.file, node.value.func)
                if isinstance(found, ClassInfo) and self.classes.is_module(found):
                    yield found

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

    def _note_others(self) -> None:
        """Chains over lists that no class of the project is seen to make."""
        seen = {left.node for left in self.left} | {loop.node for stack in self.found for loop in stack.loops}
        for loop in self.loops:
            called = any(
                loop.is_element(call.func) or is_checkpoint(loop.file, call, self.project) for call in loop.calls()
            )
            if called and is_chain(loop) and loop.node not in seen and not NO_MODULES.search(loop.path):
                away = "belongs to another object" if "." in loop.path else "is not made in this class or its bases"
                single = self.containers.kinds_of_attributes(loop.owner, loop.path) == {"leaf"}
                reason = SINGLE_LAYERS if single else f"the list {away}"
                self.left.append(Left(loop.file, loop.node, reason, loop.path))

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
                self.left.append(Left(loop.file, loop.node, reason, loop.path))
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
        if not stack.whole:
            return f"{stack.path} is no list of blocks alone; its blocks are"
        for file in self._replacing.get(stack.path.split(".")[-1].encode(), ()):
            if file is stack.owner.file or stack.owner.file in self.project.imported(file):
                return f"{file.path.name} gives {stack.path} of an object something else"
        return ""

    @cached_property
    def _replacing(self) -> dict[bytes, list[File]]:
        """The files that replace an attribute of another object by a list of modules, by the attribute's name."""
        found: dict[bytes, list[File]] = {}
        for file in self.project:
            if not any(file.mentions(text) for text in ("ModuleList(", "Sequential(", "setattr(")):
                continue  # it takes far longer to look for the whole
            for owner, one, other in _REPLACED.findall(file.source.data):
                if owner not in (b"self", b"cls"):
                    found.setdefault(one or other, []).append(file)
        return found

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


def _declared_width(call: ast.expr) -> int:
    """The ``num_hidden`` that a TransformerBlockList is built with; 0 if it is not a constant."""
    if isinstance(call, ast.Call):
        for keyword in call.keywords:
            if keyword.arg == "num_hidden":
                value = keyword.value
                return value.value if isinstance(value, ast.Constant) and isinstance(value.value, int) else 0
    return 1
