"""Builds bmtrain._C where it is of use; everything else about the package is in setup.cfg.

BMTRAIN_EXTENSION says what is built; the package uses torch operations instead of what is not, with the same results:

- ``auto``, or unset: all that can be, where an NVIDIA driver is; elsewhere nothing, and no compiler is asked
- ``0``: nothing; the wheel is pure Python, and installing it takes seconds
- ``cpp``: the NCCL bindings and what runs on a CPU, without nvcc
- ``1``: all that can be: CUDA kernels, too, if nvcc is on PATH

BMTRAIN_ARCHITECTURES says for which GPUs the kernels are compiled, 8.0 and later: "9.0", "8.0;9.0+PTX".
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ARCHITECTURES = "8.0;9.0+PTX"  # the PTX is for what comes after
CHOICES = ("auto", "0", "cpp", "1")
# What is written as a product and a sum is not fused: a CPU rounds as the kernels do.
HOST_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]


def chosen() -> str:
    """What BMTRAIN_EXTENSION asks for."""
    choice = os.environ.get("BMTRAIN_EXTENSION") or "auto"
    if choice not in CHOICES:
        sys.exit(f"BMTRAIN_EXTENSION is {choice!r}; it must be one of {', '.join(CHOICES)}")
    return choice


def architectures() -> list[str]:
    """What tells nvcc for which GPUs to compile."""
    flags = []
    for named in re.split("[; ]+", (os.environ.get("BMTRAIN_ARCHITECTURES") or ARCHITECTURES).strip("; ")):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", named)
        if match is None:
            sys.exit(f"BMTRAIN_ARCHITECTURES names {named!r}; it must be numbers, as in {ARCHITECTURES!r}")
        number, kinds = match[1] + match[2], ["sm", "compute"] if match[3] else ["sm"]
        flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    return flags


def is_wanted() -> bool:
    """Whether there is anything to build."""
    if chosen() == "auto":
        driver = any(map(os.path.exists, ("/proc/driver/nvidia/version", "/dev/nvidiactl")))
        return driver or shutil.which("nvidia-smi") is not None
    return chosen() != "0"


def cuda_library_dirs() -> list[str]:
    """The folders nvcc itself would link from."""
    dry_run = subprocess.run(
        ["nvcc", "--dryrun", "-c", "csrc/kernels/adamw.cu"], check=True, capture_output=True, text=True
    )
    return re.findall(r'-L([^"\s]+)', dry_run.stderr + dry_run.stdout)


class BuildExtension(build_ext):
    """Compiles csrc/kernels with nvcc where there is one, and links the CUDA runtime statically."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        ext.include_dirs.append(pybind11.get_include())
        objects = self.compile_kernels()
        if objects:
            ext.sources += sorted(glob("csrc/kernels/*.cpp"))
            ext.define_macros.append(("BMT_WITH_CUDA", "1"))
            ext.extra_objects += objects
            ext.library_dirs += cuda_library_dirs()
            ext.libraries += ["cudart_static", "rt", "pthread"]
        super().build_extension(ext)

    def compile_kernels(self) -> list[str]:
        if shutil.which("nvcc") is None or chosen() == "cpp":
            return []
        sources = sorted(glob("csrc/kernels/*.cu"))
        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(self.compile_kernel, sources))
        if None in objects:
            warnings.warn("nvcc cannot compile csrc/kernels; building without CUDA kernels", stacklevel=1)
            return []
        return [path for path in objects if path is not None]

    def compile_kernel(self, source: str) -> str | None:
        target = Path(self.build_temp) / Path(source).with_suffix(".cu.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-std=c++17", "--extended-lambda", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden"]
        command = ["nvcc", *flags, *architectures(), "-c", source, "-o", str(target)]
        print(" ".join(command))
        return str(target) if subprocess.run(command, check=False).returncode == 0 else None


SOURCES = ["csrc/module.cpp", *sorted(glob("csrc/nccl/*.cpp")), *sorted(glob("csrc/cpu/*.cpp"))]
EXTENSION = Extension(
    "bmtrain._C",
    SOURCES,
    depends=[path for path in glob("csrc/**/*", recursive=True) if Path(path).is_file()],
    include_dirs=["csrc"],
    language="c++",
    extra_compile_args=HOST_FLAGS,
    libraries=["dl"],
    optional=True,
)

setup(ext_modules=[EXTENSION] if is_wanted() else [], cmdclass={"build_ext": BuildExtension})
