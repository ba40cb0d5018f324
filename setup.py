"""Builds bmtrain._C; everything else about the package is in setup.cfg.

Without nvcc the extension has no CUDA kernels, and without a C++ compiler there is no extension at all: the package
then uses torch operations instead, with the same results.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ARCHITECTURES = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",  # PTX, for what comes after
]
HOST_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden"]


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
        if shutil.which("nvcc") is None:
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
        command = ["nvcc", *flags, *ARCHITECTURES, "-c", source, "-o", str(target)]
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

setup(ext_modules=[EXTENSION], cmdclass={"build_ext": BuildExtension})
