"""Inference: `LLM`, `AsyncLLM`, sampling options, results. Nothing here imports torch."""

from pyengine.infer.async_llm import AsyncLLM
from pyengine.infer.llm import LLM
from pyengine.infer.outputs import Completion, Score, TextPiece, TokenLogprobs
from pyengine.infer.sampling_params import SamplingParams

__all__ = ["LLM", "AsyncLLM", "Completion", "SamplingParams", "Score", "TextPiece", "TokenLogprobs"]
