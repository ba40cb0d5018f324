"""Calls of torch.distributed: which have a counterpart in bmtrain, and which need torch's own process group."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from rewriter.analyze.read.file import File
from rewriter.analyze.read.project import Project

SIMPLE = {
    "torch.distributed.get_rank": "rank",
    "torch.distributed.get_world_size": "world_size",
    "torch.distributed.barrier": "synchronize",
    "torch.distributed.is_initialized": "is_initialized",
}
GROUP = {"torch.distributed.init_process_group", "torch.distributed.destroy_process_group"}
_OPERATIONS = {"SUM": "sum", "AVG": "avg", "MAX": "max", "MIN": "min", "PRODUCT": "prod"}
_HARMLESS = {
    "is_available",
    "is_nccl_available",
    "is_gloo_available",
    "is_torchelastic_launched",
    "is_backend_available",
}
_PACKAGES = {
    "accelerate", "apex", "catalyst", "composer", "detectron2", "fairscale", "fairseq", "fvcore", "ignite", "lightly",
    "mmcv", "mmdet", "mmengine", "mmseg", "monai", "open_clip", "pytorch_metric_learning", "speechbrain",
    "timm", "torcheval", "torchmetrics", "transformers", "ultralytics", "webdataset",
}  # fmt: skip
"""Packages with functions that use torch's process group where there is one."""


def calls_of_packages(files: Iterable[File], project: Project) -> bool:
    """Whether a program that makes torch's process group also calls packages that may use it."""
    found = [project.external(file, call.func) for file in files for call in file.calls]
    return not GROUP.isdisjoint(found) and any(name.split(".")[0] in _PACKAGES for name in found)


def calls_that_stay(file: File, project: Project) -> list[ast.Call]:
    """Calls that go on using torch's process group."""
    if b"distributed" not in file.source.data:
        return []
    named = [(call, project.external(file, call.func)) for call in file.calls]
    return [c for c, name in named if name.startswith("torch.distributed.") and not _known(file, project, c, name)]


def _known(file: File, project: Project, call: ast.Call, name: str) -> bool:
    if name in GROUP or name.split(".")[-1] in _HARMLESS or name.count(".") > 2:
        return True
    if name in SIMPLE:
        return not call.args and all(keyword.arg == "device_ids" for keyword in call.keywords)
    if name == "torch.distributed.broadcast":
        return from_rank(file, call) is not None
    return name == "torch.distributed.all_reduce" and operation(file, project, call) is not None


def from_rank(file: File, call: ast.Call) -> tuple[ast.expr, ast.expr] | None:
    """The tensor and the source of a broadcast that is a statement of its own, without a group."""
    statement = file.names.statement_of(call)
    values = {keyword.arg: keyword.value for keyword in call.keywords}
    values.update(zip(("tensor", "src"), call.args, strict=False))
    if not isinstance(statement, ast.Expr) or statement.value is not call or set(values) != {"tensor", "src"}:
        return None
    return values["tensor"], values["src"]


def operation(file: File, project: Project, call: ast.Call) -> str | None:
    """bmtrain's name of an all_reduce's operation, if the call is a statement of its own without a group."""
    statement = file.names.statement_of(call)
    values = {keyword.arg: keyword.value for keyword in call.keywords}
    values.update(zip(("tensor", "op"), call.args, strict=False))
    if not isinstance(statement, ast.Expr) or statement.value is not call or set(values) - {"tensor", "op"}:
        return None
    if "op" not in values:
        return "sum"
    return _OPERATIONS.get(project.external(file, values["op"]).split(".")[-1])
