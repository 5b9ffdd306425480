import gguf
import numpy as np
import pytest
import torch

from pyengine import _C
from pyengine.errors import ArgumentError
from pyengine.ops.matmul_w4a16 import pack_blocks
from pyengine.reference.block_weights import BLOCK_BYTES, BLOCK_SIZE, BOOK, dequantize, parts
from pyengine.testing import assert_same_bits
from pyengine.testing.blocks import FORMATS, blocks, columns, random_blocks, scale_offsets
from pyengine.testing.guard import guarded

GGUF_TYPES = {name: gguf.GGMLQuantizationType[name.upper()] for name in FORMATS}
QUANTIZED_BY_GGUF = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]
# Bits of the two planes of a code.
PLANES = dict.fromkeys(("q4_0", "q4_1", "iq4_nl", "q4_k", "iq4_xs"), (4, 0)) | {
    "q5_0": (4, 1),
    "q5_1": (4, 1),
    "q5_k": (4, 1),
    "q8_0": (8, 0),
    "q2_k": (2, 0),
    "q3_k": (2, 1),
    "q6_k": (4, 2),
}
# Bytes of a packed block of a panel: super scales, and its groups.
PACKED_BYTES = {
    "q4_0": 288,
    "q4_1": 320,
    "q5_0": 352,
    "q5_1": 384,
    "q8_0": 544,
    "iq4_nl": 288,
    "q2_k": 64 + 8 * 160,
    "q3_k": 32 + 8 * 224,
    "q4_k": 64 + 8 * 288,
    "q5_k": 64 + 8 * 352,
    "q6_k": 32 + 8 * 416,
    "iq4_xs": 32 + 8 * 272,
}
SHAPES = [(1, 1), (15, 2), (16, 1), (17, 3), (131, 5)]  # rows, blocks


def unpack(packed, block_format, num_rows, num_cols):
    out = torch.full((num_rows, num_cols), torch.nan)
    _C.block_weights_unpack(block_format, packed, out)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_format", FORMATS)
def test_unpacks_what_the_gguf_library_dequantizes(block_format, shape):
    num_rows, num_cols = shape[0], columns(block_format, shape[1])
    raw = random_blocks(block_format, num_rows, num_cols)
    got = unpack(pack_blocks(raw, block_format), block_format, num_rows, num_cols)
    assert_same_bits(got, dequantize(raw, block_format))
    assert_same_bits(got, torch.from_numpy(gguf.quants.dequantize(raw.numpy(), GGUF_TYPES[block_format])))


@pytest.mark.parametrize("block_format", FORMATS)
def test_the_reference_in_f64_is_the_exact_weight(block_format):
    raw = random_blocks(block_format, 4, columns(block_format, 2))
    exact = dequantize(raw, block_format, torch.float64)
    assert_same_bits(exact.float(), dequantize(raw, block_format))


def test_no_rows_and_no_columns():
    raw = random_blocks("q4_0", 5, 64)
    assert pack_blocks(raw[:0], "q4_0").shape == (0,)
    assert pack_blocks(raw[:, :0], "q4_0").shape == (0,)
    assert pack_blocks(raw, "q4_0", torch.tensor([], dtype=torch.int32)).shape == (0,)


@pytest.mark.parametrize("block_format", QUANTIZED_BY_GGUF)
def test_unpacks_what_the_gguf_library_quantizes(block_format):
    weight = np.random.default_rng(0).standard_normal((48, 96), dtype=np.float32)
    raw = gguf.quants.quantize(weight, GGUF_TYPES[block_format])
    packed = np.empty(_C.block_weights_packed_bytes(block_format, 48, 96), np.uint8)
    _C.block_weights_pack(block_format, raw, None, packed)
    got = unpack(packed, block_format, 48, 96)
    assert_same_bits(got, torch.from_numpy(gguf.quants.dequantize(raw, GGUF_TYPES[block_format])))


def test_every_f16_scale_is_read_exactly():
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16).reshape(-1, 1, 1)
    codes = torch.full((65536, 1, 16), 0x99, dtype=torch.uint8)  # q - 8 = 1 everywhere
    got = unpack(pack_blocks(blocks("q4_0", every, codes), "q4_0"), "q4_0", 65536, 32)
    expected = every[:, 0].float().expand(-1, 32)
    assert torch.equal(got.isnan(), expected.isnan())
    assert_same_bits(got[~got.isnan()], expected[~got.isnan()])


