"""The lock of an engine: fair, and free on both sides of a fork."""

from __future__ import annotations

import os
import threading
import weakref


class EngineLock:
    """A lock whose holder cannot take it again before who waits for it, and which os.fork waits for, so that the child
    finds in order what it guards.

    A thread holds one at a time and does not fork while it does.
    """

    def __init__(self) -> None:
        self._queue = threading.Lock()  # held by the one that is next
        self._lock = threading.Lock()
        _locks.add(self)

    def __enter__(self) -> None:
        with self._queue:
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def hold(self) -> None:
        """Keeps everybody from holding it and from waiting to be the next."""
        self._queue.acquire()
        self._lock.acquire()

    def let_go(self) -> None:
        self._lock.release()
        self._queue.release()


_locks: weakref.WeakSet[EngineLock] = weakref.WeakSet()
_held: list[EngineLock] = []


def _before_fork() -> None:
    for lock in list(_locks):
        lock.hold()
        _held.append(lock)


def _after_fork() -> None:
    while _held:
        _held.pop().let_go()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
