"""Tiny random models on disk, made without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.families import config_from_spec
from pyengine.formats import write_safetensors
from pyengine.spec import ModelSpec, RopeSpec
from pyengine.testing.tiny import write_tiny_tokenizer


def make_spec(**overrides: Any) -> ModelSpec:
    """Two layers of 64; `overrides` are fields of ModelSpec."""
    values: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "norm_eps": 1e-5,
        "rope": RopeSpec(theta=10000.0),
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
    }
    return ModelSpec(**(values | overrides))


def write_model(
    folder: Path, spec: ModelSpec, dtype: npt.DTypeLike = np.float32, *, seed: int = 0, num_tokens: int | None = None
) -> Path:
    """Writes a Hugging Face folder; random weights whose logits differ enough that greedy text does not depend on
    rounding. `num_tokens` of the tokenizer are those of the model unless given. Returns `folder`."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: (rng.standard_normal(shape) * (0.3 if len(shape) == 2 else 0.1) + (len(shape) == 1)).astype(dtype)
        for name, shape in spec.tensor_shapes().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_from_spec(spec)))
    write_tiny_tokenizer(folder, vocab_size=num_tokens or spec.vocab_size)
    return folder
