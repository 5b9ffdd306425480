"""llama.cpp with the prompt lookup of llama-cpp-python as a worker: the only speculation that package has."""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import llama_cpp
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from serve import serve

CONTEXT = 2048


class LlamaCppLookupPeer:
    def __init__(self, args: argparse.Namespace) -> None:
        self._num_proposed = int(args.options["num_speculative_tokens"])
        self._model = llama_cpp.Llama(
            args.model,
            n_ctx=CONTEXT,
            n_threads=args.threads,
            n_threads_batch=args.threads,
            logits_all=True,
            draft_model=LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=self._num_proposed),
            verbose=False,
        )

    def info(self) -> dict[str, Any]:
        return {"version": llama_cpp.__version__, "max_ngram_size": 2, "num_pred_tokens": self._num_proposed}

    def decode(self, prompts: list[list[int]], num_steps: int) -> float:
        """Seconds for `num_steps` tokens of the one prompt, after its first token."""
        (prompt,) = prompts
        tokens = self._model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        next(tokens)
        start = time.perf_counter()
        for _ in itertools.islice(tokens, num_steps):
            pass
        seconds = time.perf_counter() - start
        tokens.close()
        return seconds


if __name__ == "__main__":
    serve(LlamaCppLookupPeer)
