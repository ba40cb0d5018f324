"""What is written to bytes in memory is no file."""

from __future__ import annotations

import pytest

from rewriter.convert import convert_text

from ...helpers import IMPORTS, NET

LOOP = """net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for x in xs:
    net(x).mean().backward()
    opt.step()
{}
"""
IN_MEMORY = {
    "a picture": "with io.BytesIO() as out:\n    picture.save(out, format='PNG')\n    text = out.getvalue()",
    "by a name": "out = io.BytesIO()\npicture.save(out, 'PNG')",
    "a figure": "out = io.BytesIO()\nplt.savefig(out)",
    "its own method": "out = io.StringIO()\nout.write('text')",
    "an array": "out = io.BytesIO()\nnp.save(out, values)",
}
TO_FILES = {
    "a picture": "picture.save('a.png')",
    "a file or memory": "out = open('a.png', 'wb') if named else io.BytesIO()\npicture.save(out, format='PNG')",
}


def of_files(code: str) -> tuple[str, list[str]]:
    result = convert_text("import io\nimport numpy as np\nimport matplotlib.pyplot as plt\nfrom PIL import Image\n\n"
                          + IMPORTS + NET + LOOP.format("picture = Image.open('b.png')\n" + code))  # fmt: skip
    assert not result.error
    return result.after.decode(), [said.message for said in result.reported if said.code == "BMT033"]


@pytest.mark.parametrize("code", IN_MEMORY.values(), ids=IN_MEMORY.keys())
def test_every_rank_has_its_bytes(code: str) -> None:
    after, told = of_files(code)
    assert code in after and told == []


@pytest.mark.parametrize("code", TO_FILES.values(), ids=TO_FILES.keys())
def test_files_are_one_ranks(code: str) -> None:
    after, told = of_files(code)
    assert f"\n{code}" not in after or told
