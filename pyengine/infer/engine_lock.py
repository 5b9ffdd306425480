"""The lock of an engine: fair, and free on both sides of a fork."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Callable


class EngineLock:
    """A lock whose holder cannot take it again before who waits for it, and which os.fork waits for, so that the child
    finds in order what it guards.

    A thread holds one at a time and does not fork while it does.
    """

    def __init__(self) -> None:
        self._queue = threading.Lock()  # held by the one that is next
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        _locks.add(self)

    def __enter__(self) -> None:
        with self._queue:
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._run_calls()

    def run_soon(self, call: Callable[[], None]) -> None:
        """Calls it with the lock held: at once, or when who holds the lock lets it go. Waits for nobody, so garbage
        collection may come here in the very thread that holds the lock."""
        self._calls.put(call)
        self._run_calls()

    def _run_calls(self) -> None:
        # Who cannot take the lock leaves them to its holder, who looks here after letting it go.
        while not self._calls.empty() and self._lock.acquire(blocking=False):
            try:
                with contextlib.suppress(queue.Empty):
                    self._calls.get_nowait()()
            finally:
                self._lock.release()

    def hold(self) -> None:
        """Keeps everybody from holding it and from waiting to be the next."""
        self._queue.acquire()
        self._lock.acquire()

    def let_go(self) -> None:
        self._lock.release()
        self._queue.release()
        self._run_calls()


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
