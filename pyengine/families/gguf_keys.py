"""What families share in reading and writing the metadata and tensor names of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pyengine.errors import ArgumentError
from pyengine.families.fields import get_float, get_ids, get_int, get_optional_int
from pyengine.spec import (
    NORM_NAMES,
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelSpec,
    RopeScaling,
    RopeSpec,
    YarnScaling,
    yarn_attention_factor,
)

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# One for each pair of a head: half of MAX_HEAD_DIM.
MAX_ROPE_FACTORS = 512
LAYER_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORM_TENSORS = {
    "attention_norm": "attn_norm",
    "attention_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp_post_norm": "post_ffw_norm",
}
_TOP_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.embed_positions": "position_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
BIASES = {"qkv_bias": "attn_q.bias", "o_bias": "attn_output.bias", "mlp_bias": "ffn_up.bias"}
_EPS_KEYS = {"rms": "attention.layer_norm_rms_epsilon", "layer": "attention.layer_norm_epsilon"}
# Keys that change the mathematics, after the architecture, with the values that change nothing.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "expert_count": (0,),
    "attention.sliding_window": (0,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
}


def check_neutral(metadata: Mapping[str, Any], architecture: str, known: set[str]) -> None:
    """Raises ArgumentError with the first key that asks for what is not computed. A family reads `known` itself."""
    for key, neutral in _NEUTRAL.items():
        value = metadata.get(f"{architecture}.{key}")
        if key not in known and value is not None and value not in neutral:
            raise ArgumentError(f"{architecture}.{key}: expected {neutral[-1]}, got {value!r:.80}")


def shortest(value: float) -> float:
    """GGUF holds float32; the shortest decimal that rounds to it is the number that was meant."""
    return float(str(np.float32(value)))


def sizes_from_gguf(metadata: Mapping[str, Any], architecture: str, *, norm: str) -> dict[str, Any]:
    """The fields of `ModelSpec` that every family says by the same keys."""
    prefix = f"{architecture}."
    num_heads = get_int(metadata, prefix + "attention.head_count")
    hidden_size = get_int(metadata, prefix + "embedding_length")
    head_dim = get_optional_int(metadata, prefix + "attention.key_length")
    if head_dim is None:
        if num_heads < 1 or hidden_size % num_heads:
            raise ArgumentError(
                f"{prefix}embedding_length: expected a multiple of the head_count {num_heads}, got {hidden_size}"
            )
        head_dim = hidden_size // num_heads
    if (value := get_optional_int(metadata, prefix + "attention.value_length")) not in (None, head_dim):
        raise ArgumentError(f"{prefix}attention.value_length: expected {head_dim}, got {value}")
    vocab_size = get_optional_int(metadata, prefix + "vocab_size")
    if vocab_size is None:
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list):
            raise ArgumentError(f"{prefix}vocab_size: expected an int or tokenizer.ggml.tokens, got neither")
        vocab_size = len(tokens)
    num_kv_heads = get_optional_int(metadata, prefix + "attention.head_count_kv")
    end_keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": get_int(metadata, prefix + "feed_forward_length"),
        "num_layers": get_int(metadata, prefix + "block_count"),
        "num_heads": num_heads,
        "num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": get_int(metadata, prefix + "context_length"),
        "norm_eps": shortest(get_float(metadata, prefix + _EPS_KEYS[norm])),
        "bos_token_id": get_optional_int(metadata, "tokenizer.ggml.bos_token_id"),
        "eos_token_ids": tuple(dict.fromkeys(token_id for key in end_keys for token_id in get_ids(metadata, key))),
        "pad_token_id": get_optional_int(metadata, "tokenizer.ggml.padding_token_id"),
    }


def sizes_to_gguf(spec: ModelSpec, architecture: str) -> dict[str, Any]:
    prefix = f"{architecture}."
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        prefix + "vocab_size": spec.vocab_size,
        prefix + "context_length": spec.max_position_embeddings,
        prefix + "embedding_length": spec.hidden_size,
        prefix + "block_count": spec.num_layers,
        prefix + "feed_forward_length": spec.intermediate_size,
        prefix + "attention.head_count": spec.num_heads,
        prefix + "attention.head_count_kv": spec.num_kv_heads,
        prefix + "attention.key_length": spec.head_dim,
        prefix + "attention.value_length": spec.head_dim,
        prefix + _EPS_KEYS[spec.norm]: spec.norm_eps,
        prefix + "rope.dimension_count": spec.rotary_dim or spec.head_dim,
        prefix + "rope.freq_base": spec.rope.theta,
    }
    metadata |= _scaling_to_gguf(spec.rope.scaling, prefix + "rope.scaling.")
    if spec.bos_token_id is not None:
        metadata["tokenizer.ggml.bos_token_id"] = spec.bos_token_id
    if len(spec.eos_token_ids) > 2:
        raise ArgumentError(f"eos_token_ids: expected at most 2, which a GGUF file can say, got {spec.eos_token_ids}")
    for key, token_id in zip(("eos", "eot"), spec.eos_token_ids, strict=False):
        metadata[f"tokenizer.ggml.{key}_token_id"] = token_id
    if spec.pad_token_id is not None:
        metadata["tokenizer.ggml.padding_token_id"] = spec.pad_token_id
    return metadata


class _TensorInfo(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


class TensorFile(Protocol):
    """What is asked of an open GGUF file."""

    def __contains__(self, name: object) -> bool: ...

    def info(self, name: str) -> _TensorInfo: ...

    def dequantize(self, name: str) -> npt.NDArray[np.float32]: ...


def read_rope_factors(file: TensorFile) -> dict[str, npt.NDArray[np.float32]]:
    """Those tensors [P] of `ROPE_TENSORS` that a file has. Raises ArgumentError with the name of one that is none."""
    names = [name for name in ROPE_TENSORS if name in file]
    for name in names:
        shape = file.info(name).shape
        if len(shape) != 1 or shape[0] > MAX_ROPE_FACTORS:
            raise ArgumentError(f"{name}: expected one dimension of at most {MAX_ROPE_FACTORS}, got shape {shape}")
    return {name: file.dequantize(name) for name in names}


def rope_from_gguf(
    metadata: Mapping[str, Any], architecture: str, rope_factors: Mapping[str, npt.NDArray[np.floating[Any]]]
) -> RopeSpec:
    theta = shortest(get_float(metadata, f"{architecture}.rope.freq_base", 10000.0))
    return RopeSpec(theta=theta, scaling=_scaling(metadata, f"{architecture}.", rope_factors))


def _scaling(
    metadata: Mapping[str, Any], architecture_prefix: str, rope_factors: Mapping[str, npt.NDArray[np.floating[Any]]]
) -> RopeScaling | None:
    prefix = f"{architecture_prefix}rope.scaling."
    name = metadata.get(prefix + "type", "none")
    if name not in ("none", "linear", "yarn", "longrope"):
        raise ArgumentError(f"{prefix}type: expected 'none', 'linear', 'yarn' or 'longrope', got {name!r:.80}")
    lists = {key: tuple(float(factor) for factor in np.ravel(values)) for key, values in rope_factors.items()}
    freqs, *long_and_short = (lists.get(key) for key in ROPE_TENSORS)
    if any(values is not None for values in long_and_short) or name == "longrope":
        if freqs is not None or None in long_and_short or name not in ("none", "longrope"):
            raise ArgumentError(
                f"{prefix}type: expected 'longrope' with long and short factors and no others, "
                f"got {name!r} and {sorted(rope_factors)}"
            )
        return LongRopeScaling(
            long_factors=lists["rope_factors_long.weight"],
            short_factors=lists["rope_factors_short.weight"],
            original_max_position_embeddings=_original_context(metadata, architecture_prefix),
            attention_factor=shortest(get_float(metadata, prefix + "attn_factor", 1.0)),
        )
    if freqs is not None and name != "none":
        raise ArgumentError(f"{prefix}type: expected 'none' beside rope_freqs.weight, got {name!r}")
    if name == "yarn":
        return _yarn(metadata, architecture_prefix, prefix)
    for key in ("attn_factor", "yarn_attn_factor"):
        if (value := get_float(metadata, prefix + key, 1.0)) != 1.0:
            raise ArgumentError(f"{prefix}{key}: expected 1 beside the type {name!r}, got {value}")
    if freqs is not None:
        return FactorScaling(factors=freqs)
    # An older key for the same thing; both are the factor itself.
    factor = metadata.get(prefix + "factor", metadata.get(f"{architecture_prefix}rope.scale_linear"))
    if name == "linear" or (factor is not None and factor != 1.0):
        return LinearScaling(factor=shortest(get_float({prefix + "factor": factor}, prefix + "factor")))
    return None


def _original_context(metadata: Mapping[str, Any], architecture_prefix: str) -> int:
    key = f"{architecture_prefix}rope.scaling.original_context_length"
    found = get_optional_int(metadata, key)
    return get_int(metadata, f"{architecture_prefix}context_length") if found is None else found


def _yarn(metadata: Mapping[str, Any], architecture_prefix: str, prefix: str) -> YarnScaling:
    factor = shortest(get_float(metadata, prefix + "factor"))
    for key, neutral in (("yarn_ext_factor", 1.0), ("yarn_log_multiplier", 0.0), ("yarn_attn_factor", 1.0)):
        if (value := get_float(metadata, prefix + key, neutral)) != neutral:
            raise ArgumentError(f"{prefix}{key}: expected {neutral:g}, got {value}")
    # The key is a multiple of what the factor gives.
    multiple, attention_factor = get_float(metadata, prefix + "attn_factor", 1.0), yarn_attention_factor(factor)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=_original_context(metadata, architecture_prefix),
        attention_factor=attention_factor if multiple == 1.0 else shortest(attention_factor * multiple),
        beta_fast=shortest(get_float(metadata, prefix + "yarn_beta_fast", 32.0)),
        beta_slow=shortest(get_float(metadata, prefix + "yarn_beta_slow", 1.0)),
    )


def _scaling_to_gguf(scaling: RopeScaling | None, prefix: str) -> dict[str, Any]:
    if isinstance(scaling, LinearScaling):
        return {prefix + "type": "linear", prefix + "factor": scaling.factor}
    if isinstance(scaling, LongRopeScaling):
        return {
            prefix + "type": "longrope",
            prefix + "original_context_length": scaling.original_max_position_embeddings,
            prefix + "attn_factor": scaling.attention_factor,
        }
    if isinstance(scaling, YarnScaling):
        return {
            prefix + "type": "yarn",
            prefix + "factor": scaling.factor,
            prefix + "original_context_length": scaling.original_max_position_embeddings,
            prefix + "attn_factor": scaling.attention_factor / yarn_attention_factor(scaling.factor),
            prefix + "yarn_beta_fast": scaling.beta_fast,
            prefix + "yarn_beta_slow": scaling.beta_slow,
        }
    return {}


def rope_factors_of(spec: ModelSpec) -> dict[str, npt.NDArray[np.float32]]:
    """Those tensors [P] of `ROPE_TENSORS` that a GGUF file of this model needs."""
    scaling = spec.rope.scaling
    if isinstance(scaling, LongRopeScaling):
        return {
            "rope_factors_long.weight": np.asarray(scaling.long_factors, np.float32),
            "rope_factors_short.weight": np.asarray(scaling.short_factors, np.float32),
        }
    if isinstance(scaling, Llama3Scaling | FactorScaling):
        return {"rope_freqs.weight": (spec.base_inv_freq() / spec.inv_freq()).astype(np.float32)}
    return {}


def layer_tensors(spec: ModelSpec) -> dict[str, str]:
    """Part of a layer -> its usual name in a GGUF file."""
    return LAYER_TENSORS | {name: NORM_TENSORS[role] for role, name in NORM_NAMES[spec.norm_placement].items()}


def tensor_names(spec: ModelSpec, parts: Mapping[str, str]) -> dict[str, str]:
    """Hugging Face name -> GGUF name of every weight of `spec.tensor_shapes()`, in the same order."""
    names = {}
    for name in spec.tensor_shapes():
        stem, _, kind = name.rpartition(".")
        if stem in _TOP_TENSORS:
            names[name] = f"{_TOP_TENSORS[stem]}.{kind}"
        else:
            _, _, layer, part = stem.split(".", 3)
            names[name] = f"blk.{layer}.{parts[part]}.{kind}"
    return names
