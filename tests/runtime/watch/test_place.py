"""Where a thread is."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from bmtrain.watch.place import RunningThreads, place_of_thread


def test_a_thread_that_is_gone() -> None:
    assert place_of_thread(-1) == ("", "")


def test_a_frame_that_leads_to_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    code = SimpleNamespace(co_filename=f"{sys.prefix}/lib/python/site-packages/torch/x.py", co_name="forward")
    broken = SimpleNamespace(f_lineno=3, f_code=code, f_locals={}, f_back=object())
    monkeypatch.setattr(sys, "_current_frames", lambda: {7: broken})
    assert place_of_thread(7) == ("", "")


def test_this_line() -> None:
    assert place_of_thread(threading.get_ident()).line.startswith("test_place.py:")


def _asked_from_another(look: Callable[[int], str]) -> str:
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(look(me)))
    me = threading.get_ident()
    asking.start()
    asking.join()
    return found[0]


def test_a_running_thread() -> None:
    threads = RunningThreads()
    for _ in range(2):  # the file is used again
        assert _asked_from_another(threads.line_of).startswith("test_place.py:")
    assert threads.line_of(-1) == ""


def test_a_file_of_any_name(tmp_path: Path) -> None:
    path = tmp_path / 'größe "2".py'
    path.write_text("def go(thread):\n    thread.start()\n    thread.join()\n", encoding="utf-8")
    names: dict[str, Callable[[threading.Thread], None]] = {}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    found: list[str] = []
    me = threading.get_ident()
    names["go"](threading.Thread(target=lambda: found.append(RunningThreads().line_of(me))))
    assert found[0] in ('größe "2".py:2', 'größe "2".py:3')


def test_the_same_as_by_its_frames() -> None:
    look = RunningThreads().line_of
    assert (
        _asked_from_another(look).split(":")[0]
        == _asked_from_another(lambda it: place_of_thread(it).line).split(":")[0]
    )
