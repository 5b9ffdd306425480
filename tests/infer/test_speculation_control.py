"""How many tokens to propose, by made-up clocks; and prompt lookup against a search of the whole text."""

import random

import pytest

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.infer.speculation_control import Acceptance, SpeculationControl, StepTimes, spread


def run(control, seconds, right, num_sequences=1, most=64, limit=8, num_steps=600, seed=0):
    """Steps that take seconds(number of proposals), with proposals that are right so often; tokens per second, and
    proposals of each step."""
    rng = random.Random(seed)
    acceptances = [Acceptance(control.mean_acceptance.rate) for _ in range(num_sequences)]
    total, num_tokens, history = 0.0, 0, []
    for _ in range(num_steps):
        counts = control.choose([a.rate for a in acceptances], [limit] * num_sequences, num_sequences, most)
        assert len(counts) == num_sequences
        assert all(0 <= count <= limit for count in counts)
        assert sum(counts) <= most
        took = seconds(sum(counts))
        control.times.add(num_sequences, sum(counts), took)
        total += took
        for i, count in enumerate(counts):
            num_tokens += 1
            for _ in range(count):
                is_right = rng.random() < right
                acceptances[i].add(is_right)
                control.mean_acceptance.add(is_right)
                if not is_right:
                    break
                num_tokens += 1
        history.append(sum(counts))
    return num_tokens / total, history


def best(seconds, right, limit=8):
    """Tokens per second of the best fixed number."""
    return max(sum(right**j for j in range(k + 1)) / seconds(k) for k in range(limit + 1))


@pytest.mark.parametrize("row_cost", [0.02, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("right", [0.95, 0.7, 0.3])
def test_near_the_best_fixed_number(row_cost, right):
    def seconds(n):
        return 0.01 * (1 + row_cost * n)

    speed, _ = run(SpeculationControl(), seconds, right, num_steps=2000)
    assert speed > 0.85 * best(seconds, right)
    assert speed > 0.97 / seconds(0)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_busy_neighbours(share):
    """Some steps take up to four times as long, whatever is in them."""
    rng = random.Random(3)

    def seconds(n):
        return 0.01 * (1 + 0.15 * n)

    def disturbed(n):
        return seconds(n) * (1 + 3 * rng.random() * (rng.random() < share))

    mean = 1 + 1.5 * share
    for right in (0.9, 0.2):
        speed, _ = run(SpeculationControl(), disturbed, right, num_steps=3000)
        assert speed * mean > 0.85 * best(seconds, right)


def test_off_where_it_does_not_pay_and_tried_again_rarely():
    speed, history = run(SpeculationControl(), lambda n: 0.01 * (1 + 0.9 * n), 0.3, num_steps=2000)
    assert speed > 0.97 / 0.01
    late = history[200:]
    assert 0 < sum(n > 0 for n in late) < len(late) / 50


def test_never_right():
    _, history = run(SpeculationControl(), lambda n: 0.01 * (1 + 0.05 * n), 0.0, num_steps=2000)
    assert sum(n > 0 for n in history[100:]) < 40


def test_on_again_when_it_starts_to_pay():
    control = SpeculationControl()
    run(control, lambda n: 0.01 * (1 + 0.9 * n), 0.2)
    _, history = run(control, lambda n: 0.01 * (1 + 0.02 * n), 0.95, num_steps=1500)
    assert sum(history[-100:]) > 500


def test_one_slow_step_does_not_end_it():
    control = SpeculationControl()
    run(control, lambda n: 0.01 * (1 + 0.02 * n), 0.9)
    control.times.add(1, 8, 10.0)
    control.times.add(1, 7, 10.0)
    _, history = run(control, lambda n: 0.01 * (1 + 0.02 * n), 0.9, num_steps=100)
    assert sum(history) > 500


def test_fades_in_a_large_batch():
    """Where a step's time follows its rows, more proposals are fewer tokens per second."""
    shares = []
    for num_sequences in (1, 8, 32):
        control = SpeculationControl()

        def seconds(n, s=num_sequences):
            return 0.01 + 0.001 * max(0, s + n - 16)

        _, history = run(control, seconds, 0.6, num_sequences=num_sequences)
        shares.append(sum(history[-300:]) / 300 / num_sequences)
    assert shares[0] > 1.0
    assert shares[0] > shares[1] > shares[2]
    assert shares[2] < 0.1


def test_the_likelier_sequence_gets_more():
    control = SpeculationControl()
    for n in (0, 4, 8, 16):
        control.times.add(2, n, 0.01 * (1 + 0.1 * n))
    good, bad = control.choose([0.95, 0.2], [8, 8], 2, 64)
    assert good > bad
    assert good > 3
    assert control.choose([0.95, 0.95], [0, 8], 2, 64)[0] == 0
    assert sum(control.choose([0.95, 0.95], [8, 8], 2, 3)) <= 3


def test_a_draft_that_costs_too_much_is_off():
    for ratio, is_on in ((0.05, True), (0.9, False)):
        control = SpeculationControl(first_draft_ratio=ratio)
        control.times.add(1, 0, 0.01)
        counts = control.choose([0.7], [4], 1, 64)
        assert (counts[0] > 0) == is_on
    control = SpeculationControl(first_draft_ratio=0.05)
    control.times.add(1, 0, 0.01)
    for _ in range(3):
        control.times.add_draft(4, 0.04)
    assert control.choose([0.7], [4], 1, 64) == [0]


def test_times_between_measured_numbers():
    times = StepTimes()
    assert times.wants_plain_step(1)
    times.add(1, 0, 2.0)
    assert not times.wants_plain_step(1)
    assert times.wants_plain_step(2)
    times.add(1, 2, 3.0)
    times.add(1, 4, 6.0)
    assert times.ratios(1, 6) == pytest.approx([1, 1.25, 1.5, 2.25, 3, 3.5, 4])
    assert times.ratios(1, 1) == pytest.approx([1, 1.25])
    assert times.ratios(7, 2) == pytest.approx([1, 1.05, 1.1])
    for _ in range(65):
        times.add(1, 4, 6.0)
    assert times.wants_plain_step(1)


def test_spread():
    assert spread([3, 0, 4, 2], 5) == [3, 0, 2, 0]
    assert spread([], 5) == []


# --- prompt lookup ----------------------------------------------------------------------------------------------------


def look_up(tokens, limit, low, high):
    """The same by a search of all places, the latest first."""
    best, best_length = None, low - 1
    for end in range(len(tokens) - 1, 0, -1):
        length = 0
        while length < min(high, end) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        if length > best_length:
            best, best_length = end, length
    if best is None:
        return []
    text = list(tokens)
    for i in range(best, best + limit):
        text.append(text[i])
    return text[len(tokens) :]


@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 4), (2, 2), (2, 16), (3, 64)])
def test_lookup_against_a_search(low, high):
    """Few enough places for the bound on candidates not to matter, then many."""
    rng = random.Random(low * 100 + high)
    num_found = 0
    for _ in range(60):
        lookup = _C.PromptLookup(min_match=low, max_match=high)
        tokens = []
        # Each token and each pair at most 16 times.
        for _ in range(rng.randrange(1, 40)):
            if tokens and rng.random() < 0.3:
                begin = rng.randrange(len(tokens))
                new = tokens[begin : begin + rng.randrange(1, 9)]
            else:
                new = [rng.randrange(2**31 - 1) for _ in range(rng.randrange(4))]
            if any((tokens + new).count(t) > 16 for t in new):
                continue
            tokens += new
            lookup.extend(new)
            limit = rng.randrange(1, 12)
            expected = look_up(tokens, limit, low, high) if len(tokens) >= low else []
            assert lookup.propose(limit) == expected
            num_found += bool(expected)
        assert lookup.num_tokens == len(tokens)
    assert num_found > 100


