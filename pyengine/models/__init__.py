"""Torch models built from `ModelSpec`, and their way to and from disk."""

from pyengine.models.causal_lm import CausalLM
from pyengine.models.initialize import initialize
from pyengine.models.pretrained import from_pretrained, save_pretrained

__all__ = ["CausalLM", "from_pretrained", "initialize", "save_pretrained"]
