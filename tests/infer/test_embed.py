"""Hidden states, embeddings and classifiers of decoders against transformers: float64 is exact, its own dtype the
baseline."""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from infer.transformers_peer import to_exact  # noqa: E402

from pyengine import _C, LLM, SamplingParams  # noqa: E402
from pyengine.errors import ArgumentError, BackendUnavailable, CapacityError, ModelFileError  # noqa: E402
from pyengine.formats import open_safetensors  # noqa: E402
from pyengine.infer import BeamSearchParams  # noqa: E402
from pyengine.infer.reading import PooledReading  # noqa: E402
from pyengine.quant import quantize_to_gguf  # noqa: E402
from pyengine.testing import assert_accurate  # noqa: E402
from pyengine.testing.random_adapter import write_random_adapter  # noqa: E402
from pyengine.testing.tiny import tiny_model  # noqa: E402

pytestmark = pytest.mark.train

PAD = 3
BODIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 24, "tie_word_embeddings": True},
    "granite": {"logits_scaling": 8.0},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 19,
        "query_pre_attn_scalar": 24,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "mistral": {"sliding_window": 19},
}
CLASSIFIERS = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma3_text"]
DTYPES = [torch.float32, torch.bfloat16]


def random_ids(count, seed):
    return np.random.default_rng(seed).integers(4, 384, count).tolist()


TEXTS = [random_ids(length, length) for length in (1, 2, 33, 150)]


def load(folder, auto_class, dtype):
    return getattr(transformers, auto_class).from_pretrained(folder, dtype=dtype).eval()


@torch.inference_mode()
def states_of(model, ids):
    return model.model(torch.tensor([ids])).last_hidden_state[0]


def pooled(states, pooling, normalize):
    vector = {"last": states[-1], "first": states[0], "mean": states.mean(0)}[pooling]
    return torch.nn.functional.normalize(vector, dim=-1) if normalize else vector


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", BODIES)
def test_hidden_states_and_embeddings(tmp_path, model_type, dtype):
    folder = tiny_model(tmp_path, model_type, dtype=dtype, **BODIES[model_type])
    llm = LLM(folder)
    peer = load(folder, "AutoModelForCausalLM", dtype)
    exact = to_exact(load(folder, "AutoModelForCausalLM", torch.float32), llm.spec)
    for ids in TEXTS:
        expected, baseline = states_of(exact, ids), states_of(peer, ids).float()
        assert_accurate(torch.from_numpy(llm.hidden_states(ids)), expected, baseline)
        for pooling in ("last", "mean", "first"):
            for normalize in (True, False):
                got = torch.from_numpy(llm.embed([ids], pooling=pooling, normalize=normalize)[0])
                assert_accurate(got, pooled(expected, pooling, normalize), pooled(baseline, pooling, normalize))


