"""Questions about what functions do, themselves or in what they call, where they may call each other in a circle."""

from __future__ import annotations

import ast
from collections.abc import Callable


class AnyCalled:
    """Whether functions, or what they call, do something: asked once of each."""

    def __init__(self) -> None:
        self._known: dict[ast.AST, bool] = {}
        self._asked: set[ast.AST] = set()  # while it is looked at what they call
        self._circles: set[ast.AST] = set()  # of those, what one that they call calls again
        self._unsure: set[ast.AST] = set()  # what does not, if those do not

    def __call__(self, function: ast.AST, look: Callable[[], bool]) -> bool:
        """Whether ``function`` does, by ``look()``, which asks this of what it calls.

        Where a circle is entered first, the "no" of the others rests on what that one does: it holds if that is "no",
        too, and is forgotten otherwise.
        """
        if function in self._asked:
            self._circles.add(function)
            return False
        if function in self._unsure:
            return False
        if function not in self._known:
            self._asked.add(function)
            found = look()
            self._asked.remove(function)
            self._circles.discard(function)
            if self._circles and not found:
                self._unsure.add(function)
                return False
            self._known[function] = found
            if not self._circles:
                self._known |= {} if found else dict.fromkeys(self._unsure, False)
                self._unsure = set()
        return self._known[function]
