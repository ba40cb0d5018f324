"""Statements that write files or logs."""

from __future__ import annotations

import ast
import re

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted, walk
from rewriter.analyze.read.project import Project

WRITERS = {
    "json.dump", "pickle.dump", "numpy.save", "numpy.savez", "numpy.savetxt", "matplotlib.pyplot.savefig", "os.remove",
    "os.rename", "os.replace", "os.symlink", "os.unlink", "shutil.copy", "shutil.copyfile", "shutil.rmtree",
    "shutil.move", "shutil.copytree", "yaml.dump", "torchvision.utils.save_image", "wandb.log", "wandb.save",
    "wandb.finish", "wandb.watch", "mlflow.log_metric", "mlflow.log_metrics", "wandb.config.update", "mlflow.log_param",
    "mlflow.log_params", "mlflow.log_artifact", "mlflow.log_artifacts", "mlflow.log_dict", "mlflow.log_text",
    "mlflow.log_figure", "mlflow.set_tag", "mlflow.set_tags", "mlflow.set_experiment", "mlflow.end_run",
    "safetensors.torch.save_file", "huggingface_hub.create_repo", "huggingface_hub.upload_folder",
    "huggingface_hub.upload_file", "huggingface_hub.upload_large_folder", "huggingface_hub.create_commit",
    "huggingface_hub.create_tag", "huggingface_hub.create_branch", "huggingface_hub.delete_file",
    "cv2.imwrite", "imageio.imwrite", "imageio.imsave", "imageio.mimsave", "imageio.mimwrite", "imageio.v2.imwrite",
    "imageio.v2.imsave", "imageio.v2.mimsave", "imageio.v2.mimwrite", "imageio.v3.imwrite", "matplotlib.pyplot.imsave",
    "matplotlib.image.imsave", "skimage.io.imsave", "scipy.io.wavfile.write", "scipy.io.savemat",
    "scipy.sparse.save_npz", "soundfile.write", "librosa.output.write_wav", "torchaudio.save",
    "torchvision.io.write_png", "torchvision.io.write_jpeg", "torchvision.io.write_video", "numpy.savez_compressed",
    "joblib.dump", "dill.dump", "cloudpickle.dump", "toml.dump", "torch.cuda.memory._dump_snapshot",
    "pprint.pprint", "pprint.pp", "rich.print", "click.echo", "click.secho", "termcolor.cprint",
    *(f"{module}.tqdm.write" for module in ("tqdm", "tqdm.auto", "tqdm.std", "tqdm.notebook", "tqdm.autonotebook")),
}  # fmt: skip
MADE_ONCE = {
    "torch.utils.tensorboard.SummaryWriter", "torch.utils.tensorboard.writer.SummaryWriter",
    "torch.utils.tensorboard.FileWriter", "tensorboardX.SummaryWriter", "tensorboardX.writer.SummaryWriter", "aim.Run",
    "comet_ml.Experiment", "comet_ml.OfflineExperiment", "comet_ml.start", "mlflow.start_run", "neptune.init_run",
    "clearml.Task.init", "visdom.Visdom", "dvclive.Live", "trackio.init",
}  # fmt: skip
"""Calls that make a writer of logs, of which there is to be one."""
CAN_BE_DISABLED = {"wandb.init", "swanlab.init"}
"""Such calls whose ``mode="disabled"`` makes one that does nothing and holds what it is given."""
LOG_FILES = {
    "logging.FileHandler", "logging.handlers.RotatingFileHandler", "logging.handlers.TimedRotatingFileHandler",
    "logging.handlers.WatchedFileHandler", "logging.basicConfig", "loguru.logger.add",
}  # fmt: skip
_STREAMS = {"sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"}
CONFIGURED_ONCE = {"logging.config.dictConfig", "logging.config.fileConfig"}
"""Calls that make handlers, of files and of what is printed, from settings."""
UPLOADING_METHODS = {
    "push_to_hub", "upload_folder", "upload_file", "upload_large_folder", "create_repo", "create_commit", "create_tag",
    "git_push",
}  # fmt: skip
WRITING_METHODS = {
    "add_scalar", "add_scalars", "add_histogram", "add_image", "add_images", "add_text", "add_graph", "add_hparams",
    "savefig", "to_csv", "write_text", "write_bytes", "writerow", "writerows", "save_pretrained",
    "print_trainable_parameters", "to_parquet", "to_pickle", "to_json", "to_feather", "to_excel", "save_to_disk",
    "unlink", "rmdir", "symlink_to", "hardlink_to",
    "export_chrome_trace", "export_stacks", "export_memory_timeline", "dump_stats",
    "tofile", "to_hdf", "to_html", "write_image", "write_html", "write_parquet", "write_csv", "save_word2vec_format",
    *UPLOADING_METHODS,
}  # fmt: skip

