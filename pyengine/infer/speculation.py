"""Speculative decoding: what to propose with, and how it went.

A step computes a sequence's last token and, behind it, proposals for the next ones. Each row is drawn as if the
proposals before it had been drawn; the first row that draws another token ends the run, and what was proposed behind it
is taken back from the cache. A row's logits do not depend on the rows beside it, and a draw is a function of (seed,
completion, position): so tokens and log-probabilities have the bits that they have without proposals, for any sampling
options. Only time depends on what is proposed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from pyengine.errors import ArgumentError

MAX_SPECULATIVE_TOKENS = 32
MAX_PROPOSED_TOKENS = 64
"""Of all sequences in one step. Each has a row of logits in memory."""
MAX_LOOKUP_MATCH = 64


@dataclass(frozen=True, kw_only=True)
class PromptLookup:
    """Propose what followed when the last tokens stood in the prompt or the answer before (n-gram speculation).

    For answers that repeat what they read: summaries, edits, code, extraction.
    """

    num_speculative_tokens: int = 8
    """Most tokens to propose per step and sequence."""
    prompt_lookup_min: int = 2
    """How many of the last tokens must have stood there before."""
    prompt_lookup_max: int = 16
    """How many of them to compare: the place with the longest match is taken, of equals the latest."""
    adaptive: bool = True
    """Propose as many as have paid lately, perhaps none; False proposes all there are in every step."""

    def __post_init__(self) -> None:
        check_count("num_speculative_tokens", self.num_speculative_tokens, 1, MAX_SPECULATIVE_TOKENS)
        check_count("prompt_lookup_min", self.prompt_lookup_min, 1, MAX_LOOKUP_MATCH)
        check_count("prompt_lookup_max", self.prompt_lookup_max, self.prompt_lookup_min, MAX_LOOKUP_MATCH)


@dataclass(frozen=True, kw_only=True)
class DraftModel:
    """Propose what a smaller model of the same vocabulary draws with the same options, seed and position."""

    model: str | os.PathLike[str]
    """A .gguf file or a Hugging Face folder."""
    num_speculative_tokens: int = 4
    """Most tokens to propose per step and sequence."""
    weights: str = "auto"
    mode: str = "auto"
    kv_dtype: str = "auto"
    adaptive: bool = True
    """Propose as many as have paid lately, perhaps none; False proposes all in every step."""

    def __post_init__(self) -> None:
        check_count("num_speculative_tokens", self.num_speculative_tokens, 1, MAX_SPECULATIVE_TOKENS)


Speculation = PromptLookup | DraftModel


def parse_speculation(value: object) -> Speculation | None:
    """What LLM takes as `speculation`. Raises ArgumentError for anything else."""
    if value is None or isinstance(value, PromptLookup | DraftModel):
        return value
    if value == "prompt_lookup":
        return PromptLookup()
    raise ArgumentError(
        f"speculation: expected None, 'prompt_lookup', a PromptLookup or a DraftModel, got {value!r:.200}"
    )


def check_count(name: str, value: object, low: int, high: int) -> None:
    """Raises ArgumentError unless it is a whole number in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ArgumentError(f"{name}: expected a whole number from {low} to {high}, got {value!r:.60}")


@dataclass
class SpeculationStats:
    """Counts since the model was loaded."""

    num_proposed_tokens: int = 0
    """Computed behind the last token of a sequence."""
    num_accepted_tokens: int = 0
    """Those of them that became part of an answer."""
    num_verify_steps: int = 0
    """Steps with at least one of them."""
    num_declined_steps: int = 0
    """Steps in which there was something to propose, and speculation was off because it had not paid."""
