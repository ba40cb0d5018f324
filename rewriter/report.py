"""What is shown to the user: diffs and lists of findings."""

from __future__ import annotations

import ast
import difflib
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rewriter.types import Finding, Refusal, Remark, Result, place

_SUBMITS = re.compile(rb"^\s*(?:import|from) submitit\b[\s\S]*\.(?:submit|map_array)\(", re.M)
READY = "ready to launch: "
FIRST = "before the launch, "
_IMPORTED = re.compile(
    rb"^[ \t]*(?:from|import)[ \t]+(\.*)[ \t]*(?!import\b)((?:\w+\.)*\w+|(?=import\b))?"
    rb"(?:[ \t]+import[ \t]+(\([^)]*\)|[^\n#]*))?",
    re.M,
)
_NAME = re.compile(rb"(?:^|[(,])\s*(\w+)")
_PART = "part of "
"""How the reason begins of a file that stays because a script does which it is part of."""
_NOT_STARTED = "no script here starts "
"""How it is said of a file that trains and that is started by none."""
_IMPORTS_BY_NAME = re.compile(rb"import_module|__import__|importlib|pkgutil|runpy|\bexec\(")
_LAUNCHED = re.compile(r"(?:pre)?train|main|run", re.I)


class Line(NamedTuple):
    """One thing to say of one place, or of several for the same reason; ``mark`` is what it means for the user."""

    place: str
    code: str
    mark: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.code} {self.mark}{self.message}"


def diff(result: Result, color: bool = False) -> str:
    """A unified diff of one file; empty if nothing changed."""
    before = result.before.decode("utf-8", "replace").splitlines(keepends=True)
    after = result.after.decode("utf-8", "replace").splitlines(keepends=True)
    lines = difflib.unified_diff(before, after, f"a/{_name(result.path)}", f"b/{_name(result.path)}")
    return "".join(_lines(lines, color))


def _lines(lines: Iterable[str], color: bool) -> Iterator[str]:
    for line in lines:
        text = line if line.endswith("\n") else line + "\n\\ No newline at end of file\n"
        if color and line.startswith(("+", "-", "@")):
            code = {"+": 32, "-": 31, "@": 36}[line[0]]
            body = text.rstrip("\r\n")
            text = f"\033[{code}m{body}\033[0m{text[len(body) :]}"
        yield text


def _name(path: Path) -> str:
    return path.as_posix().lstrip("/")


def listing(results: Sequence[Result], verbose: bool = False) -> Iterator[Line]:
    """What was found, what needs the user's hand first.

    Files that train and stay as they are come first of all. Then one line stands for all places that are left for the
    same reason, in whatever files, and one for all edits of a rule in a file; with ``verbose`` each has its own.
    """
    understood = [result for result in results if not result.error]
    for result in results:
        reason = left_training(result)
        if reason:
            yield Line(str(result.path), "error:", "", f"trains, and was left as it is: {reason}")
    yield from _places(understood, lambda result: result.reported, "left: ", verbose)
    yield from _places(understood, lambda result: result.hidden, "needs --unsafe: ", verbose)
    for result in understood:  # what is done needs no more than its rule
        yield from _lines_of([(result, f) for f in _in_order(result.applied)], "", lambda f: f.code, verbose)


def _places(
    results: Sequence[Result], found: Callable[[Result], Sequence[Finding]], mark: str, verbose: bool
) -> Iterator[Line]:
    every = [(result, finding) for result in results for finding in _in_order(found(result))]
    return _lines_of(every, mark, lambda finding: (finding.code, finding.message), verbose)


def _in_order(found: Sequence[Finding]) -> list[Finding]:
    return sorted(found, key=lambda finding: (finding.line, finding.code))


