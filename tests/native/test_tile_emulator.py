"""The model of the AMX tile unit against the pseudo-code of the manual, written down once more in numpy."""

import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from rules import ROOT

CPU_FLAGS = set(Path("/proc/cpuinfo").read_text().split())
AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="no g++"),
    pytest.mark.skipif(not {"avx512f", "avx512dq"} <= CPU_FLAGS, reason="the model computes with AVX-512"),
]

# Where there is a real unit, it has to agree with the model.
HAS_SILICON = {"amx_tile", "amx_int8", "amx_bf16"} <= CPU_FLAGS
UNITS = ["emulated", pytest.param("silicon", marks=pytest.mark.skipif(not HAS_SILICON, reason="no AMX here"))]
INTEGER_KINDS = {"uud": 0, "usd": 1, "sud": 2, "ssd": 3}
BF16_KIND = 4
# (rows of c, columns, groups of four bytes along k): one of each, odd ones, whole tiles.
SHAPES = [(1, 1, 1), (16, 16, 16), (5, 3, 7), (16, 1, 2), (1, 16, 16), (13, 16, 8)]
NUMBERS = [(0, 1, 2), (6, 3, 5)]  # of the tiles c, a and b


@pytest.fixture(scope="module")
def tile_unit(tmp_path_factory):
    executable = tmp_path_factory.mktemp("tile_unit") / "tile_unit"
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    sources = [ROOT / "tests/native/tile_unit.cpp", ROOT / "csrc/runtime/tile_emulator.cpp"]
    command = ["g++", *flags, *AVX512, f"-I{ROOT}/csrc", f"-I{ROOT}/tests/native", *map(str, sources)]
    subprocess.run([*command, "-o", str(executable)], check=True)
    return executable


def record(kind, numbers, shape, c, a, b):
    """The bytes of one record: the configuration, the kind, and three memories of 16 rows of 64 bytes."""
    rows, cols, groups = shape
    config = np.zeros(64, np.uint8)
    config[0] = 1
    for tile, (r, row_bytes) in zip(numbers, [(rows, 4 * cols), (rows, 4 * groups), (groups, 4 * cols)], strict=True):
        config[16 + 2 * tile], config[48 + tile] = row_bytes, r
    kinds = np.zeros(64, np.uint8)
    kinds[:2] = kind, numbers != NUMBERS[0]
    return b"".join(part.tobytes() for part in (config, kinds, c, a, b))


def run(executable, unit, records):
    result = subprocess.run([str(executable), unit, "products"], input=b"".join(records), capture_output=True)
    assert result.returncode == 0, result.stderr
    return np.frombuffer(bytearray(result.stdout), np.uint8).reshape(len(records), 16, 64)


def integer_product(kind, shape, c, a, b):
    rows, cols, groups = shape
    left = a[:rows, : 4 * groups].view(np.int8 if kind[0] == "s" else np.uint8).astype(np.int64)
    right = b[:groups, : 4 * cols].reshape(groups, cols, 4).view(np.int8 if kind[1] == "s" else np.uint8)
    right = right.astype(np.int64).transpose(0, 2, 1).reshape(4 * groups, cols)
    out = c.copy()
    total = c[:rows].view(np.int32)[:, :cols].astype(np.int64) + left @ right
    out.view(np.uint32)[:rows, :cols] = total.astype(np.uint64).astype(np.uint32)
    return out


def flush(x):
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x).astype(np.float32)


def fused(a, b, c):
    """a * b + c rounded once, where a and b have 8 bits: the sum in f64 is too fine to round twice."""
    exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    tiny = np.abs((exact * 2.0**100).astype(np.float32)) < 2.0**-26  # rounded, as if exponents had no end
    return np.where(tiny, np.copysign(np.float32(0), exact), exact.astype(np.float32)).astype(np.float32)


