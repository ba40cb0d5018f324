"""What an ordinary loop has in place of a DeepSpeed engine's lines, with the numbers of its configuration."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from rewriter.analyze.read.file import File
from rewriter.analyze.read.nodes import dotted
from rewriter.analyze.read.project import Project
from rewriter.analyze.training.deepspeed_config import Config, as_code, enabled, number, read_config, section

_OPTIMIZERS = {"Adam": "AdamW", "AdamW": "AdamW", "SGD": "SGD", "Adagrad": "Adagrad"}
_TORCH_NAMES = {"lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "amsgrad"}
_UNREAD = {"gradient_accumulation_steps": "gradient_accumulation_steps", "gradient_clipping": "gradient_clipping"}


def deepspeed_lines(file: File, project: Project) -> Iterator[tuple[int, str]]:
    """By line of the file, what to write there; the lines of ``deepspeed.initialize`` first."""
    made = [call for call in file.calls if project.external(file, call.func) == "deepspeed.initialize"]
    for call in made:
        yield call.lineno, "; ".join(_set_up(file, call))
    engines = {name: read_config(file, call) for call in made if (name := _part(file, call, 0))}
    parts = {name: call for call in made if (name := _part(file, call, 0))}
    for used in file.calls:
        if isinstance(used.func, ast.Attribute) and (name := dotted(used.func.value) or "") in engines:
            written = _used(file, used, engines[name], parts[name])
            if written:
                yield used.lineno, f"instead of {file.source.code(used)}: {written}"


def _set_up(file: File, call: ast.Call) -> Iterator[str]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    config = read_config(file, call)
    engine, model = _part(file, call, 0) or "engine", _model(file, call)
    yield f"instead of deepspeed.initialize(...): {engine} = {model}"
    if config is None:
        yield "its configuration is not read, so that the numbers below are to be put in"
    if "optimizer" not in given:
        yield f"{_part(file, call, 1) or 'optimizer'} = {_optimizer(config, engine)}"
    micro, steps = number(config, "train_micro_batch_size_per_gpu"), _accumulation(config)
    size = number(config, "train_batch_size")
    if size is None and micro is not None and config is not None:
        accumulated = f", {steps} batches for each step" if steps != "1" else ""
        yield f"a DataLoader whose batch_size is {micro} * the number of GPUs{accumulated}"
    elif size is not None:
        yield f"a DataLoader whose batch_size is {size}" + (f" // {steps}" if steps != "1" else "")
    if enabled(config, "bf16"):
        yield 'with torch.autocast("cuda", dtype=torch.bfloat16): around the forward'
    if enabled(config, "fp16"):
        yield 'with torch.autocast("cuda", dtype=torch.float16): around the forward, and torch.amp.GradScaler("cuda")'
    if scheduler := section(config, "scheduler"):
        yield f"a torch.optim.lr_scheduler for {scheduler.get('type', 'its scheduler')}"


def _used(file: File, call: ast.Call, config: Config | None, made: ast.Call) -> str:
    assert isinstance(call.func, ast.Attribute)
    engine, steps = dotted(call.func.value) or "engine", _accumulation(config)
    given = [file.source.code(argument) for argument in call.args]
    first = given[0] if given else ""
    match call.func.attr:
        case "backward" if first:
            return f"{first}.backward()" if steps == "1" else f"({first} / {steps}).backward()"
        case "step":
            return _step(file, engine, steps, config, made)
        case "save_checkpoint" if first:
            return (
                f'torch.save({engine}.state_dict(), os.path.join({first}, "model.pt")), and the optimizer\'s likewise'
            )
        case "load_checkpoint" if first:
            path = f'os.path.join({first}, "model.pt")'
            return f"{engine}.load_state_dict(torch.load({path})), and the optimizer's likewise"
        case "save_16bit_model" | "save_fp16_model" if first:
            return f'torch.save({engine}.state_dict(), os.path.join({first}, "pytorch_model.bin"))'
        case "zero_grad":
            return "nothing: it is behind the step"
    return ""


def _step(file: File, engine: str, steps: str, config: Config | None, made: ast.Call) -> str:
    given = {keyword.arg: keyword.value for keyword in made.keywords}
    own = given.get("optimizer")
    optimizer = _part(file, made, 1) or (file.source.code(own) if own is not None else "optimizer")
    clipping = _UNREAD["gradient_clipping"] if config is None else config.get("gradient_clipping")
    lines = [f"torch.nn.utils.clip_grad_norm_({engine}.parameters(), {clipping})"] if clipping else []
    lines += [f"{optimizer}.step()", f"{optimizer}.zero_grad()"]
    scheduler = given.get("lr_scheduler")
    if scheduler is not None or section(config, "scheduler"):
        lines.append(f"{_part(file, made, 3) or 'scheduler'}.step()")
    text = "; ".join(lines)
    return text if steps == "1" else f"if (step + 1) % {steps} == 0: {text}"


def _part(file: File, call: ast.Call, place: int) -> str:
    """The name that one of the four results gets."""
    statement = file.names.parents[call]
    target = statement.targets[0] if isinstance(statement, ast.Assign) else None
    if not isinstance(target, ast.Tuple) or place >= len(target.elts):
        return ""
    before = target.elts[: place + 1]
    name = dotted(target.elts[place]) or ""
    return "" if name == "_" or any(isinstance(item, ast.Starred) for item in before) else name


def _model(file: File, call: ast.Call) -> str:
    named = next((keyword.value for keyword in call.keywords if keyword.arg == "model"), None)
    value = named if named is not None else call.args[1] if len(call.args) > 1 else None
    return file.source.code(value) if value is not None else "model"


def _optimizer(config: Config | None, model: str) -> str:
    named = section(config, "optimizer")
    told = section(named, "params")
    kind = _OPTIMIZERS.get(str(named.get("type")), "...")
    if kind == "AdamW" and told.get("adam_w_mode") is False:
        kind = "Adam"
    numbers = {name: value for name, value in told.items() if name in _TORCH_NAMES and value != "auto"}
    numbers |= {"weight_decay": 0.0} if kind == "AdamW" and "weight_decay" not in numbers else {}  # DeepSpeed's own
    listed = [f"{name}={as_code(value)}" for name, value in numbers.items()]
    return (
        f"torch.optim.{kind}({', '.join([f'{model}.parameters()', *([] if 'lr' in numbers else ['lr=...']), *listed])})"
    )


def _accumulation(config: Config | None) -> str:
    if config is None:
        return _UNREAD["gradient_accumulation_steps"]
    return number(config, "gradient_accumulation_steps") or "1"
