"""Where a thread is."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest

from bmtrain.watch.place import place_of_thread


def test_a_thread_that_is_gone() -> None:
    assert place_of_thread(-1) == ("", "")


def test_a_frame_that_leads_to_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    code = SimpleNamespace(co_filename=f"{sys.prefix}/lib/python/site-packages/torch/x.py", co_name="forward")
    broken = SimpleNamespace(f_lineno=3, f_code=code, f_locals={}, f_back=object())
    monkeypatch.setattr(sys, "_current_frames", lambda: {7: broken})
    assert place_of_thread(7) == ("", "")


def test_this_line() -> None:
    assert place_of_thread(threading.get_ident()).line.startswith("test_place.py:")
