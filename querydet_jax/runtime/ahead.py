"""Stages of work that overlap: an iterator that runs in a thread of its own, a few items ahead of its reader."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
_PATIENCE = 10.0  # s that `close` waits for a thread which reads a stream or compiles


class Ahead(Iterator[Item], Generic[Item]):
    """Iterates over ``items`` in a thread, at most ``size`` of them ahead; what ``items`` raises, the reader gets.

    Args:
      items: a generator. Its thread also closes it.
      size: items that wait for the reader, at most.
      newest: let the oldest item that waits go when there are more, instead of holding up ``items``: for a camera,
        which does not wait.

    Attributes:
      passed_over: items that were let go.
    """

    def __init__(self, items: Generator[Item, None, None], size: int, *, newest: bool = False):
        self.passed_over = 0
        self._items, self._size, self._newest = items, size, newest
        self._waiting: deque[Item] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None
        # A daemon, so that a stream which sends nothing does not hold up the end of the process.
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def __next__(self) -> Item:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended)
            if self._waiting:
                self._changed.notify_all()
                return self._waiting.popleft()
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and drop what waits."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join(_PATIENCE)

    def _work(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    break
        except BaseException as error:
            self._error = error
        try:
            self._items.close()
        except BaseException as error:
            self._error = self._error or error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _put(self, item: Item) -> bool:
        with self._changed:
            if self._newest and len(self._waiting) == self._size:
                self._waiting.popleft()
                self.passed_over += 1
            self._changed.wait_for(lambda: self._closed or len(self._waiting) < self._size)
            if not self._closed:
                self._waiting.append(item)
                self._changed.notify_all()
            return not self._closed
