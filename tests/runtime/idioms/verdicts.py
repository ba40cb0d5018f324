"""Runs idioms and says how each came out."""

from __future__ import annotations

import faulthandler
import functools
import os
import pickle
import random
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ranks import RanksFailed, run_ranks
from torch import nn

from bmtrain.errors import BMTrainError

from .registry import FINE, RANKS, Idiom, idioms
from .user import User, device_of_ranks, tensors

LIMIT = 40.0  # seconds for one idiom


@dataclass
class Outcome:
    """What one process saw of an idiom."""

    values: dict[str, Any] | None = None  # None after an error
    error: str = ""  # its class
    ours: bool = False  # one of bmtrain.errors
    message: str = ""
    where: str = ""  # the traceback
    unclean: str = ""  # what a refusal left changed
    seconds: float = 0.0
    warned: tuple[str, ...] = ()


@dataclass
class Verdict:
    """How an idiom came out on some number of ranks."""

    word: str
    detail: str = ""


# ---- one process
# -------------------------------------------------------------------------------------------------------------


def perform(user: User, it: Idiom) -> Outcome:
    """Run ``it`` here from a fixed seed."""
    torch.manual_seed(0)
    random.seed(0)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            seen = it.run(user)
            seen = {"weights": user.weights(seen)} if isinstance(seen, nn.Module) else seen
            values = dict(_flat("", {"losses": user.losses} | seen))
        return Outcome(values, warned=tuple(str(warning.message) for warning in caught))
    except Exception as error:
        kind = type(error).__name__
        return Outcome(None, kind, isinstance(error, BMTrainError), str(error), traceback.format_exc())
    finally:
        torch.set_default_dtype(torch.float32)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), entry)
    elif isinstance(value, list | tuple):
        for key, entry in enumerate(value):
            yield from _flat(f"{name}.{key}", entry)
    elif isinstance(value, torch.Tensor):
        if hasattr(value, "full_tensor"):  # an average of a sharded parameter is in parts, too
            value = value.full_tensor()
        yield name, value.detach().to("cpu", torch.complex128 if value.is_complex() else torch.float64).numpy().copy()
    else:
        yield name, value


