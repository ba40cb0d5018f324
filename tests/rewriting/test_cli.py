"""The command line: what is printed, written and returned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rewriter.cli import main
from rewriter.types import Tried

PLAIN = "import torch\n\n\nclass A(torch.nn.Module):\n    pass\n"
DONE = "import torch\nimport bmtrain as bmt\n\n\nclass A(bmt.DistributedModule):\n    pass\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / "data").mkdir(parents=True)
    (root / "model.py").write_text(PLAIN)
    (root / "data" / "words.txt").write_text("one two")
    return root


def test_default_prints_a_diff_and_writes_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(project)]) == 0
    output = capsys.readouterr()
    assert "-class A(torch.nn.Module):" in output.out and "+class A(bmt.DistributedModule):" in output.out
    assert "model.py:4: BMT001" in output.err
    assert (project / "model.py").read_text() == PLAIN


def test_write(project: Path) -> None:
    (project / "model.py").chmod(0o755)
    assert main([str(project), "--write"]) == 0
    assert (project / "model.py").read_text() == DONE
    assert (project / "model.py").stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in project.iterdir()) == ["data", "model.py"]


def test_output_copies_the_whole_tree(project: Path, tmp_path: Path) -> None:
    assert main([str(project), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.py").read_text() == DONE
    assert (tmp_path / "out" / "data" / "words.txt").read_text() == "one two"
    assert (project / "model.py").read_text() == PLAIN


def test_check(project: Path) -> None:
    assert main([str(project), "--check"]) == 1
    main([str(project), "--write"])
    assert main([str(project), "--check"]) == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.py", b"def f(:\n"),
        ("latin.py", b"x = '\xe9'\n"),
        ("null.py", b"x = 1\0\n"),
        ("cookie.py", b"# coding: nonsense\n"),
    ],
)
def test_bad_file(project: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes) -> None:
    (project / name).write_bytes(content)
    assert main([str(project), "--write"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(errors) == 1 and name in errors[0] and "Traceback" not in errors[0]
    assert (project / name).read_bytes() == content
    assert (project / "model.py").read_text() == DONE


def test_missing_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["/nonexistent/thing"]) == 2
    assert capsys.readouterr().err == "bmt-convert: /nonexistent/thing: no such file or folder\n"


def test_folder_without_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no Python files" in capsys.readouterr().err


def test_output_into_itself_is_refused(project: Path) -> None:
    assert main([str(project), "--output", str(project)]) == 2
    assert (project / "model.py").read_text() == PLAIN


def test_libcst_is_imported_only_when_a_file_changes(tmp_path: Path) -> None:
    """It takes longer to import than most conversions that change nothing."""
    (tmp_path / "plain.py").write_text("x = 1\n")
    (tmp_path / "model.py").write_text("import torch\n\n\nclass A(torch.nn.Module):\n    pass\n")
    code = (
        "import sys; from rewriter.cli import main; main([sys.argv[1], '--check', '--quiet']);"
        "print('libcst' in sys.modules)"
    )
    for name, imported in (("plain.py", "False"), ("model.py", "True")):
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.split()[-1] == imported


TRAIN = """import torch

net = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for x in data:
    loss = net(x).mean()
    loss.backward()
    optimizer.step()
    print(1)
    print(2)
"""
LOADED = TRAIN.replace("in data", "in torch.utils.data.DataLoader(data)")


def listed(project: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    assert main([str(project), "--check", *options]) in {0, 1, 3}
    return capsys.readouterr().out.splitlines()


def listed_by(options: list[str], project: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main([str(project), *options]) in {0, 3}
    return capsys.readouterr().out.splitlines()


def test_the_last_line_says_how_to_launch(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "train.py").write_text(LOADED)
    launch = f"torchrun --nproc_per_node=N {project / 'train.py'}"
    assert listed(project, capsys)[-2:] == [
        "nothing was written", f"next: bmt-convert {project} --write; then {launch}",
    ]  # fmt: skip
    copy = project.with_name("a copy")
    assert listed_by(["--output", str(copy)], project, capsys)[-2:] == [
        f"the project, converted, is in {copy}", f"ready to launch: torchrun --nproc_per_node=N '{copy / 'train.py'}'",
    ]  # fmt: skip
    main([str(project), "--write", "-q"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("ready to launch: torchrun")
    assert listed(project, capsys, "-q")[-1].startswith("ready to launch: torchrun")  # converted already


def test_the_script_to_launch_is_the_one_that_imports_the_loop(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The module with the loop seeds on import, so that it starts the ranks, too; a second script stands first."""
    body = "    " + TRAIN.partition("\n\n")[2].replace("\n", "\n    ").rstrip() + "\n"
    (project / "engine.py").write_text("import torch\n\ntorch.manual_seed(0)\n\n\ndef fit(data):\n" + body)
    (project / "run.py").write_text("from engine import fit\n\nif __name__ == '__main__':\n    fit(data)\n")
    (project / "finder.py").write_text(TRAIN)
    assert listed(project, capsys)[-1].endswith(f"torchrun --nproc_per_node=N {project / 'run.py'}")


