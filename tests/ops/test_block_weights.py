import gguf
import numpy as np
import pytest
import torch

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.ops.matmul_w4a16 import pack_blocks
from pyengine.reference.block_weights import BLOCK_BYTES, dequantize
from pyengine.testing import assert_same_bits
from pyengine.testing.blocks import blocks, random_blocks, random_codes
from pyengine.testing.guard import guarded

FORMATS = {
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
GROUP_BYTES = {"q4_0": 288, "q4_1": 320, "q8_0": 544}
SHAPES = [(1, 32), (15, 64), (16, 32), (17, 96), (131, 160)]


def unpack(packed, block_format, num_rows, num_cols):
    out = torch.full((num_rows, num_cols), torch.nan)
    _C.block_weights_unpack(block_format, packed, out)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_format", FORMATS)
def test_unpacks_what_the_gguf_library_dequantizes(block_format, shape):
    raw = random_blocks(block_format, *shape)
    got = unpack(pack_blocks(raw, block_format), block_format, *shape)
    assert_same_bits(got, dequantize(raw, block_format))
    assert_same_bits(got, torch.from_numpy(gguf.quants.dequantize(raw.numpy(), FORMATS[block_format])))


def test_no_rows_and_no_columns():
    raw = random_blocks("q4_0", 5, 64)
    assert pack_blocks(raw[:0], "q4_0").shape == (0,)
    assert pack_blocks(raw[:, :0], "q4_0").shape == (0,)
    assert pack_blocks(raw, "q4_0", torch.tensor([], dtype=torch.int32)).shape == (0,)


@pytest.mark.parametrize("block_format", FORMATS)
def test_unpacks_what_the_gguf_library_quantizes(block_format):
    weight = np.random.default_rng(0).standard_normal((48, 96), dtype=np.float32)
    raw = gguf.quants.quantize(weight, FORMATS[block_format])
    packed = np.empty(_C.block_weights_packed_bytes(block_format, 48, 96), np.uint8)
    _C.block_weights_pack(block_format, raw, None, packed)
    got = unpack(packed, block_format, 48, 96)
    assert_same_bits(got, torch.from_numpy(gguf.quants.dequantize(raw, FORMATS[block_format])))


def test_every_f16_scale_is_read_exactly():
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16).reshape(-1, 1, 1)
    codes = torch.full((65536, 1, 16), 0x99, dtype=torch.uint8)  # q - 8 = 1 everywhere
    got = unpack(pack_blocks(blocks("q4_0", every, codes), "q4_0"), "q4_0", 65536, 32)
    expected = every[:, 0].float().expand(-1, 32)
    assert torch.equal(got.isnan(), expected.isnan())
    assert_same_bits(got[~got.isnan()], expected[~got.isnan()])


@pytest.mark.parametrize("block_format", FORMATS)
def test_layout_of_the_contract(block_format):
    """Codes and scales of one panel at the offsets that kernels of other engines may rely on."""
    num_groups = 3
    codes = random_codes(block_format, 16, 32 * num_groups)
    raw = random_blocks(block_format, 16, 32 * num_groups)
    raw = raw.reshape(16, num_groups, -1)
    raw[..., -codes.shape[-1] :] = codes
    packed = pack_blocks(raw.flatten(1), block_format).reshape(num_groups, GROUP_BYTES[block_format])
    for row, group, j, byte in [(0, 0, 0, 0), (3, 1, 2, 1), (15, 2, 3, 3), (7, 0, 1, 2)]:
        got = packed[group, 64 * j + 4 * row + byte]
        assert got == codes[row, group, 4 * j + byte] ^ (128 if block_format == "q8_0" else 0)
    scales = packed[:, 16 * codes.shape[-1] :].reshape(num_groups, -1, 16, 2)
    assert torch.equal(scales.permute(2, 0, 1, 3).flatten(2), raw[..., : -codes.shape[-1]])


@pytest.mark.parametrize("block_format", FORMATS)
def test_row_order_permutes_drops_and_repeats(block_format):
    raw = random_blocks(block_format, 21, 64)
    order = torch.randint(0, 21, (37,), dtype=torch.int32)
    got = unpack(pack_blocks(raw, block_format, order), block_format, 37, 64)
    assert_same_bits(got, dequantize(raw, block_format)[order.long()])


