import math

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.ops.sample import sample
from pyengine.reference import sample as reference
from pyengine.testing import LAYOUTS, assert_same_bits, force_num_threads
from pyengine.testing.guard import guarded

INF = float("inf")
# Random123's kat_vectors, philox4x32 10: counter, key, result.
PHILOX_VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
]


def _draw(logits, **settings):
    """sample at position 0, 1, ... of sequence 0."""
    settings = {"seed": 1, "sequence": 0, "position": torch.arange(len(logits))} | settings
    return sample(logits, **settings)


def _raw_logprobs(logits):
    return torch.log_softmax(logits.double(), -1)


# --- the random numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX_VECTORS)
def test_philox_known_answers(counter, key, expected):
    assert reference.philox4x32_10(counter, key) == expected
    assert tuple(_C.philox4x32_10(counter, key)) == expected


def test_uniform_reads_the_whole_key_and_counter():
    triples = [(0, 0, 0), (2**64 - 1, 2**64 - 1, 2**64 - 1)]
    triples += [tuple(1 << shift if i == j else 0 for j in range(3)) for i in range(3) for shift in (0, 31, 32, 63)]
    values = [_C.sample_uniform(*triple) for triple in triples]
    assert values == [reference.uniform(*triple) for triple in triples]
    assert len(set(values)) == len(triples)
    assert all(0 <= u < 1 for u in values)


# --- against the reference --------------------------------------------------------------------------------------------


def _random_settings(rng, num_rows, vocab_size):
    pick = lambda *values: rng.choice(values, num_rows)  # noqa: E731
    lengths = rng.integers(0, 6, num_rows)
    return {
        "temperature": pick(0, 1e-38, 1e-3, 0.3, 0.7, 1, 1, 1.7, 50).astype(np.float32),
        "top_k": pick(0, 0, 0, 1, 2, 7, 40, vocab_size, vocab_size + 9).astype(np.int32),
        "top_p": pick(1, 1, 1, 0, 0.1, 0.5, 0.9, 0.95, 0.999).astype(np.float32),
        "min_p": pick(0, 0, 0, 0.01, 0.1, 0.5, 1).astype(np.float32),
        "repetition_penalty": pick(1, 1, 0.7, 1.3, 2).astype(np.float32),
        "seed": rng.integers(-(2**63), 2**63, num_rows),
        "sequence": rng.integers(-(2**63), 2**63, num_rows),
        "position": rng.integers(0, 2**40, num_rows),
        "previous_ids": rng.integers(0, vocab_size, lengths.sum()).astype(np.int32),
        "previous_offsets": np.concatenate([[0], np.cumsum(lengths)]),
    }


