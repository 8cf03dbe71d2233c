"""Products through oneDNN: as exact as torch's own, in forward and backward, for every layout that a linear layer meets."""

import pytest
import torch
from mrpo_kernels import cpu_linear
from mrpo_kernels.cpu_linear import CpuLinear, fast, fast_product, has_fast_products
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

needs_products = pytest.mark.skipif(
    not has_fast_products(), reason="this CPU or torch has no AVX-512 products in oneDNN"
)


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


@needs_products
@pytest.mark.parametrize(("m", "i", "o"), [(1, 64, 64), (37, 576, 192), (130, 48, 2049)])
def test_products_are_as_exact_as_torchs(m, i, o):
    generator = torch.Generator().manual_seed(0)
    a, b, bias = (torch.randn(*shape, generator=generator) for shape in ((m, i), (o, i), (o,)))
    exact = a.double() @ b.double().t() + bias.double()
    eager = error(torch.addmm(bias, a, b.t()), exact)
    assert error(fast_product(a, b, bias), exact) <= 3 * eager + 1e-7
    # Transposed views are read as what they are.
    assert error(fast_product(a.t().contiguous().t(), b.t().contiguous().t(), bias), exact) <= 3 * eager + 1e-7


@needs_products
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("smallest", [0, cpu_linear.SMALLEST], ids=["onednn", "too small for it"])
def test_a_layer_and_its_gradients_equal_float64(bias, frozen, smallest, monkeypatch):
    monkeypatch.setattr(cpu_linear, "SMALLEST", smallest)
    products = []
    monkeypatch.setattr(cpu_linear, "fast_product", lambda *args: products.append(1) or fast_product(*args))
    torch.manual_seed(0)
    layer = nn.Linear(33, 65, bias=bias)
    exact = nn.Linear(33, 65, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    layer.__class__ = CpuLinear
    layer.weight.requires_grad_(not frozen)
    x = torch.randn(2, 19, 33, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    up = torch.randn(2, 19, 65)
    # Called twice and recomputed, as under gradient checkpointing: gradients add up.
    y = checkpoint(layer, x, use_reentrant=False) + layer(x)
    y64 = 2 * exact(x64)
    (y * up).sum().backward()
    (y64 * up.double()).sum().backward()
    assert len(products) == (0 if smallest else 3 + 2 * (1 if frozen else 2)), (
        "two forwards, one again; then per call x and weight"
    )
    assert error(y, y64) < 1e-6
    assert error(x.grad, x64.grad) < 1e-6
    if frozen:
        assert layer.weight.grad is None
    else:
        assert error(layer.weight.grad, exact.weight.grad) < 1e-6
    if bias:
        assert error(layer.bias.grad, exact.bias.grad) < 1e-6


@needs_products
@pytest.mark.parametrize("smallest", [0, cpu_linear.SMALLEST], ids=["onednn", "too small for it"])
@pytest.mark.parametrize("shape", [(38, 33), (2, 19, 33)], ids=str)
def test_a_model_may_change_the_output_in_place(shape, smallest, monkeypatch):
    """As Gemma 3n and Llama 4 do: no copy, and no view of what autograd does not know."""
    monkeypatch.setattr(cpu_linear, "SMALLEST", smallest)
    torch.manual_seed(0)
    layer = nn.Linear(33, 65)
    x = torch.randn(*shape, requires_grad=True)
    expected = torch.autograd.grad(((layer(x) * 3 + x.sum()) ** 2).sum(), [x, *layer.parameters()])
    layer.__class__ = CpuLinear
    y = layer(x)
    assert not y._is_view() and y.shape == (*shape[:-1], 65)
    y *= 3
    y += x.sum()
    got = torch.autograd.grad((y**2).sum(), [x, *layer.parameters()])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@needs_products
@pytest.mark.parametrize("smallest", [0, cpu_linear.SMALLEST], ids=["onednn", "too small for it"])
def test_their_work_is_counted(smallest, monkeypatch):
    monkeypatch.setattr(cpu_linear, "SMALLEST", smallest)
    layer = nn.Linear(33, 65)
    layer.__class__ = CpuLinear
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(2, 19, 33, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 38 * 33 * 65


def test_everything_else_is_torchs_own():
    """No rows, other dtypes, autocast: the layer is ``nn.Linear``."""
    layer = nn.Linear(8, 4)
    expected = layer(torch.ones(3, 8))
    layer.__class__ = CpuLinear
    assert layer(torch.ones(0, 8)).shape == (0, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fast(torch.ones(3, 8))
        assert layer(torch.ones(3, 8)).dtype == torch.bfloat16
    assert not fast(torch.ones(3, 8, dtype=torch.float64))
    assert not fast(torch.ones(3, 8, device="meta"))
    torch.testing.assert_close(layer.double()(torch.ones(3, 8).double()), expected.double())
