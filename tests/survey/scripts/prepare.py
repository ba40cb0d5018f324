"""Downloads packages, unpacks their source, makes scripts small, converts everything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from tests.survey.beside import make_environment
from tests.survey.scripts.table import Script

REPOSITORY = Path(__file__).parents[3]
HOME = Path(os.environ.get("BMTRAIN_SCRIPTS", Path.home() / ".cache" / "bmtrain-scripts"))
PYTHON = HOME / "venv" / "bin" / "python"


def prepare(script: Script) -> str:
    """Both forms of a script under ``HOME``; returns what the converter said."""
    make_environment(HOME / "venv")
    _install(script)
    _unpack(script)
    _make_small(script)
    return _convert(script)


def original(script: Script) -> Path:
    """The package's source as it ships, with small constants."""
    return HOME / "original" / script.name


def converted(script: Script) -> Path:
    """The same, converted."""
    return HOME / "converted" / script.name


def report(script: Script) -> Path:
    """The converter's report, as JSON."""
    return HOME / "converted" / f"{script.name}.json"


def _install(script: Script) -> None:
    mark = HOME / "installed" / script.name
    if script.needs and (not mark.exists() or mark.read_text() != repr(script.needs)):
        subprocess.run([str(PYTHON), "-m", "pip", "install", "--quiet", *script.needs], check=True)
        mark.parent.mkdir(exist_ok=True)
        mark.write_text(repr(script.needs))


def _unpack(script: Script) -> None:
    target = HOME / "src" / f"{script.package}-{script.version}"
    if target.exists():
        return
    downloads = HOME / "downloads" / target.name
    form = ["--no-binary", script.package] if script.sdist else ["--only-binary", ":all:"]
    command = [str(PYTHON), "-m", "pip", "download", "--quiet", "--no-deps", *form, "--dest", str(downloads)]
    subprocess.run([*command, f"{script.package}=={script.version}"], check=True)
    archive = next(downloads.iterdir())
    parts = target.with_name(target.name + ".part")
    shutil.rmtree(parts, ignore_errors=True)
    if archive.suffix == ".whl":
        zipfile.ZipFile(archive).extractall(parts)
        parts.rename(target)
        return
    with tarfile.open(archive) as tar:
        tar.extractall(parts, filter="data")
    next(parts.iterdir()).rename(target)
    shutil.rmtree(parts)


def _make_small(script: Script) -> None:
    """A copy of the package with the table's constants, and the script's own file where it has one."""
    target = original(script)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(HOME / "src" / f"{script.package}-{script.version}", target)
    for name, pattern, replacement in script.constants:
        path = target / name
        text, count = re.subn(pattern, replacement, path.read_text(), flags=re.MULTILINE)
        if not count:
            raise ValueError(f"{script.name}: {pattern} is not in {name}")
        path.write_text(text)
    for name, text in script.files.items():
        (target / name).write_text(text)


def _convert(script: Script) -> str:
    target = converted(script)
    shutil.rmtree(target, ignore_errors=True)
    report(script).unlink(missing_ok=True)
    options = ["--output", str(target), "--quiet", "--report", str(report(script))]
    command = [sys.executable, "-m", "rewriter.cli", str(original(script)), *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode not in {0, 3}:  # 3: a script that the table says is refused
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout + done.stderr
