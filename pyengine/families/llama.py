"""The Llama family: `model_type` llama (Llama 2 and 3, SmolLM2, ...) and mistral, which adds a sliding window."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.errors import ArgumentError
from pyengine.families.family import Family
from pyengine.families.fields import get_bool, get_float, get_ids, get_int, get_optional_int
from pyengine.families.rope_config import rope_from_config, rope_to_config
from pyengine.families.rows import unpermute_rows
from pyengine.spec import FactorScaling, LinearScaling, Llama3Scaling, ModelSpec, RopeScaling, RopeSpec

_MODEL_TYPES = ("llama", "mistral")
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

# Keys that change the mathematics, each with the one value that this family computes.
_FIXED: dict[str, Any] = {
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
    "use_qk_norm": False,
    "qk_layernorm": False,
    "num_local_experts": None,
    "num_experts": None,
    "n_routed_experts": None,
    "no_rope_layers": None,
    "num_nextn_predict_layers": 0,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
    "auto_map": None,
}

_LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP_TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """`config` is the content of config.json. Unsupported features raise ArgumentError with their key."""
    model_type = config.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise ArgumentError(f"model_type: expected one of {list(_MODEL_TYPES)}, got {model_type!r:.80}")
    for key, expected in _FIXED.items():
        value = config.get(key)
        if value is not None and (value != expected or isinstance(value, bool) != isinstance(expected, bool)):
            raise ArgumentError(f"{key}: expected {expected!r}, got {value!r:.80}")
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
        num_kv_heads = 8 if model_type == "mistral" else num_heads
    num_layers = get_int(config, "num_hidden_layers")
    return ModelSpec(
        family="llama",
        vocab_size=get_int(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=get_int(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=get_int(config, "max_position_embeddings"),
        norm_eps=get_float(config, "rms_norm_eps", 1e-6),
        rope=rope_from_config(config, default_theta=10000.0),
        tie_word_embeddings=get_bool(config, "tie_word_embeddings", False),
        sliding_window=_sliding_window(config, num_layers),
        bos_token_id=get_optional_int(config, "bos_token_id"),
        eos_token_ids=get_ids(config, "eos_token_id"),
        pad_token_id=_pad_token_id(config),
    )


def _sliding_window(config: Mapping[str, Any], num_layers: int) -> int | None:
    window = get_optional_int(config, "sliding_window")
    if config["model_type"] == "llama" and window is not None:
        raise ArgumentError(f"sliding_window: expected null for model_type llama, got {window}")
    if "use_sliding_window" in config and not get_bool(config, "use_sliding_window", True):
        window = None
    expected = "full_attention" if window is None else "sliding_attention"
    layer_types = config.get("layer_types")
    if layer_types is not None and layer_types != [expected] * num_layers:
        raise ArgumentError(f"layer_types: expected {expected!r} for every layer, got {layer_types!r:.80}")
    return window


def _pad_token_id(config: Mapping[str, Any]) -> int | None:
    """Some published configs say -1 for "no padding token"."""
    value = get_optional_int(config, "pad_token_id")
    return None if value == -1 else value


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The content of a config.json that transformers and `spec_from_config` read back to the same model."""
    model_type = "llama" if spec.sliding_window is None else "mistral"
    eos: int | list[int] | None = list(spec.eos_token_ids) or None
    if len(spec.eos_token_ids) == 1:
        eos = spec.eos_token_ids[0]
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
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
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": spec.pad_token_id,
    }
    if model_type == "mistral":
        del config["attention_bias"], config["mlp_bias"]
        config["sliding_window"] = spec.sliding_window
    return config | rope_to_config(spec.rope)


