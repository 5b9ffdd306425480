"""The tensor caster (csrc/bindings/tensor.cpp) without torch: what it reads, what it refuses, what it costs."""

import array
import ctypes
import mmap
import sys
import threading

import ml_dtypes
import numpy as np
import pytest

from pyengine import _C
from pyengine.errors import ArgumentError, PyEngineError

describe = _C.describe_tensor

DTYPES = ["float32", "float64", "float16", "uint8", "int8", "uint16", "int32", "uint32", "int64", "bool"]


def rms_norm(x, y=None, weight=None):
    y = np.empty(x.shape, np.float32) if y is None else y
    weight = np.ones(x.shape[-1], np.float32) if weight is None else weight
    _C.rms_norm_fwd_cpu(x, None, weight, None, y, None, 1e-6, 0.0)
    return y


def expected_rms_norm(x):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


# --- what it reads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_shape_strides_and_address_of_arrays(dtype):
    a = np.zeros((3, 4, 5), dtype)
    for view in (a, a.T, a[::2, 1:, ::-1], a[:0], a[1, 2, 3, ...], np.broadcast_to(a[:1], (7, 4, 5))):
        got = describe(view)
        assert got["dtype"] == dtype
        assert got["shape"] == view.shape
        assert got["strides"] == tuple(s // view.itemsize for s in view.strides)
        assert got["address"] == view.__array_interface__["data"][0]
        assert got["read_only"] is not view.flags.writeable


def test_a_field_of_records():
    records = np.zeros(3, [("a", "<f4"), ("b", "<i8")])
    assert describe(records["a"])["strides"] == (3,)


def test_no_dimension_and_no_element():
    assert describe(np.float32(2.0).reshape(()))["shape"] == ()
    assert describe(np.array(2.0))["strides"] == ()
    empty = describe(np.empty((0, 5), np.float32))
    assert empty["shape"] == (0, 5)
    assert rms_norm(np.empty((0, 5), np.float32)).shape == (0, 5)
    with pytest.raises(ArgumentError, match=r"\[rms_norm\] x: expected shape \(\*, \*\), got shape \(\)"):
        rms_norm(np.array(2.0, np.float32), np.empty((1, 1), np.float32), np.ones(1, np.float32))


def test_eight_dimensions_and_no_more():
    assert describe(np.zeros((1,) * 8, np.float32))["shape"] == (1,) * 8
    for ndim in (9, 32, 64 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 32):
        with pytest.raises(ArgumentError, match=f"ndarray: {ndim} dimensions, at most 8"):
            describe(np.zeros((1,) * ndim, np.float32))


@pytest.mark.parametrize(
    ("source", "dtype", "shape"),
    [
        (b"abcd", "uint8", (4,)),
        (bytearray(b"abcd"), "uint8", (4,)),
        (memoryview(b"abcd"), "uint8", (4,)),
        (memoryview(b"abcdefgh").cast("f"), "float32", (2,)),
        (memoryview(bytearray(24)).cast("i", (2, 3)), "int32", (2, 3)),
        (memoryview(b"abcd")[::2], "uint8", (2,)),
        (memoryview(b"abcd")[::-1], "uint8", (4,)),
        (array.array("d", [1.0, 2.0]), "float64", (2,)),
        (array.array("l", [1, 2]), "int64", (2,)),
        (array.array("q", [1, 2]), "int64", (2,)),
        # Arrays of ctypes come without strides, and c_long with the letter of a type of 4 bytes.
        ((ctypes.c_float * 4)(), "float32", (4,)),
        ((ctypes.c_long * 4 * 3)(), "int64", (3, 4)),
        ((ctypes.c_int32 * 4)(), "int32", (4,)),
        ((ctypes.c_int64 * 0)(), "int64", (0,)),
        (mmap.mmap(-1, 4096), "uint8", (4096,)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_buffers(source, dtype, shape):
    got = describe(source)
    view = memoryview(source)
    assert (got["dtype"], got["shape"], got["read_only"]) == (dtype, shape, view.readonly)
    if 0 not in shape:
        assert got["strides"] == tuple(s // view.itemsize for s in view.strides)


def test_a_reader_of_c_arrays_sees_their_values():
    x = (ctypes.c_float * 4 * 3)(*[(ctypes.c_float * 4)(1, 2, 3, r) for r in range(3)])
    y = (ctypes.c_float * 4 * 3)()
    _C.rms_norm_fwd_cpu(x, None, np.ones(4, np.float32), None, y, None, 1e-6, 0.0)
    np.testing.assert_allclose(np.array(y), expected_rms_norm(np.array(x)), rtol=1e-6)


class Capsule:
    """Offers only `__dlpack__`, as arrays of other libraries do."""

    def __init__(self, owner):
        self.owner = owner

    def __dlpack__(self, **options):
        return self.owner.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.owner.__dlpack_device__()


def test_capsules():
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    got = describe(Capsule(a))
    assert (got["dtype"], got["shape"], got["address"]) == ("float32", (3, 4), a.ctypes.data)
    y = rms_norm(a)
    _C.rms_norm_fwd_cpu(Capsule(a), None, Capsule(np.ones(4, np.float32)), None, Capsule(y), None, 1e-6, 0.0)
    np.testing.assert_allclose(y, expected_rms_norm(a), rtol=1e-6)
    before = sys.getrefcount(a)
    for _ in range(100):
        describe(Capsule(a))
    assert sys.getrefcount(a) == before


def test_strides_reach_the_kernel():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((8, 40)).astype(np.float32)
    for x in (base[::2], base[::-1], base[:, 3:17], base[1:6:3, 2:]):
        np.testing.assert_allclose(rms_norm(x), expected_rms_norm(x), rtol=2e-6)
    wide = np.full((4, 20), 7.0, np.float32)
    rms_norm(np.ascontiguousarray(base[:4, :10]), wide[:, 5:15])
    np.testing.assert_allclose(wide[:, 5:15], expected_rms_norm(base[:4, :10]), rtol=2e-6)
    assert (wide[:, :5] == 7.0).all()
    assert (wide[:, 15:] == 7.0).all()


# --- what it refuses --------------------------------------------------------------------------------------------------


class Plain:
    pass


class RaisingDlpack:
    def __dlpack__(self, **options):
        raise RuntimeError("no export today\nsecond line")


class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class RaisingUnprintable:
    def __dlpack__(self, **options):
        raise UnprintableError

    def __repr__(self):
        raise RuntimeError("no repr")

    __str__ = __repr__


class WrongCapsule:
    def __dlpack__(self, **options):
        return 3


class WrongTable:
    __dlpack_c_exchange_api__ = "no capsule"


class Lying(type):
    def __getattribute__(cls, name):
        raise SystemError(name)


class RaisingAttributes(metaclass=Lying):
    def __getattribute__(self, name):
        raise ValueError(name)


STRUCTURED = np.zeros(3, [("a", "<f4"), ("b", "u1")])
REFUSED = {
    "none": (None, "NoneType: it offers neither DLPack nor the buffer protocol"),
    "int": (3, "int: it offers neither"),
    "float": (3.0, "float: it offers neither"),
    "str": ("text", "str: it offers neither"),
    "list": ([1.0, 2.0], "list: it offers neither"),
    "plain": (Plain(), "Plain: it offers neither"),
    "class": (np.ndarray, "type: TypeError: "),
    "complex": (np.zeros(2, np.complex64), "ndarray: buffer format 'Zf'"),
    "structured": (STRUCTURED, "ndarray: buffer format"),
    "field_of_structured": (STRUCTURED["a"], "a stride that is no multiple of the element size"),
    "big_endian": (np.zeros(2, ">f4"), "ndarray: buffer format '>f'"),
    "long_double": (np.zeros(2, np.longdouble), "ndarray: buffer format 'g'"),
    "uint64": (np.zeros(2, np.uint64), "ndarray: buffer format 'L'"),
    "bytes_dtype": (np.zeros(2, "S4"), "ndarray: buffer format '4s'"),
    "void": (np.zeros(2, "V0"), "ndarray: buffer format"),
    "unicode": (np.array(["ab"]), "ndarray: buffer format '2w'"),
    "objects": (np.array([None, 1], object), "ndarray: buffer format 'O'"),
    "datetime": (np.zeros(2, "M8[s]"), "ndarray: "),
    "c_char": ((ctypes.c_char * 2)(), "buffer format 'c'"),
    "bfloat16_array": (np.zeros(2, ml_dtypes.bfloat16), "ndarray: "),
    "released": (lambda: _released(), "memoryview: ValueError"),
    "raising_dlpack": (RaisingDlpack(), "RaisingDlpack: RuntimeError: no export today"),
    "raising_unprintable": (RaisingUnprintable(), "RaisingUnprintable: UnprintableError"),
    "wrong_capsule": (WrongCapsule(), "WrongCapsule: ValueError: PyCapsule_GetPointer"),
    "wrong_table": (WrongTable(), "WrongTable: it offers neither"),
    "raising_attributes": (RaisingAttributes(), "RaisingAttributes: it offers neither"),
}


def _released():
    view = memoryview(b"abc")
    view.release()
    return view


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_tensor_is_named(case):
    source, text = REFUSED[case]
    source = source() if case == "released" else source
    with pytest.raises(ArgumentError) as error:
        describe(source)
    message = str(error.value)
    assert message.startswith("tensor: expected a dense tensor or array in memory, got ")
    assert text in message
    assert "\n" not in message
    assert isinstance(error.value, PyEngineError)
    assert isinstance(error.value, ValueError)
    # The same argument in an op: never a TypeError with the reprs of all arguments.
    with pytest.raises(ArgumentError):
        _C.rms_norm_fwd_cpu(source, None, source, None, source, None, 1e-6, 0.0)


def test_missing_and_superfluous_arguments_are_type_errors():
    with pytest.raises(TypeError):
        describe()
    with pytest.raises(TypeError):
        describe(np.zeros(1), np.zeros(1))


def test_checks_of_an_op_name_argument_expectation_and_what_came():
    x, y, weight = np.ones((2, 6), np.float32), np.empty((2, 6), np.float32), np.ones(6, np.float32)
    frozen = y.copy()
    frozen.flags.writeable = False
    for arguments, message in [
        ((x.astype(np.float64), y, weight), r"[rms_norm] x: expected float32 or bfloat16, got float64"),
        ((x[0], y, weight), r"[rms_norm] x: expected shape (*, *), got shape (6,)"),
        ((x[:, ::2], y[:, :3], weight[:3]), r"[rms_norm] x: expected unit stride in the last dimension, got stride 2"),
        ((x, y, weight[:5]), r"[rms_norm] weight: expected shape (6,), got shape (5,)"),
        ((x, y, weight[::-1]), r"[rms_norm] weight: expected a contiguous tensor, got other strides"),
        ((x, y[:1], weight), r"[rms_norm] y: expected shape (2, 6), got shape (1, 6)"),
        ((x, y.astype(np.int32), weight), r"[rms_norm] y: expected float32, got int32"),
        ((x, frozen, weight), r"[rms_norm] y: expected writable memory, got read-only memory"),
        ((x, bytes(48), weight), r"[rms_norm] y: expected float32, got uint8"),
    ]:
        with pytest.raises(ArgumentError) as error:
            rms_norm(*arguments)
        assert str(error.value) == message
    assert rms_norm(frozen, y, weight) is y  # read-only inputs are fine


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_no_reference_leaks():
    x, y, weight = np.ones((2, 6), np.float32), np.empty((2, 6), np.float32), np.ones(6, np.float32)
    capsule, raising = Capsule(x), RaisingDlpack()
    watched = [x, y, weight, capsule, raising, np.ndarray, Capsule, RaisingDlpack, None]

    def use():
        rms_norm(x, y, weight)
        describe(x)
        describe(capsule)
        for bad in (None, raising, np.zeros(2, ">f4"), np.zeros((1,) * 9)):
            with pytest.raises(ArgumentError):
                describe(bad)

    use()
    before = [sys.getrefcount(item) for item in watched]
    for _ in range(10_000):
        rms_norm(x, y, weight)
    for _ in range(1_000):
        use()
    after = [sys.getrefcount(item) for item in watched]
    # None is shared by the whole interpreter; 1,000 lost references would show.
    assert after[:-1] == before[:-1]
    assert abs(after[-1] - before[-1]) < 500


def test_memory_is_held_only_during_the_call():
    data = bytearray(64)
    describe(data)
    data.extend(b"x")  # a held buffer would refuse to grow
    grown = array.array("f", [1.0] * 4)
    with pytest.raises(ArgumentError):
        _C.rms_norm_fwd_cpu(grown, None, grown, None, grown, None, 1e-6, 0.0)
    grown.append(2.0)


def test_threads_share_the_module():
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((50, 301)).astype(np.float32) for _ in range(4)]
    expected = [rms_norm(x) for x in inputs]
    failures = []
    start = threading.Barrier(4)

    def work(x, right):
        start.wait()
        for i in range(200):
            if not np.array_equal(rms_norm(x), right):
                failures.append("other bits")
            if i % 10 == 0:
                kind = type(f"Fresh{i}", (Capsule,), {})  # a type that the table of the caster has not seen
                if describe(kind(x))["shape"] != x.shape:
                    failures.append("other shape")

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures
