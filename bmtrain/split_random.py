"""Random numbers of activations that are split over tensor-parallel ranks, beside the stream that these ranks share.

Tensor-parallel ranks see the same data and draw alike, so that what is whole on each of them stays the same.  Between a
layer that splits its output and one that joins it, that would be wrong: every rank has other heads or columns, and the
masks of one would be copies of another's.  So there each rank has a stream of its own, which starts from where the
shared one stands; that one moves on by one number if anything was drawn.

Whether activations are split is not kept anywhere but in the generator, by the seed of its stream: whoever puts back
the generator's state, to run a piece of a forward again or after an error, puts back this, too.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .autograd import Node, backward_id, never_compiled
from .errors import ConfigurationError
from .own_random import head

_MOST_LEFT = 16
_DROPOUTS = {"dropout", "native_dropout", "alpha_dropout", "feature_dropout", "scaled_dot_product_attention"}
"""What draws or not, by a number that may change."""


class _Left(NamedTuple):
    """A shared stream that is not drawn from for a while: where it stands, and where the other one began."""

    state: torch.Tensor
    start: bytes


class SplitRandom:
    """Which stream one generator draws from, by whether activations are split.

    Args:
        generator: the process's generator for the device that computes.
        rank: this rank among the tensor-parallel ones.

    Attributes:
        check: what looks at every draw of the forward that is running; None if nothing does.
    """

    def __init__(self, generator: torch.Generator, rank: int) -> None:
        self._generator, self._salt = generator, b"split" + rank.to_bytes(8, "little")
        self._left: dict[int, _Left] = {}  # by the seed of the stream that is drawn from instead
        self._trains: list[bool] = []  # of the forwards that are running, one inside the other
        # Where the streams stood when activations were split outside of them.
        self._alone: tuple[bytes, bytes] | None = None
        self.check: DrawCheck | None = None

    @property
    def is_own(self) -> bool:
        """Whether this rank draws other numbers than the other tensor-parallel ranks."""
        return self._generator.initial_seed() in self._left

    def position(self) -> bytes:
        """Of the stream that is drawn from."""
        return head(self._generator.get_state())

    def positions(self) -> tuple[bytes, bytes]:
        """Of that stream, and of the CPU's where another device computes: from that one all ranks draw alike."""
        apart = self._generator is not torch.default_generator
        return self.position(), head(torch.default_generator.get_state()) if apart else b""

    @contextmanager
    def forward(self, trains: bool, checks: bool) -> Iterator[DrawCheck | None]:
        """Around the forward of a distributed module, which begins with what is whole and leaves the stream as it was.

        With ``checks`` each draw inside is looked at, by what is yielded unless an outer forward's does so already.
        """
        was_own = self.is_own
        if was_own:
            self._join()
        self._trains.append(trains)
        check = DrawCheck(self) if checks and self.check is None else None
        try:
            if check is None:
                yield None
            else:
                self.check = check
                with check, _nothing_compiled():
                    yield check
        finally:
            if check is not None:
                self.check = None
                check.end()
            self._trains.pop()
            if self.is_own:
                self._join()
            if was_own:
                self._part()

    @never_compiled
    def follow(self, activation: torch.Tensor, split: bool, joins: bool) -> None:
        """``activation`` has been computed, and this is whether it, and what is made of it, is split.

        ``joins``: it was made of what was split.
        """
        if self.check is not None:
            self.check.note(activation, split)
        if not self._trains and backward_id() is None:
            self._follow_alone(split, joins)
        elif split and not self.is_own and (not self._trains or self._trains[-1]):
            self._part()
        elif not split and self.is_own:
            self._join()

    def _part(self) -> None:
        state = self._generator.get_state()
        seed = int.from_bytes(hashlib.blake2b(head(state), digest_size=8, salt=self._salt).digest(), "little")
        self._generator.manual_seed(seed)
        while len(self._left) >= _MOST_LEFT:  # of streams that somebody else has left by putting back a state
            del self._left[next(iter(self._left))]
        self._left[self._generator.initial_seed()] = _Left(state, self.position())

    def _join(self) -> None:
        left = self._left.pop(self._generator.initial_seed())
        drawn = self.position() != left.start
        self._generator.set_state(left.state)
        if drawn:
            torch.rand((), generator=self._generator, device=self._generator.device)

    def _follow_alone(self, split: bool, joins: bool) -> None:
        """Nobody would put an end to another stream here, should the activations not be joined again."""
        if joins and self._alone not in (None, self.positions()):
            self._alone = None
            raise ConfigurationError(
                "Between tensor-parallel layers that were called outside of the forward of a distributed module, "
                "random numbers were drawn (dropout), the same on all tensor-parallel ranks, of which each has other "
                "features. Call the whole model, or set dropout to 0."
            )
        self._alone = self.positions() if split else None


