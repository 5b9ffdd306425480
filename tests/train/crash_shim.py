"""Stops a process at the k-th file system call, and a model of what a disk holds after a power loss at that point."""

from __future__ import annotations

import builtins
import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from pyengine.formats import atomic

_CALLS = ("open", "mkdir", "fsync", "rename", "replace", "unlink", "rmdir")


@dataclass
class Event:
    """One call: its name, the paths it touches, and for a write its bytes."""

    name: str
    paths: tuple[Path, ...]
    data: bytes = b""
    creates: bool = False


class _File:
    """A file opened from a descriptor, whose every write is an event of its own."""

    def __init__(self, descriptor: int, path: Path, on_event: Callable[[Event], None]) -> None:
        self._raw = builtins.open(descriptor, "wb", buffering=0)
        self._path = path
        self._on_event = on_event

    def write(self, data: bytes | memoryview) -> int:
        content = bytes(data)
        middle = len(content) // 2
        for part in (content[:middle], content[middle:]):
            if part:
                self._on_event(Event("write", (self._path,), part))
                assert self._raw.write(part) == len(part)
        return len(content)

    def flush(self) -> None:
        self._raw.flush()

    def fileno(self) -> int:
        return self._raw.fileno()

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._raw.close()


@contextlib.contextmanager
def watch(on_event: Callable[[Event], None]) -> Iterator[None]:
    """Calls `on_event` before every file system call that changes something, or opens something."""
    real = {name: getattr(os, name) for name in _CALLS}
    opened: dict[int, Path] = {}

    def at(path: object, dir_fd: int | None = None) -> Path:
        return opened[path] if isinstance(path, int) else opened[dir_fd] / path if dir_fd is not None else Path(path)

    def open_(path, flags, mode=0o777, *, dir_fd=None):
        on_event(Event("open", (at(path, dir_fd),), creates=bool(flags & os.O_CREAT)))
        descriptor = real["open"](path, flags, mode, dir_fd=dir_fd)
        opened[descriptor] = at(path, dir_fd)
        return descriptor

    def mkdir(path, mode=0o777, *, dir_fd=None):
        on_event(Event("mkdir", (at(path, dir_fd),)))
        real["mkdir"](path, mode, dir_fd=dir_fd)

    def fsync(descriptor):
        on_event(Event("fsync", (opened[descriptor],)))
        real["fsync"](descriptor)

    def move(name):
        def call(source, target):
            on_event(Event("rename", (Path(source), Path(target))))
            real[name](source, target)

        return call

    def remove(name):
        def call(path, *, dir_fd=None):
            on_event(Event(name, (at(path, dir_fd),)))
            real[name](path, dir_fd=dir_fd)

        return call

    def open_file(descriptor, mode):
        return _File(descriptor, opened[descriptor], on_event)

    fakes = {
        "open": open_, "mkdir": mkdir, "fsync": fsync, "rename": move("rename"), "replace": move("replace"),
        "unlink": remove("unlink"), "rmdir": remove("rmdir"),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(mock.patch.object(os, name, fake))
        stack.enter_context(mock.patch.object(atomic, "open", open_file, create=True))
        yield


def events_of(action: Callable[[], object]) -> list[Event]:
    events: list[Event] = []
    with watch(events.append):
        action()
    return events


def run_until(action: Callable[[], object], stop_at: int) -> bool:
    """Run `action` in a child process that dies before file system call number `stop_at`. Whether it finished."""
    child = os.fork()
    if child == 0:
        try:
            count = 0

            def on_event(event: Event) -> None:
                nonlocal count
                if count == stop_at:
                    os._exit(9)
                count += 1

            with watch(on_event):
                action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), f"the child failed with {code}"
    return code == 0


@dataclass
class _Inode:
    """A file or folder: what a program sees and what the disk has for certain."""

    is_folder: bool
    seen: bytes = b""
    synced: bytes = b""
    entries: dict[str, _Inode] = field(default_factory=dict)
    synced_entries: dict[str, _Inode] = field(default_factory=dict)


class Disk:
    """A disk that keeps only what was synced: file content by fsync of the file, names by fsync of the folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = self._read(root)

    def _read(self, path: Path) -> _Inode:
        if path.is_dir():
            entries = {child.name: self._read(child) for child in path.iterdir()}
            return _Inode(True, entries=entries, synced_entries=dict(entries))
        content = path.read_bytes()
        return _Inode(False, seen=content, synced=content)

    def _find(self, path: Path) -> _Inode:
        node = self.top
        for part in path.relative_to(self.root).parts:
            node = node.entries[part]
        return node

    def apply(self, event: Event) -> None:
        path = event.paths[0]
        if event.name == "open" and event.creates:
            self._find(path.parent).entries[path.name] = _Inode(False)
        elif event.name == "mkdir":
            self._find(path.parent).entries[path.name] = _Inode(True)
        elif event.name == "write":
            self._find(path).seen += event.data
        elif event.name == "fsync":
            node = self._find(path)
            node.synced, node.synced_entries = node.seen, dict(node.entries)
        elif event.name == "rename":
            node = self._find(path.parent).entries.pop(path.name)
            self._find(event.paths[1].parent).entries[event.paths[1].name] = node
        elif event.name in ("unlink", "rmdir"):
            del self._find(path.parent).entries[path.name]

    def write_after_power_loss(self, target: Path, *, names_survive: bool) -> None:
        """Lay out what is left. `names_survive`: folders happen to be on disk as seen, file content only as synced."""
        self._write(self.top, target, names_survive)

    def _write(self, node: _Inode, target: Path, names_survive: bool) -> None:
        if not node.is_folder:
            target.write_bytes(node.synced)
            return
        target.mkdir()
        for name, child in (node.entries if names_survive else node.synced_entries).items():
            self._write(child, target / name, names_survive)
