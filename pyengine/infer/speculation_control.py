"""How many tokens to propose: as many as pay, by how often proposals were right and what wider steps took.

Nothing here can change a token of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

# A new measurement moves an estimate by this share of the difference: less up than down, because what disturbs a step
# makes it slower. One slow step counts at most double.
_MOVE_UP, _MOVE_DOWN = 0.1, 0.4
_MOST_OUTLIER = 2.0
# Share of a step's time that one more row takes until it is measured.
_FIRST_ROW_COST = 0.05
# Steps after which a measurement is too old to go by.
_MAX_BASE_AGE = 64
_MAX_RATIO_AGE = 1024
# An estimate of acceptance is a mean over about so many proposals.
_ACCEPTANCE_WINDOW = 24
_FIRST_ACCEPTANCE = 0.5
# Speculation that promises less than this is off.
_LEAST_GAIN = 1.03
# Of the steps in which it is off, every so many-th tries again with this many tokens per sequence.
_RETRY_EVERY = 128
_RETRY_TOKENS = 2


class Acceptance:
    """How often a proposal was right, those behind a wrong one left out."""

    def __init__(self, rate: float = _FIRST_ACCEPTANCE) -> None:
        self.rate = rate
        self._count = 2

    def add(self, is_right: bool) -> None:
        self._count = min(self._count + 1, _ACCEPTANCE_WINDOW)
        self.rate += (is_right - self.rate) / self._count


class _Estimate:
    def __init__(self, value: float, now: int) -> None:
        self.value, self.time = value, now

    def update(self, value: float, now: int) -> None:
        difference = min(value, _MOST_OUTLIER * self.value) - self.value
        self.value += (_MOVE_UP if difference > 0 else _MOVE_DOWN) * difference
        self.time = now


class StepTimes:
    """Seconds of steps by their number of sequences, and how much longer steps with proposals take."""

    def __init__(self) -> None:
        self._now = 0
        self._plain: dict[int, _Estimate] = {}
        # Of sequences, rounded down to a power of two -> number of proposals -> time over that of a plain step.
        self._ratios: dict[int, dict[int, _Estimate]] = {}
        self._draft: _Estimate | None = None

    def add(self, num_sequences: int, num_proposals: int, seconds: float) -> None:
        """A step took `seconds`."""
        self._now += 1
        if num_proposals == 0:
            _update(self._plain, num_sequences, seconds, self._now)
        elif (plain := self._plain.get(num_sequences)) is not None:
            ratios = self._ratios.setdefault(num_sequences.bit_length(), {})
            _update(ratios, num_proposals, seconds / plain.value, self._now)

    def add_draft(self, depth: int, seconds: float) -> None:
        """Drafting `depth` tokens one after the other took `seconds`."""
        if self._draft is None:
            self._draft = _Estimate(seconds / depth, self._now)
        self._draft.update(seconds / depth, self._now)

    def wants_plain_step(self, num_sequences: int) -> bool:
        """Whether nothing recent is known to compare with."""
        plain = self._plain.get(num_sequences)
        return plain is None or self._now - plain.time > _MAX_BASE_AGE

    def ratios(self, num_sequences: int, most: int) -> list[float]:
        """The time with 0 to `most` proposals over that without; between measured numbers on straight lines."""
        known = self._ratios.get(num_sequences.bit_length(), {})
        points = sorted((n, e.value) for n, e in known.items() if self._now - e.time <= _MAX_RATIO_AGE)
        out, slope = [1.0], _FIRST_ROW_COST
        for n, ratio in points:
            last = len(out) - 1
            slope = (ratio - out[last]) / (n - last)
            out += [out[last] + slope * (i - last) for i in range(last + 1, n + 1)]
        if points:
            slope = max((out[-1] - 1.0) / (len(out) - 1), 0.0)
        out += [out[-1] + slope * i for i in range(1, most + 2 - len(out))]
        return out[: most + 1]

    def draft_ratio(self, num_sequences: int, first: float) -> float:
        """The time of one drafted token of each sequence over that of a plain step; `first` until it is measured."""
        plain = self._plain.get(num_sequences)
        return first if self._draft is None or plain is None else self._draft.value / plain.value


def _update(estimates: dict[int, _Estimate], key: int, value: float, now: int) -> None:
    if key in estimates and now - estimates[key].time <= _MAX_RATIO_AGE:
        estimates[key].update(value, now)
    else:
        estimates[key] = _Estimate(value, now)


class SpeculationControl:
    """Chooses for each step how many tokens to propose for each sequence."""

    def __init__(self, first_draft_ratio: float = 0.0) -> None:
        """`first_draft_ratio`: what drafting a token costs, as a share of a step, until it is measured."""
        self.times = StepTimes()
        self.mean_acceptance = Acceptance()
        self._first_draft_ratio = first_draft_ratio
        self.num_declined = 0

    def choose(self, rates: SequenceOf[float], available: SequenceOf[int], num_sequences: int, most: int) -> list[int]:
        """How many of the `available` tokens to propose for each of some of the `num_sequences` sequences of a step.

        `rates`: how often their proposals are right; `most`: of all together.
        """
        counts = [0] * len(available)
        if not any(available) or most < 1 or self.times.wants_plain_step(num_sequences):
            return counts
        # Likeliest first: a proposal needs all those before it. The index comes last, for equals in any order.
        chances = [(rates[i] ** (j + 1), i) for i, count in enumerate(available) for j in range(count)]
        chances.sort(reverse=True)
        best, num_best = float(num_sequences) * _LEAST_GAIN, 0
        ratios = self.times.ratios(num_sequences, min(most, len(chances)))
        draft_ratio = self.times.draft_ratio(num_sequences, self._first_draft_ratio) if self._first_draft_ratio else 0.0
        expected = float(num_sequences)
        for n, (chance, i) in enumerate(chances[:most], 1):
            expected += chance
            counts[i] += 1
            speed = expected / (ratios[n] + draft_ratio * max(counts))
            if speed > best:
                best, num_best = speed, n
        if num_best:
            counts = [0] * len(available)
            for _, i in chances[:num_best]:
                counts[i] += 1
            return counts
        self.num_declined += 1
        is_trial = self.num_declined % _RETRY_EVERY == 0
        return spread([min(count, _RETRY_TOKENS if is_trial else 0) for count in available], most)


def spread(counts: SequenceOf[int], most: int) -> list[int]:
    """The counts, cut to `most` in total: the first keep theirs."""
    out = []
    for count in counts:
        out.append(min(count, most))
        most -= out[-1]
    return out
