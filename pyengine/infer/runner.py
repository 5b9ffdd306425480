"""`Runner`: the native decoder with its sampler, in terms of numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyengine import _C
from pyengine.infer.outputs import TokenLogprobs
from pyengine.infer.sampling_params import SamplingParams

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

_NO_ROWS = np.empty(0, np.int32)


@dataclass(frozen=True)
class SampleRow:
    """One row of a step to draw a token from: its index, the options, and the tokens of its sequence so far."""

    row: int
    params: SamplingParams
    token_ids: list[int]


class Runner:
    """Steps of one decoder. Not thread-safe."""

    def __init__(self, decoder: _C.Decoder, vocab_size: int) -> None:
        self.decoder = decoder
        self.vocab_size = vocab_size

    @property
    def max_tokens(self) -> int:
        """The most tokens of one step."""
        return int(self.decoder.max_tokens)

    def step(self, token_ids: list[int], slots: list[int], rows: list[SampleRow]) -> list[TokenLogprobs]:
        """Append tokens to their sequences and draw the next token after each of `rows`."""
        indices = np.array([row.row for row in rows], np.int32)
        logits = np.empty((len(rows), self.vocab_size), np.float32)
        self.decoder.step(np.array(token_ids, np.int32), np.array(slots, np.int32), indices, logits=logits)
        return sample(logits, rows) if rows else []

    def logits(self, token_ids: Int32) -> Float32:
        """Logits after each token of a sequence of its own: [T, vocab_size]."""
        out = np.empty((len(token_ids), self.vocab_size), np.float32)
        self._walk(token_ids, out, None, None)
        return out

    def target_logprobs(self, token_ids: Int32, targets: Int32, first: int, salt: str | None = None) -> Float32:
        """Log-probability of targets[i] after token i of a sequence of its own, for i >= first: [T - first].

        With a salt, tokens before `first` may come from the cache.
        """
        out = np.empty(len(token_ids), np.float32)
        self._walk(token_ids, None, targets, out, first, salt)
        return out[first:]

    def _walk(
        self,
        token_ids: Int32,
        logits: Float32 | None,
        targets: Int32 | None,
        logprobs: Float32 | None,
        first: int = 0,
        salt: str | None = None,
    ) -> None:
        seq = self.decoder.add_sequence(salt)
        try:
            for begin in range(self.decoder.adopt_prefix(seq, token_ids[:first]), len(token_ids), self.max_tokens):
                chunk = token_ids[begin : begin + self.max_tokens]
                end = begin + len(chunk)
                wanted = slice(max(begin, first), end)
                rows = np.arange(wanted.start - begin, len(chunk), dtype=np.int32) if wanted.start < end else _NO_ROWS
                self.decoder.grow(seq, len(chunk))
                self.decoder.step(
                    np.ascontiguousarray(chunk, np.int32),
                    np.full(len(chunk), seq, np.int32),
                    rows,
                    logits=None if logits is None else logits[wanted],
                    targets=None if targets is None or not len(rows) else np.ascontiguousarray(targets[wanted]),
                    target_logprobs=None if logprobs is None or not len(rows) else logprobs[wanted],
                )
        finally:
            self.decoder.free_sequence(seq)


def sample(logits: Float32, rows: list[SampleRow]) -> list[TokenLogprobs]:
    """Draw one token per row of logits [R, vocab_size]; depends on its logits, options, seed and position alone."""
    params = [row.params for row in rows]
    # The penalty reads the tokens so far; nothing else does.
    history = [row.token_ids if row.params.repetition_penalty != 1.0 else [] for row in rows]
    num_rows, num_logprobs = len(rows), max(p.logprobs or 0 for p in params)
    token_ids, logprobs = np.empty(num_rows, np.int32), np.empty(num_rows, np.float32)
    top_ids = np.empty((num_rows, num_logprobs), np.int32)
    top_logprobs = np.empty((num_rows, num_logprobs), np.float32)
    _C.sample_cpu(
        logits=logits,
        temperature=np.array([p.temperature for p in params], np.float32),
        top_k=np.array([min(p.top_k, 2**31 - 1) for p in params], np.int32),
        top_p=np.array([p.top_p for p in params], np.float32),
        min_p=np.array([p.min_p for p in params], np.float32),
        repetition_penalty=np.array([p.repetition_penalty for p in params], np.float32),
        seed=np.array([p.seed for p in params], np.uint64).view(np.int64),
        sequence=np.zeros(num_rows, np.int64),
        position=np.array([len(row.token_ids) for row in rows], np.int64),
        previous_ids=np.array([token for ids in history for token in ids], np.int32),
        previous_offsets=np.cumsum([0, *map(len, history)], dtype=np.int64),
        token_ids=token_ids,
        logprobs=logprobs,
        top_ids=top_ids if num_logprobs else None,
        top_logprobs=top_logprobs if num_logprobs else None,
    )
    return [
        TokenLogprobs(
            int(token_ids[i]),
            float(logprobs[i]),
            dict(zip(top_ids[i, :wanted].tolist(), top_logprobs[i, :wanted].tolist(), strict=True)),
        )
        for i, wanted in enumerate(p.logprobs or 0 for p in params)
    ]