def _lines_of(
    found: Sequence[tuple[Result, Finding]], mark: str, kind: Callable[[Finding], object], verbose: bool
) -> Iterator[Line]:
    groups: dict[object, list[tuple[Result, Finding]]] = {}
    for number, (result, finding) in enumerate(found):
        groups.setdefault(number if verbose else kind(finding), []).append((result, finding))
    for (result, first), *others in groups.values():
        yield Line(result.at(first.line), first.code, mark, first.message + _more(result, others))


def _more(first: Result, others: Sequence[tuple[Result, Finding]]) -> str:
    if not others:
        return ""
    places = [result.at(finding.line) for result, finding in others if result is not first]
    if not places:
        return f" (and {len(others)} more)"
    files = len({result.path for result, _ in others} | {first.path})
    return f" (and {len(others)} more in {_count(files, 'file')}: {', '.join(places[:2])}{' ...' * (len(places) > 2)})"


def left_training(result: Result) -> str:
    """Why a file that trains stays as it is; empty if it does not train, or is converted."""
    engine = next((f for f in result.reported if f.code == "BMT090" and _is_script(f)), None)
    if engine is not None and not result.changed and not _only_asks_accelerate(engine, result.before):
        return f"{engine.message} ({_line(result, engine)})"
    if result.changed or not _calls("backward", result.before) or b"bmtrain" in result.before:
        return ""
    if result.error:
        return result.error.removeprefix(f"{result.path}: ")
    refused = [finding for finding in result.reported if isinstance(finding, Refusal)]
    if refused:
        return f"{refused[0].message} ({_line(result, refused[0])})"
    return "no optimizer was found that it steps" if _calls("step", result.before) else ""


def _only_asks_accelerate(engine: Finding, text: bytes) -> bool:
    """Whether a file has an accelerator for its ranks alone, as an evaluation does: nothing is prepared or trained."""
    return "for accelerate" in engine.message and not _calls("prepare", text) and not _calls("backward", text)


def _calls(method: str, text: bytes) -> bool:
    """Whether code calls a method of this name, and not only an example in a comment or docstring does."""
    if re.search(rb"\.%b\(" % method.encode(), text) is None:
        return False
    try:
        nodes = ast.walk(ast.parse(text))
    except (SyntaxError, ValueError):  # a notebook, or no Python
        return True
    return any(isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == method for n in nodes)


def _is_script(finding: Finding) -> bool:
    """Whether a file is refused for the engine that trains in it, and not for the script that it is part of."""
    return isinstance(finding, Refusal) and not finding.spared and not finding.message.startswith(_PART)


def _line(result: Result, finding: Finding) -> str:
    where = place(result.cells, finding.line)
    return where if result.cells else f"line {where}"


def closing(results: Sequence[Result], written: str, again: str, at: Callable[[Path], Path]) -> Iterator[str]:
    """The last lines: counts, what was written, what to run next.

    ``again`` is the command that writes, empty when that is done; ``at`` says where a file now is.
    """
    yield summary(results)
    yield written
    launched = launch(results, at)
    if again and any(result.changed for result in results) and not launched.startswith("not ready"):
        then = f"; then {launched.removeprefix(READY)}" if launched.startswith(READY) else ""
        yield f"next: {again}" + (f"; {launched}" if launched.startswith(FIRST) else then)
    else:
        yield launched