COMMANDS = {"os.system", "subprocess.run", "subprocess.call", "subprocess.check_call"}
"""Calls that run a command of the system and wait for it."""
_OF_MODELS = {"safetensors.torch.save_model"}
"""Calls that write values of a model themselves."""
_PICTURES = ("PIL.Image.", "matplotlib.animation.")
"""What the names of functions begin with whose pictures ``.save(path)`` writes."""
_ARCHIVES = {"zipfile.ZipFile", "tarfile.open", "tarfile.TarFile", "pandas.ExcelWriter", "pandas.HDFStore"}
_GIVE_A_COUNT = {"write_text", "write_bytes"}
_SAVING = {"save", "dump", "save_to_file", "save_as", "export"}
_PATH = re.compile(r"(?:^|_)(?:path|filename|file_name|dir|directory|folder|out|output|dest|destination|fname)$", re.I)
_OPENING = {"io", "gzip", "bz2", "lzma", "codecs", "builtins"}
SHOWING_METHODS = {"add_scalar", "add_scalars", "writerow", "info", "debug", "log_metric", "set_postfix", "add_row"}
"""Methods that show the values they are given."""


def writes(file: File, project: Project, node: ast.stmt) -> bool:
    """Whether a statement writes something outside the process."""
    if isinstance(node, ast.With):
        opened = [item.context_expr for item in node.items]
        return all(map(_opens, opened)) and any(map(opens_for_writing, opened)) and not any(map(is_left_to_one, opened))
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    blocks = (parent for parent in file.names.ancestors(node) if isinstance(parent, ast.With))
    if any(opens_for_writing(item.context_expr) for block in blocks for item in block.items):
        return False
    return _is_writer(file, project, node.value)


