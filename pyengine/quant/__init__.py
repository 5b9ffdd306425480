"""Models as GGUF files in blocks, and with an adapter folded into their weights."""

from pyengine.quant.gguf import QuantizeResult, quantize_to_gguf
from pyengine.quant.merge import merge_adapter

__all__ = ["QuantizeResult", "merge_adapter", "quantize_to_gguf"]
