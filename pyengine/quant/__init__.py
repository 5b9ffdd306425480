"""Weights in 4 and 8 bits, and with an adapter folded in."""

from pyengine.quant.gguf import QuantizeResult, quantize_to_gguf
from pyengine.quant.merge import merge_adapter

__all__ = ["QuantizeResult", "merge_adapter", "quantize_to_gguf"]
