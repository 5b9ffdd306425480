"""One request on its way through the engine."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from pyengine.infer.outputs import Completion, FinishReason, TextPiece, TokenLogprobs
from pyengine.infer.sampling_params import SamplingParams
from pyengine.tokenizer import StopStrings, StreamDecoder, Tokenizer


@dataclass(eq=False)
class Sequence:
    """Token ids, text so far, and how much of it the cache holds."""

    prompt_token_ids: list[int]
    params: SamplingParams
    end_token_ids: frozenset[int]
    decoder: StreamDecoder
    stop_strings: StopStrings
    slot: int | None = None
    """Number of the native sequence while it holds pages."""
    num_cached: int = 0
    """Tokens whose keys and values the cache holds."""
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    inbox: deque[TextPiece] = field(default_factory=deque)
    """Pieces that its caller has not taken yet."""
    failure: Exception | None = None
    priority: int = 0
    """Higher goes first."""
    cache_salt: str = ""
    """Pages are shared with sequences of the same salt only."""
    order: tuple[int, int] = (0, 0)
    """Place in the scheduler's queues."""

    @classmethod
    def start(
        cls, prompt_token_ids: list[int], params: SamplingParams, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...]
    ) -> Sequence:
        end = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
        return cls(prompt_token_ids, params, frozenset(end), StreamDecoder(tokenizer), StopStrings(params.stop))

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)

    def pending_token_ids(self, limit: int) -> list[int]:
        """The next tokens to feed, at most `limit`."""
        num_prompt = len(self.prompt_token_ids)
        end = min(self.num_cached + limit, self.num_tokens)
        if self.num_cached >= num_prompt:
            return self.token_ids[self.num_cached - num_prompt : end - num_prompt]
        return (self.prompt_token_ids[self.num_cached :] + self.token_ids)[: end - self.num_cached]

    def accept(self, logprobs: TokenLogprobs) -> TextPiece:
        """Take the sampled token; returns the text that it makes certain."""
        token_id = logprobs.token_id
        if token_id in self.end_token_ids:
            return self._finish("stop", [])
        self.token_ids.append(token_id)
        if self.params.logprobs is not None:
            self.logprobs.append(logprobs)
        piece = self.stop_strings.push(self.decoder.push(token_id))
        self.text += piece
        if self.stop_strings.match is not None:
            return self._finish("stop", [token_id], piece)
        if len(self.token_ids) >= self.params.max_tokens:
            return self._finish("length", [token_id], piece)
        return TextPiece(piece, [token_id])

    def _finish(self, reason: FinishReason, token_ids: list[int], piece: str = "") -> TextPiece:
        self.finish_reason = reason
        if self.stop_strings.match is None:
            rest = self.stop_strings.push(self.decoder.finish())
            rest += self.stop_strings.finish()
            self.text += rest
            piece += rest
        return TextPiece(piece, token_ids, self.completion())

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        logprobs = self.logprobs if self.params.logprobs is not None else None
        return Completion(self.prompt_token_ids, self.token_ids, self.text, self.finish_reason, logprobs)
