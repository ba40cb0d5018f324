"""One process that records: gets requests through a pipe, answers each; records go to files."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import Any


def serve(pipe: Connection, job: dict[str, Any], environment: dict[str, str], log: str) -> None:
    """Serve until the requests end."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    os.environ.pop("BMTRAIN_METER", None)  # for the user's own runs
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    sys.path[:0] = job["path"]
    warnings.simplefilter("ignore")
    import torch

    from rewriter.verify.phases import Phases

    torch.set_num_threads(1)
    if job["device"] == "cuda":  # equal code must give equal bits on a GPU, too
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.allow_tf32 = False
    phases = Phases(job)
    while True:
        try:
            request: dict[str, Any] = pipe.recv()
        except EOFError:
            os._exit(0)  # the other ranks leave at the same moment: an orderly end could wait for one that is gone
        answer: dict[str, Any]
        try:
            record = getattr(phases, request["phase"])(**request["options"])
            torch.save(record, request["file"])
            answer = {"file": request["file"]}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()}
        pipe.send(answer)
