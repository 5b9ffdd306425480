"""How to choose the next token."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pyengine.errors import ArgumentError

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LOGPROBS = 20


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ArgumentError(f"{name}: expected {expected}, got {got!r}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Options of one generation; names and meanings as in vLLM.

    The logits go through, in this order: repetition_penalty, temperature, top_k, top_p, min_p. The draw is a pure
    function of (seed, position), so the same seed gives the same text whatever else runs.
    """

    max_tokens: int = 128
    """Stop after this many new tokens (finish reason "length")."""
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
    seed: int = 0
    stop: tuple[str, ...] = field(default=())
    """Strings that end the text (finish reason "stop"); they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the text, beside the model's own end tokens; they are not part of it."""
    ignore_eos: bool = False
    """Go on past the model's end tokens."""
    logprobs: int | None = None
    """Return the log-probability of each token, and of this many likeliest alternatives."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _require(
            _is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens", "a whole number >= 1", self.max_tokens
        )
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            finite = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            _require(finite, name, "a finite number", value)
        _require(0.0 <= self.temperature <= 100.0, "temperature", "0 to 100", self.temperature)
        _require(_is_int(self.top_k) and self.top_k >= 0, "top_k", "a whole number >= 0", self.top_k)
        _require(0.0 < self.top_p <= 1.0, "top_p", "more than 0 and at most 1", self.top_p)
        _require(0.0 <= self.min_p <= 1.0, "min_p", "0 to 1", self.min_p)
        _require(self.repetition_penalty > 0.0, "repetition_penalty", "more than 0", self.repetition_penalty)
        _require(_is_int(self.seed) and 0 <= self.seed < 2**64, "seed", "a whole number from 0 to 2**64 - 1", self.seed)
        _require(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings", len(self.stop))
        for text in self.stop:
            ok = isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH
            _require(ok, "stop", f"strings of 1 to {MAX_STOP_LENGTH} characters", text)
        for token in self.stop_token_ids:
            _require(_is_int(token) and token >= 0, "stop_token_ids", "token ids >= 0", token)
        ok = self.logprobs is None or (_is_int(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS)
        _require(ok, "logprobs", f"None or 0 to {MAX_LOGPROBS}", self.logprobs)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
