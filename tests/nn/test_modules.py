import pytest

torch = pytest.importorskip("torch")

from pyengine.nn import Embedding, LayerNorm, Linear, PlainMlp, RMSNorm, SwiGluMlp  # noqa: E402
from pyengine.testing import assert_accurate, assert_same_bits, force_num_threads  # noqa: E402

pytestmark = pytest.mark.train


def filled(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def test_embedding_equals_torch_and_rounds_the_gradient_once():
    """A token that comes 1000 times: adding up in bfloat16 would stop at 256."""
    ids = torch.tensor([3] * 1000 + [1, 0, 3])
    for dtype in (torch.float32, torch.bfloat16):
        module = filled(Embedding(5, 4, dtype=dtype))
        y = module(ids)
        assert_same_bits(y, module.weight[ids])
        y.backward(torch.ones_like(y))
        assert module.weight.grad.dtype == dtype
        expected = torch.tensor([1.0, 1.0, 0.0, 1001.0, 0.0])[:, None].expand(5, 4)
        assert torch.equal(module.weight.grad, expected.to(dtype))


def test_embedding_gradient_has_the_same_bits_for_any_number_of_threads():
    ids, grad = torch.randint(50, (4000,)), torch.randn(4000, 33)
    module = filled(Embedding(50, 33))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with force_num_threads(count):
                module.weight.grad = None
                module(ids).backward(grad)
                results.append(module.weight.grad)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_embedding_of_an_unknown_id():
    with pytest.raises(IndexError, match="out of range"):
        filled(Embedding(5, 4))(torch.tensor([5]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_and_mlp_equal_torch(dtype):
    torch.manual_seed(0)
    x = torch.randn(7, 24)
    linear, mlp = filled(Linear(24, 10)), filled(SwiGluMlp(24, 40))

    def mlp_of(x, weights):
        gate, up, down = weights
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    with torch.no_grad():
        exact = x.to(dtype).double() @ linear.weight.to(dtype).double().T
        got = linear.to(dtype)(x.to(dtype))
        assert_accurate(got, exact, torch.nn.functional.linear(x.to(dtype), linear.weight))
        weights = [p.weight.to(dtype) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        exact = mlp_of(x.to(dtype).double(), [weight.double() for weight in weights])
        assert_accurate(mlp.to(dtype)(x.to(dtype)), exact, mlp_of(x.to(dtype), weights))


def test_rms_norm_adds_the_residual():
    x, residual = torch.randn(3, 16), torch.randn(3, 16)
    norm = filled(RMSNorm(16, eps=1e-5))
    y, h = norm(x, residual)
    assert_same_bits(h, x + residual)
    assert_same_bits(y.detach(), norm(h)[0].detach())
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(h, (16,), norm.weight, 1e-5))


def test_parameter_names():
    assert list(SwiGluMlp(4, 8).state_dict()) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    assert "in_features=24, out_features=10" in repr(Linear(24, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_equals_torch(dtype, bias):
    torch.manual_seed(0)
    module, x, residual = filled(LayerNorm(24, eps=1e-3, bias=bias)), torch.randn(7, 24), torch.randn(7, 24)

    def peer(x, residual, to):
        weight, shift = (None if p is None else p.detach().to(to) for p in (module.weight, module.bias))
        h = x.to(to) + residual.to(to)
        return torch.nn.functional.layer_norm(h, (24,), weight / 2, None if shift is None else shift, 1e-3), h

    x, residual = x.to(dtype), residual.to(dtype)
    module = module.to(dtype)
    y, h = module(x, residual, weight_divisor=2.0)
    assert_same_bits(h, x + residual)
    assert_accurate(y, peer(h, torch.zeros_like(h), torch.float64)[0], peer(h, torch.zeros_like(h), dtype)[0])
    assert_same_bits(module(h)[0], module(x, residual)[0])
    assert set(dict(module.named_parameters())) == ({"weight", "bias"} if bias else {"weight"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("activation", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_plain_mlp_equals_torch(dtype, activation, approximate):
    torch.manual_seed(0)
    mlp, x = filled(PlainMlp(24, 40, activation=activation, bias=True)).to(dtype), torch.randn(7, 24).to(dtype)

    def peer(to):
        up, down = ((p.weight.detach().to(to), p.bias.detach().to(to)) for p in (mlp.up_proj, mlp.down_proj))
        hidden = torch.nn.functional.gelu(torch.nn.functional.linear(x.to(to), *up), approximate=approximate)
        return torch.nn.functional.linear(hidden, *down)

    assert_accurate(mlp(x), peer(torch.float64), peer(dtype))
