"""How ranks meet, and who does not take part."""

from __future__ import annotations

import ast
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from ranks import free_port
from torch.distributed import PrefixStore, TCPStore

import bmtrain as bmt
from bmtrain.comm.rendezvous import Meeting, meet, signed
from bmtrain.errors import CommunicationError
from bmtrain.watch.mesh import Mesh

PATIENCE = timedelta(seconds=20)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """Held by a launcher, as torchrun's is."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def start(*tokens: str) -> list[Meeting | str]:
    """What each rank with its token comes to, within seconds."""
    method = f"tcp://127.0.0.1:{free_port()}"

    def one(rank: int) -> Meeting | str:
        try:
            return meet(method, rank, len(tokens), PATIENCE, tokens[rank])
        except CommunicationError as error:
            return str(error)

    began = time.monotonic()
    with ThreadPoolExecutor(len(tokens)) as ranks:
        found = list(ranks.map(one, range(len(tokens))))
    assert time.monotonic() - began < PATIENCE.total_seconds() / 2
    return found


@pytest.mark.parametrize("token", ["", "a secret", "ünïcode ☃ " * 50])
def test_ranks_with_the_same_token_meet(token: str) -> None:
    found = start(token, token, token)
    meetings = [one for one in found if isinstance(one, Meeting)]
    assert len(meetings) == 3 and len({one.secret for one in meetings}) == 1, found
    meetings[1].store.set("from 1", "x")
    assert meetings[2].store.get("from 1") == b"x"


@pytest.mark.parametrize("tokens", [("ours", "theirs"), ("ours", ""), ("", "theirs"), ("ours", "ours "), ("a", "A")])
def test_a_rank_with_another_token_is_told_at_once_on_both_sides(tokens: tuple[str, str]) -> None:
    found = start(*tokens)
    assert "came as rank 1 has another BMTRAIN_TOKEN" in str(found[0])
    assert "answered as rank 0 has another BMTRAIN_TOKEN" in str(found[1])


def test_of_three_ranks_one_has_another_token() -> None:
    found = start("ours", "ours", "theirs")
    assert "came as rank 2 has another" in str(found[0]) and "answered as rank 0 has another" in str(found[2])


def test_the_token_is_nowhere_in_the_store(store: TCPStore) -> None:
    token = "do not tell"
    found: list[Meeting] = []

    def one(rank: int) -> None:
        found.append(meet(f"tcp://127.0.0.1:{store.port}", rank, 2, PATIENCE, token))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key in store.list_keys():
        name = key if isinstance(key, str) else key.decode()
        assert token not in name and found[0].secret not in name
        if store.check([name]):
            assert token.encode() not in store.get(name)
    assert found[0].secret not in {store.get("bmtrain/word/1").decode(), ""}


WORDS = ["", "a b", "guessed", f"w {signed('', '1 w')}", f"w {signed('ours', '2 w')}", "\x00 "]


@pytest.mark.parametrize("said", WORDS)
def test_a_strangers_word_is_refused(store: TCPStore, said: str) -> None:
    PrefixStore("bmtrain", store).set("word/1", said)
    with pytest.raises(CommunicationError, match="came as rank 1 has another BMTRAIN_TOKEN"):
        meet(f"tcp://127.0.0.1:{store.port}", 0, 2, PATIENCE, "ours")


@pytest.mark.parametrize("answer", ["", "name", "name signature", f"name {signed('', 'word name')}"])
def test_a_strangers_answer_is_refused(store: TCPStore, answer: str) -> None:
    ours = PrefixStore("bmtrain", store)

    def stranger() -> None:
        word = ours.get("word/1").decode().split()[0]
        ours.set(f"name for/{word}", answer)

    thread = threading.Thread(target=stranger)
    thread.start()
    with pytest.raises(CommunicationError, match="answered as rank 0 has another BMTRAIN_TOKEN"):
        meet(f"tcp://127.0.0.1:{store.port}", 1, 2, PATIENCE, "ours")
    thread.join()


def test_who_has_read_the_store_does_not_reach_a_watchdog(store: TCPStore) -> None:
    meshes: dict[int, Mesh] = {}

    def one(rank: int) -> None:  # each with a client of its own: one that waits lets nobody else speak
        meshes[rank] = Mesh(TCPStore("127.0.0.1", store.port), rank, 2, "127.0.0.1", "the secret")

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    word, port = store.get("watch/word").decode(), int(store.get("watch/0").decode().split()[1])
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(f'{{"rank": 1, "word": "{word}"}}\n{{"verdict": "no"}}\n'.encode())
        found = [pair for _ in range(10) for pair in meshes[0].receive(0.05)]
    assert found == [(1, {})], "rank 1 has come, and nobody else"
    for mesh in meshes.values():
        mesh.close()


READS_FILES = {f"checkpoint/{name}.py" for name in ("files", "command", "pickled", "sharded", "storage", "torch_file")}

READS_THE_COMMAND_LINE = {"estimate/command.py"}  # what makes the model, typed by whoever starts it


def test_nothing_but_files_is_unpickled() -> None:
    """No call that unpickles stands where something from the network could come to it."""
    root = Path(bmt.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            unpickles = called in ("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open")
            unpickles |= called == "torch.load" and not safe
            unpickles |= called.startswith(("dist.", "torch.distributed.")) and "_object" in called
            unpickles |= called in ("eval", "exec")
            if unpickles:
                found.add(path.relative_to(root).as_posix())
    assert found <= READS_FILES | READS_THE_COMMAND_LINE, found