@pytest.mark.parametrize(("vocab_size", "num_rows"), [(1, 50), (2, 200), (33, 400), (257, 300), (5003, 60)])
@pytest.mark.parametrize("kind", ["normal", "ties", "masked"])
def test_equals_the_reference(isa, vocab_size, num_rows, kind):
    rng = np.random.default_rng([vocab_size, len(kind)])
    logits = (3 * rng.standard_normal((num_rows, vocab_size))).astype(np.float32)
    if kind == "ties":
        logits = logits.round()  # -0.0 and 0.0 too
    if kind == "masked":
        logits[rng.random(logits.shape) < 0.6] = -np.inf
        logits[:, rng.integers(vocab_size)] = 0.5
    s = _random_settings(rng, num_rows, vocab_size)
    token_ids, logprobs = np.empty(num_rows, np.int32), np.empty(num_rows, np.float32)
    _C.sample_cpu(logits, **s, token_ids=token_ids, logprobs=logprobs, top_ids=None, top_logprobs=None)
    # Weights err by 2 ulp (2^-22) and a lane of a block adds at most 512 of them in f32: where the float64 margin is
    # larger, no rounding can change the token.
    bound = 2**-22 + (min(vocab_size, 4096) / 8 + 4) * 2**-24
    num_close = 0
    for r in range(num_rows):
        row = {k: v[r].item() for k, v in s.items() if not k.startswith("previous")}
        row |= {k: row[k] % 2**64 for k in ("seed", "sequence", "position")}
        previous = s["previous_ids"][s["previous_offsets"][r] : s["previous_offsets"][r + 1]].tolist()
        with np.errstate(over="ignore"):  # a tiny temperature divides to -inf
            expected = reference.sample_row(logits[r], **row, previous_ids=previous)
        if expected.margin <= bound:
            num_close += 1
            continue
        assert token_ids[r] == expected.token, row
        assert abs(logprobs[r] - expected.logprob) <= 2e-6 * max(1, abs(expected.logprob), np.abs(logits[r]).max())
    assert num_close <= 0.1 * num_rows


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_the_reference_keeps_what_transformers_keeps(settings):
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((50, 200)).astype(np.float32)
    previous = rng.integers(0, 200, (50, 9))
    processors = [
        hf.RepetitionPenaltyLogitsProcessor(1.3),
        hf.TemperatureLogitsWarper(float(settings.get("temperature", 1.0))),
        hf.TopKLogitsWarper(settings["top_k"]) if "top_k" in settings else None,
        hf.TopPLogitsWarper(settings["top_p"]) if "top_p" in settings else None,
        hf.MinPLogitsWarper(settings["min_p"]) if "min_p" in settings else None,
    ]
    scores = torch.from_numpy(logits).double()
    for processor in processors:
        scores = scores if processor is None else processor(torch.from_numpy(previous), scores)
    expected = torch.softmax(scores, -1).numpy()
    for r in range(50):
        penalised = reference.penalise(logits[r], previous[r].tolist(), 1.3)
        weights, _ = reference.kept_weights(
            penalised, **({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings)
        )
        np.testing.assert_array_equal(weights > 0, expected[r] > 0)
        np.testing.assert_allclose(weights / weights.sum(), expected[r], rtol=1e-5)


def test_the_reference_adjusts_as_transformers_does():
    rng = np.random.default_rng(0)
    words = [[3], [5, 6], [6, 6], [1, 2, 3], [9, 9, 9]]
    biases = {4: 2.5, 7: -100.0, 199: 31.25}
    end_ids = [2, 11]
    num_banned = 0
    for num_output in range(60):
        logits = 3 * rng.standard_normal(200).astype(np.float32)
        prompt, output = rng.integers(0, 12, 8).tolist(), rng.integers(0, 12, num_output).tolist()
        processors = [
            hf.MinNewTokensLengthLogitsProcessor(8, 20, end_ids, device="cpu"),
            hf.SequenceBiasLogitsProcessor([[[i], bias] for i, bias in biases.items()]),
            hf.RepetitionPenaltyLogitsProcessor(1.3),
        ]
        # Bad words look at the output alone.
        scores = hf.NoBadWordsLogitsProcessor(words)(torch.tensor([output]), torch.from_numpy(logits)[None].clone())
        for processor in processors:
            scores = processor(torch.tensor([prompt + output]), scores)
        banned = reference.banned_by_words(output, words)
        num_banned += len(banned - {3})
        adjusted = reference.adjust(
            logits,
            banned_ids=banned | set(end_ids if num_output < 20 else ()),
            biases=biases,
            repetition_penalty=1.3,
            previous_ids=prompt + output,
            num_prompt_ids=8,
        )
        np.testing.assert_array_equal(adjusted, scores[0].numpy())
    assert num_banned > 5


def test_the_reference_counts_the_output_alone():
    """OpenAI's formula: logit - count * frequency_penalty - (count > 0) * presence_penalty."""
    logits = np.arange(6, dtype=np.float32)
    previous = [0, 1, 1, 1, 4, 5, 4, 4]
    adjusted = reference.adjust(
        logits, previous_ids=previous, num_prompt_ids=3, frequency_penalty=0.5, presence_penalty=0.25
    )
    counts = np.bincount(previous[3:], minlength=6)
    np.testing.assert_array_equal(adjusted, logits - 0.5 * counts - 0.25 * (counts > 0))


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_chi_square_of_200k_draws(settings):
    logits = np.random.default_rng(3).standard_normal(64).astype(np.float32)
    num_draws = 200_000
    tokens = _draw(torch.from_numpy(logits).expand(num_draws, -1), **settings).token_ids
    counts = np.bincount(tokens.numpy(), minlength=64)
    weights, _ = reference.kept_weights(
        logits, **({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings)
    )
    expected = num_draws * weights / weights.sum()
    assert (counts[expected == 0] == 0).all()
    common = expected >= 10
    cells = [(counts[common], expected[common])]
    if (rare := (expected > 0) & ~common).any():
        cells.append((counts[rare].sum(keepdims=True), expected[rare].sum(keepdims=True)))
    got, want = (np.concatenate(c) for c in zip(*cells, strict=True))
    chi_square, df = ((got - want) ** 2 / want).sum(), len(want) - 1
    assert df >= 3
    # The 1 - 1e-4 quantile by Wilson and Hilferty; z(1e-4) = 3.719.
    limit = df * (1 - 2 / (9 * df) + 3.719 * math.sqrt(2 / (9 * df))) ** 3
    assert chi_square < limit


# --- edges ------------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_index_of_a_tie(isa):
    for num_cols in (1, 5, 64, 65, 200):
        for where in {0, num_cols // 2, num_cols - 1}:
            logits = torch.full((1, num_cols), -3.0)
            logits[0, where:] = 1.5
            assert _draw(logits, temperature=0.0).token_ids.item() == where
    assert _draw(torch.tensor([[-0.0, 0.0, -0.0]]), temperature=0.0).token_ids.item() == 0


def test_top_k_one_top_p_zero_and_a_tiny_temperature_are_greedy(isa):
    logits = torch.randn(300, 1000).round(decimals=1)
    greedy = _draw(logits, temperature=0.0).token_ids
    for settings in ({"top_k": 1}, {"top_p": 0.0}, {"top_k": 1, "top_p": 0.5, "min_p": 0.3, "temperature": 5.0}):
        assert_same_bits(_draw(logits, **settings).token_ids, greedy)
    cold = _draw(logits, temperature=1e-40).token_ids  # ties stay ties
    assert (logits.gather(1, cold[:, None].long()) == logits.max(1, keepdim=True).values).all()


def test_filters_that_are_off_change_nothing(isa):
    logits = torch.randn(200, 150)
    plain = _draw(logits).token_ids
    for settings in ({"top_k": 150}, {"top_k": 2**31 - 1}, {"top_p": 1.0}, {"min_p": 0.0}, {"repetition_penalty": 1.0}):
        assert_same_bits(_draw(logits, **settings).token_ids, plain)


def test_min_p_one_keeps_the_tied_maximum(isa):
    logits = torch.randn(500, 40)
    logits[:, [3, 17, 39]] = 9.0
    assert set(_draw(logits, min_p=1.0).token_ids.tolist()) == {3, 17, 39}


def test_top_k_cuts_ties_by_index(isa):
    tokens = _draw(torch.zeros(2000, 100), top_k=7).token_ids
    assert set(tokens.tolist()) == set(range(7))


def test_masked_tokens_are_never_drawn(isa):
    logits = torch.full((3000, 5000), -INF)
    logits[:, 4100] = -2000.0
    logits[:, 4097] = -2000.0
    assert set(_draw(logits).token_ids.tolist()) == {4097, 4100}
    assert set(_draw(logits, top_p=0.4).token_ids.tolist()) == {4097}
    assert set(_draw(logits, top_k=3000, temperature=7.0).token_ids.tolist()) == {4097, 4100}


def test_a_flat_row_needs_the_whole_ranking(isa):
    """top_p of equal logits keeps the lowest ids; the pruned candidates do not suffice."""
    tokens = _draw(torch.zeros(400, 9000), top_p=0.5).token_ids
    assert tokens.max() < 4500
    assert tokens.max() > 4300


def test_penalty_applies_once_per_id(isa):
    logits = torch.tensor([[2.0, 1.9, -1.0], [-1.0, -1.1, -9.0]])
    ids = torch.tensor([0, 0, 0, 0], dtype=torch.int32)
    offsets = torch.tensor([0, 3, 4])
    for penalty, expected in [(1.0, [0, 0]), (1.04, [0, 0]), (1.06, [1, 0]), (1.2, [1, 1])]:
        out = _draw(logits, temperature=0.0, repetition_penalty=penalty, previous_ids=ids, previous_offsets=offsets)
        assert out.token_ids.tolist() == expected


@pytest.mark.parametrize("num_logprobs", [1, 5, 100, 700])
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_top_logprobs_are_of_the_raw_logits(isa, num_logprobs, kind):
    torch.manual_seed(0)
    logits = 4 * torch.randn(5, 700)
    logits = logits.round() if kind == "ties" else logits
    ids = torch.arange(5, dtype=torch.int32)
    out = _draw(
        logits,
        temperature=0.6,
        top_k=3,
        repetition_penalty=1.8,
        previous_ids=ids,
        previous_offsets=torch.arange(6),
        num_logprobs=num_logprobs,
    )
    order = torch.sort(logits + 0.0, descending=True, stable=True).indices[:, :num_logprobs]
    assert torch.equal(out.top_ids.long(), order)
    exact = _raw_logprobs(logits)
    limit = 2 * (torch.log_softmax(logits, -1).double() - exact).abs().max() + 2**-20
    assert (out.top_logprobs.double() - exact.gather(1, order)).abs().max() <= limit
    assert (out.logprobs.double() - exact.gather(1, out.token_ids.long()[:, None])[:, 0]).abs().max() <= limit


# --- independence, memory, errors -------------------------------------------------------------------------------------

MIXED = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "num_logprobs": 4}


def test_same_bits_for_any_number_of_threads_and_for_a_row_alone(isa):
    logits = torch.randn(60, 3000)
    results = []
    for count in (1, 2, 3):
        with force_num_threads(count):
            results.append(_draw(logits, **MIXED))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(b, a)
    for r in range(0, 60, 7):
        alone = _draw(logits[r : r + 1], position=r, **MIXED)
        for a, b in zip(results[0], alone, strict=True):
            assert_same_bits(b, a[r : r + 1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(isa, layout):
    logits = LAYOUTS[layout](torch.randn(7, 130))
    for a, b in zip(_draw(logits, **MIXED), _draw(logits.contiguous(), **MIXED), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("vocab_size", [1, 7, 16, 33, 64, 129])
@pytest.mark.parametrize("at_end", [True, False])
def test_touches_no_byte_outside_its_tensors(isa, vocab_size, at_end):
    logits = guarded(torch.randn(3, vocab_size), at_end=at_end)
    for settings in (MIXED | {"num_logprobs": 1}, {"temperature": 0.0}, {}):
        a, b = _draw(logits, **settings), _draw(logits.clone(), **settings)
        assert_same_bits(a.token_ids, b.token_ids)


@pytest.mark.parametrize("vocab_size", [1, 7, 31, 32, 33, 64, 129])
@pytest.mark.parametrize("at_end", [True, False])
def test_masks_and_penalties_touch_no_byte_outside_the_logits(isa, vocab_size, at_end):
    logits = torch.randn(3, vocab_size)
    masks = torch.randint(-(2**31), 2**31, (3, -(-vocab_size // 32)), dtype=torch.int32)
    masks[:, 0] = masks[:, 0] | 1
    drawn = []
    for x in (guarded(logits, at_end=at_end), logits):
        states = [
            _C.SampleState(vocab_size, temperature=1.0, seed=i, repetition_penalty=1.5, presence_penalty=0.5)
            for i in range(3)
        ]
        for state, mask in zip(states, masks, strict=True):
            state.set_mask(mask)
        drawn.append([*_C.draw(x, states, 1).token_ids, *_C.draw(x, states, 0).token_ids])
    assert drawn[0] == drawn[1]
    assert min(drawn[0]) >= 0


def test_no_rows():
    out = _draw(torch.empty(0, 5), num_logprobs=2)
    assert [tuple(t.shape) for t in out] == [(0,), (0,), (0, 2), (0, 2)]


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (float("nan"), "logits: expected numbers or -inf, got nan at row 2, token 11"),
        (INF, "logits: expected numbers or -inf, got inf at row 2, token 11"),
        (None, "logits: expected a token with a logit above -inf, got none at row 2"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_impossible_row_is_named(isa, value, match, temperature):
    logits = torch.randn(4, 20)
    if value is None:
        logits[2] = -INF
    else:
        logits[2, 11] = value
    with pytest.raises(ArgumentError, match=rf"\[sample\] {match}$"):
        _draw(logits, temperature=temperature)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("temperature", -0.1, "a finite number >= 0, got -0.1"),
        ("temperature", INF, "a finite number >= 0, got inf"),
        ("temperature", float("nan"), "a finite number >= 0, got nan"),
        ("top_k", -1, "a number >= 0, got -1"),
        ("top_p", 1.5, "a number from 0 to 1, got 1.5"),
        ("min_p", float("nan"), "a number from 0 to 1, got nan"),
        ("repetition_penalty", 0.0, "a finite number > 0, got 0"),
    ],
)
def test_a_setting_out_of_range_is_named(name, value, match):
    values = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    t = torch.full((3,), values.get(name, 0), dtype=torch.int32 if name == "top_k" else torch.float32)
    t[1] = value
    with pytest.raises(ArgumentError, match=rf"\[sample\] {name}: expected {match}.* at row 1$"):
        _draw(torch.randn(3, 5), **{name: t})


def test_previous_ids_are_checked():
    logits = torch.randn(2, 5)
    for ids, offsets, match in [
        ([1, 5], [0, 1, 2], "previous_ids: expected token ids below the vocabulary size, got 5 at row 1"),
        ([-1, 0], [0, 1, 2], "previous_ids: expected token ids below the vocabulary size, got -1 at row 0"),
        ([1, 2], [0, 1, 3], "previous_offsets: expected ascending offsets into previous_ids, got 3 at index 2"),
        ([1, 2], [0, 2, 1], "previous_offsets: expected ascending offsets into previous_ids, got 1 at index 2"),
        ([1, 2], [-1, 0, 1], "previous_offsets: expected ascending offsets into previous_ids, got -1 at index 0"),
        ([1, 2], [0, 2], r"previous_offsets: expected shape \(3,\), got shape \(2,\)"),
    ]:
        with pytest.raises(ArgumentError, match=match):
            _draw(
                logits,
                previous_ids=torch.tensor(ids, dtype=torch.int32),
                previous_offsets=torch.tensor(offsets),
            )
    logits[0, 1] = 1e30
    with pytest.raises(ArgumentError, match=r"repetition_penalty: expected one that keeps logits finite, got .* row 0"):
        _draw(
            logits,
            repetition_penalty=1e-20,
            previous_ids=torch.tensor([1], dtype=torch.int32),
            previous_offsets=torch.tensor([0, 1, 1]),
        )


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_error_names_the_argument_and_what_came(device):
    logits = torch.randn(4, 16, device=device)
    for x, settings, match in [
        (logits[0], {}, r"logits: expected 2 dimensions \[B, V\], got shape \(16,\)"),
        (logits.bfloat16(), {}, "logits: expected torch.float32, got torch.bfloat16"),
        (logits, {"top_k": torch.zeros(4, device=device)}, "top_k: expected torch.int32, got torch.float32"),
        (logits, {"top_p": torch.ones(3, device=device)}, r"top_p: expected shape \(4,\), .* got \(3,\)"),
        (logits, {"num_logprobs": 17}, "num_logprobs: expected 0 to 16, got 17"),
    ]:
        with pytest.raises(RuntimeError, match=r"\[sample\] " + match):
            _draw(x, position=0, **settings)


def test_opcheck():
    logits = torch.randn(4, 16)
    args = [t.expand(4).contiguous() for t in (torch.tensor(0.8), torch.tensor(5, dtype=torch.int32))]
    args += [torch.full((4,), v) for v in (0.9, 0.01, 1.1)] + [torch.arange(4) for _ in range(3)]
    ids, offsets = torch.tensor([1, 2], dtype=torch.int32), torch.tensor([0, 0, 1, 2, 2])
    result = torch.library.opcheck(torch.ops.pyengine.sample.default, (logits, *args, ids, offsets, 3))
    assert set(result.values()) == {"SUCCESS"}


def test_compiles_without_graph_break():
    logits = torch.randn(4, 16)

    def fn(logits):
        return _draw(logits * 2, **MIXED).token_ids + 1

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(logits), fn(logits))
