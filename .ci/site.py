"""Hooks of mkdocs: the README is the first page, and of links to files that are no pages the names stay."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """The README, as it would stand in docs/."""
    text = re.sub(r"\]\((?!https?:|#|docs/)", "](../", (ROOT / "README.md").read_text()).replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What leaves docs/ is no page, but for the README."""

    def here(link: re.Match[str]) -> str:
        words, target = link.groups()
        if not target.startswith("../"):
            return link[0]
        if target.startswith("../README.md"):
            return f"[{words}](index.md{target[12:]})"
        path = target.removeprefix("../")
        return words if path in words else f"{words} (`{path}`)"

    parts, blocks = _CODE.split(markdown), _CODE.findall(markdown)
    changed = [_LINK.sub(here, part) for part in parts]
    return "".join(text + block for text, block in zip(changed, [*blocks, ""], strict=True))