def runs_command(file: File, project: Project, node: ast.AST) -> bool:
    """Whether a statement runs a command and uses nothing that it gives: it is there for what it leaves behind."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and project.external(file, node.value.func) in COMMANDS
    )


def writes_when_called(file: File, project: Project, call: ast.Call) -> bool:
    """Whether a call is all that a ``lambda`` does, and writes."""
    made = file.names.parents[call]
    return isinstance(made, ast.Lambda) and call is made.body and _is_writer(file, project, call)


def _is_writer(file: File, project: Project, call: ast.Call) -> bool:
    func = call.func
    if project.external(file, func) in WRITERS | _OF_MODELS:
        return True
    if isinstance(func, ast.Attribute) and func.attr == "tofile":
        # The values of a parameter are for all ranks to read: one that did so alone would wait.
        return not any(
            isinstance(item, ast.Attribute) and item.attr in {"data", "weight", "bias"} for item in walk(func)
        )
    return isinstance(func, ast.Attribute) and (
        func.attr in WRITING_METHODS
        or _renames_path(call)
        or _writes_above_bar(file, project, func)
        or _saves_picture(file, project, func)
    )


def _renames_path(call: ast.Call) -> bool:
    """``path.rename(other)`` or ``path.replace(other)``; what texts and tables give under these names is used."""
    named = isinstance(call.func, ast.Attribute) and call.func.attr in {"rename", "replace"}
    return named and len(call.args) == 1 and not call.keywords


def _writes_above_bar(file: File, project: Project, method: ast.Attribute) -> bool:
    """``bar.write`` of ``bar = tqdm(...)``, which a bar that is not drawn does, too."""
    if method.attr != "write" or not isinstance(method.value, ast.Name):
        return False
    calls = _made(file, method.value)
    return any(isinstance(call, ast.Call) and project.external(file, call.func).startswith("tqdm.") for call in calls)


def _saves_picture(file: File, project: Project, method: ast.Attribute) -> bool:
    """``Image.fromarray(x).convert("L").save(path)``, ``film.save(path)`` of ``film = FuncAnimation(...)``."""
    if method.attr != "save":
        return False
    for value in _made(file, method.value) if isinstance(method.value, ast.Name) else [method.value]:
        while isinstance(value, ast.Call):
            if project.external(file, value.func).startswith(_PICTURES):
                return True
            value = value.func.value if isinstance(value.func, ast.Attribute) else value.func
    return False


def _made(file: File, name: ast.Name) -> list[ast.expr]:
    """What a name is bound to."""
    found = file.names.lookup(name.id, file.names.scope_of(name))
    made = [file.names.parents.get(binding.node) for binding in found[1]] if found else []
    values = [node.value for node in made if isinstance(node, ast.Assign)]
    return values + [node.context_expr for node in made if isinstance(node, ast.withitem)]


def _opens(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and (dotted(node.func) == "open" or getattr(node.func, "attr", "") == "open")


def opens_for_writing(node: ast.expr) -> bool:
    """Whether a call is ``open(path, "w")``, or ``path.open("a")``."""
    if not isinstance(node, ast.Call) or not _opens(node):
        return False
    position = 1 if takes_path(node) else 0
    modes = [k.value for k in node.keywords if k.arg == "mode"] + node.args[position : position + 1]
    words = [item.value for item in walk(modes[0]) if isinstance(item, ast.Constant)] if modes else []
    return any(isinstance(word, str) and any(letter in word for letter in "wax") and len(word) < 4 for word in words)


def writes_archive(file: File, project: Project, call: ast.Call) -> bool:
    """Whether a call opens an archive, or a file of tables, to write to it."""
    name = project.external(file, call.func)
    modes = [k.value for k in call.keywords if k.arg == "mode"] + call.args[1:2]
    mode = str(getattr(modes[0], "value", "")) if modes else "w" if name == "pandas.ExcelWriter" else "r"
    return name in _ARCHIVES and bool(set(mode.split("|")[0].split(":")[0]) & set("wax"))


def maps_to_write(project: Project, file: File, call: ast.Call) -> bool:
    """Whether a call maps a file to memory to write it: ``np.memmap(path, mode="w+")``."""
    name = project.external(file, call.func)
    if name not in {"numpy.memmap", "numpy.lib.format.open_memmap"}:
        return False
    modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    modes += call.args[2:3] if name == "numpy.memmap" else call.args[1:2]
    mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else None
    return mode in {"w+", "r+"} or not modes


def gives_count(file: File, call: ast.Call) -> bool:
    """``return path.write_text(text)``: how much is written is used later."""
    used = not isinstance(file.names.parents[call], ast.Expr)
    return used and isinstance(call.func, ast.Attribute) and call.func.attr in _GIVE_A_COUNT


def saves_itself(file: File, project: Project, call: ast.Call) -> bool:
    """Whether an object saves itself to a path that it is given: ``index.save(path)``, ``words.dump("a.txt")``."""
    func = call.func
    if not isinstance(func, ast.Attribute) or func.attr not in _SAVING or project.resolve(file, func) is not None:
        return False
    return any(map(_is_path, (*call.args, *(keyword.value for keyword in call.keywords))))


def _is_path(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=str(text)):
            return "." in text or "/" in text
        case ast.JoinedStr() | ast.BinOp(left=ast.Constant(value=str())) | ast.BinOp(right=ast.Constant(value=str())):
            return True
        case ast.Name() | ast.Attribute() | ast.Subscript(value=ast.Name()):
            return bool(_PATH.search((dotted(node) or "").split(".")[-1]))
        case ast.Call(func=func):
            return (dotted(func) or "").split(".")[-1] in {"join", "Path", "str"}
    return False


def takes_path(call: ast.Call) -> bool:
    """Whether what is opened is the call's first argument, as of ``open`` and ``gzip.open``."""
    return dotted(call.func) in {"open", *(f"{module}.open" for module in _OPENING)}


def is_left_to_one(node: ast.expr) -> bool:
    """Whether all ranks but one write to nowhere: ``open(path if bmt.rank() == 0 else os.devnull, "w")``."""
    match node:
        case ast.Call(args=[ast.IfExp(orelse=ast.Attribute(attr="devnull")), *_]):
            return True
    return False


