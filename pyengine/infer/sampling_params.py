"""How to choose the next token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pyengine.errors import ArgumentError
from pyengine.infer.speculation import MAX_SPECULATIVE_TOKENS, check_count
from pyengine.infer.structured_outputs import StructuredOutputs

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_BAD_WORDS = 256
MAX_BAD_WORD_LENGTH = 256
MAX_LOGIT_BIASES = 4096
MAX_LOGPROBS = 20
MAX_COMPLETIONS = 256

LogitBias = tuple[tuple[int, float], ...]


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ArgumentError(f"{name}: expected {expected}, got {got!r:.200}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Options of one generation; names and meanings as in vLLM.

    Token ids are checked against the width of the logits when a request starts.

    The logits go through, in this order: structured_outputs and allowed_token_ids, bad_words, min_tokens, logit_bias,
    repetition_penalty, frequency_penalty, presence_penalty, temperature, top_k, top_p, min_p. The draw is a pure
    function of (seed, number of the completion, position), so the same seed gives the same text whatever else runs.
    """

    n: int = 1
    """How many completions to return per prompt. The first of several is the only one of n = 1."""
    best_of: int | None = None
    """Draw this many completions per prompt and return the n with the highest log-probability, best first."""
    best_of_by: Literal["total", "mean"] = "total"
    """Compare the log-probability of the whole completion, or its mean over the tokens."""
    max_tokens: int = 128
    """Stop after this many new tokens (finish reason "length")."""
    min_tokens: int = 0
    """End tokens cannot be drawn, and stop strings are not looked for, in the first min_tokens tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token (lowest id wins a tie)."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probability reaches top_p."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that occur in prompt or output; 1 does nothing."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token once for each time that it occurs in the output."""
    presence_penalty: float = 0.0
    """Taken once from the logits of tokens that occur in the output."""
    logit_bias: Mapping[int, float] | LogitBias = ()
    """Token id -> number from -100 to 100 that is added to its logit."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Draw these tokens only; end tokens too must be among them to be drawn."""
    bad_words: tuple[str, ...] = ()
    """Texts that the output must not spell with the tokens of their own encoding, with or without a space before."""
    seed: int = 0
    stop: tuple[str, ...] = field(default=())
    """Strings that end the text (finish reason "stop"); they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the text, beside the model's own end tokens; they are not part of it."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the end token, that ended the text as its last part."""
    ignore_eos: bool = False
    """Go on past the model's end tokens."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    logprobs: int | None = None
    """Return the log-probability of each token, and of this many likeliest alternatives."""
    structured_outputs: StructuredOutputs | None = None
    """What the text must be: a JSON schema, a regular expression, a choice, a grammar."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, but its first. Without a prefix cache they take a second pass
    over the prompt."""

    num_speculative_tokens: int | None = None
    """Propose at most this many tokens per step where the LLM speculates, 0 for none; None takes the LLM's number.
    Changes the time of an answer, and nothing else."""

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", tuple(self.logit_bias.items()))
        self._check_numbers()
        self._check_counts()
        self._check_tokens()
        self._check_texts()
        if self.structured_outputs is not None:
            ok = isinstance(self.structured_outputs, StructuredOutputs)
            _require(ok, "structured_outputs", "StructuredOutputs", self.structured_outputs)
            _require(not self.ignore_eos, "ignore_eos", "False with structured_outputs", True)

    @property
    def num_drawn(self) -> int:
        """How many completions are drawn per prompt."""
        return self.n if self.best_of is None else self.best_of

    def _check_counts(self) -> None:
        if self.num_speculative_tokens is not None:
            check_count("num_speculative_tokens", self.num_speculative_tokens, 0, MAX_SPECULATIVE_TOKENS)
        ok = _is_int(self.n) and 1 <= self.n <= MAX_COMPLETIONS
        _require(ok, "n", f"a whole number from 1 to {MAX_COMPLETIONS}", self.n)
        ok = self.best_of is None or (_is_int(self.best_of) and self.n <= self.best_of <= MAX_COMPLETIONS)
        _require(ok, "best_of", f"None or a whole number from n, {self.n}, to {MAX_COMPLETIONS}", self.best_of)
        _require(self.best_of_by in ("total", "mean"), "best_of_by", "'total' or 'mean'", self.best_of_by)
        name = "n" if self.best_of is None else "best_of"
        _require(self.num_drawn == 1 or self.temperature > 0, name, "1 with temperature 0", self.num_drawn)

    def _check_numbers(self) -> None:
        _require(
            _is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens", "a whole number >= 1", self.max_tokens
        )
        ok = _is_int(self.min_tokens) and 0 <= self.min_tokens <= self.max_tokens
        _require(ok, "min_tokens", f"a whole number from 0 to max_tokens, {self.max_tokens}", self.min_tokens)
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "frequency_penalty",
            "presence_penalty",
        ):
            value = getattr(self, name)
            _require(_is_finite(value), name, "a finite number", value)
        _require(0.0 <= self.temperature <= 100.0, "temperature", "0 to 100", self.temperature)
        _require(_is_int(self.top_k) and self.top_k >= 0, "top_k", "a whole number >= 0", self.top_k)
        _require(0.0 < self.top_p <= 1.0, "top_p", "more than 0 and at most 1", self.top_p)
        _require(0.0 <= self.min_p <= 1.0, "min_p", "0 to 1", self.min_p)
        _require(self.repetition_penalty > 0.0, "repetition_penalty", "more than 0", self.repetition_penalty)
        _require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "-2 to 2", self.frequency_penalty)
        _require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "-2 to 2", self.presence_penalty)
        _require(_is_int(self.seed) and 0 <= self.seed < 2**64, "seed", "a whole number from 0 to 2**64 - 1", self.seed)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            ok = value is None or (_is_int(value) and 0 <= value <= MAX_LOGPROBS)
            _require(ok, name, f"None or 0 to {MAX_LOGPROBS}", value)

    def _check_tokens(self) -> None:
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token in getattr(self, name) or ():
                _require(_is_int(token) and 0 <= token < 2**31, name, "token ids >= 0", token)
        _require(self.allowed_token_ids != (), "allowed_token_ids", "None or at least one token id", ())
        count = len(self.logit_bias)
        _require(count <= MAX_LOGIT_BIASES, "logit_bias", f"at most {MAX_LOGIT_BIASES} tokens", count)
        entries: Any = self.logit_bias
        for entry in entries:
            _require(isinstance(entry, tuple) and len(entry) == 2, "logit_bias", "token id -> number", entry)
            token, bias = entry
            _require(_is_int(token) and 0 <= token < 2**31, "logit_bias", "token ids >= 0", token)
            _require(_is_finite(bias) and -100.0 <= bias <= 100.0, "logit_bias", "numbers from -100 to 100", bias)

    def _check_texts(self) -> None:
        for name, max_count, max_length in (
            ("stop", MAX_STOP_STRINGS, MAX_STOP_LENGTH),
            ("bad_words", MAX_BAD_WORDS, MAX_BAD_WORD_LENGTH),
        ):
            texts = getattr(self, name)
            _require(len(texts) <= max_count, name, f"at most {max_count} strings", len(texts))
            for text in texts:
                ok = isinstance(text, str) and 0 < len(text) <= max_length
                _require(ok, name, f"strings of 1 to {max_length} characters", text)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