def launch(results: Sequence[Result], at: Callable[[Path], Path]) -> str:
    """Whether the project is ready to launch, with the command, or why it is not."""
    failed = next((result for result in results if result.error and _matters(result, results)), None)
    if failed is not None:
        return f"not ready to launch: {failed.error}"
    read = [result for result in results if not result.error or _matters(result, results)]
    stay = [(result, reason) for result in read if (reason := left_training(result))]
    if stay:  # a reason of its own says more than that of the script which it is part of
        left, reason = next((item for item in stay if not item[1].startswith(_PART)), stay[0])
        return f"not ready to launch: {left.path} trains, and was left as it is: {reason}"
    started = _started(results)
    trained = [result.path for result in results if _calls("backward", result.after) and b"bmtrain" in result.after]
    script, trains = _script(started, trained, results) if started else (None, False)
    if trained and (script is None or (not trains and all(map(_is_unstarted, results)))):
        return f"not ready to launch: nothing here starts the training in {trained[0]}: call bmt.init_distributed()"
    if script is None:
        return "nothing to launch: no script here trains"
    command = _command(at(script))
    above = _imported_from(next(result for result in results if result.path == script), results)
    if above is not None:
        command = command.replace("torchrun ", f"PYTHONPATH={shlex.quote(str(at(above)))} torchrun ")
    told = [(result, finding) for result in results for finding in result.reported]
    places = [result.at(said.line) for result, said in told if isinstance(said, Remark) and said.differs]
    if places:
        more = f" and {len(places) - 1} more of the places above" if len(places) > 1 else ""
        return f"{FIRST}see to {places[0]}{more}, where several ranks differ from one; then {command}"
    return f"{READY}{command}"


def _started(results: Sequence[Result]) -> list[Path]:
    return [result.path for result in results if b"init_distributed(" in result.after]


def _is_unstarted(result: Result) -> bool:
    """Whether a file does not train, or is said to be started by no script."""
    return not _calls("backward", result.after) or any(
        said.code == "BMT020" and said.message.startswith(_NOT_STARTED) for said in result.reported
    )


def _matters(failed: Result, results: Sequence[Result]) -> bool:
    """Whether a file that is not understood trains, or a script that starts the ranks may import it."""
    scripts = _started(results)
    if failed.path.suffix == ".ipynb" and any(path.suffix == ".py" for path in scripts):
        return False  # no script imports a notebook, and the scripts are what is launched
    if not scripts or _calls("backward", failed.before):
        return True
    importers = {result.path: result.after for result in results if not result.error}
    if any(_IMPORTS_BY_NAME.search(text) for text in importers.values()):
        return True
    imports = {path: _names_imported(path, text) for path, text in importers.items()}
    queue, reached = list(scripts), set(scripts)
    while queue:
        names = imports[queue.pop()]
        if _module(failed.path) in names:
            return True
        fresh = [path for path in imports if path not in reached and _module(path) in names]
        reached.update(fresh)
        queue.extend(fresh)
    return False


def _module(path: Path) -> str:
    return path.parent.resolve().name if path.stem == "__init__" else path.stem


def _names_imported(path: Path, text: bytes) -> set[str]:
    """Every part of what a file's imports name, and its ``__all__``; of a notebook, every word."""
    if path.suffix == ".ipynb":
        return set(re.findall(r"\w+", text.decode("utf-8", "replace")))
    names = set[str]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            names |= {_module(path.parent / "__init__.py")} if node.level and not node.module else set()
            names |= set((node.module or "").split("."))
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            names |= {str(item.value) for item in ast.walk(node.value) if isinstance(item, ast.Constant)}
    return names


def _imported_from(script: Result, results: Sequence[Result]) -> Path | None:
    """The folder above a script's own in which its imports are: Python does not look there by itself."""
    if b"sys.path" in script.after:
        return None
    known = {result.path.with_suffix("") for result in results}
    known |= {above for path in known for above in path.parents}
    names = [module.parts[0] for module in _modules(script, []) if not module.suffix and module.parts]
    own, *further = script.path.parents
    for name in (name for name in names if own / name not in known):
        for above in further:
            if above / name in known:
                return above
    return None


def _command(script: Path) -> str:
    """How a script is launched; a notebook is made one first."""
    notebook = script.suffix == ".ipynb"
    run = f"torchrun --nproc_per_node=N {shlex.quote(str(script.with_suffix('.py') if notebook else script))}"
    return f"jupyter nbconvert --to script {shlex.quote(str(script))}; {run}" if notebook else run


