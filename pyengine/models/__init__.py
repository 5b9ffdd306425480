"""Torch models built from `ModelSpec`, and their way to and from disk."""

from pyengine.models.adapters import add_adapter, load_adapter, merge_adapter, save_adapter
from pyengine.models.causal_lm import CausalLM
from pyengine.models.initialize import initialize
from pyengine.models.pretrained import from_pretrained, save_pretrained

__all__ = [
    "CausalLM",
    "add_adapter",
    "from_pretrained",
    "initialize",
    "load_adapter",
    "merge_adapter",
    "save_adapter",
    "save_pretrained",
]
