"""What the native model refuses, by the name of the argument or slot."""

import numpy as np
import pytest

from pyengine import _C
from pyengine.errors import ArgumentError

OPTIONS = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 8, "rotary_dim": 8, "sliding_windows": [0, 4], "rope_tables": [0, -1], "norm_eps": 1e-5,
    "norm_weight_offset": 0.0, "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_scale": 0.3,
    "tie_word_embeddings": True, "qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_norm": None,
    "norm": "rms", "norm_bias": False, "norm_placement": "pre", "parallel_blocks": False, "gated_mlp": True,
    "activation": "silu", "num_learned_positions": 0, "act_dtype": "float32", "product_input": "unrounded",
    "capacity_bytes": 1 << 20,
}  # fmt: skip


def make(**overrides):
    return _C.DecoderModel(**(OPTIONS | overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rotary_dim": 10}, "rotary_dim: expected an even number from 2 to 8, got 10"),
        ({"rotary_dim": 3}, "rotary_dim: expected an even number from 2 to 8, got 3"),
        ({"sliding_windows": [0]}, "sliding_windows: expected 2 entries, one per layer, got 1"),
        ({"sliding_windows": [0, -1]}, "sliding_windows: expected 0 or more, got -1"),
        ({"rope_tables": [0, 0, 0]}, "rope_tables: expected 2 entries, one per layer, got 3"),
        ({"rope_tables": [0, 2]}, "rope_tables: expected -1, 0 or 1, got 2"),
        ({"qk_norm": "row"}, "qk_norm: expected None, 'head' or 'full', got 'row'"),
        ({"norm_placement": "none"}, "norm_placement: expected 'pre', 'shared', 'post' or 'both', got 'none'"),
        ({"norm_placement": "shared"}, "norm_placement: expected one for serial blocks, got 'shared'"),
        (
            {"norm_placement": "both", "parallel_blocks": True},
            "norm_placement: expected one for parallel blocks, got 'both'",
        ),
        ({"norm": "batch"}, "norm: expected 'rms' or 'layer', got 'batch'"),
        ({"norm": "layer", "qk_norm": "head"}, "norm: expected 'rms' beside .*, got 'layer'"),
        ({"norm_bias": True}, "norm_bias: expected False beside 'rms', got True"),
        ({"activation": "relu"}, "activation: expected 'silu' or 'gelu_tanh', got 'relu'"),
        ({"activation": "gelu"}, "activation: expected 'silu' or 'gelu_tanh', got 'gelu'"),
        ({"gated_mlp": False}, "activation: expected 'gelu' or 'gelu_tanh', got 'silu'"),
        ({"num_learned_positions": -1}, r"num_learned_positions: expected 0 to 2\^28, got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(overrides, message):
    make()
    with pytest.raises(ArgumentError, match=f"^{message}"):
        make(**overrides)


@pytest.mark.parametrize(
    ("slot", "overrides", "width"),
    [
        ("norm", {}, 16),
        ("layers.1.attention_norm", {}, 16),
        ("layers.1.mlp_post_norm", {"norm_placement": "both"}, 16),
        ("layers.0.q_norm", {"qk_norm": "head"}, 8),
        ("layers.0.q_norm", {"qk_norm": "full"}, 16),
        ("layers.0.k_norm", {"qk_norm": "full"}, 8),
        ("layers.0.qkv_bias", {"qkv_bias": True}, 32),
        ("layers.0.o_bias", {"o_bias": True}, 16),
        ("layers.0.gate_up_bias", {"mlp_bias": True}, 64),
        ("layers.0.down_bias", {"mlp_bias": True}, 16),
        ("norm_bias", {"norm": "layer", "norm_bias": True}, 16),
        ("layers.1.mlp_norm_bias", {"norm": "layer", "norm_bias": True}, 16),
        ("positions", {"num_learned_positions": 5}, 80),
    ],
)
def test_a_vector_has_its_width_and_only_some_models_have_it(slot, overrides, width):
    model = make(**overrides)
    model.set_vector(slot, np.zeros(4 * width, np.uint8))
    with pytest.raises(ArgumentError, match=r"values: expected shape"):
        model.set_vector(slot, np.zeros(4 * width + 4, np.uint8))
    if overrides:
        with pytest.raises(ArgumentError, match=f"^slot: expected the name of a weight of this model, got '{slot}'"):
            make().set_vector(slot, np.zeros(4 * width, np.uint8))


def test_tables_are_those_that_the_layers_use():
    model = make(rope_tables=[0, 1])
    table = np.zeros((5, 4), np.float32)
    with pytest.raises(ArgumentError, match=r"^table: expected 0 or 1, got 2"):
        model.set_rope(table, table, table=2)
    model.set_rope(table, table)
    with pytest.raises(ArgumentError, match=r"^cos: expected the 5 positions of the other table, got 6"):
        model.set_rope(np.zeros((6, 4), np.float32), np.zeros((6, 4), np.float32), table=1)
    with pytest.raises(ArgumentError, match=r"^embed: expected 32 x 16 weights, got 0 rows"):
        model.check()
