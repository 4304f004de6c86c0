"""What several threads read from one place: each thing is read once, and the last used ones stay."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """A function's results by its arguments. `functools.lru_cache` calls it again in every thread that asks meanwhile.

    Args:
        make: makes a result; what it raises goes to all who wait for it, and is tried again by who asks later.
        most: results that stay, with those that are being made; the one that was used longest ago goes first.
    """

    def __init__(self, make: Callable[..., T], most: int) -> None:
        self.make, self.most = make, most
        self._known: OrderedDict[tuple[Hashable, ...], Future[T]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *key: Hashable) -> T:
        with self._lock:
            known = self._known.get(key)
            if known is None:
                while len(self._known) >= self.most:  # before it is made: both together would be one too many
                    self._known.popitem(last=False)
                mine: Future[T] = Future()
                self._known[key] = mine
            else:
                self._known.move_to_end(key)
        if known is not None:
            return known.result()
        try:
            made = self.make(*key)
        except BaseException as error:
            self._forget(key, mine)
            mine.set_exception(error)
            raise
        mine.set_result(made)
        return made

    def _forget(self, key: tuple[Hashable, ...], one: Future[T]) -> None:
        with self._lock:
            if self._known.get(key) is one:
                del self._known[key]

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._known.clear()
