"""A process that ends without ``bmt.shutdown()`` ends in good order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import atexit

atexit.register(lambda: print("open" if communicator._open is not None else "closed"))  # runs last

from datetime import timedelta
from torch.distributed import HashStore
from bmtrain.comm import GlooCommunicator

communicator = GlooCommunicator(HashStore(), 0, 1, timedelta(seconds=10))
"""


def test_gloo_threads_end_before_python_does() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "closed"), done.stderr
