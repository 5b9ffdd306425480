"""Adapters on disk: what is read, and what is refused, with the key or the tensor that is wrong."""

import json
import time

import ml_dtypes
import numpy as np
import pytest

from pyengine.adapters import AdapterConfig, linear_modules, read_adapter, write_adapter
from pyengine.errors import ArgumentError, BackendUnavailable, ModelFileError
from pyengine.families import spec_from_config
from pyengine.formats import open_safetensors, write_safetensors
from pyengine.testing.random_adapter import write_random_adapter
from pyengine.testing.random_model import make_spec

SPEC = make_spec()
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    return write_random_adapter(tmp_path / "a", SPEC, target_modules=("q_proj", "down_proj"), rank=4, alpha=6.0)


def edit_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = {name: np.array(value) for name, value in open_safetensors(path).items()}
    change(tensors)
    write_safetensors(path, tensors)


def test_reads_what_it_writes(tmp_path):
    config = AdapterConfig(
        rank=5,
        alpha=7.5,
        use_rslora=True,
        target_modules=("k_proj", "up_proj"),
        rank_pattern={"layers.1.mlp.up_proj": 3},
        alpha_pattern={"k_proj": 2.0},
        dropout=0.1,
    )
    modules = linear_modules(SPEC)
    weights = {}
    for i, name in enumerate(config.targets(modules)):
        rank = config.rank_of(name)
        a = np.full((rank, modules[name].num_inputs), i, ml_dtypes.bfloat16 if i % 2 else np.float32)
        weights[name] = a, np.full((modules[name].num_outputs, rank), -i, np.float32)
    write_adapter(tmp_path, SPEC, config, weights)
    read = read_adapter(tmp_path, SPEC)
    assert read.config == config
    assert read.rank == 5
    assert {m.module.name for m in read.modules} == set(weights)
    for m in read.modules:
        a, b = weights[m.module.name]
        assert m.a.dtype == a.dtype
        assert np.array_equal(m.a, a)
        assert np.array_equal(m.b, b)
    scales = {m.module.name.removeprefix("model.layers."): m.scale for m in read.modules}
    assert scales == {
        "0.self_attn.k_proj": 2.0 / 5**0.5,
        "1.self_attn.k_proj": 2.0 / 5**0.5,
        "0.mlp.up_proj": 7.5 / 5**0.5,
        "1.mlp.up_proj": 7.5 / 3**0.5,
    }


def test_the_first_pattern_counts():
    config = AdapterConfig(
        rank_pattern={"q_proj": 2, "layers.0.self_attn.q_proj": 3, "^model.layers.1.self_attn.k_proj": 4}
    )
    assert config.rank_of("model.layers.0.self_attn.q_proj") == 2
    assert config.rank_of("model.layers.1.self_attn.k_proj") == 4
    assert config.rank_of("other.model.layers.1.self_attn.k_proj") == 8
    assert AdapterConfig(rank_pattern={"proj": 2}).rank_of("model.layers.0.self_attn.q_proj") == 8


