"""Random numbers that this rank alone draws, beside the stream that all ranks share.

All ranks are seeded alike, so that they build the same model, draw the same order of the data, and decide alike.  In
a layer that would be wrong: dropout masks, noise levels and masked positions belong to a rank's own share of the batch,
and N ranks that draw the same ones have 1/N as many.  So a generator has a second stream for every rank.

Where that one starts follows from where the shared one stands, and from the rank; it is started anew each time, and if
anything was drawn from it, the shared one moves on by one number.  Thus ``torch.manual_seed`` sets both, whoever saves
and restores the shared state need not know of the other, and without such draws the shared stream is what it is in a
single process.
"""

from __future__ import annotations

import ctypes
import hashlib
import pickle
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

_MEMORY = 624 * 4 + 4  # bytes of numpy's generator: its words, and the place among them
_HEAD = 32  # bytes of a state: its seed, its counters, and the first word that a generator on a CPU computes with


class OwnRandom:
    """The second stream of one generator, from which it draws inside ``with own_random:``.

    Args:
        generator: the process's generator for a device.
        rank: whose stream it is.

    Attributes:
        depth: how many such ``with``s are open, one inside the other.
        watched: what looks at draws from the shared stream, while anything does.
    """

    def __init__(self, generator: torch.Generator, rank: int) -> None:
        self._generator, self._salt = generator, rank.to_bytes(8, "little")
        self._shared: torch.Tensor | None = None  # where the shared stream stands, while the other is drawn from
        self._start = b""
        self.depth = 0
        self.watched: SharedDraws | None = None

    def __enter__(self) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        if self.watched is not None:
            self.watched.look()
            self.watched.is_paused = True
        self._shared = self._generator.get_state()
        seed = hashlib.blake2b(head(self._shared), digest_size=8, salt=self._salt).digest()
        self._generator.manual_seed(int.from_bytes(seed, "little"))
        self._start = head(self._generator.get_state())

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth:
            return
        shared, self._shared = self._shared, None
        assert shared is not None
        drawn = head(self._generator.get_state()) != self._start
        self._generator.set_state(shared)
        if drawn:
            torch.rand((), generator=self._generator, device=self._generator.device)
        if self.watched is not None:
            self.watched.is_paused = False
            self.watched.begin_here()


class SharedDraws:
    """Whether user code draws from a generator's shared stream; that own streams move it on is no draw.

    Attributes:
        found: whether it has, since this was last set.
        is_paused: whether the generator is at another stream.
    """

    def __init__(self, generator: torch.Generator, is_paused: bool = False) -> None:
        self._generator, self.found, self.is_paused = generator, False, is_paused
        self._seed, self._position = 0, b""

    def begin_here(self) -> None:
        """What was drawn before does not count."""
        if not self.is_paused:
            self._seed, self._position = self._generator.initial_seed(), head(self._generator.get_state())

    def look(self) -> None:
        """Look whether anything was drawn since the last call; a new seed is no draw."""
        seed, position = self._seed, self._position
        self.begin_here()
        if self._seed == seed and self._position != position:
            self.found = True


def move_on(generator: torch.Generator) -> None:
    """Let ``generator`` stand elsewhere, which follows from where it stands."""
    seed = hashlib.blake2b(head(generator.get_state()), digest_size=8, salt=b"moves on").digest()
    generator.manual_seed(int.from_bytes(seed, "little"))


def head(state: torch.Tensor) -> bytes:
    """What tells one state of a generator from another."""
    return bytes(state[:_HEAD].tolist())


class OfNumpy:
    """Where numpy's generator stands.  To read all of it takes tens of microseconds, so that is done when it has moved.

    What it computes with is looked at in place.  That does not show whether a second normal number waits, which numpy
    makes in pairs; but none can have come to wait since, only one that did be gone.
    """

    def __init__(self) -> None:
        self._memory = b""
        self._state: Any = None

    def now(self) -> Any:
        """``numpy.random.get_state()``, the same object as long as nothing is drawn; None if numpy is not in use."""
        numpy = sys.modules.get("numpy")
        if numpy is None:
            return None
        generator: Any = getattr(getattr(numpy.random.mtrand, "_rand", None), "_bit_generator", None)
        memory = b""  # of another generator than numpy begins with
        if type(generator) is numpy.random.MT19937:
            memory = ctypes.string_at(generator.ctypes.state_address, _MEMORY)
        if not memory or memory != self._memory or self._state[3]:
            self._memory, self._state = memory, numpy.random.get_state()
        return self._state


