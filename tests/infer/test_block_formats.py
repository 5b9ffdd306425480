"""Models whose matrices are in every block format of GGUF, alone and mixed."""

import ctypes

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from infer.batches import assert_same, run_batch, sequences  # noqa: E402

from pyengine import _C, LLM, SamplingParams  # noqa: E402
from pyengine.errors import BackendUnavailable, ModelFileError  # noqa: E402
from pyengine.formats import GgufTensor, open_gguf, write_gguf  # noqa: E402
from pyengine.formats.quantizers import QUANTIZERS  # noqa: E402
from pyengine.models import from_pretrained  # noqa: E402
from pyengine.quant import quantize_to_gguf  # noqa: E402
from pyengine.testing.blocks import random_blocks, scale_offsets  # noqa: E402
from pyengine.testing.random_model import make_spec, write_model  # noqa: E402

pytestmark = pytest.mark.train

FORMATS = list(_C.block_formats())
SUPER = [name for name, (block_size, *_) in _C.block_formats().items() if block_size == 256]
# Every slot of a layer in parts of several formats: the sums of x for three of them share one workspace.
MIXED = {
    "token_embd": "q6_k", "attn_q": "q2_k", "attn_k": "q4_1", "attn_v": "q4_k", "attn_output": "iq4_xs",
    "ffn_gate": "q3_k", "ffn_up": "q5_1", "ffn_down": "q5_k",
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A GGUF file in float32 whose matrices have rows of a multiple of 256."""
    folder = tmp_path_factory.mktemp("dense")
    spec = make_spec(hidden_size=256, intermediate_size=512, head_dim=32, num_heads=8, num_kv_heads=4)
    out = folder / "model.gguf"
    quantize_to_gguf(write_model(folder / "model", spec), out, weights="float32", embedding="float32")
    return out


def random_rows(block_format, shape, rng_seed):
    """Random blocks whose weights have a standard deviation of about 0.3, as those of `write_model`."""
    torch.manual_seed(rng_seed)
    raw = random_blocks(block_format, *shape).numpy()
    kind = gguf.GGMLQuantizationType[block_format.upper()]
    # Halves of the scales are what makes weights smaller; a power of two keeps them exact.
    size = 2.0 ** np.round(np.log2(0.3 / gguf.quants.dequantize(raw, kind).std()))
    blocks = raw.reshape(-1, _C.block_formats()[block_format][1])
    for at in scale_offsets(block_format):
        half = blocks[:, at : at + 2].copy().view(np.float16)
        blocks[:, at : at + 2] = (half * np.float16(size)).view(np.uint8)
    return raw


def in_blocks(dense, folder, formats):
    """(the file with its matrices replaced by random blocks of the formats, the same weights in float32)."""
    source = open_gguf(dense)
    blocks, floats = {}, {}
    for seed, name in enumerate(source):
        shape = source.info(name).shape
        blocks[name] = floats[name] = source[name]
        if len(shape) == 2:
            block_format = formats[name.split(".")[-2]] if isinstance(formats, dict) else formats
            raw = random_rows(block_format, shape, seed)
            blocks[name] = GgufTensor(raw, block_format.upper(), shape)
            floats[name] = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[block_format.upper()])
    for file, tensors in (("blocks.gguf", blocks), ("floats.gguf", floats)):
        write_gguf(folder / file, source.metadata, tensors, source.metadata_types)
    return folder / "blocks.gguf", folder / "floats.gguf"


@pytest.mark.parametrize("formats", [*FORMATS, MIXED], ids=[*FORMATS, "mixed"])
def test_computes_what_the_same_weights_in_float32_compute(dense, tmp_path, formats):
    blocks, floats = in_blocks(dense, tmp_path, formats)
    llm, peer = LLM(blocks, cache_tokens=1024), LLM(floats, cache_tokens=1024)
    wanted = set(formats.values()) if isinstance(formats, dict) else {formats}
    assert set(llm.explain().weight_formats) == wanted
    ids = np.random.default_rng(1).integers(0, 384, 90).tolist()
    got, expected = llm.logits(ids), peer.logits(ids)
    # Sums in another order: a millionth of the largest logit per sum, over tens of sums in a row.
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    params = SamplingParams(max_tokens=64, ignore_eos=True)
    prompts = [ids[:1], ids[:40]]
    ours, theirs = llm.generate(prompts, params), peer.generate(prompts, params)
    assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
    assert len({token for c in ours for token in c.token_ids}) > 4, "degenerate text tests nothing"


@pytest.mark.parametrize("formats", [*FORMATS, MIXED], ids=[*FORMATS, "mixed"])
def test_int8_activations_stay_close(dense, tmp_path, formats):
    blocks, _ = in_blocks(dense, tmp_path, formats)
    ids = np.random.default_rng(1).integers(0, 384, 90).tolist()
    exact, fast = LLM(blocks).logits(ids), LLM(blocks, mode="fast").logits(ids)
    # Rounding moves these logits by some hundredths of their size; a wrong sum or scale by the whole.
    assert 0 < (fast - exact).std() < 0.2 * exact.std()


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_batch_chunk_and_threads_change_no_bit(dense, tmp_path, mode):
    blocks, _ = in_blocks(dense, tmp_path, MIXED)
    llm = LLM(blocks, mode=mode, threads=1, cache_tokens=8192)
    batch = sequences(16)
    alone = [run_batch(llm, [ids], chunk=512)[0] for ids in batch]
    assert_same(run_batch(llm, batch, chunk=64), alone)
    for chunk in (1, 7):
        assert_same(run_batch(llm, batch[:6], chunk=chunk), alone[:6])
    before = _C.num_threads()
    try:
        _C.set_num_threads(3)
        assert_same(run_batch(llm, batch[:7], chunk=64), alone[:7])
    finally:
        _C.set_num_threads(before)


# Name of a mixture of llama.cpp and its number there.
MIXTURES = {
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_M": 12,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_files_of_llama_cpp_compute_what_it_computes(dense, tmp_path, mixture):
    """It rounds activations to int8 always, so it may be as far from exact products as our own int8 ones are."""
    llama_cpp = pytest.importorskip("llama_cpp")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = MIXTURES[mixture], 1
    out = tmp_path / "model.gguf"
    assert llama_cpp.llama_model_quantize(str(dense).encode(), str(out).encode(), ctypes.byref(params)) == 0
    float32 = llama_cpp.GGML_TYPE_F32
    peer = llama_cpp.Llama(
        str(out), n_ctx=256, n_threads=1, logits_all=True, type_k=float32, type_v=float32, verbose=False
    )
    ids = np.random.default_rng(1).integers(0, 384, 90).tolist()
    peer.eval(ids)
    theirs = np.array(peer.scores[: len(ids)])
    exact, fast = LLM(out).logits(ids), LLM(out, mode="fast").logits(ids)
    assert mixture.lower().removesuffix("_m") in LLM(out).explain().weight_formats
    assert (theirs - exact).std() < 1.5 * (fast - exact).std()


@pytest.mark.parametrize("block_format", QUANTIZERS)
def test_a_written_file_gives_the_bits_of_converted_weights(dense, tmp_path, block_format):
    out = tmp_path / "model.gguf"
    quantize_to_gguf(dense, out, weights=block_format, embedding=block_format)
    ids = np.random.default_rng(1).integers(0, 384, 40).tolist()
    written, converted = LLM(out), LLM(dense, weights=block_format)
    assert set(written.explain().weight_formats) == {block_format}
    assert written.logits(ids).tobytes() == converted.logits(ids).tobytes()


def test_a_type_without_kernels_is_named_with_those_that_have_some(dense, tmp_path):
    source = open_gguf(dense)
    shape = source.info("blk.0.attn_q.weight").shape
    raw = GgufTensor(np.zeros((shape[0], shape[1] // 256 * 110), np.uint8), "IQ3_S", shape)
    path = tmp_path / "model.gguf"
    write_gguf(path, source.metadata, dict(source) | {"blk.0.attn_q.weight": raw}, source.metadata_types)
    with pytest.raises(BackendUnavailable, match=r"is stored as iq3_s, which is not read; expected .*float16") as error:
        LLM(path)
    assert all(name in str(error.value) for name in FORMATS)


@pytest.mark.parametrize("shape", [(513,), (8, 1)])
def test_factors_of_rotary_frequencies_are_bounded(dense, tmp_path, shape):
    source = open_gguf(dense)
    path = tmp_path / "model.gguf"
    tensors = dict(source) | {"rope_freqs.weight": np.ones(shape, np.float32)}
    write_gguf(path, source.metadata, tensors, source.metadata_types)
    for load in (LLM, from_pretrained):
        with pytest.raises(ModelFileError, match=r"'rope_freqs.weight': expected one dimension of at most 512, got "):
            load(path)


@pytest.mark.parametrize("block_format", SUPER)
def test_rows_that_do_not_fit_their_format_are_refused(tmp_path, block_format):
    """A writer cannot make such a file: one of 256 columns says that it has 288."""
    _, block_bytes, _ = _C.block_formats()[block_format]
    raw = GgufTensor(np.zeros(2 * block_bytes, np.uint8), block_format.upper(), (2, 256))
    path = tmp_path / "f.gguf"
    write_gguf(path, {"general.architecture": "llama"}, {"token_embd.weight": raw})
    content = path.read_bytes()
    shape = np.array([256, 2]).tobytes()
    assert content.count(shape) == 1
    path.write_bytes(content.replace(shape, np.array([288, 2]).tobytes()))
    with pytest.raises(ModelFileError, match="256"):
        LLM(path)