@pytest.mark.parametrize(
    "text", ["from tools import train", "from .tools import train", "from tools import (\n    train,\n)"]
)
def test_a_module_that_is_imported_from_its_package_is_not_launched(
    project: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (project / "work.py").write_text(f"{text}\n{TRAIN}")
    (project / "tools").mkdir()
    (project / "tools" / "train.py").write_text(TRAIN)
    assert listed(project, capsys)[-1].endswith(f"torchrun --nproc_per_node=N {project / 'work.py'}")


@pytest.mark.parametrize("other, launched", [("evaluate", "train"), ("run", "run")])
def test_a_training_script_of_which_another_takes_parts_is_launched(
    project: Path, capsys: pytest.CaptureFixture[str], other: str, launched: str
) -> None:
    body = "    " + TRAIN.partition("\n\n")[2].replace("\n", "\n    ").rstrip() + "\n"
    guard = "\n\nif __name__ == '__main__':\n    fit([])\n"
    (project / "train.py").write_text(f"import torch\n\n\ndef fit(data):\n{body}{guard}")
    (project / f"{other}.py").write_text(f"import torch\nfrom train import fit\n\ntorch.manual_seed(0)\n{guard}")
    assert listed(project, capsys)[-1].endswith(f"torchrun --nproc_per_node=N {project / launched}.py")


def test_a_script_that_comes_to_the_loop_by_a_file_between_is_launched(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What checks a layer runs backward, too, and stands first."""
    body = "    " + TRAIN.partition("\n\n")[2].replace("\n", "\n    ").rstrip() + "\n"
    (project / "engine.py").write_text(f"import torch\n\n\ndef fit(data):\n{body}")
    (project / "table.py").write_text("from engine import fit\n\nENGINES = {'a': fit}\n")
    (project / "main.py").write_text(
        "import torch\nfrom table import ENGINES\n\nif __name__ == '__main__':\n"
        "    torch.manual_seed(0)\n    ENGINES['a'](data)\n"
    )
    (project / "a_check.py").write_text(f"{TRAIN}\nif __name__ == '__main__':\n    pass\n")
    assert listed(project, capsys)[-1].endswith(f"torchrun --nproc_per_node=N {project / 'main.py'}")


@pytest.mark.parametrize("imports", ["", "from steps import train\n"])
def test_a_script_whose_name_says_so_alone_is_launched(
    project: Path, capsys: pytest.CaptureFixture[str], imports: str
) -> None:
    """``train`` of ``steps.py`` is a function, and not the script of that name."""
    (project / "steps.py").write_text("def train():\n    pass\n")
    (project / "a_plot.py").write_text(f"{imports}{TRAIN}")
    (project / "train_old.py").write_text(TRAIN)
    (project / "train.py").write_text(TRAIN)
    assert listed(project, capsys)[-1].endswith(f"torchrun --nproc_per_node=N {project / 'train.py'}")


def test_a_package_with_a_module_of_the_scripts_name_is_not_launched(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``from .main import load`` in ``sets/__init__.py`` means ``sets/main.py``, and not the script."""
    (project / "main.py").write_text(TRAIN)
    (project / "sets").mkdir()
    (project / "sets" / "main.py").write_text("def load():\n    return []\n")
    (project / "sets" / "__init__.py").write_text("from .main import load\n")
    (project / "other.py").write_text("from sets.main import load\n")
    assert listed(project, capsys)[-1].endswith(f"torchrun --nproc_per_node=N {project / 'main.py'}")


def test_the_last_line_names_what_to_see_to_first(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "train.py").write_text(
        LOADED + 'with open("net.pt", "wb") as file:\n    file.write(b"1")\n    torch.save(net, file)\n'
    )
    line = TRAIN.count("\n") + 3
    said = (
        f"before the launch, see to {project / 'train.py'}:{line}, where several ranks differ from one; then torchrun"
    )
    assert f"--write; {said}" in listed(project, capsys)[-1]
    assert listed_by(["--write"], project, capsys)[-1].startswith(said)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TRAIN.replace("torch.optim.SGD", "KFAC"), "KFAC runs the model itself"),
        (TRAIN.replace("optimizer", "engine").replace("engine = torch.optim.SGD(net.parameters(), lr=0.1)", ""), ""),
        ("from accelerate import Accelerator\n" + TRAIN.replace("loss.backward()", "Accelerator().backward(loss)"), ""),
    ],
)
def test_a_file_that_trains_and_stays_is_an_error_line(
    project: Path, capsys: pytest.CaptureFixture[str], text: str, reason: str
) -> None:
    (project / "train.py").write_text(text)
    lines = listed(project, capsys)
    assert lines[0].startswith(f"{project / 'train.py'}: error: trains, and was left as it is: ") and reason in lines[0]
    assert lines[-1].startswith("not ready to launch: ") and reason in lines[-1]


