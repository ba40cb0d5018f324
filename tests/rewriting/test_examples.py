"""What users are shown is what the converter does: examples/bmtrain_gpt byte for byte, and the README's diffs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rewriter.cli import main
from tests.runtime.ranks import run_script

from .helpers import converted

EXAMPLES = Path(__file__).parents[2] / "examples"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_converted_example_is_what_the_converter_makes(tmp_path: Path) -> None:
    assert main([str(EXAMPLES / "plain_gpt"), "--output", str(tmp_path / "out"), "--quiet"]) == 0
    assert contents(tmp_path / "out") == contents(EXAMPLES / "bmtrain_gpt"), (
        "run: rm -r examples/bmtrain_gpt; bmt-convert examples/plain_gpt --output examples/bmtrain_gpt"
    )


def test_the_plain_example_does_change() -> None:
    assert main([str(EXAMPLES / "plain_gpt"), "--check", "--quiet"]) == 1


def test_converting_the_converted_example_changes_nothing() -> None:
    assert main([str(EXAMPLES / "bmtrain_gpt"), "--check", "--quiet"]) == 0


ROOT = EXAMPLES.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DIFFS = [
    part.partition("```")[0]
    for page in PAGES
    for part in re.split(r"^<!-- converted -->\n```diff\n", page.read_text(), flags=re.MULTILINE)[1:]
]


@pytest.mark.parametrize("diff", DIFFS)
def test_the_docs_show_what_the_converter_does(diff: str) -> None:
    lines = diff.splitlines()
    before = "\n".join(line[1:] for line in lines if not line.startswith("+")) + "\n"
    after = "\n".join(line[1:] for line in lines if not line.startswith("-")) + "\n"
    assert converted(before) == after


def test_the_readme_shows_a_script_and_the_docs_more() -> None:
    assert len(DIFFS) == 4 and len(PAGES[0].read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        path, _, section = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if section:
            titles = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            assert section in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_docs_show_the_rules() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES.parent / ".ci" / "rules"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_tutorial_proves_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys' biases have gradients of rounding error alone, which AdamW makes steps of: on one rank, too."""
    shutil.copy(EXAMPLES / "tutorial" / "train.py", tmp_path)
    assert main([str(tmp_path), "--prove", "train.py", "--ranks", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "the converted script does what the original does on 1 rank"


def test_the_tutorial_says_what_happens(tmp_path: Path) -> None:
    page, script = (ROOT / "docs" / "tutorial.md").read_text(), EXAMPLES / "tutorial" / "train.py"
    diff = next(diff for diff in DIFFS if "counting in steps" in diff)
    shown = "".join(f"{line[1:]}\n" for line in diff.splitlines() if not line.startswith("+"))
    assert shown == script.read_text()
    assert main([str(script), "--output", str(tmp_path), "--quiet"]) == 0
    converted_script = tmp_path / "train.py"
    runs = ((script, 1), (converted_script, 1), (converted_script, 2))
    printed = [
        done.stdout
        for path, ranks in runs
        for done in run_script(path, ranks=ranks, folder=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""})
    ]
    said = re.findall(r"^epoch .*$", page, re.MULTILINE)
    assert len(said) == 9 and said == "".join(printed).splitlines() and printed[-1] == ""
