"""The process that compiles and renders one chat template. Run by path, never imported.

minijinja bounds steps (fuel), recursion and single repeats, but not the memory of a string that doubles, nor its own
stack: such a template aborts the process that renders it. So that process is this one, under limits on memory and CPU
time.

Frames in both directions are a big-endian u32 length and JSON. The first request is {"source"}, every other
{"variables", "now"}; a reply is {"text"} or {"reason", "message", "line"}. argv: folder that holds minijinja, memory in
bytes, CPU seconds per request, fuel, output bytes.
"""

from __future__ import annotations

import datetime
import json
import resource
import struct
import sys
from typing import Any, BinaryIO


class RaisedByTemplate(Exception):
    """`raise_exception` of a template."""


def read_exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        # The other side has closed the pipe: nobody waits for an answer.
        sys.exit(0)
    return data


def read_request(stream: BinaryIO) -> dict[str, Any]:
    (size,) = struct.unpack(">I", read_exactly(stream, 4))
    request: dict[str, Any] = json.loads(read_exactly(stream, size))
    return request


def write_reply(stream: BinaryIO, reply: dict[str, Any]) -> None:
    data = json.dumps(reply).encode("ascii")
    stream.write(struct.pack(">I", len(data)) + data)
    stream.flush()


def limit_cpu_time(seconds: int) -> None:
    """The kernel ends the process when it has used `seconds` (up to one more) from now."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, unlike the built-in filter, which escapes HTML characters."""
    separators = tuple(separators) if separators else None  # type: ignore[assignment]
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    raise RaisedByTemplate(message)


class Renderer:
    def __init__(self, source: str, fuel: int, max_output_bytes: int) -> None:
        import minijinja

        self.now = datetime.datetime.min
        self.max_output_bytes = max_output_bytes
        self.environment = minijinja.Environment(
            fuel=fuel,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_escape_callback=lambda name: None,
            filters={"tojson": tojson},
            globals={"raise_exception": raise_exception, "strftime_now": self.strftime_now},
        )
        self.environment.remove_global("debug")
        self.environment.add_template("chat", source)

    def strftime_now(self, pattern: str) -> str:
        return self.now.strftime(pattern)

    def render(self, request: dict[str, Any]) -> dict[str, Any]:
        self.now = datetime.datetime.fromisoformat(request["now"])
        text = self.environment.render_template("chat", **request["variables"])
        num_bytes = len(text.encode("utf-8"))
        if num_bytes > self.max_output_bytes:
            message = f"expected at most {self.max_output_bytes} bytes of output, got {num_bytes}"
            return {"reason": "output", "message": message, "line": None}
        return {"text": text}


def describe(error: BaseException) -> dict[str, Any]:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RaisedByTemplate):
            return {"reason": "raised", "message": str(cause)[:2000], "line": getattr(error, "line", None)}
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, MemoryError):
        return {"reason": "memory", "message": "expected to render in bounded memory", "line": None}
    kind = str(getattr(error, "kind", ""))
    reasons = {"OutOfFuel": "fuel", "SyntaxError": "syntax"}
    message = getattr(error, "detail", None) or str(error).split("\n", 1)[0]
    return {"reason": reasons.get(kind, "render"), "message": str(message)[:2000], "line": getattr(error, "line", None)}


def main() -> None:
    library_folder, memory_bytes, cpu_seconds, fuel, max_output_bytes = sys.argv[1], *map(int, sys.argv[2:6])
    sys.path.insert(0, library_folder)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    import minijinja  # noqa: F401  (its load is not part of the first request)

    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    write_reply(replies, {"text": "ready"})
    renderer: Renderer | None = None
    while True:
        request = read_request(requests)
        limit_cpu_time(cpu_seconds)
        try:
            if renderer is None:
                renderer = Renderer(request["source"], fuel, max_output_bytes)
                reply: dict[str, Any] = {"text": ""}
            else:
                reply = renderer.render(request)
        except Exception as error:
            reply = describe(error)
        write_reply(replies, reply)


if __name__ == "__main__":
    main()
