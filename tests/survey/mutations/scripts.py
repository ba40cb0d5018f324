"""Composes a training script from idioms: the same script for the same seed."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from textwrap import indent
from typing import TypeVar

from tests.survey.mutations import idioms

T = TypeVar("T")
_MARK = re.compile(r"\$(\w+)")
_PLAIN = {"train": "train_data", "valid": "valid_data"}


@dataclass
class Script:
    """The files of a script by name, the commands that run it, and what was drawn for each concern."""

    files: dict[str, str]
    commands: list[str]
    drawn: dict[str, str]


def compose(seed: int) -> Script:
    return _Composer(random.Random(seed)).script()


def _block(text: str, depth: int = 1) -> str:
    return indent(text, "    " * depth) if text.strip() else ""


def _lines(*texts: str) -> str:
    return "\n".join(text.strip("\n") for text in texts if text.strip())


def _when(condition: str, text: str) -> str:
    return f"if {condition}:\n{_block(text)}" if condition and text.strip() else text


def _named(text: str, owner: str = "") -> str:
    """``$model`` as ``model``, or as an attribute of ``owner``."""
    return _MARK.sub(lambda mark: f"{owner}.{mark[1]}" if owner else _PLAIN.get(mark[1], mark[1]), text)


def _names(*texts: str) -> str:
    """What a function with these texts is given."""
    found = dict.fromkeys(mark for text in texts for mark in _MARK.findall(text))
    return "".join(f"{_PLAIN.get(name, name)}, " for name in found)


@dataclass
class _Composer:
    draw: random.Random
    drawn: dict[str, str] = field(default_factory=dict)
    helpers: list[str] = field(default_factory=list)

    def pick(self, concern: str, ways: Mapping[str, T] | Iterable[str], without: Iterable[str] = ()) -> str:
        names = [name for name in ways if name not in set(without)]
        self.drawn[concern] = self.draw.choice(names)
        return self.drawn[concern]

    def one_in(self, number: int, concern: str) -> bool:
        if self.draw.randrange(number):
            return False
        self.drawn[concern] = "yes"
        return True

    def script(self) -> Script:
        self.shape = self.pick("shape", idioms.SHAPES)
        self.ddp = self.one_in(4, "DDP")
        net, make_model = self._model()
        data, make_data = self._data()
        make_optimizer = self._optimizer()
        step = self._step()
        evaluate = self._evaluation()
        setup = _lines(make_data, make_model, make_optimizer, "$start = 0", self._resume(), self._wrap())
        files: dict[str, str] = {}
        body, definitions = self._shape(setup, step, evaluate, files)
        body = _lines(
            "torch.manual_seed(1)",
            "logging.basicConfig(level=logging.INFO, stream=sys.stdout, format='%(message)s')",
            body,
        )
        if self.ddp:
            body = _lines(
                'os.environ.setdefault("RANK", "0")',
                'os.environ.setdefault("WORLD_SIZE", "1")',
                'os.environ.setdefault("MASTER_ADDR", "localhost")',
                'os.environ.setdefault("MASTER_PORT", "29500")',
                'dist.init_process_group("gloo")', body, "dist.destroy_process_group()",
            )  # fmt: skip
            self.helpers.append("def is_main():\n    return dist.get_rank() == 0\n")
        started = self.pick("started", ("main", "guarded", "at once"), () if self.shape != "module" else ("main",))
        body = _named(body)
        if started == "main":
            body = f"def main():\n{_block(body)}\n\n\nif __name__ == '__main__':\n    main()"
        elif started == "guarded":
            body = f"if __name__ == '__main__':\n{_block(body)}"
        imports = idioms.HEAD + f"\nEPOCHS = {self.draw.choice([2, 3])}\n"
        if self.drawn["model in"] != "here":
            files["net.py"] = f"{idioms.HEAD}\n\n{net}"
            imports += "from net import *\n" if self.one_in(5, "star") else "from net import Net, build\n"
            net = ""
        helpers = "\n\n".join(dict.fromkeys(self.helpers))
        places = ("helpers.py",) if files.keys() - {"net.py"} else ("helpers.py", "train.py")
        if helpers and self.pick("helpers in", places) == "helpers.py":
            files["helpers.py"] = f"{idioms.HEAD}import shutil\n\n\n{data}\n\n{helpers}"
            imports += "from helpers import *\n"
        else:
            imports += f"import shutil\n\n\n{data}\n\n{helpers}\n"
        for name in files.keys() - {"net.py", "helpers.py"}:
            more = "from helpers import *\n" if "helpers.py" in files else ""
            files[name] = f"{idioms.HEAD}{more}\n\n{files[name]}"
        imports += "".join(f"from {name[:-3]} import *\n" for name in files if name not in ("net.py", "helpers.py"))
        files["train.py"] = f"{imports}\n\n{net}\n\n{definitions}\n\n{body}\n"
        again = self.drawn["resume"]
        commands = ["train.py"] + (["train.py" + " --resume" * (again == "flag")] if again != "none" else [])
        return Script({name: self._guards(text) for name, text in files.items()}, commands, self.drawn)

    # ---- the parts

    def _guards(self, text: str) -> str:
        return text.replace("from helpers import *\n" * 2, "from helpers import *\n")

    def _model(self) -> tuple[str, str]:
        place = self.pick("model in", idioms.PLACES)
        made, forward = idioms.BODIES[self.pick("model", idioms.BODIES)]
        inside, after = idioms.STARTS[self.pick("start weights", idioms.STARTS)]
        way = self.pick("loss in", ("loop", "loop", "loop", *idioms.LOSSES_OF_MODEL))
        if way == "loop":
            without = ("masked mean", "helper of masked", "ignore_index") if self.ddp else ()
            self.loss, helper = idioms.LOSSES[self.pick("loss", idioms.LOSSES, without)]
            result, self.logits, arguments = "return out", "", "x"
            self.helpers += [helper] if helper else []
        else:
            self.loss, result, self.logits = idioms.LOSSES_OF_MODEL[way]
            arguments = "x, y=None"
        text = (
            f"{idioms.START_WEIGHTS if inside else ''}\n\nclass Net(nn.Module):\n    def __init__(self):\n"
            f"        super().__init__()\n{_block(_lines(made, inside), 2)}\n\n    def forward(self, {arguments}):\n"
            f"{_block(_lines(forward, result), 2)}\n\n\ndef build():\n    return Net()\n"
        )
        return text, _lines("$model = " + ("build()" if place.startswith("factory") else "Net()"), after)

    def _data(self) -> tuple[str, str]:
        texts = [idioms.SAMPLES, idioms.ROWS]
        if self.ddp:
            made = idioms.SHARED_DATA
        else:
            made = idioms.DATA[self.pick("data", idioms.DATA)]
            texts += [idioms.BATCHES] * ("Batches(" in made) + [idioms.GET_LOADERS] * ("get_loaders" in made)
        return "\n\n".join(texts), _lines(made, "$valid = DataLoader(Rows(5, 1), batch_size=2)")

    def _optimizer(self) -> str:
        made, helper = idioms.OPTIMIZERS[self.pick("optimizer", idioms.OPTIMIZERS)]
        schedule, self.sched_step, self.sched_epoch = idioms.SCHEDULES[self.pick("schedule", idioms.SCHEDULES)]
        helper_ema, average, self.average, self.averaged = idioms.AVERAGES[
            self.pick("average", ["none", "none", *idioms.AVERAGES])
        ]
        self.helpers += [text for text in (helper, helper_ema) if text]
        self.two = "$opt2" in made
        if self.ddp:
            self.average, self.averaged = (t.replace("$model", "$model.module") for t in (self.average, self.averaged))
        self.scaled = self.one_in(6, "GradScaler")
        scaler = "$scaler = torch.amp.GradScaler('cpu', enabled=False)" if self.scaled else ""
        return _lines(made, schedule, average, scaler)

    def _resume(self) -> str:
        self.state = "$model.module.state_dict()" if self.ddp else "$model.state_dict()"
        return idioms.RESUMES[self.pick("resume", ["none", "none", *idioms.RESUMES])]

    def _wrap(self) -> str:
        return "$model = nn.parallel.DistributedDataParallel($model)" if self.ddp else ""

    def main_only(self, text: str) -> str:
        if not self.ddp or not text.strip():
            return text
        return _when(self.draw.choice(["dist.get_rank() == 0", "is_main()"]), text)

    def _step(self) -> str:
        without = ("large", "nothing of a class", "not finite") if self.ddp else ()
        before, after = idioms.SKIPS[self.pick("skip", ["none", *idioms.SKIPS], without)]
        divide, self.when, left = idioms.ACCUMULATIONS[self.pick("accumulation", ["none", *idioms.ACCUMULATIONS])]
        clip, helper = idioms.CLIPS[self.pick("clipping", idioms.CLIPS)]
        self.helpers += [helper] if helper else []
        clip = clip.replace("print(", "PRINT(") if self.ddp else clip
        optimizers = ["$opt"] + ["$opt2"] * self.two
        zero = "\n".join(f"{name}.zero_grad()" for name in optimizers)
        step = "\n".join(f"$scaler.step({name})" if self.scaled else f"{name}.step()" for name in optimizers)
        if self.scaled:
            clip = _lines("\n".join(f"$scaler.unscale_({name})" for name in optimizers), clip) if clip else ""
            step += "\n$scaler.update()"
        stepped = _lines(clip, step, self.sched_step)
        first = not self.when and self.pick("zero_grad", ("first", "last")) == "first"
        self.leftover = _when("(i + 1) % 2", _lines(step, zero)) if left else ""
        return _lines(
            zero if first else "", before, self.loss, after, divide,
            "$scaler.scale(loss).backward()" if self.scaled else "loss.backward()",
            _when(self.when, stepped if first else _lines(stepped, zero)),
            _when(self.when, self.average),
        ).replace("PRINT(", "print(")  # fmt: skip

    def _evaluation(self) -> str:
        way = self.pick("evaluation", ["none", *idioms.EVALUATIONS])
        return idioms.EVALUATIONS[way].replace("LOGITS", f"model(x){self.logits}") if way != "none" else ""

    # ---- the loop around them

    def _shape(self, setup: str, step: str, evaluate: str, files: dict[str, str]) -> tuple[str, str]:
        """The script's body and its definitions."""
        shape = self.shape
        owned = shape in ("trainer", "trainer step", "callbacks")
        parted = shape in ("step function", "trainer step")
        leave = "return None" if parted else "continue"
        step = step.replace("LEAVE", leave)
        skips = "return None" in step
        definitions: list[str] = []
        if shape == "trainer step":
            method = f"def step(self, x, y, i):\n{_block(_lines(step, 'return loss'))}"
            call = "loss = self.step(x, y, i)"
        elif shape == "step function":
            names = _names(step)
            definitions.append(_named(f"def train_step({names}x, y, i):\n{_block(_lines(step, 'return loss'))}\n"))
            call = f"loss = train_step({_dollars(names)}x, y, i)"
        if parted:
            step = _lines(call, "if loss is None:\n    continue" if skips else "")
        log = self._log()
        ends = idioms.ENDS[self.pick("ends", ["none", *idioms.ENDS], ("by loss",) if self.ddp else ())]
        total = idioms.TOTALS[self.pick("total", idioms.TOTALS)]
        self.helpers += [idioms.METER]
        begin = _lines("total, count = 0.0, 0", "meter = Meter()" if "meter" in total else "")
        told = _lines("steps += 1", total, log, ends.replace("STOP", "break"))
        loop = self.pick("loop", idioms.LOOPS)
        before, head, first = idioms.LOOPS[loop]
        inner = _lines(begin, before, head) + "\n" + _block(_lines(first, step, told))
        if shape == "generator":
            names = _names(before, head, step)
            text = _lines(before, head) + "\n" + _block(_lines(first, step, "yield i, loss, x, y"))
            definitions.append(_named(f"def steps_of({names}):\n{_block(text)}\n"))
            inner = _lines(begin, f"i = -1\nfor i, loss, x, y in steps_of({_dollars(names)}):") + "\n" + _block(told)
        inner = _lines(inner, self.leftover)
        if shape == "engine file":
            names = _names(inner)
            made = _lines(inner, "return total, count, steps")
            files["engine.py"] = _named(
                f"def train_one_epoch({names}epoch, steps, history, rows):\n{_block(made)}\n\n\n{evaluate}"
            )
            inner = f"total, count, steps = train_one_epoch({_dollars(names)}epoch, steps, history, rows)"
            evaluate = ""
        closed = _lines(
            "score = float(total) / max(1, count)",
            self.main_only('print(f"epoch {epoch} mean {score:.4f}")'),
            self.sched_epoch, self._after_epoch(),
        )  # fmt: skip
        state = "best_score, bad, steps, history, rows = 9.0, 0, 0, [], []"
        fit = _lines(state, "for epoch in range($start, EPOCHS):") + "\n" + _block(_lines(inner, closed))
        fit = fit.replace("STOP", "break")
        finish = self._finish()
        if evaluate and shape == "trainer step":
            evaluate = evaluate.replace("evaluate(model, ", "evaluate(MODEL, ")
            evaluate = re.sub(r"\bmodel\b", "self.model", evaluate).replace("(MODEL, ", "(self, ")
            fit = re.sub(r"evaluate\(\$model(\.module)?, ", "self.evaluate(", fit)
            method += "\n\n" + evaluate
        elif evaluate:
            definitions.append(evaluate)
        if owned:
            methods = [f"def __init__(self):\n{_block(setup)}"]
            methods += [method] if shape == "trainer step" else []
            if shape == "callbacks":
                fit = self._called_back(fit, log, files)
            methods.append(f"def fit(self):\n{_block(_lines(fit, finish))}")
            definitions.append(_named("class Trainer:\n" + _block("\n\n".join(methods)), "self"))
            return self.draw.choice(["Trainer().fit()", "trainer = Trainer()\ntrainer.fit()"]), "\n\n".join(definitions)
        if shape in ("function", "generator"):
            names = _names(fit, finish)
            definitions.append(_named(f"def fit({names}):\n{_block(_lines(fit, finish))}\n"))
            return _lines(setup, f"fit({_dollars(names)})"), "\n\n".join(definitions)
        return _lines(setup, fit, finish), "\n\n".join(definitions)

    def _called_back(self, fit: str, log: str, files: dict[str, str]) -> str:
        """The log of a step is a callback's, of another file."""
        text = log.replace("history.", "trainer.history.").replace("rows.", "trainer.rows.")
        files["callbacks.py"] = _named(
            "class Callback:\n    def on_step(self, trainer, epoch, i, loss, x, y):\n        pass\n\n\n"
            f"class Log(Callback):\n    def on_step(self, trainer, epoch, i, loss, x, y):\n{_block(text, 2)}\n",
            "trainer",
        )
        depth = "        "
        fit = fit.replace(
            indent(log, depth),
            f"{depth}for callback in self.callbacks:\n{depth}    callback.on_step(self, epoch, i, loss, x, y)",
        )
        state = "best_score, bad, steps, history, rows = 9.0, 0, 0, [], []"
        return fit.replace(state, _lines(state, "self.callbacks = [Log()]", "self.history, self.rows = history, rows"))

    def _log(self) -> str:
        log = idioms.LOGS[self.pick("log", idioms.LOGS)].replace("LOGITS", f"$model(x){self.logits}")
        return log if "LOGITS" in log or "no_grad" in log else self.main_only(log)

    def _after_epoch(self) -> str:
        bare = "$model.module" if self.ddp else "$model"
        save, helper = idioms.SAVES[self.pick("save", idioms.SAVES)]
        self.helpers += [helper] if helper else []
        save = save.replace("STATE", self.state).replace("save_model($model", f"save_model({bare}")
        last = idioms.LAST.replace("STATE", self.state) if self.drawn["resume"] != "none" else ""
        keep = "best_score = min(best_score, score)"
        if self.drawn["evaluation"] == "none":
            return _lines(self.main_only(_lines(save, last)), keep)
        guarded = self.ddp and self.one_in(3, "evaluation guarded")
        score = f"score = evaluate({bare if guarded else '$model'}, $valid)"
        tell = 'print(f"valid {score:.4f}")'
        if guarded:
            return self.main_only(_lines(score, tell, save, last, keep))
        stop = idioms.STOPS[self.pick("stop", ["none", *idioms.STOPS])]
        text = _lines(score, self.main_only(tell), self.main_only(save), stop, keep)
        return _lines(_when(idioms.WHEN[self.pick("when", idioms.WHEN)], text), self.main_only(last))

    def _finish(self) -> str:
        results = idioms.RESULTS[self.pick("results", idioms.RESULTS)]
        self.helpers += [idioms.WRITE_RESULTS] if "write_results" in results else []
        final = f'torch.save({{"model": {self.state}, "ema": {self.averaged}}}, "final.pt")'
        final = final if self.averaged else f'torch.save({self.state}, "final.pt")'
        best = 'torch.save(best_state, "best.pt")' if self.drawn["save"] == "best kept in memory" else ""
        best = _when("best_score < 9.0 and 'best_state' in locals()", best)
        log = ""
        if "rows.append" in idioms.LOGS[self.drawn["log"]]:
            log = 'with open("log.csv", "w", newline="") as file:\n    csv.writer(file).writerows(rows)'
        if "history.append" in idioms.LOGS[self.drawn["log"]]:
            log = 'with open("history.json", "w") as file:\n    json.dump(history, file)'
        made = 'results = {"best": round(best_score, 4), "steps": steps}'
        return self.main_only(_lines(final, best, log, made, results, 'print("done", results)'))


def _dollars(names: str) -> str:
    """Arguments by the names that the caller has for them."""
    back = {plain: name for name, plain in _PLAIN.items()}
    return re.sub(r"\w+", lambda word: "$" + back.get(word[0], word[0]), names)
