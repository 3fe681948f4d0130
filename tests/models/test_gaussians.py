"""Draws and densities by kernels against torch's operations in float64."""

import numpy as np
import pytest
import torch

from scviaduct.models.gaussians import draw_and_kl, log_density
from scviaduct.models.noise import Noise

SHAPES = [(1, 1, 1), (5, 3, 2), (40, 16, 30), (0, 4, 3)]


def both_ways(function, *tensors):
    """Results and gradients in float32 and in float64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [t.to(dtype).requires_grad_() for t in tensors]
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(o.shape, generator=generator).to(dtype) for o in outputs]
        grads = torch.autograd.grad(outputs, inputs, weights, allow_unused=True)
        results.append([*outputs, *(g for g in grads if g is not None)])
    return results


def assert_close(ours, expected):
    for a, b in zip(ours, expected, strict=False):  # torch differentiates by the noise as well
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * (1.0 + float(b.detach().abs().sum() > 0)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_draw_and_kl(shape, eps, scale):
    parts = scale * torch.randn(*shape[:-1], 2 * shape[-1])
    assert_close(*both_ways(lambda p, e: draw_and_kl(p, e, eps), parts, torch.randn(shape)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("per_label", [False, True])
def test_log_density(shape, eps, per_label):
    parts, z = torch.randn(*shape[:-1], 2 * shape[-1]), torch.randn(shape if per_label else (shape[0], shape[2]))
    assert_close(*both_ways(lambda p, x: log_density(p, x, eps), parts, z))


def test_normal_numbers_are_box_s_and_muller_s():
    seeds = np.arange(500, dtype=np.uint64)
    u = Noise(seeds).uniform(64).double()
    radius, angle = torch.sqrt(-2.0 * torch.log(u[:, 0::2])), 2.0 * torch.pi * u[:, 1::2]
    expected = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 2).flatten(1)
    torch.testing.assert_close(Noise(seeds).normal(64).double(), expected, rtol=1e-6, atol=1e-6)
