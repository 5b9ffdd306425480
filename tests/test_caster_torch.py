"""The tensor caster on tensors of torch: each trap of the DLPack exchange table is a case here."""

import contextlib
import gc
import sys
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from pyengine import _C  # noqa: E402
from pyengine.errors import ArgumentError  # noqa: E402

describe = _C.describe_tensor

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_shape_strides_and_address(dtype):
    a = torch.zeros(3, 4, 5).to(dtype)
    for view in (a, a.permute(2, 0, 1), a[::2, 1:], a[1, 2, 3], a[:1].expand(7, 4, 5), a.unfold(1, 2, 1)):
        got = describe(view)
        assert got["dtype"] == str(dtype).removeprefix("torch.")
        assert got["shape"] == tuple(view.shape)
        # DLPack lets a dimension of one element have any stride.
        pairs = zip(view.shape, got["strides"], view.stride(), strict=True)
        assert all(n == 1 or stride == expected for n, stride, expected in pairs)
        assert got["address"] == view.data_ptr()
        assert got["read_only"] is False


def test_no_dimension_and_no_element():
    assert describe(torch.tensor(2.0))["shape"] == ()
    for shape in ((0,), (0, 5), (5, 0, 3)):
        assert describe(torch.empty(shape))["shape"] == shape


def test_tensors_that_require_gradients_pass():
    """The caster cannot see the graph: only the ops of pyengine.ops, which know about it, may call `_C`."""
    x = torch.ones(2, 3, requires_grad=True)
    assert describe(x)["address"] == x.data_ptr()
    assert describe(x * 2)["shape"] == (2, 3)


class Subclass(torch.Tensor):
    pass


class Noisy(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("must not be asked")


def test_parameters_and_subclasses_have_tables_of_their_own():
    plain = torch.ones(2, 3)
    for x in (plain, torch.nn.Parameter(plain), torch.nn.Buffer(plain), plain.as_subclass(Subclass)):
        for _ in range(2):  # the second call finds the type in the cache
            assert describe(x)["address"] == plain.data_ptr()
    noisy = plain.as_subclass(Noisy)
    assert describe(noisy)["address"] == plain.data_ptr()


def make_fake(*shape):
    with FakeTensorMode():
        return torch.empty(*shape)


class Wrapper(torch.Tensor):
    """A tensor with a shape and no memory of its own, as quantised and distributed tensors are."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (2, 3), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_conjugate_views_are_refused():
    z = torch.ones(2, 3, dtype=torch.complex64)
    for view in (z, z.conj(), z.conj().resolve_conj()):
        with pytest.raises(ArgumentError, match="Tensor: "):
            describe(view)


def test_negative_views_are_resolved_before_an_op_runs():
    """The sign of such a view is a flag that DLPack does not carry; the dispatcher resolves it, so ops are safe."""
    from pyengine.ops.rms_norm import rms_norm

    view = torch.randn(3, 8, dtype=torch.complex64).conj().imag
    assert view.is_neg()
    assert describe(view)["address"] == view.data_ptr()  # the caster itself sees the memory alone
    weight = torch.ones(8)
    assert torch.equal(rms_norm(view, weight), rms_norm(view.resolve_neg().clone(), weight))
    grads = [
        torch.autograd.grad(rms_norm(x, weight.requires_grad_()).sum(), weight)
        for x in (view, view.resolve_neg().clone())
    ]
    assert torch.equal(grads[0][0], grads[1][0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_fake(2, 3),
        lambda: torch.empty(2, 3, device="meta"),
        lambda: Wrapper(),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.eye(4).to_mkldnn(),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.zeros(2, dtype=torch.complex128),
        lambda: torch.zeros(4, dtype=torch.float8_e4m3fn),
        lambda: torch.zeros([1] * 9),
        lambda: torch.Tensor,
        lambda: torch.float32,
        lambda: torch.Size([2, 3]),
    ],
    ids=[
        "fake",
        "meta",
        "wrapper",
        "sparse_coo",
        "sparse_csr",
        "mkldnn",
        "quantized",
        "nested",
        "complex",
        "float8",
        "nine_dimensions",
        "class",
        "dtype",
        "size",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_memory_are_refused(make):
    source = make()
    with pytest.raises(ArgumentError) as error:
        describe(source)
    message = str(error.value)
    assert message.startswith("tensor: expected a dense tensor or array in memory, got ")
    assert "\n" not in message
    assert len(message) > 70, "the reason is missing"


def test_tensors_of_vmap_are_refused():
    seen = []

    def look(x):
        with pytest.raises(ArgumentError, match="tensor: expected a dense tensor") as error:
            describe(x)
        seen.append(str(error.value))
        return x

    torch.vmap(look)(torch.ones(3, 4))
    assert len(seen) == 1


def test_tensors_of_functorch_gradients_are_never_read_as_other_memory():
    x = torch.ones(3)

    def look(t):
        with contextlib.suppress(ArgumentError, RuntimeError):
            assert describe(t)["address"] in (t.data_ptr(), x.data_ptr())
        return t.sum()

    torch.func.grad(look)(x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_memory_on_another_device_is_refused_by_ops():
    x = torch.ones(2, 3, device="cuda")
    with pytest.raises(ArgumentError, match="expected a tensor on the CPU, got one on cuda:0"):
        _C.rms_norm_fwd_cpu(x, None, x[0], None, x.clone(), None, 1e-6, 0.0)


def test_arrays_and_tensors_mix_in_one_call():
    x, weight = torch.randn(3, 6), torch.ones(6)
    y = np.empty((3, 6), np.float32)
    _C.rms_norm_fwd_cpu(x, None, weight, None, y, None, 1e-6, 0.0)
    torch.testing.assert_close(torch.from_numpy(y), torch.nn.functional.rms_norm(x, (6,), weight, 1e-6))
    for fails in (x.to(torch.int32), make_fake(3, 6), torch.empty(3, 6, device="meta")):
        with pytest.raises(ArgumentError):
            _C.rms_norm_fwd_cpu(fails, None, weight, None, y, None, 1e-6, 0.0)


def test_no_reference_leaks():
    x, y, weight = torch.ones(2, 6), torch.empty(2, 6), torch.nn.Parameter(torch.ones(6))
    fake, meta = make_fake(2, 3), torch.empty(2, 3, device="meta")
    watched = [x, y, weight, fake, meta, torch.Tensor, torch.nn.Parameter, type(fake)]

    def use_bad():
        for bad in (fake, meta):
            with pytest.raises(ArgumentError):
                describe(bad)

    use_bad()
    _C.rms_norm_fwd_cpu(x, None, weight, None, y, None, 1e-6, 0.0)
    gc.collect()  # what earlier tests left
    before = [sys.getrefcount(item) for item in watched]
    for _ in range(10_000):
        _C.rms_norm_fwd_cpu(x, None, weight, None, y, None, 1e-6, 0.0)
    for _ in range(500):
        use_bad()
    gc.collect()
    assert [sys.getrefcount(item) for item in watched] == before


def test_threads_share_an_op():
    from pyengine.ops.rms_norm import rms_norm

    torch.manual_seed(0)
    inputs = [torch.randn(50, 301) for _ in range(4)]
    weight = torch.randn(301)
    expected = [rms_norm(x, weight) for x in inputs]
    failures = []

    def work(x, right):
        for _ in range(100):
            if not torch.equal(rms_norm(x, weight), right):
                failures.append(x)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures
