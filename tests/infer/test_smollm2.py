"""A real model against transformers: SmolLM2-135M-Instruct from its Q4_1 file, the same dequantised weights in both.

float64 is exact; transformers in float32 is the baseline. The text of each prompt is transformers' own greedy answer.
"""

from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from infer.transformers_peer import from_source, greedy, logits, to_exact  # noqa: E402

from pyengine import LLM, SamplingParams  # noqa: E402
from pyengine.evals import kl_divergence, measure_divergence  # noqa: E402
from pyengine.infer.source import open_source  # noqa: E402
from pyengine.testing import assert_accurate  # noqa: E402
from pyengine.testing.smollm2 import smollm2_gguf  # noqa: E402
from pyengine.testing.texts import CODE, PROSE  # noqa: E402

pytestmark = [pytest.mark.train, pytest.mark.slow]

NUM_NEW = 64
CHATS = [
    "Write a haiku about the sea.",
    "What is the capital of Australia, and why is it not Sydney?",
    "Explain recursion to a ten-year-old.",
    "Give me three synonyms for 'quick' and use each in a sentence.",
    "How do I boil an egg?",
]
TEXTS = [
    "The capital of France is",
    "Once upon a time, in a village at the foot of a mountain, there lived",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune,",
    "The second law of thermodynamics states that",
    "Dear Sir or Madam,\n\nI am writing to complain about",
    "def fibonacci(n):\n    ",
    "#include <stdio.h>\n\nint main(void) {\n",
    "SELECT name, COUNT(*) FROM users\nWHERE",
    '{"name": "Alice", "age": 31, "tags": ["a", "b"]}\n{"name": "Bob",',
    "for i in range(10):\n    print(i ** 2)\n\n# Output:\n",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "3.14159265358979",
    "2024-01-31, 2024-02-29, 2024-03-31,",
    "Der schnelle braune Fuchs springt über den faulen Hund. Auf Englisch:",
    "日本の首都は東京です。フランスの首都は",
]


@dataclass
class Row:
    """One prompt: its ids, the answer of transformers, and the logits after each of its tokens, in three ways."""

    prompt: list[int]
    answer: list[int]
    exact: np.ndarray
    baseline: np.ndarray
    ours: np.ndarray


@pytest.fixture(scope="module")
def llm():
    return LLM(smollm2_gguf(), mode="exact", kv_dtype="float32", max_context=1024, cache_tokens=4096)


@pytest.fixture(scope="module")
def rows(llm):
    prompts = [llm.chat_prompt([{"role": "user", "content": text}]) for text in CHATS]
    prompts += [llm.tokenizer.encode(text) for text in TEXTS]
    with torch.inference_mode():
        peer = from_source(open_source(smollm2_gguf()))
        answers = greedy(peer, prompts, NUM_NEW)
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        # The last answer token predicts nothing that is compared.
        baseline = [logits(peer, ids[:-1], NUM_NEW).numpy() for ids in texts]
        exact_model = to_exact(peer, llm.spec)
        exact = [logits(exact_model, ids[:-1], NUM_NEW).numpy() for ids in texts]
    ours = [llm.logits(ids[:-1])[-NUM_NEW:] for ids in texts]
    return [Row(*values) for values in zip(prompts, answers, exact, baseline, ours, strict=True)]


def test_logits_err_no_more_than_twice_as_much_as_transformers(llm, rows):
    assert len(rows) == 20
    assert llm.tokenizer.decode(rows[len(CHATS)].answer).startswith(" Paris")
    for row in rows:
        assert_accurate(torch.from_numpy(row.ours), torch.from_numpy(row.exact), torch.from_numpy(row.baseline))


def test_divergence_from_float64_is_that_of_float32(rows):
    ours = np.concatenate([kl_divergence(row.exact, row.ours) for row in rows])
    baseline = np.concatenate([kl_divergence(row.exact, row.baseline) for row in rows])
    # KL is quadratic in the error, of which twice as much is allowed.
    assert ours.mean() <= 4 * baseline.mean()
    assert ours.max() <= 4 * baseline.max()


def test_greedy_answers_differ_only_where_float64_has_a_tie(llm, rows):
    params = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True)
    completions = llm.generate([row.prompt for row in rows], params)
    num_ties = 0
    for row, completion in zip(rows, completions, strict=True):
        differ = np.flatnonzero(np.array(completion.token_ids) != np.array(row.answer))
        if not differ.size:
            continue
        num_ties += 1
        at = differ[0]
        exact = row.exact[at]
        # Each engine may move both candidates by its error.
        allowed = 2 * (np.abs(row.ours[at] - exact).max() + np.abs(row.baseline[at] - exact).max())
        margin = abs(exact[completion.token_ids[at]] - exact[row.answer[at]])
        assert margin <= allowed, f"token {at} of {llm.tokenizer.decode(row.prompt)!r}: margin {margin:.3g}"
    # A margin within rounding is rare: more than one in twenty answers means that something is wrong.
    assert num_ties <= 1


@pytest.fixture(scope="module")
def long_texts(llm):
    """(token ids, logits) of prose and of code."""
    return [(ids, llm.logits(ids)) for ids in (llm.tokenizer.encode(text) for text in (PROSE, CODE))]


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"mode": "exact", "kv_dtype": "bfloat16"}, 2e-4),
        ({"mode": "bf16"}, 4e-4),
        ({"mode": "fast"}, 0.01),
    ],
    ids=["bf16_cache", "bf16", "fast"],
)
def test_lossy_choices_stay_within_their_figure(long_texts, options, limit):
    """Mean KL per token on prose and code, from mode exact with a float32 cache: 4e-5, 1e-4 and 3.1e-3, with room."""
    other = LLM(smollm2_gguf(), max_context=1024, **options)
    divergence = measure_divergence((logits, other.logits(ids)) for ids, logits in long_texts)
    assert divergence.num_tokens > 1300
    assert 0 < divergence.mean_kl < limit
    assert divergence.same_top > 0.9
