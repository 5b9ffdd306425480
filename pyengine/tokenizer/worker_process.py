"""`WorkerProcess`: the parent's side of a program that answers requests in a process of its own, under limits."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from pyengine.errors import ArgumentError, BackendUnavailable, CapacityError

_START_SECONDS = 60.0


class WorkerProcess:
    """Starts a program, talks to it, ends it, replaces it after a crash; no other work waits for it or falls with it.

    The first argument of the program is the folder that holds `library`. Frames in both directions are a
    big-endian u32 length and JSON; a reply holds "text", or "reason", "message" and "line". It says "text" once when it
    is ready, and ends when its input does.

    Safe to use from several threads, which then wait for each other, and after a fork.
    """

    def __init__(
        self,
        subject: str,
        program: Path,
        library: str,
        arguments: list[int],
        *,
        memory_bytes: int,
        cpu_seconds: int,
        wall_seconds: float,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._subject = subject
        self._program = program
        self._library = library
        self._arguments = arguments
        self._memory_bytes = memory_bytes
        self._cpu_seconds = cpu_seconds
        self._wall_seconds = wall_seconds
        self._environment = environment or {}
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner_pid = os.getpid()
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def close(self) -> None:
        """Ends the process."""
        if self._finalizer is not None:
            self._finalizer()
        self._child = None

    def _locked(self) -> threading.Lock:
        if os.getpid() != self._owner_pid:
            # The process and the lock belong to the parent of this fork.
            self._lock = threading.Lock()
            self._owner_pid = os.getpid()
            if self._finalizer is not None:
                self._finalizer.detach()
            self._child = None
        return self._lock

    def _start(self, first_request: bytes) -> dict[str, Any]:
        """The reply of a new process to its first request."""
        self.close()
        library = importlib.util.find_spec(self._library)
        if library is None or library.origin is None or not sys.executable:
            raise BackendUnavailable(
                f"{self._subject}: expected the package {self._library} and a Python executable, got none"
            )
        folder = str(Path(library.origin).parent.parent)
        command = [sys.executable, "-I", "-S", str(self._program), folder, *map(str, self._arguments)]
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=self._environment,
        )
        self._finalizer = weakref.finalize(self, _end, self._child, os.getpid())
        ready = self._ask(b"", _START_SECONDS)
        if "text" not in ready:
            self.close()
            raise BackendUnavailable(f"{self._subject}: the process did not start: {ready['message']}")
        return self._ask(first_request)

    def _ask(self, request: bytes, seconds: float | None = None) -> dict[str, Any]:
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        seconds = self._wall_seconds if seconds is None else seconds
        deadline = time.monotonic() + seconds
        try:
            view = memoryview(request)
            # The child reads a whole request before it works, so that a write waits for nothing but the child's
            # scheduling.
            while view:
                view = view[child.stdin.write(view) :]
            (size,) = struct.unpack(">I", _read(child.stdout.fileno(), 4, deadline))
            reply: dict[str, Any] = json.loads(_read(child.stdout.fileno(), size, deadline))
            return reply
        except TimeoutError:
            self.close()
            return {"reason": "time", "message": f"expected a reply within {seconds:g} s, got none", "line": None}
        except (BrokenPipeError, EOFError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=5)
            code = child.returncode
            self.close()
            return self._describe_death(code)
        except BaseException:
            # An interrupt in the middle of a frame leaves the stream unusable.
            self.close()
            raise

    def _describe_death(self, code: int | None) -> dict[str, Any]:
        if code == -signal.SIGXCPU:
            message = f"expected at most {self._cpu_seconds} s of CPU time, got more"
            return {"reason": "time", "message": message, "line": None}
        if code == -signal.SIGABRT:
            message = f"expected at most {self._memory_bytes} bytes of memory, got more"
            return {"reason": "memory", "message": message, "line": None}
        return {"reason": "crash", "message": f"the process ended with status {code}", "line": None}


def frame(request: dict[str, Any], name: str, max_bytes: int) -> bytes:
    """One request. Raises ArgumentError for what is not JSON, CapacityError for more than `max_bytes`."""
    try:
        data = json.dumps(request, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        # Lone surrogates arrive here too: UnicodeEncodeError is a ValueError.
        raise ArgumentError(f"{name}: expected plain JSON values, got: {error}") from error
    if len(data) > max_bytes:
        raise CapacityError(f"{name}: expected at most {max_bytes} bytes of JSON, got {len(data)}")
    return struct.pack(">I", len(data)) + data


def _read(fd: int, size: int, deadline: float) -> bytes:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    data = bytearray()
    while len(data) < size:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        piece = os.read(fd, min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _end(child: subprocess.Popen[bytes], owner_pid: int) -> None:
    if os.getpid() != owner_pid:
        return
    child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            stream.close()
