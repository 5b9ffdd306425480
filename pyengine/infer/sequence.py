"""One request on its way through the engine."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.infer.grammar import Grammar
from pyengine.infer.outputs import Completion, FinishReason, TextPiece, TokenLogprobs
from pyengine.infer.sample_state import make_sample_state
from pyengine.infer.sampling_params import SamplingParams
from pyengine.spec import ModelSpec
from pyengine.tokenizer import StopStrings, StreamDecoder, Tokenizer

# What a negative token id of the native sampler says.
_DRAW_ERRORS = {
    -1: "logits: expected numbers or -inf, got nan or inf",
    -2: "logits: expected a token that may be drawn, got none: structured_outputs, "
    "allowed_token_ids, bad_words and min_tokens exclude all",
}


@dataclass(eq=False)
class KeptPages:
    """The pages of a sequence that has ended, for others that begin with all its tokens."""

    slot: int | None = None
    """Number of the native sequence that holds them; None before that, and when they were needed elsewhere."""


@dataclass(eq=False)
class Sequence:
    """Token ids, text so far, and how much of it the cache holds."""

    prompt_token_ids: list[int]
    params: SamplingParams
    end_token_ids: frozenset[int]
    tokenizer: Tokenizer
    sample_state: _C.SampleState
    decoder: StreamDecoder | None
    """None where nobody asks for text before the end."""
    stop_strings: StopStrings
    index: int = 0
    grammar: Grammar | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    slot: int | None = None
    """Number of the native sequence while it holds pages."""
    num_cached: int = 0
    """Tokens whose keys and values the cache holds."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    """Of all tokens that were drawn, the one that ended the sequence included; as far as anybody asked."""
    num_drawn: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    inbox: deque[TextPiece] = field(default_factory=deque)
    """Pieces that its caller has not taken yet; only of a stream."""
    failure: Exception | None = None
    priority: int = 0
    """Higher goes first."""
    cache_salt: str = ""
    """Pages are shared with sequences of the same salt only."""
    origin: KeptPages | None = None
    """Start from a copy of these, if they are there."""
    kept: KeptPages | None = None
    """Leave the pages here at the end."""
    adapter: _C.Adapter | None = None
    """It is computed with this one, whatever happens to the name that it was loaded by."""
    order: tuple[int, int] = (0, 0)
    """Place in the scheduler's queues."""
    pieces: list[str] = field(default_factory=list)
    num_logprobs: int = field(init=False)
    """How many alternatives the native sampler ranks for it; -1 for no log-probabilities at all."""

    def __post_init__(self) -> None:
        default = -1 if self.params.best_of is None else 0
        self.num_logprobs = default if self.params.logprobs is None else self.params.logprobs

    @classmethod
    def start(
        cls,
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        spec: ModelSpec,
        *,
        index: int,
        stream: bool,
        bad_words: list[list[int]] | None = None,
        grammar: Grammar | None = None,
    ) -> Sequence:
        """`index`: which of the completions of its prompt; `stream`: pieces of text go to the inbox as they come;
        `bad_words`: the tokens of those of `params`."""
        end = set(params.stop_token_ids) | (set() if params.ignore_eos else set(spec.eos_token_ids))
        is_incremental = stream or bool(params.stop)
        return cls(
            prompt_token_ids,
            params,
            frozenset(end),
            tokenizer,
            make_sample_state(prompt_token_ids, params, index, sorted(end), bad_words or [], spec.vocab_size),
            StreamDecoder(tokenizer, skip_special_tokens=params.skip_special_tokens) if is_incremental else None,
            StopStrings(params.stop),
            index=index,
            grammar=grammar,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)

    @property
    def num_adoptable(self) -> int:
        """Leading tokens that may come from the cache; the last one is computed in any case: its logits are wanted."""
        return self.num_tokens - 1

    @property
    def has_ended(self) -> bool:
        return self.finish_reason is not None or self.failure is not None

    def tokens(self, begin: int, end: int) -> list[int]:
        """Tokens of prompt and answer from `begin` on, before `end`."""
        num_prompt = len(self.prompt_token_ids)
        if begin >= num_prompt:
            return self.token_ids[begin - num_prompt : end - num_prompt]
        return self.prompt_token_ids[begin:end] + self.token_ids[: max(end - num_prompt, 0)]

    def pending_token_ids(self, limit: int) -> list[int]:
        """The next tokens to feed, at most `limit`. A sequence that gave its pages back feeds its own tokens again."""
        return self.tokens(self.num_cached, self.num_cached + limit)

    def restrict(self, proposals: list[int]) -> list[int]:
        """As many of the first tokens that may come next as its grammar lets through; prepares the draws for them."""
        if self.grammar is None or not proposals:
            return proposals
        masks = self.grammar.masks(proposals)
        self.sample_state.set_mask(masks)
        return proposals[: len(masks) - 1]

    def accept(self, token_id: int, logprobs: TokenLogprobs | None) -> bool:
        """Take the drawn token. True when it ended the sequence, which then has a finish_reason or a failure."""
        if token_id < 0:
            self.failure = None if self.grammar is None else self.grammar.error()
            self.failure = self.failure or ArgumentError(f"{_DRAW_ERRORS[token_id]} (after {self.num_tokens} tokens)")
            return True
        params = self.params
        self.num_drawn += 1
        if logprobs is not None:
            self.cumulative_logprob += logprobs.logprob
        is_end = token_id in self.end_token_ids
        if is_end:
            self.finish_reason = "stop"
            self.stop_reason = token_id if token_id in params.stop_token_ids else None
            if not params.include_stop_str_in_output:
                self._hand_out("", [])
                return True
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if self.grammar is not None and self.grammar.accept(token_id):
            self.finish_reason = "stop"
        piece = "" if self.decoder is None else self._push(self.decoder, token_id)
        if self.finish_reason is None and len(self.token_ids) >= params.max_tokens:
            self.finish_reason = "length"
        self._hand_out(piece, [token_id])
        return self.finish_reason is not None

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        if self.decoder is None:
            skip = self.params.skip_special_tokens
            text = self.tokenizer.decode(self.token_ids, skip_special_tokens=skip)
        else:
            text = "".join(self.pieces)
        return Completion(
            self.prompt_token_ids,
            self.token_ids,
            text,
            self.finish_reason,
            None if self.params.logprobs is None else self.logprobs,
            stop_reason=self.stop_reason,
            index=self.index,
            cumulative_logprob=None if self.num_logprobs < 0 else self.cumulative_logprob,
            prompt_logprobs=self.prompt_logprobs,
        )

    def rank_by(self, kind: Literal["total", "mean"]) -> float:
        """What `best_of` compares."""
        return self.cumulative_logprob / (1 if kind == "total" else self.num_drawn)

    def _push(self, decoder: StreamDecoder, token_id: int) -> str:
        """The text that the token makes certain; sets finish_reason where it completes a stop string."""
        text = decoder.push(token_id)
        if len(self.token_ids) <= self.params.min_tokens or not self.params.stop:
            return text
        text = self.stop_strings.push(text)
        match = self.stop_strings.match
        if match is not None:
            self.finish_reason, self.stop_reason = "stop", match
            if self.params.include_stop_str_in_output:
                text += match
        return text

    def _hand_out(self, piece: str, token_ids: list[int]) -> None:
        """Keep a piece of text, and the rest of it at the end; put it into the inbox."""
        if self.decoder is None:
            return
        if self.finish_reason is not None and self.stop_strings.match is None:
            piece += self._rest(self.decoder)
        self.pieces.append(piece)
        completion = None if self.finish_reason is None else self.completion()
        self.inbox.append(TextPiece(piece, token_ids, completion, self.index))

    def _rest(self, decoder: StreamDecoder) -> str:
        rest = decoder.finish()
        return self.stop_strings.push(rest) + self.stop_strings.finish()
