"""The specification of `pyengine.models.CausalLM`: one sequence, plain torch, in the dtype of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyengine.spec import ModelSpec


def causal_lm_logits(spec: ModelSpec, weights: Mapping[str, Tensor], input_ids: Tensor) -> Tensor:
    """input_ids [T] -> logits [T, vocab_size]. `weights` as `spec.tensor_shapes()` names them, float32 or float64."""
    x = weights["model.embed_tokens.weight"][input_ids]
    positions = torch.arange(len(input_ids), dtype=torch.float64)
    angles = torch.outer(positions, torch.from_numpy(spec.inv_freq()))
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    distance = positions[:, None] - positions[None, :]
    visible = (distance >= 0) & (distance < (spec.sliding_window or len(input_ids)))
    for layer in range(spec.num_layers):
        w = {part: weights[f"model.layers.{layer}.{part}.weight"] for part in _PARTS}
        y = _rms_norm(x, w["input_layernorm"], spec.norm_eps)
        q, k, v = ((y @ w[f"self_attn.{part}_proj"].T).unflatten(-1, (-1, spec.head_dim)) for part in "qkv")
        q, k = (_rotate(part, cos, sin) for part in (q, k))
        k, v = (part.repeat_interleave(spec.num_heads // spec.num_kv_heads, 1) for part in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / spec.head_dim**0.5
        weights_of_values = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        x = x + torch.einsum("hts,shd->thd", weights_of_values, v).flatten(-2) @ w["self_attn.o_proj"].T
        y = _rms_norm(x, w["post_attention_layernorm"], spec.norm_eps)
        gate, up = y @ w["mlp.gate_proj"].T, y @ w["mlp.up_proj"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w["mlp.down_proj"].T
    x = _rms_norm(x, weights["model.norm.weight"], spec.norm_eps)
    return x @ weights["model.embed_tokens.weight" if spec.tie_word_embeddings else "lm_head.weight"].T


_PARTS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D]; pair i is (i, i + D/2)."""
    low, high = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
