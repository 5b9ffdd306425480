"""pyengine as a worker. Every time includes its scheduler, sampler and detokeniser, as a user sees them."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from serve import serve

from pyengine import _C, LLM, SamplingParams, __version__


class PyenginePeer:
    def __init__(self, args: argparse.Namespace) -> None:
        self._make = lambda: LLM(
            args.model,
            mode=args.options["mode"],
            kv_dtype=args.options["kv_dtype"],
            threads=args.threads,
            max_context=4096,
            cache_tokens=8192,
            prefix_cache=False,  # prompts come again, and are to be computed again
            speculation=args.options.get("speculation"),
        )
        self._llm = self._make()

    def info(self) -> dict[str, Any]:
        explanation = self._llm.explain()
        return {
            "version": __version__,
            "compiler": _C.build_info()["compiler"],
            "isa": explanation.isa,
            "kv_dtype": explanation.kv_dtype,
            "bytes_per_token": explanation.bytes_per_token,
        }

    def load(self) -> float:
        """Seconds from a path to a model that is ready."""
        start = time.perf_counter()
        self._make()
        return time.perf_counter() - start

    def prefill(self, prompt: list[int]) -> float:
        """Seconds for a prompt and the token after it."""
        start = time.perf_counter()
        self._llm.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], num_steps: int, temperature: float = 0.0) -> float:
        """Seconds for `num_steps` tokens of every prompt, after the first token of each."""
        params = SamplingParams(max_tokens=1 + num_steps, ignore_eos=True, temperature=temperature)
        groups = self._llm._start(list(prompts), params, stream=True)
        pieces = self._llm._driver.stream([sequence for group in groups for sequence in group])
        # Prompts that fit into one step, or one prompt alone: these are the first token of each.
        for _ in prompts:
            next(pieces)
        start = time.perf_counter()
        num_tokens = sum(len(piece.token_ids) for piece in pieces)
        seconds = time.perf_counter() - start
        if num_tokens != num_steps * len(prompts):
            raise RuntimeError(f"expected {num_steps * len(prompts)} tokens, got {num_tokens}")
        return seconds

    def answer(self, prompt: list[int], num_tokens: int) -> list[int]:
        """The tokens that follow a prompt."""
        return self._llm.generate([prompt], SamplingParams(max_tokens=num_tokens, ignore_eos=True))[0].token_ids

    def verify(self, prompt: list[int], num_rows: int, num_steps: int) -> float:
        """Seconds of a step that computes `num_rows` tokens behind a prompt and draws after each of them: the mean of
        `num_steps`, each behind the prompt alone."""
        decoder = self._llm._runner.decoder
        sampler = _C.Sampler(decoder)
        seq = decoder.add_sequence()
        decoder.grow(seq, len(prompt))
        sampler.step(prompt, [seq] * len(prompt), [], [], -1)
        seconds = 0.0
        # What is drawn is no proposal of these: each is computed, and taken back.
        rows = [(token + 1) % self._llm.spec.vocab_size for token in prompt[:num_rows]]
        for _ in range(num_steps):
            state = _C.SampleState(self._llm.spec.vocab_size)
            start = time.perf_counter()
            decoder.grow(seq, num_rows)
            sampler.step(rows, [seq] * num_rows, [0], [state], -1, [num_rows - 1])
            decoder.truncate(seq, len(prompt))
            seconds += time.perf_counter() - start
        decoder.free_sequence(seq)
        return seconds / num_steps

    def speculation(self) -> dict[str, Any] | None:
        """What was proposed and accepted since the model was loaded."""
        return self._llm.explain().speculation

    def logits(self, token_ids: list[int], path: str) -> bool:
        """Writes float32 [T, vocab_size] to `path`."""
        np.save(path, self._llm.logits(token_ids))
        return True

    def profile(self) -> dict[str, Any]:
        """Seconds by phase since the model was loaded."""
        return self._llm.explain().profile


if __name__ == "__main__":
    serve(PyenginePeer)
