"""A communicator that writes each call into the diary, and says who is to blame when one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..autograd import never_compiled, outside_of_compiled_code, runs_as_written
from ..device import Waits
from ..errors import CommunicationError
from ..watch import Diary, Watchdog
from .base import Communicator, ReduceOp


class WatchedCommunicator(Communicator):
    """``inner``, under the ``name`` it has in the diary.

    Raises RankDivergenceError or CommunicationError that says which rank is the cause, and where it is.
    """

    def __init__(
        self,
        inner: Communicator,
        name: str,
        diary: Diary,
        watchdog: Watchdog,
        waits: Waits,
        ranks: Sequence[int] = (),
    ) -> None:
        """``ranks``: those of the group, by their numbers in the job; all, if none are given."""
        super().__init__(inner.rank, inner.world_size)
        self.inner, self.name, self._diary, self._watchdog, self._waits = inner, name, diary, watchdog, waits
        self._ranks = ranks or range(inner.world_size)
        self._next = self._ranks[(self.rank + 1) % self.world_size]

    @runs_as_written
    def all_gather(self, shard: torch.Tensor, whole: torch.Tensor) -> None:
        self._counted("all_gather", shard, self.inner.all_gather, shard, whole)

    @runs_as_written
    def reduce_scatter(self, whole: torch.Tensor, shard: torch.Tensor, op: ReduceOp = "sum") -> None:
        self._counted("reduce_scatter", shard, self.inner.reduce_scatter, whole, shard, op)

    @runs_as_written
    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> None:
        self._counted("all_reduce", tensor, self.inner.all_reduce, tensor, op)

    def start_all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> Callable[[], None]:
        wait = self._counted("all_reduce", tensor, self.inner.start_all_reduce, tensor, op)

        def wait_watched() -> None:
            self._diary.is_inside = True
            try:
                with self._waits.at():
                    wait()
            except CommunicationError as error:
                self._raise(error)
            finally:
                self._diary.leave()

        return wait_watched

    @runs_as_written
    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        self._counted("broadcast", tensor, self.inner.broadcast, tensor, root)

    @runs_as_written
    def barrier(self) -> None:
        self._counted("barrier", 0, self.inner.barrier)

    def send(self, tensor: torch.Tensor, peer: int) -> None:
        self._between_two("a send to", peer, self.inner.send, tensor)

    def recv(self, tensor: torch.Tensor, peer: int) -> None:
        self._between_two("a receive from", peer, self.inner.recv, tensor)

    @contextmanager
    def group(self) -> Iterator[None]:
        is_over = False
        try:
            with self._waits.at(), self.inner.group():
                yield
                is_over = self._diary.is_inside = True
        except CommunicationError as error:
            if not is_over:  # one of its collectives has said whose fault it is
                raise
            self._raise(error)
        finally:
            self._diary.leave()

    def alloc(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made: torch.Tensor = self._counted("alloc", numel * dtype.itemsize, self.inner.alloc, numel, dtype, device)
        return made

    def release(self, tensor: torch.Tensor) -> bool:
        done: bool = self._counted("release", tensor, self.inner.release, tensor)
        return done

    def close(self) -> None:
        self.inner.close()

    def abort(self) -> None:
        self.inner.abort()

    @runs_as_written
    def _counted(self, operation: str, moved: torch.Tensor | int, call: Callable[..., Any], *args: Any) -> Any:
        """``call(*args)``, with a tensor that it moves, or how many bytes."""
        if torch.compiler.is_dynamo_compiling():
            return outside_of_compiled_code(self._counted, operation, moved, call, *args)
        if self._diary.is_apart:
            self._diary.enter_pair(f"{operation} ({self.name}) with", self._next)
        else:
            self._diary.enter(self.name, operation, moved if isinstance(moved, int) else moved.nbytes)
        try:
            with self._waits.at():
                return call(*args)
        except CommunicationError as error:
            self._raise(error)
        finally:
            self._diary.leave()

    @never_compiled
    def _between_two(self, pair: str, peer: int, call: Callable[..., Any], tensor: torch.Tensor) -> None:
        self._diary.enter_pair(pair, self._ranks[peer] if peer in range(self.world_size) else peer)
        try:
            with self._waits.at():
                call(tensor, peer)
        except CommunicationError as error:
            raise self._watchdog.explained(error) from error
        finally:
            self._diary.leave()

    def _raise(self, error: CommunicationError) -> None:
        if error.__cause__ is None and self._watchdog.verdict is None:  # refused here, so that nobody waits for it
            if not self._diary.is_apart:
                self._diary.refused()
            raise error
        raise self._watchdog.explained(error) from error
