"""What families share in reading and writing a config.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pyengine.errors import ArgumentError
from pyengine.families.fields import get_ids, get_int, get_optional_int
from pyengine.spec import ModelSpec

# Keys that change the mathematics, each with the value that changes nothing.
_NEUTRAL: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "hidden_activation": "silu",
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": None,
    "query_pre_attn_scalar": None,
    "use_qk_norm": False,
    "qk_layernorm": False,
    "clip_qkv": None,
    "num_local_experts": None,
    "num_experts": None,
    "n_routed_experts": None,
    "no_rope_layers": None,
    "num_nextn_predict_layers": 0,
    "is_encoder_decoder": False,
    "use_bidirectional_attention": False,
    "add_cross_attention": False,
    "quantization_config": None,
    "auto_map": None,
    "alibi": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
_TYPES = ("full_attention", "sliding_attention")


def check_neutral(config: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises ArgumentError with the first key that asks for what is not computed. A family reads `known` itself."""
    for key, expected in _NEUTRAL.items():
        value = config.get(key)
        if key in known or value is None:
            continue
        if value != expected or isinstance(value, bool) != isinstance(expected, bool):
            raise ArgumentError(f"{key}: expected {expected!r}, got {value!r:.80}")


def sizes_from_config(config: Mapping[str, Any], *, default_num_kv_heads: int | None) -> dict[str, Any]:
    """The fields of `ModelSpec` that every family says by the same keys."""
    num_heads = get_int(config, "num_attention_heads")
    hidden_size = get_int(config, "hidden_size")
    head_dim = get_optional_int(config, "head_dim")
    if head_dim is None:
        if num_heads < 1 or hidden_size % num_heads:
            raise ArgumentError(
                f"hidden_size: expected a multiple of num_attention_heads = {num_heads}, got {hidden_size}"
            )
        head_dim = hidden_size // num_heads
    num_kv_heads = get_optional_int(config, "num_key_value_heads")
    if num_kv_heads is None:
        missing = "num_key_value_heads" not in config
        num_kv_heads = default_num_kv_heads if missing and default_num_kv_heads is not None else num_heads
    pad_token_id = get_optional_int(config, "pad_token_id")
    return {
        "vocab_size": get_int(config, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": get_int(config, "intermediate_size"),
        "num_layers": get_int(config, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": get_int(config, "max_position_embeddings"),
        "bos_token_id": get_optional_int(config, "bos_token_id"),
        "eos_token_ids": get_ids(config, "eos_token_id"),
        # Some published configs say -1 for "no padding token".
        "pad_token_id": None if pad_token_id == -1 else pad_token_id,
    }


def sizes_to_config(spec: ModelSpec) -> dict[str, Any]:
    eos: int | list[int] | None = list(spec.eos_token_ids) or None
    if len(spec.eos_token_ids) == 1:
        eos = spec.eos_token_ids[0]
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": spec.pad_token_id,
    }


_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def plain_activation(config: Mapping[str, Any], key: str, default: str) -> str:
    """`ModelSpec.activation` of an MLP without a gate."""
    name = config.get(key)
    name = default if name is None else name
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ArgumentError(f"{key}: expected one of {sorted(_ACTIVATIONS)}, got {name!r:.80}")
    return _ACTIVATIONS[name]


def windows_from_config(config: Mapping[str, Any], window: int | None, default_types: list[str]) -> dict[str, Any]:
    """`sliding_window` and `full_attention_layers` of a config whose `layer_types` are `default_types` if missing."""
    types = config.get("layer_types")
    if types is None:
        types = default_types
    if not isinstance(types, list) or len(types) != len(default_types) or any(t not in _TYPES for t in types):
        raise ArgumentError(
            f"layer_types: expected {len(default_types)} of {list(_TYPES)}, one per layer, got {types!r:.80}"
        )
    full = tuple(layer for layer, kind in enumerate(types) if kind == "full_attention")
    if len(full) == len(types):
        return {"sliding_window": None}
    if window is None:
        raise ArgumentError(f"layer_types: expected 'full_attention' without a sliding_window, got {types!r:.80}")
    return {"sliding_window": window, "full_attention_layers": full}


def layer_types(spec: ModelSpec) -> list[str]:
    return [_TYPES[spec.window_of(layer) is not None] for layer in range(spec.num_layers)]
