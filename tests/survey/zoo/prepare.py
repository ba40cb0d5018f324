"""Downloads packages, unpacks their source, converts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from tests.survey.beside import make_environment
from tests.survey.zoo.packages import PACKAGES, Package

REPOSITORY = Path(__file__).parents[3]
HOME = Path(os.environ.get("BMTRAIN_ZOO", Path.home() / ".cache" / "bmtrain-zoo"))
PYTHON = HOME / "venv" / "bin" / "python"


class UnreachableError(Exception):
    """No package can be downloaded here."""


def prepare(names: list[str], again: bool) -> None:
    """Everything that verifying the families of these packages needs.

    Raises:
        UnreachableError: there is no network.
    """
    make_environment(HOME / "venv")
    for name in names:
        package = PACKAGES[name]
        _install(package)
        _unpack(package)
        _convert(package, again)


def source(package: Package) -> Path:
    """The package's source as it ships."""
    return HOME / "src" / package.name


def converted(package: Package) -> Path:
    """The same, converted."""
    return HOME / "converted" / package.name


def _install(package: Package) -> None:
    mark = HOME / "installed" / package.name
    if (package.needs or package.alone) and not mark.exists():
        if package.needs:
            _pip("install", *package.needs)
        if package.alone:
            _pip("install", "--no-deps", *package.alone)
        mark.parent.mkdir(exist_ok=True)
        mark.touch()


def _pip(*arguments: str) -> None:
    done = subprocess.run([str(PYTHON), "-m", "pip", *arguments, "--quiet"], stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return
    print(done.stderr, file=sys.stderr)
    if "connection broken by" in done.stderr:  # what pip says before it tries again, and last of all, that it gives up
        raise UnreachableError(f"pip {arguments[0]} {arguments[-1]}: no connection")
    done.check_returncode()


def _unpack(package: Package) -> None:
    target = source(package)
    if target.exists():
        return
    downloads = HOME / "downloads" / package.name
    wanted = f"{package.name}=={package.version}"
    _pip("download", "--no-deps", "--dest", str(downloads), wanted)
    archive = next(downloads.iterdir())
    parts = target.with_suffix(".part")
    if archive.suffix == ".whl":
        zipfile.ZipFile(archive).extractall(parts)
        parts.rename(target)
        return
    with tarfile.open(archive) as tar:
        tar.extractall(parts, filter="data")
    next(parts.iterdir()).rename(target)
    shutil.rmtree(parts)


def _convert(package: Package, again: bool) -> None:
    target = converted(package)
    if target.exists() and not again:
        return
    shutil.rmtree(target, ignore_errors=True)
    options = ["--output", str(target), "--quiet", "--jobs", "2"]
    options += [option for pattern in package.without for option in ("--exclude", pattern)]
    command = [sys.executable, "-m", "rewriter.cli", str(source(package)), *options]
    done = subprocess.run(command, check=False, cwd=REPOSITORY)
    if done.returncode not in {0, 3}:  # 3: some script of the package stays as it is
        raise subprocess.CalledProcessError(done.returncode, command)
