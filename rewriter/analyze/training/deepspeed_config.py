"""The configuration of a DeepSpeed engine, as far as it can be read: a dict in the script, or a json file beside it."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import walk

Config = Mapping[str, Any]
_CONFIGS = {"config", "config_params"}


class Code(str):
    """A value of a configuration that the script computes: names and numbers without calls."""


def read_config(file: File, call: ast.Call) -> Config | None:
    """The configuration that ``deepspeed.initialize`` is given; None where it is not all seen."""
    value: ast.expr | None = next((keyword.value for keyword in call.keywords if keyword.arg in _CONFIGS), None)
    for _ in range(2):
        if isinstance(value, ast.Name):
            value = _held(file, value)
    match value:
        case ast.Constant(value=str() as path):
            return _read(file, path)
        case ast.Call(func=ast.Attribute(attr="load"), args=[source]):  # json.load(open(path)), json.load(file)
            opened = _opened(file, source)
            return _read(file, opened) if opened else None
        case ast.Dict():
            read = _value(file, value)
            return read if isinstance(read, dict) else None
    return None


def as_code(value: Any) -> str:
    """How a value of a configuration is written."""
    if isinstance(value, list):
        return f"({', '.join(map(as_code, value))}{',' if len(value) == 1 else ''})"
    return value if isinstance(value, Code) else repr(value)


def section(config: Config | None, name: str) -> Config:
    found = config.get(name) if config is not None else None
    return found if isinstance(found, dict) else {}


def enabled(config: Config | None, name: str) -> bool:
    """Whether a section is there and not told to be off."""
    return bool(section(config, name).get("enabled"))


def number(config: Config | None, name: str) -> str | None:
    """A whole number of the configuration, as code."""
    value = config.get(name) if config is not None else None
    if isinstance(value, Code):
        return f"({value})" if not value.replace(".", "_").isidentifier() else value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _held(file: File, name: ast.Name) -> ast.expr | None:
    """What a name is given, if that is one thing and nothing changes it."""
    found = file.names.lookup(name.id, file.names.scope_of(name))
    if found is None or len(found[1]) != 1:
        return None
    made = file.names.parents.get(found[1][0].node)
    if not isinstance(made, (ast.Assign, ast.AnnAssign)) or isinstance(getattr(made, "value", None), type(None)):
        return None
    for node in file.nodes:
        if isinstance(node, ast.Name) and node.id == name.id and isinstance(node.ctx, ast.Load) and node is not name:
            if file.names.lookup(node.id, file.names.scope_of(node)) == found and not _only_reads(file, node):
                return None
    return made.value


def _only_reads(file: File, node: ast.Name) -> bool:
    """Whether a configuration is only looked at: ``config["a"]["b"]``, ``config.get("a")``, handed to the engine."""
    child: ast.AST = node
    parent = file.names.parents[node]
    while isinstance(parent, ast.Subscript) and parent.value is child:
        if not isinstance(parent.ctx, ast.Load):
            return False
        child, parent = parent, file.names.parents[parent]
    if isinstance(parent, ast.Attribute):
        return parent.attr in {"get", "keys", "items", "values"}
    if isinstance(parent, ast.keyword):
        return parent.arg in _CONFIGS
    in_call = isinstance(parent, ast.Call) and getattr(parent.func, "id", "") in {"print", "len", "str"}
    return child is not node or in_call


def _opened(file: File, source: ast.expr) -> str:
    """The path of the file that an expression has open."""
    if isinstance(source, ast.Name):
        found = file.names.lookup(source.id, file.names.scope_of(source))
        places = [file.names.parents.get(binding.node) for binding in found[1]] if found is not None else []
        around = set(file.names.ancestors(source))
        items = [place for place in places if isinstance(place, ast.withitem) and file.names.parents[place] in around]
        source = items[0].context_expr if len(items) == 1 else source
    match source:
        case ast.Call(func=ast.Name(id="open"), args=[ast.Constant(value=str() as path), *_]):
            return path
    return ""


def _read(file: File, path: str) -> Config | None:
    try:
        read = json.loads((file.path.parent / path).read_bytes())
    except (OSError, ValueError):
        return None
    return read if isinstance(read, dict) else None


def _value(file: File, node: ast.expr) -> Any:
    """A dict or list of constants and code; None for what has neither."""
    match node:
        case ast.Dict(keys=keys, values=values):
            names = [key.value if isinstance(key, ast.Constant) else None for key in keys]
            read = [_value(file, value) for value in values]
            bare = [isinstance(value, ast.Constant) and value.value is None for value in values]
            if any(not isinstance(name, str) for name in names):
                return None
            if any(v is None and not plain for v, plain in zip(read, bare, strict=True)):
                return None
            return dict(zip(names, read, strict=True))
        case ast.List(elts=items) | ast.Tuple(elts=items):
            listed = [_value(file, item) for item in items]
            return None if None in listed else listed
    try:
        return ast.literal_eval(node)
    except ValueError:
        pass
    plain = (ast.Name, ast.Attribute, ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.expr_context)
    return Code(file.source.code(node)) if all(isinstance(item, plain) for item in walk(node)) else None
