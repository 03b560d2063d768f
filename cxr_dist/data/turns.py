"""One at a time, the lowest number first: tasks of a process that share a core."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

__all__ = ["Turns"]

GRACE_S = 0.5
"""Longest that a task which is ready lets the turn go by for one with a lower number that is not."""


class Turns:
    """A lock for tasks that first get ready, each in a thread: it goes to the lowest number of those that are ready.

    Tasks that began together are about as soon ready, so one that is early waits for lower numbers, for a moment.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun: set[int] = set()
        self._ready: set[int] = set()
        self._taken = False

    @contextmanager
    def task(self, number: int) -> Iterator[AbstractContextManager[None]]:
        """A task from its begin to its end; what it is given is entered when it is ready, and held."""
        with self._changed:
            self._begun.add(number)
        try:
            yield self._turn(number)
        finally:
            with self._changed:
                self._begun.discard(number)
                self._changed.notify_all()

    @contextmanager
    def _turn(self, number: int) -> Iterator[None]:
        with self._changed:
            self._ready.add(number)
            in_order = self._changed.wait_for(lambda: not self._taken and number == min(self._begun), GRACE_S)
            if not in_order:
                self._changed.wait_for(lambda: not self._taken and number == min(self._ready))
            self._ready.discard(number)
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()
