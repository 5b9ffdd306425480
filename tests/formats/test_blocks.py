"""Quantisation: bit-exact to the gguf package without search, and closer to the weights with it."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.formats.quantizers import QUANTIZERS as ALL_QUANTIZERS
from pyengine.formats.quantizers import block_geometry

# Those that the package has too; and those whose scales are fitted, where no two writers agree.
QUANTIZERS = {name: ALL_QUANTIZERS[name.lower()] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")}
FITTED = {name.upper(): quantize for name, quantize in ALL_QUANTIZERS.items() if name.upper() not in QUANTIZERS}


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


@pytest.mark.parametrize(
    ("name", "gain"), [("Q4_0", 0.9), ("Q4_1", 0.95), ("Q5_0", 0.93), ("Q5_1", 0.97), ("Q8_0", 0.99)]
)
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


def dequantized(name, weight, search=False):
    blocks = FITTED[name](weight, search)
    block_size, block_bytes = block_geometry(name.lower())
    assert blocks.dtype == np.uint8
    assert blocks.shape == (*weight.shape[:-1], weight.shape[-1] // block_size * block_bytes)
    values = reference_values(name, blocks.reshape(-1, blocks.shape[-1]))
    return values.reshape(weight.shape)


def reference_values(name, blocks):
    return quants.dequantize(blocks, GGMLQuantizationType[name])


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("name", FITTED)
def test_fitted_formats_are_as_close_as_their_bits_allow(name, search):
    """A uniform code of b bits over [-a, a] has an rms error of a / 2^b / sqrt(3) at least; theirs is near it."""
    weight = np.random.default_rng(2).uniform(-1, 1, (16, 3, 512)).astype(np.float32)
    bits = {"Q4_K": 4, "Q5_K": 5, "Q6_K": 6, "IQ4_NL": 4}[name]
    rms = np.sqrt(np.mean((dequantized(name, weight, search) - weight) ** 2))
    least = 2.0**-bits / np.sqrt(3)
    assert 0.8 * least < rms < (1.6 if name == "IQ4_NL" else 1.1) * least


@pytest.mark.parametrize("name", FITTED)
def test_fitted_formats_search_for_less_error_where_weights_are_large(name):
    weight = (np.random.default_rng(3).standard_normal((64, 512)) * 0.02).astype(np.float32)
    plain, searched = (weight**2 * (dequantized(name, weight, search) - weight) ** 2 for search in (False, True))
    assert searched.sum() < plain.sum()


@pytest.mark.parametrize("name", FITTED)
def test_fitted_formats_on_odd_rows(name):
    weight = np.zeros((7, 256), np.float32)
    weight[1] = 2.5
    weight[2] = -2.5
    weight[3, 7] = -60000
    weight[4] = 1e-7
    weight[5, :16] = 1
    weight[6] = np.linspace(3, 5, 256)
    for search in (False, True):
        got = dequantized(name, weight, search)
        assert np.isfinite(got).all()
        largest = np.abs(weight).max(-1, keepdims=True)
        assert (np.abs(got - weight) <= np.maximum(0.07 * largest, 2e-7)).all()
        assert (got[0] == 0).all()


@pytest.mark.parametrize("name", FITTED)
def test_fitted_formats_refuse(name):
    quantize = FITTED[name]
    block_size, _ = block_geometry(name.lower())
    for shape in [(), (block_size - 1,), (2, block_size + 16)]:
        with pytest.raises(ArgumentError, match=f"weight: expected rows of a multiple of {block_size}"):
            quantize(np.zeros(shape, np.float32), False)
    for value in (np.inf, -np.inf, np.nan):
        weight = np.zeros(block_size, np.float32)
        weight[3] = value
        with pytest.raises(ArgumentError, match="weight: expected finite values"):
            quantize(weight, False)
    with pytest.raises(ArgumentError, match="weight: expected scales up to 65504"):
        quantize(np.linspace(-1e11, 1e11, block_size, dtype=np.float32), False)
    assert quantize(np.zeros((0, block_size), np.float32), False).shape[0] == 0


def test_the_command_line_offers_what_there_is():
    from pyengine.cli.options import WEIGHT_FORMATS
    from pyengine.infer import loader
    from pyengine.quant import gguf

    assert tuple(WEIGHT_FORMATS) == loader.WEIGHT_FORMATS == tuple(gguf.FORMATS)
