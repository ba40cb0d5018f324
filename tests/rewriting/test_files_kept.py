"""What is not a plain file of the project is left alone, and what is one stays what it was, but for its text."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewriter import convert, output
from rewriter.cli import main

BEFORE = "import torch\n\n\nclass A(torch.nn.Module):\n    pass\n"
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / "pkg").mkdir(parents=True)
    (root / "model.py").write_text(BEFORE)
    (root / "pkg" / "part.py").write_text(BEFORE)
    (root / "data.txt").write_text("data")
    return root


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "other.py"
    path.write_text(BEFORE)
    return path


def ours(path: Path) -> bool:
    return "bmt" in path.read_text()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a run that must end with exit code 2."""
    assert main([*map(str, arguments), "--quiet"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("bmt-convert: "), lines
    return lines[0]


# ---- what is read
# -----------------------------------------------------------------------------------------------------


def circle(root: Path) -> None:
    (root / "one.py").symlink_to("two.py")
    (root / "two.py").symlink_to("one.py")


def socket_file(root: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(root / "s.py"))


STRANGE: dict[str, Callable[[Path], object]] = {
    "a link to nothing": lambda root: (root / "x.py").symlink_to(root / "missing.py"),
    "links in a circle": circle,
    "a link to itself": lambda root: (root / "x.py").symlink_to("x.py"),
    "a link to a device": lambda root: (root / "x.py").symlink_to("/dev/zero"),
    "a link to a folder": lambda root: (root / "x.py").symlink_to(root / "pkg"),
    "a link to the folder above": lambda root: (root / "up").symlink_to(".."),
    "a FIFO": lambda root: os.mkfifo(root / "x.py"),
    "a FIFO as a notebook": lambda root: os.mkfifo(root / "x.ipynb"),
    "a FIFO for settings": lambda root: os.mkfifo(root / "pyproject.toml"),
    "a FIFO for ignored names": lambda root: os.mkfifo(root / ".gitignore"),
    "a FIFO among packages": lambda root: os.mkfifo(root / "pkg" / "__init__.py"),
    "a socket": socket_file,
    "a folder with an ending": lambda root: (root / "x.py").mkdir(),
}


@pytest.mark.timeout(60)  # who opens a FIFO waits for a writer
@pytest.mark.parametrize("how", ["--write", "--output", "--check"])
@pytest.mark.parametrize("strange", STRANGE)
def test_what_is_no_file_is_left_alone(project: Path, tmp_path: Path, strange: str, how: str) -> None:
    STRANGE[strange](project)
    before = {path: path.lstat().st_mode for path in project.rglob("*")}
    arguments = [how, *([str(tmp_path / "out")] if how == "--output" else [])]
    assert main([str(project), *arguments, "--quiet"]) == (how == "--check")
    written = {"--write": project, "--output": tmp_path / "out"}.get(how)
    if written is not None:
        assert ours(written / "model.py") and ours(written / "pkg" / "part.py")
    assert {path: path.lstat().st_mode for path in project.rglob("*")} == before


def test_a_link_out_of_the_folder_is_not_followed(project: Path, outside: Path) -> None:
    (project / "linked.py").symlink_to(outside)
    (project / "relative.py").symlink_to("../elsewhere/other.py")
    assert main([str(project), "--write", "--quiet"]) == 0
    assert outside.read_text() == BEFORE and (project / "linked.py").is_symlink()
    assert ours(project / "model.py")


def test_a_link_inside_the_folder_stays_one(project: Path, tmp_path: Path) -> None:
    (project / "linked.py").symlink_to("pkg/part.py")
    assert main([str(project), "--output", str(tmp_path / "out"), "--quiet"]) == 0
    assert os.readlink(tmp_path / "out" / "linked.py") == "pkg/part.py" and ours(tmp_path / "out" / "linked.py")
    assert main([str(project), "--write", "--quiet"]) == 0
    assert os.readlink(project / "linked.py") == "pkg/part.py" and ours(project / "linked.py")


def test_a_copy_of_a_link_out_of_the_folder_leads_where_it_led(project: Path, outside: Path, tmp_path: Path) -> None:
    (project / "pkg" / "linked.py").symlink_to("../../elsewhere/other.py")
    (project / "gone.txt").symlink_to("../nothing")
    assert main([str(project), "--output", str(tmp_path / "deep" / "out"), "--quiet"]) == 0
    copy = tmp_path / "deep" / "out" / "pkg" / "linked.py"
    assert copy.is_symlink() and copy.samefile(outside) and outside.read_text() == BEFORE
    assert os.readlink(tmp_path / "deep" / "out" / "gone.txt") == str(tmp_path / "nothing")


def test_what_a_copy_has_beside_files(project: Path, outside: Path, tmp_path: Path) -> None:
    links = {
        "data": "../elsewhere", "data_by_name": str(outside.parent), "part": "pkg", "itself": ".", "gone.txt": "none",
        "by_name.py": str(project / "model.py"), "pkg/up": "..", "pkg/deep.py": str(project / "pkg" / "part.py"),
    }  # fmt: skip
    for name, said in links.items():
        (project / name).symlink_to(said)
    for name in ("logs/runs", "pkg/empty"):
        (project / name).mkdir(parents=True)
    out = tmp_path / "deep" / "out"
    assert main([str(project), "--output", str(out), "--quiet"]) == 0
    led = {name: str(outside.parent) for name in ("data", "data_by_name")}
    led |= {"part": "pkg", "itself": ".", "gone.txt": "none", "by_name.py": "model.py"}
    led |= {"pkg/up": "..", "pkg/deep.py": "part.py"}
    assert {name: os.readlink(out / name) for name in links} == led
    assert (out / "logs" / "runs").is_dir() and (out / "pkg" / "empty").is_dir() and ours(out / "by_name.py")
    assert not ours(project / "model.py") and outside.read_text() == BEFORE
    inside = project / "out"
    assert main([str(project), "--output", str(inside), "--quiet"]) == 0
    assert not (inside / "out").exists() and (inside / "logs" / "runs").is_dir()


def test_names_that_are_no_text(project: Path, tmp_path: Path) -> None:
    (project / os.fsdecode(b"caf\xe9.py")).write_text(BEFORE)
    for ending in ("html", "md", "json", "sarif"):
        report = tmp_path / f"report.{ending}"
        assert main([str(project), "--report", str(report), "--check"]) == 1
        assert "caf" in report.read_text("utf-8")
    assert main([str(project), "--output", str(tmp_path / "out")]) == 0
    assert ours(tmp_path / "out" / os.fsdecode(b"caf\xe9.py"))


def test_a_link_that_is_named_is_followed(project: Path, outside: Path) -> None:
    link = project / "linked.py"
    link.symlink_to(outside)
    assert main([str(link), "--write", "--quiet"]) == 0
    assert link.is_symlink() and ours(outside)


def test_a_fifo_that_is_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(project / "x.py")
    assert "neither a file nor a folder" in refused(capsys, project / "x.py")
    assert "neither a file nor a folder" in refused(capsys, "/dev/null", "--write")


# ---- where it is written
# ----------------------------------------------------------------------------------------------


def test_output_is_not_written_through_a_link(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, real = tmp_path / "out", tmp_path / "real"
    real.mkdir()
    target.symlink_to(real)
    for force in ([], ["--force"]):
        assert f"is a link; give the folder that it leads to, {real}" in refused(
            capsys, project, "--output", target, *force
        )
    assert not list(real.iterdir())
    target.unlink()
    target.symlink_to(tmp_path / "nowhere")
    assert "is a link" in refused(capsys, project, "--output", target)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("leads", ["to a folder", "nowhere", "to a file"])
def test_a_link_inside_output_is_not_written_through(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], leads: str
) -> None:
    target, real = tmp_path / "out", tmp_path / "real"
    target.mkdir()
    if leads != "nowhere":
        real.mkdir() if leads == "to a folder" else real.write_text("x")
    (target / "pkg").symlink_to(real)
    assert "a link where a folder must go" in refused(capsys, project, "--output", target, "--force")
    assert os.listdir(target) == ["pkg"]
    assert leads != "to a folder" or not list(real.iterdir())


def test_a_link_in_place_of_a_file_is_replaced_only_with_force(
    project: Path, tmp_path: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "model.py").symlink_to(outside)
    assert "not empty; --force" in refused(capsys, project, "--output", target)
    assert (target / "model.py").is_symlink()
    assert main([str(project), "--output", str(target), "--force", "--quiet"]) == 0
    assert not (target / "model.py").is_symlink() and ours(target / "model.py")
    assert outside.read_text() == BEFORE


def test_a_fifo_in_place_of_a_file_stays(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    target.mkdir()
    os.mkfifo(target / "model.py")
    assert "a device or FIFO where a file must go" in refused(capsys, project, "--output", target, "--force")
    assert os.listdir(target) == ["model.py"]


def test_a_report_follows_its_link_and_eats_no_fifo(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "reports").mkdir()
    (tmp_path / "r.json").symlink_to(tmp_path / "reports" / "now.json")
    assert main([str(project), "--report", str(tmp_path / "r.json"), "--quiet"]) == 0
    capsys.readouterr()
    assert (tmp_path / "r.json").is_symlink() and (tmp_path / "reports" / "now.json").is_file()
    os.mkfifo(tmp_path / "f.json")
    assert "--report is a file" in refused(capsys, project, "--report", tmp_path / "f.json")


# ---- what stays
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o444, 0o4755, 0o2750])
def test_modes_stay(project: Path, tmp_path: Path, mode: int) -> None:
    (project / "model.py").chmod(mode)
    for arguments in (["--output", str(tmp_path / "out")], ["--write"]):
        assert main([str(project), *arguments, "--quiet"]) == 0
    for path in (project / "model.py", tmp_path / "out" / "model.py"):
        assert stat.S_IMODE(path.stat().st_mode) == mode and ours(path)


@AS_ROOT
def test_owner_and_group_stay(project: Path) -> None:
    os.chown(project / "model.py", 1234, 4321)
    (project / "model.py").chmod(0o2640)
    assert main([str(project), "--write", "--quiet"]) == 0
    facts = (project / "model.py").stat()
    assert (facts.st_uid, facts.st_gid, stat.S_IMODE(facts.st_mode)) == (1234, 4321, 0o2640)
    assert ours(project / "model.py")


def test_a_file_of_another_owner_stays_theirs(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may write it but not give a file away writes into it."""
    monkeypatch.setattr(output, "_may_own", lambda path: path.name != "model.py")
    number = (project / "model.py").stat().st_ino
    assert main([str(project), "--write", "--quiet"]) == 0
    assert (project / "model.py").stat().st_ino == number and ours(project / "model.py")


def test_hard_links_stay(project: Path, outside: Path) -> None:
    os.link(outside, project / "linked.py")
    os.link(project / "model.py", project / "again.py")
    assert main([str(project), "--write", "--quiet"]) == 0
    assert (project / "linked.py").samefile(outside) and ours(outside)
    assert (project / "model.py").samefile(project / "again.py") and ours(project / "again.py")


def test_a_hard_link_that_cannot_be_written_gets_back_what_it_held(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("model.py", "pkg/part.py"):
        os.link(project / name, tmp_path / name.replace("/", "-"))
    overwrite, calls = output._overwrite, [0]

    def fails(path: Path, data: bytes) -> None:
        calls[0] += 1
        overwrite(path, data)
        if calls[0] == 2:
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(output, "_overwrite", fails)
    assert "No space left on device; nothing was written" in refused(capsys, project, "--write")
    for name in ("model.py", "pkg/part.py"):
        assert (project / name).read_text() == BEFORE
    assert sorted(os.listdir(project)) == ["data.txt", "model.py", "pkg"]


def test_attributes_stay(project: Path, tmp_path: Path) -> None:
    path = project / "model.py"
    try:
        os.setxattr(path, "user.note", b"mine")
    except OSError:
        pytest.skip("this file system has no attributes")
    for arguments in (["--output", str(tmp_path / "out")], ["--write"]):
        assert main([str(project), *arguments, "--quiet"]) == 0
    assert os.getxattr(path, "user.note") == os.getxattr(tmp_path / "out" / "model.py", "user.note") == b"mine"


def test_the_time_is_that_of_the_change(project: Path) -> None:
    os.utime(project / "model.py", (1, 1))  # a cache of the old code must not be taken for the new one's
    assert main([str(project), "--write", "--quiet"]) == 0
    assert (project / "model.py").stat().st_mtime > 1e9


def test_long_names(project: Path, tmp_path: Path) -> None:
    name = "m" * 252 + ".py"
    (project / name).write_text(BEFORE)
    for arguments in (["--output", str(tmp_path / "out")], ["--write"]):
        assert main([str(project), *arguments, "--quiet"]) == 0
    assert ours(project / name) and ours(tmp_path / "out" / name)


@pytest.mark.parametrize("arguments", [["--write"], ["--output", "out"]])
def test_contents_are_on_the_disk_before_names_change(
    project: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], tmp_path: Path
) -> None:
    said: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        function = getattr(os, name)

        def noted(*given: Any, **options: Any) -> Any:
            said.append(name)
            return function(*given, **options)

        return noted

    for name in ("fsync", "replace"):
        monkeypatch.setattr(convert.os, name, noting(name))
    monkeypatch.chdir(tmp_path)
    assert main([str(project / "model.py"), *arguments, "--quiet"]) == 0
    assert said[0] == "fsync" and said[-1] == "fsync" and "replace" in said
    assert said.index("replace") > said.index("fsync")


# ---- errors of the system
# ---------------------------------------------------------------------------------------------


def raising(number: int) -> Callable[..., Any]:
    def fails(*given: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number), "somewhere")

    return fails


ERRORS = {
    "reading": (Path, "read_bytes"), "writing": (os, "fdopen"), "syncing": (os, "fsync"), "renaming": (os, "replace"),
    "looking": (os, "walk"), "asking": (Path, "resolve"),
}  # fmt: skip


@pytest.mark.parametrize("number", [5, 13, 28, 30, 40])
@pytest.mark.parametrize("arguments", [["--write"], ["--output", "out"], ["--report", "r.json"]])
@pytest.mark.parametrize("place", ERRORS)
def test_an_error_of_the_system_is_one_line(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str,
    arguments: list[str], number: int,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_text() for path in project.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(*ERRORS[place], raising(number))
        code = main([str(project), *arguments, "--quiet", "--jobs", "1"])
    lines = [line for line in capsys.readouterr().err.splitlines() if "bmt-convert" in line]
    unread = place == "reading"  # one line a file, as each is another error
    assert code == 2, (code, lines)
    assert (len(lines) == 1 or unread) and all(os.strerror(number) in line for line in lines), lines
    assert {path: path.read_text() for path in project.rglob("*") if path.is_file()} == before
    assert unread or not (tmp_path / "r.json").exists()
    if arguments[0] == "--output" and not unread:
        assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line(project: Path) -> None:
    command = [sys.executable, "-m", "rewriter", str(project), "--diff"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
                              cwd=Path(__file__).parents[2])  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
