"""The report as one HTML file: what is in it, in which order, and that nothing of a project becomes markup."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rewriter.cli import main
from rewriter.page import page
from rewriter.types import Conversion, Refusal, Remark, Result, Tried
from rewriter.verify.compare import Comparison
from rewriter.verify.findings import NEEDED, Report, Row

VOID = {"meta", "col", "br"}
HOSTILE = "</script></table><script>alert(1)</script><img src=x onerror='alert(2)'>&amp;\"'\x00\x1b\ud800"


class Read(HTMLParser):
    """Checks that elements nest, and notes what there is."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def having(self, name: str) -> list[str]:
        return [given for _, attributes in self.tags if (given := attributes.get(name)) is not None]


def made(name: str, before: str, after: str, **more: object) -> Result:
    return Result(Path(name), before.encode("utf-8", "replace"), after.encode("utf-8", "replace"), **more)  # type: ignore[arg-type]


def check_alone(read: Read) -> None:
    """Nothing is fetched or run, and every link leads somewhere in the page."""
    assert not {tag for tag, _ in read.tags} & {"script", "img", "link", "iframe", "object", "base", "form"}
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on") or name == "src"]
    ids = read.having("id")
    assert len(ids) == len(set(ids))
    assert all(link.startswith("#") and link[1:] in ids for link in read.having("href"))


@pytest.mark.parametrize("place", ["before", "after", "path", "message", "error", "verdict", "row", "note", "closing"])
def test_nothing_of_a_project_is_markup(place: str) -> None:
    def at(name: str, other: str = "x") -> str:
        return HOSTILE if place == name else other

    result = made(
        at("path", "a.py"), f"{at('before')}\nsame\n", f"{at('after', 'y')}\nsame\n", error=at("error", ""),
        applied=(Conversion("BMT001", 1, at("message"), ()),), reported=(Remark("BMT001", 2, at("message")),),
    )  # fmt: skip
    tried = Tried("--verify", False, at("verdict"), (("a", "b"), (at("row"), "1")), (at("note"),))
    text = page([result], [at("closing")], [tried])
    text.encode()
    read = Read(text)
    assert "<script>alert(1)</script>" in read.text and "\x00" not in text and "\x1b" not in text
    check_alone(read)


def test_no_files_and_nothing_found() -> None:
    for results in ([], [made("a.py", "x = 1\n", "x = 1\n")], [made("empty.py", "", "")]):
        read = Read(page(results))
        check_alone(read)
        assert "Nothing." in read.text and not read.having("data-file")


def test_both_sides_with_line_numbers() -> None:
    before = "".join(f"line {n}\n" for n in range(1, 41))
    after = before.replace("line 20\n", "line twenty\nand more\n").replace("line 30\n", "")
    far = (Remark("BMT090", 3, "far from any change"), Remark("BMT090", 400, "beyond the end"))
    text = page([made("a.py", before, after, reported=far)])
    rows = [re.sub(r"<b>|</b>", "", row) for row in re.findall(r"<tr>(<td class=\"number\">.*?)</tr>", text)]
    cells = [re.findall(r">([^<]*)</td>", row) for row in rows]
    assert ["20", "line 20", "20", "line twenty"] in cells and ["", "", "21", "and more"] in cells
    assert ["30", "line 30", "", ""] in cells and ["17", "line 17", "17", "line 17"] in cells
    assert ["31", "line 31", "31", "line 31"] in cells and ["33", "line 33", "33", "line 33"] in cells
    assert ["3", "line 3", "3", "line 3"] in cells and not any("line 10" in row for row in cells)
    assert "line <b>20</b>" in text and "line <b>twenty</b>" in text
    assert text.count("far from any change") == text.count("beyond the end") == 2
    assert text.index("far from any change", text.index("Files")) < text.index("line 3<", text.index("Files"))


