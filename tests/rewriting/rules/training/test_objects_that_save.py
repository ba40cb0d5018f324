"""Objects with methods that write files inside: one rank is to write, or it is said."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

HEAD = """import tarfile
import zipfile
from pathlib import Path

import annoy
import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader


class Log:
    def __init__(self):
        self.rows, self.index = [], annoy.AnnoyIndex(4)

    def keep(self, path):
        BODY


net = torch.nn.Linear(4, 2)
opt = torch.optim.Adam(net.parameters())
log, words = Log(), Tokenizer(1)
for x in DataLoader(data, batch_size=8):
    net(x).mean().backward()
    opt.step()
USE
"""


def script(body: str, use: str = "log.keep('a.txt')") -> str:
    return HEAD.replace("BODY", body).replace("USE", use)


SAID = {
    "an object inside": ("self.index.save(path)", "log.keep('a.txt')"),
    "an archive": ("with zipfile.ZipFile(path, 'w') as z:\n            z.writestr('a', 'b')", "log.keep('a.zip')"),
    "another archive": ("with tarfile.open(path, 'w:gz') as z:\n            z.add('a')", "log.keep('a.tar')"),
    "how much is written": ("return Path(path).write_text('x')", "n = log.keep('a.txt')"),
    "a library's object": ("pass", "words.save('words.json')"),
    "a library's object, by a name": ("pass", "words.save(out_dir)"),
    "made there": ("pass", "annoy.AnnoyIndex(4).save('x.ann')"),
    "what it gives is used": ("pass", "place = words.save(f'{root}/words.json')"),
    "a function's object": ("pass", "made_by().dump('a.txt')"),
}


@pytest.mark.parametrize(("body", "use"), SAID.values(), ids=SAID.keys())
def test_what_every_rank_writes_is_said(body: str, use: str) -> None:
    assert "BMT033" in {finding.code for finding in convert_text(script(body, use)).reported}


GUARDED = {
    "an array": "np.array(self.rows).tofile(path)",
    "tables": "self.frame.to_hdf(path, 'x')",
    "text": "Path(path).write_text('x')",
}


@pytest.mark.parametrize("body", GUARDED.values(), ids=GUARDED.keys())
def test_one_rank_writes(body: str) -> None:
    result = convert_text(script(body))
    assert f"if bmt.rank() == 0:\n            {body}" in result.after.decode()
    assert "BMT033" not in {finding.code for finding in result.reported}


QUIET = {
    "a method that is seen": ("np.save(path, self.rows)", "log.keep('a.npy')"),
    "by a name": ("np.save(path, self.rows)", "Log.keep(log, 'a.npy')"),
    "an archive that is read": ("zipfile.ZipFile(path)", "log.keep('a.zip')"),
    "without a path": ("pass", "words.save()"),
    "by torch": ("torch.save(self.rows, path)", "log.keep('a.pt')"),
    "guarded": ("pass", "if bmt.rank() == 0:\n    words.save('words.json')"),
}


@pytest.mark.parametrize(("body", "use"), QUIET.values(), ids=QUIET.keys())
def test_nothing_is_said_of_others(body: str, use: str) -> None:
    result = convert_text(script(body, use).replace("import torch\n", "import torch\nimport bmtrain as bmt\n"))
    assert "BMT033" not in {finding.code for finding in result.reported}