@functools.cache
def reference(theme: str, name: str) -> Outcome:
    """By plain torch, in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return perform(User(False, os.environ.get("BMTRAIN_TEST_DEVICE", "cpu")), idioms(theme)[name])
    finally:
        torch.set_num_threads(threads)


# ---- ranks
# -------------------------------------------------------------------------------------------------------------------


def on_a_rank(theme: str, names: Sequence[str], folder: str, limit: float) -> None:
    """What each rank does: the idioms one after the other, until one leaves the ranks in an unknown state."""
    for number, name in enumerate(names):
        user = User(True, device_of_ranks())
        place = Path(folder, str(number))
        hangs = idioms(theme)[name].expected[RANKS.index(user.ranks)] == "hang"
        faulthandler.dump_traceback_later(min(limit, 10.0) if hangs else limit, exit=True)
        start = time.monotonic()
        outcome = perform(user, idioms(theme)[name])
        outcome.seconds = time.monotonic() - start
        everyone = _exchange(place, user, outcome)
        if outcome.ours and all(one.error == outcome.error for one in everyone):
            outcome.unclean = _what_changed(user)
            everyone = _exchange(Path(f"{place}.checked"), user, outcome)
        faulthandler.cancel_dump_traceback_later()
        if len({one.error for one in everyone}) > 1:
            raise RuntimeError(f"{name} fails on some ranks: they may wait for each other in what follows")


def _exchange(place: Path, user: User, outcome: Outcome) -> list[Outcome]:
    """All ranks' outcomes.  Not by a collective, which could meet one of the idiom's."""
    Path(f"{place}.writing.{user.rank}").write_bytes(pickle.dumps(outcome))
    os.rename(f"{place}.writing.{user.rank}", f"{place}.outcome.{user.rank}")
    files = [Path(f"{place}.outcome.{rank}") for rank in range(user.ranks)]
    while not all(file.exists() for file in files):  # one that never comes: the limit ends this rank, too
        time.sleep(0.002)
    return [pickle.loads(file.read_bytes()) for file in files]


def _what_changed(user: User) -> str:
    """After a refusal weights are whole numbers, and before a step they are the first."""
    for model, first in user.models:
        try:
            now = tensors(model.state_dict())
        except Exception as error:
            return f"the model cannot be read afterwards: {error}"
        for name, value in now.items():
            if not bool(torch.isfinite(value).all()):
                return f"{name} is not finite afterwards"
            if not user.moved and name in first and not torch.equal(value, first[name]):
                return f"{name} was changed"
    return ""


# ---- the table
# ---------------------------------------------------------------------------------------------------------------


def verdicts(
    theme: str, ranks: int, only: Sequence[str] | None = None, again: bool = True, limit: float = LIMIT
) -> dict[str, Verdict]:
    """How the idioms of ``theme`` come out on so many ranks.

    One process for each rank runs all of them, those that are known to be wrong last.  What comes out otherwise than
    expected is run ``again``, alone and on processes of its own.
    """
    expected = {name: it.expected[RANKS.index(ranks)] for name, it in idioms(theme).items()}
    names = [name for name in expected if only is None or name in only]
    found = _run(theme, ranks, sorted(names, key=lambda name: expected[name] not in FINE), limit)
    for name in names if again else ():
        if found[name].word != expected[name]:
            found |= _run(theme, ranks, [name], limit, fresh=True)
    return {name: found[name] for name in names}


def _run(theme: str, ranks: int, names: list[str], limit: float, fresh: bool = False) -> dict[str, Verdict]:
    found: dict[str, Verdict] = {}
    while names:
        with tempfile.TemporaryDirectory() as folder:
            trouble = ""
            try:
                most = limit * (len(names) + 1)
                options: dict[str, Any] = {"timeout": most, "fresh": fresh, "default_device": False}
                run_ranks(ranks, on_a_rank, theme, names, folder, limit, **options)
            except RanksFailed as error:
                trouble = str(error)
            outcomes = [_read(Path(folder, str(number)), ranks) for number in range(len(names))]
        last = max((number for number, seen in enumerate(outcomes) if any(seen)), default=0)
        if trouble and last + 1 < len(names) and all(outcomes[last]) and not any(one.error for one in outcomes[last]):
            last += 1  # every rank came through that one: the next ended the ranks before it left anything
        for name, seen in zip(names[: last + 1], outcomes, strict=False):
            found[name] = _judge(idioms(theme)[name], seen, trouble, limit)
        names = names[last + 1 :]
    return found


def _read(place: Path, ranks: int) -> list[Outcome | None]:
    def outcome(rank: int) -> Outcome | None:
        for file in (Path(f"{place}.checked.outcome.{rank}"), Path(f"{place}.outcome.{rank}")):
            if file.exists():
                made: Outcome = pickle.loads(file.read_bytes())
                return made
        return None

    return [outcome(rank) for rank in range(ranks)]


def _judge(it: Idiom, seen: list[Outcome | None], trouble: str, limit: float) -> Verdict:
    right = reference(it.theme, it.name)
    limit = min(limit, 10.0) if it.expected[RANKS.index(len(seen))] == "hang" else limit
    if any(one is None or one.seconds > 0.9 * limit for one in seen):  # an error comes when another rank is ended
        raised = [one for one in seen if one is not None and one.error]
        return Verdict("hang", (raised[0].where if raised else "") + trouble)
    outcomes = [one for one in seen if one is not None]
    errors = [one for one in outcomes if one.error]
    if right.error:
        if all(one.error == right.error for one in outcomes):
            return Verdict("right", right.message)
        return Verdict("silent" if not errors else "raw", f"plain torch raises {right.error}: {right.where}")
    for one in errors:
        if not one.ours:
            return Verdict("raw", one.where)
        if len(errors) < len(outcomes):
            return Verdict("raw", f"on {len(errors)} of {len(outcomes)} ranks: {one.where}")
        if one.unclean:
            return Verdict("raw", f"{one.unclean}; {one.where}")
        if it.says and it.says not in one.message:
            return Verdict("raw", f"the message does not name {it.says!r}: {one.message}")
    if errors:
        return Verdict("refused", errors[0].where)
    said = [message for one in outcomes for message in one.warned if it.says and it.says in message]
    for rank, one in enumerate(outcomes):
        assert one.values is not None and right.values is not None
        difference = _difference(one.values, right.values, it.tolerance)
        if difference:
            return Verdict("said" if said else "silent", f"rank {rank}: {difference}; warnings: {one.warned}")
    return Verdict("right")


def _difference(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> str:
    import numpy

    if list(ours) != list(theirs):
        return f"names {sorted(set(ours) ^ set(theirs))[:6]}"
    tolerance *= 10 if os.environ.get("BMTRAIN_TEST_DEVICE", "cpu") != "cpu" else 1
    for name, expected in theirs.items():
        found = ours[name]
        if isinstance(expected, str | bool | None) or isinstance(found, str | bool | None):
            if found != expected:
                return f"{name} is {found!r}, not {expected!r}"
            continue
        a, b = numpy.asarray(found), numpy.asarray(expected)
        if a.shape != b.shape:
            return f"{name} has shape {a.shape}, not {b.shape}"
        size = max(float(numpy.max(numpy.abs(b[numpy.isfinite(b)]), initial=0.0)), 1e-4)
        if not numpy.allclose(a, b, rtol=0, atol=tolerance * size, equal_nan=True):
            return f"{name} differs by {float(numpy.max(numpy.abs(a - b))) / size:.2e} of its largest entry"
    return ""
