"""Torch modules over the native ops. Parameters have the names of Hugging Face's Llama, in models of every family."""

from pyengine.nn.attention import Attention, PackedPositions
from pyengine.nn.embedding import Embedding
from pyengine.nn.layer_norm import LayerNorm
from pyengine.nn.linear import Linear
from pyengine.nn.lora import LoraLinear
from pyengine.nn.mlp import PlainMlp, SwiGluMlp
from pyengine.nn.rms_norm import RMSNorm

__all__ = [
    "Attention",
    "Embedding",
    "LayerNorm",
    "Linear",
    "LoraLinear",
    "PackedPositions",
    "PlainMlp",
    "RMSNorm",
    "SwiGluMlp",
]
