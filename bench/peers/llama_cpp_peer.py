"""llama.cpp as a worker, through the low-level functions of llama-cpp-python: no sampler, no text, only argmax."""

from __future__ import annotations

import argparse
import ctypes
import time
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from serve import serve

MAX_TOKENS = 2048
MAX_SEQUENCES = 32
CONTEXT = 8192


@llama_cpp.llama_log_callback
def _discard(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """llama.cpp's log goes nowhere."""


class LlamaCppPeer:
    def __init__(self, args: argparse.Namespace) -> None:
        llama_cpp.llama_log_set(_discard, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._path, self._threads = args.model.encode(), args.threads
        self._model, self._context = self._open()
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(MAX_TOKENS, 0, 1)

    def _open(self) -> tuple[Any, Any]:
        model = llama_cpp.llama_model_load_from_file(self._path, llama_cpp.llama_model_default_params())
        if not model:
            raise RuntimeError(f"{self._path!r}: llama.cpp cannot load this file")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, MAX_TOKENS, 512
        params.n_seq_max, params.kv_unified = MAX_SEQUENCES, True
        params.n_threads = params.n_threads_batch = self._threads
        context = llama_cpp.llama_init_from_model(model, params)
        if not context:
            raise RuntimeError("llama.cpp cannot make a context")
        return model, context

    def info(self) -> dict[str, Any]:
        return {
            "version": llama_cpp.__version__,
            "system": llama_cpp.llama_print_system_info().decode(),
            "kv_dtype": "float16",
            "bytes_per_token": llama_cpp.llama_model_size(self._model),
        }

    def _step(self, tokens: list[tuple[int, int, int, bool]]) -> npt.NDArray[np.float32]:
        """One llama_decode of (token, position, sequence, wants logits). Returns the logits wanted [R, vocab_size]."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: status {status}")
        num_rows = sum(wanted for *_, wanted in tokens)
        values = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(values, shape=(num_rows, self._vocab_size))

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def load(self) -> float:
        """Seconds from a path to a model that is ready."""
        start = time.perf_counter()
        model, context = self._open()
        seconds = time.perf_counter() - start
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
        return seconds

    def prefill(self, prompt: list[int]) -> float:
        """Seconds for a prompt and the token after it."""
        self._clear()
        start = time.perf_counter()
        int(self._feed([prompt])[0])
        return time.perf_counter() - start

    def _feed(self, prompts: list[list[int]]) -> npt.NDArray[np.int64]:
        """All prompts in one step. Returns the likeliest next token of each."""
        tokens = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        return self._step(tokens).argmax(-1)

    def decode(self, prompts: list[list[int]], num_steps: int) -> float:
        """Seconds for `num_steps` tokens of every prompt, after the first token of each."""
        self._clear()
        ids = self._feed(prompts).tolist()
        start = time.perf_counter()
        for step in range(num_steps):
            rows = [(token, len(prompts[s]) + step, s, True) for s, token in enumerate(ids)]
            ids = self._step(rows).argmax(-1).tolist()
        return time.perf_counter() - start

    def verify(self, prompt: list[int], num_rows: int, num_steps: int) -> float:
        """Seconds of a step that computes `num_rows` tokens behind a prompt, with the likeliest token after each: the
        mean of `num_steps`, each behind the prompt alone."""
        self._clear()
        self._feed([prompt])
        memory = llama_cpp.llama_get_memory(self._context)
        seconds = 0.0
        for _ in range(num_steps):
            start = time.perf_counter()
            self._step([(token, len(prompt) + i, 0, True) for i, token in enumerate(prompt[:num_rows])]).argmax(-1)
            llama_cpp.llama_memory_seq_rm(memory, 0, len(prompt), -1)
            seconds += time.perf_counter() - start
        return seconds / num_steps

    def logits(self, token_ids: list[int], path: str) -> bool:
        """Writes float32 [T, vocab_size] to `path`."""
        self._clear()
        np.save(path, self._step([(token, position, 0, True) for position, token in enumerate(token_ids)]))
        return True


if __name__ == "__main__":
    serve(LlamaCppPeer)
