"""Optimisers over the native ops."""

from pyengine.optim.adamw import AdamW
from pyengine.optim.clip import clip_scale, grad_norm

__all__ = ["AdamW", "clip_scale", "grad_norm"]