@pytest.mark.parametrize("block_format", FORMATS)
def test_layout_of_the_contract(block_format):
    """Codes and f16 scales of one panel at the offsets that kernels of other engines may rely on."""
    num_cols = columns(block_format, 2)
    raw = random_blocks(block_format, 16, num_cols)
    packed = pack_blocks(raw, block_format).reshape(2, PACKED_BYTES[block_format])
    halves = [raw.reshape(16, 2, -1)[:, :, at : at + 2] for at in scale_offsets(block_format)]  # [row, block, 2]
    if block_format in ("q2_k", "q4_k", "q5_k"):
        halves[1] = halves[1] ^ torch.tensor([0, 128], dtype=torch.uint8)  # GGUF subtracts this one
    stored = torch.stack(halves).permute(2, 0, 1, 3).flatten(1)
    low, high = PLANES[block_format]
    if BLOCK_SIZE[block_format] == 32:
        assert torch.equal(packed[:, 64 * (low + high) :], stored)
        groups = packed
    else:
        assert torch.equal(packed[:, : stored.shape[1]], stored)
        groups = packed[:, stored.shape[1] :].reshape(16, -1)

    codes = parts(raw, block_format)[0].flatten(1)
    if block_format in ("iq4_nl", "iq4_xs"):
        codes = torch.searchsorted(torch.tensor(BOOK, dtype=torch.float32), codes)
    elif block_format not in ("q4_1", "q5_1", "q2_k", "q4_k", "q5_k"):
        codes = codes + 2 ** (low + high - 1)
    codes = codes.to(torch.uint8)
    for row, k in [(0, 0), (3, 5), (15, 31), (7, 22), (9, num_cols - 1), (2, num_cols - 18)]:
        group, quad = groups[k // 32], k % 32 // 4
        got = 0
        for first, width in ((0, low), (low, high)):
            if width:
                byte = int(group[64 * (first + quad % width) + 4 * row + k % 4])
                got |= (byte >> (quad // width * width) & (2**width - 1)) << first
        assert got == codes[row, k]


@pytest.mark.parametrize("block_format", FORMATS)
def test_row_order_permutes_drops_and_repeats(block_format):
    num_cols = columns(block_format, 2)
    raw = random_blocks(block_format, 21, num_cols)
    order = torch.randint(0, 21, (37,), dtype=torch.int32)
    got = unpack(pack_blocks(raw, block_format, order), block_format, 37, num_cols)
    assert_same_bits(got, dequantize(raw, block_format)[order.long()])


@pytest.mark.parametrize("block_format", FORMATS)
def test_whole_panels_concatenate(block_format):
    num_cols = columns(block_format, 2)
    first, second = random_blocks(block_format, 32, num_cols), random_blocks(block_format, 5, num_cols)
    joined = torch.cat([pack_blocks(first, block_format), pack_blocks(second, block_format)])
    assert torch.equal(joined, pack_blocks(torch.cat([first, second]), block_format))


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("block_format", FORMATS)
def test_touches_no_byte_outside_its_buffers(block_format, at_end):
    num_cols = columns(block_format, 3)
    raw = guarded(random_blocks(block_format, 19, num_cols), at_end=at_end)
    order = guarded(torch.arange(18, -1, -1, dtype=torch.int32), at_end=at_end)
    num_bytes = _C.block_weights_packed_bytes(block_format, 19, num_cols)
    packed = guarded(torch.zeros(num_bytes, dtype=torch.uint8), at_end=at_end)
    out = guarded(torch.zeros(19, num_cols), at_end=at_end)
    _C.block_weights_pack(block_format, raw, order, packed)
    _C.block_weights_unpack(block_format, packed, out)
    assert_same_bits(out, dequantize(raw, block_format).flip(0))


@pytest.mark.parametrize("block_format", FORMATS)
def test_strided_raw_rows(block_format):
    raw = random_blocks(block_format, 10, columns(block_format, 2))
    wide = torch.cat([raw, torch.zeros_like(raw)], 1)[:, : raw.shape[1]]
    assert torch.equal(pack_blocks(wide, block_format), pack_blocks(raw, block_format))
    assert torch.equal(pack_blocks(raw[::3], block_format), pack_blocks(raw[::3].contiguous(), block_format))


def test_errors_name_the_argument():
    raw = random_blocks("q4_0", 4, 64)
    with pytest.raises(ArgumentError, match=r"\[block_weights\] block_format: expected one of q4_0, .* got 'q4_2'"):
        pack_blocks(raw, "q4_2")
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
    with pytest.raises(ArgumentError, match=r"num_cols: expected a multiple of 256, got 288"):
        _C.block_weights_packed_bytes("q4_k", 4, 288)
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
    sizes = BLOCK_SIZE[block_format], BLOCK_BYTES[block_format]
    assert sizes == gguf.GGML_QUANT_SIZES[GGUF_TYPES[block_format]]
    assert _C.block_formats()[block_format] == (*sizes, PACKED_BYTES[block_format])
