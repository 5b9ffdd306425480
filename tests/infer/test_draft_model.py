"""A draft model: its proposals, its cache, and whom it refuses."""

import json

import numpy as np
import pytest
from infer.speculation_cases import (
    PAGE,
    SAMPLING,
    engine,
    free_pages,
    kinds_of_requests,
    prompts,
    run_random_events,
)

from pyengine import SamplingParams
from pyengine.errors import ArgumentError, ModelFileError
from pyengine.formats import open_safetensors, write_safetensors
from pyengine.infer import DraftModel
from pyengine.testing.random_model import make_spec, write_model


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A smaller model that hardly ever agrees."""
    spec = make_spec(num_layers=1, hidden_size=32, intermediate_size=64, num_heads=2, num_kv_heads=1)
    return write_model(tmp_path_factory.mktemp("draft") / "other", spec, seed=9)


@pytest.fixture(scope="module")
def alike(tmp_path_factory, tiny):
    """The model itself with noise on its weights: it agrees now and then."""
    folder = write_model(tmp_path_factory.mktemp("draft") / "alike", make_spec())
    rng = np.random.default_rng(4)
    tensors = {
        name: np.array(t) + (rng.standard_normal(t.shape) * 0.02).astype(np.float32)
        for name, t in open_safetensors(tiny / "model.safetensors").items()
    }
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def draft_of(model, k=4):
    return DraftModel(model=model, num_speculative_tokens=k, adaptive=False)


def draft_decoder(llm):
    return llm._speculator._proposer._decoder


@pytest.mark.parametrize("name", SAMPLING)
def test_every_option_gives_what_it_gives_without(tiny, other, alike, name):
    params = SamplingParams(**({"max_tokens": 25, "ignore_eos": True} | SAMPLING[name]))
    texts = prompts(4)
    expected = engine(tiny).generate(texts, params)
    shares = {}
    for draft in (tiny, other, alike):
        llm = engine(tiny, speculation=draft_of(draft))
        assert llm.generate(texts, params) == expected
        assert free_pages(llm) == llm._runner.decoder.num_pages
        assert draft_decoder(llm).num_free_pages == draft_decoder(llm).num_pages
        stats = llm._speculator.stats
        assert (stats.num_proposed_tokens > 0) == (params.max_tokens > 1)
        shares[draft] = stats.num_accepted_tokens / max(stats.num_proposed_tokens, 1)
    if params.max_tokens > 1 and "allowed few" not in name:
        assert shares[other] < shares[alike]
    # The model itself proposes what it draws then, by the same number at random; but for ends that come before.
    assert shares[tiny] == 1.0 or params.max_tokens == 1 or not params.ignore_eos or params.stop_token_ids


def test_a_perfect_draft_is_drafted_in_few_steps(tiny):
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0)
    expected = engine(tiny).generate([[5, 6, 7]], params)
    llm = engine(tiny, speculation=draft_of(tiny, 4))
    assert llm.generate([[5, 6, 7]], params) == expected
    assert llm.explain().profile["num_steps"] == 1 + -(-39 // 5)
    # Four steps for four tokens; what was drawn behind them comes with the first of the next four.
    profile = draft_decoder(llm).profile()
    assert profile["num_steps"] <= 4 * 8
    assert profile["num_tokens"] <= 3 + 40 + 8


def test_long_prompts_reach_the_draft_in_pieces(tiny, alike):
    texts = [list(range(3, 203)), [9] * 90, [5, 6]]
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    expected = engine(tiny).generate(texts, params)
    llm = engine(tiny, max_batch_tokens=16, speculation=draft_of(alike, 3))
    assert llm.generate(texts, params) == expected
    assert llm._speculator.stats.num_accepted_tokens > 0


def test_a_draft_in_steps_of_two_tokens_catches_up(tiny):
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    expected = engine(tiny).generate([list(range(3, 13))], params)
    llm = engine(tiny, max_batch_tokens=2, speculation=draft_of(tiny, 3))
    assert llm.generate([list(range(3, 13))], params) == expected
    assert llm._speculator.stats.num_accepted_tokens > 0


def test_a_draft_with_a_shorter_context_stops_where_it_ends(tiny, tmp_path):
    short = write_model(tmp_path / "short", make_spec(max_position_embeddings=32))
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    texts = [[5, 6, 7], [8] * 31, [8] * 32, [8] * 50]
    expected = engine(tiny).generate(texts, params)
    llm = engine(tiny, speculation=draft_of(short))
    assert llm.generate(texts, params) == expected
    assert 0 < llm._speculator.stats.num_proposed_tokens <= 32


@pytest.mark.parametrize("num_draft_pages", [14, 3])
def test_random_events(tiny, alike, num_draft_pages):
    """Both caches are too small."""
    kinds = kinds_of_requests()
    alone = engine(tiny, prefix_cache=False)
    expected = [alone.generate([prompt], params)[0] for prompt, params in kinds]
    llm = engine(tiny, cache_tokens=14 * PAGE, max_batch_tokens=48, speculation=draft_of(alike))
    proposer = llm._speculator._proposer
    hog = proposer._decoder.add_sequence()
    proposer._decoder.grow(hog, (14 - num_draft_pages) * PAGE)
    num_finished, num_cancelled = run_random_events(llm, kinds, expected, 1500, 3)
    assert free_pages(llm) == 14
    assert proposer._decoder.num_free_pages == num_draft_pages
    assert not proposer._places
    assert num_finished > 80
    assert num_cancelled > 20
    assert llm._scheduler.stats.num_preemptions > 20
    assert llm._speculator.stats.num_accepted_tokens > 30


def test_the_draft_knows_what_was_accepted(tiny, alike):
    """What it proposes is what it draws on its own after the same tokens."""
    llm = engine(tiny, speculation=draft_of(alike))
    proposer = llm._speculator._proposer
    propose = proposer.propose
    alone = engine(alike)
    num_checked = 0

    def spy(sequences, counts, times):
        nonlocal num_checked
        found = propose(sequences, counts, times)
        for sequence, count, tokens in zip(sequences, counts, found, strict=True):
            params = SamplingParams(max_tokens=count, ignore_eos=True)
            (answer,) = alone.generate([sequence.tokens(0, sequence.num_tokens)], params)
            assert tokens == answer.token_ids
            num_checked += 1
        return found

    proposer.propose = spy
    texts = prompts(8)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    expected = engine(tiny).generate(texts, params)
    sequences = [llm._start([text], params, stream=False)[0][0] for text in texts]
    for sequence in sequences:
        # The others get tokens without proposals in steps that hold a prompt.
        llm._scheduler.add(sequence)
        for _ in range(3):
            llm._scheduler.step()
    while not llm._scheduler.is_idle():
        llm._scheduler.step()
    assert [sequence.completion() for sequence in sequences] == expected
    assert num_checked > 50
    stats = llm._speculator.stats
    assert 0 < stats.num_accepted_tokens < stats.num_proposed_tokens


def test_an_error_in_the_draft_fails_the_request_and_loses_no_page(tiny, alike):
    llm = engine(tiny, speculation=draft_of(alike))
    sampler = llm._speculator._proposer._sampler

    class Broken:
        def propose(self, *arguments):
            sampler.propose(*arguments)
            raise MemoryError("planted")

    llm._speculator._proposer._sampler = Broken()
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    with pytest.raises(MemoryError, match="planted"):
        llm.generate([[5, 6, 7]], params)
    llm._speculator._proposer._sampler = sampler
    assert draft_decoder(llm).num_free_pages == draft_decoder(llm).num_pages
    assert llm.generate([[5, 6, 7]], params) == engine(tiny).generate([[5, 6, 7]], params)


def test_another_vocabulary_is_refused(tiny, tmp_path):
    wider = write_model(tmp_path / "wider", make_spec(vocab_size=400))
    with pytest.raises(ArgumentError, match=r"^speculation: .*wider: expected the 384 logits of .*, got 400"):
        engine(tiny, speculation=draft_of(wider))
    fewer = write_model(tmp_path / "fewer", make_spec(), num_tokens=380)
    with pytest.raises(ArgumentError, match=r"^speculation: .*fewer: expected the vocabulary of .*, where token"):
        engine(tiny, speculation=draft_of(fewer))
    renamed = write_model(tmp_path / "renamed", make_spec())
    description = json.loads((renamed / "tokenizer.json").read_text())
    vocabulary = description["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[100:102]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (renamed / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(ArgumentError, match=r"^speculation: .*renamed: expected the vocabulary of .*, where token"):
        engine(tiny, speculation=draft_of(renamed))
    with pytest.raises(ModelFileError):
        engine(tiny, speculation=draft_of(tmp_path / "missing"))


def test_a_classifier_is_no_draft(tiny, tmp_path):
    folder = write_model(tmp_path / "classifier", make_spec())
    tensors = dict(open_safetensors(folder / "model.safetensors")) | {"score.weight": np.zeros((2, 64), np.float32)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "model.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(ArgumentError, match=r"^speculation: expected a language model, got .*classifier, which has no"):
        engine(tiny, speculation=draft_of(folder))


def test_explain_names_the_draft(tiny, other):
    llm = engine(tiny, speculation=draft_of(other))
    assert str(other) in llm.explain().speculation["method"]
