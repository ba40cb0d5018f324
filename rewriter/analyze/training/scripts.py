"""Which files train or build models, where a script starts, and what its parts need."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Set
from functools import cached_property

from rewriter.analyze.read.circles import AnyCalled
from rewriter.analyze.read.classes import Classes
from rewriter.analyze.read.file import ClassInfo, External, File, FunctionInfo, ModuleRef
from rewriter.analyze.read.nodes import dotted, is_backward, loss_of, walk, walk_own
from rewriter.analyze.training.across import Across
from rewriter.analyze.training.batches import Batches
from rewriter.analyze.training.collectives import Collectives, Exit, Guard, as_guard, exits, guards
from rewriter.analyze.training.entries import DEFINITIONS, Entries
from rewriter.analyze.training.feeds import Feed, Feeds
from rewriter.analyze.training.handed import Handed, Held
from rewriter.analyze.training.instances import Instances
from rewriter.analyze.training.opened import goes_on, with_givers
from rewriter.analyze.training.rank_names import hand_ranks_on, is_rank
from rewriter.analyze.training.roles import Roles
from rewriter.analyze.training.settings_files import modules_in_settings
from rewriter.analyze.training.shares import Kinds, Loop, Place, Share, shares, taken_by
from rewriter.analyze.training.sums import Sums

_PARALLEL = (b"DistributedDataParallel", b"init_process_group", b"DistributedSampler")
_SHARING = (b"shard_batch", b"shard_loader")
_SAMPLERS = 3
_OF_RANKS = {"rank", "num_replicas", "world_size", "get_rank", "get_world_size"}
"""What a sampler is told, or asks for, that takes a rank's part of the data."""
DATA_PARALLEL = {
    "torch.nn.parallel.DistributedDataParallel", "torch.nn.DataParallel", "torch.nn.parallel.DataParallel",
}  # fmt: skip
_OF_MODELS = {
    "state_dict", "load_state_dict", "parameters", "named_parameters", "modules", "named_modules", "children",
    "named_children", "buffers", "named_buffers", "train", "eval", "forward", "zero_grad", "requires_grad_", "apply",
    "to", "half", "cpu", "cuda", "float",
}  # fmt: skip
_TRAINS = re.compile(rb"\.backward\(")
_FOLDER = re.compile(r"(?:\.{1,2}/)?[A-Za-z_]\w*(?:[./][A-Za-z_]\w*)*[./]?")


_LOADER = "torch.utils.data.DataLoader"


class Scripts:
    """Training scripts of a project and everything they import."""

    def __init__(self, classes: Classes) -> None:
        self.classes = classes
        self.project = classes.project
        hand_ranks_on(self.project)
        self.roles: dict[File, Roles] = _Roles(classes)
        self.collectives = Collectives(classes, self.roles, lambda: self.training, self._shares, self._gives_mean)
        self.feeds = Feeds(self.collectives)
        self.batches = Batches(self.collectives, self.feeds, self.is_fed)
        self.handed = Handed(self.collectives, self.feeds, self._taking, self._kinds)
        self.entry = Entries(classes, self.roles)
        self._steps = AnyCalled()
        self._reached: dict[File, set[File]] = {}
        self._imported_by: dict[File, set[File]] = {}
        self._programs_of: dict[File, set[File]] = {}
        self._is_parallel: dict[File, bool] = {}
        self._unguarded: dict[File, dict[ast.If, Guard]] = {}
        self._lifted: dict[File, dict[ast.If, Exit]] = {}
        self._sums: dict[File, Sums] = {}
        self._across: dict[File, Across] = {}

    def across(self, file: File) -> Across:
        """What looks across the items of a batch in a file."""
        if file not in self._across:
            self._across[file] = Across(file, self._drawn(file))
        return self._across[file]

    def _shares(self, file: File) -> dict[ast.expr, Share]:
        """What a file's loops make of a rank's share of a batch, and is to be the batch's."""
        if file not in self.training or self.started or self.is_parallel(file) or not self.shares_data(file):
            return {}
        drawn = self._drawn(file)
        places: dict[Place, bool] = dict.fromkeys(drawn, True)
        for loop in (node for node in file.nodes if isinstance(node, ast.For)):
            feeds = self._feeds_of.get(loop, [])
            if feeds:
                if any(feed.trained or feed.maybe for feed in feeds):
                    places[loop] = self._is_known(feeds)
            elif loop not in drawn and not self.was_parallel(file) and self.feeds.trains(file, loop):
                places[loop] = False
        if not self.was_parallel(file):
            places |= {place: True for place, held in self.handed.of(file).items() if held.known}
        return shares(file, places, lambda place: self._kinds(file, place, self._held(file, place)))

    def _held(self, file: File, place: Place) -> set[str]:
        """The names by which a loop or function has its batch."""
        held = self.handed.of(file).get(place)
        if held is not None:
            return held.names
        return taken_by(place, self.roles[file]) if isinstance(place, ast.For) else set()

    def _kinds(self, file: File, place: Place, held: set[str], deep: int = 0) -> Kinds:
        sums, keepers = self.sums(file), self.collectives.keepers

        def inside(function: FunctionInfo, given: set[str]) -> Kinds | None:
            if deep > 1 or function.file not in self.roles:
                return None
            kinds = self._kinds(function.file, function.node, given, deep + 1)
            kinds.totals_become_whole = self.handed.gets_shares(function.file, function.node)
            return kinds

        def shown_by(call: ast.Call) -> list[ast.expr]:
            return self.collectives.showing.given(file, call)

        averaged = self.collectives.made_of_averaged(file)
        return Kinds(file, self.roles[file], place, sums.of, sums.in_parts, held, keepers, inside, shown_by, averaged)

    def _taking(self, file: File) -> dict[Place, Held]:
        """The loops of a file that take a rank's share of each batch and train on it."""
        roles = self.roles[file]
        found: dict[Place, Held] = {loop: Held(names, True) for loop, names in self._drawn(file).items()}
        loaders = [feed for feeds in self._loaders.values() for feed in feeds]
        known = {call for feed in loaders if self._is_known([feed]) for call in feed.pulled}
        pulled = {call for feed in (*loaders, *self._sampled) if feed.trained for call in feed.pulled}
        for call, place, names in self.handed.pulled(file):
            if call in pulled or self.handed.goes_back(place):
                found.setdefault(place, Held(set(), call in known)).names.update(names)
        sampled = _by_loop(self._sampled)
        for node in file.nodes:
            if isinstance(node, ast.For) and (names := taken_by(node, roles)):
                feeds = self._feeds_of.get(node, []) + sampled.get(node, [])
                if any(feed.trained or feed.maybe for feed in feeds):
                    found[node] = Held(names | (found[node].names if node in found else set()), self._is_known(feeds))
                elif node not in found and not feeds and self.handed.goes_back(node):
                    found[node] = Held(names, False)
        return found

    @staticmethod
    def _is_known(feeds: list[Feed]) -> bool:
        """Whether a loop gets nothing but shares, of one loader."""
        return all(feed.trained and not feed.read and feed.direct for feed in feeds)

    def sums(self, file: File) -> Sums:
        """Which losses of a file are sums over the batch."""
        return self._sums.setdefault(file, Sums(file, self.classes, self.roles, self.collectives.instances))

    def _gives_mean(self, file: File, call: ast.Call, place: int) -> bool:
        """Whether a model or function of the project gives a mean over a batch, at a place of what it returns."""
        return self.sums(file).looks_into(call) and self.sums(file).in_parts(call, place) == "mean"

    @cached_property
    def summed(self) -> set[ast.Call]:
        """The backward calls of losses that are sums over a rank's share, and the calls that make those sums."""
        found: set[ast.Call] = set()
        for file in self.training:
            for call in file.calls:
                loss = loss_of(call)
                if loss is not None and self.over_shares(file, call) and self.sums(file).is_sum(loss):
                    found |= self.sums(file).sources | {call}
        return found

    @cached_property
    def divided(self) -> set[ast.Call]:
        """The calls that make sums which the losses of backward calls are the means of."""
        return {
            source
            for file in self.training
            for loss in filter(None, map(loss_of, file.calls))
            for source in self.sums(file).divided(loss)
        }

    def adding_items(self, file: File) -> list[ast.Call]:
        """The backward calls of losses that add up what may be the items of a rank's share of the batch."""
        return [
            call
            for call in file.calls
            if (loss := loss_of(call)) is not None
            and self.over_shares(file, call)
            and self.sums(file).may_add_items(loss)
        ]

    def over_shares(self, file: File, node: ast.AST) -> bool:
        """Whether a node stands in a loop that trains on a rank's share of each batch."""
        drawn = self._drawn(file)
        return any(parent in drawn or self.is_fed(parent) for parent in file.names.ancestors(node))

    def _drawn(self, file: File) -> dict[Loop, set[str]]:
        """The loops that get shares of batches without a loader, and the names that hold them."""
        return {} if self.started or self.is_parallel(file) else self.batches.loops(file)

    def is_fed(self, node: ast.AST) -> bool:
        """Whether a node is a loop over a loader's batches that trains on them."""
        feeds = self._feeds_of.get(node, []) if isinstance(node, ast.For) else []
        return any(feed.trained or feed.maybe for feed in feeds)

    @cached_property
    def _feeds_of(self) -> dict[ast.For, list[Feed]]:
        """The loaders that each loop goes through, as far as they are seen."""
        return _by_loop(feed for feeds in self._loaders.values() for feed in feeds)

    @cached_property
    def _sampled(self) -> list[Feed]:
        """Where the loaders go that share out their data already."""
        made = ((file, call) for file in self.training for call in self._makes_loader(file))
        return [self.feeds.of(file, call) for file, call in made if self.has_shares(file, call)]

    @cached_property
    def _loaders(self) -> dict[File, list[Feed]]:
        """Where the loaders that each file makes go, but those that share out their data already."""
        found: dict[File, list[Feed]] = {}
        for file in self.training:
            for call in self._makes_loader(file):
                if not self.has_shares(file, call):
                    found.setdefault(file, []).append(self.feeds.of(file, call))
        return found

    def _makes_loader(self, file: File) -> Iterator[ast.Call]:
        yield from (call for call in file.calls if self.is_loader(file, call))

    def has_shares(self, file: File, loader: ast.Call) -> bool:
        """Whether a loader gives each rank its own data already: by its sampler, in a program that has ranks."""
        given = [keyword.value for keyword in loader.keywords if keyword.arg in {"sampler", "batch_sampler"}]
        if not given or self.is_parallel(file):
            return bool(given)
        return self.was_parallel(file) and any(self._samples_for_ranks(file, value) for value in given)

    def _samples_for_ranks(self, file: File, value: ast.expr, deep: int = 0) -> bool:
        """Whether a sampler is told the ranks, or asks for them; so is one that is not seen, a parameter."""
        made = file.names.values_of(value) if isinstance(value, ast.Name) else []
        if deep > _SAMPLERS or (made and isinstance(value, ast.Name)):
            return deep <= _SAMPLERS and any(self._samples_for_ranks(file, item, deep + 1) for item in made)
        if isinstance(value, ast.IfExp):
            return any(self._samples_for_ranks(file, item, deep + 1) for item in (value.body, value.orelse))
        if not isinstance(value, ast.Call):
            return not deep and not isinstance(value, ast.Constant)
        found = self.project.resolve(file, value.func)
        if isinstance(found, ClassInfo):
            names = {item.arg if isinstance(item, ast.arg) else dotted(item) for item in walk(found.node)}
            bases = {(dotted(base) or "").split(".")[-1] for base in found.node.bases}
            if "DistributedSampler" in bases or not _OF_RANKS.isdisjoint(str(n).split(".")[-1] for n in names):
                return True
        given = [*value.args, *(keyword.value for keyword in value.keywords)]
        named = any(keyword.arg in _OF_RANKS for keyword in value.keywords) or any(is_rank(file, v) for v in given)
        return named or any(self._samples_for_ranks(file, item, deep + 1) for item in given)

    def is_loader(self, file: File, call: ast.Call) -> bool:
        """Whether a call makes a DataLoader, by a class of the project or a ``partial``, too."""
        if b"oader" not in file.source.data:
            return False
        found = self.project.resolve(file, call.func)
        if isinstance(found, External):
            return found.name == _LOADER
        if isinstance(found, ClassInfo):
            return any(self.project.external(found.file, base) == _LOADER for base in found.node.bases)
        made = file.names.values_of(call.func) if isinstance(call.func, ast.Name) else []
        return bool(made) and all(
            isinstance(value, ast.Call)
            and self.project.external(file, value.func) == "functools.partial"
            and bool(value.args)
            and self.project.external(file, value.args[0]) == _LOADER
            for value in made
        )

    @cached_property
    def entries(self) -> dict[File, list[ast.stmt]]:
        """Files that are run, and the statements that run first."""
        return {file: block for file in self.project if file.convert and (block := self.entry.block(file))}

    @cached_property
    def training(self) -> Set[File]:
        """Files with a loop that trains, and project files that the scripts import, in the project's order."""
        found = set(self._loops)
        for file in self.programs:
            found |= self.reach(file)
        return dict.fromkeys(file for file in self.project if file in found).keys()

    @cached_property
    def programs(self) -> list[File]:
        """Files that are run to train, or to do something else with a model."""
        found = [f for f in self.entries if f in self._loops or self._builds_model(f) or self.drives(f)]
        return [file for file in found if not self.submits(file)]

    def submits(self, file: File) -> bool:
        """Whether a file hands a job that trains to submitit, which starts its processes, and another file is run."""
        if b"submitit" not in file.source.data or file in self._loops:
            return False
        imported = [node for node in file.nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in imported if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in imported if isinstance(node, ast.ImportFrom)}
        return any(name.split(".")[0] == "submitit" for name in names) and any(
            isinstance(call.func, ast.Attribute) and call.func.attr in {"submit", "map_array"} for call in file.calls
        )

    @cached_property
    def _loops(self) -> set[File]:
        return {file for file in self.project if _TRAINS.search(file.source.data) and self.trains(file)}

    @cached_property
    def unstarted(self) -> list[File]:
        """Files with a loop that trains which no program reaches."""
        reached = {file for program in self.programs for file in self.reach(program)}
        return [file for file in self.project if file in self._loops and file not in reached]

    def drives(self, file: File) -> bool:
        """Whether a file that is run imports a training loop that no other file starts: it calls it by some name."""
        loops = {target for target in self.reach(file) if self.trains(target) and target not in self._run_alone}
        if file in loops or not loops:
            return False
        return self._starts(file) or not any(
            self._starts(other) and loops & self.reach(other)
            for other in self.entries
            if other is not file and other not in loops and not self._runs_on_import(file, other)
            if not self.submits(other)
        )

    def _starts(self, file: File) -> bool:
        """Whether a file that is run is seen to make a model, or what trains one."""
        return self._builds_model(file) or self.entry.trains(file, self.entries[file])

    def _runs_on_import(self, file: File, other: File) -> bool:
        """Whether what another file does is done because a file imports it."""
        return other in self.reach(file) and file not in self.reach(other) and other not in self._run_alone

    @cached_property
    def _run_alone(self) -> set[File]:
        """Files that are run, and whose statements do not run because another file imports them."""
        return {file for file in self.entries if not self.entry.runs_at_import(file)}

    @cached_property
    def started_at_import(self) -> set[File]:
        """Files that are run, and import one whose statements have started the ranks by then."""
        found: set[File] = set()
        for program in self.programs:
            starting = [file for file in self._import_order(program) if file is program or file in self.starters]
            found.update(starting[1:])
        return found

    @cached_property
    def starters(self) -> set[File]:
        """Files whose own statements need the ranks when a program imports them: they make models, or loaders."""
        imported = {file for program in self.programs for file in self._import_order(program)}
        return {file for file in imported if file in self.entries and self.entry.runs_at_import(file)}

    def _import_order(self, start: File) -> list[File]:
        """The project files that a file runs when it is run, by when they need the ranks; mostly it is the last."""
        order: list[File] = []
        seen: set[File] = set()

        def visit(file: File) -> None:
            seen.add(file)
            for node in file.tree.body:
                if file is start and file not in order and not isinstance(node, DEFINITIONS):
                    if file in self.entries and self.entry.needs_init(file, node):
                        order.append(file)  # a seed in front of an import
                for target in self._imported(file, node) if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
                    if target not in seen and target.convert:
                        visit(target)
            if file not in order:
                order.append(file)

        visit(start)
        return order

    def feeds_training(self, file: File) -> bool:
        """Whether no program uses a file, or one that trains."""
        programs = [entry for entry in self.entries if file in self.reach(entry)]
        return not programs or any(self.trains(target) for entry in programs for target in self.reach(entry))

    def reach(self, start: File) -> set[File]:
        """A file and the project files that it imports, at any depth."""
        if start not in self._reached:
            self._reached[start] = self._follow(start)
        return self._reached[start]

    def _follow(self, start: File) -> set[File]:
        found, queue = {start}, [start]
        while queue:
            fresh = [target for target in self._imports(queue.pop()) if target not in found]
            found.update(fresh)
            queue.extend(fresh)
        return found

    def _imports(self, file: File) -> set[File]:
        """The project files that a file imports itself, by what its settings name, or by names made at run time."""
        if file not in self._imported_by:
            nodes = (node for node in file.nodes if isinstance(node, (ast.Import, ast.ImportFrom)))
            found = {target for node in nodes for target in self._imported(file, node)}
            named = (self.project.find_module(name, file) for name in set(modules_in_settings(file)))
            found |= {target for target in named if target is not None} | self._imported_by_name(file)
            self._imported_by[file] = {target for target in found if target.convert}
        return self._imported_by[file]

    def _imported_by_name(self, file: File) -> set[File]:
        """``importlib.import_module(f"models.{name}")``: the files, and those of folders, that it has names of."""
        if b"import_module" not in file.source.data:
            return set()
        texts = (
            re.split("[{%]", n.value)[0] for n in file.nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)
        )
        folders = {tuple(filter(None, re.split(r"[./]", text))) for text in texts if _FOLDER.fullmatch(text)} - {()}
        return {
            other
            for other in self.project
            for path in (other.path.parent, other.path.with_suffix(""))
            if any(path.parts[-len(folder) :] == folder for folder in folders)
        }

    def only_behind(self, stopped: list[File]) -> dict[File, File]:
        """Files that only scripts which cannot be converted use, each with one such script."""
        behind = {target: file for file in stopped if file in self.entries for target in self.reach(file)}
        for file in self.entries:
            if file not in stopped and file not in behind:
                for target in self.reach(file):
                    behind.pop(target, None)
        return {target: script for target, script in behind.items() if target not in stopped}

    def trains(self, file: File) -> bool:
        for node in file.calls:
            receiver = loss_of(node)
            if receiver is not None:
                owner = file.names.function_of(node)
                inner = owner is not None and owner.name in {"backward", "forward"}
                if not inner and not (isinstance(receiver, ast.Call) and dotted(receiver.func) == "super"):
                    roles = self.roles[file]
                    return bool(roles.steps or roles.scalers or roles.managers)
        return False

    def _builds_model(self, file: File) -> bool:
        """Whether running a file makes a model of the project."""
        return any(self.entry.constructs(file, statement) for statement in self.entries[file])

    def _imported(self, file: File, node: ast.Import | ast.ImportFrom) -> list[File]:
        found = []
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = self.project.find_module(alias.name, file)
                found.extend([module] if module is not None else [])
            return found
        module = self.project.find_module(node.module or "", file, node.level)
        if module is not None:
            found.append(module)
        names = [alias.name for alias in node.names]
        if names == ["*"] and module is not None:
            names = _listed(module) or self._looked_up(module)
        for listed in names:
            name = f"{node.module}.{listed}" if node.module else listed
            module = self.project.find_module(name, file, node.level)
            if module is not None:
                found.append(module)
        for alias in node.names:
            target = self.project.resolve(file, ast.Name(id=alias.asname or alias.name, ctx=ast.Load()))
            if isinstance(target, (ClassInfo, FunctionInfo, ModuleRef)):
                found.append(target.file)
        return found

    def _looked_up(self, package: File) -> list[str]:
        """The modules of a package whose ``__all__`` is made of the files in its folder, which ``import *`` brings."""
        looks = any(package.mentions(word) for word in ("glob", "listdir", "iter_modules", "iterdir", "scandir"))
        if package.path.name != "__init__.py" or not looks or not package.mentions("__all__"):
            return []
        return [file.path.stem for file in self.project if file.folder == package.folder and file is not package]

    def shares_data(self, file: File) -> bool:
        """Whether anything in a file's programs is known to give ranks other data, or can be made to."""
        return any(self._shares_itself(other) for other in self._beside(file))

    def was_parallel(self, file: File) -> bool:
        """Whether a program that a file is part of was data parallel before."""
        return not self._parallel.isdisjoint(self._beside(file))

    def was_wrapped(self, file: File) -> bool:
        """Whether a program that a file is part of puts a model into DistributedDataParallel or DataParallel."""
        return not self._wrapping.isdisjoint(self._beside(file))

    @property
    def wraps(self) -> bool:
        """Whether a program of the project puts a model into DistributedDataParallel or DataParallel."""
        return bool(self._wrapping)

    @cached_property
    def _wrapping(self) -> set[File]:
        return {
            file
            for file in self.project
            if b"DataParallel" in file.source.data and any(self.project.calls_of([file], DATA_PARALLEL))
        }

    def holds_module(self, info: ClassInfo) -> bool:
        """Whether objects of a class have a ``module`` of their own."""
        return any(_stores_module(node) for node in walk(info.node))

    @cached_property
    def any_holds_module(self) -> bool:
        """Whether any object of the project has a ``module`` of its own."""
        return any(b".module" in f.source.data and any(map(_stores_module, f.nodes)) for f in self.project)

    def is_of_models(self, name: str) -> bool:
        """Whether a name is a method of models, torch's or the project's, or what the project's keep by it."""
        return name in _OF_MODELS or name in self._methods_of_models

    @cached_property
    def _methods_of_models(self) -> set[str]:
        infos = (info for file in self.project for info in self.classes.all(file) if self.classes.is_module(info))
        return {name for info in infos for name in (*info.methods, *_kept(info.node))}

    def _shares_itself(self, file: File) -> bool:
        if self.is_parallel(file) or any(mark in file.source.data for mark in _SHARING):
            return True
        if any(not feed.only_read for feed in self._loaders.get(file, ())):
            return True
        taken = self.batches.of(file) if file in self.training else None
        return taken is not None and bool(taken.whole or taken.parts)

    @cached_property
    def _parallel(self) -> set[File]:
        return {file for file in self.project if self.is_parallel(file)}

    def _beside(self, file: File) -> set[File]:
        """The files of every program that a file is part of."""
        if file not in self._programs_of:
            programs = [entry for entry in self.entries if file in self.reach(entry)] or [file]
            self._programs_of[file] = set().union(*(self.reach(program) for program in programs))
        return self._programs_of[file]

    def is_parallel(self, file: File) -> bool:
        """Whether a script gives every rank other data already: by DDP, samplers or a process group.

        One that imports them and no more does not.
        """
        if file not in self._is_parallel:
            names = {mark.decode() for mark in _PARALLEL if mark in file.source.data}
            for node in file.nodes if names else ():
                if isinstance(node, ast.ImportFrom):
                    names |= {alias.asname for alias in node.names if alias.asname and alias.name in names}
            self._is_parallel[file] = bool(names) and any(
                (isinstance(node, ast.Name) and node.id in names)
                or (isinstance(node, ast.Attribute) and node.attr in names)
                for node in file.nodes
            )
        return self._is_parallel[file]

    @cached_property
    def started(self) -> bool:
        """Whether a script of the project starts bmtrain already; its data is then shared out as its author wants."""
        return any(
            b"init_distributed" in file.source.data
            and any(self.project.external(file, call.func) == "bmtrain.init_distributed" for call in file.calls)
            for file in self.project
        )

    def steps(self, file: File, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        """Whether a function calls backward, or a function of the project that does."""
        return self._steps(
            node, lambda: any(self._call_steps(file, item) for statement in node.body for item in walk_own(statement))
        )

    def _call_steps(self, file: File, item: ast.AST) -> bool:
        if not isinstance(item, ast.Call):
            return False
        found = self.project.resolve(file, item.func)
        return is_backward(item) or (isinstance(found, FunctionInfo) and self.steps(found.file, found.node))

    def opened_guards(self, file: File) -> dict[ast.If, Guard]:
        """Rank guards that every rank enters: for a collective or gradient inside, or for what such guards need."""
        if file not in self._unguarded:
            opened = {
                guard.node: guard
                for guard in guards(file)
                if any(self.collectives.inside(file, statement) for statement in guard.node.body)
                or (file in self.training and any(map(self.collectives.gradient_read, guard.node.body)))
            }
            self._unguarded[file] = with_givers(file, opened)
            if averaging := self._averaging(file):
                self._unguarded[file] = with_givers(file, {**self._unguarded[file], **averaging})
        return self._unguarded[file]

    def lifted_exits(self, file: File) -> dict[ast.If, Exit]:
        """Where all ranks but one leave in front of a collective, and none is to."""
        if file not in self._lifted:
            self._lifted[file] = {
                found.node: found
                for found in exits(file)
                if found.alone and any(self.collectives.inside(file, statement) for statement in found.behind)
            }
        return self._lifted[file]

    def _averaging(self, file: File) -> dict[ast.If, Guard]:
        """Rank guards under which a loss is averaged over steps, that is read as that of all ranks outside of them."""
        roles, read = self.roles[file], self.collectives.readings(file).values()
        found: dict[ast.If, Guard] = {}
        for guard in guards(file) if read else ():
            body = [item for statement in guard.node.body for item in walk_own(statement)]
            if guard.node in self._unguarded[file] or guard.either or not goes_on(guard.node):
                continue
            bound = {roles.var(t) for item in body if isinstance(item, ast.Assign) for t in item.targets}
            inside = set(body)
            others = (loss for loss in read if loss not in inside and not self.in_kept_guard(file, loss))
            if any(roles.var(loss) in bound for loss in others):
                found[guard.node] = guard
        return found

    def kept_guards(self, file: File) -> list[ast.If]:
        """Rank guards that one rank alone enters after conversion."""
        opened = self.opened_guards(file)
        return [guard.node for guard in guards(file) if guard.node not in opened and not guard.either]

    def in_opened_guard(self, file: File, node: ast.AST) -> bool:
        """Whether a node stands in a rank guard that every rank is to enter, or behind an exit that none is to take."""
        opened = self.opened_guards(file)
        behind = {statement for found in self.lifted_exits(file).values() for statement in found.behind}
        around = (node, *file.names.ancestors(node)) if behind else file.names.ancestors(node)
        return any(parent in opened or parent in behind for parent in around)

    def in_kept_guard(self, file: File, node: ast.AST) -> bool:
        """Whether only one rank reaches a node, after conversion."""
        opened = self.opened_guards(file)
        return any(guard not in opened for guard in _guards_around(file, node))

    def in_function_of_one_rank(self, file: File, node: ast.AST) -> bool:
        """Whether a node's function is called in rank guards alone, and needs no other rank: of guards that open, too,
        such calls are left to one rank.
        """
        function = file.names.function_of(node)
        if function is None or file.names.class_of(function) is not None or self.collectives.function(file, function):
            return False
        calls = list(self.collectives.instances.calls(file, function))
        return bool(calls) and all(
            isinstance(other.names.parents[call], ast.Expr) and any(_guards_around(other, call))
            for other, call in calls
        )


def _guards_around(file: File, node: ast.AST) -> Iterator[ast.If]:
    """The rank guards in whose body a node stands."""
    child = node
    for parent in file.names.ancestors(node):
        if isinstance(parent, ast.If) and any(child is item for item in parent.body):
            guard = as_guard(file, parent)
            if guard is not None and not guard.either:
                yield parent
        child = parent


class _Roles(dict[File, Roles]):
    """Roles of files, computed when first asked for."""

    def __init__(self, classes: Classes) -> None:
        super().__init__()
        self._classes = classes
        self._instances = Instances(classes, self, lambda: classes.project)

    def __missing__(self, file: File) -> Roles:
        self[file] = Roles(file, self._classes, self._instances.class_held, self)
        return self[file]


def _listed(module: File) -> list[str]:
    """What ``__all__`` names, which ``import *`` brings, modules of a package among it."""
    for node in module.tree.body if module.mentions("__all__") else ():
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List(elts=elts) | ast.Tuple(elts=elts)):
                return [item.value for item in elts if isinstance(item, ast.Constant) and isinstance(item.value, str)]
    return []


def _by_loop(feeds: Iterable[Feed]) -> dict[ast.For, list[Feed]]:
    found: dict[ast.For, list[Feed]] = {}
    for feed in feeds:
        for loop in feed.loops:
            found.setdefault(loop, []).append(feed)
    return found


def _kept(cls: ast.ClassDef) -> set[str]:
    """The attributes that a class gives its objects."""
    return {
        node.attr
        for node in walk(cls)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and dotted(node.value) == "self"
    }


def _stores_module(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "module" and isinstance(node.ctx, ast.Store)