def test_the_last_line_has_the_cause_and_no_file_that_is_part_of_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = "def more(net, optimizer, x):\n    net(x).sum().backward()\n    optimizer.step()\n"
    (project / "a_part.py").write_text(steps)
    (project / "train.py").write_text("import a_part\n" + TRAIN.replace("torch.optim.SGD", "KFAC"))
    lines = listed(project, capsys)
    assert any(f"{project / 'a_part.py'}: error: trains" in line and "part of " in line for line in lines)
    assert lines[-1].startswith(f"not ready to launch: {project / 'train.py'} trains") and "KFAC" in lines[-1]


def test_nothing_to_launch(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(project, capsys, "--unsafe")[-1] == f"next: bmt-convert {project} --unsafe --write"
    assert listed_by(["--write"], project, capsys)[-3:] == [
        "1 of 1 file changed, 1 edit", "1 file changed in place", "nothing to launch: no script here trains",
    ]  # fmt: skip


def test_a_loop_that_nothing_starts_is_not_ready(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "    " + TRAIN.partition("\n\n")[2].replace("\n", "\n    ").rstrip() + "\n"
    (project / "train.py").write_text("import torch\n\n\ndef fit(data):\n" + body)
    assert listed(project, capsys)[-1].startswith("not ready to launch: nothing here starts the training")


def test_one_line_a_rule_and_all_when_asked(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "train.py").write_text(TRAIN)
    lines = listed(project, capsys)
    assert [line for line in lines if "BMT027" in line] == [
        f"{project / 'train.py'}:9: BMT027 one rank prints (and 1 more)"
    ]
    assert len([line for line in listed(project, capsys, "-v") if "BMT027" in line]) == 2
    marks = ["left: " in line for line in lines[:-2]]
    assert any(marks) and marks == sorted(marks, reverse=True)


def test_what_is_left_for_one_reason_is_one_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.py", "b.py", "c.py", "d.py"):
        (project / name).write_text(f'{TRAIN}log = open("{name}", "x")\n')
    lines = listed(project, capsys)
    (line,) = [line for line in lines if "BMT033" in line]
    assert line.startswith(f"{project / 'a.py'}:11: BMT033 left: ")
    assert line.endswith(f"(and 3 more in 4 files: {project / 'b.py'}:11, {project / 'c.py'}:11 ...)")
    assert len([line for line in listed(project, capsys, "-v") if "BMT033" in line]) == 4
    assert [line for line in lines[:-3] if "left: " in line] == lines[: sum("left: " in line for line in lines)]


def test_a_verdict_comes_last(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rewriter.verify import __main__ as tool

    for held, verdict in ((False, "NOT shown"), (True, "the same")):
        tried = Tried("--verify", held, verdict)
        monkeypatch.setattr(tool, "compared", lambda arguments, tried=tried: tried)
        assert main([str(project), "--write", "--verify", "model:A"]) == (0 if held else 1)
        *_, written, launch, last = ["", *capsys.readouterr().out.splitlines()]
        assert last == verdict
        if held:
            assert (written, launch) == ("1 file changed in place", "nothing to launch: no script here trains")
        else:
            assert (written, launch) == ("1 of 1 file changed, 1 edit", "nothing was written")
            assert (project / "model.py").read_text() == PLAIN


def test_the_hook_names_file_line_and_rule(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hooks = (Path(__file__).parents[2] / ".pre-commit-hooks.yaml").read_text()
    program, *options = hooks.partition("entry: ")[2].splitlines()[0].split()
    assert program == "bmt-convert" and "require_serial: true" in hooks
    (project / "done.py").write_text("x = 1\n")
    assert main([*options, str(project / "done.py"), str(project / "model.py")]) == 1
    assert capsys.readouterr().out.startswith(f"{project / 'model.py'}:4: BMT001 class A inherits")
    assert main([*options, str(project / "done.py")]) == 0


LEFT_TRAINING = {
    "a step in a hook": (
        "import torch\n\nnet = torch.nn.Linear(4, 1)\n"
        "opts = {p: torch.optim.SGD([p], lr=0.1) for p in net.parameters()}\n"
        "for p in net.parameters():\n    p.register_post_accumulate_grad_hook(lambda p: opts[p].step())\n"
        "net(torch.ones(1, 4)).mean().backward()\n"
    ),
    "one optimizer's step in a hook": (
        "import torch\n\nnet = torch.nn.Linear(4, 1)\nopt = torch.optim.SGD(net.parameters(), lr=0.1)\n"
        "net.weight.register_post_accumulate_grad_hook(lambda p: opt.step())\n"
        "net(torch.ones(1, 4)).mean().backward()\n"
    ),
    "one optimizer's step in a method that is a hook": (
        "import torch\n\n\nclass Steps:\n    def __init__(self, net):\n"
        "        self.opt = torch.optim.SGD(net.parameters(), lr=0.1)\n"
        "        net.weight.register_post_accumulate_grad_hook(self.step)\n\n"
        "    def step(self, p):\n        self.opt.step()\n\n\n"
        "net = torch.nn.Linear(4, 1)\nsteps = Steps(net)\nnet(torch.ones(1, 4)).mean().backward()\n"
    ),
    "a step in a function that is a hook": (
        "import torch\n\nnet = torch.nn.Linear(4, 1)\n"
        "opts = {p: torch.optim.SGD([p], lr=0.1) for p in net.parameters()}\n\n\n"
        "def step(p):\n    opts[p].step()\n    opts[p].zero_grad()\n\n\n"
        "for p in net.parameters():\n    p.register_post_accumulate_grad_hook(step)\n"
        "net(torch.ones(1, 4)).mean().backward()\n"
    ),
    "a trainer": "from transformers import Trainer\n\ntrainer = Trainer(model)\ntrainer.train()\n",
    "lightning": (
        "import lightning\n\n\nclass Net(lightning.LightningModule):\n    pass\n\n\nlightning.Trainer().fit(Net())\n"
    ),
    "accelerate": (
        "from accelerate import Accelerator\n\naccelerator = Accelerator()\nmodel = accelerator.prepare(model)\n"
        "accelerator.backward(model(x))\n"
    ),
    "deepspeed": (
        "import deepspeed\n\nengine, *_ = deepspeed.initialize(model=net)\nengine.backward(engine(x))\nengine.step()\n"
    ),
}


@pytest.mark.parametrize("text", LEFT_TRAINING.values(), ids=LEFT_TRAINING.keys())
def test_a_script_that_trains_and_is_left_is_an_error(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "train.py"
    script.write_text(text)
    assert main([str(script), "--write"]) == 3 and script.read_text() == text
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{script}: error: trains, and was left as it is: ") and last.startswith(
        "not ready to launch"
    )


EXAMPLES = {
    "in a docstring": '    """\n    >>> loss.backward()\n    >>> optimizer.step()\n    """\n',
    "in a comment": "    # loss.backward(); optimizer.step()\n",
    "in a text": "    usage = 'loss.backward(), then optimizer.step()'\n",
}


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_an_example_trains_nothing(example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "lars.py"
    script.write_text(f"class LARS(Optimizer):\n{example}\n    def zero(self):\n        return 0\n")
    assert main([str(script), "--write"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing to launch: no script here trains"


def test_what_keeps_a_script_for_accelerate_stands_at_its_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "train.py"
    more = "accelerator.join_uneven_inputs(model)\naccelerator.print(library.f(accelerator))\n"
    script.write_text("from accelerate import Accelerator\naccelerator = Accelerator()\n" + TRAIN + more)
    main([str(script), "--write"])
    shown, line = capsys.readouterr().out, TRAIN.count("\n") + 3
    assert (
        f"{script}:{line}: BMT090 left: the script is written for accelerate and stays: accelerator.join_une" in shown
    )
    assert (
        f"{script}:{line + 1}: BMT090 left: the script is written for accelerate and stays: accelerator is h" in shown
    )


def test_completion(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert capsys.readouterr().err == "bmt-convert: --print-completion needs shtab: pip install shtab\n"
    monkeypatch.delitem(sys.modules, "shtab")
    pytest.importorskip("shtab")
    assert main(["--print-completion", "zsh"]) == 0
    assert "--unsafe" in capsys.readouterr().out
