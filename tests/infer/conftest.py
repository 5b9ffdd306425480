"""A tiny random model on disk, made without torch."""

import json

import ml_dtypes
import numpy as np
import pytest

from pyengine.families import config_from_spec
from pyengine.formats import write_safetensors
from pyengine.spec import ModelSpec, RopeSpec
from pyengine.testing.tiny import write_tiny_tokenizer


def make_spec(**overrides):
    values = {
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


def write_model(folder, spec, dtype=np.float32, seed=0):
    """Random weights whose logits differ enough that greedy text does not depend on rounding."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: (rng.standard_normal(shape) * (0.3 if len(shape) == 2 else 0.1) + (len(shape) == 1)).astype(dtype)
        for name, shape in spec.tensor_shapes().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_from_spec(spec)))
    write_tiny_tokenizer(folder, vocab_size=spec.vocab_size)
    return folder


@pytest.fixture(scope="session")
def spec():
    return make_spec()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, spec):
    """float32 weights."""
    return write_model(tmp_path_factory.mktemp("tiny") / "f32", spec)


@pytest.fixture(scope="session")
def tiny_bf16(tmp_path_factory, spec):
    return write_model(tmp_path_factory.mktemp("tiny") / "bf16", spec, ml_dtypes.bfloat16)
