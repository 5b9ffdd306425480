"""The parent's side of `template_worker`: starts the process, talks to it, ends it, replaces it after a crash."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyengine.errors import ArgumentError, BackendUnavailable, CapacityError

_START_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class TemplateLimits:
    """What one compilation or rendering may cost. Times are per request; wall time is the net under CPU time."""

    fuel: int = 500_000
    source_bytes: int = 1 << 20
    input_bytes: int = 16 << 20
    output_bytes: int = 4 << 20
    memory_bytes: int = 512 << 20
    cpu_seconds: int = 2
    wall_seconds: float = 30.0


class TemplateProcess:
    """One template, compiled in a process of its own, so that no other work waits for it or falls with it.

    Safe to use from several threads, which then wait for each other, and after a fork.
    """

    def __init__(self, source: str, limits: TemplateLimits) -> None:
        self._source = source
        self._limits = limits
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner_pid = os.getpid()
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def compile(self) -> dict[str, Any]:
        """The reply to the compilation; starts the process if there is none."""
        with self._locked():
            return self._start()

    def render(self, variables: dict[str, Any], now: str) -> dict[str, Any]:
        """The reply to a rendering. A process that dies is replaced at the next call."""
        request = _frame({"variables": variables, "now": now}, self._limits.input_bytes)
        with self._locked():
            if self._child is None and "text" not in (reply := self._start()):
                return reply
            return self._ask(request, self._limits.wall_seconds)

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

    def _start(self) -> dict[str, Any]:
        self.close()
        library = importlib.util.find_spec("minijinja")
        if library is None or library.origin is None or not sys.executable:
            raise BackendUnavailable("chat templates: expected the package minijinja and a Python executable, got none")
        limits = self._limits
        numbers = (limits.memory_bytes, limits.cpu_seconds, limits.fuel, limits.output_bytes)
        command = [
            sys.executable,
            "-I",
            "-S",
            str(Path(__file__).with_name("template_worker.py")),
            str(Path(library.origin).parent.parent),
            *map(str, numbers),
        ]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, env={}
        )
        self._finalizer = weakref.finalize(self, _end, self._child, os.getpid())
        ready = self._ask(b"", _START_SECONDS)
        if "text" not in ready:
            self.close()
            raise BackendUnavailable(f"chat templates: the process that renders them did not start: {ready['message']}")
        return self._ask(_frame({"source": self._source}, 8 * limits.source_bytes), limits.wall_seconds)

    def _ask(self, request: bytes, seconds: float) -> dict[str, Any]:
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
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
            return _describe_death(code, self._limits)
        except BaseException:
            # An interrupt in the middle of a frame leaves the stream unusable.
            self.close()
            raise


def _describe_death(code: int | None, limits: TemplateLimits) -> dict[str, Any]:
    if code == -signal.SIGXCPU:
        return {
            "reason": "time",
            "message": f"expected at most {limits.cpu_seconds} s of CPU time, got more",
            "line": None,
        }
    if code == -signal.SIGABRT:
        message = f"expected at most {limits.memory_bytes} bytes of memory, got more"
        return {"reason": "memory", "message": message, "line": None}
    return {"reason": "crash", "message": f"the rendering process ended with status {code}", "line": None}


def _frame(request: dict[str, Any], max_bytes: int) -> bytes:
    try:
        data = json.dumps(request, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        # Lone surrogates arrive here too: UnicodeEncodeError is a ValueError.
        raise ArgumentError(f"messages: expected plain JSON values, got: {error}") from error
    if len(data) > max_bytes:
        raise CapacityError(f"messages: expected at most {max_bytes} bytes of JSON, got {len(data)}")
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
