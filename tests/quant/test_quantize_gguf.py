"""The written file against the source, the `gguf` package, transformers and `LLM` over the source."""

import json
import os
import shutil

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader

from pyengine import LLM, SamplingParams
from pyengine.errors import ArgumentError, BackendUnavailable, CapacityError, ModelFileError
from pyengine.formats import GgufTensor, open_gguf, open_safetensors, write_gguf, write_safetensors
from pyengine.ledger import content_id
from pyengine.quant import quantize_to_gguf
from pyengine.spec import FactorScaling, LinearScaling, Llama3Scaling, RopeSpec
from pyengine.testing.random_model import make_spec, write_model
from pyengine.testing.smollm2 import smollm2_gguf

TYPES = {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_1": "Q4_1", "q4_0": "Q4_0"}
FILE_TYPES = {"float32": 0, "bfloat16": 32, "q8_0": 7, "q4_1": 3, "q4_0": 2}
IDS = [(7 * i + 3) % 384 for i in range(70)]
GREEDY = SamplingParams(max_tokens=30, ignore_eos=True)
LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Untied, heads of 32, three of them to one kv head."""
    spec = make_spec(num_heads=3, num_kv_heads=1, head_dim=32, hidden_size=96, tie_word_embeddings=False)
    return write_model(tmp_path_factory.mktemp("quant") / "model", spec)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("quant") / "tied", make_spec(), ml_dtypes.bfloat16, seed=1)


@pytest.fixture(scope="module")
def smollm2_copy(tmp_path_factory):
    """SmolLM2, written in the formats that it has."""
    out = tmp_path_factory.mktemp("quant") / "smollm2.gguf"
    quantize_to_gguf(smollm2_gguf(), out, weights="q4_1", embedding="q8_0")
    return out


def gguf_name(name):
    """The names of llama.cpp's converter."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)
    return table.get_name(name, try_suffixes=(".weight",))


def permuted(rows, num_heads):
    """As llama.cpp's converter permutes q and k."""
    return rows.reshape(num_heads, 2, len(rows) // num_heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def source_tensors(path, spec):
    """GGUF name -> float32 values of a folder in the order of GGUF."""
    tensors = {}
    for name, values in open_safetensors(path / "model.safetensors").items():
        values = values.astype(np.float32)
        for part, num_heads in (("q_proj", spec.num_heads), ("k_proj", spec.num_kv_heads)):
            if part in name:
                values = permuted(values, num_heads)
        tensors[gguf_name(name)] = values
    return tensors


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("embedding", ["q8_0", "float32"])
def test_file_is_what_the_gguf_package_reads_and_quantises(folder, tmp_path, weights, embedding):
    out = tmp_path / "out.gguf"
    result = quantize_to_gguf(folder, out, weights=weights, embedding=embedding)
    other, ours = GGUFReader(out), open_gguf(out)
    spec = LLM(folder).spec
    expected = source_tensors(folder, spec)
    assert {tensor.name for tensor in other.tensors} == set(ours) == set(expected)
    for tensor in other.tensors:
        values = expected[tensor.name]
        is_embedding = tensor.name in ("token_embd.weight", "output.weight")
        kind = "F32" if values.ndim == 1 else TYPES[embedding if is_embedding else weights]
        assert tensor.tensor_type == GGMLQuantizationType[kind]
        assert tuple(reversed(tensor.shape.tolist())) == values.shape
        blocks = gguf.quants.quantize(values, tensor.tensor_type)
        assert tensor.data.tobytes() == blocks.tobytes(), tensor.name
        dequantized = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)
        assert np.array_equal(ours.dequantize(tensor.name), dequantized)
    fields = {key: field.contents() for key, field in other.fields.items() if not key.startswith("GGUF.")}
    metadata = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in ours.metadata.items()}
    assert fields == metadata
    assert fields["general.file_type"] == gguf.LlamaFileType(FILE_TYPES[weights])
    assert fields["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    assert fields["general.name"] == "model"
    assert fields["llama.attention.head_count_kv"] == 1
    assert fields["tokenizer.chat_template"] == (folder / "chat_template.jinja").read_text()
    assert (result.weights, result.embedding) == (weights, embedding)
    assert result.num_parameters == sum(values.size for values in expected.values())
    assert result.num_bytes == os.path.getsize(out)
    assert result.bits_per_weight == 8 * os.path.getsize(out) / result.num_parameters
    assert result.content_id == content_id(out)


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("model", ["folder", "tied"])
def test_logits_are_those_of_the_folder_quantised_at_load(request, tmp_path, weights, model):
    path = request.getfixturevalue(model)
    quantize_to_gguf(path, tmp_path / "out.gguf", weights=weights, embedding=weights)
    expected, written = LLM(path, weights=weights), LLM(tmp_path / "out.gguf")
    assert set(written.explain().weight_formats) == {weights}
    assert np.array_equal(written.logits(IDS), expected.logits(IDS))
    prompts = ["the quick brown", "naïve café 42"]
    assert written.generate(prompts, GREEDY) == expected.generate(prompts, GREEDY)
    messages = [{"role": "user", "content": "hi"}]
    assert written.chat(messages, GREEDY) == expected.chat(messages, GREEDY)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_float32_file_is_the_folder(tmp_path, dtype):
    """No rounding, so a wrong order of rows is the only way to other bits."""
    path = write_model(tmp_path / "model", make_spec(num_heads=4, num_kv_heads=4, head_dim=32), dtype, seed=3)
    quantize_to_gguf(path, tmp_path / "out.gguf", weights="float32", embedding="float32")
    assert np.array_equal(LLM(tmp_path / "out.gguf").logits(IDS), LLM(path, weights="float32").logits(IDS))


def test_mixed_formats_are_both_kept(folder, tmp_path):
    quantize_to_gguf(folder, tmp_path / "out.gguf", weights="q4_0", embedding="bfloat16")
    written = LLM(tmp_path / "out.gguf")
    assert written.explain().weight_formats == {"bfloat16": 2, "q4_0": 14}
    scale = np.abs(LLM(folder).logits(IDS)).max()
    assert 0 < np.abs(written.logits(IDS) - LLM(folder).logits(IDS)).max() < scale


def test_search_lowers_the_error_of_every_matrix(tied, tmp_path):
    quantize_to_gguf(tied, tmp_path / "plain.gguf", weights="q4_1", embedding="q4_0")
    quantize_to_gguf(tied, tmp_path / "search.gguf", weights="q4_1", embedding="q4_0", search=True)
    plain, search = open_gguf(tmp_path / "plain.gguf"), open_gguf(tmp_path / "search.gguf")
    for name, values in source_tensors(tied, make_spec()).items():
        errors = [np.square(file.dequantize(name).astype(np.float64) - values).sum() for file in (plain, search)]
        assert errors[1] < errors[0] if values.ndim == 2 else errors == [0, 0]


def test_matrices_larger_than_one_portion_are_whole(tied, tmp_path, monkeypatch):
    quantize_to_gguf(tied, tmp_path / "whole.gguf")
    monkeypatch.setattr("pyengine.quant.gguf._CHUNK_VALUES", 7 * 64)
    quantize_to_gguf(tied, tmp_path / "parts.gguf")
    assert (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


# --- a GGUF file as the source ------------------------------------------------------------------------------------


def test_copy_of_a_gguf_file_has_its_tensors_and_metadata(smollm2_copy):
    source, copy = open_gguf(smollm2_gguf()), open_gguf(smollm2_copy)
    assert set(copy) == set(source)
    for name in source:
        assert copy.info(name)._replace(offset=0) == source.info(name)._replace(offset=0)
        assert bytes(copy.data(name)) == bytes(source.data(name)), name
    for key, value in source.metadata.items():
        assert np.array_equal(copy.metadata[key], value), key
        assert copy.metadata_types[key] == source.metadata_types[key]
    added = {"llama.attention.key_length", "llama.attention.value_length"}
    assert copy.metadata.keys() - source.metadata.keys() == added


def test_copy_of_a_gguf_file_gives_its_logits_and_text(smollm2_copy):
    source, copy = LLM(smollm2_gguf(), max_context=256), LLM(smollm2_copy, max_context=256)
    ids = source.tokenizer.encode("A model file holds weights, and says what they are.")
    assert np.array_equal(copy.logits(ids), source.logits(ids))
    messages = [{"role": "user", "content": "Name a colour."}]
    params = SamplingParams(max_tokens=8)
    assert copy.chat(messages, params) == source.chat(messages, params)


def test_other_formats_from_a_gguf_file(folder, tmp_path):
    """Through float32 in GGUF, the same file as from the folder but for the name that it gives itself."""
    quantize_to_gguf(folder, tmp_path / "model", weights="float32", embedding="float32")
    quantize_to_gguf(tmp_path / "model", tmp_path / "two.gguf", weights="q4_0", embedding="q8_0")
    quantize_to_gguf(folder, tmp_path / "one.gguf", weights="q4_0", embedding="q8_0")
    one, two = open_gguf(tmp_path / "one.gguf"), open_gguf(tmp_path / "two.gguf")
    assert list(one) == list(two)
    assert all(bytes(one.data(name)) == bytes(two.data(name)) for name in one)
    assert one.metadata.keys() == two.metadata.keys()
    assert all(np.array_equal(value, two.metadata[key]) for key, value in one.metadata.items())


def test_a_file_may_replace_its_source(tied, tmp_path):
    path = tmp_path / "model.gguf"
    quantize_to_gguf(tied, path, weights="bfloat16", embedding="bfloat16")
    quantize_to_gguf(tied, tmp_path / "expected.gguf", weights="q4_1", embedding="q4_1")
    quantize_to_gguf(path, path, weights="q4_1", embedding="q4_1")
    assert np.array_equal(LLM(path).logits(IDS), LLM(tmp_path / "expected.gguf").logits(IDS))
    assert sorted(os.listdir(tmp_path)) == ["expected.gguf", "model.gguf"]


# --- rope ---------------------------------------------------------------------------------------------------------


def test_linear_scaling_is_kept(tmp_path):
    rope = RopeSpec(theta=5000.0, scaling=LinearScaling(factor=4.0))
    path = write_model(tmp_path / "model", make_spec(rope=rope))
    quantize_to_gguf(path, tmp_path / "out.gguf", weights="float32", embedding="float32")
    written = LLM(tmp_path / "out.gguf")
    assert written.spec.rope == rope
    assert np.array_equal(written.logits(IDS), LLM(path).logits(IDS))


def test_llama3_scaling_becomes_factors(tmp_path):
    path = write_model(tmp_path / "model", make_spec(rope=RopeSpec(theta=5e5, scaling=LLAMA3)))
    quantize_to_gguf(path, tmp_path / "out.gguf", weights="float32", embedding="float32")
    written, expected = LLM(tmp_path / "out.gguf"), LLM(path)
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out.gguf").tensors}["rope_freqs.weight"]
    assert stored.tensor_type == GGMLQuantizationType.F32
    assert isinstance(written.spec.rope.scaling, FactorScaling)
    assert written.spec.rope.scaling.factors == tuple(stored.data.tolist())
    assert stored.data.min() == 1.0
    assert stored.data.max() == 8.0
    # The factors are float32: angles of up to 70 radians are off by less than 70 * 2^-24.
    assert np.allclose(written.spec.inv_freq(), expected.spec.inv_freq(), rtol=2**-23, atol=0)
    scale = np.abs(expected.logits(IDS)).max()
    assert np.abs(written.logits(IDS) - expected.logits(IDS)).max() < 1e-4 * scale
    quantize_to_gguf(tmp_path / "out.gguf", tmp_path / "copy.gguf", weights="float32", embedding="float32")
    assert LLM(tmp_path / "copy.gguf").spec == written.spec


# --- tokenizer ----------------------------------------------------------------------------------------------------

TEXTS = [
    "",
    " ",
    "hello world",
    "a1b22 333",
    "naïve café 文字 😀",
    "<|im_start|>user\nhi<|im_end|>",
    "\n\n\t x  y",
    "it's",
]


def test_tokenizer_of_the_file_is_that_of_the_folder(folder, tmp_path):
    quantize_to_gguf(folder, tmp_path / "out.gguf")
    written, expected = LLM(tmp_path / "out.gguf"), LLM(folder)
    lines = [line for path in sorted(folder.parent.rglob("*.json")) for line in path.read_text().splitlines()[:400]]
    for text in [*TEXTS, *lines]:
        ids = expected.tokenizer.encode(text)
        assert written.tokenizer.encode(text) == ids
        assert written.tokenizer.decode(ids) == expected.tokenizer.decode(ids)
    assert written.tokenizer.special_tokens == expected.tokenizer.special_tokens
    messages = [{"role": "user", "content": "hi"}]
    assert written.chat_prompt(messages) == expected.chat_prompt(messages)


def test_rows_without_a_token_become_unused_tokens(tmp_path):
    path = write_model(tmp_path / "model", make_spec(vocab_size=400), num_tokens=390)
    quantize_to_gguf(path, tmp_path / "out.gguf", weights="float32", embedding="float32")
    metadata = open_gguf(tmp_path / "out.gguf").metadata
    assert metadata["tokenizer.ggml.tokens"][390:] == [f"[PAD{i}]" for i in range(390, 400)]
    assert metadata["tokenizer.ggml.token_type"][389:391].tolist() == [1, 5]
    written, expected = LLM(tmp_path / "out.gguf"), LLM(path)
    assert written.tokenizer.encode("x[PAD395]") == expected.tokenizer.encode("x[PAD395]")
    assert np.array_equal(written.logits([395, 1, 399]), expected.logits([395, 1, 399]))


def test_end_tokens_of_tokenizer_and_config_are_both_written(tmp_path):
    path = write_model(tmp_path / "model", make_spec(eos_token_ids=(0,)))
    quantize_to_gguf(path, tmp_path / "out.gguf")
    written = LLM(tmp_path / "out.gguf")
    assert written.spec.eos_token_ids == (2, 0)
    assert written.tokenizer.special_tokens["eos_token"] == "<|im_end|>"


def test_a_folder_without_template_gives_a_file_without(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "model")
    (path / "chat_template.jinja").unlink()
    quantize_to_gguf(path, tmp_path / "out.gguf")
    assert "tokenizer.chat_template" not in open_gguf(tmp_path / "out.gguf").metadata
    with pytest.raises(BackendUnavailable, match="no chat template"):
        LLM(tmp_path / "out.gguf").chat([{"role": "user", "content": "hi"}])


# --- transformers -------------------------------------------------------------------------------------------------


@pytest.mark.train
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("weights", ["float32", "q4_1"])
def test_transformers_reads_the_file(folder, tmp_path, weights):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    quantize_to_gguf(folder, tmp_path / "out.gguf", weights=weights)
    model = transformers.LlamaForCausalLM(
        transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="out.gguf")
    ).eval()
    # What from_pretrained(gguf_file=...) does where accelerate is installed.
    state = load_gguf_checkpoint(tmp_path / "out.gguf", return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0].numpy()
    written = LLM(tmp_path / "out.gguf").logits(IDS)
    assert np.abs(logits - written).max() < 1e-4 * np.abs(written).max()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.get_vocab() == transformers.AutoTokenizer.from_pretrained(folder).get_vocab()


# --- progress and errors ------------------------------------------------------------------------------------------


def test_progress_counts_every_parameter(tied, tmp_path):
    calls = []
    result = quantize_to_gguf(tied, tmp_path / "out.gguf", progress=lambda *call: calls.append(call))
    assert calls[0] == ("token_embd.weight", 0, result.num_parameters)
    assert calls[-1] == ("output_norm.weight", result.num_parameters, result.num_parameters)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert {name for name, _, _ in calls} == set(open_gguf(tmp_path / "out.gguf"))


def check_error(kind, match, path, out, **options):
    before = sorted(os.listdir(out.parent)) if out.parent.is_dir() else None
    with pytest.raises(kind, match=match):
        quantize_to_gguf(path, out, **options)
    if before is not None:
        assert sorted(os.listdir(out.parent)) == before


@pytest.mark.parametrize("argument", ["weights", "embedding"])
def test_unknown_format(tied, tmp_path, argument):
    check_error(
        ArgumentError, f"^{argument}: expected one of .*q4_1.*'q3_k'", tied, tmp_path / "o", **{argument: "q3_k"}
    )


def test_rows_that_do_not_divide_into_blocks(tmp_path):
    path = write_model(tmp_path / "model", make_spec(intermediate_size=168))
    out = tmp_path / "out.gguf"
    check_error(ArgumentError, "^weights: q4_1 .* multiple of 32 values, got 168 in .*down_proj", path, out)
    path = write_model(tmp_path / "narrow", make_spec(hidden_size=48, num_heads=3, num_kv_heads=1, head_dim=16))
    check_error(ArgumentError, "^embedding: q8_0 .* got 48 in model.embed_tokens", path, out, weights="float32")
    quantize_to_gguf(path, out, weights="float32", embedding="bfloat16")


def test_sliding_window(tmp_path):
    path = write_model(tmp_path / "model", make_spec(sliding_window=32))
    check_error(ArgumentError, "^sliding_window: expected None.* got 32", path, tmp_path / "out.gguf")


def test_more_end_tokens_than_a_file_can_say(tmp_path):
    path = write_model(tmp_path / "model", make_spec(eos_token_ids=(0, 1)))
    check_error(ArgumentError, r"^eos_token_ids: expected at most 2.*\[2, 0, 1\]", path, tmp_path / "out.gguf")


def test_more_tokens_than_rows(tmp_path):
    path = write_model(tmp_path / "model", make_spec(vocab_size=350), num_tokens=384)
    check_error(ModelFileError, "expected at most 350 ids.* got 384", path, tmp_path / "out.gguf")


def test_unknown_pre_tokenizer(tied, tmp_path):
    path = shutil.copytree(tied, tmp_path / "model")
    description = json.loads((path / "tokenizer.json").read_text())
    description["pre_tokenizer"] = {"type": "Whitespace"}
    (path / "tokenizer.json").write_text(json.dumps(description))
    check_error(
        BackendUnavailable, "pre_tokenizer: .*'smollm'.*got {'type': 'Whitespace'}", path, tmp_path / "out.gguf"
    )


def test_paths_that_cannot_be_written(tied, tmp_path):
    check_error(ArgumentError, "^out: .*No such file", tied, tmp_path / "none" / "out.gguf")
    (tmp_path / "folder").mkdir()
    check_error(ArgumentError, "^out: expected a file.* got the folder", tied, tmp_path / "folder")
    (tmp_path / "file").write_text("")
    check_error(ArgumentError, "^out: .*Not a directory", tied, tmp_path / "file" / "out.gguf")


def test_full_disk(tied, tmp_path, monkeypatch):
    def full(path, *arguments):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr("pyengine.quant.gguf.write_gguf", full)
    check_error(CapacityError, "^out: .*No space left", tied, tmp_path / "out.gguf")


def test_weights_that_are_not_finite(tied, tmp_path):
    path = shutil.copytree(tied, tmp_path / "model")
    tensors = dict(open_safetensors(tied / "model.safetensors"))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][5, 5] = np.nan
    write_safetensors(path / "model.safetensors", tensors)
    (tmp_path / "out.gguf").write_bytes(b"old")
    check_error(ModelFileError, f"{name}.*expected finite values", path, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == b"old"


def test_stored_format_that_is_not_read(tied, tmp_path):
    quantize_to_gguf(tied, tmp_path / "model.gguf", weights="float32", embedding="float32")
    file = open_gguf(tmp_path / "model.gguf")
    tensors = dict(file)
    tensors["blk.0.attn_q.weight"] = GgufTensor(np.zeros(64 * 2 * 17, np.uint8), "MXFP4", (64, 64))
    write_gguf(tmp_path / "mxfp4.gguf", file.metadata, tensors, file.metadata_types)
    check_error(BackendUnavailable, "MXFP4", tmp_path / "mxfp4.gguf", tmp_path / "out.gguf")


def test_missing_model(tmp_path):
    check_error(ModelFileError, "none.gguf", tmp_path / "none.gguf", tmp_path / "out.gguf")
