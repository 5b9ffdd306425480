"""`Runner`: the native decoder with its sampler, in terms of numpy arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.infer.outputs import TokenLogprobs
from pyengine.infer.sequence import Sequence

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

_NO_ROWS = np.empty(0, np.int32)
# Rows of prompt logits that are in memory at a time.
_MOST_RANKED_ROWS = 64


class Runner:
    """Steps of one decoder. Not thread-safe."""

    def __init__(self, decoder: _C.Decoder, vocab_size: int) -> None:
        self.decoder = decoder
        self.vocab_size = vocab_size
        self.max_tokens = int(decoder.max_tokens)
        """The most tokens of one step."""
        self._sampler = _C.Sampler(decoder)

    def step(
        self,
        token_ids: list[int],
        slots: list[int],
        rows: list[int],
        sequences: list[Sequence],
        num_proposals: list[int],
    ) -> tuple[list[int], list[TokenLogprobs | None], list[int]]:
        """Append tokens to their sequences and draw the token that follows token rows[i] of this step, the last one of
        sequences[i]; then those that follow the num_proposals[i] tokens behind it, as long as these are what was drawn.

        Returns token ids, those of the first sequence first, negative where none could be drawn; their
        log-probabilities where asked for; and how many there are of each sequence.
        """
        for sequence, count in zip(sequences, num_proposals, strict=True):
            # The masks of proposals are there already.
            if sequence.grammar is not None and count == 0:
                sequence.sample_state.set_mask(sequence.grammar.mask())
        most = max((sequence.num_logprobs for sequence in sequences), default=-1)
        states = [sequence.sample_state for sequence in sequences]
        drawn = self._sampler.step(token_ids, slots, rows, states, most, num_proposals)
        ids, counts = drawn.token_ids, drawn.counts
        if most < 0:
            return ids, [None] * len(ids), counts
        pairs = zip(sequences, counts, strict=True)
        return ids, _logprobs(drawn, most, [s.num_logprobs for s, count in pairs for _ in range(count)]), counts

    def logits(self, token_ids: Int32, adapter: _C.Adapter | None = None) -> Float32:
        """Logits after each token of a sequence of its own: [T, vocab_size]."""
        out = np.empty((len(token_ids), self.vocab_size), np.float32)
        self._walk(token_ids, out, None, None, adapter=adapter)
        return out

    def target_logprobs(
        self,
        token_ids: Int32,
        targets: Int32,
        first: int,
        salt: str | None = None,
        adapter: _C.Adapter | None = None,
    ) -> Float32:
        """Log-probability of targets[i] after token i of a sequence of its own, for i >= first: [T - first].

        With a salt, tokens before `first` may come from the cache.
        """
        out = np.empty(len(token_ids), np.float32)
        self._walk(token_ids, None, targets, out, first, salt, adapter)
        return out[first:]

    def prompt_logprobs(
        self, token_ids: Int32, num_top: int, adapter: _C.Adapter | None = None
    ) -> list[TokenLogprobs | None]:
        """Log-probability of every token of a sequence of its own after those before it, and the `num_top` likeliest
        tokens in its place; None for the first."""
        num_rows = len(token_ids) - 1
        targets = np.ascontiguousarray(token_ids[1:])
        if num_top == 0:
            values = self.target_logprobs(token_ids[:-1], targets, 0, adapter=adapter).tolist() if num_rows else []
            return [None, *map(TokenLogprobs, targets.tolist(), values)]
        out: list[TokenLogprobs | None] = [None]
        size = min(self.max_tokens, _MOST_RANKED_ROWS)
        logits = np.empty((size, self.vocab_size), np.float32)
        logprobs = np.empty(size, np.float32)
        states = [_C.SampleState(self.vocab_size) for _ in range(size)]
        seq = self.decoder.add_sequence(adapter=adapter)
        try:
            for begin in range(0, num_rows, size):
                count = min(size, num_rows - begin)
                self.decoder.grow(seq, count)
                self.decoder.step(
                    token_ids[begin : begin + count],
                    np.full(count, seq, np.int32),
                    np.arange(count, dtype=np.int32),
                    logits=logits[:count],
                    targets=targets[begin : begin + count],
                    target_logprobs=logprobs[:count],
                )
                drawn = _C.draw(logits[:count], states[:count], num_top)
                if min(drawn.token_ids) < 0:
                    raise ArgumentError("logits: expected numbers or -inf, got nan or inf")
                ranked = _logprobs(drawn, num_top, [num_top] * count)
                entries = zip(targets[begin : begin + count].tolist(), logprobs[:count].tolist(), ranked, strict=True)
                out += [TokenLogprobs(token, value, row.top) for token, value, row in entries if row is not None]
        finally:
            self.decoder.free_sequence(seq)
        return out

    def _walk(
        self,
        token_ids: Int32,
        logits: Float32 | None,
        targets: Int32 | None,
        logprobs: Float32 | None,
        first: int = 0,
        salt: str | None = None,
        adapter: _C.Adapter | None = None,
    ) -> None:
        seq = self.decoder.add_sequence(salt, adapter)
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


def _logprobs(drawn: _C.Drawn, most: int, wanted: list[int]) -> list[TokenLogprobs | None]:
    """Each row's own number of alternatives out of the `most` that were ranked."""
    top_ids, top_logprobs = drawn.top_ids, drawn.top_logprobs
    out: list[TokenLogprobs | None] = []
    for row, (token_id, logprob, count) in enumerate(zip(drawn.token_ids, drawn.logprobs, wanted, strict=True)):
        top = slice(row * most, row * most + max(count, 0))
        entry = TokenLogprobs(token_id, logprob, dict(zip(top_ids[top], top_logprobs[top], strict=True)))
        out.append(None if count < 0 else entry)
    return out
