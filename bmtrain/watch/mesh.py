"""A connection between every two ranks, of the watchdogs alone.

No rank's death silences the others, as that of a store's host would, and the operating system tells of each: when a
process ends, however it does, its connections end.  One that is only stopped keeps them.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import selectors
import socket
import threading
import uuid
import weakref
from typing import Any, Protocol

from ..log import warn

Message = dict[str, Any]

_MOST_BYTES = 1 << 20  # of one message; whoever sends more is no rank
_PATIENCE = 10.0  # seconds to reach a rank whose address is known


class Store(Protocol):
    """Where ranks leave their addresses: the part of torch.distributed.Store that is used here."""

    def set(self, key: str, value: str, /) -> None:
        """Put a value where every rank can get it."""

    def get(self, key: str, /) -> bytes:
        """Wait for a value and return it."""


class _Link:
    """One connection; ``rank`` is -1 until the other side has said who it is."""

    def __init__(self, connection: socket.socket, rank: int = -1) -> None:
        self.connection, self.rank = connection, rank
        self._came, self._goes = b"", b""

    def send(self, message: Message, *, must: bool) -> None:
        """Queue what must arrive; leave the rest out while the other side does not read."""
        if self._goes and not must:
            message = {}
        self._goes += json.dumps(message).encode() + b"\n" if message else b""
        with contextlib.suppress(OSError):  # told by the receiving side
            self._goes = self._goes[self.connection.send(self._goes) :]

    def receive(self) -> tuple[list[Message], bool]:
        """What has come, and whether the connection is over."""
        over = False
        try:
            while data := self.connection.recv(1 << 16):
                self._came += data
            over = True
        except BlockingIOError:
            pass
        except OSError:
            over = True
        *lines, self._came = self._came.split(b"\n")
        messages = [json.loads(line) for line in lines if line]
        return messages, over or len(self._came) > _MOST_BYTES


class Mesh:
    """This rank's connections.  ``send`` is for any thread, ``receive`` for one."""

    def __init__(self, store: Store, rank: int, world_size: int, host: str | None, secret: str = "") -> None:
        self.rank, self.world_size = rank, world_size
        self._lock = threading.Lock()
        self._links: dict[int, _Link] = {}
        self._selector = selectors.DefaultSelector()
        self._door = socket.create_server(("", 0), backlog=world_size)
        self._wakes, self._wake = socket.socketpair()
        for waiting in (self._door, self._wakes):
            waiting.setblocking(False)
            self._selector.register(waiting, selectors.EVENT_READ)
        if rank == 0:
            store.set("watch/word", uuid.uuid4().hex)
        store.set(f"watch/{rank}", f"{_own_address(host)} {self._door.getsockname()[1]}")
        word = store.get("watch/word")
        self._word = hmac.new(secret.encode(), word, "sha256").hexdigest()  # whoever has read the store knows the other
        for other in range(rank):
            self._reach(other, store.get(f"watch/{other}").decode())
        _open.add(self)

    def _reach(self, other: int, address: str) -> None:
        host, port = address.split()
        try:
            connection = socket.create_connection((host, int(port)), timeout=_PATIENCE)
        except OSError as error:
            warn(
                f"The watchdog of rank {self.rank} cannot reach that of rank {other} at {host}:{port} ({error}): if "
                "one of the two dies or differs, the other may wait for it until the timeout.",
                stacklevel=2,
                category=RuntimeWarning,
            )
            return
        self._linked(connection, other).send({"rank": self.rank, "word": self._word}, must=True)

    def _linked(self, connection: socket.socket, rank: int = -1) -> _Link:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel answers for a process that is stopped; nobody does for a machine that is gone.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        link = _Link(connection, rank)
        if rank >= 0:
            self._links[rank] = link
        self._selector.register(connection, selectors.EVENT_READ, link)
        return link

    def send(self, message: Message, must: bool = False) -> None:
        """To all other ranks.  What need not arrive is left out where a rank does not read."""
        with self._lock:
            for link in self._links.values():
                link.send(message, must=must)

    def wake(self) -> None:
        """Let ``receive`` return."""
        with contextlib.suppress(OSError):
            self._wake.send(b".")

    def receive(self, patience: float) -> list[tuple[int, Message | None]]:
        """Within ``patience`` seconds: who has said what.

        An empty message is the first of a rank that has just come, None stands for the end of the connection.
        """
        found: list[tuple[int, Message | None]] = []
        for key, _ in self._selector.select(patience):
            if key.fileobj is self._wakes:
                with contextlib.suppress(OSError):
                    self._wakes.recv(4096)
            elif key.fileobj is self._door:
                with contextlib.suppress(OSError):
                    self._linked(self._door.accept()[0])
            else:
                found += self._heard(key.data)
        return found

    def _heard(self, link: _Link) -> list[tuple[int, Message | None]]:
        try:
            messages, over = link.receive()
            if link.rank < 0 and messages:
                hello = messages.pop(0)
                if not hmac.compare_digest(str(hello["word"]), self._word):
                    raise ValueError("no rank of this job")
                link.rank = int(hello["rank"])
                with self._lock:
                    self._links[link.rank] = link
                messages.insert(0, {})
        except (ValueError, KeyError, TypeError):
            messages, over = [], True
        if over:
            self._selector.unregister(link.connection)
            link.connection.close()
            with self._lock:
                self._links.pop(link.rank, None)
        if link.rank < 0:
            return []
        return [(link.rank, message) for message in messages] + ([(link.rank, None)] if over else [])

    def close(self) -> None:
        """End all connections."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        for link in self._links.values():
            link.connection.close()
        self._links = {}
        for connection in (self._door, self._wakes, self._wake):
            connection.close()


def _own_address(host: str | None) -> str:
    """The address by which ranks that meet at ``host`` reach this process."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host or socket.gethostname(), 9))  # sends nothing
        return str(probe.getsockname()[0])
    return "127.0.0.1"


_open: weakref.WeakSet[Mesh] = weakref.WeakSet()


def _close_in_child() -> None:
    # A worker of a DataLoader outlives its parent by seconds; what it holds open would hide the parent's death.
    for mesh in list(_open):
        mesh._close()


os.register_at_fork(after_in_child=_close_in_child)