def _script(started: Sequence[Path], trained: Sequence[Path], results: Sequence[Result]) -> tuple[Path, bool]:
    """What to launch: no other file imports it, it trains or imports what does, and its name says so.

    Also whether it trains, or imports what does.
    """
    imports = {result.path: set(_modules(result, [other.path for other in results])) for result in results}

    def imported(path: Path, by: Path) -> bool:
        if path in imports[by]:
            return True
        own = path.absolute().with_suffix("").parts  # train.py here is not what package.train names
        named = (module.parts for module in imports[by] if not module.suffix)
        return any(parts[-len(own) :] == own[-len(parts) :] for parts in named)

    guarded = {result.path for result in results if b"__main__" in result.after}
    submits = {result.path for result in results if _SUBMITS.search(result.after) and result.path not in started}

    def is_imported(path: Path) -> bool:
        by = [other for other in imports if other != path and other not in submits and imported(path, other)]
        if path in trained and path in guarded and _LAUNCHED.fullmatch(path.stem):
            by = [other for other in by if _LAUNCHED.fullmatch(other.stem)]  # evaluate.py may take its parts
        return bool(by)

    @cache
    def reached(path: Path) -> set[Path]:
        """What a file imports, and what that does in turn."""
        found, queue = {path}, [path]
        while queue:
            by = queue.pop()
            fresh = [other for other in imports if other not in found and imported(other, by)]
            found.update(fresh)
            queue.extend(fresh)
        return found

    def order(path: Path) -> tuple[bool, ...]:
        trains = not reached(path).isdisjoint(trained)
        named = not _LAUNCHED.match(path.stem), not _LAUNCHED.fullmatch(path.stem)
        return path.stem == "__init__", is_imported(path), not trains, *named

    runs = guarded | {result.path for result in results if result.path in trained}
    all_imported = all(map(is_imported, started))
    run = [path for path in imports if path in runs or all_imported]
    run = [path for path in run if path not in submits and any(imported(other, path) for other in started)]
    best = min([*started, *run], key=order)
    return best, not reached(best).isdisjoint(trained)


def _modules(result: Result, paths: Sequence[Path]) -> Iterator[Path]:
    """What a file imports: ``Path("package/name")`` where it is found by name, the file itself for ``.name``.

    What ``from package import name`` gives may be one of ``paths``, too.
    """
    for dots, name, inside in _IMPORTED.findall(result.after):
        parts = name.decode().split(".") if name else []
        modules = [(*parts, one.decode()) for one in _NAME.findall(inside)]
        if dots:
            folder = result.path.parent.joinpath(*[".."] * (len(dots) - 1))
            for module in (parts, *modules):
                yield Path(os.path.normpath(folder.joinpath(*module).with_suffix(".py")))
        else:
            yield Path(*parts)
            yield from (path for path in paths if path.with_suffix("").parts[-len(parts) - 1 :] in modules)


def messages(applied: Iterable[Finding], hidden: Iterable[Finding], reported: Iterable[Finding]) -> Iterator[str]:
    """One line per finding of a file, in the file's order."""
    marks = [("", applied), ("needs --unsafe: ", hidden), ("left: ", reported)]
    entries = [(finding.line, finding.code, mark + finding.message) for mark, found in marks for finding in found]
    for line, code, message in sorted(entries):
        yield f"{line}: {code} {message}"


def summary(results: Sequence[Result]) -> str:
    changed = sum(result.changed for result in results)
    applied = sum(len(result.applied) for result in results)
    parts = [f"{changed} of {_count(len(results), 'file')} changed, {_count(applied, 'edit')}"]
    hidden = sum(len(result.hidden) for result in results)
    left = sum(len(result.reported) for result in results)
    failed = [result for result in results if result.error]
    if hidden:
        parts.append(f"{hidden} more with --unsafe")
    if left:
        parts.append(f"{_count(left, 'place')} left as written")
    if failed:
        apart = (
            "" if any(_matters(result, results) for result in failed) else ", which nothing that is launched imports"
        )
        parts.append(f"{_count(len(failed), 'file')} not understood{apart}")
    return "; ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
