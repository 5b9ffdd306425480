"""Inference: `LLM`, `AsyncLLM`, sampling options, results. Nothing here imports torch."""

from pyengine.infer.adapters import AdapterInfo
from pyengine.infer.async_llm import AsyncLLM
from pyengine.infer.beam_search import BeamSearchParams
from pyengine.infer.grammar import StructuredOutputError
from pyengine.infer.llm import LLM
from pyengine.infer.outputs import Classification, Completion, Score, TextPiece, TokenLogprobs
from pyengine.infer.sampling_params import SamplingParams
from pyengine.infer.speculation import DraftModel, PromptLookup
from pyengine.infer.structured_outputs import StructuredOutputs

__all__ = [
    "LLM",
    "AdapterInfo",
    "AsyncLLM",
    "BeamSearchParams",
    "Classification",
    "Completion",
    "DraftModel",
    "PromptLookup",
    "SamplingParams",
    "Score",
    "StructuredOutputError",
    "StructuredOutputs",
    "TextPiece",
    "TokenLogprobs",
]
