"""Statements that write files or logs."""

from __future__ import annotations

import ast

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted
from rewriter.analyze.read.project import Project

WRITERS = {
    "json.dump", "pickle.dump", "numpy.save", "numpy.savez", "numpy.savetxt", "matplotlib.pyplot.savefig", "os.remove",
    "os.rename", "os.replace", "os.symlink", "os.unlink", "shutil.copy", "shutil.copyfile", "shutil.rmtree",
    "shutil.move", "shutil.copytree", "yaml.dump", "torchvision.utils.save_image", "wandb.log", "wandb.save",
    "wandb.finish", "wandb.watch", "wandb.init", "mlflow.log_metric", "mlflow.log_metrics", "wandb.config.update",
}  # fmt: skip
WRITING_METHODS = {
    "add_scalar", "add_scalars", "add_histogram", "add_image", "add_images", "add_text", "add_graph", "add_hparams",
    "savefig", "to_csv", "write_text", "write_bytes", "writerow", "writerows", "save_pretrained",
}  # fmt: skip

SHOWING_METHODS = {"add_scalar", "add_scalars", "writerow", "info", "debug", "log_metric", "set_postfix"}
"""Methods that show the values they are given."""


def writes(file: File, project: Project, node: ast.stmt) -> bool:
    """Whether a statement writes something outside the process."""
    if isinstance(node, ast.With):
        return len(node.items) == 1 and _opens_for_writing(node.items[0].context_expr)
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    if any(isinstance(parent, ast.With) and writes(file, project, parent) for parent in file.names.ancestors(node)):
        return False
    if project.external(file, node.value.func) in WRITERS:
        return True
    func = node.value.func
    return isinstance(func, ast.Attribute) and func.attr in WRITING_METHODS


def _opens_for_writing(node: ast.expr) -> bool:
    if not isinstance(node, ast.Call):
        return False
    path = dotted(node.func) or ""
    method = isinstance(node.func, ast.Attribute) and node.func.attr == "open"
    modes = [k.value for k in node.keywords if k.arg == "mode"] + node.args[0 if method and path != "io.open" else 1 :][
        :1
    ]
    mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else ""
    return (path == "open" or method) and isinstance(mode, str) and any(letter in mode for letter in "wax")


def saves_only(file: File, project: Project, node: ast.stmt) -> bool:
    """Whether a block opens a file for one ``torch.save`` and does nothing else."""
    match node:
        case ast.With(body=[ast.Expr(value=ast.Call() as call)]):
            return project.external(file, call.func) == "torch.save" and opened_for(file, call) is not None
    return False


def opened_for(file: File, call: ast.Call) -> tuple[ast.With, ast.expr] | None:
    """The block and the path of ``with open(path, "wb") as f: torch.save(x, f)``, where it does nothing else."""
    statement = file.names.parents[call]
    block = file.names.parents[statement]
    match block:
        case ast.With(
            items=[ast.withitem(ast.Call(func=ast.Name(id="open"), args=[path, *_]), ast.Name(id=name))], body=[only]
        ):
            lost = any(line in file.source.comments for line in range(block.lineno, call.lineno))
            if (
                only is statement
                and not lost
                and len(call.args) == 2
                and not call.keywords
                and file.source.owns_lines(block)
            ):
                return (block, path) if getattr(call.args[1], "id", "") == name else None
    return None