class DrawCheck(TorchFunctionMode):
    """Follows split activations through a forward, and raises ConfigurationError for a draw from the wrong stream.

    Attributes:
        is_over: whether the forward has ended; it may run again for its gradients.
        doubts: whether something would have drawn from the wrong stream had its probability not been 0.
    """

    def __init__(self, random: SplitRandom) -> None:
        super().__init__()
        self._random, self._tensors = random, WeakIdKeyDictionary()
        self._nodes: dict[Node, bool] = {}
        self.is_over = self.doubts = False

    def end(self) -> None:
        """The forward has ended."""
        self.is_over = True
        self._nodes.clear()  # they hold what autograd saves

    def note(self, activation: torch.Tensor, split: bool) -> None:
        """Where following begins, and where it ends."""
        if split:
            self._tensors[activation] = True
        elif activation in self._tensors:
            del self._tensors[activation]
        if activation.grad_fn is not None:
            self._nodes[activation.grad_fn] = split

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.is_over:
            return func(*args, **kwargs)
        before = self._random.positions()
        out = func(*args, **kwargs)
        after = self._random.positions()
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        name = getattr(func, "__name__", str(func))
        split = any(operand in self._tensors for operand in operands)
        if split:
            for leaf in tree_leaves((out, args[:1] if name == "__setitem__" else ())):
                if isinstance(leaf, torch.Tensor):
                    self._tensors[leaf] = True
        default = kwargs.get("generator") is None
        draws, on_cpu = default and after[0] != before[0], default and after[1] != before[1]
        if draws or on_cpu or name in _DROPOUTS:
            split = split or self._were_split(operands)
            if on_cpu and (split or self._random.is_own):
                raise ConfigurationError(_drawn_on_cpu(name))
            if split != self._random.is_own and not on_cpu:
                if draws:
                    raise ConfigurationError(_wrong_stream(name, not self._random.is_own))
                self.doubts = True
        return out

    def _were_split(self, operands: Iterable[torch.Tensor]) -> bool:
        """The same by their graph, which goes on where no function is seen, as in TorchScript."""
        seen: set[Node] = set()
        waiting: list[Node | None] = [operand.grad_fn for operand in operands]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            if self._nodes.get(node):
                return True
            seen.add(node)
            if node not in self._nodes:
                waiting.extend(edge[0] for edge in node.next_functions)
        return False


def _nothing_compiled() -> AbstractContextManager[object]:
    """Inside the ``with`` compiled code runs as it was written: a function mode would be compiled with it."""
    if "torch._dynamo" not in sys.modules:  # whose import takes seconds
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager


def _wrong_stream(name: str, split: bool) -> str:
    if split:
        where, what, needed = "outside", "what is split", "draw alike there"
    else:
        where, what, needed = "between", "what is, for all that is known, not split", "have streams of their own there"
    return (
        f"{name} draws random numbers for {what} over tensor-parallel ranks, {where} a layer that splits features "
        f'("colwise") and one that joins them ("rowwise"); but ranks {needed}. Set this dropout to 0, move it '
        f"{'between' if split else 'outside'}, or leave these layers out of the plan."
    )


def _drawn_on_cpu(name: str) -> str:
    return (
        f"{name} draws random numbers on the CPU, the same on all tensor-parallel ranks, between a layer that splits "
        'features ("colwise") and one that joins them ("rowwise"), where each rank has other features. Draw them like '
        "the activation, on its device (torch.rand_like(x)), or before the first of these layers."
    )
