"""One process that records: reads requests as lines of json, answers each with a line; records go to files."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from typing import Any


def main(text: str) -> None:
    """Serve until the requests end."""
    job = json.loads(text)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the model prints must not look like an answer
    sys.path[:0] = job["path"]
    warnings.simplefilter("ignore")
    import torch

    from rewriter.verify.phases import Phases

    torch.set_num_threads(1)
    phases = Phases(job)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        answer: dict[str, Any]
        try:
            record = getattr(phases, request["phase"])(**request["options"])
            torch.save(record, request["file"])
            answer = {"file": request["file"]}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    answers.flush()
    os._exit(0)  # the other ranks leave at the same moment: an orderly end could wait for one that is gone


if __name__ == "__main__":
    main(sys.argv[1])
