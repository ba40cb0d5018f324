"""Downloads packages, unpacks their source, converts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from tests.zoo.packages import PACKAGES, Package

REPOSITORY = Path(__file__).parents[2]
HOME = Path(os.environ.get("BMTRAIN_ZOO", Path.home() / ".cache" / "bmtrain-zoo"))
PYTHON = HOME / "venv" / "bin" / "python"


def prepare(names: list[str], again: bool) -> None:
    """Everything that verifying the families of these packages needs."""
    _environment()
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


def _environment() -> None:
    """An environment that sees this one's torch and can take packages that this one must not have."""
    if PYTHON.exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(HOME / "venv")], check=True)
    import torch

    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    link = HOME / "venv" / "lib" / version / "site-packages" / "base.pth"
    link.write_text(str(Path(torch.__file__).parents[1]) + "\n")


def _install(package: Package) -> None:
    mark = HOME / "installed" / package.name
    if package.needs and not mark.exists():
        subprocess.run([str(PYTHON), "-m", "pip", "install", "--quiet", *package.needs], check=True)
        mark.parent.mkdir(exist_ok=True)
        mark.touch()


def _unpack(package: Package) -> None:
    target = source(package)
    if target.exists():
        return
    downloads = HOME / "downloads" / package.name
    wanted = f"{package.name}=={package.version}"
    command = [str(PYTHON), "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(downloads), wanted]
    subprocess.run(command, check=True)
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
    subprocess.run([sys.executable, "-m", "rewriter.cli", str(source(package)), *options], check=True, cwd=REPOSITORY)
