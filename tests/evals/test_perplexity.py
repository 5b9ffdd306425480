import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pyengine.data.packing import PackedDataset  # noqa: E402
from pyengine.data.shards import Shard, TokenisedDocument, add_boundaries, write_shard  # noqa: E402
from pyengine.errors import ArgumentError  # noqa: E402
from pyengine.evals import measure_perplexity, nll_from_logits  # noqa: E402

pytestmark = pytest.mark.train


def rows_of(tmp_path, seq_len=7):
    documents = [TokenisedDocument(str(n), np.arange(n + 2) % 9, 3 * (n + 2)) for n in range(5)]
    write_shard(tmp_path / "s", add_boundaries(documents, start=9), vocab_size=10, tokenizer="blake3:" + "0" * 64)
    shard = Shard(tmp_path / "s")
    dataset = PackedDataset(shard, seq_len, seed=0)
    return shard, [dataset[index] for index in range(dataset.rows_per_epoch)]


def test_a_uniform_model_needs_log_v_per_token(tmp_path):
    shard, rows = rows_of(tmp_path)
    result = measure_perplexity(
        lambda row: np.full(row.targets.shape, math.log(10), np.float32), rows, text_bytes=shard.index.text_bytes
    )
    tokens = sum(n + 2 for n in range(5))
    assert result.num_targets == tokens, "every token of the text is predicted once"
    assert result.perplexity == pytest.approx(10.0, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(tokens * math.log2(10) / (3 * tokens), rel=1e-6)


@pytest.mark.parametrize("seq_len", [2, 5, 64])
def test_the_figure_does_not_depend_on_the_length_of_rows(tmp_path, seq_len):
    """A model that knows the token alone, so cutting documents changes nothing."""
    table = np.random.default_rng(0).normal(size=(10, 10)).astype(np.float32)

    def score(row):
        return nll_from_logits(table[row.input_ids], row.targets)

    whole = measure_perplexity(score, rows_of(tmp_path)[1])
    other = measure_perplexity(score, rows_of(tmp_path, seq_len)[1])
    assert other.num_targets == whole.num_targets
    assert other.nats == pytest.approx(whole.nats, rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nll_equals_torch(dtype):
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(3, 5, 11)) * 20).astype(dtype)
    targets = rng.integers(11, size=(3, 5))
    targets[0, 0] = targets[2, 4] = -100
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double().flatten(0, 1), torch.from_numpy(targets).flatten(), reduction="none"
    )
    np.testing.assert_allclose(nll_from_logits(logits, targets).ravel(), expected.numpy(), rtol=1e-12, atol=1e-13)


def test_large_logits_do_not_overflow():
    logits = np.array([[1e4, -1e4, 0.0]], np.float32)
    assert nll_from_logits(logits, np.array([1])).tolist() == [2e4]


def test_values_that_are_not_counted_are_not_read(tmp_path):
    _, rows = rows_of(tmp_path)
    result = measure_perplexity(lambda row: np.where(row.targets == -100, np.nan, 1.0), rows)
    assert result.nats_per_token == 1.0
    assert result.bits_per_byte is None


def test_an_impossible_token_and_large_losses(tmp_path):
    _, rows = rows_of(tmp_path)
    assert measure_perplexity(lambda row: np.full(row.targets.shape, np.inf), rows).perplexity == math.inf
    assert measure_perplexity(lambda row: np.full(row.targets.shape, 800.0), rows).perplexity == math.inf


def test_errors(tmp_path):
    _, rows = rows_of(tmp_path)
    with pytest.raises(ArgumentError, match=r"score: expected nats of shape \(7,\), got \(3,\)"):
        measure_perplexity(lambda row: np.zeros(3), rows)
    with pytest.raises(ArgumentError, match="score: expected numbers, got NaN"):
        measure_perplexity(lambda row: np.full(7, np.nan), rows)
    with pytest.raises(ArgumentError, match="rows: expected at least one target, got none"):
        measure_perplexity(lambda row: np.zeros(7), [])
