"""Where scripts name a GPU by its number: ``torch.device("cuda:0")``, ``.cuda(args.gpu)``, ``set_device(0)``.

Each rank has one GPU.  A program that knows of ranks names its own by what the launch says; any other names one and the
same on all ranks.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted, walk
from rewriter.analyze.training.scripts import Scripts

_NAMED = re.compile(r"cuda:(\d*)")
_KNOWS_RANKS = ("LOCAL_RANK", "local_rank", "SLURM_LOCALID", "init_process_group", "spawn(", "start_processes(")
_RANK = re.compile(r"(?:^|_)(?:rank|procid|process_?index)$", re.I)
_DEEP = 3
_CHOOSING = {"torch.cuda.set_device", "torch.cuda.device"}
_ASKING = re.compile(
    r"torch\.cuda\.(?:synchronize|mem_get_info|utilization|(?:get_device|max_memory|memory|reset_)\w*)$"
)
_OPTIONS = re.compile(r"^(?:.*_)?(?:arg|opt|option|config|conf|cfg|hparam|hp|param|flag|setting)s?$", re.I)
_GPU = re.compile(r"(?:^|_)gpus?(?:_?(?:id|idx|index|num|no))?s?$", re.I)
_HOLDS_DEVICE = re.compile(r"(?:^|_)dev(?:ice)?$", re.I)


@dataclass(frozen=True, slots=True)
class GpuName:
    """A place that names a GPU, its number where it is written there, and whether settings may name none at all.

    ``asks`` says that nothing is put on the GPU: ``torch.cuda.memory_allocated(0)``.
    """

    node: ast.expr
    number: int | None
    perhaps: bool = False
    asks: bool = False


class GpuNames:
    """Answers for all programs of a project."""

    def __init__(self, scripts: Scripts) -> None:
        self.scripts, self.project = scripts, scripts.project
        self._found: dict[File, list[GpuName]] = {}

    def of(self, file: File) -> list[GpuName]:
        if file not in self._found:
            self._found[file] = list(self._names(file))
        return self._found[file]

    def are_shared(self, program: File) -> bool:
        """Whether a program names a GPU, and cannot know which one is its rank's."""
        reached = self.scripts.reach(program)
        if self.scripts.started or self.scripts.was_parallel(program):
            return False
        if any(file.mentions(word) for file in reached for word in _KNOWS_RANKS):
            return False
        named = [(file, name) for file in reached for name in self.of(file) if not name.asks]
        if any(_is_of_rank(file, name.node) for file, name in named):
            return False
        names = [name for _, name in named]
        if any(not name.perhaps for name in names):
            return True
        return bool(names) and not any(_says_cuda(file) for file in reached)

    def numbers(self, file: File) -> set[int]:
        """The numbers written in the programs that a file is part of, where none of these knows of ranks."""
        programs = [program for program in self.scripts.programs if file in self.scripts.reach(program)]
        if not all(map(self.are_shared, programs)):
            return set()
        reached = {other for program in programs for other in self.scripts.reach(program)}
        names = [name for other in reached for name in self.of(other) if not name.asks]
        return {name.number for name in names if name.number is not None}

    def _names(self, file: File) -> Iterator[GpuName]:
        for node in file.nodes:
            match node:
                case ast.Constant(value=str(text)) if (found := _NAMED.match(text)) and " " not in text:
                    if not _is_key(file, node):
                        whole = bool(found[1]) and found[0] == text and not _is_choice(file, node)
                        yield GpuName(node, int(found[1]) if whole else None)
                case ast.Call(func=ast.Attribute(attr="cuda"), args=[given, *_]):
                    yield from _by_number(given)
                case ast.Call(func=ast.Attribute(attr="to"), args=[given, *_]) | ast.keyword("device", given):
                    yield from _by_option(given)
                case ast.Call():
                    yield from self._by_call(file, node)

    def _by_call(self, file: File, call: ast.Call) -> Iterator[GpuName]:
        called = self.project.external(file, call.func)
        if called in _CHOOSING and len(call.args) == 1:
            yield from _by_number(call.args[0])
        elif called == "torch.device":
            numbers = [*call.args[1:], *(keyword.value for keyword in call.keywords if keyword.arg == "index")]
            for given in numbers:
                yield from _by_number(given)
            for given in () if numbers else call.args:
                yield from _by_option(given)
        elif called is not None and _ASKING.match(called):
            for given in call.args:
                yield from (GpuName(name.node, name.number, asks=True) for name in _by_number(given))


def _is_of_rank(file: File, node: ast.expr, deep: int = 0) -> bool:
    """Whether a GPU is named by a rank: ``f"cuda:{rank}"``, ``.cuda(gpu)`` where ``gpu = dist.get_rank() % count``."""
    for parent in file.names.ancestors(node):
        made = isinstance(parent, (ast.JoinedStr, ast.FormattedValue, ast.BinOp)) or (
            isinstance(parent, ast.Attribute) and parent.attr == "format"
        )
        if not made and not (isinstance(parent, ast.Call) and parent.func is node):
            break
        assert isinstance(parent, ast.expr)
        node = parent
    for item in walk(node):
        match item:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Constant(value=str(name)) if _RANK.search(name):
                return True
            case ast.Name() if deep < _DEEP:
                if any(_is_of_rank(file, value, deep + 1) for value in file.names.values_of(item)):
                    return True
    return False


def _is_key(file: File, node: ast.expr) -> bool:
    """Whether it is what a file's tensors were on: ``map_location={"cuda:1": "cuda:0"}``."""
    parent = file.names.parents[node]
    return isinstance(parent, ast.Dict) and node in parent.keys


def _is_choice(file: File, node: ast.expr) -> bool:
    """Whether it is one of several GPUs that an option may name: ``choices=["cuda:0", "cuda:1"]``."""
    among = file.names.parents[node]
    parent = file.names.parents.get(among)
    named = [n for n in walk(among) if isinstance(n, ast.Constant) and _NAMED.match(str(n.value))]
    return isinstance(parent, ast.keyword) and parent.arg == "choices" and len(named) > 1


def _says_cuda(file: File) -> bool:
    """Whether a file names the kind of device alone, as settings do then: ``default="cuda"``."""
    return any(isinstance(node, ast.Constant) and node.value == "cuda" for node in file.nodes)


def _by_number(given: ast.expr) -> Iterator[GpuName]:
    """What is given as a number, or by a name that is none of a device, which is named where it is made."""
    match given:
        case ast.Constant(value=bool() | str() | None):
            return
        case ast.Constant(value=int(number)):
            yield GpuName(given, number)
        case ast.Name() | ast.Attribute() if _HOLDS_DEVICE.search((dotted(given) or "").split(".")[-1]):
            return
        case _:
            yield GpuName(given, None)


def _by_option(given: ast.expr) -> Iterator[GpuName]:
    """A number, ``args.gpu``, and ``config["device"]``, which the launch or a file of settings may say."""
    match given:
        case ast.Constant():
            yield from _by_number(given)
        case ast.Attribute(value=holder, attr=name) | ast.Subscript(value=holder, slice=ast.Constant(value=str(name))):
            root = (dotted(holder) or "").split(".")
            if any(map(_OPTIONS.search, root)) and (_HOLDS_DEVICE.search(name) or _GPU.search(name)):
                yield GpuName(given, None, perhaps=not _GPU.search(name))
        case ast.Name(id=name) if _GPU.search(name):
            yield GpuName(given, None)
