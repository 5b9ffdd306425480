"""What families share in reading and writing the metadata and tensor names of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.errors import ArgumentError
from pyengine.families.fields import get_float, get_ids, get_int, get_optional_int
from pyengine.spec import NORM_NAMES, FactorScaling, LinearScaling, Llama3Scaling, ModelSpec, RopeScaling, RopeSpec

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
_TOP_TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BIASES = {"qkv_bias": "attn_q.bias", "o_bias": "attn_output.bias", "mlp_bias": "ffn_gate.bias"}
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


def sizes_from_gguf(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
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
        "norm_eps": shortest(get_float(metadata, prefix + "attention.layer_norm_rms_epsilon")),
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
        prefix + "attention.layer_norm_rms_epsilon": spec.norm_eps,
        prefix + "rope.dimension_count": spec.rotary_dim or spec.head_dim,
        prefix + "rope.freq_base": spec.rope.theta,
    }
    if isinstance(spec.rope.scaling, LinearScaling):
        metadata |= {prefix + "rope.scaling.type": "linear", prefix + "rope.scaling.factor": spec.rope.scaling.factor}
    if spec.bos_token_id is not None:
        metadata["tokenizer.ggml.bos_token_id"] = spec.bos_token_id
    if len(spec.eos_token_ids) > 2:
        raise ArgumentError(f"eos_token_ids: expected at most 2, which a GGUF file can say, got {spec.eos_token_ids}")
    for key, token_id in zip(("eos", "eot"), spec.eos_token_ids, strict=False):
        metadata[f"tokenizer.ggml.{key}_token_id"] = token_id
    if spec.pad_token_id is not None:
        metadata["tokenizer.ggml.padding_token_id"] = spec.pad_token_id
    return metadata


def rope_from_gguf(
    metadata: Mapping[str, Any], architecture: str, rope_freqs: npt.NDArray[np.floating[Any]] | None
) -> RopeSpec:
    theta = shortest(get_float(metadata, f"{architecture}.rope.freq_base", 10000.0))
    return RopeSpec(theta=theta, scaling=_scaling(metadata, f"{architecture}.rope.", rope_freqs))


def _scaling(
    metadata: Mapping[str, Any], prefix: str, rope_freqs: npt.NDArray[np.floating[Any]] | None
) -> RopeScaling | None:
    name = metadata.get(prefix + "scaling.type", "none")
    if name not in ("none", "linear"):
        raise ArgumentError(f"{prefix}scaling.type: expected 'none' or 'linear', got {name!r:.80}")
    if rope_freqs is not None:
        if name != "none":
            raise ArgumentError(f"{prefix}scaling.type: expected 'none' beside rope_freqs.weight, got {name!r}")
        return FactorScaling(factors=tuple(float(factor) for factor in np.ravel(rope_freqs)))
    # An older key for the same thing; both are the factor itself.
    factor = metadata.get(prefix + "scaling.factor", metadata.get(prefix + "scale_linear"))
    if name == "linear" or (factor is not None and factor != 1.0):
        key = prefix + "scaling.factor"
        return LinearScaling(factor=shortest(get_float({key: factor}, key)))
    return None


def rope_freqs_of(spec: ModelSpec) -> npt.NDArray[np.float32] | None:
    """The tensor `rope_freqs.weight` [P] that a GGUF file of this model needs, or None."""
    if not isinstance(spec.rope.scaling, Llama3Scaling | FactorScaling):
        return None
    return (spec.base_inv_freq() / spec.inv_freq()).astype(np.float32)


def tensor_names(spec: ModelSpec, layer_tensors: Mapping[str, str]) -> dict[str, str]:
    """Hugging Face name -> GGUF name of every weight of `spec.tensor_shapes()`, in the same order."""
    norms = {name: NORM_TENSORS[role] for role, name in NORM_NAMES[spec.norm_placement].items()}
    names = {}
    for name in spec.tensor_shapes():
        stem, _, kind = name.rpartition(".")
        if stem in _TOP_TENSORS:
            names[name] = f"{_TOP_TENSORS[stem]}.{kind}"
        else:
            _, _, layer, part = stem.split(".", 3)
            names[name] = f"blk.{layer}.{(norms.get(part) or layer_tensors[part])}.{kind}"
    return names
