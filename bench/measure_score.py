"""Scores of a corpus, packed, against each pair alone: tokens per CPU second, the two in turns.

Run: python -m bench.measure_score MODEL [--mode fast]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from pyengine import LLM

Pairs = list[tuple[list[int], list[int]]]


def corpora(vocab_size: int) -> dict[str, Pairs]:
    """Token ids are random: time does not depend on them."""
    rng = np.random.default_rng(0)

    def ids(low: int, high: int) -> list[int]:
        length = int(rng.integers(low, high))
        return list(map(int, rng.integers(0, vocab_size, length)))

    questions = [ids(40, 90) for _ in range(20)]
    return {
        "a word (1 to 3 tokens)": [([0], ids(1, 4)) for _ in range(200)],
        "one sentence (10 to 30 tokens)": [([0], ids(10, 30)) for _ in range(100)],
        "question with four answers (40 to 90, then 2 to 8)": [(q, ids(2, 8)) for q in questions for _ in range(4)],
        "paragraph (200 to 400 tokens)": [([0], ids(200, 400)) for _ in range(10)],
    }


def packed(llm: LLM, pairs: Pairs, salt: str) -> list[list[float]]:
    return [score.logprobs for score in llm.score(*zip(*pairs, strict=True), cache_salt=salt)]


def alone(llm: LLM, pairs: Pairs, salt: str) -> list[list[float]]:
    return [llm.score([prompt], [completion], cache_salt=salt)[0].logprobs for prompt, completion in pairs]


def timed(work: Callable[[], list[list[float]]]) -> tuple[float, list[list[float]]]:
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    llm = LLM(arguments.model, mode=arguments.mode)
    for name, pairs in corpora(llm.spec.vocab_size).items():
        num_tokens = sum(len(prompt) + len(completion) - 1 for prompt, completion in pairs)
        rates: dict[str, list[float]] = {"alone": [], "packed": []}
        for turn in range(arguments.rounds):
            seconds, expected = timed(lambda pairs=pairs, turn=turn: alone(llm, pairs, f"alone {turn}"))
            rates["alone"].append(num_tokens / seconds)
            seconds, got = timed(lambda pairs=pairs, turn=turn: packed(llm, pairs, f"packed {turn}"))
            rates["packed"].append(num_tokens / seconds)
            if got != expected:
                raise AssertionError(f"{name}: packing changes bits")
        ratio = statistics.median(p / a for p, a in zip(rates["packed"], rates["alone"], strict=True))
        medians = {kind: round(statistics.median(values)) for kind, values in rates.items()}
        print(json.dumps({"corpus": name, "tokens": num_tokens, **medians, "ratio": round(ratio, 2)}))


if __name__ == "__main__":
    main()