def bf16_product(shape, c, a, b):
    rows, cols, groups = shape

    def widen(bits):
        return flush((bits.astype(np.uint32) << 16).view(np.float32))

    left = widen(a.view(np.uint16)[:rows, : 2 * groups])
    right = widen(b.view(np.uint16)[:groups, : 2 * cols])
    out = c.copy()
    result = out.view(np.float32)
    with np.errstate(all="ignore"):
        for m in range(rows):
            temp = np.zeros(2 * cols, np.float32)
            for k in range(groups):
                for i in (0, 1):
                    temp[i::2] = fused(left[m, 2 * k + i], right[k, i::2], temp[i::2])
            result[m, :cols] = flush(flush(result[m, :cols]) + flush(temp[0::2] + temp[1::2]))
    return out


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", INTEGER_KINDS)
def test_integer_products(tile_unit, unit, kind):
    rng = np.random.default_rng(0)
    cases = []
    for shape in SHAPES:
        for numbers in NUMBERS:
            cases.append((shape, numbers, *rng.integers(0, 256, (3, 16, 64), np.uint8)))
    cases.append(((16, 16, 16), NUMBERS[0], *np.full((3, 16, 64), 0xFF, np.uint8)))
    cases.append(((16, 16, 16), NUMBERS[0], *np.full((3, 16, 64), 0x80, np.uint8)))
    got = run(tile_unit, unit, [record(INTEGER_KINDS[kind], numbers, shape, *abc) for shape, numbers, *abc in cases])
    for (shape, _, *memories), result in zip(cases, got, strict=True):
        np.testing.assert_array_equal(result, integer_product(kind, shape, *memories))


def bf16_memories(rng, exponents):
    """a and b in bf16 with exponents in a range, c in f32 with those of their products; all signs and fractions."""

    def floats(shape, fraction_bits, low, high):
        sign, fraction = rng.integers(0, 2, shape), rng.integers(0, 1 << fraction_bits, shape)
        return sign << (8 + fraction_bits) | rng.integers(low, high, shape) << fraction_bits | fraction

    low, high = (min(max(2 * e - 127, 0), 255) for e in exponents)
    c = floats((16, 16), 23, low, high + 1).astype(np.uint32).view(np.uint8)
    a, b = (floats((16, 32), 7, *exponents).astype(np.uint16).view(np.uint8) for _ in range(2))
    return c, a, b


# Biased exponents: ordinary; all that cancel and absorb; products near the smallest normal; subnormal; overflow.
@pytest.mark.parametrize("exponents", [(125, 129), (110, 140), (58, 70), (0, 2), (180, 200), (1, 255)], ids=str)
@pytest.mark.parametrize("unit", UNITS)
def test_bf16_products(tile_unit, unit, exponents):
    rng = np.random.default_rng(1)
    cases = [(shape, numbers, *bf16_memories(rng, exponents)) for shape in SHAPES for numbers in NUMBERS]
    got = run(tile_unit, unit, [record(BF16_KIND, numbers, shape, *abc) for shape, numbers, *abc in cases])
    for (shape, _, *memories), result in zip(cases, got, strict=True):
        expected = bf16_product(shape, *memories)
        rows, cols, _ = shape
        a, b = result.view(np.float32)[:rows, :cols], expected.view(np.float32)[:rows, :cols]
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        a[np.isnan(a)] = b[np.isnan(b)] = 0
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("unit", UNITS)
def test_addresses(tile_unit, unit):
    result = subprocess.run([str(tile_unit), unit, "addresses"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


MISUSES = {
    "unconfigured": "tileloadd: no tiles are configured",
    "released": "tileloadd: no tiles are configured",
    "not_released": "ldtilecfg: the configuration before was not released",
    "palette": "ldtilecfg: the palette is neither 0 nor 1",
    "start_row": "ldtilecfg: start_row is not 0",
    "reserved": "ldtilecfg: a reserved byte is not 0",
    "ninth_tile": "ldtilecfg: tile 8: not a tile of palette 1",
    "rows": "ldtilecfg: tile 2: more than 16 rows",
    "row_bytes": "ldtilecfg: tile 2: more than 64 bytes a row",
    "no_bytes": "ldtilecfg: tile 7: rows without bytes, or bytes without rows",
    "one_missing": "tileloadd: tile 7: not configured",
    "groups": "tdpbssd: tile 1: groups of a row differ from the rows of the right operand",
    "left_rows": "tdpbssd: tile 0: rows differ from those of the left operand",
    "columns": "tdpbssd: tile 0: columns differ from those of the right operand",
    "half_groups": "tdpbssd: a row is no whole number of groups",
    "same_operands": "tdpbssd: tile 0: an operand is named twice",
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_named(tile_unit, misuse):
    result = subprocess.run([str(tile_unit), "emulated", misuse], capture_output=True, text=True)
    assert result.returncode == -signal.SIGABRT
    assert result.stderr == f"tile emulator: {MISUSES[misuse]}\n"


def test_no_misuse_is_no_error(tile_unit):
    assert subprocess.run([str(tile_unit), "emulated", "nothing"]).returncode == 0


def test_other_illegal_instructions_stay_illegal(tile_unit):
    assert subprocess.run([str(tile_unit), "emulated", "foreign"]).returncode == -signal.SIGILL
