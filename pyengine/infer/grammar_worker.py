"""The process that compiles grammars before the engine does. Run by path, never imported.

llguidance bounds the steps of a compilation and of a mask, but not its memory or its own stack. So a grammar is
compiled here first, and its first mask computed, under limits on memory and CPU time.

Frames in both directions are a big-endian u32 length and JSON. The first request is {"tokenizer", "vocab_size",
"eos_token_ids"}, every other {"grammar"}; a reply is {"text"} or {"reason", "message", "line"}. argv: folder that
holds llguidance, memory in bytes, CPU seconds per request.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
from typing import Any, BinaryIO

STACK_BYTES = 2 << 20


def read_request(stream: BinaryIO) -> dict[str, Any]:
    header = stream.read(4)
    if len(header) < 4:
        # The other side has closed the pipe: nobody waits for an answer.
        sys.exit(0)
    data = stream.read(struct.unpack(">I", header)[0])
    request: dict[str, Any] = json.loads(data)
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


def failure(reason: str, message: str) -> dict[str, Any]:
    return {"reason": reason, "message": message[:2000], "line": None}


def answer(tokenizer: Any, grammar: str) -> dict[str, Any]:
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    if matcher.is_error():
        return failure("syntax", matcher.get_error())
    matcher.compute_bitmask()
    if matcher.is_error():
        return failure("complexity", matcher.get_error())
    return {"text": ""}


def main() -> None:
    library_folder, memory_bytes, cpu_seconds = sys.argv[1], *map(int, sys.argv[2:4])
    sys.path.insert(0, library_folder)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    from llguidance import LLTokenizer

    # Smaller than the stack of any thread of the engine: what fits here fits there.
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    write_reply(replies, {"text": "ready"})
    tokenizer: Any = None
    while True:
        request = read_request(requests)
        # The tokenizer is the engine's own, not a request's.
        limit_cpu_time(cpu_seconds if tokenizer is not None else 30)
        try:
            if tokenizer is None:
                tokenizer = LLTokenizer(
                    request["tokenizer"], n_vocab=request["vocab_size"], eos_token=request["eos_token_ids"]
                )
                reply: dict[str, Any] = {"text": ""}
            else:
                reply = answer(tokenizer, request["grammar"])
        except MemoryError:
            reply = failure("memory", f"expected at most {memory_bytes} bytes of memory, got more")
        except Exception as error:
            reply = failure("syntax", str(error))
        except BaseException as error:
            # A panic of Rust code derives from BaseException only.
            if type(error).__name__ != "PanicException":
                raise
            reply = failure("crash", str(error))
        write_reply(replies, reply)


if __name__ == "__main__":
    main()
