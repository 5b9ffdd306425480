"""Granite: constant factors on the embedding, the scores of attention, what each block adds, and the logits."""

from __future__ import annotations

from pyengine.families.family import ATTENTION_BIAS, MLP_BIAS, Family, Option

FAMILY = Family(
    name="granite",
    classes={"granite": "GraniteForCausalLM"},
    gguf_architecture="granite",
    options=(
        ATTENTION_BIAS,
        MLP_BIAS,
        Option(
            fields=("embedding_multiplier",),
            config_key="embedding_multiplier",
            default=1.0,
            gguf_key="embedding_scale",
        ),
        Option(
            fields=("residual_multiplier",), config_key="residual_multiplier", default=1.0, gguf_key="residual_scale"
        ),
        Option(fields=("attention_scale",), config_key="attention_multiplier", default=1.0, gguf_key="attention.scale"),
        Option(fields=("logits_divisor",), config_key="logits_scaling", default=1.0, gguf_key="logit_scale"),
    ),
    gguf_permuted=True,
    gguf_biases=("qkv_bias", "o_bias", "mlp_bias"),
)
