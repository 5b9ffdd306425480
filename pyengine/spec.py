"""`ModelSpec`: the one description of a model. The module that trains and the plan that serves are built from it.

H query heads, K kv heads, D head_dim, C hidden_size, F intermediate_size, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.errors import ArgumentError
from pyengine.rope_spec import (
    MAX_POSITIONS,
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    RopeSpec,
    RopeTable,
    YarnScaling,
    check_float,
    check_int,
    rope_from_dict,
    rope_to_dict,
    take,
    yarn_attention_factor,
)

__all__ = [
    "MAX_POSITIONS",
    "FactorScaling",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "ModelSpec",
    "RopeScaling",
    "RopeSpec",
    "RopeTable",
    "YarnScaling",
    "yarn_attention_factor",
]

POSITIONS_NAME = "model.embed_positions.weight"

MAX_VOCAB_SIZE = 1 << 24
MAX_HIDDEN_SIZE = 1 << 17
MAX_INTERMEDIATE_SIZE = 1 << 20
MAX_NUM_LAYERS = 1024
MAX_NUM_HEADS = 2048
MAX_HEAD_DIM = 1024
MAX_EOS_TOKENS = 64


# What a norm does -> its name in a layer, for every placement of the norms.
NORM_NAMES: dict[str, dict[str, str]] = {
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "shared": {"attention_norm": "input_layernorm"},
    "post": {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    "both": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}
QK_NORMS = (None, "head", "full")
NORMS = ("rms", "layer")
# Of an MLP with a gate, and without one.
GATE_ACTIVATIONS = ("silu", "gelu_tanh")
PLAIN_ACTIVATIONS = ("gelu", "gelu_tanh")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder: by default with RMS norm, rotary attention with grouped kv heads and a SwiGLU MLP.

    Every field is checked; ArgumentError names the field, what was expected and what came. A field that only some
    families use has a default that computes nothing.

    Attributes:
        sliding_window: tokens that a token sees, itself included; None: all before it.
        full_attention_layers: layers that the window does not bound, ascending.
        local_rope: rotary embedding of the layers that the window bounds, where it is another one.
        qkv_bias, o_bias, mlp_bias: whether q, k and v, the output of attention, and the products of the MLP have one.
        qk_norm: RMS norm of q and k before rotation: of each "head" with one weight [D], or of the "full" width.
        norm: "rms", or "layer", which subtracts the mean; with norm_bias it adds a vector too.
        norm_placement: "pre": a norm before attention and before the MLP; "post": one after each, before the sum with
            the residual stream; "both"; "shared": one before both, of parallel blocks.
        parallel_blocks: whether attention and MLP of a layer start from the same residual stream.
        norm_weight_offset: added to the weight of every norm: 0 or 1.
        gated_mlp: whether the MLP is down(activation(gate(x)) * up(x)), or down(activation(up(x))).
        activation: of the MLP: "silu" (with a gate), "gelu" (without one), or "gelu_tanh", the tanh form of gelu.
        learned_positions: whether the embedding of a token gets one of its position added.
        rotary_dim: leading elements of a head that turn; None: all of them.
        nope_layers: layers without rotary embedding, ascending.
        embedding_multiplier: of the embedding on its way into the first layer.
        residual_multiplier: of what attention and MLP add to the residual stream.
        attention_scale: of q @ k; None: 1 / sqrt(D).
        logits_divisor: logits are divided by it.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    rope: RopeSpec
    tie_word_embeddings: bool
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    local_rope: RopeSpec | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    norm: str = "rms"
    norm_bias: bool = False
    norm_placement: str = "pre"
    norm_weight_offset: float = 0.0
    parallel_blocks: bool = False
    gated_mlp: bool = True
    activation: str = "silu"
    learned_positions: bool = False
    rotary_dim: int | None = None
    nope_layers: tuple[int, ...] = ()
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_scale: float | None = None
    logits_divisor: float = 1.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.family, str) or not self.family.isidentifier():
            raise ArgumentError(f"family: expected an identifier, got {self.family!r}")
        for name, high in (
            ("vocab_size", MAX_VOCAB_SIZE),
            ("hidden_size", MAX_HIDDEN_SIZE),
            ("intermediate_size", MAX_INTERMEDIATE_SIZE),
            ("num_layers", MAX_NUM_LAYERS),
            ("num_heads", MAX_NUM_HEADS),
            ("num_kv_heads", MAX_NUM_HEADS),
            ("head_dim", MAX_HEAD_DIM),
            ("max_position_embeddings", MAX_POSITIONS),
        ):
            check_int(self, name, name, low=1, high=high)
        check_float(self, "norm_eps", "norm_eps", low=0.0, high=1.0)
        if self.num_heads % self.num_kv_heads:
            raise ArgumentError(
                f"num_kv_heads: expected a divisor of num_heads = {self.num_heads}, got {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ArgumentError(f"head_dim: expected an even number, got {self.head_dim}")
        if not isinstance(self.rope, RopeSpec):
            raise ArgumentError(f"rope: expected a RopeSpec, got {type(self.rope).__name__}")
        if self.rotary_dim is not None:
            check_int(self, "rotary_dim", "rotary_dim", low=2, high=self.head_dim - 2)
            if self.rotary_dim % 2:
                raise ArgumentError(f"rotary_dim: expected an even number, got {self.rotary_dim}")
        if self.local_rope is not None and (not isinstance(self.local_rope, RopeSpec) or self.sliding_window is None):
            raise ArgumentError(
                "local_rope: expected None, or a RopeSpec beside a sliding_window, "
                f"got {type(self.local_rope).__name__}"
            )
        for rope in (self.rope, self.local_rope):
            for name, count in rope.factor_counts().items() if rope else ():
                if count != self.num_rotary_pairs:
                    raise ArgumentError(
                        f"rope.scaling.{name}: expected {self.num_rotary_pairs} factors, one per rotary pair, "
                        f"got {count}"
                    )
        for name in _BOOLS:
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name}: expected a bool, got {getattr(self, name)!r:.80}")
        _check_choice(self, "qk_norm", QK_NORMS)
        _check_choice(self, "norm", NORMS)
        _check_choice(self, "norm_placement", tuple(NORM_NAMES))
        _check_choice(self, "activation", GATE_ACTIVATIONS if self.gated_mlp else PLAIN_ACTIVATIONS)
        self._check_norms()
        check_float(self, "norm_weight_offset", "norm_weight_offset", low=0.0, high=1.0)
        for name in ("embedding_multiplier", "residual_multiplier", "attention_scale", "logits_divisor"):
            if name != "attention_scale" or self.attention_scale is not None:
                check_float(self, name, name, low=1e-6, high=1e6)
        if self.norm_weight_offset not in (0.0, 1.0):
            raise ArgumentError(f"norm_weight_offset: expected 0 or 1, got {self.norm_weight_offset}")
        if self.norm_weight_offset != 0.0 and self.logits_divisor != 1.0:
            raise ArgumentError(f"logits_divisor: expected 1 beside a norm_weight_offset, got {self.logits_divisor}")
        if self.norm_bias and self.logits_divisor != 1.0:
            raise ArgumentError(f"logits_divisor: expected 1 beside a norm_bias, got {self.logits_divisor}")
        if self.sliding_window is not None:
            check_int(self, "sliding_window", "sliding_window", low=1, high=MAX_POSITIONS)
        elif self.full_attention_layers:
            raise ArgumentError(
                f"full_attention_layers: expected none without a sliding_window, got {self.full_attention_layers!r:.80}"
            )
        _check_layers(self, "full_attention_layers")
        _check_layers(self, "nope_layers")
        for name in ("bos_token_id", "pad_token_id"):
            if getattr(self, name) is not None:
                check_int(self, name, name, low=0, high=self.vocab_size - 1)
        if not isinstance(self.eos_token_ids, tuple) or len(self.eos_token_ids) > MAX_EOS_TOKENS:
            raise ArgumentError(
                f"eos_token_ids: expected a tuple of at most {MAX_EOS_TOKENS} ids, got {self.eos_token_ids!r:.80}"
            )
        for index, token_id in enumerate(self.eos_token_ids):
            if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
                raise ArgumentError(
                    f"eos_token_ids[{index}]: expected an int in [0, {self.vocab_size - 1}], got {token_id!r}"
                )

    def _check_norms(self) -> None:
        if self.norm == "rms" and self.norm_bias:
            raise ArgumentError("norm_bias: expected False beside the norm 'rms', got True")
        if self.norm == "layer":
            # Nothing computes these together.
            for name, expected in (("qk_norm", None), ("norm_weight_offset", 0.0)):
                if getattr(self, name) != expected:
                    raise ArgumentError(
                        f"{name}: expected {expected} beside the norm 'layer', got {getattr(self, name)!r}"
                    )
        placements: tuple[str, ...] = ("pre", "shared") if self.parallel_blocks else ("pre", "post", "both")
        if self.norm == "layer":
            placements = tuple(name for name in placements if name in ("pre", "shared"))
        if self.norm_placement not in placements:
            raise ArgumentError(
                f"norm_placement: expected one of {list(placements)} beside the norm {self.norm!r} and "
                f"parallel_blocks = {self.parallel_blocks}, got {self.norm_placement!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold. `from_dict` gives back an equal spec."""
        result: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in _TUPLES:
            result[name] = list(result[name])
        result["rope"] = rope_to_dict(self.rope)
        result["local_rope"] = None if self.local_rope is None else rope_to_dict(self.local_rope)
        return result

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Inverse of `to_dict`. A missing or unknown key is an ArgumentError."""
        arguments = take(values, "spec", {field.name for field in fields(cls)})
        arguments["rope"] = rope_from_dict(arguments["rope"], "rope")
        if arguments["local_rope"] is not None:
            arguments["local_rope"] = rope_from_dict(arguments["local_rope"], "local_rope")
        for name in _TUPLES:
            if not isinstance(arguments[name], list | tuple):
                raise ArgumentError(f"{name}: expected a list, got {arguments[name]!r:.80}")
            arguments[name] = tuple(arguments[name])
        return cls(**arguments)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight, named as in the models of Hugging Face that keep each apart.

        Matrices are [out, in]. `lm_head.weight` is present only when the embedding is not tied. The order is that of
        execution.
        """
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        if self.learned_positions:
            shapes[POSITIONS_NAME] = (self.max_position_embeddings, self.hidden_size)
        layer_shapes = self._layer_shapes()
        for layer in range(self.num_layers):
            shapes |= {f"model.layers.{layer}.{part}": shape for part, shape in layer_shapes.items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if self.norm_bias:
            shapes["model.norm.bias"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}

        def add_norm(role: str) -> None:
            if role in NORM_NAMES[self.norm_placement]:
                shapes[NORM_NAMES[self.norm_placement][role] + ".weight"] = (self.hidden_size,)
                if self.norm_bias:
                    shapes[NORM_NAMES[self.norm_placement][role] + ".bias"] = (self.hidden_size,)

        def add_linear(name: str, num_outputs: int, num_inputs: int, has_bias: bool) -> None:
            shapes[name + ".weight"] = (num_outputs, num_inputs)
            if has_bias:
                shapes[name + ".bias"] = (num_outputs,)

        add_norm("attention_norm")
        add_linear("self_attn.q_proj", q_size, self.hidden_size, self.qkv_bias)
        add_linear("self_attn.k_proj", kv_size, self.hidden_size, self.qkv_bias)
        add_linear("self_attn.v_proj", kv_size, self.hidden_size, self.qkv_bias)
        if self.qk_norm is not None:
            shapes["self_attn.q_norm.weight"] = (self.head_dim if self.qk_norm == "head" else q_size,)
            shapes["self_attn.k_norm.weight"] = (self.head_dim if self.qk_norm == "head" else kv_size,)
        add_linear("self_attn.o_proj", self.hidden_size, q_size, self.o_bias)
        add_norm("attention_post_norm")
        add_norm("mlp_norm")
        if self.gated_mlp:
            add_linear("mlp.gate_proj", self.intermediate_size, self.hidden_size, self.mlp_bias)
        add_linear("mlp.up_proj", self.intermediate_size, self.hidden_size, self.mlp_bias)
        add_linear("mlp.down_proj", self.hidden_size, self.intermediate_size, self.mlp_bias)
        add_norm("mlp_post_norm")
        return shapes

    def matrix_names(self) -> list[str]:
        """The weights that may be in blocks: those of products, and the embedding."""
        return [name for name, shape in self.tensor_shapes().items() if len(shape) == 2 and name != POSITIONS_NAME]

    def num_parameters(self) -> int:
        """Number of trainable values; a tied embedding counts once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    @property
    def num_rotary_pairs(self) -> int:
        """Pairs of a head that turn, P."""
        return (self.rotary_dim or self.head_dim) // 2

    @property
    def softmax_scale(self) -> float:
        """Of q @ k, whichever way it is said."""
        return 1.0 / math.sqrt(self.head_dim) if self.attention_scale is None else self.attention_scale

    def has_rope(self, layer: int) -> bool:
        """Whether q and k of the layer turn with the position."""
        return layer not in self.nope_layers

    def window_of(self, layer: int) -> int | None:
        """The sliding window of the layer, or None."""
        return None if layer in self.full_attention_layers else self.sliding_window

    def rope_table_of(self, layer: int) -> int:
        """Which of `rope_tables` the layer turns by."""
        return int(self.local_rope is not None and self.window_of(layer) is not None)

    def rope_tables(self, context_length: int | None = None) -> list[RopeTable]:
        """The rotary tables. `context_length`, by default max_position_embeddings, chooses the factors of LongRoPE."""
        ropes = (self.rope,) if self.local_rope is None else (self.rope, self.local_rope)
        return [RopeTable(self._inv_freq(rope, context_length), rope.attention_factor) for rope in ropes]

    def base_inv_freq(self) -> npt.NDArray[np.float64]:
        """Angle per position of each rotary pair, before scaling: float64 [P], radians."""
        return self._inv_freq(RopeSpec(theta=self.rope.theta))

    def inv_freq(self) -> npt.NDArray[np.float64]:
        """Angle per position of each rotary pair, after scaling: float64 [P], radians."""
        return self._inv_freq(self.rope)

    def _inv_freq(self, rope: RopeSpec, context_length: int | None = None) -> npt.NDArray[np.float64]:
        inv_freq = np.power(rope.theta, -np.arange(self.num_rotary_pairs, dtype=np.float64) / self.num_rotary_pairs)
        if rope.scaling is None:
            return inv_freq
        return rope.scaling.scale(inv_freq, rope.theta, context_length or self.max_position_embeddings)


_BOOLS = (
    "tie_word_embeddings",
    "qkv_bias",
    "o_bias",
    "mlp_bias",
    "norm_bias",
    "parallel_blocks",
    "gated_mlp",
    "learned_positions",
)
_TUPLES = ("eos_token_ids", "full_attention_layers", "nope_layers")


def _check_choice(owner: object, name: str, choices: tuple[str | None, ...]) -> None:
    value = getattr(owner, name)
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ArgumentError(f"{name}: expected one of {list(choices)}, got {value!r:.80}")


def _check_layers(spec: ModelSpec, name: str) -> None:
    layers = getattr(spec, name)
    if not isinstance(layers, tuple) or any(type(layer) is not int for layer in layers):
        raise ArgumentError(f"{name}: expected a tuple of layers, got {layers!r:.80}")
    if list(layers) != sorted(set(layers)) or (layers and not 0 <= layers[0] <= layers[-1] < spec.num_layers):
        raise ArgumentError(f"{name}: expected ascending layers in [0, {spec.num_layers - 1}], got {layers!r:.80}")