@pytest.mark.parametrize("block_format", FORMATS)
def test_whole_panels_concatenate(block_format):
    first, second = random_blocks(block_format, 32, 64), random_blocks(block_format, 5, 64)
    joined = torch.cat([pack_blocks(first, block_format), pack_blocks(second, block_format)])
    assert torch.equal(joined, pack_blocks(torch.cat([first, second]), block_format))


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("block_format", FORMATS)
def test_touches_no_byte_outside_its_buffers(block_format, at_end):
    raw = guarded(random_blocks(block_format, 19, 96), at_end=at_end)
    order = guarded(torch.arange(18, -1, -1, dtype=torch.int32), at_end=at_end)
    num_bytes = _C.block_weights_packed_bytes(block_format, 19, 96)
    packed = guarded(torch.zeros(num_bytes, dtype=torch.uint8), at_end=at_end)
    out = guarded(torch.zeros(19, 96), at_end=at_end)
    _C.block_weights_pack(block_format, raw, order, packed)
    _C.block_weights_unpack(block_format, packed, out)
    assert_same_bits(out, dequantize(raw, block_format).flip(0))


@pytest.mark.parametrize("block_format", FORMATS)
def test_strided_raw_rows(block_format):
    raw = random_blocks(block_format, 10, 64)
    wide = torch.cat([raw, torch.zeros_like(raw)], 1)[:, : raw.shape[1]]
    assert torch.equal(pack_blocks(wide, block_format), pack_blocks(raw, block_format))
    assert torch.equal(pack_blocks(raw[::3], block_format), pack_blocks(raw[::3].contiguous(), block_format))


def test_errors_name_the_argument():
    raw = random_blocks("q4_0", 4, 64)
    with pytest.raises(ArgumentError, match=r"\[block_weights\] block_format: expected q4_0, .* got 'q5_0'"):
        pack_blocks(raw, "q5_0")
    with pytest.raises(ArgumentError, match=r"raw: expected rows of whole q4_0 blocks of 18 bytes, got rows of 35"):
        pack_blocks(raw[:, :35], "q4_0")
    with pytest.raises(ArgumentError, match=r"raw: expected uint8, got int8"):
        pack_blocks(raw.to(torch.int8), "q4_0")
    with pytest.raises(ArgumentError, match=r"row_order: expected rows of raw, 0 to 3, got 4 at index 1"):
        pack_blocks(raw, "q4_0", torch.tensor([0, 4], dtype=torch.int32))
    with pytest.raises(ArgumentError, match=r"row_order: .* got -1 at index 0"):
        pack_blocks(raw, "q4_0", torch.tensor([-1], dtype=torch.int32))
    with pytest.raises(ArgumentError, match=r"row_order: expected int32, got int64"):
        pack_blocks(raw, "q4_0", torch.tensor([0]))
    with pytest.raises(ArgumentError, match=r"packed: expected shape \(576,\), got shape \(575,\)"):
        _C.block_weights_pack("q4_0", raw, None, torch.empty(575, dtype=torch.uint8))
    with pytest.raises(ArgumentError, match=r"packed: expected 576 bytes \(q4_0, 4 rows of 64\), got 577"):
        _C.block_weights_unpack("q4_0", torch.empty(577, dtype=torch.uint8), torch.empty(4, 64))
    with pytest.raises(ArgumentError, match=r"num_cols: expected a multiple of 32, got 33"):
        _C.block_weights_packed_bytes("q4_0", 4, 33)
    with pytest.raises(ArgumentError, match=r"num_rows: expected a size that fits memory"):
        _C.block_weights_packed_bytes("q8_0", 2**62, 2**40)
    with pytest.raises(ArgumentError, match=r"num_rows: expected a count, got -1"):
        _C.block_weights_packed_bytes("q8_0", -1, 32)
    frozen = np.zeros(576, np.uint8)
    frozen.flags.writeable = False
    with pytest.raises(ArgumentError, match=r"packed: expected writable memory"):
        _C.block_weights_pack("q4_0", raw, None, frozen)


@pytest.mark.parametrize("block_format", FORMATS)
def test_sizes_per_block(block_format):
    assert (32, BLOCK_BYTES[block_format]) == gguf.GGML_QUANT_SIZES[FORMATS[block_format]]
