"""Weights in 4 and 8 bits."""

from pyengine.quant.gguf import QuantizeResult, quantize_to_gguf

__all__ = ["QuantizeResult", "quantize_to_gguf"]
