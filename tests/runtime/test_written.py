"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bmtrain.written import replacing, replacing_files_of


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_nothing_changes_when_it_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(ValueError, match="own"), replacing(tmp_path / "file") as path:
        path.write_text("new")
        raise ValueError("own")
    for folder in ("folder", "new/er"):
        with pytest.raises(ValueError, match="own"), replacing_files_of(tmp_path / folder) as path:
            (path / "file").write_text("new")
            raise ValueError("own")
    with pytest.raises(NotADirectoryError), replacing_files_of(tmp_path / "file"):
        pass
    assert names(tmp_path) == ["file", "new"] and (tmp_path / "file").read_text() == "old"
    assert not names(tmp_path / "new")


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "files", "a link", "a mount", "a mount with files"])
def test_files_take_their_places(tmp_path: Path, there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    if there != "nothing":
        (tmp_path / "elsewhere" if there == "a link" else folder).mkdir()
    if there == "a link":
        folder.symlink_to(tmp_path / "elsewhere")
    if "mount" in there:
        monkeypatch.setattr(os.path, "ismount", lambda path: path == folder)
    if "files" in there:
        (folder / "a").write_text("old")
        (folder / "kept").write_text("old")
    with replacing_files_of(folder) as path:
        (path / "a").write_text("new")
        (path / "inner").mkdir()
        (path / "inner" / "b").write_text("new")
    assert (folder / "a").read_text() == (folder / "inner" / "b").read_text() == "new"
    assert names(folder) == ["a", "inner", *(["kept"] if "files" in there else [])]
    assert folder.is_symlink() == (there == "a link")
    assert names(tmp_path) == [*(["elsewhere"] if there == "a link" else []), "folder"]