class HostState(NamedTuple):
    """Where ``random`` stands, and numpy's generator if it is in use."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...] | None

    @classmethod
    def now(cls, numpy: OfNumpy | None = None) -> HostState:
        """The present one; ``numpy`` may know some of it."""
        return cls(random.getstate(), (numpy or OfNumpy()).now())

    def put_back(self, numpy: OfNumpy | None = None) -> None:
        """Let both stand there again; ``numpy`` may know that its has not moved."""
        random.setstate(self.python)
        if self.numpy is not None and (numpy is None or numpy.now() is not self.numpy):
            sys.modules["numpy"].random.set_state(self.numpy)

    def left_by(self, later: HostState) -> tuple[bool, bool]:
        """Whether either has moved from here to ``later``."""
        arrays = self.numpy is not None and later.numpy is not None
        return self.python != later.python, arrays and _key(self.numpy) != _key(later.numpy)

    def move_on(self, drawn: Sequence[bool]) -> None:
        """Let those that have ``drawn`` stand elsewhere, which follows from here alone, and the others here."""
        self.put_back()
        if drawn[0]:
            random.seed(random.getrandbits(64))
        if drawn[1] and self.numpy is not None:
            numpy = sys.modules["numpy"]
            numpy.random.seed(numpy.random.randint(2**32, dtype=numpy.uint64))


class HostDraws:
    """Whether user code draws from what all ranks share of ``random`` and numpy.

    Attributes:
        found: whether it has, since this was last set.
    """

    def __init__(self) -> None:
        self.found = False
        self.begin_here()

    def begin_here(self) -> None:
        """What was drawn before does not count."""
        self._state = HostState.now()

    def look(self) -> None:
        """Look whether anything was drawn since the last call."""
        before = self._state
        self.begin_here()
        self.found = self.found or any(before.left_by(self._state))


def _key(state: Any) -> tuple[Any, ...]:
    return (state[1][:8].tobytes(), *state[2:])


@contextmanager
def host_draws_own(rank: int) -> Iterator[None]:
    """Inside the ``with``, what ``random`` and numpy (if it is in use) draw is this rank's own, as above."""
    shared, salt = HostState.now(), rank.to_bytes(8, "little")
    random.seed(_seed((*shared.python[1][:8], shared.python[1][-1]), salt))
    if shared.numpy is not None:
        arrays = shared.numpy
        sys.modules["numpy"].random.seed(_seed((*arrays[1][:8].tolist(), *arrays[2:]), salt) % 2**32)
    start = HostState.now()
    try:
        yield
    finally:
        drawn = start.left_by(HostState.now())
        shared.put_back()
        if drawn[0]:
            random.random()
        if drawn[1]:
            sys.modules["numpy"].random.random_sample()


def _seed(head: tuple[object, ...], salt: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(repr(head).encode(), digest_size=8, salt=salt).digest(), "little")


def is_generator(value: object) -> bool:
    """Whether ``value`` is a generator of torch's, of ``random``'s or of numpy's that somebody has made."""
    kinds = (torch.Generator, random.Random, *_of_numpy())
    return isinstance(value, kinds) and not isinstance(value, random.SystemRandom)


def _of_numpy() -> tuple[type, ...]:
    numpy = sys.modules.get("numpy")
    return () if numpy is None else (numpy.random.Generator, numpy.random.RandomState)


def generator_state(generator: object) -> object:
    """Where it stands, in the words of its kind."""
    one: Any = generator
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return one.bit_generator.state
    return one.get_state()


def is_same_state(one: object, other: object) -> bool:
    """Of two states of one generator."""
    return pickle.dumps(one) == pickle.dumps(other)


def set_generator_state(generator: object, state: object) -> None:
    """Let it stand there; ``state`` is what ``generator_state`` gave of it."""
    one: Any = generator
    if isinstance(generator, random.Random):
        one.setstate(state)
    elif hasattr(generator, "bit_generator"):
        one.bit_generator.state = state
    else:
        one.set_state(state)
