"""`ModelSpec`: validation, exact round trips, shapes and frequencies against transformers."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyengine.errors import ArgumentError
from pyengine.spec import FactorScaling, LinearScaling, Llama3Scaling, ModelSpec, RopeSpec

VALUES: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "norm_eps": 1e-5,
    "rope": RopeSpec(theta=10000.0),
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_ids": (2, 3),
}
LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def make_spec(**overrides: Any) -> ModelSpec:
    return ModelSpec(**(VALUES | overrides))


def test_is_frozen_and_hashable() -> None:
    spec = make_spec()
    assert hash(spec) == hash(make_spec())
    with pytest.raises(FrozenInstanceError):
        spec.num_layers = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("family", ""),
        ("family", "a/b"),
        ("vocab_size", 0),
        ("vocab_size", -1),
        ("vocab_size", True),
        ("vocab_size", 1.0),
        ("vocab_size", 1 << 40),
        ("hidden_size", 0),
        ("hidden_size", 1 << 18),
        ("intermediate_size", 0),
        ("num_layers", 1 << 20),
        ("num_heads", 0),
        ("num_kv_heads", 3),
        ("num_kv_heads", 8),
        ("head_dim", 15),
        ("head_dim", 0),
        ("max_position_embeddings", 0),
        ("norm_eps", -1e-6),
        ("norm_eps", float("nan")),
        ("norm_eps", "1e-5"),
        ("rope", None),
        ("tie_word_embeddings", 1),
        ("sliding_window", 0),
        ("full_attention_layers", (0,)),  # without a window
        ("nope_layers", [0]),
        ("nope_layers", (1, 0)),
        ("nope_layers", (0, 3)),
        ("nope_layers", (-1,)),
        ("nope_layers", (True,)),
        ("qkv_bias", 1),
        ("o_bias", None),
        ("mlp_bias", "yes"),
        ("qk_norm", "row"),
        ("qk_norm", ["head"]),
        ("norm_placement", None),
        ("norm_placement", "after"),
        ("local_rope", RopeSpec(theta=1e4)),  # without a window
        ("norm_weight_offset", 0.5),
        ("activation", "gelu"),  # with a gate
        ("gated_mlp", 1),
        ("norm", "batch"),
        ("norm_bias", True),  # of an RMS norm
        ("norm_placement", "shared"),  # of blocks that are not parallel
        ("parallel_blocks", None),
        ("learned_positions", "yes"),
        ("rotary_dim", 0),
        ("rotary_dim", 7),
        ("rotary_dim", 18),
        ("embedding_multiplier", 0.0),
        ("residual_multiplier", float("nan")),
        ("attention_scale", "0.5"),
        ("attention_scale", -1.0),
        ("logits_divisor", 0.0),
        ("bos_token_id", 512),
        ("bos_token_id", -1),
        ("pad_token_id", 512),
        ("eos_token_ids", [2]),
        ("eos_token_ids", (2, 512)),
        ("eos_token_ids", tuple(range(65))),
    ],
)
def test_bad_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"^{field}(\[\d+\])?: expected .*, got"):
        make_spec(**{field: value})


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("rope.theta", lambda: RopeSpec(theta=0.0)),
        ("rope.theta", lambda: RopeSpec(theta=float("inf"))),
        ("rope.scaling", lambda: RopeSpec(theta=1e4, scaling="linear")),  # type: ignore[arg-type]
        ("rope.scaling.factor", lambda: LinearScaling(factor=0.5)),
        ("rope.scaling.high_freq_factor", lambda: replace(LLAMA3, high_freq_factor=1.0)),
        ("rope.scaling.original_max_position_embeddings", lambda: replace(LLAMA3, original_max_position_embeddings=0)),
        (r"rope.scaling.factors\[1\]", lambda: FactorScaling(factors=(1.0, 0.0))),
        ("rope.scaling.factors", lambda: make_spec(rope=RopeSpec(theta=1e4, scaling=FactorScaling(factors=(1.0,))))),
    ],
)
def test_bad_rope_is_named(field: str, make: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"^{field}: expected .*, got"):
        make()


scalings = st.one_of(
    st.none(),
    st.builds(LinearScaling, factor=st.floats(1, 64)),
    st.builds(
        Llama3Scaling,
        factor=st.floats(1, 64),
        low_freq_factor=st.floats(0.5, 2),
        high_freq_factor=st.floats(3, 8),
        original_max_position_embeddings=st.integers(1, 1 << 20),
    ),
    st.builds(FactorScaling, factors=st.tuples(*[st.floats(1, 64)] * 8)),
)


@given(
    scaling=scalings,
    theta=st.floats(1, 1e8),
    eps=st.floats(1e-9, 1e-2),
    tied=st.booleans(),
    window=st.none() | st.integers(1, 4096),
    eos=st.lists(st.integers(0, 511), max_size=4).map(tuple),
)
def test_dict_round_trip_is_exact(
    scaling: Any, theta: float, eps: float, tied: bool, window: int | None, eos: tuple[int, ...]
) -> None:
    spec = make_spec(
        rope=RopeSpec(theta=theta, scaling=scaling),
        norm_eps=eps,
        tie_word_embeddings=tied,
        sliding_window=window,
        eos_token_ids=eos,
    )
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_dict_round_trip_of_what_few_families_have() -> None:
    spec = make_spec(
        sliding_window=7, full_attention_layers=(1,), nope_layers=(0, 2), qkv_bias=True, o_bias=True, mlp_bias=True,
        qk_norm="head", norm_placement="both", activation="gelu_tanh", rotary_dim=6,
        local_rope=RopeSpec(theta=5e3, scaling=LinearScaling(factor=2.0)), embedding_multiplier=12.0,
        residual_multiplier=0.22, attention_scale=0.1, logits_divisor=8.0,
    )  # fmt: skip
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert [spec.window_of(layer) for layer in range(3)] == [7, None, 7]
    assert [spec.has_rope(layer) for layer in range(3)] == [False, True, False]
    assert [spec.rope_table_of(layer) for layer in range(3)] == [1, 0, 1]
    assert [len(table.inv_freq) for table in spec.rope_tables()] == [3, 3]
    assert replace(spec, logits_divisor=1.0, norm_weight_offset=1).norm_weight_offset == 1.0
    with pytest.raises(ArgumentError, match=r"^logits_divisor: expected 1 beside a norm_weight_offset"):
        replace(spec, norm_weight_offset=1.0)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("qk_norm", {"norm": "layer", "qk_norm": "head"}),
        ("norm_weight_offset", {"norm": "layer", "norm_weight_offset": 1.0}),
        ("norm_placement", {"norm": "layer", "norm_placement": "both"}),
        ("logits_divisor", {"norm": "layer", "norm_bias": True, "logits_divisor": 2.0}),
        ("norm_placement", {"parallel_blocks": True, "norm_placement": "post"}),
        ("activation", {"gated_mlp": False}),
    ],
)
def test_fields_that_nothing_computes_together(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=rf"^{field}: expected .*, got"):
        make_spec(**values)


def test_tensors_of_what_few_families_have() -> None:
    plain = make_spec(
        norm="layer", norm_bias=True, norm_placement="shared", parallel_blocks=True, gated_mlp=False,
        activation="gelu", learned_positions=True,
    )  # fmt: skip
    shapes = plain.tensor_shapes()
    assert shapes["model.embed_positions.weight"] == (plain.max_position_embeddings, plain.hidden_size)
    assert {name for name in shapes if "norm" in name and ".1." in name} == {
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.input_layernorm.bias",
    }
    assert "model.norm.bias" in shapes
    assert not any("gate_proj" in name for name in shapes)
    assert "model.embed_positions.weight" not in plain.matrix_names()
    assert ModelSpec.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain


def test_from_dict_rejects_missing_and_unknown_keys() -> None:
    values = make_spec().to_dict()
    with pytest.raises(ArgumentError, match="'extra'"):
        ModelSpec.from_dict(values | {"extra": 1})
    with pytest.raises(ArgumentError, match="'rope'"):
        ModelSpec.from_dict({key: value for key, value in values.items() if key != "rope"})
    with pytest.raises(ArgumentError, match=r"rope\.scaling\.type.*'dynamic'"):
        ModelSpec.from_dict(values | {"rope": {"theta": 1e4, "scaling": {"type": "dynamic"}}})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 16), (4, 4, 16), (4, 1, 32)])
def test_shapes_are_those_of_transformers(tied: bool, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    from pyengine.families import config_from_spec

    spec = make_spec(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, tie_word_embeddings=tied)
    config = LlamaForCausalLM.config_class(**config_from_spec(spec))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    assert spec.tensor_shapes() == expected
    assert spec.num_parameters() == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "rope",
    [
        RopeSpec(theta=10000.0),
        RopeSpec(theta=500000.0, scaling=LLAMA3),
        RopeSpec(theta=500000.0, scaling=replace(LLAMA3, factor=32.0, original_max_position_embeddings=4096)),
        RopeSpec(theta=100000.0, scaling=LinearScaling(factor=4.0)),
    ],
)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_inv_freq_is_that_of_transformers(rope: RopeSpec, head_dim: int) -> None:
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from pyengine.families import config_from_spec

    spec = make_spec(rope=rope, head_dim=head_dim)
    expected = LlamaRotaryEmbedding(LlamaConfig(**config_from_spec(spec))).inv_freq.numpy()
    got = spec.inv_freq()
    assert got.dtype == np.float64
    assert got.shape == (head_dim // 2,)
    # The oracle works in float32: an exponent with relative error 2^-24 times ln(theta) <= 14, and six roundings.
    np.testing.assert_allclose(got, expected, rtol=20 * 2.0**-24)


def test_factor_scaling_divides() -> None:
    factors = tuple(1.0 + i for i in range(8))
    plain = make_spec().inv_freq()
    scaled = make_spec(rope=RopeSpec(theta=10000.0, scaling=FactorScaling(factors=factors))).inv_freq()
    np.testing.assert_array_equal(scaled, plain / np.array(factors))