def test_what_needs_a_hand_stands_first_once_for_each_reason() -> None:
    same = Remark("BMT025", 2, "this loss is of one rank")
    results = [
        made("good.py", "a\n", "b\n", applied=(Conversion("BMT001", 1, "inherits", ()),)),
        made("one.py", "x\ny\n", "x\ny\n", reported=(same,)),
        made("two.py", "x\ny\n", "x\ny\n", reported=(same,), hidden=(Conversion("BMT002", 1, "may differ", (), True),)),
        made("bad.py", "", "", error="bad.py: no Python"),
        made("train.py", "loss.backward()\n", "loss.backward()\n", reported=(Refusal("BMT090", 1, "for FSDP"),)),
    ]
    read = Read(page(results, ["nothing was written", "next: something"]))
    check_alone(read)
    hand = read.text.index("Needs your hand")
    order = [
        "1 of 5 files changed", "nothing was written", "next: something", "Needs your hand", "not understood: bad.py",
        "trains, and was left as it is: for FSDP", "this loss is of one rank", "may differ", "By rule", "inherits",
    ]  # fmt: skip
    places = [read.text.index(words) for words in order]
    assert places == sorted(places)
    table = read.text[hand : read.text.index("By rule")]
    assert table.count("this loss is of one rank") == 1 and "one.py:2two.py:2" in table
    files = [given for tag, given in read.tags if tag == "tr" and given.get("data-file") == "f1 f2"]
    assert [given["data-rule"] for given in files] == ["BMT025"]


def test_filters_name_what_is_there() -> None:
    result = made("a.py", "x\n", "y\n", applied=(Conversion("BMT001", 1, "done", ()),))
    text = page([result, made("b.py", "x\n", "x\n")])
    read = Read(text)
    assert set(read.having("value")) == {"", "BMT001", "f0", "left", "unsafe", "done"}
    for name, value in (("rule", "BMT001"), ("file", "f0"), ("state", "left")):
        rule = f'body:has(#{name} option[value="{value}"]:checked) [data-{name}]:not([data-{name}~="{value}"])'
        assert html.unescape(text).count(rule) == 1
    assert set(read.having("data-rule")) == {"BMT001"} and "b.py" not in read.text


def test_a_notebook_has_its_findings_before_its_file() -> None:
    done = (Conversion("BMT001", 7, "in a cell", ()),)
    text = page([made("nb.ipynb", '{"cells": 1}\n', '{"cells": 2}\n', applied=done, cells=((0, 1), (5, 3)))])
    assert "cell 3:2" in text and text.index("in a cell") < text.index("cells&quot;: <b>1</b>")


def test_the_command_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verify(settings: object) -> Report:
        return Report([Row(1, "gradients", what, Comparison(compared=3)) for what in NEEDED])

    monkeypatch.setattr("rewriter.verify.__main__.verify", verify)
    (tmp_path / "m.py").write_text("import torch\n\n\nclass Net(torch.nn.Module):  # </script><b>\n    pass\n")
    out = tmp_path / "out.html"
    assert main([str(tmp_path / "m.py"), "--write", "--verify", "m:Net", "--report", str(out)]) == 0
    read = Read(out.read_text())
    check_alone(read)
    for words in ("the converted model is the same model", "1 file changed in place", "no dropout"):
        assert words in read.text
    assert "class Net(bmt.DistributedModule):  # </script><b>" in read.text and "</script>" not in out.read_text()
    assert "the same model" in capsys.readouterr().out.splitlines()[-1]


def test_where_it_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.py").write_text("x = 1\n")
    assert main([str(tmp_path / "m.py"), "--report", str(tmp_path / "out.htm")]) == 2
    assert "ends in .html, .json" in capsys.readouterr().err
    assert main([str(tmp_path / "m.py"), "--prove", "m.py", "--report", str(tmp_path / "out.sarif")]) == 2
    assert "--prove writes a report that ends in .html" in capsys.readouterr().err
