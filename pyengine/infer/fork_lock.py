"""Locks that os.fork waits for, so that the child finds what they guard in order."""

from __future__ import annotations

import os
import threading
import weakref

_locks: weakref.WeakSet[threading.Lock] = weakref.WeakSet()
_held: list[threading.Lock] = []


def fork_lock() -> threading.Lock:
    """A lock that is free on both sides of a fork. Its holder neither forks nor waits for another such lock."""
    lock = threading.Lock()
    _locks.add(lock)
    return lock


def _before() -> None:
    for lock in list(_locks):
        lock.acquire()
        _held.append(lock)


def _after() -> None:
    while _held:
        _held.pop().release()


os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)
