"""The side of a worker process: one JSON request a line on stdin, one JSON answer a line on stdout.

A peer is an object whose methods are the requests. Needs the standard library and numpy only, because each peer runs in
an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def parse_args() -> argparse.Namespace:
    """--model PATH --threads N, and what the peer knows beside these as --option KEY=VALUE. Pins the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--option", action="append", default=[])
    args = parser.parse_args()
    args.options = dict(option.split("=", 1) for option in args.option)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    return args


def peak_bytes() -> int:
    """The largest resident set that this process has had (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status: expected a line VmHWM")


def serve(make_peer: Callable[[argparse.Namespace], Any]) -> None:
    """Answer requests {"method": name, **arguments} until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not mix with answers
    peer = make_peer(parse_args())
    for line in sys.stdin:
        request = json.loads(line)
        method = request.pop("method")
        result = peak_bytes() if method == "peak_bytes" else getattr(peer, method)(**request)
        answers.write(json.dumps({"result": result}) + "\n")
        answers.flush()