def test_lookup_against_a_search_of_long_texts():
    """Across several sizes of the table."""
    rng = random.Random(2)
    lookup = _C.PromptLookup(min_match=2, max_match=6)
    tokens = []
    for _ in range(150):
        begin = rng.randrange(len(tokens) + 1)
        new = tokens[begin : begin + rng.randrange(5)] + [rng.randrange(10**6) for _ in range(rng.randrange(16))]
        # Ends where it stood before.
        begin = rng.randrange(len(tokens) + 1)
        new += tokens[begin : begin + rng.randrange(2, 5)]
        tokens += new
        lookup.extend(new)
        assert lookup.propose(4) == look_up(tokens, 4, 2, 6)
    assert len(tokens) > 1200


def test_lookup_in_long_texts():
    """Tables grow; a period goes on past the end of the text; only candidates are bounded."""
    rng = random.Random(1)
    lookup = _C.PromptLookup(min_match=2, max_match=8)
    text = [rng.randrange(5000) for _ in range(30_000)]
    for begin in range(0, len(text), 777):
        lookup.extend(text[begin : begin + 777])
    lookup.extend(text[4321:4331])
    assert lookup.propose(20) == text[4331:4351]
    lookup.extend([1, 2, 3] * 2)
    assert lookup.propose(7) == [1, 2, 3, 1, 2, 3, 1]
    assert lookup.propose(0) == []
    many = _C.PromptLookup(min_match=1, max_match=4)
    many.extend([4, 5, 9, 1] + [9, 2] * 14 + [4, 5, 9])
    assert many.propose(1) == [1]
    # Of 16 places the longest match wins, of equals the latest.
    many.extend([9, 3] * 16 + [4, 5, 9])
    assert many.propose(1) == [3]


def test_lookup_of_nothing():
    lookup = _C.PromptLookup(min_match=2, max_match=4)
    assert lookup.propose(5) == []
    lookup.extend([1])
    assert lookup.propose(5) == []
    lookup.extend([2])
    assert lookup.propose(5) == []
    lookup.extend([])
    lookup.extend([1, 2])
    assert lookup.propose(3) == [1, 2, 1]
    for low, high in ((0, 4), (3, 2), (2, 65), (-1, -1)):
        with pytest.raises(ArgumentError, match="min_match, max_match: expected 1 to 64"):
            _C.PromptLookup(min_match=low, max_match=high)
