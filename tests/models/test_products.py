import pytest
import torch
import torch.nn.functional as F

from scviaduct.models import products
from scviaduct.models.nets import Linear
from scviaduct.models.products import large_linear, times_transposed, wide_linear


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("shape", [(128, 223, 1000), (1, 7, 5), (0, 7, 5), (3, 1, 1)])
def test_products_are_those_of_float64(monkeypatch, shape, onednn):
    if not onednn:
        monkeypatch.setattr("scviaduct.models.products._ONEDNN", None)
    n, k, m = shape
    x, w = torch.randn(n, k), torch.randn(m, k)
    for a, b in ((x, w), (x.T.contiguous().T, w.T.contiguous().T)):
        wide = (a.double() @ b.double().T).float()
        torch.testing.assert_close(times_transposed(a, b), wide, rtol=1e-5, atol=1e-5 * k**0.5)


@pytest.mark.parametrize("shape", [(70, 30, 9000), (90, 30, 60), (90, 60, 30), (1, 3, 5), (0, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", [wide_linear, large_linear])
def test_a_layer_has_the_gradients_of_torch_s(layer, shape, bias):
    n, k, width = shape
    tensors = [torch.randn(n, k), torch.randn(width, k)] + [torch.randn(width)] * bias
    slopes = torch.randn(n, width)
    ours, wide = ([t.clone().to(d).requires_grad_() for t in tensors] for d in (torch.float32, torch.float64))
    y = layer(*ours) if bias else layer(*ours, None)
    expected = F.linear(*wide)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    y.backward(slopes)
    expected.backward(slopes.double())
    for a, b in zip(ours, wide, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-3)


def test_layers_of_many_outputs_are_wide_layers(monkeypatch):
    monkeypatch.setattr(products, "WIDE", 8)
    layer, x = Linear(3, 8), torch.randn(5, 3)
    assert "WideLinear" in type(layer(x).grad_fn).__name__
    assert "WideLinear" not in type(Linear(3, 7)(x).grad_fn).__name__
    assert "WideLinear" not in type(layer.double()(x.double()).grad_fn).__name__
    with torch.autocast("cpu", torch.bfloat16):
        assert "WideLinear" not in type(layer.float()(x).grad_fn).__name__


def test_large_products_are_large_layers(monkeypatch):
    monkeypatch.setattr(products, "LARGE", 5 * 3 * 8)
    layer, x = Linear(3, 8), torch.randn(5, 3)
    assert "LargeLinear" in type(layer(x).grad_fn).__name__
    assert "LargeLinear" not in type(layer(x[1:]).grad_fn).__name__
    assert "LargeLinear" not in type(layer.double()(x.double()).grad_fn).__name__


@pytest.mark.parametrize("layer", [wide_linear, large_linear])
def test_only_wanted_gradients_of_a_layer_are_made(layer):
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3)
    layer(x, weight, None).sum().backward()
    assert x.grad is not None and weight.grad is None
