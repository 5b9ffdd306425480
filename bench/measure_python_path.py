"""CPU time per token of the Python path around the native step, on a model so small that the step itself costs little.

Run: python -m bench.measure_python_path [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from pathlib import Path

from pyengine import LLM, SamplingParams
from pyengine.testing.random_model import make_spec, write_model

NUM_TOKENS = 200
PROMPT = [5, 9, 200]
SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "logprobs": {"temperature": 0.8, "logprobs": 5},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.1, "frequency_penalty": 0.5},
    "stop": {"stop": ("never in this text",)},
}


def tiny_llm(folder: Path) -> LLM:
    """One layer of 16 numbers: about 20 us of native work per token."""
    spec = make_spec(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1)
    return LLM(write_model(folder, spec), threads=1, cache_tokens=32 * 256)


def run(llm: LLM, num_sequences: int, settings: dict[str, float]) -> float:
    """CPU microseconds per token."""
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **settings)  # type: ignore[arg-type]
    prompts = [PROMPT] * num_sequences
    begin = time.process_time()
    completions = llm.generate(prompts, params)
    seconds = time.process_time() - begin
    return 1e6 * seconds / sum(len(c.token_ids) for c in completions)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        llm = tiny_llm(Path(folder) / "model")
        if arguments.profile:
            profiler = cProfile.Profile()
            profiler.runcall(run, llm, 32, SETTINGS["greedy"])
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
            return
        for name, settings in SETTINGS.items():
            for num_sequences in (1, 32):
                # The least of several: other work on the machine only adds.
                best = min(run(llm, num_sequences, settings) for _ in range(arguments.repeats))
                print(json.dumps({"settings": name, "sequences": num_sequences, "cpu_us_per_token": round(best, 1)}))
        seconds = sum(llm.explain().profile["seconds"].values())
        print(json.dumps({"native_us_per_token": round(1e6 * seconds / llm.explain().profile["num_tokens"], 1)}))


if __name__ == "__main__":
    main()
