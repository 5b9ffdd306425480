"""Proposals of a draft model, with keys and values of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.infer.loader import EngineOptions, LoadedModel, load_model
from pyengine.infer.sequence import Sequence
from pyengine.infer.speculation import DraftModel
from pyengine.infer.speculation_control import StepTimes

# Draft steps that compute more than this of any sequence catch up with it: their time says nothing about the next ones.
_MOST_NEW_TOKENS = 2


def load_draft(options: DraftModel, target: LoadedModel) -> LoadedModel:
    """The draft model, with a cache for as many tokens as that of the target.

    Raises ArgumentError unless it is a language model with the vocabulary of the target.
    """
    draft = load_model(
        options.model,
        EngineOptions(
            weights=options.weights,
            mode=options.mode,
            kv_dtype=options.kv_dtype,
            max_context=target.max_context,
            cache_tokens=target.decoder.num_pages * target.decoder.page_size,
            page_size=target.decoder.page_size,
            max_batch_tokens=target.decoder.max_tokens,
        ),
    )
    if not draft.has_lm_head:
        raise ArgumentError(f"speculation: expected a language model, got {draft.path}, which has no head for text")
    check_vocabulary(draft, target)
    return draft


def check_vocabulary(draft: LoadedModel, target: LoadedModel) -> None:
    """Raises ArgumentError unless every token id means the same to both, and their logits are as many."""
    name = f"speculation: {draft.path}"
    if draft.spec.vocab_size != target.spec.vocab_size:
        raise ArgumentError(
            f"{name}: expected the {target.spec.vocab_size} logits of {target.path}, got {draft.spec.vocab_size}"
        )
    for token_id in range(max(draft.tokenizer.vocab_size, target.tokenizer.vocab_size)):
        expected, got = target.tokenizer.id_to_token(token_id), draft.tokenizer.id_to_token(token_id)
        if got != expected:
            raise ArgumentError(
                f"{name}: expected the vocabulary of {target.path}, where token {token_id} is {expected!r:.60}, "
                f"got {got!r:.60}"
            )


@dataclass
class _Place:
    """What the draft's cache holds of one sequence: its first tokens, then proposals that may have been wrong."""

    slot: int
    num_tokens: int = 0
    guesses: list[int] = field(default_factory=list)


class DraftProposer:
    """Runs the draft model behind the sequences of the target. Knows nothing of the target's cache."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._decoder = loaded.decoder
        self._max_context = loaded.max_context
        self._sampler = _C.Sampler(loaded.decoder)
        # The one that was used last comes last.
        self._places: dict[Sequence, _Place] = {}

    def available(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[int]:
        pairs = zip(sequences, limits, strict=True)
        return [max(0, min(limit, self._max_context - sequence.num_tokens + 1)) for sequence, limit in pairs]

    def propose(self, sequences: SequenceOf[Sequence], counts: SequenceOf[int], times: StepTimes) -> list[list[int]]:
        """Sequences that do not fit into one step or into the cache get no proposals; those cut short go on later."""
        token_ids: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        ready: list[tuple[Sequence, int]] = []
        num_new = 0
        busy = set(sequences)
        for sequence, count in zip(sequences, counts, strict=True):
            place = self._sync(sequence)
            chunk = sequence.tokens(place.num_tokens, place.num_tokens + self._decoder.max_tokens - len(token_ids))
            is_ready = place.num_tokens + len(chunk) == sequence.num_tokens
            if not chunk or not self._claim(place, len(chunk) + (count - 1 if is_ready else 0), busy):
                continue
            token_ids += chunk
            slots += [place.slot] * len(chunk)
            place.num_tokens += len(chunk)
            num_new = max(num_new, len(chunk))
            if is_ready:
                rows.append(len(token_ids) - 1)
                ready.append((sequence, count))
        if not token_ids:
            return [[] for _ in sequences]
        states = [sequence.sample_state for sequence, _ in ready]
        start = time.perf_counter()
        if ready:
            found = self._sampler.propose(token_ids, slots, rows, states, [count for _, count in ready])
        else:
            self._sampler.step(token_ids, slots, [], [], -1)
            found = []
        if ready and num_new <= _MOST_NEW_TOKENS:
            times.add_draft(max(count for _, count in ready), time.perf_counter() - start)
        proposals = {sequence: tokens for (sequence, _), tokens in zip(ready, found, strict=True)}
        for sequence, count in ready:
            # The last proposal was not computed.
            place = self._places[sequence]
            place.guesses = proposals[sequence][: count - 1]
            self._decoder.truncate(place.slot, place.num_tokens + len(place.guesses))
        return [proposals.get(sequence, []) for sequence in sequences]

    def expected(self, sequence: Sequence) -> list[int]:
        return []

    def forget(self, sequence: Sequence) -> None:
        if (place := self._places.pop(sequence, None)) is not None:
            self._decoder.free_sequence(place.slot)

    def _sync(self, sequence: Sequence) -> _Place:
        """Its place, with those guesses in the cache that came true."""
        place = self._places.pop(sequence, None) or _Place(self._decoder.add_sequence())
        self._places[sequence] = place
        # At least the last token is computed: its logits are wanted.
        place.num_tokens = min(place.num_tokens, sequence.num_tokens - 1)
        end = min(place.num_tokens + len(place.guesses), sequence.num_tokens - 1)
        for guess, token in zip(place.guesses, sequence.tokens(place.num_tokens, end), strict=False):
            if guess != token:
                break
            place.num_tokens += 1
        place.guesses = []
        if place.num_tokens < self._decoder.length(place.slot):
            self._decoder.truncate(place.slot, place.num_tokens)
        return place

    def _claim(self, place: _Place, num_tokens: int, busy: set[Sequence]) -> bool:
        """Claim pages, if need be those of sequences that are not `busy`, least recently used first."""
        while self._decoder.pages_needed(place.slot, num_tokens) > self._decoder.num_free_pages:
            victim = next((sequence for sequence in self._places if sequence not in busy), None)
            if victim is None:
                return False
            self.forget(victim)
        self._decoder.grow(place.slot, num_tokens)
        return True
