import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pyengine.errors import ModelFileError  # noqa: E402
from pyengine.families import family_of, gguf_metadata_from_spec  # noqa: E402
from pyengine.formats import open_gguf, write_gguf  # noqa: E402
from pyengine.models import CausalLM, from_pretrained, save_pretrained  # noqa: E402
from pyengine.spec import Llama3Scaling, ModelSpec, RopeSpec  # noqa: E402
from pyengine.testing import assert_same_bits  # noqa: E402
from pyengine.testing.tiny import tiny_llama  # noqa: E402

pytestmark = pytest.mark.train


def spec_of(**overrides):
    values = {
        "family": "llama",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "norm_eps": 1e-5,
        "rope": RopeSpec(theta=10000.0),
        "tie_word_embeddings": False,
        "eos_token_ids": (2,),
    }
    return ModelSpec(**(values | overrides))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_keeps_every_bit(tmp_path, tied, dtype):
    model = CausalLM(spec_of(tie_word_embeddings=tied), dtype=dtype, seed=5)
    save_pretrained(model, tmp_path / "model")
    again = from_pretrained(tmp_path / "model", dtype=dtype)
    assert again.spec == model.spec
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert_same_bits(again.state_dict()[name], value)
    assert all(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_what_we_save(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    model = CausalLM(spec_of(tie_word_embeddings=tied), seed=5)
    model.save_pretrained(tmp_path)
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert peer.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert_same_bits(peer.state_dict()[name], value)
    input_ids = torch.randint(96, (2, 17))
    torch.testing.assert_close(model(input_ids), peer(input_ids).logits, rtol=1e-5, atol=1e-6)


def test_transformers_keeps_bfloat16(tmp_path):
    transformers = pytest.importorskip("transformers")
    CausalLM(spec_of(), dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_sharded_folder_equals_the_whole(tmp_path):
    transformers = pytest.importorskip("transformers")
    whole = tiny_llama(tmp_path / "whole")
    peer = transformers.LlamaForCausalLM.from_pretrained(whole)
    peer.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    model, sharded = from_pretrained(whole), from_pretrained(tmp_path / "shards")
    for name, value in model.state_dict().items():
        assert_same_bits(sharded.state_dict()[name], value)


def write_tiny_gguf(path, model):
    """Every weight in float32, with the q and k rows in the order of GGUF."""
    family = family_of(model.spec)
    names = family.gguf_tensor_names(model.spec)
    tensors = {}
    for name, value in model.state_dict().items():
        array, order = value.numpy(), family.gguf_row_order(model.spec, name)
        tensors[names[name]] = array if order is None else array[np.argsort(order)]
    tensors |= family.gguf_rope_factors(model.spec)
    write_gguf(path, gguf_metadata_from_spec(model.spec), tensors)


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_of_float32_gives_the_same_logits(tmp_path, tied):
    scaling = Llama3Scaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
    spec = spec_of(tie_word_embeddings=tied, rope=RopeSpec(theta=10000.0, scaling=None if tied else scaling))
    model = CausalLM(spec, seed=5)
    write_tiny_gguf(tmp_path / "model.gguf", model)
    again = from_pretrained(tmp_path / "model.gguf")
    for name, value in model.state_dict().items():
        assert_same_bits(again.state_dict()[name], value)
    input_ids = torch.randint(96, (1, 40))
    if tied:
        assert_same_bits(again(input_ids), model(input_ids))
    else:
        torch.testing.assert_close(again(input_ids), model(input_ids), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_quantised_gguf_equals_the_gguf_package(tmp_path):
    gguf = pytest.importorskip("gguf")
    from pyengine.testing.smollm2 import smollm2_gguf
    from pyengine.tokenizer import Tokenizer

    reader = gguf.GGUFReader(smollm2_gguf())
    stored = {tensor.name: tensor for tensor in reader.tensors}
    model = from_pretrained(smollm2_gguf())
    heads = {"q_proj": model.spec.num_heads, "k_proj": model.spec.num_kv_heads}
    for name, gguf_name in family_of(model.spec).gguf_tensor_names(model.spec).items():
        expected = gguf.dequantize(stored[gguf_name].data, stored[gguf_name].tensor_type)
        part = name.split(".")[-2]
        if part in heads:
            expected = expected.reshape(heads[part], -1, 2, expected.shape[-1]).swapaxes(1, 2).reshape(expected.shape)
        assert_same_bits(model.state_dict()[name], torch.from_numpy(np.array(expected, order="C")))
    tokenizer = Tokenizer.from_gguf(open_gguf(smollm2_gguf()).metadata)
    with torch.no_grad():
        logits = model(torch.tensor(tokenizer.encode("The capital of France is")))
    assert tokenizer.decode([int(logits[-1].argmax())]) == " Paris"


def _damage(folder, name=None, *, drop=None, add=None, reshape=None):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    if drop:
        del tensors[drop]
    if add:
        tensors[add] = torch.zeros(3)
    if reshape:
        tensors[reshape] = tensors[reshape][1:].contiguous()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        ({"drop": "model.norm.weight"}, "model.norm.weight"),
        ({"add": "model.extra.weight"}, "model.extra.weight"),
        ({"add": "lm_head.weight"}, "lm_head.weight"),
        ({"reshape": "model.layers.1.mlp.up_proj.weight"}, "model.layers.1.mlp.up_proj.weight"),
    ],
    ids=str,
)
def test_wrong_tensors_name_file_and_tensor(tmp_path, damage, field):
    save_pretrained(CausalLM(spec_of(tie_word_embeddings=True)), tmp_path)
    _damage(tmp_path, **damage)
    with pytest.raises(ModelFileError) as error:
        from_pretrained(tmp_path)
    assert error.value.field == field
    assert str(tmp_path) in str(error.value)


def test_a_tied_head_that_equals_the_embedding_is_accepted(tmp_path):
    from safetensors.torch import load_file, save_file

    save_pretrained(CausalLM(spec_of(tie_word_embeddings=True)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert from_pretrained(tmp_path).spec.tie_word_embeddings


@pytest.mark.parametrize("value", ["../model.safetensors", "/etc/passwd", 7])
def test_an_index_cannot_name_files_elsewhere(tmp_path, value):
    save_pretrained(CausalLM(spec_of()), tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": value}}))
    with pytest.raises(ModelFileError, match="weight_map"):
        from_pretrained(tmp_path)
