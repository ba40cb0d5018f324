"""An environment beside this one, for packages that tests convert and run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def make_environment(folder: Path) -> None:
    """An environment in ``folder`` that sees this one's torch and can take packages that this one must not have."""
    if (folder / "bin" / "python").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    import torch

    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    link = folder / "lib" / version / "site-packages" / "base.pth"
    link.write_text(str(Path(torch.__file__).parents[1]) + "\n")
