"""Reports, settings, standard input, notebooks, explanations."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from rewriter import portions
from rewriter.cli import main
from rewriter.docs import rules_markdown
from rewriter.plan import Options
from rewriter.portions import convert_project
from rewriter.rules import RULES

PLAIN = "import torch\n\n\nclass A(torch.nn.Module):\n    pass\n"
DONE = "import torch\nimport bmtrain as bmt\n\n\nclass A(bmt.DistributedModule):\n    pass\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(PLAIN)
    return path


def test_json_report(model: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    assert main([str(tmp_path), "--quiet", "--report", str(tmp_path / "out.json")]) == 2
    report = json.loads((tmp_path / "out.json").read_text())
    broken, converted = report["files"]
    assert "cannot parse" in broken["error"] and not broken["changed"]
    assert converted["changed"]
    assert [finding["code"] for finding in converted["findings"]] == ["BMT001"]
    assert converted["findings"][0]["line"] == 4


def test_sarif_and_markdown_reports(model: Path, tmp_path: Path) -> None:
    assert main([str(model), "--quiet", "--report", str(tmp_path / "out.sarif")]) == 0
    run = json.loads((tmp_path / "out.sarif").read_text())["runs"][0]
    assert [result["ruleId"] for result in run["results"]] == ["BMT001"]
    driver = run["tool"]["driver"]
    assert {rule["id"] for rule in driver["rules"]} == {rule.code for rule in RULES}
    assert driver["semanticVersion"] and all("Why:" in rule["help"]["text"] for rule in driver["rules"])
    where = run["results"][0]["locations"][0]["physicalLocation"]
    assert where["region"] == {"startLine": 4, "startColumn": 1, "endColumn": 26}
    assert where["artifactLocation"]["uri"] == model.as_uri()
    assert main([str(model), "--quiet", "--report", str(tmp_path / "out.md")]) == 0
    assert f"| {model.as_posix()} | 4 | BMT001 | applied |" in (tmp_path / "out.md").read_text()
    assert main([str(model), "--report", str(tmp_path / "out.txt")]) == 2


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_explain(rule: object, capsys: pytest.CaptureFixture[str]) -> None:
    code = rule.code  # type: ignore[attr-defined]
    assert main(["--explain", code.lower()]) == 0
    output = capsys.readouterr().out
    assert output.startswith(code) and "Why:" in output


def test_unknown_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--explain", "BMT999"]) == 2
    assert "BMT001" in capsys.readouterr().err


def test_select_and_ignore(model: Path) -> None:
    assert main([str(model), "--check", "--quiet", "--ignore", "BMT001"]) == 0
    assert main([str(model), "--check", "--quiet", "--select", "BMT002,BMT003"]) == 0
    assert main([str(model), "--check", "--quiet", "--select", "BMT00"]) == 1


def test_settings(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "pyproject.toml"
    settings.write_text('[tool.bmt-convert]\nignore = ["BMT001"]\n')
    assert main([str(model), "--check", "--quiet"]) == 0
    settings.write_text('[tool.bmt-convert]\nexclude = ["model.py"]\n')
    assert main([str(tmp_path), "--check", "--quiet"]) == 2
    settings.write_text("[tool.bmt-convert]\nsafe = true\n")
    assert main([str(model), "--check"]) == 2
    assert "unknown key 'safe'" in capsys.readouterr().err


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(PLAIN))
    assert main(["-"]) == 0
    assert capsys.readouterr().out == DONE


def given(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_standard_input_keeps_what_was_found_out_of_the_code(
    monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    given(monkeypatch, PLAIN.replace("\n", "\r\n").encode())
    assert main(["-"]) == 0
    shown = capsysbinary.readouterr()
    assert shown.out == DONE.replace("\n", "\r\n").encode()
    assert shown.err == b"stdin.py:4: BMT001 class A inherits bmt.DistributedModule\n"
    given(monkeypatch, b"x = (\n")
    assert main(["-"]) == 2
    shown = capsysbinary.readouterr()
    assert not shown.out and shown.err.count(b"\n") == 1 and b"stdin.py:1: cannot parse" in shown.err
    given(monkeypatch, b"# \xe9\n")
    assert main(["-", "--check"]) == 2
    assert b"not UTF-8" in capsysbinary.readouterr().err


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["-", "--write"], "--write needs files"),
        (["-", "--output", "there"], "--output needs files"),
        (["-", "--verify", "a:b"], "--verify needs files"),
        (["-", "model.py"], "- is standard input, and goes alone"),
        (["model.py", "--force"], "--force says how --output is done"),
    ],
)
def test_what_makes_no_sense(capsys: pytest.CaptureFixture[str], options: list[str], error: str) -> None:
    assert main(options) == 2
    assert error in capsys.readouterr().err


def test_a_folder_that_is_not_empty_is_asked_about(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    for name in ("model.py", "mine.txt"):
        there.mkdir(exist_ok=True)
        (there / name).write_text("mine")
        assert main([str(model), "--output", str(there)]) == 2
        assert "not empty; --force writes into it" in capsys.readouterr().err
        assert (there / name).read_text() == "mine"
    assert main([str(model), "--output", str(there), "--force"]) == 0
    assert (there / "model.py").read_text() == DONE and (there / "mine.txt").read_text() == "mine"
    assert main([str(model), "--output", str(model)]) == 2
    assert main([str(model), "--output", str(there / "mine.txt")]) == 2
    (there / "model.py").unlink()
    (there / "model.py").mkdir()
    assert main([str(model), "--output", str(there), "--force"]) == 2
    assert "a folder where a file must go; nothing was written" in capsys.readouterr().err
    assert sorted(path.name for path in there.iterdir()) == ["mine.txt", "model.py"]


def test_a_notebook_is_named_by_its_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": ["text"]},
        {"cell_type": "code", "metadata": {}, "source": ["import torch\n", "\n"]},
        {"cell_type": "code", "metadata": {}, "source": ["%%bash\n", "ls\n"]},
        {"cell_type": "code", "metadata": {}, "source": ["# a\n", "\n", "class A(torch.nn.Module):\n", "    pass"]},
    ]
    path = tmp_path / "nb.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4}))
    assert main([str(path), "--check", "--report", str(tmp_path / "out.json")]) == 1
    assert capsys.readouterr().out.splitlines()[0] == f"{path}:cell 4:3: BMT001 class A inherits bmt.DistributedModule"
    finding = json.loads((tmp_path / "out.json").read_text())["files"][0]["findings"][0]
    assert (finding["at"], finding["line"]) == ("cell 4:3", 3)
    cells[3]["source"] = ["\n", "x = (\n"]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4}))
    assert main([str(path), "--check"]) == 2
    assert f"{path}:cell 4:2: cannot parse" in capsys.readouterr().err


def test_notebook(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": ["class A(torch.nn.Module): text\n"]},
        {"cell_type": "code", "metadata": {}, "source": ["%matplotlib inline\n", "import torch\n", "!ls"]},
        {"cell_type": "code", "metadata": {}, "outputs": [], "source": ["%%bash\n", "class A(torch.nn.Module):\n"]},
        {"cell_type": "code", "metadata": {}, "outputs": [], "source": ["class A(torch.nn.Module):\n", "    pass"]},
    ]
    path = tmp_path / "book.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4}, indent=1) + "\n")
    assert main([str(path), "--write", "--quiet"]) == 0
    after = [cell["source"] for cell in json.loads(path.read_text())["cells"]]
    assert after[0] == cells[0]["source"] and after[2] == cells[2]["source"]
    assert after[1] == ["%matplotlib inline\n", "import torch\n", "import bmtrain as bmt\n", "!ls"]
    assert after[3] == ["class A(bmt.DistributedModule):\n", "    pass"]
    assert main([str(path), "--check", "--quiet"]) == 0


@pytest.mark.parametrize(
    "before, after",
    [
        ("%%time\n{}", True),
        ("%%capture out\n{}", True),
        ("%%timeit\n{}", False),
        ("%%bash\n{}", False),
        ("!pip install a \\\n   b\n{}", True),
        ("files = !ls *.py\na, b = %sx ls\n{}", True),
        ("torch?\ntorch.nn.Module??\n?torch\n%%time\n{}", True),
        ("k = 7  # why?\nj = (k\n     % 2)\n# a question?\nif j:\n    !ls\n{}", True),
    ],
)
@pytest.mark.parametrize("in_one", [True, False])
def test_magics_of_a_notebook(tmp_path: Path, before: str, after: bool, in_one: bool) -> None:
    text = before.format("class A(torch.nn.Module):\n    pass  # is it?\n")
    cells = [
        {"cell_type": "code", "metadata": {}, "source": source if in_one else source.splitlines(keepends=True)}
        for source in ("import torch\nimport bmtrain as bmt\n", text)
    ]
    path = tmp_path / "book.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4}, indent=1) + "\n")
    assert main([str(path), "--write", "--quiet"]) == 0
    found = json.loads(path.read_text())["cells"][1]["source"]
    assert isinstance(found, str) is in_one
    assert "".join(found) == (text.replace("torch.nn.Module)", "bmt.DistributedModule)") if after else text)


def test_what_a_question_mark_ends_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [
        {"cell_type": "code", "metadata": {}, "source": "import torch\nA = torch.nn.Module  # is it?\nclass B(A): pass"}
    ]
    path = tmp_path / "book.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4}))
    assert main([str(path), "--check"]) == 1
    assert "class B inherits bmt.DistributedModule" in capsys.readouterr().out


def test_blocks_are_named_by_the_user(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.parts = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])\n\n"
        "    def forward(self, x):\n        for part in self.parts:\n            x = part(x)\n        return x\n"
    )
    assert main([str(path), "--quiet", "--output", str(tmp_path / "plain")]) == 0
    assert "TransformerBlockList" not in (tmp_path / "plain" / "model.py").read_text()
    assert main([str(path), "--quiet", "--blocks", "Net.parts", "--output", str(tmp_path / "named")]) == 0
    assert "x = self.parts(x)" in (tmp_path / "named" / "model.py").read_text()
    path.write_text(path.read_text().replace("range(3)])", "range(3)])  # bmt: blocks"))
    assert main([str(path), "--quiet", "--write"]) == 0
    assert "x = self.parts(x)" in path.read_text()


def test_color(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model), "--color", "always"]) == 0
    assert "\033[32m+class A(bmt.DistributedModule):\033[0m\n" in capsys.readouterr().out


def test_color_as_the_environment_has_it(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value, coloured in (("FORCE_COLOR", "1", True), ("NO_COLOR", "", True), ("NO_COLOR", "1", False)):
        monkeypatch.setenv(name, value)
        main([str(model)])
        assert ("\033[32m" in capsys.readouterr().out) == coloured, (name, value)
    main([str(model), "--color", "always"])
    assert "\033[32m" in capsys.readouterr().out


def test_versions_agree(capsys: pytest.CaptureFixture[str]) -> None:
    import bmtrain

    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    setup = (Path(__file__).parents[2] / "setup.cfg").read_text()
    assert capsys.readouterr().out == f"bmt-convert {bmtrain.__version__}\n"
    assert f"\nversion = {bmtrain.__version__}\n" in setup


def test_all_rules_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--explain"], ["--explain", "all"]):
        assert main(option) == 0
        assert capsys.readouterr().out.splitlines() == [f"{rule.code}  {rule.title}" for rule in RULES]


def test_portions_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        (tmp_path / f"m{number}.py").write_text(PLAIN.replace("class A", f"class A{number}"))
    (tmp_path / "last.py").write_text("from m0 import A0\n\n\nclass B(A0):\n    pass\n")
    paths = sorted(tmp_path.glob("*.py"))
    whole = convert_project(paths, Options(), [tmp_path])
    monkeypatch.setattr(portions, "WHOLE", 10)
    monkeypatch.setattr(portions, "PORTION", 200)
    assert convert_project(paths, Options(), [tmp_path], jobs=2) == whole
    assert sum(result.changed for result in whole) == 6


NET = """from torch import nn


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
"""
SUB = """from a import Net


class Sub(Net):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x + 1
"""


@pytest.mark.parametrize("skip", [False, True])
def test_a_loop_over_a_list_of_another_portion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: bool) -> None:
    """The loop becomes a call where the other portion converts the list, and only there."""
    (tmp_path / "a.py").write_text("# bmt: skip-file\n" * skip + NET)
    (tmp_path / "b.py").write_text(SUB)
    paths = [tmp_path / "a.py", tmp_path / "b.py"]
    monkeypatch.setattr(portions, "WHOLE", 10)
    monkeypatch.setattr(portions, "PORTION", 20)
    base, sub = convert_project(paths, Options(), [tmp_path])
    assert base.changed is not skip
    assert (b"x = self.layers(x)" in sub.after) is not skip
    monkeypatch.undo()
    assert convert_project(paths, Options(), [tmp_path]) == [base, sub]


def test_rules_as_markdown() -> None:
    text = rules_markdown()
    assert all(f"#### {rule.code}: " in text for rule in RULES)
    assert text.count("```") % 2 == 0
