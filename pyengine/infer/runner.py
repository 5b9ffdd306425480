"""`Runner`: the native decoder with its sampler, in terms of numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

from pyengine import _C
from pyengine.infer.outputs import TokenLogprobs
from pyengine.infer.reading import HiddenReading, LogitsReading, RowReading, TargetReading
from pyengine.infer.sequence import Sequence

# Tokens of one step of readings that want logits: all their logits are in memory.
MOST_LOGITS_ROWS = 64


class Runner:
    """Steps of one decoder. Not thread-safe."""

    def __init__(self, decoder: _C.Decoder, vocab_size: int, hidden_size: int) -> None:
        self.decoder = decoder
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
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

    def read(self, plan: SequenceOf[tuple[RowReading | LogitsReading, int, list[int]]]) -> None:
        """Append tokens of readings, all of one of the two kinds, to their native sequences (reading, number, tokens)
        and hand out the rows that are wanted of them."""
        token_ids: list[int] = []
        slots: list[int] = []
        scored_rows: list[int] = []
        targets: list[int] = []
        hidden_rows: list[int] = []
        for reading, slot, chunk in plan:
            token_ids += chunk
            slots += [slot] * len(chunk)
            num_rows = reading.num_new_rows(len(chunk))
            rows = range(len(token_ids) - num_rows, len(token_ids))
            if isinstance(reading, HiddenReading):
                hidden_rows += rows
            else:
                scored_rows += rows
                targets += reading.next_targets(num_rows)
        has_logits = isinstance(plan[0][0], LogitsReading)
        logits = np.empty((len(scored_rows), self.vocab_size if has_logits else 0), np.float32)
        logprobs = np.empty(len(scored_rows), np.float32)
        states = np.empty((len(hidden_rows), self.hidden_size), np.float32)
        self.decoder.step(
            np.array(token_ids, np.int32),
            np.array(slots, np.int32),
            np.array(scored_rows, np.int32),
            logits=logits if has_logits else None,
            targets=np.array(targets, np.int32),
            target_logprobs=logprobs,
            hidden_rows=np.array(hidden_rows, np.int32),
            hidden=states,
        )
        for reading, _, chunk in plan:
            num_rows = reading.num_new_rows(len(chunk))
            if isinstance(reading, HiddenReading):
                reading.take(states[:num_rows])
                states = states[num_rows:]
            elif isinstance(reading, TargetReading):
                reading.take(logprobs[:num_rows].tolist())
            elif isinstance(reading, LogitsReading):
                reading.take(logits[:num_rows], logprobs[:num_rows].tolist())
            if not isinstance(reading, HiddenReading):
                logits, logprobs = logits[num_rows:], logprobs[num_rows:]
            reading.num_cached += len(chunk)
            reading.next_row = max(reading.next_row, reading.num_cached)


def _logprobs(drawn: _C.Drawn, most: int, wanted: list[int]) -> list[TokenLogprobs | None]:
    """Each row's own number of alternatives out of the `most` that were ranked."""
    top_ids, top_logprobs = drawn.top_ids, drawn.top_logprobs
    out: list[TokenLogprobs | None] = []
    for row, (token_id, logprob, count) in enumerate(zip(drawn.token_ids, drawn.logprobs, wanted, strict=True)):
        top = slice(row * most, row * most + max(count, 0))
        entry = TokenLogprobs(token_id, logprob, dict(zip(top_ids[top], top_logprobs[top], strict=True)))
        out.append(None if count < 0 else entry)
    return out