def spec_from_gguf(
    metadata: Mapping[str, Any], tensor_names: Collection[str], rope_freqs: npt.NDArray[np.floating[Any]] | None
) -> ModelSpec:
    """`tensor_names` tell whether the embedding is tied; `rope_freqs` is the tensor rope_freqs.weight [D/2] or None."""
    num_heads = get_int(metadata, "llama.attention.head_count")
    hidden_size = get_int(metadata, "llama.embedding_length")
    head_dim = get_optional_int(metadata, "llama.attention.key_length")
    if head_dim is None:
        if num_heads < 1 or hidden_size % num_heads:
            raise ArgumentError(
                f"llama.embedding_length: expected a multiple of the head_count {num_heads}, got {hidden_size}"
            )
        head_dim = hidden_size // num_heads
    for key, expected in (
        ("llama.attention.value_length", head_dim),
        ("llama.rope.dimension_count", head_dim),
        ("llama.expert_count", 0),
        ("llama.attention.sliding_window", 0),
    ):
        if (value := get_optional_int(metadata, key)) not in (None, expected):
            raise ArgumentError(f"{key}: expected {expected}, got {value}")
    if biased := sorted(name for name in tensor_names if name.startswith("blk.") and name.endswith(".bias")):
        raise ArgumentError(f"tensor_names: expected no bias, got {biased[0]!r:.80}")
    vocab_size = get_optional_int(metadata, "llama.vocab_size")
    if vocab_size is None:
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list):
            raise ArgumentError("llama.vocab_size: expected an int or tokenizer.ggml.tokens, got neither")
        vocab_size = len(tokens)
    num_kv_heads = get_optional_int(metadata, "llama.attention.head_count_kv")
    return ModelSpec(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=get_int(metadata, "llama.feed_forward_length"),
        num_layers=get_int(metadata, "llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=get_int(metadata, "llama.context_length"),
        norm_eps=_shortest(get_float(metadata, "llama.attention.layer_norm_rms_epsilon")),
        rope=RopeSpec(
            theta=_shortest(get_float(metadata, "llama.rope.freq_base", 10000.0)),
            scaling=_gguf_scaling(metadata, "rope_freqs.weight" in tensor_names, rope_freqs),
        ),
        tie_word_embeddings="output.weight" not in tensor_names,
        bos_token_id=get_optional_int(metadata, "tokenizer.ggml.bos_token_id"),
        eos_token_ids=_gguf_eos(metadata),
        pad_token_id=get_optional_int(metadata, "tokenizer.ggml.padding_token_id"),
    )


def _shortest(value: float) -> float:
    """GGUF holds float32; the shortest decimal that rounds to it is the number that was meant."""
    return float(str(np.float32(value)))


def _gguf_eos(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return tuple(dict.fromkeys(token_id for key in keys for token_id in get_ids(metadata, key)))


def _gguf_scaling(
    metadata: Mapping[str, Any], has_factors: bool, rope_freqs: npt.NDArray[np.floating[Any]] | None
) -> RopeScaling | None:
    if has_factors != (rope_freqs is not None):
        raise ArgumentError(
            "rope_freqs: expected the tensor rope_freqs.weight exactly when tensor_names has it, "
            f"got {'none' if rope_freqs is None else 'one'}"
        )
    name = metadata.get("llama.rope.scaling.type", "none")
    if name not in ("none", "linear"):
        raise ArgumentError(f"llama.rope.scaling.type: expected 'none' or 'linear', got {name!r:.80}")
    if rope_freqs is not None:
        if name != "none":
            raise ArgumentError(f"llama.rope.scaling.type: expected 'none' beside rope_freqs.weight, got {name!r}")
        return FactorScaling(factors=tuple(float(factor) for factor in np.ravel(rope_freqs)))
    # An older key for the same thing; both are the factor itself.
    factor = metadata.get("llama.rope.scaling.factor", metadata.get("llama.rope.scale_linear"))
    if name == "linear" or (factor is not None and factor != 1.0):
        return LinearScaling(
            factor=_shortest(get_float({"llama.rope.scaling.factor": factor}, "llama.rope.scaling.factor"))
        )
    return None


def gguf_metadata_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """Architecture keys for a GGUF file. Llama 3 and factor scaling go into a tensor: `gguf_rope_freqs`."""
    if spec.sliding_window is not None:
        raise ArgumentError(
            f"sliding_window: expected None, which a GGUF file of Llama can say, got {spec.sliding_window}"
        )
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.vocab_size": spec.vocab_size,
        "llama.context_length": spec.max_position_embeddings,
        "llama.embedding_length": spec.hidden_size,
        "llama.block_count": spec.num_layers,
        "llama.feed_forward_length": spec.intermediate_size,
        "llama.attention.head_count": spec.num_heads,
        "llama.attention.head_count_kv": spec.num_kv_heads,
        "llama.attention.key_length": spec.head_dim,
        "llama.attention.value_length": spec.head_dim,
        "llama.attention.layer_norm_rms_epsilon": spec.norm_eps,
        "llama.rope.dimension_count": spec.head_dim,
        "llama.rope.freq_base": spec.rope.theta,
    }
    if isinstance(spec.rope.scaling, LinearScaling):
        metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": spec.rope.scaling.factor}
    if spec.bos_token_id is not None:
        metadata["tokenizer.ggml.bos_token_id"] = spec.bos_token_id
    if len(spec.eos_token_ids) > 2:
        raise ArgumentError(f"eos_token_ids: expected at most 2, which a GGUF file can say, got {spec.eos_token_ids}")
    for key, token_id in zip(("eos", "eot"), spec.eos_token_ids, strict=False):
        metadata[f"tokenizer.ggml.{key}_token_id"] = token_id
    if spec.pad_token_id is not None:
        metadata["tokenizer.ggml.padding_token_id"] = spec.pad_token_id
    return metadata


def gguf_rope_freqs(spec: ModelSpec) -> npt.NDArray[np.float32] | None:
    """The tensor `rope_freqs.weight` [D/2] that a GGUF file of this model needs, or None."""
    if not isinstance(spec.rope.scaling, Llama3Scaling | FactorScaling):
        return None
    exponent = np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim
    return (np.power(spec.rope.theta, -exponent) / spec.inv_freq()).astype(np.float32)


def gguf_tensor_names(spec: ModelSpec) -> dict[str, str]:
    """Hugging Face name -> GGUF name of every weight of `spec.tensor_shapes()`, in the same order."""
    names = {}
    for name in spec.tensor_shapes():
        stem = name.removesuffix(".weight")
        if stem in _TOP_TENSORS:
            names[name] = _TOP_TENSORS[stem] + ".weight"
        else:
            _, _, layer, part = stem.split(".", 3)
            names[name] = f"blk.{layer}.{_LAYER_TENSORS[part]}.weight"
    return names


def gguf_row_order(spec: ModelSpec, name: str) -> npt.NDArray[np.int64] | None:
    """Index array with hf = gguf[index] for the weight with Hugging Face name `name`; None where the rows agree."""
    if name.endswith(".self_attn.q_proj.weight"):
        return unpermute_rows(spec.num_heads, spec.head_dim)
    if name.endswith(".self_attn.k_proj.weight"):
        return unpermute_rows(spec.num_kv_heads, spec.head_dim)
    return None


FAMILY = Family(
    name="llama",
    model_types=_MODEL_TYPES,
    gguf_architectures=("llama",),
    spec_from_config=spec_from_config,
    config_from_spec=config_from_spec,
    spec_from_gguf=spec_from_gguf,
    gguf_metadata_from_spec=gguf_metadata_from_spec,
    gguf_rope_freqs=gguf_rope_freqs,
    gguf_tensor_names=gguf_tensor_names,
    gguf_row_order=gguf_row_order,
)