def test_content_id_is_that_of_both_files(folder):
    ids = [read_adapter(folder, SPEC).content_id]
    edit_config(folder, lora_alpha=7.0)
    ids.append(read_adapter(folder, SPEC).content_id)
    edit_tensors(folder, lambda t: t[f"{Q}.lora_A.weight"].__imul__(2))
    ids.append(read_adapter(folder, SPEC).content_id)
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("task_type", "SEQ_CLS"),
        ("bias", "all"),
        ("bias", ["none"]),
        ("use_dora", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("use_qalora", True),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [1]),
        ("target_parameters", ["mlp.w"]),
        ("use_bdlora", {"nblocks": 2}),
        ("a_key_of_the_future", 1),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", 1),
        ("r", 0),
        ("r", 257),
        ("r", True),
        ("r", 4.0),
        ("r", 10**30),
        ("lora_alpha", "8"),
        ("lora_alpha", True),
        ("lora_alpha", 1e300),
        ("lora_dropout", 2),
        ("use_rslora", 1),
        ("target_modules", None),
        ("target_modules", []),
        ("target_modules", [1]),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", "x" * 70000),
        ("target_modules", ["q_proj"]),
        ("target_modules", ["q_proj", "down_proj", "o_proj"]),
        ("target_modules", "all-linear"),
        ("exclude_modules", ["down_proj"]),
        ("layers_to_transform", [0]),
        ("layers_to_transform", ["0"]),
        ("layers_pattern", "blocks"),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"(q|k)_proj": 4}),
        ("rank_pattern", {"(.*)*x": 4}),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": "1"}),
    ],
)
def test_a_config_that_is_not_computed_names_its_key(folder, field, value):
    edit_config(folder, **{field: value})
    with pytest.raises(ModelFileError) as caught:
        read_adapter(folder, SPEC)
    error = caught.value
    expected = "target_modules" if field in ("exclude_modules", "layers_to_transform") else field
    assert error.field.split("[")[0] in (expected, field)
    assert error.path.endswith("adapter_config.json")
    assert "expected" in error.message
    assert len(str(error)) < 1000


@pytest.mark.parametrize("field", ["eva_config", "loftq_config", "runtime_config", "auto_mapping", "peft_version"])
def test_what_only_training_reads_is_left_alone(folder, field):
    before = read_adapter(folder, SPEC)
    edit_config(folder, **{field: {"anything": 1}})
    after = read_adapter(folder, SPEC)
    assert after.config == before.config
    for old, new in zip(before.modules, after.modules, strict=True):
        assert (old.a.tobytes(), old.b.tobytes(), old.scale) == (new.a.tobytes(), new.b.tobytes(), new.scale)


def test_a_regular_expression_is_not_run(folder):
    edit_config(folder, target_modules="(a|a)*" * 1000 + "(.*)*$", exclude_modules="(x+x+)+y")
    begin = time.process_time()
    assert len(read_adapter(folder, SPEC).modules) == 4
    assert time.process_time() - begin < 20


def _rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


HEAD = "base_model.model.lm_head."
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda t: t.pop(A), A),
        (lambda t: t.pop(B), B),
        (lambda t: t.update({A: t[A][:3]}), A),
        (lambda t: t.update({A: t[A].T.copy()}), A),
        (lambda t: t.update({A: t[A][:, :-1].copy()}), A),
        (lambda t: t.update({B: t[B][:-1]}), B),
        (lambda t: t.update({B: t[B][None]}), B),
        (lambda t: t.update({A: np.zeros((0, 64), np.float32)}), A),
        (lambda t: t.update({A: t[A].astype(np.float64)}), A),
        (lambda t: t.update({A: t[A].astype(np.int32)}), A),
        (lambda t: t[A].__setitem__((1, 2), np.nan), A),
        (lambda t: t[B].__setitem__((1, 2), -np.inf), B),
        (lambda t: t.update({A: np.full(t[A].shape, np.inf, np.float16)}), A),
        (lambda t: t.update({A: np.full(t[A].shape, np.nan, ml_dtypes.bfloat16)}), A),
        (lambda t: _rename(t, A, A.replace("layers.0", "layers.7")), A.replace("layers.0", "layers.7")),
        (lambda t: _rename(t, A, A.replace("q_proj", "qkv_proj")), A.replace("q_proj", "qkv_proj")),
        (lambda t: _rename(t, A, A.replace(".weight", ".default.weight")), A.replace(".weight", ".default.weight")),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": np.ones(64, np.float32)}), f"{Q}.lora_magnitude_vector"),
        (lambda t: t.update({f"{Q}.lora_B.bias": np.ones(64, np.float32)}), f"{Q}.lora_B.bias"),
        (lambda t: t.update({HEAD + "weight": np.ones(4, np.float32)}), HEAD + "weight"),
        (lambda t: t.update({HEAD + "lora_A.weight": np.ones((4, 64), np.float32)}), HEAD + "lora_A.weight"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(folder, change, field):
    edit_tensors(folder, change)
    with pytest.raises(ModelFileError) as caught:
        read_adapter(folder, SPEC)
    assert caught.value.field == field
    assert "expected" in caught.value.message


def test_modules_that_the_config_does_not_name(folder):
    def add(tensors):
        k = Q.replace("q_proj", "k_proj")
        tensors[f"{k}.lora_A.weight"] = np.ones((4, 64), np.float32)
        tensors[f"{k}.lora_B.weight"] = np.ones((32, 4), np.float32)

    edit_tensors(folder, add)
    with pytest.raises(ModelFileError, match=r"'target_modules': expected .*, got one of model\.layers\.0\..*k_proj"):
        read_adapter(folder, SPEC)


def test_an_empty_file(folder):
    edit_config(folder, target_modules="none.of.them")
    edit_tensors(folder, lambda t: t.clear())
    with pytest.raises(ModelFileError, match="expected the adapter of at least one module, got none"):
        read_adapter(folder, SPEC)


def test_files_that_are_missing_or_broken(folder):
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    with pytest.raises(ModelFileError, match="adapter_model"):
        read_adapter(folder, SPEC)
    path.unlink()
    with pytest.raises(ModelFileError, match="adapter_model"):
        read_adapter(folder, SPEC)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelFileError, match="pickles are not read"):
        read_adapter(folder, SPEC)
    for text in ("", "[]", '{"r": NaN}', '{"r": 1, "r": 2}', "[" * 100000):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ModelFileError, match="adapter_config"):
            read_adapter(folder, SPEC)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ModelFileError, match="adapter_config"):
        read_adapter(folder, SPEC)