@pytest.mark.parametrize("tied", [True, False])
def test_a_body_alone(tmp_path, tied):
    """What AutoModel writes: names without their first part, and no head."""
    whole = tiny_model(tmp_path / "whole", "qwen3", head_dim=16, tie_word_embeddings=tied)
    model = load(whole, "AutoModelForCausalLM", torch.float32)
    body = tmp_path / "body"
    model.model.save_pretrained(body)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (body / name).write_bytes((whole / name).read_bytes())
    llm, reader = LLM(whole), LLM(body)
    assert reader.embed(TEXTS).tobytes() == llm.embed(TEXTS).tobytes()
    for call in (
        lambda: reader.generate([[1]]),
        lambda: reader.stream([1]),
        lambda: reader.score([[1]], [[2]]),
        lambda: reader.score_stream([([1], [2])]),
        lambda: reader.logits([1]),
        lambda: reader.beam_search([[1]], BeamSearchParams()),
    ):
        with pytest.raises(BackendUnavailable, match="has no language-model head; use embed or classify"):
            call()
    with pytest.raises(ArgumentError, match=r"^model: expected a language model, got .*, which has no head"):
        quantize_to_gguf(body, tmp_path / "out.gguf", weights="q8_0")
    with pytest.raises(BackendUnavailable, match="has no classifier"):
        llm.classify([[1]])
    config = json.loads((body / "config.json").read_text())
    assert config["architectures"] == ["Qwen3Model"]
    # A folder that says by its architecture that the embedding is the head, as some embedding models do.
    (body / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForCausalLM"]}))
    if tied:
        assert LLM(body).logits(TEXTS[2]).tobytes() == llm.logits(TEXTS[2]).tobytes()
    else:
        with pytest.raises(BackendUnavailable, match="has no language-model head"):
            LLM(body).logits(TEXTS[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", CLASSIFIERS)
@pytest.mark.parametrize("num_labels", [1, 3])
def test_classifiers(tmp_path, model_type, num_labels, dtype):
    options = BODIES.get(model_type, {}) | {"num_labels": num_labels, "pad_token_id": PAD}
    auto_class = "AutoModelForSequenceClassification"
    folder = tiny_model(tmp_path, model_type, dtype=dtype, auto_class=auto_class, **options)
    llm = LLM(folder)
    peer = load(folder, auto_class, dtype)
    exact = to_exact(load(folder, auto_class, torch.float32), llm.spec)
    # Padding at the end, or all of a text, as the peer sees it in a batch; and inside. Many texts, because the error of
    # the peer on a few numbers is a matter of luck.
    texts = [*TEXTS, [5, 6, PAD, 7, PAD, PAD], [PAD], [PAD, PAD, PAD]] + [random_ids(20, seed) for seed in range(40)]
    got = llm.classify(texts)
    with torch.inference_mode():
        expected = torch.cat([exact(torch.tensor([ids])).logits for ids in texts])
        baseline = torch.cat([peer(torch.tensor([ids])).logits for ids in texts]).float()
    assert_accurate(torch.tensor([result.logits for result in got]), expected, baseline)
    for result, row in zip(got, expected, strict=True):
        assert result.labels == tuple(f"LABEL_{i}" for i in range(num_labels))
        if dtype == torch.float32:
            assert result.label == f"LABEL_{row.argmax()}"
        probabilities = torch.tensor([result.probabilities[label] for label in result.labels], dtype=torch.float64)
        torch.testing.assert_close(probabilities, torch.tensor(result.logits).double().softmax(-1))
    if num_labels == 1:
        assert llm.reward(texts) == [result.logits[0] for result in got]
    else:
        with pytest.raises(ArgumentError, match=r"^reward: expected a model with one label, got 3$"):
            llm.reward(texts)
    with pytest.raises(BackendUnavailable, match="has no language-model head"):
        llm.generate([[1]])


def test_names_of_labels(tmp_path):
    folder = tiny_model(tmp_path, "llama", auto_class="AutoModelForSequenceClassification", num_labels=2)
    config = json.loads((folder / "config.json").read_text())

    def load_with(**keys):
        (folder / "config.json").write_text(json.dumps(config | keys))
        return LLM(folder)

    assert load_with(id2label={"1": "good", "0": "bad"}).classify([[1]])[0].labels == ("bad", "good")
    assert load_with(id2label=None).classify([[1]])[0].labels == ("LABEL_0", "LABEL_1")
    for bad in ({"0": "a"}, {"0": "a", "2": "b"}, {"0": "a", "1": 7}, ["a", "b"], "ab", {"0": "a", "1": "b", "2": "c"}):
        with pytest.raises(ModelFileError, match=r"'id2label': expected a name for each of 0 to 1, got "):
            load_with(id2label=bad)
    with pytest.raises(ModelFileError, match=r"'id2label': expected names that differ, got "):
        load_with(id2label={"0": "a", "1": "a"})


def test_an_index_that_names_a_classifier_where_there_is_none(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    file = (folder / "model.safetensors").rename(folder / "part.safetensors")
    names = dict.fromkeys([*open_safetensors(file), "score.weight"], file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelFileError, match=r"'score.weight': expected this tensor, got none"):
        LLM(folder)


# --- law 1, and enemies -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 384, int(rng.choice([1, 2, 15, 16, 17, 80, 200]))).tolist() for _ in range(40)]


@pytest.mark.parametrize("pooling", ["last", "mean", "first"])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_pieces_change_no_bit_of_a_pool(pooling, size):
    """In float64, before the result is rounded; magnitudes so far apart that float64 rounds too."""
    rng = np.random.default_rng(2)
    states = (rng.standard_normal((200, 5)) * 10.0 ** rng.integers(-9, 10, (200, 5))).astype(np.float32)

    def pool(size):
        reading = PooledReading(token_ids=[0] * 200, first=0, pooling=pooling)
        for begin in range(0, 200, size):
            reading.take(states[begin : begin + size])
            reading.next_row = min(begin + size, 200)
        return reading.pooled().tobytes()

    assert pool(size) == pool(200)


@pytest.mark.parametrize("pooling", ["last", "mean", "first"])
def test_packing_and_threads_change_no_bit(isa, tiny, texts, pooling):
    options = {"page_size": 16, "cache_tokens": 1024}
    alone = LLM(tiny, prefix_cache=False, **options)
    expected = np.stack([alone.embed(ids, pooling=pooling)[0] for ids in texts])
    before = _C.num_threads()
    for threads, tokens in ((1, 512), (2, 7), (3, 64)):
        _C.set_num_threads(threads)
        llm = LLM(tiny, max_batch_tokens=tokens, **options)
        assert llm.embed(texts, pooling=pooling).tobytes() == expected.tobytes()
        assert np.stack(list(llm.embed_stream(iter(texts), pooling=pooling))).tobytes() == expected.tobytes()
        assert llm.embed(texts[::-1], pooling=pooling).tobytes() == expected[::-1].tobytes()
        assert llm._scheduler.is_idle()
        assert llm._runner.decoder.num_free_pages == llm._runner.decoder.num_pages
    _C.set_num_threads(before)


def test_beside_scores_and_texts(tiny, texts):
    """Readings of states, of targets and of logits share steps, pages and the queue."""
    llm = LLM(tiny, page_size=16, cache_tokens=1024, max_batch_tokens=64)
    pairs = [(ids, [1, 2, 3]) for ids in texts]
    expected = llm.embed(texts, pooling="mean"), llm.score(*zip(*pairs, strict=True)), llm.generate(texts[:5])
    states = llm.hidden_states(texts[3]).tobytes()
    vectors, scores = llm.embed_stream(texts, pooling="mean"), llm.score_stream(pairs)
    stream = llm.stream(texts[0])
    rows = []
    for _ in texts:
        rows.append((next(vectors), next(scores), next(stream, None)))
    assert np.stack([row[0] for row in rows]).tobytes() == expected[0].tobytes()
    assert [row[1] for row in rows] == expected[1]
    assert llm.generate(texts[:5]) == expected[2]
    assert llm.hidden_states(texts[3]).tobytes() == states


def test_embeddings_start_from_the_cache(tiny):
    llm = LLM(tiny, page_size=16, cache_tokens=1024)
    prefix = list(range(100))
    llm.generate([prefix], SamplingParams(max_tokens=1))
    before = llm.explain().profile["num_tokens"]
    llm.embed([[*prefix, 5, 6]])
    assert llm.explain().profile["num_tokens"] == before + 6
    llm.embed([[*prefix, 5, 6]], pooling="mean")
    assert llm.explain().profile["num_tokens"] == before + 6 + 102


def test_bad_requests(tiny):
    llm = LLM(tiny, page_size=16, cache_tokens=64)
    assert llm.embed([]).shape == (0, 64)
    assert llm.embed("ab").shape == llm.embed([5, 6]).shape == (1, 64)
    assert llm.embed([""]).tobytes() == llm.embed([[1]]).tobytes()  # the bos token
    assert llm.hidden_states([]).shape == (0, 64)
    for call, message in (
        (lambda: llm.embed([[1]], pooling="max"), r"^pooling: expected one of last, mean, first, got 'max'$"),
        (lambda: llm.embed([[1]], pooling=None), r"^pooling: expected one of last, mean, first, got None$"),
        (lambda: llm.embed_stream([], pooling=["last"]), r"^pooling: "),
        (lambda: llm.embed([[384]]), r"^prompts\[0\]: expected token ids from 0 to 383, got 384 at 0$"),
        (lambda: llm.embed([[1], [-1]]), r"^prompts\[1\]: expected token ids from 0 to 383, got -1 at 0$"),
        (lambda: llm.embed([[1] * 257]), r"^prompts\[0\]: expected at most 256 tokens, got 257$"),
        (lambda: llm.hidden_states([1] * 257), r"^token_ids: expected at most 256 tokens, got 257$"),
        (lambda: llm.embed([[1]], cache_salt=7), r"^cache_salt: "),
        (lambda: llm.embed([[1]], priority="x"), r"^priority: "),
    ):
        with pytest.raises(ArgumentError, match=message):
            call()
    with pytest.raises(CapacityError, match="a sequence of 100 tokens does not fit into 4 pages"):
        llm.embed([[1] * 100])
    assert llm._scheduler.is_idle()
    assert llm.embed([[1] * 60]).shape == (1, 64)


def test_bad_rows_of_a_native_step(tiny):
    decoder = LLM(tiny)._runner.decoder
    seq = decoder.add_sequence()
    decoder.grow(seq, 2)
    ids, seqs, none = np.array([1, 2], np.int32), np.full(2, seq, np.int32), np.empty(0, np.int32)

    def step(rows, out):
        decoder.step(ids, seqs, none, hidden_rows=np.array(rows, np.int32), hidden=out)

    for rows, out, message in (
        ([2], np.empty((1, 64), np.float32), r"hidden_rows: expected 0 to 1, got 2 at 0"),
        ([-1], np.empty((1, 64), np.float32), r"hidden_rows: expected 0 to 1, got -1 at 0"),
        ([0, 1, 0], np.empty((3, 64), np.float32), r"hidden_rows: expected at most 2, one per token, got 3"),
        ([0], np.empty((1, 63), np.float32), r"hidden: expected"),
        ([0], np.empty((1, 64), np.float64), r"hidden: expected"),
        ([0], None, r"hidden: expected an output exactly when there are hidden_rows"),
    ):
        with pytest.raises(ArgumentError, match=message):
            step(rows, out)
    out = np.empty((2, 64), np.float32)
    step([1, 1], out)
    assert out[0].tobytes() == out[1].tobytes()


def test_embeddings_with_adapters(tiny, spec, tmp_path):
    """One for all or one per text; they share steps with others, and no pages."""
    llm = LLM(tiny, page_size=16, cache_tokens=1024)
    texts = [random_ids(50, 1)] * 4
    llm.load_adapter("a", write_random_adapter(tmp_path / "a", spec, seed=1))
    llm.load_adapter("b", write_random_adapter(tmp_path / "b", spec, seed=2))
    names = [None, "a", "b", "a"]
    vectors = llm.embed(texts, adapter=names)
    assert len({vector.tobytes() for vector in vectors}) == 3
    assert vectors[1].tobytes() == vectors[3].tobytes()
    for name, vector in zip(names, vectors, strict=True):
        assert llm.embed(texts[:1], adapter=name)[0].tobytes() == vector.tobytes()
        assert next(llm.embed_stream(texts, adapter=name)).tobytes() == vector.tobytes()
        state = llm.hidden_states(texts[0], adapter=name)[-1].astype(np.float64)
        np.testing.assert_allclose(state / np.sqrt((state**2).sum()), vector, rtol=1e-6)
    assert list(llm.score_stream([(texts[0], [1, 2])], adapter="a")) == llm.score(texts[:1], [[1, 2]], adapter=["a"])
    with pytest.raises(ArgumentError, match=r"^adapter: expected one, or 4, one per prompt, got 1$"):
        llm.embed(texts, adapter=["a"])
    with pytest.raises(ArgumentError, match=r"^adapter: expected the name of a loaded adapter"):
        llm.embed_stream(texts, adapter="c")
