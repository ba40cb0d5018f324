"""Connections between the watchdogs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from torch.distributed import HashStore

from bmtrain.watch.mesh import Mesh, Message


@pytest.fixture
def store() -> HashStore:
    return HashStore()


@pytest.fixture
def meshes(store: HashStore) -> Iterator[list[Mesh]]:
    made: dict[int, Mesh] = {}

    def start(rank: int) -> None:
        made[rank] = Mesh(store, rank, 3, "127.0.0.1")

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield [made[rank] for rank in range(3)]
    for mesh in made.values():
        mesh.close()


def heard(mesh: Mesh, count: int) -> list[tuple[int, Message | None]]:
    found: list[tuple[int, Message | None]] = []
    deadline = time.monotonic() + 5
    while len(found) < count and time.monotonic() < deadline:
        found += mesh.receive(0.05)
    return sorted(found, key=lambda pair: pair[0])


def join(meshes: list[Mesh]) -> None:
    """Let those of lower rank hear who has come."""
    assert [heard(mesh, 2 - mesh.rank) for mesh in meshes] == [[(1, {}), (2, {})], [(2, {})], []]


def test_strangers_are_not_listened_to(store: HashStore, meshes: list[Mesh]) -> None:
    join(meshes)
    _, port = store.get("watch/0").decode().split()
    for said in (
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"rank": 1, "word": "guessed"}\n{"verdict": "no"}\n',
        b"[]\n",
        b"\x80" * 64,
    ):
        with socket.create_connection(("127.0.0.1", int(port))) as stranger:
            stranger.sendall(said)
            assert heard(meshes[0], 0) == []
            for _ in range(4):
                assert meshes[0].receive(0.02) == []
    meshes[1].send({"said": 1})
    assert heard(meshes[0], 1) == [(1, {"said": 1})]


def test_all_others_hear_what_one_sends(meshes: list[Mesh]) -> None:
    join(meshes)
    for mesh in meshes:
        mesh.send({"from": mesh.rank})
    for mesh in meshes:
        others = [rank for rank in range(3) if rank != mesh.rank]
        assert heard(mesh, 2) == [(rank, {"from": rank}) for rank in others]


def test_the_end_of_one_is_heard_after_its_last_word(meshes: list[Mesh]) -> None:
    join(meshes)
    meshes[2].send({"last": "word"}, must=True)
    meshes[2].close()
    assert heard(meshes[0], 2) == [(2, {"last": "word"}), (2, None)]


def test_what_must_arrive_does_though_the_other_side_reads_late(meshes: list[Mesh]) -> None:
    join(meshes)
    for number in range(20000):
        meshes[0].send({"number": number, "much": "x" * 200})
    meshes[0].send({"verdict": "the end"}, must=True)
    found: list[Message | None] = []
    deadline = time.monotonic() + 20
    while {"verdict": "the end"} not in found and time.monotonic() < deadline:
        found += [message for _, message in meshes[1].receive(0.01)]
        meshes[0].send({})
    assert {"verdict": "the end"} in found and len(found) < 20000, "the rest is left out, as nobody reads"