def test_a_config_full_of_names_costs_little(folder):
    names = [f"n{i}" for i in range(65534)]
    patterns = dict.fromkeys(names, 4)
    edit_config(folder, target_modules=[*names, "q_proj", "down_proj"], rank_pattern=patterns, alpha_pattern=patterns)
    begin = time.process_time()
    assert len(read_adapter(folder, SPEC).modules) == 4
    assert time.process_time() - begin < 20


def spec_of(model_type):
    return spec_from_config(
        {
            "model_type": model_type,
            "vocab_size": 384,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        }
    )


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gpt2", "whose MLP has a gate, got one of gpt2 without"),
        ("gpt_neox", "whose MLP has a gate, got one of gpt_neox without"),
        ("falcon", "whose MLP has a gate, got one of falcon without"),
        ("starcoder2", "whose MLP has a gate, got one of starcoder2 without"),
        ("cohere", "rows in order, got one of cohere,"),
        ("cohere2", "rows in order, got one of cohere2,"),
    ],
)
def test_a_family_without_adapters_says_why(folder, model_type, reason):
    with pytest.raises(BackendUnavailable, match=reason):
        linear_modules(spec_of(model_type))
    with pytest.raises(BackendUnavailable, match=reason):
        read_adapter(folder, spec_of(model_type))


@pytest.mark.parametrize(("model_type", "num_modules"), [("stablelm", 14), ("phi3", 8), ("olmo2", 14)])
def test_linear_modules_of_a_family(model_type, num_modules):
    assert len(linear_modules(spec_of(model_type))) == num_modules


def test_write_checks_its_arguments(tmp_path):
    config = AdapterConfig(target_modules=("q_proj",), rank=4)
    names = config.targets(linear_modules(SPEC))
    good = {name: (np.zeros((4, 64), np.float32), np.zeros((64, 4), np.float32)) for name in names}
    for weights, message in [
        ({}, "weights: expected those of"),
        ({names[0]: good[names[0]]}, "weights: expected those of"),
        (good | {names[1]: (good[names[1]][0][:3], good[names[1]][1])}, "of shape .4, 64. .* got .3, 64."),
        (good | {names[1]: (good[names[1]][0].astype(np.float16), good[names[1]][1])}, "got .* in float16"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            write_adapter(tmp_path / "out", SPEC, config, weights)
        assert not (tmp_path / "out").exists()
