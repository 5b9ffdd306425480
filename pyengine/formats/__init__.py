"""Model files: safetensors and GGUF, read without copies from untrusted sources and written by rename."""

from pyengine.formats.blocks import (
    quantize_iq4_nl,
    quantize_q4_0,
    quantize_q4_1,
    quantize_q5_0,
    quantize_q5_1,
    quantize_q8_0,
)
from pyengine.formats.gguf import GgufReader, GgufTensor, open_gguf, write_gguf
from pyengine.formats.safetensors import SafetensorsReader, open_safetensors, write_safetensors
from pyengine.formats.super_blocks import quantize_q4_k, quantize_q5_k, quantize_q6_k

__all__ = [
    "GgufReader",
    "GgufTensor",
    "SafetensorsReader",
    "open_gguf",
    "open_safetensors",
    "quantize_iq4_nl",
    "quantize_q4_0",
    "quantize_q4_1",
    "quantize_q4_k",
    "quantize_q5_0",
    "quantize_q5_1",
    "quantize_q5_k",
    "quantize_q6_k",
    "quantize_q8_0",
    "write_gguf",
    "write_safetensors",
]
