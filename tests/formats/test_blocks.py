"""Quantisation: bit-exact to the gguf package without search, and closer to the weights with it."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.formats import quantize_q4_0, quantize_q4_1, quantize_q8_0

QUANTIZERS = {"Q4_0": quantize_q4_0, "Q4_1": quantize_q4_1, "Q8_0": quantize_q8_0}


def reference(name, weight):
    with np.errstate(all="ignore"):
        return quants.quantize(weight, GGMLQuantizationType[name])


def block_errors(name, blocks, weight):
    values = _C.gguf_dequantize(name, blocks, weight.size)
    return ((values.astype(np.float64) - weight.reshape(-1)) ** 2).reshape(-1, 32).sum(axis=-1)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_same_bytes_as_the_package(name):
    rng = np.random.default_rng(0)
    weights = [
        rng.standard_normal((64, 256)).astype(np.float32),
        (rng.standard_t(2, (32, 96)) * 10.0 ** rng.integers(-5, 3, (32, 1))).astype(np.float32),
        rng.integers(-15, 16, (50, 64)).astype(np.float32) / 8,
        np.zeros((2, 32), np.float32),
        np.full((2, 32), -3.25, np.float32),
        rng.standard_normal((2, 3, 4, 32)).astype(np.float32),
        np.concatenate([np.tile(np.float32([1, -1]), 16), np.tile(np.float32([-1, 1]), 16)])[None],
    ]
    for weight in weights:
        np.testing.assert_array_equal(QUANTIZERS[name](weight), reference(name, weight), strict=True)


@pytest.mark.parametrize("name", QUANTIZERS)
@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, (2, 32), elements=st.floats(-60000, 60000, width=16)))
def test_same_bytes_as_the_package_for_any_values(name, weight):
    np.testing.assert_array_equal(QUANTIZERS[name](weight), reference(name, weight))


@pytest.mark.parametrize(("name", "gain"), [("Q4_0", 0.9), ("Q4_1", 0.95), ("Q8_0", 0.99)])
def test_search_lowers_the_error_of_every_block(name, gain):
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal((64, 256)) * 0.02).astype(np.float32)
    plain = block_errors(name, QUANTIZERS[name](weight), weight)
    searched = block_errors(name, QUANTIZERS[name](weight, search=True), weight)
    assert (searched <= plain).all()
    assert searched.sum() < gain * plain.sum()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_search_on_odd_blocks(name):
    weight = np.zeros((5, 32), np.float32)
    weight[1] = 2.5
    weight[2, 7] = -60000
    weight[3] = 1e-7
    weight[4, :16] = 1
    plain = block_errors(name, QUANTIZERS[name](weight), weight)
    assert (block_errors(name, QUANTIZERS[name](weight, search=True), weight) <= plain).all()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_refuses(name):
    quantize = QUANTIZERS[name]
    for shape in [(), (31,), (2, 33)]:
        with pytest.raises(ArgumentError, match="weight: expected rows of a multiple of 32"):
            quantize(np.zeros(shape, np.float32))
    for value in (np.inf, -np.inf, np.nan):
        weight = np.zeros(32, np.float32)
        weight[3] = value
        with pytest.raises(ArgumentError, match="weight: expected finite values"):
            quantize(weight)
    with pytest.raises(ArgumentError, match="weight: expected scales up to 65504"):
        quantize(np.linspace(-1e9, 1e9, 32, dtype=np.float32))
    assert quantize(np.zeros((0, 32), np.float32)).shape[0] == 0
