"""The fused hidden layer against torch's operations in float64."""

import copy

import numpy as np
import pytest
import torch

from scviaduct.models.fused import Values, normalised_and_rectified
from scviaduct.models.nets import BatchNorm, CategoricalLinear, Hidden, HiddenLayer
from scviaduct.models.noise import Noise
from scviaduct.models.scanvi import _PerLabel as PerLabel

NORMS = {"none": (False, False), "batch": (True, False), "layer": (False, True), "both": (True, True)}


def make_layer(norm="batch", p=0.3, categories=(5,), slope=0.0, inputs=7, width=12) -> HiddenLayer:
    batch_norm, layer_norm = NORMS[norm]
    hidden = Hidden(
        n_hidden=width, n_layers=1, dropout_rate=p, batch_norm=batch_norm, layer_norm=layer_norm,
        n_categories=categories, deep=True, labels=True, negative_slope=slope,
    )  # fmt: skip
    layer = HiddenLayer(CategoricalLinear(inputs, width, categories), hidden)
    if batch_norm:
        with torch.no_grad():
            layer.batch_norm.weight.copy_(torch.linspace(-1.0, 2.0, width))  # one is 0 where width is 4
            layer.batch_norm.bias.copy_(torch.linspace(-0.5, 0.5, width))
            layer.batch_norm.running_mean.normal_()
    return layer


def both_ways(layer, x, codes, seeds, labels=1):
    """Output, gradients and running statistics: fused in float32, and by torch's operations in float64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        net, z = copy.deepcopy(layer).to(dtype), x.detach().to(dtype).requires_grad_()
        noise = Noise(seeds) if labels == 1 else PerLabel(Noise(seeds), labels)
        y = net(z, codes, noise)
        fused = y.grad_fn is not None and "_Layer" in y.grad_fn.name()
        assert fused == (dtype == torch.float32 and not (net.batch_norm is not None and net.layer_norm))
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        y.backward(upstream)
        grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "x": z.grad} | grads | dict(net.named_buffers()))
    return results


def assert_equal(ours, expected):
    tolerance = 2e-5 * max(1.0, len(expected["y"]) ** 0.5)  # sums over rows, some of them 0 but for rounding
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(
            ours[name].double(), value.double(), rtol=2e-4, atol=tolerance * (1 + scale), msg=name
        )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("cells", "p", "slope"), [(3, 0.3, 0.0), (33, 0.0, 0.01), (700, 0.5, 0.0), (5000, 0.1, 0.01)])
def test_output_and_gradients_are_torch_s(norm, cells, p, slope):
    layer = make_layer(norm, p, slope=slope)
    codes = [torch.randint(0, 5, (cells,))]
    seeds = np.random.default_rng(cells).integers(0, 2**63, cells).astype(np.uint64)
    assert_equal(*both_ways(layer, torch.randn(cells, 7) * 3 + 2, codes, seeds))


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("categories", [(), (1,), (5, 1, 3)], ids=str)
def test_any_number_of_covariates(norm, categories):
    layer = make_layer(norm, 0.0, categories)
    codes = [torch.randint(0, n, (40,)) for n in categories]
    assert_equal(*both_ways(layer, torch.randn(40, 7), codes, np.arange(40, dtype=np.uint64)))


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize(("cells", "labels"), [(1, 4), (37, 5), (300, 5)])
@pytest.mark.parametrize("per_label", [False, True])
def test_rows_of_a_cell_s_labels(norm, cells, labels, per_label):
    layer = make_layer(norm, 0.4, (labels,))
    codes, seeds = [torch.arange(labels).repeat(cells)], np.arange(cells, dtype=np.uint64)
    x = torch.randn(cells * labels if per_label else cells, 7)
    assert_equal(*both_ways(layer, x, codes, seeds, labels))


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_frozen_and_evaluated_batch_norm_use_the_running_statistics(norm):
    layer = make_layer(norm, 0.0)
    codes, seeds = [torch.randint(0, 5, (20,))], np.arange(20, dtype=np.uint64)
    assert_equal(*both_ways(layer.eval(), torch.randn(20, 7), codes, seeds))
    layer.train()
    if layer.batch_norm is not None:
        layer.batch_norm.frozen = True
    assert_equal(*both_ways(layer, torch.randn(20, 7), codes, seeds))


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("labels", [1, 4])
def test_values_far_from_0_have_the_moments_of_float64(mean, labels):
    h = mean + torch.randn(5000 // labels, 6) * torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0, 0.0])
    h[0, 2], h[:, 3] = mean + 1e4, h[:, 3].sort().values  # the first row is far from the others; rows in order
    added, codes = torch.randn(labels, 6), torch.arange(labels).repeat(len(h))
    norm, expected = BatchNorm(6), BatchNorm(6).double()
    values = Values(h, added, codes)
    y = normalised_and_rectified(values, norm, layer_norm=False, negative_slope=1.0, kept=None)
    exact = expected(Values(h.double(), added.double(), codes).dense())
    torch.testing.assert_close(norm.running_mean.double(), expected.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), expected.running_var, rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(
        y.double(), exact, rtol=1e-4, atol=1e-3
    )  # of the unit without variance: float32's 3e-5 / sqrt(eps)


def test_no_cell_and_one_cell():
    for norm, cells in (("none", 0), ("layer", 0), ("none", 1), ("layer", 1)):
        layer, seeds = make_layer(norm), np.arange(cells, dtype=np.uint64)
        assert_equal(*both_ways(layer, torch.randn(cells, 7), [torch.zeros(cells, dtype=torch.long)], seeds))
    with pytest.raises(ValueError, match="more than one cell"):
        make_layer("batch")(torch.randn(1, 7), [torch.zeros(1, dtype=torch.long)], None)


def test_codes_outside_the_table_are_refused():
    with pytest.raises(IndexError, match="codes up to 5, but 5 categories"):
        make_layer()(torch.randn(2, 7), [torch.tensor([0, 5])], None)


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_threads_do_not_change_the_bits(norm):
    layer, x, codes = make_layer(norm), torch.randn(3000, 7), [torch.randint(0, 5, (3000,))]
    seeds, before, results = np.arange(3000, dtype=np.uint64), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(both_ways(layer, x, codes, seeds)[0])
    torch.set_num_threads(before)
    for name in ("y", "linear.columns.0.weight"):
        assert torch.equal(results[0][name], results[1][name])
