"""A tiny random model on disk, made without torch."""

import ml_dtypes
import pytest

from pyengine.testing.random_model import make_spec, write_model


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