def log_file(file: File, project: Project, call: ast.Call) -> ast.expr | None:
    """The path of the log file that a call of ``logging`` or loguru opens."""
    name = project.external(file, call.func)
    if name not in LOG_FILES:
        return None
    named = next((keyword.value for keyword in call.keywords if keyword.arg in ("filename", "sink")), None)
    first = call.args[0] if call.args and name != "logging.basicConfig" else None
    path = named if named is not None else first
    if isinstance(path, (ast.Name, ast.Attribute)) and project.external(file, path) in _STREAMS:
        return None
    return path


def handles_records(file: File, project: Project, node: ast.AST) -> bool:
    """Whether a node stands in a handler of ``logging``: by their level records come to it on one rank, or warn."""
    owner = file.names.class_of(node)
    bases = owner.bases if owner is not None else []
    names = [project.external(file, base) for base in bases]
    return any(name.startswith("logging.") and name.endswith("Handler") for name in names)


def saves_only(file: File, project: Project, node: ast.stmt) -> bool:
    """Whether a block opens a file for one ``torch.save``, and beside it only says something."""
    if not isinstance(node, ast.With):
        return False
    calls = (statement.value for statement in node.body if isinstance(statement, ast.Expr))
    return any(
        isinstance(call, ast.Call)
        and project.external(file, call.func) == "torch.save"
        and opened_for(file, call) is not None
        for call in calls
    )


def opened_for(file: File, call: ast.Call) -> tuple[ast.With, ast.expr] | None:
    """The block and the path of ``with open(path, "wb") as f: torch.save(x, f)``, where it writes nothing else."""
    statement = file.names.parents[call]
    block = file.names.parents[statement]
    match block:
        case ast.With(
            items=[ast.withitem(ast.Call(func=ast.Name(id="open"), args=[path, *_]), ast.Name(id=name))], body=body
        ):
            lost = any(line in file.source.comments for line in range(block.lineno, call.lineno))
            if (
                statement in body
                and all(_says(other, name) for other in body if other is not statement)
                and not (lost and len(body) == 1)
                and len(call.args) == 2
                and not call.keywords
                and file.source.owns_lines(block)
            ):
                return (block, path) if getattr(call.args[1], "id", "") == name else None
    return None


def is_open_file(file: File, target: ast.expr | None) -> bool:
    """Whether it is a name that a ``with`` around it has bound, or that holds an open file or bytes in memory."""
    if not isinstance(target, ast.Name):
        return False
    for parent in file.names.ancestors(target):
        if isinstance(parent, (ast.With, ast.AsyncWith)):
            if any(isinstance(i.optional_vars, ast.Name) and i.optional_vars.id == target.id for i in parent.items):
                return True
    return any(
        isinstance(value, ast.Call) and (dotted(value.func) or "").split(".")[-1] in {"open", "BytesIO"}
        for value in file.names.values_of(target)
    )


def is_in_memory(file: File, statement: ast.stmt) -> bool:
    """Whether a statement's call writes to what lies in memory: ``picture.save(buffer, format="PNG")``."""
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return False
    call = statement.value
    held = [*call.args, *(keyword.value for keyword in call.keywords)]
    held += [call.func.value] if isinstance(call.func, ast.Attribute) else []
    return any(isinstance(item, ast.Name) and _is_memory(file, item) for item in held)


def _is_memory(file: File, name: ast.Name) -> bool:
    opened = [
        item.context_expr
        for parent in file.names.ancestors(name)
        if isinstance(parent, ast.With)
        for item in parent.items
        if isinstance(item.optional_vars, ast.Name) and item.optional_vars.id == name.id
    ]
    values = opened or list(file.names.values_of(name))
    made = [(dotted(value.func) or "").split(".")[-1] if isinstance(value, ast.Call) else "" for value in values]
    return bool(made) and all(one in {"BytesIO", "StringIO"} for one in made)


def _says(statement: ast.stmt, handle: str) -> bool:
    """Whether a statement prints or logs, and leaves an open file alone."""
    match statement:
        case ast.Expr(value=ast.Call(func=ast.Name(id="print") | ast.Attribute(attr="info" | "debug" | "warning"))):
            return not any(isinstance(item, ast.Name) and item.id == handle for item in walk(statement))
    return False
