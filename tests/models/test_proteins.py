"""totalVI's losses of proteins by the kernel against torch's operations in float64."""

import pytest
import torch

from scviaduct.models.proteins import Proteins, losses


def make_said(cells, proteins, *, per_cell, scale) -> list[torch.Tensor]:
    shapes = [(cells, proteins)] * 8
    if not per_cell:
        shapes[5] = (proteins,)
    return [scale * torch.randn(shape) for shape in shapes]


@pytest.mark.parametrize(("cells", "proteins"), [(1, 1), (40, 7), (0, 3)])
@pytest.mark.parametrize("per_cell", [False, True])
@pytest.mark.parametrize("exp_std", [False, True])
@pytest.mark.parametrize(("scale", "largest"), [(1.0, 50), (2.0, 20_000)])
def test_losses_and_gradients_are_torch_s(cells, proteins, per_cell, exp_std, scale, largest):
    said = make_said(cells, proteins, per_cell=per_cell, scale=scale)
    y, noise = torch.randint(0, largest, (cells, proteins)), torch.randn(cells, proteins)
    y[:, ::3] = 0
    seen, results = torch.rand(cells, proteins) < 0.7, []
    for dtype in (torch.float32, torch.float64):
        inputs = [t.to(dtype).requires_grad_() for t in said]
        out = losses(Proteins(*inputs, exp_std), y.to(dtype), seen, noise.to(dtype))
        if cells:
            results.append([*out, *torch.autograd.grad(0.37 * out.mean, inputs)])
        else:
            results.append([out.likelihood, out.kl])
    for ours, expected in zip(*results, strict=True):
        largest_value = float(expected.detach().abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6 * (1.0 + largest_value))
