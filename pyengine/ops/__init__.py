"""Torch ops over the native kernels, one module per op. Importing this loads torch."""

from pyengine.ops.adamw import adamw_
from pyengine.ops.attention import attention
from pyengine.ops.attention_decode import attention_decode, kv_append
from pyengine.ops.gelu import gelu
from pyengine.ops.layer_norm import layer_norm, layer_norm_residual
from pyengine.ops.linear_cross_entropy import linear_cross_entropy
from pyengine.ops.lora import lora, lora_rows
from pyengine.ops.matmul import matmul
from pyengine.ops.matmul_w4a8 import matmul_w4a8
from pyengine.ops.matmul_w4a16 import matmul_w4a16
from pyengine.ops.matmul_w8a8 import matmul_w8a8
from pyengine.ops.quantize_int8 import quantize_int8
from pyengine.ops.rms_norm import rms_norm, rms_norm_residual
from pyengine.ops.rope import rope
from pyengine.ops.sample import sample
from pyengine.ops.swiglu import swiglu

__all__ = [
    "adamw_",
    "attention",
    "attention_decode",
    "gelu",
    "kv_append",
    "layer_norm",
    "layer_norm_residual",
    "linear_cross_entropy",
    "lora",
    "lora_rows",
    "matmul",
    "matmul_w4a8",
    "matmul_w4a16",
    "matmul_w8a8",
    "quantize_int8",
    "rms_norm",
    "rms_norm_residual",
    "rope",
    "sample",
    "swiglu",
]
