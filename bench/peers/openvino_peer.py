"""OpenVINO GenAI as a worker, from the same GGUF file. It repacks and rounds the weights as it likes."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai
from serve import serve


class OpenVinoPeer:
    def __init__(self, args: argparse.Namespace) -> None:
        self._num_proposed = int(args.options.get("num_speculative_tokens", 0))
        options = {"INFERENCE_NUM_THREADS": args.threads}
        if "prompt_lookup" in args.options:
            options["prompt_lookup"] = True
        self._make = lambda: openvino_genai.LLMPipeline(args.model, "CPU", **options)
        self._pipeline = self._make()

    def info(self) -> dict[str, Any]:
        return {"version": openvino_genai.__version__, "runtime": openvino.__version__}

    def load(self) -> float:
        """Seconds from a path to a model that is ready."""
        start = time.perf_counter()
        self._make()
        return time.perf_counter() - start

    def _generate(self, prompts: list[list[int]], num_tokens: int) -> Any:
        """The prompts have one length."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = num_tokens, True, False
        if self._num_proposed:
            config.num_assistant_tokens, config.max_ngram_size = self._num_proposed, 3
        ids = np.array(prompts, np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        result = self._pipeline.generate(inputs, config)
        if [len(tokens) for tokens in result.tokens] != [num_tokens] * len(prompts):
            raise RuntimeError(f"expected {num_tokens} tokens of each prompt")
        return result.perf_metrics

    def prefill(self, prompt: list[int]) -> float:
        """Seconds for a prompt and the token after it."""
        start = time.perf_counter()
        self._generate([prompt], 1)
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], num_steps: int) -> float:
        """Seconds for `num_steps` tokens of every prompt, after the first token of each."""
        metrics = self._generate(prompts, 1 + num_steps)
        return float(metrics.get_generate_duration().mean - metrics.get_ttft().mean) / 1000

    def logits(self, token_ids: list[int], path: str) -> bool:
        """Its pipeline shows no logits."""
        return False


if __name__ == "__main__":
    serve(OpenVinoPeer)
